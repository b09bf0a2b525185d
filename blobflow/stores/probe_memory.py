"""Results of this user's probes, kept in a private directory of the machine.

They are kept outside of every store, because uploads rely on them. In a bucket, anybody with write access could claim
capabilities that the server does not have.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

from blobflow.errors import BlobflowError
from blobflow.private import PrivateDirectory

_log = logging.getLogger(__name__)

_MAX_BYTES: Final = 64 * 1024


class ProbeMemory:
    """Keeps a file for each place in `$XDG_CACHE_HOME/blobflow/probes`, by default below `~/.cache`.

    The directory must belong to this user and be closed to others; otherwise nothing is written or read. A failure
    here is never an error, because it costs only a probe.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache

    def recall(self, place: str) -> bytes | None:
        """The data kept for `place`; None if there is none."""
        try:
            with self._opened(make=False) as directory:
                descriptor = directory.open(_name(place), os.O_RDONLY)
                with os.fdopen(descriptor, "rb") as file:
                    data = file.read(_MAX_BYTES + 1)
                    return data if os.fstat(descriptor).st_uid == os.geteuid() and len(data) <= _MAX_BYTES else None
        except FileNotFoundError:
            pass
        except (OSError, BlobflowError) as error:
            _log.info("probe.memory_unusable error=%s", error)
        return None

    def keep(self, place: str, data: bytes) -> None:
        """Keep `data` for `place`; it replaces earlier data."""
        name, temporary = _name(place), f".{uuid.uuid4().hex}"
        try:
            with self._opened(make=True) as directory:
                try:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                    with os.fdopen(directory.open(temporary, flags, 0o600), "wb") as file:
                        file.write(data)
                    directory.rename(temporary, name)
                except BaseException:
                    with suppress(OSError):
                        directory.unlink(temporary)
                    raise
        except (OSError, BlobflowError) as error:
            _log.info("probe.not_remembered error=%s", error)

    def _opened(self, *, make: bool) -> PrivateDirectory:
        """The open directory.

        Raises:
            OSError, BlobflowError: the directory cannot be used.
        """
        cache = self._cache or _user_cache()
        with (
            PrivateDirectory.at(cache, make=make) as above,
            PrivateDirectory.within(above.descriptor, "blobflow", cache / "blobflow", make=make) as ours,
        ):
            directory = ours.below("probes", make=make)
        status = os.fstat(directory.descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            directory.close()
            raise PermissionError(f"{directory.path} belongs to another user, or is open to others")
        return directory


def _user_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    if given.startswith("/"):  # a relative path must be ignored: https://specifications.freedesktop.org/basedir-spec
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:  # no HOME, and no entry in the password file
        raise FileNotFoundError("this user has no home directory") from error


def _name(place: str) -> str:
    return f"{hashlib.sha256(place.encode()).hexdigest()}.json"
