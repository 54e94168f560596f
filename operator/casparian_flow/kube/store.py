"""What is known of the cluster: the last body of each object, as watches and lists told it.

Watches and lists race, and either may be behind. An object's resource version only grows, so the
newer body wins; what a list does not have is gone only if it was there before the list was made;
what a watch has seen deleted does not come back by an older list, as its uid is remembered.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable

from casparian_flow.kube.kinds import Body, Kind, Ref, ref_of

GRAVES_MAX = 10_000
"""Deleted objects that are remembered; a list is seconds behind, no more."""


class Store:
    """For any number of threads. Bodies are shared: nobody may change one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bodies: dict[tuple[str, str], dict[str, Body]] = {}
        self._graves: OrderedDict[str, None] = OrderedDict()

    def get(self, ref: Ref) -> Body | None:
        with self._lock:
            return self._bodies.get((ref.kind, ref.namespace), {}).get(ref.name)

    def all(self, kind: Kind, namespace: str) -> list[Body]:
        """Objects of a kind in a namespace, by name."""
        with self._lock:
            found = self._bodies.get((kind.name, namespace), {})
            return [found[name] for name in sorted(found)]

    def all_of(self, kind: Kind) -> list[Body]:
        """Objects of a kind in every namespace."""
        with self._lock:
            return [
                body
                for (name, _), bodies in self._bodies.items()
                if name == kind.name
                for body in bodies.values()
            ]

    def put(self, body: Body) -> bool:
        """Take a body in; False if a newer one, or its end, is known."""
        with self._lock:
            return self._put(body)

    def _put(self, body: Body) -> bool:
        ref = ref_of(body)
        place = self._bodies.setdefault((ref.kind, ref.namespace), {})
        known = place.get(ref.name)
        if _uid(body) in self._graves:
            return False
        if known is not None and _uid(known) == _uid(body) and not _newer(body, known):
            return False
        place[ref.name] = body
        return True

    def drop(self, body: Body) -> None:
        """An object has been deleted."""
        with self._lock:
            ref = ref_of(body)
            place = self._bodies.get((ref.kind, ref.namespace), {})
            known = place.get(ref.name)
            if known is not None and _uid(known) == _uid(body):
                del place[ref.name]
            self._bury(_uid(body))

    def _bury(self, uid: str) -> None:
        self._graves[uid] = None
        while len(self._graves) > GRAVES_MAX:
            self._graves.popitem(last=False)

    def replace(self, kind: Kind, namespace: str, items: Iterable[Body], version: str) -> set[Ref]:
        """Take in all objects of a kind in a namespace, as a list has them.

        Args:
            version: resource version of the list.

        Returns:
            Those that were not known like this: changed, new or gone.
        """
        with self._lock:
            news: set[Ref] = set()
            listed: set[str] = set()
            for body in items:
                ref = ref_of(body)
                listed.add(ref.name)
                if self._put(body):
                    news.add(ref)
            place = self._bodies.setdefault((kind.name, namespace), {})
            for name in set(place) - listed:
                if _number(_version(place[name])) <= _number(version):
                    self._bury(_uid(place[name]))
                    del place[name]
                    news.add(Ref(kind.name, namespace, name))
            return news


def _uid(body: Body) -> str:
    return str(body["metadata"].get("uid", ""))


def _version(body: Body) -> str:
    return str(body["metadata"].get("resourceVersion", ""))


def _newer(body: Body, known: Body) -> bool:
    return _number(_version(body)) > _number(_version(known))


def _number(version: str) -> int:
    """Resource versions of one kind are numbers that grow; what is none counts as old."""
    return int(version) if version.isascii() and version.isdigit() else 0
