"""Every kind of measured call: that it computes what it says, and that its bars are judged by what they name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import oracle
import pytest
import torch
from cli_support import document, invoke
from hypothesis import given, settings
from hypothesis import strategies as st
from installed_backends import Site

from torchhal.bench import attention, catalogue, ceilings, chart, first_call
from torchhal.bench.backward import Backward
from torchhal.bench.block_mask import MakeBlockMask
from torchhal.bench.candidates import FLEX, SDPA, SDPA_DENSE, SDPA_PADDED, UNFUSED
from torchhal.bench.cases import Case, Requirement, describe
from torchhal.bench.dense import AlibiSoftCap, Dense, Window, alibi_slopes
from torchhal.bench.first_call import FirstCall
from torchhal.bench.layouts import Documents, PagedDecode
from torchhal.bench.timing import Effort, Timing, in_turns
from torchhal.pointwise import capture
from torchhal.registry import registry

CPU = torch.device("cpu")
BRIEF = Effort(repetitions=3, budget=0.0, most=3, floor=1e-5)
SIZES: dict[str, Any] = {"heads": 4, "kv_heads": 2, "length": 40, "keys": 40, "head_size": 8}
KINDS: list[Case] = [
    Dense("dense", **SIZES, causal=True),
    Dense("masked", **SIZES, windowed=True),
    Window("window", **SIZES, window=5),
    AlibiSoftCap("alibi", **SIZES),
    Documents("documents", heads=4, kv_heads=2, head_size=8, lengths=(13, 1, 20, 3)),
    Documents("documents-full", heads=4, kv_heads=2, head_size=8, lengths=(13, 1, 20, 3), causal=False),
    PagedDecode("paged", batch=3, heads=4, kv_heads=2, keys=12, head_size=8, page_size=4),
    PagedDecode(
        "paged-int8", batch=3, heads=4, kv_heads=2, keys=12, head_size=8, page_size=4, stored=torch.int8
    ),
    Backward("backward", **SIZES, causal=True),
    FirstCall("first", **SIZES),
    MakeBlockMask("made-causal", length=1024, keys=1024, peer_length=512),
    MakeBlockMask("made-window", length=1024, keys=1024, peer_length=512, window=200),
]


def measured(case: Case) -> attention.CaseResult:
    return attention.measure(case, [registry().get("reference")], CPU, BRIEF)


# ---------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_every_candidate_of_every_kind_is_right_and_timed(case: Case) -> None:
    result = measured(case)
    assert all(row.timing is not None and row.passed for row in result.rows), result.rows
    assert any(row.ours for row in result.rows) and any(not row.ours for row in result.rows)
    assert str(case.length) in describe(case)


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_a_result_that_is_off_by_a_hundredth_fails_in_every_kind(case: Case) -> None:
    with case.mode():
        bound = case.bind(CPU)
        (ours, *_) = bound.ours(case, registry().get("reference"))
        assert ours.call is not None
        right = ours.view(ours.call())
        expected = bound.expected()
    assert expected.error(right) <= expected.tolerance < expected.error(right * 1.01)


@pytest.mark.parametrize("case", KINDS[2:7], ids=lambda case: case.name)
def test_what_a_kind_expects_is_what_the_oracle_says(case: Case) -> None:
    query, key, value, _ = case.inputs(CPU)
    slopes = alibi_slopes(case.heads, CPU).double()
    starts = [0]
    if isinstance(case, Documents):
        for length in case.lengths:
            starts.append(starts[-1] + length)

    def document(row: int) -> int:
        return sum(start <= row for start in starts)

    def seen(b: int, h: int, q: int, k: int) -> bool:
        if isinstance(case, Window):
            return 0 <= q - k < case.window
        if isinstance(case, Documents):
            return document(q) == document(k) and (not case.causal or k <= q)
        return not isinstance(case, AlibiSoftCap) or k <= q

    def changed(score: float, b: int, h: int, q: int, k: int) -> float:
        return 50.0 * math.tanh(score / 50.0) - float(slopes[h]) * (q - k)

    mod = changed if isinstance(case, AlibiSoftCap) else None
    true, _ = oracle.attention(query, key, value, scale=8**-0.5, visible=seen, score_mod=mod)
    expected = case.bind(CPU).expected()
    torch.testing.assert_close(
        expected.exact, torch.from_numpy(true)[:, :, expected.rows.tolist()], rtol=0, atol=1e-9
    )


def test_the_slopes_of_eight_heads_are_the_halves_of_the_paper() -> None:
    assert alibi_slopes(8, CPU).tolist() == [2.0**-n for n in range(1, 9)]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), causal=st.booleans())
@settings(max_examples=25, deadline=None)
def test_documents_are_padded_and_unpadded_without_loss_and_counted_by_their_pairs(
    lengths: list[int], causal: bool
) -> None:
    case = Documents("d", heads=2, kv_heads=2, head_size=3, lengths=tuple(lengths), causal=causal)
    packed = case.inputs(CPU).query
    padded = case.padded(packed)
    assert padded.shape == (len(lengths), 2, max(lengths), 3)
    assert torch.equal(case.unpadded(padded), packed)
    pairs = sum(1 for n in lengths for i in range(n) for j in range(n) if not causal or j <= i)
    assert case.pairs == pairs and case.length == sum(lengths)


@given(length=st.integers(1, 12), keys=st.integers(1, 12), window=st.integers(1, 14))
@settings(max_examples=25, deadline=None)
def test_a_windows_pairs_are_those_its_mask_shows(length: int, keys: int, window: int) -> None:
    case = Window("w", length=length, keys=keys, window=window)
    pairs = sum(1 for i in range(length) for j in range(keys) if 0 <= i - j < window)
    assert case.pairs == pairs and case.density == pytest.approx(pairs / (length * keys))


def test_pages_are_shuffled_and_gathered_to_the_keys_they_were_cut_from() -> None:
    case = PagedDecode("p", batch=3, heads=4, kv_heads=2, keys=32, head_size=8, page_size=4)
    inputs = case.inputs(CPU)
    pages = case.pages(inputs)
    assert pages.table.tolist() != sorted(pages.table.flatten().tolist())
    assert pages.table.flatten().tolist() != sorted(pages.table.flatten().tolist())
    key, value = pages.gathered(torch.float32)
    assert torch.equal(key, inputs.key) and torch.equal(value, inputs.value)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_quantised_pages_are_judged_by_what_they_hold_and_read_in_fewer_bytes(stored: torch.dtype) -> None:
    plain = PagedDecode(
        "p", batch=3, heads=4, kv_heads=2, keys=32, head_size=64, page_size=4, dtype=torch.bfloat16
    )
    case = dataclasses.replace(plain, stored=stored)
    pages = case.pages(case.inputs(CPU)).quantized(stored)
    key, value = pages.gathered(torch.float64)
    true, _ = oracle.attention(case.inputs(CPU).query, key, value, scale=64**-0.5)
    expected = case.bind(CPU).expected()
    torch.testing.assert_close(expected.exact, torch.from_numpy(true), rtol=0, atol=1e-6)
    assert 0.5 * plain.bytes < case.bytes < 0.6 * plain.bytes
    others = [own.label for own in case.bind(CPU).own]
    assert others == ["", "unquantised"] and describe(case).endswith(
        f"of {str(stored).removeprefix('torch.')}"
    )


def test_the_backward_case_is_judged_by_all_three_gradients() -> None:
    case = Backward("b", **SIZES, causal=True)
    with case.mode():
        bound = case.bind(CPU)
        (peer,) = bound.peers(False)
        assert peer.call is not None
        gradients = peer.call()
        expected = bound.expected()
        for place in range(3):
            spoiled = list(gradients)
            spoiled[place] = spoiled[place] * 1.01
            assert expected.error(peer.view(spoiled)) > expected.tolerance


# ---------------------------------------------------------------------------- first calls


def test_no_two_functions_of_first_calls_have_the_same_graph() -> None:
    inputs = [("score", torch.float32), *((n, torch.int32) for n in ("b", "h", "q_idx", "kv_idx"))]
    digests = {capture(first_call.new_mod(), inputs).graph.digest for _ in range(5)}
    assert len(digests) == 5


def test_calls_in_turns_are_each_prepared_outside_the_clock_and_never_warmed_up() -> None:
    order: list[str] = []

    class Prepared:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> Any:
            order.append(f"prepare {self.name}")
            return lambda: order.append(f"call {self.name}")

        def __exit__(self, *_: object) -> None:
            order.append(f"end {self.name}")

    found = in_turns({"a": lambda: Prepared("a"), "b": lambda: Prepared("b")}, 2)
    turn = [f"{what} {name}" for name in "ab" for what in ("prepare", "call", "end")]
    assert order == turn * 2
    assert [len(timing.seconds) for timing in found.values()] == [2, 2]


# ---------------------------------------------------------------------------- bars


def row(case: Case, name: str, seconds: float, **more: Any) -> attention.Row:
    return attention.Row(case, name, error=0.0, tolerance=1.0, timing=Timing((seconds,)), **more)


def test_a_bar_is_judged_against_the_peer_or_the_backends_own_other_call() -> None:
    needs = (
        Requirement(SDPA_DENSE, 8.0),
        Requirement("own dense", 0.5, 0.1),
        Requirement(FLEX, 2.0),
    )
    case = dataclasses.replace(KINDS[2], requirements=needs)
    mine, theirs = (row(case, n, s, ours=True, backend=n) for n, s in (("a", 1.0), ("b", 2.0)))
    dense = [
        row(case, f"{n}, dense", s, ours=True, backend=n, yardstick="own dense")
        for n, s in (("a", 4.0), ("b", 30.0))
    ]
    peer = row(case, SDPA_DENSE, 9.0, ours=False)
    result = attention.CaseResult(case, [mine, dense[0], theirs, dense[1], peer])
    assert [v.passed for v in result.verdicts(mine)] == [True, False, None]
    assert [v.measured for v in result.verdicts(mine)] == pytest.approx([9.0, 0.4, None])
    assert [v.passed for v in result.verdicts(theirs)] == [False, True, None]
    assert result.verdicts(peer) == [] and result.verdicts(dense[0]) == []
    told = attention.Verdict(needs[1], 0.4).to_dict()
    assert told == {"against": "own dense", "ratio": 0.5, "factor": 0.1, "measured": 0.4, "passed": False}
    assert str(needs[0]) == "8.00x torch sdpa, dense mask"
    assert str(needs[1]) == "0.50x own dense x 0.100 of its work"


def test_a_wrong_result_clears_no_bar() -> None:
    case = dataclasses.replace(KINDS[2], requirements=(Requirement(SDPA_DENSE, 1.0),))
    fast = dataclasses.replace(row(case, "a", 1e-3, ours=True, backend="a"), error=2.0)
    result = attention.CaseResult(case, [fast, row(case, SDPA_DENSE, 1.0, ours=False)])
    assert [v.passed for v in result.verdicts(fast)] == [None]


def test_speedups_and_rates_of_other_work_are_not_told() -> None:
    result = measured(KINDS[3])
    rows = {c["candidate"]: c for c in result.to_dict(ceilings.Ceilings(1.0, 1.0, "", ""))["candidates"]}
    plain, own = rows["reference, plain"], rows["reference"]
    assert plain["yardstick"] == "own plain" and plain["speedup"] is None and plain["gflops"] is None
    assert own["speedup"] > 0 and own["gflops"] > 0 and own["speedup_over_sdpa"] is None
    assert rows[UNFUSED]["speedup"] == 1.0


def test_a_backend_that_declines_the_case_is_not_asked_for_its_yardsticks(site: Site) -> None:
    site.add("picky")
    result = attention.measure(KINDS[3], [registry().get("picky")], CPU, BRIEF)
    (declined, peer) = result.rows
    assert declined.not_run == "declined: does not claim captured_tensors, score_mod [unclaimed_feature]"
    assert peer.candidate == UNFUSED


def test_bars_of_the_chart_are_neither_baselines_nor_yardsticks() -> None:
    case = KINDS[2]
    mine = row(case, "a", 1.0, ours=True, backend="a")
    dense = row(case, "a, dense", 4.0, ours=True, backend="a", yardstick="own dense")
    peers = [row(case, name, 2.0, ours=False) for name in (SDPA_DENSE, FLEX)]
    assert chart._compared([attention.CaseResult(case, [mine, dense, *peers])]) == ["a", FLEX]


# ---------------------------------------------------------------------------- the catalogue


def test_each_named_case_is_a_valid_problem_and_its_name_is_its_own() -> None:
    names = [case.name for case in catalogue.ATTENTION]
    assert len(set(names)) == len(names)
    for case in catalogue.ATTENTION:
        smaller = case.quick().quick()
        with smaller.mode():
            assert smaller.bind(CPU).problem().query_dtype is case.dtype
        assert smaller.length < case.length or case.keys > smaller.keys
        assert smaller.requirements == (), "bars are for full sizes"


def test_the_cases_the_project_is_judged_by_are_there() -> None:
    prefill = {
        (c.length, c.head_size, c.dtype) for c in catalogue.ATTENTION if isinstance(c, Dense) and c.causal
    }
    types = (torch.float32, torch.bfloat16, torch.float16)
    assert {(n, d, t) for n in (2048, 4096) for d in (64, 128) for t in types} <= prefill
    decode = {
        (c.batch, c.keys)
        for c in catalogue.ATTENTION
        if c.length == 1 and c.heads == 32 and isinstance(c, Dense)
    }
    assert decode == {(1, 8192), (8, 2048), (32, 1024)}
    kinds = {type(case) for case in catalogue.ATTENTION}
    assert kinds == {Dense, Window, AlibiSoftCap, Documents, PagedDecode, Backward, FirstCall, MakeBlockMask}


def test_the_bars_are_those_the_project_promises() -> None:
    bars = {c.name: [(r.against, round(r.ratio, 4)) for r in c.requirements] for c in catalogue.ATTENTION}
    assert bars["window-512-8192-d64-f32"] == [(SDPA_DENSE, 8.0), ("own dense", round(1 / 1.4, 4))]
    assert bars["alibi-softcap-2048-d128-bf16"] == [("own plain", 0.7), (FLEX, 2.0)]
    assert bars["documents-d64-f32"] == [(SDPA_PADDED, 2.5)]
    assert bars["paged-decode-b8-s2048-bf16"] == [("own dense", 0.9)]
    assert bars["backward-causal-2048-d64-f32"] == [(SDPA, 1.1)]
    assert bars["backward-causal-2048-d64-bf16"] == [(SDPA, 1.6)]
    assert bars["first-call-new-mod"] == [(FLEX, 100.0)]


def test_the_documents_of_the_bar_are_a_quarter_of_the_longest_on_average() -> None:
    (case,) = catalogue.chosen("documents-d64-f32")
    assert isinstance(case, Documents)
    assert sum(case.lengths) / len(case.lengths) == max(case.lengths) / 4


# ---------------------------------------------------------------------------- the command


def test_the_command_shows_what_a_case_needs_and_ends_well_when_it_is_missed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "_SIDE", 64)
    monkeypatch.setattr(ceilings, "_BYTES", 1 << 16)
    needs = (Requirement(SDPA, 1e-9), Requirement(SDPA, 1e9))
    judged = Dense("judged", **SIZES, requirements=needs)
    monkeypatch.setattr(catalogue, "ATTENTION", (judged,))
    monkeypatch.setattr("torchhal.bench.timing.Effort.goes_on", lambda self, rounds, elapsed: rounds < 3)
    site.add("slow")
    shown = invoke("bench", "attention", "--cases", "judged")
    assert shown.exit_code == 0, shown.output
    assert "pass, MISS" in shown.stdout and "What cases need" in shown.stdout
    told = document("bench", "attention", "--cases", "judged")
    (case,) = told["cases"]
    assert [r["passed"] for r in case["candidates"][0]["requirements"]] == [True, False]
    assert case["kind"] == "dense" and case["baseline"] == SDPA and told["memory"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in KINDS if not isinstance(c, MakeBlockMask)], ids=lambda case: case.name
)
def test_compiled_flex_attention_is_right_or_says_why_it_is_not_run(case: Case) -> None:
    sized = case if isinstance(case, Documents) else dataclasses.replace(case, head_size=16)
    rows = attention.measure(sized, [registry().get("reference")], CPU, BRIEF, flex=True).rows
    (flex,) = (row for row in rows if row.candidate == FLEX)
    assert flex.passed
    if case.grad:
        assert "does not support backward on CPU" in flex.not_run
