"""Dataflow: the consumers of each layer's output, and layers whose weights must not change.

A layer is *fixed* if its weights must not change, for example because other code reads them.

A consumer is a layer that reads the output of another one; ``Consumer`` has its name and the
operators between the two layers. The reason ``consumer_fixed`` means that the consumer is fixed.
Packed layers have integer codes in place of weights. The networks ``CHAIN``, ``NORM_FIRST`` and
``BLOCK`` are in ``chained_networks.py``. ``direct_consumers`` are those that read an output
unchanged, except for its shape.
"""

from collections.abc import Callable

import pytest
import torch
from chained_networks import BLOCK, CHAIN, NORM_FIRST
from error_codes import raises_code
from models import RANKER, Reference, compress_reference
from narrow_networks import SIGNATURE, DataDependentBranchNet, HiddenLayerNet
from torch import Tensor, nn
from torch.nn import functional as F

import compressors.rewrite.dataflow as dataflow_module
from compressors.contracts import Signature
from compressors.contracts.reasons import Reason
from compressors.core.skipping import run_or_skip
from compressors.errors.steps import StepRefused
from compressors.rewrite.dataflow import Consumer, Dataflow, dataflow
from compressors.rewrite.fold import Fold


def dataflow_of(reference: Reference) -> Dataflow:
    return dataflow(reference.model().module, reference.signature)


def test_consumers_are_found_through_relus_prelus_and_views():
    flow = dataflow_of(CHAIN)
    assert flow.consumers["a"] == (Consumer("b", ("leaky_relu",)),)
    assert flow.consumers["b"] == (
        Consumer("c", ("prelu", "clamp")),
        Consumer("d", ("prelu", "clamp")),
    )
    assert flow.direct_consumers("b") == ()


# By name, a function of a layer's output, and whether a consumer after the function is found.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (torch.relu, True),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.2), True),
    "clamp from zero": (lambda x: x.clamp(min=0), True),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), True),
    "abs": (lambda x: x.abs(), True),
    "clamp from one": (lambda x: x.clamp(min=1), False),
    "clamp to six": (lambda x: x.clamp(0, 6), False),
    "gelu": (F.gelu, False),
    "sum": (lambda x: x + x.flip(1), False),
    "softmax": (lambda x: x.softmax(dim=1), False),
}


class ActivationNet(HiddenLayerNet):
    """Applies one of ``ACTIVATIONS`` between the layers ``hidden`` and ``out``."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def between(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation][0](x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_consumers_are_found_through_an_activation_only_if_it_is_positively_homogeneous(activation):
    function, is_passed = ACTIVATIONS[activation]
    x = 6 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.5
    is_homogeneous = torch.allclose(function(x * scale), function(x) * scale)
    assert is_homogeneous == is_passed  # f(scale * x) = scale * f(x)
    flow = dataflow_of(Reference(ActivationNet, SIGNATURE, {"activation": activation}))
    assert ("hidden" in flow.consumers) == is_passed


def test_a_layer_without_consumers_has_a_reason_that_names_the_operator():
    flow = dataflow_of(CHAIN)
    assert flow.reasons["c"] == Reason("output_enters", operator="gelu")
    assert flow.reasons["d"] == Reason("output_enters", operator="tanh")
    called_again = Reason("called_again")
    assert flow.reasons["e"] == Reason("consumer_fixed", consumer="called_twice", why=called_again)
    assert dataflow_of(RANKER).reasons["capped"] == Reason("output_enters", operator="relu6")


def test_layers_called_twice_or_read_elsewhere_are_fixed():
    assert dataflow_of(CHAIN).fixed_reasons == {
        "called_twice": Reason("called_again"),
        "weight_read": Reason("weight_read_elsewhere"),
    }


def test_dataflow_of_norms_before_and_after_a_layer():
    flow = dataflow_of(NORM_FIRST)
    assert flow.direct_consumers("first") == ("hidden",)
    assert flow.find_exclusive_producer("second") == "plain"
    assert flow.find_exclusive_producer("third") is None  # a sum also reads the input of this norm
    assert flow.reasons["deep"] == Reason("output_enters", operator="add")


def test_dataflow_of_a_norm_whose_output_three_layers_of_a_transformer_read():
    flow = dataflow_of(BLOCK)
    assert flow.direct_consumers("first") == ("query", "key", "value")
    assert flow.consumers["up"] == (Consumer("down", ("relu",)),)
    assert flow.direct_consumers("last") == ("out",)
    assert flow.input_dims["query"] == 3  # rows, positions and channels


class TiedWeightsNet(nn.Module):
    """``a`` and ``b`` share a weight, that of ``c`` is computed, and ``spare`` is never called."""

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
        # ``unflatten`` adds an axis of size 1 and ``select`` removes it, so this changes nothing.
        x = self.c(F.relu(self.b(x))).unflatten(1, (9, 1)).select(2, 0)
        score: Tensor = self.out(F.relu(x))
        return score


def test_layers_with_shared_computed_or_unused_weights_are_fixed():
    flow = dataflow_of(Reference(TiedWeightsNet, SIGNATURE))
    assert flow.fixed_reasons["a"] == Reason("shares_tensor", other="b")
    assert flow.fixed_reasons["b"] == Reason("shares_tensor", other="a")
    assert "c" not in flow.consumers  # its weight is computed at every call
    assert flow.fixed_reasons["c"] == flow.fixed_reasons["spare"] == Reason("not_called")


class ViewsNet(nn.Module):
    """Views and selections after a layer, some of which move channels to other positions."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.in_place, self.expanded = nn.Linear(9, 8), nn.Linear(9, 8)
        self.transposed, self.out = nn.Linear(9, 8), nn.Linear(8, 1)
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        a = self.first(self.in_place(x).unsqueeze(1)[:, 0])
        square = self.expanded(x).unsqueeze(1).expand(-1, 8, 8)
        b = self.second(square.select(2, 0))
        c = self.third(self.transposed(x).view(-1, 4, 2).transpose(1, 2).reshape(-1, 8))
        score: Tensor = self.out(F.relu(a) * F.relu(b) * F.relu(c))
        return score


def test_consumers_are_found_through_views_only_if_channels_keep_their_positions():
    flow = dataflow_of(Reference(ViewsNet, SIGNATURE))
    assert flow.direct_consumers("in_place") == ("first",)
    assert flow.reasons["expanded"] == Reason("output_enters", operator="select")
    assert flow.reasons["transposed"] == Reason("output_enters", operator="view")


def test_a_step_traces_the_network_once(monkeypatch, tmp_path):
    counts = []
    original = dataflow_module.export_graphs

    def counting_graphs(module: nn.Module, signature: Signature) -> object:
        counts.append(1)
        return original(module, signature)

    monkeypatch.setattr(dataflow_module, "export_graphs", counting_graphs)
    run_or_skip(Fold(), NORM_FIRST.model(), NORM_FIRST.bench(tmp_path / "data"), tmp_path / "out")
    assert len(counts) == 1


def test_packed_layers_have_no_consumers():
    model = compress_reference("Ranker", ("static_int8",))
    assert not dataflow(model.module, RANKER.signature).consumers


def test_a_network_that_cannot_be_exported_raises_step_refused():
    with raises_code(StepRefused, "network_not_traceable") as refusal:
        dataflow(DataDependentBranchNet(), SIGNATURE)
    assert refusal.value.__cause__ is not None
