"""The public names as users write them; pyright checks this file in `make check`, and nothing runs it.

A change that makes a line here wrong breaks somebody's type checker: it belongs into the changelog.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import assert_type

import blobflow
from blobflow import backends, batch, errors, lanes, layers, mirror, streams


def seen(event: blobflow.ProgressEvent) -> None:
    assert_type(event.bytes_done, int)


def saved(record: blobflow.TransferRecord) -> None:
    pass


def artifacts(store: blobflow.Store, exporter: blobflow.Exporter, importer: blobflow.Importer) -> None:
    profile = blobflow.ChunkProfile.datacenter()
    assert_type(profile, blobflow.ChunkProfile)
    assert_type(blobflow.open_store("s3://bucket/prefix"), blobflow.Store)
    exported = blobflow.export_artifact(exporter, "artifact")
    assert_type(exported, blobflow.ExportResult)
    assert_type(exported.artifact, blobflow.Artifact)
    assert_type(blobflow.export_artifact("/srv/orders", Path("artifact"), symlinks="skip"), blobflow.ExportResult)
    uploaded = blobflow.upload(store, "k", exported.artifact, profile=profile, on_progress=seen, on_checkpoint=saved)
    assert_type(uploaded, blobflow.UploadResult)
    assert_type(blobflow.verify(store, "k", mode="deep"), blobflow.VerifyResult)
    assert_type(blobflow.read_manifest(store, "k"), blobflow.Manifest)
    assert_type(blobflow.list_artifacts(store, "orders/"), Iterator[blobflow.ArtifactEntry])
    assert_type(blobflow.copy_artifact(store, "k", store, "k"), blobflow.CopyResult)
    assert_type(blobflow.download(store, "k", "dest", on_progress=seen), blobflow.DownloadResult)
    assert_type(blobflow.import_artifact("dest", importer), blobflow.ImportResult)
    journal = blobflow.TransferJournal(blobflow.LocalCheckpointStore("/var/lib/journal"))
    blobflow.upload(store, "k", "artifact", on_checkpoint=journal.save)


def rounds(store: blobflow.Store) -> None:
    exporter = blobflow.DirectoryExporter(path=Path("/srv/orders"))
    done = blobflow.run_export_round(store, "orders", exporter, leases="sqlite:///leases.db")
    assert_type(done, blobflow.RoundResult | None)
    assert_type(blobflow.read_ref(store, "orders/latest"), blobflow.RefState | None)
    assert_type(blobflow.move_ref(store, "orders/latest", "k", "sha256:0"), blobflow.RefState)
    kept: blobflow.LeaseStore = blobflow.SqlLeaseStore("sqlite:///leases.db")
    assert_type(blobflow.Lease(kept, "orders").try_acquire(), bool)
    assert_type(blobflow.ObjectLeaseStore(store).url, str)


def failures(store: blobflow.Store) -> None:
    try:
        blobflow.verify(store, "k")
    except errors.TemporaryError as error:
        assert_type(error.retryable, bool)
    except blobflow.BlobflowError as error:
        assert_type(error.to_dict(), dict[str, Any])


def kinds_of_sources() -> None:
    exporters: list[blobflow.Exporter] = [
        blobflow.DirectoryExporter(path=Path("source")),
        backends.AppendLogExporter(path=Path("log")),
        backends.ParquetExporter(path=Path("events")),
        backends.SqliteExporter(path=Path("orders.db")),
    ]
    importers: list[blobflow.Importer] = [
        blobflow.DirectoryImporter(path=Path("mirror")),
        backends.AppendLogImporter(path=Path("mirror")),
        backends.ParquetImporter(path=Path("mirror")),
        backends.SqliteImporter(path=Path("mirror")),
    ]
    assert_type(backends.AppendLog("log").append("key", {"value": 1}), int)
    print(exporters, importers)


def shared_transfers(store: blobflow.Store, artifact: blobflow.Artifact) -> None:
    up = lanes.begin_upload(store, "k", artifact)
    assert_type(up, lanes.UploadTicket)
    assert_type(lanes.send_parts(store, up, artifact, up.numbers(0, 2)), lanes.LaneResult)
    assert_type(lanes.commit_upload(store, up, artifact, lanes=2), blobflow.UploadResult)
    down = lanes.begin_download(store, "k", "dest", lanes=2)
    assert_type(down, lanes.DownloadTicket)
    assert_type(lanes.fetch_lane(store, down, "dest", 0), lanes.LaneResult)


def directories_as_layers(store: blobflow.Store) -> None:
    sync = layers.LayerSync(store)
    assert_type(sync.sync("home", "/srv/home"), layers.LayerSyncResult)
    assert_type(sync.restore("home", "dest"), layers.LayerRestoreResult)
    assert_type(sync.state("home"), layers.SyncState)


def small_operations(store: blobflow.Store) -> None:
    operations = [batch.Insert("a", b"1"), batch.Get("a"), batch.Delete("a")]
    with batch.BatchExecutor(store).stream(operations) as results:
        for result in results:
            assert_type(result, batch.BatchResult)


def pushed_snapshots(store: blobflow.Store, snapshot: mirror.Snapshot, importer: blobflow.Importer) -> None:
    receiver = mirror.MirrorReceiver("/srv/received")
    server = mirror.MirrorServer(receiver)
    assert_type(server.run(), None)
    for envelope in snapshot.envelopes():
        assert_type(receiver.handle(envelope), mirror.Pending | mirror.Committed)
    mirror.MirrorClient("https://example.org", token="t").push(snapshot)
    assert_type(mirror.mirror_status("/srv/mirror", store, "orders/latest"), mirror.MirrorStatus)
    assert_type(mirror.mirror_history("/srv/mirror"), list[mirror.HistoryEntry])
    assert_type(mirror.update_mirror(store, "k", "sha256:0", importer), mirror.MirrorUpdate)


def any_bytes(store: blobflow.Store, checkpoint: streams.TransferCheckpoint) -> None:
    target = streams.ObjectTarget(store, "model.bin")
    result = streams.transfer(streams.HttpSource("https://example.org/model.bin"), target, checkpoint=checkpoint)
    assert_type(result, streams.TransferResult)
    streams.transfer(streams.ObjectSource(store, "model.bin"), streams.FileTarget("model.bin"))


def frames(receiver: mirror.MirrorReceiver) -> None:
    for snapshot, status in mirror.read_snapshots("/srv/received").items():
        assert_type(snapshot, mirror.SnapshotId)
        assert_type(status, mirror.ReceiverStatus)
        if isinstance(status, mirror.Following):
            receiver.follow(snapshot, status.cursor)
    blobflow.download(mirror.ReceivedStore("/srv/received"), "k", "dest")
    mirror.mirror_app(receiver, token="t")
