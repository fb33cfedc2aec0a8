"""Which tokens should a masked language model have to guess? Five answers, one budget.

A strategy scores the positions of a text; the budget, how many of them are masked, is the same for all, so that a
comparison of strategies is never a comparison of masking rates.

    random        uniformly                                                  BERT (Devlin et al. 2018) §3.1
    whole-word    uniformly over words; all pieces of a word together        BERT's whole-word release of 2019
    entropy       where a frozen teacher is most uncertain                   [E], external reference model
    self-entropy  where the model in training is most uncertain              [E], self-masking
    typhoon       each token at its type's rate, which follows a gradient    [T]

[E] Srinivasagan et al., Entropy-aware Masking for Masked Language Modeling, *SEM 2026, arXiv 2605.28526.
[T] Abdurrahman et al., Typhoon: Towards an Effective Task-Specific Masking Strategy, arXiv 2303.15619.

The functions come first, then the strategies as the training loop sees them: a class each, and a row in STRATEGIES.
`python masking.py "Some text of yours"` shows all five at work on a text.

Shapes: B batch, L tokens, H hidden, V vocabulary, N chosen positions. `maskable` (B, L) is True on ordinary tokens: not
special, not padding. Whatever draws takes a torch.Generator on the tensors' device; None is PyTorch's global one.
"""
import argparse
import importlib.util
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# --- the budget ------------------------------------------------------------------------------------------------------

def budget(maskable: Tensor, rate: float) -> Tensor:
    """How many tokens to mask in each row: k = max(1, round(rate · count)), 0 where nothing can be masked.

    maskable (B, L) bool, rate a fraction in (0, 1). Returns (B,) long. BERT §3.1 has rate 0.15."""
    count = maskable.sum(1)
    return torch.where(count > 0, (rate * count).round().long().clamp(min=1), 0)


def top_k(scores: Tensor, maskable: Tensor, k: Tensor) -> Tensor:
    """The k[b] highest-scoring maskable positions of each row b, all of them where there are fewer.

    scores (B, L), maskable (B, L) bool, k (B,) -> (B, L) bool."""
    order = scores.masked_fill(~maskable, -math.inf).argsort(dim=1, descending=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < k[:, None]  # by rank
    return torch.zeros_like(maskable).scatter(1, order, chosen) & maskable


def uniform(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent U[0, 1) scores in the shape of `like`."""
    return torch.rand(like.shape, device=like.device, generator=generator)


# --- random and whole-word -------------------------------------------------------------------------------------------

def random_mask(maskable: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """k positions a row, uniformly without replacement (BERT §3.1). (B, L) bool -> (B, L) bool."""
    return top_k(uniform(maskable, generator), maskable, budget(maskable, rate))


def whole_word_mask(maskable: Tensor, continuation: Tensor, rate: float,
                    generator: torch.Generator | None = None) -> Tensor:
    """Whole words, uniformly without replacement (BERT's whole-word masking, 2019; [T]'s second baseline).

    continuation (B, L) bool is True on "##" pieces; a piece with no piece before it in the row begins a word. Returns
    (B, L) bool.

    Filling a budget of *pieces* word by word favours short words, which fit, or long ones, which overshoot. So words
    are counted instead: rate · W of a row's W words (rounded up or down at random, one at least). Every word of a row is
    then equally likely, and the share of pieces is the rate on average."""
    before = F.pad(maskable, (1, 0))[:, :-1]
    start = maskable & ~(continuation & before)  # (B, L), the first piece of every word
    wanted = rate * start.sum(1)  # (B,)
    k = (wanted + uniform(wanted, generator)).floor().long().clamp(min=1)
    drawn = top_k(uniform(maskable, generator), start, k)  # (B, L), the first pieces of the drawn words
    column = torch.arange(start.shape[1], device=start.device)
    first = torch.where(start, column, 0).cummax(1).values  # (B, L), on every piece the column where its word begins
    return drawn.gather(1, first) & maskable


# --- entropy ---------------------------------------------------------------------------------------------------------

def token_entropy(logits: Tensor) -> Tensor:
    """H = −Σ_v p(v) ln p(v), in nats, of p = softmax(logits): 0 where the model is sure, ln V where it knows nothing
    ([E]'s score). (..., V) -> (...)."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


def entropy_mask(entropy: Tensor, maskable: Tensor, rate: float, select: str = "high",
                 generator: torch.Generator | None = None) -> Tensor:
    """Spends the budget by entropy ([E]). entropy (B, L) in nats, maskable (B, L) bool -> (B, L) bool.

    select: `high` the k most uncertain positions; `low` the k least; `mixed` half of k the most uncertain, half uniform
    over the rest; `sample` k without replacement with probability proportional to H. Over a frozen teacher `high` and
    `low` pick the same positions every epoch (static masking, RoBERTa §4.1); `mixed` and `sample` vary."""
    return select_by_entropy(entropy, maskable, budget(maskable, rate), select, generator)


def select_by_entropy(entropy: Tensor, maskable: Tensor, k: Tensor, select: str, generator=None) -> Tensor:
    """`entropy_mask` for a budget k (B,) already counted. Raises ValueError on an unknown `select`."""
    entropy = entropy.float()
    if select == "high":
        return top_k(entropy, maskable, k)
    if select == "low":
        return top_k(-entropy, maskable, k)
    if select == "mixed":
        high = top_k(entropy, maskable, (k + 1) // 2)
        return high | top_k(uniform(entropy, generator), maskable & ~high, k // 2)
    if select == "sample":  # Gumbel top-k: the k largest ln H + Gumbel noise are a draw without replacement
        gumbel = -(-uniform(entropy, generator).clamp(min=1e-20).log()).log()
        return top_k(entropy.clamp(min=1e-20).log() + gumbel, maskable, k)
    raise ValueError(f"unknown select {select!r}: high, low, mixed or sample")


@contextmanager
def evaluating(model):
    """Evaluation mode without gradients; every module's own mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def position_entropy(model, batch: "Batch", input_ids: Tensor, positions: Tensor, chunk: int = 128) -> Tensor:
    """The model's entropy at `positions` (B, L) bool, reading input_ids (B, L). Returns (B, L) in nats, 0 elsewhere.

    The head runs `chunk` positions at a time, so that no (B, L, V) tensor is ever held. The model's mode, gradients and
    random state are left alone."""
    with evaluating(model):
        hidden = model.hidden(input_ids, batch.attention_mask, batch.token_type_ids, positions=positions)  # (N, H)
        values = [token_entropy(model.logits(rows)) for rows in hidden.split(chunk)]
    entropy = torch.zeros(positions.shape, device=positions.device)
    return entropy.masked_scatter(positions, torch.cat(values))


def hidden_entropy(model, batch: "Batch", rate: float, mask_token_id: int, generator=None) -> Tensor:
    """The entropy of every maskable position while it is hidden from the model (our second reading of [E]).

    Positions are split into ⌈1/rate⌉ random groups, and each group is masked in turn: that many passes. Returns (B, L)
    in nats, 0 where nothing is maskable."""
    groups = math.ceil(1 / rate)
    order = uniform(batch.maskable, generator).masked_fill(~batch.maskable, 2).argsort(dim=1)
    group = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    entropy = torch.zeros(order.shape, device=order.device)
    for turn in range(groups):
        positions = (group % groups == turn) & batch.maskable
        masked_ids = batch.input_ids.masked_fill(positions, mask_token_id)
        entropy += position_entropy(model, batch, masked_ids, positions)
    return entropy


# --- Typhoon ---------------------------------------------------------------------------------------------------------

def embedding_saliency(embedding_grad: Tensor, embedding_weight: Tensor, token_ids: Tensor) -> Tensor:
    """∂L/∂onehot(x_i)[v] for v = token_ids_i ([T]): how the loss moves with the one-hot entry of a token.

    The embedding is e_i = onehot(x_i) W, so the gradient is ⟨∂L/∂e_i, W_v⟩: a dot product per token, and the (B, L, V)
    one-hot tensor is never built. embedding_grad (B, L, H), embedding_weight (V, H), token_ids (B, L) -> (B, L)."""
    return (embedding_grad.float() * F.embedding(token_ids, embedding_weight.detach().float())).sum(-1)


class Typhoon:
    """[T]: a masking rate for each token type, from a moving average of its gradient saliency.

    token_counts (V,): how often each type stands at a maskable position of the corpus; rate: the budget, a fraction;
    spread σ < 1: the lowest rate is (1 − σ) times the highest; ema_weight β: the weight of the *new* value."""

    def __init__(self, token_counts: Tensor, rate: float, spread: float = 0.4, ema_weight: float = 0.8):
        real = torch.float32 if token_counts.device.type == "mps" else torch.float64  # mps has no float64
        self.rate, self.spread, self.ema_weight = rate, spread, ema_weight
        self.frequency = token_counts.to(real) / token_counts.sum()  # f, (V,)
        self.weight = torch.zeros_like(self.frequency)  # w, (V,)
        self.seen = torch.zeros_like(token_counts, dtype=torch.bool)
        self.totals = self.weight.new_zeros(2, 2 * len(token_counts))  # sums, counts; of visible types, then masked

    def update(self, original_ids: Tensor, dot: Tensor, maskable: Tensor, masked: Tensor | None = None):
        """One batch into the average. original_ids (B, L): the uncorrupted text; dot (B, L): `embedding_saliency` at
        original_ids, unsigned; maskable (B, L) bool; masked (B, L) bool: what the model did not see, None for nothing."""
        self.accumulate(original_ids, dot, maskable, masked)
        self.step()

    def accumulate(self, original_ids, dot, maskable, masked=None):
        """Adds a batch to the sums of the step under way; s = −dot where the token was visible, +dot where masked."""
        V = len(self.weight)
        masked = torch.zeros_like(maskable) if masked is None else masked
        slot = (original_ids + V * masked).flatten()
        score = torch.where(masked, dot, -dot).to(self.totals.dtype) * maskable
        self.totals.index_add_(1, slot, torch.stack([score, maskable.to(score.dtype)]).flatten(1))

    def step(self, reduce: Callable[[Tensor], object] | None = None):
        """w ← (1 − β) w + β s for the types of this step, s the mean over visible plus the mean over masked tokens; a
        type's first value sets it. `reduce` sums a tensor in place over data-parallel ranks."""
        if reduce is not None:
            reduce(self.totals)
        sums, counts = self.totals.unflatten(1, (2, -1))  # (2, V) each: visible, masked
        s, now = (sums / counts.clamp(min=1)).sum(0), counts.sum(0) > 0
        average = (1 - self.ema_weight) * self.weight + self.ema_weight * s
        self.weight = torch.where(now, torch.where(self.seen, average, s), self.weight)
        self.seen = self.seen | now
        self.totals.zero_()

    def rates(self) -> Tensor:
        """r(v) = min(1, c · (1 − σ + σ ŵ(v))), (V,): ŵ is w scaled to [0, 1] over the types seen, 1 for a type not seen
        yet, and c makes the expected rate over the corpus, Σ f(v) r(v), the budget.

        Where min(1, ·) binds for the m highest types, c solves F_m + c Σ_{v>m} f u = rate, with u = 1 − σ + σ ŵ in
        falling order and F_m the frequency of the first m; the right m is the first whose next type stays within 1."""
        low = self.weight.masked_fill(~self.seen, math.inf).min()
        high = self.weight.masked_fill(~self.seen, -math.inf).max()
        scaled = torch.where(self.seen & (high > low), (self.weight - low) / (high - low), 1)  # ŵ
        u = 1 - self.spread + self.spread * scaled
        falling, order = u.sort(descending=True)
        f = self.frequency[order]
        F_m = f.cumsum(0) - f  # (V,), the frequency of all types before this one
        rest = (f * falling).flip(0).cumsum(0).flip(0)  # (V,), Σ f u over this type and all after it
        c = (self.rate - F_m) / rest.clamp(min=1e-30)
        m = (c * falling <= 1).to(torch.uint8).argmax()
        return (c[m] * u).clamp(max=1)

    def mask(self, input_ids: Tensor, maskable: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Each token independently, at its type's rate. (B, L) -> (B, L) bool."""
        return (uniform(maskable, generator) < self.rates()[input_ids]) & maskable


# --- corruption ------------------------------------------------------------------------------------------------------

def corrupt(input_ids: Tensor, mask: Tensor, mask_token_id: int, vocab_size: int, split=(0.8, 0.1, 0.1),
            generator: torch.Generator | None = None, special_ids=()) -> tuple[Tensor, Tensor]:
    """What the model reads and what it must say (BERT §3.1, §A.1).

    Of the masked positions a share split[0] becomes [MASK], split[1] a random ordinary token, split[2] stays. Returns
    corrupted ids (B, L) and labels (B, L): the original token, −100 off the mask. A random token is never special."""
    labels = input_ids.masked_fill(~mask, -100)
    dice = uniform(mask, generator)
    corrupted = input_ids.masked_fill(mask & (dice < split[0]), mask_token_id)
    if split[1]:
        ordinary = vocab_size - len(special_ids)
        words = torch.randint(ordinary, input_ids.shape, device=input_ids.device, generator=generator)
        for special in sorted(special_ids):
            words += words >= special  # step over the special ids
        swap = mask & (dice >= split[0]) & (dice < split[0] + split[1])
        corrupted = torch.where(swap, words, corrupted)
    return corrupted, labels


# --- the strategies as the training loop sees them -------------------------------------------------------------------

@dataclass
class Batch:
    """What a strategy may look at."""
    input_ids: Tensor  # (B, L), uncorrupted
    maskable: Tensor  # (B, L) bool
    index: Tensor  # (B,) which texts of the corpus these are
    attention_mask: Tensor | None = None  # (B, L), None where nothing is padded
    token_type_ids: Tensor | None = None


@dataclass
class Context:
    """What a strategy may be built from."""
    rate: float
    model: torch.nn.Module  # the model in training
    token_counts: Tensor  # (V,), over the maskable positions of the corpus
    continuation: Tensor  # (V,) bool, True for "##" pieces
    mask_token_id: int
    teacher_entropy: Tensor | None = None  # (texts, L) in nats, the frozen teacher's, where `needs_teacher`
    entropy_select: str | None = None  # None: what suits the strategy
    entropy_input: str = "masked"  # or "visible"
    spread: float = 0.4
    ema_weight: float = 0.8


class Strategy:
    """One way to choose. A new one is a class with `mask` and a row in STRATEGIES; the rest is optional."""
    needs_teacher = False  # reads context.teacher_entropy
    wants_gradient = False  # `observe` wants to be called
    start = 0.0  # before this fraction of the steps it is random masking's turn, unless the user says otherwise

    def __init__(self, context: Context):
        self.context = context

    def mask(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """(B, L) bool: what must be guessed."""
        raise NotImplementedError

    def observe(self, batch: Batch, hidden: Tensor | None, embedding_grad: Tensor):
        """After a backward pass: hidden (B, L) bool, True where the model did not see the token itself (None: it saw all),
        and the gradient (B, L, H) with respect to the word embeddings that went in."""

    def end_step(self, reduce: Callable[[Tensor], object] | None = None):
        """After an optimizer step; `reduce` sums a tensor over data-parallel ranks."""

    def state_dict(self) -> dict:
        """Everything that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict):
        """Takes what `state_dict` gave."""


class Random(Strategy):
    """`random_mask`"""
    def mask(self, batch, generator=None):
        return random_mask(batch.maskable, self.context.rate, generator)


class WholeWord(Strategy):
    """`whole_word_mask`"""
    def mask(self, batch, generator=None):
        continuation = self.context.continuation[batch.input_ids]
        return whole_word_mask(batch.maskable, continuation, self.context.rate, generator)


class Entropy(Strategy):
    """`entropy_mask` over a frozen teacher's entropies, which are looked up: they never change. `mixed` and a late start
    are the defaults because `high` from the first step leaves a small model without the language's frame (README)."""
    needs_teacher = True
    start = 0.5

    def __init__(self, context):
        super().__init__(context)
        self.table = context.teacher_entropy  # (texts, L)

    def mask(self, batch, generator=None):
        """By the entropies of the batch's own rows of the table."""
        entropy = self.table[batch.index][:, :batch.maskable.shape[1]]  # a batch is cut to its longest text
        select = self.context.entropy_select or "mixed"
        return entropy_mask(entropy, batch.maskable, self.context.rate, select, generator)


class SelfEntropy(Strategy):
    """`entropy_mask` over the entropies of the model in training, as it is now.

    Hidden positions: 2k candidates, uniformly, all masked; one pass, with the head on those rows alone; the k most
    uncertain of them. Visible ones: one pass over the text as it is, with the head on every row."""
    def mask(self, batch, generator=None):
        """By the model's entropies at this moment."""
        context, k = self.context, budget(batch.maskable, self.context.rate)
        candidates, input_ids = batch.maskable, batch.input_ids
        if context.entropy_input == "masked":
            candidates = top_k(uniform(batch.maskable, generator), batch.maskable, 2 * k)
            input_ids = input_ids.masked_fill(candidates, context.mask_token_id)
        entropy = position_entropy(context.model, batch, input_ids, candidates)
        return select_by_entropy(entropy, candidates, k, context.entropy_select or "high", generator)


class TyphoonStrategy(Strategy):
    """`Typhoon`, fed with the gradient of the training loss: the MLM loss, as in [T]'s public code of 2023, and the
    distillation term where there is one."""
    wants_gradient = True

    def __init__(self, context):
        super().__init__(context)
        self.typhoon = Typhoon(context.token_counts, context.rate, context.spread, context.ema_weight)

    def mask(self, batch, generator=None):
        return self.typhoon.mask(batch.input_ids, batch.maskable, generator)

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


STRATEGIES: dict[str, type[Strategy]] = {
    "random": Random, "whole-word": WholeWord, "entropy": Entropy, "self-entropy": SelfEntropy,
    "typhoon": TyphoonStrategy,
}


def find_strategy(name: str) -> type[Strategy]:
    """The class for a name of STRATEGIES, or for FILE.py:CLASS, a strategy in a file of the user's own. Raises
    argparse.ArgumentTypeError, which says what is wrong."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    file, _, class_name = name.rpartition(":")
    if not Path(file).is_file():
        known = ", ".join(STRATEGIES)
        raise argparse.ArgumentTypeError(f"{name!r} is unknown: choose from {known}, or give FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, class_name)
    except Exception as error:  # the user's file can raise anything
        raise argparse.ArgumentTypeError(f"{name!r}: {type(error).__name__}: {error}") from None
    return found


def strategy_name(name: str) -> str:
    """An argparse type: a name that `find_strategy` knows."""
    find_strategy(name)
    return name


def strategy_label(name: str) -> str:
    """What a strategy is called in file names and reports: its name, or the class of FILE.py:CLASS."""
    return name.rpartition(":")[2]


# --- the terminal demo -----------------------------------------------------------------------------------------------

def demo(text: str, model, tokenizer, teacher, rate: float, seed: int) -> tuple[list[str], dict[str, tuple]]:
    """What each strategy would mask in one text. Returns the L word pieces, and for each strategy's name a mask (L,)
    and what it looked at: entropies in nats (L,), rates (L,), or None."""
    ids = torch.tensor([tokenizer.encode(text).ids[:model.config.max_position_embeddings]])  # (1, L)
    pieces = [tokenizer.id_to_token(i) for i in range(model.config.vocab_size)]
    maskable = torch.tensor([[not (pieces[i] or "[").startswith("[") or pieces[i] == "[" for i in ids[0]]])
    generator = torch.Generator().manual_seed(seed)
    batch = Batch(ids, maskable, index=torch.tensor([0]))
    counts = torch.bincount(ids[maskable], minlength=len(pieces))
    mask_id = tokenizer.token_to_id("[MASK]")
    entropy = {"entropy": hidden_entropy(teacher, batch, rate, mask_id, generator),
               "self-entropy": hidden_entropy(model, batch, rate, mask_id, generator)}
    context = Context(rate, model, counts, torch.tensor([(p or "").startswith("##") for p in pieces]), mask_id,
                      teacher_entropy=entropy["entropy"], entropy_select="high")
    shown = {}
    for name, build in STRATEGIES.items():
        strategy = build(context)
        if strategy.wants_gradient:
            feed(strategy, model, batch, context, generator)
        looked_at = entropy.get(name)
        if name == "typhoon":
            looked_at = strategy.typhoon.rates()[ids] * maskable
        shown[name] = (strategy.mask(batch, generator)[0], None if looked_at is None else looked_at[0])
    return [pieces[i] for i in ids[0]], shown


def feed(strategy: Strategy, model, batch: Batch, context: Context, generator, rounds: int = 16):
    """One step of gradients from `rounds` random maskings of one text, as if the corpus were that text."""
    for _ in range(rounds):
        mask = random_mask(batch.maskable, context.rate, generator)
        corrupted, labels = corrupt(batch.input_ids, mask, context.mask_token_id, 0, (1, 0, 0), generator)
        words = model.bert.embeddings.word_embeddings(corrupted).detach().requires_grad_()
        loss = F.cross_entropy(model(inputs_embeds=words, positions=mask), labels[mask])
        strategy.observe(batch, mask, torch.autograd.grad(loss, words)[0])  # pure [MASK]: the masked are the hidden
    strategy.end_step()


def demo_lines(pieces: list[str], shown: dict[str, tuple], colour: bool) -> list[str]:
    """A line per word piece, a column per strategy: a block where it is masked, and the number that decided."""
    width = max(map(len, pieces)) + 2
    lines = [" " * width + "".join(f"{name:<15}" for name in shown)]
    ranges = {name: (values[values > 0].min(), values.max()) for name, (_, values) in shown.items() if values is not None}
    for i, piece in enumerate(pieces):
        line = f"{piece:<{width}}"
        for name, (mask, values) in shown.items():
            number = f"{values[i]:6.2f}" if values is not None and values[i] > 0 else " " * 6
            cell = f" {'[MASK]' if mask[i] else '  .   '} {number} "
            if colour and number.strip():  # 256-colour grey to red by the value
                low, high = ranges[name]
                heat = int(5 * (values[i] - low) / (high - low).clamp(min=1e-9))
                cell = f"\x1b[48;5;{16 + 36 * heat}m\x1b[97m{cell}\x1b[0m"
            line += f"\x1b[1m{cell}\x1b[0m" if colour and mask[i] else cell
        lines.append(line)
    return lines


def parse_args(argv=None):
    """The demo's options."""
    from model import Parser
    parser = Parser(description="Shows what each strategy would mask in a text, and why.")
    parser.add_argument("text")
    parser.add_argument("--model", help="run directory, Hugging Face directory or hub name (default: the newest run)")
    parser.add_argument("--mask-rate", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv=None):
    """The demo's command line. model.py is imported here alone: the strategies need nothing but torch."""
    from model import InputError, load_pretrained, read_json
    args = parse_args(argv)
    if not 0 < args.mask_rate < 1:
        raise InputError(f"--mask-rate {args.mask_rate} is not between 0 and 1")
    runs = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not (args.model or runs):
        raise InputError("there is no run here yet: run train.py first, or give --model")
    source = args.model or str(runs[-1].parent)
    model, tokenizer = load_pretrained(source, head="mlm")
    settings = Path(source) / "train_args.json"
    teacher_dir = read_json(settings).get("teacher_dir") if settings.exists() else None
    teacher = load_pretrained(teacher_dir, head="mlm")[0] if teacher_dir else model
    text = args.text.encode(errors="surrogateescape").decode(errors="replace")  # a shell may pass what is no UTF-8
    pieces, shown = demo(text, model.eval(), tokenizer, teacher.eval(), args.mask_rate, args.seed)
    if not any(mask.any() for mask, _ in shown.values()):
        raise InputError("the text has no word to mask: give a sentence")
    print(f"model {source}, teacher {teacher_dir or 'the same'}, {args.mask_rate:.0%} masked")
    print("\n".join(demo_lines(pieces, shown, colour=sys.stdout.isatty())))
    print("entropy and self-entropy: nats, each word piece hidden in turn; typhoon: its type's masking rate")


if __name__ == "__main__":
    from model import run_cli
    run_cli(main)
