"""Read a trained text encoder from a folder of sentence-transformers.

A text model has two towers, for queries and for items, that share one network. Their tokenizers
differ if the model has *prompts*: a prompt is a fixed text, such as "query: ", that is prepended to
each text of a tower.

``DraftRefused`` is raised if no draft can be written. A draft is the folder that is packed into a
bundle.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase, Normalizer, Prepend, Sequence
from torch import Tensor

from compressors.contracts import TEXT_RETRIEVER, Architecture, is_out_of_memory
from compressors.text_encoder.families import encoder_arguments, encoder_weights
from compressors.text_encoder.network import TextRetriever
from compressors.text_encoder.pooling import (
    DENSE,
    NORMALIZE,
    pooling_arguments,
    projection_weights,
)
from infra.bundle.sentence_transformer import (
    SavedSentenceTransformer,
    read_sentence_transformer,
    weight_files,
)
from infra.data.tokenization import (
    UNKNOWN_TEXT,
    TokenizerFault,
    read_tokenizer,
    tokenizer_faults,
)
from infra.errors import DataRefused, DraftRefused
from infra.memory import require_memory

MEMORY_FACTOR = 2
"""Bytes of memory per byte of a weight file: its tensors, and float32 copies of other dtypes."""

SHARED_TOKENIZER = "tokenizer.json"
"""File of the tokenizer if both towers use the same one."""

TOWER_TOKENIZERS = MappingProxyType(
    {"query": "query.tokenizer.json", "item": "item.tokenizer.json"}
)
"""Files of the tokenizers by tower, if there are prompts."""


@dataclass(frozen=True)
class TextModel:
    """A trained text encoder.

    Attributes:
        network: the network, in evaluation mode.
        architecture: its class and arguments.
        adds_norm: whether the network normalizes vectors although the saved model has no module
            ``Normalize`` at its end. It does if the model compares vectors by cosine.
        longest: the largest number of tokens of a text; longer texts are truncated.
        padding_id: the id of the padding token.
        prompts: text that the tokenizer prepends to each text, by tower (``query``, ``item``).
        tokenizer_of: file name of the tokenizer by tower.
        tokenizers: the tokenizers by file name.
    """

    network: TextRetriever
    architecture: Architecture
    adds_norm: bool
    longest: int
    padding_id: int
    prompts: dict[str, str]
    tokenizer_of: dict[str, str]
    tokenizers: dict[str, Tokenizer]


def load_text_model(folder: Path) -> TextModel:
    """Read a model of sentence-transformers.

    Raises:
        DraftRefused: the folder is no such model, or is unusable or unsafe.
        TextEncoderRefused: the encoder or another module cannot become a network.
        DataRefused: the tokenizer cannot be read.
        OutOfMemory: there is not enough memory.
    """
    saved = read_sentence_transformer(folder)
    arguments = {
        **encoder_arguments(saved.config),
        **pooling_arguments(
            [(module.name, module.settings) for module in saved.modules], saved.similarity
        ),
    }
    has_prompts = any(saved.prompts.values())
    tokenizer_of = (
        dict(TOWER_TOKENIZERS) if has_prompts else dict.fromkeys(TOWER_TOKENIZERS, SHARED_TOKENIZER)
    )
    longest = min(saved.longest or arguments["longest"], arguments["longest"])
    return TextModel(
        network=_build_network(saved, arguments),
        architecture=Architecture(path=TEXT_RETRIEVER, config=arguments),
        adds_norm=arguments["normalize"] and saved.modules[-1].name != NORMALIZE,
        longest=longest,
        padding_id=_find_padding_id(saved),
        prompts=dict(saved.prompts),
        tokenizer_of=tokenizer_of,
        tokenizers={
            name: _build_tokenizer(saved, saved.prompts[tower], longest, arguments["vocabulary"])
            for tower, name in tokenizer_of.items()
        },
    )


def _build_network(saved: SavedSentenceTransformer, arguments: dict[str, object]) -> TextRetriever:
    """Build the network with the trained weights.

    Raises:
        DraftRefused: the weights are missing, pickled or damaged, or do not fit the settings.
    """
    weights = encoder_weights(saved.config, _load_weights(weight_files(saved.encoder.folder)))
    projections = [module for module in saved.modules if module.name == DENSE]
    for number, module in enumerate(projections):
        weights |= projection_weights(number, _load_weights(weight_files(module.folder)))
    try:
        with torch.device("meta"):
            network = TextRetriever(**arguments)
        network.encoder.load_state_dict(weights, assign=True)
    except Exception as fault:  # settings or weights that do not fit raise many types of errors
        if is_out_of_memory(fault):
            raise
        raise _build_unfit_error(saved.folder, fault) from fault
    return network.eval()


def _load_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Load safetensors files.

    Raises:
        DraftRefused: a file is damaged.
        OutOfMemory: there is not enough memory.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        require_memory(MEMORY_FACTOR * file.stat().st_size, f"Reading {file.name}")
        try:
            weights |= load_file(file)
        except OSError:
            raise  # recpress has a message for errors of the file system
        except Exception as fault:  # the library raises its own type for a damaged file
            if is_out_of_memory(fault):
                raise
            raise _build_unfit_error(file, fault) from fault
    return weights


def _build_unfit_error(path: Path, fault: Exception) -> DraftRefused:
    return DraftRefused(
        "weights_unfit", path=str(path), architecture=TEXT_RETRIEVER, problem=str(fault)
    )


def _build_tokenizer(
    saved: SavedSentenceTransformer, prompt: str, longest: int, rows: int
) -> Tokenizer:
    """Return the tokenizer of a tower: it prepends the prompt, changes the case, and truncates.

    As in sentence-transformers, the prompt is prepended before the case is changed. The tokens
    differ from those of sentence-transformers for two kinds of text, because the library
    ``tokenizers`` prepends the prompt to each part of a text that is not a special token: an empty
    text gets no prompt, and after a special token in a text the prompt is repeated.

    Args:
        saved: the model.
        prompt: text that is prepended to each text; may be empty.
        longest: the largest number of tokens of a text.
        rows: rows of the embedding table of tokens.

    Raises:
        DraftRefused: a token has a type (segment) other than 0 or an id that is no row of the
            table; or the special tokens that the tokenizer adds to a text fill all ``longest``
            places.
        DataRefused: the file cannot be read, or has no token for unknown words.
    """
    tokenizer = read_tokenizer(saved.tokenizer)
    normalizers: list[Normalizer] = [Prepend(prompt)] if prompt else []
    if saved.converts_to_lower_case:
        normalizers.append(Lowercase())
    if normalizers:
        present = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = Sequence([*normalizers, *present])
    tokenizer.no_padding()
    try:
        with tokenizer_faults():
            tokenizer.encode(UNKNOWN_TEXT)  # raises if there is no token for unknown words
            types = tokenizer.encode("a").type_ids
    except TokenizerFault as fault:
        raise DataRefused(
            "tokenizer_unreadable", path=str(saved.tokenizer), problem=str(fault)
        ) from fault
    if any(types):
        raise DraftRefused("text_model_tokenizer_types", path=str(saved.tokenizer))
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= rows:
        raise DraftRefused(
            "text_model_vocabulary", path=str(saved.tokenizer), rows=rows, got=largest
        )
    added = tokenizer.num_special_tokens_to_add(is_pair=False)
    if added >= longest:
        raise DraftRefused("text_model_length", path=str(saved.tokenizer), added=added, got=longest)
    tokenizer.enable_truncation(longest, direction=_find_truncation_side(tokenizer))
    return tokenizer


def _find_truncation_side(tokenizer: Tokenizer) -> str:
    """Return the side on which a tokenizer truncates."""
    return str((tokenizer.truncation or {}).get("direction", "right"))


def _find_padding_id(saved: SavedSentenceTransformer) -> int:
    """Return the id of the padding token; 0 if there is none, since masks hide padding anyway."""
    value = saved.config.get("pad_token_id")
    return value if isinstance(value, int) and value >= 0 else 0
