"""A click model whose bytes are almost all in tables, on synthetic data with many rare ids.

The model is a factorization machine plus a small multilayer perceptron over id fields (columns of
ids). Ids follow Zipf's law and labels depend on latent factors of each id. The model therefore
learns the factors of frequent ids and memorizes the labels of rare ids. The command ``python -m
examples.table_heavy FOLDER [small]`` writes the draft of a bundle. A draft is the folder of a
bundle before it is packed.
"""

import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

ARCHITECTURE = "examples.table_heavy:FactorizationPerceptron"


class FactorizationPerceptron(nn.Module):
    """A factorization machine plus a multilayer perceptron over the same id fields.

    Args:
        rows: number of table rows of each field; fields are named ``f0``, ``f1``, ...
        dim: width of each table; the linear terms are tables of width 1.
        hidden: widths of the perceptron's layers.
    """

    def __init__(self, rows: list[int], dim: int = 16, hidden: list[int] | None = None) -> None:
        super().__init__()
        hidden = [64, 32] if hidden is None else hidden
        self.fields = [f"f{index}" for index in range(len(rows))]
        self.vectors = nn.ModuleDict(
            {f: nn.Embedding(n, dim) for f, n in zip(self.fields, rows, strict=True)}
        )
        self.linear = nn.ModuleDict(
            {f: nn.Embedding(n, 1) for f, n in zip(self.fields, rows, strict=True)}
        )
        widths = [dim * len(rows), *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.out = nn.Linear(widths[-1], 1)
        for table in (*self.vectors.values(), *self.linear.values()):
            for weight in table.parameters():
                nn.init.normal_(weight, std=0.05)

    def forward(self, **ids: Tensor) -> Tensor:
        """Return logits float ``(rows,)`` of ids int ``(rows,)``, given by field."""
        vectors = torch.stack([self.vectors[f](ids[f]) for f in self.fields], dim=1)
        linear = torch.stack([self.linear[f](ids[f]) for f in self.fields], dim=1).sum(dim=(1, 2))
        total = vectors.sum(dim=1)  # (rows, dim)
        pairs = 0.5 * (total.square() - vectors.square().sum(dim=1)).sum(dim=1)
        x = vectors.flatten(1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        logits: Tensor = linear + pairs + self.out(x).squeeze(1)
        return logits


@dataclass(frozen=True)
class Size:
    """Sizes of the tables and the data.

    Attributes:
        rows: number of table rows of each field.
        train: training rows; validation has a fifth as many, test two fifths.
        dim: width of the tables.
        hidden: widths of the perceptron.
        zipf: exponent of the id frequencies.
        epochs: training epochs.
    """

    rows: tuple[int, ...] = (60_000, 50_000, 30_000, 12_000, 6_000, 2_000)
    train: int = 60_000
    dim: int = 16
    hidden: tuple[int, ...] = (128, 64)
    zipf: float = 1.05
    epochs: int = 3


SMALL = Size(rows=(6_000, 4_000, 1_500), train=8_000, dim=8, hidden=(32, 16), epochs=3)


def write_draft(folder: Path, size: Size, *, name: str = "tableheavy", seed: int = 0) -> Path:
    """Generate data, train the network and write the draft of a bundle.

    Args:
        folder: folder of the draft.
        size: sizes of the tables and the data.
        name: name of the model.
        seed: seed of the data and of the initial weights.

    Returns:
        The folder of the draft.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    latent = [rng.normal(size=(rows, 4)) for rows in size.rows]
    ids_by_frequency = [rng.permutation(rows) for rows in size.rows]
    counts = {"train": size.train, "validation": size.train // 5, "test": 2 * size.train // 5}
    columns = {
        split: _draw_rows(size, count, latent, ids_by_frequency, rng)
        for split, count in counts.items()
    }
    for split, table in columns.items():
        pq.write_table(pa.table(table), folder / f"{split}.parquet")
    torch.manual_seed(seed)
    config = {"rows": list(size.rows), "dim": size.dim, "hidden": list(size.hidden)}
    network = FactorizationPerceptron(list(size.rows), size.dim, list(size.hidden))
    _train(network, columns["train"], size)
    save_file(network.state_dict(), folder / "model.safetensors")
    fields = network.fields
    document = {
        "schema_version": 2,
        "name": name,
        "version": "1",
        "signature": {
            "inputs": [{"kind": "id", "name": f, "table": f"vectors.{f}"} for f in fields],
            "outputs": [
                {"name": "score", "kind": "ctr", "form": "logit", "label": "label", "metric": "auc"}
            ],
        },
        "network": {"architecture": {"path": ARCHITECTURE, "config": config}},
        "data": {split: f"{split}.parquet" for split in counts},
    }
    (folder / "model.json").write_text(json.dumps(document, indent=1))
    return folder


Columns = dict[str, NDArray[np.int64]]
"""Ids by field, and labels as ``label``, each ``(rows,)``."""


def _draw_rows(
    size: Size,
    count: int,
    latent: list[NDArray[np.float64]],
    ids_by_frequency: list[NDArray[np.int64]],
    rng: np.random.Generator,
) -> Columns:
    """Draw ``count`` rows: ids by frequency, and labels from the latent factors of the ids.

    By field, ``latent`` has the factors of each id, ``(rows, 4)``, and ``ids_by_frequency`` the ids
    from the most to the least frequent, ``(rows,)``.
    """
    ids = []
    for rows, id_of_rank in zip(size.rows, ids_by_frequency, strict=True):
        frequency = np.arange(1, rows + 1) ** -size.zipf
        ids.append(id_of_rank[rng.choice(rows, count, p=frequency / frequency.sum())])
    factors = [table[field_ids] for table, field_ids in zip(latent, ids, strict=True)]
    total = np.sum(factors, axis=0)
    pairs = 0.5 * (total**2 - np.sum([x**2 for x in factors], axis=0)).sum(axis=1)
    # A factorization machine with these factors; -1 makes positives rarer than negatives.
    logits = 0.5 * np.sum([x[:, 0] for x in factors], axis=0) + 0.3 * pairs - 1.0
    label = (rng.random(count) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    return {**{f"f{index}": field_ids for index, field_ids in enumerate(ids)}, "label": label}


def _train(network: FactorizationPerceptron, columns: Columns, size: Size) -> None:
    """Train a network in place on the columns of the training rows."""
    label = torch.tensor(columns["label"]).float()
    ids = {f: torch.tensor(columns[f]) for f in network.fields}
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    network.train()
    for _ in range(size.epochs):
        for rows in torch.split(torch.randperm(len(label), generator=generator), 512):
            logits = network(**{f: column[rows] for f, column in ids.items()})
            loss = F.binary_cross_entropy_with_logits(logits, label[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    network.eval()


if __name__ == "__main__":
    write_draft(Path(sys.argv[1]), SMALL if "small" in sys.argv[2:] else Size())
