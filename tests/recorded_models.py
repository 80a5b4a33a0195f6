"""A network whose constructor reads numbers from a data set in a file, as RecBole's models do.

``import_network`` of ``recpress new`` imports this module. It records what the constructor reads,
so that a bundle can build the network without the file.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

ROWS = Path("rows.csv")


class Rows:
    """The rows of a file, and the number of values of each column."""

    shared = "shared"  # an attribute of the class; no network here reads it

    def __init__(self, path: Path = ROWS) -> None:
        with open(path) as file:  # noqa: PTH123 - most libraries call open()
            header, *lines = [line.strip().split(",") for line in file]
        self.columns = dict(zip(header, zip(*lines, strict=True), strict=True))
        self.settings = {"hidden": [6], "activation": nn.Tanh}

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def num(self, name: str, *, padding: bool = False) -> int:
        """Return the number of different values of a column, plus one with ``padding``."""
        return len(set(self.columns[name])) + padding

    def matrix(self) -> Tensor:
        """Return all values, float ``(columns, rows)``."""
        return torch.tensor(
            [[float(value) for value in column] for column in self.columns.values()]
        )


class ReadingNet(nn.Module):
    """A network with a table for each of the columns ``user`` and ``item`` that the rows have."""

    def __init__(self, rows: Rows, dim: int) -> None:
        super().__init__()
        self.columns = [name for name in ("user", "item") if name in rows]
        self.tables = nn.ModuleList(
            nn.Embedding(rows.num(name, padding=True), dim) for name in self.columns
        )
        self.hidden = nn.Linear(dim, rows.settings["hidden"][0])
        self.activation = rows.settings["activation"]()
        self.first_user = rows["user"][0]
        self.name = getattr(rows, "name", "unknown")  # a read of an attribute that does not exist

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Return scores ``(rows, 1)``: a sum over a dense layer on the sum of the tables' rows."""
        total = self.tables[0](user) + self.tables[1](item)
        return self.activation(self.hidden(total)).sum(dim=1, keepdim=True)


class AveragingNet(nn.Module):
    """A network that computes with a tensor that it reads, which JSON cannot store."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.mean = rows.matrix() * 0.5


def reading() -> ReadingNet:
    """Return a network whose data set was read from a file."""
    return ReadingNet(Rows(), dim=4)


def copied() -> ReadingNet:
    """Return a network whose data set was not constructed by a call of its class."""
    rows = Rows.__new__(Rows)
    vars(rows).update(vars(Rows()))
    return ReadingNet(rows, dim=4)


def averaging() -> AveragingNet:
    """Return a network that a bundle cannot store."""
    return AveragingNet(Rows())
