"""Sharing of one S3 client by the stores of a process, and the renewal of the client."""

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
def clock_seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The current time for the age of clients, in seconds; a test can change it."""
    seconds = [0.0]
    fake_time = SimpleNamespace(monotonic=lambda: seconds[0], sleep=time.sleep)
    monkeypatch.setattr(s3_store, "time", fake_time)
    return seconds


def test_stores_share_one_client_for_a_minute(s3: S3Server, clock_seconds: list[float]) -> None:
    first = Bucket("models", "a")._files  # the client
    clock_seconds[0] = CLIENT_SECONDS - 1
    assert Bucket("datasets", "b")._files is first
    clock_seconds[0] = CLIENT_SECONDS
    assert Bucket("models", "a")._files is not first


def test_store_uses_the_current_credentials_of_the_environment(
    s3: S3Server, clock_seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    Store("s3://models/shared-client").write("key", b"body")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        with raises_code(SettingRefused, "store_credentials_refused"):
            Store("s3://models/shared-client").read("key")
    assert Store("s3://models/shared-client").read("key") == b"body"
