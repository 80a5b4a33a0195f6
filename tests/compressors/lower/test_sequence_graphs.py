"""Graphs of sequences: one graph gives the scores of torch at every length and batch size.

``signature`` of ``sequence_draft.py`` has the sequences ``history`` and ``categories``, which have
the same length ``category_count``, and the id ``item``. The mask and the positions are those of
``history``.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import Graph, Reference, only_served_graph
from sequence_draft import CONFIG, TABLES, Padding, signature
from sequence_network import SequenceNet

from compressors.contracts import Signature, TargetName
from compressors.core.random_inputs import edge_rows, generate_edge_inputs
from compressors.core.runner import run
from compressors.lower.export import lower
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from tasks.evaluation.single_rows import take_row

RECIPES = {"plain": (), "tables": (RowwiseInt8(),), "all": (RowwiseInt8(), StaticInt8())}
SCRATCH = tempfile.TemporaryDirectory(prefix="sequences-")
# Equal graphs add padded zeros in another order at another length: errors of float32 sums.
# TensorRT's graph rounds a dequantized row to float16, with 11 bits, before the layers. With int8
# layers a quantized input can round to the next of 256 levels, which changes a probability by
# less than 1e-2.
TOLERANCES = {"plain": 1e-5, "tables": 1e-3, "all": 1e-2}


@functools.cache
def build_graph(recipe: str, target: TargetName, padding: Padding) -> Graph:
    """Return the graph of the network after a recipe."""
    reference = Reference(SequenceNet, Signature.model_validate(signature(padding)), CONFIG)
    folder = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    model, bench = reference.model(), reference.bench(folder / "data")
    for number, step in enumerate(RECIPES[recipe]):
        model = run(step, model, bench, folder / str(number))
    path = folder / "model.onnx"
    lowered = lower(model.module, only_served_graph(reference.signature), target, path)
    return Graph(model, lowered, reference.signature, path, target)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("recipe", "target"),
    [("plain", "onnxruntime"), ("all", "onnxruntime"), ("tables", "tensorrt-rtx")],
)
def test_graph_has_the_scores_of_torch_at_every_length(recipe, target, padding):
    graph = build_graph(recipe, target, padding)
    inputs = graph.rows(30)
    expected = graph.run_in_torch(inputs)
    np.testing.assert_allclose(graph.run_in_onnx(inputs), expected, atol=TOLERANCES[recipe])
    # Edge inputs have ids out of range, and the shortest and the longest lists.
    edge = generate_edge_inputs(graph.signature, TABLES, edge_rows(graph.signature))
    scores = graph.run_in_onnx(edge)
    np.testing.assert_allclose(scores, graph.run_in_torch(edge), atol=TOLERANCES[recipe])
    assert np.isnan(scores).any()  # ids out of range of "categories" and "item", policy error


@pytest.mark.parametrize("padding", ["left", "right"])
def test_row_has_the_same_score_without_the_padding_of_its_batch(padding):
    graph = build_graph("plain", "onnxruntime", padding)
    inputs = graph.rows(12)
    in_batch = graph.run_in_onnx(inputs)
    per_id = ("history", "history_mask", "history_positions", "categories")
    for row, length in enumerate(inputs["category_count"].tolist()):
        alone = take_row(inputs, graph.signature, row)
        for name in per_id:
            ids = alone[name]
            alone[name] = ids[:, -length:] if padding == "left" else ids[:, :length]
        assert alone["history"].shape == (1, length)
        np.testing.assert_allclose(graph.run_in_onnx(alone), in_batch[row : row + 1], atol=1e-5)


def test_graph_has_one_dynamic_length_for_sequences_of_the_same_length():
    graph = build_graph("plain", "onnxruntime", "right")
    inputs = onnx.load(graph.path).graph.input
    dims = {
        item.name: [dim.dim_param for dim in item.type.tensor_type.shape.dim] for item in inputs
    }
    assert dims["history"][1] != ""
    assert {dims[name][1] for name in ("history_mask", "history_positions", "categories")} == {
        dims["history"][1]
    }
    assert dims["category_count"] == dims["item"] == [dims["history"][0]]


def test_id_out_of_range_in_a_list_is_replaced_or_refused_as_declared():
    graph = build_graph("plain", "onnxruntime", "right")
    inputs = graph.rows(3)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    changed["history"][0, 0] = TABLES["item"]  # policy default_row
    changed["categories"][1, 0] = -1  # policy error
    inputs["history"][0, 0] = 0
    scores = graph.run_in_onnx(changed)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [1]
    np.testing.assert_array_equal(scores[[0, 2]], graph.run_in_onnx(inputs)[[0, 2]])
    assert torch.tensor(scores[[0, 2]]).isfinite().all()
