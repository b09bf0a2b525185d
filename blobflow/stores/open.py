"""`open_store`: opens the store at a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any
from urllib.parse import unquote

from pydantic import ValidationError

from blobflow.backoff import DEFAULT_PATIENCE_S
from blobflow.errors import InvalidStoreUrl, UsageError
from blobflow.limits import shared_bandwidth, shared_requests
from blobflow.stores.base import Store
from blobflow.stores.limited import LimitedStore
from blobflow.stores.local.store import LocalStore
from blobflow.stores.probe import ProbedStore
from blobflow.stores.retry import RetryingStore

_HINT = "use s3://bucket/prefix, file:///absolute/path, a path, or the URL of an fsspec file system"

_MISTAKEN_SCHEMES = {
    "http": "for S3 over HTTP name the bucket, s3://bucket/prefix, and give the server as endpoint_url",
    "https": "for S3 over HTTPS name the bucket, s3://bucket/prefix, and give the server as endpoint_url",
    "s3a": "use s3://",
    "s3n": "use s3://",
}


def open_store(
    url: str | os.PathLike[str],
    *,
    patience_s: float = DEFAULT_PATIENCE_S,
    bandwidth_bytes_per_s: float | None = None,
    max_requests: int = 64,
    **options: Any,
) -> Store:
    """The store at `url`, with retries. It sends no request and creates nothing yet.

    The capabilities of a server are probed when they are first needed (`blobflow.stores.probe`).

    | url | store | options |
    |---|---|---|
    | `s3://bucket/prefix` | S3 and its relatives | fields of `blobflow.stores.s3.options.S3Options` |
    | `file:///absolute/path`, or a path | local directory, created by the first write | none |
    | `memory://prefix` | this process's memory, for experiments | none |
    | another fsspec URL (`gs://`, `az://`, `sftp://` ...) | through fsspec, without resume | those of the file system |

    Args:
        patience_s: Seconds for which a call is repeated after temporary errors.
        bandwidth_bytes_per_s: Limit of payload bytes per second, both directions together. All stores of the process
            that are opened with the same figure share it. None for no limit.
        max_requests: Most payload requests in flight to one S3 endpoint, over all stores of the process; fewer while
            the endpoint answers SlowDown.
        options: See the table; None means not given. Give credentials here, or in the usual places of the client
            library, but never in the URL, which appears in logs and metadata.

    Raises:
        InvalidStoreUrl: `url` is not a store URL; the message shows no credentials.
        UsageError: this kind of store does not have an option; the message names it.
    """
    given = {name: value for name, value in options.items() if value is not None}
    store = _open(os.fspath(url), given)
    bandwidth = shared_bandwidth(bandwidth_bytes_per_s) if bandwidth_bytes_per_s else None
    if store.url.startswith("s3://"):
        requests = shared_requests(str(given.get("endpoint_url") or "aws"), max_requests)
        return ProbedStore(LimitedStore(store, requests=requests, bandwidth=bandwidth), patience_s=patience_s)
    if bandwidth is not None:
        store = LimitedStore(store, requests=shared_requests(store.url, max_requests), bandwidth=bandwidth)
    return RetryingStore(store, patience_s=patience_s)


def _open(url: str, options: dict[str, Any]) -> Store:
    if not url.strip():
        raise _invalid(url, "it is empty")
    if "\0" in url:
        raise _invalid("", "it contains a NUL character")
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(?://(.*))?", url, re.DOTALL)
    if match is None:
        return _open_local(url, options)
    scheme, rest = match[1].lower(), match[2]
    if rest is None:
        raise _invalid(
            _hidden(url), "'//' is missing after the scheme", hint=f"{_HINT}; a path that contains ':' starts with './'"
        )
    _refuse_secrets(scheme, rest)
    if scheme in _MISTAKEN_SCHEMES:
        raise _invalid(url, f"{scheme} is not a store", hint=_MISTAKEN_SCHEMES[scheme])
    if scheme == "file":
        return _open_local(_file_path(url, rest), options)
    if scheme == "s3":
        return _open_s3(url, rest, options)
    return _open_fsspec(scheme, rest, options)


def _open_local(path: str, options: dict[str, Any]) -> Store:
    _refuse_unknown("a local store", options, ())
    return LocalStore(path)


def _open_s3(url: str, rest: str, options: dict[str, Any]) -> Store:
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise _invalid(url, "the bucket is missing", hint="use s3://bucket/prefix")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket):
        raise _invalid("s3://...", "this is not the name of a bucket", hint="use s3://bucket/prefix")
    # Loads ssl and the HTTP client, which other stores do not need.
    from blobflow.stores.s3.store import S3Options, S3Store

    _refuse_unknown("an S3 store", options, S3Options.model_fields.keys() - {"bucket", "prefix"})
    try:
        return S3Store(S3Options(bucket=bucket, prefix=prefix.strip("/"), **options))
    except ValidationError as refusal:
        # Not `from refusal`, and without the inputs, because they may contain a credential.
        reasons = [
            f"{'.'.join(map(str, error['loc'])) or 'options'}: {error['msg']}"
            for error in refusal.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise UsageError(f"options of an S3 store: {'; '.join(reasons)}") from None


def _open_fsspec(scheme: str, rest: str, options: dict[str, Any]) -> Store:
    # Loads fsspec, which other stores do not need.
    from blobflow.stores.fsspec.store import FsspecStore

    if scheme == "memory":
        _refuse_unknown("a memory store", options, ())
    return FsspecStore(f"{scheme}://{rest}", **options)


def _file_path(url: str, rest: str) -> str:
    host, _, path = rest.partition("/")
    if host not in ("", "localhost") or not path:
        raise _invalid(url, "the path is not absolute", hint="use file:///absolute/path, or a plain path")
    return "/" + unquote(path)


def _refuse_secrets(scheme: str, rest: str) -> None:
    """Refuse a URL that may contain a credential, before any message can show it.

    Raises:
        InvalidStoreUrl: the URL has a query, a fragment or credentials.
    """
    shown = f"{scheme}://..."
    if "?" in rest or "#" in rest:
        raise _invalid(shown, "it has a query or a fragment", hint="give options by name, not in the URL")
    # A secret key may contain slashes, so the '@' after it may be outside of the host part.
    if re.match(r"[^/]*:.*@", rest, re.DOTALL) or (scheme == "s3" and "@" in rest.partition("/")[0]):
        raise _invalid(
            shown,
            "it contains credentials",
            hint="give them as options or in the environment; a URL appears in logs",
        )


def _hidden(url: str) -> str:
    """The part of an invalid URL that may be shown: nothing before an `@`, and no query."""
    _, at, rest = url.rpartition("@")
    return f"...{at}{rest.partition('?')[0]}" if at else url.partition("?")[0]


def _refuse_unknown(kind: str, options: dict[str, Any], known: Collection[str]) -> None:
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise UsageError(
            f"{kind} has no option {', '.join(map(repr, unknown))}",
            hint=f"it takes {', '.join(sorted(known))}" if known else "it takes none",
            options=", ".join(unknown),
        )


def _invalid(url: str, reason: str, *, hint: str = _HINT) -> InvalidStoreUrl:
    return InvalidStoreUrl(f"invalid store url {url!r}: {reason}", hint=hint, url=url, reason=reason)
