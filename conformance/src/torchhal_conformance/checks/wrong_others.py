"""Wrong calls of the fused matrix product, of packed weights, and of foreach_map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

import torchhal
from torchhal.errors import CaptureError, InvalidProblem
from torchhal_conformance.checks.wrong import KINDS, Wrong, bad_tensors, named_backends
from torchhal_conformance.families import foreach as foreach_family
from torchhal_conformance.families import matmul as matmul_family
from torchhal_conformance.model import Inputs

PLAIN: Final = matmul_family.sample(matmul_family.Call(bias="own"))
BATCHED: Final = matmul_family.sample(matmul_family.Call(a_batch=(3,), b_batch=(3,)))
LISTS: Final = foreach_family.sample(foreach_family.Call("add"))

Change = Callable[[Inputs], Any]

# ---------------------------------------------------------------------------- matmul


def _multiply(backend: str, given: Inputs) -> object:
    options = {name: value for name, value in given.items() if name not in ("a", "b")}
    return torchhal.matmul(given["a"], given["b"], **{"backend": backend, **options})


def _product(
    name: str,
    says: tuple[str, ...],
    error: type[Exception] = InvalidProblem,
    good: Any = PLAIN,
    **changes: Change,
) -> Wrong:
    def call(backend: str, inputs: Inputs) -> object:
        return _multiply(backend, {**inputs, **{key: change(inputs) for key, change in changes.items()}})

    return Wrong(f"matmul-{name}", good, call, error, says)


def _operands() -> Iterator[Wrong]:
    kinds = {kind: KINDS[kind] for kind in ("list", "none", "integer", "sparse", "elsewhere")}
    scalar = {"scalar": (lambda t: t.sum(), ("at least one dimension", "0-dim"))}
    yield from bad_tensors("matmul", PLAIN, _multiply, {"a": "a", "b": "b"}, {**kinds, **scalar})
    words = {kind: kinds[kind] for kind in ("list", "elsewhere")}
    yield from bad_tensors("matmul", PLAIN, _multiply, {"bias": "bias"}, words)
    yield _product("inner", ("13", "12", "must be equal"), b=lambda i: i["b"][:-1])
    yield _product("transposed", ("pass b.mT",), b=lambda i: i["b"].mT.contiguous())
    yield _product("batch", ("broadcast", "(3,)", "(2,)"), good=BATCHED, b=lambda i: i["b"][:2])
    yield _product("bias_shape", ("(N,)", "(11,)", "(10,)"), bias=lambda i: i["bias"][:-1])
    yield _product("bias_matrix", ("(N,)", "(1, 11)"), bias=lambda i: i["bias"][None])
    yield _product("bias_type", ("bias", "torch.int32"), bias=lambda i: i["bias"].int())
    yield _product("packed_first", ("only b", "PackedWeight"), a=lambda i: torchhal.pack_weight(i["a"]))
    yield _product(
        "packed_inner",
        ("packed weight", "13", "must be equal"),
        b=lambda i: torchhal.pack_weight(i["b"][:-1]),
    )


def _at(place: str, change: Change) -> dict[str, Any]:
    return {place: change}


def _functions() -> Iterator[Wrong]:
    elsewhere = torch.ones((), device="meta")
    for place in ("a_prologue", "b_prologue", "epilogue"):
        yield _product(f"{place}_text", (place, "str"), **_at(place, lambda i: "relu"))
        yield _product(f"{place}_parameters", (place, "1 or 4", "2"), **_at(place, lambda i: lambda v, r: v))
        yield _product(f"{place}_reduces", ("sum",), CaptureError, **_at(place, lambda i: lambda v: v.sum()))
        yield _product(
            f"{place}_branches", (place,), CaptureError, **_at(place, lambda i: lambda v: v if v > 0 else -v)
        )
        yield _product(f"{place}_elsewhere", (place, "meta"), **_at(place, lambda i: lambda v: v * elsewhere))
    for place in ("a_prologue", "b_prologue"):
        yield _product(f"{place}_tuple", (place, "tuple"), **_at(place, lambda i: lambda v: (v, v)))


def _results() -> Iterator[Wrong]:
    yield _product("out_integer", ("out_dtype", "floating", "torch.int32"), out_dtype=lambda i: torch.int32)
    yield _product("out_text", ("out_dtype", "'float32'"), out_dtype=lambda i: "float32")
    two = (torch.float32, torch.float32)
    yield _product("out_count", ("2 types", "1 outputs"), out_dtype=lambda i: two)
    yield from named_backends("matmul", PLAIN, _multiply)


def _packing() -> Iterator[Wrong]:
    def wrong(name: str, says: tuple[str, ...], change: Callable[[Tensor], Any], **options: Any) -> Wrong:
        def call(backend: str, inputs: Inputs) -> object:
            return torchhal.pack_weight(change(inputs["b"]), **options)

        return Wrong(f"pack_weight-{name}", PLAIN, call, InvalidProblem, says)

    def same(t: Tensor) -> Tensor:
        return t

    yield wrong("list", ("matrix", "list"), lambda t: t.tolist())
    yield wrong("vector", ("matrix", "(13,)"), lambda t: t[:, 0])
    yield wrong("integer", ("floating", "torch.int64"), lambda t: t.long())
    yield wrong("infinite", ("finite", "inf"), lambda t: t + torch.inf)
    yield wrong("bits", ("bits=8", "bits=3"), same, bits=3)
    yield wrong("group", ("(None, 32, 64, 128)", "group=7"), same, group=7)


def matmul() -> Iterator[Wrong]:
    """Every wrong call of the family."""
    yield from (*_operands(), *_functions(), *_results(), *_packing())


# ---------------------------------------------------------------------------- foreach


def _lists(inputs: Inputs) -> list[list[Tensor]]:
    return [[t for name, t in inputs.items() if name.startswith(f"x{i}_")] for i in range(2)]


def _map(
    name: str,
    says: tuple[str, ...],
    make: Callable[[list[Tensor], list[Tensor]], tuple[Any, ...]],
    function: Any = torch.add,
    error: type[Exception] = InvalidProblem,
    options: Callable[[list[Tensor]], dict[str, Any]] = lambda first: {},
) -> Wrong:
    """``foreach_map(function, *make(first, second), **options(first))``."""

    def call(backend: str, inputs: Inputs) -> object:
        first, second = _lists(inputs)
        return torchhal.foreach_map(function, *make(first, second), **{"backend": backend, **options(first)})

    return Wrong(f"foreach-{name}", LISTS, call, error, says)


def _both(first: list[Tensor], second: list[Tensor]) -> tuple[Any, ...]:
    return first, second


def _arguments() -> Iterator[Wrong]:
    yield _map("no_function", ("a function first", "str"), _both, "add")
    yield _map("no_lists", ("at least one list", "float"), lambda x, y: (1.0, 2.0))
    yield _map("no_operands", ("at least one list",), lambda x, y: ())
    yield _map("lengths", ("one length", "5, 4"), lambda x, y: (x, y[:-1]))
    yield _map("one_tensor", ("operand 1", "(3,)", "list of tensors"), lambda x, y: (x, y[0]))
    yield _map("text", ("operand 1", "str"), lambda x, y: (x, "2"))
    yield _map("mixed_list", ("not both", "operand 1"), lambda x, y: (x, [*y[:-1], 1.0]))
    yield _map("list_of_text", ("operand 1", "str"), lambda x, y: (x, ["a"] * len(x)))
    yield _map("shapes", ("position 0", "broadcast", "(2,)"), lambda x, y: (x, [t.new_ones(2) for t in y]))
    yield _map("devices", ("position 0", "meta", "one device"), lambda x, y: (x, [t.to("meta") for t in y]))
    yield _map("sparse", ("operand 0", "dense", "sparse"), lambda x, y: ([t.to_sparse() for t in x], y))
    yield _map("keyword", ("no_such_keyword",), _both, options=lambda x: {"no_such_keyword": 1})
    yield Wrong("foreach-unknown_backend", LISTS, *_nobody())


def _nobody() -> tuple[Any, type[Exception], tuple[str, ...]]:
    def call(backend: str, inputs: Inputs) -> object:
        return torchhal.foreach_map(torch.add, *_lists(inputs), backend="no_such_backend")

    return call, torchhal.errors.BackendNotFound, ("no_such_backend", "Installed")


def _user_functions() -> Iterator[Wrong]:
    yield _map("parameters", ("2 operands",), _both, lambda x: x)
    yield _map("reduces", ("sum",), _both, lambda x, y: x.sum() + y, CaptureError)
    yield _map("branches", ("lambda",), _both, lambda x, y: x if x > 0 else y, CaptureError)
    yield _map("returns_text", ("str",), _both, lambda x, y: "sum", CaptureError)
    held = torch.ones(3)
    yield _map("captures_vector", ("(3,)",), _both, lambda x, y: x * held + y, InvalidProblem)


def _destinations() -> Iterator[Wrong]:
    def into(name: str, says: tuple[str, ...], make: Callable[[list[Tensor]], Any], **more: Any) -> Wrong:
        return _map(f"out_{name}", says, _both, options=lambda x: {"out": make(x)}, **more)

    yield into("tensor", ("out expects", "Tensor"), lambda x: x[0])
    yield into("short", ("as long as the operands", "4"), lambda x: x[:-1])
    yield into("numbers", ("out expects", "of tensors"), lambda x: [1.0] * len(x))
    yield into("shape", ("position 0", "(3,)", "(4,)"), lambda x: [x[0].new_empty(4), *x[1:]])
    yield into("integer", ("position 4", "torch.int32"), lambda x: [*x[:-1], x[-1].int()])
    yield into("elsewhere", ("position 0", "meta"), lambda x: [t.to("meta") for t in x])
    yield into("expanded", ("position 0", "share memory"), lambda x: [x[0][:1].expand(3), *x[1:]])
    yield into("two_lists", ("out expects",), lambda x: x, function=lambda x, y: (x + y, x - y))
    yield _map("in_place_on_number", ("first operand", "float"), lambda x, y: (1.0, y), torch.Tensor.add_)
    yield _map(
        "in_place_elsewhere", ("first operand", "out="), _both, torch.Tensor.add_,
        options=lambda x: {"out": [t.clone() for t in x]},
    )  # fmt: skip


def _reductions() -> Iterator[Wrong]:
    def reducing(name: str, says: tuple[str, ...], **options: Any) -> Wrong:
        def call(backend: str, inputs: Inputs) -> object:
            return torchhal.foreach_reduce(torch.add, *_lists(inputs), backend=backend, **options)

        return Wrong(f"foreach-{name}", LISTS, call, InvalidProblem, says)

    yield reducing("reduction", ("sum, max, any", "mean"), reduction="mean")
    yield reducing("reduction_out", ("no out",), out=[])


def foreach() -> Iterator[Wrong]:
    """Every wrong call of the family."""
    yield from (*_arguments(), *_user_functions(), *_destinations(), *_reductions())
