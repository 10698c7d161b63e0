"""Keys and values in pages: the bookkeeping an inference loop needs in front of ``torchhal.paged_attention``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from torchhal._memory import large
from torchhal._pages import (
    HOST,
    Growth,
    Pool,
    SequenceState,
    Tokens,
    check_sizes,
    checked_tokens,
    grown,
    is_integer,
    pad_rows,
    places,
)
from torchhal._quantize import check_scale, quantized, stored_type, write
from torchhal._text import dtype_name
from torchhal.attention import paged_attention
from torchhal.errors import InvalidProblem, PagedCacheFull

F = TypeVar("F", bound=Callable[..., Any])

_EAGER: Final = "which pages a sequence holds is known when the call is run, and changes from call to call"


def _eager(method: F) -> F:
    """A break in a compiled graph: traced, the numbers of pages would be constants, and new ones a recompile."""
    return torch.compiler.disable(method, reason=_EAGER)  # type: ignore[no-any-return, no-untyped-call]


class PagedKVCache:
    """Keys and values of many sequences in one pool of pages, for :func:`torchhal.paged_attention`.

    Sequences take pages as they grow. A fork shares the pages of its origin, and a page that two sequences hold is
    copied when one of them writes to it. A call that fails, for want of pages or for anything else, changes nothing.
    The cache is for inference: it keeps no gradients. It serves one layer; a model has one for each.

    With ``kv_dtype`` tokens are quantised as they are appended, in float32. Each token has a scale in each head, kept in
    pages beside it: the largest magnitude there over 127 (int8) or 448 (float8_e4m3fn), at least 2**-126. Or each head has
    one, given once. An element is divided by its scale and rounded to the nearest stored number, ties to even; beyond the
    range of a given scale it becomes the largest. NaN or infinity in a head of a token makes its scale there NaN, and so
    all of it. Under given scales they become NaN in float8_e4m3fn; int8 has none and refuses them, for which an append
    waits for the device.

    The bookkeeping is on the host, and nothing is read back from the device but ``cu_seqlens`` that live there.
    Under ``torch.compile`` the methods are breaks in the graph; for one whole graph make :meth:`page_table` and
    :meth:`seq_lens` outside it and call :func:`torchhal.paged_attention` inside.

    Not safe for threads: calls from several need a lock of the caller's around each.

    >>> import torch, torchhal
    >>> cache = torchhal.PagedKVCache(pages=8, page_size=4, kv_heads=2, head_size=16)
    >>> prompt = cache.allocate(torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16))
    >>> both = [prompt, cache.fork(prompt)]
    >>> cache.append(both, torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))
    >>> cache.seq_lens(both), cache.used_pages
    (tensor([7, 7], dtype=torch.int32), 3)
    >>> cache.attention(torch.randn(2, 2, 1, 16), both, is_causal=True).shape
    torch.Size([2, 2, 1, 16])
    >>> cache.free(prompt)
    >>> cache.used_pages
    2

    Args:
        pages: number of pages P in the pool, all allocated at once; on Linux in large pages of memory where there are any.
        page_size: tokens that a page holds.
        kv_heads: heads Hkv of keys and values.
        head_size: elements E of a key.
        value_head_size: elements Ev of a value; ``head_size`` by default.
        dtype: floating type of keys and values; torch's default by default.
        device: where the pool lives; torch's default by default.
        kv_dtype: ``torch.int8`` or ``torch.float8_e4m3fn`` to store keys and values quantised; ``dtype`` is then the type
            they are appended in. Stored as they come by default.
        key_scale: with ``kv_dtype``, a float32 (Hkv,) tensor of positive numbers, the scale of each head's keys for good; by
            default each token has scales of its own.
        value_scale: the same for values.
        max_pages: the most pages one sequence may hold, and the width of every page table, which is then one shape
            for all calls; by default a sequence may grow as long as there are pages.

    Raises:
        InvalidProblem: a size that is no positive integer, a type that is not one of those named, or scales that do not fit.
    """

    key_pages: Tensor
    """(P, Hkv, page_size, E); what no sequence has written holds anything, NaN included."""
    value_pages: Tensor
    """(P, Hkv, page_size, Ev), the same for values."""
    key_scale: Tensor | None
    """What :func:`torchhal.paged_attention` takes with the pages: (P, Hkv, page_size) float32, or (Hkv,) as given; None where
    nothing is quantised."""
    value_scale: Tensor | None
    """The same for values."""

    def __init__(
        self,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_size: int,
        value_head_size: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        device: torch.device | str | None = None,
        max_pages: int | None = None,
    ) -> None:
        value_head_size = head_size if value_head_size is None else value_head_size
        sizes = {"pages": pages, "page_size": page_size, "kv_heads": kv_heads, "head_size": head_size}
        sizes |= {"value_head_size": value_head_size, "max_pages": 1 if max_pages is None else max_pages}
        check_sizes(sizes)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        stored = stored_type(dtype, kv_dtype)
        with torch.inference_mode(False):  # an inference tensor could be written to in inference mode alone
            slots = torch.empty(pages, kv_heads, page_size, 0, dtype=stored, device=device)
            self.key_pages = large((*slots.shape[:3], head_size), stored, slots.device)
            self.value_pages = large((*slots.shape[:3], value_head_size), stored, slots.device)
            self.key_scale = check_scale("key_scale", key_scale, slots)
            self.value_scale = check_scale("value_scale", value_scale, slots)
        self._dtype = dtype
        self._max_pages = max_pages
        self._pool = Pool(pages)
        self._sequences: dict[int, SequenceState] = {}
        self._next = 0

    # ------------------------------------------------------------------------ what there is

    @property
    def page_size(self) -> int:
        """Tokens that a page holds."""
        return self.key_pages.shape[2]

    @property
    def max_pages(self) -> int | None:
        """The most pages one sequence may hold, if there is a limit."""
        return self._max_pages

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._pool.free)

    @property
    def used_pages(self) -> int:
        """Pages that at least one sequence holds; with :attr:`free_pages` all there are."""
        return self.key_pages.shape[0] - self.free_pages

    @property
    def sequences(self) -> tuple[int, ...]:
        """The ids in use, oldest first."""
        return tuple(self._sequences)

    def __repr__(self) -> str:
        pages = f"{self.used_pages} of {self.key_pages.shape[0]} pages of {self.page_size} tokens in use"
        kept = "" if self.key_scale is None else f", stored as {dtype_name(self.key_pages.dtype)}"
        return f"<PagedKVCache: {len(self._sequences)} sequences, {pages}{kept}>"

    # ------------------------------------------------------------------------ sequences

    @_eager
    def allocate(self, keys: Tensor | None = None, values: Tensor | None = None) -> int:
        """Begin a sequence, empty or with a prompt.

        Args:
            keys: (1, Hkv, L, E), as :meth:`append` takes them.
            values: (1, Hkv, L, Ev).

        Returns:
            Its id, which no other sequence gets, before or after.

        Raises:
            InvalidProblem, PagedCacheFull: as in :meth:`append`; no sequence was begun.
        """
        if (keys is None) != (values is None):
            given, absent = ("values", "keys") if keys is None else ("keys", "values")
            raise InvalidProblem(
                f"a prompt has keys and values, and {given} came without {absent}; pass both"
            )
        empty = torch.empty(0, dtype=torch.int32, device=HOST)
        sequence = SequenceState(self._next, 0, empty)
        if keys is not None and values is not None:
            (sequence,) = self._extended([sequence], keys, values, None)
        return self._begin(sequence)

    @_eager
    def append(
        self, sequences: Sequence[int], keys: Tensor, values: Tensor, cu_seqlens: Tensor | None = None
    ) -> None:
        """Write the next tokens of each of B sequences, all or none.

        Args:
            sequences: ids, each at most once.
            keys: (B, Hkv, L, E), the same number of tokens for each; or, with ``cu_seqlens``, (T, Hkv, E).
            values: (B, Hkv, L, Ev), or (T, Hkv, Ev).
            cu_seqlens: (B + 1,) int32 or int64; tokens ``cu_seqlens[b]:cu_seqlens[b + 1]`` go to sequence b.

        Raises:
            InvalidProblem: an id that is not in use or comes twice; keys or values of another shape, type or device
                than the cache's, or that require grad; lengths that do not fit; NaN or infinity for int8 under given scales.
            PagedCacheFull: there are fewer free pages than the new tokens need, copies of shared pages among them, or
                a sequence would hold more than ``max_pages``.
        """
        known = self._known(sequences)
        twice = [number for number, count in Counter(s.number for s in known).items() if count > 1]
        if twice:
            raise InvalidProblem(
                f"append expects each sequence once and got {twice[0]} more than once; "
                "append its tokens in one piece"
            )
        for sequence in self._extended(known, keys, values, cu_seqlens):
            self._sequences[sequence.number] = sequence

    @_eager
    def fork(self, sequence: int, length: int | None = None) -> int:
        """Begin a sequence with the tokens of another, without copying them.

        Args:
            sequence: id of the origin, which goes on as before.
            length: how many of its tokens, from the first; all by default.

        Returns:
            The id of the new sequence.

        Raises:
            InvalidProblem: an id that is not in use, or more tokens than there are.
        """
        (origin,) = self._known([sequence])
        length = origin.length if length is None else length
        if not is_integer(length) or not 0 <= length <= origin.length:
            raise InvalidProblem(
                f"length expects a number of tokens of sequence {sequence}, 0 to {origin.length}, and got {length}"
            )
        pages = origin.pages[: self._pages_for(length)]
        self._pool.hold(pages.tolist())
        return self._begin(SequenceState(self._next, length, pages))

    @_eager
    def free(self, sequence: int) -> None:
        """End a sequence; pages that no other holds are free.

        Raises:
            InvalidProblem: an id that is not in use.
        """
        (ended,) = self._known([sequence])
        del self._sequences[sequence]
        self._pool.release(ended.pages.tolist())

    # ------------------------------------------------------------------------ views for attention

    @_eager
    def page_table(self, sequences: Sequence[int]) -> Tensor:
        """The page table of some sequences, ids in any order and number.

        Returns:
            A new (B, ``max_pages``) int32 tensor on the pool's device; without a limit it is as wide as the longest
            of the sequences, and at least 1. Entries that a sequence has no page for are 0.

        Raises:
            InvalidProblem: an id that is not in use.
        """
        rows = [s.pages for s in self._known(sequences)]
        width = max([1, *map(len, rows)]) if self._max_pages is None else self._max_pages
        return pad_rows(rows, width).to(self.key_pages.device)

    @_eager
    def seq_lens(self, sequences: Sequence[int]) -> Tensor:
        """The lengths of some sequences, a new (B,) int32 tensor on the pool's device.

        Raises:
            InvalidProblem: an id that is not in use.
        """
        lengths = [s.length for s in self._known(sequences)]
        return torch.tensor(lengths, dtype=torch.int32, device=self.key_pages.device)

    def attention(
        self, query: Tensor, sequences: Sequence[int], **options: Any
    ) -> Tensor | tuple[Tensor, ...]:
        """:func:`torchhal.paged_attention` over the tokens of some sequences.

        Args:
            query: (B, Hq, L, E), the newest L tokens of each sequence, whose keys were appended before.
            sequences: B ids.
            options: keywords of :func:`torchhal.paged_attention`: ``is_causal``, ``enable_gqa``, ``backend``, ...

        Returns:
            (B, Hq, L, Ev), and (B, Hq, L) for each of ``return_lse`` and ``return_max_scores``.

        Raises:
            InvalidProblem: an id that is not in use, or as in :func:`torchhal.paged_attention`.
            Unsupported: as in :func:`torchhal.paged_attention`.
        """
        table, lengths = self.page_table(sequences), self.seq_lens(sequences)
        return paged_attention(
            query,
            self.key_pages,
            self.value_pages,
            table,
            lengths,
            key_scale=self.key_scale,
            value_scale=self.value_scale,
            **options,
        )

    # ------------------------------------------------------------------------ how

    def _begin(self, sequence: SequenceState) -> int:
        self._sequences[sequence.number] = sequence
        self._next += 1
        return sequence.number

    def _known(self, sequences: Sequence[int]) -> list[SequenceState]:
        if not isinstance(sequences, Iterable) or isinstance(sequences, Tensor):
            raise InvalidProblem(
                f"sequences expects a list of ids and got {type(sequences).__name__}; "
                "write one id as [id] and a tensor of ids as ids.tolist()"
            )
        found = []
        for number in sequences:
            if not is_integer(number):
                raise InvalidProblem(f"an id is an integer from allocate() or fork(), and got {number!r}")
            if number not in self._sequences:
                why = "was freed" if 0 <= number < self._next else "was never given out"
                use = ", ".join(map(str, self._sequences)) or "none"
                raise InvalidProblem(f"sequence {number} {why}; ids in use: {use}")
            found.append(self._sequences[number])
        return found

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _extended(
        self, sequences: list[SequenceState], keys: Tensor, values: Tensor, cu_seqlens: Tensor | None
    ) -> list[SequenceState]:
        """The sequences with their next tokens written.

        The pool is told at the end: until then every write goes to a slot that no sequence counts as its own, and an
        error, in a copy that finds no memory for instance, leaves all as it was.
        """
        pools = (self.key_pages, self.value_pages)
        tokens = checked_tokens(len(sequences), keys, values, pools, self._dtype, cu_seqlens)
        growths = self._plan(sequences, tokens.counts)
        fresh = self._pool.next(sum(g.fresh for g in growths))
        after = grown(growths, fresh)
        self._copy_shared(growths, after)
        self._write(growths, after, tokens)
        self._pool.hold(fresh)
        self._pool.release([g.copied for g in growths if g.copied is not None])
        return after

    def _plan(self, sequences: list[SequenceState], counts: list[int]) -> list[Growth]:
        copied = self._to_copy(sequences, counts)
        growths = []
        for sequence, tokens in zip(sequences, counts, strict=True):
            pages = self._pages_for(sequence.length + tokens)
            self._check_limit(sequence, tokens, pages)
            copy = copied.get(sequence.number)
            growths.append(Growth(sequence, tokens, pages - len(sequence.pages) + (copy is not None), copy))
        self._check_room(growths)
        return growths

    def _to_copy(self, sequences: list[SequenceState], counts: list[int]) -> dict[int, int]:
        """The partly filled page of each sequence that has to leave it to others.

        Where all who hold a page write to it, the longest keeps it: its new slots are nobody's, should the write fail.
        """
        copied: dict[int, int] = {}
        left: Counter[int] = Counter()
        for sequence, tokens in sorted(zip(sequences, counts, strict=True), key=lambda s: s[0].length):
            if tokens and sequence.length % self.page_size:
                page = int(sequence.pages[-1])
                if self._pool.holders[page] - left[page] > 1:
                    left[page] += 1
                    copied[sequence.number] = page
        return copied

    def _check_limit(self, sequence: SequenceState, tokens: int, pages: int) -> None:
        if self._max_pages is None or pages <= self._max_pages:
            return
        held = len(sequence.pages)
        raise PagedCacheFull(
            f"sequence {sequence.number} has {sequence.length} tokens and would need {pages} pages of {self.page_size} "
            f"for {tokens} more; a sequence may hold max_pages = {self._max_pages}. Append fewer, or make the cache "
            "with a larger max_pages",
            needed=pages - held,
            free=self._max_pages - held,
        )

    def _check_room(self, growths: list[Growth]) -> None:
        needed, copies = sum(g.fresh for g in growths), sum(g.copied is not None for g in growths)
        if needed <= self.free_pages:
            return
        shared = f", {copies} of them for copies of shared pages" if copies else ""
        raise PagedCacheFull(
            f"{sum(g.tokens for g in growths)} tokens for {len(growths)} sequences need {needed} more pages of "
            f"{self.page_size}{shared}, and {self.free_pages} of {self.key_pages.shape[0]} are free. Free sequences "
            "first, append to fewer, or make the cache with more pages",
            needed=needed,
            free=self.free_pages,
        )

    def _copy_shared(self, growths: list[Growth], after: list[SequenceState]) -> None:
        sources = [g.copied for g in growths if g.copied is not None]
        if not sources:
            return
        pairs = zip(growths, after, strict=True)
        copies = [int(s.pages[len(g.before.pages) - 1]) for g, s in pairs if g.copied is not None]
        for pages in (self.key_pages, self.value_pages, self.key_scale, self.value_scale):
            if pages is not None and pages.dim() > 1:  # a scale of each head belongs to no page
                source, copy = (torch.tensor(p, device=pages.device) for p in (sources, copies))
                pages[copy] = pages[source]

    def _write(self, growths: list[Growth], after: list[SequenceState], tokens: Tokens) -> None:
        if not sum(tokens.counts):
            return
        page, slot = places(growths, after, self.page_size).to(self.key_pages.device)
        keys = quantized("keys", tokens.keys, self.key_pages, self.key_scale)
        values = quantized("values", tokens.values, self.value_pages, self.value_scale)
        write(keys, page, slot, self.key_pages, self.key_scale)
        write(values, page, slot, self.value_pages, self.value_scale)
