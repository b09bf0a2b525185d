"""Errors of fsspec's file systems and of the client libraries below them, in this package's words.

No library is imported here: its errors are recognised by their names, and by their status.

| what happened | error | again? |
|---|---|---|
| wrong password or key, 401, 403, permission denied | `StoreConfigurationError` | no |
| an option is missing, misspelt, or has a value that the library refuses | `UsageError` | no |
| other refusals: HTTP 4xx, FTP 5yz, certificates | `StoreConfigurationError` | no |
| 408, 423, 429, 5xx, FTP 4yz, broken connections, unknown errors | `StoreUnavailable`, `SlowDown` | yes |
| silence | `TimedOut` | yes |

The text of a foreign error may quote URLs and headers, and with them credentials. It is shown only for errors from
before the first request, without the values of the options, and at most 200 characters of it.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import ssl
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypedDict

from blobflow.errors import (
    BlobflowError,
    InvalidKey,
    ObjectNotFound,
    SlowDown,
    StoreConfigurationError,
    StoreUnavailable,
    TimedOut,
    Unsupported,
    UsageError,
)
from blobflow.stores.fsspec.clients import Silence

PACKAGES = {
    "abfs": "adlfs",
    "abfss": "adlfs",
    "adl": "adlfs",
    "az": "adlfs",
    "dav": "webdav4[fsspec]",
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "oci": "ocifs",
    "oss": "ossfs",
    "sftp": "paramiko",
    "smb": "smbprotocol",
    "ssh": "paramiko",
    "webdav": "webdav4[fsspec]",
}
"""The package for each scheme; fsspec itself knows some schemes only once their package is installed."""

_CREDENTIALS = frozenset(
    {
        "AuthenticationException",  # paramiko
        "BadHostKeyException",
        "ClientAuthenticationError",  # azure
        "DefaultCredentialsError",  # google
        "RefreshError",
        "NoCredentialsError",  # botocore
    }
)
_FINAL = frozenset({"InvalidURL", "InvalidUrlClientError", "UnsupportedProtocol", "LocalProtocolError"})
_FINAL_SSH = re.compile("No authentication methods|not found in known_hosts|not a valid|private key|Invalid key")
"""paramiko has one class for these and for broken connections."""
_PASSING_SSH = re.compile("transport shut down|EOF|timeout", re.IGNORECASE)

_WEBDAV = {
    "BadGatewayError": 502,
    "ForbiddenOperation": 403,
    "InsufficientStorage": 507,
    "ResourceLocked": 423,
    "ResourceNotFound": 404,
}
"""Errors of its client that do not carry the status."""

_QUOTED = 200


class _About(TypedDict):
    operation: str
    key: str | None
    offset: int | None


def translate(error: Exception, *, url: str, operation: str, key: str = "", offset: int | None = None) -> BlobflowError:
    """The error of a call to a connected file system."""
    what = f"{operation} {key!r} in {url}" if key else f"{operation} {url}"
    about: _About = {"operation": operation, "key": key or None, "offset": offset}
    if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
        return taken(key, url)
    if isinstance(error, NotImplementedError):
        return Unsupported(f"{url} has no {operation}", hint="use s3:// or file://", store=url, capability=operation)
    if _status(error) == 404:
        return ObjectNotFound(f"no object {key!r} in {url}", key=key)
    known = _by_kind(error, what, about)
    if known is not None:
        return known
    if isinstance(error, TypeError | ImportError) or (
        isinstance(error, ValueError) and not isinstance(error, UnicodeError | json.JSONDecodeError)
    ):
        hint = "look at the options of this store; `-v` shows the whole error"
        return StoreConfigurationError(f"{what}: {type(error).__name__}", hint=hint, **about)
    return StoreUnavailable(f"{what}: {_name(error)}", **about)


def taken(key: str, url: str) -> InvalidKey:
    """A key that is the directory of others, or the reverse."""
    return InvalidKey(
        f"{key!r} cannot be stored in {url}: it, or a part of its path, is taken",
        hint="here a key cannot be an object and the directory of others at once",
        key=key,
        reason="object and directory of others",
    )


def translate_connecting(
    error: Exception, *, url: str, implementation: type[Any], options: Mapping[str, Any]
) -> BlobflowError:
    """The error of making a file system, before anything was asked of it."""
    scheme = url.partition("://")[0]
    about: _About = {"operation": "connect", "key": None, "offset": None}
    known = _by_kind(error, f"connect to {url}", about)
    if known is not None:
        return known
    text = _quoted(error, options)
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        text = f"{error.strerror}: {str(error.filename)[:_QUOTED]!r}"
    if isinstance(error, TypeError):
        if missing := re.search(r"missing \d+ required (?:positional |keyword-only )?arguments?: (.+)", text):
            names = ", ".join(re.findall(r"'(\w+)'", missing[1]))
            return UsageError(
                f"{scheme}:// needs the option {names}",
                hint=f"give it as an option, or in the environment: {', '.join(_variables(scheme, names))}",
                options=names,
            )
        if unexpected := re.search(r"unexpected keyword argument '(\w+)'", text):
            return unknown_option(scheme, unexpected[1], known_options(implementation))
    if isinstance(error, ImportError):
        return missing_package(scheme, error)
    if isinstance(error, ValueError | TypeError | FileNotFoundError | KeyError):
        return StoreConfigurationError(
            f"{url} cannot be connected to: {text}", hint="look at the options of this store", **about
        )
    return StoreUnavailable(f"connect to {url}: {_name(error)}", **about)


def missing_package(scheme: str, error: ImportError | None = None) -> UsageError:
    """What to install."""
    package = PACKAGES.get(scheme)
    hint = f"pip install '{package}'" if package else str(error)[:_QUOTED]
    return UsageError(f"{scheme}:// needs a package that is not installed", hint=hint)


def unknown_option(scheme: str, name: str, known: Collection[str]) -> UsageError:
    """An option that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, sorted(known), 1)
    hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(known))}"
    return UsageError(f"{scheme}:// has no option {name!r}", hint=hint, options=name)


def known_options(implementation: type[Any]) -> set[str]:
    """The options that a file system names itself, those of its parents and of its client included."""
    known: set[str] = {"use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", "batch_size"}
    for makes in (*(parent.__init__ for parent in implementation.__mro__), *_clients_of(implementation)):
        known |= _parameters(makes)
    return known - {"self", "args", "kwargs", "storage_options", "fo"}


def check_options(scheme: str, implementation: type[Any], options: Mapping[str, Any]) -> None:
    """Refuse an option that looks misspelt; most file systems ignore such options.

    Some pass unknown options to a library, and its names cannot be listed. So an unknown name passes unless it is
    nearly a known one, or all names are known.

    Raises:
        UsageError: with the nearest name.
    """
    known = known_options(implementation)
    if not known:
        return
    closed = implementation.__name__ in _SWALLOWING or bool(_clients_of(implementation))
    for name in options:
        if name not in known and (closed or difflib.get_close_matches(name, known, 1, cutoff=0.8)):
            raise unknown_option(scheme, name, known)


_SWALLOWING = frozenset({"AzureBlobFileSystem", "FTPFileSystem", "GCSFileSystem", "ExtendedGcsFileSystem"})
"""They hand options that they do not know to nobody."""


def _clients_of(implementation: type[Any]) -> list[Any]:
    """What gets the options that the file system does not take itself; its module has imported that."""
    names = {parent.__name__ for parent in implementation.__mro__}
    if "SFTPFileSystem" in names:
        return [sys.modules["paramiko"].SSHClient.connect, _sftp_own]
    if "WebdavFileSystem" in names:
        return [sys.modules["webdav4.client"].Client.__init__, sys.modules["httpx"].Client.__init__]
    return []


def _sftp_own(temppath: str, host_key_policy: str) -> None:
    """Its options that are not in its signature."""


def _parameters(makes: Any) -> set[str]:
    try:
        return set(inspect.signature(makes).parameters)
    except (TypeError, ValueError):
        return set()


def _variables(scheme: str, names: str) -> list[str]:
    return [f"FSSPEC_{scheme.upper()}_{name.upper()}" for name in names.split(", ")]


def _by_kind(error: Exception, what: str, about: _About) -> BlobflowError | None:
    """The error by facts that all libraries share; None if there are none."""
    status = _status(error)
    names = {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}
    text = str(error)
    if isinstance(error, Silence | TimeoutError) or any("Timeout" in name for name in names):
        return TimedOut(f"{what}: no answer for the idle timeout", **about)
    refused = isinstance(error, PermissionError) or (isinstance(error, OSError) and text.startswith("Forbidden"))
    if status in (401, 403, 530, 532) or refused or (names & _CREDENTIALS and not _PASSING_SSH.search(text)):
        told = f" ({status})" if status else f" ({type(error).__name__})"
        return StoreConfigurationError(
            f"{what}: refused{told}",
            hint="look at the credentials, and at what they may do there",
            status=status,
            **about,
        )
    final = bool(names & _FINAL) or any(isinstance(each, ssl.SSLCertVerificationError) for each in _chain(error))
    if final or ("SSHException" in names and _FINAL_SSH.search(text)):
        reason = text if "SSHException" in names else _name(error)
        return StoreConfigurationError(
            f"{what}: {reason[:_QUOTED]}", hint="look at the URL and the options of this store", **about
        )
    if "error_temp" in names:  # FTP's 4yz, "try again"
        return None
    if status in (429, 503) and "error_perm" not in names:
        return SlowDown(f"{what}: the server asks for fewer requests ({status})", status=status, **about)
    if "error_perm" in names or (status is not None and 400 <= status < 500 and status not in (408, 423, 425)):
        return StoreConfigurationError(f"{what}: the server refuses it ({status})", status=status, **about)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was made of."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _status(error: BaseException) -> int | None:
    """The status of the server's answer, whatever the library calls it."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        for holder in (each, response):
            for name in ("status_code", "status", "code"):
                value = getattr(holder, name, None)
                number = int(value) if isinstance(value, str) and value.isdigit() else value
                if isinstance(number, int) and 100 <= number < 600:
                    return int(number)
        if type(each).__module__ == "ftplib" and (reply := re.match(r"[1-5]\d\d", str(each))):
            return int(reply[0])
        if type(each).__module__ == "webdav4.client" and type(each).__name__ in _WEBDAV:
            return _WEBDAV[type(each).__name__]
    return None


def _name(error: Exception) -> str:
    """What kind of error it is, in the system's words where it is the system's."""
    if isinstance(error, OSError) and isinstance(error.errno, int) and error.errno > 0:
        return os.strerror(error.errno).lower()
    for each in _chain(error):
        if isinstance(each, OSError) and isinstance(each.errno, int) and each.errno > 0:
            return f"{type(error).__name__} ({os.strerror(each.errno).lower()})"
    return type(error).__name__


def _quoted(error: Exception, options: Mapping[str, Any]) -> str:
    """The error's text in one short line, without the values of options."""
    text = " ".join(str(error).split())
    for value in options.values():
        for piece in re.split(r"[;,&\s]|(?<!=)=(?!=)", value) if isinstance(value, str) else ():
            if len(piece) >= 4:
                text = text.replace(piece, "***")
    return text[:_QUOTED]
