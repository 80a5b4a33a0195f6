"""Available memory is the least of all limits, and every library's own error is recognized."""

import errno
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pytest
import torch
from error_codes import raises_code

from compressors.contracts import is_out_of_memory
from compressors.errors.compression import ModelRefused
from infra import memory
from infra.errors import DataRefused, OutOfMemory, SettingRefused
from infra.memory import as_out_of_memory, available_memory, memory_errors, require_memory
from infra.store.disk import of_input, translate

MIB = 2**20
TOO_MUCH = 2**46  # bytes: more than any address space that these processes may use


def native_error(cause) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - each library has its own class
        cause()
    return caught.value


def onnxruntime_error() -> None:
    """A graph whose one constant is larger than the address space."""
    shape = onnx.helper.make_tensor("s", onnx.TensorProto.INT64, [1], [TOO_MUCH // 4])
    node = onnx.helper.make_node("ConstantOfShape", ["s"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None])
    graph = onnx.helper.make_graph([node], "g", [], [output], [shape])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 10
    onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})


@pytest.mark.parametrize(
    "cause",
    [
        lambda: bytearray(TOO_MUCH),
        lambda: np.ones(TOO_MUCH, np.uint8),
        lambda: torch.ones(TOO_MUCH, dtype=torch.uint8),
        lambda: pa.allocate_buffer(2**60),
        onnxruntime_error,
    ],
    ids=["python", "numpy", "torch", "pyarrow", "onnxruntime"],
)
def test_the_real_error_of_each_library_is_out_of_memory(cause):
    fault = native_error(cause)
    assert is_out_of_memory(fault), repr(fault)
    found = as_out_of_memory(fault, "This test")
    assert found is not None
    assert str(found).startswith("This test ran out of memory.")


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libx.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
    ],
)
def test_errors_that_cannot_be_caused_here_are_recognized_by_their_words(fault):
    assert is_out_of_memory(fault)


@pytest.mark.parametrize(
    "fault",
    [
        ValueError("out of memory"),
        KeyError("std::bad_alloc"),
        ModelRefused("values_missing", names=("out of memory",)),
        DataRefused("column_too_long", column="bad_alloc"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ImportError("libx.so: failed to map segment from shared object: Operation not permitted"),
    ],
)
def test_a_name_that_reads_like_an_error_is_not_one(fault):
    assert not is_out_of_memory(fault)


def test_an_error_raised_from_an_exhausted_memory_is_out_of_memory():
    fault = ModelRefused("values_missing", names=("weight",))
    fault.__cause__ = MemoryError()
    assert is_out_of_memory(fault)


def test_a_block_raises_out_of_memory_and_leaves_other_errors_alone():
    with (
        raises_code(OutOfMemory, None, doing="Lowering"),
        memory_errors(lambda: "Lowering"),
    ):
        torch.ones(TOO_MUCH)
    with pytest.raises(KeyError), memory_errors(lambda: "Lowering"):
        raise KeyError("x")


def test_an_error_of_the_system_for_lack_of_memory_is_no_bad_input(tmp_path):
    fault = OSError(errno.ENOMEM, "Cannot allocate memory", str(tmp_path))
    assert isinstance(of_input(fault), OutOfMemory)
    assert isinstance(translate(fault, tmp_path, "read"), OutOfMemory)


AVAILABLE = """
import resource, sys
from infra.memory import available_memory
limit = getattr(resource, sys.argv[1])
resource.setrlimit(limit, (int(sys.argv[2]),) * 2)
found = available_memory()
print(found.bytes, found.limit)
"""


@pytest.mark.parametrize(("limit", "words"), [("RLIMIT_AS", "-v"), ("RLIMIT_DATA", "-d")])
def test_the_limits_of_the_process_bound_what_is_available(limit, words):
    command = [sys.executable, "-c", AVAILABLE, limit, str(512 * MIB)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 100 * MIB < int(said.split()[0]) < 512 * MIB
    assert words in said


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Files of /proc and control groups with given numbers."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "proc/self/status").write_text("VmRSS: 100 kB\nVmSize: 100 kB\n")

    def group(path: str, files: dict[str, str], line: str) -> None:
        folder = tmp_path / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        (tmp_path / "proc/self/cgroup").write_text(line)

    return group


STAT = "anon 1\nfile 3\ninactive_file 1048576\nactive_file 1048576\n"


def test_the_memory_of_the_machine_is_available_without_other_limits(machine):
    assert available_memory() == (8000 * 1024, "the memory of this machine")


def test_a_control_group_of_version_2_and_every_group_above_it_count(machine):
    unlimited = {"memory.max": "max", "memory.current": "1", "memory.stat": STAT}
    limited = {"memory.max": str(7 * MIB), "memory.current": str(4 * MIB), "memory.stat": STAT}
    machine("a/b", unlimited, "0::/a/b\n")
    machine("a", limited, "0::/a/b\n")
    found = available_memory()
    assert found.bytes == 5 * MIB, "what is used, less the cached files, is taken off"
    assert "control group" in found.limit


def test_a_control_group_of_version_1_counts(machine):
    files = {
        "memory.limit_in_bytes": str(4 * MIB),
        "memory.usage_in_bytes": str(3 * MIB),
        "memory.stat": STAT,
    }
    machine("memory/a", files, "5:cpu:/x\n4:memory:/a\n")
    assert available_memory().bytes == 3 * MIB


def test_the_setting_replaces_what_was_found(machine, monkeypatch):
    monkeypatch.setenv("RECPRESS_MEMORY_MB", "1")
    assert available_memory() == (MIB - 100 * 1024, "RECPRESS_MEMORY_MB=1")


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "inf", "1e300"])
def test_a_setting_that_is_no_size_is_refused(monkeypatch, text):
    monkeypatch.setenv("RECPRESS_MEMORY_MB", text)
    with raises_code(SettingRefused, "variable_invalid", name="RECPRESS_MEMORY_MB"):
        available_memory()


def test_a_refusal_names_both_figures_and_the_remedy(monkeypatch):
    monkeypatch.setenv("RECPRESS_MEMORY_MB", "100")
    with raises_code(
        OutOfMemory,
        "step_memory",
        doing="Lowering",
        needed_mib=1_048_576,
        limit="RECPRESS_MEMORY_MB=100",
        setting="RECPRESS_MEMORY_MB",
    ):
        require_memory(2**40, "Lowering")
