"""A bound is held from below by honest backends and from above by planted faults, and the command says by how much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from torchhal_conformance import calibrate, corpus, mutants, records
from torchhal_conformance.calibrate import Bound, Exceeded, Honest
from torchhal_conformance.cli import app

pytestmark = pytest.mark.timeout(120)

CHECK = "attention.numbers"
CASES = (
    "attention.numbers/dense-float32-b2-h4-l15-s17-e16",
    "attention.numbers/dense-float32-b2-h4-l1-s1-e16",
    "attention.numbers/dense-bfloat16-b2-h4-l15-s17-e16",
)


def result(case: str, ratio: float | None, *dtypes: str, **changes: Any) -> dict[str, Any]:
    check = case.partition("/")[0]
    return {
        "record": "result",
        "case": case,
        "check": check,
        "ratio": ratio,
        "dtypes": [*dtypes],
        "kind": "corpus",
        **changes,
    }


def report(*results: dict[str, Any], name: str = "honest") -> records.Report:
    return records.Report({"record": "header", "backend": {"name": name}}, list(results))


def test_the_honest_result_that_comes_nearest_to_a_bound_holds_it_whoever_gave_it() -> None:
    found = calibrate.nearest(
        [
            report(result("a.numbers/1", 0.2, "float32"), result("a.numbers/2", 0.5, "float32")),
            report(result("a.numbers/1", 0.4, "float32"), result("a.bits/1", None, "float32"), name="other"),
            report(result("a.numbers/3", 0.9, "float32", kind="explore")),
        ]
    )
    assert found == {("a.numbers", "float32"): Honest(0.5, "honest", "a.numbers/2")}


def test_a_case_of_several_types_counts_for_each_of_them_and_one_of_none_for_itself() -> None:
    found = calibrate.nearest([report(result("a.b/1", 0.3, "float32", "bfloat16"), result("c.d/1", 0.1))])
    assert {*found} == {("a.b", "float32"), ("a.b", "bfloat16"), ("c.d", calibrate.UNTYPED)}


def test_of_several_faults_the_weakest_holds_a_bound() -> None:
    key = ("a.numbers", "float32")
    faults = [(key, Exceeded(9.0, "strong", "1")), (key, Exceeded(1.5, "weak", "2"))]
    (bound,) = calibrate.weigh({key: Honest(0.5, "honest", "1")}, faults)
    assert (bound.widen, bound.tighten, bound.faults, bound.holds) == (1.5, 2.0, 2, True)
    assert bound.weakest is not None and bound.weakest.mutant == "weak"


@pytest.mark.parametrize(
    ("honest", "weakest"), [(0.5, None), (1.2, 3.0)], ids=["no fault exceeds it", "an honest backend does"]
)
def test_a_bound_without_a_fault_above_it_or_with_an_honest_result_there_does_not_hold(
    honest: float, weakest: float | None
) -> None:
    above = None if weakest is None else Exceeded(weakest, "m", "c")
    bound = Bound("a.numbers", "float32", Honest(honest, "h", "c"), above, int(above is not None))
    assert not bound.holds
    assert "DOES NOT HOLD" in [*calibrate.table([bound])][1]


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """The command over three cases and the reports of made-up honest backends."""
    whole = corpus.cases
    monkeypatch.setattr(corpus, "cases", lambda seed=0: tuple(c for c in whole(seed) if c.id in CASES))

    def run(*arguments: str, ratio: float = 0.4) -> Result:
        path = tmp_path / "honest.jsonl"
        dtypes = [case.partition("-")[2].partition("-")[0] for case in CASES]
        records.write(path, report(*(result(case, ratio, dtype) for case, dtype in zip(CASES, dtypes))))
        return CliRunner().invoke(app, ["calibrate", str(path), "--jobs", "1", *arguments])

    return run


def test_the_command_says_which_fault_would_survive_first_and_at_which_width(
    command: Callable[..., Result],
) -> None:
    found = command("--check", CHECK, "--mutant", "wrong_scale", "--mutant", "tf32", "--json")
    bounds = {bound["dtype"]: bound for bound in json.loads(found.output)["bounds"]}
    assert bounds["float32"]["faults"] == 2
    assert bounds["float32"]["tighten"] == pytest.approx(2.5)
    assert bounds["float32"]["widen"] > 1.0
    assert bounds["float32"]["weakest"]["mutant"] in ("wrong_scale", "tf32")
    assert bounds["float32"]["weakest"]["case"] in CASES


def test_the_command_ends_with_1_where_a_bound_is_held_by_no_fault(command: Callable[..., Result]) -> None:
    found = command("--check", CHECK, "--mutant", "tf32")
    assert found.exit_code == 1, found.output
    assert "bfloat16" in found.output and "no planted fault exceeds it  DOES NOT HOLD" in found.output


def test_the_command_ends_with_0_where_every_bound_is_held(command: Callable[..., Result]) -> None:
    found = command("--check", CHECK, "--mutant", "scale_squared")
    assert found.exit_code == 0, found.output
    beyond = command("--check", CHECK, "--mutant", "scale_squared", ratio=1.01)
    assert beyond.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--check", "attention.nombers"), "no check 'attention.nombers'"),
        (("--mutant", "wrong_scall"), "no mutant 'wrong_scall'"),
        (("--check", "attention.strides"), "nothing to calibrate"),
    ],
)
def test_a_mistaken_argument_ends_with_2(
    command: Callable[..., Result], arguments: tuple[str, ...], message: str
) -> None:
    found = command(*arguments)
    assert found.exit_code == 2
    assert message in found.output


def test_every_check_without_a_bound_names_the_faults_that_it_must_find() -> None:
    found = calibrate.exact({(CHECK, "float32"): Honest(0.5, "h", "c")}, ["attention.strides", CHECK])
    assert [*found] == ["attention.strides"]
    assert "no_strides" in found["attention.strides"]
    assert {m.name for m in mutants.all_mutants()} >= {*found["attention.strides"]}
