"""Hashes that the control plane and the worker both check."""
