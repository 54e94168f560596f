"""Entry points of the worker."""
