"""The command a report shows gives the order the report is of, or the order is shown as a file."""

import json
import shlex
from typing import Any

import pytest

from compressors.contracts import Artifact, Limit
from compressors.quantize.dense.float16 import Float16
from flows.cli import orders
from flows.order import Order
from flows.resolve import order_digest
from flows.terms import Targets, Terms
from infra.data.checks import Rules
from tasks.bundles.bundle_ref import BundleRef

LIMIT = Limit(metric="auc", against="baseline", at_least=-0.002)
ORDER = Order(model="clicks@1", limits=(LIMIT,))
SUBJECT = BundleRef(
    artifact=Artifact(uri="file:///s/artifacts/a", sha256="a" * 64, bytes=1),
    name="clicks",
    version="1",
    metric="auc",
    rows={"train": 10, "test": 10},
    longest={},
    task="ctr",
    grouped=False,
    architecture="b" * 64,
)


def changed(**fields: object) -> Order:
    return Order.model_validate(ORDER.model_dump() | fields)


def read_by_the_command_line(command: str) -> Terms:
    """The terms that ``recpress compress`` makes of a command a report shows."""
    program, name, model, *options = shlex.split(command.replace("\\\n", ""))
    assert (program, name) == ("recpress", "compress")
    given: dict[str, list[str]] = {}
    for option, value in zip(options[::2], options[1::2], strict=True):
        given.setdefault(option.removeprefix("--"), []).append(value)
    (preset,), (seed,) = given["preset"], given.get("seed", ["0"])
    targets, optional = given.get("target", []), given.get("optional", [])
    return orders.terms(
        model,
        preset,
        given["limit"],
        targets,
        optional,
        False,
        int(seed),
        teacher=given.get("teacher"),
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"preset": "small", "seed": 7},
        {"targets": Targets(tensorrt_rtx="required", tensorrt="optional")},
        {"targets": Targets(onnxruntime="optional", tensorrt_rtx="required")},
        {"targets": Targets(onnxruntime="optional", tensorrt_rtx="optional")},
        {"limits": (LIMIT, Limit(metric="p99_ms@64", at_most=1.1))},
    ],
)
def test_the_command_of_a_report_gives_an_order_of_the_same_digest(fields: dict[str, Any]) -> None:
    order = changed(**fields)
    again = order.reproduction("clicks@1")
    terms = read_by_the_command_line(again.command)
    assert order_digest(terms, SUBJECT, {}) == order_digest(order, SUBJECT, {})
    assert terms.model == "clicks@1"
    assert Order.model_validate(again.order) == order


@pytest.mark.parametrize(
    "fields",
    [
        {"preset": "custom", "steps": (Float16(),)},
        {"rules": Rules(min_rows=5)},
        {"targets": Targets(best_batch=128)},
        {"targets": Targets(onnxruntime="off", tensorrt_rtx="required")},
        # More digits than a limit is written with: the command would promise something else.
        {"limits": (Limit(metric="auc", at_least=-0.00123456789),)},
    ],
)
def test_what_options_cannot_say_is_given_as_a_file(fields: dict[str, Any]) -> None:
    order = changed(**fields)
    again = order.reproduction("clicks@1")
    assert again.command == "recpress compress --order order.json"
    assert Order.model_validate_json(json.dumps(again.order)) == order


def test_orders_of_one_digest_are_described_equally() -> None:
    """Else one order would have two reports, of which the registry points to the first."""
    one = changed(preset="small")
    same = changed(model="clicks", preset="small", promote=True)
    assert order_digest(one, SUBJECT, {}) == order_digest(same, SUBJECT, {})
    assert one.reproduction("clicks@1") == same.reproduction("clicks@1")


def test_another_attempt_of_an_order_is_reproduced_by_the_same_command() -> None:
    assert changed(attempt=7).reproduction("clicks@1") == ORDER.reproduction("clicks@1")


def test_the_command_of_a_report_names_its_teachers_by_what_they_are() -> None:
    order = changed(preset="small", teachers=("newest", "registry:clicks@3"))
    uris = ("file:///s/artifacts/t", "file:///s/artifacts/u")
    found = order.reproduction("clicks@1", uris)
    assert read_by_the_command_line(found.command).teachers == uris
    assert Order.model_validate(found.order).teachers == uris
