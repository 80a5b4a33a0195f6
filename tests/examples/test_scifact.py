"""The data of the encoder example: files as BEIR publishes them, and the written parquet files.

BEIR is a collection of retrieval data sets; qrels are its relevance judgements.
"""

import gzip
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from examples.public_data import DATA_VARIABLE, DataMissing
from examples.scifact import main, read_scifact


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


def test_reduced_catalogue_has_all_judged_documents(tmp_path):
    data, folder = write_beir(tmp_path / "data"), tmp_path / "parquet"
    assert main([str(folder), "--data", str(data), "--documents", "1"]) == 0
    items = pq.read_table(folder / "items.parquet").to_pydict()
    assert items == {"document": [10, 20], "text": ["T10 body 10", "T20 body 20"]}
    test = pq.read_table(folder / "test.parquet").to_pydict()
    assert test["query"] == ["question 1", "question 2"]
    assert test["relevance"] == [1, 2]


def test_missing_data_exits_with_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert main([str(tmp_path / "parquet")]) == 2
    assert "--data" in capsys.readouterr().err
    data = write_beir(tmp_path / "data")
    (data / "queries.jsonl").unlink()
    assert main([str(tmp_path / "parquet"), "--data", str(data)]) == 2
    with pytest.raises(DataMissing, match=r"queries\.jsonl or queries\.jsonl\.gz"):
        read_scifact(data)
