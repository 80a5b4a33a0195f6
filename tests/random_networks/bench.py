"""Write the bench of a random network: typical rows in the format of prepared data.

Prepared data is what the task ``prepare`` writes for a split: a safetensors file with a tensor for
each input, ``@label``, ``@group`` and ``@bounds/<input>`` (bounds of the lists of a jagged bag).
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.contracts import Bench, DenseInput, JaggedBag, Signature, Split
from tests.random_networks.generator import Case
from tests.random_networks.inputs import Rows, draw_typical_rows, take_ids_of_rows

BENCH_ROWS = 64


def write_bench(case: Case, module: nn.Module, tables: dict[str, int], folder: Path) -> Bench:
    """Write typical rows for each split, with labels that a step can learn.

    Args:
        case: the random network.
        module: the network with its weights; its scores determine the labels.
        tables: number of rows by table.
        folder: folder for the splits.
    """
    parts: dict[str, Split] = {}
    # Each split has its own seed, from 70.
    for seed, name in enumerate(("calibration", "train", "validation"), 70):
        rows = draw_typical_rows(case.signature, tables, BENCH_ROWS, case.scales, seed)
        with torch.no_grad():
            score = module(**rows).reshape(-1).nan_to_num()
        if name == "train":  # the network is its teacher, whose scores are the soft labels
            parts["soft_labels"] = _save_split(folder / "soft_labels", {"score": score})
        # Labels follow the network's scores, with every fifth label flipped, so training can learn.
        label = ((score > score.median()) ^ (torch.arange(BENCH_ROWS) % 5 == 0)).float()
        parts[name] = _save_split(
            folder / name, {**_prepared_tensors(case.signature, rows), "@label": label}
        )
    return Bench(signature=case.signature, **parts)


def _prepared_tensors(signature: Signature, rows: Rows) -> dict[str, Tensor]:
    tensors = {}
    for item in signature.inputs:
        tensors[item.name] = rows[item.name]
        if isinstance(item, JaggedBag) and not isinstance(item, DenseInput):
            lengths = torch.tensor([len(ids) for ids in take_ids_of_rows(item, rows)])
            tensors[f"@bounds/{item.name}"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if signature.group is not None:
        tensors["@group"] = torch.arange(BENCH_ROWS) // 8  # 8 rows per group
    return tensors


def _save_split(folder: Path, tensors: dict[str, Tensor]) -> Split:
    folder.mkdir(parents=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "data.safetensors")
    return Split(path=str(folder), sha256="0" * 64, rows=BENCH_ROWS)
