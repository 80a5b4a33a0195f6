"""Options and arguments that several commands have."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
RegisteredModel = Annotated[str, typer.Argument(help="Registered model name.")]
Version = Annotated[str, typer.Option("--version", help="3, @champion or @candidate.")]
