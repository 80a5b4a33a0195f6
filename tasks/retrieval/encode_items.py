"""Compute the vectors of all items with a stored graph of a retrieval model.

The vectors are a separate artifact. Orders with the same untouched model or champion, and an
order that is started again, reuse them instead of encoding the catalogue.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from prefect import task
from safetensors import safe_open

from compressors.contracts import Artifact, Signature
from compressors.contracts.targets.runtime import Machine
from compressors.core.state.safetensors_stream import write
from compressors.errors.metrics import MetricRefused
from compressors.lower.serving_wrapper import input_names, served_graphs
from infra.settings import load_settings
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import fetch_split
from tasks.evaluation.graph_sessions import open_graph
from tasks.orchestration.documents import PreparedRows
from tasks.orchestration.graph_documents import read_lowering
from tasks.orchestration.row_progress import RowProgress
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import local, store
from tasks.retrieval.towers import encode_catalogue, graph_tower


@task(task_run_name="encode items {target}", **TASK_OPTIONS)
def encode_items(
    target: str, model: Artifact, signature: Signature, items: PreparedRows, machine: Machine
) -> Artifact:
    """Compute the vectors of all items in a target's runtime.

    Args:
        target: a target with a runtime.
        model: the graphs or engines of a retrieval model.
        signature: the signature of the order's bundle.
        items: the prepared catalogue, whose columns are stored as tensors.
        machine: this machine and the runtime (``target_adapters.machine_of``). It is an argument
            only to be part of the cache key: another processor or another version of the runtime
            may round differently.

    Returns:
        The artifact of ``data.safetensors`` with ``vector``: the vectors in the order of the
        catalogue, float32 ``(items, dim)``.

    Raises:
        MetricRefused: the model does not have the graphs of the signature, or its item tower reads
            other inputs.
    """
    del machine
    folder = local(model)
    graph = next(graph for graph in served_graphs(signature) if "item" in graph.towers)
    session = open_graph(target, folder, signature, graph)
    lowering = read_lowering(folder)
    (stored,) = (item for item in lowering.graphs if item.name == graph.name)
    expected, got = input_names(graph.signature), tuple(item.name for item in stored.inputs)
    if set(got) != set(expected):
        raise MetricRefused("item_inputs_differ", name=lowering.name, got=got, expected=expected)
    progress = RowProgress(f"encode items for {target}", items.rows)
    vectors = encode_catalogue(
        graph_tower(session, signature, "item"),
        signature,
        fetch_split(items.artifact, items.rows),
        progress.show,
    )
    with scratch_folder("encode", store().scratch(load_settings().cache)) as scratch:
        write(Path(scratch) / "data.safetensors", {"vector": torch.from_numpy(vectors)})
        return store().take(Path(scratch))


def read_item_vectors(artifact: Artifact) -> NDArray[np.float32]:
    """Map the stored vectors of all items, float32 ``(items, dim)``."""
    with safe_open(local(artifact) / "data.safetensors", framework="pt") as file:
        vectors: NDArray[np.float32] = file.get_tensor("vector").numpy()
    return vectors
