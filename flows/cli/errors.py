"""Messages and exit codes of failed commands.

A command that fails prints one sentence. Its exit code is 2 for invalid input. It is 1 for errors
that may not occur in a retry or on another machine, for unexpected errors, and if the user aborts.

This code also runs when memory is exhausted. It therefore imports modules only when it needs them,
and prints a fixed sentence instead of a traceback if an import fails.
"""

import io
import itertools
import os
import resource
import sys
import tempfile
import traceback
from pathlib import Path

import typer
from typer._click.exceptions import ClickException  # of typer's own copy of click

from infra.memory_reserve import hold_reserve, is_limited, release_reserve

MIB = 2**20
MIN_MEMORY_LIMITS = {
    resource.RLIMIT_AS: (1536 * MIB, "ulimit -v"),
    resource.RLIMIT_DATA: (768 * MIB, "ulimit -d"),
}
"""Smallest limit in bytes, and the command that sets it.

With a lower limit, native libraries abort the process while they are loaded.
"""

NO_MEMORY = (
    "recpress: {command} ran out of memory. Raise the limit of this process (ulimit -v), end other "
    "processes or use a larger machine, then run again."
)

INCOMPLETE = (
    "recpress: {command} needs a module that cannot be imported: {missing}. Install recpress again."
)


def require_memory_limits(arguments: list[str]) -> None:
    """Exit with code 1 if the memory limits of this process are too low to load the libraries.

    Otherwise reserve memory for ``report_error``, which may run when memory is exhausted.

    Args:
        arguments: the command line, without the program's name.
    """
    if not arguments or "--help" in arguments:
        return
    for limit, (min_bytes, setting) in MIN_MEMORY_LIMITS.items():
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and soft < min_bytes:
            print(  # noqa: T201
                f"recpress: {quote_command(arguments)} needs at least {min_bytes // MIB} MiB of "
                f"memory, and {setting} allows {soft // MIB} MiB. Raise that limit, then run "
                f"again.",
                file=sys.stderr,
            )
            sys.exit(1)
    hold_reserve()


def report_error(fault: Exception) -> int:
    """Print the message of an error, and return the exit code."""
    release_reserve()
    traceback.clear_frames(fault.__traceback__)  # frees the objects in local variables
    try:
        return _report(fault)
    except MemoryError:
        message = NO_MEMORY
    except ImportError as missing:
        # With a memory limit, libraries that run out of memory while loading also raise this.
        message = NO_MEMORY if is_limited() else INCOMPLETE.replace("{missing}", f"{missing}")
    print(message.replace("{command}", quote_command(sys.argv[1:])), file=sys.stderr)  # noqa: T201
    return 1


def quote_command(arguments: list[str]) -> str:
    """Return the name of the command in a command line, in quotes: ``'recpress registry list'``."""
    words = itertools.takewhile(lambda word: word.isascii() and word.isalpha(), arguments[:2])
    return f"'{' '.join(('recpress', *words))}'"


def _report_usage_error(fault: ClickException) -> int:
    """Print an error of the arguments, which are untrusted text, and return the exit code."""
    out = io.StringIO()
    fault.show(file=out)
    _print(out.getvalue().rstrip("\n"))
    return fault.exit_code


def _report(fault: Exception) -> int:
    """Print the message of an error, and return the exit code.

    Some errors are replaced before they are printed:

    - An error of exhausted memory becomes ``OutOfMemory``.
    - An ``OSError`` of a file (it has a path), or one that the machine causes (such as a full
      disk), becomes the project's error for it. Other ones, such as a refused connection, remain.

    Raises:
        MemoryError, ImportError: memory is exhausted, or a module is missing.
    """
    if isinstance(fault, ClickException):
        return _report_usage_error(fault)
    if isinstance(fault, typer.Abort):
        print("Aborted.", file=sys.stderr)  # noqa: T201
        return 1
    from pydantic import ValidationError

    from compressors.errors.compression import CompressionError
    from flows.order_faults import format_errors
    from infra.errors import InfraError, Refused
    from infra.memory import convert_to_out_of_memory
    from infra.store.disk import MACHINE_ERRORS, find_os_error, translate_input_error

    shown: Exception = convert_to_out_of_memory(fault, quote_command(sys.argv[1:])) or fault
    error = find_os_error(shown)
    if error is not None and (error.filename is not None or error.errno in MACHINE_ERRORS):
        # An error without a path is reported for the folder of temporary files.
        shown = translate_input_error(error, Path(tempfile.gettempdir()))
    if os.environ.get("RECPRESS_DEBUG"):
        _print("".join(traceback.format_exception(fault)))
    if isinstance(shown, ValidationError):
        _print("recpress: " + "\n  ".join(format_errors(shown)))
        return 2
    if isinstance(shown, Refused | CompressionError):
        _print(f"recpress: {shown}")
        return 2
    kind = "" if isinstance(shown, InfraError) else f"{type(shown).__name__}: "
    hint = "" if os.environ.get("RECPRESS_DEBUG") else " (RECPRESS_DEBUG=1 prints the traceback.)"
    _print(f"recpress: {kind}{shown}{hint}")
    return 1


def _print(text: str) -> None:
    """Print to standard error; mask credentials and escape control characters of terminals."""
    from infra.credentials import mask_credentials
    from infra.printable import printable

    print(printable(mask_credentials(text)), file=sys.stderr)  # noqa: T201
