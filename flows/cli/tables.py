"""``recpress tables``: compress embedding tables of any size, from file to file.

Imports are inside the commands, so that ``--help`` is fast.
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
    table_format: Annotated[
        str, typer.Option("--format", help="Format, such as int8: see 'recpress tables formats'.")
    ],
    scale: Annotated[
        str | None, typer.Option(help="Type of the stored scales: float16 or float32.")
    ] = None,
    clipping: Annotated[
        str | None,
        typer.Option(help="How the range of each row is chosen, such as min_max or mse."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Another setting of the format. Repeatable."
        ),
    ] = None,
    tensor: Annotated[
        list[str] | None,
        typer.Option(help="Tables to compress; * matches any characters. Repeatable."),
    ] = None,
    min_rows: Annotated[
        int | None, typer.Option(help="Tables with fewer rows are not compressed.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; else one per core.")] = None,
    block_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows that a thread encodes at a time.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress every table of IN into OUT.

    OUT is written only when it is complete. If the command is interrupted, repeat it: it continues
    where it stopped. Tensors that are not tables, or not selected by --tensor, are copied, and
    listed with the reason.
    """
    from tasks.bundles.table_files import build_table_step, quantize

    settings: dict[str, object] = dict(_parse_setting(text) for text in setting or ())
    options = {"scale": scale, "clipping": clipping, "min_rows": min_rows}
    settings |= {name: value for name, value in options.items() if value is not None}
    if tensor:
        settings["tables"] = tensor
    step = build_table_step(table_format, settings)
    start = time.perf_counter()
    with _show_progress_bar(quiet=as_json) as progress:
        result = quantize(
            source, into, step, block_rows=block_rows, workers=workers, progress=progress
        )
    if as_json:
        write(result.model_dump_json(indent=1))
        return
    _print_plan(result.plan)
    seconds = time.perf_counter() - start
    write_line(f"{into}: {result.bytes:,} bytes in {seconds:.1f} s, sha256 {result.sha256}")


@tables_app.command("check")
def tables_check(
    folder: Annotated[Path, typer.Argument(help="The OUT folder of 'recpress tables quantize'.")],
    as_json: Json = False,
) -> None:
    """Verify the hashes of a compressed folder, and print its tables."""
    from tasks.bundles.table_files import check

    artifact, tables = check(folder)
    if as_json:
        write(json.dumps([artifact.model_dump(mode="json"), tables.model_dump(mode="json")]))
        return
    _print_plan(tables.plan)
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


def _parse_setting(text: str) -> tuple[str, object]:
    """Parse ``NAME=VALUE``; the value is JSON, or else a string.

    Raises:
        CommandRefused: the text has another form.
    """
    from infra.errors import CommandRefused

    name, sign, value = text.partition("=")
    if not sign or not name:
        raise CommandRefused("setting_form", got=text)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _print_plan(plan: "Plan") -> None:
    """Print format, bytes before and after, and reason of each table.

    The percentage is the bytes after relative to those before.
    """
    for line in plan.lines:
        share = f"{100 * line.bytes_after / max(line.bytes_before, 1):.1f} %"
        # A tensor that is named only "weight" belongs to a module without a name.
        write_line(
            f"{line.module or 'weight'}: {line.format}, {line.bytes_before:,} -> "
            f"{line.bytes_after:,} bytes ({share}; {line.reason})"
        )


@contextmanager
def _show_progress_bar(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar if standard error is a terminal.

    Yields:
        A function of the number of bytes that were read since its last call, and the total number
        of bytes; None if there is no progress bar.
    """
    from flows.cli.console import console

    err = console(error=True)
    if quiet or not err.is_terminal:
        yield None
        return
    from rich.progress import Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (*Progress.get_default_columns()[:-1], TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def advance(read_bytes: int, total: int) -> None:
            bar.update(task, advance=read_bytes, total=total)

        yield advance
