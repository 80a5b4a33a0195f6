"""Import of network classes from allow-listed modules, and the digest of their source code.

The tests write a package ``shopnets`` to a temporary folder.
"""

import sys
import textwrap

import pytest
import torch
from error_codes import raises_code

from infra.bundle.architecture import network_class, source_digest
from infra.errors import BundleRefused

ALLOWED = ("shopnets",)

NETWORK = """
    import os
    from json import JSONDecoder
    from torch import nn
    from torch.nn import Linear
    from shopnets.layers import Cross

    helper = os.getcwd

    class Ranker(nn.Module):
        pass
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``shopnets``; its modules are removed from ``sys.modules`` afterwards."""
    folder = tmp_path / "shopnets"
    folder.mkdir()
    write(folder / "__init__.py", "")
    write(folder / "ranker.py", NETWORK)
    write(folder / "layers.py", "from torch import nn\n\nclass Cross(nn.Module):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("shopnets", "shopnets2"):
            del sys.modules[name]


def write(path, source):
    """Write Python source without its common indentation; return the path."""
    path.write_text(textwrap.dedent(source))
    return path


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("allowed", [("shopnets",), ("x", "shopnets.ranker")])
def test_network_class_imports_an_allowed_class(allowed):
    network = network_class("shopnets.ranker:Ranker", allowed)
    assert issubclass(network, torch.nn.Module)
    assert network.__name__ == "Ranker"


def test_import_of_a_network_class_does_not_change_whether_torch_detects_anomalies(package):
    write(
        package / "slow.py",
        NETWORK + "    import torch\n    torch.autograd.set_detect_anomaly(True)\n",
    )
    network_class("shopnets.slow:Ranker", ("shopnets",))
    assert not torch.is_anomaly_enabled()


@pytest.mark.usefixtures("package")
def test_class_that_an_allowed_module_imports_from_an_allowed_module_is_accepted():
    assert network_class("shopnets.ranker:Cross", ALLOWED).__module__ == "shopnets.layers"


def test_module_that_is_not_allowed_is_refused_without_an_import(tmp_path, monkeypatch):
    raising_module = write(tmp_path / "shopnets2.py", "raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("shopnets2:Ranker", "shopnets2.below:Ranker"):
        for function in (network_class, source_digest):
            module = name.partition(":")[0]
            setting = f"shopnets,{module}"
            with raises_code(BundleRefused, "architecture_not_allowed", setting=setting) as refusal:
                function(name, ALLOWED)
            assert f"RECPRESS_ALLOWED_MODULES={setting}" in str(refusal.value)
    assert raising_module.stem not in sys.modules


def test_empty_allow_list_refuses_every_module():
    # The error shows an empty list as the word "nothing".
    with raises_code(BundleRefused, "architecture_not_allowed", allowed=("nothing",)):
        network_class("shopnets.ranker:Ranker", ())


@pytest.mark.parametrize(
    "path",
    [
        "shopnets.ranker",
        "shopnets.ranker:Ranker.forward",
        "shopnets:os.system",
        "shopnets:os.system('true')",
        "shopnets..ranker:Ranker",
        ".shopnets:Ranker",
        "../shopnets:Ranker",
        "shopnets/ranker.py:Ranker",
        "shopnets:Ranker\n",
        "shopnets:",
        ":Ranker",
        "",
    ],
)
@pytest.mark.parametrize("function", [network_class, source_digest])
def test_path_of_another_form_than_module_and_class_is_refused(path, function):
    with raises_code(BundleRefused, "architecture_form", path=path):
        function(path, ALLOWED)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("path", "code", "fields"),
    [
        ("shopnets.rankers:Ranker", "module_missing", {"module": "shopnets.rankers"}),
        ("shopnets.ranker.deep:Ranker", "module_missing", {"module": "shopnets.ranker.deep"}),
        ("shopnets.ranker:Rankers", "class_missing", {"name": "Rankers", "classes": ("Ranker",)}),
        ("shopnets.ranker:os", "no_class", {"kind": "module"}),
        ("shopnets.ranker:helper", "no_class", {"kind": "builtin_function_or_method"}),
        ("shopnets.ranker:JSONDecoder", "no_module_class", {}),
        ("shopnets.ranker:Linear", "defined_elsewhere", {"module": "torch.nn.modules.linear"}),
    ],
)
def test_value_that_is_not_a_network_class_of_an_allowed_module_is_refused(path, code, fields):
    with raises_code(BundleRefused, f"architecture_{code}", path=path, **fields):
        network_class(path, ALLOWED)


@pytest.mark.parametrize(
    ("source", "code", "fields"),
    [
        ("import nowhere_to_be_found", "dependency_missing", {"missing": "nowhere_to_be_found"}),
        (
            "raise RuntimeError('no license')",
            "import_failed",
            {"kind": "RuntimeError", "problem": "no license"},
        ),
        ("raise SystemExit(3)", "import_failed", {"kind": "SystemExit", "problem": "3"}),
        ("class Ranker(", "import_failed", {"kind": "SyntaxError"}),
    ],
)
def test_refusal_of_a_module_that_cannot_be_imported_contains_the_reason(
    package, source, code, fields
):
    write(package / "broken.py", source)
    with raises_code(BundleRefused, f"architecture_{code}", module="shopnets.broken", **fields):
        network_class("shopnets.broken:Ranker", ALLOWED)


@pytest.mark.usefixtures("package")
def test_network_class_does_not_call_the_getattr_of_a_module(package):
    write(package / "lazy.py", "def __getattr__(name):\n    raise RuntimeError(name)\n")
    with raises_code(BundleRefused, "architecture_without_classes", name="Ranker"):
        network_class("shopnets.lazy:Ranker", ALLOWED)


@pytest.mark.parametrize("edited", ["ranker.py", "layers.py", "deep/blocks.py"])
def test_source_digest_changes_with_every_source_file_of_the_package(package, edited):
    (package / "deep").mkdir()
    write(package / "deep" / "blocks.py", "width = 1\n")
    before = source_digest("shopnets.ranker:Ranker", ALLOWED)
    assert source_digest("shopnets.ranker:Ranker", ALLOWED) == before
    write(package / edited, "width = 2\n")
    assert source_digest("shopnets.ranker:Ranker", ALLOWED) != before


def test_source_digest_changes_when_a_file_is_renamed(package):
    write(package / "one.py", "width = 1\n")
    before = source_digest("shopnets:Ranker", ALLOWED)
    (package / "one.py").rename(package / "onf.py")  # the order of the files does not change
    assert source_digest("shopnets:Ranker", ALLOWED) != before


def test_source_digest_covers_folders_without_init_file_and_imports_nothing(package):
    (package / "__init__.py").unlink()
    (package / "nested").mkdir()
    write(package / "nested" / "ranker.py", NETWORK)
    before = source_digest("shopnets.nested.ranker:Ranker", ALLOWED)
    write(package / "nested" / "layers.py", "")
    assert source_digest("shopnets.nested.ranker:Ranker", ALLOWED) != before
    assert "shopnets" not in sys.modules


def test_source_digest_covers_the_packages_of_argument_classes(package, tmp_path):
    """An argument class is a class whose objects are arguments of the network."""
    write(tmp_path / "shopnets2.py", "class Settings:\n    pass\n")
    allowed = ("shopnets", "shopnets2")
    path, arguments = "shopnets.ranker:Ranker", ("shopnets2:Settings",)
    before = source_digest(path, allowed, arguments)
    assert (
        before != source_digest(path, allowed) == source_digest(path, allowed, ("torch.nn:ReLU",))
    )
    write(tmp_path / "shopnets2.py", "class Settings:\n    dim = 3\n")
    assert source_digest(path, allowed, arguments) != before


def test_source_digest_imports_no_module(package):
    write(package / "__init__.py", "raise RuntimeError('imported')\n")
    assert len(source_digest("shopnets.ranker:Ranker", ALLOWED)) == 64
    assert "shopnets" not in sys.modules


def test_source_digest_of_a_module_outside_a_package_covers_only_its_file(tmp_path, monkeypatch):
    write(tmp_path / "shopnets.py", "width = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = source_digest("shopnets:Ranker", ALLOWED)
    write(tmp_path / "neighbour.py", "width = 1\n")
    assert source_digest("shopnets:Ranker", ALLOWED) == before
    write(tmp_path / "shopnets.py", "width = 2\n")
    assert source_digest("shopnets:Ranker", ALLOWED) != before


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("module", "allowed", "code"),
    [
        ("shopnets.gone", ("shopnets",), "architecture_module_missing"),
        ("shopnets.ranker.deep", ("shopnets",), "architecture_module_missing"),
        ("gone_altogether", ("gone_altogether",), "architecture_module_missing"),
        ("builtins", ("builtins",), "architecture_source_missing"),
    ],
)
def test_source_digest_without_a_source_file_is_refused(module, allowed, code):
    with raises_code(BundleRefused, code, module=module):
        source_digest(f"{module}:Ranker", allowed)
