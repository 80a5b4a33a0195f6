"""A script that answers lines with JSON: it imports once what every line needs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOREIGN = ("AWS_", "MLFLOW_TRACKING_", "RECPRESS_")
Answers = Callable[[str], list[dict[str, Any]]]


@contextmanager
def answering(script: str, *arguments: str, variables: Mapping[str, str]) -> Iterator[Answers]:
    """Start a script; give it a line and get what it prints up to an empty line, parsed.

    Args:
        script: below the root, which is its working directory and among its import paths.
        arguments: of the script.
        variables: of its environment, besides those that belong to nobody's store or registry.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    paths = (ROOT, ROOT / "tests", ROOT / "tests" / "tasks")
    environment = {**kept, "PYTHONPATH": os.pathsep.join(map(str, paths)), **variables}
    with subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def answer(line: str) -> list[dict[str, Any]]:
            asked.write(f"{line}\n")
            asked.flush()
            found = list(iter(answers.readline, "\n"))
            assert "" not in found, f"{script} ended with {process.wait()}"
            return [json.loads(item) for item in found]

        yield answer
        asked.close()
    assert process.returncode == 0
