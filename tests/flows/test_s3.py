"""Commands and orders with an S3 server as store, whose secret key is neither stored nor printed.

``write_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

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
from test_readme import readme_commands, write_own_model

from compressors.contracts import Limit
from flows.order import Order
from tasks.bundles.bundle_ref import find_bundle
from tasks.bundles.packing import Packed, pack
from tasks.orchestration.documents import Finished
from tasks.orchestration.workspace import store

STORE_URI = "s3://models/some/prefix"
LIMIT = Limit.parse("auc vs baseline >= -0.02")


def objects_in(server: S3Server, bucket: str, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Yield key and content of each object, read with boto3, which the project does not use."""
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


def texts_in_prefect() -> str:
    """Return artifacts, runs and logs that the Prefect server stores, as JSON."""
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts()
        runs = [*client.read_flow_runs(), *client.read_task_runs()]
        logs = client.read_logs(limit=200)
    return "\n".join(item.model_dump_json() for item in (*artifacts, *runs, *logs))


def files_with(secret: str, *folders: Path) -> list[Path]:
    """Return the files that contain a secret."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [path for path in files if secret.encode() in path.read_bytes()]


def assert_secret_is_not_stored_or_printed(server: S3Server, home: Path, *output: str) -> None:
    """Assert that objects, files, Prefect and printed texts do not contain the secret key."""
    secret = server.secret_key
    objects = dict(objects_in(server, "models", "some/prefix"))
    assert len(objects) > 20  # the objects of the order were listed
    assert [key for key, body in objects.items() if secret.encode() in body] == []
    assert files_with(secret, home) == []
    assert secret not in texts_in_prefect()
    for text in output:
        assert secret not in text


def test_readme_commands_work_with_an_s3_store_and_do_not_store_or_print_its_secret(
    s3: S3Server,
    work_folder: Path,
    prefect_server: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs the README's commands for a user's model in this process."""
    monkeypatch.setenv("RECPRESS_STORE", STORE_URI)
    monkeypatch.chdir(work_folder)
    write_own_model(work_folder)
    output, compress_arguments = {}, []
    for line in readme_commands("recpress bundle pack ./draft").replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["export"]:
            for setting in words[1:]:
                name, _, value = setting.partition("=")
                if name == "PYTHONPATH":
                    monkeypatch.syspath_prepend(str(work_folder / value))
                elif name != "PATH":
                    monkeypatch.setenv(name, value)
        else:
            assert words[0] == "recpress", line
            if words[1] == "compress":
                compress_arguments = words[1:]
            code, output[words[1]] = run_main(monkeypatch, capsys, *words[1:])
            assert code == 0, output
    assert list(output) == ["bundle", "compress", "registry"]
    assert "onnxruntime: accepted" in output["compress"]
    assert store().uri_of(find_bundle("mymodel").artifact).startswith(f"{STORE_URI}/artifacts/")

    code, output_json, errors = run_main_apart(monkeypatch, capsys, *compress_arguments, "--json")
    assert code == 0, errors
    report = Finished.model_validate_json(output_json).report
    assert (work_folder / "serving" / "model.onnx").stat().st_size == report.targets[0].bytes
    assert_secret_is_not_stored_or_printed(s3, work_folder, *output.values(), output_json, errors)


@pytest.mark.nightly  # the test above does the same in one process
def test_processes_with_an_s3_store_do_not_store_or_print_its_secret(
    s3: S3Server, work_folder: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_STORE", STORE_URI)

    def command(*arguments: str) -> tuple[int, str, str]:
        env = environment(work_folder, RECPRESS_STORE=STORE_URI, **s3.environment)
        process = recpress(*arguments, env=env)
        return process.returncode, process.stdout, process.stderr

    draft = write_draft(work_folder / "draft")
    code, output, pack_errors = command("bundle", "pack", str(draft), "--json")
    assert code == 0, pack_errors
    packed = Packed.model_validate_json(output)
    assert store().uri_of(packed.artifact).startswith(f"{STORE_URI}/artifacts/")

    result = run_in_prefect(Order(model="clicks", preset="small", limits=(LIMIT,)))
    assert (result.state, result.finished.report.outcome) == ("Completed", "accepted")

    into = work_folder / "served"
    arguments = ("clicks", "--version", result.finished.version, "--into", str(into))
    code, *fetch_output = command("registry", "fetch", *arguments)
    assert code == 0, fetch_output
    assert (into / "model.onnx").stat().st_size == result.finished.report.targets[0].bytes

    code, output_json, errors = command(
        "compress", "clicks", "--preset", "small", "--limit", str(LIMIT), "--json"
    )
    assert code == 0, errors
    assert Finished.model_validate_json(output_json) == result.finished
    assert_secret_is_not_stored_or_printed(
        s3, work_folder, output, pack_errors, *fetch_output, output_json, errors
    )


def test_check_of_a_damaged_object_in_s3_exits_with_code_2(
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
    body = bytearray(dict(objects_in(s3, "models", key))[key])
    body[-1] ^= 1  # flips the last bit
    client: Any = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    )
    client.put_object(Bucket="models", Key=key, Body=bytes(body))
    code, output = run_main(monkeypatch, capsys, "bundle", "check", "clicks")
    assert code == 2
    assert "damaged" in output
    assert "model.safetensors" in output
    assert "Traceback" not in output
