"""Random cases: they look where the corpus does not, and tell, but never decide.

A case's name and the seed say all of it: which call, which functions, which data. Families take turns, so that the first
cases of a seed are the same however many are asked for.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Final

import torch

from torchhal_conformance import compose
from torchhal_conformance.checks import check_named
from torchhal_conformance.families import attention, foreach, fusions, matmul, mods, quantized
from torchhal_conformance.families.foreach_functions import FUNCTIONS
from torchhal_conformance.families.foreach_functions import Function as Mapped
from torchhal_conformance.model import Case, Sample

SIZES: Final = (1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129)
INDICES: Final = ("b", "h", "q", "k")
SCORE_MODS: Final = tuple(sorted(mods.SCORE_MODS))
MASK_MODS: Final = tuple(sorted(set(mods.MASK_MODS) - {"document"}))
"""The known ones; what is composed here joins the tables under a name of its own, and is never drawn again."""


def names(count: int, seed: int) -> list[str]:
    """Names of ``count`` random cases."""
    families = tuple(FAMILIES)
    return [f"explore.{families[i % len(families)]}/{i // len(families)}" for i in range(count)]


def case_named(name: str, seed: int) -> Case:
    """The random case with the id that a report gives it.

    Raises:
        KeyError: another seed made it, or there is no such family.
    """
    check, _, rest = name.removeprefix("explore.").partition("/")
    family = check.partition(".")[0]
    found = random_case(f"explore.{family}/{rest.partition('-')[0]}", seed) if family in FAMILIES else None
    if found is None or found.id != name:
        raise KeyError(f"there is no random case {name!r} of seed {seed}; give the --seed of the report")
    return found


def random_case(name: str, seed: int) -> Case:
    """The random case of a name out of :func:`names`."""
    family, _, number = name.removeprefix("explore.").partition("/")
    draw = random.Random(f"{seed}/{name}")
    check, sample = FAMILIES[family](draw, f"random{seed}x{number}")
    return Case(
        check_named(check), dataclasses.replace(sample, name=f"{number}-{sample.name}"), "explore", seed=seed
    )


# ---------------------------------------------------------------------------- attention


def _attention(draw: random.Random, label: str) -> tuple[str, Sample]:
    return "attention.numbers", attention.sample(_random_attention(draw, label))


def _random_attention(draw: random.Random, label: str) -> attention.Call:
    layout = draw.choice(["dense", "dense", "dense", "varlen", "paged"])
    kv_heads = draw.choice([1, 1, 2, 3])
    size = draw.choice(SIZES)
    rows = draw.choice(SIZES)
    keys = max(draw.choice([*SIZES, 257, 300]), rows if layout == "paged" else 1)
    call = attention.Call(
        layout=layout, dtype=draw.choice(attention.FLOATS), batch=draw.choice([1, 2, 3, 4]),
        heads=kv_heads * draw.choice([1, 2, 3, 5]), kv_heads=kv_heads, rows=rows, keys=keys, size=size,
        value_size=draw.choice([size, size, draw.choice(SIZES)]), causal=draw.random() < 0.4,
        lse=draw.random() < 0.4, page=draw.choice([1, 2, 5, 16]), scale=draw.choice([None, None, 0.1, 1.0]),
    )  # fmt: skip
    if draw.random() < 0.4:
        call = dataclasses.replace(call, score_mod=_score_mod(draw, label))
    if draw.random() < 0.4:
        call = dataclasses.replace(call, mask_mod=_mask_mod(draw, label, layout))
    if layout == "dense" and not call.mask_mod and draw.random() < 0.4:
        letters = "".join(draw.choice(pair) for pair in ("1b", "1h", "1l", "1k"))
        call = dataclasses.replace(call, mask=f"{draw.choice(['boolean', 'additive'])}:{letters}")
    if layout == "paged" and draw.random() < 0.4:
        stored, scaled = draw.choice(quantized.STORED), draw.choice(quantized.SCALED)
        call = dataclasses.replace(call, stored=stored, scaled=scaled)
    return call


def _score_mod(draw: random.Random, label: str) -> str:
    """A known score_mod, or one composed of the score and the indices."""
    if draw.random() < 0.3:
        return draw.choice(SCORE_MODS)
    whole = compose.around("score", compose.expression(draw, ("score", "place")))
    place = compose.over_indices(draw, INDICES)
    attention.ALL_SCORE_MODS[label] = mods.Mod(
        lambda _: lambda score, b, h, q, k: whole.of((score, place.of((b, h, q, k))))
    )
    return label


def _mask_mod(draw: random.Random, label: str, layout: str) -> str:
    """A known mask_mod, or one composed of comparisons of the indices."""
    if draw.random() < 0.3:
        return draw.choice(MASK_MODS)
    if layout == "dense":  # whose BlockMask is one for all sequences and heads
        pair = compose.predicate(draw, INDICES[2:])
        mods.MASK_MODS[label] = mods.Mod(lambda _: lambda b, h, q, k: pair.of((q, k)))
    else:
        seen = compose.predicate(draw, INDICES)
        mods.MASK_MODS[label] = mods.Mod(lambda _: lambda b, h, q, k: seen.of((b, h, q, k)))
    return label


# ---------------------------------------------------------------------------- matmul


def _matmul(draw: random.Random, label: str) -> tuple[str, Sample]:
    return "matmul.numbers", matmul.sample(_random_matmul(draw, label))


BATCHES: Final[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = (
    ((), ()), ((), ()), ((), ()), ((3,), (3,)), ((2,), ()), ((), (2,)), ((2, 1), (3,)), ((1,), (4,)), ((2, 3), (2, 3)),
)  # fmt: skip


def _random_matmul(draw: random.Random, label: str) -> matmul.Call:
    a_batch, b_batch = draw.choice(BATCHES)
    dtype = draw.choice(matmul.FLOATS)
    call = matmul.Call(
        dtype=dtype, rows=draw.choice(SIZES), columns=draw.choice(SIZES), inner=draw.choice([*SIZES, 257, 300]),
        a_batch=a_batch, b_batch=b_batch, bias=draw.choice(["", "", "own", "float32"]),
        a_memory=draw.choice(["", "", "transposed", "gaps"]), b_memory=draw.choice(["", "", "transposed", "gaps"]),
    )  # fmt: skip
    if dtype is not torch.float64 and not b_batch and draw.random() < 0.2:
        group = draw.choice([None, 32, 64])
        call = dataclasses.replace(
            call, bits=draw.choice([8, 4]), group=group, symmetric=draw.random() < 0.5, b_memory=""
        )
    elif draw.random() < 0.2:
        call = dataclasses.replace(call, out_dtype=(draw.choice((torch.float32, torch.bfloat16)),))
    for place, known in fusions.PLACES.items():
        if draw.random() < 0.35:
            known[f"{label}{place[0]}"] = _fusion(draw)
            chosen: dict[str, Any] = {place: f"{label}{place[0]}"}
            call = dataclasses.replace(call, **chosen)
    return call


def _fusion(draw: random.Random) -> fusions.Function:
    """A prologue or epilogue composed of the value, what it captures if anything, and its place."""
    place = compose.over_indices(draw, ("row", "col"))
    if draw.random() < 0.4:
        held = compose.around("value", compose.expression(draw, ("value", "held", "place"), depth=2))
        return fusions.Function(
            lambda t: lambda v, b, r, c: held.of((v, t[c], place.of((r, c)))), captured="c"
        )
    whole = compose.around("value", compose.expression(draw, ("value", "place"), depth=2))
    return fusions.Function(lambda _: lambda v, b, r, c: whole.of((v, place.of((r, c)))))


# ---------------------------------------------------------------------------- foreach


def _foreach(draw: random.Random, label: str) -> tuple[str, Sample]:
    exact = draw.random() < 0.5
    call = _random_foreach(draw, label, exact)
    return ("foreach.bitwise" if exact else "foreach.numbers"), foreach.sample(call)


SHAPES: Final = ("mixed", "odd", "empty", "one", "few", "some_scalars", "broadcast")


def _random_foreach(draw: random.Random, label: str, exact: bool) -> foreach.Call:
    others = [draw.choice(("list", "list", "float", "floats")) for _ in range(draw.choice((0, 1, 2)))]
    operands = ("list", *others)
    # A number alone is nothing that torch's functions take, so it comes as a multiple of the first operand.
    leaves = tuple(
        name if how == "list" else f"(x * {name})" for name, how in zip("xyz", operands, strict=False)
    )
    outputs = draw.choice((1, 1, 2))
    words = compose.EXACT if exact else compose.SMOOTH
    parts = [compose.around("x", compose.expression(draw, leaves, words=words)) for _ in range(outputs)]
    FUNCTIONS[label] = Mapped(lambda _: _of_operands(parts, operands), outputs=outputs, arithmetic=exact)
    types = tuple(draw.sample(foreach.FLOATS, draw.choice((1, 1, 2))))
    shapes = draw.choice(SHAPES)
    out = draw.choice(("", "", "new", "first")) if outputs == 1 and shapes != "broadcast" else ""
    memory = draw.choice(("", "", "transposed", "gaps")) if shapes != "some_scalars" else ""
    return foreach.Call(label, operands, dtypes=types, shapes=shapes, out=out, memory=memory)


def _of_operands(parts: list[compose.Expression], operands: tuple[str, ...]) -> Callable[..., Any]:
    """A function of as many operands as the call has, which is what foreach_map looks at."""

    def results(*values: Any) -> Any:
        leaves = [v if how == "list" else values[0] * v for v, how in zip(values, operands, strict=True)]
        found = tuple(part.of(leaves) for part in parts)
        return found if len(found) > 1 else found[0]

    spelled: dict[int, Callable[..., Any]] = {
        1: lambda x: results(x),
        2: lambda x, y: results(x, y),
        3: lambda x, y, z: results(x, y, z),
    }
    return spelled[len(operands)]


FAMILIES: Final[dict[str, Callable[[random.Random, str], tuple[str, Sample]]]] = {
    "attention": _attention,
    "matmul": _matmul,
    "foreach": _foreach,
}
