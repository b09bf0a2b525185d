"""The local store: a directory in which every object is a plain file."""
