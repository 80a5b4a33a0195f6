"""``recpress new --sentence-transformer``: vectors, drafts, and refused models and options.

The models are small, one of each family (BERT, MPNet, ...). Their vectors are compared with those
that the library sentence-transformers computed. A draft is the folder that the command writes, and
from which ``recpress bundle pack`` creates a bundle.

``tests/text_models/create.py`` wrote the models. The vocabulary of ``roberta`` has 300 tokens, its
texts have at most 24, and its prompts are "query: " and "passage: ". ``bert`` has no prompts.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from error_codes import raises_code
from safetensors.torch import load_file, save_file
from token_draft import encode, write_texts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from compressors.contracts import TEXT_RETRIEVER, TokensInput
from compressors.errors.text_encoders import TextEncoderRefused
from infra.errors import DataRefused, DraftRefused
from tasks.bundles.new_draft import DraftRequest, NewDraft, new_draft
from tasks.bundles.packing import pack
from tasks.bundles.text_models import TextModel, load_text_model

FIXTURES = Path(__file__).parents[1] / "text_models" / "fixtures"
MINILM_VARIABLE = "RECPRESS_MINILM"
"""Environment variable with the folder of a trained model, for the slow test."""
FAMILIES = sorted(path.name for path in FIXTURES.iterdir())


def vectors(model: TextModel, tower: str, texts: list[str]) -> torch.Tensor:
    """Return the vectors of texts, as the tower computes them."""
    tokenizer = model.tokenizers[model.tokenizer_of[tower]]
    return encode(model.network.encoder, tokenizer, texts, model.longest)


def copied(tmp_path: Path, name: str = "bert") -> Path:
    """Return a copy of a fixture."""
    return Path(shutil.copytree(FIXTURES / name, tmp_path / f"{name}-model"))


def edit(path: Path, **changes: Any) -> None:
    """Replace settings in a JSON file, which may be missing."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | changes))


@pytest.mark.parametrize("tower", ["query", "item"])
@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_those_of_sentence_transformers(name: str, tower: str) -> None:
    expected = json.loads((FIXTURES / name / "expected.json").read_text())
    got = vectors(load_text_model(FIXTURES / name), tower, expected["texts"])
    # Both compute in float32 and add in different orders.
    torch.testing.assert_close(got, torch.tensor(expected[tower]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_padding_does_not_change_a_vector(name: str) -> None:
    network = load_text_model(FIXTURES / name).network
    ids = torch.tensor([[2, 9, 10, 11, 3]])  # 2 begins a text and 3 ends it; padding is 0
    padded = torch.nn.functional.pad(ids, (0, 4))
    with torch.no_grad():
        got = network.encoder(padded, (padded > 0).long())
        expected = network.encoder(ids, torch.ones_like(ids))
    # Sums over more tokens are added in another order.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_text_model(FIXTURES / "roberta")
    return write_texts(
        tmp_path_factory.mktemp("texts"),
        lambda tower, texts: vectors(model, tower, texts),
        np.random.default_rng(0),
    )


def draft(work_folder: Path, data: Path, model: Path | str = "roberta", **options: Any) -> NewDraft:
    """Write a draft from a model."""
    request = DraftRequest(
        folder=work_folder / "new",
        model=None,
        sentence_transformer=FIXTURES / model,
        data=data,
        **{"labels": {}, **options},
    )
    return new_draft(request)


def test_folder_and_data_become_a_bundle_without_further_options(
    work_folder: Path, data: Path
) -> None:
    written = draft(work_folder, data)
    signature = written.draft.signature
    assert written.draft.name == "roberta"
    assert written.draft.network.architecture.path == TEXT_RETRIEVER
    query, item, key = signature.inputs
    assert isinstance(query, TokensInput)
    assert (query.columns, query.shape, query.min_length) == (("query",), (24,), 2)
    assert (item.columns, key.columns, signature.item) == (("text",), ("document",), "document")
    (output,) = signature.outputs
    assert (output.label, output.metric, signature.group) == ("relevance", "ndcg@10", "query_id")
    assert signature.shares_tower
    assert written.reasons["input_ids"] == "texts of at most 24 tokens after 'query: '"
    assert written.remarks == ("Rows with equal query_id are one query.",)
    assert pack(work_folder / "new").tables["encoder.word"] == 300


def test_prompts_are_in_the_tokenizers_of_the_draft(work_folder: Path, data: Path) -> None:
    draft(work_folder, data)
    plain = Tokenizer.from_file(str(FIXTURES / "roberta" / "tokenizer.json"))
    for tower, prompt in {"query": "query: ", "item": "passage: "}.items():
        written = Tokenizer.from_file(str(work_folder / "new" / f"{tower}.tokenizer.json"))
        assert written.encode("falls").ids == plain.encode(f"{prompt}falls").ids


def test_columns_that_the_user_names_are_used(
    work_folder: Path, data: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "data"
    renamed.mkdir()
    for path in data.glob("*.parquet"):
        table = pq.read_table(path)
        first = "text" if path.stem == "items" else "query"
        table = table.append_column("title", table[first]).append_column("day", table["document"])
        if path.stem != "items":
            table = table.append_column("stars", table["relevance"])
        pq.write_table(table, renamed / path.name)
    with raises_code(DraftRefused, "item_text_unknown", columns=("text", "title")):
        draft(work_folder, renamed)
    named = {"item_text": "title"}
    with raises_code(DraftRefused, "item_unknown", columns=("document", "day")):
        draft(work_folder, renamed, **named)
    named["item"] = "document"
    with raises_code(DraftRefused, "grades_unknown", columns=("relevance", "stars")):
        draft(work_folder, renamed, **named, time="day")
    with raises_code(
        DraftRefused, "column_missing", option="--query-text", columns=("query", "title")
    ):
        draft(work_folder, renamed, **named, query_text="document")
    labels = {"grade": "stars"}
    written = draft(work_folder, renamed, **named, time="day", labels=labels, group="query_id")
    assert written.draft.signature.inputs[1].columns == ("title",)
    assert written.draft.signature.time == "day"
    assert written.draft.signature.outputs[0].label == "stars"


def test_column_of_row_numbers_is_not_taken_for_the_query(
    work_folder: Path, data: Path, tmp_path: Path
) -> None:
    numbered = tmp_path / "data"
    shutil.copytree(data, numbered)
    for split in ("train", "validation", "test"):
        table = pq.read_table(numbered / f"{split}.parquet")
        rows = np.arange(len(table)) + 100
        pq.write_table(table.append_column("row", [rows]), numbered / f"{split}.parquet")
    assert draft(work_folder, numbered).draft.signature.group == "query_id"
    for split in ("train", "validation", "test"):
        table = pq.read_table(numbered / f"{split}.parquet")
        copied_ids = table.append_column("other", table["query_id"])
        pq.write_table(copied_ids, numbered / f"{split}.parquet")
    shutil.rmtree(work_folder / "new")
    with raises_code(DraftRefused, "query_id_unknown", columns=("query_id", "other")):
        draft(work_folder, numbered)


def test_vectors_of_a_model_that_compares_by_cosine_are_normalized(
    work_folder: Path, data: Path, tmp_path: Path
) -> None:
    folder = copied(tmp_path)
    modules("Transformer", "Pooling")(folder)  # removes the module Normalize
    written = draft(work_folder, data, folder)
    assert written.draft.network.architecture.config["normalize"]
    assert any("norm 1" in remark for remark in written.remarks)
    edit(folder / SETTINGS, similarity_fn_name="dot")
    assert not load_text_model(folder).network.encoder.normalize


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("model_sources_conflict", {"model": "shop:Net"}),
        ("model_sources_conflict", {"query_tower": "encoder"}),
        (
            "model_sources_conflict",
            {"sentence_transformer": None, "model": "a:B", "query_text": "query"},
        ),
        ("input_options_refused", {"inputs": {"input_ids": ("query",)}}),
        ("too_many_labels", {"labels": {"a": "relevance", "b": "relevance"}}),
        ("item_without_towers", {"sentence_transformer": None, "model": "a:B", "item": "document"}),
    ],
)
def test_options_that_do_not_fit_are_refused(
    work_folder: Path, data: Path, code: str, options: dict[str, Any]
) -> None:
    request = {"model": None, "sentence_transformer": FIXTURES / "bert", "labels": {}} | options
    with raises_code(DraftRefused, code):
        new_draft(DraftRequest(folder=work_folder / "new", data=data, **request))


LIBRARY = "sentence_transformers.models"


def modules(*names: str, **folders: str) -> Callable[[Path], None]:
    """Return a function that replaces the modules of a model; folders by the module's name."""
    folders = {"Transformer": "", "Pooling": "1_Pooling"} | folders

    def change(folder: Path) -> None:
        entries = [
            {"type": name if "." in name else f"{LIBRARY}.{name}", "path": folders.get(name, name)}
            for name in names
        ]
        (folder / "modules.json").write_text(json.dumps(entries))

    return change


def setting(file: str, **changes: Any) -> Callable[[Path], None]:
    """Return a function that replaces settings of a model."""
    return lambda folder: edit(folder / file, **changes)


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """Return a function that renames a file of a model."""

    def change(folder: Path) -> None:
        (folder / old).rename(folder / new)

    return change


def add_token(folder: Path) -> None:
    """Add a token to the tokenizer of a model, which has no row for it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["melatonin"])
    tokenizer.save(str(folder / "tokenizer.json"))


SETTINGS = "config_sentence_transformers.json"


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("text_model_weights_pickled", renamed("model.safetensors", "pytorch_model.bin")),
        ("text_model_weights_missing", renamed("model.safetensors", "model.onnx")),
        ("text_model_tokenizer_missing", renamed("tokenizer.json", "vocab.json")),
        ("text_model_no_modules", renamed("modules.json", "other.json")),
        ("text_model_unreadable", renamed("modules.json", "config.json")),
        ("text_model_other_model", setting(SETTINGS, model_type="SparseEncoder")),
        (
            "text_model_other_model",
            setting("config.json", architectures=["BertForSequenceClassification"]),
        ),
        ("text_model_module_foreign", modules("Transformer", "shop.Pooling")),
        ("text_model_module_foreign", lambda folder: (folder / "modules.json").write_text("[1]")),
        ("text_model_module_unknown", modules("StaticEmbedding")),
        ("text_model_file_outside", modules("Transformer", "Pooling", Pooling="../other")),
        (
            "text_model_prompt_unclear",
            setting(SETTINGS, prompts={"search": "search: "}, default_prompt_name="search"),
        ),
        ("weights_unfit", setting("config.json", intermediate_size=20)),
        ("text_model_vocabulary", add_token),
        ("text_model_length", setting("sentence_bert_config.json", max_seq_length=2)),
    ],
)
def test_unusable_folder_is_refused(
    tmp_path: Path, code: str, change: Callable[[Path], None]
) -> None:
    folder = copied(tmp_path)
    change(folder)
    with raises_code(DraftRefused, code):
        load_text_model(folder)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("family_unknown", setting("config.json", model_type="t5")),
        ("setting_unknown", setting("config.json", position_embedding_type="relative_key")),
        ("setting_unknown", setting("config.json", hidden_act="silu")),
        ("setting_unknown", setting("config.json", hidden_size=0)),
        ("setting_unknown", setting("config.json", num_attention_heads=3)),
        ("setting_unknown", setting(SETTINGS, similarity_fn_name="euclidean")),
        ("pooling_unknown", setting("1_Pooling/config.json", pooling_mode="lasttoken")),
        ("pooling_unknown", setting("1_Pooling/config.json", pooling_mode_cls_token=True)),
        ("modules_unknown", modules("Transformer", "Pooling", "Normalize", "Dense")),
        ("modules_unknown", modules("Transformer", "Pooling", "LayerNorm")),
        ("weights_missing", setting("config.json", num_hidden_layers=3)),
        ("weights_missing", setting("config.json", num_hidden_layers=10**15)),
        ("weights_unknown", setting("config.json", num_hidden_layers=1)),
    ],
)
def test_model_that_the_network_cannot_compute_is_refused(
    tmp_path: Path, code: str, change: Callable[[Path], None]
) -> None:
    folder = copied(tmp_path)
    change(folder)
    with raises_code(TextEncoderRefused, code):
        load_text_model(folder)


def test_tokenizer_without_a_token_for_unknown_words_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    Tokenizer(WordLevel({"a": 0}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    with raises_code(DataRefused, "tokenizer_unreadable"):
        load_text_model(folder)


def test_prompt_that_pooling_excludes_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, "roberta")
    edit(folder / "1_Pooling" / "config.json", include_prompt=False)
    with raises_code(DraftRefused, "text_model_prompt_excluded"):
        load_text_model(folder)


def test_weights_with_a_prefix_a_head_and_several_files_are_read(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    named = {f"bert.{name}": tensor for name, tensor in weights.items()}
    named |= {"cls.predictions.bias": torch.ones(3)}
    parts = [dict(list(named.items())[::2]), dict(list(named.items())[1::2])]
    file_of_tensor = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part, folder / file)
        file_of_tensor |= dict.fromkeys(part, file)
    edit(folder / "model.safetensors.index.json", weight_map=file_of_tensor)
    expected = load_text_model(FIXTURES / "bert").network.state_dict()
    got = load_text_model(folder).network.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.data
@pytest.mark.slow
def test_trained_model_ranks_a_paraphrase_before_an_unrelated_text() -> None:
    folder = os.environ.get(MINILM_VARIABLE)
    if folder is None:
        pytest.skip(f"Set {MINILM_VARIABLE} to the folder of all-MiniLM-L6-v2.")
    texts = ["A man is eating food.", "Someone eats a meal.", "The girl carries a baby."]
    of_texts = vectors(load_text_model(Path(folder)), "query", texts)
    cosine = of_texts @ of_texts.T
    assert cosine[0, 1] > 0.6 > 0.2 > cosine[0, 2]


def test_weights_in_half_precision_are_read_as_float32(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    weights = load_file(folder / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in weights.items()}
    save_file(halves, folder / "model.safetensors")
    word = load_text_model(folder).network.encoder.word.weight
    assert word.dtype == torch.float32
    assert torch.equal(word, halves["embeddings.word_embeddings.weight"].float())
