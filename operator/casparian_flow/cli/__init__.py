"""The `casparian` command: a client of the control plane, and the starter of its services."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    from casparian_flow.cli.app import run

    return run(argv)
