"""Processes that must not outlive, or must be ended by, the one that started them."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from casparian_flow.domain.errors import CasparianError

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends, however it ends.

    Everything here can be killed at any moment without losing acknowledged state, so the harshest
    signal is the right one: nothing is left behind that holds a port or the ledger.

    Raises:
        CasparianError: the system has no such means.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise CasparianError(f"prctl: {os.strerror(ctypes.get_errno())}")
    # The parent may have ended before the kernel was told.
    if os.getppid() != parent:
        sys.exit(0)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal ends the process at once."""
    stop = threading.Event()

    def ask(_number: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
