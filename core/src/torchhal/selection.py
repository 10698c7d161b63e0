"""Chooses a backend for each Problem, remembers the choice, and can say why.

The order of strength: the ``backend=`` argument; :func:`torchhal.use`; ``TORCHHAL_<FAMILY>_BACKEND``;
``TORCHHAL_BACKEND``; the lock file of ``torchhal tune``; the backends' own preference. The environment and
the lock file are read when a problem is first met; :func:`reset` makes torchhal look again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from torch import Tensor

from torchhal import environment, lock, scope
from torchhal import registry as registry_module
from torchhal._caches import REMEMBERED, fast_cache, forget_all
from torchhal.errors import AmbiguousBackends, BackendWarning, FallbackWarning, InvalidProblem, Unsupported
from torchhal.problems import FUSIONS, Decline, Plan, Problem
from torchhal.registry import REFERENCE, Backend, Registry, registry

TORCH: Final = "torch"
"""Stands in a Route for torch's own implementation, which the mode leaves calls to that it can not improve."""

SERVICES: Final = frozenset({"context_parallel", "cache_store", "deploy"})
"""Families that few backends bring. A general choice (``use()``, ``TORCHHAL_BACKEND``) of a backend that does
not claim one of them leaves it to the automatic choice, and the Route says so."""


@dataclass(eq=False)
class Route:
    """What was chosen for a Problem, by which rule, and everyone else's answer."""

    problem: Problem
    chosen: str | None
    """Name of the backend, ``torch`` for a call the mode left alone, None when nobody could."""
    rule: str
    """What decided: an argument, a variable, a file or a preference."""
    description: str = ""
    """The chosen plan in one line."""
    declined: tuple[tuple[str, Decline], ...] = ()
    unfused: Mapping[str, str] = field(default_factory=dict)
    """What the chosen plan of a matrix product does in a pass of its own, and why; see :attr:`Plan.unfused`."""
    _calls: Any = field(default_factory=lambda: itertools.count(), repr=False)

    @property
    def count(self) -> int:
        """How many calls took this route: under torch.compile, how many times it was traced."""
        return int(
            repr(self._calls)[len("count(") : -1]
        )  # itertools.count shows its next number, and only so

    def to_json(self) -> str:
        """The route as JSON, with the problem in its text form."""
        content = {
            "problem": json.loads(self.problem.text),
            "chosen": self.chosen,
            "rule": self.rule,
            "description": self.description,
            "declined": [{"backend": name, "code": d.code, "reason": d.reason} for name, d in self.declined],
            "unfused": dict(self.unfused),
            "count": self.count,
        }
        return json.dumps(content, indent=2)

    def unfused_texts(self) -> list[str]:
        """One line for each part that the chosen plan does not fuse."""
        return [f"{name}: {self.unfused[name]}" for name in FUSIONS if name in self.unfused]

    def __str__(self) -> str:
        lines = [f"{self.problem.summary()}", f"  chosen: {self.chosen or 'nobody'} by {self.rule}"]
        if self.description:
            lines[1] += f" ({self.description})"
        lines += [f"  unfused {text}" for text in self.unfused_texts()]
        lines += [f"  {name}: {decline}" for name, decline in self.declined]
        return "\n".join(lines)


class Selected(NamedTuple):
    """A cached choice."""

    plan: Plan | None
    """None when the mode should leave the call to torch."""
    route: Route
    run: Callable[..., Any] | None
    """``plan.run``, in which torch's attention is torch's own even where an installation replaced it."""
    record: Callable[[], object]
    """Counts one call: ``next`` on a C iterator is atomic, so no call of any thread is lost."""


def _selected_of(plan: Plan | None, route: Route) -> Selected:
    run = plan.run if plan else None
    if plan and not plan.traceable and route.problem.family == "attention":  # an operator calls none of it
        run = scope.uninstalled(plan.run)
    return Selected(plan, route, run, route._calls.__next__)


class _Explaining(str):
    """A choice that also asks :func:`select` to stop and hand the Route over; never equal to a plain name."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class _Explained(BaseException):
    def __init__(self, route: Route) -> None:
        self.route = route


_lock = threading.RLock()
_selected: dict[tuple[object, ...], Selected] = fast_cache()
_routes: dict[tuple[object, ...], Route] = fast_cache()


def reset() -> None:
    """Forget every plan, route and loaded plugin; environment and lock file are read again when needed."""
    with _lock:
        registry_module.reset()
        forget_all()


def is_traced(tensor: Tensor) -> bool:
    """Whether the tensor stands for data that a compiler will see later: fake, functional, a proxy."""
    return type(tensor).__name__ in (
        "FakeTensor",
        "FunctionalTensor",
    )  # by name: their modules are slow to import


def routes() -> list[Route]:
    """Every Route taken so far in this process, with counts, in the order of first use."""
    return [route for route in list(_routes.values()) if route.count]


def explain(fn: Callable[..., object], *args: object, **kwargs: object) -> Route:
    """The Route that the first call torchhal would serve inside ``fn(*args, **kwargs)`` takes.

    The call itself is not computed. ``fn`` may be a public function of torchhal or anything that calls
    torch under the mode, such as ``torch.nn.functional.scaled_dot_product_attention``, which is answered as for the
    innermost mode, else for the installation of this process, else for ``enable()``.

    Raises:
        InvalidProblem: ``fn`` made no call that torchhal routes.
    """
    from torchhal.installation import installed
    from torchhal.mode import active_mode, enable

    installation = installed()
    around = active_mode() or enable(*(installation.settings[:2] if installation else ()))
    try:
        with scope.changed(backend=_Explaining(scope.chosen_backend() or "")), around:
            fn(*args, **kwargs)
    except _Explained as answer:
        return answer.route
    except Unsupported as error:
        if error.route is not None:
            return error.route
        raise
    name = getattr(fn, "__name__", repr(fn))
    raise InvalidProblem(
        f"explain() found no call in {name} that torchhal routes; pass a torchhal function or one that calls attention"
    )


def select(
    problem: Problem,
    backend: str | None = None,
    *,
    strict: bool | None = None,
    or_torch: bool = False,
    fused: bool = False,
) -> Selected:
    """The plan for ``problem`` under the policy, chosen once and cached.

    Args:
        problem: what is asked.
        backend: the ``backend=`` argument of the call.
        strict: overrides ``TORCHHAL_STRICT``.
        or_torch: an automatic choice of the reference is given up in favour of torch itself.
        fused: a plan that leaves something unfused counts as declined.

    Raises:
        Unsupported: an explicit choice can not be honoured, or a fallback is an error under strict mode.
        AmbiguousBackends: two backends claim the problem with equal preference.
    """
    scoped = scope.chosen_backend()
    if isinstance(scoped, _Explaining):
        scoped = str.__str__(scoped) or None
        raise _Explained(_Selection(problem, backend, scoped, strict, or_torch, fused).run().route)
    key = (problem, backend, scoped, strict, or_torch, fused)
    selected = _selected.get(key)
    if selected is None:
        with _lock:
            selected = _selected.get(key) or _Selection(*key).run(announce=True)
            while len(_selected) >= REMEMBERED:
                oldest = next(iter(_selected))
                del _selected[oldest], _routes[oldest]
            _selected[key] = selected
            _routes[key] = selected.route
    return selected


class _Selection:
    """One negotiation, from the strongest rule to the weakest."""

    def __init__(
        self,
        problem: Problem,
        argument: str | None,
        scoped: str | None,
        strict: bool | None,
        or_torch: bool,
        fused: bool,
    ) -> None:
        self.problem = problem
        self.argument = argument
        self.scoped = scoped
        self.strict = environment.strict() if strict is None else strict
        self.or_torch = or_torch
        self.fused = fused
        self.registry: Registry = registry()
        self.declined: dict[str, Decline] = {}
        self.passed_over: list[str] = []
        """Backends better than the chosen one that declined: what makes a choice a fallback."""
        self.note = ""

    def run(self, announce: bool = False) -> Selected:
        if announce and not _selected:
            environment.warn_unknown(self.registry.backends)
        explicit = self._explicit_names()
        if explicit is not None:
            return self._by_name(*explicit)
        selected = self._by_lock() or self._by_preference()
        if selected.route.chosen in (REFERENCE, TORCH):
            self._blame_load_failures(selected.route)
        if announce and self.passed_over and not self.strict:
            warnings.warn(self._fallback_text(selected.route), FallbackWarning, stacklevel=4)
        if self.passed_over and self.strict:
            text = self._fallback_text(selected.route)
            refused = dataclasses.replace(
                selected.route, chosen=None, rule="strict mode, which forbids a fallback"
            )
            raise Unsupported(f"strict mode forbids the fallback: {text}", refused)
        return selected

    # -- explicit choices

    def _explicit_names(self) -> tuple[list[str], str] | None:
        if self.argument is not None:
            rule = f"the argument backend={self.argument!r}"
            return self._unless_service([self.argument], rule) if self.or_torch else ([self.argument], rule)
        if self.scoped is not None:
            return self._unless_service([self.scoped], f"use({self.scoped!r})")
        chosen = environment.preferred_backends(self.problem.family)
        return (
            None if chosen is None else self._unless_service(chosen[0], f"{chosen[1]}={','.join(chosen[0])}")
        )

    def _unless_service(self, names: list[str], rule: str) -> tuple[list[str], str] | None:
        family = self.problem.family
        backends = [self.registry.get(name) for name in names]
        optional = family in SERVICES or self.or_torch
        if optional and not any(getattr(b.info.capabilities, family) for b in backends):
            self.note = f"; {rule} does not serve {family}"
            return None
        return names, rule

    def _ask(self, backend: Backend) -> Plan | Decline:
        answer = backend.ask(self.problem)
        return answer.require_fused() if self.fused and isinstance(answer, Plan) else answer

    def _by_name(self, names: list[str], rule: str) -> Selected:
        for name in names:
            answer = self._ask(self.registry.get(name))
            if isinstance(answer, Plan):
                return self._choose(name, answer, rule, explicit=True)
            self.declined[name] = answer
        route = Route(self.problem, None, rule, declined=tuple(self.declined.items()))
        raise Unsupported(self._refusal_text(route), route)

    # -- automatic choices

    def _by_lock(self) -> Selected | None:
        locked = lock.read(self.registry)
        if locked is None:
            return None
        if locked.stale:
            _warn_stale(locked)
            return None
        name = locked.backend_for(self.problem)
        if name is None or name not in self.registry.backends:
            return None
        answer = self._ask(self.registry.backends[name])
        if isinstance(answer, Plan):
            variant, rule = locked.variant_for(self.problem), f"the lock file {locked.path}"
            found = answer if variant is None else answer.variant(variant)
            if found is None:
                rule += f", without the variant {variant!r}, which {name} does not offer any more"
            return self._choose(name, found or answer, rule)
        self._pass_over(name, answer)
        return None

    def _by_preference(self) -> Selected:
        candidates = self._candidates()
        ranked = sorted(candidates, key=self._preference, reverse=True)
        for preference, group in itertools.groupby(ranked, key=self._preference):
            plans = self._ask_all(list(group))
            if len(plans) > 1:
                raise AmbiguousBackends(self._ambiguity_text([name for name, _ in plans], preference))
            if plans:
                name, plan = plans[0]
                return self._choose(
                    name, plan, f"preference {preference} for {self.problem.device.type}{self.note}"
                )
        route = Route(self.problem, None, "no backend has a plan", declined=tuple(self.declined.items()))
        raise Unsupported(self._refusal_text(route), route)

    def _candidates(self) -> list[Backend]:
        found = []
        for backend in self.registry.backends.values():
            if backend.serves(self.problem):
                found.append(backend)
            else:
                answer = backend.ask(self.problem)
                assert isinstance(answer, Decline)
                self.declined[backend.name] = answer
        return [b for b in found if b.name not in self.passed_over]

    def _preference(self, backend: Backend) -> int:
        return backend.preference(self.problem.device.type)

    def _ask_all(self, group: list[Backend]) -> list[tuple[str, Plan]]:
        plans = []
        for backend in group:
            answer = self._ask(backend)
            if isinstance(answer, Plan):
                plans.append((backend.name, answer))
            else:
                self._pass_over(backend.name, answer)
        return plans

    def _blame_load_failures(self, route: Route) -> None:
        """A plugin that failed to load might have served: its failure counts as a decline."""
        for failure in self.registry.failures.values():
            self._pass_over(failure.name, Decline("load_failure", str(failure)))
        route.declined = tuple(self.declined.items())

    def _pass_over(self, name: str, decline: Decline) -> None:
        self.declined[name] = decline
        self.passed_over.append(name)

    # -- results

    def _choose(self, name: str, plan: Plan, rule: str, explicit: bool = False) -> Selected:
        for other in self.registry.backends:
            if other != name and other not in self.declined:
                self.declined[other] = Decline("outranked", f"not asked, {name} was chosen first")
        declined = tuple(self.declined.items())
        if name == REFERENCE and self.or_torch and not explicit:
            return _selected_of(
                None, Route(self.problem, TORCH, rule, "torch's own implementation", declined)
            )
        return _selected_of(plan, Route(self.problem, name, rule, plan.description, declined, plan.unfused))

    # -- texts

    def _reasons(self) -> str:
        return "".join(f"\n  {name}: {decline}" for name, decline in self.declined.items())

    def _refusal_text(self, route: Route) -> str:
        text = f"{self.problem.summary()} can not be served by {route.rule}.{self._reasons()}"
        failures = [
            f"\n  {failure}"
            for failure in self.registry.failures.values()
            if failure.name not in self.declined
        ]
        advice = "\nChange the call, choose another backend, or let torchhal choose."
        return text + "".join(failures) + advice

    def _fallback_text(self, route: Route) -> str:
        reasons = "; ".join(f"{name}: {self.declined[name]}" for name in self.passed_over)
        return f"{self.problem.summary()} falls back to {route.chosen}, because {reasons}"

    def _ambiguity_text(self, names: list[str], preference: int) -> str:
        choices = " and ".join(f"'{name}'" for name in names)
        return (
            f"{choices} claim {self.problem.summary()} with the same preference {preference}. Choose one with "
            f"backend=..., torchhal.use(...), TORCHHAL_BACKEND, or run `torchhal tune` to measure them."
        )


_stale_reported: set[str] = set()


def _warn_stale(locked: lock.Lock) -> None:
    if str(locked.path) not in _stale_reported:
        _stale_reported.add(str(locked.path))
        text = f"the selection lock file {locked.path} was measured elsewhere and is not used: {locked.stale}. Run `torchhal tune` again."
        warnings.warn(text, BackendWarning, stacklevel=6)
