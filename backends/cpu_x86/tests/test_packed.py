"""Native products with packed weights against float64 sums of what the weights stand for: schemes, sizes, functions, refusals."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import LIBRARY, SETS, Tensor, threads
from test_matmul import Call, instruction_set, multiply

import torchhal
from torchhal.operands import GGUFWeight, Packed, PackedWeight
from torchhal.products.packed import Operand
from torchhal.products.product import NO_FUNCTIONS
from torchhal.reference.packing import unpack
from torchhal_cpu_x86 import products
from torchhal_cpu_x86.packed import SCHEMES, description

BLOCKS = {"q4_0": 18, "q4_1": 20, "q8_0": 34}


def blocks(kind: str, inner: int, columns: int, seed: int) -> GGUFWeight:
    if not inner or not columns:
        return torchhal.gguf_weight(torch.empty(columns, inner // 32 * BLOCKS[kind], dtype=torch.uint8), kind)
    random = torch.Generator().manual_seed(seed)
    numbers = 2 if kind == "q4_1" else 1
    shape = (columns, inner // 32)
    head = (torch.randn(*shape, numbers, generator=random) / 8).to(torch.float16).view(torch.uint8)
    quants = torch.randint(0, 256, (*shape, BLOCKS[kind] - 2 * numbers), generator=random, dtype=torch.uint8)
    return torchhal.gguf_weight(torch.cat((head, quants), -1).reshape(columns, -1), kind)


def quants(bits: int, group: int, symmetric: bool, inner: int, columns: int, seed: int) -> PackedWeight:
    """Groups of any length, as :class:`PackedWeight` allows them."""
    random = torch.Generator().manual_seed(seed)
    groups, lines = -(-inner // group), inner if bits == 8 else -(-inner // 2)
    data = torch.randint(0, 256, (lines, columns), generator=random, dtype=torch.uint8)
    if bits == 4 and inner % 2:
        data[-1] = data[-1] & 15 | 0x80
    scale = torch.rand(groups, columns, generator=random) / 8 + 0.01
    zero = None if symmetric else torch.randint(-8, 8, (groups, columns), generator=random).float()
    stored = data.view(torch.int8) if bits == 8 else data
    return PackedWeight(stored, scale, zero, bits, group, (inner, columns), torch.float32)


@st.composite
def weights(draw: Any, inner: Any, columns: Any) -> Packed:
    seed, count = draw(st.integers(0, 1000)), draw(columns)
    if draw(st.booleans()):
        return blocks(draw(st.sampled_from(sorted(BLOCKS))), draw(inner) // 32 * 32, count, seed)
    length = draw(inner)
    group = draw(st.sampled_from([max(length, 1), 32, 64, 128, 6, 5]))
    return quants(draw(st.sampled_from([8, 4])), group, draw(st.booleans()), length, count, seed)


def assert_close(found: Tensor, a: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """Within what rounding may do: of each element, each product, each partial sum and the result."""
    exact, size = (
        a.double() @ dense,
        a.double().abs() @ (dense.abs() + dense.abs().amax(0, keepdim=True) if len(dense) else dense),
    )
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = size * 2.0**-23 * 40 + exact.abs() * torch.finfo(found.dtype).eps + 1e-30
    assert found.shape == exact.shape and bool(((found.double() - exact).abs() <= allowed).all())


lengths = st.one_of(st.integers(0, 100), st.sampled_from([128, 130, 256, 257, 600, 1100]))
columns = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 130, 200]))


@pytest.mark.sanitized
@settings(max_examples=150, deadline=None)
@given(
    weight=weights(lengths, columns),
    rows=st.one_of(st.integers(0, 6), st.sampled_from([16, 17, 50])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    isa=st.sampled_from(SETS),
    biased=st.booleans(),
    apart=st.booleans(),
)
def test_products_are_those_of_the_dequantised_weight(
    weight: Packed, rows: int, dtype: torch.dtype, isa: str, biased: bool, apart: bool
) -> None:
    inner, count = weight.shape
    a = torch.randn(rows, 2 * inner, generator=torch.Generator().manual_seed(rows)).to(dtype)
    a = a[:, ::2] if apart else a[:, :inner]
    bias = torch.randn(count).to(dtype) if biased else None
    with instruction_set(isa):
        found = multiply(a, weight, bias=bias, out_dtype=torch.float32)
    assert_close(found, a, unpack(weight, torch.float64), bias)


@pytest.mark.sanitized
@settings(max_examples=20, deadline=None)
@given(
    weight=weights(st.integers(0, 70), st.integers(0, 40)), rows=st.integers(0, 5), isa=st.sampled_from(SETS)
)
def test_float64_products_take_elements_in_float64(weight: Packed, rows: int, isa: str) -> None:
    a = torch.randn(rows, weight.shape[0], dtype=torch.float64)
    with instruction_set(isa):
        found = multiply(a, weight)
    torch.testing.assert_close(found, a @ unpack(weight, torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("kind", ["int8", "int4", "q4_1"])
def test_the_number_of_threads_changes_no_bit(kind: str, rows: int) -> None:
    weight = (
        blocks(kind, 1024, 1030, 0) if kind in BLOCKS else quants(int(kind[3:]), 128, False, 1024, 1030, 0)
    )
    a, scale = torch.randn(rows, 1024), torch.rand(1024)

    def found() -> Tensor:
        return multiply(  # type: ignore[no-any-return]
            a, weight, a_prologue=lambda v, i, m, k: v * scale[k], epilogue=torch.nn.functional.gelu
        )

    with threads(1):
        alone = found()
    assert torch.equal(found(), alone)


@pytest.mark.sanitized
@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_functions_see_the_indices_and_values_of_a_dense_product(rows: int, batch: tuple[int, ...]) -> None:
    a, shift, scale = torch.randn(*batch, rows, 96), torch.randn(rows, 70), torch.rand(96, 70)
    weight = blocks("q4_0", 96, 70, 0)
    dense = unpack(weight, torch.float64)
    left, both = multiply(
        a, weight, a_prologue=lambda v, i, m, k: v + m - i,
        epilogue=lambda v, i, m, n: (v * 2 + shift[m, n], torch.relu(v) + 10 * i),
    )  # fmt: skip
    i = torch.arange(len(a) if batch else 1)[:, None, None] if batch else 0
    z = (a + torch.arange(rows)[:, None] - i).double() @ dense
    torch.testing.assert_close(left.double(), z * 2 + shift, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(both.double(), z.relu() + 10 * i, rtol=1e-4, atol=1e-3)
    found = multiply(a, weight, b_prologue=lambda v, i, k, n: v * scale[k, n])
    torch.testing.assert_close(found.double(), a.double() @ (dense * scale), rtol=1e-4, atol=1e-4)


@pytest.mark.sanitized
@pytest.mark.parametrize("kind", ["int8", "int4", "q4_0", "q8_0"])
def test_gradients_reach_the_other_operand_and_the_bias(kind: str) -> None:
    weight = blocks(kind, 96, 70, 1) if kind in BLOCKS else quants(int(kind[3:]), 32, False, 96, 70, 1)
    scale = torch.rand(70)
    dense = unpack(weight, torch.float64) * scale
    a, bias = torch.randn(5, 96, requires_grad=True), torch.randn(70, requires_grad=True)
    out = multiply(a, weight, bias=bias, b_prologue=lambda v, i, k, n: v * scale[n], epilogue=torch.tanh)
    above = torch.randn_like(out)
    found = torch.autograd.grad(out, (a, bias), above)
    dz = above.double() * (1 - (a.double() @ dense + bias.double()).tanh() ** 2)
    for gradient, exact in zip(found, (dz @ dense.T, dz.sum(0)), strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_gradient_as_large_as_the_weight_is_declined() -> None:
    scale = torch.rand(70, requires_grad=True)
    route = torchhal.explain(
        torchhal.matmul,
        torch.randn(3, 96),
        blocks("q4_0", 96, 70, 0),
        b_prologue=lambda v, i, k, n: v * scale[n],
    )
    assert route.chosen == "reference" and "packed_prologue_gradient" in str(route)


def test_no_dequantised_copy_is_made() -> None:
    weight, a = quants(4, 128, True, 4096, 4096, 0), torch.randn(64, 4096)
    multiply(a, weight)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # what is held now becomes the most
    before = peak()
    multiply(a, weight)
    assert peak() - before < 48 << 20  # a float32 copy has 64 MB; panels in use at once, 16 MB


def peak() -> int:
    """Bytes that this process has held at most, in Linux's words."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def test_a_weight_with_other_strides_is_read_as_it_is() -> None:
    weight = quants(8, 32, False, 64, 50, 0)
    spread = {
        name: value.mT.contiguous().mT if isinstance(value, Tensor) else value
        for name, value in weight.state().items()
    }
    a = torch.randn(2, 64)
    assert torch.equal(multiply(a, PackedWeight.from_state(spread)), multiply(a, weight))


# ---------------------------------------------------------------------------- the C interface


class Weight(ctypes.Structure):
    """``thal_packed``, field by field."""

    _fields_ = (
        ("scheme", ctypes.c_int32), ("transposed", ctypes.c_int32), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64), ("data", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("zero", ctypes.c_void_p),
    )  # fmt: skip


def run_changed(scheme: str, changes: dict[str, Any]) -> int:
    """The code of a good call of 3 x 64 by 64 x 5 after ``changes`` to the weight."""
    seen: list[bytes] = []
    weight = blocks(scheme, 64, 5, 0) if scheme in BLOCKS else quants(int(scheme[3:]), 32, False, 64, 5, 0)
    a, good = torch.randn(3, 64), LIBRARY.matmul
    try:
        LIBRARY.matmul = seen.append  # type: ignore[method-assign, assignment]
        products.multiply(a, Operand(weight), None, NO_FUNCTIONS, (torch.float32,))
    finally:
        LIBRARY.matmul = good  # type: ignore[method-assign]
    call, out, types = Call.from_buffer_copy(seen[0]), torch.empty(3, 5), (ctypes.c_int32 * 1)(1)
    words = description(Operand(weight))
    packed = Weight.from_buffer_copy(words.tobytes())
    pointers = (ctypes.c_void_p * 1)(out.data_ptr())
    call.out, call.out_types, call.packed = map(ctypes.addressof, (pointers, types, packed))
    for name, value in changes.items():
        setattr(packed, name, value)
    return int(LIBRARY.library.thal_matmul_run(bytes(call)))


@pytest.mark.sanitized
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_wrong_weight_is_refused_before_anything_is_read(scheme: str) -> None:
    in_rows = scheme not in BLOCKS
    assert run_changed(scheme, {}) == 0
    for wrong in (-1, 5, 1 << 30):
        assert run_changed(scheme, {"scheme": wrong}) == 2
    for changes in ({"rows": 32}, {"rows": -64}, {"columns": 6}, {"transposed": 1}):
        assert run_changed(scheme, changes) == 4
    assert run_changed(scheme, {"data": None}) == 5
    assert run_changed(scheme, {"scale": None}) == (5 if in_rows else 0)
    assert run_changed(scheme, {"group": 0}) == (4 if in_rows else 0)
    assert run_changed(scheme, {"zero": None}) == 0
