"""The registry of targets, and documents about the runtime of a measurement."""

import json

from compressors.contracts import TARGETS, default_target
from compressors.contracts.targets.runtime import Machine

STORED = (
    '{"processor":"p","cores":2,"system":"Linux x86_64","onnxruntime":"1.22.0","threads":1,'
    '"int8_dot":true}'
)


def test_a_stored_machine_without_a_runtime_is_read_and_written_with_the_same_bytes() -> None:
    machine = Machine.model_validate_json(STORED)
    assert (machine.runtime, machine.version) == ("ONNX Runtime", "1.22.0")
    assert machine.model_dump_json() == STORED


def test_a_machine_with_another_runtime_is_stored_with_its_name() -> None:
    machine = Machine.model_validate_json(STORED).model_copy(update={"runtime": "another"})
    written = json.loads(machine.model_dump_json())
    assert (written["runtime"], written["version"]) == ("another", "1.22.0")
    assert "onnxruntime" not in written
    assert Machine.model_validate(written) == machine


def test_one_target_is_the_default_and_it_is_measured() -> None:
    """The bytes of a result without a measured target are compared for the default one."""
    assert [item for item in TARGETS.values() if item.is_default] == [default_target()]
    assert default_target().is_measured


def test_targets_that_triton_serves_have_different_names_there() -> None:
    suffixes = [item.triton.suffix for item in TARGETS.values() if item.triton is not None]
    assert len(set(suffixes)) == len(suffixes) >= 2
