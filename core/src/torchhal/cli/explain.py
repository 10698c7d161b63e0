"""``torchhal explain``: which backend a described call would take, and why the others would not."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from torchhal._text import dtype_from_name
from torchhal.cli.output import FAILED, Json, collected_warnings, emit, note, out, reporting_errors, usage
from torchhal.errors import FallbackWarning, InvalidProblem, Unsupported
from torchhal.problems import ForeachProblem, Problem
from torchhal.selection import Route, select

app = typer.Typer(
    help="Say which backend a described call would take, and why. Nothing is computed.", no_args_is_help=True
)

Dtype = Annotated[str, typer.Option(help="Element type, for example float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="torch device; it need not exist on this machine.")]
Backend = Annotated[str | None, typer.Option("--backend", help="As the backend= argument of the call.")]
Strict = Annotated[bool | None, typer.Option("--strict/--no-strict", help="Overrides TORCHHAL_STRICT.")]
Grad = Annotated[bool, typer.Option("--grad", help="The inputs require gradients.")]


@app.command("attention")
@reporting_errors
def attention(
    dtype: Dtype = "float32",
    batch: Annotated[int, typer.Option(help="Batch size; no choice depends on it.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key heads; as many as query heads by default.")
    ] = None,
    head_size: Annotated[int, typer.Option(help="Last dimension of query and key.")] = 64,
    value_head_size: Annotated[
        int | None, typer.Option(help="Last dimension of value; the head size by default.")
    ] = None,
    length: Annotated[int, typer.Option(help="Query rows; no choice depends on it.")] = 1,
    keys: Annotated[int, typer.Option(help="Keys; no choice depends on it.")] = 1,
    causal: Annotated[bool, typer.Option("--causal", help="is_causal=True.")] = False,
    mask: Annotated[
        str | None, typer.Option(help="attn_mask: bool (True takes part) or float (added).")
    ] = None,
    lse: Annotated[bool, typer.Option("--lse", help="return_lse=True.")] = False,
    grad: Grad = False,
    device: Device = "cpu",
    backend: Backend = None,
    strict: Strict = None,
    mode: Annotated[
        bool, typer.Option("--mode", help="As under torchhal.enable(): torch keeps what nobody improves.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Explain a call of attention.

    A choice never depends on lengths or on the batch size, so that nothing is chosen anew as a sequence grows.
    """
    from torchhal.attention_call import Call, build_problem

    kind, where = _dtype(dtype), _device(device)
    if mask not in (None, "bool", "float"):
        usage(f"--mask expects bool or float and got {mask!r}")
    groups = heads if kv_heads is None else kv_heads
    query = _meta((batch, heads, length, head_size), kind, grad)
    key = _meta((batch, groups, keys, head_size), kind, grad)
    value = _meta(
        (batch, groups, keys, head_size if value_head_size is None else value_head_size), kind, grad
    )
    attn_mask = None if mask is None else _meta((length, keys), torch.bool if mask == "bool" else kind, False)
    call = Call(query, key, value, attn_mask, is_causal=causal, enable_gqa=groups != heads, return_lse=lse)
    _explain(build_problem(call), where, backend, strict, json_output, or_torch=mode)


@app.command("matmul")
@reporting_errors
def matmul(
    dtype: Dtype = "float32",
    weight_dtype: Annotated[str | None, typer.Option(help="Element type of b; that of a by default.")] = None,
    packed: Annotated[
        int | None, typer.Option(help="b is a packed weight of this many bits, 8 or 4.")
    ] = None,
    group: Annotated[int | None, typer.Option(help="Rows of a packed weight that share a scale.")] = None,
    batched: Annotated[bool, typer.Option("--batched", help="a has a batch dimension.")] = False,
    bias: Annotated[bool, typer.Option("--bias", help="A bias is added.")] = False,
    epilogue: Annotated[
        str | None, typer.Option(help="A pointwise torch function, for example relu or silu.")
    ] = None,
    grad: Grad = False,
    device: Device = "cpu",
    backend: Backend = None,
    strict: Strict = None,
    fused: Annotated[
        bool, typer.Option("--fused", help='As fusion="require": what a plan leaves unfused declines it.')
    ] = False,
    json_output: Json = False,
) -> None:
    """Explain a call of matmul."""
    from torchhal.matmul import (
        NO_FUNCTIONS,
        Call,
        build_problem,
        capture_functions,
        element_dtype,
        pack_weight,
    )

    kind, where = _dtype(dtype), _device(device)
    other = kind if weight_dtype is None else _dtype(weight_dtype)
    a = _meta((2, 1, 128) if batched else (1, 128), kind, grad)
    b: Any = _meta((128, 1), other, grad)
    if packed is not None:
        b = pack_weight(torch.zeros(128, 1, dtype=other), bits=packed, group=group).to("meta")
    functions = NO_FUNCTIONS
    if epilogue is not None:
        functions = capture_functions(element_dtype(a, b), None, None, _torch_function(epilogue))
    call = Call(a, b, _meta((1,), kind, grad) if bias else None, functions)
    _explain(build_problem(call), where, backend, strict, json_output, fused=fused)


@app.command("foreach")
@reporting_errors
def foreach(
    dtype: Dtype = "float32",
    function: Annotated[
        str, typer.Option(help="A pointwise torch function of the operands, for example add or mul.")
    ] = "add",
    operands: Annotated[
        str, typer.Option(help="How each is passed: list, scalars or scalar, separated by commas.")
    ] = "list,list",
    in_place: Annotated[bool, typer.Option("--in-place", help="Results are written over operands.")] = False,
    device: Device = "cpu",
    backend: Backend = None,
    strict: Strict = None,
    json_output: Json = False,
) -> None:
    """Explain a call of foreach_map over lists of tensors of one type."""
    from torchhal.pointwise import capture

    kinds = tuple(operands.split(","))
    if not set(kinds) <= {"list", "scalars", "scalar"}:
        usage(f"--operands expects list, scalars or scalar, separated by commas, and got {operands!r}")
    kind, where = _dtype(dtype), _device(device)
    captured = capture(_torch_function(function), [(f"x{i}", kind) for i in range(len(kinds))], what=function)
    asked = {
        "in_place": in_place,
        "scalars": "scalar" in kinds or "scalars" in kinds,
        "several_outputs": len(captured.graph.outputs) > 1,
    }
    features = frozenset(name for name, wanted in asked.items() if wanted)
    problem = ForeachProblem(torch.device("meta"), features, (captured.graph,), kinds, in_place)
    _explain(problem, where, backend, strict, json_output)


@app.command("problem")
@reporting_errors
def problem(
    text: Annotated[
        str, typer.Argument(help="Text of a problem, as in the JSON of routes and in lock files.")
    ],
    backend: Backend = None,
    strict: Strict = None,
    json_output: Json = False,
) -> None:
    """Explain a problem of any family from its JSON text."""
    asked = Problem.from_text(text)
    _explain(asked, asked.device, backend, strict, json_output)


# ---------------------------------------------------------------------------- parts


def _dtype(name: str) -> torch.dtype:
    try:
        return dtype_from_name(name)
    except InvalidProblem as error:
        usage(str(error))


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        usage(
            f"--device expects a torch device such as cpu or cuda:0 and got {text!r}: {str(error).splitlines()[0]}"
        )
    return device if device.type == "cpu" or device.index is not None else torch.device(device.type, 0)


def _meta(shape: tuple[int, ...], dtype: torch.dtype, grad: bool) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad and dtype.is_floating_point)


def _torch_function(name: str) -> Any:
    function = getattr(torch, name, None) or getattr(torch.nn.functional, name, None)
    if not callable(function):
        usage(f"expected the name of a pointwise function of torch, such as relu, and got {name!r}")
    return function


def _explain(
    asked: Problem,
    device: torch.device,
    backend: str | None,
    strict: bool | None,
    json_output: bool,
    or_torch: bool = False,
    fused: bool = False,
) -> None:
    route, notes = explain(dataclasses.replace(asked, device=device), backend, strict, or_torch, fused)
    if json_output:
        emit({**json.loads(route.to_json()), "notes": notes})
    else:
        out().print(escape(str(route)))
        for text in notes:
            note(text)
    if route.chosen is None:
        raise typer.Exit(FAILED)


def explain(
    asked: Problem, backend: str | None, strict: bool | None, or_torch: bool, fused: bool = False
) -> tuple[Route, list[str]]:
    """The Route of a problem, refusals included, and the warnings that choosing it gave."""
    with collected_warnings(ignoring=FallbackWarning) as notes:
        try:
            route = select(asked, backend, strict=strict, or_torch=or_torch, fused=fused).route
        except Unsupported as error:
            if error.route is None:
                raise
            route = error.route
    return route, notes
