"""Networks whose constructors move, copy, cast, read or keep references to their parameters.

Networks in ``BUILT_WITHOUT_WEIGHTS`` can be constructed on the meta device. Those in
``BUILT_WITH_WEIGHTS`` read values of parameters in the constructor, so they cannot. What they store
does not depend on these values, so a loaded network has the scores of the trained one.

The argument ``device`` is ``cpu`` or ``cuda:0``; recpress builds the network on the CPU in both
cases. ``Penalized`` refers to its parameters from other objects, which must refer to the loaded
weights later.
"""

import copy

import torch
from torch import Tensor, nn

DIM = 4


class Base(nn.Module):
    """An embedding and a linear layer; subclasses end their constructor with ``finish``."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.emb = nn.Embedding(7, DIM)
        self.out = nn.Linear(DIM, 1)
        self.register_buffer("shift", torch.ones(1))
        self.register_buffer("positions", torch.arange(3), persistent=False)
        self.finish(device)

    def finish(self, device: str) -> None:
        """Do nothing by default."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.emb(ids) + self.shift).squeeze(1)


class MovesToADevice(Base):
    def finish(self, device):
        self.to(device)


class MovesToADeviceObject(Base):
    def finish(self, device):
        self.device = torch.device(device)
        self.to(self.device)


class CallsCpu(Base):
    def finish(self, device):
        self.cpu()


class CallsCuda(Base):
    def finish(self, device):
        self.cuda()


class CreatesOnCuda(Base):
    def finish(self, device):
        self.extra = nn.Parameter(torch.randn(DIM, device="cuda"))
        self.register_buffer("ids", torch.arange(3, device="cuda:0"), persistent=False)
        with torch.device("cuda"):
            self.more = nn.Linear(2, 2)
        self.steps = torch.zeros(2).cuda()


class CastsToHalfAndBack(Base):
    def finish(self, device):
        self.half().float().double().float()


class CopiesAParameter(Base):
    def finish(self, device):
        self.copy = nn.Parameter(self.emb.weight.clone())
        self.start = nn.Parameter(self.emb.weight.data.detach().clone(), requires_grad=False)


class CopiesModules(Base):
    def finish(self, device):
        self.layers = nn.ModuleList([copy.deepcopy(self.out) for _ in range(2)])
        self.twin = copy.deepcopy(self.emb)


class LoadsAnotherState(Base):
    def finish(self, device):
        self.out.load_state_dict(nn.Linear(DIM, 1).state_dict())
        self.second = nn.Linear(DIM, 1)
        self.second.load_state_dict(self.out.state_dict())


class WritesValues(Base):
    def finish(self, device):
        self.emb.weight.data.copy_(torch.randn(7, DIM))
        self.out.weight.data = torch.randn(1, DIM)
        with torch.no_grad():
            self.emb.weight[0] = 0
            self.out.bias.fill_(0.1)


class InitializesWithApply(Base):
    def finish(self, device):
        self.apply(self.initialize)
        for init in (nn.init.xavier_normal_, nn.init.kaiming_uniform_, nn.init.orthogonal_):
            init(self.emb.weight)
        nn.init.trunc_normal_(self.emb.weight, std=0.1)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    @staticmethod
    def initialize(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            module.bias.data.zero_()


class NormsWeights(Base):
    def finish(self, device):
        self.out = nn.utils.parametrizations.weight_norm(self.out)
        self.hidden = nn.utils.parametrizations.spectral_norm(nn.Linear(DIM, DIM))


class UsesPretrainedRows(Base):
    def finish(self, device):
        rows = torch.arange(7.0 * DIM).reshape(7, DIM)
        self.emb = nn.Embedding.from_pretrained(rows, freeze=False)


class MapsItsTensors(Base):
    def finish(self, device):
        self._apply(lambda tensor: tensor.contiguous())
        self.to_empty(device=device)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.shift.fill_(1)
        self.positions.copy_(torch.arange(3))


class MovesTensorsLikeOthers(Base):
    def finish(self, device):
        self.extra = nn.Parameter(torch.zeros(2).to(self.emb.weight))
        self.extra_ids = torch.arange(3).to(self.emb.weight.device)
        self.register_buffer("mask", torch.ones(2, device=self.emb.weight.device))


class HasRecurrentLayers(Base):
    def finish(self, device):
        self.gru = nn.GRU(DIM, DIM, batch_first=True).to(device)
        self.gru.flatten_parameters()
        self.block = nn.TransformerEncoderLayer(DIM, 2, 8)


class UsesGlobalTypes(Base):
    def finish(self, device):
        self.type(torch.FloatTensor)
        self.extra = nn.Parameter(torch.zeros(2).type("torch.cuda.FloatTensor"))


class ComputesWeightsInHooks(Base):
    def finish(self, device):
        self.out = nn.utils.weight_norm(self.out)
        self.hidden = nn.utils.spectral_norm(nn.Linear(DIM, DIM))
        self.pruned = nn.utils.prune.l1_unstructured(nn.Linear(DIM, DIM), "weight", 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.pruned(self.hidden(self.emb(ids)))).squeeze(1)


class SetsDefaultsOfTheProcess(Base):
    def finish(self, device):
        torch.set_default_device("cuda")
        self.extra = nn.Linear(2, 2)
        torch.set_default_dtype(torch.float64)


class KeepsAnOptimizer(Base):
    def finish(self, device):
        self.optimizer = torch.optim.Adam(self.parameters())


BUILT_WITHOUT_WEIGHTS = [
    Base,
    MovesToADevice,
    MovesToADeviceObject,
    CallsCpu,
    CallsCuda,
    CreatesOnCuda,
    CastsToHalfAndBack,
    CopiesAParameter,
    CopiesModules,
    LoadsAnotherState,
    WritesValues,
    InitializesWithApply,
    NormsWeights,
    UsesPretrainedRows,
    MapsItsTensors,
    MovesTensorsLikeOthers,
    HasRecurrentLayers,
    UsesGlobalTypes,
    ComputesWeightsInHooks,
    SetsDefaultsOfTheProcess,
    KeepsAnOptimizer,
]


class ReadsANumber(Base):
    def finish(self, device):
        self.level = float(self.emb.weight.detach().abs().max() >= 0)


class BranchesOnAValue(Base):
    def finish(self, device):
        if torch.isnan(self.emb.weight).any():
            raise ValueError("not a number")


class PrintsAMean(Base):
    def finish(self, device):
        # An empty text, so that the stored value does not depend on the weights.
        self.summary = f"{self.out.weight.mean():.3f}"[:0]


class ConvertsToNumpy(Base):
    def finish(self, device):
        self.emb.weight.data.copy_(torch.from_numpy(self.emb.weight.detach().numpy() * 2))


class KeepsRowNormsOfFixedRows(Base):
    def finish(self, device):
        nn.init.constant_(self.emb.weight, 0.5)
        self.norms = self.emb.weight.detach().norm(dim=1)


class FillsABufferFromItsWeights(Base):
    def finish(self, device):
        self.shift.copy_(self.out.bias.detach() * 0)


BUILT_WITH_WEIGHTS = [
    ReadsANumber,
    BranchesOnAValue,
    PrintsAMean,
    ConvertsToNumpy,
    KeepsRowNormsOfFixedRows,
    FillsABufferFromItsWeights,
]


class Penalized(Base):
    """Holds parameters in lists, tuples, dictionaries and objects, as penalties do."""

    def finish(self, device):
        class Penalty:
            pass

        self.to(device)
        self.weights = [(list(self.emb.parameters()), 0.1), (self.out.named_parameters, 0.2)]
        self.by_name = {"out": self.out.weight, "all": {"emb": self.emb.weight}}
        self.penalty = Penalty()
        self.penalty.weight = self.emb.weight
        self.alias = self.out.weight
        self.views = [p.data for p in self.out.parameters()]
        self.first_row = self.emb.weight.detach()[2:3]

    def penalties(self) -> list[Tensor]:
        return [
            self.weights[0][0][0],
            self.by_name["out"],
            self.by_name["all"]["emb"],
            self.penalty.weight,
            self.alias,
            self.views[0],
            self.first_row,
        ]
