"""blobflow and its peers on one server in one run: `python -m benchmarks`. docs/benchmarks.md tells what is measured."""
