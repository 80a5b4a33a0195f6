"""Convert one case to entries of the golden record: ``case | network | part | item`` -> one line.

The golden record is ``record.json``, the committed results of all cases (``cases.py``).

A part is a step, ``stored`` (the tensors after the last step), ``torch`` (the scores of the module)
or a target, followed by the graph's name if there are several. An item is what the line describes,
for example a tensor.
"""

import hashlib
import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch

from tests.golden import package
from tests.golden.cases import NETWORKS, Case, build_bench
from tests.golden.numerics import digest, format_array, format_line, format_tensor

Entries = dict[str, str]
MAX_SMALL_SIZE = 4
SMALL_TYPES = (onnx.TensorProto.BOOL, onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def compute_entries(case: Case, folder: Path, targets: tuple[str, ...]) -> Entries:
    """Compress, store, score and lower one case; return its entries.

    Args:
        case: the network and the steps.
        folder: an empty scratch folder.
        targets: names of targets in the record.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _compute_entries(case, folder, targets)


def _compute_entries(case: Case, folder: Path, targets: tuple[str, ...]) -> Entries:
    reference = NETWORKS[case.network]
    model = reference.model()
    bench = build_bench(case.network, tuple(kind for kind, _ in case.steps), folder / "data")
    title, entries = f"{case.name} | {case.network}", Entries()
    stored = folder / "none"  # not read if the case has no steps
    for index, (kind, settings) in enumerate(case.steps):
        stored = folder / f"step{index}"
        try:
            model = package.compress(package.build_step(kind, **settings), model, bench, stored)
        except package.Refused as refusal:
            return {f"{title} | step {index:02} {kind} | refused": str(refusal)}
        if len(case.steps) > 1:
            entries[f"{title} | step {index:02} {kind} | all tensors"] = _digest_tensors(stored)
    for name, tensor in package.read_stored_tensors(stored).items() if case.steps else ():
        entries[f"{title} | stored | {name}"] = format_tensor(tensor)
    entries[f"{title} | torch | scores"] = format_array(
        package.compute_module_scores(model, reference)
    )
    names = package.list_targets()
    for target in targets:
        try:
            graphs = package.write_graphs(model, reference, names[target], folder)
        except package.Refused as refusal:
            entries[f"{title} | {target} | refused"] = str(refusal)
            continue
        for graph in graphs:
            part = target if len(graphs) == 1 else f"{target} {graph.name}"
            for rows, scores in graph.runtime_scores.items():
                entries[f"{title} | {part} | scores of {rows} rows"] = format_array(scores)
            for item, line in _describe_graph(graph.path).items():
                entries[f"{title} | {part} | {item}"] = line
    return entries


def _digest_tensors(folder: Path) -> str:
    lines = sorted(
        f"{name} {format_tensor(tensor)}"
        for name, tensor in package.read_stored_tensors(folder).items()
    )
    return digest("\n".join(lines).encode())


def _describe_graph(path: Path) -> Entries:
    """Return the entries of a graph: initializers, operator counts and connections.

    All small constants together have one entry: their number and a digest.
    """
    model = onnx.load(path)
    entries = Entries()
    small = []
    for item in model.graph.initializer:
        name = package.name_tensor_in_record(item.name)
        if _is_small_constant(item):
            small.append(f"{name} {format_initializer(item)}")
        else:
            entries[f"initializer {name}"] = format_initializer(item)
    entries["small constants"] = f"{len(small)} {digest(chr(10).join(sorted(small)).encode())}"
    counts = Counter(_name_operator(node) for node in model.graph.node)
    entries["operators"] = " ".join(f"{name}:{counts[name]}" for name in sorted(counts))
    entries["connections"] = _digest_connections(model.graph)
    return entries


def _is_small_constant(item: onnx.TensorProto) -> bool:
    """Return whether an initializer has at most four integers or booleans, such as a shape."""
    return item.data_type in SMALL_TYPES and math.prod(item.dims) <= MAX_SMALL_SIZE


def format_initializer(item: onnx.TensorProto) -> str:
    """Return one line that describes an initializer of a graph."""
    kind = onnx.TensorProto.DataType.Name(item.data_type).lower()
    array = onnx.numpy_helper.to_array(item)
    return format_line(kind, array.tobytes(), tuple(item.dims), array.astype(np.float64))


def _name_operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _digest_connections(graph: onnx.GraphProto) -> str:
    """Return a digest of all operators, attributes and inputs, without intermediate names."""
    names = {item.name: f"input {item.name}" for item in graph.input}
    names |= {item.name: package.name_tensor_in_record(item.name) for item in graph.initializer}
    graph_digest = hashlib.sha256()
    for position, node in enumerate(graph.node):
        names |= {
            output: f"{position}.{index}" for index, output in enumerate(node.output) if output
        }
        inputs = [names.get(name, name) for name in node.input]
        attributes = sorted(item.SerializeToString(deterministic=True) for item in node.attribute)
        graph_digest.update(repr((_name_operator(node), inputs, attributes)).encode())
    graph_digest.update(repr([names[item.name] for item in graph.output]).encode())
    return graph_digest.hexdigest()[:16]
