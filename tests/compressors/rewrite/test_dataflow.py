"""Who reads whom: what lets numbers through, and what else reads a layer."""

from collections.abc import Callable

import pytest
import torch
from chained_networks import BLOCK, CHAIN, NORM_FIRST
from error_codes import raises_code
from models import RANKER, Reference, compressed
from narrow_networks import SCHEMA, Branching, Plain
from torch import Tensor, nn
from torch.nn import functional as F

import compressors.rewrite.dataflow as dataflow_module
from compressors.contracts import Signature
from compressors.contracts.reasons import Reason
from compressors.core.skipping import run_or_skip
from compressors.errors.steps import StepRefused
from compressors.rewrite.dataflow import Dataflow, Reader, dataflow
from compressors.rewrite.fold import Fold


def of(reference: Reference) -> Dataflow:
    return dataflow(reference.model().module, reference.signature)


def test_positive_factors_pass_relus_slopes_and_views():
    found = of(CHAIN)
    assert found.readers["a"] == (Reader("b", ("leaky_relu",)),)
    assert found.readers["b"] == (Reader("c", ("prelu", "clamp")), Reader("d", ("prelu", "clamp")))
    assert found.direct_consumers("b") == ()


BENDS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (torch.relu, True),
    "leaky": (lambda x: F.leaky_relu(x, 0.2), True),
    "at zero": (lambda x: x.clamp(min=0), True),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), True),
    "sizes": (lambda x: x.abs(), True),
    "from one": (lambda x: x.clamp(min=1), False),
    "to six": (lambda x: x.clamp(0, 6), False),
    "gelu": (F.gelu, False),
    "sum": (lambda x: x + x.flip(1), False),
    "softmax": (lambda x: x.softmax(dim=1), False),
}


class Bent(Plain):
    def __init__(self, bend: str) -> None:
        super().__init__()
        self.bend = bend

    def between(self, x: Tensor) -> Tensor:
        return BENDS[self.bend][0](x)


@pytest.mark.parametrize("bend", BENDS)
def test_a_bend_passes_if_positive_factors_do(bend):
    function, passes = BENDS[bend]
    x = 6 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.5
    alike = torch.allclose(function(x * scale), function(x) * scale)
    assert alike == passes
    assert ("hidden" in of(Reference(Bent, SCHEMA, {"bend": bend})).readers) == passes


def test_what_stops_them_is_named():
    found = of(CHAIN)
    assert found.reasons["c"] == Reason("output_enters", operator="gelu")
    assert found.reasons["d"] == Reason("output_enters", operator="tanh")
    called_again = Reason("called_again")
    assert found.reasons["e"] == Reason("reader_closed", reader="twice", why=called_again)
    assert of(RANKER).reasons["capped"] == Reason("output_enters", operator="relu6")


def test_layers_whose_numbers_cannot_change_are_closed():
    assert of(CHAIN).fixed == {
        "twice": Reason("called_again"),
        "looked": Reason("weight_read_elsewhere"),
    }


def test_dataflow_of_norms_before_and_after_a_layer():
    found = of(NORM_FIRST)
    assert found.direct_consumers("first") == ("hidden",)
    assert found.only_producer("second") == "plain"
    assert found.only_producer("third") is None  # the sum reads what the norm reads
    assert found.reasons["deep"] == Reason("output_enters", operator="add")


def test_a_norm_that_three_layers_read_over_a_sequence():
    found = of(BLOCK)
    assert found.direct_consumers("first") == ("query", "key", "value")
    assert found.readers["up"] == (Reader("down", ("relu",)),)
    assert found.direct_consumers("last") == ("out",)
    assert found.dims["query"] == 3


class Tied(nn.Module):
    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.a, self.b = nn.Linear(9, width), nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.c, self.out = nn.Linear(width, width), nn.Linear(width, 1)
        self.spare = nn.Linear(3, 3)
        torch.nn.utils.parametrizations.weight_norm(self.c)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = F.relu(self.a(torch.cat([self.user(user), price], dim=1)))
        # the first of two halves: other channels than went in
        x = self.c(F.relu(self.b(x))).unflatten(1, (9, 1)).select(2, 0)
        score: Tensor = self.out(F.relu(x))
        return score


def test_shared_computed_and_unused_weights_are_closed():
    found = of(Reference(Tied, SCHEMA))
    assert found.fixed["a"] == Reason("shares_tensor", other="b")
    assert found.fixed["b"] == Reason("shares_tensor", other="a")
    assert "c" not in found.readers  # its weight is computed at every call
    assert found.fixed["c"] == found.fixed["spare"] == Reason("not_called")


class Columns(nn.Module):
    """Views, and picks of rows and of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.kept, self.moved = nn.Linear(9, 8), nn.Linear(9, 8)
        self.turned, self.out = nn.Linear(9, 8), nn.Linear(8, 1)
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        a = self.first(self.kept(x).unsqueeze(1)[:, 0])
        square = self.moved(x).unsqueeze(1).expand(-1, 8, 8)
        b = self.second(square.select(2, 0))
        c = self.third(self.turned(x).view(-1, 4, 2).transpose(1, 2).reshape(-1, 8))
        score: Tensor = self.out(F.relu(a) * F.relu(b) * F.relu(c))
        return score


def test_channels_are_followed_only_while_they_stay_in_place():
    found = of(Reference(Columns, SCHEMA))
    assert found.direct_consumers("kept") == ("first",)
    assert found.reasons["moved"] == Reason("output_enters", operator="select")
    assert found.reasons["turned"] == Reason("output_enters", operator="view")


def test_a_step_traces_the_network_once(monkeypatch, tmp_path):
    counts = []
    traced = dataflow_module._graphs

    def counted(module: nn.Module, signature: Signature) -> object:
        counts.append(1)
        return traced(module, signature)

    monkeypatch.setattr(dataflow_module, "_graphs", counted)
    run_or_skip(Fold(), NORM_FIRST.model(), NORM_FIRST.bench(tmp_path / "data"), tmp_path / "out")
    assert len(counts) == 1


def test_packed_layers_are_nobodys_neighbours():
    model = compressed("Ranker", ("static_int8",))
    assert not dataflow(model.module, RANKER.signature).readers


def test_a_network_that_cannot_be_exported_is_refused_in_a_sentence():
    with raises_code(StepRefused, "network_not_traceable") as refusal:
        dataflow(Branching(), SCHEMA.model_copy(update={"inputs": SCHEMA.inputs}))
    assert refusal.value.__cause__ is not None
