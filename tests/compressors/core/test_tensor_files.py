"""Files of a module's tensors: one per large tensor, and hard links to those of a source model."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressors.contracts import Architecture, Network
from compressors.core.registries import METHODS
from compressors.core.state.module_state import load, save
from compressors.core.state.tensor_files import (
    INDEX,
    LARGE_BYTES,
    file_name,
    find_file,
    tensor_files,
    write_tensors,
)
from compressors.core.steps.table_encoder import encode_table

ROWS = LARGE_BYTES // 16  # of 4 float32: the smallest table with a separate file


class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(ROWS, 4)
        self.item = nn.Embedding(ROWS, 4)
        self.out = nn.Linear(8, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.out(torch.cat([self.user(user), self.item(item)], dim=1))


NETWORK = Network(architecture=Architecture(path="test_tensor_files:TwoTables"))
USER, ITEM = file_name("user.weight"), file_name("item.weight")


def save_and_load(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    save(TwoTables(), folder)
    return load(TwoTables, NETWORK, folder)


def with_new_item_table(module: nn.Module) -> TwoTables:
    """Return a module that shares all tensors with another one, except the item table."""
    result = TwoTables()
    result.user.weight = module.user.weight
    result.out = module.out
    return result


def tensors_in(folder: Path) -> dict[str, list[str]]:
    return {path.name: sorted(load_file(path)) for path in folder.glob("*.safetensors")}


def test_large_tensor_has_a_separate_file_and_small_tensors_share_one(tmp_path):
    tensors = {
        "a": torch.zeros(3),
        "large": torch.zeros(LARGE_BYTES, dtype=torch.uint8),
        "b": torch.zeros(LARGE_BYTES - 1, dtype=torch.uint8),
    }
    paths = write_tensors(tensors, tmp_path)
    assert tensors_in(tmp_path) == {
        "model.safetensors": ["a", "b"],
        file_name("large"): ["large"],
    }
    assert {path.name for path in paths} == tensors_in(tmp_path).keys()
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"]["large"] == file_name("large")


def test_module_in_several_files_is_loaded_unchanged(tmp_path):
    module = save_and_load(tmp_path)
    torch.manual_seed(0)
    expected = TwoTables().state_dict()
    torch.testing.assert_close(dict(module.state_dict()), dict(expected), rtol=0, atol=0)
    assert tensors_in(tmp_path).keys() == {USER, ITEM, "model.safetensors"}


def test_file_names_differ_for_similar_tensor_names():
    names = ["a/b", "a_b", "a b", "../a_b", "é", "x" * 300, "x" * 301, "A", "a", ""]
    files = [file_name(name) for name in names]
    assert len({file.lower() for file in files}) == len(names)
    for file in files:
        assert Path(file).name == file
        assert not file.startswith(".")
        assert len(file.encode()) < 255


def test_save_links_the_file_of_an_unchanged_tensor_and_writes_a_changed_one(tmp_path):
    source = save_and_load(tmp_path / "source")
    result = with_new_item_table(source)
    save(result, tmp_path / "result", files=tensor_files(source, tmp_path / "source"))
    assert (tmp_path / "result" / USER).samefile(tmp_path / "source" / USER)
    assert not (tmp_path / "result" / ITEM).samefile(tmp_path / "source" / ITEM)
    loaded = load(TwoTables, NETWORK, tmp_path / "result")
    torch.testing.assert_close(dict(loaded.state_dict()), dict(result.state_dict()), rtol=0, atol=0)


def test_tensor_that_was_written_to_after_loading_is_stored_with_its_values(tmp_path):
    source = save_and_load(tmp_path / "source")
    files = tensor_files(source, tmp_path / "source")
    with torch.no_grad():
        source.user.weight[3] = 7
    save(source, tmp_path / "result", files=files)
    assert not (tmp_path / "result" / USER).samefile(tmp_path / "source" / USER)
    assert load_file(tmp_path / "result" / USER)["user.weight"][3].tolist() == [7] * 4
    assert load_file(tmp_path / "source" / USER)["user.weight"][3].tolist() != [7] * 4


def test_reshaped_or_transposed_tensor_is_stored_with_its_values(tmp_path):
    source = save_and_load(tmp_path / "source")
    files = tensor_files(source, tmp_path / "source")
    weight = source.user.weight.detach()
    for number, changed in enumerate((weight.reshape(-1, 8), weight.T, weight.view(torch.int32))):
        module = nn.Module()
        module.user = nn.Module()
        module.user.register_buffer("weight", changed)
        folder = tmp_path / str(number)
        save(module, folder, files=files)
        (path,) = folder.glob("*.safetensors")
        assert torch.equal(load_file(path)["user.weight"], changed)


def test_tensor_converted_when_it_was_loaded_is_not_linked(tmp_path):
    source = save_and_load(tmp_path / "source")
    float16_weight = load_file(tmp_path / "source" / USER)["user.weight"].half()
    (tmp_path / "source" / USER).unlink()
    save_file({"user.weight": float16_weight}, tmp_path / "source" / USER)
    assert "user.weight" not in tensor_files(source, tmp_path / "source")


def test_second_save_into_a_folder_leaves_the_linked_file_of_the_source(tmp_path):
    source = save_and_load(tmp_path / "source")
    before = (tmp_path / "source" / USER).read_bytes()
    save(source, tmp_path / "result", files=tensor_files(source, tmp_path / "source"))
    other = TwoTables()
    save(other, tmp_path / "result")
    assert (tmp_path / "source" / USER).read_bytes() == before
    assert torch.equal(load_file(tmp_path / "result" / USER)["user.weight"], other.user.weight)


def test_second_save_into_a_folder_leaves_no_file_of_the_first(tmp_path):
    save(TwoTables(), tmp_path)
    save(nn.Linear(2, 2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_tensor_is_written_where_links_are_impossible(tmp_path, monkeypatch):
    source = save_and_load(tmp_path / "source")

    def raise_cross_device_error(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", raise_cross_device_error)
    save(source, tmp_path / "result", files=tensor_files(source, tmp_path / "source"))
    assert (tmp_path / "result" / USER).stat().st_nlink == 1
    assert (tmp_path / "result" / USER).read_bytes() == (tmp_path / "source" / USER).read_bytes()


def test_tensor_whose_file_is_gone_is_written(tmp_path):
    source = save_and_load(tmp_path / "source")
    files = tensor_files(source, tmp_path / "source")
    before = (tmp_path / "source" / USER).read_bytes()
    (tmp_path / "source" / USER).unlink()
    save(source, tmp_path / "result", files=files)
    assert (tmp_path / "result" / USER).read_bytes() == before


@pytest.mark.parametrize("large_bytes", [0, 2**62], ids=["large tensor", "small tensor"])
def test_single_file_has_the_usual_name(large_bytes, tmp_path):
    """``large_bytes`` is the size from which a tensor has a separate file."""
    (path,) = write_tensors({"weight": torch.ones(4)}, tmp_path, large_bytes=large_bytes)
    assert path.name == "model.safetensors"
    assert not (tmp_path / INDEX).exists()


def read_resident_bytes(path: Path) -> int:
    """Return the bytes of a mapped file that are resident in this process (Linux)."""
    total = 0
    is_of_file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:  # the first line of a mapping: addresses, ..., path
            is_of_file = line.endswith(str(path))
        elif is_of_file and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.parametrize("kind", ["rowwise_int8", "rowwise_int4", "float8_e4m3"])
def test_encoding_a_mapped_table_gives_equal_codes_and_leaves_its_pages_unmapped(kind, tmp_path):
    step = METHODS[kind].model_validate({})
    weight = torch.randn(200_000, 16, generator=torch.Generator().manual_seed(0))
    (path,) = write_tensors({"table.weight": weight}, tmp_path)
    table = nn.Module()
    table.table = nn.Embedding.from_pretrained(load_file(path)["table.weight"])
    (file,) = tensor_files(table, tmp_path).values()
    encoded = encode_table(step, table.table.weight, file)
    # The tolerance of half the table is far more than the pages that a read of the header maps.
    assert read_resident_bytes(path) < weight.nbytes / 2
    expected = encode_table(step, weight)
    for (name, tensor), (_, other) in zip(
        encoded.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("changed", ["written", "other tensor"])
def test_tensor_that_differs_from_its_file_is_not_read_from_it(changed, tmp_path):
    module = save_and_load(tmp_path / "source")
    files = tensor_files(module, tmp_path / "source")
    weight = module.user.weight
    assert find_file(weight, files) == files["user.weight"]
    if changed == "written":
        with torch.no_grad():
            weight[0] = 1
    else:
        weight = weight.detach().clone()
    assert find_file(weight, files) is None
