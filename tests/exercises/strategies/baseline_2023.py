"""The random baseline of a comparison of masking strategies, as its code of 2023 draws it.

    python train.py --masking baseline_2023.py:Baseline
"""
import torch

from masking import Strategy, uniform


class Baseline(Strategy):
    """Each maskable token is masked with the probability `rate`, and no other."""

    def mask(self, batch, generator=None):
        probability = torch.full(batch.input_ids.shape, self.context.rate)
        probability = probability.to(batch.input_ids.device)
        probability[~batch.maskable] = 0
        draws = uniform(probability, generator)
        if batch.attention_mask is not None:
            draws[~batch.attention_mask.bool()] = 1
        return draws < self.context.rate
