"""Lowering of graphs with bfloat16 products, which ONNX Runtime does not run on a CPU.

``write_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

from pathlib import Path

import numpy as np
import pytest
from drafts import ALLOWED, ROWS, write_draft

from compressors.contracts import Artifact
from compressors.quantize.dense.bfloat16_dense import BFloat16Dense
from tasks.bundles.packing import pack
from tasks.compress import compress
from tasks.lower import lower_model
from tasks.orchestration.graph_documents import read_lowering
from tasks.orchestration.workspace import local
from tasks.prepare import prepare


def test_graph_with_bfloat16_products_is_compared_and_its_copy_without_them_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    bundle = pack(write_draft(tmp_path / "draft")).artifact
    test = prepare.fn(bundle, "test")
    compressed = compress.fn(
        bundle,
        BFloat16Dense(),
        splits={},
        original=bundle,
        teachers=(),
        seed=0,
        device="cpu",
        context_digest="c",  # only a part of a cache key; here any text
    )
    assert isinstance(compressed, Artifact)
    graph = lower_model.fn(
        compressed,
        "tensorrt-rtx",
        test,
        probe_rows=ROWS["test"],  # number of rows of ``test``, of which the first are compared
        most_rows=65_536,  # the largest batch that the graph must accept
    )
    names = {path.name for path in local(graph).rglob("*") if path.is_file()}
    assert "model.onnx" in names
    # The graph is compared through a copy that computes these products in float32, on operands
    # that are rounded to bfloat16. The copy's name begins with "checkable".
    assert not {name for name in names if "checkable" in name}
    (lowered,) = read_lowering(local(graph)).graphs
    # Relative to the standard deviation of the scores (``spread``), the differences are those of
    # rounding to the 8 significant bits of bfloat16: larger than those of float32 sums, and below
    # 2^-6.
    assert 1e-5 < lowered.rows_parity.root_mean_square / lowered.rows_parity.spread < 0.015
    assert np.isfinite(lowered.edge_parity.largest)  # on edge cases, such as ids out of range
