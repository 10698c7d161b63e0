"""Why a linear layer stays as it is, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchhal.errors import InvalidProblem
from torchhal.matmul import Call, build_problem, pack_weight
from torchhal.operands import Packed
from torchhal.selection import TORCH, select

_HOOKS: Final = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_CALLING: Final = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Classes of torch whose children are used by calling them."""
_TYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_left(layer: nn.Module, parents: Iterable[tuple[nn.Module, str]], plain: type = nn.Linear) -> str:
    """Why a module that is a ``plain`` one, or derived from it, can not be swapped; an empty string where it can.

    Args:
        layer: the module.
        parents: every module it is a child of, with its name there.
        plain: ``nn.Linear`` or ``nn.Embedding``.
    """
    if parametrize.is_parametrized(layer):
        return "it is parametrized: its weight is computed anew at each use"
    if type(layer) is not plain:
        return f"{type(layer).__name__} is a subclass of nn.{plain.__name__} and may compute something else"
    return (
        hooked(layer) or _weight_fault(layer) or next(filter(None, (_parent_fault(*p) for p in parents)), "")
    )


def hooked(module: nn.Module) -> str:
    """What was hung on a module, which would be lost with it; or an empty string."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    found = [name for name in _HOOKS if getattr(module, name, None)]
    return f"it has {found[0].strip('_').replace('_', ' ')}" if found else ""


def _weight_fault(layer: nn.Module) -> str:
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own (weight norm, pruning)"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        kind = type(weight.data) if type(weight) is nn.Parameter else type(weight)
        return f"its weight is a {kind.__name__}, a tensor with a meaning of its own"
    if weight.layout != torch.strided or weight.dtype not in _TYPES:
        return f"its weight is {weight.dtype} in the layout {weight.layout}, of which no product is made"
    return ""


def _parent_fault(parent: nn.Module, name: str) -> str:
    if name == "base_layer" or any(child.startswith("lora_") for child in parent._modules):
        return f"{type(parent).__name__} adapts it, and reads or merges its weight"
    for kind in type(parent).__mro__:
        of_torch = issubclass(kind, nn.Module) and kind.__module__.startswith("torch.nn.modules.")
        if of_torch and kind not in _CALLING:
            return f"nn.{kind.__name__} reads its weight without calling it"
    return ""


def why_not_served(
    weight: Tensor, bias: Tensor | None, scheme: Packed | None, backend: str | None, training: bool
) -> str:
    """Why no backend improves on torch for a layer on this weight; an empty string where one does.

    Args:
        weight: (N, K), whose type and device count.
        bias: (N,) or None.
        scheme: how the weight will be packed, by any weight packed so; None where it stays as it is.
        backend: the name that was asked for; None for the automatic choice, which never falls to the reference here.
        training: whether gradients will be asked for.

    Raises:
        Unsupported: ``backend`` was named and can not serve the layer.
    """
    if weight.device.type == "meta":
        return "its weight is on meta and holds no numbers"
    grad = training and weight.requires_grad
    a = _like(weight, (1, 1 if scheme is None else scheme.shape[0]), grad)
    b = _like(weight, (1, 1), grad).mT if scheme is None else scheme
    try:
        problem = build_problem(Call(a, b, None if bias is None else _like(bias, (1,), False)))
    except InvalidProblem as error:
        return str(error)
    asked = dataclasses.replace(problem, device=weight.device)
    route = select(asked, backend, or_torch=backend is None).route
    if route.chosen != TORCH:
        return ""
    reasons = "; ".join(f"{name}: {no}" for name, no in route.declined if no.code != "outranked")
    return f"no backend on {weight.device} improves on torch for it ({reasons or 'none is installed'})"


def scheme_of(weight: Tensor, bits: int, group: int | None, symmetric: bool) -> Packed:
    """A stand-in on the meta device, one column wide, for how ``weight`` (N, K) will be packed."""
    column = torch.zeros((weight.shape[1], 1), dtype=weight.dtype)
    return pack_weight(column, bits=bits, group=group, symmetric=symmetric).to("meta")


def _like(tensor: Tensor, shape: tuple[int, ...], grad: bool) -> Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device="meta", requires_grad=grad)
