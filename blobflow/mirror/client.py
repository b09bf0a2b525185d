"""Pushes snapshots to a remote receiver, and continues at its offset after broken connections and crashes."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, cast
from urllib.parse import urlencode, urlsplit

from blobflow.activity import Activity, doing
from blobflow.backoff import DEFAULT_PATIENCE_S, Backoff
from blobflow.checksum import Buffer
from blobflow.config import MIB
from blobflow.credentials import cleaned
from blobflow.errors import (
    ArtifactInvalid,
    BlobflowError,
    ChecksumMismatch,
    OffsetRegressionError,
    StoreConfigurationError,
    StoreUnavailable,
    TemporaryError,
    TimedOut,
    UsageError,
    Value,
    rebuilt,
)
from blobflow.http.client import HttpClient, HttpError, Response
from blobflow.mirror.envelope import SnapshotId, head_bytes
from blobflow.mirror.sending import DEFAULT_CHUNK_BYTES, Snapshot
from blobflow.stores.base import Body
from blobflow.untrusted import plain, read_object
from blobflow.uploads.progress import TransferStats
from blobflow.version import __version__

log = logging.getLogger(__name__)

REQUEST_BYTES: Final = 64 * MIB
"""Bytes of a snapshot in one request. Each request is acknowledged, which lets the caller see progress."""
_MAX_ANSWER_BYTES: Final = 8 * MIB
"""A list of 20,000 snapshots."""
_MAX_FIELDS: Final = 20
_LARGEST: Final = 1 << 64


@dataclass(frozen=True)
class PushResult(TransferStats):
    """What a push did.

    Attributes:
        status: `unchanged`: the receiver had the whole snapshot already.
        bytes_sent: Bytes of the snapshot that this call sent, including those it sent twice.
        bytes_resumed: Bytes that the receiver held when the call began.
    """

    status: Literal["pushed", "unchanged"]
    id: SnapshotId
    bytes_sent: int


class MirrorClient:
    """Pushes to the receiver at a URL; to be used by one thread.

    Args:
        url: `http://host:port` or `https://...`, with a path if the application is mounted below one.
        token: The token that the receiver expects.
        tls: A context for another CA or a client certificate; Python's default context otherwise.
        connect_timeout_s: Seconds in which a connection must be made.
        idle_timeout_s: Seconds in which at least one byte must move.
        patience_s: Seconds without progress, over all attempts, before a push fails. A receiver that asks for a longer
            wait ends it at once.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str,
        tls: ssl.SSLContext | None = None,
        connect_timeout_s: float = 10.0,
        idle_timeout_s: float = 60.0,
        patience_s: float = DEFAULT_PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or parts.query:
            raise UsageError("a receiver needs a URL: http://host:port or https://host:port, without credentials")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._host = parts.netloc
        self._base = parts.path.rstrip("/")
        self._token = cleaned(token, "token of the receiver")
        self._patience_s = patience_s
        self._sleep = sleep
        self._clock = clock
        self._client = HttpClient(
            f"{parts.scheme}://{parts.netloc}",
            connect_timeout_s=connect_timeout_s,
            idle_timeout_s=idle_timeout_s,
            max_idle=1,
            tls=tls,
        )

    def push(
        self,
        snapshot: Snapshot,
        *,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        request_bytes: int = REQUEST_BYTES,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PushResult:
        """Send the bytes of a snapshot that the receiver lacks. May be called again after a crash.

        Args:
            on_progress: Called with the bytes acknowledged and the bytes in total.

        Raises:
            StoreUnavailable, TimedOut and the like: no progress for `patience_s`.
            StoreConfigurationError: the token is wrong, or the certificate is not trusted.
            RefusedError, IntegrityError: the receiver refuses the snapshot.
            SourceChanged: the source changed after the snapshot was taken.
        """
        with doing(f"push to {self.url}") as activity:
            return self._push(snapshot, activity, chunk_bytes, request_bytes, on_progress)

    def _push(
        self,
        snapshot: Snapshot,
        activity: Activity,
        chunk_bytes: int,
        request_bytes: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> PushResult:
        started = self._clock()
        backoff = Backoff(self._patience_s, self._clock)
        total, sent = snapshot.total_bytes, 0
        held: int | None = None
        at: dict[str, Any] | None = None
        while True:
            try:
                at = at or self.status(snapshot.id)
                offset: int = at["bytes_done"]
                if offset > total:
                    raise self._strange()
                held = offset if held is None else held
                if on_progress is not None:
                    on_progress(total if at["complete"] else offset, total)
                if at["complete"]:
                    break
                end = min(total, offset + request_bytes)
                sent += end - offset
                at = self._send(snapshot, offset, end, chunk_bytes)
                activity.went_on()
                backoff = Backoff(self._patience_s, self._clock)
            except (OffsetRegressionError, TemporaryError) as error:
                at = None
                self._wait(backoff, error, activity)
            except ChecksumMismatch as error:
                if error.what == "snapshot":
                    raise
                at = None  # a chunk was damaged on its way
                self._wait(backoff, error, activity)
        status = "pushed" if sent or not total else "unchanged"
        seconds = self._clock() - started
        return PushResult(status, snapshot.id, sent, bytes_total=total, bytes_resumed=held or 0, seconds=seconds)

    def status(self, snapshot: SnapshotId) -> dict[str, Any]:
        """How much of a snapshot the receiver has: docs/mirror.md, "Requests"."""
        return self._standing(snapshot, self._call("GET", f"/v1/snapshot?{urlencode(snapshot._asdict())}"))

    def snapshots(self) -> list[dict[str, Any]]:
        """All snapshots that the receiver has, complete or not."""
        return self._listed(self._call("GET", "/v1/snapshots"))

    def abort(self, snapshot: SnapshotId) -> None:
        """Have the receiver drop an incomplete snapshot."""
        self._call("DELETE", f"/v1/snapshot?{urlencode(snapshot._asdict())}")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> MirrorClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<MirrorClient {self.url}>"

    def _wait(self, backoff: Backoff, error: BlobflowError, activity: Activity) -> None:
        """Wait before the next attempt; raises `error` if there is none."""
        wait_s = backoff.wait_s(error)
        log.info("mirror.retry error=%s failures=%d", type(error).__name__, backoff.failures)
        activity.blocked_by(f"{error.message}; next attempt in {wait_s:.0f} s")
        self._sleep(wait_s)

    def _send(self, snapshot: Snapshot, offset: int, end: int, chunk_bytes: int) -> dict[str, Any]:
        """Send one request; returns the status of the snapshot after it."""
        chunks = max(1, -(-(end - offset) // chunk_bytes))
        size = end - offset + chunks * head_bytes(snapshot.id)

        def frames() -> Iterator[Buffer]:
            for envelope in snapshot.envelopes(offset, chunk_bytes=chunk_bytes, end=end):
                yield envelope.head()
                yield envelope.data

        found = self._listed(self._call("POST", "/v1/frames", Body(size, frames)))
        at = self._standing(snapshot.id, found[-1] if found else {})
        if not at["complete"] and at["bytes_done"] <= offset:
            # What takes no byte makes no progress, however politely it answers.
            raise StoreUnavailable(
                f"{self.url} acknowledges nothing of {snapshot.id} beyond byte {at['bytes_done']}",
                operation="push",
                offset=offset,
            )
        return at

    def _listed(self, document: dict[str, Any]) -> list[dict[str, Any]]:
        found: Any = document.get("snapshots")
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in cast("list[Any]", found)):
            raise self._strange()
        return cast("list[dict[str, Any]]", found)

    def _standing(self, snapshot: SnapshotId, document: dict[str, Any]) -> dict[str, Any]:
        """The document itself, if it is the status of this snapshot."""
        done, complete = document.get("bytes_done"), document.get("complete")
        named = {name: document.get(name) for name in SnapshotId._fields}
        if type(done) is not int or not 0 <= done < 1 << 64 or type(complete) is not bool:
            raise self._strange()
        if named != snapshot._asdict():
            raise self._strange()
        return document

    def _strange(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self.url} gave an answer that no receiver of this version gives",
            hint="see that the URL is that of `blobflow mirror serve`, of this version or a newer one",
            operation="push",
        )

    def _call(self, method: str, target: str, body: Body | None = None) -> dict[str, Any]:
        def headers() -> dict[str, str]:
            fields = {
                "Host": self._host,
                "User-Agent": f"blobflow/{__version__}",
                "Authorization": f"Bearer {self._token}",
            }
            if body is not None:
                fields |= {"Content-Length": str(body.size), "Content-Type": "application/vnd.blobflow.frames"}
            return fields

        try:
            # Frames may be sent twice: the receiver knows them again.
            with self._client.send(method, self._base + target, headers, body) as answer:
                text = answer.read(_MAX_ANSWER_BYTES)
        except HttpError as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                raise StoreConfigurationError(
                    f"{self.url} shows a certificate that is not trusted: {error.__cause__.verify_message}",
                    hint="give a context that trusts its authority",
                    operation=method,
                ) from error
            if error.timeout_s is not None:
                what = f"no connection to {error.connecting}" if error.connecting else "no answer"
                raise TimedOut(
                    f"{self.url}: {what} for {error.timeout_s:g} s", operation=method, timeout_s=error.timeout_s
                ) from error
            raise StoreUnavailable(f"{self.url}: {error}", operation=method) from error
        try:
            document = read_object(text, "answer")
        except ArtifactInvalid:
            document = {}
        if answer.status != 200 or not document:
            raise self._failure(answer, document)
        return document

    def _failure(self, answer: Response, document: dict[str, Any]) -> BlobflowError:
        """The receiver's error as one of ours."""
        told: Any = document.get("error")
        told = dict(cast("dict[str, Any]", told)) if isinstance(told, dict) else {}
        if answer.status == 401:
            return StoreConfigurationError(f"{self.url} refuses the token", operation="push", status=401)
        message, hint = (plain(str(told.pop(name, ""))) for name in ("message", "hint"))
        facts = {"operation": "push", **_fields_of(told)}
        error = rebuilt(str(told.pop("type", "")), f"{self.url}: {message}", hint, facts)
        if error is None:
            passing = answer.status >= 500 or answer.status in (408, 429)
            kind = StoreUnavailable if passing else StoreConfigurationError
            return kind(f"{self.url} answered {answer.status}", operation="push", status=answer.status)
        return error


def _fields_of(told: dict[str, Any]) -> dict[str, Value]:
    """The fields of an error in a receiver's answer; values that our errors cannot have are left out."""
    fields: dict[str, Value] = {}
    for name, value in list(told.items())[:_MAX_FIELDS]:
        if isinstance(value, str):
            fields[name] = plain(value)
        elif isinstance(value, int | float) and -_LARGEST < value < _LARGEST:
            fields[name] = value
    return fields
