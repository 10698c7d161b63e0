"""``create_block_mask`` gives what torch's gives, without the dense mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask
from torch.nn.attention.flex_attention import create_block_mask as dense
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchhal
from torchhal import _block_evaluation, block_masks
from torchhal.errors import InvalidProblem

LISTS = [
    f"{full}{side}_{what}"
    for full in ("", "full_")
    for side in ("kv", "q")
    for what in ("num_blocks", "indices")
]
B, H, LONG = 3, 2, 65536
MaskMod = Callable[..., Any]


def assert_same(ours: BlockMask, theirs: BlockMask) -> None:
    for name in LISTS:
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert found.dtype is expected.dtype, name
        assert found.shape == expected.shape, name
        assert torch.equal(found, expected), name
        assert found.is_contiguous(), name
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert ours.mask_mod is theirs.mask_mod


# --- random mask_mods: comparisons of numbers made of indices and of what captured tensors hold at them


def _numbers(seed: int) -> dict[str, MaskMod]:
    random = torch.Generator().manual_seed(seed)
    documents = torch.randint(0, 2, (100,), generator=random).cumsum(0)
    any_order = torch.randint(-50, 100, (100,), generator=random)
    lengths = torch.randint(0, 90, (B,), generator=random)
    per_batch = torch.randint(0, 5, (B, 100), generator=random, dtype=torch.int32)
    slopes = torch.rand(H, generator=random)
    matrix = torch.randint(0, 60, (100, 100), generator=random)
    return {
        "q": lambda b, h, q, k: q,
        "k": lambda b, h, q, k: k,
        "b": lambda b, h, q, k: b * 20,
        "h": lambda b, h, q, k: h * 30,
        "distance": lambda b, h, q, k: q - k,
        "far": lambda b, h, q, k: (q - k).abs(),
        "reversed": lambda b, h, q, k: 70 - k,
        "product": lambda b, h, q, k: q * k,
        "number": lambda b, h, q, k: 17,
        "strided": lambda b, h, q, k: k % 8,
        "chunk": lambda b, h, q, k: q // 16,
        "bits": lambda b, h, q, k: (q ^ k) & 13,
        "shifted": lambda b, h, q, k: (q >> 2) << 1,
        "q's document": lambda b, h, q, k: documents[q],
        "k's document": lambda b, h, q, k: documents[k],
        "any order": lambda b, h, q, k: any_order[k],
        "length": lambda b, h, q, k: lengths[b],
        "per batch": lambda b, h, q, k: per_batch[b, q],
        "matrix": lambda b, h, q, k: matrix[q, k],
        "from the end": lambda b, h, q, k: documents[-1 - k],
        "through another": lambda b, h, q, k: any_order[documents[q]],
        "chosen": lambda b, h, q, k: torch.where(k > 40, q, 2 * k),
        "clamped": lambda b, h, q, k: torch.clamp(q - k, -3, 5),
        "slope": lambda b, h, q, k: slopes[h] * (q - k),
        "wave": lambda b, h, q, k: torch.sin(q / 7.0) * 20,
        "root": lambda b, h, q, k: torch.sqrt((q - 30).float()) * 9,
    }


NUMBERS = sorted(_numbers(0))
COMPARISONS: dict[str, MaskMod] = {
    "<": lambda x, y: x < y,
    "<=": lambda x, y: x <= y,
    ">": lambda x, y: x > y,
    ">=": lambda x, y: x >= y,
    "==": lambda x, y: x == y,
    "!=": lambda x, y: x != y,
}
JOINED: dict[str, MaskMod] = {
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "and not": lambda x, y: x & ~y,
}
COMPARED = st.tuples(
    st.sampled_from([name for name in NUMBERS if name != "number"]),
    st.sampled_from(sorted(COMPARISONS)),
    st.sampled_from(NUMBERS),
)
SIDES = st.integers(1, 40) | st.sampled_from((16, 32, 128))


def _mask_mod(terms: list[tuple[str, str, str]], join: str, seed: int) -> MaskMod:
    numbers = _numbers(seed)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        at = (b, h, q_idx, kv_idx)
        seen = None
        for left, comparison, right in terms:
            term = COMPARISONS[comparison](numbers[left](*at), numbers[right](*at))
            seen = term if seen is None else JOINED[join](seen, term)
        return seen

    return mask_mod


@settings(max_examples=120, deadline=None)
@given(
    terms=st.lists(COMPARED, min_size=1, max_size=3),
    join=st.sampled_from(sorted(JOINED)),
    seed=st.integers(0, 50),
    sizes=st.tuples(*[st.none() | st.integers(1, most) for most in (B, H)]),
    lengths=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    block=SIDES | st.tuples(SIDES, SIDES),
)
def test_a_random_mask_has_the_blocks_that_torch_finds_in_the_dense_one(
    terms: list[tuple[str, str, str]],
    join: str,
    seed: int,
    sizes: tuple[int | None, int | None],
    lengths: tuple[int, int],
    block: int | tuple[int, int],
) -> None:
    mask_mod = _mask_mod(terms, join, seed)
    ours = torchhal.create_block_mask(mask_mod, *sizes, *lengths, BLOCK_SIZE=block)
    assert_same(ours, dense(mask_mod, *sizes, *lengths, "cpu", block))


def not_captured(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Outside the pointwise language, within torch's: it stacks values and reduces over them."""
    return torch.stack([q - k, h * 9 - b]).amax(0) >= 0


def hashed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Of which bounds decide nothing."""
    return ((q * 7919) ^ (k * 104729) ^ h) % 5 == b


@pytest.mark.parametrize("budget", [64, 800, 4096, 2**24])
@pytest.mark.parametrize("block", [7, 128, (5, 64), (64, 3)])
@pytest.mark.parametrize("mask_mod", [not_captured, hashed])
def test_a_mask_evaluated_in_pieces_is_the_mask_whatever_the_size_of_the_pieces(
    mask_mod: MaskMod, block: Any, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_block_evaluation, "BUDGET", budget)
    monkeypatch.setattr(block_masks, "_CHUNK", budget // 16)
    ours = torchhal.create_block_mask(mask_mod, 2, 2, 33, 70, BLOCK_SIZE=block)
    assert_same(ours, dense(mask_mod, 2, 2, 33, 70, "cpu", block))


@pytest.mark.parametrize(
    ("batches", "heads", "q_len", "kv_len"), [(0, 1, 4, 4), (1, 0, 4, 4), (1, 2, 0, 4), (2, 1, 4, 0)]
)
@pytest.mark.parametrize(
    "mask_mod", [lambda b, h, q, k: q >= k, lambda b, h, q, k: q + b >= k + h, not_captured]
)
def test_an_empty_mask_is_as_empty_as_that_of_torch(
    mask_mod: MaskMod, batches: int, heads: int, q_len: int, kv_len: int
) -> None:
    # torch computes nothing of an empty mask but with functions of the two innermost indices.
    theirs = dense(lambda b, h, q, k: q >= k, batches, heads, q_len, kv_len, "cpu", 2)
    theirs.mask_mod = mask_mod
    assert_same(torchhal.create_block_mask(mask_mod, batches, heads, q_len, kv_len, BLOCK_SIZE=2), theirs)


@pytest.mark.parametrize("lengths", [(8, 8), (7, 8), (8, 7), (5, 5)])
def test_a_block_that_reaches_beyond_the_ends_is_never_full(lengths: tuple[int, int]) -> None:
    for mask_mod in (noop_mask, not_captured, lambda b, h, q, k: k * 0 == b):
        ours = torchhal.create_block_mask(mask_mod, 1, 1, *lengths, BLOCK_SIZE=4)
        assert_same(ours, dense(mask_mod, 1, 1, *lengths, "cpu", 4))
    ours = torchhal.create_block_mask(noop_mask, None, None, *lengths, BLOCK_SIZE=4)
    assert int(ours.full_kv_num_blocks.sum()) == (lengths[0] // 4) * (lengths[1] // 4)


def test_attention_takes_the_mask() -> None:
    query, key, value = (torch.randn(1, 2, 48, 16) for _ in range(3))
    mask = torchhal.create_block_mask(lambda b, h, q, k: q - k < 9 + h, None, 2, 48, 48, BLOCK_SIZE=16)
    theirs = dense(mask.mask_mod, None, 2, 48, 48, "cpu", 16)
    ours = torchhal.attention(query, key, value, block_mask=mask)
    torch.testing.assert_close(ours, torchhal.attention(query, key, value, block_mask=theirs))
    assert torch.equal(mask.to_dense(), theirs.to_dense())


# --- what it costs


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions of each evaluation of a captured mask_mod."""
    sizes: list[int] = []

    def counting(graph: Any, inputs: Any, captured: Any) -> tuple[Tensor, ...]:
        sizes.append(torch.broadcast_tensors(*inputs)[0].numel())
        return evaluate(graph, inputs, captured)

    evaluate = _block_evaluation.evaluate
    monkeypatch.setattr(_block_evaluation, "evaluate", counting)
    return sizes


def counts(mask: BlockMask) -> tuple[int, int]:
    return int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())


def test_a_causal_mask_of_65536_positions_is_made_from_the_corners_of_its_diagonal(
    evaluated: list[int],
) -> None:
    mask = torchhal.create_block_mask(lambda b, h, q, k: q >= k, None, None, LONG, LONG)
    assert counts(mask) == (512, 512 * 511 // 2)
    assert sum(evaluated) == 4 * 512


def test_a_window_of_65536_positions_is_made_from_the_corners_of_its_two_edges(evaluated: list[int]) -> None:
    mask = torchhal.create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 1024), 8, None, LONG, LONG)
    # Rows 0 to 7 have no far edge; each later row has a block on it.
    assert counts(mask) == (8 * (512 + 504), 8 * (sum(min(row, 7) for row in range(512))))
    assert sum(evaluated) == 4 * (512 + 504)


def test_documents_of_65536_positions_evaluate_few_positions(evaluated: list[int]) -> None:
    document = torch.arange(LONG) // 1024
    mask = torchhal.create_block_mask(
        lambda b, h, q, k: (document[q] == document[k]) & (q >= k), None, None, LONG, LONG
    )
    assert counts(mask) == (512, 64 * 8 * 7 // 2)
    assert sum(evaluated) == 4 * 512


def test_prefixes_of_65536_positions_evaluate_few_positions(evaluated: list[int]) -> None:
    prefix = torch.tensor([0, 100, 1280, LONG])
    mask = torchhal.create_block_mask(lambda b, h, q, k: (k < prefix[b]) | (q >= k), 4, None, LONG, LONG)
    lower = 512 * 511 // 2
    assert mask.kv_num_blocks.sum(-1).flatten().tolist() == [512, 512, 512 - 10, 0]
    assert mask.full_kv_num_blocks.sum(-1).flatten().tolist() == [lower, lower, lower + 55, 512 * 512]
    # Of the block at the first corner of batch 1 the corners are visible ones and one that is not.
    assert sum(evaluated) <= 4 * 4 * 512


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", ["causal", "window", "documents", "prefix"])
def test_no_tensor_on_the_way_to_a_mask_of_65536_positions_is_larger_than_the_budget(name: str) -> None:
    document = torch.randint(0, 99, (LONG,), generator=torch.Generator().manual_seed(0)).sort().values
    prefix = torch.randint(0, LONG, (8,), generator=torch.Generator().manual_seed(0))
    mask_mods: dict[str, MaskMod] = {
        "causal": lambda b, h, q, k: q >= k,
        "window": lambda b, h, q, k: (q - k).abs() < 1000,
        "documents": lambda b, h, q, k: document[q] == document[k],
        "prefix": lambda b, h, q, k: (k < prefix[b]) | (q >= k),
    }
    with _Largest() as seen:
        torchhal.create_block_mask(mask_mods[name], 8, 1, LONG, LONG)
    assert 8 * 512 * 512 * 4 <= seen.largest <= _block_evaluation.BUDGET


def test_what_bounds_and_corners_leave_open_is_evaluated_within_the_budget(evaluated: list[int]) -> None:
    mask = torchhal.create_block_mask(
        lambda b, h, q, k: torch.atan2(q.float(), k.float()) >= 0, 1, 1, 4096, 2048
    )
    assert counts(mask) == (0, 32 * 16)
    assert sum(evaluated) == 4096 * 2048 + 4 * 32 * 16
    assert 8 * max(evaluated) <= _block_evaluation.BUDGET


def test_no_call_of_a_function_that_is_not_captured_sees_the_whole_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def counting(*args: Any) -> Tensor:
        mask = create_mask(*args)
        sizes.append(mask.numel())
        return mask

    create_mask = _block_evaluation.create_mask
    monkeypatch.setattr(_block_evaluation, "create_mask", counting)
    torchhal.create_block_mask(not_captured, 2, 2, 3000, 1500)
    assert sum(sizes) == 2 * 2 * 3000 * 1500
    assert 8 * max(sizes) <= _block_evaluation.BUDGET


def test_a_block_larger_than_memory_is_no_matter() -> None:
    mask = torchhal.create_block_mask(lambda b, h, q, k: q >= k, None, None, LONG, LONG, BLOCK_SIZE=2**30)
    assert counts(mask) == (1, 0)


# --- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"B": 1.5}, "B expects an int or None and got float 1.5"),
        ({"H": -1}, "H has to be at least 0 and is -1"),
        ({"Q_LEN": None}, "Q_LEN expects an int and got NoneType None"),
        ({"KV_LEN": -4}, "KV_LEN has to be at least 0 and is -4"),
        ({"BLOCK_SIZE": 0}, "BLOCK_SIZE has to be at least 1 and is 0"),
        ({"BLOCK_SIZE": (1, 2, 3)}, "a pair (query side, key side) and got (1, 2, 3), of 3 entries"),
        ({"mask_mod": 3}, "mask_mod expects a function of (b, h, q_idx, kv_idx) and got int"),
        ({"mask_mod": lambda score, b, h, q, k: score}, "a score_mod, which takes the score before them"),
        ({"mask_mod": lambda b, h, q, k: q - k}, "mask_mod has to return a bool and returns torch.int64; compare"),
        ({"mask_mod": lambda b, h, q, k: (q > k, q < k)}, "mask_mod has to return one bool and returns 2 values"),
        ({"mask_mod": lambda b, h, q, k: torch.stack([q, k]).sum(0)}, "return a scalar bool and returns torch.int64"),
        ({"mask_mod": lambda b, h, q, k: torch.stack([q, k]) > 0}, "returns torch.bool of shape (2,)"),
        ({"mask_mod": lambda b, h, q, k: bool(q > k)}, "evaluated neither by torchhal nor by torch. cannot capture"),
        ({"mask_mod": lambda b, h, q, k: q // (k - 3) > 0}, "mask_mod divides an integer by zero"),
    ],
)  # fmt: skip
def test_what_is_no_mask_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    call = {"mask_mod": lambda b, h, q, k: q >= k, "B": 1, "H": 1, "Q_LEN": 8, "KV_LEN": 8, "BLOCK_SIZE": 4}
    with pytest.raises(InvalidProblem) as refusal:
        torchhal.create_block_mask(**{**call, **change})
    assert words in str(refusal.value)


@pytest.mark.parametrize("joined", [False, True])
def test_an_index_outside_a_captured_tensor_is_refused_where_torch_refuses_it(joined: bool) -> None:
    table = torch.arange(20)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = table[k] <= q
        return seen & (k < 20) if joined else seen

    with pytest.raises(IndexError):
        dense(mask_mod, 1, 1, 24, 24, "cpu", 4)
    with pytest.raises(InvalidProblem, match="captured tensor 0 has shape"):
        torchhal.create_block_mask(mask_mod, 1, 1, 24, 24, BLOCK_SIZE=4)


def test_a_tensor_of_another_device_is_refused() -> None:
    lengths = torch.ones(2, device="meta")
    with pytest.raises(InvalidProblem, match="captures a tensor on meta and the mask is made on cpu"):
        torchhal.create_block_mask(lambda b, h, q, k: lengths[b] > k, 2, 1, 8, 8)
