"""A statistic of the routing that a user declares once: message, curve and chart follow from it.

Shapes: T tokens, K picks of a token.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Statistic(ABC):
    """A number of each token at each layer; its mean over all sites' training tokens of a round is logged.

    Attributes:
        name: A Python identifier; the curves are `statistic/<name>/mean` and `statistic/<name>/layer_<ii>`.
        unit: Of the number, for the chart.
    """

    name: ClassVar[str]
    unit: ClassVar[str]

    @abstractmethod
    def of_tokens(self, picks_TK: Tensor, gates_TK: Tensor, live_TK: Tensor) -> Tensor:
        """Return the number of each token (T,), of any number type, on the same device.

        It is called in training steps, which may be recorded as a CUDA graph: it must not read values on the host, and
        the shapes of what it makes must not depend on them.

        Args:
            picks_TK: Expert ids of a token's picks, int64.
            gates_TK: Their gates, float32.
            live_TK: bool, whether the expert of a pick is resident on this site.
        """
