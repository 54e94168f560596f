"""A real Kubernetes for the tests, also where no image registry can be reached.

errors      what went wrong, and what to install or do
progress    long steps, told as they go
cache       what is made once and kept outside the tree
tools       Kubernetes' and its neighbours' programs, built from Go modules

`python -m cluster.harness` (with `tests` on PYTHONPATH) is its command line.
"""
