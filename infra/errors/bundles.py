"""Errors of bundles, of their data, and of files that a user named.

``sentences`` of a class maps the code of each error to its message, with the fields in braces (see
``infra/errors/__init__.py``). A draft is the folder of a bundle before it is packed; packing seals
it with hashes.

Fields whose names do not explain them:

- ``place``: what the problems refer to, such as a folder. ``problem``: the message of another
  error; in ``metric_unfit``, a clause that ends with an instruction such as "Change 'metric'".
- ``kind``: the type of the wrong value, or the class of the exception.
- ``setting``: the value of RECPRESS_ALLOWED_MODULES that also allows the module. ``top``: the
  top-level package of the module.
- ``entry``: a field of ``model.json``, such as ``data.train``.
- ``cause``: the exit code or the signal that ended the process.
"""

from typing import ClassVar

from infra.errors.base import Refused

# Remedies and clauses that several sentences contain.
_SAVE = (
    'Save the weights with safetensors.torch.save_file(model.state_dict(), "model.safetensors").'
)
_ALLOW = (
    "importing a module runs its code, and only {allowed} may be imported. If you trust {module}, "
    "set RECPRESS_ALLOWED_MODULES={setting}"
)
_GIVE_PARQUET = "Give a parquet file or a folder of them."
_ENDED = "{file} is not a readable parquet file: the process that read it ended with {cause}"


class BundleRefused(Refused):
    """A bundle is unsafe, incomplete or inconsistent."""

    sentences: ClassVar = {
        "unusable": "{place}:{problems:lines}",
        "fields_unusable": "{path}:{problems:lines}",
        "json_missing": "{path} is missing; write it, or fetch the bundle again.",
        "json_no_plain_file": "{path} is not a plain file; put the file itself there.",
        "json_too_large": "{path} is too large: it has {size} bytes, at most {most_bytes} are "
        "allowed.",
        "json_too_deep": "{path} is nested too deep to be read.",
        "json_unusable": "{path} is not usable JSON: {problem}.",
        "json_no_object": "{path} must be one JSON object, not a {kind}.",
        "schema_version_newer": "{path} has schema_version {got}; this recpress knows {known}. "
        "Upgrade recpress.",
        "schema_version_too_old": "{path} has schema_version {got}, but {field} is a field of "
        'version {known}. Write "schema_version": {known}, or use the fields of version {got}.',
        "schema_version_unknown": "{path} has schema_version {got}; this recpress knows {known}. "
        'Write "schema_version": {known}.',
        "already_sealed": "{folder} is already a sealed bundle, not a draft. Check it with "
        "'recpress bundle check {folder}'; to pack it again, start from its draft.",
        "is_draft": "{folder} is a draft. Pack it first: 'recpress bundle pack {folder}'.",
        "seal_differs": "{path} was changed after it was sealed (its last line, a hash, does not "
        "match). Fetch it again, or change the draft and pack it.",
        "settings_not_json": "{folder}: {problem}. Use numbers, texts, lists and dicts with text "
        "keys in the architecture's config and in module settings.",
        "folder_unreadable": "{folder} is not a folder that can be read ({problem}); a bundle is a "
        "folder with model.json and *.safetensors.",
        "tensors_missing": f"{{folder}} holds no tensor in any *.safetensors file. {_SAVE}",
        "index_missing": "{folder} has {shards} *.safetensors files but no {index}; add one, or "
        "save all weights in one file.",
        "dtype_unknown": "{file}: dtype {dtype} is unknown; convert the weights.",
        "shard_ended_early": "{file} became shorter while it was read; fetch it again.",
        "header_too_large": "{file} is not a usable safetensors file: its header of {size} bytes "
        f"is too large; at most {{most_bytes}} are allowed. {_SAVE} Use several files for very "
        "many tensors.",
        "header_ambiguous": "{file}: its header can be read in two ways; save it again.",
        "not_safetensors": "{file} is not a safetensors file ({problem}). If it was copied, copy "
        f"it again. {_SAVE}",
        "architecture_form": "architecture {path!r} must be written 'package.module:Class'; it is "
        "imported by that name and never evaluated.",
        "architecture_name_taken": "architecture {path!r}: {package!r} is also a package of "
        "recpress, and Python imports only one package of a name. Move the class to a module with "
        "another name.",
        "architecture_not_allowed": f"architecture {{path!r}} is not allowed: {_ALLOW}",
        "architecture_defined_elsewhere": "architecture {path!r} is defined in {module}, which is "
        f"not allowed: {_ALLOW}",
        "architecture_module_missing": "architecture {path!r}: there is no module {module} to "
        "import. Put the folder that holds {top} on PYTHONPATH, or install its package.",
        "architecture_dependency_missing": "architecture {path!r}: {module} needs the module "
        "{missing}, which is not installed. Install it where recpress runs.",
        "architecture_import_failed": "architecture {path!r}: importing {module} failed with "
        "{kind}: {problem}. Repair it; 'python -c \"import {module}\"' shows the same.",
        "architecture_class_missing": "architecture {path!r}: {module} has no class {name}; it "
        "has {classes}.",
        "architecture_without_classes": "architecture {path!r}: {module} has no class {name}, "
        "and no other class that could be meant.",
        "architecture_no_class": "architecture {path!r} is a {kind}, not a torch.nn.Module class. "
        "Name the class that builds the network.",
        "architecture_no_module_class": "architecture {path!r} is a class, but not a "
        "torch.nn.Module class. Name the class that builds the network.",
        "architecture_source_missing": "architecture {path!r}: {module} has no source file, so a "
        "change of it could not be detected. Use a module that is stored on disk.",
        "layer_too_large": "Expected layers of at most {most_bytes} bytes in {name}, got a "
        "compressed module that declares {got} bytes. Pack the model again.",
        "split_missing": "{name} {version} has no {split} data; it has {splits}. Add the data to "
        "the draft's model.json and pack it again.",
        "test_data_missing": "{folder} has no test data; without it no result can be judged. "
        "Add 'test' to 'data' in model.json.",
        "training_data_missing": "{folder} has neither train nor calibration data; one of them is "
        "needed to compress the model and to compare it with the original. Add one of them to "
        "'data' in model.json.",
        "metric_unfit": "{name}@{version}: {problem} in the draft's model.json, raise its version "
        "and run 'recpress bundle pack' again.",
        "file_outside_draft": "{entry} names {path!r}, outside {folder}. Copy the file into the "
        "draft's folder; only data may be stored elsewhere.",
    }


class DataRefused(Refused):
    """Data failed its checks or does not fit the signature."""

    sentences: ClassVar = {
        "parquet_missing": f"{{path}} does not exist. {_GIVE_PARQUET}",
        "parquet_of_other_kind": f"{{path}} is neither a file nor a folder. {_GIVE_PARQUET}",
        "parquet_absent": f"{{path}} has no *.parquet file. {_GIVE_PARQUET}",
        "parquet_in_subfolders": "{path} has parquet files in subfolders ({file}). The names of "
        "such folders may be values of a column, which is not supported. Write the part files into "
        "one folder.",
        "part_no_plain_file": "{path} is not a plain file. Put the part file itself there.",
        "not_parquet": "{file} is not a readable parquet file.",
        "unreadable": "{file} is not a readable parquet file: {problem}",
        "reader_ended": f"{_ENDED}. Write the file again.",
        "reader_ended_with_message": f"{_ENDED} ({{message}}). Write the file again.",
        "reader_timed_out": "{file} could not be read within {seconds:.0f} s, the limit for its "
        "size. Write it again, or as several files.",
        "reader_memory": "{file} needs more than {most_mib} MiB of memory to be read, in batches "
        "of few rows, because a page or a value in it is too large. Write it with smaller pages "
        "and values.",
        "too_many_columns": "{file} has {columns} columns with names of {characters} characters, "
        "more than the {most_columns} columns or {most_characters} characters allowed. Write the "
        "columns that the model reads.",
        "footer_rows_differ": "{file} declares {expected} rows in its footer and has {got}. Write "
        "the file again.",
        "expands_too_far": "{file} expands to more than {most_bytes} bytes, the larger of {factor} "
        "times its size and 1 GiB. Write it without repeating one row so often, or as several "
        "files.",
        "file_broken_off": "{file} could not be read to its end: {problem}",
        "file_changed": "{file} changed while it was read: {expected} rows before, {got} now. "
        "Do not change the files of a split until it is packed.",
        "schema_unfit": "{path} does not fit the signature:{problems:list}",
        "shapes_unfit": "The data does not fit the declared shapes:{problems:list}",
        "ids_unfit": "The data does not fit the model's tables:{problems:list}",
        "table_unknown": "input {input!r} reads table {table!r}, which the model does not have; it "
        "has {tables}. Name one of them.",
        "column_too_long": "column {column!r} holds more than 2**31 list elements or characters in "
        "one split. Write it as large_list or large_string, or split the data.",
        "teacher_data_unusable": "Teacher {teacher} cannot read split {split!r} of the model: "
        "{problem} The data must have the columns that the teacher reads, with the teacher's ids.",
        "column_no_probability": "Column {column!r} of split {split!r} is named as probabilities; "
        "{count:,} value(s) are outside [0, 1], first in row {row}: {value:g}. Name another form, "
        "as in 'column:{column}=logit'.",
        "tokenizer_missing": "input {input!r} names the tokenizer {tokenizer!r}, which is not "
        "among 'transforms': {transforms}. Add the file tokenizer.json to 'transforms', or correct "
        "the name.",
        "tokenizer_unreadable": "{path} is not a tokenizer of the library 'tokenizers': {problem}. "
        "Save it with 'tokenizer.save(\"tokenizer.json\")'.",
        "tokenizer_fails": "input {input!r}: the tokenizer fails on {text}: {problem}. Use the "
        "tokenizer that the model was trained with; it needs a token for unknown words.",
        "tokenizer_length": "input {input!r}: tokenizer {tokenizer!r} gives {got} token(s) for an "
        "empty text; the input needs at least {shortest}, and room for a token of the text within "
        "{longest}. Change min_length or shape.",
        "tokenizer_types": "input {input!r}: tokenizer {tokenizer!r} gives one text token types "
        "other than 0, which is not supported. Remove 'token_types', or use another tokenizer.",
        "tokenizers_unfit": "The tokenizers do not fit the model's tables:{problems:list}",
        "checks_missing": "No split was given, so no check was run. Give at least one split.",
        "checks_failed": "The data failed its checks:{problems:list}",
        "catalogue_missing": "{place} has no {split!r} data. Task 'retrieval' ranks the whole "
        "catalogue of items: write the inputs of the item tower as parquet, one row per item, and "
        "add the file to 'data'.",
        "catalogue_unexpected": "{place} has {split!r} data, which only task 'retrieval' reads. "
        "Remove it.",
        "not_measurable": "The model cannot be measured:{problems:list}",
        "split_unusable": "split {split!r}: {problem}",
    }


class FileRefused(Refused):
    """A file the user named is missing, unreadable or of the wrong kind."""

    sentences: ClassVar = {
        "file_missing": "{path} does not exist. Correct the path, or put the file there.",
        "file_forbidden": "{path} may not be used: {problem}. Change its permissions.",
        "path_unusable": "{path} cannot be opened: {problem}. Use a shorter path without links "
        "that form a loop.",
        "file_of_wrong_kind": "{path} is a folder or special file where a file is needed, or the "
        "other way round: {problem}. Replace it by a file or a folder, as needed.",
    }
