"""When rounds end: K local steps, or a schedule of K over optimizer steps."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fomoe_pl.errors import ConfigError, check_range

KEY = "local_steps"


@dataclass(frozen=True)
class RoundSchedule:
    """K as a function of the optimizer step.

    Attributes:
        segments: Sorted (first step, K): from that optimizer step on, rounds are K steps long.
    """

    segments: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, local_steps: int | dict[int, int]) -> RoundSchedule:
        """Read the setting: a number K, or a mapping {first step: K} such as {0: 1, 64: 32}.

        Raises:
            ConfigError: If K < 1, the mapping does not start at 0, or a segment is no whole number of rounds.
        """
        given = local_steps if isinstance(local_steps, dict) else {0: local_steps}
        numbers: list[Any] = list(given.values())
        for k in numbers:  # text, where they come from JSON
            check_range(KEY, int(k) if isinstance(k, str) else k, "it is in steps: type 32, say", least=1)
        mapping = {int(s): int(k) for s, k in given.items()}
        segments = tuple(sorted(mapping.items()))
        if not segments or segments[0][0] != 0:
            raise ConfigError(KEY, local_steps, "a schedule starts at step 0", "for example {0: 1, 64: 32}")
        for (start, k), (end, _) in pairwise(segments):
            if (end - start) % k:
                down, up = end - (end - start) % k, end - (end - start) % k + k
                raise ConfigError(
                    KEY,
                    local_steps,
                    f"the steps {start}..{end} must be a whole number of rounds of {k} steps",
                    f"let the next part start at step {down} or {up} instead of {end}",
                )
        return cls(segments)

    def __str__(self) -> str:
        """`8`, or `1 (from step 64: 32)`."""
        (_, first), *others = self.segments
        return f"{first}" + "".join(f" (from step {start}: {k})" for start, k in others)

    def is_round_end(self, step: int, last_step: int | None = None) -> bool:
        """Whether a round ends after `step` optimizer steps have been taken (1-based count).

        Args:
            step: Optimizer steps taken so far.
            last_step: The run's planned last step; a round always ends there, so that no work is lost.
        """
        if step == last_step:
            return True
        start, k = self.segments[bisect_right([s for s, _ in self.segments], step - 1) - 1]
        return (step - start) % k == 0

    def rounds(self, steps: int) -> int:
        """Number of rounds in a run of `steps` optimizer steps."""
        return sum(self.is_round_end(step, steps) for step in range(1, steps + 1))
