"""How fast and how good is a text encoder in int8 on a CPU, compared with dynamic quantization?

All-MiniLM-L6-v2 encodes queries and documents of SciFact (``examples/scifact.py``) in six ways:

- torch in float32;
- ONNX Runtime in float32, exported by ``torch.onnx.export`` without recpress;
- ``quantize_dynamic`` of ONNX Runtime on that graph: int8 weights, ranges of inputs per call;
- recpress: ``rowwise_int8`` tables and ``static_int8`` layers, calibrated on pairs of a training
  query and a judged document;
- the same, with one input scale for each channel in the layers that follow a GELU;
- the same as the fourth, with ``rowwise_int4`` for the half of the tokens that training texts use
  least (``tiers``).

Another row, ``quantize_dynamic`` on the graph that recpress exports, separates the effect of the
format from that of the graph. All are timed in turn in one process on one thread, in CPU time of
the thread: one query of 20 tokens, and 32 documents of 128 tokens. NDCG@10 is that of a catalogue
of ``--documents`` documents, and is higher than with all 5,183.

    python -m benchmarks.text_encoder --data FOLDER --model FOLDER
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import quantize_dynamic
from tokenizers import Tokenizer

from compressors.contracts import Bench, Split
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.steps.step import Method
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.metrics.full_ranking import (
    Interactions,
    RankedVectors,
    ranking_metrics,
    ranking_queries,
)
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.text_encoder.network import TextRetriever
from examples.public_data import find_data_folder
from examples.scifact import REMEDY, write_splits
from infra.bundle.bundle_folder import Draft
from infra.data.catalogue import prepare
from tasks.bundles.draft_request import DraftRequest
from tasks.bundles.new_draft import new_draft
from tasks.bundles.text_models import load_text_model

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Encoder = Callable[[Ints, Ints], Floats]
"""Token ids and mask, int64 ``(rows, length)`` each -> vectors, float32 ``(rows, dim)``."""

SIZES = {"one query, 20 tokens": (1, 20, 60), "32 documents, 128 tokens": (32, 128, 5)}
"""By name of a batch: its rows, its tokens per row, and the number of timed calls."""
LONGEST = 256
"""Largest number of tokens of a text in the exported graph, as in training."""

BATCH, CALIBRATION_ROWS = 16, 48
AFTER_GELU = ("encoder.layer.?.output",)
"""The second layers of the feed-forward networks, whose inputs follow a GELU."""

STOCK = "quantize_dynamic"
ONE_SCALE, CHANNEL_SCALES = "recpress, int8", "recpress, int8 with channel scales"
RARE_IN_INT4 = "recpress, int8, rare tokens in int4"
RECIPES = {
    ONE_SCALE: (RowwiseInt8(), StaticInt8(rows=CALIBRATION_ROWS)),
    CHANNEL_SCALES: (
        RowwiseInt8(),
        StaticInt8(layers=AFTER_GELU, input_scales="channel", rows=CALIBRATION_ROWS),
        StaticInt8(rows=CALIBRATION_ROWS),
    ),
    RARE_IN_INT4: (
        Tiers(tables=("encoder.word",), hot=0.5),
        RowwiseInt4(tables=("*.cold",)),
        RowwiseInt8(),
        StaticInt8(rows=CALIBRATION_ROWS),
    ),
}
"""The steps of each compressed encoder."""
ORT_FLOAT, OURS_DYNAMIC = "ONNX Runtime, float32", "quantize_dynamic, graph of recpress"
JUDGED = {ORT_FLOAT, STOCK, *RECIPES}
"""The encoders whose NDCG is computed; the two others differ from one of these only in the runtime
or in the exported graph."""


def open_graph(path: Path) -> Encoder:
    """Open a graph on one thread; its inputs are the ids and the mask, in this order."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]

    def encode(ids: Ints, mask: Ints) -> Floats:
        vectors: Floats = session.run(None, dict(zip(names, (ids, mask), strict=True)))[0]
        return vectors

    return encode


def in_torch(network: TextRetriever) -> Encoder:
    """Return the encoder of a network as a function of arrays."""

    def encode(ids: Ints, mask: Ints) -> Floats:
        with torch.no_grad():
            vectors: Floats = network.encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
        return vectors

    return encode


def export_without_recpress(network: TextRetriever, path: Path) -> None:
    """Export the encoder in float32 as a user of torch would."""
    ids = torch.ones(2, 7, dtype=torch.int64)
    dims = {0: torch.export.Dim("rows"), 1: torch.export.Dim("length", max=LONGEST)}
    torch.onnx.export(
        network.encoder,
        (ids, ids.clone()),
        path,
        dynamo=True,
        dynamic_shapes=(dims, dims),
        verbose=False,
        external_data=False,
    )


def prepare_bench(draft: Draft, data: Path, folder: Path) -> Bench:
    """Prepare the pairs on which layers are calibrated and lookups of tokens are counted.

    Args:
        draft: the description of the network and of the data.
        data: folder with the parquet files.
        folder: contains the tokenizer; the prepared pairs are written to it.
    """
    files = {name: folder / "draft" / name for name in draft.transforms}
    parts = {}
    for part in ("calibration", "train"):
        splits = {name: data / f"{name}.parquet" for name in (part, "items")}
        prepared = prepare(splits, part, draft.signature, folder / part, files)
        # The hash is not checked here.
        parts[part] = Split(path=str(folder / part), sha256="0" * 64, rows=prepared.rows)
    return Bench(signature=draft.signature, **parts)


def compress(model: Model, steps: Sequence[Method], bench: Bench, folder: Path) -> Model:
    """Apply steps; their results are written to subfolders of ``folder``."""
    for number, step in enumerate(steps):
        (folder / str(number)).mkdir(parents=True)
        model = run(step, model, bench, folder / str(number))
    return model


def encode_texts(encoder: Encoder, texts: list[str], tokenizer: Tokenizer) -> Floats:
    """Return the vectors of texts, float32 ``(texts, dim)``; similar lengths share a batch."""
    encodings = tokenizer.encode_batch(texts)
    order = np.argsort([len(encoding) for encoding in encodings], kind="stable")
    parts = []
    for rows in np.split(order, range(BATCH, len(order), BATCH)):
        length = max(len(encodings[row]) for row in rows)
        ids, mask = np.zeros((2, len(rows), length), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(encodings[row])] = encodings[row].ids
            mask[index, : len(encodings[row])] = 1
        parts.append(encoder(ids, mask))
    vectors = np.concatenate(parts)
    vectors[order] = vectors.copy()
    return vectors


def ndcg(encoder: Encoder, data: Path, tokenizer: Tokenizer) -> float:
    """Return the mean NDCG@10 of the test queries in a folder of parquet files."""
    items = pq.read_table(data / "items.parquet").to_pydict()
    test = pq.read_table(data / "test.parquet").to_pydict()
    interactions = Interactions(test["query_id"], test["document"], test["relevance"])
    queries = ranking_queries(interactions, [], np.array(items["document"]))
    ranked = RankedVectors(
        encode_texts(encoder, [test["query"][row] for row in queries.row], tokenizer),
        encode_texts(encoder, items["text"], tokenizer),
        queries,
    )
    return float(ranking_metrics(ranked, ["ndcg@10"])["ndcg@10"].mean())


def time_encoders(encoders: Mapping[str, Encoder]) -> dict[str, dict[str, float]]:
    """Time all encoders in turn; returns the median CPU milliseconds by encoder and size."""
    random = np.random.default_rng(0)
    result: dict[str, dict[str, float]] = {name: {} for name in encoders}
    for size, (rows, length, calls) in SIZES.items():
        ids = random.integers(1000, 20_000, (rows, length))
        mask = np.ones_like(ids)
        times: dict[str, list[float]] = {name: [] for name in encoders}
        for call in range(calls + 1):
            for name, encoder in encoders.items():
                start = time.thread_time()
                encoder(ids, mask)
                if call:  # the first call allocates memory
                    times[name].append(1000 * (time.thread_time() - start))
        for name, values in times.items():
            result[name][size] = float(np.median(values))
    return result


def main() -> None:
    """Print one row for each encoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--no-quality", action="store_true", help="time only")
    args = parser.parse_args()
    skipped = JUDGED if args.no_quality else set()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = folder / "data"
        # ``REMEDY``, for the error message: what to do if the data is missing.
        write_splits(data, find_data_folder(args.data, "scifact", REMEDY), args.documents, seed=1)
        request = DraftRequest(
            folder=folder / "draft",
            model=None,
            sentence_transformer=args.model,
            data=data,
            labels={},
        )
        draft, texts = new_draft(request).draft, load_text_model(args.model)
        network, (tokenizer,) = texts.network, texts.tokenizers.values()
        (graph,) = served_graphs(draft.signature)
        paths = {
            ORT_FLOAT: folder / "float32.onnx",
            STOCK: folder / "dynamic.onnx",
            OURS_DYNAMIC: folder / "ours_dynamic.onnx",
            **{name: folder / f"{name}.onnx" for name in RECIPES},
        }
        export_without_recpress(network, paths[ORT_FLOAT])
        quantize_dynamic(paths[ORT_FLOAT], paths[STOCK])
        lower(network, graph, "onnxruntime", folder / "ours.onnx")
        quantize_dynamic(folder / "ours.onnx", paths[OURS_DYNAMIC])
        bench = prepare_bench(draft, data, folder)
        for name, steps in RECIPES.items():
            source = Model(network, TextRetriever, draft.network)
            compressed = compress(source, steps, bench, folder / name)
            lower(compressed.module, graph, "onnxruntime", paths[name])
        encoders = {
            "torch, float32": in_torch(network),
            **{name: open_graph(path) for name, path in paths.items()},
        }
        times = time_encoders(encoders)
        print("| encoder | MB | " + " | ".join(SIZES) + " | documents/s | NDCG@10 |")
        print("|---|" + "---|" * (len(SIZES) + 3))
        documents, peer = list(SIZES)[-1], times[STOCK]
        for name, encoder in encoders.items():
            file_size = f"{paths[name].stat().st_size / 1e6:.2f}" if name in paths else ""
            cells = [
                f"{times[name][size]:.2f} ms ({times[name][size] / peer[size]:.2f}x)"
                for size in SIZES
            ]
            rate = SIZES[documents][0] / times[name][documents] * 1000
            quality = f"{ndcg(encoder, data, tokenizer):.4f}" if name in JUDGED - skipped else ""
            print(f"| {name} | {file_size} | {' | '.join(cells)} | {rate:.0f} | {quality} |")


if __name__ == "__main__":
    main()
