"""Serving targets: one object for each, with its lowering, builder and runtime.

Types and declarations only; lowerings are in ``compressors/lower/targets``, builders and runtimes
in ``infra``.

target.py    what a target declares
registry.py  the registry: a target by its name, and the targets of recpress
builder.py   the protocol of a builder, and its requests
runtime.py   the protocol of a runtime, and the machine of a measurement
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
