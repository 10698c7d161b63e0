"""The stores of the reference backend: files and memory, under corruption, competition and sudden death."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchhal.cache import CacheStore, cache_store
from torchhal.errors import CacheIntegrityError, InvalidProblem, Unsupported
from torchhal.reference.cache import FileStore

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HEADER = 40


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CacheStore:
    return cache_store((tmp_path / "s").as_uri() if request.param == "file" else f"memory://{tmp_path.name}")


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def only_file(store: FileStore) -> Path:
    (path,) = store.root.iterdir()
    return path


# ---------------------------------------------------------------------------- both


@quick
@given(
    values=st.dictionaries(
        st.from_regex("[A-Za-z0-9][A-Za-z0-9._-]{0,5}(/[a-zA-Z]{1,3})?", fullmatch=True), st.binary()
    )
)
def test_every_store_gives_back_what_was_put(store: CacheStore, values: dict[str, bytes]) -> None:
    for key in store.list():
        assert store.delete(key)
    for key, value in values.items():
        store.put(key, b"an older value")
        store.put(key, value)
    assert store.list() == sorted(values)
    assert {key: store.get(key) for key in values} == values
    assert store.stats().entries == len(values)
    assert all(store.exists(key) for key in values)


def test_keys_that_differ_in_capitals_alone_are_different(store: CacheStore) -> None:
    store.put("Model/A", b"1")
    store.put("model/a", b"2")
    assert (store.get("Model/A"), store.get("model/a")) == (b"1", b"2")
    assert store.list("M") == ["Model/A"]


def test_what_is_not_there_is_none_and_counted(store: CacheStore) -> None:
    assert store.get("missing") is None
    assert not store.exists("missing")
    assert not store.delete("missing")
    store.put("here", b"x")
    assert store.get("here") == b"x"
    assert (store.stats().hits, store.stats().misses) == (1, 1)
    assert isinstance(store, CacheStore)


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "../a", "a//b", ".hidden", "a b", "a/b/c/d/e", "a\n", "x" * 121, "a+b", "é", 3]
)
def test_a_malformed_key_is_refused_by_every_method(store: CacheStore, key: Any) -> None:
    for method in (store.get, store.exists, store.delete, lambda k: store.put(k, b"")):
        with pytest.raises(InvalidProblem, match="one to four parts of letters, digits"):
            method(key)


def test_opening_the_url_of_a_store_gives_the_same_entries(store: CacheStore) -> None:
    store.put("a", b"1")
    assert cache_store(store.url).get("a") == b"1"


def test_memory_stores_of_other_names_are_apart() -> None:
    cache_store("memory://left").put("k", b"1")
    assert cache_store("memory://right").get("k") is None
    with pytest.raises(InvalidProblem, match="as in memory://tests"):
        cache_store("memory://a/b")


# ---------------------------------------------------------------------------- files


def test_files_and_directory_are_the_owners_alone(files: FileStore) -> None:
    files.put("a", b"1")
    assert stat.S_IMODE(files.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(only_file(files).stat().st_mode) == 0o600


def test_an_entry_cut_anywhere_is_reported(files: FileStore) -> None:
    files.put("a", b"some value")
    path = only_file(files)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CacheIntegrityError, match=r"'a' in the cache store .* (truncated|altered)"):
            files.get("a")
    path.write_bytes(content)
    assert files.get("a") == b"some value"


@quick
@given(at=st.integers(0, HEADER + 9), flip=st.integers(1, 255))
def test_an_entry_with_any_byte_changed_is_reported(files: FileStore, at: int, flip: int) -> None:
    files.put("a", b"some value")
    path = only_file(files)
    content = bytearray(path.read_bytes())
    content[at] ^= flip
    path.write_bytes(content)
    with pytest.raises(CacheIntegrityError, match="delete it, and compile again"):
        files.get("a")


def test_an_entry_that_is_a_link_is_not_followed(files: FileStore, tmp_path: Path) -> None:
    files.put("a", b"1")
    moved = tmp_path / "moved"
    only_file(files).rename(moved)
    (files.root / "entry-a").symlink_to(moved)
    with pytest.raises(Unsupported, match="can not read 'a' in the cache store"):
        files.get("a")


def test_a_directory_linked_by_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    assert FileStore(link).list() == [], "one's own link is fine"
    if os.geteuid() == 0:
        os.lchown(link, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(
        Unsupported, match=r"is not safe: it is a link that user .* name the directory itself"
    ):
        FileStore(link)


def test_a_directory_anyone_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(
        Unsupported, match="anyone may write to it, and what is cached is executed; run chmod o-w"
    ):
        FileStore(tmp_path)


def test_a_directory_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        Unsupported, match=r"can not create the cache store .*Not a directory; choose a directory"
    ):
        cache_store(str(tmp_path / "file" / "store"))


def test_a_read_only_directory_can_be_read_and_says_why_it_is_not_written(
    files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.put("a", b"1")
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    assert files.get("a") == b"1"
    with pytest.raises(
        Unsupported, match=r"can not write 'a' to the cache store .*Read-only file system; choose"
    ):
        files.put("a", b"2")
    assert files.get("a") == b"1"


def test_a_write_that_fails_leaves_the_old_value_and_no_litter(
    files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.put("a", b"old")

    def full(descriptor: int) -> None:
        # The first sync is the file's: the directory's comes after the entry is in place.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unsupported, match="No space left on device"):
        files.put("a", b"new")
    assert files.get("a") == b"old"
    assert only_file(files).name == "entry-a"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("file://host/path", "absolute path on this machine"),
        ("file://relative", "absolute path on this machine"),
        ("file:///x?max_bytes=", "max_bytes=N with a whole number"),
        ("file:///x?max_bytes=1G", "max_bytes=N with a whole number"),
        ("file:///x?max_bytes=0", "max_bytes=N with a whole number"),
        ("file:///x?ttl=3", "takes one option"),
    ],
)
def test_a_malformed_file_url_says_what_one_looks_like(url: str, text: str) -> None:
    with pytest.raises(InvalidProblem, match=text):
        cache_store(url)


def test_a_plain_path_may_have_any_characters(tmp_path: Path) -> None:
    store = cache_store(str(tmp_path / "a%20b?max_bytes=1 c"))
    store.put("k", b"1")
    assert (tmp_path / "a%20b?max_bytes=1 c" / "entry-k").exists()
    assert cache_store(store.url).get("k") == b"1"


# ---------------------------------------------------------------------------- bounds


def test_past_the_bound_the_least_recently_used_entries_go(tmp_path: Path) -> None:
    store = cache_store(f"{(tmp_path / 's').as_uri()}?max_bytes={3 * (HEADER + 10)}")
    for age, key in enumerate("abc"):
        store.put(key, b"0123456789")
        os.utime(tmp_path / "s" / f"entry-{key}", (1000 + age, 1000 + age))
    assert store.get("a") is not None  # used now, so 'b' is the oldest
    store.put("d", b"0123456789")
    assert store.list() == ["a", "c", "d"]
    store.put("e", b"0" * (2 * HEADER + 20))
    assert "e" in store.list()
    stats = store.stats()
    assert stats.bytes <= (stats.max_bytes or 0) == 3 * (HEADER + 10)


def test_an_entry_larger_than_the_bound_is_refused(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "s", max_bytes=100)
    with pytest.raises(
        InvalidProblem, match="'big' needs 140 bytes and the store is bounded to max_bytes=100"
    ):
        store.put("big", b"0" * 100)
    assert store.list() == []


def test_what_a_dead_writer_left_is_removed_after_an_hour(files: FileStore) -> None:
    files.put("a", b"1")
    old, young = files.root / ".new-1-old", files.root / ".new-1-young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    files.put("b", b"2")
    assert not old.exists()
    assert young.exists()
    assert files.list() == ["a", "b"]


# ---------------------------------------------------------------------------- several processes


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


WRITER = """
import sys
from pathlib import Path
from torchhal.reference.cache import FileStore
store, me = FileStore(Path(sys.argv[1]), int(sys.argv[3])), sys.argv[2]
print("ready", flush=True)
for i in range(60):
    store.put("shared", (me * 50_000).encode())
    store.put(f"own-{me}-{i % 7}", bytes(i * 100))
    got = store.get("shared")
    assert got is None or (len(set(got)) == 1 and len(got) == 50_000)
"""


def test_writers_at_the_same_time_never_show_a_mixture(tmp_path: Path) -> None:
    root, bound = tmp_path / "s", 120_000
    writers = [start(WRITER, str(root), name, str(bound)) for name in "abc"]
    for writer in writers:
        _, errors = writer.communicate(timeout=200)
        assert writer.returncode == 0, errors
    store = FileStore(root, bound)
    store.put("last", b"")
    assert store.stats().bytes <= bound
    assert not list(root.glob(".new-*"))
    assert all(store.get(key) is not None for key in store.list())


ENDLESS = """
import sys
from pathlib import Path
from torchhal.reference.cache import FileStore
store = FileStore(Path(sys.argv[1]))
for i in range(10**9):
    store.put("k", bytes([i % 250 + 1]) * 3_000_000)
    if i == 0: print("ready", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_writer_that_is_killed_leaves_a_whole_value(tmp_path: Path) -> None:
    for round_number in range(3):
        writer = start(ENDLESS, str(tmp_path / "s"))
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.013 * round_number)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        value = FileStore(tmp_path / "s").get("k")
        assert value is not None
        assert len(value) == 3_000_000
        assert len(set(value)) == 1


@pytest.mark.parametrize("value", ["text", 5, None, [1]])
def test_what_is_no_bytes_is_refused_and_nothing_is_stored(store: CacheStore, value: Any) -> None:
    with pytest.raises(InvalidProblem, match=f"expects bytes and got {type(value).__name__}"):
        store.put("k", value)
    assert not store.exists("k")


def test_a_buffer_is_stored_as_its_bytes(store: CacheStore) -> None:
    store.put("k", memoryview(bytearray(8)).cast("i"))  # type: ignore[arg-type]
    assert store.get("k") == bytes(8)
