"""DEPLOY and RELOAD from clients on the workers' socket, answered with ACK or ERR.

They write to the ledger and so take a while; a thread of their own carries them out, and the loop
sends the answers.
"""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from casparian_flow.domain.errors import CasparianError
from casparian_flow.domain.ids import Identity
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel.control_plane import ControlPlane
from casparian_flow.sentinel.events import Send

log = logging.getLogger(__name__)

WAITING_MAX = 16


class WireCalls:
    """`take` and `answers` are for the loop's thread.

    Args:
        wake: called when an answer is ready.
        allowed: whether any of this is accepted (docs/protocol.md, "DEPLOY and RELOAD").
    """

    def __init__(self, plane: ControlPlane, wake: Callable[[], None], *, allowed: bool) -> None:
        self._plane = plane
        self._wake = wake
        self._allowed = allowed
        self._waiting = 0
        self._done: deque[Send] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="wire-call")

    def take(self, identity: Identity, message: m.Message) -> None:
        """Carry a DEPLOY or RELOAD out, or refuse it."""
        if not self._allowed:
            self._refuse(identity, "DEPLOY and RELOAD are not taken here: use the control socket")
        elif self._waiting >= WAITING_MAX:
            self._refuse(identity, "too many deploys at once; repeat this one in a moment")
        else:
            self._waiting += 1
            self._pool.submit(self._carry_out, identity, message)

    def answers(self) -> list[Send]:
        ready: list[Send] = []
        while self._done:
            ready.append(self._done.popleft())
            self._waiting -= 1
        return ready

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _refuse(self, identity: Identity, why: str) -> None:
        self._waiting += 1
        self._done.append(Send(identity, 0, m.Err(why, "refused"), after_commit=False))

    def _carry_out(self, identity: Identity, message: m.Message) -> None:
        answer: m.Message
        try:
            answer = self._answer(message)
        except CasparianError as error:
            text = error.with_hint()
            answer = m.Ack(success=False, message=text)
        except Exception as error:
            log.exception("a DEPLOY or RELOAD from the wire failed")
            answer = m.Err(f"{type(error).__name__}: {error}", "refused")
        self._done.append(Send(identity, 0, answer, after_commit=False))
        self._wake()

    def _answer(self, message: m.Message) -> m.Ack:
        if not isinstance(message, m.Deploy):
            self._plane.reload()
            return m.Ack(success=True, message="wiring read anew")
        row = self._plane.deploy(message.bundle)
        return m.Ack(
            success=True,
            message=str(row.get("message", "")),
            plugin_id=row.get("plugin_id"),
            details=row,
        )
