"""Callbacks that observe and never steer: nothing here changes training or sends a byte to another site.

Loggers write on rank zero only, so a logged value is that of site 0 unless its name says otherwise.
"""

from fomoe_pl.callbacks.communication import CommunicationMonitor
from fomoe_pl.callbacks.progress import FoMoEProgressBar
from fomoe_pl.callbacks.report import RunReport
from fomoe_pl.callbacks.routing import RoutingHealthLogger
from fomoe_pl.callbacks.throughput import ThroughputMonitor

__all__ = ["CommunicationMonitor", "FoMoEProgressBar", "RoutingHealthLogger", "RunReport", "ThroughputMonitor"]
