"""Which tokens should a masked language model have to guess? Six answers, one budget.

A strategy decides which tokens of a text are masked. How many are masked, the budget, is the same
for every strategy, so that comparing strategies never means comparing masking rates.

    random        uniformly                                         BERT (Devlin et al. 2018) §3.1
    whole-word    words uniformly, all pieces of a word together    BERT's whole-word models, 2019
    entropy       where a frozen teacher is most uncertain          [E], external reference model
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
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from model import (SPECIAL_TOKENS, InputError, Parser, load_pretrained, number, read_json, run_cli,
                   write_atomic)

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
    scores = scores.float().masked_fill(~maskable, -math.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)  # (B, L), positions by rank
    chosen = torch.arange(scores.shape[1], device=scores.device) < k[:, None]  # (B, L), by rank
    return torch.zeros_like(maskable).scatter(1, order, chosen) & maskable  # (B, L), by position


# --- random and whole-word ------------------------------------------------------------------------

def random_mask(maskable: Tensor, rate: float, generator: Generator = None) -> Tensor:
    """Returns a mask on k positions of each row, drawn uniformly without replacement (BERT §3.1).

    (B, L) bool -> (B, L) bool."""
    count = budget(maskable, rate, generator)
    return top_k(uniform(maskable, generator), maskable, count)


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


def entropy_mask(entropy: Tensor, maskable: Tensor, rate: float, select: str = "high",
                 generator: Generator = None) -> Tensor:
    """Returns a mask that spends the budget by entropy ([E]).

    select: `high`, the k most uncertain positions; `low`, the k least; `mixed`, half of k the most
    uncertain, half uniformly from the rest; `sample`, k without replacement with probability
    proportional to H. With a frozen teacher `high` and `low` choose the same positions every epoch
    (static masking, RoBERTa §4.1) but for the rounding of k; `mixed` and `sample` vary.

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
    scores = scores.float()
    if select == "high":
        return top_k(scores, maskable, k)
    if select == "low":
        return top_k(-scores, maskable, k)
    if select == "mixed":
        coin = uniform(k, generator) < 0.5  # an odd k leaves one over: it goes to either half
        high = top_k(scores, maskable, (k + coin) // 2)
        return high | top_k(uniform(scores, generator), maskable & ~high, k - high.sum(1))
    if select == "sample":
        # The Gumbel trick: −ln(−ln U) is Gumbel noise, and the k largest of ln H + noise are
        # distributed like k draws one after another, each in proportion to H among what is left.
        tiny = 1e-20  # where a draw or an entropy is 0, the logarithm stays finite
        noise = -(-uniform(scores, generator).clamp(min=tiny).log()).log()
        return top_k(scores.clamp(min=tiny).log() + noise, maskable, k)
    raise ValueError(f"unknown select {select!r}: high, low, mixed or sample")


@contextmanager
def evaluating(model):
    """Puts a model into evaluation mode without gradients; restores each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def position_entropy(model, batch: "Batch", input_ids: Tensor, positions: Tensor,
                     chunk: int = 128) -> Tensor:
    """Returns the model's entropy at `positions` when it reads input_ids, in nats, 0 elsewhere.

    input_ids (B, L), positions (B, L) bool -> (B, L). The model's mode, gradients and random state
    stay as they are."""
    with evaluating(model):
        hidden = model.hidden(input_ids, batch.attention_mask, batch.token_type_ids,
                              positions=positions)  # (N, H)
        # In chunks: with BERT's vocabulary the logits of 4,096 tokens would fill half a gigabyte.
        entropies = [token_entropy(model.logits(part)) for part in hidden.split(chunk)]
    entropy = torch.zeros(positions.shape, device=positions.device)
    return entropy.masked_scatter(positions, torch.cat(entropies))  # (B, L)


def hidden_entropy(model, batch: "Batch", rate: float, mask_token_id: int,
                   generator: Generator = None) -> Tensor:
    """Returns the entropy of every maskable position while its token is hidden from the model.

    Our second reading of [E]: the entropy at a visible token mostly says how rare the token is.
    Each row's positions are dealt at random into ⌈1/rate⌉ groups, which are masked one after
    another, in as many passes. Returns (B, L) in nats, 0 where nothing is maskable."""
    groups = math.ceil(1 / rate)
    # A random order with the maskable positions first. The argsort of an order is each one's rank.
    draws = uniform(batch.maskable, generator).masked_fill(~batch.maskable, 2)  # 2: behind U[0, 1)
    rank = draws.argsort(dim=1, stable=True).argsort(dim=1)  # (B, L)
    entropy = torch.zeros(rank.shape, device=rank.device)
    for group in range(groups):
        positions = (rank % groups == group) & batch.maskable
        masked_ids = batch.input_ids.masked_fill(positions, mask_token_id)
        entropy += position_entropy(model, batch, masked_ids, positions)
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
    budget, a fraction; spread σ < 1: the lowest rate is (1 − σ) times the highest; ema_weight β:
    the weight of the *new* value in the average."""

    def __init__(self, token_counts: Tensor, rate: float, spread: float = 0.4,
                 ema_weight: float = 0.8):
        real = torch.float32 if token_counts.device.type == "mps" else torch.float64  # MPS has none
        self.rate, self.spread, self.ema_weight = rate, spread, ema_weight
        self.frequency = token_counts.to(real) / token_counts.sum()  # f, (V,)
        self.weight = torch.zeros_like(self.frequency)  # w, (V,)
        self.seen = torch.zeros_like(token_counts, dtype=torch.bool)  # (V,)
        # Row 0 sums saliencies, row 1 counts tokens; columns: V types visible, then V types masked.
        self.totals = self.weight.new_zeros(2, 2 * len(token_counts))

    def update(self, original_ids: Tensor, dot: Tensor, maskable: Tensor,
               masked: Tensor | None = None):
        """Takes a whole batch into the average: `accumulate`, then `step`."""
        self.accumulate(original_ids, dot, maskable, masked)
        self.step()

    def accumulate(self, original_ids: Tensor, dot: Tensor, maskable: Tensor,
                   masked: Tensor | None = None):
        """Adds a batch to the sums of the current step.

        original_ids (B, L): the text before corruption; dot (B, L): `embedding_saliency` at those
        ids; maskable (B, L) bool; masked (B, L) bool: True where the model did not see the token,
        None if it saw all. A token's saliency s is −dot where visible, +dot where masked ([T])."""
        V = len(self.weight)
        masked = torch.zeros_like(maskable) if masked is None else masked
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
        >>> typhoon.update(torch.tensor([[0, 1]]), torch.tensor([[-2.0, 3.0]]), every)
        >>> [round(r, 2) for r in typhoon.rates().tolist()]  # 0.5·0.5 + 0.4·0.25 + 0.1·0.5 = 0.4
        [0.5, 0.25, 0.5]
        """
        low = self.weight.masked_fill(~self.seen, math.inf).min()
        high = self.weight.masked_fill(~self.seen, -math.inf).max()
        # With fewer than two different weights there is nothing to scale: ŵ is 1 for every type.
        scalable = self.seen & (high > low)
        scaled = torch.where(scalable, (self.weight - low) / (high - low), 1)  # ŵ, (V,)
        u = 1 - self.spread + self.spread * scaled  # (V,), in [1 − σ, 1]

        # Without the cap at 1, Σ f c u = rate gives c = rate / Σ f u. Where c u > 1 the cap cuts
        # something off, which the other types must get. In falling order of u, the capped types are
        # the first m. They give the expected rate F_m, the sum of their f; the others c Σ f u. So
        # F_m + c Σ_{others} f u = rate, and c = (rate − F_m) / Σ_{others} f u. The right m is the
        # first at which the highest of the others is within the cap.
        falling, order = u.sort(descending=True)
        f = self.frequency[order]
        F_m = f.cumsum(0) - f  # (V,), at m: Σ f over the m types before it
        others = (f * falling).flip(0).cumsum(0).flip(0)  # (V,), at m: Σ f u from it to the end
        c = (self.rate - F_m) / others.clamp(min=1e-30)  # (V,), a candidate for each m
        m = (c * falling <= 1).to(torch.uint8).argmax()  # argmax finds the first 1
        return (c[m] * u).clamp(max=1)

    def mask(self, input_ids: Tensor, maskable: Tensor,
             generator: Generator = None) -> Tensor:
        """Returns a mask that takes each token independently, at its type's rate. (B, L) bool."""
        self.used = self.rates()[input_ids]  # (B, L), kept for the demo
        return (uniform(maskable, generator) < self.used) & maskable


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
        words = (uniform(mask, generator) * ordinary).long()  # (B, L), from 0 to ordinary − 1
        for special in sorted(special_ids):
            words += words >= special  # step over the special ids
        swap = mask & (dice >= split[0]) & (dice < split[0] + split[1])
        corrupted = torch.where(swap, words, corrupted)
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

    def observe(self, batch: Batch, hidden: Tensor | None, embedding_grad: Tensor):
        """Is called after a backward pass. hidden (B, L) bool: True where the model did not see the
        token itself, None if it saw all; embedding_grad (B, L, H): with respect to the word
        embeddings that went in."""

    def end_step(self, reduce: Callable[[Tensor], object] | None = None):
        """Is called after an optimizer step; `reduce` sums a tensor over data-parallel ranks."""

    def state_dict(self) -> dict:
        """Returns everything that a resumed run needs."""
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

    `mixed`, because a small model that must guess nothing but the most uncertain tokens does not
    learn the common words (README)."""
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
        mask = self.typhoon.mask(batch.input_ids, batch.maskable, generator)
        self.scores = self.typhoon.used
        return mask

    def observe(self, batch, hidden, embedding_grad):
        weight = self.context.model.bert.embeddings.word_embeddings.weight
        dot = embedding_saliency(embedding_grad, weight, batch.input_ids)
        self.typhoon.accumulate(batch.input_ids, dot, batch.maskable, hidden)

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
run_file = functools.cache(runpy.run_path)


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
        found = run_file(str(Path(file).resolve())).get(class_name)
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
         names: list[str]) -> tuple[list[str], dict[str, list]]:
    """Returns the L word pieces of a text, and by each strategy's label its L `cells`.

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
        logits = model(batch.input_ids.masked_fill(maskable, mask_id), positions=maskable)
    token_counts = 1e6 * logits.softmax(-1).mean(0)  # (V,), among a million tokens
    continuation = torch.zeros(len(token_counts), dtype=torch.bool)  # (V,), for this text's types
    continuation[ids] = torch.tensor([piece.startswith("##") for piece in pieces])
    entropy = hidden_entropy(teacher, batch, rate, mask_id, generator)
    context = Context(rate, model, token_counts, continuation, mask_id, entropy,
                      entropy_select="high")
    columns = {}
    for name in names:
        strategy = find_strategy(name)(context)
        if strategy.wants_gradient:
            feed(strategy, model, batch, context, generator)
        mask = strategy.mask(batch, generator)
        scores = entropy * math.nan if strategy.scores is None else strategy.scores.float()
        label = strategy_label(name)[:13]  # what fits above a column
        columns[label] = cells(mask[0], scores.masked_fill(~maskable, math.nan)[0])
    return pieces, columns


def feed(strategy: Strategy, model, batch: Batch, context: Context, generator: Generator):
    """Gives a strategy a step of gradients, from 16 random maskings of one text."""
    for _ in range(16):
        mask = random_mask(batch.maskable, context.rate, generator)
        corrupted = batch.input_ids.masked_fill(mask, context.mask_token_id)
        words = model.bert.embeddings.word_embeddings(corrupted).detach().requires_grad_()
        loss = F.cross_entropy(model(inputs_embeds=words, positions=mask), batch.input_ids[mask],
                               reduction="sum")  # a mean would be NaN where k is 0
        gradient, = torch.autograd.grad(loss, words)
        strategy.observe(batch, mask, gradient)  # all that is masked is hidden, by [MASK]
    strategy.end_step()


def cells(mask: Tensor, scores: Tensor) -> list[tuple[bool, str, float]]:
    """Returns of each token: is it masked, its score as text, its score scaled to [0, 1].

    mask (L,) bool; scores (L,), not finite where there is none: then "" and 0."""
    known = scores.isfinite()
    low = scores.masked_fill(~known, math.inf).min()
    high = scores.masked_fill(~known, -math.inf).max()
    heat = ((scores - low) / (high - low)).nan_to_num(0, 0, 0)  # also 0 where all are equal
    numbers = [f"{score:.2f}" if math.isfinite(score) else "" for score in scores.tolist()]
    return list(zip(mask.tolist(), numbers, heat.tolist()))


def demo_lines(pieces: list[str], columns: dict[str, list], colour: bool) -> list[str]:
    """Returns the demo for a terminal: a line for each word piece, a column for each strategy."""
    width = max(map(len, pieces)) + 2
    lines = [" " * width + "".join(f"{name:<15}" for name in columns)]
    for piece, *row in zip(pieces, *columns.values()):
        line = f"{piece:<{width}}"
        for masked, score, heat in row:
            cell = f" {'[MASK]' if masked else '  .   '} {score:>6} "
            if colour and score:  # white on one of six steps from black to red
                cell = f"\x1b[48;5;{16 + 36 * int(5 * heat)}m\x1b[97m{cell}\x1b[0m"
            line += f"\x1b[1m{cell}\x1b[0m" if colour and masked else cell
        lines.append(line)
    return lines


SVG_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{}" role="img">
<title>What each strategy masks</title>
<style>
text {{ font: 13px monospace; fill: #1f2328 }} .bold {{ font-weight: bold }}
.number {{ text-anchor: end }} .page {{ fill: #fff }} .heat {{ fill: #f08c00 }}
.masked {{ fill: none; stroke: #1f2328; stroke-width: 2 }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }} .page {{ fill: #0d1117 }} .heat {{ fill: #c2410c }}
.masked {{ stroke: #e6edf3 }} }}
</style>
<rect class="page" width="100%" height="100%"/>"""


def demo_svg(pieces: list[str], columns: dict[str, list]) -> str:
    """Returns the demo as an SVG drawing: a masked cell has a frame, its colour is the score."""
    wide, high, left = 104, 24, 24 + 8 * max(map(len, pieces))  # a cell's size, where cells begin
    text = '<text x="{}" y="{}" class="{}">{}</text>'.format
    box = '<rect x="{}" y="{}" width="98" height="21" class="{}" fill-opacity="{:.2f}"/>'.format
    drawn = [SVG_HEAD.format(left + wide * len(columns), high * (len(pieces) + 1) + 8)]
    for row, piece in enumerate(pieces, start=1):
        drawn.append(text(12, high * row + 17, "piece", html.escape(piece)))
    for x, (name, column) in zip(itertools.count(left, wide), columns.items()):
        drawn.append(text(x, 17, "bold", html.escape(name)))
        for y, (masked, score, heat) in zip(itertools.count(high, high), column):
            if score:
                drawn.append(box(x, y + 1, "heat", 0.08 + 0.72 * heat))
                drawn.append(text(x + wide - 12, y + 17, "number", score))
            if masked:
                drawn.append(box(x, y + 1, "masked", 0))
                drawn.append(text(x + 6, y + 17, "bold", "[MASK]"))
    return "\n".join([*drawn, "</svg>\n"])


def main(argv=None):
    """The demo's command line."""
    parser = Parser(description="Shows what each strategy would mask in a text, and why.")
    add = parser.add_argument
    add("text")
    add("--model", help="run, Hugging Face directory or hub name (default: the newest run)")
    add("--masking", type=strategy_name, metavar="FILE.py:CLASS", help="your strategy, as a column")
    add("--mask-rate", type=number(float, above=0, below=1), default=0.3)
    add("--seed", type=number(int, low=0, below=2 ** 63), default=0)
    add("--svg", type=Path, metavar="FILE", help="also draw what the terminal shows into this file")
    args = parser.parse_args(argv)
    runs = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not (args.model or runs):
        raise InputError("there is no run here yet: run train.py first, or give --model")
    source = args.model or str(runs[-1].parent)
    model, tokenizer = load_pretrained(source, head="mlm")
    settings = Path(source) / "train_args.json"
    teacher_dir = read_json(settings).get("teacher_dir") if settings.exists() else None
    teacher = load_pretrained(teacher_dir, head="mlm")[0] if teacher_dir else model
    names = [*STRATEGIES, args.masking] if args.masking else [*STRATEGIES]
    text = args.text.encode(errors="surrogateescape").decode(errors="replace")  # from any shell
    pieces, columns = demo(text, model.eval(), tokenizer, teacher.eval(), args.mask_rate,
                           args.seed, names)
    print(f"model {source}, teacher {teacher_dir or 'the same'}, {args.mask_rate:.0%} masked")
    print("\n".join(demo_lines(pieces, columns, colour=sys.stdout.isatty())))
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
