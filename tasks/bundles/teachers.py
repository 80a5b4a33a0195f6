"""Find the additional teachers of an order: bundles, or columns of scores in the data.

The student is the model that the order compresses. Its uncompressed version is always a teacher; an
order can name additional ones. A teacher must have the same outputs as the student. Its inputs may
differ, if the student's data has the columns for them. No Prefect, no torch.
"""

import re
from pathlib import Path
from typing import get_args

from compressors.contracts import Artifact, Frozen, Signature, digest
from compressors.contracts.task_kind import OutputForm
from compressors.errors.orders import OrderRefused
from infra.bundle.bundle_folder import MANIFEST, Manifest, parse_manifest
from infra.data.tokenization import tokens_inputs
from tasks.bundles.bundle_ref import BundleRef, architecture_digest, resolve
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import version_report

REGISTERED = "registry:"
"""Prefix of a reference to a version in the model registry instead of a bundle in the store."""
COLUMN = "column:"
"""Prefix of a reference to columns of the student's data with scores, one column per output."""
_FORM = "|".join(get_args(OutputForm))


class Teacher(Frozen):
    """An additional teacher.

    Attributes:
        artifact: its bundle; for columns, the student's training data.
        name: ``name@version``, or the reference to the columns.
        forms: the form of each output's scores: ``logit``, ``probability`` or ``score``.
        architecture: digest of the source of the teacher's model class, a part of cache keys. A
            teacher that consists of columns has no class; the value is then the digest of the
            columns' names and forms.
        columns: the columns with the teacher's scores, one per output; empty for a bundle.
        needs_separate_inputs: whether the teacher's input tensors must be built from the student's
            data and validated separately, because the teacher's signature, a tokenizer, or the
            arguments of its model class, such as the sizes of tables, differ from the student's.
            Otherwise the student's tensors are used.
    """

    artifact: Artifact
    name: str
    forms: tuple[OutputForm, ...]
    architecture: str
    columns: tuple[str, ...] = ()
    needs_separate_inputs: bool = False

    @property
    def reference(self) -> str:
        """A reference with which another order can name this teacher."""
        return self.name if self.columns else self.artifact.uri


def find_teachers(references: tuple[str, ...], bundle: BundleRef) -> tuple[Teacher, ...]:
    """Find teachers, and check that they have the student's outputs.

    Args:
        references: one for each teacher, of one of three kinds:

            - a bundle in the store: ``name@version``, ``name``, or its URI
              (``tasks.bundles.bundle_ref.resolve``);
            - the compressed model of a version in the registry: ``registry:name@version``. An alias
              begins with ``@``, so the champion is ``registry:name@@champion``;
            - scores in columns of the student's data: ``column:NAME=FORM``, or ``column:NAME`` if
              the scores have the form of the student's outputs. For several outputs, ``NAME`` lists
              one column per output, separated by commas, and ``FORM`` applies to all of them.

        bundle: the student's bundle.

    Raises:
        ArtifactMissing, RegistryRefused: there is no such bundle or version.
        OrderRefused: a reference is malformed; a teacher has other outputs, or scores in a form
            that cannot be converted; or a teacher is listed twice, or is the student.
    """
    if not references:
        return ()
    student = _read_manifest(bundle.artifact)
    # The student is listed first, so a reference to it is refused as a repeated teacher.
    teachers = {bundle.artifact.sha256: _read_teacher(bundle.artifact, student)}
    for reference in references:
        if reference.startswith(COLUMN):
            teacher = _parse_columns(reference, student)
            key = teacher.architecture
        else:
            artifact = _resolve_teacher(reference)
            key = artifact.sha256
            if key not in teachers:
                _require_same_outputs(reference, _read_manifest(artifact), student.signature)
            teacher = _read_teacher(artifact, student)
        if key in teachers:
            raise OrderRefused("teacher_repeated", reference=reference, name=teachers[key].name)
        _require_convertible(reference, teacher, student.signature)
        teachers[key] = teacher
    return tuple(teachers.values())[1:]


def _parse_columns(reference: str, student: Manifest) -> Teacher:
    """Return the teacher whose scores are columns of the student's data.

    Raises:
        OrderRefused: the reference is malformed, has another number of names than the student has
            outputs, or the bundle has no training data.
    """
    match = re.fullmatch(rf"{COLUMN}([^=]+)(?:=({_FORM}))?", reference)
    if match is None:
        raise OrderRefused("teacher_column_malformed", reference=reference)
    names = tuple(name.strip() for name in match[1].split(","))
    if not all(names):
        raise OrderRefused("teacher_column_malformed", reference=reference)
    outputs = student.signature.outputs
    if len(names) != len(outputs):
        expected = tuple(output.name for output in outputs)
        raise OrderRefused("teacher_columns_count", reference=reference, outputs=expected)
    forms = tuple(match[2] or output.form for output in outputs)
    if "train" not in student.data:
        raise OrderRefused("teacher_column_without_data", reference=reference)
    return Teacher.model_validate(
        {
            "artifact": student.data["train"].artifact,
            "name": reference,
            "forms": forms,
            "architecture": digest([COLUMN, names, forms]),
            "columns": names,
        }
    )


def _resolve_teacher(reference: str) -> Artifact:
    if not reference.startswith(REGISTERED):
        return resolve(reference)
    name, _, version = reference.removeprefix(REGISTERED).partition("@")
    if not name or not version:
        raise OrderRefused("teacher_reference_malformed", reference=reference)
    _, report = version_report(name, version)
    return report.compressed


def _read_teacher(artifact: Artifact, student: Manifest) -> Teacher:
    manifest = _read_manifest(artifact)
    architecture = manifest.network.architecture
    return Teacher(
        artifact=artifact,
        name=f"{manifest.name}@{manifest.version}",
        forms=tuple(output.form for output in manifest.signature.outputs),
        architecture=architecture_digest(architecture),
        needs_separate_inputs=manifest.signature.inputs != student.signature.inputs
        or architecture != student.network.architecture
        or _find_tokenizers(manifest) != _find_tokenizers(student),
    )


def _find_tokenizers(manifest: Manifest) -> dict[str, Artifact | None]:
    """Return the tokenizer of each input that reads texts, by the input's name."""
    transforms = manifest.transforms
    return {item.name: transforms.get(item.tokenizer) for item in tokens_inputs(manifest.signature)}


def _read_manifest(artifact: Artifact) -> Manifest:
    return parse_manifest(store().file(artifact, MANIFEST), Path(store().uri_of(artifact)))


def _require_same_outputs(reference: str, teacher: Manifest, student: Signature) -> None:
    """Raise if a teacher has other outputs than the student."""
    difference = output_difference(teacher.signature, student)
    if difference is not None:
        raise OrderRefused("teacher_outputs_differ", reference=reference, difference=difference)


def output_difference(teacher: Signature, student: Signature) -> str | None:
    """Describe the first difference of a teacher's outputs from the student's; None if equal."""
    if len(teacher.outputs) != len(student.outputs):
        return f"it has {len(teacher.outputs)} outputs, not {len(student.outputs)}"
    outputs, expected_outputs = (
        [output.name for output in signature.outputs] for signature in (teacher, student)
    )
    if student.has_several_outputs and outputs != expected_outputs:
        return f"its outputs are {', '.join(outputs)}, not {', '.join(expected_outputs)}"
    for output, expected in zip(teacher.outputs, student.outputs, strict=True):
        if output.kind != expected.kind:
            return f"its task is {output.kind!r}, not {expected.kind!r}"
    return None


def _require_convertible(reference: str, teacher: Teacher, student: Signature) -> None:
    """Raise if scores of a teacher cannot be converted to the form of the student's.

    Logits and probabilities can be converted to each other; other scores cannot be converted.
    """
    for form, output in zip(teacher.forms, student.outputs, strict=True):
        if form != output.form and "score" in (form, output.form):
            raise OrderRefused(
                "teacher_form_differs", reference=reference, form=form, expected=output.form
            )
