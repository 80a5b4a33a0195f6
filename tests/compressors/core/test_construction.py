"""Build and load networks whose constructors move, copy, cast or read their parameters.

The networks are subclasses of ``Base`` in ``tests/constructed_networks.py``. ``Base`` has a table
``emb`` of 7 rows, a dense layer ``out``, and the non-persistent buffer ``places`` with the values
0, 1, 2. It calls the method ``finish`` of the subclass at the end of its constructor.

A note is a sentence for the user on how a network had to be built. ``private_copy`` copies the
module tree of a network but shares its tensors.
"""

import copy
import resource
import weakref

import pytest
import torch
from constructed_networks import (
    BUILT_WITH_WEIGHTS,
    BUILT_WITHOUT_WEIGHTS,
    DIM,
    Base,
    CallsCuda,
    CreatesOnCuda,
    MovesToADevice,
    MovesToADeviceObject,
    Penalized,
    ReadsANumber,
    SetsDefaultsOfTheProcess,
)
from error_codes import raises_code
from safetensors.torch import save_file
from torch import nn

from compressors.contracts import Architecture, Network
from compressors.core.state.construction import assign, construct
from compressors.core.state.module_state import load, save, tensors_of
from compressors.core.units import private_copy
from compressors.errors.compression import ModelRefused
from compressors.errors.construction import ConstructionFailed


def build_network(architecture: type[nn.Module], **config: object) -> Network:
    path = f"networks:{architecture.__name__}"
    return Network(architecture=Architecture(path=path, config=config))


def train_and_load(
    architecture: type[nn.Module], folder, **config: object
) -> tuple[nn.Module, nn.Module]:
    """Return a trained network, and the same network loaded from its file."""
    torch.manual_seed(1)
    trained = build_with_weights(architecture, **config)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    ties = save(trained, folder)
    network = build_network(architecture, **config).model_copy(update={"ties": ties})
    return trained.eval(), load(architecture, network, folder)


def build_with_weights(architecture: type[nn.Module], **config: object) -> nn.Module:
    """Build a network with weights; tensors that a constructor moves to a GPU are on the CPU."""
    from compressors.core.state.construction import construct_with_weights

    return construct_with_weights(architecture, config)


@pytest.mark.parametrize("architecture", BUILT_WITHOUT_WEIGHTS)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_constructor_that_moves_casts_or_copies_is_built_on_meta(architecture, device):
    module = construct(architecture, {"device": device}).module
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not module.positions.is_meta
    assert module.positions.tolist() == [0, 1, 2]


@pytest.mark.parametrize("architecture", [*BUILT_WITHOUT_WEIGHTS, *BUILT_WITH_WEIGHTS])
def test_loaded_network_has_the_scores_of_the_trained_one(architecture, tmp_path):
    trained, loaded = train_and_load(architecture, tmp_path)
    ids = torch.arange(7)
    # Both run the same operations on the same numbers, so the scores are identical.
    torch.testing.assert_close(loaded(ids), trained(ids), rtol=0, atol=0)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        assert tensor.device.type == "cpu"


@pytest.mark.parametrize("architecture", BUILT_WITH_WEIGHTS)
def test_constructor_that_reads_weights_is_built_with_them_and_a_note(architecture):
    construction = construct(architecture, {})
    assert not any(parameter.is_meta for parameter in construction.module.parameters())
    (note,) = construction.notes
    assert architecture.__name__ in note
    assert "all its weights in memory" in note


def test_note_has_the_line_that_reads_a_weight():
    (note,) = construct(ReadsANumber, {}).notes
    assert "constructed_networks.py, line " in note
    assert "self.level = float(" in note


def test_constructor_that_reads_no_weights_has_no_note():
    assert construct(MovesToADevice, {"device": "cpu"}).notes == ()


@pytest.mark.parametrize("architecture", [CallsCuda, CreatesOnCuda, MovesToADeviceObject])
def test_constructor_that_uses_a_gpu_is_built_on_the_cpu_with_a_note(architecture):
    construction = construct(architecture, {"device": "cuda:0"})
    (note,) = construction.notes
    assert "cuda" in note
    assert "decides the device itself" in note


def test_construct_restores_the_default_device_and_dtype():
    before = torch.get_default_device(), torch.get_default_dtype()
    construct(SetsDefaultsOfTheProcess, {})
    assert (torch.get_default_device(), torch.get_default_dtype()) == before
    assert torch.zeros(1).device.type == "cpu"


def test_device_attributes_of_a_network_are_set_to_the_cpu():
    class DeviceAttributesNet(Base):
        def finish(self, device):
            self.device = device
            self.device_object = torch.device(device)
            self.from_weights = self.emb.weight.device
            self.settings = {"device": device, "name": "cuda"}
            self.to(device)

    module = construct(DeviceAttributesNet, {"device": "cuda:1"}).module
    assert module.device == "cpu"
    assert module.device_object == torch.device("cpu")
    assert module.from_weights == torch.device("cpu")
    assert module.settings == {"device": "cpu", "name": "cuda"}  # "name" is not a device


def test_parameters_in_plain_attributes_have_the_loaded_values(tmp_path):
    """``Penalized`` keeps its weights in lists and dictionaries too, to compute a penalty."""
    trained, loaded = train_and_load(Penalized, tmp_path)
    for loaded_value, expected in zip(loaded.penalties(), trained.penalties(), strict=True):
        assert torch.equal(loaded_value, expected)
    assert loaded.weights[0][0][0] is loaded.emb.weight
    assert loaded.by_name["out"] is loaded.out.weight is loaded.alias
    # ``first_row`` is a view of the weight that begins at row 2.
    assert loaded.first_row.data_ptr() == loaded.emb.weight[2].data_ptr()


def test_plain_tensor_that_shares_memory_with_a_parameter_has_the_loaded_values(tmp_path):
    """A plain tensor is an attribute that is neither a parameter nor a buffer."""

    class SharesMemory(Base):
        def finish(self, device):
            rows = torch.zeros(7, DIM)
            self.emb.weight = nn.Parameter(rows)
            self.rows = rows
            self.listed = [self.out.weight]

    _, loaded = train_and_load(SharesMemory, tmp_path)
    assert torch.equal(loaded.rows, loaded.emb.weight)
    assert loaded.listed[0] is loaded.out.weight


def test_model_with_a_replaced_parameter_in_a_list_is_loaded(tmp_path):
    from compressors.core.modules.formats import PackedTable
    from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

    storage = RowwiseInt8().storage
    settings = RowwiseInt8().settings()
    layout = storage.layout(7, DIM, settings)
    values = {name: torch.ones(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}
    packed = PackedTable(storage, 7, DIM, settings, values)
    module = build_with_weights(Penalized)
    module.emb = packed
    tensors, ties = tensors_of(module)
    save_file(tensors, tmp_path / "model.safetensors")
    network = build_network(Penalized).model_copy(
        update={"modules": {"emb": packed.record()}, "ties": ties}
    )
    loaded = load(Penalized, network, tmp_path)
    assert loaded.by_name["out"] is loaded.out.weight


def test_private_copy_shares_parameters_that_are_only_in_a_list():
    module = build_with_weights(Penalized)
    only_in_list = module.weights[0][0][0]
    module.emb = nn.Embedding(7, DIM)  # as if a packed table had replaced it
    copy_of_module = private_copy(module)
    assert copy_of_module.weights[0][0][0] is only_in_list
    assert copy_of_module.weights is not module.weights


def test_plain_tensors_with_random_values_are_refused_with_their_names():
    class HalvedWeightNet(Base):
        def finish(self, device):
            self.half = self.out.weight.detach() / 2

    class LayerInListNet(Base):
        def finish(self, device):
            self.hidden = [nn.Linear(DIM, DIM)]

    with raises_code(ModelRefused, "initial_weights_used", names=("half",)):
        construct(HalvedWeightNet, {})
    names = ("hidden[0].weight", "hidden[0].bias")
    with raises_code(ModelRefused, "initial_weights_used", names=names):
        construct(LayerInListNet, {})


def test_weight_with_weak_references_is_loaded(tmp_path):
    class WeakReferenceNet(Base):
        def finish(self, device):
            self.watch = weakref.ref(self.emb.weight)

    trained, loaded = train_and_load(WeakReferenceNet, tmp_path)
    assert torch.equal(loaded.emb.weight, trained.emb.weight)


def test_loaded_parameter_has_its_class_and_attributes(tmp_path):
    class MarkedParameter(nn.Parameter):
        pass

    class MarkedParameterNet(Base):
        def finish(self, device):
            marked = MarkedParameter(torch.zeros(2))
            marked.group = "slow"
            self.marked = marked

    _, loaded = train_and_load(MarkedParameterNet, tmp_path)
    assert type(loaded.marked) is MarkedParameter
    assert loaded.marked.group == "slow"


def test_constructor_that_raises_is_refused_with_its_error_and_line():
    class FailingNet(Base):
        def finish(self, device):
            raise ValueError("depth must be even")

    fields = {"error": "ValueError", "problem": "depth must be even", "architecture": "FailingNet"}
    with raises_code(ConstructionFailed, "constructor_raised", **fields) as caught:
        construct(FailingNet, {})
    assert caught.value.fields["place"].startswith("test_construction.py, line")


def test_unknown_argument_is_refused_with_the_arguments_of_the_class():
    with raises_code(ConstructionFailed, "arguments_wrong", arguments=("device",)) as caught:
        construct(Base, {"depth": 3})
    assert "'depth'" in caught.value.fields["problem"]


def test_constructor_that_requires_cuda_is_refused():
    class CudaNet(Base):
        def finish(self, device):
            raise RuntimeError("Found no NVIDIA driver on your system")

    with raises_code(ConstructionFailed, "constructor_needs_gpu", architecture="CudaNet") as caught:
        construct(CudaNet, {})
    assert "NVIDIA" in caught.value.fields["problem"]


def test_assign_does_not_modify_the_network_with_the_tensors():
    source, on_meta = Base(), construct(Base, {}).module
    expected = copy.deepcopy(source.state_dict())
    assign(on_meta, source.state_dict(keep_vars=True), strict=True)
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, expected[name])
        assert on_meta.state_dict()[name].data_ptr() == tensor.data_ptr()


class SizedNet(nn.Module):
    """A network whose configuration sets the size of every tensor."""

    def __init__(self, *, rows=10, hidden=4, layers=1, mask=4, plain=4):
        super().__init__()
        self.table = nn.Embedding(rows, 4)
        self.layers = nn.ModuleList(nn.Linear(4, hidden) for _ in range(layers))
        self.register_buffer("mask", torch.ones(mask, mask), persistent=False)
        self.plain = torch.zeros(plain)

    def forward(self, x):
        return self.table(x)


def store_network(tmp_path, **config):
    save(SizedNet(), tmp_path)
    architecture = Architecture(path="test_construction:SizedNet", config=config)
    return Network(architecture=architecture)


@pytest.mark.parametrize(
    "config",
    [{"rows": 10**9}, {"hidden": 10**12}, {"mask": 10**6}, {"plain": 10**10}],
    ids=["table", "layer", "buffer", "plain tensor"],
)
def test_constructor_of_a_far_larger_tensor_than_stored_is_refused_without_memory(tmp_path, config):
    network = store_network(tmp_path, **config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with raises_code(ModelRefused, "construction_failed") as caught:
        load(SizedNet, network, tmp_path)
    assert "creates a tensor of" in caught.value.fields["problem"]
    allocated = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert allocated < 100 * 1024  # KiB: no memory was allocated for the tensor


def test_constructor_of_far_more_tensors_than_stored_is_refused(tmp_path):
    network = store_network(tmp_path, layers=10**9)
    with raises_code(ModelRefused, "construction_failed") as caught:
        load(SizedNet, network, tmp_path)
    assert "far more tensors than the files contain" in caught.value.fields["problem"]


def test_unsaved_mask_of_60_mib_is_allowed(tmp_path):
    network = store_network(tmp_path, mask=4000)
    assert load(SizedNet, network, tmp_path).mask.shape == (4000, 4000)


class KeyedByFeature(nn.Module):
    """A network with a module, parameter, buffer or attribute of the given name."""

    def __init__(self, name: str, place: str = "module") -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name if place == "module" else "user": nn.Embedding(4, DIM)})
        self.owner = nn.Module()
        if place == "parameter":
            self.owner.register_parameter(name, nn.Parameter(torch.zeros(2)))
        if place == "buffer":
            self.owner.register_buffer(name, torch.zeros(2), persistent=False)
        if place == "attribute":
            setattr(self.owner, name, torch.zeros(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        (table,) = self.tables.values()
        return table(ids).sum(dim=1)


def name_that_runs(command: str) -> str:
    """Return a module name that ends torch's string literal and continues with code."""
    code = f"exec(bytes({list(command.encode())}))"
    return f'x")\r{code}\rdef other():\r    (lambda name: name)("'


def test_torch_runs_code_in_a_module_name(tmp_path):
    """If this fails, torch escapes such names, and recpress need not refuse them."""
    name = name_that_runs(f"open({str(tmp_path / 'ran')!r}, 'w')")
    program = torch.export.export(KeyedByFeature(name), (torch.arange(3),))
    program.run_decompositions({})
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["module", "parameter", "buffer", "attribute"])
@pytest.mark.parametrize("character", ['"', "'", "\\", "\n", "\r", "\0"])
def test_attribute_name_that_could_run_as_code_is_refused(place, character):
    config = {"name": f"a{character}b", "place": place}
    with raises_code(ConstructionFailed, "attribute_name_unsafe"):
        construct(KeyedByFeature, config)
    with raises_code(ConstructionFailed, "attribute_name_unsafe"):
        build_with_weights(KeyedByFeature, **config)


def test_harmless_unusual_attribute_name_is_built_and_traced(tmp_path):
    name = "price[usd] {0} %s </b> $(a) `b` ü \u2028 \x1b[31m # ; x=1"
    trained, loaded = train_and_load(KeyedByFeature, tmp_path, name=name)
    ids = torch.arange(3)
    program = torch.export.export(loaded, (ids,)).run_decompositions({})
    torch.testing.assert_close(program.module()(ids), trained(ids), rtol=0, atol=0)
