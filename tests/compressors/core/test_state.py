"""Save and load a module as tensors and records, and refuse stored files that do not fit.

A record (``ModuleRecord``) describes a compressed module: its kind, format and settings.

The networks are those of ``models.py``. In ``TIED``, the tables ``item`` and ``similar`` have one
weight, and ``user`` and ``friend`` are one module. ``NORMED`` has the table ``user``, the layer
``hidden`` of ``width`` outputs, a batch norm and the layer ``out``. ``RANKER`` has tables, the bags
``genres``, ``history`` and ``tags``, and layers such as ``cross``.
"""

import json
import threading
from pathlib import Path

import pytest
import torch
from error_codes import raises_code
from models import BUFFERED, NORMED, RANKER, TIED, compress_reference
from safetensors.torch import save_file
from torch import nn

from compressors.contracts import Architecture, ModuleRecord, Network
from compressors.core.state.meta_device import parameters_on_meta
from compressors.core.state.module_state import (
    INDEX,
    build,
    build_module,
    load,
    map_tensors,
    save,
    tensors_of,
)
from compressors.errors.compression import ModelRefused

ALL_UNITS_INT8 = ("rowwise_int8", "static_int8")  # the steps that compress all tables and layers


def build_network(reference, **changes) -> Network:
    return reference.model().network.model_copy(update=changes)


def test_parameters_on_meta_creates_parameters_on_meta_and_buffers_with_values():
    with parameters_on_meta():
        module = NORMED.network()
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not any(buffer.is_meta for buffer in module.buffers())
    assert not any(parameter.is_meta for parameter in NORMED.network().parameters())


def test_parameters_on_meta_does_not_affect_other_threads_or_later_modules():
    layers: list[nn.Linear] = []
    with parameters_on_meta():
        other = threading.Thread(target=lambda: layers.append(nn.Linear(2, 2)))
        other.start()
        other.join()
    with pytest.raises(RuntimeError, match="boom"), parameters_on_meta():
        raise RuntimeError("boom")
    assert not layers[0].weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("reference", [RANKER, TIED, BUFFERED, NORMED])
def test_loaded_model_has_identical_tensors_and_is_in_evaluation_mode(reference, tmp_path):
    source = reference.model()
    ties = save(source.module.train(), tmp_path)
    loaded = load(reference.network, build_network(reference, ties=ties), tmp_path)
    expected, actual = source.module.state_dict(), loaded.state_dict()
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)
    assert not any(module.training for module in loaded.modules())


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    source = TIED.model()
    ties = save(source.module, tmp_path)
    assert ties == {"similar.weight": "item.weight", "friend.weight": "user.weight"}
    assert set(map_tensors(tmp_path)) == {"item.weight", "user.weight", "out.weight", "out.bias"}
    loaded = load(TIED.network, build_network(TIED, ties=ties), tmp_path)
    assert loaded.similar.weight is loaded.item.weight
    assert loaded.friend is loaded.user


def test_view_of_another_tensor_is_stored_separately():
    module = nn.Module()
    module.register_buffer("whole", torch.arange(6.0))
    module.register_buffer("part", module.whole[2:4])
    stored, ties = tensors_of(module)
    assert ties == {}
    assert stored["part"].tolist() == [2, 3]


def test_unsaved_buffers_and_plain_tensors_have_values_after_loading(tmp_path):
    """``places`` is a non-persistent buffer, ``gain`` a persistent one, ``floor`` only a tensor."""
    source = BUFFERED.model()
    save(source.module, tmp_path)
    assert "places" not in map_tensors(tmp_path)
    assert "gain" in map_tensors(tmp_path)
    loaded = load(BUFFERED.network, source.network, tmp_path)
    assert loaded.places.tolist() == [0, 1, 2]
    assert loaded.floor.tolist() == [-1.0]


def test_plain_tensor_computed_from_a_parameter_is_refused(tmp_path):
    class HalvedWeightNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(2, 1)
            self.half = self.out.weight.detach() / 2

    save(HalvedWeightNet(), tmp_path)
    network = Network(architecture=Architecture(path="models:HalvedWeightNet"))
    with raises_code(ModelRefused, "initial_weights_used", names=("half",)):
        load(HalvedWeightNet, network, tmp_path)


def test_model_in_shards_has_an_index_and_is_loaded_unchanged(tmp_path):
    model = compress_reference("Ranker", ALL_UNITS_INT8)
    ties = save(model.module, tmp_path, shard_bytes=1000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(shards)
    stored, _ = tensors_of(model.module)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    loaded = load(model.architecture, model.network.model_copy(update={"ties": ties}), tmp_path)
    torch.testing.assert_close(
        dict(loaded.state_dict()), dict(model.module.state_dict()), rtol=0, atol=0
    )


def test_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with raises_code(ModelRefused, "tensor_stored_twice", name="weight"):
        map_tensors(tmp_path)


def test_records_are_unchanged_by_a_json_round_trip():
    network = compress_reference("Ranker", ALL_UNITS_INT8).network
    assert Network.model_validate_json(network.model_dump_json()) == network
    assert network.modules["history"].kind == "bag"
    assert network.modules["tags"].settings["include_last_offset"] is True
    assert network.modules["genres"].settings["padding_idx"] == 0
    assert network.modules["cross"].kind == "linear"
    assert "history.table" not in network.modules


def test_load_refuses_missing_and_unexpected_tensors(tmp_path):
    source = NORMED.model()
    stored, _ = tensors_of(source.module)
    stored["elsewhere"] = stored.pop("out.bias")
    save_file(stored, tmp_path / "model.safetensors")
    with raises_code(
        ModelRefused, "tensors_differ", missing=("out.bias",), unexpected=("elsewhere",)
    ):
        load(NORMED.network, source.network, tmp_path)


def test_load_refuses_a_tensor_of_another_shape(tmp_path):
    """The network was saved with its default width of 12."""
    save(NORMED.model().module, tmp_path)
    network = build_network(
        NORMED, architecture=Architecture(path="models:Normed", config={"width": 5})
    )
    with raises_code(ModelRefused, "shape_differs", stored=[12], expected=[5]):
        load(NORMED.network, network, tmp_path)


def test_load_refuses_integers_for_a_float_parameter(tmp_path):
    source = NORMED.model()
    stored, _ = tensors_of(source.module)
    stored["out.bias"] = stored["out.bias"].to(torch.int8)
    save_file(stored, tmp_path / "model.safetensors")
    with raises_code(ModelRefused, "dtype_differs", name="out.bias", stored="torch.int8"):
        load(NORMED.network, source.network, tmp_path)


def test_load_refuses_a_tie_to_a_tensor_that_is_not_stored(tmp_path):
    save(TIED.model().module, tmp_path)
    network = build_network(TIED, ties={"similar.weight": "items.weight"})
    with raises_code(ModelRefused, "tie_not_stored", stored="items.weight"):
        load(TIED.network, network, tmp_path)


def test_build_refuses_an_unknown_argument_of_the_class():
    network = build_network(
        NORMED, architecture=Architecture(path="models:Normed", config={"depth": 5})
    )
    with raises_code(ModelRefused, "construction_failed", architecture="models:Normed") as caught:
        build(NORMED.network, network)
    assert "'depth'" in caught.value.fields["problem"]


def test_build_refuses_a_record_of_an_unknown_module():
    record = compress_reference("Normed", ALL_UNITS_INT8).network.modules["user"]
    with raises_code(
        ModelRefused, "compressed_module_missing", name="users", architecture="models:Normed"
    ):
        build(NORMED.network, build_network(NORMED, modules={"users": record}))


def test_unknown_format_is_refused():
    record = ModuleRecord(kind="table", format="ternary", settings={"rows": 1, "dim": 1})
    with raises_code(ModelRefused, "format_unknown", format="ternary"):
        build_module("user", record)


@pytest.mark.parametrize("kind", ["table", "bag", "linear"])
@pytest.mark.parametrize("settings", [{}, {"rows": "many", "dim": 4}, {"rows": 3, "dim": 4}])
def test_incomplete_record_is_refused(kind, settings):
    format_name = "static_int8" if kind == "linear" else "rowwise_int8"
    with raises_code(ModelRefused, "record_incomplete", name="user"):
        build_module("user", ModuleRecord(kind=kind, format=format_name, settings=settings))


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="needs Linux's list of memory mappings"
)
def test_loaded_tensors_are_memory_mapped(tmp_path):
    ties = save(RANKER.model().module, tmp_path)
    loaded = load(RANKER.network, build_network(RANKER, ties=ties), tmp_path)
    lines = Path("/proc/self/maps").read_text().splitlines()
    file = str(tmp_path / "model.safetensors")
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(file)]
    mapped_ranges = [(int(begin, 16), int(end, 16)) for begin, end in ranges]
    for name, tensor in loaded.state_dict().items():
        assert any(begin <= tensor.data_ptr() < end for begin, end in mapped_ranges), name
