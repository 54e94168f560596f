"""Seeds in, judgements out; see run.py for the scenario and the judges.

`CASPARIAN_SIM_SEEDS` sets how many seeds (`make soak SEEDS=50000`), `CASPARIAN_SIM_FIRST` where
they begin. A seed that failed once becomes a named scenario in test_broker.py or below.
"""

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest
from simulation.mutants import MUTANTS
from simulation.options import FAULTS, draw
from simulation.run import Run
from simulation.shrink import outcome, report

from casparian_flow.domain.jobs import JobStatus

SEEDS = int(os.environ.get("CASPARIAN_SIM_SEEDS", "1000"))
FIRST = int(os.environ.get("CASPARIAN_SIM_FIRST", "0"))
CHUNK = 25
MUTANT_SEEDS = 200
HISTORIES_ALIKE = 3


def _run_chunk(first: int) -> tuple[int | None, Counter[tuple[str, str]], float]:
    """(first failing seed or None, what was met, simulated seconds) of one chunk of seeds."""
    met: Counter[tuple[str, str]] = Counter()
    seconds = 0.0
    for seed in range(first, first + CHUNK):
        run, failure = outcome(draw(seed))
        if failure is not None:
            return seed, met, seconds
        met.update(run.world.met)
        seconds += run.world.time
    return None, met, seconds


@pytest.mark.timeout(86_400)
def test_every_promise_holds_under_every_mix_of_faults() -> None:
    met: Counter[tuple[str, str]] = Counter()
    seconds = 0.0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for failed, some, simulated in pool.map(_run_chunk, range(FIRST, FIRST + SEEDS, CHUNK)):
            if failed is not None:
                pool.shutdown(cancel_futures=True)
                pytest.fail(report(draw(failed)))
            met.update(some)
            seconds += simulated
    print(f"seeds {FIRST} to {FIRST + SEEDS - 1}: {seconds / 3600:.1f} simulated hours")
    statuses = [status for status in JobStatus if status is not JobStatus.PENDING]
    for fault in FAULTS:
        print(f"{fault:>14}", *(f"{status}={met[fault, status]}" for status in statuses))
    never = [(fault, status) for fault in FAULTS for status in statuses if not met[fault, status]]
    assert not never, f"never met: {never}"


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_the_judges_notice_a_deliberate_bug(name: str) -> None:
    caught = (
        seed for seed in range(MUTANT_SEEDS) if outcome(draw(seed), MUTANTS[name])[1] is not None
    )
    assert next(caught, None) is not None, f"{name} survived {MUTANT_SEEDS} seeds"


def test_a_seed_is_a_history() -> None:
    traces = {tuple(Run(draw(12)).execute().world.trace) for _ in range(HISTORIES_ALIKE)}
    assert len(traces) == 1


def test_a_failing_seed_is_reported_with_the_shortest_history_that_fails() -> None:
    text = report(draw(12), MUTANTS["CancelsGranted"])
    assert text.startswith("seed 12 fails; shortest failing run:\nViolationError(")
    assert "cancel=" in text
    assert "kill_sentinel=" not in text
