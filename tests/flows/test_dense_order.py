"""An order with int4, weight-only int8 and 2:4 sparse layers, for both targets.

The targets are ONNX Runtime, which serves the graph (``served``), and TensorRT-RTX, for which an
engine is built but not measured (``built``). The limit ``ACCEPTED`` allows a loss of 0.02 in AUC.
The model ``clicks@1`` is ``ClickNet`` (``tests/draft_network.py``) with the dense layers ``cross``,
``first``, ``second`` and ``out``.
"""

from orders import ACCEPTED, BOTH_TARGETS, AcceptedOrder, run_without_prefect

from compressors.contracts.reasons import Reason
from compressors.prune.dense.sparse_2_4 import Sparse24
from compressors.quantize.dense.weight_int4 import WeightInt4
from compressors.quantize.dense.weight_int8 import WeightInt8
from flows.order import Order
from tasks.report.tables import markdown

STEPS = (
    Sparse24(layers=("first", "second")),
    WeightInt4(layers=("cross",), rounding="gptq"),
    WeightInt8(layers=("out",), activations="float32"),
)


def test_report_describes_how_targets_run_int4_and_sparse_layers(
    accepted_order: AcceptedOrder,
) -> None:
    order = Order(
        model="clicks@1", preset="custom", steps=STEPS, limits=(ACCEPTED,), targets=BOTH_TARGETS
    )
    report = run_without_prefect(order).finished.report
    assert [(item.target, item.verdict.outcome) for item in report.targets] == [
        ("onnxruntime", "accepted"),
        ("tensorrt-rtx", "built-unmeasured"),
    ]
    served, built = report.targets
    (graph,) = served.lowering.graphs
    assert graph.audit is not None
    # ONNX Runtime multiplies by the int4 codes of "cross", and converts the int8 codes of "out" to
    # float32 when it loads the graph.
    assert (graph.audit.packed_layers, graph.audit.widened_layers) == (1, 1)
    assert graph.audit.nodes["MatMulNBits"] == 1
    assert graph.sparse_layers == ("first", "second")
    assert built.lowering.graphs[0].sparse_layers == ("first", "second")
    # The log of this builder does not report whether the engine uses kernels for 2:4 zeros.
    assert built.audits["model"]["sparsity"] == "unknown"
    text = markdown(report)
    assert "no effect, since ONNX Runtime stores and multiplies zeros" in text
    assert "1 dense layer computed with quantized weights" in text
    assert "gptq reduces the output error to" in text
    assert str(Reason("two_of_four", step="sparse_2_4")) in text
