"""Open fixtures for the tests. A fixture is a stored home with expected results.

A home is the folder that ``RECPRESS_HOME`` names, with the store and the registry. An earlier
version of recpress wrote each stored home, and the current code must still read it. A fixture is
unpacked once per test run. ``create.py`` writes ``expected.json``; its keys:

- ``recpress``, ``environment``: the version and the environment (``scores.environment``) in which
  the fixture was created;
- ``steps``, ``limits``, ``orders``: lists of JSON documents that must stay valid;
- ``bundles``: by SHA-256, ``model`` (name), ``tensors`` (hash) and ``formats``;
- ``graphs``: by SHA-256, ``model`` (name) and ``graphs`` (names);
- ``recipes``: by name in ``steps.py``, ``model``, ``steps``, and the SHA-256 of ``bundle`` and of
  ``graph``;
- ``tables``: by table format, the SHA-256 of the file that ``recpress tables quantize`` wrote;
- ``finished`` (only if orders were run): by name in ``orders.py``, ``model``, ``version``,
  ``outcome``, ``order``, and the SHA-256 of ``release`` and of ``compressed``;
- ``registry`` (only if orders were run): the output of the commands ``list``, ``show`` (by
  ``model@version``) and ``fetch`` (by model, the SHA-256 of each file) of ``recpress registry``.
"""

import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from compressors.contracts import Artifact
from compressors.lower.comparison.parity import check_parity
from infra.bundle.bundle_folder import read
from tasks.orchestration.workspace import local, store
from tests.stored_home.archive import fixtures, unpack
from tests.stored_home.scores import environment

INPUT_QUANTIZING_FORMATS = {"static_int8", "weight_int8", "weight_int4", "float8_dense"}
"""Formats whose layers quantize their inputs.

Float sums in another order can move an input across the midpoint of two quantization levels, and
then it is rounded to the other level.
"""
SUMMATION_TOLERANCE = 1e-5
"""Tolerance for another order of float sums, relative to the scores' standard deviation.

It is slightly below the worst case of about 1.2e-5. The networks of ``networks.py`` have at most
four layers with at most 51 inputs each, and float32 rounds a product by at most 2 ** -24, or 6e-8,
of its size: 4 * 51 * 6e-8, for sums as large as the standard deviation. The largest measured
difference of 93 bundles is 5e-7 with torch's kernels for SSE (``ATEN_CPU_CAPABILITY=default``), and
9e-7 with the kernels of MKL that every processor runs (``MKL_CBWR=COMPATIBLE``).
"""
_SCRATCH = tempfile.TemporaryDirectory(prefix="stored-home-")


@dataclass(frozen=True)
class Fixture:
    """An unpacked stored home and its expected results.

    Attributes:
        folder: folder of the stored fixture.
        expected: content of ``expected.json``; the module docstring lists its keys.
        tensors: content of ``expected.safetensors``: inputs ``input/<model>/<input>``, scores of a
            bundle ``torch/<sha256>``, and scores of a graph ``onnx/<sha256>/<graph>/rows``, or
            ``.../edge`` for inputs with ids outside the tables.
        root: folder of the unpacked archive (``archive.py``), with the home in ``recpress``.
    """

    folder: Path
    expected: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    root: Path

    def inputs(self, model: str) -> dict[str, torch.Tensor]:
        """Return the fixed inputs for scoring the bundles of a model."""
        prefix = f"input/{model}/"
        tensors = self.tensors.items()
        return {name.removeprefix(prefix): t for name, t in tensors if name.startswith(prefix)}

    def scores(self, key: str) -> NDArray[np.float32]:
        """Return the stored scores or vectors of a key, such as ``torch/<sha256 of a bundle>``."""
        return self.tensors[key].numpy()


@functools.cache
def load_fixture(name: str) -> Fixture:
    """Return a fixture by its name, unpacked to a folder that no test may change."""
    (folder,) = [path for path in fixtures() if path.name == name]
    root = Path(_SCRATCH.name) / name
    unpack(folder, root)
    expected = json.loads((folder / "expected.json").read_text())
    return Fixture(folder, expected, load_file(folder / "expected.safetensors"), root)


NAMES = [path.name for path in fixtures()]
EXPECTED = {path.name: json.loads((path / "expected.json").read_text()) for path in fixtures()}
WITH_ORDERS = [name for name in NAMES if "finished" in EXPECTED[name]]
"""Names of the fixtures whose home contains finished orders and a registry."""


def copy_home(name: str, into: Path) -> Path:
    """Copy a fixture's unpacked archive for a test that changes it, and return the copy."""
    shutil.copytree(load_fixture(name).root, into)
    return into


def use_home(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Set the environment variables so that recpress uses the home in ``root``."""
    monkeypatch.setenv("RECPRESS_HOME", str(root / "recpress"))
    monkeypatch.setenv("RECPRESS_TRITON", str(root / "triton"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "tests.stored_home.networks")
    monkeypatch.setenv("RECPRESS_USER", "tester")


def artifact(sha256: str) -> Artifact:
    """Return an artifact of the current store by its hash."""
    return store().artifact(f"artifacts/{sha256}")


def require_equal(
    actual: NDArray[np.float32], expected: NDArray[np.float32], fixture: Fixture, bundle: str | None
) -> None:
    """Require equal scores in the stored environment, and scores within a tolerance in others.

    An environment is a processor with library versions (``scores.environment``).

    Args:
        actual: scores of the current code.
        expected: stored scores.
        fixture: the fixture; its environment is compared with the current one.
        bundle: SHA-256 of the bundle whose plan sets the tolerance; None for an original model.

    Raises:
        AssertionError: the scores differ.
        ParityLost: the scores of a bundle with layers that quantize inputs differ too much.
    """
    plan = None if bundle is None else read(local(artifact(bundle))).plan
    formats = {line.format for line in plan.lines} if plan is not None else set()
    if environment() == fixture.expected["environment"]:
        np.testing.assert_array_equal(actual, expected)
    elif formats & INPUT_QUANTIZING_FORMATS:
        check_parity(expected, actual, plan, "onnxruntime")
    else:
        spread = float(np.nanstd(expected))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=SUMMATION_TOLERANCE * spread)


def bundle_of(graph: str, expected: dict[str, Any]) -> str | None:
    """Return the hash of the compressed bundle of a graph; None if the model is uncompressed.

    Args:
        graph: SHA-256 of the graph's artifact.
        expected: content of ``expected.json``.
    """
    for recipe in expected["recipes"].values():
        if recipe["graph"] == graph:
            return str(recipe["bundle"])
    for report in expected.get("registry", {"show": {}})["show"].values():
        if graph in [target["artifact"]["sha256"] for target in report["targets"]]:
            return str(report["compressed"]["sha256"])
    return None
