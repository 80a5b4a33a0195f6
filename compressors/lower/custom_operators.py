"""The custom PyTorch ops of recpress; importing this file registers all of them.

A module registers its ops when it is imported, and the targets' translations refer to the ops of
all formats. ``core/registries.py`` imports the modules of all methods, formats and compositions
(ways to build a table from smaller ones). The ops that only lowered graphs contain are imported
here.
"""

import torch

import compressors.core.registries  # noqa: F401
from compressors.lower import value_policy  # noqa: F401
from compressors.lower.lookups import code_operators, merged_codebooks  # noqa: F401

OPS = torch.ops.recpress
"""Namespace of the custom ops, such as ``OPS.rowwise_int8``."""
