"""procrastinate's application; run as a program it is one worker.

python -m bench.peers.procrastinate_tasks CONCURRENCY
"""

import asyncio
import os
import sys
from typing import Any

import procrastinate

from bench.peers.procrastinate_peer import CONNECTION_VARIABLE

_connection = os.environ[CONNECTION_VARIABLE]
sync_app: Any = procrastinate.App(
    connector=procrastinate.SyncPsycopgConnector(conninfo=_connection)
)


def _nothing() -> None:
    """Deferred by the client, run by the workers."""


async def _nothing_async() -> None:
    """The same without a thread, which is procrastinate's fastest way."""


noop: Any = sync_app.task(name="noop", queue="bench")(_nothing)


def _worker_app() -> Any:
    app: Any = procrastinate.App(
        connector=procrastinate.PsycopgConnector(conninfo=_connection, min_size=2, max_size=20)
    )
    app.task(name="noop", queue="bench")(_nothing_async)
    return app


async def _work(concurrency: int) -> None:
    app = _worker_app()
    async with app.open_async():
        await app.run_worker_async(concurrency=concurrency, fetch_job_polling_interval=0.05)


if __name__ == "__main__":
    asyncio.run(_work(int(sys.argv[1])))
