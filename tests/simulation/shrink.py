"""From a failing seed to the shortest history that still fails."""

from dataclasses import replace

from simulation.options import Options
from simulation.run import Parts, Run

Failure = BaseException | None


def outcome(options: Options, parts: Parts | None = None) -> tuple[Run, Failure]:
    """Run once; any exception is a failure, whether a judge's or an invariant's."""
    run = Run(options, parts)
    try:
        run.execute()
    except Exception as failure:  # noqa: BLE001 - a bug may show itself as any exception
        return run, failure
    return run, None


def shrink(options: Options, parts: Parts | None = None) -> Options:
    """Take out faults, jobs, workers and time as long as the run still fails."""
    best = options
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(best):
            if outcome(smaller, parts)[1] is not None:
                best, changed = smaller, True
                break
    return best


def _smaller(options: Options) -> list[Options]:
    candidates = [options.without(name) for name in options.active]
    for name, lowest in (("jobs", 1), ("workers", 1), ("slots", 1)):
        value = getattr(options, name)
        candidates += [replace(options, **{name: v}) for v in {lowest, value // 2} if v < value]
    candidates = [c for c in candidates if min(c.jobs, c.workers, c.slots) >= 1]
    if options.fault_seconds > 2:
        candidates.append(replace(options, fault_seconds=options.fault_seconds / 2))
    return candidates


def story(options: Options, parts: Parts | None = None, lines: int = 400) -> str:
    """What a person needs to understand a failure: options, error, the end of the history."""
    run, failure = outcome(options, parts)
    tail = "\n".join(line[:300] for line in run.world.trace[-lines:])
    return f"{failure!r}\noptions: {options}\n{tail}"


def report(seed_options: Options, parts: Parts | None = None) -> str:
    """The text for a failing seed: the seed, and the shortest history found that fails."""
    least = shrink(seed_options, parts)
    return f"seed {seed_options.seed} fails; shortest failing run:\n{story(least, parts)}"
