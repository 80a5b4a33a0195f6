"""Messages and exit codes of failed commands.

Every known fault is one sentence: exit code 2 for bad input, 1 for faults that may not occur in a
retry or on another machine. No failure here may end in a traceback, not even exhausted memory:
modules are imported when they are needed, and if that fails too, a fixed sentence is printed.
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
LEAST_LEFT = {
    resource.RLIMIT_AS: (1536 * MIB, "ulimit -v"),
    resource.RLIMIT_DATA: (768 * MIB, "ulimit -d"),
}
"""Native libraries abort the process, without an exception, if less is left when they load."""

NO_MEMORY = (
    "recpress: {command} ran out of memory. Raise the limit of this process (ulimit -v), end other "
    "processes or use a larger machine, then run again."
)

INCOMPLETE = (
    "recpress: {command} needs a module that cannot be imported: {missing}. Install recpress again."
)


def require_limits(arguments: list[str]) -> None:
    """Exit with code 1 if the process's limits leave too little memory to load the libraries.

    Otherwise it reserves some memory for the report of a failure.
    """
    if not arguments or "--help" in arguments:
        return
    for limit, (least, setting) in LEAST_LEFT.items():
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and soft < least:
            print(  # noqa: T201
                f"recpress: {command(arguments)} needs at least {least // MIB} MiB of memory, and "
                f"{setting} allows {soft // MIB} MiB. Raise that limit, then run again.",
                file=sys.stderr,
            )
            sys.exit(1)
    hold_reserve()


def report(fault: Exception) -> int:
    """Print the message of a fault; returns the exit code."""
    release_reserve()
    traceback.clear_frames(fault.__traceback__)  # releases the memory of the failed work
    try:
        return _report(fault)
    except MemoryError:
        said = NO_MEMORY
    except ImportError as missing:
        # Libraries that run out of memory while loading also raise this, but only under a limit.
        said = NO_MEMORY if is_limited() else INCOMPLETE.replace("{missing}", f"{missing}")
    print(said.replace("{command}", command(sys.argv[1:])), file=sys.stderr)  # noqa: T201
    return 1


def command(arguments: list[str]) -> str:
    """Return the current command as a noun phrase for a message."""
    words = itertools.takewhile(lambda word: word.isascii() and word.isalpha(), arguments[:2])
    return f"'{' '.join(('recpress', *words))}'"


def _usage(fault: ClickException) -> int:
    """Print the faults of the arguments, which are untrusted text."""
    out = io.StringIO()
    fault.show(file=out)
    _print(out.getvalue().rstrip("\n"))
    return fault.exit_code


def _report(fault: Exception) -> int:
    if isinstance(fault, ClickException):
        return _usage(fault)
    if isinstance(fault, typer.Abort):
        print("Aborted.", file=sys.stderr)  # noqa: T201
        return 1
    from pydantic import ValidationError

    from compressors.errors.compression import CompressionError
    from flows.order_faults import sentences
    from infra.errors import InfraError, Refused
    from infra.memory import as_out_of_memory
    from infra.store.disk import OF_THE_MACHINE, as_os_error, of_input

    shown: Exception = as_out_of_memory(fault, command(sys.argv[1:])) or fault
    error = as_os_error(shown)
    if error is not None and (error.filename is not None or error.errno in OF_THE_MACHINE):
        shown = of_input(error, Path(tempfile.gettempdir()))
    if os.environ.get("RECPRESS_DEBUG"):
        _print("".join(traceback.format_exception(fault)))
    if isinstance(shown, ValidationError):
        _print("recpress: " + "\n  ".join(sentences(shown)))
        return 2
    if isinstance(shown, Refused | CompressionError):
        _print(f"recpress: {shown}")
        return 2
    kind = "" if isinstance(shown, InfraError) else f"{type(shown).__name__}: "
    hint = "" if os.environ.get("RECPRESS_DEBUG") else " (RECPRESS_DEBUG=1 shows where.)"
    _print(f"recpress: {kind}{shown}{hint}")
    return 1


def _print(text: str) -> None:
    """Print to standard error, without credentials and terminal control characters."""
    from infra.credentials import cleaned
    from infra.printable import printable

    print(printable(cleaned(text)), file=sys.stderr)  # noqa: T201
