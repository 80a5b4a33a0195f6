"""The examples of docs/onnx-models.md, run as a user runs them."""

import shutil
from pathlib import Path

import pytest
from click_data import write_clicks
from page_examples import code_blocks, run_commands

from compressors.onnx_network.operators.registry import OPERATORS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "onnx-models.md"
MODEL = ROOT / "tests" / "onnx_files" / "keras_clicks.onnx"
"""What ``examples/keras_clicks.py`` wrote for the data of ``write_clicks``."""


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page in one language."""
    return code_blocks(PAGE, language)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with the data and the exported model."""
    write_clicks(tmp_path / "data")
    shutil.copy(MODEL, tmp_path / "model.onnx")
    (tmp_path / "export_clicks.py").write_text(blocks("python")[1])
    return tmp_path


@pytest.mark.slow
def test_first_example_prints_what_the_page_shows(folder: Path) -> None:
    new, pack, _ = blocks("sh")[0].splitlines()
    (shown,) = (block for block in blocks("") if "reason" in block)
    assert run_commands(folder, f"{new}\n{pack}\n").startswith(shown)


def test_page_lists_the_operators() -> None:
    listed = " ".join(line[2:] for line in PAGE.read_text().splitlines() if line.startswith("> "))
    assert listed.rstrip(".").split(", ") == sorted(OPERATORS)


def test_page_shows_the_export_of_the_example() -> None:
    assert blocks("python")[0].strip() in (ROOT / "examples" / "keras_clicks.py").read_text()


@pytest.mark.slow
def test_model_of_keras_is_compressed_and_registered(folder: Path) -> None:
    output = run_commands(folder, blocks("sh")[0])
    assert "onnxruntime: accepted" in output
    assert "Registered: clicks version 1" in output


@pytest.mark.slow
def test_model_of_torch_is_exported_packed_and_compressed_small(folder: Path) -> None:
    compress = "recpress compress torch-clicks --preset small --target onnxruntime"
    limit = "--limit 'auc vs baseline >= -0.05'"
    output = run_commands(folder, f"{blocks('sh')[1]}\n{compress} {limit}\n")
    assert "onnxruntime: accepted" in output
