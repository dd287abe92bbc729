"""Which store, which source: option, then ``TL_*`` variable, then ``tl.toml``.

``tl.toml`` is looked for in ``$TL_CONFIG``, else in the working directory, ``$XDG_CONFIG_HOME/tl`` (``~/.config/tl``) and
``/etc/tl``; the first that exists counts::

    [cluster.prod]
    store = "s3://backups/prod"
    endpoint_url = "https://s3.example.net"     # S3-compatible servers only
    region = "eu-central-1"
    source = "host=db1 user=tl_archiver"        # never a password: use ~/.pgpass or PGPASSFILE

``cli/tl.toml.example`` names every key there is; ``cli/tl_toml.py`` reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.operations import Operations
from cli.tl_toml import CLUSTER_KEYS, read_document
from cli.tl_toml import Cluster as Cluster
from timeline.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Settings:
    """Where to work, fully resolved."""

    store: str | None
    endpoint_url: str | None
    region: str | None
    source: str | None
    """Conninfo of the archived server, for the commands that speak to it."""
    cluster: str | None
    """Name in tl.toml, when it came from there."""
    json: bool
    operations: Operations = field(default_factory=Operations)
    """The cluster's sub-tables in tl.toml, or the defaults."""

    def need_store(self) -> str:
        """The store's URL; raises UsageError when none was named anywhere."""
        if self.store is None:
            raise UsageError(
                "no store given",
                hint="name it with --store URL, TL_STORE, or a cluster in tl.toml (`tl init` writes one)",
            )
        return self.store

    def need_source(self) -> str:
        """The source's conninfo; raises UsageError when none was named anywhere."""
        if self.source is None:
            raise UsageError(
                "no source server given",
                hint='name it with --source "host=… user=…", TL_SOURCE, or in tl.toml',
            )
        return self.source


def config_path() -> Path | None:
    """The tl.toml that counts, ``None`` when there is none."""
    named = os.environ.get("TL_CONFIG")
    if named:
        return Path(named) if Path(named).exists() else None
    for candidate in (Path("tl.toml"), user_config_path(), Path("/etc/tl/tl.toml")):
        if candidate.exists():
            return candidate
    return None


def user_config_path() -> Path:
    """Where ``tl init`` writes: ``$TL_CONFIG``, else the user's own configuration directory."""
    named = os.environ.get("TL_CONFIG")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tl" / "tl.toml"


def read_clusters(path: Path) -> tuple[Cluster, ...]:
    """The clusters of a tl.toml; raises UsageError naming the file and the key that is wrong."""
    return read_document(path).clusters


def save_cluster(cluster: Cluster) -> tuple[Path, bool]:
    """Add the cluster to the user's tl.toml unless one of that name is there; returns the path and whether it was added."""
    path = user_config_path()
    if path.exists() and any(known.name == cluster.name for known in read_clusters(path)):
        return path, False
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"\n[cluster.{json.dumps(cluster.name)}]\n"]
    lines += [
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
        for key in CLUSTER_KEYS
        if (value := getattr(cluster, key)) is not None
    ]
    with path.open("a") as file:
        file.write("".join(lines))
    return path, True


def resolve(
    *,
    store: str | None,
    cluster: str | None,
    endpoint_url: str | None,
    region: str | None,
    source: str | None,
    as_json: bool,
) -> Settings:
    """Settle every value; raises UsageError when several clusters are configured and none is chosen."""
    settings = Settings(
        store=store or os.environ.get("TL_STORE") or None,
        endpoint_url=endpoint_url or os.environ.get("TL_ENDPOINT_URL") or None,
        region=region or os.environ.get("TL_REGION") or None,
        source=source or os.environ.get("TL_SOURCE") or None,
        cluster=None,
        json=as_json,
    )
    wanted = cluster or os.environ.get("TL_CLUSTER")
    path = config_path()
    if path is None:
        if wanted:
            raise UsageError(f"no tl.toml that could define cluster {wanted!r}")
        return settings
    known = {item.name: item for item in read_clusters(path)}
    if wanted:
        chosen = known.get(wanted)
        if chosen is None:
            raise UsageError(f"{path}: no cluster {wanted!r}", hint=f"known: {', '.join(known) or 'none'}")
    elif settings.store is not None:
        # A store named by hand still finds its source, if exactly one cluster archives into it.
        wanted_store = settings.store.rstrip("/")
        matching = [item for item in known.values() if (item.store or "").rstrip("/") == wanted_store]
        if len(matching) != 1:
            return settings
        chosen = matching[0]
    elif len(known) == 1:
        chosen = next(iter(known.values()))
    elif not known:
        return settings
    else:
        raise UsageError(
            f"{path} configures several clusters", hint=f"choose with --cluster: {', '.join(known)}"
        )
    if wanted and store is not None and (chosen.store or "").rstrip("/") != store.rstrip("/"):
        raise UsageError("--store and --cluster name different stores")
    return replace(
        settings,
        store=chosen.store if wanted or settings.store is None else settings.store,
        endpoint_url=settings.endpoint_url or chosen.endpoint_url,
        region=settings.region or chosen.region,
        source=settings.source or chosen.source,
        cluster=chosen.name,
        operations=chosen.operations,
    )


def store_options(command: F) -> F:
    """The options every command takes; the command gets one ``settings`` argument for them."""

    def run(**options: Any) -> Any:
        settings = resolve(
            # `tl init STORE` names it as an argument.
            store=options.pop("store") or options.get("store_url"),
            cluster=options.pop("cluster"),
            endpoint_url=options.pop("endpoint_url"),
            region=options.pop("region"),
            source=options.pop("source", None),
            as_json=options.pop("as_json"),
        )
        return command(settings=settings, **options)

    run.__name__ = command.__name__
    run.__doc__ = command.__doc__
    wrapped: Any = run
    if hasattr(command, "__click_params__"):
        wrapped.__click_params__ = command.__click_params__
    for option in (
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
        click.option("--region", metavar="NAME", help="AWS region of the bucket."),
        click.option("--endpoint-url", metavar="URL", help="Server of an S3-compatible store."),
        click.option("--cluster", metavar="NAME", help="Cluster of tl.toml to work on."),
        click.option(
            "--store", metavar="URL", help="file:///path or s3://bucket/prefix (default: TL_STORE, tl.toml)."
        ),
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def source_option(command: F) -> F:
    """``--source``; put it above ``store_options``' effect, i.e. below it in the list of decorators."""
    return click.option(
        "--source", metavar="CONNINFO", help="The archived server (default: TL_SOURCE, tl.toml)."
    )(command)
