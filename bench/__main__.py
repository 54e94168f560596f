"""Command line of the benches.

python -m bench                   every row, then the plots; writes docs/benchmarks.md
python -m bench --row 3 --row 8   these rows only; the others keep their figures
python -m bench --quick           small sizes, to see that everything works; writes nothing
"""

import argparse
import importlib
import sys
import time
from typing import cast

from bench import report
from bench.harness import ROUNDS, Figure, Plan, Row

ROWS = tuple(range(1, 13))
QUICK_ROUNDS = 2


def main() -> int:
    arguments = _arguments()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    plan = Plan(quick=arguments.quick, rounds=rounds)
    failed = []
    for number in arguments.row or ROWS:
        print(f"row {number}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        try:
            figures = _measure(number, plan)
        except Exception as error:  # noqa: BLE001 - the other rows are still worth having
            print(f"row {number} failed: {type(error).__name__}: {error}", file=sys.stderr)
            failed.append(number)
            continue
        for figure in figures:
            print(report.line(figure))
        print(f"    took {time.perf_counter() - began:.0f} s", file=sys.stderr)
        if not plan.quick or arguments.write:
            report.record(number, figures, plan)
    if arguments.plots or not (arguments.row or plan.quick):
        importlib.import_module("bench.growth").plot_all(plan)
    return 1 if failed else 0


def _measure(number: int, plan: Plan) -> list[Figure]:
    module = importlib.import_module(f"bench.rows.row{number:02}")
    return cast(Row, module.measure)(plan)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Speed beside peers.")
    parser.add_argument("--row", type=int, action="append", choices=ROWS, help="only this row")
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--rounds", type=int, help=f"rounds of each row ({ROUNDS})")
    parser.add_argument("--plots", action="store_true", help="draw the growth plots too")
    parser.add_argument("--write", action="store_true", help="write quick figures as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
