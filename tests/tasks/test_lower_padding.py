"""Lowering refuses a network whose scores depend on the padding of shorter rows.

``write_sequence_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sequence_draft import NETWORK_MODULE, ROWS, write_sequence_draft
from sequence_network import SequenceNet

from compressors.errors.compression import ParityLost
from tasks.bundles.packing import pack
from tasks.lower import lower_model
from tasks.prepare import prepare


def test_network_that_reads_padding_is_refused_if_the_first_rows_are_the_longest(
    tmp_path, monkeypatch
):
    """The longest row has the same scores in every batch, since it is never padded.

    So lowering also compares the shortest row alone and in a batch with the longest one.
    """
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", NETWORK_MODULE)
    draft = write_sequence_draft(tmp_path / "draft")
    rows = pq.read_table(draft / "test.parquet")
    by_length = np.argsort(-pc.list_value_length(rows["history"]).to_numpy(), kind="stable")
    pq.write_table(rows.take(by_length), draft / "test.parquet")
    bundle = pack(draft).artifact
    test = prepare.fn(bundle, "test")
    # The number of rows of ``test``, and the largest batch that the graph must accept.
    arguments = {"probe_rows": ROWS["test"], "most_rows": 4096}
    lower_model.fn(bundle, "onnxruntime", test, **arguments)
    forward = SequenceNet.forward

    def without_mask(network, **inputs):
        mask = inputs["history_mask"].clamp(min=1)
        return forward(network, **{**inputs, "history_mask": mask})

    monkeypatch.setattr(SequenceNet, "forward", without_mask)
    with pytest.raises(ParityLost) as caught:
        lower_model.fn(bundle, "onnxruntime", test, **arguments)
    failure = caught.value.failure
    # The network, not the graph, gives a row another score in a large batch than in a small one.
    assert (failure.code, failure.side, failure.row) == ("parity_batch", "network", 0)
