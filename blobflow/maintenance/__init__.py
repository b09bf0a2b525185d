"""Maintenance of stored artifacts: garbage collection and retention."""
