"""An order as the command line gives it: a model with options, or a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

if TYPE_CHECKING:
    from compressors.contracts import TargetKind
    from flows.terms import Terms

Model = Annotated[
    str | None, typer.Argument(help="A packed bundle: name@version, name, or artifact URI.")
]
Preset = Annotated[str, typer.Option(help="safe, fast, small or smallest.")]
Budget = Annotated[
    float | None,
    typer.Option(
        help="What the recipe may lose of the metric on validation rows. Without it 0.001 for the "
        "cuts of small and smallest."
    ),
]
Limits = Annotated[
    list[str] | None,
    typer.Option(help="What must hold, such as 'auc vs baseline >= -0.002'. Repeatable."),
]
Target = Annotated[
    list[str] | None,
    typer.Option(help="Required beside onnxruntime: tensorrt-rtx or tensorrt. Repeatable."),
]
Optionals = Annotated[
    list[str] | None, typer.Option(help="Optional target, left out if it cannot be built.")
]
File = Annotated[
    Path | None, typer.Option(help="A whole order as a JSON file, instead of the options.")
]
Promote = Annotated[bool, typer.Option(help="Make an accepted result champion.")]
Teachers = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher",
        help="A model that teaches beside the original: name@version, artifact URI, or "
        "registry:name@version. Repeatable.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn.")]


def wanted(
    model: str | None,
    preset: str,
    limit: list[str] | None,
    target: list[str] | None,
    optional: list[str] | None,
    order: Path | None,
    promote: bool,
    seed: int,
    budget: float | None,
    teacher: list[str] | None = None,
) -> "Terms":
    """The order that the options or the file give.

    Raises:
        Refused: both or neither are given, or what is given is not an order.
    """
    from infra.errors import Refused

    if order is not None:
        options = (limit, target, optional, promote, seed, preset != "safe", budget is not None)
        if model is not None or teacher or any(options):
            raise Refused("Give either --order FILE or a model with options, not both.")
        return read_order(order)
    if model is None:
        raise Refused("Name a model: recpress compress NAME --limit 'auc vs baseline >= -0.002'.")
    some = optional or []
    return terms(model, preset, limit or [], target, some, promote, seed, budget, teacher)


def terms(
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
    """The order that options give.

    Raises:
        Refused: a limit or a target is not one, or there is no limit.
    """
    from pydantic import ValidationError

    from compressors.contracts import Limit, TargetKind
    from flows.terms import Terms
    from infra.errors import Refused

    if not limits:
        raise Refused(
            "An order needs at least one limit, or nothing would be judged: --limit 'auc vs "
            "baseline >= -0.002'."
        )
    try:
        parsed = tuple(Limit.parse(text) for text in limits)
    except ValidationError as fault:
        reasons = "; ".join(
            error["msg"].removeprefix("Value error, ")
            + (f" (found {error['input']!r})" if error["type"] != "value_error" else "")
            for error in fault.errors()
        )
        raise Refused(f"--limit: {reasons}") from fault
    except ValueError as fault:
        raise Refused(str(fault)) from fault
    # The quality of a result is measured in ONNX Runtime, so it is always among the targets.
    names = [target_named(name) for name in ["onnxruntime", *(targets or []), *optional]]
    wanted = dict.fromkeys((name.replace("-", "_") for name in get_args(TargetKind)), "off")
    wanted.update({name.replace("-", "_"): "optional" for name in optional})
    wanted.update({name.replace("-", "_"): "required" for name in names if name not in optional})
    return Terms.model_validate(
        {
            "model": model,
            "preset": preset,
            "limits": parsed,
            "targets": wanted,
            "promote": promote,
            "seed": seed,
            "budget": budget,
            "teachers": teacher or (),
        }
    )


def warn(terms: "Terms") -> None:
    """Print what in an order is allowed and rarely meant, on standard error."""
    from compressors.contracts import limit_warnings
    from flows.cli.console import say

    for warning in limit_warnings(terms.limits):
        say(f"warning: {warning}")


def target_named(name: str) -> "TargetKind":
    """A target's name, checked; ``"RTX"`` is refused with those there are."""
    from compressors.contracts import TargetKind
    from infra.errors import Refused

    for known in get_args(TargetKind):
        if name == known:
            return known  # type: ignore[no-any-return]  # get_args forgets the literal's type
    raise Refused(f"Target {name!r} is not among {', '.join(get_args(TargetKind))}.")


def read_order(path: Path) -> "Terms":
    """The order in a JSON file.

    Raises:
        Refused: the file cannot be read, or holds no order.
    """
    from pydantic import ValidationError

    from flows.order import Order
    from flows.order_faults import sentences
    from infra.bundle.json_limits import check_limits, read_bounded
    from infra.errors import Refused

    try:
        raw = read_bounded(path)
        check_limits(raw)
        text = raw.decode()
    except OSError as fault:
        raise Refused(f"{path} cannot be read: {fault.strerror}. Name a readable file.") from fault
    except UnicodeDecodeError as fault:
        raise Refused(f"{path} cannot be read as UTF-8 text: {fault}.") from fault
    except ValueError as fault:
        raise Refused(f"{path} is no usable order: {fault}.") from fault
    try:
        return Order.model_validate_json(text)
    except ValidationError as fault:
        told = "\n  ".join(sentences(fault, Order))
        raise Refused(f"{path} holds no order:\n  {told}") from fault
