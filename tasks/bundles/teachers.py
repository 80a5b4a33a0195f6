"""Find the teachers of an order, in addition to the model itself. No Prefect, no torch."""

from pathlib import Path
from typing import Literal

from compressors.contracts import Artifact, Frozen, Signature
from compressors.errors.orders import OrderRefused
from infra.bundle.architecture import source_digest
from infra.bundle.bundle_folder import MANIFEST, Manifest, manifest_of
from infra.settings import load_settings
from tasks.bundles.bundle_ref import BundleRef, resolve
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import version_report

REGISTERED = "registry:"


class Teacher(Frozen):
    """A teacher: its bundle, the form of its output, and a digest of its class's source."""

    artifact: Artifact
    name: str
    output: Literal["logit", "probability", "score"]
    architecture: str


def find_teachers(references: tuple[str, ...], subject: BundleRef) -> tuple[Teacher, ...]:
    """Find the teachers' bundles, which must have the subject's signature.

    Args:
        references: for each teacher a packed bundle as in ``tasks.bundles.bundle_ref.resolve``, or
            ``registry:name@version`` for the compressed model of a registered version
            (``registry:name@@champion`` for an alias).
        subject: the student's bundle.

    Raises:
        ArtifactMissing, RegistryRefused: there is no such bundle or version.
        CompressionError: a teacher has other inputs, another form of output, or is listed twice.
    """
    if not references:
        return ()
    wanted = _signature(subject.artifact)
    found: dict[str, Teacher] = {subject.artifact.sha256: _teacher(subject.artifact)}
    for reference in references:
        artifact = _resolved(reference)
        if artifact.sha256 in found:
            raise OrderRefused(
                "teacher_repeated", reference=reference, name=found[artifact.sha256].name
            )
        _require_same(reference, _signature(artifact), wanted)
        found[artifact.sha256] = _teacher(artifact)
    return tuple(found.values())[1:]


def _resolved(reference: str) -> Artifact:
    if not reference.startswith(REGISTERED):
        return resolve(reference)
    name, _, version = reference.removeprefix(REGISTERED).partition("@")
    if not name or not version:
        raise OrderRefused("teacher_reference_malformed", reference=reference)
    _, report = version_report(name, version)
    return report.compressed


def _teacher(artifact: Artifact) -> Teacher:
    manifest = _manifest(artifact)
    path = manifest.network.architecture.path
    return Teacher(
        artifact=artifact,
        name=f"{manifest.name}@{manifest.version}",
        output=manifest.signature.single_output.form,
        architecture=source_digest(path, load_settings().allowed_modules),
    )


def _signature(artifact: Artifact) -> Signature:
    return _manifest(artifact).signature


def _manifest(artifact: Artifact) -> Manifest:
    return manifest_of(store().file(artifact, MANIFEST), Path(store().uri_of(artifact)))


def _require_same(reference: str, found: Signature, wanted: Signature) -> None:
    """Raise if a teacher has other inputs or another form of output."""
    unlike = difference(found, wanted)
    if unlike is not None:
        raise OrderRefused("teacher_signature_differs", reference=reference, difference=unlike)


def difference(found: Signature, wanted: Signature) -> str | None:
    """Return the first difference between a teacher's inputs and outputs and the expected ones."""
    for output, expected in zip(found.outputs, wanted.outputs, strict=True):
        if output.kind != expected.kind:
            return f"its task is {output.kind!r}, not {expected.kind!r}"
        if output.form != expected.form:
            return f"its output is a {output.form}, not a {expected.form}"
    own, others = ([item.name for item in signature.inputs] for signature in (found, wanted))
    if own != others:
        return f"its inputs are {', '.join(own)}, not {', '.join(others)}"
    for one, other in zip(found.inputs, wanted.inputs, strict=True):
        known = other.model_dump()
        for field, value in one.model_dump().items():
            if field not in known or value != known[field]:
                return f"{field!r} of its input {one.name!r} is {value!r}, not {known.get(field)!r}"
    return None
