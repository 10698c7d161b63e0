"""Wrong calls of the families whose results are no tensors: stores, deployment, context parallelism."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torchhal
from torchhal import deploy as deployment
from torchhal.errors import BackendNotFound, InvalidProblem, Unsupported
from torchhal_conformance import calls
from torchhal_conformance.checks.wrong import Wrong
from torchhal_conformance.model import Inputs, Needs, Outputs, Sample

NOBODY: Final = "no_such_backend"


def _nothing(inputs: Inputs) -> Outputs:
    return ()


def _good(family: str, choice: str, call: Callable[[str], object]) -> Sample:
    """A call without inputs or tensors as results."""

    def made(backend: str, inputs: Inputs) -> Outputs:
        call(backend)
        return ()

    needs = Needs(family, choice=choice)
    return Sample(choice or "auto", needs, lambda generator, device: {}, made, _nothing, _nothing)


def _wrong(
    good: Sample,
    name: str,
    says: tuple[str, ...],
    call: Callable[[str], object],
    error: type[Exception] = InvalidProblem,
) -> Wrong:
    return Wrong(name, good, lambda backend, inputs: call(backend), error, says)


# ---------------------------------------------------------------------------- stores


def _open(backend: str) -> Any:
    return torchhal.cache_store("memory://conformance-errors", backend=backend)


STORE: Final = _good("cache_store", "memory", _open)


def cache_store() -> Iterator[Wrong]:
    """Wrong places, keys and values."""
    for name, url, shown in (
        ("number", 7, "7"),
        ("empty", "", "''"),
        ("bytes", b"memory://x", "b'memory://x'"),
    ):
        yield _wrong(
            STORE,
            f"url_{name}",
            ("a path or a URL", shown),
            lambda b, url=url: torchhal.cache_store(url, backend=b),  # type: ignore[misc]
        )
    scheme = "no-such-scheme"
    yield _wrong(
        STORE,
        "scheme_unknown",
        (scheme,),
        lambda b: torchhal.cache_store(f"{scheme}://x", backend=b),
        Unsupported,
    )
    yield _wrong(
        STORE, "backend_unknown", (NOBODY, "Installed"), lambda b: torchhal.cache_store("memory://x", backend=NOBODY),
        BackendNotFound,
    )  # fmt: skip
    for method, rest in (("get", ()), ("put", (b"1",)), ("exists", ()), ("delete", ())):
        yield _wrong(
            STORE, f"{method}-key", ("a cache key is", "'../x'"),
            lambda b, method=method, rest=rest: getattr(_open(b), method)("../x", *rest),  # type: ignore[misc]
        )  # fmt: skip
    for name, value in (("text", "text"), ("number", 5)):
        yield _wrong(
            STORE, f"put-{name}", ("bytes", type(value).__name__),
            lambda b, value=value: _open(b).put("k", value),  # type: ignore[misc]
        )  # fmt: skip
    for name, function in (("save_cache", torchhal.save_cache), ("load_cache", torchhal.load_cache)):
        yield _wrong(STORE, f"{name}-store", ("a cache store or its URL", "7"), lambda b, f=function: f(7))  # type: ignore[misc]
        yield _wrong(STORE, f"{name}-key", ("key", "'../x'"), lambda b, f=function: f(_open(b), "../x"))  # type: ignore[misc]


# ---------------------------------------------------------------------------- deployment


def _advise(backend: str) -> object:
    return deployment.compile_options(calls.device_of(backend), backend=backend)


ADVICE: Final = _good("deploy", "compile_options", _advise)
TASKS: Final[dict[str, Callable[..., Any]]] = {
    "compile_options": deployment.compile_options,
    "quantizer": deployment.quantizer,
    "profiler_activities": deployment.profiler_activities,
}


def _missing(name: str) -> str:
    return str(Path(tempfile.gettempdir()) / "torchhal-conformance-nowhere" / name)


def deploy() -> Iterator[Wrong]:
    """Wrong devices, programs and paths."""
    for name, function in TASKS.items():
        yield _wrong(
            ADVICE, f"{name}-device_unknown", ("torch device", "'no_device'"),
            lambda b, f=function: f("no_device", backend=b),  # type: ignore[misc]
        )  # fmt: skip
        yield _wrong(
            ADVICE,
            f"{name}-device_number",
            ("torch device", "2.5"),
            lambda b, f=function: f(2.5, backend=b),  # type: ignore[misc]
        )
        yield _wrong(
            ADVICE, f"{name}-backend_unknown", (NOBODY, "Installed"), lambda b, f=function: f("cpu", backend=NOBODY),  # type: ignore[misc]
            BackendNotFound,
        )  # fmt: skip
    yield _wrong(
        ADVICE,
        "package-module",
        ("ExportedProgram", "int"),
        lambda b: deployment.package(3, "x.pt2", backend=b),  # type: ignore[arg-type]
    )
    yield _wrong(ADVICE, "load-missing", ("no package at",), lambda b: deployment.load(_missing("x.pt2")))
    yield _wrong(ADVICE, "load-no_archive", ("is no package",), lambda b: deployment.load(__file__))


# ---------------------------------------------------------------------------- context parallelism


def _enter(mesh: Any, **options: Any) -> None:
    with torchhal.context_parallel(mesh, **options):
        pass


RANKS: Final = _good("context_parallel", "", lambda backend: None)


def context_parallel() -> Iterator[Wrong]:
    """Without ranks there is none that is right; what is wrong is said all the same, before anybody waits for a rank."""
    yield _wrong(RANKS, "mesh_missing", ("torch.distributed",), lambda b: _enter(None, backend=b))
    yield _wrong(RANKS, "mesh_text", ("torch.distributed",), lambda b: _enter("cpu", backend=b))
