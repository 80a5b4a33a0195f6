"""``recpress registry promote``, ``rollback`` and ``restore``.

The first two change which version is the champion (the version in production), and append an entry
to the ledger, the list of these changes in the object store.
``restore`` fills a lost registry again. Imports are in the commands, so that ``--help`` is fast.
"""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import write, write_line
from flows.cli.options import Json, RegisteredModel, Version

if TYPE_CHECKING:
    from infra.registry.ledger import Entry

promotion_app = typer.Typer()

Reason = Annotated[str, typer.Option(help="A reason, stored in the ledger of promotions.")]


@promotion_app.command("promote")
def registry_promote(
    model: RegisteredModel,
    version: Version = "@candidate",
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Make an accepted version the champion."""
    from flows.resolve import format_promotion
    from tasks.promotion.promotions import apply_promotion

    change = apply_promotion(model, version, reason)
    entry = change.entry
    if as_json:
        write(entry.model_dump_json(indent=1))
    elif change.is_new:
        write_line(f"{model}: {format_promotion(entry)}")
    else:
        write_line(f"{model}: version {entry.version} is champion already ({_describe(entry)}).")


@promotion_app.command("rollback")
def registry_rollback(
    context: typer.Context,
    model: RegisteredModel,
    from_version: Annotated[
        str | None,
        typer.Option("--from", help="The version to roll back from; else the champion."),
    ] = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Make the previous champion the champion again.

    If the command is interrupted, repeat it. It completes the rollback, and does not roll back a
    second time.
    """
    from tasks.promotion.promotions import apply_rollback

    # The time at which flows/cli/app.py started. If another command has rolled back after it, this
    # command only completes that rollback.
    command_start = context.obj
    change = apply_rollback(model, reason, from_version=from_version, command_start=command_start)
    entry = change.entry
    if as_json:
        write(entry.model_dump_json(indent=1))
    elif change.is_new:
        write_line(f"{model}: version {entry.version} is champion again (was {entry.previous}).")
    else:
        write_line(
            f"{model}: already rolled back from version {entry.previous} to version "
            f"{entry.version} ({_describe(entry)}). To go back further: recpress registry "
            f"rollback {model} --from {entry.version}"
        )


@promotion_app.command("restore")
def registry_restore(
    model: Annotated[str | None, typer.Argument(help="Registered model name; else all.")] = None,
    as_json: Json = False,
) -> None:
    """Register all results in the object store again, after the registry was lost."""
    from tasks.publish import restore

    restored = restore(model)
    if as_json:
        write(json.dumps([item.model_dump(mode="json") for item in restored], indent=1))
        return
    for item in restored:
        write_line(f"{item.model} version {item.version}: {item.tags.get('recpress.outcome', '')}")
    write_line(f"{len(restored)} version(s) registered again; all others were registered already.")


def _describe(entry: "Entry") -> str:
    """Return the change of an entry (promote or rollback), who made it, when and why."""
    reason = f": {entry.reason}" if entry.reason else ""
    return f"{entry.action} by {entry.by} at {entry.at}{reason}"
