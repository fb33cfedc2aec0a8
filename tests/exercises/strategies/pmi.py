"""Pairs that belong together are masked together, after PMI-masking (Levine et al. 2020,
2010.01825); there from counts of a whole corpus, here from counts taken on the way.

    python train.py --masking tests/exercises/strategies/pmi.py:PMI

PMI(x, y) = ln p(x y) / (p(x) p(y)), the pointwise mutual information of two neighbours, in nats.
"""
import torch
from torch.nn import functional as F

from masking import Strategy, whole_word_mask

SLOTS = 2 ** 20  # pairs are counted by a hash; two pairs that share a slot are both overrated
LEAST, ENOUGH = 3.0, 10  # a pair of this PMI, seen so often, is one unit


class PMI(Strategy):
    """Whole-word masking in which a piece also continues its left neighbour where the two are a
    pair of high PMI."""

    def __init__(self, context):
        super().__init__(context)
        counts = context.token_counts.double()
        self.log_p = (counts.clamp(min=1) / counts.sum()).log()  # (V,)
        self.pairs = torch.zeros(SLOTS, device=counts.device)  # how often each slot was seen
        self.new = torch.zeros_like(self.pairs)  # in this step, on this rank

    def mask(self, batch, generator=None):
        ids, left = batch.input_ids, F.pad(batch.input_ids, (1, 0))[:, :-1]  # (B, L)
        pair = batch.maskable & F.pad(batch.maskable, (1, 0))[:, :-1]  # (B, L), with the left one
        slot = (left * 1_000_003 + ids) % SLOTS
        self.new += torch.bincount(slot[pair], minlength=SLOTS)
        seen = self.pairs[slot]
        pmi = (seen / self.pairs.sum().clamp(min=1)).log() - self.log_p[left] - self.log_p[ids]
        joined = pair & (seen >= ENOUGH) & (pmi >= LEAST)
        continuation = self.context.continuation[ids] | joined
        return whole_word_mask(batch.maskable, continuation, self.context.rate, generator)

    def end_step(self, reduce=None):
        if reduce is not None:
            reduce(self.new)  # every rank ends with the same counts
        self.pairs += self.new
        self.new.zero_()

    def state_dict(self):
        return {"pairs": self.pairs}

    def load_state_dict(self, state):
        self.pairs.copy_(state["pairs"])
