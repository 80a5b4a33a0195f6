"""The fields of ``model.json``: ``Manifest`` in a bundle, ``Draft`` in a folder not packed yet.

A draft is the folder that becomes a bundle when it is packed.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from compressors.contracts import Artifact, Frozen, Network, Plan, Sha256, Signature
from compressors.contracts.value_errors import value_error
from infra.bundle.paths import DraftPath, FileName, InsidePath

MANIFEST = "model.json"

SplitName = Literal["train", "calibration", "validation", "test", "items", "traffic"]
"""``items`` is the catalogue of a retrieval model; ``traffic``, logged requests without labels."""

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
VERSION = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME)]
Version = Annotated[str, Field(pattern=VERSION)]


class FileRecord(Frozen):
    """SHA-256 and size of one file when ``model.json`` was written."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class DataReference(Frozen):
    """One split of the data: a parquet file, or a folder of parquet files, in an artifact.

    ``file`` is the path of the file or folder in the artifact.
    """

    artifact: Artifact
    file: InsidePath
    rows: int = Field(ge=0)


class Manifest(Frozen):
    """The ``model.json`` of a complete (sealed) bundle.

    ``files`` lists the other files of the bundle by name. ``vocabularies`` and ``transforms`` (from
    raw values to ids) are files or folders that are stored unchanged with the model, by a name that
    the user chose. ``parents`` are the artifacts of the bundles that this one was computed from.
    ``plan`` is the plan by which it was compressed.
    """

    schema_version: Literal[2]
    name: Name
    version: Version
    signature: Signature
    network: Network
    data: dict[SplitName, DataReference]
    vocabularies: dict[InsidePath, Artifact] = Field(default_factory=dict)
    transforms: dict[InsidePath, Artifact] = Field(default_factory=dict)
    files: dict[FileName, FileRecord]
    parents: tuple[Artifact, ...] = ()
    plan: Plan | None = None
    notes: tuple[str, ...] = Field(
        (), description="Remarks for people who build the network from its class."
    )

    @field_validator("files")
    @classmethod
    def _refuse_itself(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        if MANIFEST in files:
            raise value_error("manifest_hashes_itself", manifest=MANIFEST)
        return files


class Draft(Frozen):
    """The ``model.json`` that a user writes: it contains paths where a manifest has artifacts.

    A path is absolute or relative to the draft's folder, so ``folder / path`` opens either.
    """

    schema_version: Literal[2]
    name: Name
    version: Version
    signature: Signature
    network: Network
    data: dict[SplitName, DraftPath]
    vocabularies: dict[InsidePath, DraftPath] = Field(default_factory=dict)
    transforms: dict[InsidePath, DraftPath] = Field(default_factory=dict)
