"""``recpress tables``: compress embedding tables of any size, from file to file.

Imports are inside the commands, as in ``flows/cli/app.py``.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import write, write_line
from flows.cli.options import Json

if TYPE_CHECKING:
    from compressors.contracts import Plan

tables_app = typer.Typer(
    no_args_is_help=True, help="Compress embedding tables of any size, from file to file."
)


@tables_app.command("quantize")
def tables_quantize(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A safetensors file, or a folder of shards.")
    ],
    into: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    form: Annotated[
        str, typer.Option("--format", help="int8, int4, ...: see 'recpress tables formats'.")
    ],
    scale: Annotated[
        str | None, typer.Option(help="How each scale is stored: float16 or float32.")
    ] = None,
    clipping: Annotated[
        str | None, typer.Option(help="How the range of a row is found, such as min_max or mse.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting; may be repeated."),
    ] = None,
    tensor: Annotated[
        list[str] | None,
        typer.Option(help="Tables to compress, with * for any characters; may be repeated."),
    ] = None,
    min_rows: Annotated[
        int | None, typer.Option(help="Tables with fewer rows stay as they are.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; else one a core.")] = None,
    block_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows a thread encodes at once.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress every table of IN into OUT, which is complete when it is there at all.

    The same command continues where an interrupted one stopped. Tensors that are no tables, or
    not among --tensor, are copied, and listed with the reason.
    """
    from tasks.bundles.table_files import quantize, step_named

    settings: dict[str, object] = dict(_setting(text) for text in setting or ())
    named = {"scale": scale, "clipping": clipping, "min_rows": min_rows}
    settings |= {name: value for name, value in named.items() if value is not None}
    if tensor:
        settings["tables"] = tensor
    step = step_named(form, settings)
    begun = time.perf_counter()
    with _bar(quiet=as_json) as progress:
        done = quantize(
            source, into, step, block_rows=block_rows, workers=workers, progress=progress
        )
    if as_json:
        write(done.model_dump_json(indent=1))
        return
    _show(done.plan)
    seconds = time.perf_counter() - begun
    write_line(f"{into}: {done.bytes:,} bytes in {seconds:.1f} s, sha256 {done.sha256}")


@tables_app.command("check")
def tables_check(
    folder: Annotated[Path, typer.Argument(help="What 'recpress tables quantize' wrote.")],
    as_json: Json = False,
) -> None:
    """Compare every chunk of a result with its hash, and say what is in it."""
    from tasks.bundles.table_files import check

    artifact, tables = check(folder)
    if as_json:
        write(json.dumps([artifact.model_dump(mode="json"), tables.model_dump(mode="json")]))
        return
    _show(tables.plan)
    write_line(f"{folder}: {artifact.bytes:,} bytes, every hash verified, sha256 {artifact.sha256}")


@tables_app.command("formats")
def tables_formats(as_json: Json = False) -> None:
    """List the table formats and their settings."""
    from tasks.bundles.table_files import short_name, table_steps

    if as_json:
        schemas = {
            short_name(kind): step.model_json_schema() for kind, step in table_steps().items()
        }
        write(json.dumps(schemas, indent=1))
        return
    for kind, step in table_steps().items():
        write_line(f"{short_name(kind)}: {(step.__doc__ or '').strip()}")
        for name, field in step.model_fields.items():
            if name != "kind":
                write_line(f"  {name} ({field.get_default(call_default_factory=True)})")
                write_line(f"    {field.description}")


def _setting(text: str) -> tuple[str, object]:
    from infra.errors import CommandRefused

    name, sign, value = text.partition("=")
    if not sign or not name:
        raise CommandRefused("setting_form", got=text)
    try:
        return name, json.loads(value)  # a number, also if only some numbers are allowed
    except ValueError:
        return name, value


def _show(plan: "Plan") -> None:
    for line in plan.lines:
        share = f"{100 * line.bytes_after / max(line.bytes_before, 1):.1f} %"
        write_line(
            f"{line.module or 'weight'}: {line.format}, {line.bytes_before:,} -> "
            f"{line.bytes_after:,} bytes ({share}; {line.reason})"
        )


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar on a terminal."""
    from flows.cli.console import console

    err = console(error=True)
    if quiet or not err.is_terminal:
        yield None
        return
    from rich.progress import Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (*Progress.get_default_columns()[:-1], TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def show(read: int, total: int) -> None:
            bar.update(task, advance=read, total=total)

        yield show
