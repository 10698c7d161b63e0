"""A function mapped over lists of tensors: the public function, the one place its Problem is built, the eager path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torchhal import scope
from torchhal._caches import fast_cache
from torchhal._foreach_capture import Function, function, name_of, out_of_place
from torchhal._foreach_checks import Entry, arrange, check_layouts, check_shapes, slots_of_nothing
from torchhal._foreach_fast import glance, learns, one_length, plainly_disjoint, signature, written_lists
from torchhal._foreach_groups import Group, captured_by, graph_at, grouped
from torchhal._foreach_out import check_aliasing, check_fit, destinations, fits_plainly
from torchhal.errors import CaptureError, InvalidProblem
from torchhal.problems import ForeachProblem
from torchhal.registry import blame
from torchhal.selection import Selected, is_traced, select


class Common(NamedTuple):
    """A call of the common kind: everything about it that operands do not say."""

    selected: Selected
    structure: str


_plans: dict[tuple[object, ...], Selected] = fast_cache()

_common: dict[tuple[object, ...], Common] = fast_cache()

_direct: dict[tuple[object, ...], Common] = fast_cache()
"""Plans that look at the tensors themselves, by what a glance at a call tells."""

Lists = tuple[Sequence[Tensor], ...]


def foreach_map(fn: Callable[..., Any], *operands: Any, backend: str | None = None, **kwargs: Any) -> Any:
    """``[fn(*values) for values in zip(*operands)]`` in as few passes as the backend can, for pointwise ``fn``.

    Results are exactly what ``fn`` gives tensor by tensor in torch, element types included. Lists must have one
    length; element types and devices may vary along them. Numbers and 0-dim tensors are used at every position.
    The value of a number may change from call to call at no cost, unlike one that ``fn`` closes over.

    Args:
        fn: pointwise; takes one value from each operand, may capture 0-dim tensors, and may return a tuple. One of
            torch's in-place functions (``torch.Tensor.add_``) writes to the first operand.
        operands: lists of tensors, lists of numbers, numbers, and 0-dim tensors, with at least one list of
            tensors. Tensors at one position broadcast.
        backend: name of the backend to use; overrides every other choice.
        kwargs: ``out``: a list of destinations, one for each position (a tuple of lists if ``fn`` returns a
            tuple), each of which may be the operand at its position; every other keyword goes to ``fn``.

    Returns:
        A list with the result for each position (a tuple of lists if ``fn`` returns a tuple): new tensors, or
        the destinations. Empty lists give ``[]``.

    Raises:
        InvalidProblem: operands, destinations or keywords that mean nothing together; the message says which.
        CaptureError: ``fn`` is not pointwise.
        RuntimeError: a leaf that requires grad would be written to, as in torch.
        Unsupported: nobody the policy allows can serve the call; carries each backend's reason.
    """
    if torch.compiler.is_dynamo_compiling():
        from torchhal import compiled

        return compiled.foreach_map(fn, operands, backend, kwargs)
    result = serve(fn, operands, kwargs.pop("out", None), kwargs, Policy(backend))
    assert result is not LEFT_TO_TORCH
    return result


class Policy(NamedTuple):
    """How a call's backend is chosen, the arguments of :func:`torchhal.selection.select`; and what becomes of results."""

    backend: str | None = None
    strict: bool | None = None
    or_torch: bool = False
    reduction: str | None = None


LEFT_TO_TORCH: Final = object()
"""What :func:`serve` returns, having written nothing, where the policy leaves the call to torch."""


def serve(
    fn: Callable[..., Any], operands: tuple[Any, ...], out: Any, kwargs: dict[str, Any], policy: Policy
) -> Any:
    """:func:`foreach_map` in eager mode, under any policy."""
    twin = out_of_place(fn)
    if twin is not None:
        out = _in_place_target(fn, operands, out)
    if not callable(fn):
        raise InvalidProblem(f"foreach_map expects a function first and got {type(fn).__name__}")
    call = function(twin or fn, kwargs)
    seen = _glance_key(call, operands, out, policy)
    direct = None if seen is None else _direct.get(seen)
    if direct is not None:
        result = _run_direct(direct, operands, out)
        if result is not None:
            return result
    key = _common_key(call, operands, out, policy)
    common = None if key is None else _common.get(key)
    if common is not None:
        return _run_common(common, operands, out)
    return _run(call, operands, out, policy, key, seen)


def _glance_key(
    call: Function, operands: tuple[Any, ...], out: Any, policy: Policy
) -> tuple[object, ...] | None:
    """What a plan that looks at tensors itself depends on, None for a call that none can serve."""
    if call.key is None or call.tensors:
        return None
    seen = glance(operands, out)
    return None if seen is None else (call.key, seen, policy, scope.current.state)


def _run_direct(common: Common, operands: tuple[Any, ...], out: Any) -> Any:
    """The result, None where the plan needs the call to be looked at."""
    selected, structure = common
    assert selected.plan is not None and selected.plan.direct is not None
    lists = written_lists(out)
    if lists is None or not one_length(operands, lists) or learns(operands, lists):
        return None
    try:
        results = selected.plan.direct(operands, lists or None)
    except Exception as error:
        blame(error, selected.route.chosen)
        raise
    if results is None:
        return None
    selected.record()
    return out if out is not None else results if structure == "tuple" else results[0]


def _common_key(
    call: Function, operands: tuple[Any, ...], out: Any, policy: Policy
) -> tuple[object, ...] | None:
    """What the plan of a call of the common kind depends on, None for every other call."""
    if call.key is None or call.tensors or not (out is None or (operands and out is operands[0])):
        return None
    grad = torch.is_grad_enabled()
    found = signature(operands, grad)
    if found is None or (out is not None and grad and any([t.requires_grad for t in out])):  # noqa: C419
        return None
    return call.key, found, out is not None, policy, scope.current.state


def _run_common(common: Common, operands: tuple[Any, ...], out: Any) -> Any:
    selected, structure = common
    assert selected.run is not None
    if out is not None and not plainly_disjoint(out, operands):
        check_aliasing(arrange(operands)[0], [out])
    selected.record()
    try:
        results = selected.run(operands, (), None if out is None else (out,))
    except Exception as error:
        blame(error, selected.route.chosen)
        raise
    return (results if structure == "tuple" else results[0]) if out is None else out


def _run(
    call: Function, operands: tuple[Any, ...], out: Any, policy: Policy, key: tuple[object, ...] | None,
    seen: tuple[object, ...] | None,
) -> Any:  # fmt: skip
    """Serve any call; remembers it under ``key`` if it turns out to be of the common kind, and under ``seen`` a plan
    that looks at tensors itself.
    """
    entries, length = arrange(operands)
    if length == 0:
        return _empty(call, entries, out)
    check_layouts(entries)
    equal = check_shapes(entries)
    groups = grouped(call, entries, length)
    structure, outputs = groups[0].captures[0].structure, len(groups[0].captures[0].graph.outputs)
    lists = None if out is None else _checked_out(out, groups, entries, equal, length)
    prepared = [_prepare(group, entries, lists, policy) for group in groups]
    if any(part.selected.plan is None for part in prepared):
        return LEFT_TO_TORCH
    results = tuple([None] * length for _ in range(outputs)) if len(groups) > 1 else ()
    for group, part in zip(groups, prepared, strict=True):
        values = _dispatch(*part)
        if len(groups) == 1:
            results = values
            if len(group.kept) == len(operands) and not group.captures[0].tensors:
                _keep(part.selected, structure, group, equal, key, seen)
            break
        _scatter(values, group.positions, results)
    if out is not None:
        return out
    return results if structure == "tuple" else results[0]


def _keep(
    selected: Selected, structure: str, group: Group, equal: bool, key: tuple[object, ...] | None,
    seen: tuple[object, ...] | None,
) -> None:  # fmt: skip
    """Remember how a call of one group, all of whose operands its graphs take, was served."""
    common = Common(selected, structure)
    if key is not None:
        _common[key] = common
    plain = (
        equal and len(group.captures) == 1 and selected.plan is not None and selected.plan.direct is not None
    )
    if seen is not None and plain and not _LEARNING & selected.route.problem.features:
        _direct[seen] = common


_LEARNING: Final = frozenset(("backward", "captured_gradient"))


class _Prepared(NamedTuple):
    """One group, ready to run."""

    selected: Selected
    operands: list[Any]
    captured: tuple[Tensor, ...]
    out: Lists | None


def _prepare(group: Group, entries: Sequence[Entry], lists: Lists | None, policy: Policy) -> _Prepared:
    operands = [_part(entries[i], group) for i in group.kept]
    captured = tuple(_moved(t, group.device) for t in group.captures[0].tensors)
    out = (
        lists
        if lists is None or group.positions is None
        else tuple([items[p] for p in group.positions] for items in lists)
    )
    key = _key(group, operands, captured, out, policy)
    selected = _plans.get(key)
    if selected is None:
        problem = build_problem(
            group, _learns(operands, out), _any_grad(captured), out is not None, policy.reduction
        )
        selected = _plans[key] = select(
            problem, policy.backend, strict=policy.strict, or_torch=policy.or_torch
        )
    selected.record()
    return _Prepared(selected, operands, captured, out)


def _dispatch(
    selected: Selected, operands: list[Any], captured: tuple[Tensor, ...], out: Lists | None
) -> tuple[list[Any], ...]:
    """Run the chosen plan."""
    assert selected.plan is not None and selected.run is not None
    if not selected.plan.traceable and any(
        is_traced(t) for entry in operands if _is_tensors(entry) for t in entry[:1]
    ):
        return _traced(selected, operands, captured, out)
    try:
        return selected.run(operands, captured, out)  # type: ignore[no-any-return]
    except Exception as error:
        blame(error, selected.route.chosen)
        raise


def _traced(
    selected: Selected, operands: list[Any], captured: tuple[Tensor, ...], out: Lists | None
) -> tuple[list[Any], ...]:
    """Record the call as one operator; destinations are written after it."""
    from torchhal import ops_families

    results = ops_families.foreach_map(selected.route, operands, captured)
    if out is None:
        return results
    return tuple(
        [t.copy_(r) for t, r in zip(items, values, strict=True)]
        for items, values in zip(out, results, strict=True)
    )


def _key(
    group: Group, operands: Sequence[Any], captured: tuple[Tensor, ...], out: Lists | None, policy: Policy
) -> tuple[object, ...]:
    layouts = frozenset([t.layout for entry in operands if _is_tensors(entry) for t in entry])
    grad = torch.is_grad_enabled() and (_learns(operands, out), _any_grad(captured))
    graphs = tuple([c.graph for c in group.captures])
    return group.device, graphs, group.how, out is not None, layouts, grad, policy, scope.current.state


def _is_tensors(entry: Any) -> bool:
    return isinstance(entry, (list, tuple)) and isinstance(entry[0], Tensor)


def _any_grad(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _learns(operands: Sequence[Any], out: Lists | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    lists = [
        entry if _is_tensors(entry) else [entry]
        for entry in operands
        if _is_tensors(entry) or isinstance(entry, Tensor)
    ]
    return any(_any_grad(items) for items in (*lists, *(out or ())))


def _part(entry: Entry, group: Group) -> Any:
    """The operand at the group's positions, 0-dim CPU tensors moved to its device."""
    content = entry.content
    if entry.how == "scalar":
        return _moved(content, group.device) if isinstance(content, Tensor) else content
    if group.positions is not None:
        content = [content[position] for position in group.positions]
    if entry.how == "list" and group.device.type != "cpu":
        return [_moved(t, group.device) for t in content]
    return content


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu":
        raise InvalidProblem(
            f"a 0-dim tensor on {tensor.device} is used with tensors on {device}; move it to one of cpu and {device}"
        )
    return tensor.to(device)


def _scatter(
    part: tuple[list[Any], ...], positions: tuple[int, ...] | None, results: tuple[list[Any], ...]
) -> None:
    for values, target in zip(part, results, strict=True):
        for value, position in zip(values, positions or (), strict=True):
            target[position] = value


# ---------------------------------------------------------------------------- the problem


def build_problem(
    group: Group, learns: bool, captured_learn: bool, in_place: bool, reduction: str | None = None
) -> ForeachProblem:
    """The Problem of a group.

    Args:
        group: its device, graphs and operands.
        learns: whether gradients are to reach operands.
        captured_learn: whether gradients are to reach captured tensors.
        in_place: whether results are written to given tensors.
        reduction: what the elements of each result are reduced to.
    """
    graphs = tuple(captured.graph for captured in group.captures)
    asked = {
        "in_place": in_place,
        "scalars": any(how != "list" for how in group.how),
        "mixed_dtypes": len(graphs) > 1,
        "several_outputs": len(graphs[0].outputs) > 1,
        "captured_tensors": bool(group.captures[0].tensors),
        "backward": learns,
        "captured_gradient": captured_learn,
        "reduction": reduction is not None,
    }
    features = frozenset(name for name, wanted in asked.items() if wanted)
    return ForeachProblem(
        device=group.device, features=features, functions=graphs, operands=group.how, in_place=in_place,
        reduction=reduction,
    )  # fmt: skip


# ---------------------------------------------------------------------------- destinations


def _in_place_target(fn: Callable[..., Any], operands: Sequence[Any], out: Any) -> Any:
    if out is not None:
        advice = "use the function that does not work in place"
        raise InvalidProblem(
            f"{name_of(fn)} writes to its first operand, and out= names other destinations; {advice}"
        )
    if not operands or not isinstance(operands[0], (list, tuple)):
        got = type(operands[0]).__name__ if operands else "no operands"
        raise InvalidProblem(
            f"{name_of(fn)} writes to its first operand, which must be a list of tensors; got {got}"
        )
    return operands[0]


def _checked_out(
    out: Any, groups: Sequence[Group], entries: Sequence[Entry], equal: bool, length: int
) -> Lists:
    first = groups[0].captures[0]
    lists = destinations(out, first.structure, len(first.graph.outputs), length)
    if not (
        equal
        and len(groups) == 1
        and len(groups[0].captures) == 1
        and fits_plainly(first.graph, groups[0].device, entries, lists)
    ):
        for group in groups:
            kept = [entries[i] for i in group.kept]
            for position in range(length) if group.positions is None else group.positions:
                graph = graph_at(group, kept, position)
                check_fit(graph, group.device, position, kept, [items[position] for items in lists])
    check_aliasing(entries, lists, [t for group in groups for t in group.captures[0].tensors])
    return lists


def _empty(fn: Function, entries: Sequence[Entry], out: Any) -> Any:
    """The result for empty lists: as many of them as the function returns values, where that can be told."""
    if out is not None:
        if any(len(items) if isinstance(items, (list, tuple)) else True for items in out):
            raise InvalidProblem("out must be as long as the operands, which are empty, and is not")
        return out
    slots = tuple(slots_of_nothing(entry) for entry in entries)
    try:
        captured, _ = captured_by(fn, slots)
    except CaptureError:
        return []
    return tuple([] for _ in captured.graph.outputs) if captured.structure == "tuple" else []
