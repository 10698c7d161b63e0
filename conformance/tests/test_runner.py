"""Runs and the command line: what is written is what happened, whatever becomes of the processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import in_process
import pytest
from in_process import CLAIMED, GOOD, REFUSED, InProcess, changed, command, lines

from torchhal_conformance import run
from torchhal_conformance.child import StartFailed
from torchhal_conformance.pool import STARTS
from torchhal_conformance.records import ReportError

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
    from torchhal_conformance.pool import Judge, Worker

    monkeypatch.setattr(run, "Worker", Worker)
    monkeypatch.setattr(run, "Judge", Judge)
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


class DiesForGood(InProcess):
    """A worker that comes up once, and whose backend then ends it."""

    starts = 0

    def start(self) -> None:
        DiesForGood.starts += 1
        if DiesForGood.starts > 1:
            raise StartFailed("it was corrupted")
        super().start()

    def recorded(self, case: str) -> tuple[dict[str, Any], bytes]:
        if case == CLAIMED[2]:
            self.start()
        return super().recorded(case)


def test_a_run_whose_workers_come_up_no_more_ends_with_a_footer_and_no_verdict(
    here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "Worker", DiesForGood)
    monkeypatch.setattr(DiesForGood, "starts", 0)
    path = tmp_path / "report.jsonl"
    result = command("run", "--plugin", "hostile:good", "-o", path)
    assert result.exit_code == 1
    assert "NO VERDICT: the suite itself failed" in result.output
    assert DiesForGood.starts == 1 + STARTS
    kinds = [(r["error"] or {}).get("class") for r in lines(path)[1:-1]]
    assert kinds.count("StartFailed") > 1
    assert run.faults(path) == []
    monkeypatch.setattr(run, "Worker", InProcess)
    run.run(GOOD, path, resume=True)
    assert lines(path)[-1]["verdict"] == "CONFORMANT"


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

    def start(self) -> None:
        if not self.specified or "good" not in self.specified:
            super().start()
        self.greeting = {
            "name": "good", "version": "1", "distribution": "plugin", "device_types": ["cpu"], "device": "none",
            "facilities": [], "claims": {},
        }  # fmt: skip


def test_one_case_is_reproduced_by_its_id(here: None, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    result = command("run", "--plugin", "hostile:good", "--case", CLAIMED[1], "-o", path)
    assert result.exit_code == 0, result.output
    assert [r["case"] for r in lines(path)[1:-1]] == [CLAIMED[1]]
    assert "a part of a run proves nothing" in result.output


def test_of_a_backend_that_is_not_there_no_report_is_begun(tmp_path: Path) -> None:
    result = command("run", "--plugin", "hostile:quits_at_import", "-o", tmp_path / "report.jsonl")
    assert result.exit_code == 2, result.output
