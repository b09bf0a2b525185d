"""What every command shares: its options, its store, and how it reports an outcome."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Collection, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click
from click.core import ParameterSource

from blobflow.activity import Wait, reporting_waits
from blobflow.cli import core
from blobflow.cli.formatting import printable
from blobflow.cli.streams import OutputLost, show
from blobflow.errors import BlobflowError, TemporaryError

if TYPE_CHECKING:
    from blobflow.config import ChunkProfile
    from blobflow.stores.base import Store

PATH: Final = click.Path(path_type=Path)
BACKENDS: Final = click.Choice(["append-log", "directory", "parquet", "sqlite"])
"""`blobflow.backends.BACKENDS`, without the import."""
DIRECTORY: Final = click.Path(exists=True, file_okay=False, path_type=Path)
FILE: Final = click.Path(exists=True, dir_okay=False)


_SHOWN: Final = frozenset({"listed", "found", "probed", "empty", "bootstrapping", "following"})
"""Statuses of documents that are the only result of their command."""


@dataclass
class Settings:
    """The options that every command takes, and how it speaks."""

    store: str | None = None
    endpoint_url: str | None = None
    region: str | None = None
    content_md5: bool = False
    profile: str = "tactical"
    chunk_size: int | None = None
    workers: int | None = None
    bwlimit: int | None = None
    """Bytes per second."""
    json: bool = False
    verbose: int = 0
    resumes: bool = False
    """Whether the command continues where it stopped when it is run again."""

    def transfer_profile(self) -> ChunkProfile:
        """The named profile, with the options that change it."""
        given = {"chunk_size": self.chunk_size, "workers": self.workers}
        changes = {name: value for name, value in given.items() if value is not None}
        return core.ChunkProfile.named(self.profile).model_copy(update=changes)

    def for_one_of_two(self, store: str, endpoint_url: str | None = None, region: str | None = None) -> Settings:
        """These settings for a store that is used beside another; options for S3 apply only to stores on S3."""
        if not _is_s3(store):
            return replace(self, store=store, endpoint_url=endpoint_url, region=region, content_md5=False)
        return replace(self, store=store, endpoint_url=endpoint_url or self.endpoint_url, region=region or self.region)

    @contextmanager
    def open_store(self) -> Generator[Store]:
        """The store that was named; `UsageError` if there is none, or for an option it does not take."""
        if not self.store:
            raise click.UsageError("no store is named: use --store URL, or set BLOBFLOW_STORE")

        options: dict[str, Any] = {
            "endpoint_url": self.endpoint_url,
            "region": self.region,
            "content_md5": self.content_md5 or None,
        }
        if _is_s3(self.store):
            # The environment means every S3 client on the machine; to other stores these options are unknown.
            from_environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            options["endpoint_url"] = self.endpoint_url or from_environment or None
        if not re.match("(?i)(?:file|memory):|(?![a-z0-9+.-]+://)", self.store):
            profile = self.transfer_profile()
            options["idle_timeout"] = max(profile.read_timeout, profile.write_timeout)
        store = core.open_store(self.store, bandwidth_bytes_per_s=self.bwlimit, **options)
        try:
            yield store
        finally:
            store.close()

    def report(self, document: dict[str, Any], *lines: str) -> None:
        """The result: the document under `--json`, otherwise the lines.

        Raises:
            OutputLost: standard output cannot be written, and the command does nothing else. One that did its work
                has done it, whatever happens to the report.
        """
        try:
            if self.json:
                show(json.dumps(document))
            else:
                for line in lines:
                    show(printable(line))
        except OutputLost as lost:
            if document["status"] in _SHOWN:
                raise
            self.complain(f"done ({document['status']}), but standard output cannot be written: {lost}")

    def fail(self, document: dict[str, Any], error: Exception | None = None) -> None:
        """The error: as a document on standard output under `--json`, otherwise in words on standard error."""
        if error is not None and self.verbose:
            traceback.print_exception(error)
        if self.json:
            with suppress(OutputLost):
                show(json.dumps({"error": document}))
            return
        unexpected = error is not None and not isinstance(error, BlobflowError)
        message = f"{document['type']}: {document['message']}" if unexpected else document["message"]
        click.echo(f"Error: {printable(message)}", err=True)
        if document["hint"]:
            click.echo(f"Hint: {printable(document['hint'])}", err=True)

    @staticmethod
    def complain(message: str) -> None:
        """A line on standard error."""
        with suppress(OSError):
            click.echo(f"Error: {printable(message)}", err=True)

    def stopped(self, number: signal.Signals) -> int:
        """The exit code for the signal that ended the command, which is also reported."""
        hint = TemporaryError.hint if self.resumes else ""
        self.fail({"type": "Interrupted", "message": f"stopped by {number.name}", "hint": hint})
        return 128 + number


def _is_s3(store: str) -> bool:
    return store.lower().startswith("s3://")


class _LogLines(logging.Handler):
    """Log lines on whatever standard error is at the moment: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _show_log(verbose: int) -> None:
    # Only this package's log: the logs of client libraries may contain what they sign.
    handler = _LogLines()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    package = logging.getLogger("blobflow")
    package.handlers = [handler]
    package.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])


class _Size(click.ParamType[int]):
    """Bytes, as a number or with a binary unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+)(?:([KMG])(?:iB)?)?", str(value))
        size = int(found[1]) << 10 * " KMG".index(found[2] or " ") if found else 0
        if not size:
            self.fail(f"{value!r} is not a size: use bytes, or for example 64KiB, 8MiB, 1GiB", param, ctx)
        return size


SIZE: Final = _Size()


class DurationType(click.ParamType[float]):
    """Seconds, as a number or with a unit."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+)([smhd]?)", str(value))
        if not found:
            self.fail(f"{value!r} is not a duration: use for example 90s, 30m, 24h, 7d", param, ctx)
        return float(int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]])


class DigestType(click.ParamType[str]):
    """An artifact digest."""

    name = "digest"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", str(value)):
            self.fail(f"{value!r} is not an artifact digest: 'sha256:' and 64 hexadecimal digits", param, ctx)
        return value


class SampleType(click.ParamType[tuple[int, int]]):
    """One slice of several, N/T."""

    name = "sample"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        slices = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", str(value))
        number, count = map(int, slices.groups()) if slices else (0, 0)
        if not 1 <= number <= count:
            self.fail(f"{value!r} is not a sample: N/T is the Nth of T slices, for example 1/7", param, ctx)
        return number, count


AGE_HELP: Final = "Keep what is younger than this: 90s, 30m, 24h, 7d."
exclude_option: Final = click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave out what matches, as in a .gitignore file: '*.tmp', 'cache/', '/logs/*'; may be repeated.",
)
digest_option: Final = click.option(
    "--digest", type=DigestType(), metavar="DIGEST", help="Refuse every artifact but this one (sha256:...)."
)
dry_run_option: Final = click.option("--dry-run", is_flag=True, help="Show what would be removed, remove nothing.")


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Put a shared option where every command finds it; given after the command it wins over one before."""
    name = parameter.name or ""
    source = context.get_parameter_source(name)
    from_environment = source is ParameterSource.ENVIRONMENT and context.parent is None
    if source is ParameterSource.COMMANDLINE or from_environment:
        setattr(context.ensure_object(Settings), name, value)


_TRANSFER_OPTIONS: Final = ("profile", "chunk_size", "workers", "bwlimit")
_STORE_OPTIONS: Final = ("store", "endpoint_url", "region", "content_md5")


def shared_options(unused: Collection[str] = ()) -> list[click.Parameter]:
    """Fresh copies of the options that every command accepts.

    Args:
        unused: Options that the help of the command does not show.
    """

    def option(*names: str, **attributes: Any) -> click.Option:
        made = click.Option(names, expose_value=False, callback=_keep, **attributes)
        made.hidden = made.name in unused
        return made

    return [
        option(
            "--store",
            metavar="URL",
            envvar="BLOBFLOW_STORE",
            show_envvar=True,
            help="s3://bucket/prefix, a path, or an fsspec URL.",
        ),
        option("--endpoint-url", metavar="URL", help="S3 server, unless it is AWS.  [env var: AWS_ENDPOINT_URL]"),
        option("--region", metavar="NAME", help="S3 region."),
        option(
            "--content-md5",
            is_flag=True,
            help="Send Content-MD5, for servers that ignore CRC32C (see `probe`).",
        ),
        option(
            "--profile",
            type=click.Choice(["datacenter", "tactical", "edge"]),
            help="Preset of chunk size, checkpoints and timeouts.  [default: tactical]",
        ),
        option("--chunk-size", type=SIZE, metavar="SIZE", help="Instead of the profile's, for example 64MiB."),
        option("--workers", type=click.IntRange(1, 256), metavar="N", help="Chunks in flight."),
        option("--bwlimit", type=SIZE, metavar="RATE", help="Limit of payload bytes per second, for example 10MiB."),
        option("--json", is_flag=True, help="Print one JSON document on standard output."),
        option("-v", "--verbose", count=True, help="Log to standard error with tracebacks; -vv for more."),
    ]


class Command(click.Command):
    """A command that accepts the shared options as well; its help shows those that it uses.

    Args:
        uses: `transfer`: the store and how its payloads are moved; `store`: the store alone; `nothing`: neither.
    """

    def __init__(
        self, *args: Any, uses: Literal["transfer", "store", "nothing"] = "transfer", **attributes: Any
    ) -> None:
        super().__init__(*args, **attributes)
        unused = () if uses == "transfer" else _TRANSFER_OPTIONS
        self.params += shared_options((*_STORE_OPTIONS, *unused) if uses == "nothing" else unused)

    def invoke(self, ctx: click.Context) -> Any:
        _show_log(ctx.ensure_object(Settings).verbose)
        with reporting_waits(show_wait):
            return super().invoke(ctx)


def show_wait(wait: Wait) -> None:
    """A line on standard error, also under `--json`."""
    click.echo(printable(f"Waiting: {wait}"), err=True)


class CommandGroup(click.Group):
    """A group whose commands take the shared options."""

    command_class = Command
    group_class = type
