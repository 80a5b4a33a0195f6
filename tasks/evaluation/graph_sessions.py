"""Open the stored graphs or engines of a model in a target's runtime. No Prefect."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors.contracts import Signature
from compressors.contracts import target as declared_target
from compressors.contracts.targets.runtime import Session
from compressors.errors.metrics import MetricRefused
from compressors.lower.serving_wrapper import ServedGraph, served_graphs
from infra.settings import load_settings
from tasks.orchestration.graph_documents import read_lowering
from tasks.target_adapters import get_runtime


def open_graph(target: str, folder: Path, signature: Signature, graph: ServedGraph) -> Session:
    """Open one graph of a stored model in the target's runtime.

    Args:
        target: a target with a runtime.
        folder: the model's graphs or engines for this target.
        signature: the signature of the order's bundle, which the model must match.
        graph: the graph to open, one of those of the signature.

    Raises:
        MetricRefused: the model does not have the graphs and outputs of the signature.
        Refused: the runtime does not accept the file.
    """
    _require_graphs(folder, signature)
    file = folder / declared_target(target).name_served_file(graph.name)
    return get_runtime(target).open(file, load_settings().threads)


def require_same_tokenizers(folders: Mapping[str, Path]) -> None:
    """Raise if a model tokenizes a text in another way than the candidate.

    The test rows contain the ids of the candidate's tokenizers, so other models are scored on them.

    Args:
        folders: the graphs or engines of each model, ``candidate`` among them.

    Raises:
        MetricRefused: names the model and the first column that it tokenizes in another way.
    """
    expected = _read_tokenizers(folders["candidate"])
    for name, folder in folders.items():
        got = _read_tokenizers(folder)
        for column in expected:
            if got.get(column) != expected[column]:
                raise MetricRefused("tokenizers_differ", model=name, column=column)


def _read_tokenizers(folder: Path) -> dict[str, Any]:
    """Return the contents of the tokenizer of each column of texts."""
    return {
        text.column: json.loads((folder / text.tokenizer).read_bytes())
        for text in read_lowering(folder).texts
    }


def _require_graphs(folder: Path, signature: Signature) -> None:
    """Raise ``MetricRefused`` if a stored model has other graphs or outputs than the signature."""
    graphs, stored = served_graphs(signature), read_lowering(folder).graphs
    expected = tuple(graph.name for graph in graphs)
    got = tuple(graph.name for graph in stored)
    if sorted(got) != sorted(expected):
        raise MetricRefused(
            "graphs_differ", task=signature.outputs[0].kind, expected=expected, got=got
        )
    outputs = {graph.name: graph.outputs for graph in stored}
    for graph in graphs:
        if outputs[graph.name] != graph.outputs:  # scores are compared by their position
            raise MetricRefused("outputs_differ", expected=graph.outputs, got=outputs[graph.name])
