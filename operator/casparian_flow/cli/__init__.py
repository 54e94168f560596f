"""The `casparian` command: a client of the control plane, and the starter of its services."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command in a process that is its own; returns its exit code."""
    # DuckDB imports pandas, where it is installed, to recognise pandas' nulls among parameters.
    # No command passes any, and the import would double the time that a short one takes.
    sys.modules.setdefault("pandas", None)  # type: ignore[arg-type]
    from casparian_flow.cli.app import run

    return run(argv)
