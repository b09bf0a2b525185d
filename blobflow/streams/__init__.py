"""Streams: any source of bytes to any target, with checkpoints; the plan and the pool of `engine` are not used here."""
