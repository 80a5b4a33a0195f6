"""Errors of the object store, of its records, and of local disks.

``sentences`` of a class maps the code of each error to its message, with the fields in braces (see
``infra/errors/__init__.py``).

Fields whose names do not explain them:

- ``doing``: a verb such as ``read`` or ``write``. ``problem``: the message of another error.
- ``place`` and ``uri``: the address of an object or artifact in the store.
- ``got`` and ``expected``: the actual and the required value.
- ``known``: the existing bundles. ``by``, ``at``, ``action``, ``reason``: fields of a ledger entry.

The ledger is the list of a model's promotions and rollbacks in the store.

Some messages name a draft: the folder that becomes a bundle when it is packed.
"""

from typing import ClassVar

from infra.errors.base import InfraError, Refused

_DELETE = "Delete it from the store and run the step that creates it again."
_DELETE_FILE = (
    "Delete {key} and the artifact from the store and run the step that creates it again."
)
_FREE_FOLDER = "Name a folder that does not exist or is empty."


class StoreUnavailable(InfraError):
    """The object store, or a disk, failed."""

    sentences: ClassVar = {
        "store_answer_unreadable": "The object store's response for {place} cannot be read. Run "
        "again.",
        "disk_full": "The disk of {path} is full. Free some space, then run again.",
        "disk_failed": "Could not {doing} {path}: {problem}. Check the disk.",
        "file_size_limit": "{path} would become larger than this process or file system allows. "
        "Raise the file-size limit (ulimit -f), or choose another file system, then run again.",
        "open_files_limit": "Could not {doing} {path}: {problem}. Raise the limits of this process "
        "(ulimit -n) or end other processes, then run again.",
        "temporary_folder_missing": "Expected a folder for temporary files, got none ({problem}): "
        "each is missing, full or read-only. Free some space, or set TMPDIR to a folder you may "
        "write.",
    }


class StoreOutage(StoreUnavailable):
    """A remote store did not respond, or responded with a server error."""

    sentences: ClassVar = {
        "store_no_answer": "The object store did not respond for {place} ({problem}). Start it or "
        "check AWS_ENDPOINT_URL, then run again.",
        "store_failed": "The object store responded with {problem} for {place}. Wait a little, "
        "then run again.",
        "create_conflict": "The object store is creating {place} for another request. Wait a "
        "little, then run again.",
    }


class ConcurrentChange(InfraError):
    """Another process changed or deleted data that was being read or written."""

    sentences: ClassVar = {
        "file_changed": "{path} changed while it was being stored; nothing was stored. Let its "
        "writer finish, then store it again.",
        "file_unreadable": "{path} could not be read while it was being stored: {problem}.",
        "cache_changing": "{path} keeps changing. End other programs that write to the cache, then "
        "run again.",
        "ledger_contention": "Other processes appended to the ledger of {model!r} first, "
        "{attempts} times in a row. Try again.",
        "ledger_emptied": "The ledger of {model!r} is empty; it may have been deleted in the "
        "meantime. Run again.",
    }


class StoreRefused(Refused):
    """A key, URI, record or folder does not have the form that the store needs."""

    sentences: ClassVar = {
        "artifact_name_form": "Expected 64 hex digits as an artifact's name, got {got}.",
        "artifact_uri_form": "Expected an artifact's URI, artifacts/<sha256>, got {got}.",
        "key_form": "Expected a plain relative path as a key of the store: {problem}.",
        "key_reserved": "{key!r} is reserved for the store itself. Write records under another "
        "key.",
        "record_too_large": "{key!r} has {size} bytes; a record has at most {most_bytes}.",
        "model_name_no_path": "A model's name must be usable in a path: {problem}.",
        "model_name_characters": "Expected a model's name without '/' and ':', got {got}.",
        "folder_unreadable": "{folder} cannot be read as a folder of files: {problem} ({file}).",
        "folder_empty": "{folder} contains no file, so there is nothing to store.",
        "file_name_form": "{folder}: {problem}. Rename the file.",
        "file_is_link": "{path} is a symlink, and its target may change or be anywhere. Replace it "
        "by a copy of the file.",
        "file_of_other_kind": "{path} is neither a file nor a folder. Remove it.",
        "output_in_use": "Another process is writing {folder}. Wait for it, or name another "
        "folder.",
        "output_no_folder": f"{{path}} is not a folder. {_FREE_FOLDER}",
        "output_not_empty": f"{{folder}} is not empty. {_FREE_FOLDER}",
    }


class RecordRefused(Refused):
    """A stored record is damaged, or does not belong to its key."""

    sentences: ClassVar = {
        "record_damaged": "{place} is damaged: {problem}.",
        "record_of_other_order": "{place} is the record of another order.",
        "record_too_large": "{place} is larger than {most_bytes} bytes, so it is not a record. "
        "Move it away.",
        "record_no_plain_file": "{place} is not a plain file. Move it away.",
        "bundle_record_damaged": "The record of bundle {name}@{version}, {place}, is damaged: "
        "{problem}. Pack the draft of this version again: 'recpress bundle pack FOLDER' restores "
        "the record.",
        "report_unusable": "{release} has no usable {file} ({problem}), so it is not a release of "
        "recpress.",
        "document_unusable": "{path} cannot be used: {problem}.",
    }


class ArtifactMissing(Refused):
    """Something that was expected in the store or the registry does not exist."""

    sentences: ClassVar = {
        "artifact_missing": "{uri} has no manifest, so it does not exist (an interrupted upload "
        "leaves none). Run the step that creates it again.",
        "artifact_in_other_store": "{uri} is in another store, and {store} does not contain it. "
        "Set RECPRESS_STORE to the store that contains it.",
        "artifact_file_missing": "{uri} has no file {path!r}.",
        "artifact_file_large": "File {path!r} of {uri} is too large to read at once.",
        "file_missing": "{path} does not exist. Run the step that writes it again.",
        "release_missing": "{uri} does not exist.",
        "result_incomplete": "{folder} has no {file}, so it is not a complete result. Create it "
        "again.",
        "result_unusable": "{place} cannot be used.",
        "order_not_in_registry": "Order {order:.12} is not in the registry.",
        "order_no_longer_in_registry": "Order {order:.12} is no longer in the registry.",
        "target_missing": "{model} version {version} has no {target}; it has {targets}.",
        "bundle_not_packed": "{folder} is a folder, not a packed bundle. Pack it first: 'recpress "
        "bundle pack {folder}', then name it by name@version.",
        "bundle_missing": "There is no bundle {reference!r} in {store}; there is {known}. Pack "
        "one: 'recpress bundle pack FOLDER'.",
        "bundle_artifact_missing": "{name}@{version} is {uri}, which does not exist. It may have "
        "been deleted. Pack the draft of this version again: 'recpress bundle pack FOLDER' "
        "restores it.",
    }


class ArtifactDamaged(Refused):
    """Stored bytes differ from the bytes that were written."""

    sentences: ClassVar = {
        "chunk_differs": "{uri} is damaged: {file}, chunk {chunk} (bytes {start} to {stop}) is not "
        f"what was written. {_DELETE_FILE}",
        "file_absent": f"{{uri}} is damaged: {{file}} is missing. {_DELETE_FILE}",
        "file_size_differs": "{uri} is damaged: {file} has {got} bytes instead of {expected}. "
        f"{_DELETE_FILE}",
        "file_unexpected": f"{{uri}} is damaged: {{file}} does not belong to it. {_DELETE}",
        "manifest_unusable": "{uri} is damaged: its manifest cannot be used ({problem}). "
        f"{_DELETE}",
        "manifest_changed": "{uri} is damaged: its manifest was changed, so its digest is not the "
        f"artifact's name. {_DELETE}",
        "artifact_names_differ": "{uri} and sha256 {sha256} name two different artifacts.",
        "artifact_size_differs": "Expected {expected} bytes in {uri}; its manifest says {got}.",
        "report_differs": "The recorded report of order {order:.12} differs from the report in its "
        "release.",
        "ledger_key_unknown": "{place} does not belong in a ledger.",
        "ledger_gap": "The ledger of {model!r} has a gap: {place} is missing, but later entries "
        "exist. Restore it from a backup of the store.",
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
        # An unfinished result of ``recpress tables quantize``, which is written in blocks.
        "file_overrun": "Bytes {start} to {stop} are outside a file of {size} bytes.",
        "file_incomplete": "The file is not complete: nothing was written at byte {start}.",
        "file_written_twice": "Byte {start} was written twice.",
        "result_manifest_unreadable": "{path} cannot be read as a manifest.",
        "result_damaged": "{folder} is damaged: {file} is not what was written. Create it again.",
    }


class AlreadyThere(Refused):
    """A key that may only be created, and never replaced, exists already."""

    sentences: ClassVar = {
        "key_exists": "{place} exists already; it is never overwritten.",
        "version_packed": "{name}@{version} was packed before with other contents ({sha256:.12}). "
        "A version never changes: raise 'version' in model.json.",
        "version_files_missing": "{name}@{version} was packed before, but its files ({sha256:.12}) "
        "are missing, so they cannot be compared. Restore them, or raise 'version' in model.json.",
        "ledger_shorter": "The ledger of {model!r} has no entry {expected}; it may have been "
        "deleted in the meantime.",
        "ledger_moved_on": "The champion of {model!r} was changed in the meantime: {by} made "
        "version {version} champion at {at} ({action}: {reason}). Check this version, then decide "
        "again.",
    }
