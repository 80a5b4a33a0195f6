"""Copy the champion to a Triton model repository, and inspect the repository. No Prefect.

Each graph of a champion is a Triton model: a folder with one subfolder per version and a
configuration, which names the version that the server loads. A promotion calls ``copy_files``
before it changes the ledger, and ``update``, which writes the configuration, at its end
(``promotions.py``). So the server always finds a complete champion, and ``update`` completes a
promotion that was interrupted. The ledger is the list of a model's promotions and rollbacks in the
store.
"""

import logging
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from compressors.contracts import Frozen
from compressors.contracts import target as declared_target
from compressors.contracts.targets.builder import EngineRecord
from infra.bundle.json_limits import validate_json
from infra.errors import Refused, SettingRefused, TritonRefused
from infra.settings import load_settings
from infra.store.object_store import Store
from infra.triton import repository as triton
from infra.triton.repository import ServedVersion, Tensor, servable_targets, triton_name
from tasks.orchestration.documents import Measurement, Report, TargetReport
from tasks.orchestration.graph_documents import LoweredGraph, build_record
from tasks.orchestration.workspace import store

log = logging.getLogger(__name__)

PARTS = ("", "query", "item", "encoder")
"""Graphs that a model may have: the only graph (""), or the two towers of a retrieval model.

``encoder`` is the graph of both towers if they are one module.
"""

_LATENCY = re.compile(r"p50_ms@([0-9]+)")
"""Name of the metric median latency; the group is the batch size."""


@dataclass(frozen=True)
class GraphPart:
    """One graph of a target: ``name`` is one of ``PARTS``."""

    name: str
    graph: LoweredGraph


class TritonModel(Frozen):
    """The state of a Triton model in a repository, compared with the champion.

    Attributes:
        name: name of the Triton model.
        uri: URI of its folder.
        state: "champion" if the server loads the champion; "behind" if the configuration differs
            from the champion's, so that the server loads another version, or the champion with
            older settings; "absent" if there is no configuration; "stale" if the champion has no
            graph for this Triton model, which an earlier version had.
        served: the version that the server loads; None if there is no configuration.
        champion: the version of the champion.
        files: state of each of the champion's files: "ok", "missing" or "changed".
        config: the configuration.
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
        """Whether a server that starts now serves the champion, and its files are undamaged."""
        return self.state == "champion" and set(self.files.values()) == {"ok"}


def repository_root(option: str | None = None) -> str | None:
    """Return the root of the Triton repository; None if there is no repository.

    Args:
        option: value of the option ``--to``; without it the setting ``RECPRESS_TRITON`` is used.

    Raises:
        SettingRefused: the root cannot be used.
    """
    root, setting = (option, "--to") if option else (load_settings().triton, "RECPRESS_TRITON")
    if not root:
        return None
    triton.refuse_overlap(root, store(), setting)  # raises if the repository contains the store
    return root


def require_repository(option: str | None) -> str:
    """Return the root of the Triton repository; raise if there is no repository.

    Args:
        option: value of the option ``--to``; without it the setting ``RECPRESS_TRITON`` is used.

    Raises:
        SettingRefused: there is no repository, or it cannot be used.
    """
    root = repository_root(option)
    if root is None:
        raise SettingRefused("triton_repository_missing")
    return root


def count_models() -> tuple[str, int]:
    """Return the root of the repository in the settings, and its number of models."""
    return triton.count_models(require_repository(None))


def servable_graphs(
    version: str, report: Report, *, unmeasured: bool = False
) -> tuple[ServedVersion, ...]:
    """List the accepted graphs of a version that Triton can serve: ONNX graphs, TensorRT engines.

    Args:
        version: number of the version in the registry.
        report: the report of the version.
        unmeasured: include targets that were built but never measured.

    Raises:
        TritonRefused: the report lacks a value that the configuration of a graph needs.
    """
    outcomes = {"accepted", "built-unmeasured"} if unmeasured else {"accepted"}
    return tuple(
        _build_graph_to_serve(version, report, target, part)
        for target in report.targets
        if target.target in servable_targets() and target.verdict.outcome in outcomes
        for part in _list_graph_parts(target)
    )


def copy_files(root: str, graphs: tuple[ServedVersion, ...]) -> None:
    """Copy the files of a version to a repository. No server loads them before ``update``.

    Raises:
        TritonRefused: a folder belongs to another model.
    """
    if not graphs:
        log.warning("Triton cannot serve this version: it has no accepted graph that Triton loads")
    for graph in graphs:
        # ``triton.copy_version`` copies the files that are missing, and returns their keys.
        for key in triton.copy_version(_get_model_folder(root, graph.name), store(), graph):
            log.info("%s: copied %s", graph.name, key)


def update(root: str, model: str, graphs: tuple[ServedVersion, ...]) -> tuple[str, ...]:
    """Copy missing files of a model's graphs, then write the configurations that load them.

    Args:
        root: root of the repository.
        model: registered name.
        graphs: the graphs of the champion.

    Returns:
        The names of the Triton models that changed.
    """
    outdated = [
        graph
        for graph in graphs
        if not triton.is_current(_get_model_folder(root, graph.name), store(), graph)
    ]
    for graph in outdated:  # all files before the first configuration
        triton.copy_version(_get_model_folder(root, graph.name), store(), graph)
    for graph in outdated:
        triton.write_config(_get_model_folder(root, graph.name), graph)
    for name in stale_models(root, model, graphs):
        log.warning(
            "%s: the champion of %s has no graph of this name, so the server keeps an earlier "
            "version. Remove the folder from %s if it should not.",
            name,
            model,
            root,
        )
    return tuple(graph.name for graph in outdated)


def stale_models(root: str, model: str, graphs: tuple[ServedVersion, ...]) -> tuple[str, ...]:
    """List the Triton models of a registered model for which the champion has no graph.

    Args:
        root: root of the repository.
        model: registered name.
        graphs: the graphs of the champion.
    """
    names = {triton_name(model, target, part) for target in servable_targets() for part in PARTS}
    names -= {graph.name for graph in graphs}
    return tuple(
        sorted(name for name in names if _is_model_of(_get_model_folder(root, name), model))
    )


def compare_models(
    root: str, model: str, version: str, graphs: tuple[ServedVersion, ...]
) -> tuple[TritonModel, ...]:
    """Compare every byte of the champion's graphs in a repository with the stored files.

    Args:
        root: root of the repository.
        model: registered name.
        version: number of the champion's version.
        graphs: the champion's graphs that Triton can serve.
    """
    models = [_compare_one(_get_model_folder(root, graph.name), graph) for graph in graphs]
    for name in stale_models(root, model, graphs):
        folder = _get_model_folder(root, name)
        body = triton.read_config(folder) or b""
        models.append(
            TritonModel(
                name=name,
                uri=folder.root,
                state="stale",
                served=triton.version_in(body),
                champion=version,
                files={},
                config=body.decode(errors="replace"),
            )
        )
    return tuple(models)


def _compare_one(folder: Store, graph: ServedVersion) -> TritonModel:
    """Compare the folder of one Triton model with a graph of the champion."""
    triton.owning_model(folder)  # raises if the folder belongs to another program
    body = triton.read_config(folder)
    problems = triton.find_wrong_files(folder, store(), graph)
    state: Literal["champion", "behind", "absent"] = "behind"
    if body is None:
        state = "absent"
    elif body == triton.config(graph):
        state = "champion"
    files: dict[str, Literal["ok", "missing", "changed"]] = {}
    for key in triton.version_keys(store(), graph):
        problem = problems.get(key)
        files[key] = "ok" if problem is None else "missing" if problem == "missing" else "changed"
    return TritonModel(
        name=graph.name,
        uri=folder.root,
        state=state,
        served=None if body is None else triton.version_in(body),
        champion=str(graph.version),
        files=files,
        config=None if body is None else body.decode(errors="replace"),
    )


def _get_model_folder(root: str, name: str) -> Store:
    return triton.model_store(root, name)


def _is_model_of(folder: Store, model: str) -> bool:
    try:
        return triton.owning_model(folder) == model
    except Refused:  # the folder belongs to another program
        return False


def _list_graph_parts(target: TargetReport) -> tuple[GraphPart, ...]:
    """List the graphs of one target; each is a separate Triton model."""
    return tuple(
        GraphPart("" if graph.name == "model" else graph.name, graph)
        for graph in target.lowering.graphs
    )


def _build_graph_to_serve(
    version: str, report: Report, target: TargetReport, part: GraphPart
) -> ServedVersion:
    """Return a graph with what its Triton configuration needs.

    Raises:
        TritonRefused: the report lacks such a value, or has an invalid one.
    """
    graph = part.graph.name
    capability = None
    engines, stored = (
        declared_target(target.target).engines,
        declared_target(target.target).name_served_file(graph),
    )
    if engines is not None:
        build = store().file(target.artifact, build_record(graph))
        capability = validate_json(EngineRecord, build).capability
        # With the GPU's compute capability in its name, other GPUs do not load the engine.
        file_name = f"{graph}-{capability}{engines.suffix}" if capability else stored
        files = {file_name: stored}  # name in the Triton repository -> name in the artifact
        batches, threads = _find_ordered_batches(report), None
    else:
        # Large weights are stored next to the graph and must be copied before it.
        paths = {entry.path for entry in store().manifest(target.artifact).files}
        weights = sorted(path for path in paths if path.startswith(f"{stored}."))
        files = {path: path for path in (*weights, stored)}
        measurement = report.measured.get(target.target)
        batches = _find_measured_batches(measurement)
        threads = None if measurement is None else measurement.machine.threads
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
                Tensor(
                    name=item.name,
                    dtype=item.dtype,
                    shape=item.shape,
                    longest=item.longest,
                    is_dynamic=item.shortest is not None,
                )
                for item in part.graph.inputs
            ),
            outputs=tuple(
                Tensor(name=name, dtype="float32", shape=width) for name in part.graph.outputs
            ),
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


def _find_measured_batches(measurement: Measurement | None) -> tuple[int, int, int]:
    """Return smallest, best and largest batch size of an ONNX graph.

    The best has the most rows per second. The largest is the largest measured batch, since no limit
    was judged for larger ones. All are 1 without measurements.
    """
    numbers = () if measurement is None else measurement.numbers.numbers
    rows_per_ms = {
        int(size[1]): int(size[1]) / max(number.estimate.point, 1e-9)
        for number in numbers
        if number.against == "absolute" and (size := _LATENCY.fullmatch(number.metric))
    }
    if not rows_per_ms:
        return 1, 1, 1
    return 1, max(rows_per_ms, key=lambda rows: rows_per_ms[rows]), max(rows_per_ms)


def _find_ordered_batches(report: Report) -> tuple[int, int, int]:
    """Return smallest, best and largest batch size of an engine, as in the order."""
    ordered = report.reproduction.order.get("targets", {})
    try:
        low, best, high = (
            int(ordered[f"{size}_batch"]) for size in ("smallest", "best", "largest")
        )
    except (KeyError, TypeError, ValueError) as fault:
        raise TritonRefused("batch_sizes_missing", model=report.name, order=report.order) from fault
    return low, best, high
