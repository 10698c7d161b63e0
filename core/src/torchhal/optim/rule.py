"""The base class of optimizers that are one pointwise function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.foreach import foreach_map

Group = dict[str, Any]
Result = TypeVar("Result", bound=Mapping[str, Any])

_REFUSED: Final = {
    "capturable": (True, "learning rate and step count are numbers of each call, which a graph of an accelerator can not replay"),
    "differentiable": (True, "parameters are overwritten, and nothing is recorded"),
    "foreach": (False, "the step is one pass over all tensors, and there is no other"),
    "fused": (False, "the step is one pass over all tensors, and there is no other"),
}  # fmt: skip
"""Keywords of torch's optimizers, the value that can not be honoured, and why."""


class Part(NamedTuple):
    """Parameters of one group that have a gradient and are updated with the same numbers."""

    params: list[Tensor]
    states: list[dict[str, Any]]
    step: int
    """How often they have been updated, this time included; for a rule that does not count, 1 or 2."""


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
    """Whether the state has ``step``, as a 0-dim float32 tensor on the CPU, and :meth:`numbers` needs it."""

    def __init__(self, params: Any, defaults: Group) -> None:
        for name, (refused, why) in _REFUSED.items():
            if defaults.get(name) is refused:
                raise InvalidProblem(
                    f"{type(self).__name__} does not have {name}={refused}: {why}; leave it out, or use torch.optim"
                )
        super().__init__(params, defaults)

    # ------------------------------------------------------------------------ what a rule says

    def state_names(self, group: Group) -> tuple[str, ...]:
        """Names of the tensors kept for each parameter: zeros of its shape and type at first."""
        return ()

    def numbers(self, group: Group, step: int) -> tuple[float, ...]:
        """The numbers that :meth:`update` takes last.

        Args:
            group: options of the parameters.
            step: 1 in the first step of a parameter; then how many there have been, or 2 if the rule does not
                count them.
        """
        return (float(group["lr"]),)

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
        for group in self.param_groups:
            names = self.state_names(group)
            for part in self._parts(group, names):
                self._update(group, names, part)
        return loss

    def _update(self, group: Group, names: tuple[str, ...], part: Part) -> None:
        kept = [[state[name] for state in part.states] for name in names]
        out = (part.params, *kept) if kept else part.params
        grads = [p.grad for p in part.params]
        numbers = self.numbers(group, part.step)
        foreach_map(type(self).update, part.params, grads, *kept, *numbers, out=out, **self.options(group))

    def _parts(self, group: Group, names: tuple[str, ...]) -> Iterator[Part]:
        params = [p for p in group["params"] if p.grad is not None]
        self._check(params)
        keeps = self.counts_steps or bool(names)
        states = [self.state[p] if keeps else {} for p in params]
        found: dict[Any, Part] = {}
        for param, state in zip(params, states, strict=True):
            new = self._begin(param, state, names)
            step = state["step"] if self.counts_steps else None
            key = new if step is None else id(step)
            part = found.get(key)
            if part is None:
                part = found[key] = Part([], [], 1 if new else 2)
            part.params.append(param)
            part.states.append(state)
        return iter(found.values()) if not self.counts_steps else self._counted(found.values())

    def _begin(self, param: Tensor, state: dict[str, Any], names: tuple[str, ...]) -> bool:
        """Complete the state of a parameter; whether it had none."""
        missing = [name for name in names if state.get(name) is None]
        for name in missing:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if self.counts_steps and not isinstance(state.get("step"), Tensor):
            state["step"] = torch.tensor(float(state.get("step", 0.0)), dtype=torch.float32)
        return bool(missing)

    @staticmethod
    def _counted(parts: Any) -> Iterator[Part]:
        """One step more for each; parts that have come as far as one another share their count from then on.

        1000 counts in tensors of their own take longer to increase than 1000 small parameters to update.
        """
        merged: dict[float, Part] = {}
        for part in parts:
            before = float(part.states[0]["step"])
            merged.setdefault(before, Part([], [], int(before) + 1))
            merged[before].params.extend(part.params)
            merged[before].states.extend(part.states)
        for before, part in merged.items():
            # A new one: parameters that have no gradient this time may share the old one.
            step = torch.tensor(before + 1.0, dtype=torch.float32)
            for state in part.states:
                state["step"] = step
            yield part

    def _check(self, params: list[Tensor]) -> None:
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
