"""Coordination of processes: leases, refs and export rounds."""
