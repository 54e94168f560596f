"""Draws faults from a seed and does them to the processes of a world, while its files change."""

import heapq
import itertools
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos.points import BY_NAME, POINTS
from chaos.processes import Service
from chaos.world import LEASE_S, World

WORKERS = 3
GAP_S = 0.35
"""Mean time between two faults, as far as there is somebody to suffer them."""
UNDISTURBED_S = {"sentinel": 1.2, "worker": 2.0, "scout": 1.0}
"""Mean time that a process is left alone once it serves: work has to begin to be cut off."""
EARLY = 0.15
"""Part of the faults that may hit a process that does not serve yet."""
SERVES = {"sentinel": "sentinel ready", "worker": "connected to the Sentinel", "scout": ""}
"""What a process logs once it serves."""
CHANGE_S = 0.5
"""Mean time between two changes of files."""
VERSIONS_MAX = 4
FILES_MAX = 2_000
STEP_S = 0.01
GONE_S = 30.0
POINT_PATIENCE_S = 8.0
"""A process that has not met its point by then is killed where it is."""
SENTINEL_AWAY = 7
"""The exit code of a Scout without a Sentinel; `casparian start` would start it again."""


@dataclass
class Place:
    """One service of the flow, whichever process it is at the moment."""

    role: str
    service: Service | None = None
    point: str = ""
    since: float = 0.0
    stopped: bool = False
    serves: bool = False
    ripe: float = 0.0
    """When it may be disturbed."""
    returns: bool = False
    """Whether a successor is on its way."""


@dataclass
class Faults:
    """See `run`."""

    world: World
    done: Counter[str] = field(default_factory=Counter)
    strange: list[str] = field(default_factory=list)
    """Processes that ended by themselves."""
    places: list[Place] = field(default_factory=list)
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    _unmet: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = ["sentinel", "scout", *["worker"] * WORKERS]
        self.places = [Place(role) for role in roles]
        for role in ("sentinel", "worker"):
            names = [point.name for point in POINTS if point.role == role]
            self.world.rng.shuffle(names)
            self._unmet[role] = names

    @property
    def count(self) -> int:
        return sum(self.done.values())

    def run(self, faults: int, timeout_s: float) -> None:
        """Do at least so many faults, among them a death at every named point."""
        for place in self.places:
            self._spawn(place)
        self._later(0.0, self._change_files)
        self._later(1.0, self._next_fault)
        end = time.monotonic() + timeout_s
        while self.count < faults or any(self._unmet.values()):
            if time.monotonic() > end:
                raise AssertionError(
                    f"{self.count} of {faults} faults after {timeout_s:g} s; "
                    f"points not met: {self._unmet}\n{self.world.story()}"
                )
            self._step()
        self._heal()

    def _heal(self) -> None:
        """Continue what is stopped and replace what is dead or doomed: no fault is left."""
        self._due.clear()
        for place in self.places:
            if place.stopped:
                self._continue(place)
            if place.point and place.service is not None:
                place.service.signal(signal.SIGKILL)
                self.world.zygote.wait(place.service, GONE_S)
        self.keep_alive()

    def keep_alive(self) -> None:
        """Start again what ends without being asked to; for after `run`."""
        self.world.zygote.poll()
        for place in self.places:
            if place.service is not None and not place.service.alive:
                self._bury(place)
            if place.service is None:
                self._spawn(place, healthy=True)

    # -- one step -----------------------------------------------------------------------------

    def _step(self) -> None:
        now = time.monotonic()
        self.world.zygote.poll()
        for place in self.places:
            if place.service is not None and not place.service.alive:
                self._bury(place)
            if place.service is None:
                self._call_successor(place)
            elif not place.serves:
                self._look(place, now)
            elif place.point and now - place.since > POINT_PATIENCE_S and not place.stopped:
                self._kill(place)
        while self._due and self._due[0][0] <= now:
            heapq.heappop(self._due)[2]()
        time.sleep(STEP_S)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), action))

    def _look(self, place: Place, now: float) -> None:
        service = place.service
        assert service is not None
        if SERVES[place.role] in service.text:
            place.serves, place.since = True, now
            mean = UNDISTURBED_S[place.role]
            place.ripe = now + self.world.rng.expovariate(1 / mean)

    def _call_successor(self, place: Place) -> None:
        if place.returns or (place.role == "scout" and not self._sentinel_serves):
            return
        place.returns = True
        self._later(self.world.rng.uniform(0, 0.2), lambda: self._spawn(place))

    @property
    def _sentinel_serves(self) -> bool:
        return any(p.role == "sentinel" and p.serves and not p.stopped for p in self.places)

    def _bury(self, place: Place) -> None:
        service = place.service
        assert service is not None
        if service.status == -signal.SIGKILL:
            met = self._met(place)
            self.done[f"point {met}" if met else f"kill {place.role}"] += 1
        elif not (place.role == "scout" and service.status == SENTINEL_AWAY):
            self.strange.append(f"{service.log.name} ended with {service.status}")
        place.service, place.stopped, place.serves = None, False, False

    def _met(self, place: Place) -> str:
        """The point at which the process died, if it did."""
        file = self.world.folder / "met.log"
        if not place.point or not file.exists():
            return ""
        met = Counter(file.read_text().split())
        if met[place.point] <= self.done[f"point {place.point}"]:
            return ""
        unmet = self._unmet[place.role]
        if place.point in unmet:
            unmet.remove(place.point)
        return place.point

    # -- faults -------------------------------------------------------------------------------

    def _next_fault(self) -> None:
        rng = self.world.rng
        self._later(rng.expovariate(1 / GAP_S), self._next_fault)
        early, now = rng.random() < EARLY, time.monotonic()
        able = [
            p
            for p in self.places
            if p.service is not None
            and not p.stopped
            and not p.point
            and (early or (p.serves and p.ripe <= now))
        ]
        workers = [p for p in able if p.role == "worker"]
        sentinel = [p for p in able if p.role == "sentinel"]
        kind = rng.choices(
            [
                "kill worker",
                "kill sentinel",
                "stop worker",
                "stop sentinel",
                "kill both",
                "kill scout",
            ],
            [30, 25, 25, 8, 8, 4],
        )[0]
        if kind == "kill scout":
            victims = [p for p in able if p.role == "scout"]
        elif kind == "kill both":
            victims = workers[:1] + sentinel
        else:
            victims = sentinel if kind.endswith("sentinel") else workers
            victims = [rng.choice(victims)] if victims else []
        for victim in victims:
            if kind.startswith("kill"):
                self._kill(victim)
            else:
                self._stop(victim)

    def _kill(self, place: Place) -> None:
        if place.service is not None:
            place.service.signal(signal.SIGKILL)

    def _stop(self, place: Place) -> None:
        service = place.service
        assert service is not None
        service.signal(signal.SIGSTOP)
        place.stopped = True
        self.done[f"stop {place.role}"] += 1

        def resume() -> None:
            if place.service is service and place.stopped:
                self._continue(place)

        self._later(LEASE_S * self.world.rng.uniform(1.3, 2.5), resume)

    def _continue(self, place: Place) -> None:
        place.stopped = False
        if place.service is not None:
            place.service.signal(signal.SIGCONT)

    def _spawn(self, place: Place, *, healthy: bool = False) -> None:
        place.point, place.returns, place.serves, nth = "", False, False, 1
        rng = self.world.rng
        unmet = self._unmet.get(place.role, [])
        if not healthy and place.role in self._unmet:
            if unmet and rng.random() < 0.7:
                place.point = rng.choice(unmet)
            elif rng.random() < 0.25:
                place.point = rng.choice([n for n, p in BY_NAME.items() if p.role == place.role])
                nth = rng.randint(1, 6)
        place.service = self.world.start(place.role, point=place.point, nth=nth)
        place.since = time.monotonic()

    def _change_files(self) -> None:
        rng = self.world.rng
        self._later(rng.expovariate(1 / CHANGE_S), self._change_files)
        for _ in range(rng.choice((1, 1, 1, 4))):
            if rng.random() < 0.5 and len(self.world.written) < FILES_MAX:
                self.world.new_file()
            else:
                self.world.edit(VERSIONS_MAX)
