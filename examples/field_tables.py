"""Embedding tables of id fields that several reference models share."""

from collections.abc import Mapping, Sequence

from torch import nn


def build_tables(fields: Sequence[Mapping[str, str | int]], width: int) -> nn.ModuleDict:
    """Return a table of ``width`` columns per field, ``{"name": str, "rows": int}``, by name."""
    tables = {str(field["name"]): nn.Embedding(int(field["rows"]), width) for field in fields}
    for table in tables.values():
        # Small enough that the ids hardly affect the first logits.
        nn.init.normal_(table.weight, std=0.01)
    return nn.ModuleDict(tables)
