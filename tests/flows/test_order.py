"""An order is the form people fill in, the file they send, and the name of the result."""

import re
import typing
from pathlib import Path

import pytest
from error_codes import raises_value_error
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from compressors.contracts import Artifact, Limit
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
CHAMPION = Artifact(uri="file:///s/artifacts/c", sha256="c" * 64, bytes=1)


def changed(**fields: object) -> Order:
    return Order.model_validate(ORDER.model_dump() | fields)


def test_an_order_without_limits_is_refused_because_nothing_would_be_judged() -> None:
    with pytest.raises(ValidationError, match="limits"):
        changed(limits=())
    with pytest.raises(ValidationError, match="limits"):
        Order.model_validate({"model": "clicks@1"})


def test_steps_belong_to_the_preset_custom_and_to_no_other() -> None:
    with raises_value_error("steps_missing"):
        changed(preset="custom")
    with raises_value_error("steps_with_preset", preset="safe"):
        changed(steps=(RowwiseInt8(),))
    assert changed(preset="custom", steps=(Float16(),)).recipe() == (Float16(),)


@pytest.mark.parametrize("following", [Recalibrate(), RowwiseInt8()])
def test_recalibrate_must_be_the_last_step_and_occur_once(following: AnyStep) -> None:
    with raises_value_error("recalibrate_not_last", step=following.kind):
        changed(preset="custom", steps=(Recalibrate(), following))
    last = changed(preset="custom", steps=(RowwiseInt8(), Recalibrate()))
    assert last.recipe()[-1] == Recalibrate()


@pytest.mark.parametrize("preset", [name for name in typing.get_args(Preset) if name != "custom"])
def test_every_preset_has_a_recipe(preset: Preset) -> None:
    order = changed(preset=preset, budget=0.001)
    assert order.choices() == PRESETS[preset] != ()
    groups = tuple(option for choice in PRESETS[preset] for option in choice.options)
    assert order.groups() == groups
    assert order.recipe() == tuple(step for group in groups for step in group)


def test_an_order_for_no_target_is_refused() -> None:
    with raises_value_error("targets_off"):
        Targets(onnxruntime="off")


def test_targets_that_are_off_are_not_wanted() -> None:
    targets = Targets(onnxruntime="optional", tensorrt_rtx="required")
    assert targets.requirements() == {"onnxruntime": "optional", "tensorrt-rtx": "required"}


def test_batch_sizes_must_grow() -> None:
    with raises_value_error("batch_sizes_shrink"):
        Targets(smallest_batch=65)


def test_an_unknown_field_is_refused_rather_than_left_out() -> None:
    with pytest.raises(ValidationError, match="promot"):
        changed(promot=True)


def test_an_order_survives_json() -> None:
    order = changed(
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
    """What Prefect's UI draws the flow's form from."""
    signature = parameter_schema(compress).model_dump()
    definitions = signature["definitions"]
    return {"Order": definitions["Order"], **definitions}


def test_the_form_shows_the_model_first_and_numbers_every_field(
    form: dict[str, typing.Any],
) -> None:
    for name in ("Order", "Targets", "Limit"):
        fields = form[name]["properties"]
        positions = {key: held.get("position") for key, held in fields.items()}
        assert sorted(positions.values()) == list(range(len(fields))), (name, positions)
        # A field that is a model of its own takes that model's title.
        titles = {
            key: held.get("title") or form[held["$ref"].rpartition("/")[2]]["title"]
            for key, held in fields.items()
        }
        assert all(titles.values()), titles
    assert form["Order"]["properties"]["model"]["position"] == 0
    assert {"model", "limits"} <= set(form["Order"]["required"])


def test_the_form_offers_choices_where_there_are_choices(form: dict[str, typing.Any]) -> None:
    assert form["Order"]["properties"]["preset"]["enum"] == list(typing.get_args(Preset))
    for target in ("onnxruntime", "tensorrt_rtx", "tensorrt"):
        assert form["Targets"]["properties"][target]["enum"] == ["required", "optional", "off"]
    assert form["Limit"]["properties"]["against"]["enum"] == ["absolute", "baseline", "champion"]
    usual, other = form["Limit"]["properties"]["metric"]["anyOf"]
    assert {"auc", "bytes", "p99_ms@64"} <= set(usual["enum"])
    assert re.search(other["pattern"], "ndcg@5")
    assert not re.search(other["pattern"], "ndcg@")


def test_the_form_schema_distinguishes_steps_by_their_kind(form: dict[str, typing.Any]) -> None:
    """Without a discriminator Prefect's form cannot select one of several models."""
    items = form["Order"]["properties"]["steps"]["items"]
    kinds = {member.model_fields["kind"].default for member in tuple(METHODS.values())}
    assert items["discriminator"]["propertyName"] == "kind"
    assert set(items["discriminator"]["mapping"]) == kinds
    assert len(items["oneOf"]) == len(kinds) >= 4


# --- the name of the result ------------------------------------------------------------------

SAME = order_digest(ORDER, SUBJECT, {})


@pytest.mark.parametrize(
    ("order", "subject", "champions"),
    [
        pytest.param(changed(preset="small"), SUBJECT, {}, id="recipe"),
        pytest.param(
            changed(limits=(Limit.parse("auc vs baseline >= -0.0021"),)), SUBJECT, {}, id="limits"
        ),
        pytest.param(changed(targets=Targets(tensorrt_rtx="optional")), SUBJECT, {}, id="target"),
        pytest.param(changed(targets=Targets(best_batch=32)), SUBJECT, {}, id="batch"),
        pytest.param(changed(rules=Rules(min_rows=7)), SUBJECT, {}, id="rules"),
        pytest.param(changed(seed=1), SUBJECT, {}, id="seed"),
        pytest.param(changed(budget=0.001), SUBJECT, {}, id="budget"),
        pytest.param(changed(attempt=1), SUBJECT, {}, id="attempt"),
        pytest.param(ORDER, SUBJECT, {"onnxruntime": CHAMPION}, id="champion"),
        pytest.param(
            ORDER,
            SUBJECT.model_copy(update={"artifact": CHAMPION}),
            {},
            id="model",
        ),
        pytest.param(
            ORDER, SUBJECT.model_copy(update={"architecture": "d" * 64}), {}, id="architecture"
        ),
    ],
)
def test_order_digest_differs_for_every_change_that_affects_the_result(
    order: Order, subject: BundleRef, champions: dict[str, Artifact]
) -> None:
    assert order_digest(order, subject, champions) != SAME


def test_teachers_change_the_orders_digest() -> None:
    teacher = Teacher(artifact=CHAMPION, name="clicks@2", output="logit", architecture="b" * 64)
    edited = teacher.model_copy(update={"architecture": "d" * 64})
    other = teacher.model_copy(update={"artifact": SUBJECT.artifact})
    digests = {order_digest(ORDER, SUBJECT, {}, (one,)) for one in (teacher, edited, other)}
    assert len(digests | {SAME}) == 4


def test_version_of_recpress_changes_the_order_digest_but_not_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = request_digest(ORDER, SUBJECT, {})
    monkeypatch.setattr(resolve, "recpress_version", lambda: "99.0")
    assert order_digest(ORDER, SUBJECT, {}) != SAME
    assert request_digest(ORDER, SUBJECT, {}) == request


def test_sources_of_recpress_do_not_change_the_order_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreadable(path: Path) -> bytes:
        raise AssertionError(f"{path} was read")

    code_digest._direct_imports.cache_clear()
    code_digest._sources_digest.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", unreadable)
    assert order_digest(ORDER, SUBJECT, {}) == SAME


def test_promoting_or_the_way_a_model_is_called_does_not_change_the_digest() -> None:
    assert order_digest(changed(promote=True), SUBJECT, {}) == SAME
    assert order_digest(changed(model="clicks"), SUBJECT, {}) == SAME


def test_the_terms_of_an_order_have_its_digest_so_the_command_line_finds_it() -> None:
    terms = Terms.model_validate(ORDER.model_dump(exclude={"steps"}))
    assert order_digest(terms, SUBJECT, {}) == SAME


def test_steps_of_ones_own_are_part_of_the_digest() -> None:
    one = changed(preset="custom", steps=(RowwiseInt8(),))
    other = changed(preset="custom", steps=(RowwiseInt8(min_rows=7),))
    digests = {order_digest(order, SUBJECT, {}) for order in (one, other)}
    assert len(digests | {SAME}) == 3
