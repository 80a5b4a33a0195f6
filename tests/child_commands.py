"""Run a script in one child process that executes many commands, so that it imports only once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SETTING_PREFIXES = ("AWS_", "MLFLOW_TRACKING_", "RECPRESS_")
SendCommand = Callable[[str], list[dict[str, Any]]]


@contextmanager
def running_child(
    script: str, *arguments: str, variables: Mapping[str, str]
) -> Iterator[SendCommand]:
    """Start a script and yield a function that sends it a command and returns its JSON replies.

    A command is one line; the replies are the lines that the script prints up to an empty line.

    Args:
        script: path relative to the root, which is its working directory and an import path.
        arguments: command-line arguments of the script.
        variables: added to the environment, from which all settings of a store or registry are
            removed.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(SETTING_PREFIXES)
    }
    paths = (ROOT, ROOT / "tests", ROOT / "tests" / "tasks")
    environment = {**inherited, "PYTHONPATH": os.pathsep.join(map(str, paths)), **variables}
    with subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        commands, replies = process.stdin, process.stdout
        assert commands is not None
        assert replies is not None

        def send(line: str) -> list[dict[str, Any]]:
            commands.write(f"{line}\n")
            commands.flush()
            lines = list(iter(replies.readline, "\n"))
            assert "" not in lines, f"{script} ended with {process.wait()}"
            return [json.loads(reply) for reply in lines]

        yield send
        commands.close()
    assert process.returncode == 0
