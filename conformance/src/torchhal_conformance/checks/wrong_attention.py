"""Wrong calls of attention, in every layout, and of the merging of partial results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import torchhal
from torchhal.errors import CaptureError, InvalidProblem
from torchhal_conformance.checks.wrong import KINDS, Wrong, bad_tensors, named_backends
from torchhal_conformance.families.attention import Call, sample
from torchhal_conformance.model import Inputs

DENSE: Final = sample(Call(batch=3))
VARLEN: Final = sample(Call(layout="varlen", batch=4))
PAGED: Final = sample(Call(layout="paged", rows=2))

NAMES: Final = ("query", "key", "value")
MORE: Final = {
    "dense": (),
    "varlen": ("cu_seqlens_q", "cu_seqlens_k"),
    "paged": ("page_table", "seq_lens"),
}
FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "dense": torchhal.attention,
    "varlen": torchhal.varlen_attention,
    "paged": torchhal.paged_attention,
}
QUANTIZED: Final = sample(Call(layout="paged", rows=2, stored=torch.int8))

GOOD: Final = {"dense": DENSE, "varlen": VARLEN, "paged": PAGED}


def _ask(layout: str) -> Callable[[str, Inputs], object]:
    """The public function of a layout: inputs by name first, every other name an option."""
    first = (*NAMES, *MORE[layout])

    def ask(backend: str, given: Inputs) -> object:
        options = {name: value for name, value in given.items() if name not in first}
        return FUNCTIONS[layout](*(given[name] for name in first), **{"backend": backend, **options})

    return ask


def _with(
    layout: str, name: str, says: tuple[str, ...], error: type[Exception] = InvalidProblem, **changes: Any
) -> Wrong:
    """The good call with arguments changed; a change that is a function of the inputs' name is applied to that input."""

    def call(backend: str, inputs: Inputs) -> object:
        made = {key: change(inputs) if callable(change) else change for key, change in changes.items()}
        return _ask(layout)(backend, {**inputs, **made})

    return Wrong(f"{layout}-{name}", GOOD[layout], call, error, says)


def _function(function: Any) -> Callable[[Inputs], Any]:
    """A user function as an argument, which is itself not to be called with the inputs."""
    return lambda inputs: function


# ---------------------------------------------------------------------------- every layout


def _tensors(layout: str) -> Iterator[Wrong]:
    heads = -2 if layout == "varlen" else 1
    rank = 3 if layout == "varlen" else 4
    called = {name: name for name in NAMES}
    ranks = {
        "few_dimensions": (lambda t: t[0], (f"{rank - 1} dimensions", f"{layout} attention expects")),
        "many_dimensions": (lambda t: t[None], (f"{rank + 1} dimensions", f"{layout} attention expects")),
    }
    yield from bad_tensors(layout, GOOD[layout], _ask(layout), called, {**KINDS, **ranks})
    yield _with(layout, "head_size", ("head size", "7", "16"), query=lambda i: i["query"][..., :7])
    yield _with(
        layout,
        "head_size_zero",
        ("head size 0",),
        query=lambda i: i["query"][..., :0],
        key=lambda i: i["key"][..., :0],
    )
    yield _with(layout, "key_and_value", ("key and value", "last dimension"), value=lambda i: i["value"][:-1])

    def fewer(count: int) -> dict[str, Any]:
        return {name: lambda i, name=name: i[name].narrow(heads, 0, count) for name in ("key", "value")}

    yield _with(layout, "heads_differ", ("4 heads", "key 2", "enable_gqa=True"), **fewer(2))
    yield _with(layout, "groups_not_whole", ("whole groups", "4 over 3"), enable_gqa=True, **fewer(3))
    yield _with(layout, "no_key_heads", ("whole groups", "4 over 0"), enable_gqa=True, **fewer(0))


def _options(layout: str) -> Iterator[Wrong]:
    yield from named_backends(layout, GOOD[layout], _ask(layout))
    yield _with(layout, "scale_text", ("scale expects a number", "str"), scale="0.5")
    yield _with(
        layout,
        "scale_tensor",
        ("scale expects a number", "multiply the query"),
        scale=lambda i: torch.ones(()),
    )
    yield _with(layout, "score_mod_number", ("score_mod", "int"), score_mod=3)
    yield _with(layout, "score_mod_parameters", ("score_mod",), score_mod=_function(lambda score, b: score))
    yield _with(
        layout, "score_mod_reduces", ("sum",), CaptureError, score_mod=_function(lambda s, b, h, q, k: s.sum())
    )  # fmt: skip
    yield _with(
        layout, "score_mod_branches", ("score_mod",), CaptureError,
        score_mod=_function(lambda s, b, h, q, k: s if s > 0 else -s),
    )  # fmt: skip
    if layout != "dense":
        yield _with(
            layout, "mask_mod_floating", ("mask_mod", "float"), mask_mod=_function(lambda b, h, q, k: q * 0.5)
        )
        yield _with(
            layout, "mask_mod_integer", ("mask_mod", "int32"), mask_mod=_function(lambda b, h, q, k: q - k)
        )
        yield _with(layout, "mask_mod_text", ("mask_mod", "str"), mask_mod="causal")
    if layout != "paged":
        yield _with(layout, "dropout_above_one", ("dropout_p", "between 0 and 1", "1.5"), dropout_p=1.5)
        yield _with(layout, "dropout_negative", ("dropout_p", "between 0 and 1", "-0.1"), dropout_p=-0.1)
        yield _with(layout, "dropout_text", ("dropout_p expects a number", "str"), dropout_p="0.1")


# ---------------------------------------------------------------------------- one layout


def _mask(inputs: Inputs, *shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=inputs["query"].device)


def _blocks(inputs: Inputs, rows: int, keys: int) -> Any:
    device = str(inputs["query"].device)
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, rows, keys, device=device, BLOCK_SIZE=8)


def _counting_blocks(inputs: Inputs) -> Any:
    """A BlockMask whose function was exchanged for one that counts, after the blocks were made with it."""
    blocks = _blocks(inputs, 9, 13)
    blocks.mask_mod = lambda b, h, q, k: q - k
    return blocks


def _dense() -> Iterator[Wrong]:
    yield _with(
        "dense", "batch", ("batch size", "3", "2"), key=lambda i: i["key"][:2], value=lambda i: i["value"][:2]
    )
    yield _with("dense", "mask_shape", ("broadcast", "(3, 4, 9, 13)"), attn_mask=lambda i: _mask(i, 9, 12))
    yield _with("dense", "mask_rank", ("broadcast",), attn_mask=lambda i: _mask(i, 1, 3, 4, 9, 13))
    yield _with(
        "dense",
        "mask_integer",
        ("bool", "torch.int64"),
        attn_mask=lambda i: _mask(i, 9, 13, dtype=torch.int64),
    )
    yield _with("dense", "mask_text", ("attn_mask expects a tensor", "str"), attn_mask="causal")
    yield _with(
        "dense", "mask_elsewhere", ("attn_mask", "meta"), attn_mask=lambda i: _mask(i, 9, 13).to("meta")
    )
    yield _with("dense", "mask_sparse", ("dense", "sparse"), attn_mask=lambda i: _mask(i, 9, 13).to_sparse())
    yield _with("dense", "block_mask_as_mask", ("block_mask=",), attn_mask=lambda i: _blocks(i, 9, 13))
    yield _with("dense", "block_mask_lengths", ("9 queries", "16"), block_mask=lambda i: _blocks(i, 16, 16))
    yield _with("dense", "block_mask_integer", ("mask_mod", "int32"), block_mask=_counting_blocks)
    yield _with("dense", "block_mask_tensor", ("block_mask", "Tensor"), block_mask=lambda i: _mask(i, 9, 13))


def _index_tensors(layout: str, ranks: dict[str, int]) -> Iterator[Wrong]:
    """What is wrong with lengths, offsets and page numbers before anybody reads them."""
    kinds = {
        "list": (lambda t: t.tolist(), ("int32", "list")),
        "int64": (lambda t: t.long(), ("int32", "torch.int64")),
        "rank": (lambda t: t[None], ("int32", "1,")),
        "elsewhere": (lambda t: t.to("meta"), ("meta", "one device")),
    }
    yield from bad_tensors(layout, GOOD[layout], _ask(layout), {name: name for name in ranks}, kinds)


def _varlen() -> Iterator[Wrong]:
    yield from _index_tensors("varlen", {"cu_seqlens_q": 1, "cu_seqlens_k": 1})
    yield _with("varlen", "sequences", ("5", "4"), cu_seqlens_k=lambda i: i["cu_seqlens_k"][:-1])
    yield _with(
        "varlen", "lengths_empty", ("cu_seqlens_q", "leading 0"), cu_seqlens_q=lambda i: i["cu_seqlens_q"][:0]
    )
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        yield _of_data(
            "varlen",
            f"{name}_past_the_end",
            (name, "number of tokens"),
            name,
            lambda t: t + (t == t[-1]).int() * 3,
        )
        yield _of_data("varlen", f"{name}_from_one", (name, "start at 0"), name, lambda t: t.clamp(min=1))
        yield _of_data("varlen", f"{name}_decrease", (name, "decrease"), name, _decreasing)


def _decreasing(ends: Tensor) -> Tensor:
    changed = ends.clone()
    changed[1], changed[2] = ends[-1], ends[0]
    return changed


def _paged() -> Iterator[Wrong]:
    yield from _index_tensors("paged", {"page_table": 2, "seq_lens": 1})
    yield _with(
        "paged", "batch_of_table", ("batch size 2", "page_table 1"), page_table=lambda i: i["page_table"][:1]
    )
    yield _with(
        "paged", "batch_of_lengths", ("batch size 2", "seq_lens 1"), seq_lens=lambda i: i["seq_lens"][:1]
    )
    yield _with(
        "paged",
        "page_size_zero",
        ("page size of 0",),
        key=lambda i: i["key"][:, :, :0],
        value=lambda i: i["value"][:, :, :0],
    )
    yield _of_data("paged", "page_number", ("pages", "100"), "page_table", lambda t: t * 0 + 100)
    yield _of_data("paged", "page_negative", ("pages", "-"), "page_table", lambda t: t - 1000)
    yield _of_data("paged", "length_beyond_table", ("seq_lens", "999"), "seq_lens", lambda t: t * 0 + 999)
    yield _of_data("paged", "length_negative", ("seq_lens", "-1"), "seq_lens", lambda t: t * 0 - 1)


def _quantized() -> Iterator[Wrong]:
    def wrong(name: str, says: tuple[str, ...], **changes: Callable[[Inputs], Any]) -> Wrong:
        def call(backend: str, inputs: Inputs) -> object:
            return _ask("paged")(
                backend, {**inputs, **{key: change(inputs) for key, change in changes.items()}}
            )

        return Wrong(f"paged-quantized-{name}", QUANTIZED, call, InvalidProblem, says)

    for name in ("key", "value"):
        label = f"{name}_scale"
        yield wrong(
            f"{name}_without_scale", (f"{name}_pages", "torch.int8", label), **{label: lambda i: None}
        )
        yield wrong(
            f"{name}_not_quantised", (label, "torch.float32"), **{name: lambda i, n=name: i[n].float()}
        )
        kinds: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...]]] = {
            "list": (lambda t: t.tolist(), ("float32", "list")),
            "double": (lambda t: t.double(), ("float32", "torch.float64")),
            "slots": (lambda t: t[..., 1:], ("float32", "one for each token and head", "4, 3)")),
            "heads": (lambda t: t[0, 1:, 0], ("float32", "one for each head", "(3,)")),
            "elsewhere": (lambda t: t.to("meta"), ("meta", "one device")),
        }
        for kind, (change, words) in kinds.items():
            changed = {label: lambda i, change=change, label=label: change(i[label])}
            yield wrong(f"{label}_{kind}", (label, *words), **changed)
    yield wrong("types_differ", ("one type",), value=lambda i: i["value"].to(torch.float8_e4m3fn))


def _of_data(
    layout: str, name: str, says: tuple[str, ...], argument: str, change: Callable[[Tensor], Tensor]
) -> Wrong:
    def call(backend: str, inputs: Inputs) -> object:
        return _ask(layout)(backend, {**inputs, argument: change(inputs[argument])})

    return Wrong(f"{layout}-{name}", GOOD[layout], call, InvalidProblem, says, of_data=True)


# ---------------------------------------------------------------------------- merging


def _merging() -> Iterator[Wrong]:
    def wrong(name: str, says: tuple[str, ...], make: Callable[[Tensor, Tensor], tuple[Any, Any]]) -> Wrong:
        def call(backend: str, inputs: Inputs) -> object:
            out = inputs["query"]
            return torchhal.merge_attention(*make(out, out[..., 0].float()))

        return Wrong(f"merge-{name}", DENSE, call, InvalidProblem, says)

    yield wrong("nothing", ("one or more", "0"), lambda out, lse: ([], []))
    yield wrong("counts", ("as many LSEs", "2 and 1"), lambda out, lse: ([out, out], [lse]))
    yield wrong("no_list", ("outs expects a list", "Tensor"), lambda out, lse: (out, [lse]))
    yield wrong("no_tensor", ("lses[0] expects a tensor", "str"), lambda out, lse: ([out], ["lse"]))
    yield wrong("shapes", ("alike", "outs[1]"), lambda out, lse: ([out, out[:1]], [lse, lse[:1]]))
    yield wrong("types", ("alike", "torch.float64"), lambda out, lse: ([out, out.double()], [lse, lse]))
    yield wrong("integers", ("floating", "torch.int64"), lambda out, lse: ([out.long()], [lse]))
    yield wrong("lse_shape", ("lses[0]", "last dimension"), lambda out, lse: ([out], [lse[..., None]]))


def attention() -> Iterator[Wrong]:
    """Every wrong call of the family."""
    for layout in FUNCTIONS:
        yield from (*_tensors(layout), *_options(layout))
    yield from (*_dense(), *_varlen(), *_paged(), *_quantized(), *_merging())
