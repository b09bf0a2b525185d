"""Artifacts: manifest, index, the virtual tar, and safe landing. The format is in docs/format.md."""
