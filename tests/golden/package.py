"""The recpress API that the golden test uses. Edit this file when code moves.

The golden test compares results of the current code with ``record.json``, the record.

No other file of the golden test imports recpress directly. ``KINDS``, ``TARGETS`` and ``REFUSALS``
map a current name to its name in the record. Add a line there when a step kind, a target or an
error class is renamed; the record then stays unchanged. ``TENSORS`` maps names of stored tensors
and initializers by regular expression. If a step's setting is renamed, rename it in ``cases.py``;
the record has no settings.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressors.contracts import TARGETS as DECLARED_TARGETS
from compressors.contracts import Bench as Bench
from compressors.contracts import DenseInput as DenseInput
from compressors.contracts import IdInput as IdInput
from compressors.contracts import JaggedBag as JaggedBag
from compressors.contracts import Signature as Signature
from compressors.core.model import Model
from compressors.core.random_inputs import generate_edge_inputs, generate_inputs
from compressors.core.registries import METHODS
from compressors.core.runner import run
from compressors.core.state.module_state import map_tensors
from compressors.errors.compression import CompressionError
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import input_names, served_graphs
from infra.onnxruntime.sessions import Session
from tests.models import Reference, Step, default_step

KINDS: dict[str, str] = {}
TARGETS: dict[str, str] = {}
REFUSALS: dict[str, str] = dict.fromkeys(
    (
        "DistillationRefused",
        "LimitRefused",
        "MetricRefused",
        "OrderRefused",
        "RowsMissing",
        "StepRefused",
        "TrainingFailed",
        "ValueNotStorable",
    ),
    "CompressionError",
)
TENSORS: dict[str, str] = {}

RUNTIME = "onnxruntime"
ROWS, EDGE_ROWS = 64, 32


def name_in_record(name: str, names: dict[str, str]) -> str:
    """Return the record's name for a name of the package."""
    return names.get(name, name)


def name_tensor_in_record(name: str) -> str:
    """Return the record's name for a stored tensor or an initializer."""
    for pattern, replacement in TENSORS.items():
        name = re.sub(pattern, replacement, name)
    return name


def list_methods() -> dict[str, type[Step]]:
    """Return all registered methods by their kinds in the record."""
    registered = tuple(METHODS.values())
    return {
        name_in_record(method.model_fields["kind"].default, KINDS): method for method in registered
    }


def list_targets() -> dict[str, str]:
    """Return all registered targets by their names in the record."""
    return {name_in_record(target, TARGETS): target for target in DECLARED_TARGETS}


def build_step(kind: str, **settings: Any) -> Step:
    """Return a step with these settings and short training; ``kind`` is the kind in the record."""
    method = list_methods()[kind]
    return method(**{**default_step(method).model_dump(), **settings})


class Refused(Exception):
    """recpress refused a step or a graph; the message is the error class's name in the record."""


@contextmanager
def refusals() -> Iterator[None]:
    """Convert refusals of recpress to ``Refused``; other exceptions propagate."""
    try:
        yield
    except CompressionError as error:
        raise Refused(name_in_record(type(error).__name__, REFUSALS)) from error


def compress(step_to_apply: Step, model: Model, bench: Bench, folder: Path) -> Model:
    """Apply one step and store the result in ``folder``."""
    with refusals():
        return run(step_to_apply, model, bench, folder)


def read_stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all stored tensors by their names in the record."""
    return {name_tensor_in_record(name): tensor for name, tensor in map_tensors(folder).items()}


def compute_module_scores(model: Model, reference: Reference) -> NDArray[Any]:
    """Return the module's output on fixed valid inputs, float32."""
    inputs = generate_inputs(reference.signature, reference.rows_of_tables(), ROWS, seed=5)
    with torch.no_grad():
        scores: Tensor = model.module(**inputs)
    return scores.to(torch.float32).numpy()


@dataclass(frozen=True)
class WrittenGraph:
    """One exported graph: its file, and ONNX Runtime's scores on fixed inputs."""

    name: str
    path: Path
    runtime_scores: dict[str, NDArray[np.float32]]


def write_graphs(
    model: Model, reference: Reference, target: str, folder: Path
) -> list[WrittenGraph]:
    """Lower a model for one target; ONNX Runtime also scores its graphs.

    The scores are of random ``valid`` inputs, and of ``edge`` inputs: ids outside of their tables,
    and lists that are empty or have the longest length.

    Args:
        model: original or compressed model.
        reference: the reference network with its signature.
        target: name of the target in the package.
        folder: folder for the graphs.

    Raises:
        Refused: the model cannot be lowered for this target.
    """
    graphs = []
    for graph in served_graphs(reference.signature):
        path = Path(tempfile.mkdtemp(dir=folder)) / "model.onnx"
        with refusals():
            rows = lower(model.module, graph, target, path).wrapper.rows_of_table  # type: ignore[arg-type]
        scores = {}
        if target == RUNTIME:
            session, names = Session(path, threads=1), input_names(graph.signature)
            for title, inputs in (
                ("valid", generate_inputs(graph.signature, rows, ROWS, seed=5)),
                ("edge", generate_edge_inputs(graph.signature, rows, EDGE_ROWS)),
            ):
                scores[title] = session.scores({name: inputs[name].numpy() for name in names})
        graphs.append(WrittenGraph(graph.name, path, scores))
    return graphs
