"""The registry of targets, and the stored form of ``Machine``, the machine of a measurement."""

import json

from compressors.contracts import TARGETS, default_target
from compressors.contracts.targets.runtime import Machine

# Stored when ONNX Runtime was the only runtime: the field ``onnxruntime`` is the runtime's version.
STORED = (
    '{"processor":"p","cores":2,"system":"Linux x86_64","onnxruntime":"1.22.0","threads":1,'
    '"int8_dot":true}'
)


def test_stored_machine_without_a_runtime_is_written_with_the_same_bytes() -> None:
    machine = Machine.model_validate_json(STORED)
    assert (machine.runtime, machine.version) == ("ONNX Runtime", "1.22.0")
    assert machine.model_dump_json() == STORED


def test_machine_with_another_runtime_is_stored_with_the_name_of_the_runtime() -> None:
    machine = Machine.model_validate_json(STORED).model_copy(update={"runtime": "another"})
    document = json.loads(machine.model_dump_json())
    assert (document["runtime"], document["version"]) == ("another", "1.22.0")
    assert "onnxruntime" not in document
    assert Machine.model_validate(document) == machine


def test_exactly_one_target_is_the_default_and_it_is_measured() -> None:
    """Reports of orders without a measured target compare bytes for the default target."""
    assert [item for item in TARGETS.values() if item.is_default] == [default_target()]
    assert default_target().is_measured


def test_targets_that_triton_serves_have_different_suffixes() -> None:
    """The suffix ends the name of a Triton model, so a model can be served for several targets."""
    suffixes = [item.triton.suffix for item in TARGETS.values() if item.triton is not None]
    assert len(set(suffixes)) == len(suffixes) >= 2
