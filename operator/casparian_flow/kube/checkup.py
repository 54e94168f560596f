"""`helm test`: is the operator ready, does its ledger take commits, can workers reach it?

python -m casparian_flow.kube.checkup --host casparian-operator --sentinel casparian-sentinel
"""

import argparse
import http.client
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping

from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.kube import names

ANSWER_S = 5.0
POLL_S = 1.0
BODY_BYTES_MAX = 16 << 20
_LEDGER_UP = re.compile(r"^casparian_ledger_up 1(\.0)?$", re.MULTILINE)

Check = Callable[[], str]
"""Returns what is wrong, "" if nothing is."""


def ready(host: str, port: int = names.HEALTH_PORT) -> str:
    """Whether the operator says that it is ready."""
    status, body = _get(host, port, "/readyz")
    return "" if status == 200 else f"/readyz answers {status}: {body[:200].strip()}"


def ledger_up(host: str, port: int = names.METRICS_PORT) -> str:
    """Whether the ledger takes commits, as the metrics tell."""
    status, body = _get(host, port, "/metrics")
    if status != 200:
        return f"/metrics answers {status}"
    return "" if _LEDGER_UP.search(body) else "the metrics do not say casparian_ledger_up 1"


def listens(host: str, port: int) -> str:
    """Whether somebody accepts connections there."""
    with socket.create_connection((host, port), timeout=ANSWER_S):
        return ""


def failures(
    checks: Mapping[str, Check],
    *,
    timeout_s: float,
    clock: Clock,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, str]:
    """What is still wrong with each failed check when the time is over; {} as soon as all hold."""
    deadline = clock.now().mono + timeout_s
    while True:
        found = {name: _outcome(check) for name, check in checks.items()}
        wrong = {name: text for name, text in found.items() if text}
        if not wrong or clock.now().mono >= deadline:
            return wrong
        sleep(POLL_S)


def _outcome(check: Check) -> str:
    try:
        return check()
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {error}"


def _get(host: str, port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(BODY_BYTES_MAX).decode("utf-8", "replace")
    finally:
        connection.close()


def main() -> None:
    """Exit with 1, and words, if an installation does not work."""
    parser = argparse.ArgumentParser(description="Check an installation.")
    parser.add_argument("--host", required=True, help="Service of health and metrics.")
    parser.add_argument("--sentinel", required=True, help="Service that workers connect to.")
    parser.add_argument("--timeout", type=float, default=60.0, help="Seconds until all must hold.")
    given = parser.parse_args()
    checks: dict[str, Check] = {
        "ready": lambda: ready(given.host),
        "ledger": lambda: ledger_up(given.host),
        "workers' port": lambda: listens(given.sentinel, names.WORKER_PORT),
        "control port": lambda: listens(given.sentinel, names.CONTROL_PORT),
    }
    wrong = failures(checks, timeout_s=given.timeout, clock=SystemClock())
    sys.stdout.writelines(f"{name}: {wrong.get(name) or 'ok'}\n" for name in checks)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
