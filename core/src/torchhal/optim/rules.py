"""AdamW, Lion and SGD as rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.optim.rule import Group, Rule


def _require(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise InvalidProblem(f"{name} must be {expected}, got {value}")


def _check_rates(lr: float | Tensor, weight_decay: float) -> None:
    if isinstance(lr, Tensor):
        _require("a tensor lr", f"shape {tuple(lr.shape)}", lr.numel() == 1, "of one element")
    _require("lr", float(lr), float(lr) >= 0, "0 or more")
    _require("weight_decay", weight_decay, weight_decay >= 0, "0 or more")


def _check_betas(betas: tuple[float, float]) -> None:
    _require("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two of [0, 1)")


def _wide(x: Any) -> Any:
    """16-bit values are computed with as float32, so that each is rounded once."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _asked(grad: Any, param: Any, maximize: bool) -> tuple[Any, Any]:
    """Gradient of what is minimised, and parameter, as they are computed with."""
    return (-_wide(grad) if maximize else _wide(grad)), _wide(param)


class AdamW(Rule):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as ``torch.optim.AdamW``.

    Args:
        params: parameters or groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decay of the averages of gradients and of their squares.
        eps: added to the root of the second.
        weight_decay: share of a parameter, times ``lr``, that each step takes away.
        amsgrad: divide by the largest second average so far (Reddi et al. 2018).
        maximize: climb instead of descend.
        foreach, fused: accepted as True or None: a step is one pass anyway.
        capturable: count steps on the device, and read a learning rate there that is a tensor, so that a step can be recorded
            in a graph and replayed.
        differentiable: accepted as False alone.

    Raises:
        InvalidProblem: a value out of its range, or a keyword that can not be honoured.
    """

    counts_steps = True

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False, foreach: bool | None = None,
        capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
    ) -> None:  # fmt: skip
        _check_rates(lr, weight_decay)
        _check_betas(betas)
        _require("eps", eps, eps >= 0, "0 or more")
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize,
            "foreach": foreach, "capturable": capturable, "differentiable": differentiable, "fused": fused,
            "decoupled_weight_decay": True,
        })  # fmt: skip

    def state_names(self, group: Group) -> tuple[str, ...]:
        averages = ("exp_avg", "exp_avg_sq")
        return (*averages, "max_exp_avg_sq") if group["amsgrad"] else averages

    def numbers(self, group: Group, step: int | Tensor) -> tuple[float | Tensor, ...]:
        lr, (beta1, beta2) = self.rate(group), group["betas"]
        count: Any = step.double() if isinstance(step, Tensor) else step
        shrink = 1.0 - lr * float(group["weight_decay"])
        return (
            shrink,
            1.0 - beta1,
            beta2,
            lr / (1.0 - beta1**count),
            (1.0 - beta2**count) ** 0.5,
            group["eps"],
        )

    def options(self, group: Group) -> dict[str, Any]:
        return {"maximize": bool(group["maximize"])}

    @staticmethod
    def update(param: Any, grad: Any, mean: Any, square: Any, *rest: Any, maximize: bool) -> Any:
        *largest, shrink, share, beta2, rate, correction, eps = rest
        g, p = _asked(grad, param, maximize)
        m = _wide(mean) + share * (g - _wide(mean))
        v = _wide(square) * beta2 + (1.0 - beta2) * (g * g)
        most = [torch.maximum(_wide(x), v) for x in largest]
        p = p * shrink - rate * (m / (torch.sqrt(most[0] if most else v) / correction + eps))
        return tuple([new.to(param.dtype) for new in (p, m, v, *most)])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


class Lion(Rule):
    """The sign of an average of gradients (Chen et al. 2023, arXiv:2302.06675).

    Args:
        params: parameters or groups.
        lr: learning rate, a number or a tensor of one element; a tenth to a third of AdamW's.
        betas: weights of the average in the step, and of the average that is kept.
        weight_decay: share of a parameter, times ``lr``, that each step takes away.
        maximize: climb instead of descend.

    Raises:
        InvalidProblem: a value out of its range.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        _check_rates(lr, weight_decay)
        _check_betas(betas)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def state_names(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg",)

    def numbers(self, group: Group, step: int | Tensor) -> tuple[float | Tensor, ...]:
        lr = float(group["lr"])
        return lr, 1.0 - lr * float(group["weight_decay"]), *group["betas"]

    def options(self, group: Group) -> dict[str, Any]:
        return {"maximize": bool(group["maximize"])}

    @staticmethod
    def update(
        param: Any, grad: Any, mean: Any, lr: Any, shrink: Any, beta1: Any, beta2: Any, *, maximize: bool
    ) -> Any:
        g, p = _asked(grad, param, maximize)
        m = _wide(mean)
        p = p * shrink - lr * torch.sign(beta1 * m + (1.0 - beta1) * g)
        m = beta2 * m + (1.0 - beta2) * g
        return p.to(param.dtype), m.to(param.dtype)


class SGD(Rule):
    """Gradient descent with momentum, as ``torch.optim.SGD``.

    Args:
        params: parameters or groups.
        lr: learning rate, a number or a tensor of one element.
        momentum: share of the last step that is taken again.
        dampening: share of the gradient that momentum leaves out, but for the first step.
        weight_decay: share of a parameter that is added to its gradient.
        nesterov: look ahead by one momentum.
        maximize: climb instead of descend.
        foreach, fused: accepted as True or None: a step is one pass anyway.
        differentiable: accepted as False alone.

    Raises:
        InvalidProblem: a value out of its range, or a keyword that can not be honoured.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, nesterov: bool = False, *, maximize: bool = False, foreach: bool | None = None,
        differentiable: bool = False, fused: bool | None = None,
    ) -> None:  # fmt: skip
        _check_rates(lr, weight_decay)
        _require("momentum", momentum, momentum >= 0, "0 or more")
        ahead = not nesterov or (momentum > 0 and dampening == 0)
        _require("nesterov", nesterov, ahead, "with a momentum and without dampening")
        super().__init__(params, {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize, "foreach": foreach, "differentiable": differentiable, "fused": fused,
        })  # fmt: skip

    def state_names(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def numbers(self, group: Group, step: int | Tensor) -> tuple[float | Tensor, ...]:
        momentum = float(group["momentum"])
        share = 1.0 if step == 1 else 1.0 - float(group["dampening"])
        return float(group["lr"]), float(group["weight_decay"]), momentum, share

    def options(self, group: Group) -> dict[str, Any]:
        return {name: bool(group[name]) for name in ("nesterov", "maximize", "weight_decay")}

    @staticmethod
    def update(param: Any, grad: Any, *rest: Any, nesterov: bool, maximize: bool, weight_decay: bool) -> Any:
        *kept, lr, decay, momentum, share = rest
        g, p = _asked(grad, param, maximize)
        g = g + decay * p if weight_decay else g
        buffers = [_wide(buffer) * momentum + share * g for buffer in kept]
        for buffer in buffers:
            g = g + momentum * buffer if nesterov else buffer
        found = tuple([new.to(param.dtype) for new in (p - lr * g, *buffers)])
        return found if kept else found[0]
