"""blobflow and its peers on one server in one run: `python -m benchmarks`. See docs/benchmarks.md."""
