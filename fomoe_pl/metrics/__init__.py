"""Metrics of one rank whose sums the strategy reduces itself, in one counted collective."""

from fomoe_pl.metrics.language import LanguageModelMetric
from fomoe_pl.metrics.routing import RoutingHealth

__all__ = ["LanguageModelMetric", "RoutingHealth"]
