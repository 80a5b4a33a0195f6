"""Golden test: results of every method and lowering equal ``tests/golden/record.json``.

The default tests check mixed recipes, which together contain every method, on one target each.
Tests with the marker ``nightly`` check each method alone on all networks and targets.

A case is a recipe on a network. ``MIXED`` are the cases of mixed recipes, and ``SINGLE`` the
networks on which each method is checked alone. The key of an entry is
``case | network | part | item``. The part is a target (its graph), ``torch`` (the module),
``stored`` (the tensors of the result), or a step of the recipe, such as ``step 06 fold``.

If a difference is intended, run ``python -m tests.golden`` and give the reason for each changed
entry in the commit message.
"""

import json

import pytest
import torch

from tests.golden import compare, numerics, package
from tests.golden.cases import MIXED, SINGLE, TRAINING, Case, list_all_cases
from tests.golden.entries import compute_entries

RECORDED_ON, RECORD = compare.read()
SAMPLE = [case for case in MIXED if case.sample]
"""The cases of the default tests; ``case.sample`` is the only target for which it lowers them."""


def name_of(case: Case) -> str:
    """Return the test id of a case."""
    return f"{case.name}, {case.network}".replace(" ", "_")


def require_recorded_entries(case: Case, targets: tuple[str, ...], folder) -> None:
    """Fail with one line for each entry of the record that differs."""
    torch.set_num_threads(1)
    result = compute_entries(case, folder, targets)
    skipped = package.list_targets().keys() - set(targets)
    expected = compare.select_entries_of_case(RECORD, case, skipped)
    this_machine = numerics.describe_machine()
    lines = compare.find_differences(
        expected,
        result,
        exact=this_machine == RECORDED_ON,
        trains=any(kind in TRAINING for kind, _ in case.steps),
    )
    if this_machine != RECORDED_ON:
        lines += (
            [f"(the record was written on {RECORDED_ON}; this is {this_machine})"] if lines else []
        )
    assert not lines, "\n".join(
        [
            f"{len(lines)} differences from the golden record (python -m tests.golden):",
            *lines[:60],
        ]
    )


@pytest.mark.parametrize("case", SAMPLE, ids=name_of)
def test_mixed_recipes_on_one_target_have_the_recorded_tensors_graphs_and_scores(case, tmp_path):
    require_recorded_entries(case, (case.sample,), tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("case", list_all_cases(), ids=name_of)
def test_every_method_on_every_target_has_the_recorded_tensors_graphs_and_scores(case, tmp_path):
    require_recorded_entries(case, tuple(package.list_targets()), tmp_path)


# --- the record is complete ------------------------------------------------------------------


def recorded_cases() -> set[tuple[str, str]]:
    """Return the case and network of every entry."""
    return {tuple(key.split(" | ")[:2]) for key in RECORD}


def test_record_has_exactly_the_cases_of_all_methods_and_networks():
    expected = {(case.name, case.network) for case in list_all_cases()}
    assert recorded_cases() == expected
    methods = {(kind, network) for kind in package.list_methods() for network in SINGLE}
    assert methods <= expected


def test_record_has_every_target_or_a_refusal_for_every_case():
    targets = package.list_targets().keys()
    for case in list_all_cases():
        keys = [key.split(" | ") for key in compare.select_entries_of_case(RECORD, case)]
        parts = {part.split(" ")[0] for _, _, part, _ in keys}
        refused = any(p.startswith("step") and item == "refused" for _, _, p, item in keys)
        assert refused or targets <= parts, f"{name_of(case)}: no entry for {targets - parts}"


def test_every_method_changes_a_network_and_is_in_a_mixed_recipe():
    mixed = {kind for case in SAMPLE for kind, _ in case.steps}
    assert mixed == package.list_methods().keys()
    for case in SAMPLE:
        assert not [
            key for key in compare.select_entries_of_case(RECORD, case) if key.endswith("| refused")
        ]
    for kind in package.list_methods():
        cases = [Case(kind, network, ()) for network in SINGLE]
        assert any(f"{kind} | {case.network} | torch | scores" in RECORD for case in cases), kind


def test_sample_has_every_target():
    assert {case.sample for case in SAMPLE} == package.list_targets().keys()


def test_record_file_is_sorted_with_one_line_per_entry_and_below_a_megabyte():
    text = compare.RECORD.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    content = json.loads(text)
    assert text == json.dumps(content, indent=0, sort_keys=True) + "\n"


# --- messages of the comparison --------------------------------------------------------------


def differences_after_change(key: str, line: str | None) -> list[str]:
    """Return the differences after one entry of a case was changed, or removed (``line`` None).

    An entry for a tensor has its dtype and shape, the digest of its values, their mean and their
    root mean square, as in ``int8[40,6] 0 mean 0 rms 0``.
    """
    case = SAMPLE[0]
    expected = compare.select_entries_of_case(RECORD, case)
    result = {**expected, key: line}
    if line is None:
        del result[key]
    return compare.find_differences(expected, result, exact=True, trains=False)


GRAPH = "mixed 1 | click | onnxruntime | "
"""Start of the keys of one graph's entries: case, network and target."""


def test_difference_names_method_network_target_and_tensor():
    (line,) = differences_after_change(
        "mixed 1 | click | stored | user.codes", "int8[40,6] 0 mean 0 rms 0"
    )
    assert line.startswith("mixed 1 | click | stored | user.codes: recorded int8[40,6]")
    (line,) = differences_after_change(
        "mixed 1 | click | stored | user.extra", "int8[40,6] 0 mean 0 rms 0"
    )
    assert "user.extra: not in the record" in line
    (line,) = differences_after_change(f"{GRAPH}initializer model.user.codes", None)
    assert "initializer model.user.codes: recorded" in line
    assert "got nothing of this name" in line


def test_difference_in_operators_names_the_operator_and_both_counts():
    counts = RECORD[f"{GRAPH}operators"]
    gathers = int(counts.split(" Gather:")[1].split(" ")[0])
    more = counts.replace(f" Gather:{gathers} ", f" Gather:{gathers + 1} ")
    (line,) = differences_after_change(f"{GRAPH}operators", more)
    assert line == f"{GRAPH}operators: Gather recorded {gathers}, got {gathers + 1}"


def test_difference_in_the_last_bits_is_reported_with_equal_statistics():
    key = "mixed 1 | click | torch | scores"
    dtype_and_shape, _, statistics = RECORD[key].split(" ", 2)
    (line,) = differences_after_change(key, f"{dtype_and_shape} {'0' * 16} {statistics}")
    assert line.endswith("(mean and rms within 0.1%)")


def test_first_step_after_which_tensors_differ_is_named_first():
    case = SAMPLE[0]
    expected = compare.select_entries_of_case(RECORD, case)
    steps = sorted(key for key in expected if key.endswith("| all tensors"))
    assert len(steps) == len(case.steps)
    first = 6  # an arbitrary step, counted from 0; the digests of it and of later steps are changed
    result = {**expected, **dict.fromkeys(steps[first:], "0" * 16)}
    (line,) = compare.find_differences(expected, result, exact=True, trains=False)
    kind, _ = case.steps[first]
    assert line.startswith(f"mixed 1 | click | step 06 {kind} | all tensors: the first step")


def test_on_another_machine_digests_may_differ_but_not_statistics_types_or_operators():
    first = {"a | b | torch | scores": "float32[64] 0123456789abcdef mean 0.5 rms 2"}
    for line, is_allowed in (
        ("float32[64] fedcba9876543210 mean 0.5001 rms 2.0001", True),
        ("float32[64] fedcba9876543210 mean 0.51 rms 2", False),
        ("float32[64] fedcba9876543210 mean 0.5 rms 2.01", False),
        ("float16[64] 0123456789abcdef mean 0.5 rms 2", False),
        ("float32[65] 0123456789abcdef mean 0.5 rms 2", False),
    ):
        second = dict.fromkeys(first, line)
        lines = compare.find_differences(first, second, exact=False, trains=False)
        assert (lines == []) == is_allowed, line
        assert compare.find_differences(first, second, exact=True, trains=False)
    scalar = {"a | b | stored | bias": "float32[1] = 0.5"}
    for line, after_rounding, after_training in (
        ("float32[1] = 0.50001", True, True),
        ("float32[1] = 0.6", False, True),
        ("float64[1] = 0.5", False, False),
    ):
        second = dict.fromkeys(scalar, line)
        for trains, is_allowed in ((False, after_rounding), (True, after_training)):
            lines = compare.find_differences(scalar, second, exact=False, trains=trains)
            assert (lines == []) == is_allowed, line
    operators = {"a | b | onnxruntime | operators": "Add:3 Mul:2"}
    other_operators = dict.fromkeys(operators, "Add:3 Mul:1")
    assert compare.find_differences(operators, other_operators, exact=False, trains=True)


def test_record_has_a_round_trip_and_stores_equal_targets_once(tmp_path):
    entries = {
        f"m | n | {target} | {item}": f"{item} {index if target == 'x' else 0}"
        for target in ("a", "b", "x")
        for index, item in enumerate(("one", "two", "three"), 1)
    }
    compare.write({"cpu": "z"}, entries, tmp_path / "record.json")
    assert compare.read(tmp_path / "record.json") == ({"cpu": "z"}, entries)
    stored = json.loads((tmp_path / "record.json").read_text())["entries"]
    assert stored["m | n | b"] == {"same as": "m | n | a"}
    assert len(stored["m | n | a"]) == len(stored["m | n | x"]) == 3
