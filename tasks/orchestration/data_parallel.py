"""Run a step in this process, or data parallel in several processes, one per device.

With several devices, one child process starts one process (a rank) per device. All ranks run the
whole step and share the batches of its training (``compressors.distill.training.data_parallel``);
the result of the first rank is used. Ranks communicate over the loopback interface and connect
through a file.
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

from compressors.contracts import Artifact, Bench, Frozen, Network, Plan, Reason
from compressors.core.placement import require_device
from compressors.core.registries import AnyStep
from compressors.core.skipping import run_or_skip
from compressors.errors.compression import CompressionError, NothingToCompress
from compressors.errors.steps import StepRefused
from infra.child import run_child, serve
from infra.errors import BuildRefused
from tasks.bundles.loading import load_bundle
from tasks.orchestration.documents import NotApplicable, not_applicable

log = logging.getLogger(__name__)

SECONDS = 30 * 86_400.0
"""How long such a training may take: the flow's own time limits end it sooner."""
LOOPBACK = {"linux": "lo", "darwin": "lo0"}


class Work(Frozen):
    """One step, with its bundles and rows."""

    source: Artifact
    original: Artifact
    step: AnyStep
    bench: Bench
    excluded: dict[str, str] = Field(default_factory=dict)


class SharedWork(Frozen):
    """The work of several ranks: one device per rank, and the folders of their files."""

    work: Work
    devices: tuple[str, ...]
    folder: str


class Outcome(Frozen):
    """The result of the first rank, or why there is none."""

    network: Network | None = None
    plan: Plan | None = None
    left_out: NotApplicable | None = None
    refused: str | None = None


@dataclass(frozen=True)
class StepResult:
    """The result of a step; its tensors are in a folder."""

    network: Network
    plan: Plan | None


def run_step(work: Work, folder: Path) -> StepResult:
    """Run a step in this process.

    Raises:
        CompressionError: as ``compressors.core.skipping.run_or_skip``.
    """
    model = load_bundle(work.source).model
    if work.step.reads_original:
        model = replace(model, original=load_bundle(work.original).model.module)
    folder.mkdir(parents=True, exist_ok=True)
    excluded = {unit: Reason("not_servable", fault=why) for unit, why in work.excluded.items()}
    result = run_or_skip(work.step, model, work.bench, folder, excluded)
    return StepResult(result.network, result.plan)


def run_step_on_devices(work: Work, devices: list[str], folder: Path) -> StepResult | NotApplicable:
    """Run a step with one process per device; a step with nothing to do is also a result.

    Raises:
        CompressionError: as ``compressors.core.runner.run``; or a device does not exist.
        ChildFailed: a process ended without a response.
    """
    for device in devices:
        require_device(torch.device(device))
    place = folder.parent
    shared = SharedWork(work=work, devices=tuple(devices), folder=str(folder))
    log.info("%s on %s: every batch is shared", work.step.kind, ", ".join(devices))
    try:
        answer = run_child("tasks.orchestration.data_parallel", shared, place / "together", SECONDS)
    except BuildRefused as fault:
        raise StepRefused("device_processes_failed", problem=str(fault)) from fault
    outcome = Outcome.model_validate(answer)
    if outcome.left_out is not None:
        return outcome.left_out
    if outcome.refused is not None or outcome.network is None:
        raise (
            StepRefused("result_missing")
            if outcome.refused is None
            else StepRefused("device_processes_failed", problem=outcome.refused)
        )
    return StepResult(outcome.network, outcome.plan)


def run_ranks(request: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks, wait for all, and return the result of the first one.

    If a rank fails, the others are stopped and this process raises its reason.
    """
    from tasks.orchestration.data_parallel import (
        run_rank,  # this module runs as __main__, which ranks cannot import
    )

    shared = SharedWork.model_validate(request)
    place = Path(shared.folder).parent
    multiprocessing.spawn(  # type: ignore[attr-defined,no-untyped-call]
        run_rank, args=(shared.model_dump_json(), str(place)), nprocs=len(shared.devices)
    )
    found: dict[str, Any] = json.loads(_outcome(place).read_text())
    return found


def run_rank(rank: int, text: str, place: str) -> None:
    """Run one rank; only the first rank writes its tensors and outcome."""
    shared = SharedWork.model_validate_json(text)
    device = torch.device(shared.devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK.get(sys.platform, "lo")
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=(Path(place) / "ranks").as_uri(),
        rank=rank,
        world_size=len(shared.devices),
    )
    bench = shared.work.bench.model_copy(update={"device": str(device)})
    folder = Path(shared.folder) if rank == 0 else Path(place) / f"rank-{rank}"
    try:
        result = run_step(shared.work.model_copy(update={"bench": bench}), folder)
        outcome = Outcome(network=result.network, plan=result.plan)
    except NothingToCompress as fault:
        outcome = Outcome(left_out=not_applicable(fault))
    except CompressionError as fault:  # the same on all ranks, which compute the same numbers
        outcome = Outcome(refused=str(fault))
    if rank == 0:
        _outcome(Path(place)).write_text(outcome.model_dump_json())
    # gloo aborts a process that still waits for one that has closed its connections.
    distributed.barrier()
    distributed.destroy_process_group()


def _outcome(place: Path) -> Path:
    return place / "outcome.json"


if __name__ == "__main__":
    serve(run_ranks)
