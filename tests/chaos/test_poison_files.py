"""Files that kill, hang or gorge their plugin, among many good ones.

`CASPARIAN_POISON_FILES` sets how many good files. The same flow works off the good files alone
and the good files with the poison; both speeds are printed, with their ratio.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from chaos.judge import Remains
from chaos.processes import Service, Zygote, zygote
from chaos.world import World, make_world, publish, wait_until

GOOD = int(os.environ.get("CASPARIAN_POISON_FILES", "1000"))
SECONDS_PER_FILE = 0.1
PATIENCE_S = 120.0
TIMEOUT_S = 1
MEMORY_MB = 256
RETRY_BASE_S = 1.5
"""Retries after 1.5, 2.3 and 3.4 s. They take their turn among the good files, as with the default
of 4, 16 and 64 s; much shorter ones would only follow each other."""
WORKER = f"job_timeout_seconds = {TIMEOUT_S}\nmemory_mb = {MEMORY_MB}"
POISON = {"crashed": "crash", "timeout": "hang", "out_of_memory": "gorge"}
"""Reason of the dead letter → what the file tells the plugin to do."""
PLUGIN = """\
import os
import signal
import time
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.txt", topic="texts")

class Handler(BasePlugin):
    def execute(self, file_path):
        with self.open_input("r") as file:
            text = file.read()
        if text == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        while text == "hang":
            time.sleep(1)
        hoard = []
        while text == "gorge":
            hoard.append(b"x" * (16 << 20))
        self.publish("texts", [{"text": text}])
"""


@pytest.mark.timeout(86_400)
def test_poison_files_end_as_dead_letters_and_hold_up_nobody(tmp_path: Path) -> None:
    with zygote() as nursery:
        clean = prepared(tmp_path / "clean", nursery)
        plain_s, _ = worked_off(clean)
        mixed = prepared(tmp_path / "mixed", nursery, *POISON.values())
        good_s, all_s = worked_off(mixed)
        print(
            f"{GOOD} files alone {plain_s:.1f} s, beside poison {good_s:.1f} s: "
            f"{plain_s / good_s:.2f} x the speed; last dead letter after {all_s:.1f} s"
        )
        remains = Remains(mixed.folder)
        letters = {row[1]: row for row in remains.dead_letters}
        assert set(letters) == set(POISON), remains.dead_letters
        assert len(remains.dead_letters) == len(POISON)
        names = {job[0]: job[4] for job in remains.jobs}
        for reason, (job_id, _, message) in letters.items():
            assert names[job_id].endswith(f"-{POISON[reason]}.txt"), message
        assert sum(job[2] == "COMPLETED" for job in remains.jobs) == GOOD
        assert all(job[8] == 1 for job in remains.jobs if job[2] == "COMPLETED"), (
            "a good file was tried again because of a bad one"
        )
        assert not remains.sink_faults()
        rows = remains.parquet_rows("texts")
        assert sum(rows.values()) == len(rows) == GOOD


def prepared(folder: Path, nursery: Zygote, *orders: str) -> World:
    """A flow whose files are scanned; the poison stands between the good ones."""
    world = make_world(folder, nursery, 0, WORKER, retry_base_s=RETRY_BASE_S)
    publish(world, "texts", PLUGIN)
    for number in range(GOOD):
        world.write(f"{number:06}.txt", f"text {number}".encode())
    for order in orders:
        world.write(f"{GOOD // 2:06}-{order}.txt", order.encode())
    world.flow.json("scan")
    return world


def worked_off(world: World) -> tuple[float, float]:
    """Seconds from the workers' start until the good files are done, and until all are."""
    services = [world.start("sentinel"), world.start("worker"), world.start("worker")]
    began = time.monotonic()
    wait_until(world, "the good files", lambda: completed(world) >= GOOD, limit_s())
    good_s = time.monotonic() - began
    wait_until(world, "the bad files", world.rest, limit_s())
    all_s = time.monotonic() - began
    stop(world, services)
    return good_s, all_s


def completed(world: World) -> int:
    return (world.counts() or {}).get("COMPLETED", 0)


def limit_s() -> float:
    return PATIENCE_S + GOOD * SECONDS_PER_FILE


def stop(world: World, services: list[Service]) -> None:
    """Workers first, as `casparian start` does it."""
    for service in reversed(services):
        service.signal(signal.SIGTERM)
        status = world.zygote.wait(service, PATIENCE_S)
        assert status == 0, f"{service.log.name} ended with {status}\n{world.story()}"
