"""use() belongs to one thread or task, and errors do not leave it behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_backends import Install, backend, constant_plan

import torchhal
from torchhal.errors import BackendNotFound, InvalidProblem
from torchhal.problems import AttentionProblem, Plan
from torchhal.scope import chosen_backend

QUERY = torch.randn(1, 1, 2, 4)


def served_by() -> float:
    return float(torchhal.attention(QUERY, QUERY, QUERY)[0, 0, 0, 0])  # type: ignore[index]


def fill(install: Install, count: int) -> None:
    for i in range(count):

        def answer(problem: AttentionProblem, value: float = float(i)) -> Plan:
            return constant_plan(value)

        install(f"b{i}", backend(f"b{i}", answer, preference={"cpu": i + 1}))


def test_blocks_nest_and_end_even_when_the_code_inside_raises(install: Install) -> None:
    fill(install, 3)
    with torchhal.use("b0"):
        with contextlib.suppress(KeyError), torchhal.use("b1"):
            assert served_by() == 1.0
            raise KeyError
        assert served_by() == 0.0
    assert chosen_backend() is None
    assert served_by() == 2.0


def test_a_new_thread_does_not_see_the_choice_of_the_one_that_started_it(install: Install) -> None:
    fill(install, 2)
    seen: list[str | None] = []
    with torchhal.use("b0"):
        thread = threading.Thread(target=lambda: seen.append(chosen_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_hundred_threads_choose_a_hundred_backends_at_once(install: Install) -> None:
    fill(install, 100)
    barrier = threading.Barrier(100)

    def work(i: int) -> list[float]:
        barrier.wait()
        with torchhal.use(f"b{i}"):
            return [served_by() for _ in range(20)]

    with ThreadPoolExecutor(100) as pool:
        results = list(pool.map(work, range(100)))
    assert results == [[float(i)] * 20 for i in range(100)]
    assert sum(route.count for route in torchhal.routes()) == 2000


def test_asyncio_tasks_keep_their_choices_apart_across_awaits(install: Install) -> None:
    fill(install, 3)

    async def work(i: int) -> list[float]:
        seen = []
        with torchhal.use(f"b{i}"):
            for _ in range(5):
                await asyncio.sleep(0)
                seen.append(served_by())
        return seen

    async def main() -> list[list[float]]:
        return await asyncio.gather(*(work(i) for i in range(3)))

    assert asyncio.run(main()) == [[float(i)] * 5 for i in range(3)]


def test_use_refuses_a_backend_that_is_not_there_on_entry() -> None:
    with pytest.raises(BackendNotFound, match="no backend is called 'ghost'"), torchhal.use("ghost"):
        pass


def test_use_refuses_what_is_not_a_name() -> None:
    with (
        pytest.raises(InvalidProblem, match=r"use\(\) expects the name of a backend and got 3"),
        torchhal.use(3),
    ):  # type: ignore[arg-type]
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_goes_on_choosing(install: Install) -> None:
    fill(install, 2)
    assert served_by() == 1.0
    child = os.fork()
    if child == 0:
        with torchhal.use("b0"):
            os._exit(0 if served_by() == 0.0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
