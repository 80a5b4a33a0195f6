"""The entry point of the command line, and most commands of ``recpress --help``.

Imports are inside the commands, so that ``--help`` does not load torch or Prefect. ``Terms`` is an
order without custom steps; an order from a file is its subclass ``Order``. ``add_order_options``
replaces a command's parameter ``terms`` by the options that describe an order.

Exit codes: 0 accepted or completed, 1 failure, 2 invalid input, 3 rejected, 4 undecided or built
but not measured. A draft is the folder of a bundle before it is packed. The ledger is the list of a
model's promotions and rollbacks in the store.
"""

import functools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli import orders
from flows.cli.console import write, write_line, write_table
from flows.cli.errors import report_error, require_memory_limits
from flows.cli.new import new
from flows.cli.options import Json, RegisteredModel, Version
from flows.cli.promotion import promotion_app
from flows.cli.tables import tables_app
from flows.cli.triton import triton_app

if TYPE_CHECKING:
    from compressors.contracts.reasons import Reason
    from flows.terms import Terms

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress trained search and recommendation models under a quality budget.",
)
bundle_app = typer.Typer(no_args_is_help=True, help="Pack, check and show model bundles.")
registry_app = typer.Typer(no_args_is_help=True, help="List, fetch and promote results.")
app.command()(new)
app.add_typer(bundle_app, name="bundle")
registry_app.add_typer(promotion_app)
app.add_typer(registry_app, name="registry")
app.add_typer(tables_app, name="tables")
app.add_typer(triton_app, name="triton")

EXIT_CODES = {"accepted": 0, "rejected": 3, "undecided": 4, "built-unmeasured": 4}
"""Exit code of ``compress`` and ``demo`` by the outcome of the order."""


def main() -> None:
    """Run a command, and exit with its code; print an error as one sentence."""
    require_memory_limits(sys.argv[1:])
    try:
        # standalone_mode=False: typer would print usage errors with unescaped arguments. The object
        # is the start time, which 'registry rollback' compares with the times in the ledger.
        code = app(obj=datetime.now(UTC), standalone_mode=False)
    except (Exception, typer.Abort) as fault:
        code = report_error(fault)
    sys.exit(code if isinstance(code, int) else 0)


# --- compress --------------------------------------------------------------------------------


@app.command()
@orders.add_order_options
def compress(
    terms: "Terms",
    force: Annotated[bool, typer.Option(help="Run the order again, as a new version.")] = False,
    as_json: Json = False,
) -> None:
    """Compress a model, compare the result with its limits, and register it."""
    raise typer.Exit(_run_order(terms, force=force, as_json=as_json))


@app.command()
@orders.add_order_options
def explain(
    terms: "Terms",
    as_json: Json = False,
) -> None:
    """Predict the steps, bytes and peak memory of an order without running it."""
    from flows.cli.console import show_explanation
    from flows.explain import explain

    explanation = explain(terms)
    orders.print_limit_warnings(terms)
    if as_json:
        write(explanation.model_dump_json(indent=1))
    else:
        show_explanation(explanation)


@app.command()
def demo(
    force: Annotated[
        bool, typer.Option(help="Compress the trained model again, as a new version.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a click model on MovieLens 100K, compress it, and register the result."""
    from flows.cli.demo import demo_order

    raise typer.Exit(_run_order(demo_order(), force=force, as_json=as_json))


def _run_order(order: "Terms", *, force: bool, as_json: bool) -> int:
    """Run an order unless it ran before, print its result, and return the exit code."""
    from flows.cli import console
    from flows.resolve import (
        current_champion,
        format_already_completed,
        format_promotion_result,
        require_registry,
        reuse_completed_result,
    )

    if force:
        order = order.model_copy(update={"attempt": time.time_ns()})
    champion = current_champion(order) if order.promote else None
    finished = reuse_completed_result(order)
    orders.print_limit_warnings(order)
    if finished is None:
        with _hold_order_lock(order, quiet=as_json):
            finished = reuse_completed_result(order)
            if finished is None:
                require_registry()  # fails immediately; the flow would wait for the registry
                finished = console.run(order, quiet=as_json)
    else:
        console.print_progress(format_already_completed(finished), quiet=as_json)
    if as_json:
        write(finished.model_dump_json(indent=1))
    else:
        console.show_result(finished)
    if order.promote:
        console.print_progress(format_promotion_result(order, finished, champion), quiet=as_json)
    return EXIT_CODES[finished.report.outcome]


@contextmanager
def _hold_order_lock(order: "Terms", *, quiet: bool) -> Iterator[None]:
    """Hold the lock of an order, so that only one process with this home folder runs the order.

    Raises:
        SettingRefused: the lock file cannot be written.
    """
    from flows.cli import console
    from flows.resolve import current_order_digest
    from infra.errors import SettingRefused
    from infra.settings import load_settings
    from infra.store.lock import hold_named_lock

    digest, path = current_order_digest(order), load_settings().home / "orders.lock"
    text = f"Order {digest[:12]} is running in another process. Waiting for its result."
    with ExitStack() as stack:
        try:
            notify_waiting = functools.partial(console.print_progress, text, quiet=quiet)
            stack.enter_context(hold_named_lock(path, digest, notify_waiting))
        except OSError as fault:
            raise SettingRefused(
                "lock_not_writable", path=str(path), problem=fault.strerror
            ) from fault
        yield


def _write_file(path: Path, content: bytes) -> None:
    from infra.store.disk import translate_input_error

    try:
        path.write_bytes(content)
    except OSError as fault:
        raise translate_input_error(fault, path) from fault


# --- bundle ----------------------------------------------------------------------------------


@bundle_app.command("pack")
def bundle_pack(
    folder: Annotated[
        Path, typer.Argument(help="A draft: model.json, *.safetensors and data files.")
    ],
    as_json: Json = False,
) -> None:
    """Check a draft and store it as a bundle."""
    from tasks.bundles.packing import pack
    from tasks.orchestration.workspace import store

    packed = pack(folder)
    if as_json:
        write(packed.model_dump_json(indent=1))
        return
    write_line(f"{packed.name}@{packed.version}  {packed.artifact.bytes:,} bytes")
    for split, rows in packed.rows.items():
        write_line(f"  {split}: {rows:,} rows")
    for table, rows in packed.tables.items():
        write_line(f"  table {table}: {rows:,} rows")
    write_line(store().uri_of(packed.artifact))
    _print_notices(packed.notes, packed.warnings)


@bundle_app.command("check")
def bundle_check(
    bundle: Annotated[str, typer.Argument(help="name@version, name, artifact URI, or a folder.")],
    as_json: Json = False,
) -> None:
    """Verify the hashes, tensors and ids of a bundle, and load its model."""
    from tasks.bundles.packing import examine

    checked = examine(bundle)
    manifest, tensors = checked.manifest, checked.facts
    summary = {
        "name": manifest.name,
        "version": manifest.version,
        "tensors": len(tensors),
        "files": len(manifest.files),
        "rows": {split: data.rows for split, data in manifest.data.items()},
        "notes": manifest.notes,
        "warnings": tuple(map(str, checked.warnings)),
    }
    if as_json:
        write(json.dumps(summary, indent=1))
    else:
        write_line(
            f"{manifest.name}@{manifest.version} is valid: {len(tensors)} finite tensors in "
            f"{len(manifest.files)} file(s), every hash verified, every id in its table."
        )
        _print_notices(manifest.notes, checked.warnings)


@bundle_app.command("show")
def bundle_show(
    bundle: Annotated[str, typer.Argument(help="name@version, name, artifact URI, or a folder.")],
    as_json: Json = False,
) -> None:
    """Print the inputs, outputs, data and weight formats of a bundle."""
    from compressors.contracts import all_tables
    from tasks.bundles.packing import show
    from tasks.orchestration.workspace import store

    manifest = show(bundle)
    if as_json:
        write(manifest.model_dump_json(indent=1))
        return
    signature = manifest.signature
    outputs = "; ".join(
        f"{output.name}: {output.kind}, {output.metric}"
        if signature.has_several_outputs
        else f"{output.kind}, {output.metric}"
        for output in signature.outputs
    )
    write_line(f"{manifest.name}@{manifest.version}: {outputs}")
    write_line(f"architecture {manifest.network.architecture.path}")
    for item in signature.inputs:
        tables = ", ".join(all_tables(item))
        destination = f" -> table {tables}" if tables else ""
        # Only a column of lists has a shape: that of the longest list.
        at_most = "at most " if len(item.columns) == 1 else ""
        values = f", {at_most}{item.shape[0]} values per row" if item.shape else ""
        write_line(f"  input {item.name}: {item.kind} {item.dtype}{values}{destination}")
    for split, data in manifest.data.items():
        write_line(f"  {split}: {data.rows:,} rows, {store().uri_of(data.artifact)}")
    for name, record in manifest.network.modules.items():
        write_line(f"  weights of {name}: {record.format}")
    _print_notices(manifest.notes)


@bundle_app.command("schema")
def bundle_schema() -> None:
    """Print the JSON schema of a draft's model.json."""
    from infra.bundle.bundle_folder import Draft

    write(json.dumps(Draft.model_json_schema(), indent=1))


# --- registry --------------------------------------------------------------------------------


@registry_app.command("list")
def registry_list(
    model: Annotated[str | None, typer.Argument(help="Registered model name; else all.")] = None,
    as_json: Json = False,
) -> None:
    """List the registered versions of models, with their outcomes."""
    from tasks.promotion.registry_listing import list_versions

    versions = list_versions(model)
    if as_json:
        write(json.dumps([item.model_dump(mode="json") for item in versions], indent=1))
        return
    if not versions:
        write_line("Nothing is registered yet. Try: recpress demo")
        return
    write_table(
        ["model", "version", "aliases", "outcome", "recipe", "bundle"],
        [
            [
                item.model,
                item.version,
                " ".join(item.aliases),
                item.tags.get("recpress.outcome", ""),
                ", ".join(item.recipe),
                item.tags.get("recpress.bundle", ""),
            ]
            for item in versions
        ],
    )
    for item in versions:
        if item.note:
            write_line(f"{item.model} version {item.version} is {item.note}.")


@registry_app.command("show")
def registry_show(
    model: RegisteredModel,
    version: Version = "@candidate",
    html: Annotated[
        Path | None,
        typer.Option(help="Write the report as an HTML page, with charts, to this file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the report of one version, or write its page to a file."""
    from tasks.promotion.promotions import version_page, version_report
    from tasks.report.tables import markdown

    if html is not None:
        registered, page = version_page(model, version)
        _write_file(html, page)
        write_line(f"{model} version {registered.version}: its report is in {html}")
        return
    _, report = version_report(model, version)
    write(report.model_dump_json(indent=1) if as_json else markdown(report))


@registry_app.command("fetch")
def registry_fetch(
    model: RegisteredModel,
    into: Annotated[Path, typer.Option(help="The destination, a new or empty folder.")],
    version: Version = "@champion",
    target: Annotated[
        str | None, typer.Option(help="The target to copy; else the default target.")
    ] = None,
    unmeasured: Annotated[
        bool, typer.Option(help="Allow a target that was built but never measured.")
    ] = False,
    unaccepted: Annotated[
        bool, typer.Option(help="Allow a target that was rejected or is undecided.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy the files of one target to a folder, and verify their hashes."""
    from compressors.contracts import default_target
    from tasks.promotion.promotions import fetch

    name = default_target().name if target is None else orders.require_target(target)
    registered, fetched = fetch(
        model,
        version,
        name,
        into,
        unmeasured=unmeasured,
        unaccepted=unaccepted,
    )
    if as_json:
        write(fetched.model_dump_json(indent=1))
        return
    write_line(
        f"{model} version {registered.version}, {name}: {fetched.verdict.outcome}. "
        f"{fetched.artifact.bytes:,} bytes verified in {into}:"
    )
    for path in sorted(into.rglob("*")):
        if path.is_file():
            write_line(f"  {path.relative_to(into)}  {path.stat().st_size:,}")


# --- doctor ----------------------------------------------------------------------------------


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check each service and library that this installation uses."""
    from flows.cli.doctor import check_installation

    findings = check_installation()
    if as_json:
        write(json.dumps([item.model_dump() for item in findings], indent=1))
    else:
        write_table(
            ["what", "state", "found"],
            [[item.what, item.state, item.found] for item in findings],
        )
        for item in findings:
            if item.remedy:
                write_line(f"{item.what}: {item.remedy}")
    raise typer.Exit(1 if any(item.state == "fault" for item in findings) else 0)


def _print_notices(notes: tuple[str, ...], warnings: "tuple[Reason, ...]" = ()) -> None:
    """Print the notes and warnings of a bundle."""
    for note in notes:
        write_line(f"note: {note}")
    for warning in warnings:
        write_line(f"warning: {warning}")


if __name__ == "__main__":
    main()
