"""Which tokens should a masked language model have to guess? Five answers and a control.

A strategy decides which tokens of a text are masked. How many are masked, the budget, is the same
for every strategy, so that comparing strategies never means comparing masking rates.

    random        uniformly                                         BERT (Devlin et al. 2018) §3.1
    whole-word    words uniformly, all pieces of a word together    BERT's whole-word models, 2019
    entropy       where a frozen teacher is most uncertain (half)   [E], external reference model
    self-entropy  where the model in training is most uncertain     [E], self-masking
    typhoon       each token at a rate that follows a gradient      [T]
    rarity        the rarest word pieces                            ours, a control for [E]

[E] Srinivasagan et al., Entropy-aware Masking for Masked Language Modeling, arXiv 2605.28526.
[T] Abdurrahman et al., Typhoon: Towards an Effective Task-Specific Masking Strategy, 2303.15619.

The ideas come first, as functions of tensors; then the strategies as the training loop sees them, a
class each; last a demo, which shows them all at work on a text:

    python masking.py "Some text of yours" --svg picture.svg

Shapes: B batch, L tokens, H hidden, V vocabulary, N chosen positions. `maskable` (B, L) bool is
True on ordinary tokens, False on special ones and padding. What draws at random takes a generator:
one on the tensors' device, one on the CPU (the draws are then the same on every device), or None
for PyTorch's global one.
"""
import argparse
import functools
import html
import itertools
import math
import runpy
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from model import (SPECIAL_TOKENS, InputError, Parser, load_pretrained, number, query_positions,
                   read_json, run_cli, write_atomic)

Generator = torch.Generator | None

# --- the budget -----------------------------------------------------------------------------------

def uniform(like: Tensor, generator: Generator = None) -> Tensor:
    """Returns independent draws from U[0, 1), in the shape and on the device of `like`."""
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, device=device, generator=generator).to(like.device)


def budget(maskable: Tensor, rate: float, generator: Generator = None) -> Tensor:
    """Returns how many tokens to mask in each row: rate · count, rounded up or down at random.

    Rounding to the nearest integer, or to at least one, would mask more than the rate where texts
    are short. Rounded at random, k is right on average for texts of any length, and may be 0.

    maskable (B, L) bool; rate is a fraction in (0, 1), 0.15 in BERT §3.1. Returns k (B,) long.

    >>> ten_tokens_each = torch.ones(4000, 10, dtype=torch.bool)
    >>> k = budget(ten_tokens_each, 0.15, torch.Generator().manual_seed(0))
    >>> sorted(set(k.tolist())), round(k.float().mean().item(), 1)
    ([1, 2], 1.5)
    """
    expected = rate * maskable.sum(1)  # (B,)
    low = expected.floor()
    up = uniform(expected, generator) < expected - low  # at 1.5, up in half of the rows
    return (low + up).long()


def top_k(scores: Tensor, maskable: Tensor, k: Tensor) -> Tensor:
    """Returns a mask on the k[b] highest-scoring maskable positions of each row b.

    Where a row has fewer, all of them. scores (B, L), maskable (B, L) bool, k (B,) -> (B, L)."""
    # torch.topk takes one k for all rows, so every row is sorted and its first k[b] ranks are kept.
    # The sort is stable: of equal scores the left one comes first, on every device.
    # A maskable score of −inf is raised, so that it still comes before what is not maskable.
    scores = scores.float().clamp(min=torch.finfo().min).masked_fill(~maskable, -math.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)  # (B, L), positions by rank
    chosen = torch.arange(scores.shape[1], device=scores.device) < k[:, None]  # (B, L), by rank
    return torch.zeros_like(maskable).scatter(1, order, chosen) & maskable  # (B, L), by position


# --- random and whole-word ------------------------------------------------------------------------

def random_mask(maskable: Tensor, rate: float, generator: Generator = None) -> Tensor:
    """Returns a mask on k positions of each row, drawn uniformly without replacement (BERT §3.1).

    (B, L) bool -> (B, L) bool."""
    k = budget(maskable, rate, generator)
    return top_k(uniform(maskable, generator), maskable, k)


def whole_word_mask(maskable: Tensor, continuation: Tensor, rate: float,
                    generator: Generator = None) -> Tensor:
    """Returns a mask on whole words, drawn uniformly without replacement (BERT 2019; [T]).

    Filling a budget of *pieces* word by word would favour short words, which fit, or long words,
    which overshoot. So the budget counts words: each word of a row is equally likely, and the share
    of masked pieces is the rate on average.

    continuation (B, L) bool is True on "##" pieces; a piece with no maskable piece before it begins
    a word all the same. Returns (B, L) bool.

    >>> continuation = torch.tensor([[False, True, False]]).repeat(100, 1)  # tele ##phone rang
    >>> every = torch.ones_like(continuation)
    >>> mask = whole_word_mask(every, continuation, 0.5, torch.Generator().manual_seed(0))
    >>> sorted(set(map(tuple, mask.int().tolist())))
    [(0, 0, 1), (1, 1, 0)]
    """
    before = F.pad(maskable, (1, 0))[:, :-1]  # (B, L), is the position to the left maskable?
    start = maskable & ~(continuation & before)  # (B, L), the first piece of every word
    drawn = random_mask(start, rate, generator)  # (B, L), the first pieces of the drawn words
    column = torch.arange(start.shape[1], device=start.device)
    # The running maximum carries the column of a word's first piece on to its other pieces.
    first = torch.where(start, column, 0).cummax(1).values  # (B, L)
    return drawn.gather(1, first) & maskable


# --- entropy --------------------------------------------------------------------------------------

def token_entropy(logits: Tensor) -> Tensor:
    """Returns H = −Σ_v p(v) ln p(v) of p = softmax(logits), in nats ([E]'s score).

    0 where the model is sure, ln V where all word pieces are equally likely. (..., V) -> (...)."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)  # entr(p) = −p ln p, and 0 at 0


SELECTS = ("high", "middle", "low", "mixed", "sample")


def entropy_mask(entropy: Tensor, maskable: Tensor, rate: float, select: str = "high",
                 generator: Generator = None) -> Tensor:
    """Returns a mask that spends the budget by entropy ([E]).

    select: `high`, the k most uncertain positions; `low`, the k least; `middle`, the k nearest the
    median entropy of the row; `mixed`, half of k the most uncertain, half uniformly from the rest;
    `sample`, k without replacement with probability proportional to H.

    entropy (B, L) in nats, maskable (B, L) bool -> (B, L) bool.

    >>> entropy, every = torch.tensor([[0.1, 2.0, 0.5, 3.0]]), torch.ones(1, 4, dtype=torch.bool)
    >>> entropy_mask(entropy, every, 0.5, "high").int().tolist()
    [[0, 1, 0, 1]]
    """
    k = budget(maskable, rate, generator)
    return select_positions(entropy, maskable, k, select, generator)


def select_positions(scores: Tensor, maskable: Tensor, k: Tensor, select: str,
                     generator: Generator = None) -> Tensor:
    """Returns `entropy_mask` for a given budget k (B,). Raises ValueError on another `select`."""
    # With a frozen teacher `high`, `low` and `middle` choose the same positions every epoch, but
    # for the rounding of k (static masking, RoBERTa §4.1). `mixed` and `sample` vary.
    scores = scores.float()
    if select == "high":
        return top_k(scores, maskable, k)
    if select == "low":
        return top_k(-scores, maskable, k)
    if select == "middle":
        known = scores.masked_fill(~maskable, math.nan)
        median = known.nanquantile(0.5, dim=1, keepdim=True)  # (B, 1)
        return top_k(-(scores - median).abs(), maskable, k)
    if select == "mixed":
        # A small model that must guess only the most uncertain tokens never learns the common ones.
        coin = uniform(k, generator) < 0.5  # an odd k leaves one over: it goes to either half
        high = top_k(scores, maskable, (k + coin) // 2)
        return high | top_k(uniform(scores, generator), maskable & ~high, k - high.sum(1))
    if select == "sample":
        # The Gumbel trick: −ln(−ln U) is Gumbel noise, and the k largest of ln H + noise are
        # distributed like k draws one after another, each in proportion to H among what is left.
        tiny = 1e-20  # where a draw or an entropy is 0, the logarithm stays finite
        noise = -(-uniform(scores, generator).clamp(min=tiny).log()).log()
        return top_k(scores.clamp(min=tiny).log() + noise, maskable, k)
    raise ValueError(f"unknown select {select!r}: choose from {', '.join(SELECTS)}")


@contextmanager
def evaluating(model):
    """Puts a model into evaluation mode without gradients; restores each module's own mode."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True


def position_entropy(model, batch: "Batch", input_ids: Tensor, mask: Tensor,
                     chunk_bytes: int = 2 ** 26) -> Tensor:
    """Returns the model's entropy where the mask is True when it reads input_ids, in nats, else 0.

    input_ids (B, L), mask (B, L) bool -> (B, L). The model's mode, gradients and random state stay
    as they are. chunk_bytes: how many bytes of logits are held at a time."""
    with evaluating(model):
        hidden = model.encode(input_ids, batch.attention_mask, batch.token_type_ids,
                              positions=query_positions(mask))  # (N, H)
        # In chunks: with BERT's vocabulary the logits of 4,096 tokens would fill half a gigabyte.
        # A chunk of 64 MiB keeps a GPU busy for longer than it takes to launch the next one.
        rows = max(1, chunk_bytes // (4 * model.config.vocab_size))  # 4 bytes a logit
        entropies = [token_entropy(model.logits(part)) for part in hidden.split(rows)]
    entropy = torch.zeros(mask.shape, device=mask.device)
    return entropy.masked_scatter(mask, torch.cat(entropies))  # (B, L)


def masked_entropy(model, batch: "Batch", rate: float, mask_token_id: int,
                   generator: Generator = None) -> Tensor:
    """Returns the entropy of every maskable position while its token is hidden from the model.

    Hidden is our reading of [E]: where the token is seen, entropy says mostly how rare it is.
    Each row's positions are dealt at random into ⌈1/rate⌉ groups, which are masked one after
    another, in as many passes. Returns (B, L) in nats, 0 where nothing is maskable."""
    groups = math.ceil(1 / rate)
    # As cards are dealt: the maskable positions in a random order, one to each group in turn.
    draws = uniform(batch.maskable, generator).masked_fill(~batch.maskable, 2)  # 2: behind U[0, 1)
    order = draws.argsort(dim=1, stable=True)  # (B, L), the position at each place of the order
    place = order.argsort(dim=1)  # (B, L), the place of each position: sorting inverts an order
    entropy = torch.zeros(place.shape, device=place.device)
    for group in range(groups):
        mask = (place % groups == group) & batch.maskable
        masked_ids = batch.input_ids.masked_fill(mask, mask_token_id)
        entropy += position_entropy(model, batch, masked_ids, mask)
    return entropy


# --- Typhoon --------------------------------------------------------------------------------------

def embedding_saliency(embedding_grad: Tensor, embedding_weight: Tensor,
                       token_ids: Tensor) -> Tensor:
    """Returns ∂L/∂onehot(x_i)[v] at v = token_ids_i: how the loss changes with that one-hot entry.

    x_i is what the model read at position i, token_ids_i the original token there. The embedding is
    e_i = onehot(x_i) W, so the derivative is ⟨∂L/∂e_i, W_v⟩ ([T]): one dot product for each token,
    without a (B, L, V) one-hot tensor.
    embedding_grad (B, L, H), embedding_weight (V, H), token_ids (B, L) -> (B, L)."""
    embeddings = F.embedding(token_ids, embedding_weight.detach())  # (B, L, H)
    return (embedding_grad.float() * embeddings).sum(-1)  # in float32, also under bf16


class Typhoon:
    """[T]: a masking rate for each token type, from a moving average of its gradient saliency.

    token_counts (V,): how often each type stands at a maskable position of the corpus; rate: the
    budget, a fraction; spread σ < 1: the lowest rate is (1 − σ) times the highest, as long as
    none is cut to 1; ema_weight β: the weight of the *new* value in the average."""

    def __init__(self, token_counts: Tensor, rate: float, spread: float = 0.4,
                 ema_weight: float = 0.8):
        exact = torch.float32 if token_counts.device.type == "mps" else torch.float64  # MPS: no 64
        self.rate, self.spread, self.ema_weight = rate, spread, ema_weight
        self.frequency = token_counts.to(exact) / token_counts.sum()  # f, (V,)
        self.weight = torch.zeros_like(self.frequency)  # w, (V,)
        self.seen = torch.zeros_like(token_counts, dtype=torch.bool)  # (V,)
        # Row 0 sums saliencies, row 1 counts tokens; columns: V types visible, then V types masked.
        self.totals = self.weight.new_zeros(2, 2 * len(token_counts))

    def accumulate(self, original_ids: Tensor, dot: Tensor, maskable: Tensor,
                   masked: Tensor | None = None):
        """Adds a batch to the sums of the current step.

        original_ids (B, L): the text before corruption; dot (B, L): `embedding_saliency` at those
        ids; maskable (B, L) bool; masked (B, L) bool: True where the model did not see the token,
        None if it saw all."""
        V = len(self.weight)
        masked = torch.zeros_like(maskable) if masked is None else masked
        # dot is the slope of the loss along the token's one-hot entry. That entry is 1 where the
        # token is visible and 0 where it is masked. To flip it, 1 → 0 or 0 → 1, changes the loss by
        # −dot or +dot, to first order. This is the saliency s ([T]): how far the loss would rise.
        # So the two have opposite signs: a token that helps the model has s > 0 where visible, for
        # without it the loss would rise, and s < 0 where masked, for with it the loss would fall.
        s = torch.where(masked, dot, -dot).to(self.totals.dtype) * maskable  # (B, L)
        # One index_add_ in place of a loop over types: a visible token of type v adds itself to
        # column v, a masked one to column V + v; tokens that are not maskable add zeros.
        column = (original_ids + V * masked).flatten()  # (B·L,)
        self.totals.index_add_(1, column, torch.stack([s, maskable.to(s.dtype)]).flatten(1))

    def step(self, reduce: Callable[[Tensor], object] | None = None):
        """Ends a step: w ← (1 − β) w + β s for each type that occurred; its first s sets its w.

        s is the mean over a type's visible tokens plus the mean over its masked ones. `reduce` sums
        a tensor in place over data-parallel ranks. It gets sums and counts, not means: then every
        rank ends with the mean over the whole batch, as a single process would."""
        if reduce is not None:
            reduce(self.totals)
        sums, counts = self.totals.unflatten(1, (2, -1))  # (2, V) each: visible, masked
        s = (sums / counts.clamp(min=1)).sum(0)  # (V,)
        occurred = counts.sum(0) > 0
        average = (1 - self.ema_weight) * self.weight + self.ema_weight * s
        new = torch.where(self.seen, average, s)
        self.weight = torch.where(occurred, new, self.weight)
        self.seen = self.seen | occurred
        self.totals.zero_()

    def rates(self) -> Tensor:
        """Returns r(v) = min(1, c u(v)), the masking rate of each type, (V,) fractions.

        u(v) = 1 − σ + σ ŵ(v), where ŵ is w scaled to [0, 1] over the types seen, and 1 for a type
        not seen yet. c makes the expected rate over the corpus, Σ f(v) r(v), the budget.

        >>> typhoon = Typhoon(torch.tensor([50, 40, 10]), rate=0.4, spread=0.5)
        >>> every = torch.ones(1, 2, dtype=torch.bool)
        >>> typhoon.accumulate(torch.tensor([[0, 1]]), torch.tensor([[-2.0, 3.0]]), every)
        >>> typhoon.step()
        >>> [round(r, 2) for r in typhoon.rates().tolist()]  # 0.5·0.5 + 0.4·0.25 + 0.1·0.5 = 0.4
        [0.5, 0.25, 0.5]
        """
        low = self.weight.masked_fill(~self.seen, math.inf).min()
        high = self.weight.masked_fill(~self.seen, -math.inf).max()
        # With fewer than two different weights there is nothing to scale: ŵ is 1 for every type.
        scalable = self.seen & (high > low)
        scaled = torch.where(scalable, (self.weight - low) / (high - low), 1)  # ŵ, (V,)
        u = 1 - self.spread + self.spread * scaled  # (V,), in [1 − σ, 1]

        # Without the cap at 1, Σ f c u = rate gives c = rate / Σ f u. With it, the types of the
        # highest u have the rate 1, and the others must give the rest of the budget. If m types are
        # capped, these give Σ_capped f, the others c Σ_others f u. Both together are the rate, so
        # c = (rate − Σ_capped f) / Σ_others f u. All m are computed at once, as entries 0 to V − 1.
        # The right one is the smallest m at which all others are within the cap: c u ≤ 1.
        falling, order = u.sort(descending=True)
        f = self.frequency[order]
        capped = f.cumsum(0) - f  # (V,), entry m: Σ f over the m types of the highest u
        others = (f * falling).flip(0).cumsum(0).flip(0)  # (V,), entry m: Σ f u over all but these
        c = (self.rate - capped) / others.clamp(min=1e-30)  # (V,)
        m = (c * falling <= 1).byte().argmax()  # the first 1: the highest u of the others fits
        # c[m] would make the program wait for a GPU to say what m is; gather does not.
        return (c.gather(0, m[None]) * u).clamp(max=1)


# --- corruption -----------------------------------------------------------------------------------

def corrupt(input_ids: Tensor, mask: Tensor, mask_token_id: int, vocab_size: int,
            split=(0.8, 0.1, 0.1), generator: Generator = None,
            special_ids=()) -> tuple[Tensor, Tensor]:
    """Returns what the model reads and what it must predict (BERT §3.1, §A.1).

    Of the masked positions a share split[0] becomes [MASK], split[1] a random token that is not
    special, and split[2] stays. Returns corrupted ids (B, L) and labels (B, L): the original token,
    and off the mask −100, which cross_entropy ignores."""
    labels = input_ids.masked_fill(~mask, -100)
    dice = uniform(mask, generator)
    corrupted = input_ids.masked_fill(mask & (dice < split[0]), mask_token_id)
    if split[1]:
        ordinary = vocab_size - len(special_ids)
        random_ids = (uniform(mask, generator) * ordinary).long()  # (B, L), 0 to ordinary − 1
        for special in sorted(special_ids):
            random_ids += random_ids >= special  # step over the special ids
        swap = mask & (dice >= split[0]) & (dice < split[0] + split[1])
        corrupted = torch.where(swap, random_ids, corrupted)
    return corrupted, labels


# --- the strategies as the training loop sees them ------------------------------------------------

@dataclass
class Batch:
    """What a strategy may look at."""
    input_ids: Tensor  # (B, L), uncorrupted
    maskable: Tensor  # (B, L) bool
    index: Tensor  # (B,) which texts of the corpus these are
    attention_mask: Tensor | None = None  # (B, L), None where nothing is padded
    token_type_ids: Tensor | None = None  # (B, L)


@dataclass
class Context:
    """What a strategy may be built from."""
    rate: float
    model: torch.nn.Module  # the model in training
    token_counts: Tensor  # (V,), over the maskable positions of the corpus
    continuation: Tensor  # (V,) bool, True for "##" pieces
    mask_token_id: int
    teacher_entropy: Tensor | None = None  # (texts, L) in nats, a frozen teacher's
    entropy_select: str | None = None  # None: the strategy's own `select`
    entropy_input: str = "masked"  # or "visible"
    spread: float = 0.4
    ema_weight: float = 0.8
    progress: float = 0.0  # the fraction of the run that is done; the trainer sets it every step


class Strategy:
    """One way to choose. A new strategy is a class with a `mask` method; the rest is optional."""
    needs_teacher = False  # reads context.teacher_entropy
    wants_gradient = False  # `observe` wants to be called
    select = "high"  # as in `entropy_mask`, unless the user says otherwise
    scores: Tensor | None = None  # (B, L) by which the last `mask` decided, NaN where it had none

    def __init__(self, context: Context):
        self.context = context
        self.select = context.entropy_select or self.select

    def mask(self, batch: Batch, generator: Generator = None) -> Tensor:
        """Returns (B, L) bool, True on the tokens to guess."""
        raise NotImplementedError

    def observe(self, batch: Batch, unseen: Tensor | None, embedding_grad: Tensor):
        """Is called after a backward pass. unseen (B, L) bool: True where the model did not see the
        token itself, None if it saw all; embedding_grad (B, L, H): with respect to the word
        embeddings that went in."""

    def end_step(self, reduce: Callable[[Tensor], object] | None = None):
        """Is called after an optimizer step; `reduce` sums a tensor over data-parallel ranks."""

    def state_dict(self) -> dict:
        """Returns everything that a resumed run needs: tensors, numbers, text, lists, dicts."""
        return {}

    def load_state_dict(self, state: dict):
        """Takes what `state_dict` gave."""


class Random(Strategy):
    """`random_mask`."""
    def mask(self, batch, generator=None):
        return random_mask(batch.maskable, self.context.rate, generator)


class WholeWord(Strategy):
    """`whole_word_mask`."""
    def mask(self, batch, generator=None):
        continuation = self.context.continuation[batch.input_ids]  # (B, L)
        return whole_word_mask(batch.maskable, continuation, self.context.rate, generator)


class Entropy(Strategy):
    """`entropy_mask` by a frozen teacher's entropies, which never change and are looked up.
    `mixed`: half of the budget goes by entropy, the other half at random."""
    needs_teacher = True
    select = "mixed"

    def mask(self, batch, generator=None):
        entropy = self.context.teacher_entropy[batch.index]  # (B, longest text)
        self.scores = entropy[:, :batch.maskable.shape[1]]  # (B, L), a batch may be cut shorter
        return entropy_mask(self.scores, batch.maskable, self.context.rate, self.select, generator)


class SelfEntropy(Strategy):
    """`entropy_mask` by the entropies of the model in training, as it is now.

    With entropy_input "masked": 2k candidates are drawn uniformly and all masked; one pass, with
    the head on the candidates alone; k of them are selected. With "visible": one pass over the text
    as it is, with the head on every position."""
    def mask(self, batch, generator=None):
        context = self.context
        k = budget(batch.maskable, context.rate, generator)
        candidates, input_ids = batch.maskable, batch.input_ids
        if context.entropy_input == "masked":
            candidates = top_k(uniform(batch.maskable, generator), batch.maskable, 2 * k)
            input_ids = input_ids.masked_fill(candidates, context.mask_token_id)
        entropy = position_entropy(context.model, batch, input_ids, candidates)
        self.scores = entropy.masked_fill(~candidates, math.nan)
        return select_positions(entropy, candidates, k, self.select, generator)


class TyphoonStrategy(Strategy):
    """`Typhoon`, fed with the gradient of the training loss: the MLM loss, as in [T]'s public code
    of 2023, and the distillation term where there is one."""
    wants_gradient = True

    def __init__(self, context):
        super().__init__(context)
        self.typhoon = Typhoon(context.token_counts, context.rate, context.spread,
                               context.ema_weight)

    def mask(self, batch, generator=None):
        self.scores = self.typhoon.rates()[batch.input_ids]  # (B, L): each token at its type's rate
        return (uniform(batch.maskable, generator) < self.scores) & batch.maskable

    def observe(self, batch, unseen, embedding_grad):
        weight = self.context.model.bert.embeddings.word_embeddings.weight
        dot = embedding_saliency(embedding_grad, weight, batch.input_ids)
        self.typhoon.accumulate(batch.input_ids, dot, batch.maskable, unseen)

    def end_step(self, reduce=None):
        self.typhoon.step(reduce)

    def state_dict(self):
        return {"weight": self.typhoon.weight, "seen": self.typhoon.seen}

    def load_state_dict(self, state):
        self.typhoon.weight.copy_(state["weight"])
        self.typhoon.seen.copy_(state["seen"])


class Rarity(Strategy):
    """`entropy_mask` by rarity, −ln f of a token's frequency f in the corpus, in nats.

    The control for [E] (ours), so it selects as `Entropy` does: where entropy masking does no
    better than rarity masking, entropy only found the rare words. A type that never occurs is as
    rare as one that occurs once."""
    select = Entropy.select

    def __init__(self, context):
        super().__init__(context)
        counts = context.token_counts
        self.rarity = -(counts.clamp(min=1) / counts.sum()).log()  # (V,)

    def mask(self, batch, generator=None):
        self.scores = self.rarity[batch.input_ids]  # (B, L)
        return entropy_mask(self.scores, batch.maskable, self.context.rate, self.select, generator)


STRATEGIES: dict[str, type[Strategy]] = {
    "random": Random, "whole-word": WholeWord, "entropy": Entropy, "self-entropy": SelfEntropy,
    "typhoon": TyphoonStrategy, "rarity": Rarity,
}


# --- a strategy by its name -----------------------------------------------------------------------

# Once a process, so that a class stays the same one however often it is asked for.
load_file = functools.cache(runpy.run_path)


def find_strategy(name: str) -> type[Strategy]:
    """Returns the class for a name of STRATEGIES, or for FILE.py:CLASS, a file of the user's own.

    Raises argparse.ArgumentTypeError: one line that says what is wrong."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    file, _, class_name = name.rpartition(":")
    if not file.endswith(".py"):
        raise argparse.ArgumentTypeError(
            f"{name!r} is unknown: choose from {', '.join(STRATEGIES)}, or give FILE.py:CLASS")
    try:
        found = load_file(str(Path(file).resolve())).get(class_name)
    except (Exception, SystemExit) as error:  # the user's file can raise anything
        raise argparse.ArgumentTypeError(f"{file} cannot be imported: {error!r}") from None
    is_strategy = isinstance(found, type) and issubclass(found, Strategy)
    if not is_strategy or found.mask is Strategy.mask:
        raise argparse.ArgumentTypeError(
            f"{file} has no class {class_name} that derives from masking.Strategy and has a `mask`")
    return found


def strategy_name(name: str) -> str:
    """An argparse type: a name that `find_strategy` knows."""
    find_strategy(name)
    return name


def strategy_label(name: str) -> str:
    """Returns a strategy's name in files and reports: its name, or the class of FILE.py:CLASS."""
    return name.rpartition(":")[2]


# --- the demo -------------------------------------------------------------------------------------

def demo(text: str, model, tokenizer, teacher, rate: float, seed: int,
         names: list[str]) -> tuple[list[str], dict[str, list[tuple[bool, float]]]]:
    """Returns the L word pieces of a text, and by each strategy's label L cells: is the piece
    masked, and the score by which this was decided, NaN where there is none.

    Raises InputError where the text has no word to mask."""
    encoding, most = tokenizer.encode(text), model.config.max_position_embeddings
    ids, pieces = encoding.ids[:most], encoding.tokens[:most]
    maskable = torch.tensor([[piece not in SPECIAL_TOKENS for piece in pieces]])  # (1, L)
    if not maskable.any():
        raise InputError("the text has no word to mask: give a sentence")
    batch = Batch(torch.tensor([ids]), maskable, index=torch.tensor([0]))
    mask_id, generator = tokenizer.token_to_id("[MASK]"), torch.Generator().manual_seed(seed)
    # The corpus is not at hand, but where it sees no word a masked LM guesses by frequency.
    with evaluating(model):
        logits = model(batch.input_ids.masked_fill(maskable, mask_id))[maskable]  # (N, V)
    token_counts = 1e6 * logits.softmax(-1).mean(0)  # (V,), among a million tokens
    continuation = torch.zeros(len(token_counts), dtype=torch.bool)  # (V,), for this text's types
    prefix = tokenizer.model.continuing_subword_prefix  # "##" in BERT's own
    continuation[ids] = torch.tensor([piece.startswith(prefix) for piece in pieces])
    entropy = masked_entropy(teacher, batch, rate, mask_id, generator)
    context = Context(rate, model, token_counts, continuation, mask_id, entropy, "high")
    columns = {}
    for name in names:
        strategy = find_strategy(name)(context)
        if strategy.wants_gradient:
            feed(strategy, model, batch, generator)
        mask = strategy.mask(batch, generator)
        scores = entropy * math.nan if strategy.scores is None else strategy.scores.float()
        scores = scores.masked_fill(~maskable | scores.isinf(), math.nan)
        label = strategy_label(name)[:13]  # what fits above a column
        columns[label] = list(zip(mask[0].tolist(), scores[0].tolist()))
    return pieces, columns


def feed(strategy: Strategy, model, batch: Batch, generator: Generator):
    """Gives a strategy a step of gradients, from 16 random maskings of one text."""
    for _ in range(16):
        mask = random_mask(batch.maskable, strategy.context.rate, generator)
        corrupted = batch.input_ids.masked_fill(mask, strategy.context.mask_token_id)
        words = model.bert.embeddings.word_embeddings(corrupted).detach().requires_grad_()
        logits = model(inputs_embeds=words)[mask]  # (N, V)
        # The sum, since a mean would be NaN where N is 0.
        loss = F.cross_entropy(logits, batch.input_ids[mask], reduction="sum")
        gradient, = torch.autograd.grad(loss, words)
        strategy.observe(batch, mask, gradient)  # all that is masked is unseen, by [MASK]
    strategy.end_step()


def demo_lines(pieces: list[str], columns: dict[str, list]) -> list[str]:
    """Returns the demo as text: a line for each word piece, 15 characters for each strategy."""
    width = max(map(len, pieces)) + 2
    lines = [" " * width + "".join(f"{name:<15}" for name in columns)]
    for piece, *row in zip(pieces, *columns.values()):
        cells = [f"{'[MASK]' if masked else '':<6} {'' if math.isnan(score) else f'{score:.2f}':>5}"
                 for masked, score in row]
        lines.append(f"{piece:<{width}}" + "   ".join(cells))
    return lines


SVG_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{}" role="img">
<title>What each strategy masks</title>
<style>
text {{ font: 13px monospace; fill: #1f2328; white-space: pre }}
.page {{ fill: #fff }} .heat {{ fill: #f08c00 }} .masked {{ stroke: #1f2328; stroke-width: 2 }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }}
.page {{ fill: #0d1117 }} .heat {{ fill: #c2410c }} .masked {{ stroke: #e6edf3 }} }}
</style>
<rect class="page" width="100%" height="100%"/>"""


def demo_svg(pieces: list[str], columns: dict[str, list]) -> str:
    """Returns `demo_lines` as a drawing: a masked cell has a frame, its colour is the score."""
    lines = demo_lines(pieces, columns)  # a character is 8 wide, a line 24 high
    drawn = [SVG_HEAD.format(8 * len(lines[0]) + 16, 24 * len(lines) + 8)]
    left = 8 * (max(map(len, pieces)) + 3)
    for x, column in zip(itertools.count(left, 8 * 15), columns.values()):
        scores = [score for _, score in column if not math.isnan(score)] or [0]
        low, span = min(scores), max(scores) - min(scores) or 1  # 1 where all are equal
        for y, (masked, score) in zip(itertools.count(25, 24), column):
            kind = "heat masked" if masked else "heat"
            opacity = 0 if math.isnan(score) else 0.08 + 0.72 * (score - low) / span
            drawn.append(f'<rect x="{x}" y="{y}" width="112" height="21" class="{kind}" '
                         f'fill-opacity="{opacity:.2f}"/>')
    for y, line in zip(itertools.count(17, 24), lines):
        width = 8 * len(line)  # said, since each reader's font has its own
        drawn.append(f'<text x="12" y="{y}" textLength="{width}">{html.escape(line)}</text>')
    return "\n".join([*drawn, "</svg>\n"])


def main(argv=None):
    """The demo's command line."""
    parser = Parser(description="Shows what each strategy would mask in a text, and why.")
    add = parser.add_argument
    add("text")
    add("--model", help="run, Hugging Face directory or hub name (default: the newest run)")
    add("--masking", type=strategy_name, metavar="FILE.py:CLASS", help="your strategy, as a column")
    add("--mask-rate", type=number(float, above=0, below=1), default=0.3)
    add("--seed", type=number(int, low=0, below=2 ** 32), default=0)
    add("--svg", type=Path, metavar="FILE", help="also draw what the terminal shows into this file")
    args = parser.parse_args(argv)
    runs = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not (args.model or runs):
        raise InputError("there is no run here yet: run train.py first, or give --model")
    source = args.model or str(runs[-1].parent)
    model, tokenizer = load_pretrained(source, "mlm", whole=True)
    settings = Path(source) / "train_args.json"
    teacher_name = read_json(settings).get("teacher") if settings.exists() else None
    teacher = load_pretrained(teacher_name, "mlm", whole=True)[0] if teacher_name else model
    names = [*STRATEGIES, args.masking] if args.masking else [*STRATEGIES]
    text = args.text.encode(errors="surrogateescape").decode(errors="replace")  # from any shell
    pieces, columns = demo(text, model.eval(), tokenizer, teacher.eval(), args.mask_rate,
                           args.seed, names)
    print(f"model {source}, teacher {teacher_name or 'the same'}, {args.mask_rate:.0%} masked")
    print("\n".join(demo_lines(pieces, columns)))
    print(f"""The numbers decided; the entropies and rarity take the highest ones.
entropy: nats, one in {math.ceil(1 / args.mask_rate)} word pieces hidden from the teacher at a time
self-entropy: nats, of candidates for twice the budget, all hidden from the model at once
typhoon: the masking rate of the word piece
rarity: -ln of the frequency that the model guesses where it sees no word""")
    if args.svg:
        write_atomic(args.svg, demo_svg(pieces, columns))


if __name__ == "__main__":
    import masking  # not __main__ again: a user's file derives its class from masking.Strategy
    run_cli(masking.main)
