"""Publishing, finding and aliasing versions in an MLflow registry that is a SQLite file.

Arguments of ``Registry.publish`` are the model's name, the digest of an order, the URI of the
release (``source``), tags, and a description.
"""

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from error_codes import TextMatching, raises_code

from infra.errors import RegistryOutage, RegistryRefused, SettingRefused
from infra.registry.limits import MAX_TAG_VALUE
from infra.registry.mlflow_registry import ORDER_TAG, RegisteredVersion, Registry

# Digests of two orders.
ORDER = "a" * 64
OTHER_ORDER = "b" * 64

# Publishes one order in several processes at once. Importing MLflow takes two seconds, so the
# processes are forked after the import.
PUBLISH = """
import os, sys
from infra.registry.mlflow_registry import Registry
import mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store
uri, count = sys.argv[1], int(sys.argv[2])
for number in range(count):
    if os.fork() == 0:
        entry = Registry(uri).publish("ranker", "a" * 64, "s3://models/x", {"by": str(number)}, "")
        os.write(1, f"{entry.version} {entry.tags['by']}\\n".encode())
        os._exit(0)
assert all(os.wait()[1] == 0 for _ in range(count))
"""


@pytest.fixture
def registry(empty_registry, tmp_path) -> Registry:
    return Registry(f"sqlite:///{shutil.copy(empty_registry, tmp_path / 'registry.db')}")


def publish(registry: Registry, order: str = ORDER, model: str = "ranker") -> RegisteredVersion:
    """Publish an order with fixed tags."""
    return registry.publish(model, order, f"s3://models/{order[:4]}", {"recipe": "[]"}, "text")


def test_publishing_an_order_twice_creates_one_version(registry):
    first = publish(registry)
    assert first == publish(registry)
    assert first == RegisteredVersion(
        model="ranker",
        version="1",
        source="s3://models/aaaa",
        tags={"recipe": "[]", ORDER_TAG: ORDER},
        aliases=(),
    )
    assert registry.versions("ranker") == (first,)
    assert registry.find_by_order(ORDER, "ranker") == first
    assert registry.find_by_order(OTHER_ORDER, "ranker") is None
    assert registry.find_by_order(ORDER, "other") is None


def test_find_by_order_without_mlflow_returns_the_same_version_as_find_by_order(registry, tmp_path):
    """It reads the SQLite file directly, since importing MLflow takes about two seconds."""
    assert registry.find_by_order_without_mlflow(ORDER, "ranker") is None
    publish(registry)
    assert registry.find_by_order_without_mlflow(ORDER, "ranker") == registry.find_by_order(
        ORDER, "ranker"
    )
    assert registry.find_by_order_without_mlflow(OTHER_ORDER, "ranker") is None
    assert registry.find_by_order_without_mlflow(ORDER, "other") is None
    registry._client.delete_model_version("ranker", "1")
    assert registry.find_by_order_without_mlflow(ORDER, "ranker") is None
    assert (
        Registry(f"sqlite:///{tmp_path}/none.db").find_by_order_without_mlflow(ORDER, "ranker")
        is None
    )
    assert not (tmp_path / "none.db").exists()


def test_versions_are_sorted_as_numbers_newest_first(registry):
    for number in range(11):
        publish(registry, f"{number:064x}")
    assert [item.version for item in registry.versions("ranker")] == [
        str(number) for number in range(11, 0, -1)
    ]


def test_one_order_published_for_two_models_creates_a_version_of_each(registry):
    publish(registry)
    assert publish(registry, model="tower").model == "tower"
    assert registry.models() == ("ranker", "tower")


@pytest.mark.slow
def test_two_processes_publishing_one_order_to_a_missing_registry_create_one_version(tmp_path):
    uri = f"sqlite:///{tmp_path}/new folder/registry.db"
    lines = publish_in_processes(uri, 2)
    assert lines[0] == lines[1], "both processes got the same version"
    assert [item.version for item in Registry(uri).versions("ranker")] == [lines[0].split()[0]]


def publish_in_processes(uri: str, count: int) -> list[str]:
    """Publish one order in ``count`` processes; return version and first tag of each result."""
    process = subprocess.run(
        [sys.executable, "-c", PUBLISH, uri, str(count)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, ""), "migrations and telemetry print nothing"
    lines = process.stdout.splitlines()
    assert len(lines) == count
    return lines


def test_concurrent_publishers_keep_the_lowest_version_and_delete_the_others(registry, monkeypatch):
    """Simulate a race: the first query of each publisher does not find a version of the order."""
    publish(registry, OTHER_ORDER)
    queries = []
    find_by_order = Registry.find_by_order

    def first_query_finds_nothing(self, order, model):
        queries.append(order)
        # Each of the three publishers queries twice, before and after it creates a version.
        return None if len(queries) in (1, 3, 5) else find_by_order(self, order, model)

    monkeypatch.setattr(Registry, "find_by_order", first_query_finds_nothing)
    versions = {publish(registry).version for _ in range(3)}
    assert versions == {"2"}
    assert [item.version for item in registry.versions("ranker")] == ["2", "1"]


def test_four_threads_publishing_one_order_create_one_version(registry):
    registry.models()
    with ThreadPoolExecutor(4) as pool:
        versions = {item.version for item in pool.map(lambda _: publish(registry), range(4))}
    assert len(versions) == 1
    assert len(registry.versions("ranker")) == 1


# --- lookup -----------------------------------------------------------------------


def test_unknown_model_is_refused_with_the_names_of_existing_models(registry):
    with raises_code(RegistryRefused, "model_missing", models=("none yet",)):
        registry.versions("ranker")
    publish(registry)
    publish(registry, model="tower")
    for look_up in (registry.versions, lambda model: registry.version(model, "1")):
        with raises_code(
            RegistryRefused, "model_missing", model="rankr", models=("ranker", "tower")
        ):
            look_up("rankr")


def test_version_is_returned_by_number_and_by_alias(registry):
    publish(registry)
    second = publish(registry, OTHER_ORDER)
    registry.set_alias("ranker", "candidate", "2")
    assert registry.version("ranker", "2").source == second.source
    assert registry.version("ranker", "@candidate").version == "2"
    assert registry.version("ranker", "2").aliases == ("candidate",)
    assert registry.version("ranker", "1").aliases == ()
    registry.set_alias("ranker", "candidate", "1")
    assert registry.version("ranker", "@candidate").version == "1"
    with raises_code(RegistryRefused, "alias_missing", alias="@champion", aliases=("@candidate",)):
        registry.version("ranker", "@champion")
    for ref in ("3", "one", "", "@"):
        with raises_code(RegistryRefused, None, model="ranker"):  # any code
            registry.version("ranker", ref)
    with raises_code(RegistryRefused, "version_missing", version="9", newest=("2", "1")):
        registry.set_alias("ranker", "champion", "9")


def test_repair_sets_or_removes_the_champion_alias(registry):
    """``repair`` returns whether it has changed the alias."""
    publish(registry)
    publish(registry, OTHER_ORDER)
    assert registry.repair("ranker", "2") is True
    assert registry.repair("ranker", "2") is False
    registry.set_alias("ranker", "champion", "1")
    assert registry.repair("ranker", "2") is True
    assert registry.version("ranker", "@champion").version == "2"
    assert registry.repair("ranker", None) is True
    assert registry.repair("ranker", None) is False
    with raises_code(RegistryRefused, "alias_missing", alias="@champion"):
        registry.version("ranker", "@champion")


# --- limits of the registry ---------------------------------------------------------


def test_tags_and_sources_beyond_the_limits_are_refused(registry):
    tags = {"plan": "x" * MAX_TAG_VALUE}
    assert (
        registry.publish("ranker", ORDER, "s3://x", tags, "d" * 9999).tags["plan"] == tags["plan"]
    )
    with raises_code(RegistryRefused, "tag_value_too_long", tag="plan", got=100_001):
        registry.publish("ranker", OTHER_ORDER, "s3://x", {"plan": "x" * (MAX_TAG_VALUE + 1)}, "")
    for name in ("k" * 251, "a'b", ""):
        # The error shows at most 60 characters of a name.
        with raises_code(RegistryRefused, "tag_name_invalid", tag=name[:60]):
            registry.publish("ranker", OTHER_ORDER, "s3://x", {name: "x"}, "")
    with raises_code(RegistryRefused, "source_too_long", got=501):
        registry.publish("ranker", OTHER_ORDER, "s" * 501, {}, "")
    with raises_code(RegistryRefused, "order_invalid", got="x"):
        registry.publish("ranker", "x", "s3://x", {}, "")
    assert len(registry.versions("ranker")) == 1


@pytest.mark.parametrize("model", ["", " a", "a/b", "a:b", "it's", 'a"b', "a`b", "x" * 257])
def test_model_name_that_mlflow_does_not_accept_is_refused(registry, model):
    with raises_code(RegistryRefused, "model_name_invalid", name=model[:60]):
        publish(registry, model=model)


def test_alias_that_mlflow_does_not_accept_is_refused(registry):
    publish(registry)
    for alias in ("latest", "v1", "a b", ""):
        with raises_code(RegistryRefused, "registry_refused"):
            registry.set_alias("ranker", alias, "1")


# --- unusable registries -----------------------------------------------------------


def test_unreachable_server_is_reported_within_20_seconds():
    start = time.monotonic()
    with raises_code(RegistryOutage, "registry_no_answer"):
        Registry("http://user:hunter2@127.0.0.1:9").models()
    assert time.monotonic() - start < 20


def test_uri_that_is_not_a_registry_raises_setting_refused(tmp_path):
    for uri in ("", "registry.db", "ftp://host/x", "databricks"):
        with raises_code(SettingRefused, "registry_scheme_unknown"):
            Registry(uri)
    (tmp_path / "text.db").write_text("not a database" * 100)
    with raises_code(
        SettingRefused, "registry_file_unusable", problem=TextMatching("not a database")
    ):
        Registry(f"sqlite:///{tmp_path}/text.db").models()
    (tmp_path / "file").write_text("x")
    with raises_code(SettingRefused, "registry_file_not_creatable"):
        Registry(f"sqlite:///{tmp_path}/file/registry.db").models()


def test_registry_file_with_an_unknown_schema_is_refused(registry, tmp_path):
    import sqlite3

    with sqlite3.connect(tmp_path / "registry.db") as database:
        database.execute("update alembic_version set version_num = 'somebody-elses'")
    with raises_code(SettingRefused, "registry_schema_unknown", schema="somebody-elses"):
        registry.models()


def test_messages_contain_no_password_of_the_uri():
    registry = Registry("postgresql://ann:hunter2@host/x")
    message = registry._clean_message("cannot reach postgresql://ann:hunter2@host/x")
    assert message == "cannot reach postgresql://host/x"
    assert registry._clean_message("user ann, password hunter2: no") == "user ann, password ***: no"
