"""The HTTP server of a receiver, so that one cluster can push to another. docs/mirror.md has the requests and answers.

A body is a stream of frames. It is processed as it arrives: each request holds one frame in memory, and nothing is
read from the connection while the disk is busy. Threads wait for the disk, never the event loop.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from blobflow.credentials import cleaned
from blobflow.errors import (
    AtCapacity,
    BlobflowError,
    DiskFull,
    IntegrityError,
    NotFoundError,
    ObjectTooLarge,
    OffsetRegressionError,
    PermissionMissing,
    RefusedError,
    SlowDown,
    TemporaryError,
    TimedOut,
    UsageError,
)
from blobflow.mirror.door import Door
from blobflow.mirror.envelope import MAX_PAYLOAD_BYTES, FrameDecoder, SnapshotId
from blobflow.mirror.machine import Following, ReceiverStatus
from blobflow.mirror.receiver import Committed, MirrorReceiver

log = logging.getLogger(__name__)

MIN_TOKEN_CHARACTERS: Final = 16
_MAX_PUSHES: Final = 16
_MAX_SENDERS_BYTES: Final = 1 << 20
_TIMER_SHARE: Final = 0.1
"""Share of the idle timeout by which silence may be noticed early."""
_STATUS: Final[tuple[tuple[type[BlobflowError], int], ...]] = (
    (ObjectTooLarge, 413),
    (OffsetRegressionError, 409),
    (DiskFull, 507),
    (SlowDown, 429),
    (AtCapacity, 429),
    (TimedOut, 408),
    (TemporaryError, 503),
    (IntegrityError, 422),
    (NotFoundError, 404),
    (PermissionMissing, 403),
    (RefusedError, 409),
    (UsageError, 400),
)
"""HTTP status by error class; the first match counts."""

_Endpoint = Callable[[Request, "Sender"], Awaitable[Response]]


def snapshot_document(snapshot: SnapshotId, status: ReceiverStatus | None, *, complete: bool = False) -> dict[str, Any]:
    """A snapshot as the responses show it."""
    document: dict[str, Any] = {**snapshot._asdict(), "status": "absent", "bytes_done": 0}
    if isinstance(status, Following):
        return document | {"status": "following", "cursor": status.cursor, "complete": True}
    if status is not None:
        document |= {"status": "bootstrapping", "bytes_done": status.bytes_done, "bytes_total": status.bytes_total}
    return document | {"complete": complete}


@dataclass(frozen=True)
class Sender:
    """A sender's token, and the snapshots that it may push, see and drop.

    Attributes:
        token: At least 16 characters; white space around it is removed.
        source, database: The sender's snapshots; None: any.
    """

    token: str = field(repr=False)
    source: str | None = None
    database: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", cleaned(self.token, "token"))
        if len(self.token) < MIN_TOKEN_CHARACTERS:
            raise UsageError(f"the token has fewer than {MIN_TOKEN_CHARACTERS} characters")

    def may(self, snapshot: SnapshotId) -> bool:
        """Whether the snapshot is one of the sender's."""
        return self.source in (None, snapshot.source) and self.database in (None, snapshot.database)

    def check(self, snapshot: SnapshotId) -> None:
        """Return if the snapshot is one of the sender's.

        Raises:
            PermissionMissing: it is not; the error does not say whether it exists.
        """
        if not self.may(snapshot):
            raise PermissionMissing(
                f"this token is not for snapshots of {snapshot.database} from {snapshot.source}",
                hint="push with the token of that source and database, or have the receiver's list of tokens changed",
                operation="push",
                permission="snapshots",
            )


def read_senders(path: str | os.PathLike[str]) -> list[Sender]:
    """The senders in a file with lines `SOURCE DATABASE TOKEN`; `*` means any, `#` begins a comment.

    Raises:
        UsageError: a line is invalid, two lines have the same token, or other users may read the file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise UsageError(f"{path} may be read by others", hint=f"chmod 600 {path}", path=str(path))
            lines = file.read(_MAX_SENDERS_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the tokens in {path} cannot be read: {error}", path=str(path)) from error
    senders: list[Sender] = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            source, database, token = words
            named = [None if word == "*" else word for word in (source, database)]
            SnapshotId(named[0] or "x", named[1] or "x", 0, "sha256:" + 64 * "0").checked()
            senders.append(Sender(token, *named))
        except (ValueError, BlobflowError):
            # Without the line, which holds a token.
            raise UsageError(
                f"line {number} of {path} is not SOURCE DATABASE TOKEN",
                hint=f"'*' is any source or database; a token has {MIN_TOKEN_CHARACTERS} characters or more",
                path=str(path),
            ) from None
    if len({sender.token for sender in senders}) < len(senders):
        raise UsageError(f"two senders in {path} have the same token", path=str(path))
    if not senders:
        raise UsageError(f"there is no token in {path}", path=str(path))
    return senders


class _Api:
    def __init__(
        self,
        receiver: MirrorReceiver,
        senders: Sequence[Sender],
        max_frame_bytes: int,
        max_pushes: int,
        idle_timeout_s: float,
    ) -> None:
        self._receiver = receiver
        self._senders = [(_digest(sender.token), sender) for sender in senders]
        self._max_frame_bytes = max_frame_bytes
        self._pushes_left = max_pushes
        self._idle_timeout_s = idle_timeout_s

    def routes(self) -> list[Route]:
        return [
            Route("/v1/snapshots", self._guarded(self._list), methods=["GET"]),
            Route("/v1/snapshot", self._guarded(self._show), methods=["GET"]),
            Route("/v1/snapshot", self._guarded(self._abort), methods=["DELETE"]),
            Route("/v1/frames", self._guarded(self._frames), methods=["POST"]),
            # Without a token, unknown paths are answered like all others.
            Route(
                "/{anything:path}", self._guarded(self._nowhere), methods=["GET", "POST", "PUT", "DELETE", "OPTIONS"]
            ),
        ]

    def _guarded(self, endpoint: _Endpoint) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint, for requests with a valid token; its errors become JSON documents."""

        async def guarded(request: Request) -> Response:
            sender = self._sender_of(request)
            if sender is None:
                log.warning("mirror.unauthorized client=%s", request.client.host if request.client else "")
                error = RefusedError("the token is missing or wrong", hint="give the token of this receiver")
                headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
                return JSONResponse({"error": error.to_dict()}, 401, headers)
            try:
                await to_thread.run_sync(self._receiver.expire)
                return await endpoint(request, sender)
            except BlobflowError as error:
                status = next((number for kind, number in _STATUS if isinstance(error, kind)), 500)
                log.info("mirror.refused status=%d error=%s", status, type(error).__name__)
                return JSONResponse({"error": error.to_dict()}, status)
            except ClientDisconnect:
                log.info("mirror.disconnected")
                return Response(status_code=400)

        return guarded

    def _sender_of(self, request: Request) -> Sender | None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest, found = _digest(given.strip()), None
        # All digests have the same length and all are compared, so the time reveals nothing about a token.
        for known, sender in self._senders:
            if hmac.compare_digest(digest, known) and scheme.lower() == "bearer":
                found = sender
        return found

    async def _nowhere(self, _: Request, __: Sender) -> Response:
        return JSONResponse({"error": NotFoundError("there is no such address").to_dict()}, 404)

    async def _list(self, _: Request, sender: Sender) -> Response:
        found = [each for each in await to_thread.run_sync(self._receiver.snapshots) if sender.may(each)]
        documents = [await to_thread.run_sync(self._document, snapshot) for snapshot in found]
        return JSONResponse({"snapshots": documents})

    async def _show(self, request: Request, sender: Sender) -> Response:
        return JSONResponse(await to_thread.run_sync(self._document, _id_of(request, sender)))

    async def _abort(self, request: Request, sender: Sender) -> Response:
        snapshot = _id_of(request, sender)
        await to_thread.run_sync(self._receiver.abort, snapshot)
        return JSONResponse(await to_thread.run_sync(self._document, snapshot))

    def _document(self, snapshot: SnapshotId) -> dict[str, Any]:
        status = self._receiver.status(snapshot)
        return snapshot_document(snapshot, status, complete=self._receiver.committed(snapshot) is not None)

    async def _frames(self, request: Request, sender: Sender) -> Response:
        if not self._pushes_left:
            raise SlowDown("as many pushes as are allowed are under way", operation="push", retry_after_s=1.0)
        self._pushes_left -= 1
        try:
            return await self._take_frames(request, sender)
        finally:
            self._pushes_left += 1

    async def _take_frames(self, request: Request, sender: Sender) -> Response:
        decoder = FrameDecoder(self._max_frame_bytes)
        frames = 0
        reached: dict[SnapshotId, dict[str, Any]] = {}
        with anyio.CancelScope(deadline=anyio.current_time() + self._idle_timeout_s) as silence:
            async for piece in request.stream():
                for envelope in decoder.feed(piece):
                    sender.check(envelope.id)
                    silence.deadline = float("inf")  # the disk's time is not the sender's
                    outcome = await to_thread.run_sync(self._receiver.handle, envelope)
                    frames += 1
                    complete = isinstance(outcome, Committed)
                    done = envelope.total_bytes if complete else outcome.bytes_done
                    reached[envelope.id] = {**envelope.id._asdict(), "bytes_done": done, "complete": complete}
                # Each move of a deadline is a new timer: not for every piece of a few kilobytes.
                deadline = anyio.current_time() + self._idle_timeout_s
                if not 0 <= deadline - silence.deadline < self._idle_timeout_s * _TIMER_SHARE:
                    silence.deadline = deadline
        if silence.cancelled_caught:
            raise TimedOut("no byte arrived", operation="push", timeout_s=self._idle_timeout_s)
        if decoder.pending:
            raise IntegrityError("the body ended inside a frame")
        return JSONResponse({"frames": frames, "snapshots": list(reached.values())})


def mirror_app(
    receiver: MirrorReceiver,
    *,
    token: str | None = None,
    senders: Sequence[Sender] = (),
    max_frame_bytes: int = MAX_PAYLOAD_BYTES,
    max_pushes: int = _MAX_PUSHES,
    idle_timeout_s: float = 60.0,
) -> Starlette:
    """The ASGI application of a receiver; mount it anywhere.

    Args:
        token: The bearer token of a sender that may push anything; at least 16 characters.
        senders: Senders with their own tokens. None of them sees or touches the snapshots of another.
        max_frame_bytes: Largest payload of a frame; memory is this times `max_pushes`.
        max_pushes: Requests with frames at the same time; further ones get 429 and wait.
        idle_timeout_s: Seconds in which at least one byte of a body must arrive; at worst a tenth less.

    Raises:
        UsageError: there is no token, or a token is too short.
    """
    everybody = [*senders, *([Sender(token)] if token is not None else [])]
    if not everybody:
        raise UsageError("a receiver needs a token, or senders that have one")
    return Starlette(routes=_Api(receiver, everybody, max_frame_bytes, max_pushes, idle_timeout_s).routes())


class MirrorServer:
    """Serves a receiver over HTTP or HTTPS.

    Args:
        host, port: Where to listen; port 0 takes a free one.
        certificate, private_key: PEM files; with them the server speaks HTTPS.
        door: The limits that hold before a token is checked.
        options: See `mirror_app`.

    Attributes:
        url: The URL of the server, known from construction on.
    """

    def __init__(
        self,
        receiver: MirrorReceiver,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        certificate: str | None = None,
        private_key: str | None = None,
        door: Door | None = None,
        **options: Any,
    ) -> None:
        app = mirror_app(receiver, **options)
        door = door or Door()
        self._listener = door.listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        scheme = "https" if certificate else "http"
        self.url = f"{scheme}://{shown}:{self._listener.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=door.protocol(),
                h11_max_incomplete_event_size=door.max_head_bytes,
                loop="asyncio",  # of others it is not known how they accept
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                ssl_certfile=certificate,
                ssl_keyfile=private_key,
                timeout_graceful_shutdown=10,
            )
        )

    def run(self) -> None:
        """Serve until `stop`, SIGINT or SIGTERM; requests in progress are finished."""
        started = time.monotonic()
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._listener.close()
            log.info("mirror.stopped seconds=%.1f", time.monotonic() - started)

    def stop(self) -> None:
        """Make `run` return; may be called from any thread."""
        self._server.should_exit = True

    def __repr__(self) -> str:
        return f"<MirrorServer {self.url}>"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _id_of(request: Request, sender: Sender) -> SnapshotId:
    given = request.query_params
    try:
        snapshot = SnapshotId(given["source"], given["database"], int(given["position"]), given["digest"]).checked()
    except (KeyError, ValueError):
        raise UsageError("a snapshot is named by source, database, position and digest") from None
    sender.check(snapshot)
    return snapshot
