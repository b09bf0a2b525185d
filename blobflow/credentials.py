"""Credentials: cleaned before use, rejected by name, never shown.

The commonest fault of a secret is a newline at the end of the file it was read from. HTTP headers cannot carry a
newline, and a client library that reports it repeats the whole value.
"""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import urlsplit

from blobflow.errors import StoreConfigurationError, UsageError

_Text = TypeVar("_Text", str, "str | None")


def cleaned(value: _Text, name: str) -> _Text:
    """A key, secret or token without surrounding white space; None stays None.

    Args:
        name: The name for messages; the value is in no message.

    Raises:
        StoreConfigurationError: it has a character that no key, secret or token has.
    """
    if value is None:
        return value
    stripped = value.strip()
    if not (stripped.isascii() and stripped.isprintable()):
        raise StoreConfigurationError(
            f"the {name} holds a control character or one outside of ASCII",
            hint=f"look for a line break or a wrong encoding in what gives the {name}; its value is not shown here",
            credential=name,
        )
    return stripped


def header_value(name: str, value: str) -> str:
    """The value of a request header without surrounding white space.

    Raises:
        UsageError: it cannot be sent. The value is not shown, because it may be a secret.
    """
    stripped = value.strip()
    try:
        stripped.encode("latin-1")
    except UnicodeEncodeError:
        is_sendable = False
    else:
        is_sendable = not any(character in stripped for character in "\r\n\0")
    if not is_sendable:
        # Not `from`: the encoding error shows the value that it could not encode.
        raise UsageError(
            f"the header {name} cannot be sent: it holds a line break or a character outside of Latin-1",
            hint="look for a line break or a wrong encoding in what gives it; its value is not shown here",
            header=name,
        ) from None
    return stripped


def endpoint_fault(url: str) -> str | None:
    """Why `url` cannot be the address of a server, without repeating it; None if it can be one."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "it is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "it is not http://host:port or https://host:port"
    if parts.username is not None or parts.password is not None:
        return "it contains credentials; give them as options or in the environment"
    if parts.query or parts.fragment or "?" in url or "#" in url:
        return "it has a query or a fragment"
    if any(character.isspace() or not character.isprintable() for character in url):
        return "it contains white space or a control character"
    return None
