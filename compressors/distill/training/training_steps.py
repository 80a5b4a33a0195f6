"""Code that training steps such as ``fine_tune`` and ``distill`` share: everything but the loss."""

from collections.abc import Callable, Collection, Sequence

from torch import nn

from compressors.contracts import Bench
from compressors.contracts.reasons import Reason
from compressors.core.batches import JoinedRows, Rows
from compressors.core.model import Model
from compressors.core.modules.formats import Bag, PackedTable
from compressors.core.steps.decisions import AppliedStep, Decision
from compressors.core.units import Unit, innermost
from compressors.distill.training.settings import Training
from compressors.distill.training.trainable import trainable_tensors
from compressors.distill.training.trainer import Epoch, Loss, train
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import RowsMissing


def choose_trainable(
    model: Model,
    bench: Bench,
    kind: str,
    training: Training,
    *,
    dense: bool = True,
    reasons: tuple[Reason, ...] = (),
) -> dict[str, Decision]:
    """Select the units that training may change; give a reason for each other unit.

    Args:
        model: the network.
        bench: provides the number of training rows for the reasons.
        kind: the kind of the calling step.
        training: settings of the training.
        dense: whether dense layers and all other modules except tables are trained.
        reasons: reasons for trained units; if empty, the reason is the number of training rows.

    Raises:
        NothingToCompress: as ``require_loss``.
    """
    require_loss(bench, kind, training)
    names = trainable_tensors(model.module, tables=training.tables, dense=dense)
    rows = bench.train.rows if bench.train else 0
    units = {unit.name: unit for unit in Unit.of(model.module)}
    trained = {innermost(name, units) for name in names}  # the unit that each tensor belongs to
    decisions = {}
    for unit in units.values():
        if unit.name in trained:
            rows_read = Reason("trained_on_rows", step=kind, rows=rows)
            decisions[unit.name] = Decision("taken", reasons or (rows_read,))
        elif unit.shared_with is not None:
            decisions[unit.name] = Decision(
                "skipped", (Reason("shares_weight", unit=unit.shared_with),)
            )
        elif unit.role == "table" and not training.tables:
            decisions[unit.name] = Decision("skipped", (Reason("tables_not_trained", step=kind),))
        elif unit.role == "dense" and not dense:
            decisions[unit.name] = Decision("skipped", (Reason("dense_not_trained", step=kind),))
        else:
            decisions[unit.name] = Decision("skipped", (nothing_to_train(unit, kind),))
    return decisions


def require_loss(bench: Bench, kind: str, training: Training) -> None:
    """Raise if the task has no training loss, or none with these settings.

    Raises:
        NothingToCompress: a task kind of the signature's outputs has no loss, or there are
            ``negatives`` and the model has no catalogue.
    """
    task = bench.signature.outputs[0].kind
    if any(output.task_kind.load() is None for output in bench.signature.outputs):
        raise NothingToCompress("training_unavailable", step=kind, task=task)
    if training.negatives and bench.signature.scores_rows:
        raise NothingToCompress(
            "negatives_without_catalogue", step=kind, task=task, negatives=training.negatives
        )


def nothing_to_train(unit: Unit, kind: str) -> Reason:
    """Return the reason why a unit has nothing to train, although the settings select it."""
    # A ``Bag`` replaces an EmbeddingBag and contains its table.
    module = unit.module.table if isinstance(unit.module, Bag) else unit.module
    learned = module.storage.learned if isinstance(module, PackedTable) else ()
    if names := [name for name, tensor in module.named_buffers() if name in learned]:
        dtype = str(module.get_buffer(names[0]).dtype).removeprefix("torch.")
        return Reason(
            "trains_float32_only", step=kind, tensor=names[0], format=unit.format, dtype=dtype
        )
    return Reason("nothing_to_train", format=unit.format, step=kind)


def list_pruned_layers(model: Model) -> tuple[str, ...]:
    """Return the names of layers whose zeros must stay zero in training.

    These are the layers that a step with ``keeps_zeros`` compressed, such as the pruning step
    ``magnitude``: it declares that weights that it sets to zero stay zero in later training.
    """
    # Imported here, because the registry imports every method, and some methods import this file.
    from compressors.core.registries import METHODS

    lines = model.plan.lines if model.plan is not None else ()
    return tuple(
        line.module for line in lines if any(METHODS[kind].keeps_zeros for kind in line.steps)
    )


def require_training_rows(bench: Bench) -> None:
    """Raise ``RowsMissing`` if the bench lacks training or validation rows."""
    if bench.train is None or bench.validation is None:
        raise RowsMissing("training_needs_rows")


def train_units(
    model: Model,
    bench: Bench,
    loss: Loss,
    settings: Training,
    units: Collection[Unit],
    selected: Collection[str],
) -> tuple[Reason, ...]:
    """Train some units, and modules outside of units, such as norms.

    Args:
        model: the network, in which modules for training may replace the selected units.
        bench: provides the rows.
        loss: the loss to minimize.
        settings: how the units are trained.
        units: all units of the network before any was replaced.
        selected: the names of the selected ones.

    Returns:
        The result of the training for the plan. The network has the tensors of the best epoch.

    Raises:
        RowsMissing: the bench lacks training or validation rows.
        TrainingFailed: training diverged, or nothing can be trained.
    """
    names = _list_tensors_of_units(model.module, units, selected)
    return _train_on_bench(model, bench, loss, settings, list_pruned_layers(model), names)


def _list_tensors_of_units(
    module: nn.Module, units: Collection[Unit], selected: Collection[str]
) -> tuple[str, ...]:
    """Return the names of the tensors of the selected units, and of modules outside of units.

    A composed table is built from smaller tables, which are its units. Its other tensors belong to
    no unit, but they are not returned, because they belong to a table.
    """
    names = {unit.name for unit in units}
    outside_tables = set(trainable_tensors(module, tables=False))
    owners = {name: innermost(name, names) for name in trainable_tensors(module, tables=True)}
    return tuple(
        name
        for name, owner in owners.items()
        if owner in selected or (owner is None and name in outside_tables)
    )


def train_model(
    model: Model,
    bench: Bench,
    loss: Loss,
    settings: Training,
    keep_zeros_in: Collection[str],
    tensor_names: Collection[str] | None = None,
    *,
    rows: Rows | JoinedRows | None = None,
    whole_lists: bool = False,
    auxiliary: nn.Module | None = None,
    after_step: Callable[[float], None] | None = None,
    keep_last_epoch: bool = False,
) -> AppliedStep:
    """Train the model on the rows of a bench and return it with the tensors of its best epoch.

    The decision for every unit that training may change describes the result of the training.
    ``rows`` replaces the bench's training rows; the other arguments are as for ``trainer.train``.

    Raises:
        RowsMissing: the bench lacks rows.
        TrainingFailed: training diverged, or nothing can be trained.
    """
    names = tensor_names
    if names is None:
        names = trainable_tensors(model.module, tables=settings.tables)
    units = {unit.name for unit in Unit.of(model.module)}
    trained = {innermost(name, units) for name in names} - {None}
    reasons = _train_on_bench(
        model,
        bench,
        loss,
        settings,
        keep_zeros_in,
        tensor_names,
        rows=rows,
        whole_lists=whole_lists,
        auxiliary=auxiliary,
        after_step=after_step,
        keep_last_epoch=keep_last_epoch,
    )
    # "deferred": training may change no tensor of a unit, so the code that runs the step compares
    # the tensors afterwards.
    decision = Decision("deferred", reasons)
    return AppliedStep(model, {name: decision for name in trained if name is not None})


def _train_on_bench(
    model: Model,
    bench: Bench,
    loss: Loss,
    settings: Training,
    keep_zeros_in: Collection[str],
    tensor_names: Collection[str] | None,
    *,
    rows: Rows | JoinedRows | None = None,
    whole_lists: bool = False,
    auxiliary: nn.Module | None = None,
    after_step: Callable[[float], None] | None = None,
    keep_last_epoch: bool = False,
) -> tuple[Reason, ...]:
    """Train a network as ``train_model`` does; return the result of the training for the plan."""
    train_rows = rows if rows is not None else bench.train
    if train_rows is None or bench.validation is None:
        raise RowsMissing("training_needs_rows")
    epochs = train(
        model.module,
        bench.signature,
        train_rows,
        bench.validation,
        loss,
        settings,
        items=bench.items,
        seed=bench.seed,
        checkpoints=bench.checkpoints,
        keep_zeros_in=keep_zeros_in,
        tensor_names=tensor_names,
        whole_lists=whole_lists,
        auxiliary=auxiliary,
        device=bench.device,
        after_step=after_step,
        keep_last_epoch=keep_last_epoch,
    )
    return describe_outcome(
        epochs, bench.signature.judged_by, settings, keep_last_epoch=keep_last_epoch
    )


def describe_outcome(
    epochs: Sequence[Epoch], metric: str, settings: Training, *, keep_last_epoch: bool = False
) -> tuple[Reason, ...]:
    """Summarize the result of training for the plan.

    Args:
        epochs: all epochs, starting with the state before training.
        metric: name of the metric by which epochs are compared.
        settings: the settings, with the largest number of epochs.
        keep_last_epoch: whether the result is the last epoch instead of the best one.
    """
    first, *_ = epochs
    # Of several epochs with the best metric, ``max`` returns the earliest.
    best = epochs[-1] if keep_last_epoch else max(epochs, key=lambda epoch: epoch.quality)
    if best.number == 0:
        return (Reason("training_unchanged", epochs=len(epochs) - 1),)
    trained = Reason(
        "trained_to_epoch",
        epoch=best.number,
        metric=metric,
        before=first.quality,
        after=best.quality,
    )
    rising = not keep_last_epoch and best.number == settings.epochs
    return (trained, Reason("still_rising")) if rising else (trained,)
