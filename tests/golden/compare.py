"""Read and write the record file, and compare its entries with new entries.

If a target has the same entries as another target, the file stores a reference to that target.
A key is ``case | network | part | item`` (see ``entries.py``). In the file, entries are grouped by
``case | network | part``. The part of an entry of a graph begins with the name of its target.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tests.golden.cases import Case
from tests.golden.numerics import get_type_and_shape, is_near, is_scalar

RECORD = Path(__file__).with_name("record.json")
SAME = "same as"
"""Key in the file for the target with equal entries."""
ALL = " | all tensors"
"""End of the keys of digests of all tensors that are stored after a step."""
# Tolerance relative to a tensor's root mean square, on a machine that differs from the record's.
# Float sums in another order change float32 values by parts in 10^6, and stored integer codes by at
# most one level.
NEAR = 1e-3
# Training amplifies such differences. With torch, MKL and numba limited to AVX2, statistics of
# trained networks differed by up to 0.21, and biases of one element by up to a factor of 2. Those
# of untrained networks were equal in five digits, except two scales that differed in the eighth.
NEAR_TRAINED = 0.5

Entries = dict[str, str]


def read(path: Path = RECORD) -> tuple[dict[str, str], Entries]:
    """Read the record; return the machine that wrote it, and its entries."""
    content = json.loads(path.read_text(encoding="utf-8"))
    groups: dict[str, Entries] = content["entries"]
    entries = {
        f"{group} | {item}": line
        for group, items in groups.items()
        for item, line in groups.get(items.get(SAME, ""), items).items()
    }
    return content["machine"], entries


def write(machine: dict[str, str], entries: Entries, path: Path = RECORD) -> None:
    """Write the record: sorted, one line per entry, grouped by case, network and part."""
    groups: dict[str, Entries] = {}
    for key, line in entries.items():
        group, _, item = key.rpartition(" | ")
        groups.setdefault(group, {})[item] = line
    for group, items in sorted(groups.items()):
        equal_groups = (name for name in sorted(groups) if name < group and groups[name] == items)
        equal_group = next(
            (
                name
                for name in equal_groups
                if _get_case_and_network(name) == _get_case_and_network(group)
            ),
            None,
        )
        # A reference hardly shortens a group of one or two entries.
        if equal_group is not None and len(items) > 2:
            groups[group] = {SAME: equal_group}
    content = {"machine": machine, "entries": groups}
    path.write_text(json.dumps(content, indent=0, sort_keys=True) + "\n", encoding="utf-8")


def _get_case_and_network(group: str) -> str:
    """Return the case and the network of a group."""
    return group.rpartition(" | ")[0]


def select_entries_of_case(
    entries: Entries, case: Case, skipped_targets: Iterable[str] = ()
) -> Entries:
    """Return the record's entries of one case, without the entries of ``skipped_targets``."""
    skipped = set(skipped_targets)
    start = f"{case.name} | {case.network} | "
    return {
        key: line
        for key, line in entries.items()
        if key.startswith(start) and key.split(" | ")[2].split(" ")[0] not in skipped
    }


def find_differences(expected: Entries, actual: Entries, *, exact: bool, trains: bool) -> list[str]:
    """Return one line for each entry that differs; empty if none does.

    If stored tensors differ after a step, the first line names the first such step.

    Args:
        expected: entries of the record.
        actual: entries of the current code.
        exact: whether the machine is equal to the one that wrote the record.
        trains: whether the case has a step that trains.
    """
    lines, first_step = [], ""
    for key in sorted(expected.keys() | actual.keys()):
        first, second = expected.get(key), actual.get(key)
        if first == second or (first and second and _is_allowed(key, first, second, exact, trains)):
            continue
        if first and second and key.endswith(ALL):
            first_step = first_step or f"{key}: the first step after which stored tensors differ"
        elif first is None:
            lines.append(f"{key}: not in the record, got {second}")
        elif second is None:
            lines.append(f"{key}: recorded {first}, got nothing of this name")
        elif key.endswith("| operators"):
            lines.append(f"{key}: {_describe_counts_that_differ(first, second)}")
        else:
            near = f" (mean and rms within {NEAR:.1%})" if is_near(first, second, NEAR) else ""
            lines.append(f"{key}: recorded {first}, got {second}{near}")
    return [first_step, *lines] if first_step else lines


def _is_allowed(key: str, expected: str, actual: str, exact: bool, trains: bool) -> bool:
    """Return whether two entries may differ: never if ``exact``, otherwise within a tolerance."""
    if exact:
        return False
    if key.endswith(ALL):  # every tensor of the last step has an entry with statistics
        return True
    # A trained bias of one element may differ by a factor of 2, so only its type is compared.
    if trains and is_scalar(expected) and is_scalar(actual):
        return get_type_and_shape(expected) == get_type_and_shape(actual)
    return is_near(expected, actual, NEAR_TRAINED if trains else NEAR)


def _describe_counts_that_differ(expected: str, actual: str) -> str:
    """Return the operators whose counts differ in two entries of the form ``Add:2 Gather:1``."""
    pairs = [dict(item.rsplit(":", 1) for item in text.split()) for text in (expected, actual)]
    names = sorted(name for name in pairs[0] | pairs[1] if pairs[0].get(name) != pairs[1].get(name))
    return "; ".join(
        f"{name} recorded {pairs[0].get(name, 0)}, got {pairs[1].get(name, 0)}" for name in names
    )
