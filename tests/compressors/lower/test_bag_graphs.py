"""Bags in served graphs: every mode, weights per id, padding, empty bags, padded and jagged.

The graphs of both targets run in ONNX Runtime, with float32, packed (int8 or int4) and row-pruned
tables. A row-pruned table is composed of a table of fewer rows and a map from ids to these rows.
"""

import numpy as np
import pytest
import torch
from models import Reference, write_split
from torch import Tensor, nn

from compressors.contracts import Bench, IdInput, JaggedBag, Output, PaddedBag, Signature
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import run
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import input_names, served_graphs
from compressors.prune.tables.prune_rows import PruneRows
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import Session

LENGTH = 4


class BagNet(nn.Module):
    """A padded and a jagged bag; in mode ``sum``, each id has a weight from a table of width 1.

    With ``padding``, id 0 is padding. With ``last``, the offsets include the end of the last list.
    """

    def __init__(
        self,
        modes: tuple[str, str] = ("sum", "sum"),
        padding: bool = True,
        last: bool = False,
    ) -> None:
        super().__init__()
        padding_idx = 0 if padding else None
        self.last = last
        self.padded = nn.EmbeddingBag(30, 6, mode=modes[0], padding_idx=padding_idx)
        self.jagged = nn.EmbeddingBag(
            50, 6, mode=modes[1], padding_idx=padding_idx, include_last_offset=last
        )
        self.id_weights = nn.Embedding(50, 1)
        self.out = nn.Linear(12, 1)

    def forward(
        self, user: Tensor, padded: Tensor, jagged: Tensor, jagged_offsets: Tensor
    ) -> Tensor:
        def weights(bag: nn.EmbeddingBag, ids: Tensor) -> Tensor | None:
            # torch accepts weights only in mode "sum".
            return self.id_weights(ids).squeeze(-1) if bag.mode == "sum" else None

        offsets = jagged_offsets
        if self.last:
            offsets = torch.cat([offsets, offsets.new_full((1,), jagged.shape[0])])
        parts = (
            self.padded(padded, per_sample_weights=weights(self.padded, padded)),
            self.jagged(jagged, offsets, per_sample_weights=weights(self.jagged, jagged)),
        )
        score: Tensor = self.out(torch.cat(parts, dim=1))
        return score + 0.1 * self.id_weights(user)


SIGNATURE = Signature(
    inputs=(
        IdInput(name="user", table="id_weights"),
        PaddedBag(name="padded", table="padded", shape=(LENGTH,)),
        JaggedBag(name="jagged", table="jagged", shape=(LENGTH,)),
    ),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
STEPS = {
    "plain": None,
    "int8": RowwiseInt8(tables=("padded", "jagged")),
    "int4": RowwiseInt4(tables=("padded", "jagged")),
    "composed": PruneRows(tables=("padded", "jagged")),
}


def bench(reference: Reference, folder) -> Bench:
    """Write generated training rows and return a bench with them."""
    train = write_split(SIGNATURE, reference.rows_of_tables(), folder)
    return Bench(signature=SIGNATURE, train=train)


def edge_batch(reference: Reference) -> dict[str, Tensor]:
    """Return a batch with empty first and last bags, and one bag with only padding."""
    inputs = generate_inputs(SIGNATURE, reference.rows_of_tables(), 40, seed=11)
    lengths = torch.cat([inputs["jagged_offsets"], torch.tensor([len(inputs["jagged"])])]).diff()
    lengths[0] = lengths[-1] = 0
    lengths[3], lengths[4] = LENGTH, 2
    values = torch.randint(1, 50, (int(lengths.sum()),), generator=torch.Generator().manual_seed(3))
    first_id = lengths.cumsum(0) - lengths
    values[first_id[4] : first_id[4] + 2] = 0
    inputs["padded"][0], inputs["padded"][-1] = 0, 0
    inputs["padded"][5] = torch.tensor([7, 0, 9, 0])  # padding in the middle
    return {**inputs, "jagged": values, "jagged_offsets": first_id}


SUMS = ("sum", "sum")
# Arguments of ``BagNet`` (modes, padding, last) and the kind of table.
CASES = (
    *((SUMS, True, False, tables) for tables in STEPS),
    (SUMS, False, True, "int4"),
    (("mean", "max"), True, True, "int4"),
    (("max", "mean"), True, False, "int4"),
)


TARGETS = ("onnxruntime", "tensorrt-rtx")
# Indices of the cases in the default tier, each for one target: 1 has int8 tables; 4 to 6 have int4
# tables and together every mode.
SAMPLE = {(index, TARGETS[index % 2]) for index in (1, 4, 5, 6)}


@pytest.mark.parametrize(
    ("modes", "padding", "last", "tables", "target"),
    [
        pytest.param(
            *case,
            target,
            id="-".join([*case[0], str(case[1]), str(case[2]), case[3], target]),
            marks=() if (index, target) in SAMPLE else pytest.mark.nightly,
        )
        for index, case in enumerate(CASES)
        for target in TARGETS
    ],
)
def test_bags_in_graphs_have_the_scores_of_torch(modes, padding, last, tables, target, tmp_path):
    config = {"modes": modes, "padding": padding, "last": last}
    reference = Reference(BagNet, SIGNATURE, config)
    source, step = reference.model(), STEPS[tables]
    model = (
        source if step is None else run(step, source, bench(reference, tmp_path), tmp_path / "o")
    )
    inputs = edge_batch(reference)
    (served_graph,) = served_graphs(SIGNATURE)
    lower(model.module, served_graph, target, tmp_path / "model.onnx")
    arrays = {name: inputs[name].numpy() for name in input_names(SIGNATURE)}
    scores = Session(tmp_path / "model.onnx", 1).scores(arrays)  # one thread
    if tables == "plain":  # the export must not replace the EmbeddingBag of the caller's module
        assert isinstance(source.module.padded, nn.EmbeddingBag)
    with torch.no_grad():
        expected = torch.sigmoid(model.module(**inputs)).squeeze(1).numpy()
    # Float32 sums of up to four rows have another order. Graphs for TensorRT round rows of
    # packed tables to float16.
    tolerance = 1e-6 if target == "onnxruntime" or tables in {"plain", "composed"} else 2e-3
    np.testing.assert_allclose(scores, expected, atol=tolerance, rtol=0)
    assert np.isfinite(scores).all()
