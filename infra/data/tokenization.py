"""Convert columns of texts to token ids, with the tokenizers of a bundle.

This is the only place where texts are tokenized: prepared splits contain ids. A tokenizer is a
``tokenizer.json`` of the library ``tokenizers``. It is data: reading it runs no code of the bundle.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from compressors.contracts import Signature, TokensInput, all_tables
from infra.bundle.json_limits import check_limits, read_bounded
from infra.data.parquet import Array, Violations, null_positions
from infra.errors import DataRefused

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

MAX_TOKENIZER_BYTES = 64 * 2**20
"""Four times the largest usual tokenizer, which has 250,000 tokens."""

MAX_TOKENIZER_VALUES = 5_000_000
"""JSON values of a file: twice those of a vocabulary of 260,000 tokens with 515,000 merges."""

UNKNOWN_TEXT = "a \U0010fffd"
"""A text with a character that no vocabulary has; a tokenizer needs a token for it."""

TEXTS_AT_ONCE = 1024
"""Texts that are tokenized at a time: the library's results take far more memory than the ids."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with the settings of one input.

    Attributes:
        item: the input.
        tokenizer: truncates texts to the length of the input, and does not pad.
    """

    item: TokensInput
    tokenizer: "Tokenizer"

    def convert(self, column: pa.Array, first: int, violations: Violations) -> tuple[Array, Array]:
        """Tokenize a column of strings.

        Args:
            column: the column in one record batch.
            first: row number of the batch's first row in the split.
            violations: collects rows whose text is null.

        Returns:
            The ids of all rows, one after another, in the dtype of the input; int64 ``(rows,)``,
            the number of ids of each row.

        Raises:
            DataRefused: the tokenizer fails on a text.
        """
        violations.add(self.item.columns[0], "null text", first + null_positions(column))
        ids = [np.empty(0, self.item.dtype)]
        lengths = np.empty(len(column), np.int64)
        for begin in range(0, len(column), TEXTS_AT_ONCE):
            texts = column.slice(begin, TEXTS_AT_ONCE).fill_null("").to_pylist()
            encodings = self._encode(texts, first + begin)
            lengths[begin : begin + len(texts)] = [len(encoding) for encoding in encodings]
            ids += [np.asarray(encoding.ids, self.item.dtype) for encoding in encodings]
        return np.concatenate(ids), lengths

    def _encode(self, texts: list[str], first: int) -> "Sequence[Encoding]":
        """Tokenize texts; ``first`` is the row number of the first one."""
        try:
            with tokenizer_faults():
                return self.tokenizer.encode_batch_fast(texts)
        except TokenizerFault as fault:
            row = first + next((row for row, text in enumerate(texts) if self._fails_on(text)), 0)
            raise DataRefused(
                "tokenizer_fails",
                input=self.item.name,
                text=f"row {row:,}",
                problem=str(fault),
            ) from fault

    def _fails_on(self, text: str) -> bool:
        try:
            with tokenizer_faults():
                self.tokenizer.encode_batch_fast([text])
        except TokenizerFault:
            return True
        return False

    def save(self, path: Path) -> None:
        """Save the tokenizer for clients: it truncates as here, and pads as the input says."""
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        names = {number: token for token, number in vocabulary.items()}
        self.tokenizer.enable_padding(
            direction=self.item.padding,
            pad_id=self.item.padding_id,
            pad_token=names.get(self.item.padding_id, "[PAD]"),
        )
        self.tokenizer.save(str(path))
        self.tokenizer.no_padding()


def tokens_inputs(signature: Signature) -> tuple[TokensInput, ...]:
    """Return the inputs of a signature that read texts."""
    return tuple(item for item in signature.inputs if isinstance(item, TokensInput))


def load_tokenizers(signature: Signature, files: Mapping[str, Path]) -> dict[str, TextTokenizer]:
    """Load the tokenizer of each input that reads texts.

    Args:
        signature: the inputs.
        files: the file of each tokenizer, by its name in the bundle's ``transforms``.

    Returns:
        The tokenizers by the name of the input.

    Raises:
        DataRefused: a tokenizer is missing, cannot be read, or does not fit its input.
    """
    return {item.name: _load(item, files) for item in tokens_inputs(signature)}


def check_tokenizers(
    signature: Signature, files: Mapping[str, Path], rows_of_table: Mapping[str, int]
) -> None:
    """Raise if a tokenizer has ids that are not rows of the tables that its input reads.

    Args:
        signature: the inputs.
        files: the file of each tokenizer, by its name in the bundle's ``transforms``.
        rows_of_table: number of rows by table name.

    Raises:
        DataRefused: a tokenizer cannot be used; or there are such ids, with one line for each
            table.
    """
    lines = []
    for name, loaded in load_tokenizers(signature, files).items():
        vocabulary = loaded.tokenizer.get_vocab(with_added_tokens=True).values()
        largest = max([*vocabulary, *loaded.tokenizer.encode("").ids], default=0)
        lines += [
            f"input {name!r}: tokenizer {loaded.item.tokenizer!r} has ids up to {largest}, table "
            f"{table!r} has {rows_of_table[table]} rows. Pack the tokenizer that the model was "
            "trained with."
            for table in all_tables(loaded.item)
            if largest >= rows_of_table[table]
        ]
    if lines:
        raise DataRefused("tokenizers_unfit", problems=tuple(lines))


def _load(item: TokensInput, files: Mapping[str, Path]) -> TextTokenizer:
    """Load the tokenizer of one input, and apply the settings of the input.

    The tokenizer's direction of truncation, and a length below that of the input, stay in force.
    BPE dropout, which skips merges at random, is for training only: with it, a text has other ids
    each time.
    """
    path = files.get(item.tokenizer)
    if path is None:
        raise DataRefused(
            "tokenizer_missing",
            input=item.name,
            tokenizer=item.tokenizer,
            transforms=tuple(sorted(files)) or ("none",),
        )
    tokenizer = read_tokenizer(path)
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    settings = {"max_length": item.shape[0], "direction": "right", **(tokenizer.truncation or {})}
    longest = min(int(settings["max_length"]), item.shape[0])
    added = tokenizer.num_special_tokens_to_add(is_pair=False)
    tokenizer.no_truncation()
    try:
        with tokenizer_faults():
            tokenizer.encode(UNKNOWN_TEXT)
            empty = tokenizer.encode("")
    except TokenizerFault as fault:
        raise DataRefused(
            "tokenizer_fails",
            input=item.name,
            text="an empty text or an unknown character",
            problem=str(fault),
        ) from fault
    if len(empty) < item.min_length or added >= longest:
        raise DataRefused(
            "tokenizer_length",
            input=item.name,
            tokenizer=item.tokenizer,
            got=len(empty),
            shortest=item.min_length,
            longest=longest,
        )
    # The model always receives token types of 0, since a row has only one text.
    if item.token_types is not None and any(tokenizer.encode("a").type_ids):
        raise DataRefused("tokenizer_types", input=item.name, tokenizer=item.tokenizer)
    tokenizer.enable_truncation(longest, direction=str(settings["direction"]))
    return TextTokenizer(item, tokenizer)


def read_tokenizer(path: Path) -> "Tokenizer":
    """Read a ``tokenizer.json`` within the limits of untrusted JSON.

    Raises:
        DataRefused: it cannot be read, or is not a tokenizer of a version that is known here.
    """
    from tokenizers import Tokenizer  # the import takes 50 ms; only models with texts need it

    try:
        with tokenizer_faults():
            raw = read_bounded(path, MAX_TOKENIZER_BYTES)
            check_limits(raw, MAX_TOKENIZER_BYTES, MAX_TOKENIZER_VALUES)
            return Tokenizer.from_str(raw.decode())
    except TokenizerFault as fault:
        raise DataRefused("tokenizer_unreadable", path=str(path), problem=str(fault)) from fault


class TokenizerFault(Exception):
    """A tokenizer cannot be read, or fails on a text; the message is that of the library."""


@contextmanager
def tokenizer_faults() -> Iterator[None]:
    """Raise ``TokenizerFault`` in place of what the library raises for a faulty tokenizer.

    The library raises ``Exception`` itself; a panic of its Rust code is only a ``BaseException``.
    Exhausted memory and the end of the process are no such faults.
    """
    try:
        yield
    except MemoryError:
        raise
    except BaseException as fault:
        is_panic = type(fault).__module__ == "pyo3_runtime"
        if not is_panic and not isinstance(fault, Exception):
            raise
        problem = " ".join(str(fault).split())[:300].rstrip(".") or repr(fault)
        raise TokenizerFault(problem) from fault
