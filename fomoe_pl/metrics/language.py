"""Loss, perplexity and bits per byte, in total and by domain."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_pl.metrics.flat import FlatSumMetric
from fomoe_pl.model.losses import IGNORED


class LanguageModelMetric(FlatSumMetric):
    """Loss (nats a token), perplexity and bits per byte (of the text itself, so independent of the tokenizer).

    Totals are over all tokens, not means of the domains. A domain that has no token yet is NaN, so that every rank
    always returns the same keys.

    Args:
        domains: Names of the domains; a batch's `domain` indexes into them.
    """

    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, domains: Sequence[str]) -> None:
        super().__init__()
        self.domains = tuple(domains)
        for name in ("nats", "tokens", "bytes"):
            self.add_sum(name, (len(self.domains),))

    def update(self, token_losses_BS: Tensor, targets_BS: Tensor, domain_B: Tensor, bytes_BS: Tensor) -> None:
        """Add one batch.

        Args:
            token_losses_BS: Cross entropy of each position in nats, float32, 0 where the target is ignored.
            targets_BS: Token ids, int64, -100 = ignored.
            domain_B: Index of each sequence's domain, int64.
            bytes_BS: Bytes of text that each target stands for, counted when the text was encoded; 0 where ignored.
        """
        counted_BS = targets_BS != IGNORED
        # A product with the one-hot domains and no index_add_: on CUDA its order of summation varies from run to run.
        of_domain_BN = F.one_hot(domain_B, len(self.domains)).double()
        self.nats = self.nats + token_losses_BS.double().sum(dim=1) @ of_domain_BN
        self.tokens = self.tokens + counted_BS.double().sum(dim=1) @ of_domain_BN
        self.bytes = self.bytes + bytes_BS.double().sum(dim=1) @ of_domain_BN

    def compute(self) -> dict[str, Tensor]:
        """Return `loss`, `perplexity`, `bits_per_byte`, then `loss/<domain>` and `bits_per_byte/<domain>`.

        Every value is a 0-dim float64 tensor.
        """
        loss = self.nats.sum() / self.tokens.sum()
        values = {
            "loss": loss,
            "perplexity": torch.exp(loss),
            "bits_per_byte": self.nats.sum() / (self.bytes.sum() * math.log(2)),
        }
        loss_N = self.nats / self.tokens
        bits_per_byte_N = self.nats / (self.bytes * math.log(2))
        for index, domain in enumerate(self.domains):
            values[f"loss/{domain}"] = loss_N[index]
            values[f"bits_per_byte/{domain}"] = bits_per_byte_N[index]
        return values
