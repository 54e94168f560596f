"""One worker's plugin machinery put together: scratch, environments, guest kit, sandbox policy."""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.records import Limits, Sample
from casparian_flow.protocol.messages import Plugin
from casparian_flow.trust.rules import TrustSource
from casparian_worker import sandbox
from casparian_worker.environments import Environment, EnvironmentCache, own_environment
from casparian_worker.guest_family import EndFamily, Family, Launch, Lines, LocalFamily
from casparian_worker.guest_kit import install_kit
from casparian_worker.plugin_events import Failed, LaunchError, RunRequest
from casparian_worker.plugin_host import PluginHost
from casparian_worker.remote_family import PluginContainer, shared_group
from casparian_worker.scratch import Scratch, SlotScratch
from casparian_worker.source import COPY_BYTES_MAX, Source, open_source, sample_source
from casparian_worker.trust_check import require_trusted

UID_BASE = 60_600
"""Of a range that neither distributions nor systemd assign to anyone."""
POD_REQUIRED = (
    "environment",
    "limits",
    "no_new_privs",
    "landlock",
    "capabilities",
    "parent_death",
    "not_dumpable",
    "seccomp",
)
"""Measures that hold in a container without rights; it shares its pod's network, so that the
filter is what keeps a plugin from it."""
WHOLE_FILE = 1 << 62
"""Where another container runs the plugins, every input is copied: it has no sources."""
THREADS_MAX = 4
"""Threads a numeric library starts; libraries would take one per core, beyond the task limit."""


@dataclass(frozen=True, slots=True)
class SandboxPolicy:
    """How plugins are confined on this worker.

    Attributes:
        required: measures (sandbox.MEASURES) without which no plugin runs.
        uid_base: first user id for slots of a worker started as root; 0 keeps plugins root.
        file_bytes: largest file a plugin may write.
        scratch_bytes: all that a plugin may have in its scratch folder.
        threads: what numeric libraries are told to use.
    """

    required: tuple[str, ...] = ()
    uid_base: int = UID_BASE
    file_bytes: int = 8 << 30
    scratch_bytes: int = 16 << 30
    threads: int = field(default_factory=lambda: max(1, min(THREADS_MAX, os.cpu_count() or 1)))

    def __post_init__(self) -> None:
        unknown = sorted(set(self.required) - set(sandbox.MEASURES))
        if unknown:
            raise LaunchError(
                f"unknown sandbox measure {unknown[0]!r}",
                reason=Reason.SANDBOX,
                hint="Known are: " + ", ".join(sandbox.MEASURES) + ".",
            )


class PluginRuntime:
    """Makes hosts and sources for a worker's slots; see plugin_events.py for their use."""

    def __init__(
        self,
        *,
        scratch_root: str,
        cache_root: str,
        policy: SandboxPolicy | None = None,
        clock: Clock | None = None,
        progress: Callable[[str], None] = lambda _: None,
        copy_limit: int = COPY_BYTES_MAX,
        trust: TrustSource | None = None,
        environments: EnvironmentCache | None = None,
        container: PluginContainer | None = None,
    ) -> None:
        """Make the scratch folder, remove those of dead workers, and have a guest kit.

        Args:
            environments: by default those that are made below `cache_root`.
            container: where plugins run, if not beside this process; closed with the runtime.
            trust: the rules that every plugin must satisfy at each start of its process; None runs
                whatever it is handed, which is for programs that have checked it themselves.

        Raises:
            OSError: one of the folders cannot be written.
            LaunchError: the container is not there, or does not fit.
        """
        self.policy = policy or SandboxPolicy()
        self._clock = clock or SystemClock()
        self._progress = progress
        self._trust = trust
        self._numbers = itertools.count(1)
        self._environments = environments or EnvironmentCache(cache_root)
        self._container = container
        if container is None:
            self._copy_limit = copy_limit
            self._kit = install_kit(cache_root)
            self._scratch = Scratch(scratch_root, uid_base=self.policy.uid_base)
        else:
            there = container.hello()
            self._copy_limit = WHOLE_FILE
            self._kit = there.kit
            self._scratch = Scratch(
                scratch_root, group=shared_group(there), elsewhere=there.scratch
            )

    def host(
        self, plugin: Plugin, slot: int, progress: Callable[[str], None] | None = None
    ) -> PluginHost:
        """A host for one plugin version in one slot. Its process starts with its first job.

        A slot may keep several hosts warm; they share its user, so its task limit too.

        Args:
            progress: told, instead of the runtime's own, while an environment is made.
        """
        scratch = self._private(slot)

        def launch() -> Launch:
            if self._trust is not None:
                require_trusted(self._trust, plugin)
            environment = self._environments.obtain(plugin.lockfile, progress or self._progress)
            return self._launch(environment, scratch, plugin.limits)

        return self._host(plugin, launch, scratch)

    def _host(
        self, plugin: Plugin, launch: Callable[[], Launch], scratch: SlotScratch
    ) -> PluginHost:
        return PluginHost(
            plugin, launch=launch, start=self._start, scratch=scratch, clock=self._clock
        )

    def _start(self, launch: Launch, lines: Lines, end: EndFamily) -> Family:
        if self._container is not None:
            return self._container.start(launch, lines, end)
        return LocalFamily(launch, lines, end, self._clock)

    def source(self, slot: int, *, path: str, content_hash: str, size: int) -> Source:
        """The bytes of one file version, ready for the slot's plugin. See source.open_source."""
        return open_source(
            path,
            content_hash=content_hash,
            size=size,
            scratch=self._scratch.slot(slot),
            clock=self._clock,
            copy_limit=self._copy_limit,
        )

    def sample(self, slot: int, sample: Sample) -> Source:
        """A plugin's own sample, ready for the slot's plugin. See source.sample_source."""
        return sample_source(sample, self._scratch.slot(slot))

    def probe(self) -> sandbox.Report:
        """How far the sandbox goes on this machine, found out by starting it without a plugin.

        Raises:
            LaunchError: it cannot be started, or falls short of what the policy requires.
        """
        plugin = Plugin("probe", "probe", "0", "", _PROBE, "", "", (), "{}", "", Limits())
        scratch = self._private(0)
        launch = self._launch(own_environment(), scratch, plugin.limits)
        host = self._host(plugin, lambda: launch, scratch)
        try:
            for event in host.run(RunRequest("probe", scratch.tmp)):
                if isinstance(event, Failed):
                    raise LaunchError(event.message, reason=event.reason)
            return host.sandbox_report
        finally:
            host.stop()

    def problem(self) -> str:
        """Why no plugin could be started now; "" if nothing is known against it."""
        return self._container.problem() if self._container is not None else ""

    def stop_waiting(self) -> None:
        """Have whatever waits for another container fail soon, since the end is near."""
        if self._container is not None:
            self._container.stop_waiting()

    def close(self) -> None:
        """Remove the scratch folder. Hosts must have been stopped."""
        self._environments.close()
        if self._container is not None:
            self._container.close()
        self._scratch.close()

    def _private(self, slot: int) -> SlotScratch:
        return self._scratch.slot(slot).private(f"host-{next(self._numbers)}")

    def _launch(self, environment: Environment, scratch: SlotScratch, limits: Limits) -> Launch:
        # What was in another container's folder may still be going when the next process starts.
        tmp = f"{scratch.tmp}-{next(self._numbers)}" if scratch.elsewhere else scratch.tmp
        confinement = sandbox.Confinement(
            code=(*environment.code, self._kit),
            reads=(scratch.input,),
            writes=(tmp,),
            uid=scratch.uid,
            memory_mb=limits.memory_mb,
            pids=limits.pids,
            file_bytes=self.policy.file_bytes,
            scratch_bytes=self.policy.scratch_bytes,
            required=self.policy.required,
        )
        return Launch(
            python=environment.python,
            kit=self._kit,
            site=environment.site,
            prefix=environment.prefix,
            confinement=confinement,
            log_bytes=limits.log_bytes,
            variables=_variables(tmp, self.policy.threads),
        )


_PROBE = """
from casparian_flow.sdk import BasePlugin

class Handler(BasePlugin):
    def execute(self, file_path):
        return None
"""


def _variables(tmp: str, threads: int) -> dict[str, str]:
    """The plugin's whole environment: nothing of the worker's but the time zone."""
    count = str(threads)
    variables = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": tmp,
        "TMPDIR": tmp,
        "USER": "plugin",
        "LOGNAME": "plugin",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "NUMEXPR_MAX_THREADS": count,
        "POLARS_MAX_THREADS": count,
        "ARROW_IO_THREADS": count,
    }
    zone = os.environ.get("TZ")
    return variables | ({"TZ": zone} if zone else {})
