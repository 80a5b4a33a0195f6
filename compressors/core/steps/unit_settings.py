"""Types of settings that several methods have, with their descriptions and bounds."""

from typing import Annotated

from pydantic import Field

TablePatterns = Annotated[
    tuple[str, ...],
    Field(description="Tables to compress: module names, with * for any characters."),
]
LayerPatterns = Annotated[
    tuple[str, ...],
    Field(description="Dense layers to compress: module names, with * for any characters."),
]
MinRows = Annotated[int, Field(ge=1, description="Tables with fewer rows are not changed.")]
