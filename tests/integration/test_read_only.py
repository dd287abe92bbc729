"""P10: whoever only reads needs permission to read and list, and writes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from tests.fix_stores import BUCKET, fresh_prefix
from tests.support.postgres import PostgresServer, scratch
from tests.support.seaweed import READER_ACCESS_KEY, READER_SECRET_KEY, Seaweed, boto3_client
from tests.support.tl_host import Host, make_host

ROWS = 500


@pytest.fixture
def place() -> Iterator[Path]:
    """A scratch directory."""
    path = scratch("tl-ro-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


def fill(server: PostgresServer, host: Host) -> None:
    """A store with a base backup and some WAL after it, part of it not sealed."""
    host.tl("init", host.store, "--source", server.conninfo)
    host.tl("archive", "--once")
    server.sql(f"create table t as select generate_series(1, {ROWS}) n")
    host.tl("archive", "--once")


def told_of(reader: Host) -> str:
    """What the only branch is said to be in danger of, once its mount knows."""
    for _ in range(300):
        (branch,) = reader.branches()
        if branch["warnings"]:
            return " ".join(branch["warnings"])
        time.sleep(0.1)
    return ""


def read_all(server: PostgresServer, reader: Host, home: Path) -> None:
    """Every command that reads: status, both modes of a branch and its life, restore."""
    assert reader.tl("status")["recoverable"]
    try:
        for mode in ("lazy", "copy"):
            result = reader.tl("branch", "look", "--mode", mode)
            assert result["mode"] == mode
            with psycopg.connect(result["dsn"], autocommit=True) as conn:
                assert conn.execute("select count(*) from t").fetchone() == (ROWS,)
                conn.execute("insert into t values (0)")
            if mode == "lazy":
                assert "nothing pins its snapshot" in told_of(reader)
            reader.tl("stop", "look")
            reader.tl("start", "look")
            assert [each["name"] for each in reader.branches()] == ["look"]
            reader.tl("delete", "look", "--yes")
    finally:
        reader.end_agent()
    server.make_directory(home)
    reader.tl("restore", str(home / "data"))
    assert (home / "data" / "global" / "pg_control").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="a read-only mount takes root")
def test_a_directory_mounted_read_only(make_postgres: Callable[..., PostgresServer], place: Path) -> None:
    server = make_postgres(15)
    fill(server, make_host(place / "writer", f"file://{place}/store", source=server.conninfo))
    frozen = place / "frozen"
    frozen.mkdir()
    subprocess.run(["mount", "--bind", str(place / "store"), str(frozen)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(frozen)], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            (frozen / "new").touch()
        before = files(place / "store")
        assert before
        read_all(server, make_host(place / "reader", f"file://{frozen}"), place / "home")
        assert files(place / "store") == before
    finally:
        subprocess.run(["umount", str(frozen)], check=True)


def files(root: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below, with size, inode and time of its last change."""
    found = {}
    for path in root.rglob("*"):
        info = path.lstat()
        found[str(path)] = (info.st_size, info.st_ino, info.st_ctime_ns)
    return found


def test_s3_credentials_that_read_and_list(
    make_postgres: Callable[..., PostgresServer], seaweed: Seaweed, place: Path
) -> None:
    server = make_postgres(15)
    prefix = fresh_prefix()
    url = f"s3://{BUCKET}/{prefix}"
    writer = make_host(place / "writer", url, source=server.conninfo, endpoint_url=seaweed.endpoint_url)
    fill(server, writer)
    reader = make_host(place / "reader", url, endpoint_url=seaweed.endpoint_url)
    reader = replace(
        reader,
        environment=reader.environment
        | {"AWS_ACCESS_KEY_ID": READER_ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET_KEY},
    )
    client = boto3_client(seaweed.endpoint_url, READER_ACCESS_KEY, READER_SECRET_KEY)
    with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/new", Body=b"new")
    before = objects(seaweed, prefix)
    assert before
    read_all(server, reader, place / "home")
    assert objects(seaweed, prefix) == before


def objects(seaweed: Seaweed, prefix: str) -> dict[str, tuple[int, str, str]]:
    """Every object, with size, ETag and time."""
    pages = seaweed.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
    return {
        each["Key"]: (each["Size"], each["ETag"], str(each["LastModified"]))
        for page in pages
        for each in page.get("Contents", [])
    }
