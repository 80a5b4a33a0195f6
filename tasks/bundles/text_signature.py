"""Describe the signature of a text encoder: columns of texts, ids and relevance grades.

``DraftRefused`` is raised if no draft can be written. A draft is the folder that is packed into a
bundle.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressors.contracts import FORWARD, KeyInput, TokensInput
from compressors.inspection.forward_arguments import Call
from compressors.inspection.inputs import DerivedInputs
from compressors.inspection.sample import Sample, SampleColumn
from infra.data.data_sample import TEXT, TRAIN, ColumnSummary, summarize_columns
from infra.errors import DraftRefused
from tasks.bundles.draft_request import DraftRequest, require_column, sample_of
from tasks.bundles.draft_signature import DraftContent, document_of, item_column
from tasks.bundles.text_models import TextModel

METRIC = "ndcg@10"
"""The metric that decides the quality of a text encoder by default."""

HIGHEST_GRADE = 10
"""Largest relevance grade, if the user does not name the column of the grades.

A column of integers with a larger value is then not considered to contain grades.
"""

ENCODED_TEXTS = 8
"""Number of texts per tower with which the network is called.

It is small because the activations of long texts take much memory.
"""

Summaries = Mapping[str, ColumnSummary]


def describe_texts(
    request: DraftRequest, model: TextModel, rows: Summaries, catalogue: Path
) -> DraftContent:
    """Describe a text encoder, whose two towers are one module.

    Args:
        request: the columns that the user names.
        model: the encoder.
        rows: summaries of the columns of the rows, each of which is a query and an item.
        catalogue: the file of the catalogue, which has one row per item.

    Raises:
        DraftRefused: a column cannot be derived, or the user names one that is missing.
    """
    items = summarize_columns({TRAIN: catalogue})
    query_text, item_text = (
        _select_query_text(request, rows, items),
        _select_item_text(request, items),
    )
    numbers = sample_of(rows)
    item = request.item or item_column(numbers, sample_of(items))
    used = {item, request.time, *request.labels.values()}
    group = request.group or _select_query_id(numbers, rows[query_text].values, used)
    label = next(iter(request.labels.values()), None) or _select_grades(numbers, {*used, group})
    inputs = {
        "query": _build_tokens_input(model, "query", ("input_ids", "attention_mask"), query_text),
        "item": _build_tokens_input(model, "item", ("document_ids", "document_mask"), item_text),
    }
    texts = {"query": rows[query_text].values, "item": items[item_text].values}
    fields: dict[str, Any] = {
        "inputs": [document_of(entry) for entry in (*inputs.values(), KeyInput(name=item))],
        "outputs": [
            {
                "name": next(iter(request.labels), "score"),
                "kind": "retrieval",
                "form": "score",
                "label": label,
                "metric": request.metric or METRIC,
            }
        ],
        "group": group,
        "item": item,
        "towers": {
            tower: {"module": "encoder", "inputs": [entry.name]} for tower, entry in inputs.items()
        },
    }
    if request.time is not None:
        fields["time"] = request.time
    calls = tuple(_encode_sample(model, tower, inputs[tower], texts[tower]) for tower in inputs)
    remarks = [f"Rows with equal {group} are one query."]
    if model.adds_norm:
        remarks.append(
            "Vectors have the norm 1, because the model compares them by cosine and has no "
            "module Normalize."
        )
    files = {name: tokenizer.to_str() for name, tokenizer in model.tokenizers.items()}
    return DraftContent(fields, calls, files, tuple(remarks))


def _select_query_text(request: DraftRequest, rows: Summaries, items: Summaries) -> str:
    """Return the column with the texts of the queries.

    Raises:
        DraftRefused: the named one has no texts; or there is none, or there are several.
    """
    texts = _list_text_columns(rows)
    if request.query_text is not None:
        return require_column("--query-text", request.query_text, texts)
    candidates = tuple(name for name in texts if name not in items) or texts
    if len(candidates) != 1:
        raise DraftRefused("query_text_unknown", columns=candidates or "none")
    return candidates[0]


def _select_item_text(request: DraftRequest, items: Summaries) -> str:
    """Return the column of the catalogue with the texts of the items.

    Raises:
        DraftRefused: as ``_select_query_text``.
    """
    texts = _list_text_columns(items)
    if request.item_text is not None:
        return require_column("--item-text", request.item_text, texts)
    if len(texts) != 1:
        raise DraftRefused("item_text_unknown", columns=texts or "none")
    return texts[0]


def _list_text_columns(columns: Summaries) -> tuple[str, ...]:
    """Return the columns of texts."""
    return tuple(name for name, column in columns.items() if column.kind == TEXT)


def _select_query_id(numbers: Sample, texts: list[str], used: Iterable[str | None]) -> str:
    """Return the column of integers that identifies the query: equal ids have equal texts.

    Row numbers have this property too, so of several such columns the one with the fewest values is
    returned.

    Args:
        numbers: the sampled columns of numbers.
        texts: the texts of the queries of the sampled rows.
        used: columns with another meaning.

    Raises:
        DraftRefused: there is no such column, or there are several.
    """
    counts = {}
    for column in _iterate_integer_columns(numbers, used):
        ids = column.values.tolist()
        if len(set(zip(ids, texts, strict=True))) == len(set(ids)):
            counts[column.name] = len(set(ids))
    candidates = tuple(name for name, count in counts.items() if count == min(counts.values()))
    if len(candidates) != 1:
        raise DraftRefused("query_id_unknown", columns=candidates or "none")
    return candidates[0]


def _select_grades(numbers: Sample, used: Iterable[str | None]) -> str | None:
    """Return the column of relevance grades: the only one of small integers, none negative.

    Returns None if there is no such column.

    Raises:
        DraftRefused: there are several.
    """
    candidates = tuple(
        column.name
        for column in _iterate_integer_columns(numbers, used)
        if column.low >= 0 and column.high <= HIGHEST_GRADE
    )
    if len(candidates) > 1:
        raise DraftRefused("grades_unknown", highest=HIGHEST_GRADE, columns=candidates)
    return candidates[0] if candidates else None


def _iterate_integer_columns(numbers: Sample, used: Iterable[str | None]) -> Iterator[SampleColumn]:
    """Yield the columns of integers without another meaning."""
    others = set(used)
    for name, column in numbers.items():
        if column.kind == "integer" and name not in others:
            yield column


def _build_tokens_input(
    model: TextModel, tower: str, names: tuple[str, str], column: str
) -> TokensInput:
    """Return the input of a tower.

    Args:
        model: the encoder.
        tower: ``query`` or ``item``.
        names: names of the token ids and of the mask.
        column: the column of texts.
    """
    tokenizer = model.tokenizer_of[tower]
    return TokensInput.model_validate(
        {
            "name": names[0],
            "columns": (column,),
            "shape": (model.longest,),
            "table": "encoder.word",
            "tokenizer": tokenizer,
            "min_length": len(model.tokenizers[tokenizer].encode("")),
            "padding_id": model.padding_id,
            "mask": names[1],
            "out_of_range": "clamp",  # has no effect: a tokenizer returns only ids in the table
        }
    )


def _encode_sample(
    model: TextModel, tower: str, item: TokensInput, texts: list[str]
) -> DerivedInputs:
    """Encode a few sampled texts with a tower, and state why its input has the kind ``tokens``."""
    encodings = model.tokenizers[item.tokenizer].encode_batch(texts[:ENCODED_TEXTS])
    longest = max(len(encoding) for encoding in encodings)
    ids, mask = (torch.zeros(len(encodings), longest, dtype=torch.int64) for _ in range(2))
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding)] = torch.tensor(encoding.ids)
        mask[row, : len(encoding)] = 1
    tensors: dict[str, Tensor] = dict(zip(item.tensors, (ids, mask), strict=True))
    with torch.no_grad():
        returned = model.network.encoder(ids, mask)
    prompt = model.prompts[tower]
    reason = f"texts of at most {model.longest} tokens"
    return DerivedInputs(
        call=Call(FORWARD, "keywords"),
        inputs=(item,),
        reasons={item.name: f"{reason} after {prompt!r}" if prompt else reason},
        unused=(),
        tensors=tensors,
        returned=returned,
    )
