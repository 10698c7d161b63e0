"""The C entry points of the gradients compute, or refuse with a code before they touch anything."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

import gradient_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import LIBRARY, OPS, Tensor

from torchhal.pointwise import Graph, capture
from torchhal_cpu_x86 import gradients, programs

pytestmark = pytest.mark.sanitized

P, I32, I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
UNTOUCHED = -77.0
B, HQ, HKV, L, S, E, EV = 1, 4, 2, 3, 5, 6, 4
HUGE = 2**63 - 1


class Function(ctypes.Structure):
    _fields_: ClassVar = [("words", P), ("count", I64), ("captured", P), ("captured_count", I64)]


class Contribution(ctypes.Structure):
    _fields_: ClassVar = [
        ("captured", I32),
        ("index", I32),
        ("value", I32),
        ("reserved", I32),
        ("offset", I64),
    ]


class Attention(ctypes.Structure):
    _fields_: ClassVar = [
        ("struct_size", ctypes.c_uint32), *((n, I32) for n in ("dtype", "isa", "is_causal", "mask_kind", "num_threads")),
        ("scale", ctypes.c_double), *((n, I64) for n in ("B", "Hq", "Hkv", "L", "S", "E", "Ev")),
        *((n, P) for n in ("q", "k", "v", "mask", "out", "lse")),
        *((n, I64 * 4) for n in ("q_stride", "k_stride", "v_stride", "mask_stride", "out_stride")), ("lse_stride", I64 * 3),
        *((n, P) for n in ("score_mod", "mask_mod", "blocks", "dropout", "ragged", "quantized", "workspace")), ("workspace_size", I64),
        ("parallel", P), ("parallel_user", P), ("max_scores", P),
    ]  # fmt: skip


class Gradients(ctypes.Structure):
    _fields_: ClassVar = [
        ("struct_size", ctypes.c_uint32), ("contribution_count", I32),
        *((n, P) for n in ("grad_out", "grad_lse", "grad_q", "grad_k", "grad_v")), ("grad_out_stride", I64 * 4),
        ("grad_lse_stride", I64 * 3), *((n, I64 * 4) for n in ("grad_q_stride", "grad_k_stride", "grad_v_stride")),
        ("words", P), ("word_count", I64), ("contributions", P), ("sums", P), ("sum_count", I64), ("mask_sum", I64),
        ("mask_sum_stride", I64 * 4),
    ]  # fmt: skip


_size = LIBRARY.library.thal_gradients_workspace
_size.argtypes, _size.restype = [P, P], I64
_run = LIBRARY.library.thal_gradients_run
_run.argtypes, _run.restype = [P, P], ctypes.c_int


def bias_of_each_pair(table: Tensor) -> cases.Function:
    return lambda s, b, h, q, k: torch.tanh(s) * 2.0 + table[h, k - q]


def graph() -> Graph:
    inputs = [("score", torch.float32), *((name, torch.int32) for name in ("b", "h", "q_idx", "kv_idx"))]
    return capture(bias_of_each_pair(torch.zeros(HQ, 9)), inputs).graph


SCORE = graph()
TOLD = gradients.Description.of_text(gradients.Description(True, *gradients._gradient_of(SCORE)).text())


class Call:
    """A call with a score_mod, a captured table and a mask, whose gradients are sums of HQ * 9 + L * S numbers.

    What it reads is random; what it writes is UNTOUCHED, with as much again behind it that nobody may write.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.query, self.key, self.value = randn(B, HQ, L, E), randn(B, HKV, S, E), randn(B, HKV, S, EV)
        self.mask, self.table = randn(L, S), randn(HQ, 9)
        main = (self.query, self.key, self.value)
        self.problem = cases.Problem(*main, self.mask, (self.table,), bias_of_each_pair)
        self.out, self.lse = (x.contiguous() for x in cases.attend(self.problem))
        self.above, self.lse_above = (x.contiguous() for x in cases.gradients_above(self.problem))
        self.found = [torch.full((2 * x.numel(),), UNTOUCHED) for x in main]
        self.sums = torch.full((2 * (HQ * 9 + L * S),), UNTOUCHED, dtype=torch.float64)
        self.kept: list[Any] = []
        self.contributions = (Contribution * len(TOLD.contributions))()
        for own, (captured, index, value) in zip(self.contributions, TOLD.contributions, strict=True):
            own.captured, own.index, own.value, own.offset = captured, index, value, L * S
        self.words = (I64 * (len(TOLD.words) + 1))(*TOLD.words)
        self.call, self.gradients = self.attention(), self.asked()

    def attention(self) -> Attention:
        words = programs.encode(SCORE)
        shape = [(I64 * 2)(*numbers) for numbers in (self.table.shape, self.table.stride())]
        table = programs.Captured(
            self.table.data_ptr(), programs.TYPES[torch.float32], 2, *map(ctypes.addressof, shape)
        )
        array = (I64 * len(words))(*words)
        mod = Function(ctypes.addressof(array), len(words), ctypes.addressof(table), 1)
        self.kept += [shape, table, array, mod]
        c = Attention(
            struct_size=ctypes.sizeof(Attention), isa=1, mask_kind=2, num_threads=1, scale=self.problem.scale
        )
        c.B, c.Hq, c.Hkv, c.L, c.S, c.E, c.Ev = B, HQ, HKV, L, S, E, EV
        for name in ("query", "key", "value", "mask", "out", "lse"):
            short = {"query": "q", "key": "k", "value": "v"}.get(name, name)
            tensor = getattr(self, name)
            setattr(c, short, tensor.data_ptr())
            stride = (0, 0, *tensor.stride()) if name == "mask" else tensor.stride()
            setattr(c, f"{short}_stride", type(getattr(c, f"{short}_stride"))(*stride))
        c.score_mod = ctypes.addressof(mod)
        return c

    def asked(self) -> Gradients:
        g = Gradients(struct_size=ctypes.sizeof(Gradients), contribution_count=len(self.contributions))
        g.grad_out, g.grad_lse = self.above.data_ptr(), self.lse_above.data_ptr()
        g.grad_out_stride, g.grad_lse_stride = (
            (I64 * 4)(*self.above.stride()),
            (I64 * 3)(*self.lse_above.stride()),
        )
        for name, found, like in zip("qkv", self.found, (self.query, self.key, self.value), strict=True):
            setattr(g, f"grad_{name}", found.data_ptr())
            setattr(g, f"grad_{name}_stride", (I64 * 4)(*like.stride()))
        g.words, g.word_count = ctypes.addressof(self.words), len(TOLD.words)
        g.contributions = ctypes.addressof(self.contributions)
        g.sums, g.sum_count = self.sums.data_ptr(), self.sums.numel() // 2
        g.mask_sum, g.mask_sum_stride = 0, (I64 * 4)(0, 0, S, 1)
        return g

    def run(self, workspace: int | None = None) -> int:
        """The code of thal_gradients_run, given ``workspace`` bytes or as many as it asks for."""
        needed: int = _size(ctypes.byref(self.call), ctypes.byref(self.gradients))
        if needed < 0:
            assert _run(ctypes.byref(self.call), ctypes.byref(self.gradients)) == -needed
            return -needed
        size = needed if workspace is None else workspace
        memory = torch.full((size + 64,), 99, dtype=torch.uint8)
        self.call.workspace, self.call.workspace_size = memory.data_ptr(), size
        code: int = _run(ctypes.byref(self.call), ctypes.byref(self.gradients))
        assert (memory[size:] == 99).all()
        return code

    def outside_is_untouched(self) -> bool:
        return all(bool((x[x.numel() // 2 :] == UNTOUCHED).all()) for x in (*self.found, self.sums))

    def is_untouched(self) -> bool:
        return all(bool((x == UNTOUCHED).all()) for x in (*self.found, self.sums))


def test_a_call_of_the_library_gives_the_gradients_of_the_oracle() -> None:
    call = Call()
    assert call.run() == 0 and call.outside_is_untouched()
    wide = call.problem.over([x.double() for x in call.problem.leaves])
    exact = cases.pulled_back(cases.attend, wide, [call.above, call.lse_above], "both")
    flat = [x[: x.numel() // 2] for x in call.found]
    sums = call.sums[: call.sums.numel() // 2]
    for found, expected in zip([*flat, sums[: L * S], sums[L * S :]], exact, strict=True):
        torch.testing.assert_close(found.double(), expected.flatten(), rtol=1e-5, atol=1e-5)


def fields(which: str, **values: Any) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        for name, value in values.items():
            setattr(getattr(call, which), name, value)

    return change


def contribution(**values: int) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        for name, value in values.items():
            setattr(call.contributions[0], name, value)

    return change


STRUCT, SIZE, POINTER, WORKSPACE, THREADS, PROGRAM = 1, 4, 5, 6, 7, 10
REFUSED: list[tuple[Callable[[Call], None], int]] = [
    *((fields(which, struct_size=size), STRUCT) for which in ("call", "gradients") for size in (0, 8, 2**32 - 1)),
    *((fields("call", **{name: -1}), SIZE) for name in ("B", "Hq", "Hkv", "L", "S", "E", "Ev")),
    (fields("call", num_threads=0), THREADS),
    (fields("call", num_threads=2), THREADS),
    *((fields("gradients", **{name: -1}), SIZE) for name in ("contribution_count", "sum_count")),
    *((fields("call", **{name: None}), POINTER) for name in ("q", "k", "v", "out", "lse", "mask")),
    *((fields("gradients", **{name: None}), POINTER) for name in ("grad_out", "grad_q", "grad_k", "grad_v", "sums")),
    (fields("gradients", contributions=None), SIZE),
    (fields("gradients", words=None), PROGRAM),
    *((fields("gradients", word_count=count), PROGRAM) for count in (-1, 0, 5, len(TOLD.words) - 1, len(TOLD.words) + 1)),
    (fields("call", score_mod=None), PROGRAM),
    *((contribution(captured=place), PROGRAM) for place in (-1, 1, 2**31 - 1)),
    *((contribution(index=place), PROGRAM) for place in (-1, 0, 99, 2**31 - 1)),
    *((contribution(value=place), PROGRAM) for place in (-1, TOLD.contributions[0][1], 99, 2**31 - 1)),
    *((contribution(offset=place), PROGRAM) for place in (-1, L * S + 1, HUGE)),
    (fields("gradients", sum_count=0), PROGRAM),
    (fields("gradients", sum_count=L * S + HQ * 9 - 1), PROGRAM),
    *((fields("gradients", mask_sum=place), SIZE) for place in (HQ * 9 + 1, HUGE)),
    (fields("gradients", mask_sum_stride=(I64 * 4)(0, 0, S, -1)), SIZE),
    (fields("gradients", mask_sum_stride=(I64 * 4)(0, 0, HUGE, HUGE)), SIZE),
    (fields("gradients", mask_sum_stride=(I64 * 4)(0, 2**62, 0, 0)), SIZE),
    (fields("call", mask_kind=0), SIZE),
    (fields("call", mask_kind=1), SIZE),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_refused_by_code_before_anything_is_written(
    change: Callable[[Call], None], code: int
) -> None:
    call = Call()
    change(call)
    assert call.run() == code and call.is_untouched()


def test_a_workspace_that_is_missing_or_small_is_refused() -> None:
    call = Call()
    needed = _size(ctypes.byref(call.call), ctypes.byref(call.gradients))
    for size in (0, 1, needed - 1):
        assert call.run(size) == WORKSPACE and call.is_untouched()
    call.call.workspace, call.call.workspace_size = None, needed
    assert _run(ctypes.byref(call.call), ctypes.byref(call.gradients)) == WORKSPACE and call.is_untouched()


def test_no_call_at_all_is_refused() -> None:
    call = Call()
    for given_call, asked in ((None, ctypes.byref(call.gradients)), (ctypes.byref(call.call), None)):
        assert _size(given_call, asked) == -POINTER
        assert _run(given_call, asked) == POINTER


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(-(2**63), HUGE) | st.integers(-3, 90)), max_size=4),
    st.integers(0, len(TOLD.words)) | st.just(len(TOLD.words)),
    st.lists(
        st.tuples(
            st.sampled_from(["captured", "index", "value"]),
            st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 6),
        ),
        max_size=2,
    ),
    st.integers(-(2**63), HUGE) | st.integers(0, L * S + 1),
)
def test_damaged_words_and_contributions_are_refused_or_stay_inside_what_they_were_given(
    changes: list[tuple[int, int]], count: int, moved: list[tuple[str, int]], offset: int
) -> None:
    """tools/sanitize.py runs this too."""
    call = Call()
    for place, word in changes:
        call.words[place % len(TOLD.words)] = word
    for name, value in moved:
        setattr(call.contributions[0], name, value)
    call.contributions[0].offset = offset
    call.gradients.word_count = count
    code = call.run()
    assert code in (0, PROGRAM)
    assert call.outside_is_untouched() if code == 0 else call.is_untouched()


@settings(max_examples=80, deadline=None)
@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(st.integers(-(2**63), HUGE) | st.integers(-2, 3), max_size=30).map(
            lambda words: " ".join(map(str, words))
        ),
        st.tuples(
            st.sampled_from(["1 0 ", "0 1 ", "1 1 0 0 0 "]), st.lists(st.integers(-2, 40), max_size=12)
        ).map(lambda parts: parts[0] + " ".join(map(str, parts[1]))),
    )
)
def test_texts_that_describe_no_gradient_are_refused(text: str) -> None:
    call = Call()
    description = f"0 0 1 1 0 0 1 1 1 -1 0 0 0 {len(programs.encode(SCORE))} {' '.join(map(str, programs.encode(SCORE)))} 0"
    operands = [call.mask, call.table]
    try:
        OPS.attention_backward(
            call.query, call.key, call.value, operands, description, 0.3, text, call.above, call.lse_above, call.out,
            call.lse,
        )  # fmt: skip
    except RuntimeError as error:
        assert "torchhal_cpu_x86::attention_backward" in str(error)
