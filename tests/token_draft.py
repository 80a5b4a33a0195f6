"""Write a small draft (a bundle before it is packed) of an encoder that ranks relevant texts high.

Queries and documents are random words of a small vocabulary. One encoder is both towers. A relevant
document is drawn from the encoder's scores, so no other network fits the data better.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from compressors.contracts import TEXT_RETRIEVER
from compressors.text_encoder.network import TextEncoder, TextRetriever

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = tuple(f"w{index}" for index in range(56))
VOCABULARY = len(SPECIAL) + len(WORDS)
LONGEST_QUERY, LONGEST_DOCUMENT = 8, 12
"""Tokens of a text, with ``[CLS]`` and ``[SEP]``."""
CONFIG = {
    "vocabulary": VOCABULARY,
    "longest": 16,
    "dim": 16,
    "heads": 2,
    "hidden": 32,
    "layers": 2,
}
QUERIES, DOCUMENTS = 80, 150
Encode = Callable[[str, list[str]], torch.Tensor]
"""Tower and texts -> vectors, float ``(texts, dim)``."""

RELEVANT = {"train": 3, "validation": 1, "test": 2}
"""Relevant documents of each query, by split."""


def tokens(name: str, mask: str, column: str, longest: int) -> dict[str, Any]:
    """Return a text input of the signature, as in ``model.json``."""
    return {
        "kind": "tokens",
        "name": name,
        "columns": [column],
        "shape": [longest],
        "table": "encoder.word",
        "min_length": 2,
        "mask": mask,
        "out_of_range": "clamp",
    }


SIGNATURE: dict[str, Any] = {
    "inputs": [
        tokens("input_ids", "attention_mask", "query", LONGEST_QUERY),
        tokens("document_ids", "document_mask", "text", LONGEST_DOCUMENT),
        {"kind": "key", "name": "document"},
    ],
    "outputs": [
        {
            "name": "score",
            "kind": "retrieval",
            "form": "score",
            "label": "relevance",
            "metric": "ndcg@10",
        }
    ],
    "group": "query_id",
    "item": "document",
    "towers": {
        "query": {"module": "encoder", "inputs": ["input_ids"]},
        "item": {"module": "encoder", "inputs": ["document_ids"]},
    },
}


def word_tokenizer() -> Tokenizer:
    """Return a tokenizer of words between spaces, which adds ``[CLS]`` and ``[SEP]``."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def draw_texts(count: int, most_words: int, random: np.random.Generator) -> list[str]:
    """Draw texts of random words; the first text is empty, the second has ``most_words``."""
    lengths = random.integers(1, most_words + 1, count)
    lengths[:2] = 0, most_words
    return [" ".join(random.choice(WORDS, length)) for length in lengths]


def encode(
    encoder: TextEncoder, tokenizer: Tokenizer, texts: list[str], longest: int
) -> torch.Tensor:
    """Return the vectors of texts, one after another and so without padding."""
    tokenizer.enable_truncation(longest)
    with torch.no_grad():
        return torch.cat(
            [
                encoder(ids, torch.ones_like(ids))
                for text in texts
                for ids in [torch.tensor([tokenizer.encode(text).ids])]
            ]
        )


def write_texts(folder: Path, encode_texts: Encode, random: np.random.Generator) -> Path:
    """Write a catalogue and one parquet file per split; return the folder.

    Documents have up to 20 words, so the tokenizer truncates some of them.

    Args:
        folder: the folder.
        encode_texts: returns the vectors of queries or of documents. The documents with the largest
            dot products, after noise is added, are relevant to a query.
        random: draws texts, grades and noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    queries = draw_texts(QUERIES, LONGEST_QUERY - 2, random)
    documents = draw_texts(DOCUMENTS, 20, random)
    query_vectors = encode_texts("query", queries)
    scores = (query_vectors @ encode_texts("item", documents).T).numpy()
    noise = random.gumbel(scale=scores.std() / 4, size=scores.shape)
    ranked = np.argsort(-(scores + noise), axis=1)
    ids = random.permutation(DOCUMENTS) + 1000
    pq.write_table(
        pa.table({"document": pa.array(ids), "text": documents}), folder / "items.parquet"
    )
    first = 0
    for split, count in RELEVANT.items():
        query = np.repeat(np.arange(QUERIES), count)
        columns = {
            "query_id": pa.array(query),
            "query": pa.array([queries[index] for index in query]),
            "document": pa.array(ids[ranked[:, first : first + count].reshape(-1)]),
            "relevance": pa.array(random.integers(1, 3, query.size)),
        }
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
        first += count
    return folder


def write_token_draft(folder: Path, *, seed: int = 0) -> Path:
    """Write ``model.json``, weights, tokenizer and the parquet files; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = TextRetriever(**CONFIG).eval()
    longest = {"query": LONGEST_QUERY, "item": LONGEST_DOCUMENT}
    write_texts(
        folder,
        lambda tower, texts: encode(model.encoder, word_tokenizer(), texts, longest[tower]),
        np.random.default_rng(seed),
    )
    save_file(model.state_dict(), folder / "model.safetensors")
    word_tokenizer().save(str(folder / "tokenizer.json"))
    document = {
        "schema_version": 2,
        "name": "texts",
        "version": "1",
        "signature": SIGNATURE,
        "network": {"architecture": {"path": TEXT_RETRIEVER, "config": CONFIG}},
        "data": {split: f"{split}.parquet" for split in (*RELEVANT, "items")},
        "transforms": {"tokenizer.json": "tokenizer.json"},
    }
    (folder / "model.json").write_text(json.dumps(document, indent=1))
    return folder
