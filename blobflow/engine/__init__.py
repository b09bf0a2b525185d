"""The engine: moves numbered byte ranges; it knows nothing of artifacts."""
