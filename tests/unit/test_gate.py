"""The gate by itself: what one key may cost the others."""

import secrets
import threading
import time

from curve_kit import new_pair, worker_of

from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.ids import Identity
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel.admission import Admission, PodIdentity
from casparian_flow.sentinel.events import WorkerMessage
from casparian_flow.sentinel.gate import REVIEWS_PER_KEY, Gate
from casparian_flow.sentinel.metrics import SentinelMetrics


def identify(token: str) -> m.Identify:
    return m.Identify(worker_id="w", nonce="n", token=token)


def routing_id() -> Identity:
    return Identity(b"w" + secrets.token_bytes(16))


def test_a_key_with_one_wrong_token_after_another_holds_up_no_other_key() -> None:
    thief, honest = new_pair().public, new_pair().public
    release = threading.Event()
    reviewed: list[str] = []

    def review(token: str) -> PodIdentity | None:
        assert release.wait(30)
        reviewed.append(token)
        return PodIdentity("team", "sa-beta") if token == "good" else None

    admission = Admission(review)
    alpha, beta = worker_of("alpha"), worker_of("beta")
    admission.replace({thief: alpha, honest: beta})
    gate = Gate(admission, SentinelMetrics(), SystemClock(), lambda: None)
    try:
        same = routing_id()
        for number in range(2_000):
            gate.take(same, thief, 0, identify(f"forged {number}"))
            gate.take(routing_id(), thief, 0, identify(f"other {number}"))
        mine = routing_id()
        gate.take(mine, honest, 0, identify("good"))
        release.set()
        admitted: list[WorkerMessage] = []
        deadline = time.monotonic() + 30
        while not admitted and time.monotonic() < deadline:
            admitted = gate.admitted()
        assert [message.identity for message in admitted] == [mine]
        assert len(reviewed) <= REVIEWS_PER_KEY + 1
    finally:
        release.set()
        gate.close()
