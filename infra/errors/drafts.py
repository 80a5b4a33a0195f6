"""Errors of writing a draft, a bundle before it is packed, from a trained network.

``sentences`` of the class maps the code of each error to its message, with the fields in braces
(see ``infra/errors/__init__.py``). ``path`` is the network in the user's module, in the form
``module:name``, or an ONNX file in codes that begin with ``onnx``. A draft is the folder of a
bundle before it is packed.
"""

from typing import ClassVar

from infra.errors.base import Refused


class DraftRefused(Refused):
    """A draft cannot be written from this network and data."""

    sentences: ClassVar = {
        "model_missing": "Expected a network or a function that returns one as {path}, got no such "
        "name. The module has {names}.",
        "model_is_class": "Expected a trained network as {path}, got a class. Give weights with "
        "--weights FILE.safetensors (and its arguments with --config JSON), or name a function "
        "that returns a trained network.",
        "model_function_failed": "Expected a trained network from {path}(), got the error "
        "{problem}. Check that the function works in Python.",
        "model_no_network": "Expected a torch.nn.Module as {path}, got a {kind}. Name a trained "
        "network, or a function that returns one.",
        "model_not_constructed": "Expected a network that is constructed while its module is "
        "imported, or by the function, so that the arguments of {architecture} are known; got one "
        "that was unpickled or copied. Construct it, and load its weights with load_state_dict.",
        "class_not_importable": "Expected a class that can be imported, got {name} of {module}. "
        "Define it at the top level of a module.",
        "argument_not_stored": "Expected numbers, texts, lists, dictionaries, classes, or objects "
        "that are constructed in Python as the arguments of a network; got a {kind} in {place}. "
        "Give, for example, a layer such as torch.nn.ReLU() in place of a function.",
        "read_not_stored": "Expected numbers, texts, lists, dictionaries or classes wherever the "
        "constructor of the network reads from its arguments; got a {kind} from {place}, and "
        "without it the error {problem}. Let the constructor read plain values only.",
        "weights_unfit": "The weights in {path} do not fit {architecture}: {problem}",
        "config_no_json": "Expected a JSON object as --config, got {problem}.",
        "folder_not_empty": "Expected a new or empty folder for the draft, got {folder}, which has "
        "files. Name another folder.",
        "data_missing": "Expected train.parquet and test.parquet (or folders train and test with "
        "parquet files) in {folder}, got {got}.",
        "data_without_rows": "Expected rows of data in {path}, got none.",
        "towers_incomplete": "Expected --query-tower and --item-tower, got only one of them. Name "
        "the submodule or method of each tower.",
        "group_missing": "Expected a column that identifies the query of a row, such as the user. "
        "Give it with --group COLUMN; the columns are {columns}.",
        "item_unknown": "Expected one column of integers that is in the rows and in the catalogue, "
        "as the item's id; got {columns}. Give it with --item COLUMN.",
        "labels_of_towers": "Expected at most one --label for a retrieval model, got {got}.",
        "catalogue_missing": "Expected the catalogue of all items as items.parquet (or a folder "
        "items) in {folder}, because the model has towers.",
        "name_form": "Expected at most 64 letters, digits and . _ - as {option}, the first one a "
        "letter or digit, and the name in lower case; got {got!r}.",
        "output_name_form": "Expected a name of letters, digits and _ for the output, got {got!r}. "
        "Give it with --label NAME=COLUMN.",
        "label_missing": "Expected a column with the labels. Give it with --label COLUMN; the "
        "columns are {columns}.",
        "column_missing": "Expected a column of the data as {option}, got {column}. The columns "
        "are {columns}.",
        "rebuilt_differs": "Expected the scores of {path} from a network that is built from the "
        "draft, got {problem}. The class {architecture} depends on more than its arguments and "
        "weights, such as a global variable, or an attribute that was set later. Make it an "
        "argument.",
        "onnx_unreadable": "Expected an ONNX model as {path}, got {problem}. Export the model "
        "again.",
        "onnx_too_large": "Expected an ONNX file of at most {most_bytes} bytes as {path}, got "
        "{bytes}. Export the model with external data.",
        "onnx_opset": "Expected the opset {first} to {last} in {path}, got {got}. Export the model "
        "with another opset.",
        "onnx_data_outside": "Expected the external data of {path} in its folder, got {location}. "
        "Copy the file to the folder and export or save the model again.",
        "onnx_data_missing": "Expected {bytes} bytes of the tensor {name} in {location}, got a "
        "file that is missing or too short. Copy the file again.",
        "onnx_and_model": "Expected --onnx FILE or --model MODULE:NAME, got {got}. Give one of "
        "them; --weights, --config, --method and the towers belong to --model.",
        "state_no_tensor": "Expected only tensors in the network's state_dict(), got a {kind} as "
        "{name}. Store it as an argument of the constructor.",
    }
