"""Whatever a backend does to its process is recorded under the case that it did it in, and the next case runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest

from torchhal.registry import registry
from torchhal_conformance import corpus, examine, pool
from torchhal_conformance.pool import StartFailed, Worker

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


@pytest.mark.parametrize("harm", ["loops", "sleeps"])
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


@pytest.mark.parametrize("harm", ["answers for another", "answers nonsense"])
def test_an_answer_that_is_no_result_of_the_case_is_refused(examined: Examine, harm: str) -> None:
    assert_failed(examined(harm), "Garbled", "no result")
    assert examined("nothing", NEXT)["status"] == "pass"


def test_a_child_that_outlives_its_dead_worker_is_ended(examined: Examine) -> None:
    assert_failed(examined("leaves a child and dies"), "Crash", "exit code 3")
    assert_children_are_gone()


def test_a_child_ends_with_the_worker(examined: Examine, shared: Worker) -> None:
    assert examined("leaves a child")["status"] == "pass"
    shared.stop()
    assert_children_are_gone()


def lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def assert_children_are_gone() -> None:
    children = [int(line) for line in Path(os.environ[hostile.CHILDREN]).read_text().split()]
    assert children
    for child in children:
        deadline = time.monotonic() + 5
        while lives(child):
            assert time.monotonic() < deadline, f"{child} lives on"
            time.sleep(0.05)


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
    monkeypatch.setattr(pool, "START_SECONDS", 8.0)
    with pytest.raises(StartFailed, match="not ready within 8 s"):
        loaded("hangs_at_import").run(CASE)


def test_a_closed_worker_starts_no_process(loaded: Callable[[str], Worker]) -> None:
    worker = loaded("good")
    worker.close()
    with pytest.raises(StartFailed, match="ended"):
        worker.run(CASE)
