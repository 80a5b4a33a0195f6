"""Apply one step of a recipe to a bundle and store the result as a bundle."""

import logging
import shutil
from pathlib import Path

from prefect import task

from compressors.contracts import Artifact, Part, digest
from compressors.core.registries import AnyStep
from compressors.errors.compression import CompressionError, ModelRefused, NothingToCompress
from infra.bundle.bundle_folder import SplitName, read, seal
from infra.settings import load_settings
from infra.store.chunks import find_hard_links
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import build_bench, fetch_split
from tasks.orchestration.code_digest import code_digest
from tasks.orchestration.data_parallel import StepInputs, StepResult, run_step, run_step_on_devices
from tasks.orchestration.documents import NotApplicable, not_applicable
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import local, store

log = logging.getLogger(__name__)


@task(task_run_name="{step.kind}", **TASK_OPTIONS)
def compress(
    source: Artifact,
    step: AnyStep,
    splits: dict[Part, Artifact],
    original: Artifact,
    teachers: tuple[Artifact, ...],
    seed: int,
    device: str,
    context_digest: str,
    preset: bool = False,
    excluded: dict[str, str] | None = None,
) -> Artifact | NotApplicable:
    """Apply one step to a stored model and store the result.

    Args:
        source: the bundle to compress.
        step: the method and its settings.
        splits: the prepared data (columns as tensors) and soft labels that the step needs; never
            test data. ``traffic`` has logged requests, which have no labels.
        original: the bundle the recipe started from. It is the teacher, and a parent of the result
            (one of the bundles that it was made from).
        teachers: other models whose predictions this step or an earlier one learns from; they are
            parents of the result as well.
        seed: seed of all random numbers of the step.
        device: the device of a training step; several are separated by commas.
        context_digest: digest of the source code of the model's class and of the order's
            ``attempt``, a number that users increase to run an order again. An interrupted training
            resumes only from checkpoints with the same digest.
        preset: whether the step is part of a preset. If so, it is skipped if it cannot be applied.
        excluded: units that the step may not change, with the reasons.

    Returns:
        The artifact of the compressed bundle, or ``NotApplicable`` if the step changes nothing.

    Raises:
        ModelRefused: the model cannot be compressed by any step.
        CompressionError: the step cannot be applied and is not part of a preset.
    """
    source_folder = local(source)
    manifest = read(source_folder)
    rows = {name: reference.rows for name, reference in manifest.data.items()}
    # Without a calibration split, a bundle is calibrated on its training split.
    split_of_part: dict[Part, SplitName] = {
        "train": "train",
        "calibration": "calibration" if "calibration" in rows else "train",
        "validation": "validation",
        "soft_labels": "train",
        "traffic": "traffic",
        "traffic_soft_labels": "traffic",
        "items": "items",
    }
    parts = {
        part: fetch_split(artifact, rows[split_of_part[part]]) for part, artifact in splits.items()
    }
    devices = device.split(",")
    inputs_digest = digest(
        [
            source,
            step,
            splits,
            original,
            seed,
            context_digest,
            excluded,
            code_digest(compress.fn),
        ]
    )
    checkpoints = load_settings().home / "progress" / inputs_digest
    bench = build_bench(manifest, parts, original, seed, checkpoints, teachers, devices[0])
    work = StepInputs(
        source=source, original=original, step=step, bench=bench, excluded=excluded or {}
    )
    with scratch_folder("compress", store().scratch(load_settings().cache)) as scratch:
        folder = Path(scratch) / "result"
        result = _run_or_skip(work, devices, folder, preset=preset)
        if isinstance(result, NotApplicable):
            log.warning("%s has nothing to do in this model: %s", step.kind, result.reason)
            return result
        seal(
            folder,
            name=manifest.name,
            version=manifest.version,
            signature=manifest.signature,
            network=result.network,
            data=manifest.data,
            vocabularies=manifest.vocabularies,
            transforms=manifest.transforms,
            parents=tuple(dict.fromkeys((original, source, *teachers))),
            plan=result.plan,
            notes=manifest.notes,
            # Unchanged files are links to files of the source; their hashes are not computed again.
            linked=find_hard_links(folder, source_folder, manifest.files),
        )
        artifact = store().take_derived(folder, source, source_folder)
    shutil.rmtree(checkpoints, ignore_errors=True)  # exists only if the step trains
    log.info("%s: %d -> %d bytes", step.kind, source.bytes, artifact.bytes)
    return artifact


def _run_or_skip(
    work: StepInputs, devices: list[str], folder: Path, *, preset: bool
) -> StepResult | NotApplicable:
    """Run a step on one or several devices; errors that allow skipping the step are results."""
    try:
        if len(devices) > 1 and "train" in work.step.needs:
            return run_step_on_devices(work, devices, folder)
        return run_step(work, folder)
    except NothingToCompress as fault:
        return not_applicable(fault)
    except ModelRefused:
        raise  # a problem of the model, which no other step avoids
    except CompressionError as fault:
        if not preset:
            raise
        return not_applicable(fault)
