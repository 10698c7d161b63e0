"""Runs, reports, waivers and the command line: what is written is what happened, and what was altered is found."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from torchhal.registry import registry
from torchhal_conformance import corpus, examine, explore, records, run, waivers
from torchhal_conformance.cli import app
from torchhal_conformance.records import ReportError
from torchhal_conformance.run import Options

pytestmark = pytest.mark.timeout(90)

CLAIMED = (
    "attention.numbers/dense-float32-b2-h4-l1-s1-e16",
    "attention.numbers/dense-float32-b2-h4-l15-s17-e16",
    "attention.numbers/dense-float32-b2-h4-l9-s0-e16",
    "attention.determinism/dense-float32-b2-h4-l1-s1-e16",
)
REFUSED = (
    "attention.numbers/varlen-float32-b4-h4-l9-s13-e16",
    "attention.numbers/varlen-float32-causal-b4-h4-l9-s13-e16",
)
TODAY = datetime.date(2026, 11, 25)
GOOD = Options("", plugin="hostile:good")


class InProcess:
    """A worker without a process, for backends that leave this one alone."""

    def __init__(self, backend: str, plugin: str, seed: int, timeout: float, threads: int) -> None:
        self.backend, self.seed = examine.load_plugin(plugin), seed

    def start(self) -> None:
        """It is there."""

    def close(self) -> None:
        """It stays."""

    def run(self, case: str) -> dict[str, Any]:
        named = explore.case_named if case.startswith("explore.") else corpus.case_named
        return {"case": case, **examine.examine(named(case, self.seed), self.backend)}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of six cases, all required."""
    whole, ids = corpus.cases, {*CLAIMED, *REFUSED}
    monkeypatch.setattr(corpus, "cases", lambda seed=0: tuple(c for c in whole(seed) if c.id in ids))
    monkeypatch.setattr(corpus, "frozen", lambda profile, edition="": frozenset(ids))
    monkeypatch.setattr(registry(), "backends", dict(registry().backends))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Worker", InProcess)


@pytest.fixture
def report(here: None, tmp_path: Path) -> Path:
    run.run(GOOD, tmp_path / "report.jsonl")
    return tmp_path / "report.jsonl"


def changed(options: Options, **changes: Any) -> Options:
    return Options(**{**vars(options), **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# ---------------------------------------------------------------------------- runs


def test_a_run_says_of_each_case_what_became_of_it(report: Path) -> None:
    header, *results, footer = lines(report)
    assert header["backend"]["name"] == "good"
    assert {r["case"]: r["status"] for r in results} == {
        **dict.fromkeys(CLAIMED, "pass"),
        **dict.fromkeys(REFUSED, "unsupported-verified"),
    }
    assert footer["verdict"] == "CONFORMANT"
    assert (footer["required"], footer["passed"]) == (4, 4)
    assert run.faults(report) == []


def test_two_runs_of_one_seed_differ_in_times_alone(report: Path, tmp_path: Path) -> None:
    run.run(GOOD, tmp_path / "again.jsonl")

    def timeless(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k not in ("seconds", "started")} for r in lines(path)]

    assert timeless(report) == timeless(tmp_path / "again.jsonl")


def test_two_processes_give_the_same_results_in_the_same_order_as_none(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchhal_conformance.pool import Worker

    monkeypatch.setattr(run, "Worker", Worker)
    double = run.run(changed(GOOD, jobs=2), tmp_path / "double.jsonl")
    timeless = [[{**r, "seconds": None} for r in found] for found in (double.results, lines(report)[1:-1])]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("kept", [1, 3, 6])
@pytest.mark.parametrize("torn", ["", '{"record": "resu'], ids=["between lines", "within a line"])
def test_an_interrupted_run_goes_on_to_the_same_digest(report: Path, kept: int, torn: str) -> None:
    whole = report.read_text().splitlines(keepends=True)
    report.write_text("".join(whole[: kept + 1]) + torn)
    run.run(GOOD, report, resume=True)
    assert lines(report)[-1]["digest"] == json.loads(whole[-1])["digest"]
    assert report.read_text().splitlines(keepends=True)[: kept + 1] == whole[: kept + 1]


@pytest.mark.parametrize(
    "changes",
    [{"plugin": "hostile:other"}, {"seed": 1}, {"shard": (1, 2)}, {"family": "attention"}],
    ids=lambda changes: next(iter(changes)),
)
def test_the_report_of_another_run_is_not_gone_on_with(report: Path, changes: dict[str, Any]) -> None:
    before = report.read_text()
    with pytest.raises(ReportError, match="of another run"):
        run.run(changed(GOOD, **changes), report, resume=True)
    assert report.read_text() == before


def test_merged_shards_are_the_whole_run_and_two_of_one_are_refused(report: Path, tmp_path: Path) -> None:
    parts = [tmp_path / f"{number}.jsonl" for number in (1, 2, 3)]
    for number, path in enumerate(parts, 1):
        run.run(changed(GOOD, shard=(number, 3)), path)
        assert "a part of a run proves nothing" in lines(path)[-1]["verdict"]
    merged = tmp_path / "merged.jsonl"
    assert command("merge", *parts, "-o", merged).exit_code == 0
    assert lines(merged)[1:] == [
        {**r, "seconds": m["seconds"]} if "seconds" in r else r
        for r, m in zip(lines(report)[1:], lines(merged)[1:], strict=True)
    ]
    assert run.faults(merged) == []
    twice = command("merge", parts[0], parts[1], parts[1], "-o", tmp_path / "twice.jsonl")
    assert twice.exit_code == 2
    assert "more than one of these reports" in twice.output
    command("merge", parts[0], parts[1], "-o", tmp_path / "two.jsonl")
    assert "NO VERDICT" in lines(tmp_path / "two.jsonl")[-1]["verdict"]


def test_what_there_was_no_time_for_is_not_run_and_can_be_made_up_for(report: Path, tmp_path: Path) -> None:
    late = tmp_path / "late.jsonl"
    found = run.run(changed(GOOD, time_budget=-1.0), late)
    assert {r["status"] for r in found.results} == {"not-run"}
    assert found.footer is not None
    assert "a part of a run proves nothing" in found.footer["verdict"]
    run.run(GOOD, late, resume=True)
    assert lines(late)[-1]["digest"] == lines(report)[-1]["digest"]


def test_random_cases_run_once_and_are_reproduced_by_their_ids(here: None, tmp_path: Path) -> None:
    path = tmp_path / "explored.jsonl"
    options = changed(GOOD, explore=2)
    found = [r["case"] for r in run.run(options, path).results if r["kind"] == "explore"]
    assert len(found) == 2
    assert len(run.run(options, path, resume=True).results) == 8
    assert run.faults(path) == []
    again = run.run(changed(GOOD, case=found[1]), tmp_path / "one.jsonl")
    assert [r["case"] for r in again.results] == [found[1]]
    with pytest.raises(KeyError, match="seed"):
        run.run(changed(GOOD, case=found[1], seed=5), tmp_path / "one.jsonl")


def test_claiming_nothing_gets_no_verdict(here: None, tmp_path: Path) -> None:
    path = tmp_path / "nothing.jsonl"
    result = command("run", "--plugin", "hostile:claims_nothing", "-o", path)
    assert result.exit_code == 1
    assert "NO VERDICT: nothing of this profile is claimed" in result.output
    assert run.faults(path) == []


@pytest.mark.parametrize(("name", "status"), [("raises", "fail"), ("declines", "untestable")])
def test_a_backend_that_does_not_do_what_it_claims_is_not_conformant(
    here: None, tmp_path: Path, name: str, status: str
) -> None:
    path = tmp_path / "bad.jsonl"
    result = command("run", "--plugin", f"hostile:{name}", "-o", path)
    assert result.exit_code == 1
    assert "NOT CONFORMANT" in result.output
    assert lines(path)[-1]["counts"][status] >= 3
    assert run.faults(path) == []


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


# ---------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--backend NAME or --plugin"),
        (["--backend", "no_such_backend"], "no_such_backend"),
        (["--plugin", "hostile:identity_raises"], "who am I"),
        (["--plugin", "no_such_module:x"], "no_such_module"),
        (["--plugin", "hostile:good", "--profile", "all"], "inference, training, distributed"),
        (["--plugin", "hostile:good", "--family", "attentoin"], "attention, matmul"),
        (["--plugin", "hostile:good", "--case", CLAIMED[0][:-1]], CLAIMED[0]),
        (["--plugin", "hostile:good", "--shard", "4/3"], "--shard"),
        (["--plugin", "hostile:good", "--time-budget", "soon"], "10m"),
        (["--plugin", "hostile:good", "--jobs", "0"], "--jobs"),
        (["--plugin", "hostile:good", "--waivers", "/no/such/file"], "/no/such/file"),
    ],
    ids=lambda value: " ".join(value[-2:]) or "nothing" if isinstance(value, list) else "",
)
def test_a_mistaken_argument_ends_with_2_and_what_was_expected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(run, "Worker", Absent)
    monkeypatch.setenv("COLUMNS", "200")
    result = command("run", *arguments, "-o", tmp_path / "report.jsonl")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "report.jsonl").exists()


class Absent(InProcess):
    """A worker that is not needed."""

    def __init__(self, *arguments: object) -> None:
        """Load nothing."""


def test_one_case_is_reproduced_by_its_id(here: None, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    result = command("run", "--plugin", "hostile:good", "--case", CLAIMED[1], "-o", path)
    assert result.exit_code == 0, result.output
    assert [r["case"] for r in lines(path)[1:-1]] == [CLAIMED[1]]
    assert "a part of a run proves nothing" in result.output


def test_of_a_backend_that_is_not_there_no_report_is_begun(tmp_path: Path) -> None:
    result = command("run", "--plugin", "hostile:quits_at_import", "-o", tmp_path / "report.jsonl")
    assert result.exit_code == 2, result.output
