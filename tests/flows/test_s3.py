"""The whole way against a real S3 server, and no secret of it anywhere afterwards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from drafts import environment, recpress, write_draft
from orders import carry_out
from prefect.client.orchestration import get_client
from s3_server import S3Server

from compressors.contracts import Limit
from flows.order import Order
from tasks.bundles import Packed
from tasks.documents import Finished
from tasks.stored import store

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


def told_to_prefect() -> str:
    """All that the server keeps for its pages: artifacts, logs, parameters, state messages."""
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts()
        runs = [*client.read_flow_runs(), *client.read_task_runs()]
        logs = client.read_logs(limit=200)
    return "\n".join(item.model_dump_json() for item in (*artifacts, *runs, *logs))


def files_with(secret: str, *folders: Path) -> list[Path]:
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [path for path in files if secret.encode() in path.read_bytes()]


def test_pack_compress_and_fetch_with_an_s3_store_and_its_secret_stays_out_of_everything(
    s3: S3Server, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = "s3://models/way/of/one"
    monkeypatch.setenv("RECPRESS_STORE", root)
    env = environment(fresh, RECPRESS_STORE=root, **s3.environment)
    draft = write_draft(fresh / "draft")
    packing = recpress("bundle", "pack", str(draft), "--json", env=env)
    assert packing.returncode == 0, packing.stderr
    packed = Packed.model_validate_json(packing.stdout)
    assert store().uri_of(packed.artifact).startswith(f"{root}/artifacts/")

    ran = carry_out(Order(model="clicks", preset="small", limits=(LIMIT,)))
    assert (ran.state, ran.finished.report.outcome) == ("Completed", "accepted")

    into = fresh / "served"
    arguments = ("clicks", "--version", ran.finished.version, "--into", str(into))
    fetching = recpress("registry", "fetch", *arguments, env=env)
    assert fetching.returncode == 0, fetching.stderr
    assert (into / "model.onnx").stat().st_size == ran.finished.report.targets[0].bytes

    again = recpress(
        "compress", "clicks", "--preset", "small", "--limit", str(LIMIT), "--json", env=env
    )
    assert again.returncode == 0, again.stderr
    assert Finished.model_validate_json(again.stdout) == ran.finished

    secret = s3.secret_key
    objects = dict(everything_in(s3, "models", "way/of/one"))
    assert len(objects) > 20
    assert [key for key, body in objects.items() if secret.encode() in body] == []
    assert files_with(secret, fresh) == []
    assert secret not in told_to_prefect()
    for ended in (packing, fetching, again):
        assert secret not in ended.stdout + ended.stderr


def test_a_damaged_object_is_not_fetched(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = "s3://models/damaged"
    env = environment(tmp_path, RECPRESS_STORE=root, **s3.environment)
    packing = recpress("bundle", "pack", str(write_draft(tmp_path / "d")), "--json", env=env)
    packed = Packed.model_validate_json(packing.stdout)
    key = f"damaged/artifacts/{packed.artifact.sha256}/files/model.safetensors"
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
    checked = recpress("bundle", "check", "clicks", env=env)
    assert checked.returncode == 2
    assert "damaged" in checked.stderr
    assert "model.safetensors" in checked.stderr
    assert "Traceback" not in checked.stderr
