"""``tl branch`` and the life of a branch on this host."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.branch_scripts import chosen_scripts, script_options
from cli.config import Settings, source_option, store_options
from cli.duration import Duration
from cli.importing import nothing_collected
from cli.init import confirm
from cli.output import duration_text, emit_json, iso, local_time, plain, say, table, warn
from timeline.errors import UsageError
from timeline.ids import MAIN
from timeline.size_text import size_text

if TYPE_CHECKING:
    from restore.branch import HostBranches
    from restore.branch_request import BranchResult, BranchStatus
    from timeline.catalog.when import When

NOW_TIMEOUT_SECONDS = 60.0
_TIMES = ("time", "last_commit_time", "next_commit_time", "expires")


def host_branches(*, mounting: str | None = None) -> HostBranches:
    """The branches of this user on this host; with an agent at hand when one of that store is about to be
    mounted."""
    from restore.agent_fork import fork_agent, prepare_libraries

    prepare_libraries()
    with nothing_collected():
        from restore.branch import HostBranches
        from timeline.clock import SystemClock

        if mounting is not None:
            from restore import agent_server

            # The command needs it as well.
            agent_server.import_for(mounting)

    if mounting is not None:
        fork_agent(os.environ, mounting)
    return HostBranches.of(os.environ, SystemClock())


def about_to_mount(branches: HostBranches, name: str | None) -> None:
    """Have an agent at hand for that branch, or for any of them."""
    from restore.agent_fork import fork_agent

    origins = [status.branch.origin for status in branches.list() if name in (None, status.branch.name)]
    urls = [origin.store_url for origin in origins if origin is not None]
    if urls:
        fork_agent(os.environ, urls[0])


def not_main(name: str) -> str:
    """The name, unless it is the archived server's, which none of these verbs may touch."""
    if name == MAIN:
        raise UsageError(
            "'main' is the archived server, not a branch", hint="`tl branches` lists the branches"
        )
    return name


def branch_document(result: BranchResult) -> dict[str, Any]:
    """The JSON of a branch, times as ISO 8601."""
    document: dict[str, Any] = plain(result)
    for name in _TIMES:
        document[name] = iso(getattr(result, name))
    return document


async def resolve_now(settings: Settings) -> When:
    """Wait until the source's present position is in the store; then the head is what was asked for."""
    from timeline.archive.source import Source
    from timeline.catalog.history import wait_for
    from timeline.catalog.when import Latest
    from timeline.clock import SystemClock
    from timeline.store.open import open_store

    clock = SystemClock()
    source = await Source.open(settings.need_source())
    try:
        position = (await source.probe(slot=None, sender_pid=None)).end
    finally:
        await source.aclose()
    store = await open_store(
        settings.need_store(), endpoint_url=settings.endpoint_url, region=settings.region, clock=clock
    )
    try:
        await wait_for(store, clock, position, timeout_seconds=NOW_TIMEOUT_SECONDS)
    finally:
        await store.aclose()
    return Latest()


def local_zone() -> Any:
    """The zone a time without one is meant in."""
    from datetime import UTC
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    name = os.environ.get("TZ", "").lstrip(":")
    link = os.path.realpath("/etc/localtime")
    if not name and "/zoneinfo/" in link:
        name = link.split("/zoneinfo/", 1)[1]
    try:
        return ZoneInfo(name) if name else UTC
    except (ZoneInfoNotFoundError, ValueError):
        raise UsageError(
            f"unknown time zone {name!r} in TZ or /etc/localtime", hint="give the zone with the time"
        ) from None


@click.command("branch")
@click.argument("name", required=False)
@click.option(
    "--at", "at", metavar="WHEN", default="latest", show_default=True, help="See `tl branch --help`, below."
)
@click.option(
    "--from", "parent", metavar="BRANCH", default=MAIN, show_default=True, help="Branch to start from."
)
@click.option("--tli", type=int, metavar="N", help="Look on the line that leads to this Postgres timeline.")
@click.option(
    "--ttl", type=Duration(), metavar="DURATION", help="Delete it after this time (unnamed branches: 24h)."
)
@click.option(
    "--stop-when-idle",
    type=Duration(),
    metavar="DURATION",
    help="Stop it (`tl start` brings it back) when no client has been connected for so long.",
)
@click.option("--mode", type=click.Choice(["auto", "lazy", "copy"]), default="auto", show_default=True)
@click.option("--listen", metavar="ADDR:PORT", help="Listen on TCP, too, with scram passwords.")
@click.option("--preload", multiple=True, metavar="LIBRARY", help="A shared_preload_libraries entry to keep.")
@click.option("--if-exists", type=click.Choice(["fail", "reuse", "reset"]), default="fail", show_default=True)
@script_options
@source_option
@store_options
def branch_command(
    *,
    settings: Settings,
    name: str | None,
    at: str,
    parent: str,
    tli: int | None,
    ttl: float | None,
    stop_when_idle: float | None,
    mode: str,
    listen: str | None,
    preload: tuple[str, ...],
    if_exists: str,
    run: tuple[Path, ...],
    no_run: bool,
    run_database: str | None,
    run_timeout: float | None,
) -> None:
    """A running, writable, isolated Postgres as of WHEN. Prints how to connect.

    \b
    WHEN   "2026-01-20 10:00"     local zone unless given; refused when ambiguous
           "5 minutes ago"        by the source's clock
           1/5A0003F8             an LSN
           xid:1234               just before that transaction committed
           name:before-release    a restore point
           latest                 everything in the store
           now                    the source's present position; waits until it is stored

    Without a NAME one is generated, and the branch lives for 24 hours.

    Scripts (--run, and `run` of [cluster.NAME.branch] in tl.toml) run through psql as superuser, all in one
    session and one transaction, before anybody can reach the branch. If anything fails there is no branch.
    A script with a statement that no transaction may hold says COMMIT; before it. `tl reset` runs the same
    again, from copies kept with the branch.
    """
    url = settings.need_store()
    branches = host_branches(mounting=url if mode != "copy" else None)
    scripts = chosen_scripts(settings, run, no_run=no_run, database=run_database, timeout_seconds=run_timeout)
    from restore.branch_request import BranchRequest, Listen, StoreAddress

    idle = stop_when_idle or settings.operations.branch.stop_when_idle_seconds

    async def make() -> BranchResult:
        when: When | str = at
        if at.strip().lower() == "now":
            when = await resolve_now(settings)
        return await branches.create(
            BranchRequest(
                store=StoreAddress(url, settings.endpoint_url, settings.region),
                name=name,
                when=when,
                zone=local_zone(),
                tli=tli,
                parent=parent,
                ttl_seconds=ttl,
                stop_when_idle_seconds=None if idle is None else round(idle),
                mode=mode,
                listen=Listen.parse(listen) if listen else None,
                preload=preload,
                if_exists=if_exists,
                scripts=scripts,
            )
        )

    result = asyncio.run(make())
    if settings.json:
        emit_json(branch_document(result))
        return
    warn(result.warnings)
    print_branch(result)


def print_branch(result: BranchResult) -> None:
    """A branch for people: what it holds, then how to reach it."""
    say(f"branch     {result.name} ({result.mode}), ready in {duration_text(result.elapsed_seconds)}")
    say(
        f"at         {result.lsn}"
        + (f", {local_time(result.time)} = {iso(result.time)}" if result.time else "")
    )
    if result.last_commit_time is not None:
        say(f"holds      every commit up to {local_time(result.last_commit_time)}")
    if result.next_commit_time is not None:
        say(f"leaves out the commit of {local_time(result.next_commit_time)} and later ones")
    say(
        f"cost       {size_text(result.fetched_bytes)} fetched in {result.requests} requests, "
        f"{size_text(result.replayed_bytes)} of WAL replayed"
    )
    for script in result.scripts:
        say(f"has run    {script.path}")
    if result.expires is not None:
        say(f"expires    {local_time(result.expires)}")
    say(f"connect    psql '{result.dsn}'")
    say(f"           or: tl psql {result.name}")


@click.command("branches")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def branches_command(*, as_json: bool) -> None:
    """The branches on this host."""
    found = host_branches().list()
    if as_json:
        emit_json(
            [
                {
                    "name": status.branch.name,
                    "id": status.branch.id,
                    "state": status.state,
                    "mode": status.branch.mode,
                    "parent": status.branch.origin.parent if status.branch.origin else None,
                    "lsn": status.branch.origin.lsn if status.branch.origin else None,
                    "time": iso(status.branch.origin.time) if status.branch.origin else None,
                    "created": iso(status.branch.created),
                    "expires": iso(status.branch.expires),
                    "protected": status.branch.protected,
                    "dsn": status.dsn,
                    "pinned_until": iso(status.pin.until) if status.pin else None,
                    "warnings": _warnings(status),
                }
                for status in found
            ]
        )
        return
    warn(
        [f"{one.branch.name}: {one.pin.warning}" for one in found if one.pin is not None and one.pin.warning]
    )
    if not found:
        say("no branches on this host; make one with `tl branch`")
        return
    table(
        ("name", "state", "mode", "as of", "expires", "connect"),
        (
            (
                status.branch.name,
                status.state,
                status.branch.mode,
                _as_of(status.branch.origin),
                local_time(status.branch.expires) if status.branch.expires else "never",
                status.dsn,
            )
            for status in found
        ),
    )


def _warnings(status: BranchStatus) -> list[str]:
    late = [status.pin.warning] if status.pin is not None and status.pin.warning is not None else []
    return [*status.branch.warnings, *late]


def _as_of(origin: Any) -> str:
    if origin is None:
        return "-"
    return local_time(origin.time) if origin.time is not None else str(origin.lsn)


@click.command("start")
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Every branch of this host that is not running.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def start_command(*, name: str | None, everything: bool, as_json: bool) -> int:
    """Start a branch that was stopped, or went down with a crash or a reboot."""
    from timeline.errors import TimelineError

    if everything == (name is not None):
        raise UsageError("name a branch, or give --all")
    branches = host_branches()
    about_to_mount(branches, name)
    if name is not None:
        result = asyncio.run(branches.start(not_main(name)))
        if as_json:
            emit_json(branch_document(result))
        else:
            warn(result.warnings)
            print_branch(result)
        return 0

    async def start_all() -> list[dict[str, Any]]:
        outcome = []
        for status in branches.list():
            if status.state == "running":
                continue
            try:
                outcome.append(branch_document(await branches.start(status.branch.name)))
            except TimelineError as error:
                outcome.append({"name": status.branch.name, "error": error.message, "hint": error.hint})
        return outcome

    outcome = asyncio.run(start_all())
    if as_json:
        emit_json(outcome)
    for each in outcome:
        if "error" in each:
            warn([f"{each['name']}: {each['error']}"])
        elif not as_json:
            say(f"started {each['name']}")
    return 1 if any("error" in each for each in outcome) else 0


@click.command("stop")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def stop_command(*, name: str, as_json: bool) -> None:
    """Stop a branch; its data stays."""
    asyncio.run(host_branches().stop(not_main(name)))
    emit_json({"name": name, "state": "stopped"}) if as_json else say(f"stopped {name}")


@click.command("delete")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def delete_command(*, names: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Delete branches with all their data. The store and the source are not touched."""
    branches = host_branches()
    # All names are looked up first: either all of them can die, or none does.
    found = [branches.status(not_main(name)) for name in names]
    if not yes:
        listed = ", ".join(
            f"{each.branch.name} ({each.state}, made {local_time(each.branch.created)})" for each in found
        )
        confirm(f"This deletes with all its data: {listed}")

    async def delete() -> None:
        for each in found:
            await branches.delete(each.branch.name)

    asyncio.run(delete())
    emit_json({"deleted": list(names)}) if as_json else say(f"deleted {', '.join(names)}")


@click.command("reset")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def reset_command(*, name: str, yes: bool, as_json: bool) -> None:
    """Make a branch anew at the moment it was made from; what was written to it is lost."""
    branches = host_branches()
    status = branches.status(not_main(name))
    if not yes:
        confirm(f"This loses everything written to {name} since {local_time(status.branch.created)}.")
    result = asyncio.run(branches.reset(name))
    if as_json:
        emit_json(branch_document(result))
        return
    warn(result.warnings)
    print_branch(result)


@click.command("rename")
@click.argument("name")
@click.argument("new_name")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def rename_command(*, name: str, new_name: str, as_json: bool) -> None:
    """Give a branch another name; its connections are not disturbed."""
    host_branches().rename(not_main(name), new_name)
    emit_json({"name": new_name, "was": name}) if as_json else say(f"{name} is now {new_name}")


@click.command("protect")
@click.argument("name")
@click.option("--off", is_flag=True, help="Take the protection away.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def protect_command(*, name: str, off: bool, as_json: bool) -> None:
    """Refuse to delete or expire a branch until told otherwise."""
    host_branches().protect(not_main(name), protected=not off)
    state = "no longer protected" if off else "protected"
    emit_json({"name": name, "protected": not off}) if as_json else say(f"{name} is {state}")


@click.command("psql", context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("-d", "--database", default="postgres", show_default=True, metavar="NAME")
def psql_command(*, name: str, arguments: tuple[str, ...], database: str) -> None:
    """Open psql on a branch; further arguments are psql's (after --)."""
    from restore.branch_request import socket_dsn_of

    status = host_branches().status(not_main(name))
    server = status.branch.server
    if server is None or status.state != "running":
        raise UsageError(f"branch {name!r} is {status.state}", hint=f"tl start {name}")
    psql = os.path.join(server.bin_directory, "psql")
    if not os.path.exists(psql):
        psql = "psql"
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("PG") or key == "PGOPTIONS"
    }
    try:
        os.execvpe(psql, [psql, socket_dsn_of(server, database=database), *arguments], environment)
    except FileNotFoundError:
        raise UsageError("no psql on this host", hint="apt-get install postgresql-client") from None


@click.command("dsn")
@click.argument("name")
@click.option("-d", "--database", default="postgres", show_default=True, metavar="NAME")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def dsn_command(*, name: str, database: str, as_json: bool) -> None:
    """Print how to connect to a running branch, for pg_dump and other programs: psql "$(tl dsn NAME)"."""
    from restore.branch_request import socket_dsn_of

    status = host_branches().status(not_main(name))
    server = status.branch.server
    if server is None or status.state != "running":
        raise UsageError(f"branch {name!r} is {status.state}", hint=f"tl start {name}")
    dsn = socket_dsn_of(server, database=database)
    emit_json({"name": name, "dsn": dsn}) if as_json else say(dsn)


@click.command("logs")
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on printing what is added.")
@click.option("-n", "--lines", type=int, default=100, show_default=True)
def logs_command(*, name: str, follow: bool, lines: int) -> None:
    """Print a branch's server log."""
    path = host_branches().log(not_main(name))
    if not path.exists():
        raise UsageError(f"branch {name!r} has no log yet")
    arguments = ["tail", "-n", str(lines), *(["-F"] if follow else []), str(path)]
    os.execvp("tail", arguments)


@click.command("expire", hidden=True)
@click.option("--json", "as_json", is_flag=True)
def expire_command(*, as_json: bool) -> None:
    """Delete the branches whose time is over, and stop the idle ones; the mount agent runs this."""
    branches = host_branches()

    async def act() -> tuple[tuple[str, ...], tuple[str, ...]]:
        return await branches.expire(), await branches.stop_idle()

    deleted, stopped = asyncio.run(act())
    if as_json:
        emit_json({"deleted": list(deleted), "stopped": list(stopped)})
    else:
        for name in deleted:
            say(f"deleted {name}")
        for name in stopped:
            say(f"stopped {name}, which was idle")
