"""Promises of plans, wrong calls, and random cases: what is asked, what is not, and what a failure says."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchhal import BackendInfo, Capabilities, hookimpl, selection
from torchhal.errors import InvalidProblem, Unsupported
from torchhal.pointwise import capture
from torchhal.pointwise.primitives import PRIMITIVES
from torchhal.problems import Plan
from torchhal.reference import plugin as reference
from torchhal_conformance import calls, compose, corpus, examine, explore, tape
from torchhal_conformance.checks import check_named, errors, promises, wrong_attention
from torchhal_conformance.checks.wrong import Wrong
from torchhal_conformance.model import CheckFailed, Sample
from torchhal_conformance.mutants import Mutant, all_mutants


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Planted faults share one name, and plans are kept by name."""
    selection.reset()
    yield
    selection.reset()


def mutant(name: str, **promises: Any) -> str:
    (found,) = [m for m in all_mutants() if m.name == name]
    return loaded(dataclasses.replace(found, promises={**found.promises, **promises}))


def loaded(fault: Mutant) -> str:
    return plugged(fault.plugin)


def plugged(plugin: Any) -> str:
    module = ModuleType("made_up_plugin")
    module.plugin = plugin  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    try:
        return examine.load_plugin("made_up_plugin:plugin")
    finally:
        del sys.modules[module.__name__]


def asked(check: str, sample: str, backend: str, seed: int = 3) -> Any:
    case = corpus.case_named(f"{check}/{sample}")
    return case.check.run(backend, case.sample, seed)


CAUSAL = "dense-float32-causal-b2-h4-l9-s13-e16"

# ---------------------------------------------------------------------------- determinism


def test_a_plan_that_says_deterministic_is_asked_for_the_same_bits_again() -> None:
    with pytest.raises(CheckFailed, match="expected the same bits in call 3 of 8 as in the first"):
        asked("attention.determinism", "dense-float32-b2-h4-l1-s1-e16", mutant("random_bits"))


@pytest.mark.parametrize("check", ["determinism", "fresh_data", "threads", "written"])
def test_a_plan_that_does_not_say_so_is_not_asked_for_bits(check: str) -> None:
    backend = mutant("random_bits", deterministic=False)
    found = asked(f"attention.{check}", CAUSAL, backend)
    if check == "determinism":
        assert found.note == "the plan does not promise the same result again"


def test_a_plan_that_does_not_promise_bits_still_owes_the_right_numbers() -> None:
    def change(run: Any, problem: Any) -> Any:
        seen: list[int] = []

        def faulty(*given: Any) -> Any:
            seen.append(0)
            return run(*given) * (1.0 if len(seen) == 1 else 1.5)

        return faulty

    backend = loaded(Mutant("drifts", "", (), change, promises={"deterministic": False}))
    with pytest.raises(CheckFailed, match="in memory that held other values before within its bound"):
        asked("attention.written", "dense-float32-b2-h4-l1-s1-e16", backend)


# ---------------------------------------------------------------------------- batch invariance


def of_layout(layout: str) -> Sample:
    return next(s for s in check_named("attention.batch_invariance").samples() if layout in s.tags)


@pytest.mark.parametrize("layout", ["varlen", "paged"])
def test_a_batch_of_sequences_that_are_computed_one_by_one_is_promised_and_found_invariant(
    layout: str,
) -> None:
    sample = of_layout(layout)
    inputs = calls.make(sample, "reference", 1)
    plan = calls.plan_of(sample, "reference", inputs)
    assert plan is not None and plan.batch_invariant
    assert check_named("attention.batch_invariance").run("reference", sample, 1).note == ""


def test_without_the_promise_nothing_is_asked_and_a_note_says_so() -> None:
    found = check_named("attention.batch_invariance").run("reference", of_layout("dense"), 1)
    assert found.note == "the plan does not promise it"
    matmuls = check_named("matmul.batch_invariance")
    assert {matmuls.run("reference", s, 1).note for s in matmuls.samples()} == {
        "the plan does not promise it"
    }


def test_an_entry_whose_bits_follow_the_size_of_the_batch_is_named() -> None:
    backend = mutant("order_by_batch")
    with pytest.raises(CheckFailed, match="entry 0 alone to have the bits that it has in the full batch"):
        check_named("attention.batch_invariance").run(backend, of_layout("dense"), 1)


@pytest.mark.parametrize("layout", ["varlen", "paged"])
def test_every_part_of_a_batch_is_the_call_of_those_sequences(layout: str) -> None:
    """Parts that were cut wrongly would find no fault in a backend, or one in every backend."""
    from torchhal_conformance.checks import batch_invariance

    sample = of_layout(layout)
    inputs = calls.make(sample, "reference", 1)
    whole = calls.call(sample, "reference", inputs)
    parts = list(batch_invariance._attention_parts(inputs))
    assert len(parts) >= 5
    for _, part, of_whole in parts:
        for one, other in zip(calls.call(sample, "reference", part), whole):
            torch.testing.assert_close(one, of_whole(other), atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------- errors


def a_wrong(name: str) -> Wrong:
    return next(w for w in wrong_attention.attention() if w.name == name)


def test_a_call_that_should_raise_and_does_not_fails() -> None:
    wrong = dataclasses.replace(a_wrong("dense-head_size"), call=lambda backend, inputs: inputs["query"])
    with pytest.raises(CheckFailed, match="expected InvalidProblem for dense-head_size, got no error"):
        errors.run("reference", wrong, 1)


def test_an_error_of_another_class_is_quoted() -> None:
    def call(backend: str, inputs: Any) -> Any:
        raise IndexError("page 99")

    with pytest.raises(CheckFailed, match="expected InvalidProblem, got IndexError: page 99"):
        errors.run("reference", dataclasses.replace(a_wrong("dense-head_size"), call=call), 1)


def test_a_message_that_does_not_say_what_arrived_is_quoted() -> None:
    wrong = dataclasses.replace(a_wrong("dense-head_size"), says=("head size", "no such word"))
    with pytest.raises(CheckFailed, match="a message that says 'no such word', got 'query and key need"):
        errors.run("reference", wrong, 1)


def test_an_input_that_was_changed_before_the_error_is_named() -> None:
    def call(backend: str, inputs: Any) -> Any:
        inputs["key"].add_(1.0)
        raise InvalidProblem("no")

    wrong = dataclasses.replace(a_wrong("dense-head_size"), call=call, says=())
    with pytest.raises(CheckFailed, match="input key left as it was by a call that raises"):
        errors.run("reference", wrong, 1)


def test_the_next_good_call_has_to_be_right() -> None:
    backend = mutant("broken_afterwards")
    with pytest.raises(CheckFailed, match="result 0 of the next good call within its bound"):
        errors.run(backend, a_wrong("paged-page_number"), 1)


@pytest.mark.parametrize(
    "family", ["attention", "matmul", "foreach", "context_parallel", "cache_store", "deploy"]
)
def test_a_feature_of_a_later_specification_is_refused_by_name(family: str) -> None:
    sample = next(s for s in check_named(f"{family}.errors").samples() if s.name == "unknown_feature")
    assert check_named(f"{family}.errors").run("reference", sample, 1).note == ""
    with pytest.raises(CheckFailed, match="expected Unsupported for unknown_feature, got no error"):
        check_named(f"{family}.errors").run(mutant(f"{family}_yes_to_anything"), sample, 1)


def test_each_public_function_has_wrong_calls() -> None:
    names = {
        s.name.partition("-")[0]
        for f in ("attention", "matmul", "foreach")
        for s in check_named(f"{f}.errors").samples()
    }
    assert names >= {
        "dense",
        "varlen",
        "paged",
        "merge",
        "matmul",
        "pack_weight",
        "foreach",
        "unknown_feature",
    }


# ---------------------------------------------------------------------------- unknown hooks


@hookimpl
def torchhal_backend() -> BackendInfo:
    return BackendInfo(
        "later", "somebody", frozenset({"cpu"}), ">=1.0,<2", Capabilities(attention=reference.ATTENTION)
    )


def test_a_plugin_with_a_hook_that_nobody_knows_is_a_load_failure_that_names_it() -> None:
    @hookimpl
    def torchhal_teleport(problem: Any) -> None: ...

    plugin = SimpleNamespace(torchhal_backend=torchhal_backend, torchhal_teleport=torchhal_teleport)
    with pytest.raises(ValueError, match="unknown hook 'torchhal_teleport'"):
        plugged(plugin)


def test_a_plugin_with_an_argument_that_no_hook_has_is_a_load_failure_that_names_it() -> None:
    @hookimpl
    def torchhal_attention(problem: Any, destination: Any) -> None: ...

    plugin = SimpleNamespace(torchhal_backend=torchhal_backend, torchhal_attention=torchhal_attention)
    with pytest.raises(ValueError, match="destination"):
        plugged(plugin)


def test_a_problem_of_a_later_specification_is_unsupported_and_not_dropped() -> None:
    ask = errors.unknown_feature("matmul")
    with pytest.raises(Unsupported, match="does not claim feature_of_a_later_specification"):
        ask("reference", {})


# ---------------------------------------------------------------------------- random functions and cases


def test_every_word_of_the_composition_is_defined_and_finite_wherever_it_is_used() -> None:
    extremes = torch.tensor([-1e3, -7.5, -1.0, -1e-6, 0.0, 0.3, 1.0, 2.5, 40.0, 1e3], dtype=torch.float64)
    grid = torch.cartesian_prod(extremes, extremes, extremes).unbind(1)
    for word in compose.WORDS:
        found = word.of(*grid[: word.arity])
        assert torch.isfinite(found).all(), word.text
        assert found.abs().max() <= 2e3, word.text


def test_the_words_reach_most_of_the_floating_primitives() -> None:
    floats = [("x", torch.float32), ("y", torch.float32), ("z", torch.float32)]
    reached = set()
    for word in compose.WORDS:
        functions = {
            1: lambda x, w=word: w.of(x),
            2: lambda x, y, w=word: w.of(x, y),
            3: lambda x, y, z, w=word: w.of(x, y, z),
        }
        graph = capture(functions[word.arity], floats[: word.arity]).graph
        reached |= {node.primitive for node in graph.nodes}
    missing = {
        name for name, word in PRIMITIVES.items() if word.rule((torch.float32,)) is torch.float32
    } - reached
    assert missing <= {"detach", "isnan", "isinf", "isfinite", "logical_not"}


def test_what_is_written_is_what_is_computed() -> None:
    names = {name: getattr(torch, name) for name in dir(torch) if not name.startswith("_")}
    x, y = torch.randn(2, 50, dtype=torch.float64)
    for seed in range(60):
        whole = compose.expression(random.Random(seed), ("x", "y"), words=compose.WORDS)
        spelled: Tensor = eval(
            whole.text, {**names, "x": x, "y": y, "abs": torch.abs, "pow": torch.pow, "round": torch.round}
        )
        torch.testing.assert_close(
            torch.as_tensor(spelled), torch.as_tensor(whole.of((x, y))), atol=0, rtol=0
        )


def test_exact_words_leave_no_bit_to_an_implementation_and_smooth_ones_do_not_jump() -> None:
    assert all(word.exact for word in compose.EXACT) and all(word.smooth for word in compose.SMOOTH)
    steps = [word.text for word in compose.WORDS if not word.smooth]
    assert all(
        any(name in text for name in ("where", "floor", "ceil", "round", "trunc", "sign", "mod", "remainder"))
        for text in steps
    )


def test_families_take_turns_and_the_first_cases_do_not_depend_on_their_number() -> None:
    names = explore.names(7, 0)
    assert names[:3] == ["explore.attention/0", "explore.matmul/0", "explore.foreach/0"]
    assert names == explore.names(30, 0)[:7]


@pytest.mark.parametrize("seed", [0, 5])
def test_a_name_and_a_seed_say_all_of_a_random_case(seed: int) -> None:
    for name in explore.names(24, seed):
        case = explore.random_case(name, seed)
        again = explore.case_named(case.id, seed)
        assert case.kind == "explore" and again.id == case.id and again.data_seed == case.data_seed
        results = [
            calls.call(c.sample, "reference", calls.make(c.sample, "reference", c.data_seed))
            for c in (case, again)
        ]
        assert all(calls.same_bits(a, b) for a, b in zip(*results, strict=True))


def test_a_random_case_of_another_seed_is_not_taken_for_this_one() -> None:
    case = explore.random_case("explore.matmul/0", 0)
    with pytest.raises(KeyError, match="give the --seed of the report"):
        explore.case_named(case.id, 1)
    with pytest.raises(KeyError, match="no random case 'explore.poetry"):
        explore.case_named("explore.poetry/0-x", 0)


def test_the_reference_passes_random_cases_of_each_family() -> None:
    cases = [explore.random_case(name, 0) for name in explore.names(60, 0)]
    assert {case.check.name for case in cases} == {
        "attention.numbers",
        "matmul.numbers",
        "foreach.numbers",
        "foreach.bitwise",
    }
    found = {case.id: examine.examine(case, "reference") for case in cases}
    assert {r["status"] for r in found.values()} == {"pass"}, {
        k: r for k, r in found.items() if r["status"] != "pass"
    }


def test_a_nondeterministic_fault_in_results_is_found_by_random_cases_too() -> None:
    backend = mutant("matmul_off")
    cases = [explore.random_case(name, 0) for name in explore.names(6, 0) if "matmul" in name]
    assert "fail" in {examine.examine(case, backend)["status"] for case in cases}


def test_agreement_is_asked_of_integers_whatever_the_plan_promises() -> None:
    sample = next(s for s in check_named("foreach.determinism").samples() if "integer" in s.tags)
    inputs = calls.make(sample, "reference", 1)
    found = calls.call(sample, "reference", inputs)
    other = tuple(t.logical_not() if t.dtype is torch.bool else t + 1 for t in found)
    with pytest.raises(CheckFailed, match="the same bits somewhere"):
        promises.agree("reference", sample, inputs, found, other, "somewhere")


def test_what_a_plan_does_is_no_promise_that_a_tape_would_have_to_hold() -> None:
    functions = {field.name for field in dataclasses.fields(Plan) if "Callable" in str(field.type)}
    assert {"run", "direct", "bind"} <= functions and functions.isdisjoint(tape.PROMISES)
