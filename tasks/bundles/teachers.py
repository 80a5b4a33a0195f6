"""Find the bundles of an order's additional teachers. No Prefect, no torch.

The student is the model that the order compresses. Its uncompressed version is always a teacher; an
order can name further models.
"""

from pathlib import Path

from compressors.contracts import Artifact, Frozen, Signature
from compressors.contracts.task_kind import OutputForm
from compressors.errors.orders import OrderRefused
from infra.bundle.architecture import source_digest
from infra.bundle.bundle_folder import MANIFEST, Manifest, parse_manifest
from infra.settings import load_settings
from tasks.bundles.bundle_ref import BundleRef, resolve
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import version_report

REGISTERED = "registry:"
"""Prefix of a reference to a registered version instead of a packed bundle."""


class Teacher(Frozen):
    """A teacher: its bundle, the form of each output, and a digest of its class's source."""

    artifact: Artifact
    name: str
    forms: tuple[OutputForm, ...]
    architecture: str


def find_teachers(references: tuple[str, ...], bundle: BundleRef) -> tuple[Teacher, ...]:
    """Find the bundles of teachers, and check that they have the student's inputs and outputs.

    Args:
        references: one for each teacher: ``name@version`` or ``name`` of a packed bundle, or its
            URI (``tasks.bundles.bundle_ref.resolve``); or ``registry:name@version`` for the
            compressed model of a registered version. An alias begins with ``@``, so the reference
            to a champion is ``registry:name@@champion``.
        bundle: the student's bundle.

    Raises:
        ArtifactMissing, RegistryRefused: there is no such bundle or version.
        OrderRefused: a teacher has other inputs, another form of output, or is listed twice.
    """
    if not references:
        return ()
    expected = _read_signature(bundle.artifact)
    # Starts with the student, so that it is refused as its own teacher.
    teachers: dict[str, Teacher] = {bundle.artifact.sha256: _read_teacher(bundle.artifact)}
    for reference in references:
        artifact = _resolve_teacher(reference)
        if artifact.sha256 in teachers:
            raise OrderRefused(
                "teacher_repeated", reference=reference, name=teachers[artifact.sha256].name
            )
        _require_same_signature(reference, _read_signature(artifact), expected)
        teachers[artifact.sha256] = _read_teacher(artifact)
    return tuple(teachers.values())[1:]


def _resolve_teacher(reference: str) -> Artifact:
    if not reference.startswith(REGISTERED):
        return resolve(reference)
    name, _, version = reference.removeprefix(REGISTERED).partition("@")
    if not name or not version:
        raise OrderRefused("teacher_reference_malformed", reference=reference)
    _, report = version_report(name, version)
    return report.compressed


def _read_teacher(artifact: Artifact) -> Teacher:
    manifest = _read_manifest(artifact)
    path = manifest.network.architecture.path
    return Teacher(
        artifact=artifact,
        name=f"{manifest.name}@{manifest.version}",
        forms=tuple(output.form for output in manifest.signature.outputs),
        architecture=source_digest(path, load_settings().allowed_modules),
    )


def _read_signature(artifact: Artifact) -> Signature:
    return _read_manifest(artifact).signature


def _read_manifest(artifact: Artifact) -> Manifest:
    return parse_manifest(store().file(artifact, MANIFEST), Path(store().uri_of(artifact)))


def _require_same_signature(reference: str, teacher: Signature, student: Signature) -> None:
    """Raise if a teacher has other inputs or another form of output than the student."""
    difference = first_difference(teacher, student)
    if difference is not None:
        raise OrderRefused("teacher_signature_differs", reference=reference, difference=difference)


def first_difference(teacher: Signature, student: Signature) -> str | None:
    """Describe the first difference of a teacher's inputs and outputs from the student's."""
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
        if output.form != expected.form:
            return f"its output is a {output.form}, not a {expected.form}"
    names, expected_names = (
        [item.name for item in signature.inputs] for signature in (teacher, student)
    )
    if names != expected_names:
        return f"its inputs are {', '.join(names)}, not {', '.join(expected_names)}"
    for item, expected_item in zip(teacher.inputs, student.inputs, strict=True):
        expected_fields = expected_item.model_dump()
        for field, value in item.model_dump().items():
            if field not in expected_fields or value != expected_fields[field]:
                return (
                    f"{field!r} of its input {item.name!r} is {value!r}, "
                    f"not {expected_fields.get(field)!r}"
                )
    return None
