"""The serving targets by name. To add one, write its folder and add it here."""

from compressors.lower.targets.onnxruntime.target import OnnxRuntime
from compressors.lower.targets.target import LoweringTarget
from compressors.lower.targets.tensorrt.target import TensorRT

LOWERING_TARGETS: dict[str, LoweringTarget] = {
    "onnxruntime": OnnxRuntime(),
    "tensorrt": TensorRT(),
    "tensorrt-rtx": TensorRT(),
}


def lowering_target(name: str) -> LoweringTarget:
    """Return the target of a name.

    Raises:
        KeyError: there is none.
    """
    return LOWERING_TARGETS[name]
