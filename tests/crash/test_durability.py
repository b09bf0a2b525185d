"""What survives a power cut, and how little of it has to be touched again."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from blobflow import ChunkProfile, download, upload
from blobflow.streams import TransferCheckpoint, transfer
from blobflow.testing import FaultyStore, Request
from tests.kit import Killed, artifact_of, local_store, noise

DATA = noise(2000)
PROFILE = ChunkProfile.custom(100, 2)


class PowerCut(BaseException):
    """Nothing happens after it."""


class Disk:
    """A target whose bytes are durable once they are flushed; a power cut keeps some of the others, and spoils them."""

    def __init__(self, dice: random.Random) -> None:
        self.durable = 0
        self._written = bytearray()
        self._dice = dice
        self._calls_left = dice.randint(0, 200)

    def write(self, data: memoryview) -> int:
        self.tick()
        taken = data[: self._dice.randint(1, len(data))]
        self._written += taken
        return len(taken)

    def flush(self) -> None:
        self.tick()
        self.durable = len(self._written)

    def tick(self) -> None:
        """One more call; the power may be gone."""
        if not self._calls_left:
            raise PowerCut
        self._calls_left -= 1

    def after_the_cut(self) -> bytes:
        """What is found when the power is back."""
        lost = self._dice.randint(0, len(self._written) - self.durable)
        spoiled = bytes(255 - byte for byte in self._written[self.durable : len(self._written) - lost])
        return bytes(self._written[: self.durable]) + spoiled


@pytest.mark.seed("W0.2")
def test_no_power_cut_loses_what_a_checkpoint_speaks_of():
    """A thousand of them: the last saved checkpoint ends within what is durable, and can be continued to the end."""
    cuts = 0
    for seed in range(1000):
        disk = Disk(random.Random(seed))
        saved = TransferCheckpoint.new("s", total_size=len(DATA)).to_json()

        def save(checkpoint: TransferCheckpoint, disk: Disk = disk) -> None:
            nonlocal saved
            disk.tick()
            saved = checkpoint.to_json()

        try:
            transfer(io.BytesIO(DATA), disk, PROFILE, TransferCheckpoint.from_json(saved), save)
        except PowerCut:
            cuts += 1
        checkpoint = TransferCheckpoint.from_json(saved)
        assert checkpoint.offset <= disk.durable, f"seed {seed}"
        target = io.BytesIO(disk.after_the_cut())
        target.seek(checkpoint.offset)
        transfer(io.BytesIO(DATA), target, PROFILE, checkpoint)
        assert target.getvalue() == DATA, f"seed {seed}"
    assert 500 < cuts < 1000


def dies_after(operation: str, number: int) -> Callable[[Request], None]:
    """The process dies after so many requests of this kind, and sends nothing more."""
    dead = False

    def faults(request: Request) -> None:
        nonlocal dead
        dead = dead or (request.operation == operation and request.number > number)
        if dead:
            raise Killed

    return faults


@pytest.mark.seed("W0.3")
def test_a_resumed_upload_reads_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed at nine tenths, the next run reads the last tenth and what was in flight, and hashes nothing else."""
    artifact, store = artifact_of(tmp_path, {"large": noise(400_000)}), local_store(tmp_path)
    profile = ChunkProfile.custom(4000, 8, workers=2)
    with pytest.raises(Killed):
        upload(FaultyStore(store, dies_after("put_part", 90)), "k", artifact, profile=profile)
    read = 0
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = preadv(descriptor, buffers, offset)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/large"):
            read += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    result = upload(store, "k", artifact, profile=profile)
    assert result.bytes_resumed >= (90 - profile.workers) * 4000
    assert 0 < read <= result.bytes_sent <= artifact.payload_size - (90 - profile.workers) * 4000


@pytest.mark.seed("W0.3", "W1.8")
def test_a_resumed_download_fetches_only_what_is_missing(tmp_path: Path):
    """The same for what comes from the store; members that were whole before are not fetched to be checked again."""
    tree = {f"{number:03}": noise(4000, number) for number in range(100)}
    store = local_store(tmp_path)
    upload(store, "k", artifact_of(tmp_path, tree))
    profile = ChunkProfile.custom(4000, 8, workers=2)
    with pytest.raises(Killed):
        download(FaultyStore(store, dies_after("get_range", 90)), "k", tmp_path / "dest", profile=profile)
    watched = FaultyStore(store)
    result = download(watched, "k", tmp_path / "dest", profile=profile)
    head = 2  # manifest and index, which every download begins with
    assert result.bytes_resumed >= (90 - head - profile.workers) * 4000
    assert watched.count("get_range") <= result.parts - (90 - head - profile.workers) + head
