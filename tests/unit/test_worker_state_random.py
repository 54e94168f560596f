"""The worker's state machine under long random histories, its invariants checked at each step.

The Sentinel is hostile here: it sends any message at any time, for tokens of this and other
jobs. The runner is honest: each StartJob is answered by exactly one end, each publish by one
outcome, at any later time.
"""

import random

import pytest

from casparian_flow.domain.clock import Now
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import fencing_token
from casparian_flow.domain.outputs import OutputEntry, OutputKind, SinkMode
from casparian_flow.domain.records import Limits
from casparian_flow.protocol import messages as m
from casparian_worker import worker_events as e
from casparian_worker.worker_state import WorkerState

LEDGER = "7f3ac91e"
STEPS = 3000


def make_entry(rng: random.Random) -> OutputEntry:
    return OutputEntry(
        0, "t", OutputKind.OUTPUT, "parquet://t", SinkMode.APPEND, "root-1", "k", "s", (1, 1, 0),
        "stage", "final", rng.randrange(100), 10, "ab",
    )  # fmt: skip


class World:
    """Draws events; keeps what the runner owes and what was granted."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        slots = self.rng.randint(1, 3)
        self.config = e.WorkerConfig(
            "w",
            "n",
            "root-1",
            slots=slots,
            credit=slots + self.rng.randint(0, 12),
            lookahead=self.rng.randint(1, 4),
        )
        self.state = WorkerState(self.config)
        self.mono = 0.0
        self.owed: list[str] = []
        self.stopping: set[str] = set()
        self.publishing: list[str] = []
        self.granted: set[str] = set()
        self.abandoned: set[str] = set()
        self.trace: list[object] = []

    def token(self) -> tuple[int, int, str]:
        job_id, attempt = self.rng.randint(1, 12), self.rng.randint(1, 6)
        return job_id, attempt, fencing_token(LEDGER, self.rng.randint(1, 2), job_id, attempt)

    def message(self) -> e.FromSentinel:
        job_id, attempt, token = self.token()
        spec = self.rng.choice(["a", "b", "c"])
        held = list(self.state.attempts)
        if held and self.rng.random() < 0.6:
            token = self.rng.choice(held)
            job_id = self.state.attempts[token].job_id
        messages: list[m.Message] = [
            m.Dispatch(token, attempt, spec, "p", "/x", 1, 1, "h", (1, 1, 1, 1, 1), (1, 1, 0)),
            m.Grant(token),
            m.Refuse(token, self.rng.choice([Reason.STALE_TOKEN, Reason.ABANDONED])),
            m.Abort(token, self.rng.choice(["stale", Reason.ABANDONED, ""])),
            m.ConcludeAck([token]),
            m.Recover(token, (make_entry(self.rng),)),
            m.Welcome(LEDGER, self.rng.randint(1, 2), 5.0, 30.0, True),
            m.Plugin(
                spec, "p", "1", "h", "x" * self.rng.randrange(99), "", "", (), "", "", Limits()
            ),
            m.Heartbeat("ALIVE"),
            m.Err("?", self.rng.choice(["unknown_worker", "malformed"])),
            m.Discard([token, "../x"]),
            m.Reload(),
            m.Identify("x", "y"),
        ]
        weights = [12, 8, 2, 2, 6, 2, 3, 6, 2, 1, 1, 1, 1]
        return e.FromSentinel(job_id, self.rng.choices(messages, weights)[0])

    def runner_news(self) -> e.Event:
        kind = self.rng.random()
        if self.publishing and kind < 0.4:
            token = self.publishing.pop(self.rng.randrange(len(self.publishing)))
            outcomes: list[e.Event] = [
                e.Published(token),
                e.PublishFailed(token, "away", transient=True),
                e.PublishFailed(token, "no", transient=False),
            ]
            return self.rng.choice(outcomes)
        if not self.owed:
            return e.Tick()
        token = self.rng.choice(self.owed)
        if kind < 0.6:
            return e.Began(token)
        self.owed.remove(token)
        if token in self.stopping and self.rng.random() < 0.7:
            return e.Stopped(token)
        if self.rng.random() < 0.3:
            return e.Ended(token, m.Conclude(token, self.rng.choice(["SUCCESS", "FAILED"])))
        return e.Staged(token, (make_entry(self.rng),), m.Conclude(token, "SUCCESS"))

    def event(self) -> e.Event:
        kind = self.rng.random()
        if kind < 0.5:
            return self.message()
        if kind < 0.85:
            return self.runner_news()
        self.mono += self.rng.choice([0.1, 1.0, 10.0])
        return e.Tick()

    def carry_out(self, event: e.Event, instructions: list[e.Instruction]) -> None:
        heard = event.message if isinstance(event, e.FromSentinel) else None
        if getattr(heard, "reason", "") == Reason.ABANDONED:
            self.abandoned.add(heard.token)  # type: ignore[union-attr]  # only those have reasons
        for instruction in instructions:
            match instruction:
                case e.StartJob(token=token):
                    assert token not in self.owed, "a token is started while it still runs"
                    self.owed.append(token)
                case e.StopJob(token=token):
                    assert token in self.owed, "only what runs is stopped"
                    self.stopping.add(token)
                case e.PublishOutputs(token=token):
                    assert token not in self.publishing, "one publish at a time"
                    self.publishing.append(token)
                    if not isinstance(event, e.Tick):
                        assert isinstance(heard, m.Grant | m.Recover)
                        assert heard.token == token
                        self.granted.add(token)
                    assert token in self.granted, "nothing is published without a grant"
                case e.DeleteStages(token=token):
                    told = isinstance(heard, m.Discard) or token in self.abandoned
                    assert told or token not in self.granted, "granted stages are not deleted"

    def run(self, steps: int) -> None:
        for _ in range(steps):
            event = self.event()
            instructions = self.state.handle(event, Now(self.mono, 0))
            self.trace.append((event, instructions))
            self.state.invariants()
            # A publish whose attempt was dropped meanwhile is still carried out by the runner.
            self.carry_out(event, instructions)


@pytest.mark.parametrize("seed", range(12))
def test_no_history_breaks_the_invariants(seed: int) -> None:
    print(f"seed {seed}")
    World(seed).run(STEPS)


def test_equal_events_give_equal_instructions_in_equal_order() -> None:
    first, second = World(4711), World(4711)
    first.run(STEPS)
    second.run(STEPS)
    assert first.trace == second.trace


def test_memory_stays_bounded_under_a_flood_of_dispatches() -> None:
    config = e.WorkerConfig("w", "n", credit=4)
    state = WorkerState(config)
    now = Now(0.0, 0)
    state.handle(e.Tick(), now)
    state.handle(e.FromSentinel(0, m.Welcome(LEDGER, 1, 5.0, 30.0, True)), now)
    for job_id in range(1, 20_000):
        token = fencing_token(LEDGER, 1, job_id, 1)
        flood = m.Dispatch(token, 1, "a", "p", "/x", 1, 1, "h", (1, 1, 1, 1, 1), (1, 1, 0))
        state.handle(e.FromSentinel(job_id, flood), now)
        state.handle(e.FromSentinel(job_id, m.Recover(token + "0", ())), now)
    state.invariants()
    assert len(state.attempts) <= config.held_max


def test_everything_converges_once_the_sentinel_answers() -> None:
    world = World(99)
    world.run(STEPS)
    state = world.state
    for _ in range(2000):
        world.mono += 0.2
        events: list[e.Event] = [e.Tick()]
        while world.owed or world.publishing:
            if world.publishing:
                events.append(e.Published(world.publishing.pop()))
            else:
                events.append(world.runner_news())
        answers: list[e.Event] = []
        for event in events:
            instructions = state.handle(event, Now(world.mono, 0))
            world.trace.append((event, instructions))
            world.carry_out(event, instructions)
            for i in instructions:
                if isinstance(i, e.Send):
                    answers += answer(i)
        for event in answers:
            world.carry_out(event, state.handle(event, Now(world.mono, 0)))
        state.invariants()
        if not state.attempts:
            return
    pytest.fail(f"still held: {state.attempts}")


def answer(sent: e.Send) -> list[e.Event]:
    """What a well-behaved Sentinel says."""
    match sent.message:
        case m.Identify():
            return [e.FromSentinel(0, m.Welcome(LEDGER, 2, 5.0, 30.0, True))]
        case m.Stage(token=token):
            return [e.FromSentinel(sent.job_id, m.Grant(token))]
        case m.Conclude(token=token):
            return [e.FromSentinel(sent.job_id, m.ConcludeAck([token]))]
        case m.Heartbeat():
            return [e.FromSentinel(0, m.Heartbeat("ALIVE"))]
    return []
