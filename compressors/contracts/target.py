"""What a serving target declares."""

from dataclasses import dataclass
from typing import Literal

TargetKind = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Properties of a runtime by which results are served.

    Attributes:
        name: name in orders and reports.
        is_measured: whether its runtime scores and times the result where recpress runs, so that
            limits are judged. Other targets are built and audited.
        is_built: whether its graphs are built to engines.
    """

    name: TargetKind
    is_measured: bool = False
    is_built: bool = False


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(name="onnxruntime", is_measured=True),
        Target(name="tensorrt-rtx", is_built=True),
        Target(name="tensorrt", is_built=True),
    )
}
"""Every target by its name."""

(MEASURED,) = (target.name for target in TARGETS.values() if target.is_measured)
"""The target that is measured."""
