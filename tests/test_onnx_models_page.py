"""The examples of docs/onnx-models.md, run as a user runs them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click_data import write_clicks

from compressors.onnx_network.operators.table import OPERATORS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "onnx-models.md").read_text()
MODEL = ROOT / "tests" / "onnx_files" / "keras_clicks.onnx"
"""What ``examples/keras_clicks.py`` wrote for the data of ``write_clicks``."""


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page in one language."""
    all_blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [text for name, text in all_blocks if name == language]


def run(folder: Path, commands: str) -> str:
    """Run shell commands of the page in a folder; return their output."""
    bash = shutil.which("bash")
    assert bash is not None
    environment = {
        **os.environ,
        "RECPRESS_HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    result = subprocess.run(
        [bash, "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with the data and the exported model."""
    write_clicks(tmp_path / "data")
    shutil.copy(MODEL, tmp_path / "model.onnx")
    (tmp_path / "export_clicks.py").write_text(blocks("python")[1])
    return tmp_path


def test_first_example_prints_what_the_page_shows(folder: Path) -> None:
    new, pack, _ = blocks("sh")[0].splitlines()
    (shown,) = (block for block in blocks("") if "reason" in block)
    assert run(folder, f"{new}\n{pack}\n").startswith(shown)


def test_page_lists_the_operators() -> None:
    listed = " ".join(line[2:] for line in PAGE.splitlines() if line.startswith("> "))
    assert listed.rstrip(".").split(", ") == sorted(OPERATORS)


def test_page_shows_the_export_of_the_example() -> None:
    assert blocks("python")[0].strip() in (ROOT / "examples" / "keras_clicks.py").read_text()


@pytest.mark.slow
def test_model_of_keras_is_compressed_and_registered(folder: Path) -> None:
    output = run(folder, blocks("sh")[0])
    assert "onnxruntime: accepted" in output
    assert "Registered: clicks version 1" in output


@pytest.mark.slow
def test_model_of_torch_is_exported_packed_and_compressed_small(folder: Path) -> None:
    compress = "recpress compress torch-clicks --preset small --target onnxruntime"
    limit = "--limit 'auc vs baseline >= -0.05'"
    output = run(folder, f"{blocks('sh')[1]}\n{compress} {limit}\n")
    assert "onnxruntime: accepted" in output
