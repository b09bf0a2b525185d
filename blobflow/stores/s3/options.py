"""Where a bucket is and how to talk to it, as configuration."""

from __future__ import annotations

from typing import Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from blobflow.credentials import cleaned, endpoint_fault
from blobflow.errors import StoreConfigurationError, setting
from blobflow.stores.base import check_key

_TIB: Final = 1024**4
_LARGEST_OBJECTS: Final = {
    "r2.cloudflarestorage.com": 5 * _TIB - 5 * 1024**3,
    "storage.googleapis.com": 5 * _TIB,
    "backblazeb2.com": 10 * 10**12,
    "digitaloceanspaces.com": 5 * _TIB,
    "wasabisys.com": 5 * _TIB,
}
"""Bytes of the largest object by domain, according to the providers' pages; AWS takes 10,000 parts of 5 GiB."""


def largest_object(endpoint_url: str | None) -> int | None:
    """Bytes of the largest object that a provider takes; None where nothing but the number of parts limits it."""
    host = urlsplit(endpoint_url or "").hostname or ""
    return next((size for domain, size in _LARGEST_OBJECTS.items() if f".{host}".endswith(f".{domain}")), None)


class S3Options(BaseModel):
    """Where a bucket is and how to talk to it.

    With access keys given here, or with `anonymous`, the environment (`AWS_*`) and the shared configuration files
    are not consulted; without them botocore's usual chain applies, refreshable credentials included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    bucket: str = Field(min_length=1, description="Name of an existing bucket; it is never created.")
    prefix: str = Field(default="", description="Put before every key, with a `/` between.")
    endpoint_url: str | None = Field(default=None, description="For servers that are not AWS.")
    region: str | None = Field(default=None, description="Default: the chain's, then us-east-1.")
    access_key_id: str | None = Field(default=None, repr=False, description="Together with the secret, or not at all.")
    secret_access_key: SecretStr | None = Field(default=None, repr=False, description="Belongs to the access key id.")
    session_token: SecretStr | None = Field(
        default=None, repr=False, description="Session token of temporary credentials."
    )
    anonymous: bool = Field(default=False, description="Sign nothing, for public buckets.")
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        default="auto",
        description="Bucket in the path or in the host name; auto is what the AWS configuration says, else path for an"
        " endpoint_url, else botocore's choice.",
    )
    accelerate: bool = Field(default=False, description="Through AWS's edge locations (S3 Transfer Acceleration).")
    verify: bool | str = Field(default=True, description="Check TLS certificates; a path names a CA bundle.")
    content_md5: bool = Field(
        default=False,
        description="Also send the MD5 of every object and part. For servers that ignore CRC32C (see the probe); "
        "costs a second reading of the source and 1.5 s of processor time per GiB.",
    )
    max_object_size: int | None = Field(
        default=None,
        gt=0,
        description="Bytes of the largest object that the server takes; known for some providers by their address.",
    )
    connect_timeout: float = Field(default=10.0, gt=0, description="Seconds for a connection to be made.")
    idle_timeout: float = Field(default=120.0, gt=0, description="Seconds without a single byte before giving up.")
    max_connections: int = Field(default=32, ge=1, description="Connections kept open between requests.")

    @field_validator("access_key_id")
    @classmethod
    def _clean_id(cls, value: str | None) -> str | None:
        return cleaned(value, "access key id")

    @field_validator("secret_access_key")
    @classmethod
    def _clean_secret(cls, value: SecretStr | None) -> SecretStr | None:
        return value and SecretStr(cleaned(value.get_secret_value(), "secret access key"))

    @field_validator("session_token")
    @classmethod
    def _clean_token(cls, value: SecretStr | None) -> SecretStr | None:
        return value and SecretStr(cleaned(value.get_secret_value(), "session token"))

    @field_validator("endpoint_url")
    @classmethod
    def _is_endpoint(cls, value: str | None) -> str | None:
        if value is not None and (fault := endpoint_fault(value)):
            raise StoreConfigurationError(
                f"{setting('endpoint_url')} cannot be used: {fault}", hint="use http://host:port or https://host:port"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> S3Options:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("access_key_id and secret_access_key belong together")
        if self.access_key_id is None and self.session_token is not None:
            raise ValueError("session_token needs access_key_id and secret_access_key")
        if self.anonymous and self.access_key_id is not None:
            raise ValueError("anonymous access takes no keys")
        if self.accelerate and (self.endpoint_url is not None or self.addressing_style == "path"):
            raise ValueError("accelerate means an address of AWS, with the bucket in the host name")
        if self.bucket.endswith("--x-s3"):
            raise ValueError("directory buckets (S3 Express One Zone) are not supported")
        if self.prefix.strip("/"):
            check_key(self.prefix.strip("/"))
        return self

    @property
    def explicit(self) -> bool:
        """Whether all settings are here and nothing is taken from the environment."""
        return self.anonymous or self.access_key_id is not None
