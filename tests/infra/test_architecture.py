"""Only allow-listed modules are imported, and only network classes come back."""

import sys
import textwrap

import pytest
import torch

from infra.bundle.architecture import network_class, source_digest
from infra.errors import BundleRefused

ALLOWED = ("shopnets",)

NETWORK = """
    import os
    from json import JSONDecoder
    from torch import nn
    from torch.nn import Linear
    from shopnets.layers import Cross

    helper = os.getcwd

    class Ranker(nn.Module):
        pass
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``shopnets`` whose modules are gone from ``sys.modules`` afterwards."""
    folder = tmp_path / "shopnets"
    folder.mkdir()
    write(folder / "__init__.py", "")
    write(folder / "ranker.py", NETWORK)
    write(folder / "layers.py", "from torch import nn\n\nclass Cross(nn.Module):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("shopnets", "shopnets2"):
            del sys.modules[name]


def write(path, source):
    path.write_text(textwrap.dedent(source))
    return path


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("allowed", [("shopnets",), ("x", "shopnets.ranker")])
def test_an_allowed_class_is_imported(allowed):
    found = network_class("shopnets.ranker:Ranker", allowed)
    assert issubclass(found, torch.nn.Module)
    assert found.__name__ == "Ranker"


@pytest.mark.usefixtures("package")
def test_a_class_imported_from_an_allowed_module_is_allowed():
    assert network_class("shopnets.ranker:Cross", ALLOWED).__module__ == "shopnets.layers"


def test_a_module_outside_the_list_is_refused_before_it_is_imported(tmp_path, monkeypatch):
    trap = write(tmp_path / "shopnets2.py", "raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("shopnets2:Ranker", "shopnets2.below:Ranker"):
        for look in (network_class, source_digest):
            with pytest.raises(BundleRefused) as refusal:
                look(name, ALLOWED)
            assert "not allowed" in str(refusal.value)
            assert "RECPRESS_ALLOWED_MODULES=shopnets,shopnets2" in str(refusal.value)
    assert trap.stem not in sys.modules


def test_an_empty_list_allows_nothing():
    with pytest.raises(BundleRefused, match="only nothing may be imported"):
        network_class("shopnets.ranker:Ranker", ())


@pytest.mark.parametrize(
    "path",
    [
        "shopnets.ranker",
        "shopnets.ranker:Ranker.forward",
        "shopnets:os.system",
        "shopnets:os.system('true')",
        "shopnets..ranker:Ranker",
        ".shopnets:Ranker",
        "../shopnets:Ranker",
        "shopnets/ranker.py:Ranker",
        "shopnets:Ranker\n",
        "shopnets:",
        ":Ranker",
        "",
    ],
)
@pytest.mark.parametrize("look", [network_class, source_digest])
def test_a_path_that_is_no_plain_module_and_class_is_refused(path, look):
    with pytest.raises(BundleRefused, match=r"must be written 'package\.module:Class'"):
        look(path, ALLOWED)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("shopnets.rankers:Ranker", "no module shopnets.rankers to import. Put the folder"),
        ("shopnets.ranker.deep:Ranker", "no module shopnets.ranker.deep"),
        ("shopnets.ranker:Rankers", "has no class Rankers; there is Ranker"),
        ("shopnets.ranker:os", "is a module, not a torch.nn.Module class"),
        ("shopnets.ranker:helper", "is a builtin_function_or_method, not a torch.nn.Module"),
        ("shopnets.ranker:JSONDecoder", "is another class, not a torch.nn.Module class"),
        ("shopnets.ranker:Linear", "is defined in torch.nn.modules.linear, which is not allowed"),
    ],
)
def test_what_is_no_network_of_an_allowed_module_is_refused(path, words):
    with pytest.raises(BundleRefused) as refusal:
        network_class(path, ALLOWED)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nowhere_to_be_found", "needs the module nowhere_to_be_found"),
        ("raise RuntimeError('no license')", "failed with RuntimeError: no license"),
        ("raise SystemExit(3)", "failed with SystemExit: 3"),
        ("class Ranker(", "failed with SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(package, source, words):
    write(package / "broken.py", source)
    with pytest.raises(BundleRefused) as refusal:
        network_class("shopnets.broken:Ranker", ALLOWED)
    assert words in str(refusal.value)


@pytest.mark.usefixtures("package")
def test_a_modules_own_getattr_is_not_asked(package):
    write(package / "lazy.py", "def __getattr__(name):\n    raise RuntimeError(name)\n")
    with pytest.raises(BundleRefused, match="has no class Ranker"):
        network_class("shopnets.lazy:Ranker", ALLOWED)


@pytest.mark.parametrize("edited", ["ranker.py", "layers.py", "deep/blocks.py"])
def test_the_digest_follows_every_source_file_of_the_package(package, edited):
    (package / "deep").mkdir()
    write(package / "deep" / "blocks.py", "width = 1\n")
    before = source_digest("shopnets.ranker:Ranker", ALLOWED)
    assert source_digest("shopnets.ranker:Ranker", ALLOWED) == before
    write(package / edited, "width = 2\n")
    assert source_digest("shopnets.ranker:Ranker", ALLOWED) != before


def test_the_digest_follows_renamed_files(package):
    write(package / "one.py", "width = 1\n")
    before = source_digest("shopnets:Ranker", ALLOWED)
    (package / "one.py").rename(package / "onf.py")  # keeps its place in the order
    assert source_digest("shopnets:Ranker", ALLOWED) != before


def test_the_digest_imports_nothing(package):
    write(package / "__init__.py", "raise RuntimeError('imported')\n")
    assert len(source_digest("shopnets.ranker:Ranker", ALLOWED)) == 64
    assert "shopnets" not in sys.modules


def test_the_digest_of_a_lone_module_ignores_its_neighbours(tmp_path, monkeypatch):
    write(tmp_path / "shopnets.py", "width = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = source_digest("shopnets:Ranker", ALLOWED)
    write(tmp_path / "neighbour.py", "width = 1\n")
    assert source_digest("shopnets:Ranker", ALLOWED) == before
    write(tmp_path / "shopnets.py", "width = 2\n")
    assert source_digest("shopnets:Ranker", ALLOWED) != before


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("path", "allowed", "words"),
    [
        ("shopnets.gone:Ranker", ("shopnets",), "no module shopnets.gone"),
        ("shopnets.ranker.deep:Ranker", ("shopnets",), "no module shopnets.ranker.deep"),
        ("gone_altogether:Ranker", ("gone_altogether",), "no module gone_altogether"),
        ("builtins:Ranker", ("builtins",), "has no source file"),
    ],
)
def test_the_digest_of_what_has_no_source_is_refused(path, allowed, words):
    with pytest.raises(BundleRefused, match=words):
        source_digest(path, allowed)
