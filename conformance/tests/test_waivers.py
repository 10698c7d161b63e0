"""Waivers and verification: what is waived is answered for, and what was altered is found."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_process
import pytest
from in_process import CLAIMED, GOOD, TODAY, changed, command, lines

from torchhal_conformance import corpus, records, run, waivers
from torchhal_conformance.run import Options

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    in_process.few(monkeypatch)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    in_process.in_this_process(monkeypatch)


@pytest.fixture
def report(here: None, tmp_path: Path) -> Path:
    run.run(GOOD, tmp_path / "report.jsonl")
    return tmp_path / "report.jsonl"


# ---------------------------------------------------------------------------- waivers

WAIVER = {
    "case": "attention.*", "owner": "tests", "issue": "https://example.org/1", "error": "RuntimeError",
    "reason": "it gives up", "expires": TODAY + datetime.timedelta(days=30),
}  # fmt: skip


@pytest.fixture
def waived(tmp_path: Path) -> Callable[..., tuple[waivers.Waiver, ...]]:
    def write(**changes: Any) -> tuple[waivers.Waiver, ...]:
        path = tmp_path / "waivers.toml"
        entry = {key: value for key, value in {**WAIVER, **changes}.items() if value is not None}
        texts = [f"{k} = {json.dumps(v) if isinstance(v, str) else v}" for k, v in entry.items()]
        path.write_text("[[waiver]]\n" + "\n".join(texts))
        return waivers.read(path, TODAY)

    return write


Waived = Callable[..., tuple[waivers.Waiver, ...]]


def statuses(options: Options, path: Path) -> list[str]:
    return [r["status"] for r in run.run(options, path).results if r["case"] in CLAIMED]


def test_a_waiver_covers_the_failures_it_names_and_no_other(
    here: None, waived: Waived, tmp_path: Path
) -> None:
    bad = Options("", plugin="hostile:raises")
    path = tmp_path / "waived.jsonl"
    numbers = waived(case="attention.numbers/dense-*l1-s1-*")
    found = statuses(changed(bad, waivers=numbers), path)
    assert sorted(found)[-1] == "waived"
    assert found.count("waived") == 1
    assert "waived" not in statuses(changed(bad, waivers=waived(error="CheckFailed")), path)


def test_a_waiver_of_what_passes_is_stale_and_fails(here: None, waived: Waived, tmp_path: Path) -> None:
    path = tmp_path / "stale.jsonl"
    found = statuses(changed(GOOD, waivers=waived(case=CLAIMED[0])), path)
    assert sorted(found) == ["pass", "pass", "pass", "stale-waiver"]
    assert lines(path)[-1]["verdict"] == "NOT CONFORMANT"


def test_a_waiver_of_no_case_of_a_whole_run_is_an_error_before_anything_runs(
    here: None, waived: Waived, tmp_path: Path
) -> None:
    path = tmp_path / "report.jsonl"
    lost = waived(case="attention.numbers/dance-*")
    with pytest.raises(waivers.WaiverError, match=r"attention.numbers/dance-\*.*none of the 6 cases"):
        run.run(changed(GOOD, waivers=lost), path)
    assert not path.exists()
    for part in ({"shard": (1, 2)}, {"family": "attention"}, {"case": CLAIMED[0]}):
        run.run(changed(GOOD, waivers=lost, **part), path)
    assert lines(path)[0]["waivers"][0]["case"] == "attention.numbers/dance-*"


def test_a_waiver_of_no_case_is_found_once_the_shards_are_merged(
    here: None, waived: Waived, tmp_path: Path
) -> None:
    lost = waived(case="attention.numbers/dance-*")
    parts = [tmp_path / f"{number}.jsonl" for number in (1, 2)]
    for number, path in enumerate(parts, 1):
        run.run(changed(GOOD, waivers=lost, shard=(number, 2)), path)
        assert run.faults(path) == []
    result = command("merge", *parts, "-o", tmp_path / "merged.jsonl")
    assert result.exit_code == 2
    assert "dance" in result.output


def test_a_waived_run_holds_by_the_waivers_of_its_own_header(
    here: None, waived: Waived, tmp_path: Path
) -> None:
    path = tmp_path / "waived.jsonl"
    bad = changed(Options("", plugin="hostile:raises"), waivers=waived(case="attention.*/dense-*"))
    assert set(statuses(bad, path)) == {"waived"}
    assert run.faults(path) == []
    found = lines(path)
    found[0]["waivers"] = []
    path.write_text("".join(map(records.line, found)))
    assert any("no waiver of the header makes it so" in fault for fault in run.faults(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expires": TODAY - datetime.timedelta(days=1)}, "expired"),
        ({"expires": TODAY + datetime.timedelta(days=181)}, "at most 180 days"),
        ({"expires": "soon"}, "a date"),
        ({"colour": "red"}, "colour"),
        ({"owner": None}, "owner"),
        ({"reason": " "}, "reason"),
    ],
    ids=["expired", "too long", "no date", "unknown field", "missing field", "empty field"],
)
def test_a_waiver_that_can_not_be_honoured_is_refused(
    waived: Waived, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(waivers.WaiverError, match=message):
        waived(**changes)


# ---------------------------------------------------------------------------- verification

ALTERATIONS: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "a removed result": (lambda r: r.pop(2), "1 cases are missing"),
    "a duplicated result": (lambda r: r.insert(2, r[2]), "more than one result"),
    "an edited status": (lambda r: r[1].update(status="fail"), "digest"),
    "an edited ratio": (lambda r: r[1].update(ratio=0.125), "digest"),
    "no footer": (lambda r: r.pop(), "no footer"),
    "an edited verdict": (lambda r: r[-1].update(verdict="CONFORMANT!"), "verdict"),
    "an edited count": (lambda r: r[-1].update(passed=5), "passed"),
    "an unknown field": (lambda r: r[1].update(colour="red"), "colour"),
    "a missing field": (lambda r: r[0].pop("backend"), "backend"),
    "an unknown claim": (lambda r: r[0].update(claims={"tea": {}}), "header"),
    "another corpus": (lambda r: r[0].update(corpus="0" * 64), "the corpus is another one"),
    "a result waived by hand": (
        lambda r: r[1].update(status="waived", waiver="https://example.org"),
        "no waiver",
    ),
    "a waiver of nothing": (
        lambda r: r[0].update(
            waivers=[{**WAIVER, "case": "no.such/*", "expires": "2026-12-24"}], started="2026-11-25T00:00:00Z"
        ),
        "about none of the 6 cases",
    ),
    "a waiver without end": (
        lambda r: r[0].update(waivers=[{**WAIVER, "expires": "2036-12-24"}], started="2026-11-25T00:00:00Z"),
        "at most 180 days",
    ),
    "a waiver that covers more": (
        lambda r: r[0].update(waivers=[{**WAIVER, "expires": "2026-12-24"}], started="2026-11-25T00:00:00Z"),
        "should be stale-waiver",
    ),
    "another format": (lambda r: r[0].update(format=2), "1 was expected"),
    "another judge": (lambda r: r[1].update(judged="nobody"), "nobody"),
    "another seed": (lambda r: r[0].update(seed=3), "digest"),
    "results after the footer": (lambda r: r.append(r[1]), "after the footer"),
    "no header": (lambda r: r.pop(0), "no place"),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_report_does_not_hold(report: Path, alteration: str) -> None:
    alter, message = ALTERATIONS[alteration]
    found = lines(report)
    alter(found)
    report.write_text("".join(map(records.line, found)))
    result = command("verify", report)
    assert result.exit_code == 1, result.output
    assert message in result.output


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[1]\n", b"not JSON\n", b"\xff\xfe\n"])
def test_a_file_that_is_no_report_does_not_hold(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "report.jsonl"
    path.write_bytes(content)
    result = command("verify", path)
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)


def test_a_profile_that_was_changed_after_it_was_frozen_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    folder = tmp_path / "profiles"
    folder.mkdir()
    digests = {"inference": corpus.digest(["a/1", "a/2"])}
    (folder / "1.json").write_text(json.dumps({"cases": {"inference": {"a": ["1"]}}, "digests": digests}))
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="its digest differs"):
        corpus.frozen("inference", "1")
