"""Errors of writing a draft from a trained network.

A draft is the folder of a bundle before it is packed.

``sentences`` of the class maps the code of each error to its message, with the fields in braces
(see ``infra/errors/__init__.py``). ``path`` is the network in the user's module, in the form
``module:name``, an ONNX file in codes that begin with ``onnx``, and a file of a model of
sentence-transformers in codes that begin with ``text_model``.
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
        "library_differs": "Expected a network of {library}, whose classes are in the package "
        "{package}; got {got}. Leave --from out.",
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
        "too_many_labels": "Expected at most one --label for a retrieval model, got {got}.",
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
        "model_sources_conflict": "Expected one of --model MODULE:NAME, --onnx FILE and "
        "--sentence-transformer FOLDER, got {got}. Give one of them; --weights, --config, --method "
        "and the towers belong to --model, --query-text and --item-text to "
        "--sentence-transformer.",
        "item_without_towers": "Expected --item only for a model with two towers, got --item "
        "{got}. Name the towers with --query-tower and --item-tower, or leave --item out.",
        "input_options_refused": "Expected no --input for a model of sentence-transformers, got "
        "--input {got}. Name the columns with --query-text and --item-text.",
        "query_text_unknown": "Expected one column of texts that only the rows have, as the "
        "queries; got {columns}. Give it with --query-text COLUMN.",
        "item_text_unknown": "Expected one column of texts in the catalogue, got {columns}. Give "
        "it with --item-text COLUMN; texts in several columns, such as title and text, must be "
        "joined in the data.",
        "query_id_unknown": "Expected one column of integers that identifies the query, so that "
        "rows with equal integers have equal queries; got {columns}. Give it with --group COLUMN.",
        "grades_unknown": "Expected at most one column of integers from 0 to {highest} as the "
        "relevance of an item, got {columns}. Give it with --label COLUMN.",
        "text_model_unreadable": "Expected JSON in {path}, got {problem}. Save the model again.",
        "text_model_no_modules": "Expected a folder with the modules.json of sentence-transformers "
        "as {folder}, got {got}. Save the model with "
        "SentenceTransformer(...).save_pretrained(FOLDER).",
        "text_model_other_model": "Expected a SentenceTransformer in {folder}, which has a vector "
        "for each text, got {got}. Only models with one dense vector per text are read.",
        "text_model_module_foreign": "Expected modules of sentence-transformers in {path}, got "
        "{got}. Write the network and its bundle by hand (docs/encoders.md).",
        "text_model_module_unknown": "Expected a Transformer as the first module in {path}, got "
        "{got}. Write the network and its bundle by hand (docs/encoders.md).",
        "text_model_file_outside": "Expected files in the folder {folder}, got {got}. Save the "
        "model again.",
        "text_model_tokenizer_missing": "Expected the tokenizer as {path}, got no such file. Load "
        "and save the model with a current version of sentence-transformers, which writes it.",
        "text_model_tokenizer_types": "Expected the token type 0 for all tokens of a text from "
        "{path}, got others. Write the network and its bundle by hand (docs/encoders.md).",
        "text_model_vocabulary": "Expected token ids below {rows}, the vocab_size in config.json, "
        "from {path}, got ids up to {got}. Save the model with the tokenizer it was trained with.",
        "text_model_length": "Expected texts of more than {added} tokens, which {path} adds to "
        "each text, got at most {got}. Raise max_seq_length in sentence_bert_config.json.",
        "text_model_weights_missing": "Expected model.safetensors in {folder}, got no such file. "
        "Save the model again.",
        "text_model_weights_pickled": "Expected model.safetensors in {folder}, got {got}, which is "
        "pickled and is not read. Load the model where you trust it, and save it with "
        "SentenceTransformer(...).save_pretrained(FOLDER), which writes safetensors.",
        "text_model_prompt_unclear": "Expected the prompts query and document in "
        "config_sentence_transformers.json, got the default prompt {name} ({text!r}). Rename it to "
        "query or document, or repeat it as both, and set default_prompt_name to null.",
        "text_model_prompt_excluded": "Expected a pooling over all tokens, got include_prompt "
        "false with prompts. Write the network and its bundle by hand (docs/encoders.md).",
        "state_no_tensor": "Expected only tensors in the network's state_dict(), got a {kind} as "
        "{name}. Store it as an argument of the constructor.",
    }
