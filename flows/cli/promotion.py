"""``recpress registry promote``, ``rollback`` and ``restore``: which version serves.

Imports are inside the commands, as in ``flows/cli/app.py``.
"""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import write, write_line
from flows.cli.options import Json, RegisteredModel, Version

if TYPE_CHECKING:
    from infra.registry.ledger import Entry

promotion_app = typer.Typer()

Reason = Annotated[str, typer.Option(help="Written into the ledger.")]


@promotion_app.command("promote")
def registry_promote(
    model: RegisteredModel,
    version: Version = "@candidate",
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Make an accepted version the champion."""
    from flows.resolve import promoted_sentence
    from tasks.promotion.promotions import apply_promotion

    change = apply_promotion(model, version, reason)
    entry = change.entry
    if as_json:
        write(entry.model_dump_json(indent=1))
    elif change.is_new:
        write_line(f"{model}: {promoted_sentence(entry)}")
    else:
        write_line(f"{model}: version {entry.version} is champion already ({_decision(entry)}).")


@promotion_app.command("rollback")
def registry_rollback(
    context: typer.Context,
    model: RegisteredModel,
    leaving: Annotated[
        str | None,
        typer.Option("--from", help="The version to roll back from; else the champion."),
    ] = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Make the champion before the current one the champion again.

    Repeating a command that was interrupted completes it and does not go back a second time.
    """
    from tasks.promotion.promotions import apply_rollback

    change = apply_rollback(model, reason, leaving=leaving, began=context.obj)
    entry = change.entry
    if as_json:
        write(entry.model_dump_json(indent=1))
    elif change.is_new:
        write_line(f"{model}: version {entry.version} is champion again (was {entry.previous}).")
    else:
        write_line(
            f"{model}: already rolled back from version {entry.previous} to version "
            f"{entry.version} ({_decision(entry)}). To go back further: recpress registry "
            f"rollback {model} --from {entry.version}"
        )


@promotion_app.command("restore")
def registry_restore(
    model: Annotated[str | None, typer.Argument(help="One model; all without it.")] = None,
    as_json: Json = False,
) -> None:
    """Register the results in the store again, after a registry was lost."""
    from tasks.publish import restore

    restored = restore(model)
    if as_json:
        write(json.dumps([item.model_dump(mode="json") for item in restored], indent=1))
        return
    for item in restored:
        write_line(f"{item.model} version {item.version}: {item.tags.get('recpress.outcome', '')}")
    write_line(f"{len(restored)} version(s) registered again; every other result was registered.")


def _decision(entry: "Entry") -> str:
    why = f": {entry.reason}" if entry.reason else ""
    return f"{entry.action} by {entry.by} at {entry.at}{why}"
