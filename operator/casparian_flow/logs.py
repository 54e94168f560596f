"""How services write their log: lines for people, or one JSON object a line for collectors.

Standard library only, so that it can be used where no settings are (the plugin container).
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]

TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
LEVEL_VARIABLE = "CASPARIAN_LOGGING__LEVEL"
FORMAT_VARIABLE = "CASPARIAN_LOGGING__FORMAT"


class JsonFormatter(logging.Formatter):
    """Keys `time` (UTC), `level`, `logger`, `message`, and `exception` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _ServiceHandler(logging.StreamHandler[TextIO]):
    """Marks the handler that this module made."""


def start_logging(level: str, form: str = "text", stream: TextIO | None = None) -> None:
    """Write the log to `stream`; called again, it changes level and form.

    A log that somebody else has set up keeps its form.

    Args:
        level: least severity, such as "INFO".
        form: "text" or "json".
        stream: stderr by default.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(_ServiceHandler(stream or sys.stderr))
    for handler in root.handlers:
        if isinstance(handler, _ServiceHandler):
            json_wanted = form == "json"
            handler.setFormatter(JsonFormatter() if json_wanted else logging.Formatter(TEXT_FORMAT))
    root.setLevel(level)


def start_logging_from_environment() -> None:
    """Begin with what the environment says, as reading the settings has something to say too."""
    level = os.environ.get(LEVEL_VARIABLE, "INFO").upper()
    known = level in logging.getLevelNamesMapping()
    start_logging(level if known else "INFO", os.environ.get(FORMAT_VARIABLE, "text"))
