"""``tl``: the command line. Each command's module is imported only when that command runs."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from cli.importing import nothing_collected
from timeline.errors import TimelineError
from timeline.store.user_agent import name_command

_COMMANDS = {
    "init": ("cli.init", "create the store; check source, store and host"),
    "archive": ("cli.archive", "stream the source's WAL into the store until told to stop"),
    "backup": ("cli.archive", "take another base backup; report what differs"),
    "detach": ("cli.init", "remove everything of ours from the source"),
    "daemon": ("cli.daemon", "archive, and do everything else on its schedule"),
    "status": ("cli.status", "what is recoverable, and how fresh"),
    "snapshot": ("cli.snapshot", "build a snapshot from the store's WAL, so that branches replay little"),
    "branch": ("cli.branch", "a running, writable Postgres at any recorded moment"),
    "branches": ("cli.branch", "list the branches on this host"),
    "start": ("cli.branch", "start a stopped branch"),
    "stop": ("cli.branch", "stop a branch, keeping its data"),
    "delete": ("cli.branch", "delete a branch and its data"),
    "reset": ("cli.branch", "make a branch anew at its own moment"),
    "rename": ("cli.branch", "give a branch another name"),
    "protect": ("cli.branch", "refuse to delete or expire a branch"),
    "psql": ("cli.branch", "open psql on a branch"),
    "dsn": ("cli.branch", "print a branch's DSN, for pg_dump and other programs"),
    "logs": ("cli.branch", "print a branch's server log"),
    "expire": ("cli.branch", ""),
    "restore": ("cli.restore", "write a full copy into an empty directory"),
    "verify": ("cli.verify", "check that the store is whole, and what damage endangers"),
    "doctor": ("cli.doctor", "what on source, store and host stands in the way, and its cure"),
    "drill": ("cli.drill", "prove that recovery works, and keep the evidence"),
    "gc": ("cli.gc", "delete what nothing in the store needs any more, after a grace period"),
    "each": ("cli.each", "do one of these for many clusters, here or on Dask workers"),
    "demo": ("cli.demo", "all of it in one minute"),
}
_HIDDEN = {"expire"}

EXIT_CODES = """\b
Exit codes: 0 done, 1 failed, 2 usage, 3 target unreachable, 4 store damaged,
5 fenced, 6 a check did not pass, 7 temporarily unavailable (try again)."""


class LazyGroup(click.Group):
    """Knows the commands' names and one-liners without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in _COMMANDS if name not in _HIDDEN]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        with nothing_collected():
            module = importlib.import_module(_COMMANDS[cmd_name][0])
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            name, command, rest = super().resolve_command(ctx, args)
            name_command(name or "")
            return name, command, rest
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            if not near:
                raise
            raise click.UsageError(f"No such command {args[0]!r}. Did you mean {near[0]!r}?", ctx) from error


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)
@click.version_option(package_name="timeline-postgres", prog_name="tl")
def cli() -> None:
    """Branches, history and undo for an unmodified PostgreSQL.

    \b
    tl init s3://bucket/prod --source "host=db1 user=tl"   create the store
    tl archive                                             keep it up to date
    tl branch --at "5 minutes ago"                         a database as it was
    """


def main() -> None:
    """Entry point of the installed ``tl``."""
    as_json = "--json" in sys.argv
    # Arrow's own pool keeps what a seal or a build took, 35 MB in an archiver; malloc gives large pieces back.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        result: Any = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        print("tl: interrupted", file=sys.stderr)
        sys.exit(130)
    except click.ClickException as error:
        if as_json:
            from cli.output import emit_json

            emit_json({"error": error.format_message(), "hint": None, "kind": "UsageError", "exit_code": 2})
        error.show()
        sys.exit(2)
    except TimelineError as error:
        from cli.output import fail

        sys.exit(fail(error, as_json=as_json))
    except KeyboardInterrupt:
        print("tl: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away; the interpreter must not try to flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(result if isinstance(result, int) else 0)


if __name__ == "__main__":
    main()
