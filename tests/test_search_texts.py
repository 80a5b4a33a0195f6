"""The sample client for texts computes every tensor that a text encoder may read."""

import json
from pathlib import Path

import onnx
import pytest
from onnx import parser
from token_draft import word_tokenizer

from examples.search_texts import load_towers, main

GRAPH = """
<ir_version: 9, opset_import: ["" : 20]>
encoder (int64[rows, length] ids, bool[rows, length] is_token, int64[rows] count,
         int32[rows, length] position) => (float[rows, width] vector)
{
    id_values = Cast<to = 1>(ids)
    mask_values = Cast<to = 1>(is_token)
    position_values = Cast<to = 1>(position)
    counts = Cast<to = 1>(count)
    axis = Constant<value_ints = [1]>()
    count_column = Unsqueeze(counts, axis)
    vector = Concat<axis = 1>(id_values, mask_values, position_values, count_column)
}
"""
PAD, UNKNOWN, CLS, SEP, FIRST_WORD = range(5)


def write_version(folder: Path, texts: int = 2) -> Path:
    """Write the files of a fetched version: a graph whose vectors are its inputs, and a tokenizer.

    The tokenizer pads on the left. ``texts`` is the number of text inputs in ``lowering.json``.
    """
    onnx.save(parser.parse_model(GRAPH), folder / "encoder.onnx")
    tokenizer = word_tokenizer()
    tokenizer.enable_padding(direction="left", pad_id=PAD, pad_token="[PAD]")
    tokenizer.save(str(folder / "tokenizer.json"))
    text = {
        "graph": "encoder",
        "tokenizer": "tokenizer.json",
        "ids": "ids",
        "mask": "is_token",
        "token_types": None,
        "lengths": "count",
        "positions": "position",
        "first_position": 2,
    }
    (folder / "lowering.json").write_text(json.dumps({"texts": [text] * texts}))
    return folder


def test_client_computes_mask_lengths_and_positions_on_the_side_of_padding(tmp_path):
    query, document = load_towers(write_version(tmp_path))
    assert query.session is document.session
    longer, shorter = query.compute_vectors(["w0 w1", "w2"])
    word = FIRST_WORD
    # A vector has the ids, the mask, the positions, and the length without padding.
    expected = [CLS, word, word + 1, SEP, *(1, 1, 1, 1), *(2, 3, 4, 5), 4]
    assert longer.tolist() == expected
    assert shorter.tolist() == [PAD, CLS, word + 2, SEP, *(0, 1, 1, 1), *(0, 2, 3, 4), 3]


def test_client_pads_empty_texts_of_a_tokenizer_without_special_tokens_to_one_position(tmp_path):
    query, _ = load_towers(write_version(tmp_path))
    query.tokenizer.post_processor = None
    assert query.compute_vectors(["", ""]).tolist() == [[PAD, 0, 0, 0]] * 2


def test_client_refuses_a_version_with_another_number_of_texts(tmp_path):
    with pytest.raises(ValueError, match="got 3 texts"):
        load_towers(write_version(tmp_path, texts=3))


def test_client_exits_with_code_2_without_documents(tmp_path):
    documents = tmp_path / "documents.txt"
    documents.write_text("")
    with pytest.raises(SystemExit) as caught:
        main([str(write_version(tmp_path)), str(documents), "query"])
    assert caught.value.code == 2
