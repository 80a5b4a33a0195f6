"""Data-parallel training in several processes: results, errors, and the parts of each batch.

Each process is a rank, which trains on its share of the rows of a batch. Its gradients are weighted
by the share and summed over the ranks. Here two ranks train on the CPU.

``write_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from drafts import ROWS, write_draft
from error_codes import raises_code
from safetensors.torch import load_file
from torch import Tensor

from compressors.distill.fine_tune import FineTune
from compressors.distill.training import data_parallel
from compressors.distill.training.settings import Training
from compressors.errors.compression import ModelRefused
from compressors.errors.steps import StepRefused
from compressors.prune.dense.l1_training import L1Training
from infra.bundle.bundle_folder import read
from tasks.bundles.loading import build_bench, fetch_split
from tasks.bundles.packing import pack
from tasks.orchestration import data_parallel as rank_processes
from tasks.orchestration.data_parallel import (
    RankOutcome,
    SharedWork,
    StepInputs,
    StepResult,
    run_rank,
    run_step,
    run_step_on_devices,
)
from tasks.orchestration.workspace import local
from tasks.prepare import prepare

TWO_DEVICES = ["cpu", "cpu"]
TRAINING = Training(epochs=2, batch=256, learning_rate=1e-3, warmup=0, tables=True, table_l2=1e-4)


@pytest.fixture
def work(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> StepInputs:
    """A training step with a packed bundle and the prepared splits that it needs."""
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "draft_network")
    bundle = pack(write_draft(work_folder / "draft")).artifact
    manifest = read(local(bundle))
    # This step always keeps its last epoch, so both trainings end at the same one. The penalty is
    # negligible.
    step = L1Training(training=TRAINING, soft_share=0, penalty_strength=1e-9)
    splits: dict[Any, Any] = {
        part: fetch_split(prepare.fn(bundle, part), ROWS[part]) for part in step.needs
    }
    bench = build_bench(manifest, splits, bundle, seed=3)
    return StepInputs(source=bundle, original=bundle, step=step, bench=bench)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Load the tensors of all safetensors files in a folder."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.slow
def test_training_on_two_processes_gives_the_weights_of_training_on_one(
    work: StepInputs, tmp_path: Path
) -> None:
    before = tensors_in(local(work.source))
    one_folder, two_folder = tmp_path / "one" / "result", tmp_path / "two" / "result"
    result_of_one = run_step(work, one_folder)
    result_of_two = run_step_on_devices(work, TWO_DEVICES, two_folder)
    assert isinstance(result_of_two, StepResult)
    assert result_of_two.network == result_of_one.network
    one, two = tensors_in(one_folder), tensors_in(two_folder)
    assert one.keys() == two.keys()
    # Gradients are summed in another order, so they differ in their last bits. Where a gradient is
    # nearly zero, Adam, which divides by its size, turns that into a difference of up to the
    # learning rate, 1e-3. So the bounds are relative to how much training changed the weights.
    largest_change = max(float((one[name] - before[name]).abs().max()) for name in one)
    assert largest_change > 5e-3
    for name, tensor in one.items():
        gap = (tensor - two[name]).abs()
        assert float(gap.mean()) < 1e-5, name
        assert float(gap.max()) < largest_change / 5, name


DIVERGING = FineTune(training=TRAINING.model_copy(update={"learning_rate": 1e30, "warmup": 0}))


@pytest.mark.nightly
def test_divergence_in_two_processes_is_raised_with_its_message(
    work: StepInputs, tmp_path: Path
) -> None:
    with raises_code(StepRefused, "device_processes_failed") as caught:
        run_step_on_devices(
            work.model_copy(update={"step": DIVERGING}), TWO_DEVICES, tmp_path / "result"
        )
    assert "Training diverged: the loss is" in caught.value.fields["problem"]


def test_divergence_is_written_to_the_outcome_of_the_rank(work: StepInputs, tmp_path: Path) -> None:
    diverging = work.model_copy(update={"step": DIVERGING})
    shared = SharedWork(work=diverging, devices=("cpu",), folder=str(tmp_path / "result"))
    run_rank(0, shared.model_dump_json(), str(tmp_path))
    outcome = RankOutcome.model_validate_json((tmp_path / "outcome.json").read_text())
    assert outcome.network is None
    assert outcome.refused is not None
    assert "Training diverged: the loss is" in outcome.refused


def test_refused_model_is_reported_as_such_by_a_rank_and_to_the_caller(
    work: StepInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: StepInputs, __: Path) -> StepResult:
        raise ModelRefused("score_not_finite", architecture="net", rows=3)

    monkeypatch.setattr(rank_processes, "run_step", refuse)
    shared = SharedWork(work=work, devices=("cpu",), folder=str(tmp_path / "result"))
    run_rank(0, shared.model_dump_json(), str(tmp_path))
    response = json.loads((tmp_path / "outcome.json").read_text())
    monkeypatch.setattr(rank_processes, "run_child", lambda *_: response)
    with raises_code(ModelRefused, "device_processes_failed") as caught:
        run_step_on_devices(work, TWO_DEVICES, tmp_path / "other")
    assert caught.value.fields["problem"].startswith("net must return one finite score")


def test_missing_device_is_refused_before_a_process_starts(
    work: StepInputs, tmp_path: Path
) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("this machine has two GPUs")
    with raises_code(StepRefused, "device_missing", device="cuda:1"):
        run_step_on_devices(work, ["cpu", "cuda:1"], tmp_path / "result")
    assert not (tmp_path / "child").exists()


def test_rank_share_is_the_whole_batch_without_a_process_group() -> None:
    numbers, loss = torch.arange(5), torch.tensor(2.0)
    share, weight = data_parallel.rank_share(numbers, None)
    assert share is numbers
    assert weight == 1.0
    assert data_parallel.sum_gradients([], weight, loss) is loss


@pytest.mark.parametrize(
    ("rows", "group", "shares"),
    [
        (7, None, ([0, 2, 4, 6], [1, 3, 5])),
        (3, None, ([0, 1, 2], [])),  # too few rows for two ranks
        (6, [4, 4, 9, 9, 9, 4], ([0, 1, 5], [2, 3, 4])),  # a group is never split
        (4, [1, 1, 1, 1], ([0, 1, 2, 3], [])),  # a single group
    ],
)
def test_rank_shares_partition_the_rows_and_their_weights_add_up_to_one(
    rows: int,
    group: list[int] | None,
    shares: tuple[list[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_parallel, "_has_several_ranks", lambda: True)
    monkeypatch.setattr(data_parallel.distributed, "get_world_size", lambda: 2)
    groups = None if group is None else torch.tensor(group)
    total_weight = 0.0
    for rank, expected in enumerate(shares):
        monkeypatch.setattr(data_parallel.distributed, "get_rank", lambda rank=rank: rank)
        share, weight = data_parallel.rank_share(torch.arange(rows), groups)
        assert share.tolist() == expected
        total_weight += weight
    assert total_weight == pytest.approx(1)
