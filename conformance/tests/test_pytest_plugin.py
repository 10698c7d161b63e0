"""A backend's own tests, one for each case: they fail, err and pass as the suite's results say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from torchhal.registry import registry
from torchhal_conformance import corpus

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.timeout(90)

CASE = "attention.numbers/dense-float32-b2-h4-l1-s1-e16"
TEST = """
from torchhal_conformance.pytest_plugin import conformance_cases

@conformance_cases(backend="hostile", plugin="hostile:{name}", family={family!r}, profile={profile!r})
def test_conformance(case):
    case.check()
"""


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A session that finds the hostile backends and knows of two cases."""
    whole = corpus.cases
    monkeypatch.setattr(corpus, "cases", lambda seed=0: tuple(c for c in whole(seed) if c.id == CASE))
    monkeypatch.setattr(registry(), "backends", dict(registry().backends))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return pytester


def outcomes(
    session: pytest.Pytester,
    name: str,
    *arguments: str,
    family: str = "attention",
    profile: str = "inference",
) -> pytest.RunResult:
    session.makepyfile(TEST.format(name=name, family=family, profile=profile))
    return session.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


def test_a_case_of_a_good_backend_passes_under_its_id(session: pytest.Pytester) -> None:
    result = outcomes(session, "good", "-v")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"*test_conformance?{CASE}?*PASSED*"])


def test_a_failure_says_what_it_is_and_how_to_reproduce_it(session: pytest.Pytester) -> None:
    result = outcomes(session, "raises")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            f"fail: {CASE}",
            "RuntimeError: the kernel gave up*",
            f"reproduce: torchhal-conformance run --plugin hostile:raises --case {CASE}",
        ]
    )


def test_the_command_that_reproduces_a_case_names_all_that_decides_it() -> None:
    from torchhal_conformance.run import Options

    assert Options("mine").command("a/b") == "torchhal-conformance run --backend mine --case a/b"
    other = Options("", "training", plugin="m:p", seed=7).command("a/b c")
    assert other == "torchhal-conformance run --plugin m:p --profile training --seed 7 --case 'a/b c'"


def test_a_claimed_case_that_is_declined_fails(session: pytest.Pytester) -> None:
    result = outcomes(session, "declines")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"untestable: {CASE}"])


def test_a_case_takes_no_longer_than_the_option_says(session: pytest.Pytester) -> None:
    result = outcomes(session, "hook_hangs", "--conformance-timeout", "1")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"timeout: {CASE}", "*within 1 s*"])


def test_what_the_suite_gets_wrong_is_an_error_and_no_failure(session: pytest.Pytester) -> None:
    result = outcomes(session, "blames_the_suite")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*SuiteError: error: {CASE}*"])


@pytest.mark.parametrize(
    ("name", "family", "profile", "message"),
    [
        ("identity_raises", "attention", "inference", "*who am I*"),
        ("good", "attentoin", "inference", "*attention, matmul*"),
        ("good", "attention", "all", "*inference, training, distributed*"),
    ],
)
def test_what_can_not_be_examined_is_an_error_of_collection(
    session: pytest.Pytester, name: str, family: str, profile: str, message: str
) -> None:
    result = outcomes(session, name, family=family, profile=profile)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])


def test_a_session_without_conformance_tests_imports_no_torch() -> None:
    code = "import sys, torchhal_conformance.pytest_plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
