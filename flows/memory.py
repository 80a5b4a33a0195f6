"""Compare the peak memory that an order is estimated to need with what is available."""

from collections.abc import Callable

from compressors.contracts import TARGETS
from flows.order import Order
from infra.errors import OutOfMemory
from infra.memory import SETTING, available_memory, resident
from tasks.bundles.bundle_ref import BundleRef
from tasks.orchestration.memory_estimate import MIB, Memory, peak_memory


def trains_tables(order: Order) -> bool:
    """Return whether a step of the order trains tables that no earlier step has changed."""
    for step in order.recipe():
        training = getattr(step, "training", None)
        if training is not None and training.tables:
            return True
        if hasattr(step, "tables"):  # a table method, after which tables are smaller
            return False
    return False


def estimated_memory(order: Order, subject: BundleRef) -> Memory:
    """Estimate memory from the sizes in a bundle's manifest, before anything is fetched."""
    return peak_memory(
        bytes_before=subject.weight_bytes,
        bytes_after=subject.weight_bytes,
        data_bytes=subject.data_bytes,
        builds=any(TARGETS[target].is_built for target in order.targets.wanted()),
        trained_bytes=subject.weight_bytes if trains_tables(order) else 0,
    )


def require_order_memory(order: Order, subject: BundleRef) -> Memory:
    """Raise before any work if an order does not fit in memory.

    The estimate includes the untouched model's mapped file; this check does not, since the system
    reclaims those pages before it runs out of memory.

    Returns:
        The estimate.

    Raises:
        OutOfMemory: contains the estimate, the available memory, its limit, and the remedy.
    """
    estimate, available, used = estimated_memory(order, subject), available_memory(), resident()
    needed = estimate.peak - subject.weight_bytes
    if available is not None and needed - used > available.bytes:
        raise OutOfMemory(
            "order_memory",
            name=subject.name,
            version=subject.version,
            needed_mib=needed // MIB,
            moment=estimate.moment,
            available_mib=max(available.bytes + used, 0) // MIB,
            limit=available.limit,
            setting=SETTING,
        )
    return estimate


def what_ran(stage: Callable[[], str], estimate: Memory, subject: BundleRef) -> Callable[[], str]:
    """Describe for a message what ran out of memory: the stage, and the estimate."""
    return lambda: (
        f"Stage '{stage()}' of the order for {subject.name}@{subject.version}, estimated to use "
        f"{estimate.peak // MIB:,} MiB at most,"
    )
