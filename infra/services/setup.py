"""Set up the services before the first run: buckets, work pools, deployments, automations.

``python -m infra.services.setup`` creates missing buckets and pools, and creates or updates the
deployments and automations of this folder. It reads these environment variables:

- ``AWS_*``: endpoint, region and a key that may create buckets.
- ``PREFECT_API_URL``: the address of Prefect's API.
- ``PREFECT_API_AUTH_STRING``: ``user:password`` of the Prefect server; unset if it needs none.
- ``RECPRESS_CODE``: the folder from which workers run the code (used in ``prefect.yaml``).
"""

import json
import os
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

from compressors.contracts import digest
from infra.credentials import mask_credentials
from infra.errors import ChildFailed, ServiceFailed, SettingRefused
from infra.services.compose import ROOT
from infra.services.http_probe import send_request

BUCKETS = ("recpress", "mlflow")
POOLS = ("recpress-cpu", "recpress-gpu")
DEPLOYMENTS = Path(__file__).parent / "prefect.yaml"
AUTOMATIONS = Path(__file__).parent / "automations.yaml"

_BUCKET_EXISTS_CODES = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}
"""Error codes of S3 for a bucket that exists."""
TIMEOUT_SECONDS = 120
"""Time limit of each command and request."""


def create_buckets(names: tuple[str, ...] = BUCKETS) -> None:
    """Create the missing buckets.

    Raises:
        SettingRefused: the key may not create a bucket, or the store does not respond.
    """
    import s3fs
    from botocore.exceptions import BotoCoreError, ClientError

    files: Any = s3fs.S3FileSystem(anon=False, skip_instance_cache=True)
    for name in names:
        try:
            files.call_s3("create_bucket", Bucket=name)
        except FileExistsError:
            continue
        except (ClientError, BotoCoreError, OSError) as fault:
            # s3fs replaces a ClientError by an OSError with the ClientError as its cause.
            cause = fault if isinstance(fault, ClientError) else fault.__cause__
            code = getattr(cause, "response", {}).get("Error", {}).get("Code", "")
            if code in _BUCKET_EXISTS_CODES:
                continue
            raise SettingRefused(
                "bucket_not_creatable", bucket=name, problem=code or type(fault).__name__
            ) from None


def create_pools(names: tuple[str, ...] = POOLS) -> None:
    """Create the work pools that are missing, each with a limit of one run at a time.

    If a worker is killed but the process of its run continues, the run still counts, so a new
    worker does not start another one in parallel. Existing pools are not changed.

    Raises:
        ChildFailed: a command of Prefect failed; contains its output.
    """
    for name in names:
        if _run_prefect("work-pool", "inspect", name, must_succeed=False).returncode:
            _run_prefect("work-pool", "create", name, "--type", "process")
            _run_prefect("work-pool", "set-concurrency-limit", name, "1")


def deploy() -> None:
    """Create or update the deployments of ``infra/services/prefect.yaml``.

    Raises:
        ChildFailed: a command of Prefect failed; contains its output.
    """
    _run_prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS))


def create_automations() -> None:
    """Create or update the automations of ``infra/services/automations.yaml``.

    An unchanged automation is not updated, because an update discards the state of its trigger. To
    detect changes, the description of an automation contains a digest of its entry in the file.

    Raises:
        ChildFailed: a command of Prefect failed; contains its output.
        NoAnswer, ServiceFailed: the server did not return the existing automations.
    """
    import yaml

    current = _list_automations()
    for entry in yaml.safe_load(AUTOMATIONS.read_text(encoding="utf-8"))["automations"]:
        description = (
            f"{entry['description']} (infra/services/automations.yaml, {digest(entry)[:12]})"
        )
        text = json.dumps({**entry, "description": description})
        same_name = [item for item in current if item["name"] == entry["name"]]
        if not same_name:
            _run_prefect("automation", "create", "--from-json", text)
        for duplicate in same_name[1:]:  # two setups ran concurrently
            _run_prefect("automation", "delete", "--id", duplicate["id"])
        if same_name and same_name[0]["description"] != description:
            _run_prefect("automation", "update", "--id", same_name[0]["id"], "--from-json", text)


def _list_automations() -> list[dict[str, Any]]:
    """List the server's automations through its API.

    The CLI is not used, because its JSON contains line breaks inside strings.

    Raises:
        NoAnswer: the server did not respond within the time limit.
        ServiceFailed: the server did not return a list.
    """
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    answer = send_request(
        os.environ["PREFECT_API_URL"].rstrip("/") + "/automations/filter",
        auth=(user, password) if user else None,
        json_body={"limit": 200},  # the server's default maximum per response
        timeout=TIMEOUT_SECONDS,
    )
    automations = answer.parse_json()
    if answer.status != HTTPStatus.OK or not isinstance(automations, list):
        raise ServiceFailed("automations_not_listed", status=answer.status)
    return automations


def _run_prefect(*arguments: str, must_succeed: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run a command of Prefect's command line, since this package must not import Prefect.

    Raises:
        ChildFailed: the command failed, and ``must_succeed`` is set; or it did not end within
            ``TIMEOUT_SECONDS``.
    """
    command = " ".join(("prefect", *arguments))
    try:
        process = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=ROOT,  # the folder of the deployments' entrypoints
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        output = f"it did not end within {TIMEOUT_SECONDS} seconds"
        raise ChildFailed("command_failed", command=command, output=output) from None
    if must_succeed and process.returncode:
        output = mask_credentials(process.stdout + process.stderr)[-2000:]
        raise ChildFailed("command_failed", command=command, output=output)
    return process


def main() -> None:
    """Create or update everything; print the names of the buckets and work pools."""
    create_buckets()
    create_pools()
    deploy()
    create_automations()
    print(  # noqa: T201
        f"buckets {', '.join(BUCKETS)}; pools {', '.join(POOLS)}; deployments; automations"
    )


if __name__ == "__main__":
    main()
