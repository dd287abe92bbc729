"""A drill's evidence as JSON, HTML and JUnit XML, whatever texts are in it."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from restore.drill_checks import read_assertion
from restore.drill_junit import junit
from restore.drill_page import page
from restore.mount_damage import MAX_DAMAGES, met_damage
from timeline.errors import DamagedStore, TimelineError
from timeline.format import keys, sealed_json
from timeline.format.evidence import (
    Check,
    Damage,
    DrillTarget,
    Evidence,
    RecoveryPoint,
    RecoveryTime,
    Step,
    decode_evidence,
    drill_id,
    encode_evidence,
)
from timeline.lsn import Lsn

NASTY = "<script>alert('1')</script>&\"\x00\x1b ]]> \ud800"
STARTED = 1_764_171_340_000_000


def evidence(text: str = "fine", *, started: int = STARTED, result: str = "damaged") -> Evidence:
    """One with something in every field."""
    return Evidence(
        id=drill_id(started, "0123abcd"),
        store_id="ab" * 16,
        store_url=f"file:///{text}",
        version="tl 0.1.0",
        host=text,
        account=text,
        started=started,
        finished=started + 5_000_000,
        seed=(1 << 56) - 1,
        asked="random",
        target=DrillTarget("random", 3, Lsn(0xFFFFFFFF12345678), started, None, text, Lsn(7), 99),
        server_version=text,
        result=result,
        exit_code=4,
        message=text,
        recovery_time=RecoveryTime(1_200_000, "lazy", None, 60_000_000, 1),
        recovery_point=RecoveryPoint(Lsn(9), started, None, True, Lsn(10), started, 1, 2, text, None),
        steps=(Step(text, 0, 1_000_000, 3, 4096, "passed"), Step("second", 1, 2, 0, 0, "failed", text)),
        checks=(
            Check("catalog", text, text, "passed", text, 1, (text,), 1),
            Check("amcheck", "heap", "db", "failed", text, 2, (text, "more"), 70),
            Check("amcheck", "heap", None, "skipped", text, 0),
        ),
        damages=(Damage("packs/ab/cd", 5, 10, text, (text,)), Damage("wal/main/1/0", 0, None, text)),
        warnings=(text,),
    )


def test_json_comes_back() -> None:
    found = evidence("naïve\n")
    data = encode_evidence(found)
    assert decode_evidence(data, "k") == found
    with pytest.raises(DamagedStore):
        decode_evidence(data.replace(b"random", b"rAndom", 1), "k")


def test_newer_members_are_ignored_and_absent_ones_have_defaults() -> None:
    """[JSN-4]"""
    members = sealed_json.decode(encode_evidence(evidence()), "k")
    del members["magic"]
    with pytest.raises(DamagedStore, match="magic"):
        decode_evidence(sealed_json.encode(members), "k")
    members |= {"magic": "timeline drill", "later": 1}
    assert decode_evidence(sealed_json.encode(members), "k") == evidence()


def test_the_newest_id_sorts_first() -> None:
    """[DRL-1]"""
    ids = [drill_id(STARTED + step, "ffffffff") for step in (2, 1, 0)]
    assert ids == sorted(ids)
    for form in ("json", "html", "junit.xml"):
        key = keys.drill_evidence(ids[0], form)
        assert keys.parse_drill_evidence(key) == (ids[0], form)
    for key in (
        "drills/x/evidence.json",
        f"drills/{ids[0]}/evidence.xml",
        f"x/drills/{ids[0]}/evidence.json",
    ):
        assert keys.parse_drill_evidence(key) is None


class Texts(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_no_text_becomes_markup() -> None:
    found = page(evidence(NASTY), [evidence(NASTY, started=STARTED - 1)]).decode()
    assert "<script" not in found
    parsed = Texts(found)
    assert "script" not in parsed.tags
    assert parsed.tags == Texts(page(evidence(), [evidence(started=STARTED - 1)]).decode()).tags
    assert parsed.text.count("<script>alert('1')</script>&") > 10


def test_junit_holds_what_xml_cannot() -> None:
    suite = ElementTree.fromstring(junit(evidence(NASTY)))
    assert suite.attrib["tests"] == "4" and suite.attrib["failures"] == "2" and suite.attrib["skipped"] == "1"
    failure = suite.findall("testcase/failure")[1]
    assert "<script>alert('1')</script>&" in failure.attrib["message"] and "�" in failure.attrib["message"]


def test_junit_of_a_failed_check_fails_once() -> None:
    """A check that failed stands for itself; a stage that broke is told by the case `recovery`."""
    failed = dataclasses.replace(evidence(result="failed"), damages=(), steps=())
    assert ElementTree.fromstring(junit(failed)).attrib["failures"] == "1"
    broken = dataclasses.replace(evidence(result="failed"), damages=(), checks=())
    assert ElementTree.fromstring(junit(broken)).attrib["failures"] == "1"


def test_damage_is_read_from_a_mounts_log(tmp_path: Path) -> None:
    log = tmp_path / "mount.log"
    assert met_damage(log) == ()
    line = "2026-01-01 10:00:00,000 ERROR restore.mount: read: packs/ab/{}: at byte {}: expected: this\n"
    other = "2026-01-01 10:00:00,000 WARNING restore.mount: open: packs/no/0: at byte 1: no error\n"
    log.write_text(line.format("cd", 7).replace("read: ", ""))
    assert [error.key for error in met_damage(log)] == ["packs/ab/cd"]
    log.write_text(other + line.format("cd", 7) * 3 + "".join(line.format("ef", n) for n in range(100)))
    found = met_damage(log)
    assert len(found) == MAX_DAMAGES
    assert (found[0].key, found[0].offset, found[0].expectation) == ("packs/ab/cd", 7, "expected: this")
    assert (found[1].key, found[1].offset) == ("packs/ab/ef", 0)


def test_an_assertion_names_its_database() -> None:
    assert read_assertion("a", b"select true").database == "postgres"
    assert read_assertion("a", b"-- why\n  -- database: my shop \nselect true").database == "my shop"
    with pytest.raises(TimelineError, match="UTF-8"):
        read_assertion("a", b"\xff")
    with pytest.raises(TimelineError, match="at most"):
        read_assertion("a", b" " * (2 << 20))
