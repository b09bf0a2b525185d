"""Mirrors, which follow what a store publishes; and pushes to the receiver of another cluster.

A mirror is a directory that shows one whole artifact at any time:

| module | knows |
|---|---|
| `update` | how a mirror comes to show an artifact: download, import, record |
| `status` | what a mirror shows, and whether it is behind |

A push sends a snapshot to a receiver, where it arrives whole, whatever breaks on the way:

| module | knows |
|---|---|
| `envelope` | the frames on the wire |
| `machine` | the rules of receiving, without I/O |
| `receiver` | the files and locks of a receiver |
| `received` | a receiver's directory as a store that is read |
| `sending` | the snapshot that is pushed, and where its chunks come from |
| `server`, `door`, `client` | HTTP, and whom the server lets in; it needs the extra `blobflow[mirror]` |
"""

from __future__ import annotations

from blobflow import lazy

__getattr__ = lazy.attach(__name__)
