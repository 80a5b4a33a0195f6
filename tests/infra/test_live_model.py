"""Description of a trained network's class and arguments, recorded while it is constructed.

``import_network`` runs a function or imports a variable of a user's module, and returns the network
and the recorded calls of constructors. An object is described by its class and its arguments;
``$class`` without ``$arguments`` is the class itself. A draft is the folder that becomes a bundle
when it is packed.
"""

import copy
import sys

import new_draft_models
import pytest
import torch
from error_codes import TextMatching, raises_code
from torch import nn

from compressors.contracts import Architecture
from compressors.core.state.argument_values import decode_arguments, register_argument_classes
from compressors.errors.construction import ConstructionFailed
from infra.bundle.architecture import argument_classes, network_class
from infra.bundle.live_model import class_path, describe_architecture, import_network
from infra.errors import BundleRefused, DraftRefused

ALLOWED = ("new_draft_models",)
MODULE = "new_draft_models"


def describe(name: str) -> Architecture:
    """Import a network of ``new_draft_models`` and describe it.

    ``import_network`` records only the constructors that run during its call, so it has to execute
    the module again.
    """
    return describe_architecture(*import_network(f"{MODULE}:{name}", ALLOWED))


@pytest.fixture(autouse=True)
def not_imported(monkeypatch):
    """Remove the module from ``sys.modules``, so that each test imports it again."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)


def test_description_has_class_and_arguments_of_objects_and_omits_default_values():
    assert describe("shop") == Architecture(
        path="new_draft_models:ShopNet",
        config={
            "settings": {
                "$class": "new_draft_models:Settings",
                "$arguments": {
                    "columns": [
                        {
                            "$class": "new_draft_models:Column",
                            "$arguments": {"name": "user", "rows": 40},
                        },
                        {
                            "$class": "new_draft_models:Column",
                            "$arguments": {"name": "item", "rows": 30},
                        },
                    ],
                    "pooling": {
                        "$class": "new_draft_models:Pooling",
                        "$arguments": {"value": "mean"},
                    },
                },
            },
            "activation": {"$class": "torch.nn:LeakyReLU", "$arguments": {"negative_slope": 0.2}},
            "norm": {"$class": "torch.nn:LayerNorm"},
        },
    )


def test_network_built_from_its_description_has_the_same_layers():
    architecture = describe("shop")
    register_argument_classes(argument_classes(architecture.argument_classes, ALLOWED))
    built = network_class(architecture.path, ALLOWED)(**decode_arguments(architecture.config))
    assert str(built) == str(new_draft_models.shop())
    assert built.activation.negative_slope == 0.2


def test_variable_constructed_while_its_module_is_imported_is_described():
    assert describe("tied") == Architecture(path="new_draft_models:TiedNet")


def test_prints_of_the_imported_code_go_to_standard_error(capsys):
    import_network(f"{MODULE}:print_and_return", ALLOWED)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "epoch 1\n")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("absent", "model_missing"),
        ("ShopNet", "model_is_class"),
        ("number", "model_no_network"),
        ("fails", "model_function_failed"),
    ],
)
def test_import_of_something_else_than_a_network_raises(name, code):
    with raises_code(DraftRefused, code, path=f"{MODULE}:{name}"):
        import_network(f"{MODULE}:{name}", ALLOWED)


def test_import_from_a_module_that_is_not_allowed_raises_before_it_runs():
    with raises_code(BundleRefused, "architecture_not_allowed", module=MODULE):
        import_network(f"{MODULE}:shop", ("examples",))
    assert MODULE not in sys.modules


def test_function_as_argument_raises_with_its_place():
    with raises_code(DraftRefused, "argument_not_stored", place="FunctionNet(activation)"):
        describe("function")


@pytest.fixture
def catalog(tmp_path, monkeypatch):
    """A module ``catalog_model`` that creates objects of the module ``catalog_settings``."""
    (tmp_path / "catalog_settings.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass Settings:\n    dim: int = 3\n"
        "\nclass Rows:\n    def __init__(self):\n        self.values = bytearray(10)\n"
    )
    (tmp_path / "catalog_model.py").write_text(
        "from torch import nn\nfrom catalog_settings import Rows, Settings\n\n"
        "class Net(nn.Module):\n    def __init__(self, settings):\n        super().__init__()\n"
        "\ndef trained():\n    Rows()\n    return Net(Settings(4))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("catalog_model", "catalog_settings"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("catalog")
def test_argument_of_a_module_that_is_not_allowed_raises_with_the_setting():
    network, calls = import_network("catalog_model:trained", ("catalog_model",))
    setting = "catalog_model,catalog_settings"
    with raises_code(BundleRefused, "architecture_not_allowed", setting=setting):
        describe_architecture(network, calls)


@pytest.mark.usefixtures("catalog")
def test_only_layers_and_objects_of_allowed_modules_are_kept_in_memory():
    allowed = ("catalog_model", "catalog_settings")
    network, calls = import_network("catalog_model:trained", allowed)
    recorded = {type(value).__name__ for value, _ in calls.arguments.values()}
    assert recorded == {"Net", "Settings", "Rows"}
    assert describe_architecture(network, calls).config == {
        "settings": {"$class": "catalog_settings:Settings", "$arguments": {"dim": 4}}
    }
    _, calls = import_network("catalog_model:trained", ("catalog_model",))
    assert {type(value).__name__ for value, _ in calls.arguments.values()} == {"Net"}


def test_copied_network_raises_because_its_arguments_are_unknown():
    network, calls = import_network(f"{MODULE}:tied", ALLOWED)
    with raises_code(DraftRefused, "model_not_constructed", architecture=TextMatching("TiedNet")):
        describe_architecture(copy.deepcopy(network), calls)


def test_class_defined_in_a_function_has_no_path():
    class Inner(nn.Module):
        pass

    with raises_code(DraftRefused, "class_not_importable", name=TextMatching("Inner")):
        class_path(Inner)


def test_argument_class_of_another_module_raises_before_it_is_imported():
    with raises_code(BundleRefused, "architecture_not_allowed", module="subprocess"):
        argument_classes(("subprocess:Popen",), ALLOWED)


def test_only_layers_of_torch_are_allowed_without_the_allow_list():
    assert argument_classes(("torch.nn:ReLU",), ()) == {"torch.nn:ReLU": torch.nn.ReLU}
    with raises_code(BundleRefused, "architecture_not_allowed", module="torch.nn"):
        argument_classes(("torch.nn:Parameter",), ())


def test_decoding_uses_no_class_that_was_not_registered():
    with raises_code(ConstructionFailed, "argument_class_unknown", path="pathlib:Path"):
        decode_arguments({"folder": [{"$class": "pathlib:Path", "$arguments": {}}]})


@pytest.mark.parametrize(
    "value",
    [{"$class": "a:B", "more": 1}, {"$class": "a:B", "$arguments": [1]}],
    ids=["further key", "list of arguments"],
)
def test_decoding_a_malformed_description_raises(value):
    with raises_code(ConstructionFailed, "argument_form"):
        decode_arguments({"settings": value})


def test_arguments_that_are_changed_later_are_described_as_the_constructor_received_them():
    assert describe("changed").config == {
        "widths": [3],
        "settings": {"$class": "new_draft_models:Width", "$arguments": {"dim": 8}},
        "level": {"$class": "new_draft_models:Level", "$arguments": {"value": 2}},
    }


def test_variable_arguments_raise():
    with raises_code(DraftRefused, "argument_not_stored", place="AnyArguments(*widths)"):
        describe("any_arguments")
