"""The resource: the store of artifacts, and the settings of transfers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import dagster as dg
from pydantic import Field, PrivateAttr, model_validator
from typing_extensions import Self

from blobflow.backoff import DEFAULT_PATIENCE_S
from blobflow.config import ChunkProfile
from blobflow.coordination.lease_store import LeaseStore, ObjectLeaseStore
from blobflow.errors import UsageError, expanded
from blobflow.fields import KnownFields, check_names
from blobflow.stores import Store, open_store

STORE_DIR: Final = "blobflow/store"
SCRATCH_DIR: Final = "blobflow/scratch"


class Configured(KnownFields):
    """Base of classes that Dagster configures: refuses unknown fields, also for the Launchpad.

    Dagster itself drops unknown fields.
    """

    @classmethod
    def configure_at_launch(cls, **given: Any) -> Any:
        """The same as Dagster's: a resource whose other fields the Launchpad gives.

        Raises:
            UsageError: a field is unknown; the message names it.
        """
        check_names(cls.__name__, cls.model_fields, given)
        # The method belongs to Dagster's class, the next base of each subclass.
        return super().configure_at_launch(**given)  # pyright: ignore[reportAttributeAccessIssue]


class ProfileConfig(dg.Config, ChunkProfile):
    """A custom transfer profile, with the fields of `ChunkProfile`."""


class TransferResource(Configured, dg.ConfigurableResource):
    """Base of the resources: a transfer profile, a scratch directory, and stores that are closed with the resource."""

    profile: Literal["datacenter", "tactical", "edge"] = Field(
        default="tactical",
        description="datacenter: 32 MiB chunks, for fast networks. tactical: 8 MiB, for most networks. edge: 1 MiB and"
        " long timeouts, for unreliable links.",
    )
    custom_profile: ProfileConfig | None = Field(
        default=None,
        description="Custom settings instead of `profile`: chunk size (bytes), checkpoint interval (chunks) and more.",
    )
    scratch_dir: str | None = Field(
        default=None,
        description="Absolute path for files that are needed between two steps of a run; by default in the Dagster"
        " instance's storage. All steps of an asset must see the same directory.",
    )

    _instance_storage: Path | None = PrivateAttr(default=None)
    _opened: list[Store | LeaseStore] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _one_profile(self) -> Self:
        if self.custom_profile is not None and self.profile != "tactical":
            raise UsageError(
                f"{type(self).__name__} has the profile {self.profile!r} and a custom_profile", hint="give one of them"
            )
        return self

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Remember the directory of the Dagster instance's storage."""
        if context.instance is not None:
            self._instance_storage = Path(context.instance.storage_directory())

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:  # noqa: ARG002  # Dagster's signature
        """Close the connections that were opened."""
        while self._opened:
            self._opened.pop().close()

    def get_profile(self) -> ChunkProfile:
        """The transfer profile."""
        if self.custom_profile is not None:
            return ChunkProfile(**self.custom_profile.model_dump())
        return ChunkProfile.named(self.profile)

    def scratch_path(self, *names: str) -> Path:
        """A path for local files that are needed until the end of a run; it may not exist yet."""
        root = Path(self.scratch_dir) if self.scratch_dir else self._instance_path(SCRATCH_DIR)
        return expanded(root).absolute().joinpath(*names)

    def _instance_path(self, name: str) -> Path:
        if self._instance_storage is None:
            home = os.environ.get("DAGSTER_HOME")
            if not home:
                raise UsageError(
                    "outside of a run, the storage of the Dagster instance is unknown",
                    hint="give `store` and `scratch_dir`, or set DAGSTER_HOME",
                )
            return Path(home, "storage", name)
        return self._instance_storage / name


class BlobflowResource(TransferResource):
    """A store and a transfer profile.

    Give secrets as `dg.EnvVar(...)`: Dagster then shows the name of the variable and never its value. Without keys,
    they are taken from the usual places: the environment, shared configuration files, or the machine's role.
    """

    store: str | None = Field(
        default=None,
        description="URL of the store (s3://bucket/prefix, an fsspec URL) or an absolute path; by default a directory"
        " in the Dagster instance's storage. It must not contain credentials.",
    )
    endpoint_url: str | None = Field(default=None, description="URL of an S3 server other than AWS.")
    region: str | None = Field(default=None, description="Region of the bucket.")
    access_key_id: str | None = Field(
        default=None, description="Access key id of S3; give it together with secret_access_key, or neither."
    )
    secret_access_key: str | None = Field(default=None, description="Secret access key of S3, as dg.EnvVar(...).")
    session_token: str | None = Field(
        default=None, description="Session token of temporary credentials, as dg.EnvVar(...)."
    )
    s3: dg.ResourceDependency[Any] = None  # pyright: ignore[reportAssignmentType]
    """A dagster-aws `S3Resource` that gives endpoint, region and keys. Its type is `Any`: its import costs seconds."""
    leases: str | None = Field(
        default=None,
        description="SQLAlchemy URL of a database that keeps the leases of rounds; give it as dg.EnvVar(...) if it"
        " contains a password. By default the store keeps them, which needs conditional writes.",
    )

    def __repr__(self) -> str:
        return f"BlobflowResource(store={self.store!r}, profile={'custom' if self.custom_profile else self.profile!r})"

    __str__ = __repr__

    def get_store(self, *, patience_s: float = DEFAULT_PATIENCE_S) -> Store:
        """The store, without any request yet. It is closed with the resource, at the end of the step or run.

        Args:
            patience_s: Seconds for which a call is repeated after temporary errors.

        Raises:
            UsageError: a setting is wrong; the message names it.
        """
        url = self.store or self._instance_path(STORE_DIR)
        store = open_store(url, patience_s=patience_s, **self._s3_options())
        self._opened.append(store)
        return store

    def get_leases(self, store: Store) -> LeaseStore | None:
        """The lease store of rounds published in `store`; None if there is none. It is closed with the resource.

        Raises:
            StoreConfigurationError: `leases` is not the URL of a database, or its driver is not installed.
        """
        if self.leases is None:
            return ObjectLeaseStore(store) if store.capabilities().conditional else None
        # SQLAlchemy takes a quarter of a second to import.
        from blobflow.coordination.sql_lease_store import SqlLeaseStore

        leases = SqlLeaseStore(self.leases)
        self._opened.append(leases)
        return leases

    def _s3_options(self) -> Mapping[str, Any]:
        own = {
            "endpoint_url": self.endpoint_url,
            "region": self.region,
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
            "session_token": self.session_token,
        }
        if self.s3 is None:
            return own
        if self.s3.profile_name:
            raise UsageError(
                "S3Resource.profile_name is not supported", hint="give keys, or set AWS_PROFILE in the environment"
            )
        if not self.s3.use_ssl and not (self.endpoint_url or self.s3.endpoint_url):
            raise UsageError("S3Resource.use_ssl=False is not supported", hint="give an endpoint_url with http://")
        if self.access_key_id or self.secret_access_key or self.session_token:
            raise UsageError("keys are given twice", hint="give them here or in the S3Resource, not in both")
        return {
            "endpoint_url": self.endpoint_url or self.s3.endpoint_url,
            "region": self.region or self.s3.region_name,
            "access_key_id": self.s3.aws_access_key_id,
            "secret_access_key": self.s3.aws_secret_access_key,
            "session_token": self.s3.aws_session_token,
            "anonymous": self.s3.use_unsigned_session or None,
            "verify": self.s3.verify,
        }
