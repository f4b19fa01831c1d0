"""Callbacks that observe and never steer training.

Nothing here changes training, and what they tell other sites travels in the one control message of a round.
Loggers write on rank zero only, so a logged value is that of site 0 unless its name says otherwise.
"""

from fomoe_pl.callbacks.average import GlobalEMA
from fomoe_pl.callbacks.communication import CommunicationMonitor
from fomoe_pl.callbacks.pictures import RunPictures
from fomoe_pl.callbacks.progress import FoMoEProgressBar
from fomoe_pl.callbacks.report import RunReport
from fomoe_pl.callbacks.stability import RoutingStability
from fomoe_pl.callbacks.throughput import ThroughputMonitor

__all__ = [
    "CommunicationMonitor", "FoMoEProgressBar", "GlobalEMA", "RoutingStability", "RunPictures", "RunReport",
    "ThroughputMonitor",
]  # fmt: skip
