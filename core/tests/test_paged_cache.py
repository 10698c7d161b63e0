"""A PagedKVCache holds what a plain list of tokens would, in as few pages as sharing allows, and refuses the rest."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from typing import Any, ClassVar

import oracle
import pytest
import torch
from attention_calls import normal, plain
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from paged_cache_support import HEADS, E, cache, contents, packed, pages_of, spoil, state, tokens
from tolerance import assert_accurate
from torch import Tensor

import torchhal
from torchhal import paged_cache
from torchhal.errors import PagedCacheFull

# ---------------------------------------------------------------------------- against a model


class Model:
    """Sequences as lists of pages, and pages as lists of tokens, written one token at a time."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[int, list[list[Any]]] = {}
        self.rows: dict[int, list[Any]] = {}
        """Each sequence's tokens once more, without pages: what its contents have to be."""

    def append(self, sequence: int, new: list[Any]) -> None:
        pages, rows = self.pages[sequence], self.rows[sequence]
        for token in new:
            slot = len(rows) % self.page_size
            if slot == 0:
                pages.append([])
            elif sum(any(p is pages[-1] for p in other) for other in self.pages.values()) > 1:
                pages[-1] = list(pages[-1])
            pages[-1][slot:] = [token]
            rows.append(token)

    def fork(self, origin: int, new: int, length: int) -> None:
        self.pages[new] = self.pages[origin][: -(-length // self.page_size)]
        self.rows[new] = self.rows[origin][:length]

    def free(self, sequence: int) -> None:
        del self.pages[sequence], self.rows[sequence]

    def distinct(self) -> int:
        return len({id(page) for pages in self.pages.values() for page in pages})


LENGTHS = st.sampled_from([1, 2, 3, 0, 7, 12])
"""Short ones above all: many calls fit, and many end inside a page."""


class Life(RuleBasedStateMachine):
    """Whatever is asked of a cache, in whatever order, it agrees with the model after every step."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.seed = 0

    @initialize(pages=st.integers(2, 24), page_size=st.integers(1, 5), limit=st.none() | st.integers(2, 9))
    def begin(self, pages: int, page_size: int, limit: int | None) -> None:
        self.cache = cache(pages, page_size, dtype=torch.float32, max_pages=limit, **self.options)
        self.model = Model(page_size)

    def new(self, length: int) -> tuple[Tensor, Tensor]:
        self.seed += 1
        return tokens(1, length, self.seed)

    def some(self, data: st.DataObject, **sizes: int) -> list[int]:
        known = st.sampled_from(list(self.model.rows))
        return data.draw(st.lists(known, unique=True, **{"min_size": 1, **sizes}))

    def attempt(self, parts: dict[int, tuple[Tensor, Tensor]], call: Callable[[], Any]) -> Any:
        """Make a call that appends, which has to fail as the model says, or to be followed by the model."""
        before, room = state(self.cache), self.cache.free_pages
        after = copy.deepcopy(self.model)
        for sequence, (keys, values) in parts.items():
            after.pages.setdefault(sequence, [])
            after.rows.setdefault(sequence, [])
            after.append(sequence, list(zip(keys[0].unbind(1), values[0].unbind(1), strict=True)))
        limit = self.cache.max_pages
        too_long = limit is not None and any(len(after.pages[s]) > limit for s in parts)
        needed = after.distinct() - self.model.distinct()
        if too_long or needed > room:
            with pytest.raises(PagedCacheFull) as caught:
                call()
            assert caught.value.needed > caught.value.free
            assert too_long or (caught.value.needed, caught.value.free) == (needed, room)
            assert state(self.cache) == before
            return
        self.model = after
        call()

    @rule(length=LENGTHS, with_prompt=st.booleans())
    def allocate(self, length: int, with_prompt: bool) -> None:
        prompt = self.new(length if with_prompt else 0)
        number = self.next_number()
        self.attempt({number: prompt}, lambda: self.cache.allocate(*(prompt if with_prompt else ())))

    def next_number(self) -> int:
        """The id an allocation would give, found out without keeping it."""
        number = self.cache.allocate()
        self.cache.free(number)
        return number + 1

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data(), length=LENGTHS)
    def append(self, data: st.DataObject, length: int) -> None:
        chosen = self.some(data)
        parts = {sequence: self.new(length) for sequence in chosen}
        keys, values = (torch.cat([p[i] for p in parts.values()]) for i in (0, 1))
        self.attempt(parts, lambda: self.cache.append(chosen, keys, values))

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data())
    def append_packed(self, data: st.DataObject) -> None:
        parts = {sequence: self.new(data.draw(LENGTHS)) for sequence in self.some(data)}
        tensors = packed(list(parts.values()))
        self.attempt(parts, lambda: self.cache.append(list(parts), *tensors))

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data(), whole=st.booleans())
    def fork(self, data: st.DataObject, whole: bool) -> None:
        (origin,) = self.some(data, max_size=1)
        length = len(self.model.rows[origin])
        part = None if whole else data.draw(st.integers(0, length))
        room = self.cache.free_pages
        self.model.fork(origin, self.cache.fork(origin, part), length if part is None else part)
        assert self.cache.free_pages == room

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        (ended,) = self.some(data, max_size=1)
        self.cache.free(ended)
        self.model.free(ended)
        held = {page for s in self.cache.sequences for page in pages_of(self.cache, s)}
        spoil(self.cache, [page for page in range(len(self.cache.key_pages)) if page not in held])

    @invariant()
    def contents_are_those_of_the_model(self) -> None:
        assert set(self.cache.sequences) == set(self.model.rows)
        for sequence, rows in self.model.rows.items():
            found = contents(self.cache, sequence)
            assert found[0].shape[2] == len(rows)
            for got, want in zip(found, zip(*rows, strict=True), strict=False):
                assert torch.equal(got[0], torch.stack(want, dim=1))

    @invariant()
    def pages_are_shared_where_the_model_shares_them_and_nowhere_else(self) -> None:
        pairs = set()
        for sequence, pages in self.model.pages.items():
            held = pages_of(self.cache, sequence)
            assert len(held) == len(pages)
            pairs |= {(page, id(of_model)) for page, of_model in zip(held, pages, strict=True)}
        assert len(pairs) == len({page for page, _ in pairs}) == self.model.distinct()

    @invariant()
    def every_page_is_counted_once_for_each_sequence_and_free_without_one(self) -> None:
        held = [page for s in self.cache.sequences for page in pages_of(self.cache, s)]
        count = len(self.cache.key_pages)
        assert self.cache._pool.holders == [held.count(page) for page in range(count)]
        assert sorted(self.cache._pool.free) == [page for page in range(count) if page not in held]
        assert self.cache.used_pages == len(set(held)) == count - self.cache.free_pages

    @invariant()
    def attention_is_that_of_the_tokens(self) -> None:
        chosen = [s for s, rows in reversed(self.model.rows.items()) if rows][:3]
        query = normal(len(chosen), 2 * HEADS, 1, E, dtype=torch.float32, seed=self.seed)
        options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "backend": self.backend}
        result = self.cache.attention(query, chosen, **options)
        assert isinstance(result, Tensor)
        for b, sequence in enumerate(chosen):
            keys, values = (
                torch.stack(rows, dim=1)[None] for rows in zip(*self.model.rows[sequence], strict=True)
            )
            expected, _ = oracle.attention(query[b : b + 1], keys, values, scale=E**-0.5)
            simple, _ = plain(query[b : b + 1], keys, values)
            # Of a few dozen numbers a plain evaluation may happen to be nearly exact, which bounds nothing.
            assert_accurate(result[b : b + 1], expected, simple, k=6)


def live(backend: str, examples: int, kind: type[Life] = Life) -> None:
    rules = settings(max_examples=examples, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(lambda: kind(backend), settings=rules)  # type: ignore[no-untyped-call]


def test_a_cache_agrees_with_a_plain_list_of_tokens_whatever_is_asked_of_it() -> None:
    live("reference", 25)


def test_a_native_backend_reads_a_cache_as_the_specification_does(native: None) -> None:
    live("cpu_x86", 12)


# ---------------------------------------------------------------------------- one thing at a time


def test_the_example_of_the_class_runs() -> None:
    result = doctest.testmod(paged_cache)
    assert result.attempted >= 8 and not result.failed


def test_a_fork_copies_one_page_when_it_is_written_to_and_none_before() -> None:
    held = cache()
    origin = held.allocate(*tokens(1, 10))
    child = held.fork(origin)
    assert pages_of(held, child) == pages_of(held, origin) and held.used_pages == 3
    held.append([child], *tokens(1, 1, 1))
    first, second = pages_of(held, origin), pages_of(held, child)
    assert first[:2] == second[:2] and first[2] != second[2] and held.used_pages == 4
    held.append([origin], *tokens(1, 1, 2))
    assert pages_of(held, origin) == first, "the last to hold a page writes to it where it is"


def test_a_fork_at_the_end_of_a_page_never_copies() -> None:
    held = cache()
    origin = held.allocate(*tokens(1, 8))
    held.append([held.fork(origin), origin], *tokens(2, 1))
    assert held.used_pages == 4


def test_a_fork_of_a_prefix_outlives_its_origin() -> None:
    held = cache()
    keys, values = tokens(1, 10)
    origin = held.allocate(keys, values)
    prefix = held.fork(origin, 5)
    held.free(origin)
    assert held.used_pages == 2
    for found, whole in zip(contents(held, prefix), (keys, values), strict=True):
        assert torch.equal(found, whole[:, :, :5])


def test_forks_that_share_a_page_and_append_together_need_one_copy_less_than_there_are() -> None:
    held = cache(pages=3)
    family = [held.allocate(*tokens(1, 3))]
    family += [held.fork(family[0]), held.fork(family[0])]
    held.append(family, *tokens(3, 1))
    assert held.free_pages == 0


def test_an_append_to_no_sequence_or_of_no_token_writes_nothing() -> None:
    held = cache()
    one = held.allocate(*tokens(1, 5))
    held.fork(one)
    before = state(held)
    held.append([], *tokens(0, 3))
    held.append([one], *tokens(1, 0))
    held.append([], *(t[0].transpose(0, 1) for t in tokens(1, 0)), torch.tensor([0]))
    assert state(held) == before


def test_an_id_is_never_given_out_twice() -> None:
    held = cache()
    first = held.allocate()
    held.free(first)
    assert len({first, held.allocate(), held.fork(held.allocate())}) == 3


def test_a_limit_gives_every_page_table_one_width() -> None:
    held = cache(max_pages=5)
    some = [held.allocate(), held.allocate(*tokens(1, 9))]
    assert [held.page_table(s).shape for s in (some, some[:1], [])] == [(2, 5), (1, 5), (0, 5)]
    assert held.max_pages == 5


def test_without_a_limit_a_page_table_is_as_wide_as_the_longest_sequence() -> None:
    held = cache()
    some = [held.allocate(), held.allocate(*tokens(1, 9))]
    assert [held.page_table(s).shape for s in (some, some[:1], [])] == [(2, 3), (1, 1), (0, 1)]
    assert held.page_table(some).dtype == held.seq_lens(some).dtype == torch.int32


def test_a_sequence_without_tokens_attends_to_nothing() -> None:
    held = cache()
    out, lse = held.attention(torch.ones(1, HEADS, 1, E), [held.allocate()], return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_views_are_new_tensors_that_later_calls_leave_alone() -> None:
    held = cache()
    one = held.allocate(*tokens(1, 4))
    table, lengths = held.page_table([one]), held.seq_lens([one])
    before = table.clone(), lengths.clone()
    table += 7
    held.append([one], *tokens(1, 1))
    assert torch.equal(held.page_table([one])[:, :1], before[0]) and torch.equal(lengths, before[1])


def test_strided_keys_and_values_are_written_as_they_read() -> None:
    held = cache()
    keys, values = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tokens(1, 6))
    for found, given in zip(contents(held, held.allocate(keys, values)), (keys, values), strict=True):
        assert torch.equal(found, given)


def test_a_cache_made_in_inference_mode_is_written_to_outside_it_and_the_other_way_round() -> None:
    with torch.inference_mode():
        held = cache()
        one = held.allocate(*tokens(1, 5))
    held.append([one], *tokens(1, 1))
    with torch.inference_mode():
        held.append([one], *tokens(1, 1))
        held.attention(torch.ones(1, HEADS, 1, E), [one])
    assert held.seq_lens([one]).tolist() == [7]


def test_page_numbers_stay_on_the_host_whatever_the_default_device_is() -> None:
    held = cache()
    keys, values = tokens(1, 5)
    with torch.device("meta"):
        one = held.allocate(keys, values)
        held.append([held.fork(one)], keys, values)
        assert held.page_table([one]).device.type == held.seq_lens([one]).device.type == "cpu"
    assert torch.equal(contents(held, one)[0], keys)


def test_a_cache_takes_torchs_defaults_and_says_what_it_holds() -> None:
    held = cache()
    assert held.key_pages.dtype == torch.float32 and held.key_pages.shape == (8, HEADS, 4, E)
    assert cache(dtype=torch.bfloat16).value_pages.dtype == torch.bfloat16
    held.allocate(*tokens(1, 5))
    assert repr(held) == "<PagedKVCache: 1 sequences, 2 of 8 pages of 4 tokens in use>"


# ---------------------------------------------------------------------------- torch.compile


def test_attention_over_a_cache_is_one_graph_for_all_lengths() -> None:
    held = cache(max_pages=8)
    one = held.allocate()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    attend = torch.compile(torchhal.paged_attention, fullgraph=True, backend=count)
    query = torch.ones(1, HEADS, 1, E)
    for step in range(10):
        held.append([one], *tokens(1, 1, step))
        pools = (held.key_pages, held.value_pages)
        result = attend(query, *pools, held.page_table([one]), held.seq_lens([one]))
        torch.testing.assert_close(result, held.attention(query, [one]))
    assert len(graphs) == 1


def test_a_compiled_function_may_append_and_attend_and_is_not_compiled_for_every_step() -> None:
    held, other = cache(max_pages=8), cache(max_pages=8)
    one, same = held.allocate(), other.allocate()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(query: Tensor, keys: Tensor, values: Tensor, to: torchhal.PagedKVCache, number: int) -> Any:
        to.append([number], keys + 1, values)
        return to.attention(query * 2, [number]) + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=count)
    query = torch.ones(1, HEADS, 1, E)
    made = []
    for seed in range(12):
        new = tokens(1, 1, seed)
        torch.testing.assert_close(compiled(query, *new, held, one), step(query, *new, other, same))
        made.append(len(graphs))
    assert made[-1] == made[2], made
