"""Compare the peak memory that an order is estimated to need with what is available."""

from collections.abc import Callable

from compressors.contracts import TARGETS
from flows.order import Order
from infra.errors import OutOfMemory
from infra.memory import SETTING, estimate_available_memory, read_resident_bytes
from tasks.bundles.bundle_ref import BundleRef
from tasks.orchestration.memory_estimate import MIB, Memory, peak_memory


def trains_tables(order: Order) -> bool:
    """Return whether a step of the order trains tables at their full, uncompressed size."""
    for step in order.recipe():
        training = getattr(step, "training", None)
        if training is not None and training.tables:
            return True
        if hasattr(step, "tables"):  # the step compresses tables; later steps train the result
            return False
    return False


def estimate_memory(order: Order, bundle: BundleRef) -> Memory:
    """Estimate the peak memory of an order from the sizes in its bundle's manifest."""
    return peak_memory(
        bytes_before=bundle.weight_bytes,
        bytes_after=bundle.weight_bytes,
        data_bytes=bundle.data_bytes,
        # Whether any engine is built, which needs more memory.
        builds=any(TARGETS[target].is_built for target in order.targets.requirements()),
        trained_bytes=bundle.weight_bytes if trains_tables(order) else 0,
    )


def require_order_memory(order: Order, bundle: BundleRef) -> Memory:
    """Estimate the peak memory of an order, and raise if it is not available.

    The estimate includes the memory-mapped file of the untouched model. The comparison does not,
    since the operating system frees those pages before it runs out of memory.

    Returns:
        The estimate.

    Raises:
        OutOfMemory: the order needs more than is available.
    """
    estimate = estimate_memory(order, bundle)
    available, used = estimate_available_memory(), read_resident_bytes()
    needed = estimate.peak - bundle.weight_bytes
    if available is not None and needed - used > available.bytes:
        raise OutOfMemory(
            "order_memory",
            name=bundle.name,
            version=bundle.version,
            needed_mib=needed // MIB,
            moment=estimate.moment,  # the phase of the peak, such as "training"
            available_mib=max(available.bytes + used, 0) // MIB,
            limit=available.limit,  # the limit that leaves the least memory, as text
            setting=SETTING,  # the environment variable that sets the limit
        )
    return estimate


def describe_running_phase(
    phase: Callable[[], str], estimate: Memory, bundle: BundleRef
) -> Callable[[], str]:
    """Return a function that names the current phase, as the subject of an error sentence.

    The sentence continues with "ran out of memory".
    """
    return lambda: (
        f"Phase '{phase()}' of the order for {bundle.name}@{bundle.version}, estimated to use "
        f"{estimate.peak // MIB:,} MiB at most,"
    )
