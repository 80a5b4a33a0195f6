"""The commands of the README run and have the documented result."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drafts import ROWS, write_draft

ROOT = Path(__file__).parents[1]


def commands(containing: str) -> str:
    """The one block of shell commands in the README that contains a text."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found = [block for block in blocks if containing in block]
    assert len(found) == 1, containing
    return found[0]


def write_own_model(folder: Path) -> None:
    """What the README has a user bring along: a class in mymodels.py, a draft called mymodel."""
    shutil.copy(ROOT / "tests" / "draft_network.py", folder / "mymodels.py")
    # Enough test rows to distinguish a loss of 0.002 from none, as the README's limit requires.
    rows = {**ROWS, "test": 30_000}
    write_draft(folder / "draft", name="mymodel", network="mymodels:ClickNet", rows=rows)


@pytest.mark.nightly  # tests/flows/test_s3.py runs the same commands in one process
def test_the_commands_for_a_model_of_ones_own_do_what_they_say(tmp_path: Path) -> None:
    write_own_model(tmp_path)
    bash = shutil.which("bash")
    assert bash is not None
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        [bash, "-euo", "pipefail", "-c", commands("recpress bundle pack ./draft")],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "onnxruntime: accepted" in ran.stdout
    assert (tmp_path / "serving" / "model.onnx").stat().st_size > 0


def test_the_two_commands_of_the_first_screen_are_the_makefiles() -> None:
    block = commands("make demo")
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", block, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
