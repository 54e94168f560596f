"""When a failed attempt runs again: exponential backoff with jitter."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Delays of 4, 16 and 64 seconds, each ± 20 %, then a dead letter.

    Jitter keeps jobs that failed together from coming back together (Brooker, "Exponential
    Backoff and Jitter", AWS Architecture Blog, 2015).
    """

    max_retries: int = 3
    base_s: float = 4.0
    jitter: float = 0.2
    """Largest relative deviation, 0..1."""
    max_delay_s: float = 3600.0

    def delay_s(self, retry_count: int, rng: random.Random) -> float:
        """Seconds to wait before retry number `retry_count` (the first is 1)."""
        return self._nominal_s(retry_count) * (1.0 + self.jitter * (2.0 * rng.random() - 1.0))

    def longest_s(self, retry_count: int) -> float:
        """The most that `delay_s` can return for this retry; an upper bound for any wait."""
        return self._nominal_s(retry_count) * (1.0 + self.jitter)

    def _nominal_s(self, retry_count: int) -> float:
        nominal: float = min(self.base_s**retry_count, self.max_delay_s)
        return nominal

    def allows(self, retry_count: int) -> bool:
        """Whether a job that has been retried `retry_count` times may be retried again."""
        return retry_count < self.max_retries
