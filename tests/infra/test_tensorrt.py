"""Build TensorRT-RTX engines in a child process, and audit their weights and scratch memory.

A builder may widen a table: convert its packed numbers to a wider type, in the engine's weights or
in scratch memory, the temporary memory of a call. The audit compares the scratch memory with that
of a twin, an engine of the same graph with half the rows in large tables: it is "flat" if both are
equal and a widened copy would not fit into it. See ``infra/tensorrt/audit.py``.

A ``Profile`` has the smallest (``low``), optimal (``best``) and largest (``high``) shape of an
input. Tables with fewer than ``TWIN_ROWS`` rows are not cut for the twin. ``GROWTH`` is the largest
allowed difference in scratch memory, as a share of the bytes that the twin lacks.
"""

import hashlib
import json
from itertools import pairwise

import numpy as np
import onnx
import pytest
from error_codes import TextMatching, raises_code, raises_value_error
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from compressors.contracts.targets.builder import BuildRequest, Profile, TableWeights
from infra.errors import BuildRefused, ChildFailed
from infra.tensorrt import engines
from infra.tensorrt.audit import (
    GROWTH,
    TWIN_ROWS,
    check_weights,
    find_tables,
    halve_large_tables,
    judge_scratch,
    read_log_bytes,
)
from infra.tensorrt.engines import build_engine, find_installed_version

try:
    import tensorrt_rtx_bindings
except ImportError:
    tensorrt_rtx_bindings = None
needs_rtx = pytest.mark.skipif(
    tensorrt_rtx_bindings is None,
    reason="TensorRT-RTX is not installed; pip install 'recpress[tensorrt-rtx]'",
)
FIELDS, DIM = 26, 32
# Enough rows for a twin, and for an fp16 copy of the table to be larger than the 9.9 MB of scratch
# memory that the activations of these graphs take.
ROWS = 220_000
IDS = Profile(input="ids", low=(1, FIELDS), best=(512, FIELDS), high=(1024, FIELDS))


class Graph:
    """An ONNX graph under construction; ``packed`` is the bytes of its initializers."""

    def __init__(self):
        self.nodes, self.initializers, self.packed = [], [], 0

    def init(self, name, values):
        """Add an initializer; return its name."""
        self.initializers.append(numpy_helper.from_array(values, name))
        self.packed += values.nbytes
        return name

    def int4(self, name, shape):
        """Add an initializer of random int4 values; return its name."""
        tensor = TensorProto(name=name, data_type=TensorProto.INT4, dims=shape)
        tensor.raw_data = np.random.default_rng(0).bytes((np.prod(shape) + 1) // 2)
        self.initializers.append(tensor)
        self.packed += len(tensor.raw_data)
        return name

    def node(self, op, inputs, out, **attributes):
        """Add a node with one output; return the output's name."""
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"make_{out}", **attributes))
        return out

    def model(self, inputs, outputs):
        """Return the ONNX model with these inputs and outputs."""
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.nowhere", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def build_lookup_model(table, rows, dim=DIM):
    """Build a model of a table, its Gather and one dense layer; return it and its packed bytes.

    Args:
        table: type of the stored table, or ``int8 minus its column maximum``.
        rows: rows of the table.
        dim: columns of the table.
    """
    g, half = Graph(), np.float16
    rng = np.random.default_rng(0)
    if table == "int4":
        g.int4("codes", (rows, dim))
        g.init("scale", np.full((rows, 1), 0.01, half))
        wide = g.node("DequantizeLinear", ["codes", "scale"], "wide", axis=1, block_size=dim)
    elif table in ("fp16", "fp32"):
        wide = g.init(
            "codes", rng.standard_normal((rows, dim)).astype(table.replace("fp", "float"))
        )
    else:
        g.init("codes", rng.integers(-128, 128, (rows, dim)).astype(np.int8))
        g.init("scale", np.full(rows, 0.01, half))
        wide = g.node("DequantizeLinear", ["codes", "scale"], "wide", axis=0)
    if table == "int8 minus its column maximum":  # the maximum needs all rows, so all are widened
        top = g.node("ReduceMax", [wide, g.init("axis", np.array([0]))], "top", keepdims=0)
        wide = g.node("Sub", [wide, top], "centred")
    looked_up = g.node("Gather", [wide, "ids"], "rows", axis=0)
    if table == "fp32":
        looked_up = g.node("Cast", [looked_up], "narrow", to=TensorProto.FLOAT16)
    flat = g.node("Reshape", [looked_up, g.init("shape", np.array([0, FIELDS * dim]))], "flat")
    weight = g.init("weight", rng.standard_normal((FIELDS * dim, 1)).astype(half))
    g.node("MatMul", [flat, weight], "score")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", FIELDS])
    score = helper.make_tensor_value_info("score", TensorProto.FLOAT16, ["batch", 1])
    return g.model([ids], [score]), g.packed


def build_request(path, rows, packed, names=("codes", "scale"), **changes):
    """Return a request for a graph with the table ``items``, with some settings changed."""
    settings = {
        "target": "tensorrt-rtx",
        "onnx": str(path),
        "profiles": (IDS,),
        "tables": (TableWeights(module="items", rows=rows, initializers=names),),
        "packed_bytes": packed,
        "seconds": 120,
    }
    return BuildRequest(**(settings | changes))


def build(tmp_path, table, rows, dim=DIM, **changes):
    """Build the engine of a lookup model, with some settings of the request changed."""
    model, packed = build_lookup_model(table, rows, dim)
    onnx.save(model, tmp_path / "model.onnx")
    names = ("codes",) if table.startswith("fp") else ("codes", "scale")
    changes = {"packed_bytes": packed} | changes
    # ``model_copy`` does not validate the changes, and replaces the 0.
    request = build_request(tmp_path / "model.onnx", rows, names=names, packed=0).model_copy(
        update=changes
    )
    return build_engine(request, tmp_path / "out")


# --- engines -----------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("table", ["int8", "int4", "fp16"])
def test_engine_of_a_packed_table_passes_the_audit(tmp_path, table):
    engine = build(tmp_path, table, ROWS)
    audit = engine.audit
    assert audit.scratch == "flat"
    assert audit.tables_checked == ("items",)
    assert audit.scratch_bytes == audit.twin_scratch_bytes
    assert audit.layer_types[table] > 0
    assert audit.constant_bytes[table] >= ROWS * DIM * {"int8": 1, "int4": 0.5, "fp16": 2}[table]
    # The engine contains the packed bytes and padding: 2.4 KB was measured, 16 KB leaves room.
    assert audit.packed_bytes <= audit.weights_bytes < audit.packed_bytes + 16_384
    stored = (tmp_path / "out" / "model.engine").read_bytes()
    assert len(stored) == engine.bytes
    assert hashlib.sha256(stored).hexdigest() == engine.sha256
    assert engine.version == find_installed_version("tensorrt-rtx")
    record = json.loads((tmp_path / "out" / "build.json").read_text())
    assert record["engine"]["sha256"] == engine.sha256


@needs_rtx
def test_table_widened_before_its_gather_is_refused(tmp_path):
    with raises_code(BuildRefused, "scratch_grows") as caught:
        build(tmp_path, "int8 minus its column maximum", ROWS)
    fields = caught.value.fields
    assert fields["scratch_bytes"] > fields["twin_bytes"]
    assert not (tmp_path / "out" / "model.engine").exists()


@needs_rtx
def test_widening_of_a_small_table_is_reported_as_not_checkable(tmp_path):
    audit = build(tmp_path, "int8 minus its column maximum", 2_000).audit
    assert audit.scratch == "not checkable"
    assert f"{2_000 * DIM * 2:,} bytes as fp16" in audit.scratch_reason
    assert audit.tables_checked == ()


@needs_rtx
def test_engine_with_more_weight_bytes_than_planned_is_refused(tmp_path):
    packed_as_int8 = 20_000 * (DIM + 2)  # int8 codes and a float16 scale per row
    with raises_code(
        BuildRefused, "weights_widened", packed_bytes=680_000, constants=TextMatching("fp32")
    ):
        build(tmp_path, "fp32", 20_000, packed_bytes=packed_as_int8)
    assert not (tmp_path / "out" / "model.engine").exists()


@needs_rtx
def test_refused_build_removes_the_engine_of_an_earlier_build(tmp_path):
    build(tmp_path, "int8", 2_000)
    with pytest.raises(BuildRefused):
        build(tmp_path, "fp32", 20_000, packed_bytes=1)
    assert not (tmp_path / "out" / "model.engine").exists()
    assert not (tmp_path / "out" / "build.json").exists()


@needs_rtx
def test_twin_of_a_graph_with_external_weights_has_the_same_scratch_memory(tmp_path):
    model, packed = build_lookup_model("int4", ROWS)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")
    before = (tmp_path / "model.onnx.data").read_bytes()
    assert path.stat().st_size < 10_000
    audit = build_engine(build_request(path, ROWS, packed), tmp_path / "out").audit
    assert audit.scratch == "flat"
    assert audit.twin_scratch_bytes == audit.scratch_bytes
    assert (tmp_path / "model.onnx.data").read_bytes() == before


@needs_rtx
def test_dense_int8_layers_stay_int8_in_the_engine(tmp_path):
    g, widths = Graph(), (160, 128, 64, 1)
    current = "x"
    for i, (k, n) in enumerate(pairwise(widths)):
        scale = [
            g.init(f"xs{i}", np.array(0.03, np.float32)),
            g.init(f"xz{i}", np.array(0, np.int8)),
        ]
        codes = g.node("QuantizeLinear", [current, *scale], f"q{i}")
        dequantized = g.node("DequantizeLinear", [codes, *scale], f"xd{i}")
        weight = [
            g.init(f"w{i}", np.ones((n, k), np.int8)),
            g.init(f"ws{i}", np.full(n, 0.01, np.float32)),
            g.init(f"wz{i}", np.zeros(n, np.int8)),
        ]
        wide = g.node("DequantizeLinear", weight, f"wd{i}", axis=0)
        bias = g.init(f"b{i}", np.zeros(n, np.float32))
        current = g.node("Gemm", [dequantized, wide, bias], f"g{i}", transB=1)
    info = helper.make_tensor_value_info
    model = g.model(
        [info("x", TensorProto.FLOAT, ["batch", 160])], [info(current, TensorProto.FLOAT, None)]
    )
    onnx.save(model, tmp_path / "mlp.onnx")
    profile = Profile(input="x", low=(1, 160), best=(64, 160), high=(1024, 160))
    request = build_request(tmp_path / "mlp.onnx", 1, g.packed, profiles=(profile,), tables=())
    audit = build_engine(request, tmp_path / "out").audit
    # Measured: packed + 0.9 KB. As fp16 it would be packed + 27 KB.
    assert audit.weights_bytes < g.packed + 4_096
    assert audit.layer_types["int8"] == 6  # three activations, three weights
    assert (audit.scratch, audit.scratch_reason) == ("not checkable", "the model has no table")


# --- graphs that cannot be built ---------------------------------------------------------------


@needs_rtx
def test_unknown_operator_is_refused_with_the_name_of_its_node(tmp_path):
    model, packed = build_lookup_model("int8", 100)
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "Astrology", "com.nowhere"
    onnx.save(model, tmp_path / "model.onnx")
    with raises_code(
        BuildRefused,
        "tensorrt_graph_refused",
        problem=TextMatching(r"^node 'make_score' \(Astrology\): "),
    ):
        build_engine(build_request(tmp_path / "model.onnx", 100, packed), tmp_path / "out")


@needs_rtx
def test_gather_of_int8_codes_without_dequantize_is_refused_with_tensorrts_message(tmp_path):
    g = Graph()
    g.init("codes", np.ones((100, DIM), np.int8))
    g.init("scale", np.full((100, 1), 0.01, np.float16))
    codes = g.node("Gather", ["codes", "ids"], "rows", axis=0)
    wide = g.node("Cast", [codes], "wide", to=TensorProto.FLOAT16)
    g.node("Mul", [wide, g.node("Gather", ["scale", "ids"], "scales", axis=0)], "out")
    info = helper.make_tensor_value_info
    ids, out = info("ids", TensorProto.INT64, ["b"]), info("out", TensorProto.FLOAT16, ["b", DIM])
    onnx.save(g.model([ids], [out]), tmp_path / "model.onnx")
    profile = Profile(input="ids", low=(1,), best=(8,), high=(64,))
    request = build_request(tmp_path / "model.onnx", 100, g.packed, profiles=(profile,))
    with raises_code(
        BuildRefused,
        "engine_not_built",
        problem=TextMatching(r"Quantized constant \(codes\) is only allowed before DQ"),
    ):
        build_engine(request, tmp_path / "out")


@needs_rtx
@pytest.mark.parametrize(
    ("changes", "code", "fields"),
    [
        ({"profiles": ()}, "profiles_missing", {"inputs": ("ids",)}),
        (
            {"profiles": (IDS, IDS.model_copy(update={"input": "bags"}))},
            "profile_input_unknown",
            {"input": "bags", "inputs": ("ids",)},
        ),
        (
            {"profiles": (Profile(input="ids", low=(1, 9), best=(2, 9), high=(3, 9)),)},
            "profile_shape_differs",
            {"input": "ids", "shape": (-1, 26)},
        ),
        (
            {"tables": (TableWeights(module="items", rows=100, initializers=("lost",)),)},
            "initializer_missing",
            {"table": "items", "initializer": "lost"},
        ),
        (
            {"tables": (TableWeights(module="items", rows=99, initializers=("codes",)),)},
            "initializer_rows_differ",
            {"expected": 99, "shape": (100, 32)},
        ),
        ({"onnx": "nowhere.onnx"}, "graph_missing", {"path": "nowhere.onnx"}),
    ],
)
def test_request_that_does_not_fit_the_graph_is_refused(tmp_path, changes, code, fields):
    with raises_code(BuildRefused, code, **fields):
        build(tmp_path, "int8", 100, **changes)


@needs_rtx
def test_build_that_exceeds_its_time_limit_is_killed(tmp_path):
    with raises_code(ChildFailed, "child_timed_out", seconds=0.2):
        build(tmp_path, "int8", 100, seconds=0.2)  # the interpreter alone takes longer to start


def test_profile_with_a_maximum_below_its_optimum_is_refused():
    with raises_value_error("profile_order", input="ids"):
        Profile(input="ids", low=(1, 26), best=(64, 26), high=(32, 26))


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_missing_tensorrt_is_refused_with_the_target(tmp_path, monkeypatch, target):
    monkeypatch.setitem(engines.MODULES, target, ("no_such_tensorrt",))
    request = build_request(tmp_path / "model.onnx", 1, 1, target=target)
    with raises_code(BuildRefused, "tensorrt_missing", target=target):
        build_engine(request, tmp_path)
    assert find_installed_version(target) is None


def test_bindings_without_their_native_libraries_count_as_missing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("raise OSError('libnvinfer.so.11: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(engines.MODULES, "tensorrt", ("half_installed",))
    with raises_code(
        BuildRefused, "tensorrt_missing", problem=TextMatching(r"libnvinfer\.so\.11: cannot open")
    ):
        engines.load("tensorrt")


# --- functions of the audit --------------------------------------------------------------------

MB = 1_000_000
# Arguments of ``judge_scratch``: scratch bytes of the engine and of its twin, bytes of the rows
# that the twin does not have, and bytes of an fp16 copy of each table. It returns outcome, reason,
# and the tables that are proven not to be widened.


def test_scratch_smaller_than_a_widened_copy_is_judged_flat():
    outcome, reason, proven = judge_scratch(10 * MB, 10 * MB, 6 * MB, {"items": 13 * MB, "age": 1})
    assert (outcome, proven) == ("flat", ("items",))
    assert "10,000,000 bytes, less than an fp16 copy of 'items'" in reason


def test_scratch_larger_than_a_widened_copy_is_judged_not_checkable():
    outcome, reason, proven = judge_scratch(14 * MB, 14 * MB, 6 * MB, {"items": 13 * MB})
    assert (outcome, proven) == ("not checkable", ())
    assert "14,000,000 bytes of scratch memory for activations could hide" in reason


@given(removed=st.integers(10, 10**12), share=st.floats(0, 1), base=st.integers(0, 10**12))
def test_scratch_memory_counts_as_grown_if_it_differs_by_more_than_the_allowed_share(
    removed, share, base
):
    growth = round(removed * share)
    outcome, _, _ = judge_scratch(base + growth, base, removed, {"items": 10**13})
    assert (outcome == "grows") == (growth > GROWTH * removed)


@given(packed=st.integers(0, 10**12))
def test_weights_may_exceed_the_plan_by_ten_percent_and_64_kib(packed):
    limit = int(packed * 1.1) + 65_536
    check_weights(limit, packed, {})
    with raises_code(BuildRefused, "weights_widened", most_bytes=limit):
        check_weights(limit + 1, packed, {})


def test_log_bytes_reads_both_wordings_and_returns_the_largest_values():
    log = ["Layer: a Scratch Memory: 99 bytes", "Max Scratch Memory: 7 bytes"]
    log += ["Total Scratch Memory: 5", "Total Weights Memory: 11 bytes"]
    assert read_log_bytes(log, "11.4") == (7, 11)


@pytest.mark.parametrize("line", ["Max Scratch Memory", "Total Weights Memory"])
def test_log_without_a_required_line_is_refused(line):
    log = ["Max Scratch Memory: 7 bytes", "Total Weights Memory: 11 bytes"]
    with raises_code(BuildRefused, "log_line_missing", version="12.0", line=line):
        read_log_bytes([text for text in log if line not in text], "12.0")


@pytest.mark.parametrize("kind", ["int8", "int4", "fp16"])
def test_halve_keeps_the_first_half_of_large_tables_and_all_of_small_tables(kind):
    rows, dim = TWIN_ROWS + 3, 3  # odd rows of odd width: 4-bit rows do not end on bytes
    model, _ = build_lookup_model(kind, rows, dim)
    before = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    names = ("codes",) if kind == "fp16" else ("codes", "scale")
    large = TableWeights(module="items", rows=rows, initializers=names)
    small = TableWeights(module="weight", rows=FIELDS * dim, initializers=("weight",))
    removed = halve_large_tables(model, [large, small])
    after = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    kept_rows = rows // 4 * 2  # half, rounded down to an even number: 4-bit rows end on a byte
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values[:kept_rows] if name in names else values)
    row_bytes = {"int8": dim + 2, "int4": dim / 2 + 2, "fp16": dim * 2}[kind]
    # abs: half a byte is rounded up.
    assert removed == pytest.approx((rows - kept_rows) * row_bytes, abs=1)


def test_halve_keeps_only_the_shared_scales_of_the_kept_rows():
    rows = TWIN_ROWS + 32
    model, _ = build_lookup_model("int8", rows)
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == "scale")
    shared = numpy_helper.to_array(scale)[: rows // 64 + 1]  # the last scale is for 32 rows
    scale.CopyFrom(numpy_helper.from_array(shared, "scale"))
    codebook = np.ones((4, DIM), np.float16)
    model.graph.initializer.append(numpy_helper.from_array(codebook, "codebook"))
    table = TableWeights(
        module="items",
        rows=rows,
        initializers=("codes", "scale", "codebook"),
        # Rows that share one entry of the initializer; 0: all rows share it, so it is not cut.
        rows_per_entry={"scale": 64, "codebook": 0},
    )
    # Half the rows, rounded down to an even number of groups of 64.
    kept_rows = rows // 128 // 2 * 128
    kept_scales = kept_rows // 64
    removed_scales = len(shared) - kept_scales
    assert halve_large_tables(model, [table]) == (rows - kept_rows) * DIM + removed_scales * 2
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == "scale")
    np.testing.assert_array_equal(numpy_helper.to_array(scale), shared[:kept_scales])
    initializers = find_tables(model, [table.model_copy(update={"rows": kept_rows})])
    assert [tensor.name for tensor in initializers["items"]] == ["codes", "scale", "codebook"]


def test_halve_cuts_a_table_shared_by_two_modules_once():
    rows = TWIN_ROWS
    model, _ = build_lookup_model("int8", rows)
    tables = [
        TableWeights(module=name, rows=rows, initializers=("codes", "scale")) for name in "ab"
    ]
    assert halve_large_tables(model, tables) == rows // 2 * (DIM + 2)
    halved = [table.model_copy(update={"rows": rows // 2}) for table in tables]
    assert set(find_tables(model, halved)) == {"a", "b"}


def test_halve_returns_none_without_a_large_table():
    model, _ = build_lookup_model("int8", 100)
    table = TableWeights(module="items", rows=100, initializers=("codes",))
    assert halve_large_tables(model, [table]) is None


def test_halve_does_not_cut_a_table_that_the_graph_multiplies():
    model, _ = build_lookup_model("int8", TWIN_ROWS)
    table = TableWeights(module="items", rows=TWIN_ROWS, initializers=("codes",), multiplied=True)
    assert halve_large_tables(model, [table]) is None
