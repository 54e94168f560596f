"""The nouns and rules of the system, without I/O: standard library only."""
