"""P6 to the letter: a lazy branch nobody has connected to has the bytes of stock recovery from a full
copy."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from restore.binaries import Binaries
from restore.branch import HostBranches
from restore.branch_request import BranchRequest, StoreAddress
from restore.compute import Postmaster, stop
from restore.host import find_host
from restore.icu_memory import IcuMemory
from tests.fix_postgres import MAJORS
from tests.support.archived_server import archived_server
from tests.support.postgres import PostgresServer, scratch
from tests.support.restored import stock_recovery
from tests.support.workload import prepare, steps
from timeline.catalog.when import AtLsn
from timeline.clock import SystemClock
from timeline.lsn import Lsn

CLOCK = SystemClock()
COMPARED = ("base", "global", "pg_tblspc", "pg_xact", "pg_multixact", "pg_commit_ts", "pg_twophase")
BY_NATURE_DIFFERENT = ("pg_control", "pg_internal.init", "1262")
"""Times; caches; pg_database, in which the launcher of autovacuum sets hint bits as soon as there is one."""
QUIET = {"autovacuum": "off", "checkpoint_timeout": "1h", "track_commit_timestamp": "on"}


def files(data: Path) -> dict[str, bytes]:
    """Every file that recovery answers for."""
    found = {}
    for top in COMPARED:
        for path in (data / top).rglob("*"):
            if path.is_file() and path.name not in BY_NATURE_DIFFERENT:
                found[str(path.relative_to(data))] = path.read_bytes()
    return found


@pytest.mark.fuse
@pytest.mark.parametrize(
    ("major", "moment"),
    [(major, "prepare again" if major == 18 else "restore point") for major in MAJORS],
)
def test_every_page_is_the_same(
    make_postgres: Callable[..., PostgresServer], major: int, moment: str
) -> None:
    """With prepared transactions, multixacts, subtransactions, DDL, new databases and tablespaces on the
    way."""
    root = scratch("tl-by-")
    server = make_postgres(major, settings=QUIET)
    prepare(server)
    space = server.make_directory(root / "space")
    host = find_host({**os.environ, "TL_STATE": str(root / "state")})
    host.make()
    branches = HostBranches(host, CLOCK, os.environ)
    try:
        with archived_server(server, root / "store") as archived:
            lsn = Lsn(0)
            for name, step in steps(server, space):
                step()
                if name == moment:
                    lsn = Lsn.parse(server.position())
            archived.position()
            # A connection made to learn of ICU's version would set hint bits in the branch.
            icu = server.value(
                "select max(pg_collation_actual_version(oid)) from pg_collation "
                "where collprovider = 'i' and collversion is not null"
            )
            IcuMemory(host.state).note(Binaries(major, server.bin), icu)
            request = BranchRequest(StoreAddress(archived.url), name="lazy", when=AtLsn(lsn))
            made = asyncio.run(branches.create(request))
            server_of = branches.registry.get(made.name).server
            assert server_of is not None and made.pid is not None
            asyncio.run(stop(Postmaster(made.pid, server_of.pid_started or ""), CLOCK, seconds=60))
            ours = files(Path(made.data_directory))
            theirs = files(stock_recovery(archived.url, lsn, root / "stock", major, host))
            assert ours.keys() == theirs.keys()
            assert [path for path in ours if ours[path] != theirs[path]] == []
            assert len(ours) > 900
    finally:
        for branch in branches.registry.all():
            asyncio.run(branches.delete(branch.name))
        server.stop("immediate")
        shutil.rmtree(root, ignore_errors=True)
