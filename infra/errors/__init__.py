"""What can go wrong at the edges, split by whether a second try can help.

InfraError               something outside did not work this time; a retry may help
├─ StoreUnavailable      the object store, or a disk, failed
│  └─ StoreOutage        a store over the network does not answer: orders wait for it
├─ RegistryUnavailable   the model registry failed
│  └─ RegistryOutage     a registry over the network does not answer: orders wait for it
├─ OutOfMemory           there is not enough memory for what was to be done
└─ ChildFailed           a child process was killed or died (its limit is named)
Refused                  what was given cannot be used; retrying will not help
├─ SettingRefused        a setting is missing or unusable
├─ BundleRefused         a bundle is unsafe, incomplete or does not fit together
├─ DataRefused           data failed its checks or does not fit the signature
├─ FileRefused           a file the user named is missing, unreadable or of the wrong kind
├─ RecordRefused         a stored record is damaged, or is not what its key says
├─ ArtifactMissing       something expected in the store or the registry does not exist
├─ ArtifactDamaged       stored bytes are not the bytes that were written
├─ AlreadyThere          a conditional create lost: the key exists
├─ BuildRefused          an engine could not be built from this graph, or failed its audit
└─ PromotionRefused      a version cannot become champion, or cannot be fetched or served
"""

from typing import ClassVar

from compressors.contracts import CodedError

_DELETE = "Delete it from the store and run the step that makes it again."


class InfraError(Exception):
    """Something outside did not work this time; a retry may help."""


class StoreUnavailable(InfraError):
    """The object store, or a disk, failed."""


class StoreOutage(StoreUnavailable):
    """A store over the network did not answer, or answered with its own failure."""


class RegistryUnavailable(InfraError):
    """The model registry failed."""


class RegistryOutage(RegistryUnavailable):
    """A registry over the network did not answer, or answered with its own failure."""


class OutOfMemory(InfraError):
    """There was not enough memory; with more of it, the same work succeeds."""


class ChildFailed(InfraError):
    """A child process was killed or died."""


class Refused(Exception):
    """What was given cannot be used; retrying will not help."""


class SettingRefused(Refused):
    """A setting is missing or unusable."""


class BundleRefused(Refused):
    """A bundle is unsafe, incomplete or does not fit together."""


class DataRefused(Refused):
    """Data failed its checks or does not fit the signature."""


class FileRefused(Refused):
    """A file the user named is missing, unreadable or of the wrong kind."""


class RecordRefused(CodedError, Refused):
    """A stored record is damaged, or is not what its key says."""

    sentences: ClassVar = {
        "record_damaged": "{place} is damaged: {problem}.",
        "record_of_other_order": "{place} is the record of another order.",
        "record_too_large": "{place} is larger than {most_bytes} bytes, so it is no record. Move "
        "it away.",
        "record_no_plain_file": "{place} is not a plain file. Move it away.",
        "bundle_record_damaged": "The record of bundle {name}@{version}, {place}, is damaged: "
        "{problem}. Pack the draft of this version again: 'recpress bundle pack FOLDER' restores "
        "the record.",
        "report_unusable": "{release} has no usable {file} ({problem}), so it is no release of "
        "recpress.",
        "document_unusable": "{path} cannot be used: {problem}.",
    }


class ArtifactMissing(CodedError, Refused):
    """Something that was expected in the store or the registry does not exist."""

    sentences: ClassVar = {
        "artifact_missing": "{uri} has no manifest, so it does not exist (a put that was cut short "
        "leaves none). Run the step that makes it again.",
        "artifact_in_other_store": "{uri} is in another store, and {store} does not hold the same "
        "content. Set RECPRESS_STORE to the store it was put into.",
        "artifact_file_missing": "{uri} holds no file {path!r}.",
        "artifact_file_large": "{uri} holds no small file {path!r}.",
        "file_missing": "{path} does not exist. Run the step that writes it again.",
        "release_missing": "{uri} does not exist.",
        "result_incomplete": "{folder} has no {file}, so it is no complete result. Make it again.",
        "result_unusable": "{place} cannot be used.",
        "order_not_in_registry": "The registry does not hold order {order:.12}.",
        "order_no_longer_in_registry": "The registry no longer holds order {order:.12}.",
        "target_missing": "{model} version {version} has no {target}; it has {targets}.",
        "bundle_not_packed": "{folder} is a folder, not a packed bundle. Pack it first: 'recpress "
        "bundle pack {folder}', then name it by name@version.",
        "bundle_missing": "There is no bundle {reference!r} in {store}; there is {known}. Pack "
        "one: 'recpress bundle pack FOLDER'.",
        "bundle_artifact_missing": "{name}@{version} is {uri}, which is not there (any more). Pack "
        "it again: 'recpress bundle pack FOLDER' with the draft of this version restores it.",
    }


class ArtifactDamaged(CodedError, Refused):
    """Stored bytes are not the bytes that were written."""

    sentences: ClassVar = {
        "chunk_differs": "{uri} is damaged: {file}, chunk {chunk} (bytes {start} to {stop}) is not "
        f"what was written. {_DELETE}",
        "file_absent": f"{{uri}} is damaged: {{file}} is missing. {_DELETE}",
        "file_size_differs": "{uri} is damaged: {file} has {got} bytes instead of {expected}. "
        f"{_DELETE}",
        "file_unexpected": f"{{uri}} is damaged: {{file}} does not belong to it. {_DELETE}",
        "manifest_unusable": "{uri} is damaged: its manifest cannot be used ({problem}). "
        f"{_DELETE}",
        "manifest_changed": "{uri} is damaged: its manifest was changed: the root over it is "
        f"another. {_DELETE}",
        "artifact_names_differ": "{uri} and sha256 {sha256} name two different artifacts.",
        "artifact_size_differs": "Expected {expected} bytes in {uri}; its manifest says {got}.",
        "report_differs": "The recorded report of order {order:.12} is not that of its release.",
        "ledger_key_unknown": "{place} does not belong in a ledger.",
        "ledger_gap": "The ledger of {model!r} has a gap: {place} is missing, later entries are "
        "there. Restore it from a backup of the store.",
        "ledger_entry_unreadable": "{place} is not an entry of a ledger. Restore it from a backup "
        "of the store.",
        "ledger_entry_out_of_order": "{place} does not continue the entry before it: expected "
        "entry {sequence} of {model!r} after version {previous}, got entry {got_sequence} of "
        "{got_model} after version {got_previous}. Restore it from a backup of the store.",
        "ledger_rollback_unfounded": "{place} rolls back to version {version}, order {order}, "
        "which was not champion before. Restore it from a backup of the store.",
        "ledger_digest_missing": "{place} has no digest, and the entry before it has one. Restore "
        "it from a backup of the store.",
        "ledger_digest_differs": "{changed} was changed: the digest does not match. Restore it "
        "from a backup of the store.",
        "draft_outside_file": "Bytes {start} to {stop} lie outside a file of {size} bytes.",
        "draft_incomplete": "The file is not complete: nothing was written at byte {start}.",
        "draft_written_twice": "Byte {start} was written twice.",
        "result_manifest_unreadable": "{path} cannot be read as a manifest.",
        "result_damaged": "{folder} is damaged: {file} is not what was written. Make it again.",
    }


class AlreadyThere(CodedError, Refused):
    """A conditional create lost: the key exists."""

    sentences: ClassVar = {
        "key_exists": "{place} exists already; it is never overwritten.",
        "version_packed": "{name}@{version} was packed before with other contents ({sha256:.12}). "
        "A version never changes: raise 'version' in model.json.",
        "ledger_shorter": "The ledger of {model!r} has no entry {expected} (any more).",
        "ledger_moved_on": "The ledger of {model!r} moved on: {by} made version {version} champion "
        "at {at} ({action}: {reason}). Look at it, then decide again.",
    }


class BuildRefused(Refused):
    """An engine could not be built from this graph, or failed its audit."""


class PromotionRefused(CodedError, Refused):
    """A version cannot become champion, or cannot be fetched or served."""

    sentences: ClassVar = {
        "champion_missing": "{model} has no champion in the ledger, so there is no @champion. Make "
        "one: 'recpress registry promote {model}', or name a version.",
        "champion_to_serve_missing": "{model} has no champion in the ledger. Make one: 'recpress "
        "registry promote {model}'.",
        "earlier_champion_missing": "{model} has no champion before the current one to go back to; "
        "its ledger has {entries} line(s).",
        "other_champion": "Expected version {expected} to be the champion of {model}, got {got}. "
        "Name the version to roll back from, or leave out --from.",
        "target_unmeasured": "{target} of {model} version {version} is built-unmeasured: it was "
        "built and audited on a machine that could not run it. Measure it where it will serve; to "
        "take it as it is, add --unmeasured.",
        "target_not_accepted": "{target} of {model} version {version} is {outcome}: {reason}. To "
        "take it all the same, add --unaccepted.",
        "not_servable_by_triton": "Triton can serve nothing of {model} version {version}; it has "
        "{targets}. Triton loads accepted ONNX Runtime graphs and TensorRT plans (built but "
        "unmeasured ones with --unmeasured), and never engines of TensorRT-RTX.",
        "other_release": "Expected {model} version {version} to be order {expected:.12} of "
        "{model}, got a release of {got_model}, order {got:.12}: the version was changed, or not "
        "registered by recpress. Choose another version.",
        "order_not_registered": "Order {order:.12} of {model} is not in the registry {registry}. "
        "Set MLFLOW_TRACKING_URI to the registry it was published in, or register the results of "
        "the store again: 'recpress registry restore {model}'.",
        "champion_not_registered": "The ledger names order {order:.12} as champion of {model} "
        "(version {version} when {by} wrote it). This order is not in the registry {registry}. Set "
        "MLFLOW_TRACKING_URI to the registry it was published in, or register the results of the "
        "store again: 'recpress registry restore {model}'.",
        "champions_unusable": "{problems}",
        "alias_elsewhere": "its champion is version {version}, and the alias @{alias} does not "
        "point to it. Run 'recpress registry promote {model} --version {version}'.",
        "limits_missing": "The report of {model} version {version} has no limits, so nothing was "
        "promised. Compress the model again with at least one limit.",
        "verdict_contradicts_judgements": "The report of {model} version {version} contradicts "
        "itself: {problem}. It was changed after it was judged. Compress the model again.",
        "outcome_contradicts_verdicts": "The report of {model} version {version} contradicts "
        "itself: it says {stated}, and its targets' verdicts add up to {computed}. It was changed "
        "after it was judged. Compress the model again.",
        "not_accepted": "{model} version {version} is {outcome} ({reasons}). Only an accepted "
        "version can become champion.",
    }
