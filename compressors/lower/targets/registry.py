"""Get the lowering of a serving target by the target's name.

The digest of a task's sources follows import statements. This file imports the built-in lowerings
so that the digests of tasks that lower a model contain them.
"""

from compressors.contracts import target
from compressors.lower.targets.onnxruntime.target import OnnxRuntime as OnnxRuntime
from compressors.lower.targets.target import LoweringTarget
from compressors.lower.targets.tensorrt.target import TensorRT as TensorRT


def lowering_target(name: str) -> LoweringTarget:
    """Return the lowering that a target declares.

    Raises:
        KeyError: there is no target of this name.
    """
    lowering: LoweringTarget = target(name).load_lowering()
    return lowering
