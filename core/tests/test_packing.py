"""Packed int8 and int4 weights: the error is half a step, the layout is as documented, bad weights are refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchhal.errors import InvalidProblem
from torchhal.operands import PackedWeight
from torchhal.reference.packing import pack_weight, unpack

settings.register_profile("packing", max_examples=25, deadline=None)
few = settings(settings.get_profile("packing"))

schemes = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([8, 4]),
        "group": st.sampled_from([None, 32, 64, 128]),
        "symmetric": st.booleans(),
    }
)
shapes = st.tuples(st.integers(0, 140), st.integers(0, 9))


def random_weight(shape: tuple[int, int], seed: int, spread: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    return (values + spread * torch.randn(shape[1], generator=generator, dtype=torch.float64)).to(dtype)


def steps(packed: PackedWeight) -> torch.Tensor:
    rows = [packed.scale[k // packed.group] for k in range(packed.shape[0])]
    return torch.stack(rows).double() if rows else torch.zeros(packed.shape, dtype=torch.float64)


@few
@given(
    shape=shapes, scheme=schemes, seed=st.integers(0, 2**30), spread=st.sampled_from([1e-42, 1e-6, 1.0, 1e30])
)
def test_every_element_is_within_half_a_step(
    shape: tuple[int, int], scheme: Any, seed: int, spread: float
) -> None:
    weight = random_weight(shape, seed, spread, torch.float32)
    packed = pack_weight(weight, **scheme)
    error = (unpack(packed, torch.float64) - weight.double()).abs()
    assert bool((error <= steps(packed) * 0.5001).all())


@few
@given(
    shape=shapes,
    scheme=schemes,
    seed=st.integers(0, 2**30),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float64]),
)
def test_other_types_add_only_their_own_rounding(
    shape: tuple[int, int], scheme: Any, seed: int, dtype: torch.dtype
) -> None:
    weight = random_weight(shape, seed, 1.0, dtype)
    packed = pack_weight(weight, **scheme)
    assert unpack(packed).dtype == dtype
    error = (unpack(packed).double() - weight.double()).abs()
    assert bool(
        (error <= steps(packed) * 0.5001 + weight.double().abs() * torch.finfo(dtype).eps + 1e-7).all()
    )


@few
@given(shape=shapes, scheme=schemes, seed=st.integers(0, 2**30))
def test_the_documented_formula_gives_each_element(shape: tuple[int, int], scheme: Any, seed: int) -> None:
    packed = pack_weight(random_weight(shape, seed, 1.0, torch.float32), **scheme)
    unpacked = unpack(packed)
    for k in range(0, shape[0], 7):
        for n in range(shape[1]):
            g = k // packed.group
            byte = int(packed.data[k, n] if packed.bits == 8 else packed.data[k // 2, n])
            q = byte if packed.bits == 8 else ((byte >> 4 if k % 2 else byte & 15) - 8)
            zero = 0.0 if packed.zero is None else float(packed.zero[g, n])
            assert float(unpacked[k, n]) == float(torch.tensor(q - zero) * packed.scale[g, n])


@few
@given(shape=shapes, scheme=schemes, seed=st.integers(0, 2**30))
def test_a_transposed_weight_packs_like_its_transpose(shape: tuple[int, int], scheme: Any, seed: int) -> None:
    weight = random_weight(shape, seed, 1.0, torch.float32)
    plain, transposed = (
        pack_weight(weight, **scheme),
        pack_weight(weight.t().contiguous(), transposed=True, **scheme),
    )
    assert torch.equal(plain.data, transposed.data) and torch.equal(plain.scale, transposed.scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.5e-3])
def test_a_constant_column_is_exact_to_an_ulp(value: float, bits: int, symmetric: bool) -> None:
    weight = torch.full((33, 2), value)
    torch.testing.assert_close(
        unpack(pack_weight(weight, bits=bits, symmetric=symmetric)), weight, rtol=3e-7, atol=0
    )


def test_zero_stays_exactly_zero_in_an_asymmetric_column() -> None:
    weight = torch.tensor([[0.0, 5.0], [0.1, 0.0], [3.3, 7.7]])
    unpacked = unpack(pack_weight(weight, bits=4, symmetric=False))
    assert float(unpacked[0, 0]) == 0.0 and float(unpacked[1, 1]) == 0.0


def test_the_largest_float_survives() -> None:
    largest = torch.finfo(torch.float32).max
    assert bool(torch.isfinite(unpack(pack_weight(torch.tensor([[largest], [-largest]])))).all())


def test_an_odd_number_of_rows_pads_one_int4() -> None:
    packed = pack_weight(torch.randn(5, 3), bits=4)
    assert packed.data.shape == (3, 3) and bool((packed.data[2] >> 4 == 8).all())
    assert unpack(packed).shape == (5, 3)


def test_a_group_longer_than_the_column_is_the_column() -> None:
    packed = pack_weight(torch.randn(40, 3), group=64)
    assert packed.group == 40 and packed.scheme == "int8:group=channel:symmetric"
    assert (
        pack_weight(torch.randn(65, 3), bits=4, group=64, symmetric=False).scheme
        == "int4:group=64:asymmetric"
    )


def test_a_weight_that_learns_is_packed_by_value() -> None:
    packed = pack_weight(torch.randn(4, 3, requires_grad=True))
    assert not packed.scale.requires_grad


@pytest.mark.parametrize("symmetric", [True, False])
def test_state_survives_a_weights_only_checkpoint(symmetric: bool) -> None:
    packed = pack_weight(torch.randn(37, 5, dtype=torch.bfloat16), bits=4, group=32, symmetric=symmetric)
    buffer = io.BytesIO()
    torch.save(packed.state(), buffer)
    buffer.seek(0)
    restored = PackedWeight.from_state(torch.load(buffer, weights_only=True))
    assert (
        restored.scheme == packed.scheme and restored.shape == packed.shape and restored.dtype == packed.dtype
    )
    assert torch.equal(unpack(restored), unpack(packed))


def test_to_moves_every_tensor() -> None:
    moved = pack_weight(torch.randn(4, 3), symmetric=False).to("meta")
    assert moved.device.type == "meta" and moved.zero is not None and moved.zero.device.type == "meta"


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (
            torch.randn(3),
            {},
            r"expects a matrix, \(K, N\) or with transposed=True \(N, K\); got shape \(3,\)",
        ),
        ([[1.0]], {}, "expects a matrix.*got list"),
        (torch.ones(2, 2, dtype=torch.int8), {}, "expects a floating weight; got torch.int8"),
        (torch.ones(2, 2), {"bits": 2}, "bits=8 or bits=4; got bits=2"),
        (torch.ones(2, 2), {"group": 48}, r"one of \(None, 32, 64, 128\).*got group=48"),
        (
            torch.tensor([[1.0, 2.0], [3.0, float("nan")]]),
            {},
            r"finite values; the weight has nan at \(1, 1\)",
        ),
        (torch.tensor([[float("-inf")]]), {}, r"has -inf at \(0, 0\)"),
        (
            torch.tensor([[1e300]], dtype=torch.float64),
            {},
            "float32, which the largest values of this weight exceed",
        ),
    ],
)
def test_a_weight_that_can_not_be_packed_is_refused(
    weight: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidProblem, match=message):
        pack_weight(weight, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "8 or 4 bits; got bits=5"),
        ({"group": 0}, "positive number of rows; got 0"),
        ({"dtype": "int32"}, "dequantises to a floating type; got torch.int32"),
        ({"dtype": "float33"}, "names a torch dtype; got 'float33'"),
        (
            {"shape": [4, 4]},
            r"'data' of a packed int8 weight of shape \(4, 4\).*must be \(4, 4\) torch.int8.*got \(4, 3\)",
        ),
        ({"scale": torch.ones(2, 3)}, r"'scale' of a packed.*must be \(1, 3\).*got \(2, 3\)"),
        (
            {"zero": torch.ones(1, 3, dtype=torch.int8)},
            r"'zero' of a packed.*torch.float32.*got \(1, 3\) torch.int8",
        ),
        ({"other": 1}, "has the entries.*got.*'other'"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change: dict[str, Any], message: str) -> None:
    state = {**pack_weight(torch.randn(4, 3)).state(), **change}
    with pytest.raises(InvalidProblem, match=message):
        PackedWeight.from_state(state)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 32])
def test_packed_tensors_lie_as_backends_read_them_whatever_way_the_weight_lay(
    bits: int, symmetric: bool, group: int | None
) -> None:
    packed = pack_weight(torch.randn(8, 64), bits=bits, symmetric=symmetric, group=group, transposed=True)
    assert all(value.is_contiguous() for value in packed.state().values() if isinstance(value, torch.Tensor))
