"""Set up the services before the first run: buckets, work pools, deployments, automations.

``python -m infra.services.setup`` creates missing objects and leaves existing ones unchanged,
except our deployments and automations, which it updates. It reads the ``AWS_*`` variables (a key
that may create buckets), ``PREFECT_API_URL`` and ``RECPRESS_CODE``, the folder that workers run the
code from.
"""

import json
import os
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

from compressors.contracts import digest
from infra.credentials import cleaned
from infra.errors import ChildFailed, ServiceFailed, SettingRefused
from infra.services.compose import ROOT
from infra.services.http_probe import get

BUCKETS = ("recpress", "mlflow")
POOLS = ("recpress-cpu", "recpress-gpu")
DEPLOYMENTS = Path(__file__).parent / "prefect.yaml"
AUTOMATIONS = Path(__file__).parent / "automations.yaml"

_THERE = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}
SECONDS = 120


def make_buckets(names: tuple[str, ...] = BUCKETS) -> None:
    """Create the missing buckets.

    Raises:
        SettingRefused: this key may not create a bucket, or the store does not respond.
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
            cause = fault if isinstance(fault, ClientError) else fault.__cause__
            said = getattr(cause, "response", {}).get("Error", {}).get("Code", "")
            if said in _THERE:
                continue
            raise SettingRefused(
                "bucket_not_creatable", bucket=name, problem=said or type(fault).__name__
            ) from None


def make_pools(names: tuple[str, ...] = POOLS) -> None:
    """Create the work pools that are missing, each with a limit of one run.

    The limit of the pool also counts a run whose worker was killed and whose process still runs: a
    new worker does not start another run in parallel. Existing pools are unchanged.

    Raises:
        ChildFailed: Prefect refused, or did not respond.
    """
    for name in names:
        if _prefect("work-pool", "inspect", name, needed=False).returncode:
            _prefect("work-pool", "create", name, "--type", "process")
            _prefect("work-pool", "set-concurrency-limit", name, "1")


def deploy() -> None:
    """Create or update the deployments of ``infra/services/prefect.yaml``.

    Raises:
        ChildFailed: Prefect refused, or did not respond.
    """
    _prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS))


def make_automations() -> None:
    """Create or update the automations of ``infra/services/automations.yaml``.

    An automation that matches the file is not updated: an update discards the state of its trigger.
    Its description contains a digest of the file's entry for this comparison.

    Raises:
        ChildFailed: Prefect refused, or did not respond.
    """
    import yaml

    current = _automations()
    for entry in yaml.safe_load(AUTOMATIONS.read_text(encoding="utf-8"))["automations"]:
        described = (
            f"{entry['description']} (infra/services/automations.yaml, {digest(entry)[:12]})"
        )
        text = json.dumps({**entry, "description": described})
        same_name = [item for item in current if item["name"] == entry["name"]]
        if not same_name:
            _prefect("automation", "create", "--from-json", text)
        for duplicate in same_name[1:]:  # two setups ran concurrently
            _prefect("automation", "delete", "--id", duplicate["id"])
        if same_name and same_name[0]["description"] != described:
            _prefect("automation", "update", "--id", same_name[0]["id"], "--from-json", text)


def _automations() -> list[dict[str, Any]]:
    """List the server's automations. Prefect's CLI prints JSON with line breaks inside strings."""
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    answer = get(
        os.environ["PREFECT_API_URL"].rstrip("/") + "/automations/filter",
        login=(user, password) if user else None,
        posted={"limit": 200},
        seconds=SECONDS,
    )
    found = answer.value()
    if answer.status != HTTPStatus.OK or not isinstance(found, list):
        raise ServiceFailed("automations_not_listed", status=answer.status)
    return found


def _prefect(*arguments: str, needed: bool = True) -> "subprocess.CompletedProcess[str]":
    # The command line, since only flows and tasks import Prefect.
    ended = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=ROOT,  # the folder of the deployments' entrypoints
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if needed and ended.returncode:
        said = cleaned(ended.stdout + ended.stderr)[-2000:]
        raise ChildFailed("command_failed", command=" ".join(("prefect", *arguments)), output=said)
    return ended


def main() -> None:
    """Create all of them, and print what was created."""
    make_buckets()
    make_pools()
    deploy()
    make_automations()
    print(  # noqa: T201
        f"buckets {', '.join(BUCKETS)}; pools {', '.join(POOLS)}; deployments; automations"
    )


if __name__ == "__main__":
    main()
