"""Which store and source a command works on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.config import Cluster, Settings, read_clusters, resolve, save_cluster
from timeline.errors import UsageError

TWO = '[cluster.a]\nstore = "file:///a"\nsource = "host=a"\n[cluster.b]\nstore = "s3://b"\nendpoint_url = "http://x"\n'


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No configuration but the test's own."""
    for name in ("TL_STORE", "TL_CLUSTER", "TL_SOURCE", "TL_ENDPOINT_URL", "TL_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TL_CONFIG", str(tmp_path / "tl.toml"))


def settle(store: str | None = None, cluster: str | None = None, source: str | None = None) -> Settings:
    return resolve(store=store, cluster=cluster, endpoint_url=None, region=None, source=source, as_json=False)


def write(text: str, tmp_path: Path) -> None:
    (tmp_path / "tl.toml").write_text(text)


def test_option_before_variable_before_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write('[cluster.a]\nstore = "file:///a"\n', tmp_path)
    assert settle().store == "file:///a"
    monkeypatch.setenv("TL_STORE", "file:///variable")
    assert settle().store == "file:///variable"
    assert settle("file:///option").store == "file:///option"


def test_several_clusters_and_none_chosen(tmp_path: Path) -> None:
    write(TWO, tmp_path)
    with pytest.raises(UsageError) as caught:
        settle()
    assert caught.value.hint == "choose with --cluster: a, b"
    assert settle(cluster="b").endpoint_url == "http://x"


def test_a_store_named_as_an_argument_is_the_one(tmp_path: Path) -> None:
    """`tl init` of one more store, beside several clusters."""
    write('[cluster.a]\nstore = "file:///a"\n[cluster.b]\nstore = "file:///b"\n', tmp_path)
    from cli.init import init_command

    with pytest.raises(UsageError, match="no source server given"):
        init_command.main(["file:///c"], standalone_mode=False)


def test_a_named_store_finds_its_source(tmp_path: Path) -> None:
    write(TWO, tmp_path)
    assert settle("file:///a").source == "host=a"
    assert settle("file:///a", source="host=mine").source == "host=mine"
    assert settle("file:///other").source is None


def test_store_and_cluster_that_disagree(tmp_path: Path) -> None:
    write(TWO, tmp_path)
    with pytest.raises(UsageError, match="different stores"):
        settle("file:///b", cluster="a")


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    write('[cluster.a]\nsorce = "host=a"\n', tmp_path)
    with pytest.raises(UsageError) as caught:
        settle()
    assert caught.value.hint == "did you mean 'source'?"


@pytest.mark.parametrize("text", ["[cluster", 'cluster = "a"', "[cluster.a]\nstore = 1\n", "[other]\n"])
def test_broken_file(text: str, tmp_path: Path) -> None:
    write(text, tmp_path)
    with pytest.raises(UsageError) as caught:
        settle()
    assert "tl.toml" in caught.value.message


def test_saving_keeps_what_is_there(tmp_path: Path) -> None:
    write(TWO, tmp_path)
    mine = Cluster("c", 'file:///with "quotes"', None, None, "host=c user='x y'")
    path, added = save_cluster(mine)
    assert added
    assert read_clusters(path)[-1] == mine
    assert len(read_clusters(path)) == 3
    _, again = save_cluster(Cluster("a", "file:///new", None, None, None))
    assert not again
    assert read_clusters(path)[0].store == "file:///a"


def test_need(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no store"):
        settle().need_store()
    with pytest.raises(UsageError, match="no source"):
        settle().need_source()
