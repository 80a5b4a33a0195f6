"""Graphs of a matrix, bounded integers and fields: scores of torch, and the policy of each field.

The network is ``FieldsNet`` (``tests/field_network.py``, with the config and signature of
``tests/field_draft.py``): users have ids 0 to 899 and items 0 to 599 of the input ``ids`` with
policy default_row (7 for items); ``matrix`` has a brand (policy error), four tags (clamp) and two
numbers; ``position`` is from 1 to 10 (error). Edge inputs have integers out of these ranges.

A policy says what a graph does with an integer out of its range: ``error`` gives the score NaN,
``clamp`` replaces the integer by the nearest valid one, and ``default_row`` by a fixed row.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from field_draft import CONFIG, SIGNATURE
from field_network import FieldsNet
from models import Graph, Reference, only_served_graph

from compressors.contracts import Signature, TargetName
from compressors.core.random_inputs import edge_rows, generate_edge_inputs
from compressors.core.runner import run
from compressors.lower.export import lower
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

FIELDS = Reference(FieldsNet, Signature.model_validate(SIGNATURE), CONFIG)
RECIPES = {"plain": (), "int8": (RowwiseInt8(), StaticInt8())}
SCRATCH = tempfile.TemporaryDirectory(prefix="fields-")
BRANDS, TAGS, ITEMS = CONFIG["brands"], CONFIG["tags"], CONFIG["items"]

each_target = pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])


@functools.cache
def build_graph(recipe: str, target: TargetName) -> Graph:
    """Return the graph of the network after a recipe."""
    folder = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    model, bench = FIELDS.model(), FIELDS.bench(folder / "data")
    for number, step in enumerate(RECIPES[recipe]):
        model = run(step, model, bench, folder / str(number))
    path = folder / "model.onnx"
    lowered = lower(model.module, only_served_graph(FIELDS.signature), target, path)
    return Graph(model, lowered, FIELDS.signature, path, target)


@each_target
@pytest.mark.parametrize("recipe", RECIPES)
def test_graph_has_the_scores_of_torch_for_valid_and_invalid_inputs(recipe, target):
    graph = build_graph(recipe, target)
    tables = FIELDS.rows_of_tables()
    edge = generate_edge_inputs(FIELDS.signature, tables, edge_rows(FIELDS.signature))
    for inputs in (graph.rows(50), edge):
        expected, actual = graph.run_in_torch(inputs), graph.run_in_onnx(inputs)
        # Quantized activations may round to the next of 256 levels; a probability then changes by
        # less than 1e-2. NaN must be in the same rows.
        np.testing.assert_allclose(actual, expected, atol=1e-2 if recipe == "int8" else 1e-5)
    assert np.isnan(graph.run_in_onnx(edge)).any()


@each_target
def test_policy_of_each_field_of_a_matrix_applies_to_its_columns(target):
    graph = build_graph("plain", target)
    inputs = graph.rows(6)
    valid = graph.run_in_onnx(inputs)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    changed["matrix"][1, 0] = BRANDS  # policy error
    changed["matrix"][2, 0] = -1
    changed["matrix"][3, 2] = TAGS + 5  # policy clamp: becomes the last tag
    changed["matrix"][4, 6] = 1e30  # no id: any number is valid
    inputs["matrix"][3, 2] = TAGS - 1
    inputs["matrix"][4, 6] = 1e30
    scores = graph.run_in_onnx(changed)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [1, 2]
    np.testing.assert_array_equal(scores[[3, 4]], graph.run_in_onnx(inputs)[[3, 4]])
    np.testing.assert_array_equal(scores[[0, 5]], valid[[0, 5]])


@each_target
def test_id_outside_its_field_becomes_the_default_row_of_the_field(target):
    graph = build_graph("plain", target)
    inputs = graph.rows(3)
    inputs["ids"] = torch.tensor([[5, ITEMS], [-1, 3], [2, 1]])
    actual = graph.run_in_onnx(inputs)
    inputs["ids"] = torch.tensor([[5, 7], [0, 3], [2, 1]])
    np.testing.assert_array_equal(actual, graph.run_in_onnx(inputs))
    assert not np.isnan(actual).any()


@each_target
def test_integer_outside_its_bounds_is_refused(target):
    graph = build_graph("plain", target)
    inputs = graph.rows(4)
    inputs["position"] = torch.tensor([1, 0, 10, 11])
    assert np.flatnonzero(np.isnan(graph.run_in_onnx(inputs))).tolist() == [1, 3]


def test_nan_in_a_column_of_numbers_gives_nan_under_every_policy():
    graph = build_graph("plain", "onnxruntime")
    inputs = graph.rows(3)
    inputs["matrix"][1, 5] = torch.nan
    assert np.flatnonzero(np.isnan(graph.run_in_onnx(inputs))).tolist() == [1]
