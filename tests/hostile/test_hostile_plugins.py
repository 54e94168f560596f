"""Plugins that want out, each tried three ways.

With everything on the Gatekeeper answers first: its finding is expected by name, or that it has
none. With the Gatekeeper off, the sandbox alone must keep every effect from happening: where
plugins get a user of their own, where they share the worker's, and in a pod's plugin container,
which can make no namespaces, and here may write to what they are after. And let loose without a
sandbox, each does bring its effect about: otherwise the tests before would prove nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from hostile import networks, powers, reads, writes
from hostile.driver import DRIVER
from hostile.parts import Hostile
from hostile.world import World
from plugin_runs import Bench, Run
from pod_kit import PLUGIN_USER, pod_folder
from signing_kit import rules
from worker_process import plugin_spec

from casparian_flow.domain.failures import Reason
from casparian_worker.environments import own_environment
from casparian_worker.plugin_events import LaunchError
from casparian_worker.plugin_host import PluginHost
from casparian_worker.runtime import POD_REQUIRED, PluginRuntime, SandboxPolicy
from casparian_worker.sandbox import APPLIED, Report
from casparian_worker.trust_check import require_trusted

CORPUS: list[Hostile] = [*reads.CORPUS, *writes.CORPUS, *networks.CORPUS, *powers.CORPUS]
ATTEMPTS = pytest.mark.parametrize("hostile", CORPUS, ids=[h.name for h in CORPUS])
CONTROLS = [h for h in CORPUS if h.control and (os.geteuid() == 0 or not h.privileged)]
USERS = ("own user", "worker's user", "container") if os.geteuid() == 0 else ("worker's user",)
FILE_BYTES_MAX = 64 << 20


@dataclass
class Cell:
    """A worker's sandbox with a warm process, and the world around it."""

    bench: Bench
    world: World
    host: PluginHost

    def run(self, hostile: Hostile) -> str:
        """All that comes out of one hostile plugin."""
        path = self.bench.file("hostile.py", self.source(hostile).encode())
        if not hostile.fresh:
            return told(self.bench.again(self.host, path=path))
        own = self.bench.host(DRIVER, memory_mb=1024, pids=64)
        try:
            return told(self.bench.again(own, path=path))
        finally:
            own.stop()

    def source(self, hostile: Hostile) -> str:
        return hostile.source(self.world.places(control=False))

    def report(self) -> Report:
        """What the sandbox says of itself; `casparian status` shows the same."""
        if not self.host.sandbox_report:
            self.bench.again(self.host, path=self.bench.file("idle.py", b"Handler = None"))
        return self.host.sandbox_report


def told(run: Run) -> str:
    """Rows, log and error as one text."""
    rows = [batch.batch.to_pylist() for batch in run.batches]
    return f"{rows} {run.outcome}"


@pytest.fixture(scope="module", params=USERS)
def cell(request: pytest.FixtureRequest) -> Iterator[Cell]:
    with ExitStack() as stack:
        if request.param == "container":
            pod = stack.enter_context(pod_folder())
            pod.launch(writable=[Path(tempfile.gettempdir())])
            folder, user = str(pod.folder), PLUGIN_USER
            runtime = PluginRuntime(
                scratch_root=f"{folder}/scratch", cache_root=f"{folder}/c",
                policy=SandboxPolicy(file_bytes=FILE_BYTES_MAX, required=POD_REQUIRED),
                container=pod.container(),
            )  # fmt: skip
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            Path(folder).chmod(0o755)
            policy = SandboxPolicy(file_bytes=FILE_BYTES_MAX)
            if request.param == "worker's user":
                policy = SandboxPolicy(file_bytes=FILE_BYTES_MAX, uid_base=0)
            runtime = PluginRuntime(
                scratch_root=f"{folder}/s", cache_root=f"{folder}/c", policy=policy
            )
            user = runtime._scratch.slot(0).uid
        neighbour = runtime._scratch.slot(1).private("host-of-another")
        if request.param == "container":
            os.mkdir(neighbour.tmp, 0o700)
            os.chown(neighbour.tmp, user, user)
        environment = own_environment()
        code = {"site": environment.site[0], "prefix": environment.prefix,
                "base": environment.code[0], "kit": runtime._kit}  # fmt: skip
        world = World(user, Path(neighbour.tmp), code)
        bench = Bench(runtime, Path(folder))
        yield Cell(bench, world, bench.host(DRIVER, memory_mb=1024, pids=64))
        bench.close()
        world.close()
        runtime.close()


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Wild"]:
    wild = Wild(tmp_path_factory.mktemp("wild"))
    yield wild
    wild.close()


class Wild:
    """A process that runs hostile plugins without a sandbox, and the world around it."""

    def __init__(self, folder: Path) -> None:
        neighbour = folder / "neighbour"
        neighbour.mkdir(0o700)
        self.folder = folder
        self.world = World(0, neighbour, dict.fromkeys(("site", "prefix", "base", "kit"), "x"))
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "let_loose.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self.world.inherited],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )

    def run(self, hostile: Hostile) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        source = hostile.source(self.world.places(control=True))
        order = {"source": source, "folder": str(self.folder)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        output: str = json.loads(self._process.stdout.readline())["output"]
        return output

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self.world.close()


@ATTEMPTS
def test_the_gatekeeper_refuses_it_or_leaves_it_to_the_sandbox(hostile: Hostile) -> None:
    """By the check that a worker makes before each start, of a plugin that is rightly signed."""
    plugin = plugin_spec(hostile.source({"folder": "/nowhere"}))
    if not hostile.rule:
        require_trusted(rules, plugin)
        return
    with pytest.raises(LaunchError, match=hostile.rule) as refused:
        require_trusted(rules, plugin)
    assert refused.value.reason is Reason.UNTRUSTED


@ATTEMPTS
def test_the_sandbox_alone_keeps_it_from_happening(cell: Cell, hostile: Hostile) -> None:
    output = cell.run(hostile)
    report = cell.report()
    effects = cell.world.effects(output)
    if effects:
        cell.world.repair()
    missing = [report[measure] for measure in hostile.held_by]
    if not missing or any(why.startswith(APPLIED) for why in missing):
        assert effects == set(), output
    else:
        assert all(why.startswith("not applied: ") for why in missing), missing


@pytest.mark.parametrize("hostile", CONTROLS, ids=[h.name for h in CONTROLS])
def test_let_loose_it_happens(wild: Wild, hostile: Hostile) -> None:
    output = wild.run(hostile)
    effects = wild.world.await_effect(output, hostile.effect)
    wild.world.repair()
    assert hostile.effect in effects, output
