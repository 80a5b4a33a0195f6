"""Search documents with a released text encoder: tokenizers and onnxruntime, without torch.

Run ``python -m examples.search_texts FOLDER DOCUMENTS QUERY...``. The folder is what ``recpress
registry fetch`` writes for the target ``onnxruntime``; the file of documents has one text per line.
Copy this file to serve such a model: it imports nothing of recpress.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

Vectors = NDArray[np.float32]
BATCH = 32
"""Texts of one call. Their number of tokens determines the memory that a call needs."""
DTYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(bool)": np.bool_,
}
"""numpy types of a graph's inputs, by the names of onnxruntime."""


class TextTower:
    """Computes the vectors of queries or of documents.

    Args:
        tokenizer: the tokenizer; it truncates texts, and pads them to the longest of a batch.
        session: the graph of the encoder.
        text: an entry of ``texts`` in ``lowering.json``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        session: onnxruntime.InferenceSession,
        text: Mapping[str, Any],
    ) -> None:
        self.tokenizer, self.session, self.text = tokenizer, session, text
        self.dtypes = {item.name: DTYPES[item.type] for item in session.get_inputs()}

    def compute_vectors(self, texts: Sequence[str]) -> Vectors:
        """Return float32 ``(texts, dim)``.

        Texts of similar length share a batch, so that few positions are padding.
        """
        permutation = np.argsort([len(text) for text in texts], kind="stable")
        parts = [
            self._compute_batch([texts[index] for index in permutation[begin : begin + BATCH]])
            for begin in range(0, len(permutation), BATCH)
        ]
        result = np.concatenate(parts)
        result[permutation] = result.copy()
        return result

    def _compute_batch(self, texts: list[str]) -> Vectors:
        """Tokenize the texts of one batch, and run the graph."""
        encodings = self.tokenizer.encode_batch(texts)
        ids = np.array([encoding.ids for encoding in encodings], np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
        if not ids.shape[1]:  # only empty texts: the graph needs a padded position
            padding: Any = self.tokenizer.padding
            ids = np.full((len(texts), 1), padding["pad_id"], np.int64)
            mask = np.zeros_like(ids)
        tensors = {
            self.text["ids"]: ids,
            self.text["mask"]: mask,
            self.text["token_types"]: np.zeros_like(ids),
            self.text["lengths"]: mask.sum(axis=1),
            self.text["positions"]: (mask.cumsum(axis=1) - 1 + self.text["first_position"]) * mask,
        }
        inputs = {
            name: values.astype(self.dtypes[name])
            for name, values in tensors.items()
            if name is not None  # the graph has no such input
        }
        result: Vectors = self.session.run(["vector"], inputs)[0]
        return result


def load_towers(folder: Path, threads: int = 1) -> tuple[TextTower, TextTower]:
    """Return the towers of queries and of documents of a fetched version.

    Args:
        folder: the fetched files.
        threads: threads of onnxruntime for one call.

    Raises:
        ValueError: the version does not read one text of the query and one of the document.
    """
    texts = json.loads((folder / "lowering.json").read_text())["texts"]
    if len(texts) != 2:
        raise ValueError(
            f"Expected a version that reads one text of the query and one of the document, got "
            f"{len(texts)} texts."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = {  # one for both towers if these are one encoder
        graph: onnxruntime.InferenceSession(
            str(folder / f"{graph}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        for graph in {text["graph"] for text in texts}
    }
    query, document = (
        TextTower(
            Tokenizer.from_file(str(folder / text["tokenizer"])), sessions[text["graph"]], text
        )
        for text in texts
    )
    return query, document


def main(argv: Sequence[str] | None = None) -> int:
    """Print the best documents for each query, with their scores."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.search_texts", description=main.__doc__
    )
    parser.add_argument("folder", type=Path, help="folder that `recpress registry fetch` wrote")
    parser.add_argument("documents", type=Path, help="text file with one document per line")
    parser.add_argument("query", nargs="+")
    parser.add_argument("--count", type=int, default=5, help="documents to print for each query")
    args = parser.parse_args(argv)
    documents = args.documents.read_text(encoding="utf-8").splitlines()
    if not documents:
        parser.error(f"Expected one document per line in {args.documents}, got an empty file.")
    query_tower, document_tower = load_towers(args.folder)
    index = document_tower.compute_vectors(documents)
    query_vectors = query_tower.compute_vectors(args.query)
    for query, scores in zip(args.query, query_vectors @ index.T, strict=True):
        print(query)
        for best in np.argsort(-scores)[: args.count]:
            print(f"  {scores[best]:.3f}  {documents[best][:90]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
