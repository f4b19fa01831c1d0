"""Metrics of one rank whose sums the strategy reduces itself, in one counted collective."""

from fomoe_pl.metrics.language import LanguageModelMetric
from fomoe_pl.metrics.routing import RoutingHealth
from fomoe_pl.metrics.specialisation import DomainLoad
from fomoe_pl.metrics.validation import ValidationMetrics
from fomoe_pl.model.statistic import Statistic

__all__ = ["DomainLoad", "LanguageModelMetric", "RoutingHealth", "Statistic", "ValidationMetrics"]
