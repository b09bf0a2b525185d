"""Three regions, each with its own snapshots, its own ref and its own mirror."""
