"""Whatever a backend does to its process is recorded under the case that it did it in, and the next case runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest

from torchhal.registry import registry
from torchhal_conformance import child, corpus, examine, judge, keeper
from torchhal_conformance.child import StartFailed
from torchhal_conformance.pool import Examiners, Worker

pytestmark = pytest.mark.timeout(60)

CASE = "attention.numbers/dense-float32-b2-h4-l1-s1-e16"
NEXT = "attention.numbers/dense-float32-b2-h4-l15-s17-e16"
OTHER_LAYOUT = "attention.numbers/varlen-float32-b4-h4-l9-s13-e16"
HERE = str(Path(__file__).parent)
WAIT = 2.0


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that says what harm to do; the worker's environment knows it."""
    folder = tmp_path_factory.mktemp("orders")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", HERE, prepend=os.pathsep)
        patch.setenv(hostile.ORDERS, str(folder / "harm"))
        patch.setenv(hostile.CHILDREN, str(folder / "children"))
        yield folder / "harm"


@pytest.fixture(scope="module")
def shared(orders: Path) -> Iterator[Worker]:
    worker = Worker("hostile", "hostile:as_ordered", 0, WAIT, 1)
    yield worker
    worker.close()


Examine = Callable[..., dict[str, Any]]


@pytest.fixture
def examined(orders: Path, shared: Worker) -> Examine:
    """Examines a case with some harm done."""

    def run(harm: str, case: str = CASE) -> dict[str, Any]:
        orders.write_text(harm)
        return shared.run(case)

    return run


@pytest.fixture
def loaded(orders: Path) -> Iterator[Callable[[str], Worker]]:
    workers: list[Worker] = []

    def load(name: str) -> Worker:
        workers.append(Worker("hostile", f"hostile:{name}", 0, WAIT, 1))
        return workers[-1]

    yield load
    for worker in workers:
        worker.close()


Alone = Callable[[str, str], dict[str, Any]]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Alone:
    """Examines a case of a backend that harms no process in this one."""
    monkeypatch.setattr(registry(), "backends", dict(registry().backends))

    def examine_alone(name: str, case: str) -> dict[str, Any]:
        return examine.examine(corpus.case_named(case), examine.load_plugin(f"hostile:{name}"))

    return examine_alone


def assert_failed(result: dict[str, Any], error: str, message: str = "", status: str = "fail") -> None:
    assert (result["case"], result["status"], result["error"]["class"]) == (CASE, status, error)
    assert message in result["error"]["message"]


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        ("raises", "RuntimeError", "the kernel gave up"),
        ("exits", "SystemExit", "0"),
        ("interrupts", "KeyboardInterrupt", ""),
        ("cannot say why", "_Unprintable", ""),
        ("fills memory", "MemoryError", ""),
    ],
)
def test_whatever_is_raised_fails_the_case_by_its_class(
    examined: Examine, harm: str, error: str, message: str
) -> None:
    assert_failed(examined(harm), error, message)
    assert examined("nothing", NEXT)["status"] == "pass"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("quits", "exit code 0"),
        ("quits with 7", "exit code 7"),
        ("segfaults", "SIGSEGV"),
        ("aborts", "SIGABRT"),
        ("closes everything", "exit code 1"),
    ],
)
def test_the_end_of_the_process_fails_the_case_and_says_how_it_ended(
    examined: Examine, harm: str, message: str
) -> None:
    assert_failed(examined(harm), "Crash", message)
    result = examined("nothing", NEXT)
    assert (result["case"], result["status"]) == (NEXT, "pass")


@pytest.mark.parametrize("harm", ["loops", "sleeps", "ignores signals", "gives half an answer"])
def test_a_call_that_does_not_return_is_a_timeout(examined: Examine, harm: str) -> None:
    examined("nothing")
    begin = time.monotonic()
    assert_failed(examined(harm), "Timeout", "within 2 s", "timeout")
    assert time.monotonic() - begin < WAIT + 5
    assert examined("nothing", NEXT)["status"] == "pass"


def test_a_million_printed_lines_neither_block_nor_enter_the_result(examined: Examine) -> None:
    result = examined("prints")
    assert result["status"] == "pass"
    assert "a line that nobody reads" not in str(result)


def test_without_standard_output_and_error_the_cases_go_on(examined: Examine) -> None:
    assert examined("closes its output")["status"] == "pass"
    assert examined("nothing", NEXT)["status"] == "pass"


@pytest.mark.parametrize(
    "harm",
    [
        "answers for another",
        "answers nonsense",
        "answers brackets",
        "answers endless numbers",
        "takes infinite time",
    ],
)
def test_an_answer_that_is_no_result_of_the_case_is_refused(examined: Examine, harm: str) -> None:
    assert_failed(examined(harm), "Garbled", "no result")
    assert examined("nothing", NEXT)["status"] == "pass"


@pytest.mark.parametrize("harm", ["leaves threads", "ruins the modules"])
def test_a_process_that_was_made_useless_is_replaced_before_long(examined: Examine, harm: str) -> None:
    examined(harm)
    found = [examined("nothing", NEXT)["status"] for _ in range(2)]
    assert found[-1] == "pass"


@pytest.mark.parametrize(
    ("harm", "what"),
    [("limits everything", "resource limits"), ("leaves the folder", "the working directory")],
)
def test_a_case_that_changes_what_others_need_says_so_and_harms_none(
    examined: Examine, harm: str, what: str
) -> None:
    assert what in str(examined(harm)["note"])
    assert examined("nothing", NEXT)["status"] == "pass"


@pytest.mark.parametrize("what", ["child", "daemon"])
def test_whoever_outlives_a_dead_worker_is_ended(examined: Examine, what: str) -> None:
    assert_failed(examined(f"leaves a {what} and dies"), "Crash", "exit code 3")
    assert_children_are_gone()


@pytest.mark.parametrize("what", ["child", "daemon"])
def test_whoever_a_worker_started_ends_with_it(examined: Examine, shared: Worker, what: str) -> None:
    assert examined(f"leaves a {what}")["status"] == "pass"
    shared.stop()
    assert_children_are_gone()


def test_a_worker_that_stops_its_keeper_gains_nothing(
    examined: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "STOP_SECONDS", 1.0)
    assert_failed(examined("stops the keeper"), "Crash", "closed its connection")
    assert examined("nothing", NEXT)["status"] == "pass"


def test_a_worker_ends_with_the_process_that_started_it(orders: Path, tmp_path: Path) -> None:
    orders.write_text("leaves a daemon")
    code = (
        "import os, signal; from torchhal_conformance.pool import Worker; "
        f"Worker('', 'hostile:as_ordered', 0, 60.0, 1).run({CASE!r}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    assert_children_are_gone()


def test_the_keeper_ends_its_own_descendants_and_nobody_else(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeper) as stranger:
        kept = subprocess.Popen([sys.executable, keeper.__file__, *sleeper], stdin=subprocess.PIPE)
        time.sleep(0.5)
        kept.communicate(timeout=10)
        assert kept.returncode == 0
        assert stranger.poll() is None
        stranger.kill()


def lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def assert_children_are_gone() -> None:
    children = [int(line) for line in Path(os.environ[hostile.CHILDREN]).read_text().split()]
    assert children
    for process in children:
        deadline = time.monotonic() + 5
        while lives(process):
            assert time.monotonic() < deadline, f"{process} lives on"
            time.sleep(0.05)


# ---------------------------------------------------------------------------- what is judged elsewhere


@pytest.fixture
def tried(orders: Path) -> Iterator[Callable[[str], Examiners]]:
    everyone: list[Examiners] = []

    def start(name: str) -> Examiners:
        everyone.append(Examiners([Worker("", f"hostile:{name}", 0, 20.0, 1)], 0, 1))
        everyone[-1].start()
        return everyone[-1]

    yield start
    for examiners in everyone:
        examiners.__exit__()


Tried = Callable[[str], Examiners]


def test_what_an_honest_backend_gives_is_judged_where_it_is_not(tried: Tried) -> None:
    examiners = tried("good")
    found = examiners.run(NEXT, is_recorded=True)
    alone = examiners.first.run(NEXT)
    assert (found["status"], found["judged"]) == ("pass", "apart")
    assert found["ratio"] == alone["ratio"] > 0


def test_a_backend_that_makes_torch_agree_with_everything_fools_its_own_process_alone(tried: Tried) -> None:
    examiners = tried("agrees_with_itself")
    assert examiners.first.run(NEXT)["status"] == "pass"
    result = examiners.run(NEXT, is_recorded=True)
    assert (result["status"], result["judged"]) == ("fail", "apart")
    assert "within its bound" in result["expected"]


def test_an_answer_that_is_forged_in_every_field_lacks_the_results(tried: Tried) -> None:
    examiners = tried("forges")
    for case in (CASE, NEXT):
        result = examiners.run(case, is_recorded=True)
        assert (result["case"], result["status"], result["error"]["class"]) == (case, "fail", "Forged")


def test_the_judge_says_of_what_it_can_not_see_that_it_did_not(tried: Tried) -> None:
    compiled = next(c.id for c in corpus.cases() if c.check.name == "attention.compiled_lengths")
    examiners = tried("good")
    for case, is_recorded in ((compiled, True), (compiled, False)):
        result = examiners.run(case, is_recorded)
        assert (result["status"], result["judged"]) == ("pass", "within"), result


def test_no_check_of_numbers_is_left_to_the_word_of_a_worker() -> None:
    left = {case.check.name for case in corpus.cases() if not judge.is_recorded(case.check.name)}
    assert not [
        name
        for name in left
        if name.endswith((".numbers", ".gradients", ".bitwise")) and "parallel" not in name
    ]


def test_a_process_that_comes_up_no_more_is_given_up_after_a_few_tries(
    tried: Tried, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(hostile.STARTED, str(tmp_path / "started"))
    examiners = tried("comes_up_once")
    found = [examiners.run(case, is_recorded=True) for case in (CASE, CASE, NEXT)]
    assert [r["status"] for r in found] == ["fail", "error", "error"]
    assert (
        "3 tries: plugin hostile:comes_up_once does not load: RuntimeError: not again"
        in found[1]["error"]["message"]
    )
    assert found[2]["error"]["class"] == "StartFailed"


# ---------------------------------------------------------------------------- beyond a plan's run


def test_a_write_past_the_end_is_found_by_the_check_that_looks_for_it(
    alone: Alone,
) -> None:
    result = alone("writes_past_the_end", "attention.inputs_alone/dense-float32-b2-h4-l1-s1-e16")
    assert result["status"] == "fail", result


def test_a_layout_that_is_claimed_and_not_there_fails(alone: Alone) -> None:
    result = alone("varlen_is_not_there", OTHER_LAYOUT)
    assert (result["status"], result["error"]["class"]) == ("fail", "RuntimeError")


def test_zeros_for_everything_pass_nothing_that_has_another_truth(alone: Alone) -> None:
    for case in (CASE, OTHER_LAYOUT):
        result = alone("zeros_for_everything", case)
        assert (result["status"], result["error"]["class"]) == ("fail", "CheckFailed")


def test_what_is_not_claimed_and_refused_is_verified(alone: Alone) -> None:
    assert [alone("claims_nothing", case)["status"] for case in (CASE, OTHER_LAYOUT)] == [
        "unsupported-verified"
    ] * 2


@pytest.mark.parametrize("name", ["declines", "hook_raises", "hook_exits"])
def test_a_claimed_problem_without_a_plan_is_untestable(alone: Alone, name: str) -> None:
    result = alone(name, CASE)
    assert (result["status"], result["error"]["class"]) == ("untestable", "Unsupported")


def test_a_hook_that_hangs_is_a_timeout(loaded: Callable[[str], Worker]) -> None:
    assert_failed(loaded("hook_hangs").run(CASE), "Timeout", status="timeout")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("identity_raises", "who am I"),
        ("identity_exits", "SystemExit"),
        ("quits_at_import", "exit code 0"),
        ("not_there", "not_there"),
    ],
)
def test_a_plugin_that_does_not_load_stops_the_run_with_what_it_said(
    loaded: Callable[[str], Worker], name: str, message: str
) -> None:
    with pytest.raises(StartFailed, match=message):
        loaded(name).run(CASE)


def test_an_import_that_hangs_is_given_up(
    loaded: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "START_SECONDS", 8.0)
    with pytest.raises(StartFailed, match="not ready within 8 s"):
        loaded("hangs_at_import").run(CASE)


def test_a_closed_worker_starts_no_process(loaded: Callable[[str], Worker]) -> None:
    worker = loaded("good")
    worker.close()
    with pytest.raises(StartFailed, match="ended"):
        worker.run(CASE)
