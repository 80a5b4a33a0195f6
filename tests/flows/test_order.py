"""Orders: validation, the form in Prefect's UI, and the digest that identifies a result.

Preset recipes consist of choices. A choice has one or more options, which a budget tries one after
the other until one fits; ``recipe()`` lists the steps of all of them. An option is a group of steps
that are applied together. ``Terms`` is the base class of ``Order``, without custom steps.
``attempt`` is the number of a forced repetition of an order, which gets a version of its own.
The order digest identifies a result and depends on the version of recpress; the request digest
does not, so that the result is found after an upgrade.
"""

import re
import typing
from pathlib import Path

import pytest
from error_codes import raises_value_error
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from compressors.contracts import Artifact, Limit, Output
from compressors.core.registries import METHODS, AnyStep
from compressors.distill.recalibrate import Recalibrate
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows import resolve
from flows.compress import compress
from flows.order import Order
from flows.presets import PRESETS
from flows.resolve import order_digest, request_digest
from flows.terms import Preset, Targets, Terms
from infra.data.checks import Rules
from tasks.bundles.bundle_ref import BundleRef
from tasks.bundles.teachers import Teacher
from tasks.orchestration import code_digest

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
CHAMPION = Artifact(uri="file:///s/artifacts/c", sha256="c" * 64, bytes=1)


def order_with(**fields: object) -> Order:
    """Return ``ORDER`` with other fields."""
    return Order.model_validate(ORDER.model_dump() | fields)


def test_order_without_limits_is_refused() -> None:
    with pytest.raises(ValidationError, match="limits"):
        order_with(limits=())
    with pytest.raises(ValidationError, match="limits"):
        Order.model_validate({"model": "clicks@1"})


def test_steps_are_required_with_preset_custom_and_refused_with_others() -> None:
    with raises_value_error("steps_missing"):
        order_with(preset="custom")
    with raises_value_error("steps_with_preset", preset="safe"):
        order_with(steps=(RowwiseInt8(),))
    assert order_with(preset="custom", steps=(Float16(),)).recipe() == (Float16(),)


@pytest.mark.parametrize("following", [Recalibrate(), RowwiseInt8()])
def test_step_after_recalibrate_is_refused(following: AnyStep) -> None:
    with raises_value_error("recalibrate_not_last", step=following.kind):
        order_with(preset="custom", steps=(Recalibrate(), following))
    last = order_with(preset="custom", steps=(RowwiseInt8(), Recalibrate()))
    assert last.recipe()[-1] == Recalibrate()


@pytest.mark.parametrize("preset", [name for name in typing.get_args(Preset) if name != "custom"])
def test_recipe_of_a_preset_has_the_steps_of_all_its_options(preset: Preset) -> None:
    order = order_with(preset=preset, budget=0.001)
    assert order.choices() == PRESETS[preset] != ()
    groups = tuple(option for choice in PRESETS[preset] for option in choice.options)
    assert order.groups() == groups
    assert order.recipe() == tuple(step for group in groups for step in group)


def test_order_without_targets_is_refused() -> None:
    with raises_value_error("targets_off"):
        Targets(onnxruntime="off")


def test_requirements_omit_targets_that_are_off() -> None:
    targets = Targets(onnxruntime="optional", tensorrt_rtx="required")
    assert targets.requirements() == {"onnxruntime": "optional", "tensorrt-rtx": "required"}


def test_decreasing_batch_sizes_are_refused() -> None:
    with raises_value_error("batch_sizes_shrink"):
        Targets(smallest_batch=65)  # the default of best_batch is 64


def test_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="promot"):
        order_with(promot=True)


def test_order_read_from_its_json_is_equal() -> None:
    order = order_with(
        preset="custom",
        steps=(RowwiseInt8(), Float16()),
        targets=Targets(tensorrt="optional"),
        rules=Rules(label_rate=(0.1, 0.9)),
        limits=(LIMIT, Limit.parse("bytes <= 500000"), Limit.parse("p99_ms@64 vs champion <= 1.2")),
        promote=True,
        seed=3,
    )
    assert Order.model_validate_json(order.model_dump_json()) == order


# --- the form --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def form() -> dict[str, typing.Any]:
    """The JSON schemas from which Prefect's UI renders the form of the flow."""
    signature = parameter_schema(compress).model_dump()
    definitions = signature["definitions"]
    return {"Order": definitions["Order"], **definitions}


def test_form_fields_have_titles_and_positions_with_the_model_first(
    form: dict[str, typing.Any],
) -> None:
    for name in ("Order", "Targets", "Limit"):
        fields = form[name]["properties"]
        positions = {key: properties.get("position") for key, properties in fields.items()}
        assert sorted(positions.values()) == list(range(len(fields))), (name, positions)
        # A field whose type is a model has the title of that model.
        titles = {
            key: properties.get("title") or form[properties["$ref"].rpartition("/")[2]]["title"]
            for key, properties in fields.items()
        }
        assert all(titles.values()), titles
    assert form["Order"]["properties"]["model"]["position"] == 0
    assert {"model", "limits"} <= set(form["Order"]["required"])


def test_form_lists_presets_targets_references_and_usual_metrics(
    form: dict[str, typing.Any],
) -> None:
    assert form["Order"]["properties"]["preset"]["enum"] == list(typing.get_args(Preset))
    for target in ("onnxruntime", "tensorrt_rtx", "tensorrt"):
        assert form["Targets"]["properties"][target]["enum"] == ["required", "optional", "off"]
    assert form["Limit"]["properties"]["against"]["enum"] == ["absolute", "baseline", "champion"]
    # The metrics that every order measures are listed; others only have to match a pattern.
    default_metrics, other_metrics = form["Limit"]["properties"]["metric"]["anyOf"]
    assert {"auc", "bytes", "p99_ms@64"} <= set(default_metrics["enum"])
    assert re.search(other_metrics["pattern"], "ndcg@5")
    assert not re.search(other_metrics["pattern"], "ndcg@")


def test_form_schema_distinguishes_steps_by_their_kind(form: dict[str, typing.Any]) -> None:
    """Without a discriminator Prefect's form cannot select one of several models."""
    items = form["Order"]["properties"]["steps"]["items"]
    kinds = {member.model_fields["kind"].default for member in tuple(METHODS.values())}
    assert items["discriminator"]["propertyName"] == "kind"
    assert set(items["discriminator"]["mapping"]) == kinds
    assert len(items["oneOf"]) == len(kinds) >= 4


# --- the digest ------------------------------------------------------------------------------

DIGEST = order_digest(ORDER, BUNDLE, champions={})


@pytest.mark.parametrize(
    ("order", "bundle", "champions"),
    [
        pytest.param(order_with(preset="small"), BUNDLE, {}, id="recipe"),
        pytest.param(
            order_with(limits=(Limit.parse("auc vs baseline >= -0.0021"),)), BUNDLE, {}, id="limits"
        ),
        pytest.param(order_with(targets=Targets(tensorrt_rtx="optional")), BUNDLE, {}, id="target"),
        pytest.param(order_with(targets=Targets(best_batch=32)), BUNDLE, {}, id="batch"),
        pytest.param(order_with(rules=Rules(min_rows=7)), BUNDLE, {}, id="rules"),
        pytest.param(order_with(seed=1), BUNDLE, {}, id="seed"),
        pytest.param(order_with(budget=0.001), BUNDLE, {}, id="budget"),
        pytest.param(order_with(attempt=1), BUNDLE, {}, id="attempt"),
        pytest.param(ORDER, BUNDLE, {"onnxruntime": CHAMPION}, id="champion"),
        pytest.param(
            ORDER,
            BUNDLE.model_copy(update={"artifact": CHAMPION}),
            {},
            id="model",
        ),
        pytest.param(
            ORDER, BUNDLE.model_copy(update={"architecture": "d" * 64}), {}, id="architecture"
        ),
    ],
)
def test_order_digest_differs_for_every_change_that_affects_the_result(
    order: Order, bundle: BundleRef, champions: dict[str, Artifact]
) -> None:
    assert order_digest(order, bundle, champions) != DIGEST


def test_order_digest_differs_for_other_teachers_and_other_teacher_code() -> None:
    teacher = Teacher(artifact=CHAMPION, name="clicks@2", forms=("logit",), architecture="b" * 64)
    edited = teacher.model_copy(update={"architecture": "d" * 64})
    other = teacher.model_copy(update={"artifact": BUNDLE.artifact})
    digests = {order_digest(ORDER, BUNDLE, {}, (one,)) for one in (teacher, edited, other)}
    assert len(digests | {DIGEST}) == 4


def test_version_of_recpress_changes_the_order_digest_but_not_the_request_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = request_digest(ORDER, BUNDLE, {})
    monkeypatch.setattr(resolve, "recpress_version", lambda: "99.0")
    assert order_digest(ORDER, BUNDLE, {}) != DIGEST
    assert request_digest(ORDER, BUNDLE, {}) == request


def test_sources_of_recpress_do_not_change_the_order_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreadable(path: Path) -> bytes:
        raise AssertionError(f"{path} was read")

    code_digest._list_direct_imports.cache_clear()
    code_digest._hash_sources.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", unreadable)
    assert order_digest(ORDER, BUNDLE, {}) == DIGEST


def test_order_digest_ignores_promote_and_the_reference_to_the_model() -> None:
    assert order_digest(order_with(promote=True), BUNDLE, {}) == DIGEST
    assert order_digest(order_with(model="clicks"), BUNDLE, {}) == DIGEST


def test_terms_of_an_order_have_the_digest_of_the_order() -> None:
    terms = Terms.model_validate(ORDER.model_dump(exclude={"steps"}))
    assert order_digest(terms, BUNDLE, {}) == DIGEST


def test_order_digest_differs_for_other_custom_steps() -> None:
    one = order_with(preset="custom", steps=(RowwiseInt8(),))
    other = order_with(preset="custom", steps=(RowwiseInt8(min_rows=7),))
    digests = {order_digest(order, BUNDLE, {}) for order in (one, other)}
    assert len(digests | {DIGEST}) == 3
