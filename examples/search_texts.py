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


class TextTower:
    """Computes the vectors of queries or of documents.

    Args:
        folder: the fetched files of a version.
        text: an entry of ``texts`` in ``lowering.json``.
        threads: threads of onnxruntime for one call.
    """

    def __init__(self, folder: Path, text: Mapping[str, Any], threads: int = 1) -> None:
        self.text = text
        self.tokenizer = Tokenizer.from_file(str(folder / text["tokenizer"]))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(folder / f"{text['graph']}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.dtypes = {
            item.name: {"tensor(int32)": np.int32, "tensor(float)": np.float32}.get(
                item.type, np.int64
            )
            for item in self.session.get_inputs()
        }

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
        encodings = self.tokenizer.encode_batch(texts)  # truncates, and pads to the longest
        tensors = {
            self.text["ids"]: [encoding.ids for encoding in encodings],
            self.text["mask"]: [encoding.attention_mask for encoding in encodings],
            self.text["token_types"]: [encoding.type_ids for encoding in encodings],
        }
        inputs = {
            name: np.array(values, self.dtypes[name])
            for name, values in tensors.items()
            if name is not None
        }
        result: Vectors = self.session.run(["vector"], inputs)[0]
        return result


def load_towers(folder: Path) -> tuple[TextTower, TextTower]:
    """Return the towers of queries and of documents of a fetched version."""
    texts = json.loads((folder / "lowering.json").read_text())["texts"]
    query, document = (TextTower(folder, text) for text in texts)
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
