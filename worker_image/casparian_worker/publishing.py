"""Publishing granted outputs and clearing stages away, in threads of their own."""

import logging
from collections import Counter
from collections.abc import Iterable
from functools import partial
from threading import Lock

from casparian_flow.domain.errors import CasparianError, InvariantError, SinkError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.outputs import OutputEntry, parse_sink_uri
from casparian_worker.conclusions import described
from casparian_worker.mailbox import Mailbox
from casparian_worker.pool import Pool
from casparian_worker.sinks.base import Sink, SinkEnvironment, reason_of
from casparian_worker.sinks.garbage import delete_stages, list_stages
from casparian_worker.sinks.registry import sink_for
from casparian_worker.worker_events import Published, PublishFailed, StageListing

log = logging.getLogger(__name__)

THREADS = 4
"""Enough for several fsyncs to be under way, few enough not to fight over the processor."""
SINKS_MAX = 256
CLOSE_S = 10.0
ONE_WRITER = frozenset({"sqlite", "duckdb"})
"""Their files take one writer at a time, and a queue here is fairer than their own waiting."""


class Sinks:
    """Open sinks by URI; the most recent ones are kept."""

    def __init__(self, environment: SinkEnvironment) -> None:
        self._environment = environment
        self._lock = Lock()
        self._sinks: dict[str, Sink] = {}
        self._turns: dict[str, Lock] = {}

    def get(self, uri: str) -> Sink:
        """The sink of a canonical URI.

        Raises:
            CasparianError: there is no such sink.
        """
        with self._lock:
            sink = self._sinks.get(uri)
            if sink is None:
                sink = self._sinks[uri] = sink_for(uri, self._environment)
                if len(self._sinks) > SINKS_MAX:
                    del self._sinks[next(iter(self._sinks))]
            return sink

    def uris(self) -> list[str]:
        """The sinks known so far."""
        with self._lock:
            return list(self._sinks)

    def turn(self, uri: str) -> Lock:
        """What to hold while publishing to a sink: shared where the sink takes one writer."""
        address = parse_sink_uri(uri)
        if address.scheme not in ONE_WRITER:
            return Lock()
        with self._lock:
            if len(self._turns) > SINKS_MAX:
                self._turns.clear()
            return self._turns.setdefault(f"{address.scheme}:{address.path}", Lock())


class Publisher:
    """Answers publish requests by mailbox; every call returns at once."""

    def __init__(self, sinks: Sinks, environment: SinkEnvironment, mailbox: Mailbox) -> None:
        self._sinks = sinks
        self._environment = environment
        self._post = mailbox.post
        self._pool = Pool(THREADS, "publisher")
        self._lock = Lock()
        self.counts: Counter[str] = Counter()
        """Per scheme: `{scheme}_files` and `{scheme}_rows` that were put in place."""

    def publish(self, token: str, entries: tuple[OutputEntry, ...]) -> None:
        self._pool.submit(partial(self._publish, token, entries))

    def delete_stages(self, token: str, entries: tuple[OutputEntry, ...]) -> None:
        self._pool.submit(partial(self._delete, token, entries))

    def list_stages(self) -> None:
        self._pool.submit(self._list)

    def close(self) -> None:
        self._pool.close(CLOSE_S)

    def _publish(self, token: str, entries: tuple[OutputEntry, ...]) -> None:
        try:
            for entry in entries:
                self._put_in_place(entry, token)
            for entry in entries:
                self._sinks.get(entry.uri).unstage(entry, token)
        except SinkError as error:
            log.warning("job output %s was not published: %s", token, error)
            self._post(PublishFailed(token, described(error), error.transient, reason_of(error)))
        except (CasparianError, InvariantError) as error:
            # The manifest itself is none that this worker could have staged.
            log.error("job output %s cannot be published: %s", token, error)
            self._post(PublishFailed(token, described(error), transient=False))
        except Exception as error:
            log.exception("publishing %s failed", token)
            self._post(PublishFailed(token, described(error), True, Reason.WORKER_ERROR))
        else:
            self._post(Published(token))

    def _put_in_place(self, entry: OutputEntry, token: str) -> None:
        with self._sinks.turn(entry.uri):
            receipt = self._sinks.get(entry.uri).publish(entry, token)
        if receipt.already or not entry.rows:
            return
        scheme = entry.uri.partition(":")[0]
        with self._lock:
            self.counts[f"{scheme}_files"] += 1
            self.counts[f"{scheme}_rows"] += entry.rows

    def _delete(self, token: str, entries: Iterable[OutputEntry]) -> None:
        try:
            known = list(entries)
            for entry in known:
                self._sinks.get(entry.uri).unstage(entry, token)
            if not known:
                delete_stages(self._environment, {token}, self._sinks.uris())
        except (CasparianError, InvariantError) as error:
            # The next listing reports them again.
            log.warning("stages of %s were not deleted: %s", token, error)

    def _list(self) -> None:
        try:
            tokens = list_stages(self._environment, self._sinks.uris())
            self._post(StageListing(sorted(tokens)))
        except CasparianError as error:
            log.warning("left-over stages could not be listed: %s", error)
