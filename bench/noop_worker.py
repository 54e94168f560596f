"""A worker process whose jobs end at once: wire and state machine as in production, no plugin.

python -m bench.noop_worker tcp://127.0.0.1:5555
"""

import os
import secrets
import signal
import sys

from casparian_flow.domain.clock import SystemClock
from casparian_worker.mailbox import Mailbox
from casparian_worker.noop_runner import NoopRunner
from casparian_worker.process import CREDIT, LOOKAHEAD
from casparian_worker.wire import Wire
from casparian_worker.worker_events import DrainRequested, WorkerConfig
from casparian_worker.worker_state import WorkerState


def main(address: str) -> None:
    """Work for the Sentinel at `address` until SIGTERM."""
    mailbox = Mailbox()
    config = WorkerConfig(
        worker_id=f"noop-{os.getpid()}",
        nonce=secrets.token_hex(16),
        credit=CREDIT,
        lookahead=LOOKAHEAD,
        pid=os.getpid(),
    )
    signal.signal(signal.SIGTERM, lambda _number, _frame: mailbox.post(DrainRequested()))
    runner = NoopRunner(mailbox)
    Wire(address, WorkerState(config), runner, mailbox, SystemClock(), secrets.token_bytes).run()
    mailbox.close()


if __name__ == "__main__":
    main(sys.argv[1])
