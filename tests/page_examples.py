"""Run the examples of a documentation page as a user runs them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def code_blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in blocks if name == language]


def run_commands(folder: Path, commands: str) -> str:
    """Run shell commands of a page in a folder that also has their home; return their output."""
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
