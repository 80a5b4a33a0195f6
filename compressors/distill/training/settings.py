"""Settings of the training loop: epochs, learning rate, schedule, and which tensors to train."""

from typing import Literal

from pydantic import Field

from compressors.contracts import Frozen


class Training(Frozen):
    """How a network is trained on: Adam, a warm-up, and early stopping on validation rows."""

    epochs: int = Field(
        10,
        ge=1,
        description="Passes over the training rows, at most.",
        json_schema_extra={"position": 0},
    )
    batch: int = Field(
        1024, ge=1, description="Training rows of one step.", json_schema_extra={"position": 1}
    )
    learning_rate: float = Field(
        3e-3, gt=0, description="Adam's, at its highest.", json_schema_extra={"position": 2}
    )
    schedule: Literal["plateau", "cosine"] = Field(
        "plateau",
        description="plateau: divided by 10 whenever validation does not improve. cosine: falls "
        "to zero over all epochs.",
        json_schema_extra={"position": 3},
    )
    warmup: int = Field(
        50,
        ge=0,
        description="Steps over which the learning rate rises from zero.",
        json_schema_extra={"position": 4},
    )
    patience: int = Field(
        2,
        ge=1,
        description="Epochs without a better validation metric before it stops.",
        json_schema_extra={"position": 5},
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Decoupled (AdamW), on dense weights.",
        json_schema_extra={"position": 6},
    )
    tables: bool = Field(
        False,
        description="Train tables as well: float32 ones, and the float32 scales and codebooks of "
        "packed ones. Give table_l2 as the original had it.",
        json_schema_extra={"position": 7},
    )
    table_l2: float = Field(
        0.0,
        ge=0,
        description="Penalty on whole tables that are trained, packed ones as they are read: half "
        "of it times their squared norm.",
        json_schema_extra={"position": 8},
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16: mixed precision, matrices are multiplied in bfloat16 and weights, "
        "their updates and the loss stay float32. Pays on GPUs and on CPUs that multiply it.",
        json_schema_extra={"position": 9},
    )
