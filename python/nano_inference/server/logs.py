"""Log lines of the server: text for people, or a JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import datetime, timezone

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that this task works for; every line of the log carries it."""


def setup_logging(level: str, log_format: str) -> None:
    """One handler on stderr for everything. uvicorn's and asyncio's own chatter is left out."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    quiet = max(logging.getLevelName(level.upper()), logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "asyncio", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(quiet)
    logging.getLogger("uvicorn.error").addFilter(_is_of_use)
    logging.captureWarnings(True)


def _is_of_use(record: logging.LogRecord) -> bool:
    """Whoever asks for a WebSocket gets a plain answer; uvicorn's advice to install one is none."""
    return not record.getMessage().startswith(("Unsupported upgrade", "No supported WebSocket"))


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, timezone.utc)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        request_id = REQUEST_ID.get()
        where = f" [{request_id}]" if request_id else ""
        text = f"{_time(record)} {record.levelname:<7}{where} {record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            entry["request_id"] = request_id
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)
