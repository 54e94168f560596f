"""Which worker tries a new plugin version when, and what becomes of the version."""

import random
from typing import Any

import pytest

from casparian_flow.domain.clock import Now
from casparian_flow.domain.ids import Identity, ManifestId
from casparian_flow.domain.records import PluginSpec, StagedVersion
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel.events import Send
from casparian_flow.sentinel.leases import Worker
from casparian_flow.sentinel.trials import Conclude, Staged, Told, Trials, TrialsConfig


def version(number: int, plugin: str = "sales") -> StagedVersion:
    spec = PluginSpec(
        f"spec-{number}", plugin, f"{number}.0", ManifestId(number), "a" * 64, "", "", "", ()
    )
    return StagedVersion(spec)


def worker(name: str = "w1", nonce: str = "n", takes: str = "*") -> Worker:
    identity = Identity(name.encode())
    return Worker(identity, name, nonce, frozenset({takes}), "r", 1, 8, 8.0, 0, 0.0)


class World:
    def __init__(self, *workers: Worker) -> None:
        self.trials = Trials("t")
        self.workers = {w.identity: w for w in workers}
        self.mono = 100.0

    def step(self, *events: Staged | Told, after: float = 0.0) -> list[Send | Conclude]:
        self.mono += after
        out = self.trials.step(events, self.workers, Now(self.mono, 0))
        self.trials.invariants()
        return out

    def told(self, send: Send | Conclude, outcome: str, **more: Any) -> list[Send | Conclude]:
        assert isinstance(send, Send)
        assert isinstance(send.message, m.Trial)
        return self.step(Told(send.identity, m.TrialResult(send.message.trial_id, outcome, **more)))

    @property
    def state(self) -> str:
        return str(self.trials.rows(Now(self.mono, 0))[0]["state"])


def tries(sends: list[Send | Conclude]) -> list[str]:
    messages = [send.message for send in sends if isinstance(send, Send)]
    return [message.trial_id for message in messages if isinstance(message, m.Trial)]


def test_a_staged_version_waits_for_a_worker_and_is_tried_by_the_first_that_takes_it() -> None:
    world = World(worker("other", takes="elsewhere"))
    assert world.step(Staged([version(1)])) == []
    assert world.state == "waits for a worker"

    world.workers[Identity(b"w1")] = worker()
    (send,) = world.step()

    assert isinstance(send, Send)
    assert send.identity == b"w1"
    assert world.state == "being tried on w1"


@pytest.mark.parametrize(("outcome", "passed"), [("passed", True), ("failed", False)])
def test_the_end_of_a_trial_is_concluded_until_the_ledger_knows(outcome: str, passed: bool) -> None:
    world = World(worker())
    (send,) = world.step(Staged([version(1)]))
    (verdict,) = world.told(send, outcome, reason="plugin_invalid", message="no Handler")

    assert isinstance(verdict, Conclude)
    assert verdict.passed is passed
    assert passed or verdict.message == "the plugin cannot be loaded: no Handler"
    assert world.step() == []
    assert world.step(after=6) == [verdict]
    assert world.step(Staged([]), after=6) == []
    assert not world.trials.pending


def test_an_unanswered_trial_is_repeated_and_progress_is_shown() -> None:
    world = World(worker())
    (send,) = world.step(Staged([version(1)]))
    assert world.step(after=1) == []
    assert world.step(after=5) == [send]
    assert world.told(send, "running", message="building an environment") == []
    assert world.trials.rows(Now(world.mono, 0))[0]["note"] == "building an environment"


def test_a_lost_worker_is_replaced_and_too_many_lost_ones_reject_the_version() -> None:
    world = World(worker("w0", nonce="n0"))
    world.trials.config = TrialsConfig(losses_max=3)
    (send,) = world.step(Staged([version(1)]))
    for number in (1, 2):
        world.workers = {w.identity: w for w in (worker(f"w{number}", nonce=f"n{number}"),)}
        (send,) = world.step(after=1)
        assert isinstance(send, Send)
        assert send.identity == f"w{number}".encode()
    # Its process was replaced under the same routing id.
    world.workers = {w.identity: w for w in (worker("w2", nonce="other"),)}
    (verdict,) = [*world.step(after=1), *world.step()]
    assert isinstance(verdict, Conclude)
    assert "tried 3 times in vain" in verdict.message


def test_a_worker_that_falls_silent_loses_its_trial() -> None:
    world = World(worker("w1"))
    world.step(Staged([version(1)]))
    sends = world.step(after=61)
    assert tries(sends) == ["t-1-2"]


def test_through_no_fault_of_the_version_it_is_tried_again_after_growing_pauses() -> None:
    world = World(worker())
    (send,) = world.step(Staged([version(1)]))
    for pause in (5, 10, 20):
        assert world.told(send, "again", reason="environment", message="dns error") == []
        assert world.state == f"tried again in {pause} s"
        assert world.step(after=pause - 1) == []
        (send,) = world.step(after=1)


def test_versions_of_one_plugin_are_tried_in_order_and_a_worker_tries_one_at_a_time() -> None:
    world = World(worker("w1", nonce="n1"), worker("w2", nonce="n2"))
    sends = world.step(Staged([version(2), version(1), version(3, "other"), version(4, "third")]))
    tried = tries(sends)
    assert tried == ["t-1-1", "t-3-1"]


def test_a_worker_that_connects_anew_keeps_its_trial_and_strangers_are_not_believed() -> None:
    world = World(worker("w1", nonce="n1"))
    (send,) = world.step(Staged([version(1)]))
    world.workers = {w.identity: w for w in (worker("w2", nonce="n1"), worker("x", nonce="n2"))}
    assert world.step() == []
    assert isinstance(send, Send)
    assert isinstance(send.message, m.Trial)
    passed = m.TrialResult(send.message.trial_id, "passed")
    assert world.step(Told(Identity(b"x"), passed), Told(Identity(b"nobody"), passed)) == []
    (verdict,) = world.step(Told(Identity(b"w2"), passed))
    assert isinstance(verdict, Conclude)


def test_what_comes_late_or_from_another_try_changes_nothing() -> None:
    world = World(worker())
    (first,) = world.step(Staged([version(1)]))
    (second,) = world.step(after=61)
    assert world.told(first, "failed", message="too late") == []
    assert world.step(Told(Identity(b"x"), m.TrialResult("", "passed"))) == []
    assert world.told(second, "nonsense") == []
    (verdict,) = world.told(second, "passed")
    assert world.told(second, "failed") == []
    assert isinstance(verdict, Conclude)
    assert verdict.passed


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_version_ends_once_workers_stay(seed: int) -> None:
    rng = random.Random(seed)
    world = World()
    staged = {n: version(n, rng.choice(("a", "b", "c"))) for n in range(1, 9)}
    under_way: list[Send] = []
    events: list[Staged | Told] = [Staged(list(staged.values()))]
    for turn in range(3_000):
        if turn < 300 and rng.random() < 0.3:
            name = f"w{rng.randrange(3)}"
            world.workers[Identity(name.encode())] = worker(
                name, nonce=f"{name}-{rng.randrange(3)}"
            )
        elif turn < 300 and world.workers and rng.random() < 0.2:
            del world.workers[rng.choice(list(world.workers))]
        elif turn == 300:
            world.workers[Identity(b"w9")] = worker("w9", nonce="n9")
        for out in world.step(*events, after=rng.random() * 4):
            if isinstance(out, Send):
                under_way.append(out)
            elif rng.random() < 0.5:
                staged.pop(out.manifest_id, None)
        events = [Staged(list(staged.values()))] if rng.random() < 0.3 else []
        if under_way and rng.random() < 0.7:
            send = under_way.pop(rng.randrange(len(under_way)))
            assert isinstance(send.message, m.Trial)
            outcome = rng.choice(("passed", "failed", "again", "running"))
            events.append(Told(send.identity, m.TrialResult(send.message.trial_id, outcome)))
        if not staged and not world.trials.pending:
            return
    pytest.fail(f"seed {seed}: {sorted(staged)} never ended")


def test_the_deadline_ends_a_trial_that_only_says_that_it_runs() -> None:
    world = World(worker())
    world.trials.config = TrialsConfig(deadline_s=30.0, losses_max=1)
    (send,) = world.step(Staged([version(1)]))
    out: list[Send | Conclude] = []
    for _ in range(8):
        world.told(send, "running")
        out += world.step(after=5)
    (verdict,) = [o for o in out if isinstance(o, Conclude)][:1]
    assert "did not end within 30 s" in verdict.message
