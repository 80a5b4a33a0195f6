"""Serving targets: one object for each, with its lowering, builder and runtime.

This folder declares targets; lowerings are in ``compressors/lower/targets``, builders and runtimes
in ``infra``.

target.py    the class ``Target``
registry.py  the registry: a target by its name, and the built-in targets
builder.py   the protocol of a builder, and its requests
runtime.py   the protocol of a runtime, and the description of the machine of a measurement
"""

from compressors.contracts.targets.registry import TARGETS as TARGETS
from compressors.contracts.targets.registry import TargetName as TargetName
from compressors.contracts.targets.registry import default_target as default_target
from compressors.contracts.targets.registry import engine_suffixes as engine_suffixes
from compressors.contracts.targets.registry import register as register
from compressors.contracts.targets.registry import target as target
from compressors.contracts.targets.target import Engines as Engines
from compressors.contracts.targets.target import Target as Target
from compressors.contracts.targets.target import TritonBackend as TritonBackend
