"""The gate between the workers' socket and the broker: which connection speaks for whom.

Only on a socket with CURVE. libzmq has let in only keys that are admitted (zap.py), and each
message carries its sender's. A worker says IDENTIFY with its pod's token; the token is reviewed in
another thread, and from then on its routing id is bound to its key and its plugin version. What
comes under a bound routing id with another key is dropped, and so is all that would be sent there.
"""

import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError
from casparian_flow.domain.ids import Identity
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel.admission import Admission, PodIdentity, Principal
from casparian_flow.sentinel.events import Send, WorkerMessage, WorkerRevoked
from casparian_flow.sentinel.metrics import SentinelMetrics

log = logging.getLogger(__name__)

ROUTING_ID_BYTES_MIN = 17
"""128 bits by chance, and a letter."""
THREADS = 4
PENDING_MAX = 4096
"""Workers whose tokens are being reviewed; more have to ask again."""
REVIEWS_PER_KEY = 64
"""Under way for one key: whoever has a key, and shows one wrong token after another with it, holds
up nobody with another key."""
REFUSED_S = 5.0
"""How long a token that was refused is not reviewed again."""
REFUSED_MAX = 4096
FORGET_S = 120.0
"""After which a routing id that the broker does not know and that says nothing is unbound."""


@dataclass(slots=True)
class _Bound:
    """A routing id whose owner has proved itself."""

    key: str
    principal: Principal
    token: bytes
    heard: float
    revoked: bool = False

    @property
    def binding(self) -> tuple[str, str]:
        return self.principal.plugin, self.principal.artifact_hash


@dataclass(slots=True)
class _Pending:
    """An IDENTIFY whose token is under review; repeated ones take its place."""

    key: str
    token: bytes
    message: m.Identify


class _Reviewed(NamedTuple):
    identity: Identity
    pending: _Pending
    principal: Principal
    refusal: str | None
    """"" for none, None if nobody could tell."""


class Gate:
    """All methods but `close` are for the loop's thread, and none waits.

    Args:
        wake: makes that thread call `admitted` and `answers` soon.
    """

    def __init__(
        self,
        admission: Admission,
        metrics: SentinelMetrics,
        clock: Clock,
        wake: Callable[[], None],
    ) -> None:
        self._admission = admission
        self._metrics = metrics
        self._clock = clock
        self._wake = wake
        self._seen = admission.version
        self._mono = clock.now().mono
        self._bound: dict[Identity, _Bound] = {}
        self._pending: dict[Identity, _Pending] = {}
        self._reviews: Counter[str] = Counter()
        self._refused: dict[tuple[str, bytes], tuple[float, str]] = {}
        self._reviewed: deque[_Reviewed] = deque()
        self._answers: list[Send] = []
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="token-review")

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    # -- in -------------------------------------------------------------------------------------

    def take(
        self, identity: Identity, key: str, job_id: int, message: m.Message
    ) -> WorkerMessage | None:
        """The message for the broker; None if it is none, or not yet."""
        bound = self._bound.get(identity)
        pending = self._pending.get(identity)
        if len(identity) < ROUTING_ID_BYTES_MIN:
            # One that could be guessed; libzmq also makes such ones of a peer that comes back
            # under a routing id still in use. Its owner, unanswered, takes another one.
            self._metrics.count("messages_foreign")
            return None
        owner = bound or pending
        if owner is not None and owner.key != key:
            self._drop(identity, key)
            return None
        if isinstance(message, m.Identify):
            return self._identify(identity, key, message, bound)
        if bound is None:
            self._answer(identity, m.Err("identify first", "unknown_worker"))
            return None
        bound.heard = self._mono
        return WorkerMessage(identity, job_id, message, bound.binding)

    def speaks(self, identity: Identity, key: str) -> bool:
        """Whether this is a bound routing id with its own key."""
        bound = self._bound.get(identity)
        return bound is not None and bound.key == key

    def hears(self, identity: Identity) -> bool:
        """Whether anything may be sent to a routing id."""
        return identity in self._bound

    def admitted(self) -> list[WorkerMessage]:
        """IDENTIFYs whose tokens have been found good since the last call."""
        messages = []
        while self._reviewed:
            done = self._reviewed.popleft()
            self._count(done.pending.key, -1)
            if self._pending.get(done.identity) is not done.pending:
                continue  # its routing id was taken from it
            del self._pending[done.identity]
            if done.refusal is None:
                continue  # it repeats its IDENTIFY
            if done.refusal:
                self._refuse(done.identity, done.pending, done.refusal)
            elif self._admission.principal(done.pending.key) == done.principal:
                messages.append(self._bind(done.identity, done.pending, done.principal))
        return messages

    def answers(self) -> list[Send]:
        """What is to be told to workers that are not admitted."""
        answers, self._answers = self._answers, []
        return answers

    def tick(self, known: Container[Identity]) -> list[WorkerRevoked]:
        """Look at the clock and at the admitted keys; call it about once a second.

        Args:
            known: the workers that the broker knows.

        Returns:
            Workers whose key has been dropped, or stands for something else now.
        """
        self._mono = mono = self._clock.now().mono
        for token, (until, _) in list(self._refused.items()):
            if until <= mono:
                del self._refused[token]
        for identity, bound in list(self._bound.items()):
            if identity not in known and bound.heard + FORGET_S <= mono:
                del self._bound[identity]
        version = self._admission.version
        if version == self._seen:
            return []
        self._seen = version
        return [
            WorkerRevoked(identity)
            for identity, bound in self._bound.items()
            if self._changed(identity, bound)
        ]

    def _changed(self, identity: Identity, bound: _Bound) -> bool:
        """Whether a worker is newly revoked; one that is admitted again identifies anew."""
        before = bound.revoked
        bound.revoked = self._admission.principal(bound.key) != bound.principal
        if before and not bound.revoked:
            self._answer(identity, m.Err("admitted again", "unknown_worker"))
        elif bound.revoked and not before:
            log.info("the key of %s is withdrawn: it gets no more jobs", bound.principal)
        return bound.revoked and not before

    # -- IDENTIFY -------------------------------------------------------------------------------

    def _identify(
        self, identity: Identity, key: str, message: m.Identify, bound: _Bound | None
    ) -> WorkerMessage | None:
        principal = self._admission.principal(key)
        asked = _Pending(key, hashlib.sha256(message.token.encode()).digest(), message)
        if principal is None or principal.kind != "worker":
            self._refuse(identity, asked, "this key is not admitted, or not for a worker")
            return None
        review = self._admission.review
        proved = bound is not None and (bound.principal, bound.token) == (principal, asked.token)
        if proved or review is None:
            return self._bind(identity, asked, principal)
        before = self._refused.get((key, asked.token))
        if before is not None:
            self._refuse(identity, asked, before[1])
            return None
        pending = self._pending.get(identity)
        if pending is not None and pending.token == asked.token:
            pending.message = message
        elif len(self._pending) < PENDING_MAX and self._reviews[key] < REVIEWS_PER_KEY:
            self._pending[identity] = asked
            self._count(key, 1)
            self._pool.submit(self._review, identity, asked, principal)
        return None

    def _count(self, key: str, change: int) -> None:
        self._reviews[key] += change
        if not self._reviews[key]:
            del self._reviews[key]

    def _bind(self, identity: Identity, asked: _Pending, principal: Principal) -> WorkerMessage:
        bound = _Bound(asked.key, principal, asked.token, self._mono)
        if identity not in self._bound:
            log.info("worker %s is admitted as %s", asked.message.worker_id, principal)
        self._bound[identity] = bound
        identify = replace(asked.message, capabilities=[principal.plugin], token="")
        return WorkerMessage(identity, 0, identify, bound.binding)

    def _refuse(self, identity: Identity, asked: _Pending, why: str) -> None:
        self._metrics.count("workers_refused")
        token = (asked.key, asked.token)
        if token not in self._refused and len(self._refused) < REFUSED_MAX:
            log.warning("worker %s is refused: %s", asked.message.worker_id[:100], why)
            self._refused[token] = (self._mono + REFUSED_S, why)
        self._answer(identity, m.Err(why, "refused"))

    def _drop(self, identity: Identity, key: str) -> None:
        """Somebody speaks under a routing id that another one has proved to be its own."""
        self._metrics.count("messages_foreign")
        self._bound.pop(identity, None)
        self._pending.pop(identity, None)
        log.warning(
            "%s spoke under another worker's routing id: dropped",
            self._admission.principal(key) or "a client",
        )

    def _answer(self, identity: Identity, message: m.Message) -> None:
        self._answers.append(Send(identity, 0, message, after_commit=False))

    # -- the pool's threads ---------------------------------------------------------------------

    def _review(self, identity: Identity, asked: _Pending, principal: Principal) -> None:
        refusal = self._judged(asked.message.token, principal)
        self._reviewed.append(_Reviewed(identity, asked, principal, refusal))
        self._wake()

    def _judged(self, token: str, principal: Principal) -> str | None:
        review = self._admission.review
        if review is None:
            return ""
        if not token:
            return "it shows no token of its pod"
        try:
            pod = review(token)
        except CasparianError as error:
            log.warning("a worker's token could not be reviewed: %s", error.with_hint())
            return None
        except Exception:
            log.exception("a worker's token could not be reviewed")
            return None
        return _mismatch(pod, principal)


def _mismatch(pod: PodIdentity | None, principal: Principal) -> str:
    if pod is None:
        return "its token is not valid"
    found = (pod.namespace, pod.service_account)
    if found != (principal.namespace, principal.service_account):
        return f"its token is of {'/'.join(found)[:200]}, its key of {principal}"
    return ""
