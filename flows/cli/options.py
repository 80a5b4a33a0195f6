"""Options and arguments that several commands share."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
RegisteredModel = Annotated[str, typer.Argument(help="Registered model name.")]
# The alias champion is the version in production, candidate the version accepted last.
Version = Annotated[
    str, typer.Option("--version", help="A version: a number such as 3, @champion or @candidate.")
]
