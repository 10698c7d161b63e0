"""What a PagedKVCache refuses, in which words, and that it is as it was afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged_cache_support import EV, HEADS, E, assert_append_breaks_off, cache, state, tokens

import torchhal
from torchhal.errors import InvalidProblem, PagedCacheFull, TorchhalError


@pytest.mark.parametrize("pool", ["key_pages", "value_pages"])
@pytest.mark.parametrize("fails", [0, 1], ids=["copy of a page", "write of tokens"])
@pytest.mark.parametrize("backwards", [False, True])
def test_an_append_that_breaks_off_in_the_middle_leaves_everything_as_it_was(
    pool: str, fails: int, backwards: bool
) -> None:
    held = cache()
    longer = held.allocate(*tokens(1, 7))
    both = [longer, held.fork(longer, 5)]
    both = both[::-1] if backwards else both
    assert_append_breaks_off(held, both, pool, fails)
    held.append(both, *tokens(2, 1, 1))
    assert held.used_pages == 3


def test_a_cache_without_room_says_what_is_needed_and_what_to_do() -> None:
    held = cache(pages=4)
    one = held.allocate(*tokens(1, 6))
    two = held.fork(one)
    message = (
        r"^10 tokens for 2 sequences need 3 more pages of 4, 1 of them for copies of shared pages, and 2 of 4 are free. "
        r"Free sequences first, append to fewer, or make the cache with more pages$"
    )
    with pytest.raises(PagedCacheFull, match=message) as caught:
        held.append([one, two], *tokens(2, 5))
    assert (caught.value.needed, caught.value.free) == (3, 2)
    assert isinstance(caught.value, TorchhalError)
    with pytest.raises(
        PagedCacheFull, match="^9 tokens for 1 sequences need 3 more pages of 4, and 2 of 4 are"
    ):
        held.allocate(*tokens(1, 9))
    assert held.sequences == (one, two)


def test_a_sequence_that_outgrows_its_limit_is_refused_and_no_other_is_written() -> None:
    held = cache(max_pages=2)
    one, two = held.allocate(), held.allocate(*tokens(1, 7))
    before = state(held)
    message = (
        r"^sequence 1 has 7 tokens and would need 3 pages of 4 for 2 more; a sequence may hold max_pages = 2. "
        r"Append fewer, or make the cache with a larger max_pages$"
    )
    with pytest.raises(PagedCacheFull, match=message) as caught:
        held.append([one, two], *tokens(2, 2))
    assert (caught.value.needed, caught.value.free) == (1, 0)
    assert state(held) == before


KEYS, VALUES = tokens(1, 3)
ROWS, WIDE_ROWS = torch.zeros(3, HEADS, EV), torch.zeros(3, HEADS, E)
INT = torch.int32

APPENDS: list[tuple[tuple[Any, ...], str]] = [
    ((0, KEYS, VALUES), r"sequences expects a list of ids and got int; write one id as \[id\]"),
    ((torch.tensor([0]), KEYS, VALUES), "got Tensor; .* a tensor of ids as ids.tolist()"),
    (([0.0], KEYS, VALUES), r"an id is an integer from allocate\(\) or fork\(\), and got 0.0"),
    (([9], KEYS, VALUES), "sequence 9 was never given out; ids in use: 0, 2"),
    (([-1], KEYS, VALUES), "sequence -1 was never given out"),
    (([1], KEYS, VALUES), "sequence 1 was freed; ids in use: 0, 2"),
    (([0, 2, 0], KEYS, VALUES), "append expects each sequence once and got 0 more than once; append its tokens in one"),
    (([0], None, VALUES), "keys expects a tensor and got NoneType"),
    (([0], KEYS.to_sparse(), VALUES), "keys expects a dense tensor and has the layout torch.sparse_coo"),
    (([0, 2], KEYS, VALUES), r"keys expects \(2, 2, L, 8\): sequences, heads, tokens, head size; and is \(1, 2, 3, 8\)"),
    (([0], KEYS[0], VALUES), r"keys expects \(1, 2, L, 8\): .* and is \(2, 3, 8\)"),
    (([0], KEYS.mT, VALUES), r"keys expects \(1, 2, L, 8\): .* and is \(1, 2, 8, 3\)"),
    (([0], KEYS, KEYS), r"values expects \(1, 2, L, 4\): .* and is \(1, 2, 3, 8\)"),
    (([0], KEYS, VALUES[:, :, 1:]), "keys has 3 and values 2; pass one of each for each token"),
    (([0], KEYS.double(), VALUES), r"keys is torch.float64 and the cache torch.float32; convert it with .to\(torch.float32\)"),
    (([0], KEYS, VALUES.to("meta")), "values is on meta and the cache on cpu; move it to cpu"),
    (([0], KEYS, VALUES.clone().requires_grad_()), r"values requires grad .* pass values.detach\(\)"),
    (([0], KEYS, VALUES, torch.tensor([0, 3])), r"keys expects \(T, 2, 8\): tokens, heads, .* and is \(1, 2, 3, 8\)"),
    (([0], WIDE_ROWS, ROWS[1:], torch.tensor([0, 3])), "keys has 3 and values 2"),
    (([0], WIDE_ROWS, ROWS, [0, 3]), r"cu_seqlens expects an integer tensor \(B \+ 1,\) and got list"),
    (([0], WIDE_ROWS, ROWS, torch.tensor([3])), r"cu_seqlens expects int32 or int64 \(2,\).*, and is torch.int64 \(1,\)"),
    (([0], WIDE_ROWS, ROWS, torch.tensor([0.0, 3.0])), "cu_seqlens expects int32 or int64 .* is torch.float32"),
    (([0], WIDE_ROWS, ROWS, torch.tensor([1, 3])), r"begin at 0, .* number of tokens, 3, and is \[1, 3\]"),
    (([0], WIDE_ROWS, ROWS, torch.tensor([0, 2])), r"end at the number of tokens, 3, and is \[0, 2\]"),
    (([0, 2], WIDE_ROWS, ROWS, torch.tensor([0, 4, 3])), r"never decrease .* and is \[0, 4, 3\]"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), APPENDS)
def test_an_append_that_means_nothing_is_refused_and_writes_nothing(arguments: Any, message: str) -> None:
    held = cache()
    held.allocate(*tokens(1, 5))
    held.free(held.allocate())
    held.allocate(*tokens(1, 2, 1))
    before = state(held)
    with pytest.raises(InvalidProblem, match=message):
        held.append(*arguments)
    assert state(held) == before


def test_keys_that_require_grad_are_taken_where_grad_is_off() -> None:
    held = cache()
    with torch.no_grad():
        held.allocate(KEYS.clone().requires_grad_(), VALUES)
    assert not held.key_pages.requires_grad


@pytest.mark.parametrize(("given", "message"), [
    ({"keys": KEYS}, "keys came without values; pass both"),
    ({"values": VALUES}, "values came without keys; pass both"),
    ({"keys": KEYS[0], "values": VALUES[0]}, r"keys expects \(1, 2, L, 8\)"),
])  # fmt: skip
def test_half_a_prompt_is_refused_and_begins_nothing(given: Any, message: str) -> None:
    held = cache()
    with pytest.raises(InvalidProblem, match=message):
        held.allocate(**given)
    assert held.sequences == () and held.free_pages == 8


@pytest.mark.parametrize("length", [-1, 6, 2.0, True])
def test_a_fork_of_more_than_there_is_is_refused(length: Any) -> None:
    held = cache()
    one = held.allocate(*tokens(1, 5))
    with pytest.raises(InvalidProblem, match=f"tokens of sequence 0, 0 to 5, and got {length}"):
        held.fork(one, length)
    assert held.sequences == (one,)


@pytest.mark.parametrize("method", ["free", "fork", "page_table", "seq_lens", "attention"])
def test_a_freed_id_is_refused_by_every_method(method: str) -> None:
    held = cache()
    one = held.allocate()
    held.free(one)
    given: dict[str, Any] = {"free": (one,), "fork": (one,), "attention": (torch.ones(1, HEADS, 1, E), [one])}
    with pytest.raises(InvalidProblem, match="sequence 0 was freed; ids in use: none"):
        getattr(held, method)(*given.get(method, ([one],)))


@pytest.mark.parametrize(("name", "value", "message"), [
    ("pages", 0, "pages expects a positive integer and got 0"),
    ("page_size", 1.5, "page_size expects a positive integer and got 1.5"),
    ("kv_heads", -2, "kv_heads expects a positive integer and got -2"),
    ("head_size", "8", "head_size expects a positive integer and got '8'"),
    ("value_head_size", 0, "value_head_size expects a positive integer and got 0"),
    ("max_pages", True, "max_pages expects a positive integer and got True"),
    ("dtype", torch.int8, r"dtype expects a floating type \(torch.float64, .*\) and got torch.int8"),
])  # fmt: skip
def test_a_cache_of_no_size_or_type_is_refused(name: str, value: Any, message: str) -> None:
    sizes: dict[str, Any] = {"pages": 8, "page_size": 4, "kv_heads": HEADS, "head_size": E}
    with pytest.raises(InvalidProblem, match=message):
        torchhal.PagedKVCache(**{**sizes, name: value})
