"""A click model that is nearly all tables, with data in which most ids are rare.

A factorization machine next to a small perceptron over id fields. Ids are drawn by Zipf's law and
labels from latent numbers of each id, so frequent rows of the tables hold what was learned and rare
rows what was memorized. ``python -m examples.table_heavy FOLDER [small]`` writes the draft of a
bundle.
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
    """A factorization machine plus a perceptron over the same id fields.

    Args:
        rows: of the table of each field; fields are called ``f0``, ``f1``, ...
        dim: width of each table; the linear terms are tables of width 1.
        hidden: widths of the perceptron's layers.
    """

    def __init__(self, rows: list[int], dim: int = 16, hidden: list[int] | None = None) -> None:
        super().__init__()
        hidden = [64, 32] if hidden is None else hidden
        self.fields = [f"f{place}" for place in range(len(rows))]
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
        """Logits ``(rows,)`` of one id int ``(rows,)`` a field."""
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
    """How large the tables and the data are.

    Attributes:
        rows: of the table of each field.
        train: labelled rows to train on; a fifth as many are for validation, two fifths for test.
        dim: width of the tables.
        hidden: widths of the perceptron.
        zipf: exponent of the ids' frequencies.
        epochs: of training.
    """

    rows: tuple[int, ...] = (60_000, 50_000, 30_000, 12_000, 6_000, 2_000)
    train: int = 60_000
    dim: int = 16
    hidden: tuple[int, ...] = (128, 64)
    zipf: float = 1.05
    epochs: int = 3


SMALL = Size(rows=(6_000, 4_000, 1_500), train=8_000, dim=8, hidden=(32, 16), epochs=3)


def write_draft(folder: Path, size: Size, *, name: str = "tableheavy", seed: int = 0) -> Path:
    """Draw data, train the network on it and write a draft of a bundle.

    Args:
        folder: that the draft is written to.
        size: of tables and data.
        name: of the model.
        seed: of everything drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(seed)
    latent = [drawn.normal(size=(rows, 4)) for rows in size.rows]
    order = [drawn.permutation(rows) for rows in size.rows]
    counts = {"train": size.train, "validation": size.train // 5, "test": 2 * size.train // 5}
    columns = {
        split: _columns(size, count, latent, order, drawn) for split, count in counts.items()
    }
    for split, held in columns.items():
        pq.write_table(pa.table(held), folder / f"{split}.parquet")
    torch.manual_seed(seed)
    config = {"rows": list(size.rows), "dim": size.dim, "hidden": list(size.hidden)}
    network = FactorizationPerceptron(list(size.rows), size.dim, list(size.hidden))
    _train(network, columns["train"], size)
    save_file(network.state_dict(), folder / "model.safetensors")
    fields = network.fields
    document = {
        "schema_version": 1,
        "name": name,
        "version": "1",
        "signature": {
            "task": "ctr",
            "inputs": [{"kind": "id", "name": f, "table": f"vectors.{f}"} for f in fields],
            "output": "logit",
            "label": "label",
            "metric": "auc",
        },
        "network": {"architecture": {"path": ARCHITECTURE, "config": config}},
        "data": {split: f"{split}.parquet" for split in counts},
    }
    (folder / "model.json").write_text(json.dumps(document, indent=1))
    return folder


Columns = dict[str, NDArray[np.int64]]


def _columns(
    size: Size,
    count: int,
    latent: list[NDArray[np.float64]],
    order: list[NDArray[np.int64]],
    drawn: np.random.Generator,
) -> Columns:
    ids = []
    for rows, places in zip(size.rows, order, strict=True):
        share = np.arange(1, rows + 1) ** -size.zipf
        ids.append(places[drawn.choice(rows, count, p=share / share.sum())])
    own = [held[chosen] for held, chosen in zip(latent, ids, strict=True)]
    total = np.sum(own, axis=0)
    pairs = 0.5 * (total**2 - np.sum([x**2 for x in own], axis=0)).sum(axis=1)
    logits = 0.5 * np.sum([x[:, 0] for x in own], axis=0) + 0.3 * pairs - 1.0
    label = (drawn.random(count) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    return {**{f"f{place}": chosen for place, chosen in enumerate(ids)}, "label": label}


def _train(network: FactorizationPerceptron, columns: Columns, size: Size) -> None:
    label = torch.tensor(columns["label"]).float()
    ids = {f: torch.tensor(columns[f]) for f in network.fields}
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    drawn = torch.Generator().manual_seed(0)
    network.train()
    for _ in range(size.epochs):
        for rows in torch.split(torch.randperm(len(label), generator=drawn), 512):
            logits = network(**{f: column[rows] for f, column in ids.items()})
            loss = F.binary_cross_entropy_with_logits(logits, label[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    network.eval()


if __name__ == "__main__":
    write_draft(Path(sys.argv[1]), SMALL if "small" in sys.argv[2:] else Size())
