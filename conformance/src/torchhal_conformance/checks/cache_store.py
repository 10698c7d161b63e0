"""Cache stores under damage, competition and sudden death."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

import torchhal
from torchhal.cache import CacheStore
from torchhal.errors import CacheIntegrityError, InvalidProblem
from torchhal_conformance.checks.processes import CHILD_SECONDS, await_all, named, specification, start
from torchhal_conformance.model import (
    Check,
    CheckFailed,
    Explanation,
    Inputs,
    Measured,
    Needs,
    Outputs,
    Sample,
)

SIZE: Final = 200_000

SCHEMES: Final = ("file", "memory")


@contextmanager
def _place(scheme: str) -> Iterator[tuple[str, Path]]:
    """The URL of an empty store, and a folder that holds nothing but that store's files."""
    with tempfile.TemporaryDirectory(prefix="torchhal-conformance-") as folder:
        root = Path(folder).resolve()
        url = (root / "store").as_uri() if scheme == "file" else f"memory://conformance-{uuid.uuid4().hex}"
        yield url, root


def _open_and_close(scheme: str, backend: str) -> Outputs:
    with _place(scheme) as (url, _):
        torchhal.cache_store(url, backend=backend)
    return ()


def _store_sample(scheme: str) -> Sample:
    def nothing(inputs: Inputs) -> Outputs:
        return ()

    return Sample(
        name=scheme,
        needs=Needs("cache_store", choice=scheme),
        make=lambda generator, device: {},
        call=lambda backend, inputs: _open_and_close(scheme, backend),
        exact=nothing,
        plain=nothing,
        tags=frozenset({scheme}),
    )


def _stores(*schemes: str) -> Callable[[], Iterator[Sample]]:
    return lambda: (_store_sample(scheme) for scheme in schemes)


def _value(seed: int, size: int) -> bytes:
    made = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return bytes(made.tolist())


def _require(wanted: object, got: object, what: str) -> None:
    if wanted != got:
        shown = got if not isinstance(got, bytes) else f"{len(got)} other bytes"
        raise CheckFailed(what, shown)


def roundtrip(backend: str, sample: Sample, seed: int) -> Measured:
    """What is put comes back, through every method of a store."""
    with _place(sample.needs.choice) as (url, _):
        store = torchhal.cache_store(url, backend=backend)
        values = {
            "empty": b"", "a/b/c": bytes(range(256)), "A/b/c": b"\0", "x.y_z-1": _value(seed, SIZE), "a": b"\r\n",
        }  # fmt: skip
        for key, value in values.items():
            _require(None, store.get(key), f"None for {key!r} before anything is put there")
            store.put(key, b"an older, longer value" * 9)
            store.put(key, value)
        for opened in (store, torchhal.cache_store(store.url, backend=backend)):
            _require_content(opened, values)
        _require(True, store.delete("a"), "True for a key that is deleted")
        _require(False, store.delete("a"), "False for a key that is deleted again")
        del values["a"]
        _require_content(store, values)
    return Measured()


def _require_content(store: CacheStore, values: dict[str, bytes]) -> None:
    _require(sorted(values), list(store.list()), "every key that was put, sorted")
    _require(["a/b/c"], list(store.list("a/")), "the keys that begin with a prefix")
    for key, value in values.items():
        _require(value, store.get(key), f"the bytes last put under {key!r}")
        _require(True, store.exists(key), f"{key!r} to exist")
    _require(False, store.exists("missing"), "a key that was never put not to exist")
    _require(len(values), store.stats().entries, "the number of entries in stats()")


# ---------------------------------------------------------------------------- damage


def _damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Other contents of a file, and what was done to it."""
    size = len(content)
    for length in sorted({0, 1, size // 2, size - 1}):
        if 0 <= length < size:
            yield f"cut to {length} of {size} bytes", content[:length]
    for at in sorted({*range(0, size, max(size // 16, 1)), size - 1}):
        if at >= 0:
            changed = bytearray(content)
            changed[at] ^= 0x10
            yield f"with a bit of byte {at} of {size} changed", bytes(changed)
    yield "with 7 bytes more", content + b"\0" * 7


def corruption(backend: str, sample: Sample, seed: int) -> Measured:
    """Every file of the store, damaged in turn; and a buffer that its owner changes after it was put."""
    value = _value(seed, 1000)
    with _place(sample.needs.choice) as (url, root):
        store = torchhal.cache_store(url, backend=backend)
        buffer = bytearray(value)
        store.put("k", buffer)  # type: ignore[arg-type]
        buffer[10] ^= 1
        _require(value, store.get("k"), "the bytes as they were when they were put")
        reported = 0
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        for path in files:
            content = path.read_bytes()
            for how, damaged in _damaged(content):
                path.write_bytes(damaged)
                reported += _is_reported(store, value, how)
            path.write_bytes(content)
        if files and not reported:
            raise CheckFailed("CacheIntegrityError for damaged files", "no error for any damage")
    return Measured(note=f"{reported} kinds of damage reported")


def _is_reported(store: CacheStore, value: bytes, how: str) -> bool:
    try:
        found = store.get("k")
    except CacheIntegrityError:
        return True
    if found != value:
        raise CheckFailed(
            f"CacheIntegrityError for a file {how}", "None" if found is None else "altered bytes"
        )
    return False


# ---------------------------------------------------------------------------- competition


def compete(specified: str, url: str, me: str, rounds: str) -> None:
    """Put and get one key over and over; raises if what is found was never put as a whole."""
    store = torchhal.cache_store(url, backend=named(specified))
    for _ in range(int(rounds)):
        store.put("shared", me.encode() * SIZE)
        found = store.get("shared")
        if found is not None and (len(found) != SIZE or len(set(found)) != 1):
            raise CheckFailed("the old value, the new one, or none", f"a mixture of {len(found)} bytes")


def concurrency(backend: str, sample: Sample, seed: int) -> Measured:
    """Four threads, and where they can share it two other processes, on one key."""
    with _place(sample.needs.choice) as (url, root):
        logs = [root / f"{me}.log" for me in "yz"] if sample.needs.choice == "file" else []
        specified = specification(backend)
        others = [start(__name__, "compete", specified, url, log.stem, "150", log=log) for log in logs]
        try:
            _compete_in_threads(backend, url)
        finally:
            await_all(others, logs, "processes that put and get one key", CHILD_SECONDS)
        if (found := torchhal.cache_store(url, backend=backend).get("shared")) is None or len(found) != SIZE:
            raise CheckFailed("a whole value when all have finished", "none, or a part")
    return Measured()


def _compete_in_threads(backend: str, url: str) -> None:
    raised: list[BaseException] = []

    def work(me: str) -> None:
        try:
            compete(backend, url, me, "40")
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(me,), daemon=True) for me in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(CHILD_SECONDS)
    if raised:
        raise raised[0]
    if any(thread.is_alive() for thread in threads):
        raise CheckFailed(f"threads to finish within {CHILD_SECONDS:.0f} s", "one that still runs")


def put_forever(specified: str, url: str, ready: str) -> None:
    """Put one key until killed; a file ``ready`` appears after the first time."""
    store = torchhal.cache_store(url, backend=named(specified))
    for number in itertools.count():
        store.put("k", bytes([number % 250 + 1]) * (20 * SIZE))
        if number == 0:
            Path(ready).touch()


def die_often(specified: str, url: str, ready: str) -> None:
    """Fork processes that put one key, kill each at another moment, and look at what is left."""
    backend = named(specified)
    torchhal.cache_store(url, backend=backend).put("k", bytes([251]) * (20 * SIZE))
    for number in range(DEATHS):
        _fork_and_kill(backend, url, Path(f"{ready}{number}"), 0.001 + 0.00037 * number)
        _require_whole(torchhal.cache_store(url, backend=backend))


def _fork_and_kill(backend: str, url: str, ready: Path, seconds: float) -> None:
    child = os.fork()
    if child == 0:
        try:
            put_forever(backend, url, str(ready))
        finally:
            os._exit(1)  # an exception must not go on as the process that was forked
    _await(ready.exists)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not ready.exists():
        raise CheckFailed("put() to return", "none that did")


DEATHS: Final = 32
"""A writer in place spends a third of its time in a write at least, so that all of so many miss it once in 400 000."""


def crash(backend: str, sample: Sample, seed: int) -> Measured:
    """Processes that die while they put."""
    with _place(sample.needs.choice) as (url, root):
        if sys.platform == "linux":
            log = root / "log"
            process = start(__name__, "die_often", specification(backend), url, str(root / "ready"), log=log)
            await_all([process], [log], f"put() to be killed {DEATHS} times", CHILD_SECONDS)
        else:
            for number in range(4):
                _kill_one(backend, url, root, number)
    return Measured()


def _kill_one(backend: str, url: str, root: Path, number: int) -> None:
    ready, log = root / f"ready{number}", root / "log"
    process = start(__name__, "put_forever", specification(backend), url, str(ready), log=log)
    try:
        _await(lambda: ready.exists() or process.poll() is not None)
        time.sleep(0.02 + 0.0137 * number)
    finally:
        process.kill()
        process.wait()
    if not ready.exists():
        raise CheckFailed("put() to return", log.read_text(errors="replace")[-300:] or "nothing")
    _require_whole(torchhal.cache_store(url, backend=backend))


def _await(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + CHILD_SECONDS / 2
    while not is_there() and time.monotonic() < deadline:
        time.sleep(0.001)


def _require_whole(store: CacheStore) -> None:
    expected = "the old value or the new one after a process died in put()"
    try:
        found = store.get("k")
    except CacheIntegrityError as error:
        raise CheckFailed(expected, f"CacheIntegrityError: {error}") from error
    if found is None or len(found) != 20 * SIZE or len(set(found)) != 1:
        raise CheckFailed(expected, "nothing" if found is None else f"a mixture of {len(found)} bytes")


# ---------------------------------------------------------------------------- keys


def _bad_keys(root: Path) -> tuple[str, ...]:
    return (
        "", ".", "..", "../x", "../../x", "a/../../x", "a/..", "/", "/x", str(root / "absolute"), "a//b", "a/", "a\\..\\..\\x",
        "C:\\x", "a\0b", "a\n", " ", "ü", "x\u202ey", "~", "$HOME", "%2e%2e/x", "x" * 121, "x" * 5000, "a/" * 60 + "a", "a/b/c/d/e",
    )  # fmt: skip


def paths(backend: str, sample: Sample, seed: int) -> Measured:
    """Keys that lead elsewhere, or that no file can be called by."""
    with _place(sample.needs.choice) as (url, root):
        store = torchhal.cache_store(url, backend=backend)
        store.put("honest", b"1")
        (root / "x").write_bytes(b"somebody else's")
        before = _outside(root)
        refused = 0
        for key in _bad_keys(root):
            refused += _is_refused_or_kept(store, key)
            _require(
                before, _outside(root), f"nothing outside of the store to change for the key {key[:40]!r}"
            )
            _require(b"1", store.get("honest"), f"other entries to stay for the key {key[:40]!r}")
    return Measured(note=f"{refused} keys refused")


def _outside(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if root / "store" not in path.parents and path.is_file())
    return {str(path): path.read_bytes() for path in files}


def _is_refused_or_kept(store: CacheStore, key: str) -> bool:
    steps: tuple[Callable[[], Any], ...] = (
        lambda: store.put(key, b"2"), lambda: store.get(key), lambda: store.exists(key), lambda: store.delete(key),
    )  # fmt: skip
    answers = []
    for step in steps:
        try:
            answers.append(step())
        except InvalidProblem:
            answers.append("refused")
        except Exception as error:
            expected = f"InvalidProblem, or an entry, for the key {key[:40]!r}"
            raise CheckFailed(expected, f"{type(error).__name__}: {error}") from error
    if answers == ["refused"] * 4:
        return True
    _require([None, b"2", True, True], answers, f"the key {key[:40]!r} refused by all methods, or by none")
    return False


# ---------------------------------------------------------------------------- checks

CHECKS: Final = (
    Check(
        "cache_store.roundtrip",
        Explanation(
            "Puts, overwrites, lists, reopens and deletes values of all bytes, empty ones and keys that differ in capitals.",
            "A store on a file system that does not tell capitals apart gives one model the other's code, and a file "
            "opened in text mode changes line ends.",
            "Look at how a key becomes a name, and whether overwriting cuts the older, longer value.",
        ),
        _stores(*SCHEMES), roundtrip, refuses=True,
    ),
    Check(
        "cache_store.corruption",
        Explanation(
            "Cuts, extends and changes every file of a store, and changes a buffer after it was put: each time the store "
            "gives the bytes that were put or raises CacheIntegrityError.",
            "Caches hold code that is executed. A container killed while it wrote left truncated Triton and Inductor "
            "cache files that later runs loaded, and failed on far away from the cause.",
            "Keep a digest of the whole value beside it, and check it in get() before anything is returned.",
        ),
        _stores(*SCHEMES), corruption,
    ),
    Check(
        "cache_store.concurrency",
        Explanation(
            "Lets four threads, and two more processes for files, put and get one key: a value is whole or absent.",
            "The ranks of one job compile the same graph at the same time; caches that wrote into the final file gave "
            "half-written kernels to the others on shared file systems.",
            "Write to a temporary file whose name no other writer has, and move it into place with os.replace.",
        ),
        _stores(*SCHEMES), concurrency,
    ),
    Check(
        "cache_store.crash",
        Explanation(
            f"Kills processes in the middle of put(), {DEATHS} of them (4 elsewhere than on Linux); the key then holds a whole value.",
            "Schedulers kill jobs with SIGKILL, so no cleanup runs; a store that removes or truncates the old value "
            "first has lost it then.",
            "Nothing may touch the old value before the new one is complete on disk.",
        ),
        _stores("file"), crash,
    ),
    Check(
        "cache_store.paths",
        Explanation(
            "Gives keys with '..', absolute paths, control characters and thousands of letters: refused by all methods with "
            "InvalidProblem, or kept as entries; never a file elsewhere.",
            "Keys come from archives that somebody else made; extracting cache keys with '..' in them has overwritten "
            "files of the user's (zip slip).",
            "Call torchhal.cache.check_key first in every method.",
        ),
        _stores(*SCHEMES), paths,
    ),
)  # fmt: skip


def checks() -> Iterator[Check]:
    """Those of stores."""
    yield from CHECKS
