"""Training a pruned or smaller network to answer as the original does.

Soft labels are what the teacher, the bundle the recipe began with, answers to each training row;
they are computed once, stored, and mixed with the hard labels.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531 (soft targets with a temperature).
Differs: binary for click models, where it is the soft form of their own loss; for ranking the
softmax runs over each list instead of classes.
"""

import copy
import inspect
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.contracts import Bench, Change, Frozen, Part
from compressors.distill.soft_labels import taught_loss
from compressors.errors import CompressionError
from compressors.meta import parameters_on_meta
from compressors.model import Model
from compressors.stand_ins import with_stand_ins
from compressors.trained import choose_trained, pruned_layers, trained_on
from compressors.training import Training
from compressors.units import Choice, Unit, table_rows


class Distill(Frozen):
    """Train dense layers to answer as the original does, mixed with the labels."""

    kind: Literal["distill"] = "distill"
    soft_share: float = Field(
        0.5, gt=0, le=1, description="Weight of the teacher's answers against the labels."
    )
    temperature: float = Field(
        1.0, ge=0.1, le=100, description="Both answers are divided by it before they are compared."
    )
    student: dict[str, Any] | None = Field(
        None,
        description="Keyword arguments of the architecture that differ in a smaller student, such "
        'as {"hidden": [64, 32]}. Without it the network is trained as it stands, for instance '
        "after pruning.",
    )
    training: Training = Field(default_factory=Training, description="How it is trained.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """Rows to learn from, what the teacher answers to them, and rows that say when to stop."""
        return ("train", "validation", "soft_labels")

    @property
    def changes(self) -> Change:
        """Values change, and a student's layers may be smaller or gone."""
        return "values"

    def choose(self, model: Model, bench: Bench) -> dict[str, Choice]:
        """What is trained, and what becomes of each layer in a smaller student."""
        choices = choose_trained(model, bench, self.kind, tables=self.training.tables)
        if self.student is None:
            return choices
        _need_unpacked(model)
        self._need_arguments(model)
        shapes = {unit.name: _shape(unit) for unit in Unit.of(model.module)}
        with parameters_on_meta():
            student = Unit.of(self._built(model))
        smaller = {unit.name: _shape(unit) for unit in student}
        if added := sorted(smaller.keys() - shapes.keys()):
            raise CompressionError(
                f"The student of 'distill' has {added[0]!r}, which the original has not: a student "
                f"has the original's layers or fewer. Name another configuration."
            )
        held = table_rows(model.module)
        for unit in student:
            if unit.role == "table" and unit.rows < held[unit.name]:
                raise CompressionError(
                    f"The student of 'distill' has fewer rows in table {unit.name!r} ({unit.rows}) "
                    f"than the original ({held[unit.name]}): ids would lie outside of it. Leave "
                    f"the tables' rows alone."
                )
        fresh = [u.name for u in student if u.role == "table" and smaller[u.name] != shapes[u.name]]
        if fresh and not self.training.tables:
            raise CompressionError(
                f"The student of 'distill' has a table {fresh[0]!r} of another shape, which would "
                f"stay as it is drawn: tables are not trained. Set 'tables' of its training, or "
                f"leave the tables' shapes alone."
            )
        for name, shape in shapes.items():
            if name not in smaller:
                choices[name] = Choice(True, "distill: not in the student")
            elif smaller[name] != shape:
                words = " -> ".join("x".join(map(str, size)) for size in (shape, smaller[name]))
                choices[name] = Choice(True, f"distill: {words} in the student")
        return choices

    def apply(self, model: Model, bench: Bench) -> Model:
        """Train on soft and hard labels, and leave the network as it was in its best epoch.

        Raises:
            CompressionError: the bench lacks rows, the student cannot be built, or training
                diverged.
        """
        loss = taught_loss(bench, self.soft_share, self.temperature, self.kind)
        if self.student is not None:
            model = self._student(model, bench.seed)
        pruned = pruned_layers(model) if self.student is None else ()
        return trained_on(model, bench, loss, self.training, pruned)

    def outline(self, model: Model, bench: Bench) -> Model:  # noqa: ARG002
        """The student, if it is a smaller one; training changes no shape."""
        if self.student is None:
            return model
        with parameters_on_meta():
            student = self._built(model)
        return self._over(model, with_stand_ins(student))

    def _need_arguments(self, model: Model) -> None:
        """Refuse a word that a class taking any keywords would swallow.

        Raises:
            CompressionError: names it and those there are.
        """
        named = inspect.signature(model.architecture).parameters
        known = {*named, *model.network.architecture.config}
        if unknown := sorted((self.student or {}).keys() - known):
            raise CompressionError(
                f"'distill' cannot build its student: {model.network.architecture.path} has no "
                f"argument {unknown[0]!r}; it has {', '.join(sorted(known))}."
            )

    def _built(self, model: Model) -> nn.Module:
        config = {**copy.deepcopy(model.network.architecture.config), **(self.student or {})}
        try:
            return model.architecture(**config)
        except Exception as fault:
            raise CompressionError(
                f"'distill' cannot build its student: {model.network.architecture.path} with "
                f"{self.student}: {fault}. Give keyword arguments of that class."
            ) from fault

    def _student(self, model: Model, seed: int) -> Model:
        """The smaller network: fresh layers, and the original's tensors where they fit."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            student = self._built(model)
        return self._over(model, student)

    def _over(self, model: Model, student: nn.Module) -> Model:
        """The student with the original's tensors where they fit."""
        own = student.state_dict(keep_vars=True)
        fitting = {
            name: tensor
            for name, tensor in model.module.state_dict(keep_vars=True).items()
            if name in own and tensor.shape == own[name].shape
        }
        student.load_state_dict(fitting, strict=False, assign=True)
        config = {**model.network.architecture.config, **(self.student or {})}
        architecture = model.network.architecture.model_copy(update={"config": config})
        network = model.network.model_copy(update={"architecture": architecture})
        return replace(model, module=student.eval(), network=network)


def _shape(unit: Unit) -> tuple[int, ...]:
    weight = getattr(unit.module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else (unit.rows,)


def _need_unpacked(model: Model) -> None:
    """Refuse to build a student beside packed units.

    Raises:
        CompressionError: one of them is packed.
    """
    packed = [unit.name for unit in Unit.of(model.module) if unit.format != "float32"]
    if packed:
        raise CompressionError(
            f"'distill' into a smaller student must come before quantization; {packed[0]!r} is "
            f"already packed. Move it to the front of the recipe."
        )
