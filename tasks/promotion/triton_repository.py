"""Update and inspect the champion's Triton repository. No Prefect: commands call this.

A promotion copies a version's files before the ledger refers to it, and lets the server load it
after the registry's alias has moved. At every moment in between, the server finds the complete old
champion or the complete new one. ``follow`` completes an interrupted promotion.
"""

import logging
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from compressors.contracts import Frozen
from compressors.contracts import target as declared
from compressors.contracts.targets.builder import EngineRecord
from infra.bundle.json_limits import validated
from infra.errors import Refused, SettingRefused, TritonRefused
from infra.settings import load_settings
from infra.store.object_store import Store
from infra.triton import repository as triton
from infra.triton.repository import ServedVersion, Tensor, servable_targets, triton_name
from tasks.orchestration.documents import (
    LoweredGraph,
    Measurement,
    Report,
    TargetReport,
    build_record,
)
from tasks.orchestration.workspace import store

log = logging.getLogger(__name__)

PARTS = ("", "query", "item")
"""Which graphs a model may have: the only one, or the two towers of a retrieval model."""

_LATENCY = re.compile(r"p50_ms@([0-9]+)")


@dataclass(frozen=True)
class GraphPart:
    """One graph of a target: ``name`` is one of ``PARTS``."""

    name: str
    graph: LoweredGraph


class TritonModel(Frozen):
    """One Triton model in a repository, compared with the published files.

    ``files`` has the state of every file of the served version: ``ok``, ``missing`` or ``changed``.
    """

    name: str
    uri: str
    state: Literal["champion", "behind", "absent", "stale"]
    served: str | None
    champion: str
    files: dict[str, Literal["ok", "missing", "changed"]]
    config: str | None

    @property
    def sound(self) -> bool:
        """Whether a server that starts now serves the champion from undamaged files."""
        return self.state == "champion" and set(self.files.values()) == {"ok"}


def repository(given: str | None = None) -> str | None:
    """Return the repository's root: the argument, or ``RECPRESS_TRITON``; None without both.

    Raises:
        SettingRefused: the root cannot be used.
    """
    root, setting = (given, "--to") if given else (load_settings().triton, "RECPRESS_TRITON")
    if not root:
        return None
    triton.refuse_overlap(root, store(), setting)
    return root


def needed(given: str | None) -> str:
    """Return the root as ``repository`` does, and raise if there is none.

    Raises:
        SettingRefused: there is none.
    """
    root = repository(given)
    if root is None:
        raise SettingRefused("triton_repository_missing")
    return root


def contents() -> tuple[str, int]:
    """Return the repository of these settings and its number of models."""
    return triton.contents(needed(None))


def graphs(version: str, report: Report, *, unmeasured: bool = False) -> tuple[ServedVersion, ...]:
    """List the graphs Triton can serve of a version: accepted ONNX graphs and TensorRT plans.

    Args:
        version: its number in the registry.
        report: its report.
        unmeasured: include targets that were built but never measured.

    Raises:
        TritonRefused: the report lacks a fact that the configuration of a graph needs.
    """
    outcomes = {"accepted", "built-unmeasured"} if unmeasured else {"accepted"}
    return tuple(
        _served(version, report, target, part)
        for target in report.targets
        if target.target in servable_targets() and target.verdict.outcome in outcomes
        for part in _parts(target)
    )


def stage(root: str, found: tuple[ServedVersion, ...]) -> None:
    """Copy the files of a version. No server loads them before ``follow``.

    Raises:
        TritonRefused: a folder belongs to another model.
    """
    if not found:
        log.warning("Triton has nothing to serve of this version: no accepted graph it can load")
    for served in found:
        for key in triton.stage(_home(root, served.name), store(), served):
            log.info("%s: %s is in place", served.name, key)


def follow(root: str, model: str, found: tuple[ServedVersion, ...]) -> tuple[str, ...]:
    """Copy missing files of a model's graphs, then let the server load them.

    Returns:
        The Triton models that changed.
    """
    late = [item for item in found if not triton.follows(_home(root, item.name), store(), item)]
    for served in late:  # all files before the first configuration: graphs are updated together
        triton.stage(_home(root, served.name), store(), served)
    for served in late:
        triton.point(_home(root, served.name), served)
    for name in stale_models(root, model, found):
        log.warning(
            "%s: the champion of %s has nothing to serve under this name, so the server keeps "
            "an earlier version. Remove the folder from %s if it should not.",
            name,
            model,
            root,
        )
    return tuple(served.name for served in late)


def stale_models(root: str, model: str, found: tuple[ServedVersion, ...]) -> tuple[str, ...]:
    """List Triton models of earlier versions for which the current version has no graph."""
    names = {triton_name(model, target, part) for target in servable_targets() for part in PARTS}
    names -= {served.name for served in found}
    return tuple(sorted(name for name in names if _follows(_home(root, name), model)))


def compare(
    root: str, model: str, version: str, served: tuple[ServedVersion, ...]
) -> tuple[TritonModel, ...]:
    """Compare every byte of the champion's graphs in the repository with the published files.

    Args:
        root: the repository.
        model: the registered model.
        version: the champion's version.
        served: the graphs of it that Triton can serve.
    """
    found = [_compare_one(_home(root, item.name), item) for item in served]
    for name in stale_models(root, model, served):
        home = _home(root, name)
        body = triton.current(home) or b""
        found.append(
            TritonModel(
                name=name,
                uri=home.root,
                state="stale",
                served=triton.version_in(body),
                champion=version,
                files={},
                config=body.decode(errors="replace"),
            )
        )
    return tuple(found)


def _compare_one(home: Store, wanted: ServedVersion) -> TritonModel:
    triton.owner(home)  # raises for another program's model
    body = triton.current(home)
    wrong = triton.faults(home, store(), wanted)
    state: Literal["champion", "behind", "absent"] = "behind"
    if body is None:
        state = "absent"
    elif body == triton.config(wanted):
        state = "champion"
    return TritonModel(
        name=wanted.name,
        uri=home.root,
        state=state,
        served=None if body is None else triton.version_in(body),
        champion=str(wanted.version),
        files={
            key: "missing" if wrong.get(key) == "missing" else "changed" if key in wrong else "ok"
            for key in triton.keys(store(), wanted)
        },
        config=None if body is None else body.decode(errors="replace"),
    )


def _home(root: str, name: str) -> Store:
    return triton.place(root, name)


def _follows(home: Store, model: str) -> bool:
    try:
        return triton.owner(home) == model
    except Refused:  # another program's folder with this name
        return False


def _parts(target: TargetReport) -> tuple[GraphPart, ...]:
    """List the graphs of one target; each is a separate Triton model."""
    return tuple(
        GraphPart("" if graph.name == "model" else graph.name, graph)
        for graph in target.lowering.graphs
    )


def _served(version: str, report: Report, target: TargetReport, part: GraphPart) -> ServedVersion:
    graph = part.graph.name
    held = {entry.path for entry in store().manifest(target.artifact).files}
    capability = None
    engines, stored = declared(target.target).engines, declared(target.target).served_file(graph)
    if engines is not None:
        build = store().file(target.artifact, build_record(graph))
        capability = validated(EngineRecord, build).capability
        # A GPU of another kind finds no file, instead of one it cannot load.
        named = f"{graph}-{capability}{engines.suffix}" if capability else stored
        files = {named: stored}
        batches, threads = _ordered_batches(report), None
    else:
        # Large weights are stored next to the graph and must be copied before it.
        external = sorted(path for path in held if path.startswith(f"{stored}."))
        files = {path: path for path in (*external, stored)}
        measured = report.measured.get(target.target)
        batches = _measured_batches(measured)
        threads = None if measured is None else measured.machine.threads
    width = () if part.graph.width is None else (part.graph.width,)
    try:
        return ServedVersion(
            name=triton_name(report.name, target.target, part.name),
            model=report.name,
            version=int(version),
            order=report.order,
            target=target.target,
            artifact=target.artifact,
            files=files,
            inputs=tuple(
                Tensor(name=item.name, dtype=item.dtype, shape=item.shape, longest=item.longest)
                for item in part.graph.inputs
            ),
            outputs=(Tensor(name=part.graph.output, dtype="float32", shape=width),),
            batches=batches,
            threads=threads,
            capability=capability,
        )
    except (ValidationError, ValueError) as fault:
        raise TritonRefused(
            "configuration_impossible",
            model=report.name,
            version=version,
            target=target.target,
            problem=str(fault),
        ) from fault


def _measured_batches(measured: Measurement | None) -> tuple[int, int, int]:
    """Return one row, the measured batch with the most rows per second, and the largest one.

    No limit was judged for a request larger than all measured batches.
    """
    numbers = () if measured is None else measured.numbers.numbers
    pace = {
        int(size[1]): int(size[1]) / max(number.estimate.point, 1e-9)
        for number in numbers
        if number.against == "absolute" and (size := _LATENCY.fullmatch(number.metric))
    }
    if not pace:
        return 1, 1, 1
    return 1, max(pace, key=lambda rows: pace[rows]), max(pace)


def _ordered_batches(report: Report) -> tuple[int, int, int]:
    """Return the shapes of the plan's optimization profile."""
    ordered = report.reproduction.order.get("targets", {})
    try:
        low, best, high = (
            int(ordered[f"{size}_batch"]) for size in ("smallest", "best", "largest")
        )
    except (KeyError, TypeError, ValueError) as fault:
        raise TritonRefused("batch_sizes_missing", model=report.name, order=report.order) from fault
    return low, best, high
