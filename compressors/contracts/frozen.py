"""``Frozen``, the base class of the project's immutable values, and values that were renamed."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Frozen(BaseModel):
    """Base class of immutable values, which are equal if their fields are equal."""

    # Non-finite floats are written as text: by default, NaN is written as null.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


def read_renamed(new_names: Mapping[str, str]) -> BeforeValidator:
    """Return a validator that replaces values that earlier versions of recpress wrote.

    Args:
        new_names: the current value by the earlier one.
    """

    def replace(value: Any) -> Any:
        return new_names.get(value, value) if isinstance(value, str) else value

    return BeforeValidator(replace)
