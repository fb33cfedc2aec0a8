"""Spans of words of geometric length, as in SpanBERT (Joshi et al. 2020, 1907.10529, §3.1).

    python train.py --masking tests/exercises/strategies/spans.py:Spans
"""
import math

import torch
from torch.nn import functional as F

from masking import Strategy, budget, top_k, uniform

P, LONGEST = 0.2, 10  # SpanBERT's: lengths of 3.8 words on average


class Spans(Strategy):
    """Draws spans of words one after the other until the budget is spent, which cuts the last one
    short. (SpanBERT draws again where one does not fit.)"""

    def mask(self, batch, generator=None):
        maskable, continuation = batch.maskable, self.context.continuation[batch.input_ids]
        before = F.pad(maskable, (1, 0))[:, :-1]  # (B, L), is the position to the left maskable?
        first = maskable & ~(continuation & before)  # (B, L), the first piece of every word
        word = (first.cumsum(1) - 1).clamp(min=0)  # (B, L), each piece's word, by number

        # From every word a span could begin: its rank in the order of drawing, and its length,
        # which is geometric by inversion: P(length > n) = (1 − p)ⁿ.
        rank = uniform(maskable, generator)  # (B, W), W ≤ L words
        length = 1 + (1 - uniform(maskable, generator)).log() // math.log(1 - P)
        # A word is masked with the first-drawn of the spans that reach it, from up to 9 words off.
        best = rank
        for words_back in range(1, LONGEST):
            rank, length = (F.pad(x, (1, 0))[:, :-1] for x in (rank, length))
            best = torch.where(length > words_back, torch.maximum(best, rank), best)
        return top_k(best.gather(1, word), maskable, budget(maskable, self.context.rate, generator))
