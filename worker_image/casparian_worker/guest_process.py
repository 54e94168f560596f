"""The worker's end of one plugin process with its family: started, watched and ended as one."""

import contextlib
import fcntl
import os
import select
import signal
import threading

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.failures import Reason
from casparian_worker import guest_family
from casparian_worker.bridge import FrameReader, bridge_pair
from casparian_worker.guest_family import (
    LOOK_INTERVAL_S,
    Launch,
    Lines,
    StartFamily,
    Usage,
    Verdict,
)
from casparian_worker.guest_log import GuestLog

_GRACE_S = 3.0
_LOG_PIPE_BYTES = 1024 * 1024


class GuestProcess:
    """A running plugin process.

    Attributes:
        sock: the worker's end of the bridge, non-blocking.
        frames: reads `sock`.
        log: what the process prints.
    """

    def __init__(self, launch: Launch, start: StartFamily, clock: Clock) -> None:
        """Start it.

        Raises:
            OSError, LaunchError: as `start`.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._verdict: Verdict | None = None
        self._oom_kills = guest_family.oom_kills()
        self.sock, bridge = bridge_pair()
        self.frames = FrameReader(self.sock)
        life, self._life = os.pipe2(os.O_CLOEXEC)
        self._status, status = os.pipe2(os.O_CLOEXEC)
        output, printed = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # fewer wake-ups for a talkative plugin
            fcntl.fcntl(printed, fcntl.F_SETPIPE_SZ, _LOG_PIPE_BYTES)
        lines = Lines(bridge.fileno(), life, status, printed)
        try:
            self._family = start(launch, lines, self.kill)
        except BaseException:
            self.kill()
            for descriptor in (self._status, output):
                os.close(descriptor)
            self.sock.close()
            raise
        finally:
            bridge.close()
            for descriptor in (life, status, printed):
                os.close(descriptor)
        self.sock.setblocking(False)
        self.log = GuestLog(output, launch.log_bytes)
        self._watcher = threading.Thread(
            target=self._watch, args=(output,), name=f"plugin-{self.pid}", daemon=True
        )
        self._watcher.start()

    @property
    def pid(self) -> int:
        """Of the family's first process; where it runs in another container, as it is there."""
        return self._family.pid

    @property
    def usage(self) -> Usage:
        """As last looked at."""
        return self._family.usage

    def kill(self, verdict: Verdict | None = None) -> None:
        """Have all its processes end. Safe from any thread; the first verdict stands."""
        with self._lock:
            if self._verdict is None:
                self._verdict = verdict
            if self._life >= 0:
                os.close(self._life)
                self._life = -1

    def left_behind(self, own: int) -> bool:
        """See Family.left_behind."""
        return self._family.left_behind(own)

    def end(self) -> Verdict:
        """Make sure that every process is gone, and say why they went.

        The verdict of `kill` comes first; else the guest's own exit status.
        """
        # The bridge broke first; a crash needs a moment to show its exit status.
        if self._life >= 0 and not self._family.wait(_GRACE_S / 3):
            self.kill(Verdict(Reason.TRUNCATED, "the plugin closed the bridge to the worker"))
        self.kill()
        if not self._family.wait(_GRACE_S):
            self._family.kill()
        self.sock.close()
        self._watcher.join(_GRACE_S)
        status = self._exit_status()
        return self._verdict or self._judge(status)

    def _exit_status(self) -> bytes:
        """What the family wrote last; b"" if nothing, or if it outlives its end elsewhere."""
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        try:
            return os.read(self._status, 64) if poll.poll(int(_GRACE_S * 1000)) else b""
        finally:
            os.close(self._status)

    def _judge(self, status: bytes) -> Verdict:
        if not status.strip().isdigit():
            return Verdict(Reason.CRASHED, "the plugin process vanished")
        code = os.waitstatus_to_exitcode(int(status))
        if code == 0:
            return Verdict(Reason.EXITED, "the plugin ended its own process (exit code 0)")
        if code > 0:
            return Verdict(Reason.EXITED, f"the plugin ended its own process (exit code {code})")
        if -code == signal.SIGKILL and guest_family.oom_kills() > self._oom_kills:
            return Verdict(
                Reason.OUT_OF_MEMORY, "the kernel ended the plugin process: out of memory"
            )
        name = guest_family.signal_name(-code)
        return Verdict(Reason.CRASHED, f"the plugin process was ended by {name}")

    def _watch(self, pipe: int) -> None:
        """The watcher thread: takes in what is printed, and looks at what is used."""
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        due = 0.0
        while not self.log.closed:
            try:
                poll.poll(int(LOOK_INTERVAL_S * 1000))
                self.log.drain()
            except OSError:
                return
            now = self._clock.now().mono
            if now >= due:
                due = now + LOOK_INTERVAL_S
                self._family.look()
