"""What the routes, the middleware and the process around them share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM
    from .args import ServeArgs
    from .metrics import Metrics

LOADING, READY, DRAINING, FAILED = "loading", "ready", "draining", "failed"


@dataclass
class ServerState:
    """One per process, at `app.state.server`."""

    args: ServeArgs
    metrics: Metrics
    llm: AsyncLLM | None = None
    """None while the model is being loaded."""
    phase: str = LOADING
    """loading -> ready -> draining; failed if the model could not be loaded."""
    failure: str = ""
    """Why it failed."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time, as /v1/models reports it."""
    in_flight: int = 0
    """HTTP requests of the completion endpoints that have not sent their last byte."""

    @property
    def model_names(self) -> list[str]:
        """What requests may say for `model`; the first is what responses say."""
        return self.args.model_names

    def unhealthy_because(self) -> str | None:
        """Why requests should go elsewhere; None if all is well. A stuck step counts: work is
        pending and none has finished for args.health_timeout seconds."""
        if self.phase != READY or self.llm is None:
            return f"the server is {self.phase}" + (f": {self.failure}" if self.failure else "")
        if not self.llm.is_healthy:
            return "the engine has stopped"
        stats = self.llm.stats
        if stats["running"] or stats["waiting"]:
            idle = time.monotonic() - max(stats["last_step_time"], stats["busy_since"])
            if idle > self.args.health_timeout:
                return f"work is pending and no step has finished for {idle:.1f} s"
        return None
