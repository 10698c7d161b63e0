"""What torch asks of the native operators beside their kernels: results of fake tensors, and no derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchhal.operands import empty_output
from torchhal.reference.attention import score_dtype
from torchhal_cpu_x86 import gradients

NAMESPACE: Final = "torchhal_cpu_x86"
OPERATORS: Final = (
    "attention",
    "attention_lse",
    "masked_attention",
    "masked_attention_lse",
    "flex_attention",
    "attention_backward",
    "products",
)
"""Those that have no derivatives."""


def register() -> None:
    """Complete the operators that the native library has registered."""
    _register_fakes()
    gradients.register()
    for name in OPERATORS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "Autograd"):
            refuse_derivatives(name)


_LIBRARY: Final = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def refuse_derivatives(name: str) -> None:
    """Where the library found no refusing kernel in this torch: one in Python, which costs microseconds a call."""
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    _LIBRARY.impl(name, _refusing(operator), "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def _refusing(operator: Any) -> Callable[..., Any]:
    def call(keyset: Any, *arguments: Any) -> Any:
        if any(_is_differentiated(x) for x in _tensors(arguments)):
            raise NotImplementedError(
                f"{operator} has no gradient and does not support forward AD; call torchhal.attention without a "
                "backend, or enter torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return call


def _tensors(arguments: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among arguments and in lists among them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


def _is_differentiated(x: Tensor) -> bool:
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x)[1] is not None  # type: ignore[no-untyped-call]


def _check_devices(*arguments: object) -> None:
    """One meta tensor sends a call here: what it would make for real tensors is memory that nobody wrote."""
    devices = [x.device for x in _tensors(arguments)]
    if len(set(devices)) > 1:
        raise RuntimeError(
            "torchhal_cpu_x86: all tensors must be on one device, got " + ", ".join(map(str, devices))
        )


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    _check_devices(query, key, value, *rest)
    return empty_output(query, value)


def _fake_lse(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    _check_devices(query, key, value, *rest)
    return empty_output(query, value), query.new_empty(query.shape[:3], dtype=score_dtype(query.dtype))


def _fake_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: list[Tensor],
    description: str,
    scale: float,
    gradient: str = "",
) -> tuple[Tensor, ...]:
    _check_devices(query, key, value, operands)
    numbers = description.split(" ", 13)
    asked = (int(numbers[2]), int(numbers[12]))
    rows = (
        query.new_empty(query.shape[:-1] if wanted else (0,), dtype=score_dtype(query.dtype))
        for wanted in asked
    )
    return empty_output(query, value), *rows


def _fake_products(a: Tensor, parts: list[Tensor], chain: str) -> list[Tensor]:
    from torchhal_cpu_x86 import chains  # which needs the library, that is loading now

    _check_devices(a, parts)
    return chains.fake(a, parts, chain)


def _register_fakes() -> None:
    for name in ("flex_attention", "differentiable_attention"):
        torch.library.register_fake(f"torchhal_cpu_x86::{name}", _fake_flex)
    torch.library.register_fake("torchhal_cpu_x86::products", _fake_products)
    torch.library.register_fake("torchhal_cpu_x86::attention_backward", gradients.fake)
    for prefix in ("", "masked_"):
        torch.library.register_fake(f"torchhal_cpu_x86::{prefix}attention", _fake)
        torch.library.register_fake(f"torchhal_cpu_x86::{prefix}attention_lse", _fake_lse)
