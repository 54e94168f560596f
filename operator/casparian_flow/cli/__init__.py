"""The `casparian` command: a client of the control plane, and the starter of its services."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command in a process that is its own; returns its exit code."""
    sys.meta_path.insert(0, _WithoutPandas)
    try:
        from casparian_flow.cli.app import run

        return run(argv)
    except KeyboardInterrupt:  # while modules are still being read
        sys.stderr.write("interrupted\n")
        return 130


class _WithoutPandas:
    """Lets pandas and numpy look as if they were not installed.

    DuckDB and pyarrow import them, where they can, only to recognise their objects among
    arguments. No command has any (plugins run in processes of their own), and the import would
    double the time of a short command and the memory of a service.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name in {"pandas", "numpy"}:
            raise ModuleNotFoundError(f"{name} is not used in this process", name=name)
        return None
