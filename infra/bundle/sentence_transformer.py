"""Read the folder of a model of sentence-transformers, which is not trusted.

The folder has the settings as JSON, the weights as safetensors, and a ``tokenizer.json``. It is
data: no code of the folder runs, and the packages sentence-transformers and transformers are not
needed. Files that a setting names must be in the folder.

recpress uses such a model for retrieval: a query tower encodes the texts of queries, and an item
tower the texts of items (documents); both are this model.

A draft is the folder that becomes a bundle when it is packed. ``DraftRefused`` is raised if no
draft can be written.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressors.contracts import is_out_of_memory
from infra.bundle.json_limits import check_limits, read_bounded
from infra.bundle.json_reader import escape_message
from infra.errors import DraftRefused

MODULES, CONFIG, MODEL_SETTINGS = "modules.json", "config.json", "config_sentence_transformers.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
LIBRARY = "sentence_transformers."
SENTENCE_TRANSFORMER = "SentenceTransformer"
"""The class of models with one vector per text, in ``config_sentence_transformers.json``."""

QUERY_PROMPTS, ITEM_PROMPTS = ("query",), ("document", "passage", "corpus")
"""The prompts that ``encode_query`` and ``encode_document`` apply, the preferred name first."""


@dataclass(frozen=True)
class SavedModule:
    """A module of a model.

    Attributes:
        name: the name of its class.
        folder: its folder.
        settings: its settings; empty if it has none.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class SavedSentenceTransformer:
    """A model of sentence-transformers.

    Attributes:
        folder: its folder.
        encoder: the module ``Transformer``.
        modules: the modules after it.
        config: the encoder's ``config.json``, as the package transformers defines it.
        similarity: the name of the function that compares two vectors; None for the default.
        prompts: the text that is put before each text, by tower (``query``, ``item``); may be
            empty.
        longest: the largest number of tokens of a text; None if the tokenizer has no limit.
    """

    folder: Path
    encoder: SavedModule
    modules: tuple[SavedModule, ...]
    config: Mapping[str, Any]
    similarity: str | None
    prompts: Mapping[str, str]
    longest: int | None

    @property
    def converts_to_lower_case(self) -> bool:
        """Whether texts are converted to lower case before the tokenizer reads them."""
        return bool(self.encoder.settings.get("do_lower_case"))

    @property
    def tokenizer(self) -> Path:
        """The file of the tokenizer."""
        return self.encoder.folder / TOKENIZER


def read_sentence_transformer(folder: Path) -> SavedSentenceTransformer:
    """Read the settings of a model, and check that its files are there.

    Raises:
        DraftRefused: the folder has another kind of model, a file is missing or cannot be read, or
            the prompts are ambiguous.
    """
    settings = _read_object(folder / MODEL_SETTINGS)
    _require_model(folder, settings)
    encoder, *others = _read_modules(folder)
    config = _read_object(encoder.folder / CONFIG, is_needed=True)
    tokenizer = _read_object(encoder.folder / TOKENIZER_CONFIG)
    if not (encoder.folder / TOKENIZER).is_file():
        raise DraftRefused("text_model_tokenizer_missing", path=str(encoder.folder / TOKENIZER))
    longest = encoder.settings.get("max_seq_length") or tokenizer.get("model_max_length")
    similarity = settings.get("similarity_fn_name")
    return SavedSentenceTransformer(
        folder=folder,
        encoder=encoder,
        modules=tuple(others),
        config=config,
        similarity=None if similarity is None else str(similarity),
        prompts=_select_prompts(settings, others),
        longest=longest if isinstance(longest, int) and longest > 0 else None,
    )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a module's weights.

    Raises:
        DraftRefused: there are none, or they are pickled.
    """
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if (folder / WEIGHTS_INDEX).is_file():
        index = _read_object(folder / WEIGHTS_INDEX).get("weight_map")
        names = sorted(set(index.values())) if isinstance(index, Mapping) else []
        files = tuple(_resolve_inside(folder, name) for name in names)
        if files and all(file.is_file() for file in files):
            return files
    pickled = [file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind)]
    if pickled:
        raise DraftRefused("text_model_weights_pickled", folder=str(folder), got=pickled[0])
    raise DraftRefused("text_model_weights_missing", folder=str(folder))


def _require_model(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ``DraftRefused`` unless the folder has a model with one vector per text."""
    kind = settings.get("model_type", SENTENCE_TRANSFORMER)
    config = _read_object(folder / CONFIG)
    if "SequenceClassification" in str(config.get("architectures")):  # a score per pair of texts
        kind = "CrossEncoder"
    if kind != SENTENCE_TRANSFORMER:
        raise DraftRefused("text_model_other_model", folder=str(folder), got=str(kind))
    if not (folder / MODULES).is_file():
        got = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ()
        raise DraftRefused(
            "text_model_no_modules", folder=str(folder), got=tuple(got[:10]) or "nothing"
        )


def _read_modules(folder: Path) -> list[SavedModule]:
    """Return the modules of a model; the first one is the encoder.

    Raises:
        DraftRefused: the first one is of another class, or a module is not of the library.
    """
    modules: list[SavedModule] = []
    listed = _read(folder / MODULES)
    for entry in listed if isinstance(listed, list) else []:
        fields = entry if isinstance(entry, Mapping) else {}
        path, kind = (str(fields.get(key, "")) for key in ("path", "type"))
        if not kind.startswith(LIBRARY):
            raise DraftRefused("text_model_module_foreign", path=str(folder / MODULES), got=kind)
        name, place = kind.rpartition(".")[2], _resolve_inside(folder, path)
        if modules:
            settings = _read_object(place / CONFIG)
        else:  # named after a model family, such as sentence_bert_config.json
            files = sorted(place.glob("sentence_*_config.json"))
            settings = _read_object(files[0]) if files else {}
        modules.append(SavedModule(name, place, settings))
    if not modules or modules[0].name != "Transformer":
        got = modules[0].name if modules else "none"
        raise DraftRefused("text_model_module_unknown", path=str(folder / MODULES), got=got)
    task = modules[0].settings.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise DraftRefused("text_model_other_model", folder=str(folder), got=f"a model for {task}")
    return modules


def _select_prompts(settings: Mapping[str, Any], modules: list[SavedModule]) -> dict[str, str]:
    """Return the prompt of each tower, ``query`` and ``item``.

    Raises:
        DraftRefused: the default prompt is that of neither tower, or a pooling module leaves out
            the tokens of prompts.
    """
    prompt_texts = settings.get("prompts")
    texts = {
        str(name): str(text)
        for name, text in (prompt_texts if isinstance(prompt_texts, Mapping) else {}).items()
        if text
    }
    names = {
        tower: next((name for name in candidates if name in texts), None)
        for tower, candidates in (("query", QUERY_PROMPTS), ("item", ITEM_PROMPTS))
    }
    default = settings.get("default_prompt_name")
    if default in texts and default not in names.values():
        raise DraftRefused("text_model_prompt_unclear", name=str(default), text=texts[default])
    prompts = {tower: texts.get(str(name), "") for tower, name in names.items()}
    if any(prompts.values()) and any(
        module.settings.get("include_prompt") is False for module in modules
    ):
        raise DraftRefused("text_model_prompt_excluded")
    return prompts


def _read(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        DraftRefused: the file cannot be read, is too large or is no JSON.
    """
    try:
        raw = read_bounded(path)
        check_limits(raw)
        return json.loads(raw)
    except (OSError, ValueError, RecursionError) as fault:
        if is_out_of_memory(fault):
            raise
        raise DraftRefused(
            "text_model_unreadable", path=str(path), problem=escape_message(fault)
        ) from fault


def _read_object(path: Path, *, is_needed: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is no file and none is needed.

    Raises:
        DraftRefused: as ``_read``, or the value is no object.
    """
    if not is_needed and not path.is_file():
        return {}
    value = _read(path)
    if not isinstance(value, dict):
        problem = f"a {type(value).__name__} in place of an object"
        raise DraftRefused("text_model_unreadable", path=str(path), problem=problem)
    return value


def _resolve_inside(folder: Path, name: object) -> Path:
    """Return the path of a file or folder that a setting names.

    Raises:
        DraftRefused: it is outside of the model's folder.
    """
    path = folder / str(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DraftRefused("text_model_file_outside", folder=str(folder), got=str(name))
    return path
