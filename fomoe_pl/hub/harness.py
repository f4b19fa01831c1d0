"""Models of this project for lm-evaluation-harness: checkpoints, exports, and a run's model while it is trained.

`FomoeLM` is also in the entry-point group `lm_eval.models`, for versions whose own command line reads it.

Shapes: B sequences of a batch, S positions, D model, N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from fomoe_pl.hub.loading import Loaded, load

LOGITS_BYTES = 256 * 2**20
"""Upper bound of one chunk of float32 logits."""


class Scored(NamedTuple):
    """A sequence whose last tokens are scored: `ids[:-1]` is the input, the last `n` of `ids[1:]` count."""

    ids: list[int]
    n: int


class Score(NamedTuple):
    """Log-likelihood in nats of the scored tokens, and whether each of them is the most likely one."""

    nats: float
    greedy: bool


def batches_by_length(sequences: Sequence[Scored], batch_size: int) -> list[list[int]]:
    """Return indices of sequences of similar length, the longest first: what does not fit into memory fails early."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def padded(sequences: Sequence[Scored], device: torch.device) -> Tensor:
    """Return the inputs of a batch, int64 (B,S), filled up on the right: what comes later changes nothing before it."""
    length = max(len(sequence.ids) - 1 for sequence in sequences)
    rows = [sequence.ids[:-1] + [0] * (length - len(sequence.ids) + 1) for sequence in sequences]
    return torch.tensor(rows, device=device)


@torch.no_grad()
def scores(sequences: Sequence[Scored], hidden_BSD: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Iterator[Score]:
    """Score a batch; logits are made for scored positions alone, in chunks.

    Args:
        sequences: The batch.
        hidden_BSD: Final hidden states of `padded`.
        logits_of: Turns hidden states (N,D) into logits (N,V).
    """
    for sequence, hidden_SD in zip(sequences, hidden_BSD, strict=True):
        end = len(sequence.ids) - 1
        hidden_ND = hidden_SD[end - sequence.n : end]
        targets_N = torch.tensor(sequence.ids[-sequence.n :], device=hidden_ND.device)
        nats, greedy = 0.0, True
        rows = max(1, LOGITS_BYTES // (4 * logits_of(hidden_ND[:1]).shape[-1]))
        for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
            log_p_CV = logits_of(hidden_CD).log_softmax(dim=-1, dtype=torch.float32)
            nats += float(log_p_CV.gather(1, targets_C[:, None]).double().sum())
            greedy = greedy and bool((log_p_CV.argmax(dim=-1) == targets_C).all())
        yield Score(nats, greedy)


class HarnessLM(TemplateLM):
    """What the harness asks of a model, on top of scores of token sequences.

    Args:
        encode: Turns a text into token ids.
        eod_id: Token that ends a document; a text without context begins after it, as in training.
        max_length: Longest input, tokens.
    """

    def __init__(self, encode: Callable[[str], list[int]], eod_id: int, max_length: int) -> None:
        super().__init__()
        self._encode, self._eod_id, self.max_length = encode, eod_id, max_length

    def score(self, sequences: Sequence[Scored]) -> list[Score]:
        """Score all sequences, in their order."""
        raise NotImplementedError

    @property
    def eot_token_id(self) -> int:
        """End of document."""
        return self._eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, nothing added."""
        return self._encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations of contexts, nats, and whether each is what greedy decoding gives."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        sequences = [
            Scored((context + continuation)[-(self.max_length + 1) :], min(len(continuation), self.max_length))
            for _, context, continuation in requests
        ]
        return [(found.nats, found.greedy) for found in self.score(sequences)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, nats; longer ones in windows, each token once."""
        sequences, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self._eod_id, self.max_length, 1):
                context, continuation = make_disjoint_window(pair)
                sequences.append(Scored(context + continuation, len(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, self.score(sequences), strict=True):
            totals[owner] += found.nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts until a stop string."""
        raise NotImplementedError(f"{type(self).__name__} scores texts, and makes none")


class FomoeLM(HarnessLM):
    """A checkpoint without conversion, an export, or either as one site of its run sees it.

    Args:
        pretrained: Folder, or what `load` has returned.
        batch_size: Sequences that are scored together.
        site: As of `load`.
        data: As of `load`.
        device: As of `load`.
        dtype: As of `load`.
        max_length: Longest input, tokens; None is that of a training sequence.
        **kwargs: Of the harness, not used.
    """

    def __init__(
        self,
        pretrained: str | Loaded,
        batch_size: int | str | None = 16,
        site: int | None = None,
        data: str | None = None,
        device: Any = "auto",
        dtype: Any = "float32",
        max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(pretrained, Loaded):
            pretrained = load(
                pretrained, site=site, data=data, device=device or "auto", dtype=dtype, command="evaluate"
            )
        self.loaded = pretrained
        super().__init__(pretrained.encode, pretrained.eod_id, max_length or pretrained.max_length)
        self.batch_size = int(batch_size or 16)

    def score(self, sequences: Sequence[Scored]) -> list[Score]:
        """Score all sequences, in their order, in batches of similar length."""
        model = self.loaded.model
        found: dict[int, Score] = {}
        batches = batches_by_length(sequences, self.batch_size)
        for batch in tqdm(batches, desc="Scoring", disable=None, leave=False):
            chosen = [sequences[i] for i in batch]
            with torch.no_grad():
                hidden_BSD = model.base_model(padded(chosen, model.device), use_cache=False).last_hidden_state
            found |= dict(zip(batch, scores(chosen, hidden_BSD, model.get_output_embeddings()), strict=True))
        return [found[i] for i in range(len(sequences))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a stop string, an end of document, or `max_gen_toks` tokens.

        The key-value cache is transformers'. Contexts that are too long lose their beginning.
        """
        texts: dict[int, str] = {}
        contexts = [self.tok_encode(request.args[0]) or [self._eod_id] for request in requests]
        # Sampling may differ between requests, so only those with the same settings go together.
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for members in groups.values():
            settings = dict(requests[members[0]].args[1])
            members.sort(key=lambda i: -len(contexts[i]))
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                made = self._generate([contexts[i] for i in batch], dict(settings))
                texts |= dict(zip(batch, made, strict=True))
        return [texts[i] for i in range(len(requests))]

    def _generate(self, contexts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        new = int(settings.pop("max_gen_toks", 256))
        if float(settings.get("temperature", 0.0)) == 0.0:
            settings.pop("temperature", None)
        settings.setdefault("do_sample", "temperature" in settings)
        kept = max(1, self.max_length - new)
        contexts = [context[-kept:] for context in contexts]
        length = max(map(len, contexts))
        device = self.loaded.model.device
        ids_BS = torch.tensor([[self._eod_id] * (length - len(c)) + c for c in contexts], device=device)
        mask_BS = torch.tensor([[0] * (length - len(c)) + [1] * len(c) for c in contexts], device=device)
        if until:
            settings |= {"stop_strings": until, "tokenizer": self.loaded.tokenizer}
        with torch.no_grad():
            made = self.loaded.model.generate(
                ids_BS, attention_mask=mask_BS, max_new_tokens=new, eos_token_id=self._eod_id,
                pad_token_id=self._eod_id, **settings,
            )  # fmt: skip
        texts = self.loaded.tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
        return [_cut(text, until) for text in texts]


def _cut(text: str, until: Sequence[str]) -> str:
    return text[: min([text.find(stop) for stop in until if stop in text], default=len(text))]


try:  # for `lm_eval --model fomoe` in a process that has imported this module
    from lm_eval.api.registry import register_model

    register_model("fomoe")(FomoeLM)
except ValueError:  # an entry point has registered it already
    pass
