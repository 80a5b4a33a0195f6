"""Options and arguments that several commands share."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
RegisteredModel = Annotated[str, typer.Argument(help="Registered model name.")]
Version = Annotated[
    str, typer.Option("--version", help="A version: a number such as 3, @champion or @candidate.")
]
