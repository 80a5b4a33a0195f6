"""Networks whose constructors move, copy, cast or read their parameters are built and loaded."""

import copy
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.construction import ConstructionFailed, assign, construct
from compressors.contracts import Architecture, Network
from compressors.errors import ModelRefused
from compressors.state import load, save, tensors_of

DIM = 4


class Base(nn.Module):
    """An embedding and a linear layer; ``finish`` is what a constructor does at its end."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.emb = nn.Embedding(7, DIM)
        self.out = nn.Linear(DIM, 1)
        self.register_buffer("shift", torch.ones(1))
        self.register_buffer("places", torch.arange(3), persistent=False)
        self.finish(device)

    def finish(self, device: str) -> None:
        """Nothing by default."""

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
        self.places.copy_(torch.arange(3))


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


EMPTY = [
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


WITH_VALUES = [
    ReadsANumber,
    BranchesOnAValue,
    PrintsAMean,
    ConvertsToNumpy,
    KeepsRowNormsOfFixedRows,
    FillsABufferFromItsWeights,
]


def network_of(architecture: type[nn.Module], **config: object) -> Network:
    path = f"networks:{architecture.__name__}"
    return Network(architecture=Architecture(path=path, config=config))


def stored(architecture: type[nn.Module], folder, **config: object) -> tuple[nn.Module, nn.Module]:
    """A network as a user trained it, and the same loaded from its file."""
    torch.manual_seed(1)
    trained = construct_as_a_user(architecture, **config)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    ties = save(trained, folder)
    network = network_of(architecture, **config).model_copy(update={"ties": ties})
    return trained.eval(), load(architecture, network, folder)


def construct_as_a_user(architecture: type[nn.Module], **config: object) -> nn.Module:
    """Without CUDA here, what a GPU would hold is on the CPU; nothing else differs."""
    from compressors.construction import construct_with_weights

    return construct_with_weights(architecture, config)


@pytest.mark.parametrize("architecture", EMPTY)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_constructor_that_moves_casts_or_copies_is_built_without_weights(architecture, device):
    module = construct(architecture, {"device": device}).module
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not module.places.is_meta
    assert module.places.tolist() == [0, 1, 2]


@pytest.mark.parametrize("architecture", [*EMPTY, *WITH_VALUES])
def test_a_loaded_network_scores_like_the_trained_one(architecture, tmp_path):
    trained, loaded = stored(architecture, tmp_path)
    ids = torch.arange(7)
    # The same operations on the same numbers: not even rounding differs.
    torch.testing.assert_close(loaded(ids), trained(ids), rtol=0, atol=0)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        assert tensor.device.type == "cpu"


@pytest.mark.parametrize("architecture", WITH_VALUES)
def test_a_constructor_that_reads_values_is_built_with_weights_and_a_note(architecture):
    built = construct(architecture, {})
    assert not any(parameter.is_meta for parameter in built.module.parameters())
    (note,) = built.notes
    assert architecture.__name__ in note
    assert "all its weights in memory" in note


def test_the_note_names_the_line_that_reads_a_value():
    (note,) = construct(ReadsANumber, {}).notes
    assert "test_construction.py, line " in note
    assert "self.level = float(" in note


def test_a_class_that_needs_no_values_has_no_notes():
    assert construct(MovesToADevice, {"device": "cpu"}).notes == ()


@pytest.mark.parametrize("architecture", [CallsCuda, CreatesOnCuda, MovesToADeviceObject])
def test_a_constructor_on_a_gpu_is_built_on_the_cpu_with_a_note(architecture):
    built = construct(architecture, {"device": "cuda:0"})
    (note,) = built.notes
    assert "cuda" in note
    assert "decides the device itself" in note


def test_devices_that_a_network_remembers_become_the_cpu():
    class Remembers(Base):
        def finish(self, device):
            self.device = device
            self.own_device = torch.device(device)
            self.from_weights = self.emb.weight.device
            self.settings = {"device": device, "name": "cuda"}
            self.to(device)

    module = construct(Remembers, {"device": "cuda:1"}).module
    assert module.device == "cpu"
    assert module.own_device == torch.device("cpu")
    assert module.from_weights == torch.device("cpu")
    assert module.settings == {"device": "cpu", "name": "cuda"}  # a name is no device


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


def test_references_to_parameters_in_plain_attributes_have_the_loaded_values(tmp_path):
    trained, loaded = stored(Penalized, tmp_path)
    for found, expected in zip(loaded.penalties(), trained.penalties(), strict=True):
        assert torch.equal(found, expected)
    assert loaded.weights[0][0][0] is loaded.emb.weight
    assert loaded.by_name["out"] is loaded.out.weight is loaded.alias
    assert loaded.first_row.data_ptr() == loaded.emb.weight[2].data_ptr()


def test_a_plain_tensor_that_became_a_parameter_follows_the_stored_values(tmp_path):
    class SharesMemory(Base):
        def finish(self, device):
            rows = torch.zeros(7, DIM)
            self.emb.weight = nn.Parameter(rows)
            self.rows = rows
            self.held = [self.out.weight]

    _, loaded = stored(SharesMemory, tmp_path)
    assert torch.equal(loaded.rows, loaded.emb.weight)
    assert loaded.held[0] is loaded.out.weight


def test_parameters_of_compressed_layers_in_lists_do_not_refuse_the_model(tmp_path):
    from compressors.formats import PackedTable
    from compressors.tables.rowwise_int8 import RowwiseInt8

    storage = RowwiseInt8().storage
    settings = RowwiseInt8().settings()
    layout = storage.layout(7, DIM, settings)
    values = {name: torch.ones(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}
    packed = PackedTable(storage, 7, DIM, settings, values)
    module = construct_as_a_user(Penalized)
    module.emb = packed
    tensors, ties = tensors_of(module)
    save_file(tensors, tmp_path / "model.safetensors")
    network = network_of(Penalized).model_copy(
        update={"modules": {"emb": packed.record()}, "ties": ties}
    )
    loaded = load(Penalized, network, tmp_path)
    assert loaded.by_name["out"] is loaded.out.weight


def test_random_values_that_no_file_stores_are_refused_by_name():
    class Halved(Base):
        def finish(self, device):
            self.half = self.out.weight.detach() / 2

    class Hidden(Base):
        def finish(self, device):
            self.hidden = [nn.Linear(DIM, DIM)]

    with pytest.raises(ModelRefused, match=r"'half'.*still has no values"):
        construct(Halved, {})
    with pytest.raises(ModelRefused, match=r"'hidden\[0\]\.weight'.*Register it as a module"):
        construct(Hidden, {})


def test_a_weight_with_weak_references_is_still_loaded(tmp_path):
    class Watched(Base):
        def finish(self, device):
            self.watch = weakref.ref(self.emb.weight)

    trained, loaded = stored(Watched, tmp_path)
    assert torch.equal(loaded.emb.weight, trained.emb.weight)


def test_attributes_and_class_of_a_parameter_survive_building_and_loading(tmp_path):
    class Marked(nn.Parameter):
        pass

    class HasMarks(Base):
        def finish(self, device):
            marked = Marked(torch.zeros(2))
            marked.group = "slow"
            self.marked = marked

    _, loaded = stored(HasMarks, tmp_path)
    assert type(loaded.marked) is Marked
    assert loaded.marked.group == "slow"


def test_a_constructor_that_fails_is_refused_with_its_own_cause():
    class Broken(Base):
        def finish(self, device):
            raise ValueError("depth must be even")

    with pytest.raises(ConstructionFailed) as refused:
        construct(Broken, {})
    text = str(refused.value)
    assert "ValueError" in text
    assert "depth must be even" in text
    assert "test_construction.py, line" in text
    assert "keyword arguments" not in text


def test_wrong_arguments_are_refused_with_those_the_class_takes():
    with pytest.raises(ConstructionFailed, match=r"'depth'.*keyword arguments: device\."):
        construct(Base, {"depth": 3})


def test_a_constructor_that_needs_cuda_itself_is_refused_with_a_remedy():
    class Needs(Base):
        def finish(self, device):
            raise RuntimeError("Found no NVIDIA driver on your system")

    with pytest.raises(ConstructionFailed, match=r"NVIDIA.*\.to\(device\).*argument of Needs"):
        construct(Needs, {})


def test_assigning_leaves_the_network_that_gave_the_tensors_as_it_was():
    source, target = Base(), construct(Base, {}).module
    expected = copy.deepcopy(source.state_dict())
    assign(target, source.state_dict(keep_vars=True), strict=True)
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, expected[name])
        assert target.state_dict()[name].data_ptr() == tensor.data_ptr()
