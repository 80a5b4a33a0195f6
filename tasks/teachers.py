"""Models that teach beside the one that is compressed. No Prefect, no torch."""

from pathlib import Path
from typing import Literal

from compressors.contracts import Artifact, Frozen, Schema
from compressors.errors import CompressionError
from infra.architecture import source_digest
from infra.bundle import MANIFEST, manifest_of
from infra.settings import load_settings
from tasks.promotion import version_report
from tasks.stored import store
from tasks.subject import Subject, resolve

REGISTERED = "registry:"


class Teacher(Frozen):
    """A teacher: which bundle it is, the form it answers in, a digest of its class's source."""

    artifact: Artifact
    name: str
    output: Literal["logit", "probability", "score"]
    architecture: str


def find_teachers(references: tuple[str, ...], subject: Subject) -> tuple[Teacher, ...]:
    """The bundles that are meant, of the same signature as the subject's.

    Args:
        references: of each a packed bundle as ``tasks.subject.resolve`` knows it, or
            ``registry:name@version`` for the compressed model of a registered version
            (``registry:name@@champion`` for an alias).
        subject: the model that is to be taught.

    Raises:
        ArtifactMissing, Refused: there is no such bundle or version.
        CompressionError: a teacher takes other inputs, answers in another form, or is named twice.
    """
    if not references:
        return ()
    wanted = _signature(subject.artifact)
    found: dict[str, Teacher] = {subject.artifact.sha256: _teacher(subject.artifact)}
    for reference in references:
        artifact = _resolved(reference)
        if artifact.sha256 in found:
            raise CompressionError(
                f"Teacher {reference!r} is {found[artifact.sha256].name}, which teaches already. "
                f"Name each other model once; the one that is compressed is always among them."
            )
        _need_same(reference, _signature(artifact), wanted)
        found[artifact.sha256] = _teacher(artifact)
    return tuple(found.values())[1:]


def _resolved(reference: str) -> Artifact:
    if not reference.startswith(REGISTERED):
        return resolve(reference)
    name, _, version = reference.removeprefix(REGISTERED).partition("@")
    if not name or not version:
        raise CompressionError(
            f"Teacher {reference!r} is not of the form 'registry:name@version', such as "
            f"'registry:clicks@3' or 'registry:clicks@@champion'."
        )
    _, report = version_report(name, version)
    return report.compressed


def _teacher(artifact: Artifact) -> Teacher:
    manifest = manifest_of(store().file(artifact, MANIFEST), Path(artifact.uri))
    path = manifest.network.architecture.path
    return Teacher(
        artifact=artifact,
        name=f"{manifest.name}@{manifest.version}",
        output=manifest.signature.output,
        architecture=source_digest(path, load_settings().allowed_modules),
    )


def _signature(artifact: Artifact) -> Schema:
    return manifest_of(store().file(artifact, MANIFEST), Path(artifact.uri)).signature


def _need_same(reference: str, found: Schema, wanted: Schema) -> None:
    """Refuse a teacher who could not be asked, or would answer something else."""
    for part in ("task", "inputs", "output"):
        if getattr(found, part) != getattr(wanted, part):
            raise CompressionError(
                f"Teacher {reference!r} has another signature: its {part} differ from those of "
                f"the model that is compressed ({_shown(found, part)} against "
                f"{_shown(wanted, part)}). Teachers must take the same inputs and answer in the "
                f"same form."
            )


def _shown(schema: Schema, part: str) -> str:
    if part == "inputs":
        return ", ".join(f"{item.kind} {item.name}" for item in schema.inputs)
    return repr(getattr(schema, part))
