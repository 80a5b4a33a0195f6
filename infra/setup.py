"""What the services need once before the first run: buckets, work pools, deployments.

``python -m infra.setup`` makes what is missing and leaves alone what is there. It reads the
``AWS_*`` variables (a key that may make buckets), ``PREFECT_API_URL`` and ``RECPRESS_CODE``, the
folder that workers run the code from.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from infra.credentials import cleaned
from infra.errors import InfraError, SettingRefused

BUCKETS = ("recpress", "mlflow")
POOLS = ("recpress-cpu", "recpress-gpu")
DEPLOYMENTS = Path(__file__).parent / "prefect.yaml"

_THERE = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}
SECONDS = 120


def make_buckets(names: tuple[str, ...] = BUCKETS) -> None:
    """Make the buckets that are not there.

    Raises:
        SettingRefused: the store does not let this key make one, or does not answer.
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
                f"The bucket {name!r} cannot be made ({said or type(fault).__name__}). Check "
                "AWS_ENDPOINT_URL, and that AWS_ACCESS_KEY_ID may make buckets."
            ) from None


def make_pools(names: tuple[str, ...] = POOLS) -> None:
    """Make the work pools that are not there; their limits and templates stay as they are.

    Raises:
        InfraError: Prefect refused, or did not answer.
    """
    for name in names:
        if _prefect("work-pool", "inspect", name, needed=False).returncode:
            _prefect("work-pool", "create", name, "--type", "process")


def deploy() -> None:
    """Make or renew the deployments of ``infra/prefect.yaml``.

    Raises:
        InfraError: Prefect refused, or did not answer.
    """
    _prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS))


def _prefect(*arguments: str, needed: bool = True) -> "subprocess.CompletedProcess[str]":
    # Its command line, since only flows and tasks know Prefect as a library.
    ended = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=DEPLOYMENTS.parent.parent,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if needed and ended.returncode:
        said = cleaned(ended.stdout + ended.stderr)[-2000:]
        raise InfraError(f"'prefect {' '.join(arguments)}' failed: {said}")
    return ended


def main() -> None:
    """Make all of it, and say so."""
    make_buckets()
    make_pools()
    deploy()
    print(f"buckets {', '.join(BUCKETS)}; pools {', '.join(POOLS)}; deployments")  # noqa: T201


if __name__ == "__main__":
    main()
