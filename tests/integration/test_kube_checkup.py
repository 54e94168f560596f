"""`helm test`'s questions, asked of a real HTTP server."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ledger_kit import ManualClock

from casparian_flow.kube import checkup

HOST = "127.0.0.1"


class _Answers:
    """What the server says at each path."""

    def __init__(self) -> None:
        self.status = 200
        self.bodies = {"/readyz": "ok", "/metrics": "casparian_ledger_up 1.0\n"}
        self.asked = 0


@pytest.fixture
def answers() -> _Answers:
    return _Answers()


@pytest.fixture
def port(answers: _Answers) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.asked += 1
            body = answers.bodies[self.path].encode()
            self.send_response(answers.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer((HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_installation_that_works_has_nothing_wrong(port: int) -> None:
    assert checkup.ready(HOST, port) == ""
    assert checkup.ledger_up(HOST, port) == ""
    assert checkup.listens(HOST, port) == ""


def test_what_is_wrong_is_told(port: int, answers: _Answers) -> None:
    answers.bodies["/metrics"] = "casparian_ledger_up 0.0\ncasparian_ledger_up_total 1\n"
    assert "ledger_up" in checkup.ledger_up(HOST, port)
    answers.status, answers.bodies["/readyz"] = 503, "the ledger is being opened"
    assert checkup.ready(HOST, port) == "/readyz answers 503: the ledger is being opened"


def _checked(check: checkup.Check, sleep: Callable[[float], None], clock: ManualClock) -> str:
    wrong = checkup.failures({"it": check}, timeout_s=10, clock=clock, sleep=sleep)
    return wrong.get("it", "")


def test_it_waits_for_what_is_not_there_yet(port: int, answers: _Answers) -> None:
    clock = ManualClock()
    answers.status = 503

    def come_up(_: float) -> None:
        clock.seconds += 1
        answers.status = 200

    assert _checked(lambda: checkup.ready(HOST, port), come_up, clock) == ""
    assert answers.asked == 2


def test_it_gives_up_in_time_when_nobody_answers() -> None:
    clock = ManualClock()

    def wait(seconds: float) -> None:
        clock.seconds += seconds

    said = _checked(lambda: checkup.listens(HOST, 1), wait, clock)
    assert said.startswith("no answer: ")
    assert clock.seconds == 10
