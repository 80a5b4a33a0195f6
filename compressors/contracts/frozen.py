"""``Frozen``, the base class of the project's immutable values."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base class of immutable values, which are equal if their fields are equal."""

    # Non-finite floats are written as text: by default, NaN is written as null.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
