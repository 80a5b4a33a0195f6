"""A step carried out in this process, or by several that share its training, one on each device.

Several devices mean one child process with one process (a rank) below it for each of them, that
all do the whole step and share the batches of its training
(``compressors.distill.training.data_parallel``); the first one's result is the result. They
communicate over the loopback interface and find each other by a file.
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
from compressors.distill.distill import Distill
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
    """One step, and the bundles and rows it is for."""

    source: Artifact
    original: Artifact
    step: AnyStep
    bench: Bench
    excluded: dict[str, str] = Field(default_factory=dict)


class SharedWork(Frozen):
    """The same for several ranks: a device for each, and where files lie."""

    work: Work
    devices: tuple[str, ...]
    folder: str


class Outcome(Frozen):
    """What the first rank made, or why there is nothing."""

    network: Network | None = None
    plan: Plan | None = None
    left_out: NotApplicable | None = None
    refused: str | None = None


@dataclass(frozen=True)
class StepResult:
    """A result, whose tensors lie in a folder."""

    network: Network
    plan: Plan | None


def run_step(work: Work, folder: Path) -> StepResult:
    """Carry a step out in this process.

    Raises:
        CompressionError: as ``compressors.core.skipping.run_or_skip``.
    """
    model = load_bundle(work.source).model
    if isinstance(work.step, Distill) and work.step.hints:
        model = replace(model, original=load_bundle(work.original).model.module)
    folder.mkdir(parents=True, exist_ok=True)
    excluded = {unit: Reason("not_servable", fault=why) for unit, why in work.excluded.items()}
    result = run_or_skip(work.step, model, work.bench, folder, excluded)
    return StepResult(result.network, result.plan)


def run_step_on_devices(work: Work, devices: list[str], folder: Path) -> StepResult | NotApplicable:
    """Carry it out by one process on each device; a step that fits nothing is a result too.

    Raises:
        CompressionError: as ``compressors.core.runner.run``; or a device is not there.
        ChildFailed: a process ended without an answer.
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


def run_ranks(asked: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks, wait for all, and give back what the first one made.

    Where one of them fails, the others are ended and this one fails with its reason.
    """
    from tasks.orchestration.data_parallel import (
        run_rank,  # this module runs as __main__, which ranks cannot import
    )

    shared = SharedWork.model_validate(asked)
    place = Path(shared.folder).parent
    multiprocessing.spawn(  # type: ignore[attr-defined,no-untyped-call]
        run_rank, args=(shared.model_dump_json(), str(place)), nprocs=len(shared.devices)
    )
    found: dict[str, Any] = json.loads(_outcome(place).read_text())
    return found


def run_rank(rank: int, text: str, place: str) -> None:
    """What each process does; the first one's tensors and outcome are kept."""
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
    except CompressionError as fault:  # the same on all ranks, which see the same numbers
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
