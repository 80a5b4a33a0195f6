"""Conversion of texts to token ids when data is prepared, and refused tokenizers.

The data is the catalogue (the split ``items``): documents with a text. A bundle has its tokenizer
as a transform, a file that is stored with the model.
"""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from error_codes import raises_code
from token_draft import LONGEST_DOCUMENT, SIGNATURE, VOCABULARY, word_tokenizer
from tokenizers import Tokenizer, models, processors

from compressors.contracts import ITEMS, Signature, Split
from compressors.core.batches import MAX_TOKENS, Rows, batches, rows_per_batch
from infra.data.catalogue import prepare
from infra.data.expectations import Rules, validate
from infra.data.parquet import Violations
from infra.data.tokenization import check_tokenizers, load_tokenizers
from infra.errors import DataRefused

TEXTS = Signature.model_validate(SIGNATURE)
CATALOGUE = TEXTS.of_split(ITEMS)
TABLES = {"encoder.word": VOCABULARY}
PAD, UNKNOWN, CLS, SEP = range(4)  # ids of the special tokens; those of words begin with 4


def save_tokenizer(folder, tokenizer=None):
    """Save a tokenizer, by default one of words; return its file by the transform's name."""
    path = folder / "tokenizer.json"
    (tokenizer or word_tokenizer()).save(str(path))
    return {"tokenizer.json": path}


def prepare_items(folder, texts, tokenizer=None, signature=TEXTS):
    """Prepare a catalogue of these texts; return it as a split."""
    table = pa.table({"document": range(len(texts)), "text": pa.array(texts, pa.string())})
    pq.write_table(table, folder / "items.parquet")
    files = save_tokenizer(folder, tokenizer)
    prepare({ITEMS: folder / "items.parquet"}, ITEMS, signature, folder / "out", files)
    return Split(path=str(folder / "out"), sha256="0" * 64, rows=len(texts))


def with_documents(**changes):
    """Return the signature with some fields of the documents' input replaced."""
    first, documents, key = SIGNATURE["inputs"]
    return Signature.model_validate(SIGNATURE | {"inputs": [first, documents | changes, key]})


def test_batch_has_ids_and_mask_padded_to_its_longest_text(tmp_path):
    split = prepare_items(tmp_path, ["w0 w2 w0", "", "unknown w1"])
    (batch,) = batches(split, CATALOGUE, 8)
    word = {f"w{index}": 4 + index for index in range(3)}
    assert batch.inputs["document_ids"].tolist() == [
        [CLS, word["w0"], word["w2"], word["w0"], SEP],
        [CLS, SEP, PAD, PAD, PAD],
        [CLS, UNKNOWN, word["w1"], SEP, PAD],
    ]
    assert batch.inputs["document_mask"].tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
    ]
    assert batch.inputs["document_mask"].dtype == torch.int64
    # Training puts rows of similar length in one batch.
    assert Rows(split, CATALOGUE).lengths().tolist() == [5, 2, 4]


@pytest.mark.parametrize(
    ("direction", "longest", "words"),
    # LONGEST_DOCUMENT is 12: ten words, [CLS] and [SEP].
    [("right", 100, range(10)), ("left", 100, range(10, 20)), ("right", 6, range(4))],
)
def test_long_text_is_truncated_on_the_side_and_to_the_length_of_the_tokenizer(
    tmp_path, direction, longest, words
):
    tokenizer = word_tokenizer()
    tokenizer.enable_truncation(longest, direction=direction)
    tokenizer.enable_padding(length=128)  # padding of the tokenizer's file is not used
    split = prepare_items(tmp_path, [" ".join(f"w{index}" for index in range(20))], tokenizer)
    (ids,) = next(batches(split, CATALOGUE, 8)).inputs["document_ids"].tolist()
    assert ids == [CLS, *(4 + index for index in words), SEP]
    assert len(ids) == min(longest, LONGEST_DOCUMENT)


def test_token_types_are_zero_everywhere(tmp_path):
    signature = with_documents(token_types="types")
    split = prepare_items(tmp_path, ["w0", "w1 w2"], signature=signature)
    inputs = next(batches(split, signature.of_split(ITEMS), 8)).inputs
    assert inputs["types"].tolist() == [[0] * 4] * 2  # the longer text has four tokens
    assert inputs["types"].dtype == torch.int64


def test_batches_of_long_texts_have_at_most_max_tokens():
    long = with_documents(shape=[1000]).of_split(ITEMS)
    assert rows_per_batch(long, 1024) == MAX_TOKENS // 1000
    assert rows_per_batch(CATALOGUE, 8) == 8  # a size below the limit is not changed


def test_null_text_is_refused_with_its_row_by_conversion_and_validation(tmp_path):
    with raises_code(DataRefused, "schema_unfit") as caught:
        prepare_items(tmp_path, ["w0", None, "w1"])
    (problem,) = caught.value.fields["problems"]
    assert problem == "column 'text': null text; 1 value(s), first in row(s) 1."
    validation = validate({ITEMS: tmp_path / "items.parquet"}, TEXTS, TABLES, Rules())
    (failed,) = (finding for finding in validation.findings if not finding.success)
    assert (failed.column, failed.failing_rows) == ("text", (1,))


def test_column_of_numbers_in_place_of_texts_is_refused(tmp_path):
    table = pa.table({"document": [0], "text": [3]})
    pq.write_table(table, tmp_path / "items.parquet")
    with raises_code(DataRefused, "schema_unfit") as caught:
        prepare(
            {ITEMS: tmp_path / "items.parquet"}, ITEMS, TEXTS, tmp_path, save_tokenizer(tmp_path)
        )
    assert "needs string, found integer" in caught.value.fields["problems"][0]


def test_tokenizer_with_ids_beyond_the_table_is_refused(tmp_path):
    files = save_tokenizer(tmp_path)
    check_tokenizers(TEXTS, files, TABLES)
    with raises_code(DataRefused, "tokenizers_unfit") as caught:
        check_tokenizers(TEXTS, files, {"encoder.word": VOCABULARY - 1})
    assert len(caught.value.fields["problems"]) == 2  # one for each input that reads texts
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["new"])
    with raises_code(DataRefused, "tokenizers_unfit"):
        check_tokenizers(TEXTS, save_tokenizer(tmp_path, tokenizer), TABLES)


def test_tokenizer_that_is_not_among_the_transforms_is_refused(tmp_path):
    files = {"other.json": save_tokenizer(tmp_path)["tokenizer.json"]}
    with raises_code(DataRefused, "tokenizer_missing", transforms=("other.json",)):
        check_tokenizers(TEXTS, files, TABLES)


@pytest.mark.parametrize("content", ["{}", "[" * 100_000, "not JSON", '{"model": 1e999}'])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    save_tokenizer(tmp_path)["tokenizer.json"].write_text(content)
    with raises_code(DataRefused, "tokenizer_unreadable"):
        check_tokenizers(TEXTS, {"tokenizer.json": tmp_path / "tokenizer.json"}, TABLES)


def test_tokenizer_that_gives_an_empty_text_too_few_tokens_is_refused(tmp_path):
    plain = Tokenizer.from_str(word_tokenizer().to_str())
    plain.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    files = save_tokenizer(tmp_path, plain)
    with raises_code(DataRefused, "tokenizer_length", got=0, shortest=2):
        check_tokenizers(TEXTS, files, TABLES)


def test_input_without_room_for_a_token_is_refused(tmp_path):
    signature = with_documents(shape=[2])
    with raises_code(DataRefused, "tokenizer_length", longest=2):
        check_tokenizers(signature, save_tokenizer(tmp_path), TABLES)


def test_tokenizer_with_other_token_types_is_refused_if_the_network_receives_them(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:1 $A:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    files = save_tokenizer(tmp_path, tokenizer)
    check_tokenizers(TEXTS, files, TABLES)
    with raises_code(DataRefused, "tokenizer_types"):
        check_tokenizers(with_documents(token_types="types"), files, TABLES)


def test_bpe_dropout_of_a_tokenizer_is_off_when_data_is_prepared(tmp_path):
    merges = models.BPE(
        vocab={"[UNK]": 0, "a": 1, "b": 2, "ab": 3},
        merges=[("a", "b")],
        dropout=0.5,
        unk_token="[UNK]",
    )
    signature = with_documents(min_length=0)
    split = prepare_items(tmp_path, ["ab"] * 30, Tokenizer(merges), signature)
    ids = next(batches(split, signature.of_split(ITEMS), 30)).inputs["document_ids"]
    assert ids.tolist() == [[3]] * 30  # with dropout, about half of the rows are [1, 2]


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel(vocab={"a": 0}, unk_token="[UNK]"),
        models.WordPiece(vocab={"a": 0}, unk_token="[UNK]"),
        models.Unigram([("a", 0.0)], unk_id=None),
    ],
    ids=lambda model: type(model).__name__,
)
def test_tokenizer_without_a_token_for_unknown_words_is_refused(tmp_path, model):
    with raises_code(DataRefused, "tokenizer_fails", input="input_ids"):
        check_tokenizers(TEXTS, save_tokenizer(tmp_path, Tokenizer(model)), TABLES)


def test_panic_of_the_library_is_a_refusal(tmp_path):
    """Such a fault is no ``Exception`` in Python."""
    content = json.loads(word_tokenizer().to_str())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with raises_code(DataRefused, "tokenizer_unreadable"):
        check_tokenizers(TEXTS, {"tokenizer.json": path}, TABLES)


def test_refusal_of_a_text_names_its_row(tmp_path):
    class FailsOnLongTexts:
        """A tokenizer whose library fails on one text, as with a faulty table of characters."""

        def encode_batch_fast(self, texts):
            if any(len(text) > 3 for text in texts):
                raise Exception("charsmap")  # noqa: TRY002 - as the library does
            return word_tokenizer().encode_batch_fast(texts)

    loaded = load_tokenizers(TEXTS, save_tokenizer(tmp_path))["document_ids"]
    faulty = replace(loaded, tokenizer=FailsOnLongTexts())
    # The first of the four texts is row 1000 of the split.
    with raises_code(DataRefused, "tokenizer_fails", text="row 1,002", problem="charsmap"):
        faulty.convert(pa.array(["a", "b", "long", "c"]), 1000, Violations())
