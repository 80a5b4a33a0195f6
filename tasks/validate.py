"""Validate every split of a bundle's data with Great Expectations, and check the model's scores."""

import logging
from pathlib import Path

from prefect import task

from compressors.contracts import Artifact
from compressors.metrics.baseline_problem import BaselineProblem
from infra.bundle.bundle_folder import check_weights, read, table_rows
from infra.data.checks import Rules
from infra.data.expectations import refuse_failures
from infra.data.expectations import validate as run_checks
from infra.data.validation_page import validation_page
from infra.store.temporary import scratch_folder
from tasks.bundles.baseline import check_baseline, require_sound
from tasks.bundles.loading import data_path, model_of, tokenizer_files
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import local, store

log = logging.getLogger(__name__)


@task(task_run_name="validate", **TASK_OPTIONS)
def validate(bundle: Artifact, rules: Rules) -> Artifact:
    """Check a bundle's data against its signature; store the result and its HTML page.

    Also checks the labels, and the model's scores of a sample of rows. Problems that prevent
    measurement raise; other problems are warnings in the result.

    Args:
        bundle: the bundle whose data is checked.
        rules: requirements beyond the signature, such as the minimum number of rows.

    Returns:
        The artifact of ``validation.json`` and ``validation.html``.

    Raises:
        DataRefused: a check failed, fewer checks were evaluated than planned, or the model cannot
            be measured. The page is stored before.
    """
    folder = local(bundle)
    manifest = read(folder)
    rows_of_table = table_rows(check_weights(folder, manifest), manifest)
    splits: dict[str, Path] = {split: data_path(manifest, split) for split in manifest.data}
    validation = run_checks(splits, manifest.signature, rows_of_table, rules)
    problems: tuple[BaselineProblem, ...] = ()
    if validation.success:  # splits that failed may not be readable; they are refused below
        module = model_of(folder, manifest).module
        problems = check_baseline(module, manifest.signature, splits, tokenizer_files(manifest))
        texts = tuple(str(problem.reason) for problem in problems)
        validation = validation.model_copy(update={"warnings": texts})
    with scratch_folder("validate") as scratch:
        out = Path(scratch)
        (out / "validation.json").write_text(validation.model_dump_json(indent=1))
        title = f"{manifest.name} {manifest.version}"
        (out / "validation.html").write_text(validation_page(validation, title))
        artifact = store().put(out)
    log.info(
        "%d of %d checks evaluated; %s",
        validation.evaluated,
        validation.intended,
        store().uri_of(artifact),
    )
    refuse_failures(validation)
    for warning in require_sound(problems, is_packed=True):
        log.warning("%s", warning)
    return artifact
