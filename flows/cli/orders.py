"""Build an order from the command line: a model with options, or a file.

``Terms`` is an order without custom steps. Its subclass ``Order`` can have custom steps, and takes
longer to import. Options can express only ``Terms``; a file is read as ``Order``.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flows.terms import Terms

Model = Annotated[
    str | None, typer.Argument(help="A packed bundle: name@version, name, or artifact URI.")
]
Preset = Annotated[str, typer.Option(help="safe, fast, small or smallest.")]
Budget = Annotated[
    float | None,
    typer.Option(
        help="Largest loss of the metric on validation rows. Without it the pruning of presets "
        "small and smallest may lose 0.001."
    ),
]
Limits = Annotated[
    list[str] | None,
    typer.Option(help="Limit of the result, such as 'auc vs baseline >= -0.002'. Repeatable."),
]
Target = Annotated[
    list[str] | None,
    typer.Option(help="Another required target, such as tensorrt-rtx. Repeatable."),
]
Optionals = Annotated[
    list[str] | None,
    typer.Option(help="Optional target, skipped if it cannot be built. Repeatable."),
]
File = Annotated[Path | None, typer.Option(help="JSON file of the order, instead of the options.")]
Promote = Annotated[bool, typer.Option(help="Make an accepted result champion.")]
Teachers = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher",
        help="An additional teacher: name@version, artifact URI, "
        "registry:name@version, or column:NAME for scores in the data. Repeatable.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]


def order_from_options(
    model: Model = None,
    preset: Preset = "safe",
    limit: Limits = None,
    target: Target = None,
    optional: Optionals = None,
    order: File = None,
    promote: Promote = False,
    seed: Seed = 0,
    budget: Budget = None,
    teacher: Teachers = None,
) -> "Terms":
    """Return the order that the options or the file describe.

    Raises:
        CommandRefused: there is a file and also a model or an option that differs from its
            default; there is neither a file nor a model; or the input is not an order.
    """
    from infra.errors import CommandRefused

    if order is not None:
        options = (limit, target, optional, promote, seed, preset != "safe", budget is not None)
        if model is not None or teacher or any(options):
            raise CommandRefused("order_and_options")
        return read_order(order)
    if model is None:
        raise CommandRefused("model_missing")
    return build_terms(
        model=model,
        preset=preset,
        limits=limit or [],
        targets=target,
        optional=optional or [],
        promote=promote,
        seed=seed,
        budget=budget,
        teacher=teacher,
    )


def add_order_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of ``order_from_options`` to a command; it receives the order as ``terms``.

    typer reads the options of a command from its signature.
    """
    options = inspect.signature(order_from_options).parameters
    command_parameters = inspect.signature(command).parameters
    others = [parameter for name, parameter in command_parameters.items() if name != "terms"]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        terms = order_from_options(**{name: values.pop(name) for name in options})
        command(terms=terms, **values)

    parameters = [*options.values(), *others]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {item.name: item.annotation for item in parameters}
    return run


def build_terms(
    model: str,
    preset: str,
    limits: list[str],
    targets: list[str] | None,
    optional: list[str],
    promote: bool,
    seed: int,
    budget: float | None = None,
    teacher: list[str] | None = None,
) -> "Terms":
    """Build an order from the values of the options of ``order_from_options``.

    Args:
        model: name@version, name or artifact URI of a bundle in the store.
        preset: name of the preset.
        limits: limits as text, such as ``auc vs baseline >= -0.002``.
        targets: names of required targets, in addition to the default target.
        optional: names of optional targets.
        promote: whether an accepted result becomes champion.
        seed: seed of all random numbers.
        budget: largest loss of the metric on validation rows; None for the preset's default.
        teacher: references to additional teachers.

    Raises:
        CommandRefused: a limit or a target is invalid, or there is no limit.
    """
    from pydantic import ValidationError

    from compressors.contracts import TARGETS, Limit, default_target
    from compressors.contracts.value_errors import SENTENCES
    from flows.terms import Terms
    from infra.errors import CommandRefused

    if not limits:
        raise CommandRefused("limit_missing")
    try:
        parsed = tuple(Limit.parse(text) for text in limits)
    except ValidationError as fault:
        # pydantic's messages lack the invalid value; the project's (``SENTENCES``) are complete.
        reasons = "; ".join(
            error["msg"]
            + (f" (found {error['input']!r})" if error["type"] not in SENTENCES else "")
            for error in fault.errors()
        )
        raise CommandRefused("limit_invalid", problem=reasons) from fault
    except ValueError as fault:
        raise CommandRefused("limit_unreadable", problem=str(fault)) from fault
    # Reports compare the bytes of the default target's files, so it is always ordered.
    names = [default_target().name, *(targets or []), *optional]
    requirements = {
        TARGETS[require_target(name)].field: "optional" if name in optional else "required"
        for name in names
    }
    return Terms.model_validate(
        {
            "model": model,
            "preset": preset,
            "limits": parsed,
            "targets": requirements,
            "promote": promote,
            "seed": seed,
            "budget": budget,
            "teachers": teacher or (),
        }
    )


def print_limit_warnings(terms: "Terms") -> None:
    """Print warnings about limits that are valid but rarely intended to standard error."""
    from compressors.contracts import limit_warnings
    from flows.cli.console import print_progress

    for warning in limit_warnings(terms.limits):
        print_progress(f"warning: {warning}")


def require_target(name: str) -> str:
    """Return the name of a target, unchanged, if the target exists.

    Raises:
        CommandRefused: there is no such target; lists those that exist.
    """
    from compressors.contracts import TARGETS
    from infra.errors import CommandRefused

    if name not in TARGETS:
        raise CommandRefused("target_unknown", target=name, targets=tuple(TARGETS))
    return name


def read_order(path: Path) -> "Terms":
    """Read the order in a JSON file.

    Raises:
        CommandRefused: the file cannot be read, or does not contain an order.
    """
    from pydantic import ValidationError

    from flows.order import Order
    from flows.order_faults import format_errors
    from infra.bundle.json_limits import check_limits, read_bounded
    from infra.errors import CommandRefused

    try:
        raw = read_bounded(path)
        check_limits(raw)
        text = raw.decode()
    except OSError as fault:
        raise CommandRefused("order_unreadable", path=str(path), problem=fault.strerror) from fault
    except UnicodeDecodeError as fault:
        raise CommandRefused("order_not_utf8", path=str(path), problem=str(fault)) from fault
    except ValueError as fault:
        raise CommandRefused("order_unusable", path=str(path), problem=str(fault)) from fault
    try:
        return Order.model_validate_json(text)
    except ValidationError as fault:
        problems = tuple(format_errors(fault, Order))
        raise CommandRefused("order_invalid", path=str(path), problems=problems) from fault
