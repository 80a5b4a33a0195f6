"""The examples of docs/encoders.md, run as a user runs them."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from page_examples import code_blocks, run_commands
from token_draft import encode, write_texts

from tasks.bundles.text_models import load_text_model

ROOT = Path(__file__).parents[1]
PAGE, OTHER_PAGE = ROOT / "docs" / "encoders.md", ROOT / "docs" / "new-model.md"
MODEL = ROOT / "tests" / "text_models" / "fixtures" / "bert"
"""A small model with the settings of all-MiniLM-L6-v2's folder, and random weights."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with a model, and with texts whose relevant documents it ranks high."""
    model = load_text_model(MODEL)
    (tokenizer,) = model.tokenizers.values()
    write_texts(
        tmp_path / "scifact",
        lambda _, texts: encode(model.network.encoder, tokenizer, texts, model.longest),
        np.random.default_rng(0),
    )
    shutil.copytree(MODEL, tmp_path / "all-MiniLM-L6-v2")
    return tmp_path


def words(output: str) -> list[str]:
    """Return the words of an output without numbers and lines of tables, which differ in size."""
    without_lines = re.sub(r"[━┏┳┓┃┡╇┩│└┴┘─]", " ", output)
    return re.sub(r"\d[\d,]*", "N", without_lines).split()


@pytest.mark.slow
def test_first_example_prints_what_the_page_shows(folder: Path) -> None:
    new, pack, _ = code_blocks(PAGE, "sh")[0].splitlines()
    (shown,) = (block for block in code_blocks(PAGE, "") if "reason" in block)
    output = run_commands(folder, f"{new}\n{pack}\n")
    assert words(output)[: len(words(shown))] == words(shown)
    assert "all-minilm-l6-v2@1" in output


def test_page_on_new_models_has_the_command_of_this_page() -> None:
    (other,) = (block for block in code_blocks(OTHER_PAGE, "sh") if "--sentence" in block)
    commands = "".join(code_blocks(PAGE, "sh")[0].splitlines(keepends=True)[:2])
    assert other.replace("./encoder", "./draft") == commands
