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
from torchhal_conformance import oracle, philox
from torchhal_conformance.families import quantized
from torchhal_conformance.families.mods import MASK_MODS, PRIMITIVE_MODS, SCORE_MODS, Mod, sinks
from torchhal_conformance.model import Inputs, Needs, Outputs, Sample

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALL_SCORE_MODS: Final = SCORE_MODS | PRIMITIVE_MODS


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
    maxima: bool = False
    sink: bool = False
    """Whether a learned logit for each head joins the softmax by :func:`torchhal.merge_attention`."""
    gradient: str = ""
    """``inputs``, ``mask`` or ``captured``: what gradients are asked of."""
    dropout: float = 0.0
    page: int = 4
    stored: torch.dtype | None = None
    """Type of quantised keys and values in pages."""
    scaled: str = "token"
    """Of quantised pages: what has a scale, a ``head`` or a ``token`` in each."""
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
        words += (
            ["causal"] * self.causal + ["lse"] * self.lse + ["maxima"] * self.maxima + ["sink"] * self.sink
        )
        for label, value in (("mask", self.mask), ("mod", self.score_mod), ("see", self.mask_mod)):
            words += [f"{label}_{value.replace(':', '_')}"] if value else []
        words += [f"block{self.block}"] if self.block else []
        words += [f"grad_{self.gradient}"] if self.gradient else []
        words += [f"drop{self.dropout:g}"] if self.dropout else []
        words += [f"page{self.page}"] if self.layout == "paged" else []
        if self.stored is not None:
            words.append(f"kv_{str(self.stored).removeprefix('torch.')}_each_{self.scaled}")
        words += [f"scale{self.scale:g}"] if self.scale is not None else []
        return "-".join([*words, sizes])

    def needs(self) -> Needs:
        """The claims that cover it."""
        mods = _mods(self).values()
        wanted = {
            "causal": self.causal,
            "boolean_mask": self.mask.startswith("boolean"),
            "additive_mask": self.mask.startswith("additive"),
            "gqa": self.heads != self.kv_heads,
            "value_head_size": self.size != self.value_size,
            "lse": self.lse or self.maxima or self.sink,
            "max_scores": self.maxima,
            "score_mod": bool(self.score_mod),
            "mask_mod": bool(self.mask_mod),
            "captured_tensors": any(mod.captured is not None for mod in mods),
            "dropout": self.dropout > 0,
            "mixed_dtypes": self.key_dtype is not None,
            "quantized_kv": self.stored is not None,
            "backward": bool(self.gradient),
            "mask_gradient": self.gradient == "mask",
            "captured_gradient": self.gradient == "captured",
        }
        dtypes = {self.dtype, self.stored or self.key_dtype or self.dtype}
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
    for name, shape in (("key", shapes[1]), ("value", shapes[2])):
        if call.stored is None:
            made[name] = random(*shape, dtype=call.key_dtype)
        else:
            made[name] = quantized.stored(shape, call.stored, generator).to(device)
            made[f"{name}_scale"] = quantized.scales(made[name], call.scaled, generator)
    if call.mask:
        made["mask"] = _mask(call, generator).to(device)
    for name, mod in _mods(call).items():
        if mod.captured is not None:
            captured = mod.captured(generator, call.batch, call.heads, call.rows, call.keys)
            made[f"{name}_tensor"] = _captured(captured, call.dtype).to(device)
    if call.dropout:
        made["random"] = int(torch.randint(2**31, (), generator=generator))
    if call.sink:
        made["sink"] = sinks(generator, call.heads).to(device, _lse_dtype(call))
    made |= _layout_tensors(call, generator, device)
    if any(mod.silent_first for mod in _mods(call).values()):
        _silence_first(call, made)
    return made


def _lse_dtype(call: Call) -> torch.dtype:
    return torch.float64 if torch.float64 in (call.dtype, call.key_dtype) else torch.float32


def _silence_first(call: Call, made: Inputs) -> None:
    """The value of each sequence's first key made zero."""
    if call.layout == "varlen":
        starts, total = made["cu_seqlens_k"][:-1].long(), made["value"].shape[0]
        made["value"][starts[starts < total]] = 0.0
    elif call.layout == "paged":
        made["value"][made["page_table"][:, 0].long(), :, 0] = 0.0
    else:
        made["value"][:, :, :1] = 0.0


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
    """The mods of a call by the argument that takes them.

    Raises:
        KeyError: there is none of such a name.
    """
    found = {}
    if call.score_mod:
        found["score_mod"] = ALL_SCORE_MODS[call.score_mod]
    if call.mask_mod:
        found["mask_mod"] = MASK_MODS[call.mask_mod]
    return found


# ---------------------------------------------------------------------------- the call


def _functions(call: Call, inputs: Inputs) -> dict[str, Any]:
    return {name: mod.over(inputs.get(f"{name}_tensor")) for name, mod in _mods(call).items()}


def _call(call: Call, backend: str, inputs: Inputs) -> Outputs:
    functions = _functions(call, inputs)
    options: dict[str, Any] = {
        "is_causal": call.causal,
        "scale": call.scale,
        "enable_gqa": call.heads != call.kv_heads,
        "return_lse": call.lse or call.sink,
        "return_max_scores": call.maxima,
        "backend": backend,
        "score_mod": functions.get("score_mod"),
        **{name: inputs[name] for name in ("key_scale", "value_scale") if name in inputs},
    }
    if call.dropout:
        options["dropout_p"] = call.dropout
        torch.manual_seed(inputs["random"])
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
    if call.sink:
        found = _with_sink(inputs["sink"], call.layout, *found)[: 1 + call.lse]
    return found if isinstance(found, tuple) else (found,)


def _with_sink(sink: Tensor, layout: str, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The result of a softmax that one more logit takes part in, whose value is zero."""
    every = (sink if layout == "varlen" else sink[:, None]).expand(lse.shape)
    return torchhal.merge_attention([out, torch.zeros_like(out)], [lse, every])


def _block_mask(call: Call, mask_mod: Any, inputs: Inputs) -> Any:
    if mask_mod is None:
        return None
    device = inputs["query"].device
    return create_block_mask(
        mask_mod, None, None, call.rows, call.keys, device=str(device), BLOCK_SIZE=call.block or 8
    )


# ---------------------------------------------------------------------------- the truth


def _evaluate(call: Call, inputs: Inputs, dtype: torch.dtype, scale_first: bool = False) -> Outputs:
    functions: dict[str, Any] = {
        name: mod.over(_wide(inputs.get(f"{name}_tensor"), dtype)) for name, mod in _mods(call).items()
    }
    found = []
    for part in _sequences(call, inputs):
        query = part["query"].to(dtype) * call.factor if scale_first else part["query"]
        results = oracle.attention(
            query, part["key"], part["value"], dtype=dtype, scale=1.0 if scale_first else call.factor,
            is_causal=call.causal, mask=inputs.get("mask"), first_query=part["first"], batch=part["batch"],
            keep=_keep(call, inputs, part), dropout_p=call.dropout, **functions,
        )  # fmt: skip
        found.append([t[0].transpose(0, 1) for t in results] if call.layout == "varlen" else results)
    out, lse, largest = (torch.cat(parts) for parts in zip(*found, strict=True))
    if call.sink:
        logit = inputs["sink"].to(dtype)
        whole = torch.logaddexp(lse, logit if call.layout == "varlen" else logit[:, None])
        out, lse = out * torch.exp(lse - whole).unsqueeze(-1), whole
    return out, *([lse] if call.lse else []), *([largest] if call.maxima else [])


def _keep(call: Call, inputs: Inputs, part: dict[str, Any]) -> Tensor | None:
    """What dropout leaves, by the seed that a call draws from torch's generator."""
    if not call.dropout:
        return None
    device = part["query"].device
    drawn = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**drawn):
        torch.manual_seed(inputs["random"])
        seed = int(torch.randint(2**62, (), dtype=torch.int64, device=device))
    shape = (part["query"].shape[0], call.heads, part["query"].shape[2], part["key"].shape[2])
    return philox.kept(seed, shape, call.dropout, part["first"], part["batch"] or 0).to(device)


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
    if call.stored is not None:
        key, value = (
            quantized.dequantized(pages, inputs[f"{name}_scale"])
            for name, pages in (("key", key), ("value", value))
        )
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
    if call.dtype is not torch.float64:  # an LSE and a maximum are float32 whatever the inputs
        worst[1:] = _evaluate(call, inputs, torch.float32)[1:]
    return tuple(worst)


def sample(call: Call) -> Sample:
    """The sample of a call."""
    leaves: tuple[str, ...] = ("query", "key", "value") if call.gradient else ()
    leaves += ("mask",) * (call.gradient == "mask")
    leaves += ("score_mod_tensor",) * (call.gradient == "captured")
    leaves += ("sink",) * (call.sink and bool(call.gradient))
    tags = {call.layout, *call.needs().features} | ({"sink"} if call.sink else set())
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
    from torchhal_conformance.families.attention_calls import calls

    return (sample(call) for call in dict.fromkeys(calls()))
