"""The lowering of each serving target, which its declaration names."""

from compressors.contracts import target
from compressors.lower.targets.onnxruntime.target import OnnxRuntime as OnnxRuntime
from compressors.lower.targets.target import LoweringTarget
from compressors.lower.targets.tensorrt.target import TensorRT as TensorRT


def lowering_target(name: str) -> LoweringTarget:
    """Return the lowering of a target.

    The imports of this file make the digests of tasks contain the lowerings of recpress.

    Raises:
        KeyError: there is no target of this name.
    """
    lowering: LoweringTarget = target(name).load_lowering()
    return lowering
