"""What a visitor relies on: pins that are complete, commands that exist, files that are ours."""

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
LARGEST = 1_000_000
# What `make .venv` names, besides the demo's data.
INSTALLED_EXTRAS = ("dev", "services", "tensorrt-rtx")
# CUDA builds of torch pin these themselves, CPU builds do not have them.
PINNED_BY_TORCH = re.compile(r"^(nvidia|cuda)-|^triton$")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|Users|home)/[\w.]")
REGISTRY_HOST = re.compile(
    r"pypi\.(?:org|nvidia|python)|pythonhosted\.|download\.pytorch\.|anaconda\.(?:org|com)"
    r"|index-url[ =]+\S*://",
    re.IGNORECASE,
)
# Import names whose distribution somebody else of ours requires, and why that is safe to rely on.
BROUGHT_ALONG = {
    "aiohttp": "s3fs lets its errors through, so they have to be named",
    "botocore": "s3fs lets its errors through, so they have to be named",
    "onnx_ir": "the values that onnxscript's translation functions build",
    "llvmlite": "numba requires exactly one version of it",
    "markupsafe": "jinja2 requires it; its Markup marks what is escaped already",
    "packaging": "pytest requires it; used in tests only",
    "pydantic_core": "pydantic requires exactly one version of it",
    "uvicorn": "prefect's server is run by it",
    "websockets": "prefect's client requires it; used in tests only",
}
OPTIONAL = {
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "tensorrt_bindings",
    "torch_pruning",
    "modelopt",
}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared(*extras: str) -> list[Requirement]:
    """Our requirements with the named extras, or with all of them."""
    table = project()["project"]
    optional = table["optional-dependencies"]
    lines = table["dependencies"] + [
        line for extra in extras or optional for line in optional[extra]
    ]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, Version]:
    """constraints.txt: name -> version. Anything but ``name==version`` is an error."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    result = {canonicalize_name(name): Version(version) for name, version in pairs}
    assert len(result) == len(pairs), "a package is pinned twice"
    return result


def closure(wanted: list[Requirement]) -> dict[str, Version]:
    """Everything installed here that the requirements pull in: name -> version."""
    result: dict[str, Version] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        requirement = wanted.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        installed = metadata.distribution(name)  # raises if the environment is incomplete
        result[name] = Version(installed.version)
        for line in installed.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in {*extras, ""}
            ):
                wanted.append(needed)
    return result


def texts() -> list[tuple[Path, str]]:
    return [
        (path.relative_to(ROOT), path.read_bytes().decode("utf-8", "replace"))
        for path in repository_files()
    ]


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([.a-z-]+):(?!=)", makefile, re.MULTILINE)) - {".PHONY"}


def test_every_package_that_make_installs_is_pinned_to_what_is_installed():
    pinned = pins()
    recbole = metadata.version("recbole")  # installed alone: its own requirements are not ours
    needed = closure(declared(*INSTALLED_EXTRAS)) | {"recbole": Version(recbole)}
    # A local build of the pinned version (2.13.0+cpu) is that version.
    differing = {
        name: f"installed {version}, pinned {pinned.get(name)}"
        for name, version in needed.items()
        if not PINNED_BY_TORCH.match(name) and Version(version.public) != pinned.get(name)
    }
    assert differing == {}
    assert len(needed) > 100


def test_every_pin_is_a_version_that_pyproject_accepts():
    pinned = pins()
    refused = [
        str(requirement)
        for requirement in declared()
        if requirement.name != "tensorrt"  # its libraries come from the vendor: never pinned
        and not requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
    ]
    assert refused == []


def test_every_third_party_import_is_a_declared_dependency():
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    owners = metadata.packages_distributions()
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()}
    undeclared = set()
    for path, text in texts():
        if path.suffix != ".py":
            continue
        local = {item.stem for item in (ROOT / path).parent.glob("*.py")}
        local |= {item.stem for item in (ROOT / "tests").glob("*.py")}
        for node in ast.walk(ast.parse(text)):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for top in {module.partition(".")[0] for module in modules}:
                known = sys.stdlib_module_names | ours | local | BROUGHT_ALONG.keys() | OPTIONAL
                owned = {canonicalize_name(owner) for owner in owners.get(top, [])}
                if top not in known and not owned & names:
                    undeclared.add(f"{path}: {top}")
    assert sorted(undeclared) == []


def test_no_file_is_over_1_mb():
    assert [str(path) for path in repository_files() if path.stat().st_size > LARGEST] == []


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["paths", "hosts"])
def test_no_file_names_somebodys_machine_or_a_package_registry(pattern):
    result = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in texts()
        if path.name != "LICENSE"
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
    assert result == []


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (MACHINE_PATH, "see " + "/work" + "/main/x.py"),
        (MACHINE_PATH, '"' + "/home" + '/me/model"'),
        (REGISTRY_HOST, "https://" + "pypi" + ".org/simple"),
        (REGISTRY_HOST, "pip install --index-url" + " https://host/whl"),
    ],
)
def test_a_machine_path_or_registry_host_would_be_found(pattern, text):
    assert pattern.search(text)


def test_every_make_command_in_the_prose_is_a_target():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = readme + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    command = re.compile(r"(?:^|`)make ([.a-z-]+)", re.MULTILINE)
    assert {"demo", "test"} <= set(command.findall(readme))
    assert set(command.findall(prose)) - targets() == set()


def test_make_help_lists_every_target():
    shown = subprocess.run(
        ["make", "--no-print-directory"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split()[1] for line in shown.splitlines()} == targets()


def test_every_ignored_rule_carries_its_reason():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    start = lines.index("ignore = [") + 1
    entries = lines[start : lines.index("]", start)]
    assert [line for line in entries if not re.search(r'",\s+# \S', line)] == []
    start = lines.index("[tool.ruff.lint.per-file-ignores]") + 1
    entries = lines[start : lines.index("", start)]
    bare = [
        line
        for before, line in zip(["", *entries], entries, strict=False)
        if not line.startswith("#") and "#" not in line and not before.startswith("#")
    ]
    assert bare == []
    assert len(project()["tool"]["ruff"]["lint"]["ignore"]) > 5
