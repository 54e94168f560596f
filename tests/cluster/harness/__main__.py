"""Command line of the harness; run it from the project's folder as `make cluster-up` does.

python -m cluster.harness tools [NAME ...]   build programs (all of them), print their paths
python -m cluster.harness up [NAME]          make a cluster
python -m cluster.harness down [NAME]        remove it
python -m cluster.harness load TAG ...       put images of the docker daemon onto its nodes
python -m cluster.harness environment        what docker and kubectl need, for `eval`
"""

import argparse
import shlex
import sys

from cluster.harness import daemon, kind
from cluster.harness.errors import HarnessError
from cluster.harness.tools import RECIPES, tool


def main() -> int:
    arguments = _arguments()
    try:
        _carry_out(arguments)
    except HarnessError as error:
        print(f"error: {error.message}\n{error.hint}", file=sys.stderr)
        return 1
    return 0


def _carry_out(arguments: argparse.Namespace) -> None:
    if arguments.command == "tools":
        for name in arguments.names or RECIPES:
            print(tool(name))
    elif arguments.command == "up":
        cluster = kind.up(arguments.name)
        print(f"export KUBECONFIG={shlex.quote(str(cluster.kubeconfig))}")
    elif arguments.command == "down":
        kind.down(arguments.name)
    elif arguments.command == "load":
        _found(arguments.name).load_image(*arguments.tags)
    else:
        kubeconfig = _found(arguments.name).kubeconfig
        for name in ("kind", "kubectl", "helm"):
            daemon.add_command(name, tool(name))
        exports = daemon.environment() | {"KUBECONFIG": str(kubeconfig)}
        for name, value in exports.items():
            print(f"export {name}={shlex.quote(value)}")


def _found(name: str) -> kind.Cluster:
    cluster = kind.find(name)
    if cluster is None:
        raise HarnessError(f"there is no cluster {name}", "make cluster-up")
    return cluster


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster.harness")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tools").add_argument("names", nargs="*", choices=(*RECIPES, []))
    for command in ("up", "down", "environment"):
        commands.add_parser(command).add_argument("name", nargs="?", default=kind.DEFAULT_NAME)
    load = commands.add_parser("load")
    load.add_argument("tags", nargs="+")
    load.add_argument("--name", default=kind.DEFAULT_NAME)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
