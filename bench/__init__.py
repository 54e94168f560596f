"""Speed beside peers: one module a row, run by `python -m bench` (see docs/benchmarks.md)."""
