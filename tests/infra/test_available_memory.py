"""The estimate of available memory, and recognition of out-of-memory errors of all libraries.

The field ``doing`` of an error names the work that ran out of memory. ``raises_code`` with the
code None accepts any code.
"""

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
from infra.memory import (
    convert_to_out_of_memory,
    estimate_available_memory,
    memory_errors,
    require_memory,
)
from infra.store.disk import translate_input_error, translate_os_error

MIB = 2**20
TOO_MUCH = 2**46  # bytes: more than any address space that these processes may use


def raised_exception(cause) -> BaseException:
    """Return the exception that a call raises."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - each library has its own class
        cause()
    return caught.value


def onnxruntime_error() -> None:
    """Run a graph with a constant that is larger than the address space."""
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
def test_allocation_error_of_each_library_is_out_of_memory(cause):
    fault = raised_exception(cause)
    assert is_out_of_memory(fault), repr(fault)
    error = convert_to_out_of_memory(fault, "This test")
    assert error is not None
    assert str(error).startswith("This test ran out of memory.")


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libx.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
    ],
)
def test_is_out_of_memory_recognizes_messages_of_libraries(fault):
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
def test_is_out_of_memory_ignores_the_same_words_in_names_and_in_other_errors(fault):
    assert not is_out_of_memory(fault)


def test_error_caused_by_memory_error_is_out_of_memory():
    fault = ModelRefused("values_missing", names=("weight",))
    fault.__cause__ = MemoryError()
    assert is_out_of_memory(fault)


def test_memory_errors_converts_only_out_of_memory_errors():
    with (
        raises_code(OutOfMemory, None, doing="Lowering"),
        memory_errors(lambda: "Lowering"),
    ):
        torch.ones(TOO_MUCH)
    with pytest.raises(KeyError), memory_errors(lambda: "Lowering"):
        raise KeyError("x")


def test_enomem_of_a_file_is_out_of_memory(tmp_path):
    fault = OSError(errno.ENOMEM, "Cannot allocate memory", str(tmp_path))
    assert isinstance(translate_input_error(fault), OutOfMemory)
    assert isinstance(translate_os_error(fault, tmp_path, "read"), OutOfMemory)


# Prints the available memory of a process with a limit: the limit's name, its value in bytes.
PRINT_AVAILABLE = """
import resource, sys
from infra.memory import estimate_available_memory
limit = getattr(resource, sys.argv[1])
resource.setrlimit(limit, (int(sys.argv[2]),) * 2)
available = estimate_available_memory()
print(available.bytes, available.limit)
"""


@pytest.mark.parametrize(("limit", "ulimit_option"), [("RLIMIT_AS", "-v"), ("RLIMIT_DATA", "-d")])
def test_available_memory_is_bounded_by_limits_of_the_process(limit, ulimit_option):
    command = [sys.executable, "-c", PRINT_AVAILABLE, limit, str(512 * MIB)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 100 * MIB < int(output.split()[0]) < 512 * MIB
    assert ulimit_option in output


@pytest.fixture
def simulated_machine(tmp_path, monkeypatch):
    """Replace ``/proc`` by files with fixed numbers, and return a function for control groups.

    The function writes the files of one control group, and the line of ``/proc/self/cgroup``.
    """
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "proc/self/status").write_text("VmRSS: 100 kB\nVmSize: 100 kB\n")

    def write_control_group(path: str, files: dict[str, str], line: str) -> None:
        folder = tmp_path / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        (tmp_path / "proc/self/cgroup").write_text(line)

    return write_control_group


# memory.stat of a control group with 2 MiB of cached files.
STAT = "anon 1\nfile 3\ninactive_file 1048576\nactive_file 1048576\n"


def test_available_memory_without_limits_is_the_memory_of_the_machine(simulated_machine):
    assert estimate_available_memory() == (8000 * 1024, "the memory of this machine")


def test_available_memory_is_bounded_by_all_parents_of_a_version_2_control_group(simulated_machine):
    unlimited = {"memory.max": "max", "memory.current": "1", "memory.stat": STAT}
    limited = {"memory.max": str(7 * MIB), "memory.current": str(4 * MIB), "memory.stat": STAT}
    simulated_machine("a/b", unlimited, "0::/a/b\n")
    simulated_machine("a", limited, "0::/a/b\n")
    available = estimate_available_memory()
    # The limit of 7 MiB, without 4 MiB that are used, of which 2 MiB are cached files.
    assert available.bytes == 5 * MIB, "cached files do not count as used"
    assert "control group" in available.limit


def test_available_memory_is_bounded_by_a_version_1_control_group(simulated_machine):
    files = {
        "memory.limit_in_bytes": str(4 * MIB),
        "memory.usage_in_bytes": str(3 * MIB),
        "memory.stat": STAT,
    }
    simulated_machine("memory/a", files, "5:cpu:/x\n4:memory:/a\n")
    assert estimate_available_memory().bytes == 3 * MIB  # 4 MiB - (3 MiB - 2 MiB of cached files)


def test_memory_setting_replaces_all_other_limits(simulated_machine, monkeypatch):
    monkeypatch.setenv("RECPRESS_MEMORY_MB", "1")
    # The process already uses the 100 kB of ``VmRSS``.
    assert estimate_available_memory() == (MIB - 100 * 1024, "RECPRESS_MEMORY_MB=1")


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "inf", "1e300"])
def test_memory_setting_that_is_not_a_positive_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("RECPRESS_MEMORY_MB", text)
    with raises_code(SettingRefused, "variable_invalid", name="RECPRESS_MEMORY_MB"):
        estimate_available_memory()


def test_require_memory_raises_with_needed_memory_and_limit(monkeypatch):
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
