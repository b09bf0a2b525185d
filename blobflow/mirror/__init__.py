"""Mirrors, which follow what a store publishes; and pushes to the receiver of another cluster.

A mirror is a directory that shows one whole artifact at any time:

| module | knows |
|---|---|
| `update` | the steps that bring a mirror up to date: download, import, record |
| `status` | what a mirror shows, and whether it is behind |

A push sends a snapshot to a receiver, where it arrives whole, whatever fails on the way:

| module | knows |
|---|---|
| `envelope` | the frames on the wire |
| `machine` | the rules of receiving, without I/O |
| `receiver` | the files and locks of a receiver |
| `received` | a receiver's directory as a read-only store |
| `sending` | the pushed snapshot, and the source of its chunks |
| `server`, `door`, `client` | HTTP, and limits for strangers; the server needs the extra `blobflow[mirror]` |
"""

from __future__ import annotations

from blobflow import lazy

__getattr__ = lazy.attach(__name__)
