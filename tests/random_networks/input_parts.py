"""Parts of random networks that read inputs: lookups, all kinds of bags, histories, dense inputs.

These parts are called with input tensors instead of outputs of other parts. ``input_specs`` returns
the inputs of a part with given settings as ``(kind of input, shape)``; the generator builds the
signature from them. ``takes``, ``gives``, ``size`` and ``draw`` are explained in ``parts.py``. In
``DIMS`` and ``ROWS``, repeated values are drawn more often.
"""

import random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.random_networks.parts import Part, Sizes, part

DIMS = (1, 2, 3, 4, 5, 7, 8, 8, 12, 16, 16, 16, 17, 24, 32, 32, 33)
ROWS = (2, 5, 9, 20, 33, 64, 150, 150, 300, 300, 500)
Inputs = list[tuple[str, tuple[int, ...]]]


class Source(Part):
    """A part that reads inputs.

    If ``reads`` is set, the part has no inputs of its own: it reads inputs of this kind that the
    generator has created for other parts.
    """

    takes = ()
    reads: ClassVar[str] = ""

    @staticmethod
    def input_specs(settings: dict[str, Any]) -> Inputs:
        """Return the inputs of a part; the first one has the ids of its table, if it has one."""
        raise NotImplementedError


def draw_table(rng: random.Random) -> dict[str, Any]:
    """Draw the number of rows and the dim of a table."""
    return {"rows": rng.choice(ROWS), "dim": rng.choice(DIMS)}


@part
class Lookup(Source):
    """The table row of one id, by the module or by ``F.embedding`` on the module's weight."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {**draw_table(rng), "functional": rng.random() < 0.04}

    @staticmethod
    def input_specs(settings: dict[str, Any]) -> Inputs:
        return [("id", ())]

    def __init__(self, sizes: Sizes, *, rows: int, dim: int, functional: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, dim)
        self.functional, self.size = functional, (dim,)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table.weight) if self.functional else self.table(ids)


@part
class Fields(Source):
    """Several ids of one table in one input; their rows are the fields."""

    gives = "fields"

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {**draw_table(rng), "count": rng.randint(2, 5)}

    @staticmethod
    def input_specs(settings: dict[str, Any]) -> Inputs:
        return [("id", (settings["count"],))]

    def __init__(self, sizes: Sizes, *, rows: int, dim: int, count: int) -> None:
        super().__init__()
        self.table, self.size = nn.Embedding(rows, dim), (count, dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


@part
class PaddedBag(Source):
    """An EmbeddingBag over padded lists, in all modes, optionally with weights as an input."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        mode = rng.choice(("sum", "mean", "max"))
        return {
            **draw_table(rng),
            "mode": mode,
            "length": rng.choice((1, 2, 5, 8)),
            "padding": rng.random() < 0.7,
            "weighted": mode == "sum" and rng.random() < 0.5,
        }

    @staticmethod
    def input_specs(settings: dict[str, Any]) -> Inputs:
        shape = (settings["length"],)
        return [("padded_bag", shape), *([("dense", shape)] if settings["weighted"] else [])]

    def __init__(
        self, sizes: Sizes, *, rows: int, dim: int, mode: str, padding: bool, **more: Any
    ) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(rows, dim, mode=mode, padding_idx=0 if padding else None)
        self.size = (dim,)

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return self.table(ids)
        return self.table(ids, per_sample_weights=weights)


@part
class JaggedBag(Source):
    """An EmbeddingBag over concatenated lists, with offsets or lengths and optional id weights.

    With ``last``, lengths are converted to offsets that include the end of the last list.
    """

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        mode = rng.choice(("sum", "mean", "max"))
        return {
            **draw_table(rng),
            "mode": mode,
            "length": rng.choice((1, 3, 6)),
            "padding": rng.random() < 0.4,
            "weighted": mode == "sum" and rng.random() < 0.5,
            "layout": rng.choice(("offsets", "lengths")),
            "last": rng.random() < 0.5,
        }

    @staticmethod
    def input_specs(settings: dict[str, Any]) -> Inputs:
        return [(f"jagged_{settings['layout']}", (settings["length"],))]

    def __init__(
        self,
        sizes: Sizes,
        *,
        rows: int,
        dim: int,
        mode: str,
        padding: bool,
        weighted: bool,
        layout: str,
        last: bool,
        **more: Any,
    ) -> None:
        super().__init__()
        self.last = last and layout == "lengths"
        self.table = nn.EmbeddingBag(
            rows,
            dim,
            mode=mode,
            padding_idx=1 if padding else None,
            include_last_offset=self.last,
        )
        self.weight = nn.Embedding(rows, 1) if weighted else None
        self.layout, self.size = layout, (dim,)

    def forward(self, ids: Tensor, bounds: Tensor) -> Tensor:
        if self.layout == "lengths":
            bounds = bounds.cumsum(0) if self.last else bounds.cumsum(0) - bounds
            if self.last:
                bounds = torch.cat([bounds.new_zeros(1), bounds])
        if self.weight is None:
            return self.table(ids, bounds)
        weights = self.weight(ids).squeeze(-1)
        return self.table(ids, bounds, per_sample_weights=weights)


@part
class History(Source):
    """The table rows of a padded list of ids as a sequence, with a mask of the valid positions."""

    gives = "sequence"

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {
            **draw_table(rng),
            "length": rng.choice((1, 3, 6, 10)),
            "padding": rng.random() < 0.5,
        }

    @staticmethod
    def input_specs(settings: dict[str, Any]) -> Inputs:
        return [("padded_bag", (settings["length"],))]

    def __init__(self, sizes: Sizes, *, rows: int, dim: int, length: int, padding: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, dim, padding_idx=0 if padding else None)
        self.size = (length, dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(ids), ids != 0


@part
class Dense(Source):
    """A dense input."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"width": rng.choice((1, 2, 3, 8, 13))}

    @staticmethod
    def input_specs(settings: dict[str, Any]) -> Inputs:
        return [("dense", (settings["width"],))]

    def __init__(self, sizes: Sizes, *, width: int) -> None:
        super().__init__()
        self.size = (width,)

    def forward(self, x: Tensor) -> Tensor:
        return x


@part
class CrossedIds(Source):
    """A table whose ids the network computes from two inputs of other parts."""

    reads = "id"

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return draw_table(rng)

    @staticmethod
    def input_specs(settings: dict[str, Any]) -> Inputs:
        return []

    def __init__(self, sizes: Sizes, *, rows: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, dim)
        self.rows, self.size = rows, (dim,)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.table((left * 7 + right) % self.rows)


@part
class Buckets(Source):
    """A table indexed by the bucket of a dense input of another part."""

    reads = "dense"

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"rows": rng.choice((3, 5, 9)), "dim": rng.choice(DIMS)}

    @staticmethod
    def input_specs(settings: dict[str, Any]) -> Inputs:
        return []

    def __init__(self, sizes: Sizes, *, rows: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, dim)
        self.register_buffer("edges", torch.linspace(-1, 1, rows - 1))
        self.size = (dim,)

    def forward(self, x: Tensor) -> Tensor:
        bucket = (x[:, :1] > self.edges).long().sum(dim=1)  # (rows,)
        return self.table(bucket)


@part
class TiedOutput(Part):
    """A layer whose weight is the table of another part; its outputs are scores of all rows."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"form": rng.choice(("layer", "matmul")), "bias": rng.random() < 0.5}

    def __init__(self, sizes: Sizes, *, rows: int, dim: int, form: str, bias: bool) -> None:
        super().__init__()
        self.project = nn.Linear(sizes[0][0], dim)
        self.form, self.size = form, (rows,)
        self.output = nn.Linear(dim, rows, bias=bias)
        self.table = nn.Embedding(1, 1) if form == "matmul" else None  # ``tie`` replaces it

    def tie(self, table: nn.Module) -> None:
        """Share the weight of another part's table."""
        if self.form == "layer":
            self.output.weight = table.weight
        else:
            self.table, self.output = table, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.project(x))
        if self.table is not None:
            return torch.matmul(x, self.table.weight.t())
        return self.output(x)
