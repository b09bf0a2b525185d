"""How a bucket is reached, and how requests are signed: botocore's decisions, without botocore's client.

Credentials, refreshable ones included, are botocore's, and signatures are those that it would compute
(`blobflow.stores.s3.signing`). So is the address of a bucket at AWS (virtual
hosts, dual stack, accelerate, FIPS, regions): a client prepares one request, which is caught before it is sent, and the
client is dropped. It costs 0.07 s and 15 MiB; a server that an endpoint URL names is addressed without one, in the same
way. Why: docs/design/009-no-client.md.
"""
# botocore has no types
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

import botocore
import botocore.auth
import botocore.exceptions
import botocore.httpsession
import botocore.utils
from pydantic import SecretStr

from blobflow.credentials import cleaned, endpoint_fault
from blobflow.errors import StoreConfigurationError
from blobflow.http.client import HttpClient
from blobflow.stores.s3.options import S3Options
from blobflow.stores.s3.signing import Signer
from blobflow.version import __version__

if TYPE_CHECKING:
    from blobflow.http.async_client import AsyncHttpClient

UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"

_SAMPLE_KEY = "x"


class Address(NamedTuple):
    """The address of a bucket's objects, and the region and service for signatures."""

    url: str
    """URL of the sample key."""
    service: str
    region: str


class S3Endpoint:
    """Access to a bucket: connections, and a way to address and sign requests.

    Nothing is sent before the first request, except by botocore to providers of credentials.

    Attributes:
        region: Region that requests are signed for.
        skew_s: Seconds by which the server's clock is ahead of ours; signatures are dated by it.
        endpoint: Scheme and host, without credentials.
        server: The same without the bucket, if the host contains it.
        wire: The connections.

    Raises:
        BotoCoreError, ValueError, OSError: the configuration is invalid.
    """

    def __init__(self, options: S3Options, *, skew_s: float = 0.0) -> None:
        options = from_variables(options)
        self.skew_s = skew_s
        self._anonymous = options.anonymous
        # Explicit settings need no session; its import alone costs 0.07 s and 3 MiB.
        session = None if options.explicit and options.endpoint_url is not None else _session(options)
        region = options.region
        if region is None and not options.explicit and session is not None:
            region = session.get_config_variable("region") or os.environ.get("AWS_REGION")
        region = region or "us-east-1"
        if options.addressing_style == "auto" and not options.explicit and session is not None:
            options = options.model_copy(update={"addressing_style": _configured_style(session)})
        endpoint = options.endpoint_url or _configured_endpoint(options, session)
        address = plain_address(options, endpoint, region)
        if address is None:
            session = session or _session(options)
            address = prepared_address(options, session, region)
        self._credentials = _credentials(options, session)
        self.region = address.region
        self._signer = Signer(address.service, address.region)
        parts = urlsplit(address.url)
        self._host = parts.netloc
        self._base = parts.path.removesuffix(_SAMPLE_KEY)
        self._origin = f"{parts.scheme}://{parts.netloc}"
        host = parts.netloc.rpartition("@")[2]
        self.endpoint = f"{parts.scheme}://{host}"
        self.server = f"{parts.scheme}://{host.removeprefix(f'{options.bucket}.')}"
        self._tls = _tls(options, session) if parts.scheme == "https" else None
        self._proxy = botocore.utils.get_environ_proxies(self._origin).get(parts.scheme)
        self._timeouts = (options.connect_timeout, options.idle_timeout)
        self.client = HttpClient(
            self._origin,
            connect_timeout_s=options.connect_timeout,
            idle_timeout_s=options.idle_timeout,
            max_idle=options.max_connections,
            tls=self._tls,
            proxy=self._proxy,
        )

    @property
    def is_direct(self) -> bool:
        """Whether no proxy is in between."""
        return self._proxy is None

    def async_client(self) -> AsyncHttpClient:
        """Separate connections for the running event loop."""
        # Loads asyncio, which only batches need.
        from blobflow.http.async_client import AsyncHttpClient

        connect_s, idle_s = self._timeouts
        return AsyncHttpClient(self._origin, tls=self._tls, connect_timeout_s=connect_s, idle_timeout_s=idle_s)

    def target(self, full_key: str) -> str:
        """Path of an object, as it is on the request line; that of the bucket for the empty key."""
        return self._base + quote(full_key, safe="-_.~/")

    def signed(
        self, method: str, target: str, headers: Mapping[str, str], payload: str = UNSIGNED_PAYLOAD
    ) -> Mapping[str, str]:
        """All headers of one attempt, signed now, with the credentials that are valid now.

        Args:
            payload: SHA-256 of the body, in hex; without it the signature covers the head only.

        Raises:
            BotoCoreError, ClientError: no credentials, or none at the moment (`s3_errors.BOTOCORE_ERRORS`).
        """
        given = {"Host": self._host, "User-Agent": f"blobflow/{__version__}", **headers}
        if self._anonymous:
            return given
        if self._credentials is None:
            raise botocore.exceptions.NoCredentialsError
        now = botocore.auth.get_current_datetime() + timedelta(seconds=self.skew_s)
        return self._signer.sign(method, target, given, payload, self._keys(), now)

    def _keys(self) -> _Fixed:
        """The credentials that are valid now, cleaned: files that they come from end with a newline."""
        try:
            found = self._credentials.get_frozen_credentials()
        except botocore.exceptions.BotoCoreError:
            raise  # its timeouts are OSErrors, too, and pass
        except (OSError, ValueError) as error:
            # A missing token file, or a document that is not JSON: botocore's providers raise these unchanged.
            named = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else "they are malformed"
            raise StoreConfigurationError(
                f"the credentials cannot be read: {named}",
                hint="check the variables and files that say where the credentials are",
            ) from None
        return _Fixed(
            cleaned(found.access_key, "access key id"),
            cleaned(found.secret_key, "secret access key"),
            cleaned(found.token, "session token"),
        )

    def identity(self) -> str:
        """Whose requests these are: the access key id that is valid now; empty for nobody's.

        Raises:
            BotoCoreError, ClientError: no credentials at the moment.
        """
        return self._keys().access_key if self._credentials else ""

    def close(self) -> None:
        """Close the idle connections; requests under way end first."""
        self.client.close()


class _Fixed(NamedTuple):
    """Credentials that are given once, in the form in which botocore signs with them."""

    access_key: str
    secret_key: str
    token: str | None

    def get_frozen_credentials(self) -> _Fixed:
        return self


def _credentials(options: S3Options, session: Any) -> Any:
    if options.access_key_id is None or options.secret_access_key is None:
        return None if options.anonymous else session.get_credentials()
    token = options.session_token.get_secret_value() if options.session_token is not None else None
    return _Fixed(options.access_key_id, options.secret_access_key.get_secret_value(), token)


def _session(options: S3Options) -> Any:
    import botocore.session  # takes 0.07 s to import, and a pipeline is defined more often than it is run

    session = botocore.session.Session()
    if options.explicit:
        # Only the options count: no variables and no files, not even a profile that they name.
        for name, (_, _, default, conversion) in list(session.session_var_map.items()):
            if name in ("config_file", "credentials_file"):
                default = os.devnull
            session.session_var_map[name] = (None, None, default, conversion)
        session.get_component("config_store").set_config_variable("s3", {})
    return session


def _configured_style(session: Any) -> str:
    """The `addressing_style` that the configuration file names in the profile's section `s3`."""
    section = session.get_scoped_config().get("s3")
    style = section.get("addressing_style") if isinstance(section, dict) else None
    return style if style in ("path", "virtual") else "auto"


def _configured_endpoint(options: S3Options, session: Any) -> str | None:
    """The endpoint that environment or profile name, as botocore finds it.

    None also where a profile has a section of services: then it takes a client to find out.

    Raises:
        StoreConfigurationError: it cannot be used.
    """
    if options.explicit or session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    variable = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    profile = {} if variable else session.get_scoped_config()
    return _usable(variable or (None if "services" in profile else profile.get("endpoint_url")) or None)


def _usable(endpoint: str | None) -> str | None:
    if endpoint is not None and (fault := endpoint_fault(endpoint)):
        raise StoreConfigurationError(
            f"the endpoint in AWS_ENDPOINT_URL or in the AWS configuration cannot be used: {fault}",
            hint="use http://host:port or https://host:port",
        )
    return endpoint


def from_variables(options: S3Options) -> S3Options:
    """The options, completed from environment variables if these contain everything; otherwise unchanged.

    They contain everything if they name keys and an endpoint, and there is no profile and no configuration file, as in
    most containers. Then botocore's session, whose import costs 0.07 s, is not needed.
    """
    given = os.environ
    endpoint = options.endpoint_url or given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL")
    key, secret = given.get("AWS_ACCESS_KEY_ID"), given.get("AWS_SECRET_ACCESS_KEY")
    if options.explicit or options.accelerate or not (endpoint and key and secret) or _NEEDS_SESSION & given.keys():
        return options
    files = (
        given.get("AWS_CONFIG_FILE", "~/.aws/config"),
        given.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
    )
    if any(os.path.exists(os.path.expandvars(os.path.expanduser(file))) for file in files):
        return options
    token = given.get("AWS_SECURITY_TOKEN") or given.get("AWS_SESSION_TOKEN")
    bundle = given.get("AWS_CA_BUNDLE")
    found = {
        "endpoint_url": _usable(endpoint),
        "region": options.region or given.get("AWS_DEFAULT_REGION") or given.get("AWS_REGION"),
        "access_key_id": key,
        "secret_access_key": SecretStr(secret),
        "session_token": SecretStr(token) if token else None,
        "verify": bundle if options.verify is True and bundle else options.verify,
    }
    return options.model_copy(update=found)


_NEEDS_SESSION = frozenset({
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_CREDENTIAL_EXPIRATION",  # then botocore reads the variables again when it is near
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_DATA_PATH",
})  # fmt: skip


def plain_address(options: S3Options, endpoint: str | None, region: str) -> Address | None:
    """The address at an endpoint where it follows from its URL alone; None where it takes all of botocore's rules."""
    if endpoint is None or options.accelerate:
        return None
    if not re.fullmatch(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]+)?(/[A-Za-z0-9._~/-]*)?", endpoint):
        return None
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    # AWS's own hosts may mean accelerate, and some regions' and buckets' names mean more than a name.
    if "amazonaws." in host or not re.fullmatch(r"(?!.*fips)(?!aws-global)[a-z0-9][a-z0-9-]{0,62}", region):
        return None
    if not re.fullmatch(r"(?!.*--)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", options.bucket):
        return None
    path = parts.path.rstrip("/")
    if options.addressing_style != "virtual":
        return Address(f"{parts.scheme}://{parts.netloc}{path}/{options.bucket}/{_SAMPLE_KEY}", "s3", region)
    if "." in options.bucket or _is_ip(host):
        return None
    return Address(f"{parts.scheme}://{options.bucket}.{parts.netloc}{path}/{_SAMPLE_KEY}", "s3", region)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Prepared(Exception):
    """A request that botocore made ready and must not send."""

    def __init__(self, url: str, authorization: str) -> None:
        super().__init__(url)
        self.url = url
        self.authorization = authorization


def prepared_address(options: S3Options, session: Any, region: str) -> Address:
    """The address that a client of botocore would use.

    It prepares a request, which is caught before it is sent. (A presigned URL would not do: for most regions it names
    the global endpoint.)

    Raises:
        StoreConfigurationError: the endpoint that is configured cannot be used.
    """
    try:
        return _address_of_client(options, session, region)
    except ValueError as error:
        if "endpoint" not in str(error).lower():
            raise
        # Not `from`: the message repeats the URL.
        raise StoreConfigurationError(
            "the endpoint in the AWS configuration cannot be used", hint="use http://host:port or https://host:port"
        ) from None


def _address_of_client(options: S3Options, session: Any, region: str) -> Address:
    import botocore.config  # as in `_session`

    style = options.addressing_style
    # Only the requested settings: each one here hides that of the shared configuration.
    s3: dict[str, Any] = {"addressing_style": "path" if style == "auto" and options.endpoint_url else style}
    config = botocore.config.Config(
        # Signed, but not with credentials that may have to be fetched: only the scope of the signature is read.
        signature_version=botocore.UNSIGNED if options.anonymous else "s3v4",
        s3=s3 | ({"use_accelerate_endpoint": True} if options.accelerate else {}),
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        ignore_configured_endpoint_urls=options.explicit or None,
    )
    client = session.create_client(
        "s3",
        region_name=region,
        endpoint_url=options.endpoint_url,
        aws_access_key_id=None if options.anonymous else "nobody",
        aws_secret_access_key=None if options.anonymous else "nothing",
        config=config,
    )

    def catch(request: Any, **_: Any) -> None:
        raise _Prepared(request.url, str(request.headers.get("Authorization", "")))

    client.meta.events.register_first("before-send.s3.HeadObject", catch)
    try:
        client.head_object(Bucket=options.bucket, Key=_SAMPLE_KEY)
    except _Prepared as prepared:
        scope = re.search(r"/(?P<region>[^/]+)/(?P<service>[^/]+)/aws4_request", prepared.authorization)
        return Address(prepared.url, *((scope["service"], scope["region"]) if scope is not None else ("s3", region)))
    finally:
        client.close()
    raise AssertionError("botocore sent a request without the before-send event")


def _tls(options: S3Options, session: Any) -> ssl.SSLContext:
    """A context that trusts whom botocore would trust."""
    bundle = options.verify if isinstance(options.verify, str) else None
    if bundle is None and session is not None:
        bundle = session.get_config_variable("ca_bundle")
    context = ssl.create_default_context(cafile=bundle or botocore.httpsession.get_cert_path(True))
    context.set_alpn_protocols(["http/1.1"])
    if options.verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
