"""Write small models of five encoder families with sentence-transformers, and vectors of texts.

    pip install --no-deps --target LIBRARIES sentence-transformers transformers \
        huggingface-hub regex
    PYTHONPATH=.:LIBRARIES python -m tests.text_models.create

Each folder of ``fixtures`` has what ``save_pretrained`` writes, except the model card, and a file
``expected.json``: texts, and their vectors from ``encode_query`` and ``encode_document``. Some
folders have settings in the form of earlier versions of sentence-transformers, which the current
version reads too.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    Transformer,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

FIXTURES = Path(__file__).parent / "fixtures"
DIM, HIDDEN, LAYERS, HEADS, VOCABULARY = 16, 24, 2, 2, 120
LENGTH = 24
FAR = 160
"""Largest number of tokens for MPNet: more than 128, because it treats longer distances alike."""

TEXTS = (
    "",
    "Does vitamin D prevent falls?",
    "  Vitamin D  supplements and\nthe risk of FALLS in older adults.",
    "Café naïve: 3.5 µg/day",
    " ".join(f"trial {number} of vitamins and falls" for number in range(60)),
)
CORPUS = [*TEXTS, "query: ", "passage: ", "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"]


@dataclass(frozen=True)
class Model:
    """A model to write.

    Attributes:
        network: the encoder.
        tokenizer: its tokenizer.
        length: the largest number of tokens of a text.
        others: the modules after the encoder.
        options: arguments of ``SentenceTransformer``.
        files: settings to replace, by the name of the file.
    """

    network: nn.Module
    tokenizer: PreTrainedTokenizerFast
    length: int
    others: Sequence[nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def word_pieces(*, lowercase: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer in the style of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return finished(tokenizer, *special)


def byte_pairs() -> PreTrainedTokenizerFast:
    """Return a tokenizer in the style of RoBERTa, whose tokens contain the space before a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return finished(tokenizer, "<pad>", "<unk>", "<s>", "</s>", "<mask>")


def unigrams() -> PreTrainedTokenizerFast:
    """Return a tokenizer in the style of XLM-R."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>"
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return finished(tokenizer, "<pad>", "<unk>", "<s>", "</s>", "<mask>")


def finished(
    tokenizer: Tokenizer, pad: str, unknown: str, first: str, last: str, mask: str
) -> PreTrainedTokenizerFast:
    """Add the first and last token of a text; return the tokenizer as transformers expects it."""
    ids = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B:1 {last}:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        cls_token=first,
        sep_token=last,
        bos_token=first,
        eos_token=last,
        mask_token=mask,
    )


def bert_like(config: type, network: type, tokenizer: Any, length: int, **other: Any) -> nn.Module:
    """Return an encoder whose settings have the names of BERT's."""
    return network(
        config(
            vocab_size=len(tokenizer),
            hidden_size=DIM,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=HIDDEN,
            max_position_embeddings=length,
            pad_token_id=tokenizer.pad_token_id,
            **other,
        )
    )


def all_models() -> dict[str, Model]:
    """Return the models by the name of their folder."""
    lower, cased, pairs, unigram = (
        word_pieces(lowercase=True),
        word_pieces(lowercase=False),
        byte_pairs(),
        unigrams(),
    )
    bert = bert_like(BertConfig, BertModel, lower, 32)  # more positions than texts have tokens
    # The following three families number positions from 2, so they need two more.
    roberta = bert_like(
        RobertaConfig, RobertaModel, pairs, LENGTH + 2, type_vocab_size=1, layer_norm_eps=1e-5
    )
    xlm = bert_like(
        XLMRobertaConfig,
        XLMRobertaModel,
        unigram,
        LENGTH + 2,
        type_vocab_size=1,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
    )
    mpnet = bert_like(MPNetConfig, MPNetModel, lower, FAR + 2, layer_norm_eps=1e-5)
    distilbert = DistilBertModel(
        DistilBertConfig(
            vocab_size=len(cased),
            dim=DIM,
            n_layers=LAYERS,
            n_heads=HEADS,
            hidden_dim=HIDDEN,
            max_position_embeddings=LENGTH,
            pad_token_id=0,
            activation="relu",
        )
    )
    # Names in the pooling settings of earlier versions of the library.
    flags = {"word_embedding_dimension": DIM, "pooling_mode_mean_tokens": True}
    dense = Dense(DIM, 6, activation_function=nn.Tanh())
    prompts = {"query": "query: ", "document": "passage: "}
    return {
        "bert": Model(
            bert,
            lower,
            LENGTH,
            [Pooling(DIM, "mean"), Normalize()],
            files={
                "1_Pooling/config.json": {**flags, "pooling_mode_cls_token": False},
                "sentence_bert_config.json": {"max_seq_length": LENGTH, "do_lower_case": False},
                "config_sentence_transformers.json": {"__version__": {}},
            },
        ),
        "roberta": Model(
            roberta, pairs, LENGTH, [Pooling(DIM, "cls"), Normalize()], {"prompts": prompts}
        ),
        "xlm-roberta": Model(
            xlm, unigram, LENGTH, [Pooling(DIM, "mean")], {"similarity_fn_name": "dot"}
        ),
        "distilbert": Model(
            distilbert,
            cased,
            LENGTH,
            [Pooling(DIM, "max"), dense, Normalize()],
            files={
                "sentence_bert_config.json": {"max_seq_length": LENGTH, "do_lower_case": True},
            },
        ),
        "mpnet": Model(mpnet, lower, FAR, [Pooling(DIM, "mean"), Normalize()]),
    }


def write(folder: Path, model: Model) -> None:
    """Write a model, read it with the library, and write the vectors that it then computes."""
    with torch.no_grad():  # weights of norms are around 1, all others around 0
        for name, parameter in model.network.named_parameters():
            nn.init.normal_(parameter, mean=float("Norm.weight" in name), std=0.3)
    with tempfile.TemporaryDirectory() as scratch:
        model.network.save_pretrained(scratch)
        model.tokenizer.save_pretrained(scratch)
        encoder = Transformer(scratch, max_seq_length=model.length)
        SentenceTransformer(modules=[encoder, *model.others], **model.options).save_pretrained(
            str(folder), create_model_card=False
        )
    for name, settings in model.files.items():
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n")
    loaded = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    texts = list(TEXTS)
    if any(loaded.prompts.values()):
        texts.remove("")  # recpress writes no prompt before an empty text
    expected = {
        "texts": texts,
        "query": loaded.encode_query(texts).tolist(),
        "item": loaded.encode_document(texts).tolist(),
    }
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False) + "\n")


def main() -> None:
    """Write all models."""
    torch.manual_seed(0)
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for name, model in all_models().items():
        write(FIXTURES / name, model)
        size = sum(path.stat().st_size for path in (FIXTURES / name).rglob("*") if path.is_file())
        print(f"{name}: {size:,} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
