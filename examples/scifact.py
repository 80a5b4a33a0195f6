"""Write the documents, queries and judgements of SciFact as parquet files for a text encoder.

Run ``python -m examples.scifact FOLDER --data FOLDER``. The data is SciFact as BEIR publishes it:
``corpus.jsonl``, ``queries.jsonl``, ``qrels/train.tsv`` and ``qrels/test.tsv``. Files may be
gzipped, and the judgements may be ``qrels_train.tsv`` and ``qrels_test.tsv``. The corpus may be
``scifact_corpus_claims.zip``, in which each abstract is a list of quoted sentences.

``docs/encoders.md`` describes the models and the results.
"""

import argparse
import ast
import csv
import gzip
import io
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from examples.public_data import DATA_VARIABLE, DataMissing, find_data_folder

CALIBRATION_ROWS = 256
REMEDY = "Download scifact of BEIR and unpack it."


@dataclass(frozen=True)
class SciFact:
    """The texts and judgements of the data set.

    Attributes:
        documents: title and abstract by document id.
        queries: text by query id.
        judgements: rows of query id, document id and relevance, by split.
    """

    documents: dict[int, str]
    queries: dict[int, str]
    judgements: dict[str, list[tuple[int, int, int]]]


def read_scifact(folder: Path) -> SciFact:
    """Read the data set.

    Raises:
        DataMissing: a file is missing.
    """
    documents = {int(row["_id"]): f"{row['title']} {row['text']}" for row in _read_corpus(folder)}
    queries = {
        int(row["_id"]): str(row["text"])
        for row in map(json.loads, _read_lines(folder, ("queries.jsonl", "queries.jsonl.gz")))
    }
    judgements = {}
    for split in ("train", "test"):
        lines = _read_lines(folder, (f"qrels/{split}.tsv", f"qrels_{split}.tsv"))
        rows = (tuple(map(int, line.split("\t"))) for line in list(lines)[1:])
        judgements[split] = [(query, document, grade) for query, document, grade in rows]
    return SciFact(documents, queries, judgements)


def _read_lines(folder: Path, names: Sequence[str]) -> Iterable[str]:
    """Return the lines of the first of these files that exists."""
    for name in names:
        path = folder / name
        if path.is_file():
            raw = path.read_bytes()
            return (gzip.decompress(raw) if name.endswith(".gz") else raw).decode().splitlines()
    raise DataMissing(f"Expected {' or '.join(names)} in {folder}. Download it again.")


def _read_corpus(folder: Path) -> Iterable[dict[str, str]]:
    """Yield ``_id``, ``title`` and ``text`` of each document."""
    archive = folder / "scifact_corpus_claims.zip"
    if not archive.is_file():
        yield from map(json.loads, _read_lines(folder, ("corpus.jsonl", "corpus.jsonl.gz")))
        return
    string = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
    with zipfile.ZipFile(archive) as files, files.open("corpus_train.csv") as file:
        for row in csv.DictReader(io.TextIOWrapper(file, "utf-8")):
            sentences = map(ast.literal_eval, string.findall(row["abstract"]))
            yield {"_id": row["doc_id"], "title": row["title"], "text": " ".join(sentences)}


def write_splits(folder: Path, data: Path, documents: int | None, seed: int) -> int:
    """Write the catalogue and the judgements of train, calibration and test.

    Args:
        folder: folder of the parquet files; created if needed, files of these names are replaced.
        data: folder of SciFact.
        documents: size of the catalogue: the documents of test and calibration rows, and others
            drawn at random; None for all documents. The metrics of a smaller catalogue are higher.
        seed: seed of the drawn documents and calibration rows.

    Returns:
        The number of documents.

    Raises:
        DataMissing: a file is missing.
    """
    scifact, random = read_scifact(data), np.random.default_rng(seed)
    train, test = scifact.judgements["train"], scifact.judgements["test"]
    chosen = random.permutation(len(train))[:CALIBRATION_ROWS]
    calibration = [train[row] for row in sorted(chosen)]
    judged = {document for _, document, _ in (*calibration, *test)}
    others = random.permutation(sorted(scifact.documents.keys() - judged)).tolist()
    if documents is not None:
        others = others[: max(0, documents - len(judged))]
    catalogue = judged | set(others)
    ids = [key for key in scifact.documents if key in catalogue]
    known = [row for row in train if row[1] in catalogue]
    splits = {"train": known, "calibration": calibration, "test": test}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        columns = {
            "query_id": pa.array([query for query, _, _ in rows]),
            "query": pa.array([scifact.queries[query] for query, _, _ in rows]),
            "document": pa.array([document for _, document, _ in rows]),
            "relevance": pa.array([grade for _, _, grade in rows]),
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    texts = pa.array([scifact.documents[key] for key in ids])
    pq.write_table(pa.table({"document": pa.array(ids), "text": texts}), folder / "items.parquet")
    return len(ids)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the parquet files. Returns 0, or 2 if the data is missing."""
    parser = argparse.ArgumentParser(prog="python -m examples.scifact", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of the parquet files")
    parser.add_argument(
        "--data", type=Path, help=f"folder of SciFact; default {DATA_VARIABLE}/scifact"
    )
    parser.add_argument("--documents", type=int, help="size of the catalogue; default all 5,183")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        data = find_data_folder(args.data, "scifact", REMEDY)
        count = write_splits(args.folder, data, args.documents, args.seed)
    except DataMissing as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {args.folder} with {count:,} documents", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
