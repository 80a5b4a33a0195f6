"""If a network is sensitive to rounding, its graph is compared with torch with more tolerance.

The network, ``tests/deep_int8.py``, has 32 int8 layers. Where torch and ONNX Runtime round a value
to different codes, the difference grows from layer to layer, so that some scores differ by more
than the usual tolerance for int8 layers. The codes of errors call a tolerance a limit.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deep_int8 import DeepInt8
from error_codes import raises_code
from models import only_served_graph
from torch import Tensor

from compressors.contracts import DenseInput, Output, Plan, PlanLine, Signature
from compressors.contracts.reasons import Reason
from compressors.errors.compression import ParityLost
from compressors.lower.comparison.parity import check_parity
from compressors.lower.export import Lowered, lower
from infra.onnxruntime.sessions import Session
from tasks.evaluation.parity import GraphCheck

DEPTH, WIDTH, ROWS = 32, 256, 300
SIGNATURE = Signature(
    inputs=(DenseInput(name="x", shape=(WIDTH,)),),
    outputs=(Output(name="label", kind="ranking", form="score", label="label", metric="ndcg@10"),),
    group="query",
)
PLAN = Plan(
    lines=tuple(
        PlanLine(
            module=f"layers.{index}",
            role="dense",
            format="static_int8",
            bytes_before=4 * WIDTH**2,
            bytes_after=WIDTH**2,
            reasons=(Reason("as_written", text="calibrated"),),
        )
        for index in range(DEPTH)
    )
)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[DeepInt8], tuple[Lowered, Path]]:
    """A function that exports a network for ONNX Runtime."""

    def export_network(network: DeepInt8) -> tuple[Lowered, Path]:
        path = tmp_path_factory.mktemp("deep") / "model.onnx"
        return lower(network, only_served_graph(SIGNATURE), "onnxruntime", path), path

    return export_network


@pytest.fixture(scope="module")
def lowered(export: Callable[[DeepInt8], tuple[Lowered, Path]]) -> tuple[Lowered, Path]:
    """The exported network and its graph."""
    return export(DeepInt8(DEPTH, WIDTH))


def create_check(lowered: Lowered, path: Path) -> GraphCheck:
    """Return the comparison of an exported network with the graph in a file."""
    session = Session(path, threads=1)
    return GraphCheck(lowered.wrapper.model, lowered, PLAN, "onnxruntime", ROWS, path, session)


@pytest.fixture(scope="module")
def rows() -> dict[str, Tensor]:
    """Random rows."""
    return {"x": torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5))}


def test_graph_that_differs_by_more_than_the_tolerance_of_int8_is_accepted(
    lowered: tuple[Lowered, Path], rows: dict[str, Tensor]
) -> None:
    # ``check_parity`` applies the usual tolerance, ``check.parity`` a larger one if rounding errors
    # explain the difference.
    check = create_check(*lowered)
    expected, actual = check.scores(rows, "the data")
    with raises_code(ParityLost, "parity_limit"):
        check_parity(expected, actual, PLAN, "onnxruntime")
    (parity,), _ = check.parity(rows, "the data")
    # ``by_rounding``: how much rounding errors change the module's scores (root mean square).
    assert parity.root_mean_square < 2 * parity.by_rounding
    # Nine of ten scores still differ only by float rounding, which is at most 1e-5 here.
    assert parity.quantile_90 < 1e-4


@pytest.mark.slow
def test_graph_with_a_wrong_input_scale_is_refused_in_a_sensitive_network_too(
    lowered: tuple[Lowered, Path],
    export: Callable[[DeepInt8], tuple[Lowered, Path]],
    rows: dict[str, Tensor],
) -> None:
    _, wrong_path = export(DeepInt8(DEPTH, WIDTH, wrong_scale=DEPTH // 2))
    with raises_code(ParityLost, "parity_limit") as caught:
        create_check(lowered[0], wrong_path).parity(rows, "the data")
    failure = caught.value.failure
    assert failure.by_rounding > 0  # the larger tolerance was used
    assert failure.measured["in nine of ten rows"] > failure.limits["in nine of ten rows"]


def test_wrong_operator_is_found_although_rounding_explains_the_difference_of_the_scores(
    lowered: tuple[Lowered, Path],
    export: Callable[[DeepInt8], tuple[Lowered, Path]],
    rows: dict[str, Tensor],
) -> None:
    # No layer follows the last one, so its error does not grow: the scores are within the larger
    # tolerance, and only the comparison of single operators finds it.
    _, wrong_path = export(DeepInt8(DEPTH, WIDTH, wrong_scale=DEPTH - 1))
    with raises_code(ParityLost, "parity_operator") as caught:
        create_check(lowered[0], wrong_path).parity(rows, "the data")
    tensor = caught.value.failure.tensor
    assert tensor is not None
    assert tensor.submodule == f"layers.{DEPTH - 1}"
