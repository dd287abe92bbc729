"""A real S3 server (SeaweedFS) for tests and benchmarks: loopback only, data in a scratch directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.child import die_with_parent
from tests.support.ports import free_ports, owns_port

ACCESS_KEY = "testkey"
SECRET_KEY = "testsecret"
READER_ACCESS_KEY = "readerkey"
READER_SECRET_KEY = "readersecret"
"""Credentials of somebody who may read and list, and nothing else."""


class Seaweed:
    """One server. ``start`` returns when it answers; ``stop`` kills it, and may be followed by ``start``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self._master, self._volume, self._filer = free_ports(4, companion=10_000)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, seconds: float = 60.0) -> None:
        """Run it and wait until it takes an object; raises RuntimeError with its log otherwise."""
        (self.directory / "data").mkdir(exist_ok=True)
        config = self.directory / "s3.json"
        config.write_text(
            json.dumps(
                {
                    "identities": [
                        {
                            "name": "test",
                            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                        },
                        {
                            "name": "reader",
                            "credentials": [{"accessKey": READER_ACCESS_KEY, "secretKey": READER_SECRET_KEY}],
                            "actions": ["Read", "List"],
                        },
                    ]
                }
            )
        )
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(Path(sys.executable).parent / "weed"),
                    "-logtostderr=true",
                    "server",
                    f"-dir={self.directory / 'data'}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    "-master.telemetry=false",
                    "-master.electionTimeout=1s",
                    "-master.heartbeatInterval=100ms",
                    "-master.resumeState=false",
                    "-master.volumeSizeLimitMB=256",
                    f"-master.port={self._master}",
                    f"-volume.port={self._volume}",
                    "-volume.max=50",
                    "-volume.preStopSeconds=0",
                    "-filer",
                    f"-filer.port={self._filer}",
                    # A range of an object costs it the reading of whole chunks.
                    "-filer.maxMB=1",
                    "-s3",
                    f"-s3.port={self.port}",
                    f"-s3.config={config}",
                    "-s3.iam=false",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    "-s3.autoCreateBucket=false",
                ],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            if owns_port(self._process.pid, self.port) and self._takes_objects():
                return
            time.sleep(0.1)
        log_end = (self.directory / "server.log").read_text(errors="replace")[-4000:]
        self.stop()
        raise RuntimeError(f"SeaweedFS did not come up:\n{log_end}")

    def make_bucket(self, name: str) -> str:
        """Make a bucket; its name. There is room for a handful: each takes several of the 50 volumes."""
        self.client().create_bucket(Bucket=name)
        return name

    def client(self) -> Any:
        """A boto3 client, for what tests must look at from outside."""
        return boto3_client(self.endpoint_url)

    def kill(self) -> None:
        """``kill -9``, without a farewell: what it acknowledged must be there after the next start."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it; hard, for SIGTERM takes it 17 s and more. Its sockets go, too: it puts them beside everybody else's."""
        self.kill()
        for port in (self._master, self._volume, self._filer, self.port):
            for number in (port, port + 10_000):
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink(missing_ok=True)

    def _takes_objects(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.client()
        try:
            with contextlib.suppress(
                client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
            ):
                client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError):
            return False
        return True


@contextlib.contextmanager
def credentials() -> Iterator[None]:
    """What the server takes, in this process's own environment."""
    ours = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def boto3_client(endpoint_url: str, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> Any:
    """A boto3 client with the test credentials, without retries."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        config=Config(
            retries={"total_max_attempts": 1, "mode": "standard"}, connect_timeout=5, read_timeout=30
        ),
    )


@contextlib.contextmanager
def running_seaweed() -> Iterator[Seaweed]:
    """A fresh server, stopped and removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="tl-s3-", dir="/tmp"))
    server = Seaweed(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)
