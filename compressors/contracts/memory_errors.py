"""Recognize errors of Python and native libraries caused by too little memory."""

import errno
import re

_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc"
    r"|bad allocation|failed to allocate|unable to allocate|unable to mmap|cannot map"
    r"|malloc of size|can't start new thread"
    # The same message with "operation not permitted" has another cause: the noexec mount option.
    r"|failed to map segment from shared object(?!: operation not permitted)",
    re.IGNORECASE,
)

# Native libraries raise errors of these classes of Python, or of classes in these modules.
_NATIVE_ERRORS = (RuntimeError, OSError, ImportError, SystemError)
_NATIVE_MODULES = ("onnxruntime", "torch", "safetensors", "safetensors_rust", "pyarrow", "numba")


def is_out_of_memory(fault: BaseException) -> bool:
    """Return whether too little memory caused the error ``fault``, directly or through its causes.

    numpy and pyarrow raise subclasses of ``MemoryError``. torch, ONNX Runtime, safetensors and the
    system's library loader raise other classes, so the messages of these are searched.
    """
    visited: set[int] = set()
    error: BaseException | None = fault
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        module = type(error).__module__.partition(".")[0]
        is_native = isinstance(error, _NATIVE_ERRORS) or module in _NATIVE_MODULES
        if is_native and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
