"""Blocks of GGUF files as weights: each byte is read as the format says, and what is no such block is refused."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchhal
from torchhal.errors import InvalidProblem
from torchhal.matmul import Call, build_problem
from torchhal.operands import GGUFWeight, PackedWeight, packed_from_state
from torchhal.reference.packing import unpack

few = settings(max_examples=25, deadline=None)
SIZES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
kinds = st.sampled_from(sorted(SIZES))


def random_blocks(kind: str, blocks: int, columns: int, seed: int) -> torch.Tensor:
    """Random bytes, with scales that are finite."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (columns, blocks, SIZES[kind]), generator=generator, dtype=torch.uint8)
    data[:, :, 1:4:2] &= 0xBF  # of the exponents' highest bits, that only NaN and infinity need
    if kind != "q4_1":
        data[:, :, 3] = torch.randint(0, 256, (columns, blocks), generator=generator, dtype=torch.uint8)
    return data.reshape(columns, blocks * SIZES[kind])


def decoded(kind: str, row: bytes) -> list[float]:
    """The elements of a row, byte by byte."""
    found: list[float] = []
    for start in range(0, len(row), SIZES[kind]):
        block = row[start : start + SIZES[kind]]
        if kind == "q8_0":
            scale, *quants = struct.unpack("<e32b", block)
            found += [scale * q for q in quants]
            continue
        if kind == "q4_0":
            scale, *stored = struct.unpack("<e16B", block)
            low = -8 * scale
        else:
            scale, low, *stored = struct.unpack("<ee16B", block)
        found += [scale * (byte % 16) + low for byte in stored]
        found += [scale * (byte // 16) + low for byte in stored]
    return found


@few
@given(kind=kinds, blocks=st.integers(0, 4), columns=st.integers(0, 5), seed=st.integers(0, 2**30))
def test_every_element_is_what_its_bytes_say(kind: str, blocks: int, columns: int, seed: int) -> None:
    data = random_blocks(kind, blocks, columns, seed)
    weight = torchhal.gguf_weight(data, kind)
    assert weight.shape == (32 * blocks, columns) and weight.scheme == f"gguf:{kind}"
    rows = [decoded(kind, bytes(row.tolist())) for row in data]
    exact = torch.tensor(rows, dtype=torch.float64).reshape(columns, 32 * blocks).t()
    assert torch.equal(unpack(weight, torch.float64), exact)
    # d * q + m is rounded twice, each time by half an ulp of what may cancel.
    bound = (exact.abs() + 16 * exact.abs().amax(0, keepdim=True) if blocks else exact.abs()) * 2.0**-23
    assert bool(((unpack(weight).double() - exact).abs() <= bound).all())


@few
@given(kind=kinds, seed=st.integers(0, 2**30), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_product_is_that_of_the_dequantised_values(kind: str, seed: int, dtype: torch.dtype) -> None:
    weight = torchhal.gguf_weight(random_blocks(kind, 2, 7, seed), kind, dtype=dtype)
    a = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    out = torchhal.matmul(a, weight, out_dtype=torch.float32, backend="reference")
    exact = a.double() @ unpack(weight, torch.float64)
    size = a.double().abs() @ unpack(weight, torch.float64).abs()
    assert isinstance(out, torch.Tensor) and out.shape == (3, 7)
    assert bool(((out.double() - exact).abs() <= size * 1e-5).all())


def test_a_narrow_type_is_the_products_and_never_the_elements() -> None:
    data = torch.zeros(1, 34, dtype=torch.uint8)
    data[0, :2] = torch.tensor(list(struct.pack("<e", 1 + 2.0**-10)), dtype=torch.uint8)
    data[0, 2] = 127
    weight = torchhal.gguf_weight(data, "q8_0", dtype=torch.bfloat16)
    a = torch.zeros(1, 32, dtype=torch.bfloat16)
    a[0, 0] = 1
    assert torchhal.matmul(a, weight, backend="reference").dtype == torch.bfloat16  # type: ignore[union-attr]
    wide = torchhal.matmul(a, weight, out_dtype=torch.float32, backend="reference")
    assert float(wide) == 127 * (1 + 2.0**-10)  # type: ignore[arg-type]


def test_the_problem_names_the_kind_and_its_feature() -> None:
    weight = torchhal.gguf_weight(random_blocks("q4_1", 1, 3, 0), "q4_1")
    problem = build_problem(Call(torch.randn(2, 32), weight))
    assert problem.packing == "gguf:q4_1" and problem.features == {"packed_gguf"}


def test_memory_is_shared_unless_it_may_not_be_written_to() -> None:
    data = random_blocks("q4_0", 2, 3, 0)
    assert torchhal.gguf_weight(data, "q4_0").data.data_ptr() == data.data_ptr()
    array = data.numpy()
    assert torchhal.gguf_weight(array, "q4_0").data.data_ptr() == data.data_ptr()
    array.flags.writeable = False
    copied = torchhal.gguf_weight(array, "q4_0").data
    assert copied.data_ptr() != data.data_ptr() and torch.equal(copied, data)


@pytest.mark.parametrize("packed", ["gguf", "int4", "int8"])
def test_tensors_and_the_rest_of_a_state_come_back_from_a_module(packed: str) -> None:
    if packed == "gguf":
        weight: Any = torchhal.gguf_weight(random_blocks("q4_1", 2, 3, 1), "q4_1", dtype=torch.bfloat16)
    else:
        weight = torchhal.pack_weight(torch.randn(37, 5), bits=int(packed[3:]), group=32)

    class Holder(torch.nn.Module):
        """What a module that keeps a packed weight does."""

        def __init__(self, state: dict[str, Any]) -> None:
            super().__init__()
            self.rest = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
            for name in state.keys() - self.rest.keys():
                self.register_buffer(name, torch.empty_like(state[name]))

        def get_extra_state(self) -> dict[str, Any]:
            return self.rest

        def set_extra_state(self, state: dict[str, Any]) -> None:
            self.rest = state

    first, second = Holder(weight.state()), Holder(weight.state())
    first.load_state_dict(weight.state() | {"_extra_state": first.rest}, strict=False)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    back = packed_from_state({**dict(second.named_buffers()), **second.rest})
    assert type(back) is type(weight) and back.scheme == weight.scheme and back.dtype == weight.dtype
    assert torch.equal(unpack(back), unpack(weight))


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_state_survives_a_weights_only_checkpoint(kind: str) -> None:
    weight = torchhal.gguf_weight(random_blocks(kind, 2, 3, 2), kind, dtype=torch.float16)
    buffer = io.BytesIO()
    torch.save(weight.state(), buffer)
    buffer.seek(0)
    back = GGUFWeight.from_state(torch.load(buffer, weights_only=True))
    assert (back.kind, back.dtype, back.shape) == (kind, torch.float16, (64, 3))
    assert torch.equal(back.data, weight.data)


def test_to_moves_the_blocks() -> None:
    moved = torchhal.gguf_weight(random_blocks("q8_0", 1, 2, 0), "q8_0").to("meta")
    assert moved.device.type == "meta" and moved.shape == (32, 2)


def test_a_compiled_product_keeps_the_blocks() -> None:
    weight = torchhal.gguf_weight(random_blocks("q4_0", 1, 3, 0), "q4_0")
    a = torch.randn(2, 32)
    product = torch.compile(
        lambda x: torchhal.matmul(x, weight, backend="reference"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(product(a), torchhal.matmul(a, weight, backend="reference"))


GOOD = torch.zeros(3, 36, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("data", "kind", "options", "message"),
    [
        (GOOD, "q6_k", {}, r"one of q4_0, q4_1, q8_0; got 'q6_k': dequantise other kinds and pass a tensor"),
        (GOOD, "Q4_0", {}, r"one of q4_0, q4_1, q8_0; got 'Q4_0'"),
        (GOOD, "q4_1", {}, r"'data' of a q4_1 weight.*rows of whole blocks of 20 bytes; got \(3, 36\) torch.uint8"),
        (GOOD[0], "q4_0", {}, r"must be \(N, bytes of a row\).*got \(36,\) torch.uint8"),
        (GOOD.to(torch.int8), "q4_0", {}, r"torch.uint8.*got \(3, 36\) torch.int8"),
        (GOOD.float().numpy(), "q4_0", {}, "uint8 tensor or numpy array.*got ndarray float32"),
        ([[0]], "q4_0", {}, r"uint8 tensor or numpy array \(N, bytes of a row\); got list"),
        (GOOD, "q4_0", {"dtype": torch.int32}, "dequantises to a floating type; got torch.int32"),
        (GOOD, "q4_0", {"dtype": "float32"}, "dequantises to a floating type; got float32"),
    ],
)  # fmt: skip
def test_what_is_no_such_block_is_refused(
    data: Any, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidProblem, match=message):
        torchhal.gguf_weight(data, kind, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other": 1}, r"entries \['data', 'dtype', 'kind'\]; got.*'other'"),
        ({"dtype": "float33"}, "names a torch dtype; got 'float33'"),
        ({"kind": "q4_1"}, "whole blocks of 20 bytes"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change: dict[str, Any], message: str) -> None:
    state = {**torchhal.gguf_weight(GOOD, "q4_0").state(), **change}
    with pytest.raises(InvalidProblem, match=message):
        packed_from_state(state)


def test_a_wrong_length_names_the_packed_weight() -> None:
    with pytest.raises(InvalidProblem, match="rows of 4 elements and packed weight b.*columns of 64"):
        torchhal.matmul(torch.randn(2, 4), torchhal.gguf_weight(GOOD, "q4_0"))
    with pytest.raises(InvalidProblem, match="got GGUFWeight; only b may be a packed weight"):
        torchhal.matmul(torchhal.gguf_weight(GOOD, "q4_0"), torch.randn(3, 2))  # type: ignore[arg-type]


def test_a_packed_state_is_told_from_blocks() -> None:
    assert isinstance(packed_from_state(torchhal.pack_weight(torch.randn(4, 3)).state()), PackedWeight)
