"""Create a fixture: a recpress home as the current code writes it.

    python -m tests.stored_home.create NAME [--recipe RECIPE ...]

Run it at a commit whose formats must stay readable. ``NAME`` is a new folder below ``fixtures/``.
An existing fixture is never written again: the tests would then only show that the current code
reads its own output. Add an entry to ``steps.py`` and a new fixture for each new method or format,
with ``--recipe`` for the new entries only. Without ``--recipe`` the home has all recipes, the
orders of ``orders.py`` and their promotions; this takes about ten minutes.

All content is created by the command line, and single steps by the tasks of a flow. All data is
generated from seeds. A home is the folder with everything that recpress stores (``RECPRESS_HOME``).

The models are written as drafts: a draft is the folder that becomes a bundle when it is packed.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures"
HOME = "{HOME}"
"""Placeholder for the folder of the home in stored output."""
CODE = "stored home"
"""Replaces the digest of the source code in the arguments of the task ``compress``."""
# Files and folders of the home that are not stored in the fixture.
TEMPORARY = ("cache", "progress", "orders.lock", "registry.db.lock")


def main(arguments: Sequence[str] | None = None) -> None:
    """Create the fixture that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="name of the new folder below fixtures/")
    parser.add_argument(
        "--recipe", action="append", help="a recipe of steps.py; default: all recipes and orders"
    )
    options = parser.parse_args(arguments)
    fixture = FIXTURES / options.name
    if fixture.exists():
        sys.exit(f"{fixture} exists and stays as it is. Choose another name.")
    with tempfile.TemporaryDirectory(prefix="stored-home-") as scratch:
        root = Path(scratch) / "root"
        _set_environment(root, Path(scratch) / "prefect")
        expected, tensors = _fill_home(root, options.recipe)
        _write_fixture(fixture, root, expected, tensors)


def _set_environment(root: Path, prefect: Path) -> None:
    """Set the environment variables of a command; Prefect reads them when it is imported."""
    for name in list(os.environ):
        if name.startswith(("RECPRESS_", "MLFLOW_", "PREFECT_", "AWS_")):
            del os.environ[name]
    os.environ |= {
        "RECPRESS_HOME": str(root / "recpress"),
        "RECPRESS_TRITON": str(root / "triton"),
        "RECPRESS_USER": "somebody",
        "RECPRESS_ALLOWED_MODULES": "tests.stored_home.networks",
        "PREFECT_HOME": str(prefect),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }
    # MLflow stores the working directory in an experiment that recpress does not use.
    os.chdir("/")


def _fill_home(root: Path, recipes: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill the home; return the expected results for the tests, as JSON and as tensors."""
    from tests.stored_home import settings
    from tests.stored_home.drafts import write_click_draft, write_retrieval_draft
    from tests.stored_home.scores import environment
    from tests.stored_home.steps import RECIPES

    drafts = (
        write_click_draft(root / "drafts" / "clicks"),
        write_click_draft(root / "drafts" / "ranker", name="ranker", ranking=True),
        write_retrieval_draft(root / "drafts" / "finder"),
    )
    for draft in drafts:
        _run_command("bundle", "pack", str(draft))
    expected: dict[str, Any] = {
        "recpress": metadata.version("recpress"),
        "environment": environment(),
        "steps": settings.step_documents(),
        "limits": settings.limit_documents(),
        "orders": settings.order_documents(),
    }
    if recipes is None:
        expected["finished"] = _run_orders(root)
    expected["recipes"] = {name: _apply_recipe(name) for name in recipes or RECIPES}
    expected["tables"] = _quantize_tables(root)
    if recipes is None:
        expected["registry"] = _run_registry_commands(root)
    expected["bundles"], expected["graphs"], tensors = _compute_scores(root)
    for name in TEMPORARY:
        path = root / "recpress" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return expected, tensors


def _run_command(*arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    """Run the command line in this process; return its standard output.

    Raises:
        RuntimeError: the exit code is not in ``codes``.
    """
    from flows.cli import app

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = app.app(list(arguments), obj=datetime.now(UTC), standalone_mode=False) or 0
    if code not in codes:
        raise RuntimeError(f"expected {codes} of {arguments}, got {code}: {output.getvalue()}")
    print(f"{code}: recpress {' '.join(arguments)}", file=sys.stderr)  # noqa: T201
    return output.getvalue()


def _run_orders(root: Path) -> dict[str, Any]:
    """Run every order and the commands after it; return outcome, version and hashes by order."""
    from flows.cli.app import EXIT_CODES
    from tests.stored_home.orders import COMMANDS, ORDERS, OUTCOMES

    finished = {}
    folder = root / "orders"
    folder.mkdir()
    for name, order in ORDERS.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(order, indent=1))
        code = EXIT_CODES[OUTCOMES[name]]
        output = _run_command("compress", "--order", str(file), "--json", codes=(code,))
        result = json.loads(output)
        finished[name] = {
            "model": result["report"]["name"],
            "version": result["version"],
            "outcome": result["report"]["outcome"],
            "order": result["report"]["order"],
            "release": result["release"]["sha256"],
            "compressed": result["report"]["compressed"]["sha256"],
        }
        for command in COMMANDS.get(name, ()):
            _run_command(*command)
    return finished


def _apply_recipe(name: str) -> dict[str, Any]:
    """Apply a recipe of ``steps.py`` as a flow does; return its steps, bundle and graph."""
    from tasks.bundles.bundle_ref import find_bundle
    from tasks.compress import compress
    from tasks.lower import lower_model
    from tasks.prepare import prepare
    from tasks.score import score
    from tests.stored_home.settings import STEP
    from tests.stored_home.steps import RECIPES

    model, steps = RECIPES[name]
    bundle_ref = find_bundle(model)
    original = bundle = bundle_ref.artifact
    for document in steps:
        step = STEP.validate_python(document)
        splits = {}
        # A step requires the data in ``needs``, and uses that in ``wants`` if the bundle has it.
        for part in {*step.needs, *step.wants}:
            split = {"soft_labels": "train", "calibration": bundle_ref.calibration()}.get(
                part, part
            )
            if split not in bundle_ref.rows:
                continue
            splits[part] = prepare.fn(original, split)
            # Soft labels are the scores of the original model on the training rows.
            if part == "soft_labels":
                splits[part] = score.fn(original, splits[part], bundle_ref.rows[split])
        bundle = compress.fn(
            source=bundle,
            step=step,
            splits=splits,
            original=original,
            teachers=(),
            seed=0,
            device="cpu",
            context_digest=CODE,
        )
        if not hasattr(bundle, "sha256"):
            raise RuntimeError(f"recipe {name!r}: {bundle}")
    split = bundle_ref.calibration()
    compared_rows = prepare.fn(original, split)  # rows on which graph and module are compared
    # most_rows is the largest batch that the graph must accept.
    graph = lower_model.fn(
        bundle, "onnxruntime", compared_rows, bundle_ref.rows[split], most_rows=65_536
    )
    print(f"{name}: {bundle.bytes:,} bytes", file=sys.stderr)  # noqa: T201
    return {
        "model": model,
        "steps": list(steps),
        "bundle": bundle.sha256,
        "graph": graph.sha256,
    }


def _quantize_tables(root: Path) -> dict[str, str]:
    """Write a table file in every table format; return the hashes by format."""
    from tasks.bundles.table_files import short_name, table_steps

    tables = {}
    source = root / "drafts" / "clicks" / "model.safetensors"
    for kind in table_steps():
        into = root / "tables" / kind
        arguments = ["--format", short_name(kind), "--tensor", "user.weight", "--json"]
        output = _run_command("tables", "quantize", str(source), str(into), *arguments)
        tables[kind] = json.loads(output)["sha256"]
    return tables


def _run_registry_commands(root: Path) -> dict[str, Any]:
    """Return the output of ``registry list``, ``show`` and ``fetch`` for all versions."""
    listed = json.loads(
        _run_command("registry", "list", "--json").replace(str(root / "recpress"), HOME)
    )
    shown = {}
    for item in listed:
        version = ("--version", item["version"], "--json")
        output = _run_command("registry", "show", item["model"], *version)
        shown[f"{item['model']}@{item['version']}"] = json.loads(output)
    fetched = {}
    for model in sorted({item["model"] for item in listed}):
        with tempfile.TemporaryDirectory() as folder:
            into = Path(folder) / "into"
            _run_command("registry", "fetch", model, "--into", str(into))
            fetched[model] = {
                path.relative_to(into).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(into.rglob("*"))
                if path.is_file()
            }
    return {"list": listed, "show": shown, "fetch": fetched}


def _compute_scores(root: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Compute the scores of all bundles and of all graphs for ONNX Runtime in the store.

    Returns:
        Descriptions of the bundles and of the graphs, by hash; inputs and scores as tensors by key.
    """
    from tasks.bundles.loading import load_bundle
    from tasks.orchestration.graph_documents import read_lowering
    from tasks.orchestration.workspace import store
    from tests.stored_home.drafts import scored_inputs
    from tests.stored_home.scores import (
        graph_scores,
        module_scores,
        out_of_range_inputs,
        tensors_digest,
    )

    inputs = {name: scored_inputs(name) for name in ("clicks", "ranker", "finder")}
    tensors = {
        f"input/{model}/{name}": tensor
        for model, model_inputs in inputs.items()
        for name, tensor in model_inputs.items()
    }
    bundles: dict[str, Any] = {}
    graphs: dict[str, Any] = {}
    artifacts = root / "recpress" / "store" / "artifacts"
    for folder in sorted(path / "files" for path in artifacts.iterdir()):
        sha256 = folder.parent.name
        if (folder / "model.json").is_file():
            loaded = load_bundle(store().artifact(f"artifacts/{sha256}"))
            name, module = loaded.manifest.name, loaded.model.module
            tensors[f"torch/{sha256}"] = _tensor(module_scores(module, inputs[name]))
            records = loaded.manifest.network.modules.values()
            formats = {f"{record.kind}:{record.format}" for record in records}
            bundles[sha256] = {
                "model": name,
                "tensors": tensors_digest(module),
                "formats": sorted(formats),
            }
        elif (folder / "lowering.json").is_file():
            lowering = read_lowering(folder)
            if lowering.target != "onnxruntime":
                continue
            name = lowering.name.partition("@")[0]
            graphs[sha256] = {"model": name, "graphs": [g.name for g in lowering.graphs]}
            for graph in lowering.graphs:
                names = tuple(item.name for item in graph.inputs)
                for kind, values in (
                    ("rows", inputs[name]),
                    ("edge", out_of_range_inputs(inputs[name])),
                ):
                    scores = graph_scores(folder / graph.file, names, values)
                    tensors[f"onnx/{sha256}/{graph.name}/{kind}"] = _tensor(scores)
    return bundles, graphs, tensors


def _tensor(scores: Any) -> Any:
    """Copy an array to a tensor."""
    import torch

    return torch.from_numpy(scores.copy())


def _write_fixture(
    fixture: Path, root: Path, expected: dict[str, Any], tensors: dict[str, Any]
) -> None:
    """Write the fixture to a temporary folder and rename it, so no partial fixture can remain."""
    from safetensors.torch import save_file

    from tests.stored_home.archive import pack

    home_path = str(root.parent).encode()
    for path in root.rglob("*"):
        # The record of a publication contains the registry's path, which is ignored after a move.
        is_publication = path.parent.name == "publish"
        if path.is_file() and not is_publication and home_path in path.read_bytes():
            raise RuntimeError(f"{path} contains the path of the scratch folder")
    staged = fixture.with_name(f".{fixture.name}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    size = pack(root, staged)
    (staged / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
    save_file(tensors, staged / "expected.safetensors")
    staged.rename(fixture)
    print(f"{fixture}: {size:,} bytes packed", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
