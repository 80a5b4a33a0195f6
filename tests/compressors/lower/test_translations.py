"""Each module with translations works if it is imported alone, in a new process.

A translation replaces a custom op by ONNX operators when a model is exported. Translations refer to
custom ops, which exist only after the modules of their formats were imported.
"""

import subprocess
import sys
from pathlib import Path

import pytest

MODULES = [
    f"compressors.lower.targets.{name}"
    for name in (
        "onnxruntime.tables",
        "onnxruntime.dense",
        "onnxruntime.operators",
        "tensorrt.tables",
        "tensorrt.operators",
    )
]
SCRIPT = """
import importlib, os, sys
import onnxscript, torch  # slow, so before the forks
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module(name).translations()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(name)
"""


@pytest.mark.slow
def test_translations_of_each_module_need_no_other_import():
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *MODULES],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
