"""Trained networks that ``recpress new`` imports, in a module outside of recpress.

``ShopNet`` receives its settings as objects, and all its inputs in one mapping.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

USERS, ITEMS = 40, 30


class Column(NamedTuple):
    """An id column: its name, and the rows of its table."""

    name: str
    rows: int


class Pooling(enum.Enum):
    """How the lists of ids are pooled."""

    MEAN = "mean"
    SUM = "sum"


@dataclass(frozen=True)
class Settings:
    """The settings of ``ShopNet``."""

    columns: tuple[Column, ...]
    pooling: Pooling
    dim: int = 4
    hidden: list[int] = field(default_factory=lambda: [8])


class ShopNet(nn.Module):
    """A click network with a table per column, and a mean or sum of the ids of ``tags``."""

    def __init__(
        self,
        settings: Settings,
        activation: nn.Module,
        norm: type[nn.Module] = nn.Identity,
        *,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.tables = nn.ModuleDict(
            {column.name: nn.Embedding(column.rows, settings.dim) for column in settings.columns}
        )
        self.tags = nn.Embedding(20, settings.dim)
        width = settings.dim * (len(settings.columns) + 1) + 2
        self.first = nn.Linear(width, settings.hidden[0])
        self.activation = activation
        self.norm = norm(settings.hidden[0])
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(settings.hidden[0], 1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return probabilities ``(rows, 1)``."""
        ids = [self.tables[column.name](inputs[column.name]) for column in self.settings.columns]
        tags = inputs["tags"]
        is_tag = (tags != 0).unsqueeze(2)
        bag = (self.tags(tags) * is_tag).sum(dim=1)
        if self.settings.pooling is Pooling.MEAN:
            bag = bag / is_tag.sum(dim=1).clamp(min=1)
        hidden = self.first(torch.cat([*ids, bag, inputs["price"], inputs["age"]], dim=1))
        probability: Tensor = self.out(self.dropout(self.norm(self.activation(hidden)))).sigmoid()
        return probability


def shop(pooling: Pooling = Pooling.MEAN) -> ShopNet:
    """Return a network with seeded weights."""
    torch.manual_seed(0)
    columns = (Column("user", USERS), Column("item", ITEMS))
    return ShopNet(Settings(columns, pooling), nn.LeakyReLU(0.2), nn.LayerNorm)


def print_and_return() -> ShopNet:
    """Print a line, as training scripts do, and return a network."""
    print("epoch 1")  # noqa: T201 - the command must not mix it with its result
    return shop()


class TiedNet(nn.Module):
    """A network with two tables that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, 4)
        self.again = nn.Embedding(ITEMS, 4)
        self.again.weight = self.item.weight
        self.out = nn.Linear(8, 1)

    def forward(self, item: Tensor, user: Tensor) -> Tensor:
        """Return logits ``(rows, 1)``."""
        logits: Tensor = self.out(torch.cat([self.item(item), self.again(user % ITEMS)], dim=1))
        return logits


tied = TiedNet()


class FunctionNet(nn.Module):
    """A network with a function as an argument, which JSON cannot represent."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 1)
        self.activation = activation

    def forward(self, user: Tensor) -> Tensor:
        """Return values ``(rows, 1)``."""
        return self.activation(self.user(user))


function = FunctionNet(torch.relu)


class PatchedNet(TiedNet):
    """A network whose output depends on an attribute that was set after it was constructed."""

    factor = 1.0

    def forward(self, item: Tensor, user: Tensor) -> Tensor:
        """Return logits ``(rows, 1)``."""
        return self.factor * super().forward(item, user)


patched = PatchedNet()
patched.factor = 2.0

number = 3  # an object that is no network, which ``recpress new`` must refuse


def fails() -> nn.Module:
    """Raise the error that a script without its checkpoint raises."""
    raise FileNotFoundError("checkpoint.safetensors")


class Level(enum.IntEnum):
    """A number with a name."""

    LOW = 1
    HIGH = 2


@dataclass
class Width:
    """Settings that scripts change after they are created."""

    dim: int = 4


class ChangingNet(nn.Module):
    """A network that changes the list that it is given."""

    def __init__(self, widths: list[int], settings: Width, level: Level) -> None:
        super().__init__()
        widths.insert(0, settings.dim)
        self.user = nn.Embedding(USERS, widths[0] * level)


def changed() -> ChangingNet:
    """Return a network whose settings were changed after they were created."""
    settings = Width()
    settings.dim = 8
    return ChangingNet([3], settings, Level.HIGH)


class AnyArguments(nn.Module):
    """A network with any number of arguments."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, sum(widths))


any_arguments = AnyArguments(1, 2)


class ContentTowers(nn.Module):
    """Two towers, of which that of items reads only the tags of an item."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.tag = nn.Embedding(USERS * 10, 4), nn.Embedding(USERS, 4)

    def of_user(self, user: Tensor) -> Tensor:
        """Return vectors ``(rows, 4)``."""
        vectors: Tensor = self.user(user)
        return vectors

    def of_mapping(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return vectors ``(rows, 4)``."""
        return self.of_user(inputs["user"])

    def mean(self, user: Tensor) -> Tensor:
        """Return means ``(rows,)``, which are no vectors."""
        return self.of_user(user).mean(dim=1)

    def of_item(self, tags: Tensor) -> Tensor:
        """Return vectors ``(rows, 4)``."""
        vectors: Tensor = (self.tag(tags) * (tags != 0).unsqueeze(2)).sum(dim=1)
        return vectors

    def forward(self, user: Tensor, tags: Tensor) -> Tensor:
        """Return the dot products ``(rows,)``."""
        return (self.of_user(user) * self.of_item(tags)).sum(dim=1)


def content_towers() -> ContentTowers:
    """Return a network with seeded weights."""
    torch.manual_seed(0)
    return ContentTowers()
