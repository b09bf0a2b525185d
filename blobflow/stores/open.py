"""From a URL to a store."""

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
    """The store at `url`, with retries; nothing is sent or made yet.

    What a server can do is found out when it is first relied upon (`blobflow.stores.probe`).

    | url | store | options |
    |---|---|---|
    | `s3://bucket/prefix` | S3 and its relatives | fields of `blobflow.stores.s3.options.S3Options` |
    | `file:///absolute/path`, or a path | local directory, made by the first write | none |
    | `memory://prefix` | this process's memory, for experiments | none |
    | another fsspec URL (`gs://`, `az://`, `sftp://` ...) | through fsspec, without resume | that file system's own |

    Args:
        patience_s: Seconds for which a call that fails for a passing reason is repeated.
        bandwidth_bytes_per_s: Of payloads, in both directions together; shared by all stores of the process that are
            opened with the same figure. None: no limit.
        max_requests: Payload requests in flight to one S3 endpoint, over all stores of the process; fewer while the
            endpoint says SlowDown.
        options: See the table; None means not given. Credentials belong here, or into the usual places of the client
            library, but never into the URL, which appears in logs and metadata.

    Raises:
        InvalidStoreUrl: not a store URL; the message shows no credentials.
        UsageError: an option this kind of store does not know, by name.
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
        # Not `from refusal`, and without the inputs: a credential may be among them.
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
    """Refuse what may be a credential, or hide one, before any message can show the URL."""
    shown = f"{scheme}://..."
    if "?" in rest or "#" in rest:
        raise _invalid(shown, "it has a query or a fragment", hint="give options by name, not in the URL")
    # A secret key may contain slashes, so that the '@' behind it need not lie in the host part.
    if re.match(r"[^/]*:.*@", rest, re.DOTALL) or (scheme == "s3" and "@" in rest.partition("/")[0]):
        raise _invalid(
            shown,
            "it contains credentials",
            hint="give them as options or in the environment; a URL appears in logs",
        )


def _hidden(url: str) -> str:
    """What may be shown of a URL that is none: nothing in front of an `@`."""
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
