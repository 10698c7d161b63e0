"""Where exactness is the truth: what must not matter changes no bit, and what is hidden is never seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from torchhal_conformance import calls
from torchhal_conformance.families import quantized, samples
from torchhal_conformance.model import Check, CheckFailed, Explanation, Inputs, Measured, Outputs, Sample

# ---------------------------------------------------------------------------- helpers


def _tagged(*wanted: str, without: tuple[str, ...] = ()) -> Callable[[], Iterator[Sample]]:
    def select() -> Iterator[Sample]:
        for sample in samples("attention"):
            if (
                sample.profile == "inference"
                and sample.tags >= set(wanted)
                and not sample.tags & set(without)
            ):
                yield sample

    return select


def require_same(before: Outputs, after: Outputs, what: str) -> None:
    """Raise CheckFailed, with the first place, unless all results agree in every bit."""
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        if not calls.same_bits(one, other):
            at = (one != other).nonzero()
            place = tuple(at[0].tolist()) if len(at) else "the signs of zeros"
            raise CheckFailed(
                f"result {number} to be the same bit for bit {what}", f"a difference at {place}"
            )


def _twice(backend: str, sample: Sample, inputs: Inputs, changed: Inputs, what: str) -> Measured:
    before = calls.call(sample, backend, inputs)
    require_same(before, calls.call(sample, backend, changed), what)
    return Measured()


# ---------------------------------------------------------------------------- strides


def _respread(tensor: Tensor, how: str) -> Tensor:
    """The same values elsewhere in memory: dimensions in another order, gaps, an odd offset."""
    if tensor.dim() < 2 or not tensor.numel():
        return tensor
    if how == "swapped":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "reversed":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if how == "gaps":
        wide = tensor.new_full(
            (*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan if tensor.is_floating_point() else 1
        )
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


SPREADS: Final = ("swapped", "reversed", "gaps", "offset")


def strides(backend: str, sample: Sample, seed: int) -> Measured:
    """The same values in four other layouts of memory."""
    inputs = calls.make(sample, backend, seed)
    before = calls.call(sample, backend, inputs)
    for how in SPREADS:
        with calls.harness():
            changed = {
                name: _respread(value, how) if name in ("query", "key", "value", "mask") else value
                for name, value in inputs.items()
            }
        require_same(before, calls.call(sample, backend, changed), f"with {how} strides")
    return Measured()


def broadcast(backend: str, sample: Sample, seed: int) -> Measured:
    """One operand after the other, the first along one dimension throughout: expanded, so with stride 0, and as copies."""
    inputs = calls.make(sample, backend, seed)
    for name in ("query", "key", "value", "mask"):
        for dimension in range(inputs[name].dim() if name in inputs else 0):
            with calls.harness():
                expanded = inputs[name].narrow(dimension, 0, 1).expand(inputs[name].shape)
            before = calls.call(sample, backend, {**inputs, name: expanded.contiguous()})
            after = calls.call(sample, backend, {**inputs, name: expanded})
            require_same(before, after, f"with {name} expanded along dimension {dimension}")
    return Measured()


# ---------------------------------------------------------------------------- poison


def _causally_hidden(sample: Sample, inputs: Inputs) -> Inputs:
    """Keys and values that no row sees, made NaN and infinite."""
    rows, keys = inputs["query"].shape[2], inputs["key"].shape[2]
    if keys <= rows:
        return inputs
    changed = dict(inputs)
    for name, poison in (("key", math.nan), ("value", math.inf)):
        changed[name] = inputs[name].clone()
        changed[name][:, :, rows:] = poison
    return changed


def poison(backend: str, sample: Sample, seed: int) -> Measured:
    """NaN in keys and infinity in values that a causal limit hides from every row."""
    inputs = calls.make(sample, backend, seed)
    return _twice(
        backend, sample, inputs, _causally_hidden(sample, inputs), "when hidden keys hold NaN and infinity"
    )


def page_poison(backend: str, sample: Sample, seed: int) -> Measured:
    """NaN in every page slot that belongs to no sequence."""
    inputs = calls.make(sample, backend, seed)
    with calls.harness():
        page = inputs["key"].shape[2]
        used = torch.zeros(inputs["key"].shape[0], page, dtype=torch.bool)
        for table, length in zip(inputs["page_table"].tolist(), inputs["seq_lens"].tolist()):
            for slot in range(length):
                used[table[slot // page], slot % page] = True
        changed = dict(inputs)
        for name in ("key", "value"):
            scale = inputs.get(f"{name}_scale")
            changed[name], scale = quantized.poisoned(inputs[name], scale, ~used)
            changed |= {} if scale is None else {f"{name}_scale": scale}
    return _twice(backend, sample, inputs, changed, "when unused page slots hold NaN")


def page_order(backend: str, sample: Sample, seed: int) -> Measured:
    """The same pages at other physical places."""
    inputs = calls.make(sample, backend, seed)
    with calls.harness():
        order = torch.randperm(inputs["key"].shape[0], generator=torch.Generator().manual_seed(seed + 1))
        place = torch.argsort(order).to(torch.int32).to(inputs["page_table"].device)
        changed = {**inputs, "key": inputs["key"][order], "value": inputs["value"][order]}
        for name in ("key_scale", "value_scale"):
            if name in inputs and inputs[name].dim() == 3:
                changed[name] = inputs[name][order]
        changed["page_table"] = place[inputs["page_table"].long()]
    return _twice(backend, sample, inputs, changed, "when pages are stored in another order")


# ---------------------------------------------------------------------------- batches, rows, sequences


def batch_order(backend: str, sample: Sample, seed: int) -> Measured:
    """The sequences of a batch in the opposite order."""
    inputs = calls.make(sample, backend, seed)
    with calls.harness():
        changed = {
            name: value.flip(0) if name in ("query", "key", "value") else value
            for name, value in inputs.items()
        }
    before = calls.call(sample, backend, inputs)
    after = calls.call(sample, backend, changed)
    require_same(
        before, tuple(result.flip(0) for result in after), "for the sequences of a batch in another order"
    )
    return Measured()


def blind_rows(backend: str, sample: Sample, seed: int) -> Measured:
    """Every key hidden by the mask, and no keys at all: 0 and an LSE of minus infinity, exactly."""
    inputs = calls.make(sample, backend, seed)
    if "mask" in inputs:
        mask = inputs["mask"]
        hidden = torch.zeros_like(mask) if mask.dtype is torch.bool else torch.full_like(mask, -math.inf)
        inputs["mask"] = hidden
    out, *rest = calls.call(sample, backend, inputs)
    if out.ne(0).any() or out.isnan().any():
        raise CheckFailed("0 in rows that see no key", out.flatten()[:4].tolist())
    for lse in rest:
        if not torch.isneginf(lse).all():
            raise CheckFailed("an LSE of -inf in rows that see no key", lse.flatten()[:4].tolist())
    return Measured()


def sequence_leak(backend: str, sample: Sample, seed: int) -> Measured:
    """Every other sequence of a packed batch made NaN: the first one must not notice."""
    inputs = calls.make(sample, backend, seed)
    with calls.harness():
        ends = {n: int(inputs[f"cu_seqlens_{n}"][1]) for n in ("q", "k")}
        changed = dict(inputs)
        for name, first in (("query", ends["q"]), ("key", ends["k"]), ("value", ends["k"])):
            changed[name] = inputs[name].clone()
            changed[name][first:] = math.nan
    before = calls.call(sample, backend, inputs)
    after = calls.call(sample, backend, changed)
    first_rows = ends["q"]
    require_same(
        tuple(t[:first_rows] for t in before),
        tuple(t[:first_rows] for t in after),
        "when other sequences hold NaN",
    )
    return Measured()


def far_below(backend: str, sample: Sample, seed: int) -> Measured:
    """Logits a thousand below zero: in one half of the keys they weigh nothing, in all of them they change nothing."""
    inputs = calls.make(sample, backend, seed)
    keys = inputs["key"].shape[2]

    def with_logits(lowered: int) -> Inputs:
        # The first element of each row is the query's 1 and the key's logit.
        changed = {**inputs, "query": inputs["query"].clone(), "key": inputs["key"].clone()}
        changed["query"][..., 0] = 1.0
        changed["key"][..., 0] = 0.0
        changed["key"][:, :, :lowered, 0] = -FAR * inputs["query"].shape[-1] ** 0.5
        return changed

    with calls.harness():
        level, half, low = with_logits(0), with_logits(keys // 2), with_logits(keys)
        rest = {**level, **{name: level[name][:, :, keys // 2 :] for name in ("key", "value")}}
    for given, alike, what in ((half, rest, "in half of the keys"), (low, level, "in all keys")):
        found, expected = (calls.call(sample, backend, i)[0].double() for i in (given, alike))
        if not torch.allclose(found, expected, rtol=2e-2, atol=2e-2):
            at = int((found - expected).abs().nan_to_num(math.inf).argmax())
            raise CheckFailed(
                f"{expected.flatten()[at].item():.4g} where logits are {FAR:g} lower {what}",
                found.flatten()[at].item(),
            )
    return Measured()


FAR: Final = 1000.0


CHECKS: Final = (
    Check(
        "attention.strides",
        Explanation(
            "Gives the same values in swapped, reversed, gapped and misaligned memory; results must agree bit for bit.",
            "Kernels that take a tensor for contiguous are the commonest fault of new backends.",
            "Compare the strides your kernel uses with those of the tensor; look for a .contiguous() on one path only.",
        ),
        _tagged("small", "dense", without=("score_mod", "mask_mod", "dropout")),
        strides,
    ),
    Check(
        "attention.broadcast",
        Explanation(
            "Expands query, key, value and mask along each dimension, one after the other; results must be those of copies, "
            "bit for bit.",
            "torch 2.13's own CPU attention computes wrong numbers for a query expanded along its rows.",
            "Look for a stride that is taken from the sizes, or tested for being 1 where it should be tested for its value.",
        ),
        lambda: (
            s
            for s in _tagged("small", "dense", without=("score_mod", "mask_mod", "dropout"))()
            if "b2-h4-l9-s13" in s.name
        ),
        broadcast,
    ),
    Check(
        "attention.poison",
        Explanation(
            "Puts NaN and infinity into keys and values that no row sees; the result must not change by a bit.",
            "0 times NaN is NaN: a kernel that multiplies hidden values by a weight of 0 lets through what uninitialised "
            "memory holds.",
            "Skip or clean hidden positions before the second product; a weight of 0 is not enough.",
        ),
        _tagged("dense", "causal", without=("score_mod", "mask_mod")),
        poison,
    ),
    Check(
        "attention.page_poison",
        Explanation(
            "Fills every page slot beyond a sequence's length with NaN, and its scale where pages are quantised.",
            "Pages come from a pool and hold what the last request left, NaN included.",
            "Mask by seq_lens before the products, in the last page above all.",
        ),
        _tagged("paged"),
        page_poison,
    ),
    Check(
        "attention.page_order",
        Explanation(
            "Stores the same pages at other physical places; results must agree bit for bit.",
            "A stale or ignored page table gives right numbers while pages happen to lie in order.",
            "Print the physical page of each logical page as the kernel sees it.",
        ),
        _tagged("paged"),
        page_order,
    ),
    Check(
        "attention.batch_order",
        Explanation(
            "Reverses the batch; each sequence's result must be the same bit for bit.",
            "Schedulers that split work by position in the batch give results that depend on one's neighbours, which "
            "breaks reproducible serving.",
            "Make the split of keys a function of the sequence alone.",
        ),
        _tagged(
            "small", "dense", without=("mask_mod", "score_mod", "boolean_mask", "additive_mask", "dropout")
        ),
        batch_order,
    ),
    Check(
        "attention.blind_rows",
        Explanation(
            "Hides every key: the result is 0 and the LSE minus infinity, exactly.",
            "softmax over nothing is NaN in the plain formula (PyTorch #163588, #186775 and others are NaN or silent errors of masks), "
            "and a merge of partial results needs -inf.",
            "Guard the division by the sum and the logarithm for rows without a visible key.",
        ),
        lambda: (
            s
            for s in samples("attention")
            if s.profile == "inference"
            and (s.tags & {"boolean_mask", "additive_mask"} or "nothing" in s.name or "-s0-" in s.name)
        ),
        blind_rows,
    ),
    Check(
        "attention.sequence_leak",
        Explanation(
            "Makes all sequences but the first NaN; the first must not change by a bit.",
            "Tiles that cross a boundary of a packed batch read their neighbours (PyTorch #177378, jagged FlexAttention).",
            "Clamp the key range to cu_seqlens before loading, not after.",
        ),
        _tagged("varlen"),
        sequence_leak,
    ),
    Check(
        "attention.far_below",
        Explanation(
            "Lowers logits by a thousand: in half of the keys, which must then weigh nothing, and in all, which must not matter.",
            "A merge that starts its running maximum at 0 or at -100 instead of -inf goes wrong for partitions whose "
            "logits are all lower: torch's CPU decoding template stores a maximum of 0 for an empty partition.",
            "Look at the identity element of the running maximum in each partition.",
        ),
        lambda: (
            s
            for s in _tagged("dense", "small")()
            if s.tags <= {"dense", "small", "typical", "lse"}
            and "scale" not in s.name
            and "b2-h4-l9" in s.name
        ),
        far_below,
    ),
)


def checks() -> Iterator[Check]:
    """All of them."""
    yield from CHECKS
