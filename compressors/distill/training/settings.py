"""Settings of the training loop: epochs, learning rate, schedule, and which tensors to train.

The ``position`` of a setting is its place in Prefect's form for a flow run; it has no other effect.
"""

import operator
from typing import Annotated, Literal

from pydantic import Field

from compressors.contracts import Frozen, Part

SoftShare = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Weight of the original model's predictions; the labels get the rest.",
    ),
]
Temperature = Annotated[
    float,
    Field(
        ge=0.1,
        le=100,
        description="Temperature: divides the logits of both models before they are compared.",
    ),
]


class Training(Frozen):
    """Settings of the training: Adam, a warm-up, and early stopping on validation rows."""

    epochs: int = Field(
        10,
        ge=1,
        description="Largest number of passes over the training rows.",
        json_schema_extra={"position": 0},
    )
    batch: int = Field(
        1024,
        ge=1,
        description="Training rows per optimizer step.",
        json_schema_extra={"position": 1},
    )
    learning_rate: float = Field(
        3e-3, gt=0, description="Largest learning rate of Adam.", json_schema_extra={"position": 2}
    )
    schedule: Literal["plateau", "cosine"] = Field(
        "plateau",
        description="Learning rate schedule. plateau: divide by 10 after each epoch without a "
        "better validation metric. cosine: decrease to zero over all epochs.",
        json_schema_extra={"position": 3},
    )
    warmup: int = Field(
        50,
        ge=0,
        description="Optimizer steps over which the learning rate increases from zero.",
        json_schema_extra={"position": 4},
    )
    patience: int = Field(
        2,
        ge=1,
        description="Training stops after so many epochs without a better validation metric.",
        json_schema_extra={"position": 5},
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Decoupled weight decay (AdamW) of dense weights.",
        json_schema_extra={"position": 6},
    )
    tables: bool = Field(
        False,
        description="Train tables too: float32 tables, and the float32 scales and codebooks of "
        "packed tables. Set table_l2 to the penalty of the original training.",
        json_schema_extra={"position": 7},
    )
    table_l2: float = Field(
        0.0,
        ge=0,
        description="L2 penalty on trained tables: half of this times the squared norm of the "
        "whole table (dequantized if it is packed).",
        json_schema_extra={"position": 8},
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16: mixed precision. Matrix products are in bfloat16; weights, updates "
        "and the loss stay in float32. Faster on GPUs and on CPUs with bfloat16 instructions.",
        json_schema_extra={"position": 9},
    )
    negatives: int = Field(
        0,
        ge=0,
        exclude_if=operator.not_,
        description="Items that are drawn from the catalogue for each batch of a retrieval model, "
        "as negatives of all its queries. 0: only the items of the batch.",
        json_schema_extra={"position": 10},
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """The parts of a bench that these settings need, in addition to those of the step."""
        return ("items",) if self.negatives else ()
