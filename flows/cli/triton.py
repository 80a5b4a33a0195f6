"""``recpress triton``: export a champion to Triton, and show the state of the repository.

Imports are inside the commands, as in ``flows/cli/app.py``.
"""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import write, write_line
from flows.cli.options import Json, RegisteredModel

if TYPE_CHECKING:
    from tasks.promotion.triton_repository import TritonModel

triton_app = typer.Typer(
    no_args_is_help=True, help="A Triton model repository that follows the champion."
)

To = Annotated[
    str | None, typer.Option("--to", help="A folder or s3://bucket/prefix; else RECPRESS_TRITON.")
]
Unmeasured = Annotated[
    bool, typer.Option(help="Also a TensorRT plan that was built but never measured.")
]


@triton_app.command("export")
def triton_export(
    model: RegisteredModel, to: To = None, unmeasured: Unmeasured = False, as_json: Json = False
) -> None:
    """Lay the champion out: its files, then the configuration that serves them."""
    from tasks.promotion.promotions import export

    laid = export(model, to, unmeasured=unmeasured)
    if as_json:
        write(json.dumps([item.model_dump(mode="json") for item in laid], indent=1))
        return
    for item in laid:
        write_line(f"{item.name}: version {item.served} of {model} is served from {item.uri}")


@triton_app.command("show")
def triton_show(
    model: RegisteredModel, to: To = None, unmeasured: Unmeasured = False, as_json: Json = False
) -> None:
    """Print the configuration, which version it serves, and whether its files are sound.

    Exit code 0 if a server that starts now serves the champion, 1 if not.
    """
    from tasks.promotion.promotions import triton_contents

    laid = triton_contents(model, to, unmeasured=unmeasured)
    if as_json:
        write(json.dumps([item.model_dump(mode="json") for item in laid], indent=1))
    else:
        for item in laid:
            _show(item)
    raise typer.Exit(0 if all(item.sound for item in laid) else 1)


def _show(item: "TritonModel") -> None:
    said = {
        "champion": f"serves version {item.served}, the champion",
        "behind": f"serves version {item.served} or an older configuration; the champion is "
        f"{item.champion}. Run 'recpress triton export'",
        "absent": f"is not laid out; the champion is {item.champion}. Run 'recpress triton export'",
        "stale": f"serves version {item.served}; the champion, {item.champion}, has nothing to "
        "serve here",
    }[item.state]
    write_line(f"{item.name} {said}.")
    for key, found in item.files.items():
        write_line(f"  {item.uri}/{key}: {'ok, every hash verified' if found == 'ok' else found}")
    if item.config is not None:
        write(f"\n{item.config}")
