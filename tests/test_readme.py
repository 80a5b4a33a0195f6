"""Run the commands of the README and check their documented results.

A draft is the folder of a bundle before it is packed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drafts import ROWS, write_draft

ROOT = Path(__file__).parents[1]


def readme_commands(containing: str) -> str:
    """Return the block of shell commands in the README that contains a text."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    matching = [block for block in blocks if containing in block]
    assert len(matching) == 1, containing
    return matching[0]


def write_own_model(folder: Path) -> None:
    """Write the files that the README's commands need: mymodels.py and the draft of mymodel."""
    shutil.copy(ROOT / "tests" / "draft_network.py", folder / "mymodels.py")
    # The README's limit allows a loss of 0.002; with fewer test rows the verdict is undecided.
    rows = {**ROWS, "test": 30_000}
    write_draft(folder / "draft", name="mymodel", network="mymodels:ClickNet", rows=rows)


@pytest.mark.nightly  # tests/flows/test_s3.py runs the same commands in one process
def test_readme_commands_for_own_model_write_an_accepted_graph(tmp_path: Path) -> None:
    write_own_model(tmp_path)
    bash = shutil.which("bash")
    assert bash is not None
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [bash, "-euo", "pipefail", "-c", readme_commands("recpress bundle pack ./draft")],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "onnxruntime: accepted" in result.stdout
    assert (tmp_path / "serving" / "model.onnx").stat().st_size > 0


def test_make_targets_of_the_readme_exist_in_the_makefile() -> None:
    block = readme_commands("make demo")
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", block, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
