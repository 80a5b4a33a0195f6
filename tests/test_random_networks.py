"""Random networks in every format on every target: one by default, 300 in the nightly tests.

Parity means that the scores of a graph equal those of the module, except for rounding.

To repeat and reduce a failure: ``python -m tests.random_networks --seed 17 --shrink``.
"""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from compressors.contracts.targets.builder import BuildRequest, Profile, TableWeights
from compressors.core.registries import COMPOSITIONS, LINEAR_FORMATS, TABLE_FORMATS
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from infra.tensorrt.engines import build_engine, find_installed_version
from tests.random_networks.check import Checker, Findings, run_check
from tests.random_networks.generator import generate
from tests.random_networks.passes import check_mixed_formats, check_network
from tests.random_networks.shrink import shrink_case
from tests.random_networks.steps import TARGETS

SAMPLE = {11: "onnxruntime", 29: "tensorrt", 52: "tensorrt-rtx"}
"""Targets by seed; only that of ONNX Runtime is checked without the marker ``nightly``."""
NIGHTLY = 300
"""Number of seeds that the nightly tests check."""
ENGINE_SEEDS = (14, 25, 39, 53, 66)
"""Seeds of networks without jagged bags, which ``profile_of`` does not support."""
LOWERED_PAIRS: Counter[str] = Counter()
"""Number of lowered units by format and target, and the number of networks."""


def format_faults(findings: Findings) -> str:
    """Return one line for each fault."""
    return "\n".join(fault.line() for fault in findings.faults)


@pytest.mark.parametrize(
    ("seed", "target"),
    [
        pytest.param(seed, target, marks=() if target == "onnxruntime" else pytest.mark.nightly)
        for seed, target in SAMPLE.items()
    ],
)
def test_a_random_network_has_parity_in_mixed_formats(seed, target):
    result = run_check(
        generate(seed),
        # ``number`` selects the assignment of formats; that there are seven is arbitrary.
        lambda checker: check_mixed_formats(checker, number=seed % 7, target=target) and None,
    )
    assert not result.faults, format_faults(result)
    assert result.counts["parities"] >= 4  # typical, edge, extreme and empty rows


def test_the_same_seed_gives_the_same_network_and_weights():
    first, second = generate(18), generate(18)
    assert (first.config, first.signature) == (second.config, second.signature)
    weights = [case.model().module.state_dict() for case in (first, second)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_shrink_case_keeps_the_failing_part_and_removes_others():
    case = generate(3)
    kinds = {spec["kind"] for spec in case.config["parts"]}
    expected = sorted(kinds - {"Lookup"})[0]

    def fails(candidate):
        return any(spec["kind"] == expected for spec in candidate.config["parts"])

    small = shrink_case(case, fails, seconds=20)
    assert len(small.config["parts"]) <= 3
    assert fails(small)
    small.model()


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(NIGHTLY))
def test_a_random_network_has_parity_in_every_format_on_every_target(seed):
    result = run_check(generate(seed), check_network)
    LOWERED_PAIRS.update(result.pairs)
    LOWERED_PAIRS["networks"] += 1
    assert not result.faults, format_faults(result)


@pytest.mark.nightly
def test_all_random_networks_together_lower_every_format_for_every_target():
    if LOWERED_PAIRS["networks"] < NIGHTLY:
        pytest.skip(f"only {LOWERED_PAIRS['networks']} of {NIGHTLY} networks ran in this process")
    formats = {*TABLE_FORMATS, *LINEAR_FORMATS, *COMPOSITIONS}
    expected = {f"{name} on {target}" for name in formats for target in TARGETS}
    assert {pair: LOWERED_PAIRS[pair] for pair in expected if LOWERED_PAIRS[pair] < 5} == {}


@pytest.mark.nightly
@pytest.mark.parametrize("seed", ENGINE_SEEDS)
def test_the_graphs_for_tensorrt_and_tensorrt_rtx_are_identical(seed, tmp_path):
    model = network_in_mixed_formats(seed, tmp_path)
    for graph in served_graphs(generate(seed).signature):
        paths = [tmp_path / f"{graph.name}-{target}.onnx" for target in TARGETS[1:]]
        for target, path in zip(TARGETS[1:], paths, strict=True):
            lower(model.module, graph, target, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.nightly
@pytest.mark.skipif(
    find_installed_version("tensorrt-rtx") is None, reason="TensorRT-RTX is not installed"
)
@pytest.mark.parametrize("seed", ENGINE_SEEDS)
def test_a_random_network_is_built_as_a_tensorrt_rtx_engine(seed, tmp_path):
    model = network_in_mixed_formats(seed, tmp_path)
    for graph in served_graphs(generate(seed).signature):
        path = tmp_path / f"{graph.name}.onnx"
        lowered = lower(model.module, graph, "tensorrt-rtx", path)
        request = BuildRequest(
            target="tensorrt-rtx",
            onnx=str(path),
            profiles=tuple(profile_of(item) for item in graph.signature.inputs),
            tables=tuple(
                TableWeights(
                    module=table.module,
                    rows=table.rows,
                    initializers=table.names,
                    rows_per_entry=table.every,
                )
                for table in lowered.tables
            ),
            packed_bytes=sum(line.bytes_after for line in model.plan.lines),
            seconds=300,
        )
        assert build_engine(request, tmp_path / graph.name).audit.weights_bytes > 0


def network_in_mixed_formats(seed: int, folder: Path):
    """Return a random network in mixed formats, with one of seven assignments of formats."""
    checker = Checker(generate(seed), folder)
    return check_mixed_formats(checker, random.Random(seed).randrange(7), None)


def profile_of(item) -> Profile:
    """Return the optimization profile of an input for 1, 32 and 64 rows."""
    assert item.kind != "jagged_bag"
    shapes = [(rows, *item.shape) for rows in (1, 32, 64)]
    return Profile(input=item.name, low=shapes[0], best=shapes[1], high=shapes[2])
