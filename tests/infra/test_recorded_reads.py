"""Arguments of a network of which only the values that its constructor reads are stored.

An example is a data set, whose own constructor reads a file that a bundle does not have. A bundle
stores the *reads* of such an argument: the attributes, items and results of calls that the
network's constructor used. The networks are in ``tests/recorded_models.py``.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import recorded_models
from error_codes import raises_code

from compressors.contracts import READS, Architecture
from compressors.core.state.argument_values import decode_arguments, register_argument_classes
from compressors.core.state.construction import construct
from compressors.errors.construction import ConstructionFailed
from infra.bundle.architecture import argument_classes
from infra.bundle.live_model import describe_architecture, import_network
from infra.errors import DraftRefused

MODULE = "recorded_models"
# ``num`` returns the number of different values of a column, and one more for padding.
READS_OF_ROWS: dict[str, Any] = {
    "attributes": {
        "num": {
            READS: {
                "calls": [
                    {"arguments": ["user"], "keywords": {"padding": True}, "value": 4},
                    {"arguments": ["item"], "keywords": {"padding": True}, "value": 3},
                ]
            }
        },
        "settings": {"hidden": [6], "activation": {"$class": "torch.nn:Tanh"}},
    },
    "items": {"user": ["1", "2", "3"]},
    "contains": {"user": True, "item": True},
}


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the data set, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    path = tmp_path / recorded_models.ROWS
    path.write_text("user,item\n1,4\n2,4\n3,5\n")
    return path


def describe(name: str) -> Architecture:
    """Return class and arguments of a network in ``recorded_models``, as a bundle stores them."""
    return describe_architecture(*import_network(f"{MODULE}:{name}", (MODULE,)))


@pytest.mark.parametrize("name", ["reading", "copied"])
def test_object_that_reads_a_file_or_was_not_constructed_is_described_by_reads(name: str) -> None:
    assert describe(name).config == {"rows": {READS: READS_OF_ROWS}, "dim": 4}


def test_network_is_built_from_recorded_reads_without_the_file(rows: Path) -> None:
    trained, calls = import_network(f"{MODULE}:reading", (MODULE,))
    architecture = describe_architecture(trained, calls)
    rows.unlink()
    register_argument_classes(argument_classes(architecture.argument_classes, ()))
    built = construct(type(trained), architecture.config).module
    assert str(built) == str(trained)
    assert (built.first_user, built.name) == ("1", "unknown")


def test_value_that_only_python_can_use_is_refused_with_its_place() -> None:
    place = "AveragingNet(rows).matrix()"
    with raises_code(DraftRefused, "read_not_stored", place=place, kind="Tensor"):
        describe("averaging")


def test_read_that_was_not_recorded_raises_what_the_object_would_raise() -> None:
    rows = decode_arguments({"rows": {READS: READS_OF_ROWS}})["rows"]
    assert rows.num("item", padding=True) == 3
    assert not hasattr(rows, "matrix")
    with pytest.raises(KeyError, match="'item'"):
        rows["item"]
    with pytest.raises(KeyError, match="contains 'age'"):
        "age" in rows  # noqa: B015
    with pytest.raises(TypeError, match="got a call"):
        rows.num("item")
    with pytest.raises(TypeError, match="not iterable"):
        iter(rows)


def test_recorded_object_can_be_copied() -> None:
    rows = decode_arguments({"rows": {READS: READS_OF_ROWS}})["rows"]
    assert copy.deepcopy(rows).num("user", padding=True) == 4


@pytest.mark.parametrize(
    "value",
    [{READS: {"lengths": 3}}, {READS: {}, "more": 1}, {READS: {"calls": [{"arguments": []}]}}],
    ids=["kind", "key", "call without value"],
)
def test_malformed_reads_raise(value: dict[str, Any]) -> None:
    with raises_code(ConstructionFailed, "reads_form"):
        decode_arguments({"rows": value})
