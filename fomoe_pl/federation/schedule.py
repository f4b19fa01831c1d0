"""When what is averaged: rounds of K local steps, in which fragments of the model take turns."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from fomoe_pl.errors import ConfigError, check_range

KEY = "local_steps"


class Turn(NamedTuple):
    """What sites begin to average after a step.

    Attributes:
        fragment: Index of the fragment; the last one's turn ends the round.
        ends_round: Whether it is the last one's, or the run's last step, with which all fragments are averaged.
    """

    fragment: int
    ends_round: bool


@dataclass(frozen=True)
class RoundSchedule:
    """K as a function of the optimizer step, and the turns in a round.

    Attributes:
        segments: Sorted (first step, K): from that optimizer step on, rounds are K steps long.
        fragments: That take turns within a round, one after each K / fragments steps.
        delay: Optimizer steps between the beginning of an average and the step with which it is applied.
        router_every: Steps between two averages of the routers within a round; None: with their round alone.
    """

    segments: tuple[tuple[int, int], ...]
    fragments: int = 1
    delay: int = 0
    router_every: int | None = None

    @classmethod
    def parse(
        cls, local_steps: int | dict[int, int], fragments: int = 1, delay: int = 0, router_every: int | None = None
    ) -> RoundSchedule:
        """Read the settings.

        Args:
            local_steps: A number K, or a mapping {first step: K} such as {0: 1, 64: 32}.
            fragments: Number of them.
            delay: In steps.
            router_every: In steps.

        Raises:
            ConfigError: If K < 1, the mapping does not start at 0, or a segment is no whole number of rounds; if
                fragments do not divide a K, or an average would not be there when the next one begins; if the routers'
                period does not divide a K above it, or there is none.
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
        check_range("fragments", fragments, "1 is the whole model at once", least=1)
        check_range("delay", delay, "0 is waiting for each average", least=0)
        for k in (k for _, k in segments):
            if k % fragments:
                divisors = ", ".join(str(n) for n in range(1, min(k, 64) + 1) if k % n == 0)
                rule = f"must divide the {k} steps of a round (local_steps): fragments take turns at equal distances"
                raise ConfigError("fragments", fragments, rule, f"type one of {divisors}, or another local_steps")
            if delay >= k // fragments:
                rule = f"must be below {k // fragments}, the steps between two turns (local_steps / fragments): each " \
                    "average is applied before the next one begins"  # fmt: skip
                hint = f"type 0 to {k // fragments - 1}, or fewer fragments, or a larger local_steps"
                raise ConfigError("delay", delay, rule, hint)
        cls._check_routers(router_every, [k for _, k in segments])
        return cls(segments, fragments, delay, router_every)

    @staticmethod
    def _check_routers(every: int | None, numbers: list[int]) -> None:
        check_range("router_every", every, "it is in local steps: type 8, say", least=1)
        if every is None:
            return
        longest = max(numbers)
        odd = next((k for k in numbers if every < k and k % every), longest if every >= longest else None)
        if odd is not None:
            divisors = ", ".join(str(n) for n in range(1, min(odd, 64)) if odd % n == 0)
            rule = (
                f"must divide the {odd} steps of a round (local_steps), and be below them: each round averages routers"
            )
            raise ConfigError("router_every", every, rule, f"type one of {divisors}" if divisors else "leave it out")

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
        turn = self.turn(step, last_step)
        return turn is not None and turn.ends_round

    def _segment(self, step: int) -> tuple[int, int]:
        """First step and K of the part that the `step`-th step is in."""
        return self.segments[bisect_right([s for s, _ in self.segments], step - 1) - 1]

    def turn(self, step: int, last_step: int | None = None) -> Turn | None:
        """Whose turn it is after `step` optimizer steps have been taken (1-based count); None between turns.

        Args:
            step: Optimizer steps taken so far.
            last_step: The run's planned last step.
        """
        if step == last_step:
            return Turn(self.fragments - 1, True)
        start, k = self._segment(step)
        turns, between = divmod(step - start, k // self.fragments)
        if between:
            return None
        fragment = (turns - 1) % self.fragments
        return Turn(fragment, fragment == self.fragments - 1)

    def routers_due(self, step: int, last_step: int | None = None) -> bool:
        """Whether routers are averaged after `step` optimizer steps, but for those whose turn it is.

        Args:
            step: Optimizer steps taken so far.
            last_step: The run's planned last step, with which everything is averaged.
        """
        if self.router_every is None or step == last_step:
            return False
        start, k = self._segment(step)
        return self.router_every < k and (step - start) % self.router_every == 0

    def rounds(self, steps: int) -> int:
        """Number of rounds in a run of `steps` optimizer steps."""
        return sum(self.is_round_end(step, steps) for step in range(1, steps + 1))
