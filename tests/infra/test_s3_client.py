"""How long stores of one process share an S3 client: until something may have changed."""

import time
from types import SimpleNamespace

import pytest
from error_codes import raises_code
from s3_server import S3Server

from infra.errors import SettingRefused
from infra.store import s3 as s3_store
from infra.store.object_store import Store
from infra.store.s3 import CLIENT_SECONDS, Bucket


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the clients' age is counted in, in seconds."""
    held = [0.0]
    clock = SimpleNamespace(monotonic=lambda: held[0], sleep=time.sleep)
    monkeypatch.setattr(s3_store, "time", clock)
    return held


def test_stores_share_a_client_for_a_minute(s3: S3Server, now: list[float]) -> None:
    first = Bucket("models", "a")._files
    now[0] = CLIENT_SECONDS - 1
    assert Bucket("datasets", "b")._files is first
    now[0] = CLIENT_SECONDS
    assert Bucket("models", "a")._files is not first


def test_a_store_uses_the_credentials_of_the_environment_at_its_time(
    s3: S3Server, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    Store("s3://models/shared-client").write("key", b"body")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        with raises_code(SettingRefused, "store_credentials_refused"):
            Store("s3://models/shared-client").read("key")
    assert Store("s3://models/shared-client").read("key") == b"body"
