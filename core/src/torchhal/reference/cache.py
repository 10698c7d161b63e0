"""Cache stores that need nothing: a directory of files, and the memory of this process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import parse_qs, urlsplit
from urllib.request import url2pathname

from torchhal.cache import CacheStore, StoreStats, check_key, check_value
from torchhal.errors import CacheIntegrityError, InvalidProblem, Unsupported
from torchhal.problems import CacheStoreProblem, Decline, Plan

MAGIC: Final = b"THSTORE1"
_HEADER: Final = len(MAGIC) + 32
_PREFIX: Final = "entry-"
_TEMPORARY: Final = ".new-"
_ABANDONED_SECONDS: Final = 3600
_NOFOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)
_BINARY: Final[int] = getattr(os, "O_BINARY", 0)


def plan(problem: CacheStoreProblem) -> Plan | Decline:
    """Serves the schemes ``file`` (and plain paths) and ``memory``."""
    if problem.scheme == "file":
        return Plan(run=FileStore.open, description="a directory of files with SHA-256 digests")
    if problem.scheme == "memory":
        return Plan(run=MemoryStore.open, description="the memory of this process")
    return Decline(
        "unclaimed_scheme",
        f"keeps caches in files (file:///path) and in memory (memory://name), not at {problem.scheme}://",
    )


# ---------------------------------------------------------------------------- files


class FileStore:
    """A directory with one file for each entry: ``magic | SHA-256 of the value | value``.

    Files are written aside, synced and moved into place, so whoever dies leaves the old value. Directory and
    files are the owner's alone (0700, 0600) when created. No link to an entry is followed; a directory that is
    a link of, or to, another user's, or that anyone may write to, is refused.

    Args:
        root: the directory; created if missing.
        max_bytes: bound on the sum of the files' sizes. After each ``put`` the least recently used others go.

    Raises:
        Unsupported: the directory can not be created or read, or is not safe; says what to change.
    """

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._hits = 0
        self._misses = 0
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Unsupported(
                f"can not create the cache store {root}: {_reason(error)}; choose a directory you can write to"
            ) from error
        _check_directory(root)

    @staticmethod
    def open(url: str) -> FileStore:
        """The store at a path or ``file:///path?max_bytes=N``."""
        if "://" not in url:
            return FileStore(Path(url).expanduser().absolute())
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise InvalidProblem(
                f"a file URL names an absolute path on this machine, as in file:///var/cache/torchhal; got {url!r}"
            )
        return FileStore(Path(url2pathname(parts.path)), _max_bytes(url, parts.query))

    @property
    def url(self) -> str:
        """``file://`` URL of the directory and the bound."""
        return self.root.as_uri() + ("" if self.max_bytes is None else f"?max_bytes={self.max_bytes}")

    def get(self, key: str) -> bytes | None:
        """See :meth:`torchhal.cache.CacheStore.get`; marks the entry as used."""
        path = self._path(key)
        try:
            data = _read(path)
        except FileNotFoundError:
            self._misses += 1
            return None
        except OSError as error:
            raise Unsupported(
                f"can not read '{key}' in the cache store {self.root}: {_reason(error)}"
            ) from error
        with contextlib.suppress(OSError):  # a store mounted read-only has no record of use
            os.utime(path)
        self._hits += 1
        return _verified(data, f"'{key}' in the cache store {self.root}")

    def put(self, key: str, value: bytes) -> None:
        """See :meth:`torchhal.cache.CacheStore.put`.

        Raises:
            InvalidProblem: ``value`` is no bytes, or the entry alone passes ``max_bytes``.
            Unsupported: the directory can not be written to.
        """
        path, value = self._path(key), check_value(value)
        if self.max_bytes is not None and len(value) + _HEADER > self.max_bytes:
            raise InvalidProblem(
                f"'{key}' needs {len(value) + _HEADER} bytes and the store is bounded to "
                f"max_bytes={self.max_bytes}; raise the bound"
            )
        try:
            _write(path, MAGIC + hashlib.sha256(value).digest() + value)
            self._tidy(keep=path)
        except OSError as error:
            advice = "choose a directory you can write to; loading from this one still works"
            raise Unsupported(
                f"can not write '{key}' to the cache store {self.root}: {_reason(error)}; {advice}"
            ) from error

    def exists(self, key: str) -> bool:
        """See :meth:`torchhal.cache.CacheStore.exists`."""
        return os.path.lexists(self._path(key))

    def list(self, prefix: str = "") -> Sequence[str]:
        """See :meth:`torchhal.cache.CacheStore.list`."""
        return sorted(key for key in (_key(path.name) for path, _ in self._files()) if key.startswith(prefix))

    def delete(self, key: str) -> bool:
        """See :meth:`torchhal.cache.CacheStore.delete`."""
        try:
            self._path(key).unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise Unsupported(
                f"can not delete '{key}' from the cache store {self.root}: {_reason(error)}"
            ) from error
        return True

    def stats(self) -> StoreStats:
        """See :meth:`torchhal.cache.CacheStore.stats`; sizes include a header of 40 bytes for each entry."""
        sizes = [info.st_size for _, info in self._files()]
        return StoreStats(len(sizes), sum(sizes), self.max_bytes, self._hits, self._misses)

    def _path(self, key: str) -> Path:
        # File systems may not tell capitals apart, so a capital letter is written as '+' and the small one.
        name = re.sub("[A-Z]", lambda match: f"+{match[0].lower()}", check_key(key)).replace("/", "=")
        return self.root / f"{_PREFIX}{name}"

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        with os.scandir(self.root) as found:
            for item in found:
                if item.name.startswith(_PREFIX):
                    with contextlib.suppress(FileNotFoundError):
                        yield Path(item.path), item.stat(follow_symlinks=False)

    def _tidy(self, keep: Path) -> None:
        _remove_abandoned(self.root)
        if self.max_bytes is None:
            return
        oldest_first = sorted(self._files(), key=lambda item: item[1].st_mtime_ns)
        total = sum(info.st_size for _, info in oldest_first)
        for path, info in oldest_first:
            if total <= self.max_bytes:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= info.st_size


def _key(name: str) -> str:
    joined = name.removeprefix(_PREFIX).replace("=", "/")
    return re.sub(r"\+(.)", lambda match: match[1].upper(), joined)


def _max_bytes(url: str, query: str) -> int | None:
    options = parse_qs(query, keep_blank_values=True)
    text = options.pop("max_bytes", [""])[-1]
    if options or (query and not re.fullmatch("[1-9][0-9]*", text)):
        raise InvalidProblem(
            f"a file URL takes one option, max_bytes=N with a whole number of bytes, as in "
            f"file:///path?max_bytes=10000000000; got {url!r}"
        )
    return int(text) if text else None


def _check_directory(root: Path) -> None:
    try:
        link, target = root.lstat(), root.stat()
    except OSError as error:
        raise Unsupported(f"can not read the cache store {root}: {_reason(error)}") from error
    if not hasattr(os, "geteuid"):
        return
    trusted = (0, os.geteuid())
    if stat.S_ISLNK(link.st_mode) and (link.st_uid not in trusted or target.st_uid not in trusted):
        _unsafe(
            root,
            f"it is a link that user {link.st_uid} made to a directory of user {target.st_uid}",
            "name the directory itself",
        )
    if target.st_mode & stat.S_IWOTH:
        _unsafe(root, "anyone may write to it", f"run chmod o-w {root}")


def _unsafe(root: Path, reason: str, advice: str) -> NoReturn:
    raise Unsupported(
        f"the cache store {root} is not safe: {reason}, and what is cached is executed; {advice}, or choose another directory"
    )


def _read(path: Path) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | _NOFOLLOW | _BINARY), "rb") as file:
        return file.read()


def _verified(data: bytes, what: str) -> bytes:
    value = data[_HEADER:]
    if len(data) < _HEADER or not data.startswith(MAGIC):
        raise CacheIntegrityError(
            f"{what} is truncated or is not an entry ({len(data)} bytes); delete it, and compile again"
        )
    if hashlib.sha256(value).digest() != data[len(MAGIC) : _HEADER]:
        raise CacheIntegrityError(
            f"{what} was altered: its SHA-256 does not match; delete it, and compile again"
        )
    return value


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _BINARY, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _replace(source: Path, target: Path) -> None:
    """Move into place; where a reader that holds the target open blocks that (Windows), try for a second."""
    for attempt in range(20):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if os.name != "nt" or attempt == 19:
                raise
            time.sleep(0.05)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such notion
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(root: Path) -> None:
    """Remove what writers that died left behind."""
    before = time.time() - _ABANDONED_SECONDS
    for path in root.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_mtime < before:
                path.unlink()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


# ---------------------------------------------------------------------------- memory


class MemoryStore:
    """Entries in the memory of this process; opening the same ``memory://name`` again gives the same entries."""

    _all: Final[dict[str, dict[str, bytes]]] = {}
    _lock: Final = threading.Lock()

    def __init__(self, name: str) -> None:
        self.name = name
        with self._lock:
            self._entries = self._all.setdefault(name, {})
        self._hits = 0
        self._misses = 0

    @staticmethod
    def open(url: str) -> CacheStore:
        """The store called ``name`` in ``memory://name``."""
        parts = urlsplit(url)
        if not re.fullmatch("[A-Za-z0-9._-]+", parts.netloc) or parts.path.strip("/") or parts.query:
            raise InvalidProblem(
                f"a memory store has a name of letters, digits, '.', '_' and '-', as in memory://tests; got {url!r}"
            )
        return MemoryStore(parts.netloc)

    @property
    def url(self) -> str:
        """``memory://name``."""
        return f"memory://{self.name}"

    def get(self, key: str) -> bytes | None:
        """See :meth:`torchhal.cache.CacheStore.get`."""
        value = self._entries.get(check_key(key))
        self._hits += value is not None
        self._misses += value is None
        return value

    def put(self, key: str, value: bytes) -> None:
        """See :meth:`torchhal.cache.CacheStore.put`."""
        self._entries[check_key(key)] = check_value(value)

    def exists(self, key: str) -> bool:
        """See :meth:`torchhal.cache.CacheStore.exists`."""
        return check_key(key) in self._entries

    def list(self, prefix: str = "") -> Sequence[str]:
        """See :meth:`torchhal.cache.CacheStore.list`."""
        return sorted(key for key in tuple(self._entries) if key.startswith(prefix))

    def delete(self, key: str) -> bool:
        """See :meth:`torchhal.cache.CacheStore.delete`."""
        return self._entries.pop(check_key(key), None) is not None

    def stats(self) -> StoreStats:
        """See :meth:`torchhal.cache.CacheStore.stats`."""
        sizes = [len(value) for value in tuple(self._entries.values())]
        return StoreStats(len(sizes), sum(sizes), None, self._hits, self._misses)
