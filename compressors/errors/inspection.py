"""Errors of inspecting a trained network to describe its inputs and outputs."""

from typing import ClassVar

from compressors.errors.compression import CompressionError


class InspectionFailed(CompressionError):
    """The inputs or outputs of a network cannot be derived from a call with rows of data."""

    sentences: ClassVar = {
        "method_missing": "Expected a method of {architecture}, got {method}. Name the method that "
        "returns the scores of rows.",
        "arguments_unknown": "Expected a column of the data for each argument of {architecture}"
        ".{method}, got no column for {names}. The columns are {columns}. Name those that fill "
        "each argument, such as --input {first}=COLUMN, or {first}=COLUMN,COLUMN for several. "
        "For lengths, masks or positions of lists, write --input {first}=lengths(LISTS), "
        "mask(LISTS) or positions(LISTS), where LISTS is the argument with the lists. An argument "
        "with their offsets must be called LISTS_offsets. If another method returns the scores, "
        "name it with --method.",
        "inputs_unknown": "Expected arguments of {architecture}.{method} in --input, got {names}. "
        "Its arguments are {arguments}.",
        "arguments_variable": "Expected an argument of {architecture}.{method} for each input, "
        "got *{name}. Wrap the network in a class whose {method} names its inputs.",
        "columns_missing": "Expected columns of the data in --input {name}, got {missing}. The "
        "columns are {columns}.",
        "network_fails": "{architecture} fails on {rows} rows of the data: {problem}. Its inputs "
        "were {inputs}. If a column fills another argument, name it with --input.",
        "list_computed": "Expected the ids of the lists in column {column} as rows of a table; the "
        "network computes the rows in another way. Do this in the data.",
        "list_unused": "Expected the lists in column {column} in a table, or lists of one length "
        "as numbers; got lists of {shortest} to {longest} values that no table reads. Pad them in "
        "the data, or leave the argument out.",
        "float_ids": "Expected integers in column {column}, because the network looks its values "
        "up in a table; got floats. Store the column as int64.",
        "offsets_differ": "Expected one offset for all tables that column {column} is looked up "
        "in, got {offsets}. Use one table, or two columns.",
        "values_not_finite": "Expected finite numbers in column {column}, got NaN or infinity in "
        "the sampled rows. Replace them in the data.",
        "outputs_not_finite": "Expected finite outputs of {architecture}, got NaN or infinity for "
        "{count} of {rows} sampled rows. Check what the network does with empty lists.",
        "padding_matters": "Expected a network that ignores padding, because the lists of column "
        "{column} have {shortest} to {longest} ids; got other outputs with more padding "
        "({padding_id}) on the right, and on the left. Pad the lists in the data to one length, as "
        "in training, or let the network mask {padding_id}.",
        "tower_missing": "Expected a submodule or a method of {architecture} as a tower, got "
        "{path}. Its submodules are {names}.",
        "tower_vectors": "Expected a tower that returns one vector per row, (rows, dim), got {got} "
        "from {path}.",
        "tower_calls_differ": "Expected two towers that are called in the same way, got {forms}. "
        "Wrap one of them in a class with the form of the other.",
        "outputs_unknown": "Expected one number per row from {architecture}, or a tuple or mapping "
        "of them; got {got}.",
        "labels_count": "Expected a label for each of the {expected} outputs of {architecture}, "
        "got {got}. Give --label COLUMN for each, in their order.",
        "labels_unnamed": "Expected labels for outputs of {architecture}, which are {names}; got "
        "{got}. Give --label OUTPUT=COLUMN.",
    }
