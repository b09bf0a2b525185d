"""Everything in this directory is loaded: components as defs.yaml, the rest as Python."""
