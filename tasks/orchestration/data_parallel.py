"""Run a step in this process, or data parallel in several processes, one per device.

With several devices, a child process starts one process (a rank) per device. All ranks run the
whole step; in training, each rank computes the gradient of a part of every batch
(``compressors.distill.training.data_parallel``). The result of the first rank is used. Ranks find
each other through a file and communicate over the loopback interface.
"""

import json
import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import distributed, multiprocessing

from compressors.contracts import SOFT_LABELS, Artifact, Bench, Frozen, Network, Plan, Reason
from compressors.core.placement import require_device
from compressors.core.registries import AnyStep
from compressors.core.skipping import run_or_skip
from compressors.errors.compression import CompressionError, ModelRefused, NothingToCompress
from compressors.errors.steps import StepRefused
from infra.child import run_child, serve
from infra.errors import BuildRefused
from tasks.bundles.loading import load_bundle
from tasks.orchestration.documents import NotApplicable, not_applicable

log = logging.getLogger(__name__)

TIME_LIMIT_SECONDS = 30 * 86_400.0
"""Time limit of the child process, so high that only the flow's time limits have an effect."""
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
"""Name of the loopback interface by platform."""


class StepInputs(Frozen):
    """A step with its inputs.

    Attributes:
        source: the bundle to compress.
        original: the bundle of the untouched model.
        step: the step.
        bench: the data of the step.
        excluded: units that the step may not change, with the reasons.
    """

    source: Artifact
    original: Artifact
    step: AnyStep
    bench: Bench
    excluded: dict[str, str] = Field(default_factory=dict)


class SharedWork(Frozen):
    """The work of several ranks: one device per rank, and the folder of the first rank's result."""

    work: StepInputs
    devices: tuple[str, ...]
    folder: str


class RankOutcome(Frozen):
    """The result of the first rank, or why there is none.

    Attributes:
        network: records of the compressed model; its tensors are in ``SharedWork.folder``.
        plan: plan of the compressed model.
        left_out: the result of a step that changes nothing.
        refused: the message of the step's error.
        is_model_refused: whether the error is a ``ModelRefused``, which no other step avoids.
    """

    network: Network | None = None
    plan: Plan | None = None
    left_out: NotApplicable | None = None
    refused: str | None = None
    is_model_refused: bool = False


@dataclass(frozen=True)
class StepResult:
    """Records and plan of a compressed model, whose tensors are in the folder of the result."""

    network: Network
    plan: Plan | None


def run_step(work: StepInputs, folder: Path) -> StepResult:
    """Run a step in this process and write the result's tensors to a folder.

    Raises:
        CompressionError: the step cannot be applied (``compressors.core.skipping.run_or_skip``).
    """
    model = load_bundle(work.source).model
    # The soft labels of a retrieval model are vectors, which the step computes with the original.
    learns_from_vectors = not work.bench.signature.scores_rows and any(
        part in SOFT_LABELS for part in work.step.needs
    )
    if work.step.reads_original or learns_from_vectors:
        model = replace(model, original=load_bundle(work.original).model.module)
    folder.mkdir(parents=True, exist_ok=True)
    # The flow excludes units whose compressed form a target cannot serve.
    excluded = {unit: Reason("not_servable", fault=text) for unit, text in work.excluded.items()}
    result = run_or_skip(work.step, model, work.bench, folder, excluded)
    return StepResult(result.network, result.plan)


def run_step_on_devices(
    work: StepInputs, devices: list[str], folder: Path
) -> StepResult | NotApplicable:
    """Run a step with one process per device and write the result's tensors to a folder.

    Returns:
        The result, or ``NotApplicable`` if the step changes nothing.

    Raises:
        StepRefused: the step raised a ``CompressionError`` (the field ``problem`` is its sentence),
            there is no result, or a device does not exist.
        ModelRefused: the step raised it; the field ``problem`` is its sentence.
        ChildFailed: the child process crashed or was killed.
    """
    for device in devices:
        require_device(torch.device(device))
    parent = folder.parent  # also contains files of the child process and of its ranks
    shared = SharedWork(work=work, devices=tuple(devices), folder=str(folder))
    log.info("%s: training data parallel on %s", work.step.kind, ", ".join(devices))
    try:
        response = run_child(
            "tasks.orchestration.data_parallel", shared, parent / "child", TIME_LIMIT_SECONDS
        )
    except BuildRefused as fault:  # what run_child raises if the child raised a Refused
        raise StepRefused("device_processes_failed", problem=str(fault)) from fault
    outcome = RankOutcome.model_validate(response)
    if outcome.left_out is not None:
        return outcome.left_out
    if outcome.refused is not None:
        if outcome.is_model_refused:
            raise ModelRefused("device_processes_failed", problem=outcome.refused)
        raise StepRefused("device_processes_failed", problem=outcome.refused)
    if outcome.network is None:
        raise StepRefused("result_missing")
    return StepResult(outcome.network, outcome.plan)


def run_ranks(request: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks, wait for all, and return the outcome of the first one.

    This function runs in the child process. If a rank fails, the others are stopped and the error
    of the failed rank is raised.

    Args:
        request: ``SharedWork`` as JSON.
    """
    from tasks.orchestration.data_parallel import (
        run_rank,  # this module runs as __main__, which ranks cannot import
    )

    shared = SharedWork.model_validate(request)
    parent = Path(shared.folder).parent
    multiprocessing.spawn(  # type: ignore[attr-defined,no-untyped-call]
        run_rank, args=(shared.model_dump_json(), str(parent)), nprocs=len(shared.devices)
    )
    outcome: dict[str, Any] = json.loads(_get_outcome_path(parent).read_text())
    return outcome


def run_rank(rank: int, request: str, parent: str) -> None:
    """Run one rank; only the outcome of the first rank is written.

    Args:
        rank: number of the rank.
        request: ``SharedWork`` as JSON.
        parent: folder of the outcome and of the other ranks' tensors, which are not used.
    """
    shared = SharedWork.model_validate_json(request)
    device = torch.device(shared.devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK.get(sys.platform, "lo")
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=(Path(parent) / "ranks").as_uri(),
        rank=rank,
        world_size=len(shared.devices),
    )
    bench = shared.work.bench.model_copy(update={"device": str(device)})
    folder = Path(shared.folder) if rank == 0 else Path(parent) / f"rank-{rank}"
    try:
        result = run_step(shared.work.model_copy(update={"bench": bench}), folder)
        outcome = RankOutcome(network=result.network, plan=result.plan)
    except NothingToCompress as fault:
        outcome = RankOutcome(left_out=not_applicable(fault))
    except CompressionError as fault:  # every rank raises it, since all compute the same numbers
        outcome = RankOutcome(refused=str(fault), is_model_refused=isinstance(fault, ModelRefused))
    if rank == 0:
        _get_outcome_path(Path(parent)).write_text(outcome.model_dump_json())
    # gloo aborts a process that waits for another one whose connections are closed.
    distributed.barrier()
    distributed.destroy_process_group()


def _get_outcome_path(parent: Path) -> Path:
    return parent / "outcome.json"


if __name__ == "__main__":
    serve(run_ranks)
