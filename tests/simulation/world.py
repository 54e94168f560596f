"""Simulated time, processes, network and file systems: everything under the parts being tested.

Nothing here knows about jobs. All chance comes from one generator, so a seed is a history.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from simulation.options import Options

from casparian_flow.domain.clock import Now
from casparian_flow.domain.outputs import OutputEntry

WALL_START_US = 1_760_000_000_000_000


class World:
    """The event loop: callbacks in order of simulated time."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rng = random.Random(options.seed)
        self.time = 0.0
        self.wall_offset = 0.0
        self.healed = False
        self.trace: list[str] = []
        self.met: Counter[tuple[str, str]] = Counter()
        """(fault, job status) → how often the fault struck while a job was in that status."""
        self.statuses: Callable[[], set[str]] = set
        self.bindings: dict[object, tuple[str, str]] = {}
        """Routing id → plugin version that it is bound to, in runs where workers are."""
        self._heap: list[tuple[float, int, Process | None, int, Callable[[], None]]] = []
        self._sequence = 0

    def now(self) -> Now:
        """For the parts under test: a clock that never jumps, and one that may."""
        return Now(self.time, WALL_START_US + int((self.time + self.wall_offset) * 1e6))

    def after(self, delay: float, run: Callable[[], None], owner: "Process | None" = None) -> None:
        """Run something later; if its owner has died by then it is dropped, if paused deferred."""
        self._sequence += 1
        generation = owner.generation if owner is not None else 0
        entry = (self.time + delay, self._sequence, owner, generation, run)
        heapq.heappush(self._heap, entry)

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Advance to `until`, or to the first moment when `done` holds."""
        while self._heap and self._heap[0][0] <= until and not done():
            self.time, _, owner, generation, run = heapq.heappop(self._heap)
            if owner is None:
                run()
            elif owner.generation == generation:
                if owner.paused:
                    owner.deferred.append(run)
                else:
                    run()
        if not done():
            self.time = max(self.time, until)

    def chance(self, probability: float) -> bool:
        """Whether a fault strikes now; never after healing."""
        return not self.healed and probability > 0 and self.rng.random() < probability

    def strike(self, fault: str, what: str = "") -> None:
        """Note that a fault has happened, and which statuses jobs were in."""
        for status in self.statuses():
            self.met[fault, status] += 1
        self.log(f"FAULT {fault} {what}")

    def log(self, line: str) -> None:
        self.trace.append(f"{self.time:9.4f} {line}")


@dataclass(eq=False)
class Process:
    """Something that can die and be paused."""

    world: World
    name: str
    alive: bool = False
    paused: bool = False
    generation: int = 0
    deferred: list[Callable[[], None]] = field(default_factory=list)

    def kill(self) -> None:
        self.alive = self.paused = False
        self.generation += 1
        self.deferred.clear()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        waiting, self.deferred = self.deferred, []
        for run in waiting:
            self.world.after(0.0, run, self)


Address = Hashable


class Network:
    """Messages between addresses: in order on each link unless a fault says otherwise."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.receivers: dict[Address, list[tuple[Process, Callable[[Address, object], None]]]] = {}
        self.cut: set[tuple[Address, Address]] = set()
        """(from, to) pairs through which nothing passes."""
        self._last: dict[tuple[Address, Address], float] = {}

    def attach(
        self, address: Address, process: Process, receive: Callable[[Address, object], None]
    ) -> None:
        self.receivers.setdefault(address, []).append((process, receive))

    def detach(self, process: Process) -> None:
        for address, bound in list(self.receivers.items()):
            left = [pair for pair in bound if pair[0] is not process]
            if left:
                self.receivers[address] = left
            else:
                del self.receivers[address]

    def send(self, source: Address, target: Address, message: object) -> None:
        world, options = self.world, self.world.options
        if (source, target) in self.cut:
            return
        if world.chance(options.drop):
            world.strike("drop", type(message).__name__)
            return
        copies = 1
        if world.chance(options.duplicate):
            world.strike("duplicate", type(message).__name__)
            copies = 2
        for _ in range(copies):
            self._transmit(source, target, message)

    def _transmit(self, source: Address, target: Address, message: object) -> None:
        world, options = self.world, self.world.options
        arrival = world.time + world.rng.uniform(0.0001, 0.002)
        if world.chance(options.delay):
            world.strike("delay")
            arrival += world.rng.uniform(0.1, 8.0)
        link = (source, target)
        if world.chance(options.reorder):
            world.strike("reorder")
        else:
            arrival = max(arrival, self._last.get(link, 0.0))
            self._last[link] = arrival
        world.after(arrival - world.time, lambda: self._deliver(source, target, message))

    def _deliver(self, source: Address, target: Address, message: object) -> None:
        bound = self.receivers.get(target)
        if not bound or (source, target) in self.cut:
            return
        process, receive = self.world.rng.choice(bound)
        if process.alive:
            self.world.after(0.0, lambda: receive(source, message), process)


@dataclass
class Stored:
    """Data of one output, and under which token it was made."""

    token: str
    content: tuple[object, ...]


class Store:
    """One output root: stages and finals, published by put-if-absent. It survives everything."""

    def __init__(self, root_id: str) -> None:
        self.root_id = root_id
        self.stages: dict[tuple[str, int], Stored] = {}
        self.finals: dict[str, Stored] = {}
        self.down = False
        self.on_publish: Callable[[str, OutputEntry], None] = lambda _token, _entry: None
