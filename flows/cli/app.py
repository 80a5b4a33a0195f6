"""The command line: ``recpress --help``.

Imports are inside the commands, so that help is printed immediately. Exit codes: 0 accepted or
done, 1 failure, 2 bad input, 3 rejected, 4 undecided or nothing measured.
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
from flows.cli.errors import report, require_limits
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
    help="Compress trained search and recommendation models under an accuracy budget.",
)
bundle_app = typer.Typer(no_args_is_help=True, help="Pack, check and show model bundles.")
registry_app = typer.Typer(no_args_is_help=True, help="List, fetch and promote results.")
app.add_typer(bundle_app, name="bundle")
registry_app.add_typer(promotion_app)
app.add_typer(registry_app, name="registry")
app.add_typer(tables_app, name="tables")
app.add_typer(triton_app, name="triton")

EXIT = {"accepted": 0, "rejected": 3, "undecided": 4, "built-unmeasured": 4}


def main() -> None:
    """Run the command line; every known fault becomes one sentence and an exit code."""
    require_limits(sys.argv[1:])
    try:
        # Usage errors are also reported here: typer would print the arguments unescaped.
        code = app(obj=datetime.now(UTC), standalone_mode=False)
    except (Exception, typer.Abort) as fault:
        code = report(fault)
    sys.exit(code if isinstance(code, int) else 0)


# --- compress --------------------------------------------------------------------------------


@app.command()
@orders.with_order_options
def compress(
    terms: "Terms",
    force: Annotated[bool, typer.Option(help="Run the order again, as a new version.")] = False,
    as_json: Json = False,
) -> None:
    """Compress a model, judge what will be served, and register the result."""
    raise typer.Exit(_carry_out(terms, force=force, as_json=as_json))


@app.command()
@orders.with_order_options
def explain(
    terms: "Terms",
    as_json: Json = False,
) -> None:
    """Say what an order would run, its bytes and its peak memory, without running it."""
    from flows.cli.console import explained
    from flows.explain import explain

    found = explain(terms)
    orders.warn(terms)
    if as_json:
        write(found.model_dump_json(indent=1))
    else:
        explained(found)


@app.command()
def demo(
    force: Annotated[
        bool, typer.Option(help="Compress again, as a new version; the trained model is kept.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a click model on MovieLens 100K, compress it, judge it, register it."""
    from flows.cli.demo import demo_order

    raise typer.Exit(_carry_out(demo_order(), force=force, as_json=as_json))


def _carry_out(order: "Terms", *, force: bool, as_json: bool) -> int:
    """Find the finished report of this order, or run the flow; print it; return the exit code."""
    from flows.cli import console
    from flows.resolve import carried_out_before, champion_now, earlier, promotion, require_registry

    if force:
        order = order.model_copy(update={"attempt": time.time_ns()})
    champion = champion_now(order) if order.promote else None
    found = earlier(order)
    orders.warn(order)
    if found is None:
        with _only_process_of(order, quiet=as_json):
            found = earlier(order)
            if found is None:
                require_registry()  # fails at once: the flow would wait for it
                found = console.run(order, quiet=as_json)
    else:
        console.print_progress(carried_out_before(found), quiet=as_json)
    if as_json:
        write(found.model_dump_json(indent=1))
    else:
        console.show(found)
    if order.promote:
        console.print_progress(promotion(order, found, champion), quiet=as_json)
    return EXIT[found.report.outcome]


@contextmanager
def _only_process_of(order: "Terms", *, quiet: bool) -> Iterator[None]:
    """Hold the lock of an order in this home; other processes wait, then use its result."""
    from flows.cli import console
    from flows.resolve import digest_now
    from infra.errors import SettingRefused
    from infra.settings import load_settings
    from infra.store.lock import locked_name

    digest, path = digest_now(order), load_settings().home / "orders.lock"
    text = f"Order {digest[:12]} is being carried out by another process. Waiting for its result."
    with ExitStack() as held:
        try:
            waiting = functools.partial(console.print_progress, text, quiet=quiet)
            held.enter_context(locked_name(path, digest, waiting))
        except OSError as fault:
            raise SettingRefused(
                "lock_not_writable", path=str(path), problem=fault.strerror
            ) from fault
        yield


def _write(path: Path, body: bytes) -> None:
    from infra.store.disk import of_input

    try:
        path.write_bytes(body)
    except OSError as fault:
        raise of_input(fault, path) from fault


# --- bundle ----------------------------------------------------------------------------------


@bundle_app.command("pack")
def bundle_pack(
    folder: Annotated[Path, typer.Argument(help="Draft: model.json, *.safetensors, data files.")],
    as_json: Json = False,
) -> None:
    """Check a draft completely and store it as a bundle."""
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
    _notices(packed.notes, packed.warnings)


@bundle_app.command("check")
def bundle_check(
    bundle: Annotated[str, typer.Argument(help="name@version, name, artifact URI, or a folder.")],
    as_json: Json = False,
) -> None:
    """Verify a bundle from its bytes to its loaded module."""
    from tasks.bundles.packing import examine

    checked = examine(bundle)
    manifest, facts = checked.manifest, checked.facts
    found = {
        "name": manifest.name,
        "version": manifest.version,
        "tensors": len(facts),
        "files": len(manifest.files),
        "rows": {split: held.rows for split, held in manifest.data.items()},
        "notes": manifest.notes,
        "warnings": tuple(map(str, checked.warnings)),
    }
    if as_json:
        write(json.dumps(found, indent=1))
    else:
        write_line(
            f"{manifest.name}@{manifest.version} is sound: {len(facts)} finite tensors in "
            f"{len(manifest.files)} file(s), every hash verified, every id in its table."
        )
        _notices(manifest.notes, checked.warnings)


@bundle_app.command("show")
def bundle_show(
    bundle: Annotated[str, typer.Argument(help="name@version, name, artifact URI, or a folder.")],
    as_json: Json = False,
) -> None:
    """Print what a bundle says about itself."""
    from tasks.bundles.packing import show
    from tasks.orchestration.workspace import store

    manifest = show(bundle)
    if as_json:
        write(manifest.model_dump_json(indent=1))
        return
    signature = manifest.signature
    measured = "; ".join(f"{output.kind}, {output.metric}" for output in signature.outputs)
    write_line(f"{manifest.name}@{manifest.version}: {measured}")
    write_line(f"architecture {manifest.network.architecture.path}")
    for item in signature.inputs:
        table = getattr(item, "table", None)
        where = f" -> table {table}" if table else ""
        shape = f" {list(item.shape)} a row" if item.shape else ""
        write_line(f"  input {item.name}: {item.kind} {item.dtype}{shape}{where}")
    for split, held in manifest.data.items():
        write_line(f"  {split}: {held.rows:,} rows, {store().uri_of(held.artifact)}")
    for name, record in manifest.network.modules.items():
        write_line(f"  {name}: {record.format}")
    _notices(manifest.notes)


@bundle_app.command("schema")
def bundle_schema() -> None:
    """Print the JSON schema of a draft's model.json."""
    from infra.bundle.bundle_folder import Draft

    write(json.dumps(Draft.model_json_schema(), indent=1))


# --- registry --------------------------------------------------------------------------------


@registry_app.command("list")
def registry_list(
    model: Annotated[str | None, typer.Argument(help="One model; all without it.")] = None,
    as_json: Json = False,
) -> None:
    """List registered versions with their verdicts."""
    from tasks.promotion.registry_listing import listed

    found = listed(model)
    if as_json:
        write(json.dumps([item.model_dump(mode="json") for item in found], indent=1))
        return
    if not found:
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
            for item in found
        ],
    )
    for item in found:
        if item.note:
            write_line(f"{item.model} version {item.version} is {item.note}.")


@registry_app.command("show")
def registry_show(
    model: RegisteredModel,
    version: Version = "@candidate",
    html: Annotated[
        Path | None, typer.Option(help="Write the report's page, with pictures, to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the report of one version, or write its page to a file."""
    from tasks.promotion.promotions import version_page, version_report
    from tasks.report.tables import markdown

    if html is not None:
        registered, page = version_page(model, version)
        _write(html, page)
        write_line(f"{model} version {registered.version}: its report is in {html}")
        return
    _, report = version_report(model, version)
    write(report.model_dump_json(indent=1) if as_json else markdown(report))


@registry_app.command("fetch")
def registry_fetch(
    model: RegisteredModel,
    into: Annotated[Path, typer.Option(help="A new or empty folder.")],
    version: Version = "@champion",
    target: Annotated[
        str | None, typer.Option(help="Which target's files; without it the default target's.")
    ] = None,
    unmeasured: Annotated[
        bool, typer.Option(help="Take a target that was built but never measured.")
    ] = False,
    unaccepted: Annotated[
        bool, typer.Option(help="Take a target that was rejected or is undecided.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy one target of a version to a folder, every chunk verified."""
    from compressors.contracts import default_target
    from tasks.promotion.promotions import fetch

    name = default_target().name if target is None else orders.target_named(target)
    registered, found = fetch(
        model,
        version,
        name,
        into,
        unmeasured=unmeasured,
        unaccepted=unaccepted,
    )
    if as_json:
        write(found.model_dump_json(indent=1))
        return
    write_line(
        f"{model} version {registered.version}, {name}: {found.verdict.outcome}. "
        f"{found.artifact.bytes:,} bytes verified in {into}:"
    )
    for path in sorted(into.rglob("*")):
        if path.is_file():
            write_line(f"  {path.relative_to(into)}  {path.stat().st_size:,}")


# --- doctor ----------------------------------------------------------------------------------


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this installation uses, and whether it responds."""
    from flows.cli.doctor import examine

    findings = examine()
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


def _notices(notes: tuple[str, ...], warnings: "tuple[Reason, ...]" = ()) -> None:
    """Print remarks about a bundle after the output of a command."""
    for note in notes:
        write_line(f"note: {note}")
    for warning in warnings:
        write_line(f"warning: {warning}")


if __name__ == "__main__":
    main()
