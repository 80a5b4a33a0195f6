"""Contracts: defaults, JSON round trips, and values that are refused."""

import subprocess
import sys

import pytest
from error_codes import HasReason, TextMatching, raises_value_error
from models import RANKER
from pydantic import TypeAdapter, ValidationError
from signatures import replace_output

from compressors.contracts import (
    AnyInput,
    Architecture,
    Artifact,
    Bench,
    DenseInput,
    IdInput,
    JaggedBag,
    Limit,
    Output,
    PaddedBag,
    Plan,
    PlanLine,
    Signature,
    Verdict,
    digest,
    overall,
    tensor_names,
)
from compressors.contracts.reasons import Reason

USER = IdInput(name="user", table="user")

CLICK = {"name": "click", "kind": "ctr", "form": "logit", "label": "click", "metric": "auc"}


def signature(*inputs, **changes) -> Signature:
    """Return a signature with one output; ``changes`` are fields of the output or the signature."""
    output = {name: changes.pop(name, value) for name, value in CLICK.items()}
    return Signature(inputs=inputs or (USER,), outputs=(output,), **changes)


def test_importing_contracts_loads_no_tensor_library_and_no_prefect():
    code = (
        "import sys, compressors.contracts; "
        "print(*sorted({'torch', 'onnx', 'numpy', 'prefect'} & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == ""


def test_frozen_values_are_immutable_equal_by_fields_and_refuse_unknown_fields():
    first, second = (Artifact(uri="a", sha256="0" * 64, bytes=3) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(ValidationError, match="frozen"):
        first.bytes = 4
    with pytest.raises(ValidationError, match="Extra inputs"):
        Artifact(uri="a", sha256="0" * 64, bytes=3, size=3)


@pytest.mark.parametrize("sha256", ["0" * 63, "G" * 64, "A" * 64, ""])
def test_hash_that_is_not_64_lower_case_hex_digits_is_refused(sha256):
    with pytest.raises(ValidationError, match="sha256"):
        Artifact(uri="a", sha256=sha256, bytes=3)


def test_digest_depends_on_values_but_not_on_the_order_of_keys():
    assert digest({"a": 1, "b": [USER]}) == digest({"b": [USER.model_dump(mode="json")], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest([1, 2]) != digest([2, 1])
    with pytest.raises(TypeError, match="set has no canonical JSON form"):
        digest({1})


def test_signature_is_unchanged_by_a_json_round_trip():
    assert Signature.model_validate_json(RANKER.signature.model_dump_json()) == RANKER.signature


def test_kind_selects_the_class_of_an_input():
    adapter = TypeAdapter(AnyInput)
    assert isinstance(adapter.validate_python({"kind": "id", "name": "u", "table": "t"}), IdInput)
    with pytest.raises(ValidationError, match="'id', 'dense', 'padded_bag', 'jagged_bag'"):
        adapter.validate_python({"kind": "image", "name": "u"})


def test_columns_default_to_the_name():
    assert USER.columns == ("user",)
    assert PaddedBag(name="genres", table="g", shape=(3,)).columns == ("genres",)


# ``TextMatching("int64")`` equals every text that contains ``int64``; below, ``HasReason`` equals a
# reason with this code and these fields.
@pytest.mark.parametrize(
    ("kind", "settings", "code", "fields"),
    [
        (
            IdInput,
            {"columns": ("a", "b"), "table": "t"},
            "input_shape_differs",
            {"columns": 2, "expected": [2], "got": []},
        ),
        (
            IdInput,
            {"shape": (3,), "table": "t"},
            "input_shape_differs",
            {"columns": 1, "expected": [], "got": [3]},
        ),
        (
            IdInput,
            {"table": "t", "dtype": "int16"},
            "literal_error",
            {"expected": TextMatching("int64")},
        ),
        (
            IdInput,
            {"table": "t", "out_of_range": "ignore"},
            "literal_error",
            {"expected": "'error', 'clamp' or 'default_row'"},
        ),
        (IdInput, {"table": "t", "default_row": -1}, "greater_than_equal", {"ge": 0}),
        (DenseInput, {"shape": ()}, "dense_shape_form", {"name": "x"}),
        (DenseInput, {"shape": (0,)}, "dense_shape_form", {"name": "x"}),
        (
            DenseInput,
            {"shape": (3,), "columns": ("a", "b")},
            "dense_columns_count",
            {"width": 3, "columns": 2},
        ),
        (PaddedBag, {"shape": (), "table": "t"}, "bag_shape_form", {"name": "x"}),
        (PaddedBag, {"shape": (0,), "table": "t"}, "bag_shape_form", {"name": "x"}),
        (JaggedBag, {"shape": (2, 2), "table": "t"}, "bag_shape_form", {"name": "x"}),
        (
            JaggedBag,
            {"shape": (2,), "table": "t", "columns": ("a", "b")},
            "bag_columns_count",
            {"name": "x"},
        ),
        (
            JaggedBag,
            {"shape": (2,), "table": "t", "layout": "ends"},
            "literal_error",
            {"expected": "'offsets' or 'lengths'"},
        ),
    ],
)
def test_input_with_inconsistent_settings_is_refused(kind, settings, code, fields):
    with raises_value_error(code, **fields):
        kind(name="x", **settings)


def test_jagged_bag_has_two_tensor_names():
    bag = JaggedBag(name="tags", table="t", shape=(2,), layout="lengths")
    assert tensor_names(bag) == ("tags", "tags_lengths")
    assert tensor_names(USER) == ("user",)


@pytest.mark.parametrize(
    ("inputs", "changes", "code", "fields"),
    [
        ((USER, USER), {}, "inputs_repeated", {"names": ("user",)}),
        (
            (
                JaggedBag(name="a", table="t", shape=(2,)),
                IdInput(name="a_offsets", table="t"),
            ),
            {},
            "inputs_repeated",
            {"names": ("a_offsets",)},
        ),
        (
            (USER,),
            {"metric": "gauc"},
            "metric_not_measured",
            {"reason": Reason("metric_without_group", metric="gauc")},
        ),
        ((USER,), {"form": "score"}, "output_form", {"task": "ctr", "got": "score"}),
        ((USER,), {"kind": "regression"}, "task_unknown", {"task": "regression"}),
        ((USER,), {"metric": "accuracy"}, "metric_unknown", {"metric": "accuracy"}),
    ],
)
def test_signature_with_inconsistent_fields_is_refused(inputs, changes, code, fields):
    with raises_value_error(code, **fields):
        signature(*inputs, **changes)


def test_signature_without_an_input_is_refused():
    with pytest.raises(ValidationError, match="at least 1 item"):
        Signature(inputs=(), outputs=(CLICK,))


@pytest.mark.parametrize("count", [0, 65])
def test_signature_with_no_output_or_more_than_64_is_refused(count):
    outputs = tuple(CLICK | {"name": f"o{number}"} for number in range(count))
    with raises_value_error("outputs_count", count=count, most=64):
        Signature(inputs=(USER,), outputs=outputs)


@pytest.mark.parametrize("second", ["click", USER.name])
def test_several_outputs_need_names_that_no_output_or_input_has(second):
    with raises_value_error("outputs_repeated", names=(second,)):
        Signature(inputs=(USER,), outputs=(CLICK, CLICK | {"name": second}))
    alone = Signature(inputs=(USER,), outputs=(CLICK | {"name": USER.name},))
    assert alone.judged_metrics == ("auc",)


def test_metrics_of_several_outputs_have_their_names():
    outputs = (CLICK, CLICK | {"name": "like", "loss_weight": 2})
    several = Signature(inputs=(USER,), outputs=outputs)
    assert several.judged_metrics == ("auc[click]", "auc[like]")
    assert several.judged_by == "the mean of auc[click], auc[like]"
    assert several.outputs[1].loss_weight == 2
    assert "loss_weight" not in several.outputs[0].model_dump()  # hashes of bundles stay the same
    assert "label_where" not in several.outputs[0].model_dump()


def test_loss_weight_of_the_only_output_is_refused():
    with raises_value_error("loss_weight_unused", output="click"):
        Signature(inputs=(USER,), outputs=(CLICK | {"loss_weight": 2},))


def test_several_outputs_must_score_rows():
    """Models of the task kind ``retrieval`` rank a catalogue of items; others score each row."""
    ranked = {"name": "x", "kind": "retrieval", "form": "score", "metric": "recall@20"}
    with raises_value_error("outputs_of_ranked_catalogue", task="retrieval"):
        Signature(inputs=(USER,), outputs=(CLICK, ranked), group="user")


def test_condition_of_a_label_is_refused_for_retrieval_which_needs_no_labels():
    ranked = {"kind": "retrieval", "form": "score", "metric": "recall@20", "name": "x"}
    for changes in ({"label_where": "click"}, {"label_where": "click", "label": "bought"}):
        with raises_value_error("label_condition_unused", output="x", task="retrieval"):
            Output.model_validate(ranked | changes)


def test_metric_of_an_output_has_no_brackets():
    with raises_value_error("metric_of_an_output", output="click", metric="auc[click]"):
        Output.model_validate(CLICK | {"metric": "auc[click]"})


def test_single_output_raises_if_there_are_several():
    (output,) = signature().outputs
    assert signature().single_output == output
    two_outputs = signature().model_copy(update={"outputs": (output, output)})
    with pytest.raises(ValueError, match="too many values"):
        _ = two_outputs.single_output


@pytest.mark.parametrize("name", ["", "1st", "a b", "a-b", "é", "a" * 65])
def test_output_name_that_is_no_identifier_is_refused(name):
    with raises_value_error("string_pattern_mismatch"):
        Output.model_validate(CLICK | {"name": name})


def test_has_lists_and_scores_rows_depend_on_the_task_kind():
    ranking = replace_output(signature(), kind="ranking", form="score")
    retrieval = replace_output(signature(), kind="retrieval", form="score")
    assert [s.has_lists for s in (signature(), ranking, retrieval)] == [False, True, False]
    assert [s.scores_rows for s in (signature(), ranking, retrieval)] == [True, True, False]


@pytest.mark.parametrize("path", ["a.b", "a:b:c", "a/b:C", "os.system('x'):y", ":A", "a:"])
def test_architecture_path_other_than_module_and_class_is_refused(path):
    with pytest.raises(ValidationError, match="path"):
        Architecture(path=path)


def test_bench_has_no_field_for_test_data_and_refuses_a_time_budget_of_0_seconds():
    assert "test" not in Bench.model_fields
    with pytest.raises(ValidationError, match="Extra inputs"):
        Bench(signature=RANKER.signature, test=None)
    with pytest.raises(ValidationError, match="greater than 0"):
        Bench(signature=RANKER.signature, seconds=0)


REASONS = (Reason("selected", step="s"),)


def test_plan_returns_the_line_of_a_module():
    line = PlanLine(
        module="user", role="table", format="f", bytes_before=2, bytes_after=1, reasons=REASONS
    )
    assert Plan(lines=(line,)).of("user") is line
    assert Plan(lines=(line,)).of("item") is None


@pytest.mark.parametrize(
    "text",
    [
        "auc vs baseline >= -0.002",
        "auc vs champion >= 0",
        "bytes <= 500000",
        "p99_ms@64 vs baseline <= 1.2",
        "ndcg@10 >= 0.3",
        "mrr@10 vs baseline >= -0.01",
        "map@100 >= 0.3",
        "hit@20 vs champion >= 0",
        "precision@5 >= 0.1",
    ],
)
def test_limit_is_unchanged_by_formatting_and_parsing(text):
    assert str(Limit.parse(text)) == text
    assert Limit.parse(str(Limit.parse(text))) == Limit.parse(text)
    assert Limit.parse(text.replace(" ", "  ")) == Limit.parse(text)


@pytest.mark.parametrize(
    ("text", "code", "fields"),
    [
        ("auc > 0.5", "limit_form", {"text": "auc > 0.5"}),
        ("auc vs best >= 0", "limit_form", {"text": "auc vs best >= 0"}),
        ("accuracy >= 0.5", "metric_unknown", {"metric": "accuracy"}),
        ("p95_ms@64 <= 2", "metric_unknown", {"metric": "p95_ms@64"}),
        ("auc >= nan", "finite_number", {}),
        ("bytes <= inf", "finite_number", {}),
        ("auc >= much", "float_parsing", {}),
    ],
)
def test_limit_with_an_unusable_text_is_refused(text, code, fields):
    with raises_value_error(code, **fields):
        Limit.parse(text)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 0.1, "at_most": 0.2}])
def test_limit_without_exactly_one_bound_is_refused(bounds):
    with raises_value_error("bound_count", metric="auc"):
        Limit(metric="auc", **bounds)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (("accepted", "accepted"), "accepted"),
        (("accepted", "undecided"), "undecided"),
        (("undecided", "rejected", "accepted"), "rejected"),
        (("built-unmeasured", "accepted"), "accepted"),
        (("built-unmeasured",), "built-unmeasured"),
        ((), "built-unmeasured"),
    ],
)
def test_overall_outcome_is_the_worst_of_measured_targets(outcomes, expected):
    verdicts = [Verdict(target="onnxruntime", outcome=item, reasons=REASONS) for item in outcomes]
    assert overall(verdicts) == expected


ITEM = IdInput(name="item", table="item")
TOWERS = {
    "query": {"module": "of_user", "inputs": ["user"]},
    "item": {"module": "of_item", "inputs": ["item"]},
}
RETRIEVAL = {
    "kind": "retrieval",
    "form": "score",
    "label": None,
    "group": "user",
    "metric": "ndcg@20",
    "towers": TOWERS,
    "item": "item",
}


def test_of_split_returns_the_inputs_and_columns_of_each_split():
    """Split ``items`` has one row per item; ``traffic`` has logged requests without labels."""
    retrieval = signature(
        USER,
        ITEM,
        DenseInput(name="price", shape=(2,)),
        **RETRIEVAL
        | {
            "label": "bought",
            "towers": TOWERS | {"item": {"module": "of_item", "inputs": ["price", "item"]}},
        },
    )
    test, items = retrieval.of_split("test"), retrieval.of_split("items")
    assert [item.name for item in test.inputs] == ["user", "item"]
    assert (test.single_output.label, test.group) == ("bought", "user")
    assert [item.name for item in items.inputs] == ["item", "price"]
    assert (items.single_output.label, items.group) == (None, None)
    assert signature().of_split("items") == signature()
    traffic = retrieval.of_split("traffic")
    assert (traffic.inputs, traffic.group) == (test.inputs, "user")
    assert traffic.outputs == test.remove_labels().outputs
    assert signature().of_split("traffic") == replace_output(signature(), label=None)


OF_FIRST_RANKS = ("recall@k", "ndcg@k", "mrr@k", "map@k", "hit@k", "precision@k")
"""Metrics of the first k ranks, in the form in which errors list them."""


# The field ``read`` of ``tower_inputs_differ`` lists the inputs of both towers.
@pytest.mark.parametrize(
    ("changes", "code", "fields"),
    [
        ({"towers": None}, "towers_missing", {}),
        ({"item": None}, "towers_missing", {}),
        ({"item": "user"}, "item_not_in_tower", {"item": "user"}),
        (
            {"metric": "auc"},
            "metric_not_measured",
            {"reason": HasReason("metric_of_other_task", metrics=OF_FIRST_RANKS, metric="auc")},
        ),
        (
            {"group": None},
            "metric_not_measured",
            {"reason": Reason("metric_without_group", metric="ndcg@20")},
        ),
        ({"form": "logit"}, "output_form", {"task": "retrieval", "got": "logit"}),
        (
            {"towers": TOWERS | {"query": {"module": "of_user", "inputs": ["user", "item"]}}},
            "tower_inputs_differ",
            {"inputs": ("item", "user"), "read": ("item", "item", "user")},
        ),
        (
            {"towers": TOWERS | {"query": {"module": "of_user", "inputs": ["usr"]}}},
            "tower_inputs_differ",
            {"inputs": ("item", "user"), "read": ("item", "usr")},
        ),
        (
            {"kind": "ranking", "label": "bought", "metric": "auc"},
            "metric_not_measured",
            {"reason": HasReason("metric_of_other_task", metrics=OF_FIRST_RANKS, metric="auc")},
        ),
        (
            {"kind": "ranking", "label": "bought", "metric": "ndcg@10"},
            "towers_unexpected",
            {"task": "ranking"},
        ),
        ({"kind": "ranking", "metric": "gauc"}, "label_missing", {"task": "ranking"}),
    ],
)
def test_retrieval_signature_with_inconsistent_fields_is_refused(changes, code, fields):
    with raises_value_error(code, **fields):
        signature(USER, ITEM, **RETRIEVAL | changes)


def test_item_that_is_a_bag_is_refused():
    bag = JaggedBag(name="item", table="item", shape=(3,))
    with raises_value_error("item_no_single_id", item="item"):
        signature(USER, bag, **RETRIEVAL)
