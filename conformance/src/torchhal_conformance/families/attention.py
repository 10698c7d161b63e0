"""Attention in all layouts: shapes on and off the grid of any tile, every claim alone and the usual ones together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import torchhal
from torchhal_conformance import oracle
from torchhal_conformance.families.mods import MASK_MODS, SCORE_MODS, Mod
from torchhal_conformance.model import Inputs, Needs, Outputs, Sample

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Call:
    """What decides a call; everything else follows from the seed."""

    layout: str = "dense"
    dtype: torch.dtype = torch.float32
    key_dtype: torch.dtype | None = None
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    rows: int = 9
    keys: int = 13
    size: int = 16
    value_size: int = 16
    causal: bool = False
    mask: str = ""
    """``boolean`` or ``additive``, with ``:`` and the shape's letters, for example ``boolean:1h1k``; 1 broadcasts."""
    score_mod: str = ""
    mask_mod: str = ""
    block: int = 0
    """Block size of a BlockMask made of ``mask_mod``; 0: none."""
    lse: bool = False
    gradient: str = ""
    """``inputs``, ``mask`` or ``captured``: what gradients are asked of."""
    dropout: float = 0.0
    page: int = 4
    scale: float | None = None

    @property
    def factor(self) -> float:
        """The scale that applies."""
        return float(self.size) ** -0.5 if self.scale is None else self.scale

    @property
    def name(self) -> str:
        """What differs from the plainest call, and the sizes."""
        sizes = f"b{self.batch}-h{self.heads}" + (f"o{self.kv_heads}" if self.kv_heads != self.heads else "")
        sizes += f"-l{self.rows}-s{self.keys}-e{self.size}" + (
            f"v{self.value_size}" if self.value_size != self.size else ""
        )
        words = [self.layout, str(self.dtype).removeprefix("torch.")]
        if self.key_dtype is not None:
            words.append("key_" + str(self.key_dtype).removeprefix("torch."))
        words += ["causal"] * self.causal + ["lse"] * self.lse
        for label, value in (("mask", self.mask), ("mod", self.score_mod), ("see", self.mask_mod)):
            words += [f"{label}_{value.replace(':', '_')}"] if value else []
        words += [f"block{self.block}"] if self.block else []
        words += [f"grad_{self.gradient}"] if self.gradient else []
        words += [f"drop{self.dropout:g}"] if self.dropout else []
        words += [f"page{self.page}"] if self.layout == "paged" else []
        words += [f"scale{self.scale:g}"] if self.scale is not None else []
        return "-".join([*words, sizes])

    def needs(self) -> Needs:
        """The claims that cover it."""
        mods = (SCORE_MODS.get(self.score_mod), MASK_MODS.get(self.mask_mod))
        wanted = {
            "causal": self.causal,
            "boolean_mask": self.mask.startswith("boolean"),
            "additive_mask": self.mask.startswith("additive"),
            "gqa": self.heads != self.kv_heads,
            "value_head_size": self.size != self.value_size,
            "lse": self.lse,
            "score_mod": bool(self.score_mod),
            "mask_mod": bool(self.mask_mod),
            "captured_tensors": any(mod is not None and mod.captured is not None for mod in mods),
            "dropout": self.dropout > 0,
            "mixed_dtypes": self.key_dtype is not None,
            "backward": bool(self.gradient),
            "mask_gradient": self.gradient == "mask",
            "captured_gradient": self.gradient == "captured",
        }
        dtypes = {self.dtype, self.key_dtype or self.dtype}
        features = frozenset(name for name, on in wanted.items() if on)
        return Needs("attention", features, frozenset(dtypes), self.layout)


# ---------------------------------------------------------------------------- data


def _lengths(call: Call) -> tuple[list[int], list[int]]:
    """Query and key lengths of each sequence of a varlen call, zeros among them."""
    rows = [call.rows, 0, max(call.rows // 2, 1), 1][: call.batch]
    keys = [call.keys, max(call.keys // 3, 1), 0, call.keys][: call.batch]
    return rows, keys


def _make(call: Call, generator: torch.Generator, device: torch.device) -> Inputs:
    def random(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(device, dtype or call.dtype)

    made: Inputs = {}
    shapes = _shapes(call)
    made["query"] = random(*shapes[0])
    made["key"] = random(*shapes[1], dtype=call.key_dtype)
    made["value"] = random(*shapes[2], dtype=call.key_dtype)
    if call.mask:
        made["mask"] = _mask(call, generator).to(device)
    for name, mod in _mods(call).items():
        if mod.captured is not None:
            captured = mod.captured(generator, call.batch, call.heads, call.rows, call.keys)
            made[f"{name}_tensor"] = _captured(captured, call.dtype).to(device)
    made |= _layout_tensors(call, generator, device)
    return made


def _captured(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the type that arithmetic with the score gives, so that no promotion rule decides about the truth."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return tensor.to(wide) if tensor.is_floating_point() else tensor


def _shapes(call: Call) -> tuple[tuple[int, ...], ...]:
    h, kv, e, ev = call.heads, call.kv_heads, call.size, call.value_size
    if call.layout == "varlen":
        rows, keys = map(sum, _lengths(call))
        return (rows, h, e), (keys, kv, e), (keys, kv, ev)
    if call.layout == "paged":
        pages = call.batch * -(-call.keys // call.page) + 2
        return (call.batch, h, call.rows, e), (pages, kv, call.page, e), (pages, kv, call.page, ev)
    return (call.batch, h, call.rows, e), (call.batch, kv, call.keys, e), (call.batch, kv, call.keys, ev)


def _mask(call: Call, generator: torch.Generator) -> Tensor:
    kind, _, letters = call.mask.partition(":")
    sizes = {"b": call.batch, "h": call.heads, "l": call.rows, "k": call.keys, "1": 1}
    shape = [sizes[letter] for letter in letters or "bhlk"]
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return drawn > -0.3 if kind == "boolean" else drawn.to(call.dtype)


def _layout_tensors(call: Call, generator: torch.Generator, device: torch.device) -> Inputs:
    if call.layout == "varlen":
        ends = [torch.tensor([0, *itertools.accumulate(each)], dtype=torch.int32) for each in _lengths(call)]
        return {"cu_seqlens_q": ends[0].to(device), "cu_seqlens_k": ends[1].to(device)}
    if call.layout == "paged":
        most = -(-call.keys // call.page)
        order = torch.randperm(call.batch * most + 2, generator=generator)[: call.batch * most]
        table = order.view(call.batch, most).to(torch.int32)
        lens = torch.tensor([max(call.keys - 2 * b, call.rows) for b in range(call.batch)], dtype=torch.int32)
        return {"page_table": table.to(device), "seq_lens": lens.to(device)}
    return {}


def _mods(call: Call) -> dict[str, Mod]:
    found = {"score_mod": SCORE_MODS.get(call.score_mod), "mask_mod": MASK_MODS.get(call.mask_mod)}
    return {name: mod for name, mod in found.items() if mod is not None}


# ---------------------------------------------------------------------------- the call


def _functions(call: Call, inputs: Inputs) -> dict[str, Any]:
    return {name: mod.over(inputs.get(f"{name}_tensor")) for name, mod in _mods(call).items()}


def _call(call: Call, backend: str, inputs: Inputs) -> Outputs:
    functions = _functions(call, inputs)
    options: dict[str, Any] = {
        "is_causal": call.causal,
        "scale": call.scale,
        "enable_gqa": call.heads != call.kv_heads,
        "return_lse": call.lse,
        "backend": backend,
        "score_mod": functions.get("score_mod"),
    }
    if call.dropout:
        options["dropout_p"] = call.dropout
    if call.layout == "dense":
        options["attn_mask"] = inputs.get("mask")
        options["block_mask"] = _block_mask(call, functions.get("mask_mod"), inputs)
    else:
        options["mask_mod"] = functions.get("mask_mod")
    names = {
        "dense": ("query", "key", "value"),
        "varlen": ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k"),
        "paged": ("query", "key", "value", "page_table", "seq_lens"),
    }[call.layout]
    function = {
        "dense": torchhal.attention,
        "varlen": torchhal.varlen_attention,
        "paged": torchhal.paged_attention,
    }[call.layout]
    found: Any = function(*(inputs[name] for name in names), **options)  # type: ignore[operator]
    return found if isinstance(found, tuple) else (found,)


def _block_mask(call: Call, mask_mod: Any, inputs: Inputs) -> Any:
    if mask_mod is None:
        return None
    device = inputs["query"].device
    return create_block_mask(
        mask_mod, None, None, call.rows, call.keys, device=str(device), BLOCK_SIZE=call.block or 8
    )


# ---------------------------------------------------------------------------- the truth


def _evaluate(call: Call, inputs: Inputs, dtype: torch.dtype, scale_first: bool = False) -> Outputs:
    functions = {
        name: mod.over(_wide(inputs.get(f"{name}_tensor"), dtype)) for name, mod in _mods(call).items()
    }
    parts = _sequences(call, inputs)
    outs, lses = [], []
    for part in parts:
        query = part["query"].to(dtype) * call.factor if scale_first else part["query"]
        out, lse = oracle.attention(
            query, part["key"], part["value"], dtype=dtype, scale=1.0 if scale_first else call.factor,
            is_causal=call.causal, mask=inputs.get("mask"), first_query=part["first"], batch=part["batch"],
            **functions,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    if call.layout == "varlen":
        out = torch.cat([o[0].transpose(0, 1) for o in outs])
        lse = torch.cat([t[0].transpose(0, 1) for t in lses])
    else:
        out, lse = torch.cat(outs), torch.cat(lses)
    return (out, lse) if call.lse else (out,)


def _wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor


def _sequences(call: Call, inputs: Inputs) -> list[dict[str, Any]]:
    """The call as dense calls: one for each sequence of varlen and paged ones."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    if call.layout == "dense":
        return [{"query": query, "key": key, "value": value, "first": 0, "batch": None}]
    if call.layout == "varlen":
        ends = [inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()]
        return [
            {
                "query": query[ends[0][b] : ends[0][b + 1]].transpose(0, 1)[None],
                "key": key[ends[1][b] : ends[1][b + 1]].transpose(0, 1)[None],
                "value": value[ends[1][b] : ends[1][b + 1]].transpose(0, 1)[None],
                "first": 0,
                "batch": b,
            }
            for b in range(call.batch)
        ]
    found = []
    for b, length in enumerate(inputs["seq_lens"].tolist()):
        pages = inputs["page_table"][b].long()
        rows = [t[pages].transpose(0, 1).flatten(1, 2)[None, :, :length] for t in (key, value)]
        found.append(
            {
                "query": query[b : b + 1],
                "key": rows[0],
                "value": rows[1],
                "first": length - call.rows,
                "batch": b,
            }
        )
    return found


def _plain(call: Call, inputs: Inputs) -> Outputs:
    exact = _evaluate(call, inputs, torch.float64)
    evaluations = [_evaluate(call, inputs, call.dtype, first) for first in (False, True)]
    worst = list(oracle.worst_of(evaluations, exact))
    if call.lse and call.dtype is not torch.float64:  # an LSE is float32 whatever the inputs
        worst[1] = _evaluate(call, inputs, torch.float32)[1]
    return tuple(worst)


# ---------------------------------------------------------------------------- which calls


SHAPES: Final[tuple[dict[str, int], ...]] = (
    {"rows": 1, "keys": 1},
    {"batch": 1, "heads": 1, "kv_heads": 1, "rows": 1, "keys": 1, "size": 1, "value_size": 1},
    {"rows": 0},
    {"keys": 0},
    {"batch": 0},
    {"rows": 1, "keys": 257},
    {"rows": 1, "keys": 1031, "heads": 2, "kv_heads": 2},
    {"rows": 15, "keys": 17},
    {"rows": 16, "keys": 16},
    {"rows": 17, "keys": 15},
    {"rows": 63, "keys": 65, "heads": 2, "kv_heads": 2},
    {"rows": 64, "keys": 64, "size": 64, "value_size": 64, "heads": 2, "kv_heads": 2},
    {"rows": 65, "keys": 63, "size": 80, "value_size": 80, "heads": 2, "kv_heads": 2},
    {"rows": 127, "keys": 129, "heads": 2, "kv_heads": 2},
    {"rows": 131, "keys": 257, "size": 72, "value_size": 72, "batch": 1, "heads": 3, "kv_heads": 3},
    {"rows": 33, "keys": 29, "size": 3, "value_size": 3},
    {"rows": 7, "keys": 31, "size": 128, "value_size": 128},
    {"rows": 5, "keys": 37, "size": 192, "value_size": 128},
    {"rows": 2, "keys": 19, "size": 256, "value_size": 256, "batch": 1},
    {"rows": 9, "keys": 11, "size": 17, "value_size": 5},
    {"rows": 11, "keys": 23, "size": 8, "value_size": 40},
    {"rows": 3, "keys": 700, "batch": 1, "heads": 2, "kv_heads": 2, "size": 32, "value_size": 32},
)
GROUPS: Final = ((3, 1), (6, 2), (5, 1), (7, 1), (14, 2), (8, 1))
"""Query and key heads: groups of 3, 3, 5, 7, 7 and 8."""

FEATURES: Final[tuple[dict[str, Any], ...]] = (
    {"causal": True},
    {"causal": True, "rows": 13, "keys": 9},
    {"causal": True, "rows": 40, "keys": 70},
    {"lse": True},
    {"lse": True, "causal": True, "rows": 17, "keys": 5},
    {"scale": 0.0},
    {"scale": -0.5},
    {"scale": 3.0, "lse": True},
    {"scale": 30.0, "lse": True},
    {"mask": "boolean"},
    {"mask": "boolean:k"},
    {"mask": "boolean:lk"},
    {"mask": "boolean:b11k", "lse": True},
    {"mask": "boolean:1hl1"},
    {"mask": "additive"},
    {"mask": "additive:lk", "lse": True},
    {"mask": "additive:1h1k"},
    {"score_mod": "soft_cap"},
    {"score_mod": "distance", "lse": True, "causal": True},
    {"score_mod": "alibi", "causal": True, "rows": 33, "keys": 33},
    {"score_mod": "relative"},
    {"score_mod": "per_batch"},
    {"mask_mod": "window", "rows": 40, "keys": 40, "lse": True},
    {"mask_mod": "prefix", "rows": 21, "keys": 34},
    {"mask_mod": "document", "rows": 50, "keys": 50, "block": 16},
    {"mask_mod": "nothing", "lse": True},
    {"mask_mod": "window", "score_mod": "soft_cap", "rows": 30, "keys": 30},
)
LAYOUT_FEATURES: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"causal": True},
    {"lse": True, "causal": True},
    {"heads": 6, "kv_heads": 2},
    {"value_size": 5},
    {"score_mod": "soft_cap"},
    {"score_mod": "alibi"},
    {"mask_mod": "window"},
    {"rows": 1, "keys": 33, "heads": 8, "kv_heads": 1},
)
PAGES: Final = (1, 3, 4, 16)
GRADIENTS: Final[tuple[dict[str, Any], ...]] = (
    {"gradient": "inputs"},
    {"gradient": "inputs", "lse": True},
    {"gradient": "inputs", "causal": True, "rows": 17, "keys": 5, "lse": True},
    {"gradient": "inputs", "heads": 6, "kv_heads": 2},
    {"gradient": "inputs", "value_size": 5},
    {"gradient": "inputs", "rows": 65, "keys": 70, "causal": True},
    {"gradient": "inputs", "mask": "boolean"},
    {"gradient": "mask", "mask": "additive"},
    {"gradient": "mask", "mask": "additive:1h1k", "lse": True},
    {"gradient": "inputs", "score_mod": "soft_cap"},
    {"gradient": "captured", "score_mod": "alibi"},
    {"gradient": "captured", "score_mod": "relative", "lse": True},
    {"gradient": "inputs", "mask_mod": "window", "rows": 30, "keys": 30},
    {"gradient": "inputs", "layout": "varlen", "causal": True, "batch": 4},
    {"gradient": "captured", "layout": "varlen", "score_mod": "alibi", "batch": 4},
)


def calls() -> Iterator[Call]:
    """Every call of the corpus."""
    for dtype in FLOATS:
        plain = Call(dtype=dtype)
        for shape in SHAPES:
            yield dataclasses.replace(plain, **shape)
        for heads, kv_heads in GROUPS:
            yield dataclasses.replace(plain, heads=heads, kv_heads=kv_heads, rows=3)
            yield dataclasses.replace(plain, heads=heads, kv_heads=kv_heads, rows=20, causal=True, lse=True)
        for changes in FEATURES:
            yield dataclasses.replace(plain, **changes)
        for changes in LAYOUT_FEATURES:
            yield dataclasses.replace(plain, **{"layout": "varlen", "batch": 4, **changes})
            yield dataclasses.replace(plain, **{"layout": "paged", "rows": 2, **changes})
        for page, beyond in itertools.product(PAGES, (-1, 0, 1)):
            keys = 2 * page + beyond
            yield dataclasses.replace(
                plain, layout="paged", page=page, keys=keys, rows=1, batch=3, causal=True
            )
        for changes in GRADIENTS:
            yield dataclasses.replace(plain, **changes)
    yield Call(key_dtype=torch.bfloat16)
    yield Call(dtype=torch.bfloat16, key_dtype=torch.float32, lse=True)


def sample(call: Call) -> Sample:
    """The sample of a call."""
    leaves: tuple[str, ...] = ("query", "key", "value") if call.gradient else ()
    leaves += ("mask",) * (call.gradient == "mask")
    leaves += ("score_mod_tensor",) * (call.gradient == "captured")
    tags = {call.layout, *call.needs().features}
    if max(call.rows, call.keys) <= 40 and call.rows and call.keys and call.batch:
        tags.add("small")
    if call == dataclasses.replace(Call(), dtype=call.dtype, **_chosen(call)):
        tags.add("typical")
    return Sample(
        name=call.name,
        needs=call.needs(),
        make=lambda generator, device: _make(call, generator, device),
        call=lambda backend, inputs: _call(call, backend, inputs),
        exact=lambda inputs: _evaluate(call, inputs, torch.float64),
        plain=lambda inputs: _plain(call, inputs),
        leaves=leaves,
        tags=frozenset(tags),
        profile="training" if call.gradient else "inference",
    )


def _chosen(call: Call) -> dict[str, Any]:
    """The fields of the calls that stand for the family where one of each kind is enough."""
    return {
        name: getattr(call, name)
        for name in ("layout", "causal", "lse", "mask", "score_mod", "mask_mod", "rows", "keys", "batch")
    }


def samples() -> Iterator[Sample]:
    """Every sample of the family."""
    return (sample(call) for call in dict.fromkeys(calls()))
