"""Check a bundle's model and labels before compression. No Prefect."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from compressors.contracts import ITEMS, TRAFFIC, Signature, Split
from compressors.contracts.reasons import Reason
from compressors.core.batches import Rows
from compressors.metrics.baseline_checks import label_problems, score_problems
from compressors.metrics.baseline_problem import BaselineProblem
from infra.data.catalogue import prepare
from infra.errors import DataRefused
from infra.store.temporary import scratch_folder

JUDGED = ("test", "validation")


@dataclass(frozen=True)
class LabelledSplits:
    """Problems of the labels, and the prepared test rows, valid as long as their folder exists."""

    problems: tuple[BaselineProblem, ...]
    test: Split


def check_labels(
    signature: Signature, paths: Mapping[str, Path], splits: Collection[str], into: Path
) -> LabelledSplits:
    """Prepare splits with the checks of a run, and check their labels.

    Args:
        signature: the bundle's signature.
        paths: parquet file or folder by split name.
        splits: the splits to check; ``test`` is always checked.
        into: a folder for the prepared test rows.

    Raises:
        DataRefused: a split does not match the signature.
    """
    problems: list[BaselineProblem] = []
    for split in paths:
        if split != "test" and split not in splits:
            continue
        with scratch_folder("check") as scratch:
            folder = into if split == "test" else scratch
            try:
                prepared = prepare(paths, split, signature, folder)
            except DataRefused as fault:
                raise DataRefused("split_unusable", split=split, problem=str(fault)) from fault
            if split in (ITEMS, TRAFFIC) or not prepared.rows:
                continue
            held = Split(path=str(folder), sha256="0" * 64, rows=prepared.rows)
            rows = Rows(held, signature)
            group = None if rows.group is None else rows.group.numpy()
            problems += label_problems(signature, split, rows.label.numpy(), group)
            if split == "test":
                test = held
    return LabelledSplits(tuple(problems), test)


def check_scores(
    module: nn.Module, signature: Signature, labelled: LabelledSplits
) -> tuple[BaselineProblem, ...]:
    """Score a sample of the test rows, and add the problems of the scores."""
    return (*labelled.problems, *score_problems(module, signature, labelled.test))


def check_baseline(
    module: nn.Module, signature: Signature, paths: Mapping[str, Path]
) -> tuple[BaselineProblem, ...]:
    """Check the labels of test and validation rows, and a sample of the test rows' scores.

    Args:
        module: the loaded model.
        signature: of the bundle.
        paths: parquet file or folder by split name.
    """
    with scratch_folder("check") as scratch:
        return check_scores(module, signature, check_labels(signature, paths, JUDGED, scratch))


def require_sound(problems: tuple[BaselineProblem, ...], *, packed: bool) -> tuple[Reason, ...]:
    """Raise for problems that make results meaningless; return the others as warnings.

    Args:
        problems: problems of one bundle.
        packed: whether the bundle is already stored; then only problems that prevent measurement
            raise.

    Raises:
        DataRefused: one line per problem.
    """
    refused = [item.reason for item in problems if (item.fatal if packed else item.refused)]
    if refused:
        raise DataRefused("not_measurable", problems=tuple(refused))
    return tuple(item.reason for item in problems)
