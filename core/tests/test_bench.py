"""The measuring code itself: turns, limits, accuracy, and that it counts what it says it counts."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from fake_backends import backend
from hypothesis import given, settings
from hypothesis import strategies as st
from installed_backends import Site

import torchhal
from torchhal.bench import (
    accuracy,
    attention,
    candidates,
    catalogue,
    ceilings,
    chart,
    choice,
    idle,
    overhead,
    timing,
)  # fmt: skip
from torchhal.bench.cases import Case, Inputs
from torchhal.bench.ceilings import Ceilings
from torchhal.bench.dense import Dense
from torchhal.bench.timing import Effort, Timing, interleaved, quantile
from torchhal.errors import BackendNotFound, InvalidProblem, Unsupported
from torchhal.problems import AttentionProblem, Plan
from torchhal.reference.attention import plan as reference_plan
from torchhal.registry import registry

CPU = torch.device("cpu")
BRIEF = Effort(repetitions=3, budget=0.0, most=3, floor=1e-5)
LIMITS = Ceilings(100.0, 10.0, "somewhere", "somewhere")
TINY = Dense("tiny", batch=2, heads=4, kv_heads=2, length=5, keys=7, head_size=8)


# ---------------------------------------------------------------------------- timing


@given(st.lists(st.floats(0.0, 10.0), min_size=1), st.floats(0.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_quantiles_are_those_of_numpy(values: list[float], at: float) -> None:
    import numpy as np

    assert quantile(tuple(values), at) == pytest.approx(float(np.quantile(values, at)), abs=1e-12)


def test_candidates_take_turns_and_are_warmed_up_first() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        time.sleep(1e-3)

    found = interleaved({"a": lambda: call("a"), "b": lambda: call("b")}, BRIEF)
    assert "".join(order) == "aabb" + "ab" * 3
    assert all(len(timing.seconds) == 3 and timing.best >= 1e-3 for timing in found.values())


class Clock:
    """An event of a device that works while the host waits."""

    def __init__(self, device: object, enable_timing: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Clock) -> float:
        return (other.time - self.time) * 1e3


def test_on_a_device_its_own_clock_counts_and_the_hosts_time_stands_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "Event", Clock)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "_CACHE", 1 << 10)
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    calls = {"a": lambda: call("a", 2e-3), "b": lambda: call("b", 1e-4)}
    found = timing.on_device(calls, BRIEF, CPU)
    assert found["a"].median >= 2e-3 > found["b"].median
    assert found["a"].host is not None and found["a"].host >= 2e-3
    assert "host" in found["a"].to_dict() and interleaved(calls, BRIEF)["a"].host is None
    turns = "".join(name for i, name in enumerate(order) if i == 0 or order[i - 1] != name)
    assert turns.startswith("abab"), "candidates take turns"


def test_accelerators_have_cases_of_their_own_all_in_bfloat16_with_every_kind() -> None:
    cases = catalogue.chosen(None, torch.device("cuda"))
    assert {case.dtype for case in cases} == {torch.bfloat16}
    assert len({case.name for case in cases}) == len(cases)
    assert {case.kind for case in cases} >= {
        "dense", "backward", "ALiBi and soft-cap", "sliding window", "documents", "paged decode"
    }  # fmt: skip
    assert all(case.heads == 4 * case.kv_heads for case in cases)
    assert catalogue.chosen(None) == list(catalogue.ATTENTION)


@pytest.mark.parametrize("name", ["cuda:77", "warp drive"])
def test_a_device_that_torch_can_not_use_is_named_with_the_way_to_find_out_why(name: str) -> None:
    with pytest.raises(
        InvalidProblem, match=rf"can not compute on the device '{name}' here \(.+\); `torchhal doctor` says"
    ):
        choice.usable_device(name)
    assert choice.usable_device("cpu") == CPU


def test_each_variant_of_a_plan_is_a_candidate_of_its_own(install: Any) -> None:
    def answer(problem: AttentionProblem) -> Plan:
        run = reference_plan(problem).run
        return Plan(run, variants={"one": run, "two": run})

    install("many", backend("many", answer))
    inputs = TINY.inputs(CPU)
    found = TINY.bind(CPU).own[0].candidates(TINY, registry().get("many"))
    assert [c.name for c in found] == ["many", "many:one", "many:two"]
    assert all(c.ours and c.backend == "many" and c.call is not None for c in found)
    assert candidates.each_fused(inputs, True, lambda call: call) == [], (
        "a processor has no fused kernels to choose"
    )


def test_a_short_call_is_repeated_until_a_timing_lasts() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    timing = interleaved({"short": call}, Effort(repetitions=3, budget=0.0, most=3, floor=1e-4))["short"]
    assert calls > 50 and timing.median < 1e-5


def test_rounds_are_at_least_nine_unless_they_take_too_long() -> None:
    effort = Effort()
    assert effort.goes_on(8, 29.0) and not effort.goes_on(9, 29.0)
    assert effort.goes_on(2, 100.0) and not effort.goes_on(3, 31.0)
    assert effort.goes_on(49, 0.1) and not effort.goes_on(50, 0.1)


# ---------------------------------------------------------------------------- cases

small = st.integers(1, 9)


@given(length=small, keys=small, causal=st.booleans(), heads=small)
@settings(max_examples=25, deadline=None)
def test_work_is_counted_as_the_pairs_that_are_not_hidden_by_causality(
    length: int, keys: int, causal: bool, heads: int
) -> None:
    case = dataclasses.replace(TINY, length=length, keys=keys, causal=causal, heads=heads, kv_heads=heads)
    pairs = sum(1 for i in range(length) for j in range(keys) if not causal or j <= i)
    assert case.pairs == pairs
    assert case.flops == 4 * case.batch * heads * pairs * case.head_size
    query, key, value, _ = case.inputs(CPU)
    assert case.bytes == 4 * (2 * query.numel() + key.numel() + value.numel())


def test_cases_are_chosen_by_beginning_or_pattern() -> None:
    assert [c.name for c in catalogue.chosen("decode-gqa-d128")] == [
        "decode-gqa-d128-f32",
        "decode-gqa-d128-bf16",
    ]
    assert {c.dtype for c in catalogue.chosen("*-bf16")} == {torch.bfloat16}
    with pytest.raises(
        InvalidProblem, match="no attention case is called 'prefil'; cases are causal-2048-d64-f32"
    ):
        catalogue.chosen("decode,prefil")


# ---------------------------------------------------------------------------- accuracy


@given(
    causal=st.booleans(),
    mask=st.sampled_from([None, torch.bool, torch.float32]),
    length=small,
    keys=small,
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_what_is_expected_is_what_the_oracle_says(
    causal: bool, mask: torch.dtype | None, length: int, keys: int, seed: int
) -> None:
    inputs = dataclasses.replace(TINY, length=length, keys=keys).inputs(CPU, seed)
    if mask is not None:
        seen = torch.rand(length, keys, generator=torch.Generator().manual_seed(seed)) > 0.3
        made = seen if mask is torch.bool else torch.zeros(length, keys).masked_fill(~seen, -torch.inf)
        inputs = inputs._replace(attn_mask=made)
    expected = accuracy.expectation(inputs, causal)
    query, key, value, attn_mask = inputs
    true, _ = oracle.attention(query, key, value, scale=8**-0.5, is_causal=causal, mask=attn_mask)
    torch.testing.assert_close(expected.exact, torch.from_numpy(true), rtol=0, atol=1e-12)


def test_long_calls_are_checked_at_a_sample_of_rows_with_the_first_and_the_last() -> None:
    expected = accuracy.expectation(dataclasses.replace(TINY, length=1000).inputs(CPU), False)
    rows = expected.rows.tolist()
    assert len(rows) == 33 and rows[0] == 0 and rows[-1] == 999 and sorted(set(rows)) == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_torch_itself_passes_and_plain_mistakes_do_not(dtype: torch.dtype, causal: bool) -> None:
    case = dataclasses.replace(TINY, length=40, keys=40, dtype=dtype, causal=causal)
    query, key, value, _ = inputs = case.inputs(CPU)
    expected = accuracy.expectation(inputs, causal)

    def sdpa(is_causal: bool = causal, **changed: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, enable_gqa=True, **changed
        )

    assert expected.error(sdpa()) <= expected.tolerance
    assert expected.error(sdpa(not causal)) > expected.tolerance
    assert expected.error(sdpa(scale=0.3)) > expected.tolerance
    assert expected.error(sdpa() * 1.05) > expected.tolerance


def test_nan_and_other_shapes_are_infinitely_wrong() -> None:
    expected = accuracy.expectation(TINY.inputs(CPU), False)
    right = torch.zeros(2, 4, 5, 8)
    assert expected.error(right * torch.nan) == float("inf")
    assert expected.error(right[..., :7]) == float("inf")
    assert expected.error(right[0]) == float("inf")


# ---------------------------------------------------------------------------- attention


def rows(case: Case, *names: str) -> dict[str, attention.Row]:
    result = attention.measure(case, [registry().get(name) for name in names], CPU, BRIEF)
    return {row.candidate: row for row in result.rows}


def test_ours_and_the_peers_are_checked_and_timed_on_the_same_inputs(site: Site) -> None:
    site.add("fast", causal="True")
    found = rows(dataclasses.replace(TINY, causal=True), "fast", "reference")
    assert list(found) == ["fast", "reference", candidates.SDPA, candidates.SDPA_DENSE]
    assert all(row.passed and row.timing is not None for row in found.values())
    assert [row.ours for row in found.values()] == [True, True, False, False]


def test_a_wrong_backend_is_flagged_and_gets_no_speedup(site: Site) -> None:
    site.add("wrong", factor=1.5)
    result = attention.measure(TINY, [registry().get("wrong")], CPU, BRIEF)
    row = result.rows[0]
    assert not row.passed and row.error > row.tolerance
    assert result.speedup(row) is None
    assert result.to_dict(LIMITS)["candidates"][0]["passed"] is False


def test_a_backend_that_declines_or_raises_is_shown_with_the_reason(site: Site) -> None:
    site.add("picky")
    site.add("crash", causal="1/0")
    assert (
        rows(dataclasses.replace(TINY, head_size=13), "picky")["picky"].not_run
        == "declined: does not like 13 [unlucky]"
    )
    assert rows(TINY, "crash")["crash"].not_run == "raised ZeroDivisionError: division by zero"


def test_the_reference_is_not_run_where_its_scores_would_fill_the_memory(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_MOST_SCORES", 1)
    assert "keeps all scores" in rows(TINY, "reference")["reference"].not_run


def test_shares_are_of_the_limits_and_speedups_of_torch() -> None:
    ours = attention.Row(TINY, "ours", True, Timing((1e-6,)), 0.0, 1.0)
    torchs = attention.Row(TINY, candidates.SDPA, False, Timing((3e-6,)), 0.0, 1.0)
    found = attention.CaseResult(TINY, [ours, torchs]).to_dict(LIMITS)["candidates"][0]
    assert found["speedup_over_sdpa"] == pytest.approx(3.0)
    assert found["compute_share"] == pytest.approx(TINY.flops / 1e-6 / 100e9)
    assert found["read_share"] == pytest.approx(TINY.bytes / 1e-6 / 10e9)


def test_by_default_every_backend_but_the_reference_is_measured(site: Site) -> None:
    found = registry().backends
    assert [b.name for b in choice.backends("attention", found, CPU, None)] == ["reference"]
    site.add("a")
    site.add("b")
    found = registry().backends
    assert {b.name for b in choice.backends("attention", found, CPU, None)} == {"a", "b"}
    assert [b.name for b in choice.backends("attention", found, CPU, "reference")] == ["reference"]


# ---------------------------------------------------------------------------- limits


def test_a_limit_is_the_highest_that_a_probe_or_torch_reaches(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "_SIDE", 64)
    monkeypatch.setattr(ceilings, "_BYTES", 1 << 16)
    site.add("fast", probe='return {"fma_gflops": lambda: 1e9, "read_gbps": 1e-9}')
    site.add("mad", probe='return {"fma_gflops": float("nan"), "read_gbps": -3}')
    site.add("shy", probe="raise RuntimeError")
    found = ceilings.ceilings(CPU, list(registry().backends.values()))
    assert (found.gflops, found.gflops_source) == (1e9, "probe of fast")
    assert found.gbps > 1e-3 and found.gbps_source.startswith("torch sum")


# ---------------------------------------------------------------------------- chart


def result_for_chart() -> attention.CaseResult:
    timings = {"ours": (1e-3,), candidates.SDPA: (2e-3,)}
    return attention.CaseResult(
        TINY, [attention.Row(TINY, n, n == "ours", Timing(t), 0.0, 1.0) for n, t in timings.items()]
    )


def test_a_chart_is_drawn_and_an_unknown_format_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chart.draw([result_for_chart()], "a machine", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(Unsupported, match=r"can not draw .*chart\.xyz"):
        chart.draw([result_for_chart()], "a machine", tmp_path / "chart.xyz")


def test_without_matplotlib_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Unsupported, match=r'pip install "torchhal\[bench\]"'):
        chart.require_matplotlib()


# ---------------------------------------------------------------------------- overhead


def test_the_idle_backend_is_installed_for_the_block_alone(site: Site) -> None:
    x = torch.zeros(1, 1, 1, 16)
    with idle.installed():
        assert torchhal.attention(x, x, x, backend="idle") is x
        assert torchhal.explain(torchhal.attention, x, x, x).chosen == "reference", (
            "never chosen unless named"
        )
    with pytest.raises(BackendNotFound):
        torchhal.attention(x, x, x, backend="idle")


def test_budgets_are_judged_and_what_was_not_measured_is_not() -> None:
    def verdict(value: float | None, budget: float | None) -> bool | None:
        return overhead.Overhead("x", "x", value, budget).passed

    assert (verdict(1.0, 2.0), verdict(3.0, 2.0)) == (True, False)
    assert verdict(None, 2.0) is None and verdict(3.0, None) is None


def test_the_budgets_are_those_the_project_promises() -> None:
    promised = {"mode": 1.5e-6, "intercepted": 3e-6, "negotiation": 1e-3, "import": 0.15, "compiled": 0.0}
    assert promised.items() <= overhead.BUDGETS.items()


def test_python_calls_sees_every_function_of_ours_and_none_of_torchs() -> None:
    x = torch.zeros(1, 1, 1, 16)
    assert overhead.python_calls(lambda: F.scaled_dot_product_attention(x, x, x)) == []
    entered = overhead.python_calls(lambda: torchhal.attention(x, x, x, backend="reference"))
    assert entered[0] == "torchhal.attention.attention" and len(entered) > 2
    assert sys.getprofile() is None


def test_the_fastest_batch_counts_and_the_context_is_entered_around_it() -> None:
    inside = False

    class Context:
        def __enter__(self) -> None:
            nonlocal inside
            inside = True

        def __exit__(self, *_: object) -> None:
            nonlocal inside
            inside = False

    def call() -> None:
        assert inside

    best = overhead.fastest({"x": (Context, call)}, 10, 3)
    assert 0 < best["x"] < 1e-4 and not inside


def test_each_cost_is_measured(site: Site) -> None:
    amount = overhead.Amount(calls=20, batches=3, processes=1, negotiations=3)
    found = [
        cost
        for _, measure in overhead.steps(registry().get("reference"), amount, compiled=False)
        for cost in measure()
    ]
    measured = {cost.name: cost.value for cost in found}
    assert set(measured) == {
        "import",
        "mode",
        "bare mode",
        "intercepted",
        "installed",
        "function",
        "negotiation",
    }
    assert all(value is not None for value in measured.values())
    assert len(found) == 10, "three of them twice: around a plan that does nothing and a real one"


def test_a_backend_without_a_plan_leaves_the_cost_unmeasured_with_the_reason(site: Site) -> None:
    site.add("picky")
    picky = registry().get("picky")
    elsewhere = dataclasses.replace(picky.info, device_types=frozenset({"xyz"}))
    (cost,) = overhead.intercepted_call(dataclasses.replace(picky, info=elsewhere), overhead.QUICK)
    assert cost.value is None and cost.passed is None
    assert cost.note == "picky has no plan for a small float32 call"


@pytest.mark.slow
def test_a_compiled_call_through_torchhals_operator_is_counted_and_not_judged(site: Site) -> None:
    (cost,) = overhead.compiled_call(registry().get("reference"), overhead.QUICK)
    assert cost.passed is None
    assert cost.value is not None and cost.value > 0, cost.note
    assert "no operator of its own" in cost.note


def test_random_inputs_are_the_same_for_the_same_seed() -> None:
    first, again, other = (TINY.inputs(CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(first.query, again.query) and not torch.equal(first.query, other.query)
    assert isinstance(first, Inputs) and first.attn_mask is None
