"""Lightning strategies: thin shells around `fomoe_pl.federation`."""

from fomoe_pl.strategies.base import SiteStrategy
from fomoe_pl.strategies.ddp import CountedDDPStrategy
from fomoe_pl.strategies.federated import FederatedStrategy
from fomoe_pl.strategies.registry import REGISTERED, register
from fomoe_pl.strategies.single import SingleSiteStrategy

register()

__all__ = ["REGISTERED", "CountedDDPStrategy", "FederatedStrategy", "SingleSiteStrategy", "SiteStrategy"]
