"""Each rule of the worker's state machine, told as events in and instructions out."""

import itertools
from typing import Any

import pytest

from casparian_flow.domain.clock import Now
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import fencing_token
from casparian_flow.domain.outputs import OutputEntry, OutputKind, SinkMode
from casparian_flow.domain.records import Limits
from casparian_flow.protocol import messages as m
from casparian_worker.worker_events import (
    Began,
    DeleteStages,
    DrainRequested,
    Ended,
    Event,
    Exit,
    ForgetPlugins,
    FromSentinel,
    Instruction,
    ListStages,
    Published,
    PublishFailed,
    PublishOutputs,
    Reconnect,
    Send,
    Staged,
    StageListing,
    StartJob,
    StopJob,
    Stopped,
    Tick,
    Unsent,
    WorkerConfig,
)
from casparian_worker.worker_state import Phase, WorkerState

LEDGER = "7f3ac91e"


class Rig:
    """A worker state with a hand-moved clock; every step checks the invariants."""

    def __init__(self, **config: Any) -> None:
        settings: dict[str, Any] = {"slots": 1, "credit": 8, "lookahead": 1, **config}
        self.state = WorkerState(WorkerConfig("w1", "nonce-1", "root-1", **settings))
        self.mono = 100.0

    def tell(self, event: Event) -> list[Instruction]:
        out = self.state.handle(event, Now(self.mono, 0))
        self.state.invariants()
        return out

    def hear(self, message: m.Message, job_id: int = 0) -> list[Instruction]:
        return self.tell(FromSentinel(job_id, message))

    def wait(self, seconds: float) -> list[Instruction]:
        self.mono += seconds
        return self.tell(Tick())

    def welcome(self, epoch: int = 1, ledger: str = LEDGER) -> list[Instruction]:
        return self.hear(m.Welcome(ledger, epoch, 5.0, 30.0, True))

    def dispatch(self, job_id: int, attempt: int = 1, spec: str = "spec-1") -> list[Instruction]:
        return self.hear(dispatch(job_id, attempt, spec), job_id)


def token_of(job_id: int, attempt: int = 1, epoch: int = 1) -> str:
    return fencing_token(LEDGER, epoch, job_id, attempt)


def dispatch(job_id: int, attempt: int = 1, spec: str = "spec-1", epoch: int = 1) -> m.Dispatch:
    return m.Dispatch(
        token_of(job_id, attempt, epoch), attempt, spec, "p", "/in/a.csv", 1, 1, "aa",
        (1, 2, 3, 4, 5), (1, 1, 0),
    )  # fmt: skip


def plugin(spec: str = "spec-1", source: str = "class Handler: ...") -> m.Plugin:
    return m.Plugin(spec, "p", "1.0.0", "hash", source, "", "", (), "{}", "", Limits())


def entry(n: int = 0, root: str = "root-1", kind: OutputKind = OutputKind.OUTPUT) -> OutputEntry:
    return OutputEntry(
        n, "t", kind, "parquet://t", SinkMode.APPEND, root, f"k{n}", "s", (1, 1, 0),
        f"t/.stage/x.{n}", f"t/x{n}.parquet", 10, 100, "ab",
    )  # fmt: skip


def success(token: str) -> m.Conclude:
    return m.Conclude(token, "SUCCESS", metrics={"rows": 10})


def ready(**config: Any) -> Rig:
    """A rig that is welcome and knows the plugin."""
    rig = Rig(**config)
    rig.tell(Tick())
    rig.welcome()
    rig.hear(plugin())
    return rig


def running(*job_ids: int, **config: Any) -> Rig:
    rig = ready(**config)
    for job_id in job_ids:
        rig.dispatch(job_id)
        rig.tell(Began(token_of(job_id)))
    return rig


def staged(job_id: int = 1, **config: Any) -> Rig:
    rig = running(job_id, **config)
    token = token_of(job_id)
    rig.tell(Staged(token, (entry(),), success(token)))
    return rig


def publishing(job_id: int = 1, **config: Any) -> Rig:
    rig = staged(job_id, **config)
    rig.hear(m.Grant(token_of(job_id)), job_id)
    return rig


def sent(instructions: list[Instruction], kind: type[Any]) -> list[Any]:
    return [i.message for i in instructions if isinstance(i, Send) and isinstance(i.message, kind)]


def rejected(job_id: int, reason: Reason, attempt: int = 1) -> Send:
    return Send(job_id, m.Conclude(token_of(job_id, attempt), "REJECTED", reason))


# -- contact


def test_the_first_thing_a_worker_says_is_identify() -> None:
    rig = Rig(slots=2, credit=8, hostname="h", pid=7, version="1", sandbox={"seccomp": "applied"})
    (first,) = rig.tell(Tick())
    assert first == Send(
        0,
        m.Identify(
            "w1", "nonce-1", ["*"], [], "root-1", 2, 8, "h", 7, "1", True, {"seccomp": "applied"}
        ),
    )


def test_identify_is_repeated_every_second_until_welcome() -> None:
    rig = Rig()
    rig.tell(Tick())
    assert rig.wait(0.5) == []
    assert len(sent(rig.wait(0.5), m.Identify)) == 1
    rig.welcome()
    assert sent(rig.wait(1.0), m.Identify) == []


def test_an_identify_that_could_not_be_sent_is_said_again_at_the_next_tick() -> None:
    rig = Rig()
    rig.tell(Tick())
    assert rig.tell(Unsent()) == []
    assert len(sent(rig.wait(0.1), m.Identify)) == 1
    rig.welcome()
    rig.tell(Unsent())
    assert sent(rig.wait(0.1), m.Identify) == []


def test_welcome_asks_for_the_stages_that_are_left_over_once_and_then_hourly() -> None:
    rig = Rig()
    rig.tell(Tick())
    assert rig.welcome() == [ListStages()]
    assert rig.welcome() == []
    kinds: list[type[Any]] = []
    for _ in range(3700):
        kinds += [type(i) for i in rig.wait(1.0)]
        rig.hear(m.Heartbeat("ALIVE"))
    assert kinds.count(ListStages) == 1


def test_heartbeats_list_what_is_held_at_the_interval_that_welcome_gave() -> None:
    rig = running(1)
    rig.dispatch(2)
    assert rig.wait(4.9) == [
        # Job 2 waits behind job 1 and is given back meanwhile.
        rejected(2, Reason.BUSY)
    ]
    beats = sent(rig.wait(0.2), m.Heartbeat)
    assert beats == [m.Heartbeat("BUSY", [token_of(1), token_of(2)])]
    assert sent(rig.wait(4.0), m.Heartbeat) == []


def test_an_idle_worker_goes_on_sending_heartbeats() -> None:
    rig = ready()
    beats = []
    for _ in range(1200):
        beats += sent(rig.wait(0.1), m.Heartbeat)
        rig.hear(m.Heartbeat("ALIVE"))
    assert len(beats) >= 20
    assert set(map(repr, beats)) == {repr(m.Heartbeat("IDLE", []))}


def test_an_unknown_worker_identifies_again_with_all_it_holds() -> None:
    rig = staged(1)
    out = rig.hear(m.Err("identify first", "unknown_worker"))
    (identify,) = sent(out, m.Identify)
    assert identify.held == [token_of(1)]
    assert rig.hear(m.Err("identify first", "unknown_worker")) == []
    assert sent(rig.welcome(epoch=2), m.Stage) == [m.Stage(token_of(1), (entry(),))]


def test_a_welcome_of_another_epoch_that_was_not_asked_for_is_answered_by_identify() -> None:
    rig = running(1)
    (identify,) = sent(rig.welcome(epoch=2), m.Identify)
    assert identify.held == [token_of(1)]
    assert sent(rig.welcome(epoch=2), m.DispatchAck) == [m.DispatchAck(token_of(1))]


def test_another_ledger_at_the_same_address_ends_what_was_not_granted() -> None:
    rig = running(1, lookahead=4)
    rig.dispatch(2)
    rig.tell(Began(token_of(2)))
    rig.tell(Staged(token_of(2), (entry(),), success(token_of(2))))
    out = rig.welcome(ledger="0000beef")
    assert StopJob(token_of(1)) in out
    assert DeleteStages(token_of(2), (entry(),)) in out
    assert rig.state.held() == []


def test_a_silent_sentinel_is_asked_again_and_then_reconnected_to() -> None:
    rig = running(1)
    out = []
    for _ in range(310):
        out += rig.wait(0.1)
    assert len(sent(out, m.Identify)) > 5
    assert out.count(Reconnect()) == 1
    assert rig.state.held() == [token_of(1)]


def test_losing_contact_for_longer_than_a_lease_ends_no_attempt() -> None:
    rig = staged(1)
    for _ in range(600):
        rig.wait(1.0)
    assert rig.state.attempts[token_of(1)].phase is Phase.STAGED
    assert sent(rig.welcome(), m.Stage) == [m.Stage(token_of(1), (entry(),))]


def test_err_is_never_answered_with_err() -> None:
    rig = ready()
    assert rig.hear(m.Err("what?", "malformed")) == []


def test_a_message_for_the_sentinel_is_answered_with_err() -> None:
    rig = ready()
    (err,) = sent(rig.hear(m.Stages(["x"])), m.Err)
    assert err.code == "unexpected"


# -- dispatch


def test_a_dispatch_starts_and_is_acknowledged_when_the_plugin_begins() -> None:
    rig = ready()
    assert rig.dispatch(1) == [StartJob(token_of(1), 1, dispatch(1), plugin())]
    assert rig.tell(Began(token_of(1))) == [Send(1, m.DispatchAck(token_of(1)))]


def test_jobs_start_in_order_of_arrival_as_places_become_free() -> None:
    rig = ready(slots=2)
    started = [i for n in (3, 1, 2) for i in rig.dispatch(n)]
    assert [i.job_id for i in started if isinstance(i, StartJob)] == [3, 1]
    out = rig.tell(Ended(token_of(1), success(token_of(1))))
    assert [i.job_id for i in out if isinstance(i, StartJob)] == [2]


def test_lookahead_hands_the_runner_more_than_its_slots() -> None:
    rig = ready(lookahead=3)
    started = [i for n in range(1, 6) for i in rig.dispatch(n)]
    assert [i.job_id for i in started if isinstance(i, StartJob)] == [1, 2, 3]


def test_a_dispatch_beyond_the_credit_is_rejected_as_busy() -> None:
    rig = ready(credit=2)
    rig.dispatch(1)
    rig.dispatch(2)
    assert rig.dispatch(3) == [rejected(3, Reason.BUSY)]


def test_a_dispatch_whose_plugin_is_unknown_is_rejected_as_need_plugin() -> None:
    rig = ready()
    assert rig.dispatch(1, spec="spec-2") == [rejected(1, Reason.NEED_PLUGIN)]
    rig.hear(plugin("spec-2"))
    assert isinstance(rig.dispatch(1, attempt=2, spec="spec-2")[0], StartJob)


def test_a_repeated_dispatch_of_a_held_token_is_ignored() -> None:
    rig = running(1)
    assert rig.dispatch(1) == []


def test_a_repeated_dispatch_of_a_finished_attempt_is_ignored() -> None:
    rig = running(1)
    rig.tell(Ended(token_of(1), success(token_of(1))))
    rig.hear(m.ConcludeAck([token_of(1)]))
    assert rig.state.held() == []
    assert rig.dispatch(1) == []


def test_a_newer_attempt_stops_the_older_one_and_takes_its_place() -> None:
    rig = running(1)
    assert rig.dispatch(1, attempt=2) == [StopJob(token_of(1))]
    assert rig.state.held() == [token_of(1, 2)]
    assert rig.tell(Stopped(token_of(1))) == [StartJob(token_of(1, 2), 1, dispatch(1, 2), plugin())]


def test_an_older_attempt_than_the_one_held_is_ignored() -> None:
    rig = ready()
    rig.dispatch(1, attempt=2)
    assert rig.dispatch(1, attempt=1) == []


def test_a_newer_attempt_of_a_granted_job_is_refused_here() -> None:
    rig = publishing(1)
    out = rig.dispatch(1, attempt=2)
    assert [err.code for err in sent(out, m.Err)] == ["unexpected"]
    assert rig.state.held() == [token_of(1)]


@pytest.mark.parametrize(
    "token", ["", "../../etc/passwd", "7f3ac91e-1-2-1", "7f3ac91e-1-1-2", "ffff-1-1-1"]
)
def test_a_dispatch_whose_token_does_not_name_it_is_answered_with_err(token: str) -> None:
    rig = ready()
    bad = dispatch(1)
    bad.token = token
    out = rig.hear(bad, 1)
    assert len(sent(out, m.Err)) == 1
    assert rig.state.held() == []


def test_a_job_waiting_behind_a_long_one_is_given_back_after_a_second() -> None:
    rig = running(1)
    rig.dispatch(2)
    assert rig.wait(0.9) == []
    assert rig.wait(0.2) == [rejected(2, Reason.BUSY)]


def test_a_job_waiting_for_a_plugin_to_start_is_kept_for_longer() -> None:
    rig = ready(starting_s=10.0)
    rig.dispatch(1)
    rig.dispatch(2)
    for _ in range(98):
        assert sent(rig.wait(0.1), m.Conclude) == []
        rig.hear(m.Heartbeat("ALIVE"))
    assert rejected(2, Reason.BUSY) in rig.wait(0.3)
    assert rig.state.attempts[token_of(1)].phase is Phase.STARTED


def test_giving_back_pauses_ever_longer_while_nothing_moves() -> None:
    rig = running(1)
    attempt = 0
    given_back_at = []
    for tenth in range(400):
        if token_of(2, attempt) not in rig.state.held():
            attempt += 1
            rig.dispatch(2, attempt)
        for conclusion in sent(rig.wait(0.1), m.Conclude):
            given_back_at.append(tenth / 10)
            rig.hear(m.ConcludeAck([conclusion.token]))
        rig.hear(m.Heartbeat("ALIVE"))
    gaps = [b - a for a, b in itertools.pairwise(given_back_at)]
    assert len(given_back_at) <= 6
    assert gaps == sorted(gaps)


def test_a_job_waiting_behind_short_ones_is_kept() -> None:
    rig = running(1)
    rig.dispatch(9)
    for job_id in range(2, 6):
        assert sent(rig.wait(0.9), m.Conclude) == []
        rig.hear(m.Heartbeat("ALIVE"))
        running_token = next(t for t, a in rig.state.attempts.items() if a.phase is Phase.RUNNING)
        rig.tell(Ended(running_token, success(running_token)))
        rig.dispatch(job_id)
        started = next(t for t, a in rig.state.attempts.items() if a.phase is Phase.STARTED)
        rig.tell(Began(started))
        rig.hear(m.ConcludeAck([running_token]))


def test_a_job_handed_ahead_is_taken_back_from_the_runner_and_given_back() -> None:
    rig = running(1, lookahead=2)
    rig.dispatch(2)
    assert rig.wait(1.1) == [StopJob(token_of(2))]
    assert rig.tell(Stopped(token_of(2))) == [rejected(2, Reason.BUSY)]


def test_a_job_that_ended_before_it_could_be_taken_back_counts_as_ended() -> None:
    rig = running(1, lookahead=2)
    rig.dispatch(2)
    rig.wait(1.1)
    out = rig.tell(Staged(token_of(2), (entry(),), success(token_of(2))))
    assert out == [Send(2, m.Stage(token_of(2), (entry(),)))]


def test_plugin_specs_are_bounded_by_their_size() -> None:
    rig = ready()
    for n in range(12):
        rig.hear(plugin(f"big-{n}", source="x" * 10_000_000))
    assert rig.dispatch(1) == [rejected(1, Reason.NEED_PLUGIN)]
    assert isinstance(rig.dispatch(2, spec="big-11")[0], StartJob)


def test_reload_forgets_specs_but_not_the_jobs_that_use_them() -> None:
    rig = running(1)
    rig.dispatch(2)
    assert rig.hear(m.Reload()) == [ForgetPlugins()]
    assert rig.dispatch(3) == [rejected(3, Reason.NEED_PLUGIN)]
    out = rig.tell(Ended(token_of(1), success(token_of(1))))
    assert StartJob(token_of(2), 2, dispatch(2), plugin()) in out


# -- ending


def test_a_job_without_outputs_concludes_at_once_until_acknowledged() -> None:
    rig = running(1)
    conclusion = success(token_of(1))
    assert rig.tell(Ended(token_of(1), conclusion)) == [Send(1, conclusion)]
    assert rig.wait(0.9) == []
    assert rig.wait(0.1) == [Send(1, conclusion)]
    rig.hear(m.ConcludeAck([token_of(1)]))
    assert rig.wait(1.0) == []
    assert rig.state.held() == []


def test_acknowledging_what_is_not_concluded_changes_nothing() -> None:
    rig = running(1)
    rig.hear(m.ConcludeAck([token_of(1), token_of(2), "junk"]))
    assert rig.state.held() == [token_of(1)]


def test_stage_is_repeated_every_second_until_answered() -> None:
    rig = staged(1)
    again = [Send(1, m.Stage(token_of(1), (entry(),)))]
    assert rig.wait(1.0) == again
    assert rig.wait(1.0) == again
    rig.hear(m.Grant(token_of(1)), 1)
    assert rig.wait(1.0) == []


def test_a_grant_publishes_and_then_concludes() -> None:
    rig = staged(1)
    assert rig.hear(m.Grant(token_of(1)), 1) == [PublishOutputs(token_of(1), (entry(),))]
    assert rig.tell(Published(token_of(1))) == [Send(1, success(token_of(1)))]
    rig.hear(m.ConcludeAck([token_of(1)]))
    assert rig.state.held() == []


def test_a_repeated_grant_changes_nothing() -> None:
    rig = publishing(1)
    assert rig.hear(m.Grant(token_of(1)), 1) == []
    rig.tell(Published(token_of(1)))
    assert rig.hear(m.Grant(token_of(1)), 1) == []


def test_a_late_grant_of_a_finished_attempt_is_ignored_silently() -> None:
    rig = publishing(1)
    rig.tell(Published(token_of(1)))
    rig.hear(m.ConcludeAck([token_of(1)]))
    assert rig.hear(m.Grant(token_of(1)), 1) == []


@pytest.mark.parametrize("token", [token_of(7), "junk"])
def test_a_grant_for_an_unknown_token_is_answered_with_err_and_ignored(token: str) -> None:
    rig = ready()
    (err,) = sent(rig.hear(m.Grant(token), 7), m.Err)
    assert err.code == "unexpected"


def test_a_grant_before_anything_was_staged_is_answered_with_err() -> None:
    rig = running(1)
    (err,) = sent(rig.hear(m.Grant(token_of(1)), 1), m.Err)
    assert err.code == "unexpected"
    assert rig.state.attempts[token_of(1)].phase is Phase.RUNNING


def test_a_refusal_deletes_the_stages_and_says_no_more() -> None:
    rig = staged(1)
    refuse = m.Refuse(token_of(1), Reason.SUPERSEDED)
    assert rig.hear(refuse, 1) == [DeleteStages(token_of(1), (entry(),))]
    assert rig.wait(1.0) == []
    assert rig.state.held() == []


def test_a_refusal_after_the_grant_deletes_nothing() -> None:
    rig = publishing(1)
    out = rig.hear(m.Refuse(token_of(1), Reason.STALE_TOKEN), 1)
    assert [type(i) for i in out] == [Send]
    assert rig.state.held() == [token_of(1)]


def test_a_sink_that_is_away_is_tried_again_for_ever_ever_less_often() -> None:
    rig = publishing(1)
    failed = PublishFailed(token_of(1), "disk is away", transient=True)
    pauses = []
    for _ in range(12):
        assert rig.tell(failed) == []
        waited = 0.0
        while PublishOutputs(token_of(1), (entry(),)) not in rig.wait(0.5):
            rig.hear(m.Heartbeat("ALIVE"))
            waited += 0.5
        pauses.append(waited)
    assert pauses == sorted(pauses)
    assert max(pauses) <= 30.0
    assert rig.tell(Published(token_of(1))) == [Send(1, success(token_of(1)))]


def test_a_sink_that_refuses_for_good_is_reported_and_keeps_the_stages() -> None:
    rig = publishing(1)
    out = rig.tell(PublishFailed(token_of(1), "other bytes there", False, Reason.SINK_CONFLICT))
    want = m.Conclude(token_of(1), "FAILED", "sink_conflict", "other bytes there", False)
    assert out == [Send(1, want)]
    assert rig.hear(m.ConcludeAck([token_of(1)])) == []
    assert rig.state.held() == []


def test_recover_publishes_what_another_worker_staged() -> None:
    rig = ready()
    bad_rows = entry(1, kind=OutputKind.QUARANTINE)
    out = rig.hear(m.Recover(token_of(5), (entry(), bad_rows)), 5)
    assert out == [PublishOutputs(token_of(5), (entry(), bad_rows))]
    (conclusion,) = sent(rig.tell(Published(token_of(5))), m.Conclude)
    assert conclusion.status == "PARTIAL_SUCCESS"
    assert conclusion.metrics == {"rows": 10, "bytes": 200, "quarantine_rows": 10}


def test_recover_of_an_own_stage_counts_as_its_grant() -> None:
    rig = staged(1)
    out = rig.hear(m.Recover(token_of(1), (entry(),)), 1)
    assert out == [PublishOutputs(token_of(1), (entry(),))]
    assert rig.hear(m.Recover(token_of(1), (entry(),)), 1) == []


def test_recover_of_another_output_root_is_refused() -> None:
    rig = ready()
    (err,) = sent(rig.hear(m.Recover(token_of(5), (entry(root="root-2"),)), 5), m.Err)
    assert err.code == "refused"
    assert rig.state.held() == []


def test_recover_after_a_permanent_failure_publishes_once_more() -> None:
    rig = publishing(1)
    rig.tell(PublishFailed(token_of(1), "other bytes there", transient=False))
    rig.hear(m.ConcludeAck([token_of(1)]))
    out = rig.hear(m.Recover(token_of(1), (entry(),)), 1)
    assert out == [PublishOutputs(token_of(1), (entry(),))]


# -- abort


def test_abort_of_a_queued_job_drops_it() -> None:
    rig = running(1)
    rig.dispatch(2)
    assert rig.hear(m.Abort(token_of(2)), 2) == []
    assert rig.state.held() == [token_of(1)]


def test_abort_of_a_running_job_stops_it_and_nothing_more_is_said() -> None:
    rig = running(1)
    assert rig.hear(m.Abort(token_of(1)), 1) == [StopJob(token_of(1))]
    assert rig.state.held() == []
    assert rig.tell(Stopped(token_of(1))) == []
    assert rig.state.attempts == {}


def test_abort_that_meets_a_finished_run_deletes_its_stages() -> None:
    rig = running(1)
    rig.hear(m.Abort(token_of(1)), 1)
    out = rig.tell(Staged(token_of(1), (entry(),), success(token_of(1))))
    assert out == [DeleteStages(token_of(1), (entry(),))]


def test_abort_of_a_staged_job_deletes_its_stages() -> None:
    rig = staged(1)
    assert rig.hear(m.Abort(token_of(1)), 1) == [DeleteStages(token_of(1), (entry(),))]


def test_abort_after_the_grant_is_too_late() -> None:
    rig = publishing(1)
    assert rig.hear(m.Abort(token_of(1)), 1) == []
    assert rig.state.held() == [token_of(1)]


def test_abort_of_a_granted_job_that_an_operator_gave_up_deletes_its_stages() -> None:
    rig = publishing(1)
    assert rig.hear(m.Abort(token_of(1), Reason.ABANDONED), 1) == []
    assert rig.state.held() == []
    assert rig.tell(Published(token_of(1))) == [DeleteStages(token_of(1), (entry(),))]
    assert rig.state.attempts == {}


def test_abort_of_a_granted_job_that_waits_for_its_sink_leaves_the_stages_alone() -> None:
    rig = publishing(1)
    rig.tell(PublishFailed(token_of(1), "disk is away", transient=True))
    assert rig.hear(m.Abort(token_of(1), "stale"), 1) == []
    assert rig.state.held() == []


def test_abort_stops_the_attempt_it_names_and_no_other() -> None:
    rig = running(1)
    assert rig.hear(m.Abort(token_of(1, 2)), 1) == []
    assert rig.hear(m.Abort(token_of(2)), 2) == []
    assert rig.state.held() == [token_of(1)]


# -- left-over stages


def test_stages_that_are_not_held_are_reported_and_deleted_when_told() -> None:
    rig = staged(1)
    out = rig.tell(StageListing([token_of(1), token_of(8), "../etc/passwd"]))
    assert out == [Send(0, m.Stages([token_of(8)]))]
    out = rig.hear(m.Discard([token_of(8), token_of(1), "../etc/passwd"]))
    assert out == [DeleteStages(token_of(8))]


# -- drain


def test_drain_gives_back_what_has_not_begun_and_ends_what_runs() -> None:
    rig = running(1, lookahead=2)
    rig.dispatch(2)
    rig.dispatch(3)
    out = rig.tell(DrainRequested())
    assert out == [
        Send(0, m.Heartbeat("DRAINING", [token_of(1), token_of(2), token_of(3)])),
        rejected(3, Reason.DRAINING),
        StopJob(token_of(2)),
    ]
    assert rig.tell(Stopped(token_of(2))) == [rejected(2, Reason.DRAINING)]
    assert rig.dispatch(4) == [rejected(4, Reason.DRAINING)]
    rig.hear(m.ConcludeAck([token_of(2), token_of(3), token_of(4)]))
    rig.tell(Staged(token_of(1), (entry(),), success(token_of(1))))
    rig.hear(m.Grant(token_of(1)), 1)
    rig.tell(Published(token_of(1)))
    assert rig.hear(m.ConcludeAck([token_of(1)])) == [Exit()]


def test_an_idle_worker_drains_at_once() -> None:
    rig = ready()
    assert rig.tell(DrainRequested()) == [Send(0, m.Heartbeat("DRAINING", [])), Exit()]
    assert rig.wait(1.0) == []


def test_a_drain_gives_long_jobs_back_when_its_time_is_over() -> None:
    rig = running(1, drain_s=3.0)
    rig.tell(DrainRequested())
    assert StopJob(token_of(1)) not in rig.wait(2.9)
    assert StopJob(token_of(1)) in rig.wait(0.2)
    assert rig.tell(Stopped(token_of(1))) == [rejected(1, Reason.DRAINING)]
    assert rig.hear(m.ConcludeAck([token_of(1)])) == [Exit()]


def test_a_drain_ends_even_if_nobody_answers() -> None:
    rig = staged(1, drain_s=3.0, drain_grace_s=2.0)
    rig.tell(DrainRequested())
    out = []
    for _ in range(51):
        out += rig.wait(0.1)
    assert out[-1] == Exit()
    assert not [i for i in out if isinstance(i, DeleteStages)]
