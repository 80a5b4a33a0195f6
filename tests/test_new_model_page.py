"""The examples of docs/new-model.md, run as a user runs them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click_data import ITEMS, USERS, write_clicks
from safetensors.torch import save_file

PAGE = Path(__file__).parents[1] / "docs" / "new-model.md"
LIBRARIES = Path(sys.prefix) / "libraries"


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page in one language."""
    all_blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in all_blocks if name == language]


def run(folder: Path, commands: str) -> str:
    """Run shell commands of the page in a folder; return their output."""
    bash = shutil.which("bash")
    assert bash is not None
    commands = commands.replace("PYTHONPATH=.", f"PYTHONPATH=.:{LIBRARIES}")
    environment = {
        **os.environ,
        "RECPRESS_HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    result = subprocess.run(
        [
            bash,
            "-euo",
            "pipefail",
            "-c",
            commands.replace("PYTHONPATH=.", f"PYTHONPATH=.:{LIBRARIES}"),
        ],
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
    """A user's folder with the data and modules of the page."""
    write_clicks(tmp_path / "data")
    shop, rechub, deepctr = blocks("python")
    (tmp_path / "shop_models.py").write_text(shop)
    (tmp_path / "rechub_click.py").write_text(rechub)
    (tmp_path / "deepctr_click.py").write_text(deepctr)
    names: dict[str, type] = {}
    exec(shop, names)  # noqa: S102 - the code of the page
    torch.manual_seed(0)
    save_file(
        names["ShopNet"](users=USERS, items=ITEMS, dim=8).state_dict(),
        tmp_path / "weights.safetensors",
    )
    return tmp_path


def test_first_example_prints_what_the_page_shows(folder: Path) -> None:
    export, new, pack, *_ = blocks("sh")[0].splitlines()
    output = run(folder, f"{export}\n{new}\n{pack}\n")
    (shown,) = (block for block in blocks("") if "reason" in block)
    assert output.startswith(shown)


def test_class_with_weights_and_config_becomes_the_same_draft(folder: Path) -> None:
    export, new, *_ = blocks("sh")[0].splitlines()
    run(folder, f"{export}\n{new}\nmv draft first\n{blocks('sh')[1]}")
    for name in ("model.json", "model.safetensors"):
        assert (folder / "draft" / name).read_bytes() == (folder / "first" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("index", "library"), [(2, "torch_rechub"), (3, "deepctr_torch")])
def test_model_of_a_library_is_trained_packed_and_compressed(
    folder: Path, index: int, library: str
) -> None:
    commands = blocks("sh")[index]
    assert library in commands
    output = run(folder, commands)
    assert "onnxruntime: accepted" in output
