"""Where the S3 store goes and how it signs: as botocore would, with and without making a client of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import botocore.auth
import botocore.awsrequest
import botocore.loaders
import botocore.session
import pytest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given, settings, strategies as st

from blobflow.stores.s3.endpoint import Address, S3Endpoint, from_variables, plain_address, prepared_address
from blobflow.stores.s3.options import S3Options
from blobflow.stores.s3.signing import Signer
from tests.servers import service_model_read_once

KEYS = {"access_key_id": "key", "secret_access_key": "secret"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Keys in the environment, and no trace of the machine's own configuration."""
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return monkeypatch


@pytest.fixture(scope="module", autouse=True)
def _service_model_is_read_once() -> Iterator[None]:
    with service_model_read_once():
        yield


@pytest.fixture
def no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making a client is a failure."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a client was made")

    monkeypatch.setattr(botocore.session.Session, "create_client", refuse)


def url_of(**options: Any) -> str:
    access = S3Endpoint(S3Options.model_validate({"bucket": "bucket"} | options))
    access.close()
    return access.endpoint + access.target("k")


@pytest.mark.parametrize("style", ["auto", "path", "virtual"])
@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:9000",
        "http://[::1]:9000",
        "https://s3.example.test",
        "https://s3.example.test/",
        "https://s3.example.test:443/base/path",
        "http://s3.example.test/base/",
        "https://S3.Example.Test",
    ],
)
@pytest.mark.parametrize(
    ("bucket", "region"), [("bucket", "us-east-1"), ("my.dotted.bucket", "eu-central-1"), ("a-b-c", "default")]
)
def test_the_plain_address_is_botocore_s(
    environment: pytest.MonkeyPatch, style: str, endpoint: str, bucket: str, region: str
) -> None:
    """Wherever an address is made without a client, it is the one that a client would have used."""
    options = S3Options.model_validate({"bucket": bucket, "endpoint_url": endpoint, "addressing_style": style})
    plain = plain_address(options, endpoint, region)
    if plain is None:
        assert style == "virtual"
        return
    assert plain == prepared_address(options, botocore.session.Session(), region)


@pytest.mark.parametrize(
    ("endpoint", "options"),
    [
        (None, {}),
        ("https://s3.eu-central-1.amazonaws.com", {}),
        ("https://bucket.s3-accelerate.amazonaws.com", {}),
        ("https://user@s3.example.test", {}),
        ("https://s3.example.test/?query", {}),
        ("ftp://s3.example.test", {}),
        ("s3.example.test", {}),
        ("http://127.0.0.1:9000", {"addressing_style": "virtual"}),
        ("https://s3.example.test", {"bucket": "my.bucket", "addressing_style": "virtual"}),
        ("https://s3.example.test", {"bucket": "My_Bucket"}),
        ("https://s3.example.test", {"bucket": "bucket--op-s3"}),
        ("https://s3.example.test", {"region": "fips-us-east-1"}),
        ("https://s3.example.test", {"region": "aws-global"}),
    ],
)
def test_what_takes_rules_is_left_to_botocore(endpoint: str | None, options: dict[str, Any]) -> None:
    """AWS's own hosts, names that mean more than a name, and URLs that are none have no plain address."""
    given = S3Options.model_validate({"bucket": "bucket"} | options)
    assert plain_address(given, endpoint, given.region or "us-east-1") is None


@pytest.mark.usefixtures("no_client")
@pytest.mark.parametrize(
    ("configured", "option", "expected"),
    [
        ("virtual", "auto", "https://bucket.s3.example.test/k"),
        ("path", "auto", "https://s3.example.test/bucket/k"),
        ("auto", "auto", "https://s3.example.test/bucket/k"),
        ("virtual", "path", "https://s3.example.test/bucket/k"),
        ("path", "virtual", "https://bucket.s3.example.test/k"),
    ],
)
@pytest.mark.parametrize("where", ["option", "variable", "profile"])
def test_the_addressing_style_of_the_configuration_counts_at_an_endpoint_too(
    environment: pytest.MonkeyPatch, tmp_path: Path, where: str, configured: str, option: str, expected: str
) -> None:
    """As for AWS itself, wherever the endpoint is named; the option has the last word."""
    endpoint = "https://s3.example.test"
    lines = ["[default]", f"endpoint_url = {endpoint}" if where == "profile" else ""]
    (tmp_path / "config").write_text("\n".join([*lines, "s3 =", f"    addressing_style = {configured}", ""]))
    if where == "variable":
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
    given = {"endpoint_url": endpoint} if where == "option" else {}
    assert url_of(addressing_style=option, **given) == expected


@pytest.mark.usefixtures("no_client")
def test_an_endpoint_needs_no_client(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options, either variable and the profile name an endpoint without a client, in this order of precedence."""
    (tmp_path / "config").write_text(
        "[default]\nendpoint_url = http://profile.test\nregion = eu-west-9\n"
        "[profile silent]\nendpoint_url = http://profile.test\nignore_configured_endpoint_urls = true\n"
    )
    assert url_of() == "http://profile.test/bucket/k"
    environment.setenv("AWS_ENDPOINT_URL", "http://variable.test")
    assert url_of() == "http://variable.test/bucket/k"
    environment.setenv("AWS_ENDPOINT_URL_S3", "http://s3-variable.test")
    assert url_of() == "http://s3-variable.test/bucket/k"
    assert url_of(addressing_style="virtual") == "http://bucket.s3-variable.test/k"
    assert url_of(endpoint_url="http://option.test") == "http://option.test/bucket/k"
    assert url_of(endpoint_url="http://option.test", **KEYS) == "http://option.test/bucket/k"
    environment.setenv("AWS_PROFILE", "silent")
    with pytest.raises(AssertionError, match="a client was made"):
        url_of()


def test_a_profile_with_services_is_read_by_botocore(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An endpoint in a section of services counts, as it does for every other client."""
    (tmp_path / "config").write_text(
        "[default]\nendpoint_url = http://all.test\nservices = mine\n[services mine]\ns3 =\n"
        "  endpoint_url = http://s3-alone.test\n"
    )
    assert url_of() == "http://s3-alone.test/bucket/k"


def test_explicit_keys_need_no_session() -> None:
    """With keys and an endpoint in the options, neither botocore's session nor its client is even imported."""
    program = (
        "import sys\n"
        "from blobflow.stores.s3.store import S3Options, S3Store\n"
        "store = S3Store(S3Options(bucket='bucket', endpoint_url='http://127.0.0.1:1', access_key_id='a', "
        "secret_access_key='b'))\n"
        "print(store.server.endpoint, *sorted(sys.modules.keys() & {'botocore.session', 'botocore.client'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["http://127.0.0.1:1"]


@pytest.mark.parametrize("options", [{}, {"region": "eu-north-1"}, {"endpoint_url": "https://option.test"}])
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"AWS_SESSION_TOKEN": "token"},
        {"AWS_SESSION_TOKEN": "token", "AWS_SECURITY_TOKEN": "older"},
        {"AWS_REGION": "eu-west-9"},
        {"AWS_REGION": "eu-west-9", "AWS_DEFAULT_REGION": "eu-west-8"},
        {"AWS_ENDPOINT_URL_S3": "https://other.test", "AWS_USE_DUALSTACK_ENDPOINT": "true"},
        {"AWS_CA_BUNDLE": "/no/such/bundle"},
    ],
)
def test_variables_mean_the_same_with_and_without_a_session(
    environment: pytest.MonkeyPatch,
    patched_time: Callable[[str], None],
    tmp_path: Path,
    variables: dict[str, str],
    options: dict[str, Any],
) -> None:
    """Where no file says anything, the variables are read without a session, and mean what they mean with one."""
    patched_time("2026-11-21T12:00:00")
    environment.setenv("AWS_ENDPOINT_URL", "http://variable.test")
    for name, value in variables.items():
        environment.setenv(name, value)

    def opened() -> object:
        try:
            access = S3Endpoint(S3Options.model_validate({"bucket": "bucket"} | options))
        except OSError as error:
            return type(error)
        return access.endpoint, access.target("k"), access.signed("GET", "/bucket/k", {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blobflow.stores.s3.endpoint._session", lambda _: pytest.fail("a session was made"))
        alone = opened()
        (tmp_path / "config").write_text("")
        with pytest.raises(pytest.fail.Exception, match="a session was made"):
            opened()
    assert alone == opened()


@pytest.mark.parametrize(
    "name", ["AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CREDENTIAL_EXPIRATION", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"]
)
def test_variables_that_say_where_to_look_are_left_to_botocore(environment: pytest.MonkeyPatch, name: str) -> None:
    """A profile, keys that expire, an endpoint that does not count, a missing key: then the session decides."""
    options = S3Options(bucket="bucket")
    environment.setenv("AWS_ENDPOINT_URL", "http://variable.test")
    assert from_variables(options).explicit
    environment.setenv(name, "x")
    assert from_variables(options) is options
    environment.delenv(name)
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    assert from_variables(options) is options


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({"region": "eu-central-1"}, "https://bucket.s3.eu-central-1.amazonaws.com/k"),
        ({"accelerate": True, "region": "eu-central-1"}, "https://bucket.s3-accelerate.amazonaws.com/k"),
        ({"addressing_style": "path", "region": "eu-central-1"}, "https://s3.eu-central-1.amazonaws.com/bucket/k"),
        ({"bucket": "dotted.name", "region": "eu-central-1"}, "https://s3.eu-central-1.amazonaws.com/dotted.name/k"),
    ],
)
@pytest.mark.parametrize("keys", [KEYS, {}, {"anonymous": True}])
def test_addresses_at_aws(environment: pytest.MonkeyPatch, options: dict[str, Any], url: str, keys: Any) -> None:
    """Virtual hosts, accelerate and path style are prepared by botocore, for all kinds of credentials alike."""
    assert url_of(**options, **keys) == url


def test_dual_stack_of_the_environment_counts(environment: pytest.MonkeyPatch) -> None:
    """What the environment says of addresses at AWS is heard, unless the keys are explicit."""
    environment.setenv("AWS_USE_DUALSTACK_ENDPOINT", "true")
    environment.setenv("AWS_REGION", "eu-central-1")
    assert url_of() == "https://bucket.s3.dualstack.eu-central-1.amazonaws.com/k"
    assert url_of(**KEYS, region="eu-central-1") == "https://bucket.s3.eu-central-1.amazonaws.com/k"


def test_the_address_is_found_without_credentials(environment: pytest.MonkeyPatch) -> None:
    """The prepared request does not ask the chain for credentials, which may have to be fetched from somewhere."""
    environment.setattr(
        botocore.session.Session, "get_credentials", lambda _: pytest.fail("the chain was asked for credentials")
    )
    options = S3Options(bucket="bucket", region="eu-central-1")
    address = prepared_address(options, botocore.session.Session(), "eu-central-1")
    assert address == Address("https://bucket.s3.eu-central-1.amazonaws.com/x", "s3", "eu-central-1")


def test_a_signature_is_for_this_moment_and_this_document(
    environment: pytest.MonkeyPatch, patched_time: Callable[[str], None]
) -> None:
    """The same request signed again is signed with the new time; the hash of a document is part of what is signed."""
    access = S3Endpoint(S3Options.model_validate({"bucket": "bucket", "endpoint_url": "http://127.0.0.1:1"} | KEYS))
    patched_time("2026-11-21T12:00:00")
    one = access.signed("POST", "/bucket/k?uploadId=1", {"Content-Length": "3"})
    document = access.signed("POST", "/bucket/k?uploadId=1", {"Content-Length": "3"}, "ab" * 32)
    patched_time("2026-11-21T12:00:01")
    later = access.signed("POST", "/bucket/k?uploadId=1", {"Content-Length": "3"})
    assert [each["X-Amz-Date"] for each in (one, document, later)] == ["20261121T120000Z"] * 2 + ["20261121T120001Z"]
    assert [each["X-Amz-Content-SHA256"] for each in (one, document)] == ["UNSIGNED-PAYLOAD", "ab" * 32]
    signatures = {re.search("Signature=(.*)", each["Authorization"])[1] for each in (one, document, later)}  # type: ignore[index]
    assert len(signatures) == 3


_NAME = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=20).filter(lambda name: name.strip("-"))
_VALUE = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)


@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from(["GET", "PUT", "POST", "DELETE", "HEAD"]),
    key=st.text(max_size=20),
    query=st.dictionaries(
        st.sampled_from(["uploads", "uploadId", "part-number-marker", "a", "a-b"]), st.text(max_size=8)
    ),
    headers=st.dictionaries(_NAME.map(lambda name: f"x-amz-{name}"), _VALUE, max_size=5),
    payload=st.sampled_from(["UNSIGNED-PAYLOAD", "ab" * 32]),
    token=st.none() | st.text("abc/+=", min_size=1, max_size=9),
    service=st.sampled_from(["s3", "s3-object-lambda"]),
)
def test_signatures_are_botocore_s(
    method: str,
    key: str,
    query: dict[str, str],
    headers: dict[str, str],
    payload: str,
    token: str | None,
    service: str,
) -> None:
    """Whatever the request, it is signed as botocore would sign it."""
    keys = ReadOnlyCredentials("key id", "secret/key+", token)
    target = "/bucket/" + quote(key.encode("utf-8", "replace"), safe="-_.~/")
    if query:
        pairs = (f"{n}={quote(v.encode('utf-8', 'replace'), safe='-_.~')}" for n, v in query.items())
        target += "?" + "&".join(pairs)
    given_headers = {"Host": "s3.test:9000", "User-Agent": "blobflow/1", "Content-Length": "3", **headers}
    now = datetime(2026, 11, 21, 12, 3, 4, tzinfo=timezone.utc)
    ours = Signer(service, "eu-central-1").sign(method, target, given_headers, payload, keys, now)

    class Theirs(botocore.auth.S3SigV4Auth):
        def payload(self, request: Any) -> str:
            return payload

    request = botocore.awsrequest.AWSRequest(method, "http://s3.test:9000" + target, headers=given_headers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.auth.get_current_datetime", lambda: now)
        Theirs(keys, service, "eu-central-1").add_auth(request)
    assert ours == dict(request.headers.items())


@pytest.fixture
def patched_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the clock by which botocore signs."""

    def set_to(moment: str) -> None:
        monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: datetime.fromisoformat(moment))

    return set_to


def test_a_proxy_over_tls_is_refused(environment: pytest.MonkeyPatch) -> None:
    """A proxy that wants TLS itself is said to be impossible, instead of being spoken to in clear."""
    environment.delenv("NO_PROXY", raising=False)
    environment.delenv("no_proxy", raising=False)
    environment.setenv("https_proxy", "https://proxy.test:3128")
    with pytest.raises(ValueError, match="only proxies at http://"):
        url_of(endpoint_url="https://s3.example.test", **KEYS)
