"""A PagedKVCache that quantises: what is stored for a token, that its scales go where it goes, and what is refused."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from attention_calls import INF, NAN
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cache_support import EV, HEADS, E, assert_append_breaks_off, cache, contents, state, tokens
from test_paged_cache import Life, live
from torch import Tensor

import torchhal
from torchhal.errors import InvalidProblem

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
KINDS = (INT8, FLOAT8)
LARGEST = {INT8: 127.0, FLOAT8: 448.0}
ONES = torch.ones(HEADS)

# ---------------------------------------------------------------------------- in pages


class Exact(Life):
    """Of tokens that quantisation does not change: stored numbers over 32 or 128, the largest of them in each row."""

    options: ClassVar[dict[str, Any]] = {"kv_dtype": INT8}
    step = 1.0
    scale = 1 / 32

    def new(self, length: int) -> tuple[Tensor, Tensor]:
        largest, made = LARGEST[self.options["kv_dtype"]], []
        for drawn in super().new(length):
            rows = (torch.round(drawn / self.scale / self.step) * self.step).clamp(-largest, largest)
            rows[..., -1] = torch.copysign(torch.tensor(largest), drawn[..., -1])
            made.append(rows * self.scale)
        return made[0], made[1]


class ExactFloat8(Exact):
    options: ClassVar[dict[str, Any]] = {"kv_dtype": FLOAT8}
    step = 32.0  # which divides every number of float8 from 256 on
    scale = 1 / 128


class ExactUnderGivenScales(Exact):
    options: ClassVar[dict[str, Any]] = {"kv_dtype": INT8, "key_scale": ONES / 32, "value_scale": ONES / 32}


@pytest.mark.parametrize("kind", [Exact, ExactFloat8, ExactUnderGivenScales])
def test_a_quantised_cache_agrees_with_a_plain_list_of_tokens_whatever_is_asked_of_it(
    kind: type[Life],
) -> None:
    live("reference", 3, kind)


def test_a_native_backend_reads_a_quantised_cache_as_the_specification_does(native: None) -> None:
    live("cpu_x86", 2, Exact)
    live("cpu_x86", 2, ExactFloat8)


@pytest.mark.parametrize("pool", ["key_scale", "value_scale"])
@pytest.mark.parametrize("fails", [0, 1], ids=["copy of a page", "write of tokens"])
def test_an_append_that_breaks_off_at_a_scale_leaves_everything_as_it_was(pool: str, fails: int) -> None:
    held = cache(kv_dtype=INT8)
    longer = held.allocate(*tokens(1, 7))
    both = [longer, held.fork(longer, 5)]
    assert_append_breaks_off(held, both, pool, fails)


# ---------------------------------------------------------------------------- what is stored


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    size=st.sampled_from([1e-44, 1e-38, 1e-30, 1e-3, 1.0, 3e3, 1e30, 1e38]),
    seed=st.integers(0, 2**31),
)
def test_a_token_is_off_by_half_a_step_of_its_own_scale_at_most(
    kind: torch.dtype, dtype: torch.dtype, size: float, seed: int
) -> None:
    drawn = torch.randn(1, HEADS, 5, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keys = (drawn.clamp(-3, 3) * size).to(dtype)
    if not keys.isfinite().all():
        keys = drawn.to(dtype)
    held = cache(dtype=dtype, kv_dtype=kind)
    found = contents(held, held.allocate(keys, keys[..., :EV].contiguous()))[0].double()
    wanted = keys.float().double()
    step = wanted.abs().amax(-1, keepdim=True) / LARGEST[kind]
    # A float8 number has three bits of fraction: half a step is a sixteenth of a number, or a subnormal 2**-10.
    off = step / 2 if kind is INT8 else torch.maximum(wanted.abs() / 16, step * 2.0**-10)
    # The quotient, the scale and the product are each rounded to float32: of up to 127 steps, 127 * 2**-24 of one.
    assert ((found - wanted).abs() <= off * (1 + 1e-4) + 2.0**-127).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_is_stored_as_exact_zeros_under_a_finite_positive_scale(kind: torch.dtype) -> None:
    held = cache(kv_dtype=kind)
    one = held.allocate(torch.zeros(1, HEADS, 3, E), torch.zeros(1, HEADS, 3, EV))
    assert all((rows == 0).all() for rows in contents(held, one))
    assert held.key_scale is not None
    used = held.key_scale[held.page_table([one])[0].long(), :, :3]
    assert used.isfinite().all() and (used > 0).all()


ROUNDED: dict[torch.dtype, tuple[list[float], list[float]]] = {
    INT8: ([0.5, 1.5, -2.5, 2.51, 126.5, 127.4, -200.0, 3e38], [0, 2, -2, 3, 126, 127, -127, 127]),
    FLOAT8: ([17.0, 19.0, 17.1, 2.0**-10, -464.0, 466.0, 447.0, 3e38], [16, 20, 18, 0, -448, 448, 448, 448]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_given_scales_round_to_the_nearest_with_ties_to_even_and_saturate(
    kind: torch.dtype, scale: float
) -> None:
    before, after = (torch.tensor(numbers) for numbers in ROUNDED[kind])
    held = cache(kv_dtype=kind, key_scale=ONES * scale, value_scale=ONES)
    keys = (before * scale).expand(1, HEADS, 1, E)
    one = held.allocate(keys, torch.zeros(1, HEADS, 1, EV))
    assert torch.equal(contents(held, one)[0], (after * scale).expand(1, HEADS, 1, E))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wild", [NAN, INF, -INF])
def test_a_token_with_a_number_that_is_not_finite_is_nan_in_its_head_and_nowhere_else(
    kind: torch.dtype, wild: float
) -> None:
    keys, values = tokens(1, 5)
    sound = cache(kv_dtype=kind)
    plain = contents(sound, sound.allocate(keys, values))[0]
    keys[0, 1, 2, 3] = wild
    held = cache(kv_dtype=kind)
    found = contents(held, held.allocate(keys, values))[0]
    assert found[0, 1, 2].isnan().all()
    found[0, 1, 2] = plain[0, 1, 2]
    assert torch.equal(found, plain)


@pytest.mark.parametrize("wild", [NAN, INF, -INF])
def test_under_given_scales_what_is_not_finite_is_nan_in_float8_and_refused_in_int8(wild: float) -> None:
    keys, values = tokens(1, 5)
    values[0, 1, 2, 3] = wild
    scales = {"key_scale": ONES / 32, "value_scale": ONES / 32}
    held = cache(kv_dtype=FLOAT8, **scales)
    found = contents(held, held.allocate(keys, values))[1]
    assert found.isnan().nonzero().tolist() == [[0, 1, 2, 3]]
    held = cache(kv_dtype=INT8, **scales)
    one = held.allocate(*tokens(1, 3))
    before = state(held)
    message = r"^values hold NaN or infinity, which int8 under given scales can not; .* kv_dtype=torch.float8_e4m3fn$"
    with pytest.raises(InvalidProblem, match=message):
        held.append([one], keys, values)
    assert state(held) == before


def test_a_given_scale_is_copied_and_keys_and_values_may_be_scaled_in_different_ways() -> None:
    mine = torch.tensor([0.01, 0.02])
    held = cache(kv_dtype=INT8, key_scale=mine)
    mine.zero_()
    assert held.key_scale is not None and held.key_scale.tolist() == pytest.approx([0.01, 0.02])
    assert held.value_scale is not None and held.value_scale.shape == (8, HEADS, 4)
    keys, values = tokens(1, 6)
    query = torch.ones(1, HEADS, 1, E)
    other = cache()
    (out, exact) = (each.attention(query, [each.allocate(keys, values)]) for each in (held, other))
    torch.testing.assert_close(out, exact, rtol=0.05, atol=0.05)
    assert repr(held) == "<PagedKVCache: 1 sequences, 2 of 8 pages of 4 tokens in use, stored as int8>"


def test_a_cache_that_quantises_nothing_has_no_scales() -> None:
    held = cache()
    assert held.key_scale is None and held.value_scale is None


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("options", "message"), [
    ({"kv_dtype": torch.uint8}, "kv_dtype expects torch.int8 or torch.float8_e4m3fn and got torch.uint8; .* leave it out"),
    ({"kv_dtype": torch.float16}, "kv_dtype expects torch.int8 or torch.float8_e4m3fn and got torch.float16"),
    ({"kv_dtype": INT8, "dtype": INT8}, "dtype expects a floating type .* and got torch.int8"),
    ({"key_scale": ONES}, "key_scale is given and the cache stores torch.float32; leave it out, or pass kv_dtype"),
    ({"kv_dtype": INT8, "value_scale": 0.5}, r"value_scale expects a float32 tensor \(2,\) and got float"),
    ({"kv_dtype": INT8, "key_scale": ONES.double()}, r"key_scale expects float32 \(2,\), .* and is torch.float64 \(2,\)"),
    ({"kv_dtype": INT8, "key_scale": torch.ones(8, 2, 4)}, r"one for each head, and is torch.float32 \(8, 2, 4\)"),
    ({"kv_dtype": INT8, "key_scale": ONES.to_sparse()}, "key_scale expects a dense tensor and has the layout"),
    ({"kv_dtype": INT8, "key_scale": ONES.to("meta")}, "key_scale is on meta and the cache on cpu; move it to cpu"),
    ({"kv_dtype": INT8, "key_scale": torch.tensor([1.0, 0.0])}, r"positive, finite numbers and is \[1.0, 0.0\]"),
    ({"kv_dtype": FLOAT8, "value_scale": torch.tensor([NAN, 1.0])}, r"value_scale expects positive, finite .* \[nan, 1.0\]"),
    ({"kv_dtype": FLOAT8, "value_scale": torch.tensor([INF, 1.0])}, "value_scale expects positive, finite"),
])  # fmt: skip
def test_scales_and_types_that_mean_nothing_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        torchhal.PagedKVCache(8, 4, HEADS, E, EV, **options)


def test_tokens_of_the_stored_type_are_refused_for_those_of_the_caches_own() -> None:
    held = cache(kv_dtype=INT8)
    keys, values = tokens(1, 2)
    with pytest.raises(
        InvalidProblem, match="keys is torch.int8 and the cache torch.float32; convert it with"
    ):
        held.allocate(keys.to(INT8), values)
