"""A masking rate that falls to half of --mask-rate, from 30 to 15% by default, as in Ankner et al.
2023 (2305.15096): much to guess at first, much to read later.

    python train.py --masking falling_rate.py:FallingRate
"""
from masking import Strategy, random_mask


class FallingRate(Strategy):
    """Random masking at rate · (1 − progress / 2)."""

    def mask(self, batch, generator=None):
        rate = self.context.rate * (1 - self.context.progress / 2)
        return random_mask(batch.maskable, rate, generator)
