"""The whole way against a real S3 server, and no secret of it anywhere afterwards."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from command_line import run_main, run_main_apart
from drafts import environment, recpress, write_draft
from orders import run_in_prefect, use_home
from prefect.client.orchestration import get_client
from s3_server import S3Server
from test_readme import commands, write_own_model

from compressors.contracts import Limit
from flows.order import Order
from tasks.bundles.bundle_ref import find
from tasks.bundles.packing import Packed, pack
from tasks.orchestration.documents import Finished
from tasks.orchestration.workspace import store

ROOT = "s3://models/way/of/one"
LIMIT = Limit.parse("auc vs baseline >= -0.02")


def everything_in(server: S3Server, bucket: str, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Every object, read by another client than ours."""
    client: Any = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
    )
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            body = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"]
            yield entry["Key"], body.read()


def everything_in_prefect() -> str:
    """All text that the server stores: artifacts, logs, parameters and state messages, as JSON."""
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts()
        runs = [*client.read_flow_runs(), *client.read_task_runs()]
        logs = client.read_logs(limit=200)
    return "\n".join(item.model_dump_json() for item in (*artifacts, *runs, *logs))


def files_with(secret: str, *folders: Path) -> list[Path]:
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [path for path in files if secret.encode() in path.read_bytes()]


def assert_nowhere(server: S3Server, home: Path, *said: str) -> None:
    """The server's secret key is in no object, no file, not in Prefect and in nothing printed."""
    secret = server.secret_key
    objects = dict(everything_in(server, "models", "way/of/one"))
    assert len(objects) > 20
    assert [key for key, body in objects.items() if secret.encode() in body] == []
    assert files_with(secret, home) == []
    assert secret not in everything_in_prefect()
    for text in said:
        assert secret not in text


def test_the_readmes_commands_work_with_an_s3_store_and_its_secret_stays_out_of_everything(
    s3: S3Server,
    empty_home: Path,
    prefect_server: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The commands for a model of one's own, one after another in this process."""
    monkeypatch.setenv("RECPRESS_STORE", ROOT)
    monkeypatch.chdir(empty_home)
    write_own_model(empty_home)
    said, order = {}, []
    for line in commands("recpress bundle pack ./draft").replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["export"]:
            for setting in words[1:]:
                name, _, value = setting.partition("=")
                if name == "PYTHONPATH":
                    monkeypatch.syspath_prepend(str(empty_home / value))
                elif name != "PATH":
                    monkeypatch.setenv(name, value)
        else:
            assert words[0] == "recpress", line
            order = words[1:] if words[1] == "compress" else order
            code, said[words[1]] = run_main(monkeypatch, capsys, *words[1:])
            assert code == 0, said
    assert list(said) == ["bundle", "compress", "registry"]
    assert "onnxruntime: accepted" in said["compress"]
    assert store().uri_of(find("mymodel").artifact).startswith(f"{ROOT}/artifacts/")

    code, found, again = run_main_apart(monkeypatch, capsys, *order, "--json")
    assert code == 0, again
    report = Finished.model_validate_json(found).report
    assert (empty_home / "serving" / "model.onnx").stat().st_size == report.targets[0].bytes
    assert_nowhere(s3, empty_home, *said.values(), found, again)


@pytest.mark.nightly  # the README's commands do the same in this process
def test_pack_compress_and_fetch_in_processes_with_an_s3_store_leave_its_secret_nowhere(
    s3: S3Server, empty_home: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_STORE", ROOT)

    def command(*arguments: str) -> tuple[int, str, str]:
        env = environment(empty_home, RECPRESS_STORE=ROOT, **s3.environment)
        ended = recpress(*arguments, env=env)
        return ended.returncode, ended.stdout, ended.stderr

    draft = write_draft(empty_home / "draft")
    code, said, packing = command("bundle", "pack", str(draft), "--json")
    assert code == 0, packing
    packed = Packed.model_validate_json(said)
    assert store().uri_of(packed.artifact).startswith(f"{ROOT}/artifacts/")

    ran = run_in_prefect(Order(model="clicks", preset="small", limits=(LIMIT,)))
    assert (ran.state, ran.finished.report.outcome) == ("Completed", "accepted")

    into = empty_home / "served"
    arguments = ("clicks", "--version", ran.finished.version, "--into", str(into))
    code, *fetching = command("registry", "fetch", *arguments)
    assert code == 0, fetching
    assert (into / "model.onnx").stat().st_size == ran.finished.report.targets[0].bytes

    code, found, again = command(
        "compress", "clicks", "--preset", "small", "--limit", str(LIMIT), "--json"
    )
    assert code == 0, again
    assert Finished.model_validate_json(found) == ran.finished
    assert_nowhere(s3, empty_home, said, packing, *fetching, found, again)


def test_a_damaged_object_is_not_fetched(
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_home(monkeypatch, tmp_path / "recpress")
    monkeypatch.setenv("RECPRESS_STORE", "s3://models/damaged")
    packed = pack(write_draft(tmp_path / "d"))
    uri = store().file_uri(packed.artifact, "model.safetensors")
    key = uri.removeprefix("s3://models/")
    body = bytearray(dict(everything_in(s3, "models", key))[key])
    body[-1] ^= 1
    client: Any = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    )
    client.put_object(Bucket="models", Key=key, Body=bytes(body))
    code, said = run_main(monkeypatch, capsys, "bundle", "check", "clicks")
    assert code == 2
    assert "damaged" in said
    assert "model.safetensors" in said
    assert "Traceback" not in said
