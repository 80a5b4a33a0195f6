"""Check that a model's quality can be measured at all: its labels and its scores. No Prefect.

A problem is, for example, that all labels or all scores are equal. The baseline is the untouched
model of a bundle, with which a compressed model is compared.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from compressors.contracts import ITEMS, TRAFFIC, Signature, Split
from compressors.contracts.reasons import Reason
from compressors.core.batches import Rows
from compressors.metrics.baseline_checks import find_label_problems, find_score_problems
from compressors.metrics.baseline_problem import BaselineProblem
from infra.data.catalogue import prepare
from infra.errors import DataRefused
from infra.store.temporary import scratch_folder

MEASURED_SPLITS = ("test", "validation")
"""The splits on which quality is measured, so that their labels matter."""


@dataclass(frozen=True)
class LabelCheck:
    """The result of ``check_labels``.

    Attributes:
        problems: the problems of the labels.
        test: the prepared test rows, in the folder ``into`` of ``check_labels``.
    """

    problems: tuple[BaselineProblem, ...]
    test: Split


def check_labels(
    signature: Signature,
    paths: Mapping[str, Path],
    splits: Collection[str],
    into: Path,
    tokenizer_files: Mapping[str, Path],
) -> LabelCheck:
    """Convert splits from parquet to tensors, as the flow does, and check their labels.

    Args:
        signature: the bundle's signature.
        paths: parquet file or folder of each split, by the split's name.
        splits: names of the splits to check; ``test`` is always checked.
        into: a folder for the prepared test rows.
        tokenizer_files: the file of each tokenizer that an input names, by this name.

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
                prepared = prepare(paths, split, signature, folder, tokenizer_files)
            except DataRefused as fault:
                raise DataRefused("split_unusable", split=split, problem=str(fault)) from fault
            # The catalogue (ITEMS) and logged requests (TRAFFIC) have no labels.
            if split in (ITEMS, TRAFFIC) or not prepared.rows:
                continue
            # The rows are not an artifact, so they have no hash; nothing reads it here.
            prepared_split = Split(path=str(folder), sha256="0" * 64, rows=prepared.rows)
            rows = Rows(prepared_split, signature)
            group = None if rows.group is None else rows.group.numpy()
            problems += find_label_problems(signature, split, rows.label.numpy(), group)
            if split == "test":
                test = prepared_split
    return LabelCheck(tuple(problems), test)


def check_scores(
    module: nn.Module, signature: Signature, labelled: LabelCheck
) -> tuple[BaselineProblem, ...]:
    """Score a sample of the test rows; returns the problems of the labels and of the scores."""
    return (*labelled.problems, *find_score_problems(module, signature, labelled.test))


def check_baseline(
    module: nn.Module,
    signature: Signature,
    paths: Mapping[str, Path],
    tokenizer_files: Mapping[str, Path],
) -> tuple[BaselineProblem, ...]:
    """Check the labels of test and validation rows, and a sample of the test rows' scores.

    Args:
        module: the loaded model.
        signature: the bundle's signature.
        paths: parquet file or folder of each split, by the split's name.
        tokenizer_files: the file of each tokenizer that an input names, by this name.

    Raises:
        DataRefused: a split does not match the signature.
    """
    with scratch_folder("check") as scratch:
        labelled = check_labels(signature, paths, MEASURED_SPLITS, scratch, tokenizer_files)
        return check_scores(module, signature, labelled)


def require_sound(problems: tuple[BaselineProblem, ...], *, is_packed: bool) -> tuple[Reason, ...]:
    """Raise for problems that make measurements meaningless; return the others as warnings.

    Args:
        problems: all problems of one bundle.
        is_packed: whether the bundle is already stored. If so, only problems that prevent
            measurement raise.

    Raises:
        DataRefused: contains one line per problem.
    """
    errors = [
        item.reason
        for item in problems
        if (item.prevents_measurement if is_packed else item.prevents_packing)
    ]
    if errors:
        raise DataRefused("not_measurable", problems=tuple(errors))
    return tuple(item.reason for item in problems)
