"""Samples cover the claims and are met by the reference; the checks of every family find what is planted in it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import torchhal
from torchhal import problems, selection
from torchhal.errors import Unsupported
from torchhal.problems import Capabilities, Plan
from torchhal.reference.plugin import CAPABILITIES
from torchhal.registry import registry
from torchhal_conformance import calls, examine
from torchhal_conformance.checks import (
    all_checks,
    check_named,
    context_parallel,
    far,
    foreach,
    gradients,
    merging,
    numbers,
)
from torchhal_conformance.families import attention, samples
from torchhal_conformance.families.foreach import apart
from torchhal_conformance.model import Check, CheckFailed, Sample
from torchhal_conformance.mutants.services import CarelessStore

DEADLINE = 300
quiet = pytest.mark.filterwarnings("ignore")


def sample_named(family: str, name: str) -> Sample:
    return next(sample for sample in samples(family) if sample.name == name)


def checks_of(*families: str) -> list[Check]:
    return [check for check in all_checks() if check.name.partition(".")[0] in families]


# ---------------------------------------------------------------------------- coverage


@pytest.mark.parametrize("family", ["attention", "matmul", "foreach"])
def test_every_claim_and_every_type_has_a_sample(family: str) -> None:
    claims = getattr(CAPABILITIES, family)
    needs = [sample.needs for sample in samples(family)]
    wanted = {field.name for field in dataclasses.fields(claims) if getattr(claims, field.name) is True}
    booleans = {field.name for field in dataclasses.fields(claims) if field.type == "bool"}
    assert wanted == booleans, "the reference claims everything"
    assert wanted <= frozenset().union(*(need.features for need in needs))
    assert claims.dtypes <= frozenset().union(*(need.dtypes for need in needs))


def test_every_scheme_and_task_of_the_reference_has_a_sample() -> None:
    found = {
        sample.needs.choice for check in checks_of("cache_store", "deploy") for sample in check.samples()
    }
    assert CAPABILITIES.cache_store is not None
    assert CAPABILITIES.deploy is not None
    assert found == CAPABILITIES.cache_store.schemes | CAPABILITIES.deploy.tasks
    fields = [f for kind in problems.PROBLEMS for f in dataclasses.fields(type(getattr(CAPABILITIES, kind)))]
    assert all(f.type == "bool" or f.name in ("dtypes", "layouts", "schemes", "tasks") for f in fields)


@quiet
@pytest.mark.parametrize("family", ["matmul", "foreach"])
def test_needs_are_what_the_call_asks_for_no_more_and_no_less(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample that needs too much is never asked of a backend that could serve it, and too little refuses it."""
    asked: list[problems.Problem] = []
    module = import_module(f"torchhal.{family}")
    build = module.build_problem

    def recorded(*arguments: Any) -> problems.Problem:
        asked.append(build(*arguments))
        return asked[-1]

    monkeypatch.setattr(module, "build_problem", recorded)
    for sample in samples(family):
        selection.reset()
        asked.clear()
        inputs = calls.make(sample, "reference", 1)
        inputs |= {name: inputs[name].detach().clone().requires_grad_() for name in sample.leaves}
        calls.call(sample, "reference", inputs)
        assert sample.needs.features == frozenset().union(*(p.features for p in asked)), sample.name
        assert sample.needs.dtypes == frozenset().union(*(p.dtypes for p in asked)), sample.name


# ---------------------------------------------------------------------------- what lies far apart


def test_what_is_spread_keeps_its_values_and_is_too_far_apart_for_32_bits() -> None:
    tensor = torch.randn(3, 4, 5).to(torch.bfloat16)
    for dimension in range(3):
        spread = apart(tensor, dimension)
        assert torch.equal(spread, tensor)
        assert (tensor.shape[dimension] - 1) * spread.stride(dimension) > 2**31
        assert spread.stride(dimension) % 64 == 0, "what is aligned stays aligned"


@pytest.mark.parametrize(("free", "refused"), [(None, False), (6 << 30, False), (4 << 30, True)])
def test_a_device_without_room_is_untestable_and_says_how_much_it_has(
    monkeypatch: pytest.MonkeyPatch, free: int | None, refused: bool
) -> None:
    monkeypatch.setattr(far, "_free", lambda device: free)
    message = r"need 5 GiB free on cpu, which has 4\.0; end what else uses it"
    with pytest.raises(Unsupported, match=message) if refused else nullcontext():
        far.require_room(torch.device("cpu"))


def test_memory_that_an_allocator_keeps_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = {"get_memory_info": (100, 900), "memory_reserved": 70, "memory_allocated": 30}
    for name, reading in readings.items():
        monkeypatch.setattr(torch.accelerator, name, lambda device, reading=reading: reading)
    assert far._free(torch.device("meta")) == 140
    assert far._free(torch.device("cpu")) is None, "a host spends memory when it is touched"


def accepted(check: Callable[..., Any], chosen: list[Sample]) -> None:
    failed = {}
    for sample in chosen:
        try:
            check("reference", sample, 7)
        except Exception as error:
            failed[sample.name] = f"{type(error).__name__}: {error}"
    assert chosen
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())


@quiet
@pytest.mark.parametrize("module", [far, merging], ids=["far", "merging"])
def test_the_reference_finds_what_lies_far_apart_and_can_be_merged(module: Any) -> None:
    for check in module.checks():
        accepted(check.run, list(check.samples()))


@quiet
def test_a_sink_is_one_softmax_whichever_way_it_is_computed() -> None:
    """A score in place of the first key's, and a merge with a logit beside the other keys, are the same numbers."""
    replaced = attention.sample(attention.Call(score_mod="sink", dtype=torch.float64, lse=True))
    inputs = calls.make(replaced, "reference", 3)
    beside = attention.sample(attention.Call(sink=True, dtype=torch.float64, lse=True, keys=12))
    rest = {"query": inputs["query"], "sink": inputs["score_mod_tensor"]}
    rest |= {name: inputs[name][:, :, 1:] for name in ("key", "value")}
    for one, other in zip(replaced.call("reference", inputs), beside.call("reference", rest), strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------------- planted faults


class Fault:
    """The reference with ``run`` in place of one hook's plan, so that any process can load it as a plugin."""

    def __init__(self, hook: str, run: Callable[..., Any]) -> None:
        from torchhal.reference import plugin as reference

        family = hook.removeprefix("torchhal_")
        capabilities = Capabilities(**{family: getattr(CAPABILITIES, family)})

        @torchhal.hookimpl
        def torchhal_backend() -> problems.BackendInfo:
            kinds = frozenset({"cpu"})
            return problems.BackendInfo(
                "faulty", "nobody", kinds, ">=1.0,<2", capabilities, {"cpu": -1}, lambda: {"status": "ready"}
            )

        def answer(problem: Any) -> Any:
            plan = getattr(reference, hook)(problem)
            if not isinstance(plan, Plan):
                return plan
            faulty = lambda *arguments: run(plan.run, problem, *arguments)  # noqa: E731
            return dataclasses.replace(plan, run=faulty)

        answer.__name__ = hook
        self.torchhal_backend = torchhal_backend
        setattr(self, hook, torchhal.hookimpl(answer))


def off_by_a_little(honest: Any, problem: Any, *arguments: Any) -> Any:
    return tuple(t * 1.01 for t in honest(*arguments))


def off_by_a_bit(honest: Any, problem: Any, operands: Any, captured: Any, out: Any) -> Any:
    (found,) = honest(operands, captured, None)
    return ([torch.nextafter(t, t + 1) for t in found],)


def without_gradient_of_the_bias(honest: Any, problem: Any, a: Any, b: Any, bias: Any, operands: Any) -> Any:
    return honest(a, b, bias.detach() + 0 * bias, operands)


def rows_from_zero(honest: Any, problem: Any, call: Any, *rest: Any) -> Any:
    return honest(
        dataclasses.replace(call, query_lengths=(0,) * call.rank + call.query_lengths[call.rank :]), *rest
    )


def stuck(honest: Any, problem: Any, call: Any, *rest: Any) -> Any:
    import time

    if call.rank:
        time.sleep(1000)
    return honest(call, *rest)


def careless(honest: Any, problem: Any, url: str) -> Any:
    return CarelessStore(url)


def wrong_tasks(honest: Any, problem: Any, *arguments: Any) -> Any:
    from torch._inductor import aoti_compile_and_package

    if problem.task == "package":
        program, path = arguments
        with torch.no_grad():
            next(iter(program.state_dict.values())).add_(0.5)
        return Path(aoti_compile_and_package(program, package_path=os.fspath(path)))
    if problem.task == "quantizer":
        return type(honest())()  # one that was not configured annotates nothing
    return {"compile_options": {"no_such_option": True}, "profiler": []}[problem.task]


PLUGINS = {
    "numbers": Fault("torchhal_matmul", off_by_a_little),
    "bits": Fault("torchhal_foreach", off_by_a_bit),
    "bias": Fault("torchhal_matmul", without_gradient_of_the_bias),
    "rows": Fault("torchhal_context_parallel", rows_from_zero),
    "stuck": Fault("torchhal_context_parallel", stuck),
    "store": Fault("torchhal_cache_store", careless),
    "tasks": Fault("torchhal_deploy", wrong_tasks),
}


class _Plugins:
    def __getattr__(self, name: str) -> Fault:
        return PLUGINS[name]


plugins = _Plugins()


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Loads a fault by name, here and in processes that are started from here."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    selection.reset()
    yield lambda name: examine.load_plugin(f"{Path(__file__).stem}:plugins.{name}")
    registry().backends.pop("faulty", None)
    selection.reset()


Faulty = Callable[[str], str]


@pytest.mark.parametrize("name", ["float32-m64-n64-k64", "float16-bias_own-m9-n11-k13"])
def test_an_error_of_a_percent_is_found(faulty: Faulty, name: str) -> None:
    with pytest.raises(CheckFailed, match="within its bound"):
        numbers.run(faulty("numbers"), sample_named("matmul", name), 1)


def test_an_error_of_one_bit_is_found_in_foreach_arithmetic(faulty: Faulty) -> None:
    sample = sample_named("foreach", "chain-float32-list_list-odd")
    numbers.run(faulty("bits"), sample, 1)
    with pytest.raises(CheckFailed, match="the bits that torch gives tensor by tensor"):
        foreach.run("faulty", sample, 1)


def test_a_missing_gradient_is_found(faulty: Faulty) -> None:
    sample = sample_named("matmul", "float32-bias_own-gradient_inputs-m33-n17-k65")
    with pytest.raises(CheckFailed, match="bias within its bound"):
        gradients.run(faulty("bias"), sample, 1)


STORE_FAULTS = {
    "cache_store.roundtrip": "every key that was put, sorted",
    "cache_store.corruption": "CacheIntegrityError for a file",
    "cache_store.concurrency": "the old value, the new one, or none",
    "cache_store.crash": "the old value or the new one",
    "cache_store.paths": "InvalidProblem, or an entry|nothing outside|refused by all methods",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STORE_FAULTS)
def test_a_careless_store_is_found_by_every_check(faulty: Faulty, name: str) -> None:
    sample = next(s for s in check_named(name).samples() if s.name == "file")
    with pytest.raises(CheckFailed, match=STORE_FAULTS[name]):
        check_named(name).run(faulty("store"), sample, 1)


@quiet
@pytest.mark.slow
@pytest.mark.timeout(DEADLINE)
@pytest.mark.parametrize("task", ["compile_options", "quantizer", "package", "profiler"])
def test_a_task_done_wrongly_is_found(faulty: Faulty, task: str) -> None:
    if task == "quantizer":
        pytest.importorskip("torchao")
    check = check_named("deploy.tasks")
    sample = next(s for s in check.samples() if s.name == task)
    with pytest.raises((CheckFailed, RuntimeError)):
        check.run(faulty("tasks"), sample, 1)


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE)
def test_positions_counted_from_the_start_of_a_shard_are_found(faulty: Faulty) -> None:
    check = check_named("context_parallel.numbers")
    with pytest.raises(CheckFailed, match="causal.* within its bound"):
        check.run(faulty("rows"), next(iter(check.samples())), 1)


@pytest.mark.slow
def test_a_rank_that_never_ends_is_ended(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_parallel, "SECONDS", 20.0)
    check = check_named("context_parallel.numbers")
    with pytest.raises(CheckFailed, match="2 ranks to end within 20 s"):
        check.run(faulty("stuck"), next(iter(check.samples())), 1)
