"""Does a backend keep what every plan promises: the same result again, inputs left alone, no state between calls?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Final

import torch

from torchhal_conformance import calls, tolerance
from torchhal_conformance.families import samples
from torchhal_conformance.model import (
    Check,
    CheckFailed,
    Explanation,
    Inputs,
    Measured,
    Outputs,
    Sample,
    tensors_of,
)

REPEATS: Final = 8
THREADS: Final = 8


def representatives(family: str) -> Iterator[Sample]:
    """One sample for each combination of claims and element types, gradients apart: the first of its kind."""
    seen = set()
    for sample in samples(family):
        kind = (sample.needs.features, sample.needs.dtypes, sample.needs.choice, "small" in sample.tags)
        if sample.profile == "inference" and kind not in seen:
            seen.add(kind)
            yield sample


def _alike(before: Outputs, after: Outputs) -> bool:
    return len(before) == len(after) and all(calls.same_bits(a, b) for a, b in zip(before, after))


def _same(before: Outputs, after: Outputs, what: str) -> None:
    if not _alike(before, after):
        raise CheckFailed(f"the same bits {what}", "others")


def agree(backend: str, sample: Sample, inputs: Inputs, before: Outputs, after: Outputs, what: str) -> None:
    """Raise CheckFailed unless two results of one call are the same: in every bit, if the plan promises that of repeats.

    Args:
        backend, sample, inputs: the call.
        before: its result as it was first.
        after: its result under other circumstances.
        what: those circumstances, to go on with "the same bits".
    """
    plan = calls.plan_of(sample, backend, inputs) if not _alike(before, after) else None
    if plan is None or plan.deterministic or "integer" in sample.tags:
        _same(before, after, what)
        return
    exact, plain = calls.truth(sample, inputs)
    tolerance.judge(after, exact, plain, WIDE, [f"result {i} {what}" for i in range(len(exact))])


def determinism(backend: str, sample: Sample, seed: int) -> Measured:
    """The same call again and again, where the plan promises the same result."""
    inputs = calls.make(sample, backend, seed)
    plan = calls.plan_of(sample, backend, inputs)
    if plan is not None and not plan.deterministic:
        return Measured(note="the plan does not promise the same result again")
    first = calls.call(sample, backend, inputs)
    for number in range(1, REPEATS):
        _same(
            first, calls.call(sample, backend, inputs), f"in call {number + 1} of {REPEATS} as in the first"
        )
    return Measured()


def inputs_alone(backend: str, sample: Sample, seed: int) -> Measured:
    """Every byte of the memory around the inputs is what it was."""
    inputs = calls.make(sample, backend, seed)
    with calls.harness():
        guarded, memory = _guarded(inputs)
        before = {name: m.clone() for name, m in memory.items()}
    calls.call(sample, backend, guarded)
    for name, m in memory.items():
        if not torch.equal(m, before[name]):
            where = "beside it" if torch.equal(_inside(m), _inside(before[name])) else "in it"
            raise CheckFailed(f"input {name} and the memory around it left as they were", f"a write {where}")
    return Measured()


BAND: Final = 256
"""Bytes of a known pattern before and behind each input."""


def _guarded(inputs: Inputs) -> tuple[Inputs, dict[str, torch.Tensor]]:
    """The inputs, each in the middle of memory of its own, and that memory as bytes."""
    memory: dict[str, torch.Tensor] = {}

    def guard(name: str, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        memory[name] = torch.full((size + 2 * BAND,), 0xA5, dtype=torch.uint8, device=tensor.device)
        return _inside(memory[name]).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    moved: Inputs = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            moved[name] = guard(name, value)
        elif isinstance(value, list):
            parts = enumerate(value)
            moved[name] = [guard(f"{name}[{i}]", v) if isinstance(v, torch.Tensor) else v for i, v in parts]
        else:
            moved[name] = value
    return moved, memory


def _inside(memory: torch.Tensor) -> torch.Tensor:
    return memory[BAND : memory.numel() - BAND]


def fresh_data(backend: str, sample: Sample, seed: int) -> Measured:
    """New values at the same addresses give new results."""
    inputs = calls.make(sample, backend, seed)
    others = calls.make(sample, backend, seed + 1)
    calls.call(sample, backend, inputs)
    with calls.harness():
        exact, plain = calls.truth(sample, others)
        moved, old = tensors_of(others), tensors_of(inputs)
        if moved.keys() != old.keys() or any(moved[name].shape != t.shape for name, t in old.items()):
            return Measured(note="shapes follow the data, so nothing can be put in place")
        for name, tensor in old.items():
            tensor.copy_(moved[name])
        again = {name: _in_old_memory(name, value, old) for name, value in others.items()}
    found = calls.call(sample, backend, again)
    elsewhere = calls.call(sample, backend, others)
    agree(
        backend, sample, others, elsewhere, found, "for new data at old addresses as for the data elsewhere"
    )
    if "integer" in sample.tags:
        return Measured()
    # Alike they may still both be made of what the first call left, so the truth is asked as well; with a wide bound,
    # for numbers are another check's business.
    names = [f"result {i} for new data" for i in range(len(exact))]
    return Measured(tolerance.judge(found, exact, plain, WIDE, names))


WIDE: Final = 30.0
"""Times plain arithmetic's error: enough for a few numbers and one draw."""


def _in_old_memory(name: str, value: Any, old: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [old.get(f"{name}[{i}]", item) for i, item in enumerate(value)]
    return old.get(name, value)


def threads(backend: str, sample: Sample, seed: int) -> Measured:
    """Eight threads at once, each with data of its own, get what each would get alone."""
    inputs = [calls.make(sample, backend, seed + i) for i in range(THREADS)]
    alone = [calls.call(sample, backend, given) for given in inputs]
    found: list[Outputs | BaseException | None] = [None] * THREADS
    barrier = threading.Barrier(THREADS)

    def work(number: int) -> None:
        barrier.wait()
        try:
            for _ in range(3):
                found[number] = sample.call(backend, inputs[number])
        except BaseException as error:
            found[number] = error

    workers = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for given, one, other in zip(inputs, alone, found):
        if not isinstance(other, tuple):
            raise CheckFailed("every thread to be served", repr(other))
        agree(backend, sample, given, one, other, "in each of eight threads as alone")
    return Measured()


def state(backend: str, sample: Sample, seed: int) -> Measured:
    """Torch's settings and random numbers are what they were."""
    inputs = calls.make(sample, backend, seed)
    calls.call(sample, backend, inputs)
    before, random = _settings(), torch.get_rng_state()
    calls.call(sample, backend, inputs)
    after = _settings()
    changed = [name for name, value in before.items() if after[name] != value]
    if changed:
        raise CheckFailed(f"torch's {changed[0]} left at {before[changed[0]]}", after[changed[0]])
    if "dropout" not in sample.needs.features and not torch.equal(random, torch.get_rng_state()):
        raise CheckFailed("torch's random numbers left alone", "some drawn")
    return Measured()


def _settings() -> dict[str, object]:
    return {
        "number of threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "denormal results": float(torch.tensor([1e-39]) * 0.5) != 0.0,
        "anomaly mode": torch.is_anomaly_enabled(),
    }


def written(backend: str, sample: Sample, seed: int) -> Measured:
    """Results computed in memory that was full of something else before."""
    inputs = calls.make(sample, backend, seed)
    first = calls.call(sample, backend, inputs)
    kept = [t.clone() for t in first]
    shapes = [(t.shape, t.dtype, t.device) for t in first]
    del first
    for pattern in (float("nan"), 7.0):
        with calls.harness():
            # The allocator hands these blocks out again, so what the call does not write shows.
            poison = [torch.full(s, pattern, device=v).to(d) for s, d, v in shapes for _ in range(4)]
            del poison
        again = calls.call(sample, backend, inputs)
        agree(backend, sample, inputs, tuple(kept), again, "in memory that held other values before")
    return Measured()


RUNS: Final = {
    "determinism": (
        determinism,
        Explanation(
            f"Makes one call {REPEATS} times; a plan that does not say otherwise gives the same bits each time. One that "
            "says so (deterministic=False) is not asked, and a note in the report tells.",
            "Partial results that are merged in the order in which threads finish differ in the last bits from run to "
            "run, and nobody can reproduce a fault in training.",
            "Merge in a fixed order, and keep atomic additions out of floating-point sums.",
        ),
    ),
    "inputs_alone": (
        inputs_alone,
        Explanation(
            "Puts every input between guard bands and compares all of that memory before and after.",
            "In-place scaling of the query saves a pass and ruins the caller's tensor; stores beyond a last tile ruin "
            "somebody else's.",
            "A write beside an input is a store without a bound; a write in it is an operation in place.",
        ),
    ),
    "fresh_data": (
        fresh_data,
        Explanation(
            "Overwrites the inputs in place and calls again: results must be those of the new data.",
            "Caches of packed operands keyed by address return yesterday's result once memory is reused "
            "(MLPerf's TEST04 exists for such caches).",
            "Key a cache by content or by version, or keep none.",
        ),
    ),
    "threads": (
        threads,
        Explanation(
            f"{THREADS} threads call at once with data of their own; each gets what it gets alone.",
            "A workspace kept in a global is shared by all threads of a server.",
            "Make scratch memory thread-local or give each call its own.",
        ),
    ),
    "state": (
        state,
        Explanation(
            "Compares torch's threads, default type, precision, denormal mode and random numbers before and after.",
            "Code built for fast mathematics can switch denormals off for the whole process; a kernel that sets the number of "
            "threads and leaves it slows everything after it.",
            "Restore what you set, in a destructor or a finally.",
        ),
    ),
    "written": (
        written,
        Explanation(
            "Calls after memory of the results' sizes was filled with NaN and with 7, and given back.",
            "A kernel that leaves its last tile unwritten passes whenever the allocator returns the memory of the last "
            "right result: a published speed-up of 104 times returned memory that nobody had written.",
            "Allocate the output with a known pattern and look for it in the result.",
        ),
    ),
}


def checks() -> Iterator[Check]:
    """One of each kind for each family whose results are tensors."""
    for family in ("attention", "matmul", "foreach"):
        for name, (run, explanation) in RUNS.items():
            yield Check(
                name=f"{family}.{name}",
                explanation=explanation,
                samples=lambda family=family, name=name: _asked(family, name),  # type: ignore[misc]
                run=run,
            )


def _asked(family: str, check: str) -> Iterator[Sample]:
    """Threads share torch's generator, from which each dropout draws its seed."""
    drawing = ("threads", "fresh_data")
    return (s for s in representatives(family) if check not in drawing or "dropout" not in s.tags)
