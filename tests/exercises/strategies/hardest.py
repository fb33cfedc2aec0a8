"""The tokens that the model itself finds hardest: self-entropy with the loss in entropy's place.

    python train.py --masking tests/exercises/strategies/hardest.py:Hardest

Entropy says how unsure the model is; the loss says how wrong, and needs the answer for it.
"""
import torch
from torch.nn import functional as F

from masking import Strategy, budget, evaluating, top_k, uniform
from model import query_positions


class Hardest(Strategy):
    """Of twice as many candidates as are wanted, all masked, those with the highest loss."""

    def mask(self, batch, generator=None):
        model, maskable = self.context.model, batch.maskable
        k = budget(maskable, self.context.rate, generator)
        candidates = top_k(uniform(maskable, generator), maskable, 2 * k)
        input_ids = batch.input_ids.masked_fill(candidates, self.context.mask_token_id)
        queries = query_positions(candidates)
        with evaluating(model):
            hidden = model.encode(input_ids, batch.attention_mask, batch.token_type_ids,
                                  positions=queries)  # (N, H)
            losses = [F.cross_entropy(model.logits(part).float(), tokens, reduction="none")
                      for part, tokens in zip(hidden.split(1024),
                                              queries.pick(batch.input_ids).split(1024))]
        zeros = torch.zeros(maskable.shape, device=maskable.device)
        self.scores = zeros.masked_scatter(candidates, torch.cat(losses))  # (B, L)
        return top_k(self.scores, candidates, k)
