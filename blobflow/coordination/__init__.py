"""Who may publish, and what is current: leases, refs and export rounds."""
