"""A published model accepts the warm-up requests in its Triton configuration."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from drafts import LONGEST
from orders import AcceptedOrder
from pbtxt_reader import parse_message
from triton_configs import warmup_requests

from tasks.promotion.promotions import promote

pytestmark = pytest.mark.usefixtures("without_champion")


def test_published_model_scores_the_warm_up_requests_of_its_triton_configuration(
    accepted_order: AcceptedOrder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_TRITON", str(tmp_path))
    version = promote("clicks", "@candidate", reason="").version
    text = (tmp_path / "clicks" / "config.pbtxt").read_text()
    path = tmp_path / "clicks" / version / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    message = parse_message(text)
    assert _names(message["input"]) == [item.name for item in session.get_inputs()]
    assert _names(message["output"]) == [item.name for item in session.get_outputs()]
    batch_sizes = []
    for rows, arrays in warmup_requests(text):
        (scores,) = session.run(None, arrays)
        assert scores.shape == (rows,)
        assert np.isfinite(scores).all()
        # The last row has a bag of the longest length, and the bags of the other rows are empty.
        assert arrays["tags"].shape == (LONGEST,)
        batch_sizes.append(rows)
    # Warm-up requests have the smallest, the preferred and the largest of the measured batch sizes
    # (1, 64 and 1024 rows). The preferred one, with most rows per second, depends on the machine.
    assert {1, 1024} <= set(batch_sizes) <= {1, 64, 1024}
    # Triton must not batch requests, because a bag may have any number of values per row.
    assert message["max_batch_size"] == [0]


def _names(items: list[dict[str, Any]]) -> list[str]:
    """Return the names of inputs or outputs in a parsed configuration."""
    return [item["name"][0] for item in items]
