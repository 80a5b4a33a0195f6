"""``recpress triton``: export a champion to a Triton model repository, and show its state.

Imports are inside the commands, so that ``--help`` is fast.
"""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import write, write_line
from flows.cli.options import Json, RegisteredModel

if TYPE_CHECKING:
    from tasks.promotion.triton_repository import TritonModel

triton_app = typer.Typer(
    no_args_is_help=True, help="Export the champion to a Triton model repository."
)

To = Annotated[
    str | None,
    typer.Option(
        "--to", help="The repository: a folder or s3://bucket/prefix; else RECPRESS_TRITON."
    ),
]
Unmeasured = Annotated[
    bool, typer.Option(help="Include a TensorRT engine that was built but never measured.")
]


@triton_app.command("export")
def triton_export(
    model: RegisteredModel, to: To = None, unmeasured: Unmeasured = False, as_json: Json = False
) -> None:
    """Write the files of the champion, then the configuration that serves them."""
    from tasks.promotion.promotions import export

    exported = export(model, to, unmeasured=unmeasured)
    if as_json:
        write(json.dumps([item.model_dump(mode="json") for item in exported], indent=1))
        return
    for item in exported:
        write_line(f"{item.name}: version {item.served} of {model} is served from {item.uri}")


@triton_app.command("show")
def triton_show(
    model: RegisteredModel, to: To = None, unmeasured: Unmeasured = False, as_json: Json = False
) -> None:
    """Print the configuration, the version that it serves, and whether its files are valid.

    The exit code is 0 if a server that starts now would serve the champion, else 1.
    """
    from tasks.promotion.promotions import triton_contents

    models = triton_contents(model, to, unmeasured=unmeasured)
    if as_json:
        write(json.dumps([item.model_dump(mode="json") for item in models], indent=1))
    else:
        for item in models:
            _print_model(item)
    # A model is sound if the server would load the champion, and its files are undamaged.
    raise typer.Exit(0 if all(item.sound for item in models) else 1)


def _print_model(item: "TritonModel") -> None:
    """Print the state, files and configuration of one model in the repository."""
    state = {
        "champion": f"serves version {item.served}, the champion",
        "behind": f"serves version {item.served} or an older configuration; the champion is "
        f"{item.champion}. Run 'recpress triton export'",
        "absent": f"is not in the repository; the champion is {item.champion}. "
        "Run 'recpress triton export'",
        "stale": f"serves version {item.served}; the champion, {item.champion}, has no file for "
        "this target",
    }[item.state]
    write_line(f"{item.name} {state}.")
    for key, problem in item.files.items():
        status = "ok, every hash verified" if problem == "ok" else problem
        write_line(f"  {item.uri}/{key}: {status}")
    if item.config is not None:
        write(f"\n{item.config}")
