"""Problems with the files of a bundle or draft, and with the paths in its ``model.json``.

``SENTENCES`` maps the code of a reason to its sentence, in the syntax of ``str.format``.
``Reason`` in ``reason.py`` fills in the fields in braces.

A draft is a bundle's ``model.json`` and weights before they are packed. Weights may be in several
files, called shards; the index is the JSON file that maps each tensor to its shard. A field
``near`` lists the existing names that are most similar. ``entry`` is the key of ``model.json`` that
contains the path, and ``place`` the index of a value in its tensor.
"""

_HOW_TO_SAVE = (
    'Save the weights with safetensors.torch.save_file(model.state_dict(), "model.safetensors")'
)
_NAMES = "A table is named as the module's attribute path; there is {near}"
_PLACE = "put a safetensors file in its place, or remove it"

SENTENCES = {
    "more_problems": "and more",
    # --- files
    "file_named_like_pickle": f"{{file}} is named like a pickle, which runs when loaded. "
    f"{_HOW_TO_SAVE}",
    "file_is_pickle": f"{{file}} is a pickle despite its name, and runs when loaded. "
    f"{_HOW_TO_SAVE}",
    "file_is_link": "{file} is a symbolic link; put the file itself into the bundle",
    "file_is_folder": "{file} is a folder; a bundle has no subfolders. Remove it",
    "file_is_special": "{file} is not a regular file; remove it",
    "file_of_other_kind": (
        "{file} does not belong to a bundle, which has {manifest}, *.safetensors and {index}. "
        "Remove it; data and vocabularies are stored next to the bundle"
    ),
    "file_missing": "{file} is missing; fetch or pack the bundle again",
    "file_unlisted": "{file} is not listed in {manifest}. Remove it or pack again",
    "file_size_differs": "{file} has {got} bytes, not {expected}; fetch or pack it again",
    "file_hash_differs": "{file} was changed, its hash is wrong: sha256 {got:.12}..., not "
    "{expected:.12}...; fetch or pack it again",
    "weights_are_folder": f"{{file}} is a folder; {_PLACE}",
    "weights_are_broken_link": f"{{file}} is a link to a file that does not exist; {_PLACE}",
    "weights_are_special": f"{{file}} is neither a file nor a folder; {_PLACE}",
    # --- tensors
    "tensor_in_two_shards": "tensor {tensor} is in two shards, {first} and {second}; keep one",
    "weights_not_finite": "tensor {tensor} has {count} NaN or infinite value(s), the first at "
    "{place:[]}. Find where training diverged; such a model cannot be served",
    "tie_not_stored": "network.ties: {alias} shares {target}, which is not stored; there is {near}",
    "tie_stored_too": "network.ties: {alias} is both tied and stored; keep one",
    "table_record_unusable": "input {input}, table {table}: network.modules has a {kind} with rows "
    "{rows}; a table or bag with its number of rows is needed",
    "table_not_stored": f"input {{input}}, table {{table}}: {{weight}} is not stored. {_NAMES}",
    "table_shape": f"input {{input}}, table {{table}}: {{weight}} has shape {{shape:[]}}. {_NAMES}",
    # --- the index of shards
    "index_form": "{index} needs 'weight_map', an object of tensor name -> file name",
    "index_file_outside": "{index} names {file}, which leaves the bundle; shards are in its folder",
    "index_file_missing": "{index} names {file}, which is missing or empty; add that shard",
    "index_tensor_missing": "{index} names tensor {tensor}, which is in no shard",
    "index_tensor_elsewhere": "{index} maps tensor {tensor} to {file}, but it is in {shard}",
    "index_without_tensor": "{index} does not name tensor {tensor} of {shard}; add it",
    # --- paths of a draft
    "draft_path_unreadable": "{entry}: {path} cannot be read ({problem})",
    "draft_path_missing": "{entry}: {path} does not exist (paths are relative to {folder})",
    "draft_path_holds_draft": (
        "{entry}: {path} is a folder that contains the draft itself; name one file, or a folder of"
        " part files and nothing else"
    ),
    "draft_path_outside": "{entry}: {path} leaves the folder by a symbolic link; name its real "
    "path",
    # --- why a path may not be followed
    "path_not_printable": "is empty or has characters that cannot be shown",
    "path_with_backslash": "has a backslash; write paths with /",
    "path_with_parent": "has '..', which leaves the folder",
    "path_with_scheme": "has a scheme or a drive letter; only plain paths are read here",
    "path_too_long": "is longer than a file system allows",
    "path_absolute": "is absolute",
}
