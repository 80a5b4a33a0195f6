"""Write a draft of a click model whose labels are drawn with the network's probabilities.

A draft is the folder of a bundle before it is packed. Because of these labels (the network is
"planted" in the data), no other network fits the data better, and compression can only lower the
quality.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

SPREAD = 1.1  # standard deviation of the logits
CLICK = {"name": "click", "kind": "ctr", "form": "logit", "label": "click", "metric": "auc"}
"""The output in the signature of such a draft."""


def write_click_draft(
    folder: Path,
    *,
    name: str,
    model: nn.Module,
    architecture: Mapping[str, Any],
    signature: Mapping[str, Any],
    columns: Mapping[str, Mapping[str, pa.Array]],
    logits: Mapping[str, Tensor],
    rng: np.random.Generator,
) -> Path:
    """Write ``model.json``, the weights and one parquet file per split; return the folder.

    Args:
        folder: the folder of the draft, which exists.
        name: name of the bundle.
        model: the network.
        architecture: its class and arguments, as ``model.json`` has them.
        signature: its signature; its label is the column ``click``.
        columns: the inputs of each split by column.
        logits: the network's logits for the rows of each split, float ``(rows,)``.
        rng: draws the labels, split after split.
    """
    tables = {
        split: {**inputs, "click": pa.array(draw_clicks(logits[split].sigmoid(), rng))}
        for split, inputs in columns.items()
    }
    return write_files(
        folder,
        name=name,
        model=model,
        architecture=architecture,
        signature=signature,
        tables=tables,
    )


def draw_clicks(probability: Tensor, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw labels 0 and 1, int64 ``(rows,)``, with these probabilities of 1."""
    clicks: NDArray[np.bool_] = rng.random(len(probability)) < probability.numpy()
    return clicks.astype(np.int64)


def write_files(
    folder: Path,
    *,
    name: str,
    model: nn.Module,
    architecture: Mapping[str, Any],
    signature: Mapping[str, Any],
    tables: Mapping[str, Mapping[str, pa.Array]],
) -> Path:
    """Write ``model.json``, the weights and one parquet file per split; return the folder.

    The arguments are those of ``write_click_draft``; ``tables`` has the columns of each split, with
    the labels.
    """
    for split, table in tables.items():
        pq.write_table(pa.table(table), folder / f"{split}.parquet")
    save_file(model.state_dict(), folder / "model.safetensors")
    document = {
        "schema_version": 2,
        "name": name,
        "version": "1",
        "signature": signature,
        "network": {"architecture": architecture},
        "data": {split: f"{split}.parquet" for split in tables},
    }
    (folder / "model.json").write_text(json.dumps(document, indent=1))
    return folder
