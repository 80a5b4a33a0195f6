"""The code digest of a task covers the sources that the task imports, and no others.

The sources of a Prefect task are its module, every module of the project that it imports, directly
or indirectly, and the HTML templates that these modules render.
The digest is part of the key under which the result of a task is cached.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressors.contracts import TARGETS
from tasks import build, compress, gate, lower, measure, publish, stages, validate
from tasks.orchestration import code_digest as digest_module
from tasks.orchestration.code_digest import ROOT, code_digest, list_imported_sources
from tasks.retrieval import rank

# Prints, for each module in the arguments, the files of the project that importing it loads.
PRINT_LOADED_FILES = """
import json, os, sys
import onnx, onnxscript, pandas, prefect, scipy.optimize, torch  # slow, so before the forks
names = sys.argv[1:]
for name in names:
    read, write = os.pipe()
    if os.fork() == 0:
        __import__(name)
        files = [getattr(m, "__file__", None) for k, m in sys.modules.items()
                 if k.split(".")[0] in ("flows", "tasks", "compressors", "infra")]
        os.write(write, json.dumps(files).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        print(pipe.read().decode())
    os.wait()
"""


def source_names(function: object) -> set[str]:
    """Return the paths of a function's sources, relative to the repository."""
    files = list_imported_sources(Path(inspect.getsourcefile(function)))
    return {file.relative_to(ROOT).as_posix() for file in files}


def test_imported_sources_contain_every_module_that_importing_a_task_loads():
    """The reference is the list of modules that Python loads, in one process per task."""
    tasks = [compress.compress, publish.publish]
    names = [task.fn.__module__ for task in tasks]
    process = subprocess.run(
        [sys.executable, "-c", PRINT_LOADED_FILES, *names],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = process.stdout.decode().splitlines()
    for task, line in zip(tasks, lines, strict=True):
        loaded = {Path(file).relative_to(ROOT).as_posix() for file in json.loads(line) if file}
        assert len(loaded) > 20  # otherwise the child process did not list them
        assert loaded <= source_names(inspect.unwrap(task.fn))


def test_imported_sources_exclude_flows_and_modules_that_are_not_imported():
    names = source_names(compress.compress.fn)
    assert "compressors/quantize/tables/rowwise_int8.py" in names
    assert "infra/store/object_store.py" in names
    assert not any(name.startswith("flows/") for name in names)
    assert not any("report" in name for name in names)
    assert "compressors/quantize/tables/rowwise_int8.py" not in source_names(gate.gate.fn)
    assert "tasks/report/tables.py" in source_names(publish.publish.fn)


@pytest.mark.parametrize(
    ("task", "file"),
    [
        (measure.measure, "compressors/metrics/estimators/auc.py"),
        (measure.measure, "compressors/metrics/estimators/recall.py"),
        (measure.measure, "compressors/metrics/top_k.py"),
        (stages.measure_stages, "compressors/metrics/estimators/log_loss.py"),
        (rank.rank, "compressors/metrics/estimators/ndcg.py"),
        (compress.compress, "compressors/metrics/estimators/ndcg.py"),
        (compress.compress, "compressors/task_kinds/ctr.py"),
        (compress.compress, "compressors/task_kinds/ranking.py"),
        (validate.validate, "compressors/task_kinds/ctr.py"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_imported_sources_contain_estimators_and_task_kinds(task, file):
    assert file in source_names(inspect.unwrap(task.fn))


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_imported_sources_contain_lowering_builder_and_runtime_of_every_target(target):
    def find_file(class_path):
        """Return the file of a class named ``module:Class``."""
        return class_path.partition(":")[0].replace(".", "/") + ".py"

    assert find_file(target.lowering) in source_names(inspect.unwrap(lower.lower_model.fn))
    if target.engines is not None:
        assert find_file(target.engines.builder) in source_names(inspect.unwrap(build.build.fn))
    if target.runtime is not None:
        assert find_file(target.runtime) in source_names(inspect.unwrap(measure.measure.fn))


def test_imported_sources_contain_templates_only_of_rendered_pages():
    validation = "infra/pages/templates/validation.html.jinja"
    assert validation in source_names(validate.validate.fn)
    assert "tasks/report/templates/limits.html.jinja" in source_names(publish.publish.fn)
    assert not any(name.endswith(".jinja") for name in source_names(compress.compress.fn))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The root of a small project whose task has direct, indirect and function-level imports."""
    texts = {
        "tasks/__init__.py": "",
        "tasks/work.py": "from compressors import direct\nimport infra.inside.leaf\n"
        "def work():\n    from compressors.late import f\n",
        "compressors/__init__.py": "",
        "compressors/direct.py": "import compressors.indirect as other, json\n",
        "compressors/indirect.py": "from compressors.direct import x\n",
        "compressors/late.py": "",
        "compressors/unrelated.py": "",
        "infra/__init__.py": "",
        "infra/inside/__init__.py": "",
        "infra/inside/leaf.py": "",
        "infra/inside/templates/leaf.html.jinja": "",
        "flows/__init__.py": "",
        "flows/templates/unused.html.jinja": "",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(digest_module, "ROOT", tmp_path)
    _clear_caches()
    yield tmp_path
    _clear_caches()


def _clear_caches():
    digest_module._list_direct_imports.cache_clear()
    digest_module._hash_sources.cache_clear()


@pytest.mark.parametrize(
    ("edited", "is_part"),
    [
        ("tasks/work.py", True),
        ("compressors/direct.py", True),
        ("compressors/indirect.py", True),
        ("compressors/late.py", True),
        ("compressors/__init__.py", True),
        ("infra/inside/__init__.py", True),
        ("infra/inside/leaf.py", True),
        ("infra/inside/templates/leaf.html.jinja", True),
        ("compressors/unrelated.py", False),
        ("flows/__init__.py", False),
        ("flows/templates/unused.html.jinja", False),
    ],
)
def test_editing_a_file_changes_the_digest_only_if_the_task_imports_it(project, edited, is_part):
    before = digest_module._hash_sources(project / "tasks/work.py")
    with (project / edited).open("a") as file:
        file.write("# edited\n")
    _clear_caches()
    assert (digest_module._hash_sources(project / "tasks/work.py") != before) == is_part


def test_thread_count_and_library_versions_change_the_digest(monkeypatch):
    before = code_digest(gate.gate.fn)
    monkeypatch.setenv("RECPRESS_THREADS", "7")
    assert code_digest(gate.gate.fn) != before
    monkeypatch.delenv("RECPRESS_THREADS")
    versions = digest_module._find_library_versions()
    monkeypatch.setattr(
        digest_module, "_find_library_versions", lambda: versions | {"onnx": "0.0.1"}
    )
    assert code_digest(gate.gate.fn) != before
