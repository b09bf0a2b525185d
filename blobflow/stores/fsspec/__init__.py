"""The fsspec store: any file system that fsspec knows."""
