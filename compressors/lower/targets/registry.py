"""Get the lowering of a serving target by the target's name.

The key of a cached task contains a digest of the source files that it imports. This file imports
the built-in lowerings so that a change of them changes the keys of tasks that lower a model.
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
