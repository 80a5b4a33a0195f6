"""Checks of the repository: pinned dependencies, file sizes, machine paths, make targets, lint."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from repository_files import repository_files

ROOT = Path(__file__).parents[1]
MAX_FILE_BYTES = 1_000_000
# The extras that `make .venv` installs, except the data of the demo.
INSTALLED_EXTRAS = ("dev", "services", "tensorrt-rtx")
# CUDA builds of torch pin these, and CPU builds do not require them.
PINNED_BY_TORCH = re.compile(r"^(nvidia|cuda)-|^triton$")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|Users|home)/[\w.]")
REGISTRY_HOST = re.compile(
    r"pypi\.(?:org|nvidia|python)|pythonhosted\.|download\.pytorch\.|anaconda\.(?:org|com)"
    r"|index-url[ =]+\S*://",
    re.IGNORECASE,
)
# Imported modules of packages that only our dependencies require, and why we may rely on it.
USED_THROUGH_OTHERS = {
    "aiohttp": "s3fs raises its errors, which we catch by their class",
    "botocore": "s3fs raises its errors, which we catch by their class",
    "onnx_ir": "the values that onnxscript's translation functions build",
    "llvmlite": "numba requires exactly one version of it",
    "markupsafe": "jinja2 requires it; its Markup marks text that is already escaped",
    "packaging": "pytest requires it; used in tests only",
    "pydantic_core": "pydantic requires exactly one version of it",
    "uvicorn": "runs prefect's server",
    "websockets": "prefect's client requires it; used in tests only",
}
# Imported modules of packages that need not be installed.
OPTIONAL = {
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "tensorrt_bindings",
    "torch_pruning",
    "modelopt",
    "nncf",
    "openvino",
    "keras",  # of the example that trains a model of TensorFlow, in an environment of its own
    "tf2onnx",
    "sentence_transformers",  # of the script that writes the models in tests/text_models
    "transformers",
}


def project() -> dict:
    """Return the contents of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared_requirements(*extras: str) -> list[Requirement]:
    """Return the requirements in pyproject.toml with the named extras, by default with all."""
    table = project()["project"]
    optional = table["optional-dependencies"]
    lines = table["dependencies"] + [
        line for extra in extras or optional for line in optional[extra]
    ]
    return [Requirement(line) for line in lines]


def pinned_versions() -> dict[str, Version]:
    """Read constraints.txt: version by name; raises for lines other than ``name==version``."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(name): Version(version) for name, version in pairs}
    assert len(versions) == len(pairs), "a package is pinned twice"
    return versions


def required_versions(remaining: list[Requirement]) -> dict[str, Version]:
    """Return the installed versions, by name, of the required packages and their requirements."""
    versions: dict[str, Version] = {}
    visited: set[tuple[str, frozenset[str]]] = set()
    while remaining:
        requirement = remaining.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        installed = metadata.distribution(name)  # raises if the environment is incomplete
        versions[name] = Version(installed.version)
        for line in installed.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in {*extras, ""}
            ):
                remaining.append(needed)
    return versions


def texts() -> list[tuple[Path, str]]:
    """Return path and text of every file of the repository."""
    return [
        (path.relative_to(ROOT), path.read_bytes().decode("utf-8", "replace"))
        for path in repository_files()
    ]


def targets() -> set[str]:
    """Return the targets of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([.a-z-]+):(?!=)", makefile, re.MULTILINE)) - {".PHONY"}


def test_every_package_that_make_installs_is_pinned_to_the_installed_version():
    pinned = pinned_versions()
    recbole = metadata.version("recbole")  # installed without its requirements
    libraries = metadata.distributions(path=[str(Path(sys.prefix) / "libraries")])
    needed = required_versions(declared_requirements(*INSTALLED_EXTRAS)) | {
        "recbole": Version(recbole),
        **{canonicalize_name(item.name): Version(item.version) for item in libraries},
    }
    # A local version such as 2.13.0+cpu counts as the pinned version.
    differing = {
        name: f"installed {version}, pinned {pinned.get(name)}"
        for name, version in needed.items()
        if not PINNED_BY_TORCH.match(name) and Version(version.public) != pinned.get(name)
    }
    assert differing == {}
    assert len(needed) > 100


def test_every_pin_is_a_version_that_pyproject_accepts():
    pinned = pinned_versions()
    refused = [
        str(requirement)
        for requirement in declared_requirements()
        if requirement.name != "tensorrt"  # installed from the vendor, so not pinned
        and not requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
    ]
    assert refused == []


def test_every_third_party_import_is_a_declared_dependency():
    names = {canonicalize_name(requirement.name) for requirement in declared_requirements()}
    owners = metadata.packages_distributions()
    libraries = {  # installed in a separate folder
        Requirement(line).name.replace("-", "_")
        for line in project()["project"]["optional-dependencies"]["libraries"]
    }
    own_folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    own_modules = {path.stem for path in ROOT.glob("*.py")}
    undeclared = set()
    for path, text in texts():
        if path.suffix != ".py":
            continue
        local_modules = {item.stem for item in (ROOT / path).parent.glob("*.py")}
        local_modules |= {item.stem for item in (ROOT / "tests").glob("*.py")}
        for node in ast.walk(ast.parse(text)):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for top in {module.partition(".")[0] for module in modules}:
                allowed = (
                    sys.stdlib_module_names
                    | own_folders
                    | own_modules
                    | local_modules
                    | USED_THROUGH_OTHERS.keys()
                    | OPTIONAL
                    | libraries
                )
                distributions = {canonicalize_name(owner) for owner in owners.get(top, [])}
                if top not in allowed and not distributions & names:
                    undeclared.add(f"{path}: {top}")
    assert sorted(undeclared) == []


def test_no_file_is_over_1_mb():
    assert [str(path) for path in repository_files() if path.stat().st_size > MAX_FILE_BYTES] == []


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["paths", "hosts"])
def test_no_file_has_a_path_of_a_machine_or_a_host_of_a_package_registry(pattern):
    matching_lines = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in texts()
        if path.name != "LICENSE"
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
    assert matching_lines == []


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (MACHINE_PATH, "see " + "/work" + "/main/x.py"),
        (MACHINE_PATH, '"' + "/home" + '/me/model"'),
        (REGISTRY_HOST, "https://" + "pypi" + ".org/simple"),
        (REGISTRY_HOST, "pip install --index-url" + " https://host/whl"),
    ],
)
def test_patterns_find_machine_paths_and_registry_hosts(pattern, text):
    assert pattern.search(text)


def test_every_make_command_in_readme_and_contributing_is_a_target():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = readme + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    command = re.compile(r"(?:^|`)make ([.a-z-]+)", re.MULTILINE)
    assert {"demo", "test"} <= set(command.findall(readme))
    assert set(command.findall(prose)) - targets() == set()


def test_make_help_lists_every_target():
    output = subprocess.run(
        ["make", "--no-print-directory"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split()[1] for line in output.splitlines()} == targets()


def test_every_ignored_lint_rule_has_a_reason():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    start = lines.index("ignore = [") + 1
    entries = lines[start : lines.index("]", start)]
    assert [line for line in entries if not re.search(r'",\s+# \S', line)] == []
    start = lines.index("[tool.ruff.lint.per-file-ignores]") + 1
    entries = lines[start : lines.index("", start)]
    without_comment = [
        line
        for before, line in zip(["", *entries], entries, strict=False)
        if not line.startswith("#") and "#" not in line and not before.startswith("#")
    ]
    assert without_comment == []
    assert len(project()["tool"]["ruff"]["lint"]["ignore"]) > 5
