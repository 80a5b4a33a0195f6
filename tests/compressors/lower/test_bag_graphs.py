"""Bags in served graphs: every mode, weights for each id, padding, empty bags, both layouts.

Both targets' graphs run in ONNX Runtime here, over plain, packed and composed tables.
"""

import numpy as np
import pytest
import torch
from models import Reference, prepared
from torch import Tensor, nn

from compressors.contracts import Bench, IdInput, JaggedBag, Output, PaddedBag, Signature
from compressors.core.batches import example
from compressors.core.runner import run
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import input_names, served_graphs
from compressors.prune.tables.prune_rows import PruneRows
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import Session

LENGTH = 4


class Bags(nn.Module):
    """Each id brings a weight of its own, from a table one number wide."""

    def __init__(
        self,
        modes: tuple[str, str] = ("sum", "sum"),
        padding: bool = True,
        last: bool = False,
    ) -> None:
        super().__init__()
        skip = 0 if padding else None
        self.last = last
        self.padded = nn.EmbeddingBag(30, 6, mode=modes[0], padding_idx=skip)
        self.jagged = nn.EmbeddingBag(
            50, 6, mode=modes[1], padding_idx=skip, include_last_offset=last
        )
        self.worth = nn.Embedding(50, 1)
        self.out = nn.Linear(12, 1)

    def forward(
        self, user: Tensor, padded: Tensor, jagged: Tensor, jagged_offsets: Tensor
    ) -> Tensor:
        def weights(bag: nn.EmbeddingBag, ids: Tensor) -> Tensor | None:
            # As torch: the other modes take no weights.
            return self.worth(ids).squeeze(-1) if bag.mode == "sum" else None

        offsets = jagged_offsets
        if self.last:
            offsets = torch.cat([offsets, offsets.new_full((1,), jagged.shape[0])])
        parts = (
            self.padded(padded, per_sample_weights=weights(self.padded, padded)),
            self.jagged(jagged, offsets, per_sample_weights=weights(self.jagged, jagged)),
        )
        score: Tensor = self.out(torch.cat(parts, dim=1))
        return score + 0.1 * self.worth(user)


SCHEMA = Signature(
    inputs=(
        IdInput(name="user", table="worth"),
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
    train = prepared(SCHEMA, reference.rows_of_tables(), folder)
    return Bench(signature=SCHEMA, train=train)


def edges(reference: Reference) -> dict[str, Tensor]:
    """A batch that begins and ends with empty bags and holds one of nothing but padding."""
    inputs = example(SCHEMA, reference.rows_of_tables(), 40, seed=11)
    lengths = torch.cat([inputs["jagged_offsets"], torch.tensor([len(inputs["jagged"])])]).diff()
    lengths[0] = lengths[-1] = 0
    lengths[3], lengths[4] = LENGTH, 2
    values = torch.randint(1, 50, (int(lengths.sum()),), generator=torch.Generator().manual_seed(3))
    begin = lengths.cumsum(0) - lengths
    values[begin[4] : begin[4] + 2] = 0
    inputs["padded"][0], inputs["padded"][-1] = 0, 0
    inputs["padded"][5] = torch.tensor([7, 0, 9, 0])  # padding in the middle
    return {**inputs, "jagged": values, "jagged_offsets": begin}


SUMS = ("sum", "sum")
CASES = (
    *((SUMS, True, False, made) for made in STEPS),
    (SUMS, False, True, "int4"),
    (("mean", "max"), True, True, "int4"),
    (("max", "mean"), True, False, "int4"),
)


TARGETS = ("onnxruntime", "tensorrt-rtx")
# The default tier has every mode and a packed form of each kind, each for one target.
SAMPLE = {(place, TARGETS[place % 2]) for place in (1, 4, 5, 6)}


@pytest.mark.parametrize(
    ("modes", "padding", "last", "made", "target"),
    [
        pytest.param(
            *case,
            target,
            id="-".join([*case[0], str(case[1]), str(case[2]), case[3], target]),
            marks=() if (place, target) in SAMPLE else pytest.mark.nightly,
        )
        for place, case in enumerate(CASES)
        for target in TARGETS
    ],
)
def test_graphs_reduce_bags_as_torch_does(modes, padding, last, made, target, tmp_path):
    config = {"modes": modes, "padding": padding, "last": last}
    reference = Reference(Bags, SCHEMA, config)
    source, step = reference.model(), STEPS[made]
    model = (
        source if step is None else run(step, source, bench(reference, tmp_path), tmp_path / "o")
    )
    inputs = edges(reference)
    (form,) = served_graphs(SCHEMA)
    lower(model.module, form, target, tmp_path / "model.onnx")
    arrays = {name: inputs[name].numpy() for name in input_names(SCHEMA)}
    found = Session(tmp_path / "model.onnx", 1).scores(arrays)
    if made == "plain":  # torch's own bags; the others are compared with what they became
        assert isinstance(source.module.padded, nn.EmbeddingBag)
    with torch.no_grad():
        expected = torch.sigmoid(model.module(**inputs)).squeeze(1).numpy()
    # float32 sums of up to four rows in another order; TensorRT's form rounds weights to float16
    tolerance = 1e-6 if target == "onnxruntime" or made in {"plain", "composed"} else 2e-3
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)
    assert np.isfinite(found).all()
