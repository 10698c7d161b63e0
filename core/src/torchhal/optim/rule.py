"""The base class of optimizers that are one pointwise function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Final, TypeVar

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.foreach import foreach_map
from torchhal.optim.parts import (
    Arrangement,
    Part,
    count_again,
    counted,
    counted_there,
    same,
    share_equal_counts,
)
from torchhal.streams import is_capturing

Group = dict[str, Any]
Result = TypeVar("Result", bound=Mapping[str, Any])

_REFUSED: Final = {
    "differentiable": (True, "parameters are overwritten, and nothing is recorded"),
    "foreach": (False, "the step is one pass over all tensors, and there is no other"),
    "fused": (False, "the step is one pass over all tensors, and there is no other"),
}  # fmt: skip
"""Keywords of torch's optimizers, the value that can not be honoured, and why."""


class Rule(torch.optim.Optimizer):
    """An optimizer whose step is one pointwise function over all parameters.

    A rule says what it keeps for each parameter, which numbers a step depends on, and how an element changes::

        class Momentum(torchhal.optim.Rule):
            def __init__(self, params, lr=1e-3, momentum=0.9):
                super().__init__(params, {"lr": lr, "momentum": momentum})

            def state_names(self, group):
                return ("velocity",)

            def numbers(self, group, step):
                return float(group["lr"]), group["momentum"]

            @staticmethod
            def update(param, grad, velocity, lr, momentum):
                velocity = velocity * momentum + grad
                return param - lr * velocity, velocity

    Numbers may change from step to step at no cost: the function is captured once for each element type.

    Args:
        params: parameters, or groups of them, as for every optimizer of torch.
        defaults: options of a group that does not set them.
    """

    counts_steps: ClassVar[bool] = False
    """Whether the state has ``step``, a 0-dim float32 tensor, and :meth:`numbers` needs it.

    It is on the CPU; in a group with ``capturable=True`` on the parameter's device, where a graph that is replayed counts on.
    """

    _last: dict[int, Arrangement]
    """By the group's number, if all of its parameters had a gradient in the last step."""
    _known: tuple[list[Any], list[Any]]
    """Parameters that had a state after the last step, and those states."""

    def __init__(self, params: Any, defaults: Group) -> None:
        for name, (refused, why) in _REFUSED.items():
            if defaults.get(name) is refused:
                raise InvalidProblem(
                    f"{type(self).__name__} does not have {name}={refused}: {why}; leave it out, or use torch.optim"
                )
        super().__init__(params, defaults)
        self._forget()

    # ------------------------------------------------------------------------ what a rule says

    def state_names(self, group: Group) -> tuple[str, ...]:
        """Names of the tensors kept for each parameter: zeros of its shape and type at first."""
        return ()

    def numbers(self, group: Group, step: int | Tensor) -> tuple[float | Tensor, ...]:
        """The numbers that :meth:`update` takes last, or 0-dim tensors in their place.

        Args:
            group: options of the parameters.
            step: 1 in the first step of a parameter; then how many there have been, or 2 if the rule does not
                count them. With ``capturable=True`` a rule that counts gets them as a 0-dim float32 tensor on the device,
                which it must not read.
        """
        return (self.rate(group),)

    @staticmethod
    def rate(group: Group) -> float | Tensor:
        """The learning rate; with ``capturable=True`` as the 0-dim tensor on a device that it may be, which graphs follow."""
        lr = group["lr"]
        if group.get("capturable") and isinstance(lr, Tensor) and lr.device.type != "cpu":
            return lr.reshape(())
        return float(lr)

    def options(self, group: Group) -> dict[str, Any]:
        """Keywords of :meth:`update`, each value of which is a function of its own."""
        return {}

    update: Callable[..., Any]
    """``update(param, grad, *state, *numbers, **options)``, static and pointwise: the new parameter, or a tuple of it and
    the new state in the order of :meth:`state_names`."""

    # ------------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss again, under autograd, and returns it.

        Returns:
            What ``closure`` returns.

        Raises:
            InvalidProblem: a gradient is sparse, or a parameter complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_capture()
        steady = same(self.state, self._known[0]) and same(self.state.values(), self._known[1])
        for number, group in enumerate(self.param_groups):
            names = self.state_names(group)
            for part in self._parts(number, group, names, steady):
                self._update(group, part)
        if not steady:
            self._known = list(self.state), list(self.state.values())
        return loss

    def _update(self, group: Group, part: Part) -> None:
        kept, numbers = part.kept, self.numbers(group, part.step)
        out = (part.params, *kept) if kept else part.params
        foreach_map(
            type(self).update, part.params, part.grads, *kept, *numbers, out=out, **self.options(group)
        )

    def _parts(self, number: int, group: Group, names: tuple[str, ...], steady: bool) -> list[Part]:
        """The parameters of a group that have a gradient, in parts; as in the last step where nothing has changed."""
        last = self._last.get(number) if steady else None
        found = None if last is None else last.again(group["params"], names, self.counts_steps)
        if found is not None:
            if self.counts_steps:
                for part in found:
                    count_again(part)
            return found
        self._last.pop(number, None)
        params = [p for p in group["params"] if p.grad is not None]
        self._check(params)
        parts = self._arranged(params, group, names)
        for part in parts:
            part.read(names)
        if params and len(params) == len(group["params"]):
            self._last[number] = Arrangement(list(params), [p.grad for p in params], names, parts)
        return parts

    def _arranged(self, params: list[Tensor], group: Group, names: tuple[str, ...]) -> list[Part]:
        """Parameters by how often they have been updated; each is looked at."""
        keeps = self.counts_steps or bool(names)
        there = bool(group.get("capturable"))
        begun: dict[torch.device, Tensor] = {}
        found: dict[Any, Part] = {}
        for param in params:
            state = self.state[param] if keeps else {}
            new = self._begin(param, state, names)
            if self.counts_steps:
                self._begin_count(param, state, begun, there)
            part = found.setdefault(
                id(state["step"]) if self.counts_steps else new, Part([], [], [], 1 if new else 2)
            )
            assert param.grad is not None
            part.params.append(param)
            part.grads.append(param.grad)
            part.states.append(state)
        if not self.counts_steps:
            return list(found.values())
        return list(counted_there(found.values(), self.state.values()) if there else counted(found.values()))

    @staticmethod
    def _begin(param: Tensor, state: dict[str, Any], names: tuple[str, ...]) -> bool:
        """Complete the state of a parameter; whether it had none."""
        missing = [name for name in names if state.get(name) is None]
        for name in missing:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return bool(missing)

    @staticmethod
    def _begin_count(
        param: Tensor, state: dict[str, Any], begun: dict[torch.device, Tensor], there: bool
    ) -> None:
        """See to it that a parameter has a count where it belongs; new ones on a device are one tensor, ``begun``."""
        device = param.device if there else torch.device("cpu")
        count = state.get("step")
        if isinstance(count, Tensor):
            state["step"] = count.to(device)
        elif count is None and there:
            state["step"] = begun.setdefault(device, torch.zeros((), dtype=torch.float32, device=device))
        else:
            state["step"] = torch.tensor(float(count or 0.0), dtype=torch.float32, device=device)

    def _check_capture(self) -> None:
        """Refuse to have a step count recorded that would stand still."""
        if not self.counts_steps:
            return
        for group in self.param_groups:
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            if not group.get("capturable") and is_capturing(device):
                raise InvalidProblem(
                    f"a step of {type(self).__name__} is being captured in a graph, whose replays would all have the same "
                    "step count; make the optimizer with capturable=True"
                )

    def _check(self, params: Iterable[Tensor]) -> None:
        for param in params:
            assert param.grad is not None
            if param.grad.layout is not torch.strided:
                raise InvalidProblem(
                    f"{type(self).__name__} takes dense gradients, and one is {param.grad.layout}; make the layer give dense "
                    "ones (Embedding(sparse=False)), or put its parameters into torch.optim.SparseAdam"
                )
            if param.is_complex():
                raise InvalidProblem(
                    f"{type(self).__name__} takes real parameters, and one is {param.dtype}; pass torch.view_as_real of it"
                )

    # ------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with a ``step`` of its own for every parameter, which torch's optimizers count up one by one."""
        found = super().state_dict()
        for number, state in found["state"].items():
            if isinstance(state.get("step"), Tensor):
                found["state"][number] = {**state, "step": state["step"].clone()}
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a checkpoint of torch's, whose groups may say how its steps were computed: here they are one pass."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            for name in _REFUSED.keys() & group.keys():
                group[name] = self.defaults.get(name)
            if self.counts_steps and group.get("capturable"):
                share_equal_counts(self.state[p] for p in group["params"] if p in self.state)
        self._forget()

    def _forget(self) -> None:
        """Look at every parameter in the next step."""
        self._last, self._known = {}, ([], [])
