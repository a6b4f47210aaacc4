"""What RELAY_VERBOSE=1 says while vLLM runs."""

import time

from relay_attention.cpu.plan import PlanningCost
from relay_attention.log import logger


class Report:
    """Logs, every hundred steps, what share of their time was planning."""

    STEPS = 100

    def __init__(self, cost: PlanningCost) -> None:
        self._cost = cost
        self._steps = 0
        self._begin = time.perf_counter()
        self._seconds = 0.0

    def next_step(self) -> None:
        if self._steps == self.STEPS:
            elapsed = time.perf_counter() - self._begin
            planning = self._cost.seconds - self._seconds
            logger.info(
                "Relay: planning took %.0f us of each of %d steps, %.2f %% of their time",
                planning / self.STEPS * 1e6,
                self.STEPS,
                100 * planning / elapsed,
            )
            self._steps = 0
        if self._steps == 0:
            self._begin = time.perf_counter()
            self._seconds = self._cost.seconds
        self._steps += 1
