"""Portable compile caches: stores named by a URL, and what ``torch.compile`` produced kept in them safely.

Upstream's cache artifacts (``torch.compiler.save_cache_artifacts``) are kept in sections of our own format,
each stamped with the environment it was made in and with digests of every byte, all checked before torch sees
any of it. See :func:`load_cache` for what that protects from, and what it does not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable
from urllib.parse import urlsplit

import torch

from torchhal import _cache_format as fmt
from torchhal._fingerprint import Difference, Fingerprint, explain, fingerprint
from torchhal.errors import CacheIntegrityError, InvalidProblem
from torchhal.problems import CacheStoreProblem
from torchhal.selection import select

__all__ = [
    "CacheEntry",
    "CacheStore",
    "Difference",
    "Fingerprint",
    "LoadReport",
    "StoreStats",
    "cache_store",
    "check_key",
    "default_key",
    "explain",
    "fingerprint",
    "load_cache",
    "save_cache",
]

_PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_KEY: Final = re.compile(rf"{_PART}(/{_PART}){{0,3}}")
MAX_KEY: Final = 120
"""Longest key of a store, in characters: with each capital letter escaped it still fits a file name."""
_SECTION_DIGITS: Final = 32


@dataclass(frozen=True)
class StoreStats:
    """What a store holds, and how this object has been used."""

    entries: int
    bytes: int
    max_bytes: int | None
    """Bound on ``bytes``, past which the least recently used entries go; None without one."""
    hits: int
    misses: int


@runtime_checkable
class CacheStore(Protocol):
    """A place that keeps bytes under keys, safe for several processes at once.

    Keys are one to four parts of letters, digits, ``.``, ``_`` and ``-``, separated by ``/``, at most 120
    characters in all; every method raises :class:`~torchhal.errors.InvalidProblem` for another.
    """

    @property
    def url(self) -> str:
        """What :func:`cache_store` opens this place by."""
        ...

    def get(self, key: str) -> bytes | None:
        """The bytes last put under ``key``, None without any.

        Raises:
            CacheIntegrityError: what is stored are not the bytes that were put.
        """
        ...

    def put(self, key: str, value: bytes) -> None:
        """Store ``value``, atomically: a reader sees the old value, the new one, or none.

        Raises:
            InvalidProblem: ``value`` is neither bytes nor another buffer of them.
        """
        ...

    def exists(self, key: str) -> bool:
        """Whether something is stored under ``key``, intact or not."""
        ...

    def list(self, prefix: str = "") -> Sequence[str]:
        """The stored keys that begin with ``prefix``, sorted."""
        ...

    def delete(self, key: str) -> bool:
        """Forget ``key``; whether there was something to forget."""
        ...

    def stats(self) -> StoreStats:
        """What the store holds now."""
        ...


@dataclass(frozen=True)
class CacheEntry:
    """What :func:`save_cache` did."""

    key: str
    section: str | None
    """Key of the new section in the store; None when it had nothing new to hold."""
    artifacts: int
    """How many artifacts the section holds."""
    recorded: int
    """How many artifacts torch has recorded in this process; 0 when nothing was compiled, or caching is off."""
    bytes: int


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_cache` did."""

    key: str
    sections: tuple[str, ...] = ()
    """Sections of the store whose artifacts were handed to torch."""
    artifacts: Mapping[str, int] = field(default_factory=dict)
    """How many artifacts of each type torch took."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """How many artifacts of types this torch does not know."""
    refused: tuple[str, ...] = ()
    """Sections made for another environment, and the field that differs."""
    advice: tuple[str, ...] = ()
    """Differences that make the cache slower at worst: measured choices of another machine."""

    @property
    def loaded(self) -> int:
        """How many artifacts torch took."""
        return sum(self.artifacts.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in self.artifacts.items()) or "nothing"
        lines = [f"{self.key}: loaded {kinds} from {len(self.sections)} sections"]
        lines += [
            f"  skipped {n} of a type this torch does not know: {name}" for name, n in self.skipped.items()
        ]
        lines += [f"  refused {text}" for text in self.refused]
        return "\n".join(lines + [f"  {text}" for text in self.advice])


# ---------------------------------------------------------------------------- stores


def cache_store(url: str, *, backend: str | None = None) -> CacheStore:
    """Open the place that ``url`` names.

    Args:
        url: a path, ``file:///path`` (``?max_bytes=N`` bounds it), ``memory://name``, or another scheme that
            an installed backend serves.
        backend: name of the backend to ask.

    Raises:
        InvalidProblem: the URL is malformed.
        Unsupported: no backend serves the scheme, or the place can not be used; the message says why.
    """
    if not isinstance(url, str) or not url:
        raise InvalidProblem(
            f"cache_store() expects a path or a URL such as file:///var/cache/torchhal and got {url!r}"
        )
    scheme = urlsplit(url).scheme.lower() if "://" in url else "file"
    selected = select(CacheStoreProblem(device=torch.device("cpu"), scheme=scheme), backend)
    selected.record()
    assert selected.plan is not None, selected
    store: CacheStore = selected.plan.run(url)
    return store


def check_key(key: str) -> str:
    """``key``, if it may name an entry of a store.

    Raises:
        InvalidProblem: it may not; says what may.
    """
    if not isinstance(key, str) or len(key) > MAX_KEY or not _KEY.fullmatch(key):
        raise InvalidProblem(
            f"a cache key is one to four parts of letters, digits, '.', '_' and '-' that begin with a letter or "
            f"digit, separated by '/', at most {MAX_KEY} characters; got {key!r}"
        )
    return key


def check_value(value: object) -> bytes:
    """``value`` as bytes of its own, if a store may keep it: bytes, or a buffer such as a bytearray.

    Raises:
        InvalidProblem: it is text, a number or something else; says what to do about text.
    """
    if isinstance(value, bytes):
        return value
    try:
        return memoryview(value).tobytes()  # type: ignore[arg-type]
    except TypeError:
        advice = "; encode it first" if isinstance(value, str) else ""
        raise InvalidProblem(
            f"the value put into a cache store expects bytes and got {type(value).__name__}{advice}"
        ) from None


# ---------------------------------------------------------------------------- compile caches


def default_key() -> str:
    """The key for this environment: equal wherever each other's caches can be loaded without a second look."""
    return f"compile-{fingerprint().digest[:32]}"


def save_cache(store: CacheStore | str, key: str | None = None) -> CacheEntry:
    """Keep what ``torch.compile`` has produced in this process.

    Adds one section with the artifacts that no earlier section of ``key`` in this environment holds, so it may
    be called as often as wanted, by any number of processes at once, and nothing is lost or kept twice.

    Args:
        store: a store, or its URL.
        key: up to 80 characters; :func:`default_key` by default.

    Raises:
        InvalidProblem: the key is malformed.
        CacheIntegrityError: torch's own container is not of the form this version of torchhal knows.
    """
    store = _opened(store)
    key = _section_prefix(key)
    saved = torch.compiler.save_cache_artifacts()
    artifacts = [] if saved is None else fmt.parse_torch(saved[0])
    known = _known_artifacts(store, key)
    new = [a for a in dict.fromkeys(artifacts) if a.identity not in known]
    if not new:
        return CacheEntry(key, None, 0, len(artifacts), 0)
    content = fmt.encode_section(fingerprint(), new)
    section = f"{key}/{fmt.digest(content)[:_SECTION_DIGITS]}"
    store.put(section, content)
    return CacheEntry(key, section, len(new), len(artifacts), len(content))


def load_cache(store: CacheStore | str, key: str | None = None) -> LoadReport:
    """Hand the compile caches under ``key`` to torch, once every byte of them is verified.

    **Only load caches you trust.** Upstream's artifacts hold pickles and source code, which torch executes: who
    can write to a store can run code in every process that loads from it. Digests find accidents (truncation,
    bit rot, a mix of two files) and do not prove who wrote an entry. What is checked before torch is called:
    magic, bounds and digests of all sections; that each was made in an environment whose identity equals this
    one's (torch build, Python, platform, vector instruction set, devices, backends) and whose instructions this
    processor has; that no artifact's key leads out of the cache directory.

    Args:
        store: a store, or its URL.
        key: as given to :func:`save_cache`; :func:`default_key` by default.

    Returns:
        What was loaded. Nothing under ``key`` is a report with no sections, and no error. Sections of other
        environments are listed as refused when others could be loaded.

    Raises:
        CacheIntegrityError: a section is truncated or altered, or all were made for another environment; names
            the section and the field. Nothing was loaded.
    """
    store = _opened(store)
    key = _section_prefix(key)
    sections = [fmt.decode_section(name, content) for name, content in _contents(store, key)]
    here = fingerprint()
    differences = {s.name: explain(s.fingerprint, here) for s in sections}
    fatal = {name: [d for d in found if d.refuses] for name, found in differences.items()}
    usable = [s for s in sections if not fatal[s.name]]
    refused = tuple(f"{name}: {'; '.join(map(str, found))}" for name, found in fatal.items() if found)
    if refused and not usable:
        raise CacheIntegrityError(
            f"the caches under '{key}' were made for another environment, and nothing was loaded. {refused[0]}. "
            f"Compile here and save_cache() under another key, or under the default one, which depends on the environment"
        )
    artifacts, skipped = _load_into_torch(usable)
    advice = dict.fromkeys(str(d) for s in usable for d in differences[s.name])
    return LoadReport(key, tuple(s.name for s in usable), artifacts, skipped, refused, tuple(advice))


# ---------------------------------------------------------------------------- parts


def _opened(store: CacheStore | str) -> CacheStore:
    if isinstance(store, str):
        return cache_store(store)
    if not isinstance(store, CacheStore):
        raise InvalidProblem(
            f"expected a cache store or its URL and got {store!r}; open one with torchhal.cache_store(url)"
        )
    return store


def _section_prefix(key: str | None) -> str:
    key = default_key() if key is None else check_key(key)
    if len(key) + 1 + _SECTION_DIGITS > MAX_KEY or key.count("/") > 2:
        longest = MAX_KEY - 1 - _SECTION_DIGITS
        raise InvalidProblem(
            f"a key of a compile cache has at most three parts and {longest} characters; got {key!r}"
        )
    return key


def _contents(store: CacheStore, key: str) -> list[tuple[str, bytes]]:
    found = (
        (name, store.get(name)) for name in store.list(f"{key}/") if name.count("/") == key.count("/") + 1
    )
    return [(name, content) for name, content in found if content is not None]


def _known_artifacts(store: CacheStore, key: str) -> set[str]:
    """What intact sections of this very environment hold; damaged ones are for :func:`load_cache` to report."""
    known: set[str] = set()
    here = fingerprint()
    for name in store.list(f"{key}/"):
        try:
            section = fmt.decode_section(name, store.get(name) or b"")
        except CacheIntegrityError:
            continue
        if section.fingerprint == here:
            known.update(a.identity for a in section.artifacts)
    return known


def _load_into_torch(sections: list[fmt.Section]) -> tuple[dict[str, int], dict[str, int]]:
    artifacts = list(dict.fromkeys(a for section in sections for a in section.artifacts))
    loaded: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for kind in dict.fromkeys(a.kind for a in artifacts):
        same = [a for a in artifacts if a.kind == kind]
        # One container for each type: torch drops all but the last section of a type, and all types if it
        # does not know one.
        info = torch.compiler.load_cache_artifacts(fmt.emit_torch(same))
        (skipped if info is None else loaded)[kind] += len(same)
    return dict(loaded), dict(skipped)
