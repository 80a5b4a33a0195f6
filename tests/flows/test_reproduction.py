"""The command in a report that reproduces its order, with options or with an order file."""

import json
import shlex
from typing import Any

import pytest

from compressors.contracts import Artifact, Limit, Output
from compressors.quantize.dense.float16 import Float16
from flows.cli import orders
from flows.order import Order
from flows.resolve import order_digest
from flows.terms import Targets, Terms
from infra.data.checks import Rules
from tasks.bundles.bundle_ref import BundleRef

LIMIT = Limit(metric="auc", against="baseline", at_least=-0.002)
ORDER = Order(model="clicks@1", limits=(LIMIT,))
BUNDLE = BundleRef(
    artifact=Artifact(uri="file:///s/artifacts/a", sha256="a" * 64, bytes=1),
    name="clicks",
    version="1",
    outputs=(Output(name="click", kind="ctr", form="logit", label="click", metric="auc"),),
    rows={"train": 10, "test": 10},
    longest={},  # longest list of each jagged input, of which there is none
    grouped=False,  # rows have no group, such as a session
    architecture="b" * 64,  # digest of the source of the model's class
)


def order_with(**fields: object) -> Order:
    """Return ``ORDER`` with other fields."""
    return Order.model_validate(ORDER.model_dump() | fields)


def terms_of_command(command: str) -> Terms:
    """Return the terms (an order without custom steps) that ``recpress compress`` reads."""
    program, name, model, *options = shlex.split(command.replace("\\\n", ""))
    assert (program, name) == ("recpress", "compress")
    options_by_name: dict[str, list[str]] = {}
    for option, value in zip(options[::2], options[1::2], strict=True):
        options_by_name.setdefault(option.removeprefix("--"), []).append(value)
    (preset,), (seed,) = options_by_name["preset"], options_by_name.get("seed", ["0"])
    targets, optional = options_by_name.get("target", []), options_by_name.get("optional", [])
    return orders.build_terms(
        model,
        preset,
        limits=options_by_name["limit"],
        targets=targets,
        optional=optional,
        promote=False,
        seed=int(seed),
        teacher=options_by_name.get("teacher"),
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
def test_reproduction_command_describes_an_order_with_the_same_digest(
    fields: dict[str, Any],
) -> None:
    order = order_with(**fields)
    reproduction = order.reproduction("clicks@1")
    terms = terms_of_command(reproduction.command)
    assert order_digest(terms, BUNDLE, {}) == order_digest(order, BUNDLE, {})
    assert terms.model == "clicks@1"
    assert Order.model_validate(reproduction.order) == order


@pytest.mark.parametrize(
    "fields",
    [
        {"preset": "custom", "steps": (Float16(),)},
        {"rules": Rules(min_rows=5)},
        {"targets": Targets(best_batch=128)},
        {"targets": Targets(onnxruntime="off", tensorrt_rtx="required")},
        # A limit is written with fewer digits, so the command would have another limit.
        {"limits": (Limit(metric="auc", at_least=-0.00123456789),)},
    ],
)
def test_order_that_options_cannot_express_is_reproduced_from_a_file(
    fields: dict[str, Any],
) -> None:
    order = order_with(**fields)
    reproduction = order.reproduction("clicks@1")
    assert reproduction.command == "recpress compress --order order.json"
    assert Order.model_validate_json(json.dumps(reproduction.order)) == order


def test_orders_with_the_same_digest_have_the_same_reproduction() -> None:
    """Otherwise one order could have two different reports."""
    one = order_with(preset="small")
    same = order_with(model="clicks", preset="small", promote=True)
    assert order_digest(one, BUNDLE, {}) == order_digest(same, BUNDLE, {})
    assert one.reproduction("clicks@1") == same.reproduction("clicks@1")


def test_reproduction_ignores_the_attempt() -> None:
    """The field ``attempt`` only makes an order differ from an equal one, so that it runs again."""
    assert order_with(attempt=7).reproduction("clicks@1") == ORDER.reproduction("clicks@1")


def test_reproduction_names_teachers_by_their_uris() -> None:
    order = order_with(preset="small", teachers=("newest", "registry:clicks@3"))
    uris = ("file:///s/artifacts/t", "file:///s/artifacts/u")
    reproduction = order.reproduction("clicks@1", uris)
    assert terms_of_command(reproduction.command).teachers == uris
    assert Order.model_validate(reproduction.order).teachers == uris
