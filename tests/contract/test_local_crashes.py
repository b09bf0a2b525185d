"""The local store under SIGKILL: at every system call that changes something, what is left is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blobflow.checksum import crc32c
from blobflow.errors import NoSuchUpload
from blobflow.stores import Body
from blobflow.stores.local.store import LocalStore

PART = 1000
BEFORE, AFTER, NEW = b"before" * 500, b"after!" * 700, b"new" * 900
FIRST, SECOND, SECOND_AGAIN, THIRD = b"1" * PART, b"2" * PART, b"b" * PART, b"3" * 10
LARGE = FIRST + SECOND_AGAIN + THIRD

CHILD = f"""
import itertools, json, os, signal, sys
from pathlib import Path
from blobflow.stores import Body, PutMode
from blobflow.stores.local.store import LocalStore

CALLS = ("fsync", "fdatasync", "ftruncate", "link", "mkdir", "pwrite", "rename", "rmdir", "unlink", "utime", "write")

def die_at(number):
    calls = itertools.count(1)
    def wrap(real):
        def call(*args, **options):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        return call
    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))

def halves(data):
    return Body(len(data), lambda: (data[: len(data) // 2], data[len(data) // 2 :]))

def story(root, number):
    log = os.open(str(root) + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    write = os.write
    def acknowledged(what):
        write(log, (what + "\\n").encode())
    store = LocalStore(root)
    store.put("old", {BEFORE!r})
    die_at(number)
    store.put("dir/new", halves({NEW!r}), mode=PutMode.CREATE)
    acknowledged("new")
    store.put("old", halves({AFTER!r}))
    acknowledged("old")
    upload_id = store.create_multipart("deep/dir/large", part_size={PART})
    acknowledged("upload " + upload_id)
    store.put_part("deep/dir/large", upload_id, 2, halves({SECOND!r}))
    acknowledged("second")
    store.put_part("deep/dir/large", upload_id, 1, halves({FIRST!r}))
    acknowledged("first")
    store.put_part("deep/dir/large", upload_id, 2, halves({SECOND_AGAIN!r}))
    acknowledged("second again")
    store.put_part("deep/dir/large", upload_id, 3, halves({THIRD!r}))
    acknowledged("third")
    store.complete_multipart("deep/dir/large", upload_id, store.list_parts("deep/dir/large", upload_id))
    acknowledged("complete")
    store.delete("dir/new")
    acknowledged("delete")

base = Path(sys.argv[1])
for number in itertools.count(1):
    child = os.fork()
    if not child:
        try:
            story(base / str(number), number)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
print(json.dumps(number))
"""


def acknowledged(root: Path) -> tuple[list[str], str | None]:
    """What the child was told before it died, and its upload id."""
    lines = Path(f"{root}.log").read_text().splitlines()
    ids = [line.split()[1] for line in lines if line.startswith("upload")]
    return [line.split()[0] if line.startswith("upload") else line for line in lines], ids[0] if ids else None


def content(store: LocalStore, key: str) -> bytes | None:
    return store.get(key, max_bytes=1 << 20).data if store.exists(key) else None


def check_upload(root: Path, store: LocalStore, upload_id: str, done: list[str]) -> None:
    """An unfinished upload lists its acknowledged parts with the bytes it vouches for, and can be completed."""
    key = "deep/dir/large"
    assert [(upload.key, upload.upload_id) for upload in store.list_uploads()] == [(key, upload_id)]
    parts = {part.part_number: part for part in store.list_parts(key, upload_id)}
    payload = (root / ".blobflow" / "uploads" / upload_id / "payload").read_bytes()
    for number, part in parts.items():
        start = (number - 1) * PART
        assert crc32c(payload[start : start + part.size]) == part.crc32c
    if "first" in done:
        assert parts[1].crc32c == crc32c(FIRST)
    if "second again" in done:
        assert parts[2].crc32c == crc32c(SECOND_AGAIN)
    elif "second" in done and "first" not in done:
        assert parts[2].crc32c == crc32c(SECOND)
    if "third" in done:
        assert parts[3].crc32c == crc32c(THIRD)
    for number, data in ((1, FIRST), (2, SECOND_AGAIN), (3, THIRD)):
        if number not in parts or parts[number].crc32c != crc32c(data):
            parts[number] = store.put_part(key, upload_id, number, Body.of(data))
    store.complete_multipart(key, upload_id, [parts[1], parts[2], parts[3]])


@pytest.mark.seed("1.2")
def test_a_kill_at_any_point_leaves_everything_whole(tmp_path: Path) -> None:
    """Whatever call a writer dies before: objects are old or new, acknowledged parts are there, uploads go on."""
    answer = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True, timeout=100
    )
    points: int = json.loads(answer.stdout)
    assert points > 60, "the child died too seldom to show anything"
    seen: set[str] = set()
    for number in range(1, points + 1):
        root = tmp_path / str(number)
        store = LocalStore(root)
        done, upload_id = acknowledged(root)

        assert {meta.key for meta in store.list()} <= {"old", "dir/new", "deep/dir/large"}
        assert content(store, "old") in ((AFTER,) if "old" in done else (BEFORE, AFTER))
        new = content(store, "dir/new")
        assert new in (None, NEW)
        if "new" in done and "complete" not in done:
            assert new == NEW
        if "delete" in done:
            assert new is None

        large = content(store, "deep/dir/large")
        assert large in (None, LARGE)
        if large is None:
            seen.add("unfinished" if upload_id else "not begun")
            assert "complete" not in done
            if upload_id:
                check_upload(root, store, upload_id, done)
        else:
            seen.add("complete" if "complete" in done else "finished without an answer")
            assert upload_id is not None
            assert store.list_uploads() == []
            with pytest.raises(NoSuchUpload):
                store.list_parts("deep/dir/large", upload_id)

        LocalStore(root, now_ns=lambda: 4_000_000_000 * 10**9).put("after", b"")
        assert list((root / ".blobflow" / "tmp").iterdir()) == []
        if upload_id:
            assert content(store, "deep/dir/large") == LARGE
            assert list((root / ".blobflow" / "uploads").iterdir()) == []
    assert seen == {"not begun", "unfinished", "finished without an answer", "complete"}
