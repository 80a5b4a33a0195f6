"""Every name of the TensorRT API that the code uses exists in TensorRT 10, 11 and RTX.

The data-center builder needs large libraries and a GPU, but the wheels of its Python bindings are
small and contain every name. So these tests compare the code with ``NAMES``, the list of the names,
and ``NAMES`` with the bindings.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import reduce
from pathlib import Path

import pytest

import infra.tensorrt.build
from infra.tensorrt.engines import NAMES

WHEELS = ("tensorrt-cu12-bindings==10.13.3.9", "tensorrt-cu13-bindings==11.4.0.106")
# Variable of a TensorRT object in build.py -> the class of that object.
HANDLES = {
    "trt": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "fault": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "layer": "ILayer",
    "tensor": "ITensor",
}
# Functions of the native libraries without which the bindings cannot be imported.
STUBS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
]


def used_names(source):
    """Return the dotted TensorRT names that a source uses, and its chained calls.

    Only attributes of the variables in ``HANDLES`` are read, so the class of a chained call's
    result is unknown, and chained calls are forbidden.
    """
    names, chains = set(), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        parts, base, is_plain = [node.attr], node.value, True
        while isinstance(base, ast.Attribute | ast.Call | ast.Subscript):
            is_plain = is_plain and isinstance(base, ast.Attribute)
            if isinstance(base, ast.Attribute):
                parts.append(base.attr)
            base = base.func if isinstance(base, ast.Call) else base.value
        if not (isinstance(base, ast.Name) and base.id in HANDLES):
            continue
        if is_plain:
            prefix = [HANDLES[base.id]] if HANDLES[base.id] else []
            names.add(".".join(prefix + parts[::-1]))
        else:
            chains.append(ast.unparse(node))
    return names, chains


def source():
    """Return the source code of build.py."""
    return Path(infra.tensorrt.build.__file__).read_text()


def test_build_uses_exactly_the_listed_tensorrt_names():
    names, chains = used_names(source())
    assert chains == [], "assign each TensorRT object to a variable in HANDLES"
    inherited = {"ILogger.__init__"}  # every Python subclass calls it
    assert names - inherited == set(NAMES)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("config.clear_flag(1)", "IBuilderConfig.clear_flag"),
    ],
)
def test_used_names_finds_a_name_that_is_not_listed(line, expected):
    names, _ = used_names(line)
    assert expected in names - set(NAMES)


def test_used_names_reports_a_chained_call():
    assert used_names("network.get_layer(0).precision")[1] == ["network.get_layer(0).precision"]


def test_only_build_uses_the_tensorrt_module():
    for path in Path(infra.tensorrt.build.__file__).parent.glob("*.py"):
        if path.name != "build.py":
            assert "trt" not in {
                n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)
            }


def test_tensorrt_rtx_has_every_listed_name():
    trt = pytest.importorskip(
        "tensorrt_rtx_bindings", reason="install with: pip install 'recpress[tensorrt-rtx]'"
    )
    assert [name for name in NAMES if not has_name(trt, name)] == []


def has_name(trt, name):
    """Return whether a module has a dotted name."""
    try:
        reduce(getattr, name.split("."), trt)
    except AttributeError:
        return False
    return True


@pytest.fixture(scope="module", params=WHEELS)
def bindings(request, tmp_path_factory):
    """The unpacked package of a real binding wheel, a download of about 1.2 MB."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    subprocess.run([*pip, request.param], check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    return folder / "tensorrt_bindings"


@pytest.mark.slow
def test_datacenter_bindings_contain_every_listed_name_as_a_string(bindings):
    native = (bindings / "tensorrt.so").read_bytes()
    python = (bindings / "__init__.py").read_bytes()
    last_parts = {name.rsplit(".", 1)[-1].encode() for name in NAMES}
    missing = [part for part in last_parts if part + b"\0" not in native and part not in python]
    assert missing == []
    assert b"set_no_such_thing\0" not in native


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for empty libraries")
def test_datacenter_bindings_have_every_listed_attribute(bindings):
    """Import the real bindings with stub libraries and look up each name as an attribute."""
    native = (bindings / "tensorrt.so").read_bytes()
    major = next(v for v in (b"10", b"11") if b"libnvinfer.so." + v + b"\0" in native).decode()
    libraries = bindings.parent / "libraries"
    libraries.mkdir()
    stub = libraries / "stub.c"
    stub.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in STUBS))
    for name in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        out = f"{name}.so.{major}"
        link = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{out}", "-o", str(libraries / out)]
        subprocess.run([*link, str(stub)], check=True, timeout=60)
    script = (
        "import json, sys, tensorrt_bindings as trt\n"
        "from functools import reduce\n"
        "def has(name):\n"
        "    try:\n"
        "        reduce(getattr, name.split('.'), trt)\n"
        "        return True\n"
        "    except AttributeError:\n"
        "        return False\n"
        "names = json.loads(sys.argv[1])\n"
        "print(json.dumps([trt.__version__, [n for n in names if not has(n)]]))\n"
    )
    names = json.dumps([*NAMES, "BuilderFlag.NO_SUCH_FLAG"])
    process = subprocess.run(
        [sys.executable, "-c", script, names],
        env=os.environ | {"LD_LIBRARY_PATH": str(libraries)},
        cwd=bindings.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    version, missing = json.loads(process.stdout)
    assert version.startswith(major)
    assert missing == ["BuilderFlag.NO_SUCH_FLAG"]
