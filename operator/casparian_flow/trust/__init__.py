"""Who may publish what: hashes, bundles, signatures, keys, the policy and the Gatekeeper.

The control plane and the worker both check with this (docs/trust.md).
"""
