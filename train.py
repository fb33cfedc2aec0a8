"""Pretrains a masked language model with any of the masking strategies.

    python train.py --masking entropy --device cuda          the main job
    python train.py --masking typhoon --kd-weight 0.5        another strategy, with distillation
    python train.py --corpus docs my_texts/ --preset mini    your own text too, a larger model
    torchrun --nproc_per_node=8 train.py --masking random    data-parallel

The text is the English that ships with Python, unless another is named. A teacher that is wanted
and not named is trained first, and kept for the next run.

In order: the recipe and one training step (BERT §3.1, with distill.py and masking.py); a run, from
text to summary; the exam that every model sits; the teacher; text; tokens and windows; files,
signals, ranks and devices; the command line. Shapes: B texts, L tokens, H hidden, V vocabulary,
N masked tokens, P exam positions.
"""
from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import sysconfig
import time
import zipfile
from argparse import BooleanOptionalAction, Namespace
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from distill import init_student, kd_loss
from masking import (SELECTS, STRATEGIES, Batch, Context, Random, Strategy, corrupt, evaluating,
                     find_strategy, masked_entropy, position_entropy, random_mask, strategy_label,
                     strategy_name, token_entropy)
from model import (PRESETS, SPECIAL_TOKENS, BertConfig, BertForMaskedLM, InputError, Parser,
                   RunError, can_write, find_pretrained, load_pretrained, local_start, number,
                   query_positions, read_json, run_cli, save_pretrained, weights_digest,
                   wordpiece_tokenizer, write_atomic)

EXAM_RATE = 0.15  # masked share of the held-out exam, whatever the run's own rate
FEW_WORDS, FEW_QUESTIONS = 100_000, 500  # in the text, in the exam: below these a run says so
VOCAB_SIZE = 4096  # of a vocabulary of the text's own


# --- the recipe -----------------------------------------------------------------------------------
# A field of these classes is an option of the command line too: mask_rate is --mask-rate. Its
# default, help and bounds stand here.

FRACTION, BELOW_1 = number(float, low=0, high=1), number(float, low=0, below=1)
POSITIVE, COUNT = number(float, above=0), number(int, low=1)


def option(default, said: str = "", kind=None, **settings):
    """Returns a field; kind and settings: type and other arguments of argparse's add_argument."""
    settings |= {"default": default, "help": said or None} | ({"type": kind} if kind else {})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=settings)
    return field(default=default, metadata=settings)


@dataclass
class Masking:
    """How a strategy spends its budget. glue.py has these options too."""
    mask_rate: float = option(0.3, "share of the tokens masked", number(float, above=0, below=1))
    corruption: list[float] = option(
        [0.8, 0.1, 0.1], "shares of the chosen tokens that become [MASK], become a random token, "
        "stay", FRACTION, nargs=3, metavar=("MASK", "SWAP", "KEEP"))
    entropy_select: str | None = option(
        None, "which entropies are masked; train.py: mixed for entropy and rarity, else high",
        choices=SELECTS)
    entropy_input: str = option(
        "masked", "entropy of a token that the model sees, or of one that is hidden from it",
        choices=["visible", "masked"])
    typhoon_spread: float = option(0.4, "the lowest rate is 1 - spread times the highest", BELOW_1)
    typhoon_ema: float = option(0.8, "moving average: weight of a new value", FRACTION)


@dataclass
class Recipe(Masking):
    """The numbers of the training loop."""
    steps: int = option(1400, "optimizer steps", COUNT)
    batch_size: int = option(16, "windows an optimizer step, over all ranks", COUNT)
    accumulate: int = option(1, "micro-batches that a rank cuts its share into", COUNT)
    lr: float = option(3e-3, "peak learning rate of AdamW", POSITIVE)
    warmup: float = option(0.1, "fraction of the steps in which it rises", FRACTION)
    weight_decay: float = option(0.01, "of matrices only", number(float, low=0))
    clip: float = option(1.0, "largest gradient norm", POSITIVE)
    strategy_start: float = option(0.0, "random masks for this fraction of the steps", FRACTION)
    kd_weight: float = option(0.0, "alpha: distillation's share of the loss", FRACTION)
    kd_temperature: float = option(2.0, "T: softens teacher and student for it", POSITIVE)
    kd_start: float = option(0.0, "--kd-weight is 0 before this fraction of the steps", FRACTION)
    seed: int = option(0, "of weights, order, masks, dropout", number(int, low=0, below=2 ** 32))
    bf16: bool | None = option(None, "default: on a GPU that has it", action=BooleanOptionalAction)


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Returns AdamW (Loshchilov and Hutter 2019, 1711.05101) over what is not frozen. As in BERT,
    biases and LayerNorms, which are the vectors among the parameters, do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
    # RoBERTa's β₂ (§3.1), for BERT's 0.999
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def lr_at(step: int, steps: int, warmup: float) -> float:
    """Returns the factor on the learning rate: a line up for `warmup` (a fraction of the steps),
    then a line down to zero (BERT §A.2).

    >>> [round(lr_at(step, steps=5, warmup=0.4), 2) for step in range(5)]
    [0.5, 1.0, 1.0, 0.67, 0.33]
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / (steps - rising)


# --- the training step ----------------------------------------------------------------------------

class Trainer:
    """A model, its optimizer and a strategy, one optimizer step at a time.

    All randomness of a step is a function of (seed, rank, step), and the order of the texts one of
    (seed, epoch). So a resumed run goes on exactly as it would have, and stores no generator. (On a
    GPU nearly so: some of its kernels add in any order.)"""

    def __init__(self, model: BertForMaskedLM, texts: Texts, strategy: Strategy, recipe: Recipe,
                 teacher: BertForMaskedLM | None = None):
        self.model, self.texts, self.strategy, self.recipe = model, texts, strategy, recipe
        self.teacher = teacher
        self.device = model.head.bias.device
        self.random = Random(strategy.context)  # masks before strategy_start; `strategy` observes
        self.generator = torch.Generator(self.device)
        self.optimizer = make_optimizer(model, recipe.lr, recipe.weight_decay)
        # What a checkpoint holds of a trainer.
        self.parts = {"model": model, "optimizer": self.optimizer, "strategy": strategy}
        self.parallel = model
        if world_size() > 1:  # averages the gradients of all ranks during the backward pass
            self.parallel = nn.parallel.DistributedDataParallel(model)

    def micro_step(self, batch: Batch, mask: Tensor, masked_in_all: Tensor,
                   kd_weight: float) -> Tensor:
        """Forward and backward pass of one micro-batch; its gradients add to those before.

        mask (B, L) bool: the N tokens to guess; masked_in_all: how many the whole optimizer step
        guesses, over its micro-batches and ranks. Returns the sum of the N losses, in nats."""
        recipe, vocab = self.recipe, self.texts.vocab
        corrupted, labels = corrupt(batch.input_ids, mask, vocab.mask_id, vocab.size,
                                    recipe.corruption, self.generator, vocab.special_ids)
        # A GPU computes while the program goes on; a line that needs a number from it has to wait.
        # This one needs N. Student and teacher share it, so that nothing below waits.
        queries = query_positions(mask)
        targets = queries.pick(labels)  # (N,)
        inputs = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids,
                  "positions": queries}
        with self.autocast():
            # The embeddings are looked up here, not in the model: Typhoon asks for their gradient.
            words = self.model.bert.embeddings.word_embeddings(corrupted)  # (B, L, H)
            if self.strategy.wants_gradient:
                words.retain_grad()  # autograd keeps gradients of parameters, not of results
            logits = self.parallel(inputs_embeds=words, **inputs)  # (N, V)
            teacher_logits = None
            if kd_weight:
                with torch.no_grad():  # the teacher reads the same corrupted text
                    teacher_logits = self.teacher(corrupted, **inputs)  # (N, V)
            if len(targets):
                mean = kd_loss(logits, teacher_logits, targets, kd_weight, recipe.kd_temperature)
                loss = mean * len(targets)
            else:  # a mean over nothing is NaN; DistributedDataParallel wants every parameter used
                loss = logits.sum()  # 0
        # Micro-batches and ranks hold different numbers of masked tokens: sums, divided by the
        # total of the step, make every token count the same. The average over ranks divides once
        # more, by their number; the factor undoes that.
        (loss * world_size() / masked_in_all).backward()
        if self.strategy.wants_gradient:
            unseen = corrupted != batch.input_ids  # [T]: a kept token is visible although guessed
            # No parameter, so not averaged over ranks: the factor is still in this gradient.
            self.strategy.observe(batch, unseen, words.grad / world_size())
        return loss.detach()

    def step(self, step: int) -> Tensor:
        """One optimizer step. Returns a tensor (4,) on the device, over all ranks: the mean loss
        (nats a masked token), the gradient's norm, masked tokens, maskable tokens."""
        recipe, progress = self.recipe, step / self.recipe.steps
        self.seed(step)
        self.strategy.context.progress = progress
        batches = [self.texts.batch(index) for index in self.text_numbers(step)]
        strategy = self.strategy if progress >= recipe.strategy_start else self.random
        with self.autocast():  # self-entropy runs the model
            masks = [strategy.mask(batch, self.generator) for batch in batches]
        counts = torch.stack([sum(mask.sum() for mask in masks),
                              sum(batch.maskable.sum() for batch in batches)])
        masked, maskable = reduce_sum(counts)
        masked_in_all = masked.clamp(min=1)  # short texts may leave nothing to guess
        kd_weight = recipe.kd_weight if progress >= recipe.kd_start else 0.0
        loss = 0
        for i, (batch, mask) in enumerate(zip(batches, masks), start=1):
            # Among ranks, gradients travel once a step: with the last micro-batch.
            self.parallel.require_backward_grad_sync = i == len(batches)
            loss = loss + self.micro_step(batch, mask, masked_in_all, kd_weight)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * lr_at(step, recipe.steps, recipe.warmup)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.strategy.end_step(reduce_sum)
        return torch.stack([reduce_sum(loss) / masked_in_all, norm, masked.float(),
                            maskable.float()])

    def text_numbers(self, step: int) -> list[Tensor]:
        """Returns which texts this rank reads in this step, a tensor on the CPU for each
        micro-batch: its share of the next batch_size texts."""
        size, n = self.recipe.batch_size, len(self.texts)
        places = np.arange(step * size, (step + 1) * size)  # in the stream of all epochs
        numbers = [epoch_order(n, self.recipe.seed, place // n)[place % n] for place in places]
        shares = np.array(numbers).reshape(world_size(), self.recipe.accumulate, -1)
        return list(torch.from_numpy(shares[rank()]))

    def seed(self, step: int):
        """Seeds dropout and masks. SeedSequence turns neighbouring steps into unrelated seeds."""
        sequence = np.random.SeedSequence([self.recipe.seed, rank(), step])
        for_dropout, for_masks = sequence.generate_state(2)
        torch.manual_seed(int(for_dropout))
        self.generator.manual_seed(int(for_masks))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.recipe.bf16))


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the numbers 0 to n - 1 in the order in which this epoch reads them."""
    return np.random.default_rng([seed, epoch]).permutation(n)


# --- a run ----------------------------------------------------------------------------------------

def pretrain(args: Options, go_on: str = ""):
    """One run, from text to summary. A signal during its steps ends it with everything saved;
    go_on: the command that then goes on with it, by default --resume."""
    label, device = strategy_label(args.masking), pick_device(args.device)
    say(f"{label} masking, {args.steps:,} steps: preparing text and model")
    recipe = replace(args, bf16=use_bf16(device, args.bf16))
    if device.type == "cuda" and not recipe.bf16:
        # Matrix products in TF32: float32's range with bfloat16's speed and 10 bits of mantissa.
        torch.set_float32_matmul_precision("high")

    # Text in the word pieces of --init or --teacher, or else in a vocabulary of its own.
    if uses_teacher(args):
        args = replace(args, teacher=args.teacher or args.init)
    init, teacher, tokenizer = load_models(args)
    tokenizer, windows, words = tokenised_windows(args, tokenizer)
    size = tokenizer.get_vocab_size()
    if known := init or teacher:  # a model may have more ids than its tokenizer
        size = known.config.vocab_size
    vocab = Vocab(tokenizer, size, device)
    texts, held_out = (Texts(windows[part].to(device), vocab) for part in ("train", "held_out"))
    if not (texts.token_counts().any() and held_out.token_counts().any()):
        raise InputError(f"--corpus {' '.join(args.corpus)} leaves nothing to guess: it is too "
                         f"short for windows of {args.seq_len} tokens, or no word of it is known")
    exam = Exam(held_out, texts.token_counts())

    # A teacher that is wanted and not given is trained here and now, and is --teacher from here on.
    if wants_teacher(args):
        args = replace(args, teacher=automatic_teacher(args, texts.digest(), recipe.bf16, device))
        teacher, _ = load_pretrained(args.teacher, "mlm", whole=True)

    # The model, and what trains it.
    torch.manual_seed(args.seed)
    model = init or fresh_model(args, texts)
    if args.student_init != "random":
        init_student(model, teacher, args.student_init)
    model.to(device)
    if args.compile:
        model.bert.compile()
        model.head.compile()
    teacher_weights = table = None
    if teacher:
        teacher.to(device).eval()
        teacher_weights = weights_digest(args.teacher)
        if find_strategy(args.masking).needs_teacher:
            how = (args.entropy_input, args.mask_rate, recipe.bf16)
            key = [teacher_weights, texts.digest(), *how, device.type]
            table = cached("entropy", key, lambda: entropy_table(teacher, texts, *how).cpu())
            table = table.to(device)
    strategy = build_strategy(args.masking, model, texts, args, table)
    trainer = Trainer(model, texts, strategy, recipe, teacher)

    # The run's directory; a resumed run goes on from the checkpoint in it.
    args = replace(args, out=args.out or free_directory(args))
    barrier()  # every rank has found the same name before rank 0 makes it
    run = Path(args.out)
    settings = vars(args) | {"resume": None, "ranks": world_size(),
                             "windows": [texts.digest(), held_out.digest()],
                             "teacher_weights": teacher_weights, "versions": versions()}
    ran_on = f"{device.type}, {'bf16' if recipe.bf16 else 'float32'}"
    state = {"step": 0, "seconds": 0.0, "log": [], "results": torch.zeros(args.steps, 4),
             "ran_on": ran_on}
    if args.resume:
        state |= load_checkpoint(run, trainer, settings)
        if not state["ran_on"].endswith(ran_on):
            state["ran_on"] += f", then {ran_on}"
    settings["ran_on"] = state["ran_on"]
    if rank() == 0:
        write_atomic(run / "train_args.json", json.dumps(settings, indent=1) + "\n")
    say(f"{run}: {words:,} words; {len(texts):,} windows of {args.seq_len} tokens to learn from, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{args.mask_rate:.0%} of the tokens masked, on {device}")
    if words < FEW_WORDS:
        say("So few words teach a model little (docs has 300,000 if Python's library is complete).")
    if device.type == "cpu" and torch.get_num_threads() > 1:
        say("On a machine that is busy otherwise, OMP_NUM_THREADS=1 is faster than all its cores.")
    tenth = max(1, args.steps // 10)
    every = (args.log_every, args.eval_every or tenth, args.save_every or tenth)
    python = f"torchrun --nproc_per_node={world_size()}" if world_size() > 1 else "python"
    go_on = go_on or f"{python} train.py --resume {shlex.quote(args.out)}"
    mine = training_loop(trainer, exam, run, state, every, go_on)

    # The exam's results, and the model. Its weights come last: they mark a finished run.
    answers = {"word-piece frequency alone": exam.frequency_alone()}
    if teacher:
        answers["the teacher"] = exam.take(teacher, recipe.bf16)
    answers[f"this model ({label})"] = mine
    rows = {name: exam_metrics(**exam.per_window(given)) for name, given in answers.items()}
    if rank() == 0:
        record = exam_record(settings, rows, exam.per_window(mine), state)
        write_atomic(run / "exam.json", json.dumps(record) + "\n")
        save_pretrained(model, tokenizer, run)
    say(summary(settings, rows, mine, state))
    say("\nWhat it fills in:\n" + "\n".join(fill_in(model, tokenizer, device)))


def training_loop(trainer: Trainer, exam: Exam, run: Path, state: dict,
                  every: tuple[int, int, int], go_on: str) -> np.ndarray:
    """Takes the steps that are left and keeps `state`, which a checkpoint holds beside the trainer.
    every: steps between log lines, exams, checkpoints. Returns the last exam's answers. Raises
    RunError on a loss that is not finite."""
    recipe, answers = trainer.recipe, None
    results = state["results"] = state["results"].to(trainer.device)  # (steps, 4): of each step
    began, received = time.perf_counter() - state["seconds"], []
    bar = with_bar(range(state["step"] + 1, recipe.steps + 1), run.name)
    trainer.model.train()
    with on_signal(lambda number, _: received.append(number)), bar:
        for step in bar:
            results[step - 1] = trainer.step(step - 1)
            stop = agreed_signal(received, step - 1, trainer.device)
            log_now, exam_now, save_now = (step % n == 0 or step == recipe.steps for n in every)
            if stop or log_now or exam_now or save_now:
                # Reading a result waits for the GPU: not in every step.
                if not results[:step].isfinite().all():
                    raise RunError(f"by step {step} the loss or its gradient is not finite: lower "
                                   f"--lr or drop --bf16. A checkpoint, if any, is in {run}")
            if log_now:
                loss, norm, masked, _ = results[:step].cpu().double().T  # (step,) each
                new = slice((step - 1) // every[0] * every[0], step)  # since the last line
                mean = ((loss * masked)[new].sum() / masked[new].sum().clamp(min=1)).item()
                lr = trainer.optimizer.param_groups[0]["lr"]
                # No times: the log of a resumed run is the same to the byte.
                state["log"].append({"step": step, "loss": mean, "lr": lr,
                                     "max_grad_norm": norm[new].max().item(),
                                     "masked_so_far": int(masked.sum())})
                bar.set_postfix(loss=f"{mean:.3f}", lr=f"{lr:.1e}")
            if exam_now:
                answers = exam.take(trainer.model, recipe.bf16)
                metrics = exam_metrics(**exam.per_window(answers))
                state["log"].append({"step": step, "exam": metrics})
            if rank() == 0 and (log_now or exam_now):
                lines = [json.dumps(line) + "\n" for line in state["log"]]
                write_atomic(run / "log.jsonl", "".join(lines))
            state |= {"step": step, "seconds": time.perf_counter() - began}
            if rank() == 0 and (save_now or stop):
                parts = {name: part.state_dict() for name, part in trainer.parts.items()}
                save(run / "checkpoint.pt", {"trainer": parts, **state})
            if stop:
                barrier()  # rank 0 has saved
                say(f"stopped after step {step} and saved; to go on: {go_on}")
                raise SystemExit(128 + stop)  # as a shell reports a signal
    return exam.take(trainer.model, recipe.bf16) if answers is None else answers


def load_models(args: Options):
    """Returns --init's model, --teacher's and their tokenizer, None for what is not given. Raises
    InputError where they do not fit: an id must be the same word piece to both."""
    init = teacher = tokenizer = None
    torch.manual_seed(args.seed)  # of a masked-LM head that --init may lack
    if args.init:
        init, tokenizer = load_pretrained(args.init, "mlm", dropout=args.dropout,
                                          whole=args.init == args.teacher)
    if args.teacher:
        teacher, pieces = load_pretrained(args.teacher, "mlm", whole=True)
        if init and (init.config.vocab_size != teacher.config.vocab_size
                     or tokenizer.get_vocab() != pieces.get_vocab()):
            raise InputError(f"{args.teacher} and {args.init} do not predict the same word pieces")
        tokenizer = pieces
    if tokenizer and args.vocab_size not in (None, tokenizer.get_vocab_size()):
        known = args.teacher or args.init
        settings = find_pretrained(known) / "train_args.json"
        # A run's text may have fewer word pieces than its --vocab-size asked for.
        if not settings.exists() or read_json(settings).get("vocab_size") != args.vocab_size:
            raise InputError(f"{known} has {tokenizer.get_vocab_size():,} word pieces, not "
                             f"{args.vocab_size:,}: drop --vocab-size")
    for name, model in (("--init", init), ("--teacher", teacher)):
        if model and args.seq_len > (most := model.config.max_position_embeddings):
            raise InputError(f"{name} has {most} positions: lower --seq-len")
    return init, teacher, tokenizer


@torch.no_grad()
def fresh_model(args: Options, texts: Texts) -> BertForMaskedLM:
    """Returns a model of --preset as it is before its first step.

    The decoder's bias is the log of each word piece's frequency: with zero weights, its softmax is
    the frequency itself, the first thing that a model from scratch learns."""
    config = BertConfig.preset(args.preset, vocab_size=texts.vocab.size,
                               pad_token_id=texts.vocab.pad_id, hidden_dropout_prob=args.dropout,
                               attention_probs_dropout_prob=args.dropout)
    model = BertForMaskedLM(config)
    if not args.plain_start:
        local_start(model)
    counts = texts.token_counts() + 1
    model.head.bias.copy_((counts / counts.sum()).log())
    return model


def build_strategy(name: str, model: BertForMaskedLM, texts: Texts, masking: Masking,
                   teacher_entropy: Tensor | None = None) -> Strategy:
    """Returns the strategy `name` for these texts; teacher_entropy (n, L), where it needs one."""
    context = Context(rate=masking.mask_rate, model=model, token_counts=texts.token_counts(),
                      continuation=texts.vocab.continuation, mask_token_id=texts.vocab.mask_id,
                      teacher_entropy=teacher_entropy, entropy_select=masking.entropy_select,
                      entropy_input=masking.entropy_input, spread=masking.typhoon_spread,
                      ema_weight=masking.typhoon_ema)
    return find_strategy(name)(context)


# --- the exam -------------------------------------------------------------------------------------
# Random positions of held-out text, the same for every strategy, each of them [MASK]: with BERT's
# 80/10/10 a model that copies what it sees would already score.

BANDS = ("common", "middle", "rare")
SENTENCES = ("return the [MASK] of the list.", "the file could not be [MASK].",
             "this is the first [MASK] of the year.")


def frequency_bands(training_counts: Tensor, held_out_counts: Tensor) -> Tensor:
    """Returns the band of every type, (V,): 0, 1, 2 for the commonest, middle and rarest types that
    each make up a third of the held-out text. The training counts (V,) rank the types.

    >>> frequency_bands(torch.tensor([9, 1, 5, 2]), torch.tensor([4, 2, 4, 2])).tolist()
    [0, 2, 1, 2]
    """
    order = training_counts.argsort(descending=True, stable=True)  # (V,), commonest first
    mass = held_out_counts[order]
    # A type that crosses the end of a third belongs to the one in which the middle of its share
    # lies. Twice that middle is a whole number, so that no rounding decides.
    twice_middle = 2 * mass.cumsum(0) - mass
    band = (3 * twice_middle // (2 * mass.sum()).clamp(min=1)).clamp(max=2)
    return torch.empty_like(order).scatter(0, order, band)  # by id again


def exam_metrics(right: np.ndarray, count: np.ndarray, log_likelihood: np.ndarray) -> dict:
    """Returns the exam's five figures, higher is better for each: accuracy, over all positions and
    in each band (fractions, 0 where nothing was asked), and the mean log-likelihood (nats).

    right, count (n, 3): of each window and band; log_likelihood (n,): of a window, summed.

    >>> exam_metrics(np.array([[2, 1, 0]]), np.array([[2, 2, 1]]), np.array([-5.0]))
    {'accuracy': 0.6, 'common': 1.0, 'middle': 0.5, 'rare': 0.0, 'log_likelihood': -1.0}
    """
    asked, hits = count.sum(0), right.sum(0)  # (3,)
    bands = dict(zip(BANDS, (hits / np.maximum(asked, 1)).tolist()))
    positions = max(1, int(asked.sum()))
    return {"accuracy": float(hits.sum() / positions), **bands,
            "log_likelihood": float(log_likelihood.sum() / positions)}


class Exam:
    """The questions: batches of held-out windows with a mask each, from a fixed seed, P masked
    positions in all. token_counts (V,): of the training corpus.

    Answers are an array (3, P), a row each: the loss (nats); 1 where the guess is right, else 0;
    the entropy of the model's prediction (nats)."""

    def __init__(self, texts: Texts, token_counts: Tensor):
        self.texts, self.token_counts = texts, token_counts
        generator = torch.Generator().manual_seed(0)  # on the CPU: the same on every device
        batches = [texts.batch(index) for index in torch.arange(len(texts)).split(64)]
        self.questions = [(batch, random_mask(batch.maskable, EXAM_RATE, generator))
                          for batch in batches]
        self.tokens = torch.cat([batch.input_ids[mask] for batch, mask in self.questions])  # (P,)
        window = torch.cat([batch.index[mask.nonzero()[:, 0]] for batch, mask in self.questions])
        band = frequency_bands(token_counts, texts.token_counts())[self.tokens]  # (P,)
        self.cell = (3 * window + band).cpu().numpy()  # (P,), one number for window and band

    def take(self, model: BertForMaskedLM, bf16: bool = False) -> np.ndarray:
        """Returns the model's answers, (3, P). Ranks share the batches."""
        sizes = [int(mask.sum()) for _, mask in self.questions]
        answers = torch.zeros(3, len(self.tokens), device=self.tokens.device)
        parts = list(zip(self.questions, answers.split(sizes, dim=1), self.tokens.split(sizes)))
        with evaluating(model), torch.autocast(answers.device.type, torch.bfloat16, enabled=bf16):
            for (batch, mask), part, tokens in parts[rank()::world_size()]:  # part: a view
                masked_ids = batch.input_ids.masked_fill(mask, self.texts.vocab.mask_id)
                logits = model(masked_ids, batch.attention_mask, batch.token_type_ids,
                               positions=query_positions(mask)).float()  # (N, V)
                part[0] = F.cross_entropy(logits, tokens, reduction="none")
                part[1] = logits.argmax(-1) == tokens
                part[2] = token_entropy(logits)
        # A batch's answers are zeros but on the rank that took it: the sum gathers them.
        return reduce_sum(answers).cpu().double().numpy()

    def frequency_alone(self) -> np.ndarray:
        """Returns the answers, (2, P), of whoever knows the training corpus's frequencies alone."""
        counts = (self.token_counts + 1) * self.texts.vocab.ordinary  # nothing is impossible
        loss = -(counts / counts.sum())[self.tokens].log()
        right = self.tokens == self.token_counts.argmax()
        return torch.stack([loss, right]).cpu().double().numpy()

    def per_window(self, answers: np.ndarray) -> dict[str, np.ndarray]:
        """Returns what `exam_metrics` takes: right and count, (n, 3), and log_likelihood, (n,)."""
        n = len(self.texts)
        right = np.bincount(self.cell, answers[1], minlength=3 * n).astype(int)
        count = np.bincount(self.cell, minlength=3 * n)
        return {"right": right.reshape(n, 3), "count": count.reshape(n, 3),
                "log_likelihood": -np.bincount(self.cell // 3, answers[0], minlength=n)}


def entropy_line(answers: np.ndarray) -> str:
    """Says how far the entropies in `Exam.take`'s answers differ, and whether they go with the
    mistakes: what a strategy that ranks positions by them has to work with."""
    loss, _, entropy = answers
    ranks = [values.argsort().argsort() for values in (loss, entropy)]
    spearman = np.corrcoef(ranks)[0, 1] if len(loss) > 1 else 0.0
    return (f"entropy of hidden held-out tokens: sd {entropy.std():.2f} nats, "
            f"Spearman with the loss {spearman:.2f}")


def exam_record(settings: dict, rows: dict[str, dict], per_window: dict, state: dict) -> dict:
    """Returns exam.json: what stats.py reads of a run. rows: frequency alone first, the model
    last, each with its `exam_metrics`."""
    baseline, *_, mine = rows.values()
    _, _, masked, maskable = state["results"].cpu().double().sum(0).tolist()
    return {"task": "mlm", "model": settings["out"], "pattern": None, "seed": settings["seed"],
            "strategy": strategy_label(settings["masking"]) + "-kd" * bool(settings["kd_weight"]),
            "args": settings, "pretraining": settings, "versions": settings["versions"],
            "last": mine, "baseline": baseline, "masked": masked / max(1, maskable),
            "dev": {name: array.tolist() for name, array in per_window.items()},
            "seconds": state["seconds"]}


def summary(settings: dict, rows: dict[str, dict], answers: np.ndarray, state: dict) -> str:
    """Says in plain words what came of a run; rows as in `exam_record`."""
    _, _, masked, maskable = state["results"].cpu().double().sum(0).tolist()
    questions, heads = answers.shape[1], ("accuracy", *BANDS)
    title = f"{questions:,} held-out word pieces, all [MASK]"
    lines = [f"\n{settings['out']}: {settings['steps']:,} steps, {state['seconds']:.0f} s",
             f"masked {masked / max(1, maskable):.2%} of the ordinary tokens (asked for: "
             f"{settings['mask_rate']:.2%}), {masked:,.0f} guesses in all",
             f"\n{title:<44}  loss (nats)" + "".join(f"{head:>10}" for head in heads)]
    for name, metrics in rows.items():
        shares = "".join(f"{metrics[head]:>10.1%}" for head in heads)
        lines.append(f"  {name:<42}{-metrics['log_likelihood']:>13.2f}{shares}")
    lines += [f"\n{entropy_line(answers)}",
              "The same exam for every strategy. A strategy's own training loss is no measure: "
              "hard tokens cost more."]
    if questions < FEW_QUESTIONS:
        lines.append(f"With {questions} questions chance decides between models: give more text.")
    baseline, *_, mine = [metrics["log_likelihood"] for metrics in rows.values()]
    if not mine >= baseline:  # worse, or NaN
        lines.append("This model is worse than guessing by frequency alone: its training diverged "
                     "(lower --lr), was too short, or asked for rare word pieces too often.")
    return "\n".join(lines)


def fill_in(model: BertForMaskedLM, tokenizer: Tokenizer, device: torch.device) -> list[str]:
    """Returns SENTENCES, each with the three likeliest words for its gap."""
    lines = []
    for sentence in SENTENCES:
        ids = torch.tensor([tokenizer.encode(sentence).ids], device=device)  # (1, L)
        gap = ids == tokenizer.token_to_id("[MASK]")
        with evaluating(model):
            best = model(ids)[gap][0].float().softmax(-1).topk(3)
        words = [f"{tokenizer.id_to_token(i)} {p:.0%}"
                 for p, i in zip(best.values.tolist(), best.indices.tolist())]
        lines.append(f"  {sentence:<40} {', '.join(words)}")
    return lines


# --- the teacher and its entropies ----------------------------------------------------------------

# With its student's seed a teacher would start from the same weights and see the same masks. Not
# 2 ** 32: PyTorch's generator on a CPU takes 32 bits of a seed, so that this would change nothing.
TEACHER_SEEDS = 2 ** 31  # plus the student's seed


def uses_teacher(args: Options) -> bool:
    """Whether anything in this run asks a teacher. Where none is given, that is --init's model."""
    return (find_strategy(args.masking).needs_teacher or args.kd_weight > 0
            or args.student_init != "random")


def wants_teacher(args: Options) -> bool:
    """Whether this run has to train its teacher first."""
    return uses_teacher(args) and not (args.teacher or args.init)


def teacher_options(args: Options) -> list[str]:
    """Returns the options that make a run's teacher when they follow the run's own."""
    return ["--masking", "random", "--mask-rate", "0.3", "--corruption", "0.8", "0.1", "0.1",
            "--kd-weight", "0", "--student-init", "random", "--steps", str(args.teacher_steps)]


def automatic_teacher(args: Options, windows: str, bf16: bool, device: torch.device) -> str:
    """Returns the directory of the teacher for runs that name none, trained now unless it is there.
    Its name tells what decides its weights, but for the versions of the packages; windows: the
    digest of the text."""
    seed = ["--seed", str(TEACHER_SEEDS + args.teacher_seed)]
    teacher = make_parser().parse_args([*teacher_options(args), *seed], replace(args))
    decides = ("seed", "preset", "plain_start", "dropout", "steps", "batch_size", "accumulate",
               "lr", "warmup", "weight_decay", "clip")
    key = [windows, bf16, device.type, world_size(), *(getattr(teacher, name) for name in decides)]
    teacher.out = f"runs/reference-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]}"
    if not (Path(teacher.out) / "model.safetensors").exists():
        started = (Path(teacher.out) / "train_args.json").exists()
        teacher.resume = teacher.out if started else None
        say(f"No --teacher is given: one is trained first and kept in {teacher.out}, in "
            f"{teacher.steps:,} --teacher-steps, {teacher.steps / args.steps:.1f} times this run's")
        pretrain(teacher, go_on="the same command")
    barrier()  # rank 0 has written the model
    return teacher.out


def entropy_table(teacher: BertForMaskedLM, texts: Texts, entropy_input: str, rate: float,
                  bf16: bool) -> Tensor:
    """Returns the teacher's entropy at every position of every text, (n, L) float16 in nats, 0
    where nothing is maskable. The teacher is frozen, so its entropies never change: a run looks
    them up. entropy_input: "visible", one pass over the text as it is; "masked", each position
    while it is hidden, about a share `rate` of a text at a time (`masked_entropy`)."""
    device, rows = texts.input_ids.device, []
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same groups on every device
    size = 1024 if device.type == "cuda" else 64  # texts at once: many keep a GPU busy
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for index in with_bar(torch.arange(len(texts)).split(size), "the teacher's entropies"):
            batch = texts.batch(index)
            if entropy_input == "visible":
                entropy = position_entropy(teacher, batch, batch.input_ids, batch.maskable)
            else:
                entropy = masked_entropy(teacher, batch, rate, texts.vocab.mask_id, generator)
            rows.append(F.pad(entropy.half(), (0, texts.input_ids.shape[1] - entropy.shape[1])))
    return torch.cat(rows)


# --- text -----------------------------------------------------------------------------------------
# A corpus is a list of documents, a document a list of paragraphs.

PIECE = 500  # words of a document that are held out or trained on together
HELD_OUT = 0.1  # share of the pieces that the exam gets
WIKITEXT = {  # name: address, sha256 of the archive
    "wikitext-2": ("https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
                   "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
    "wikitext-103": ("https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
                     "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"),
}
SUFFIXES = (".txt", ".md", ".jsonl")  # what is read of a folder


def read_corpus(names: list[str], fraction: float) -> tuple[list[list[str]], list[list[str]]]:
    """Returns (training text, held-out text), each a list of pieces, a piece a list of paragraphs.

    A tenth of the pieces is held out, at least one; WikiText brings held-out articles of its own.
    fraction: of the training text, always the same. Raises InputError where there is too little."""
    documents = read_docs() if "docs" in names else []
    for path in with_bar(corpus_files(names), "reading the corpus"):
        documents += read_documents(path)
    drawn = sorted(draw_pieces(documents))
    tenth = max(1, min(sum(u < HELD_OUT for u, _ in drawn), len(drawn) - 1))
    held_out, training = [piece for _, piece in drawn[:tenth]], drawn[tenth:]
    for name in sorted(WIKITEXT.keys() & names):
        articles, more = read_wikitext(name)
        # The pieces above drew from HELD_OUT to 1. Articles are brought into the same range: then
        # --corpus-fraction takes the same share of both.
        training += [(HELD_OUT + (1 - HELD_OUT) * draw(article[0]), article)
                     for article in articles]
        held_out += more
    if not training:
        words = sum(len(text.split()) for piece in held_out for text in piece)
        raise InputError(f"--corpus {' '.join(names)} has {words:,} words in one piece, and the "
                         "exam needs another: a line is a paragraph, a blank line ends a document, "
                         f"and longer documents are divided after a paragraph, at {PIECE} words")
    kept = sorted(training)[:math.ceil(fraction * len(training))]
    return [piece for _, piece in kept], held_out


def draw(text: str) -> float:
    """Returns a number in [0, 1), as if drawn at random, but always the same for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2 ** 48


def draw_pieces(documents: list[list[str]]) -> list[tuple[float, list[str]]]:
    """Returns the documents in pieces of about PIECE words, each with a draw that decides whether
    it is held out. It depends on the document's first paragraph and the piece's number, so that
    another document more or less, as between two versions of Python, moves no piece.

    The exam should ask nothing that stands in the training text as well: a paragraph is kept once
    in the whole corpus, and rulers such as ------ shrink to ---."""
    pieces, seen, numbers = [], set(), Counter()
    for document in documents:
        first, words = document[0], PIECE
        for paragraph in document:
            if words >= PIECE:  # the piece is full: another begins
                numbers[first] += 1  # documents with the same first paragraph count on
                piece, words = [], 0
                pieces.append((draw(f"{numbers[first]} {first}"), piece))
            words += len(paragraph.split())
            squeezed = re.sub(r"([^\w\s]|_)\1{3,}", r"\1\1\1", paragraph)
            if squeezed not in seen:
                seen.add(squeezed)
                piece.append(squeezed)
    return [(u, piece) for u, piece in pieces if piece]


def corpus_files(names: list[str]) -> list[Path]:
    """Returns the files of every FILE and DIR. Raises InputError on a name without a file."""
    files = []
    for name in names:
        if name == "docs" or name in WIKITEXT:
            continue
        path = Path(name)
        inside = [file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
        found = [path] if path.is_file() else sorted(inside)
        if not found:
            raise InputError(f"--corpus {name}: no such file, nor a folder with "
                             f"{', '.join(SUFFIXES)} files (or docs, {', '.join(WIKITEXT)})")
        files += found
    return files


def read_docs() -> list[list[str]]:
    """Returns the docstrings of Python's standard library, a document for each module, without its
    tests and programs, and last the topics of the language reference that `help()` shows."""
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip",
            "turtledemo", "pydoc_data"}
    files, texts = [], []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in skip]  # those are not even walked
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in with_bar(sorted(files), "reading Python's docs"):
        nodes = [node for node in ast.walk(ast.parse(path.read_bytes()))
                 if isinstance(node, holders)]
        texts.append("\n\n".join(ast.get_docstring(node) or "" for node in nodes))
    with contextlib.suppress(ImportError):  # some systems leave the topics out
        from pydoc_data.topics import topics
        texts += topics.values()
    return as_documents(text.split("\n\n") for text in texts)


def read_documents(path: Path) -> list[list[str]]:
    """Returns the documents of a file: in a .jsonl file the `text` of each line, elsewhere what a
    blank line ends. A paragraph is a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{path} is binary or not UTF-8: convert it first")
    parts = re.split(r"\n\s*\n", text)
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        parts = [json_text(path, i, line) for i, line in lines if line.strip()]
    return as_documents(part.split("\n") for part in parts)


def json_text(path: Path, i: int, line: str) -> str:
    """Returns the `text` of line i of a .jsonl file. Raises InputError where there is none."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        text = json.loads(line)["text"]
        text.encode()  # half of a surrogate pair, as in "\ud83d", is no character
        return text
    raise InputError(f"{path}, line {i}: no JSON object with a \"text\" that is valid Unicode")


def read_wikitext(name: str) -> list[list[list[str]]]:
    """Returns WikiText's training and held-out articles, each with its title first."""
    (url, sha256), articles = WIKITEXT[name], []
    with zipfile.ZipFile(download(url, Path("data") / Path(url).name, sha256)) as archive:
        for part in ("train", "valid"):
            text = archive.read(f"{name}-raw/wiki.{part}.raw").decode()
            for escape, mark in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
                text = text.replace(escape, mark)
            parts = re.split(r"\n(?= = [^=])", text)
            articles.append(as_documents(part.split("\n") for part in parts))
    return articles


def as_documents(parts) -> list[list[str]]:
    """Returns lists of paragraphs, single-spaced, without the empty ones."""
    documents = [[" ".join(text.split()) for text in part if text.strip()] for part in parts]
    return [document for document in documents if document]


def download(url: str, path: Path, sha256: str) -> Path:
    """Sees to it that the file at `url` is at `path`, and returns path. Raises InputError where it
    cannot be had, or has another sha256."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, ValueError, RuntimeError) as error:  # no network, a bad address, the hash
        raise InputError(f"could not fetch {url} ({error}): put that file at {path} "
                         "yourself") from None
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InputError(f"{path} is not the file of {url} (sha256 {found[:12]}...): delete it")
    return path


# --- tokens, windows, caches ----------------------------------------------------------------------

class Vocab:
    """What masking must know of a tokenizer, as tensors on a device."""

    def __init__(self, tokenizer: Tokenizer, size: int, device: torch.device):
        pieces = [tokenizer.id_to_token(i) or "" for i in range(size)]  # a model may have spare ids
        self.size = size
        self.mask_id, self.pad_id = tokenizer.token_to_id("[MASK]"), tokenizer.token_to_id("[PAD]")
        added = tokenizer.get_added_tokens_decoder().values()
        not_text = {*SPECIAL_TOKENS, "", *(token.content for token in added if token.special)}
        special = [piece in not_text for piece in pieces]
        self.special_ids = tuple(i for i in range(size) if special[i])
        self.ordinary = ~torch.tensor(special, device=device)  # (V,)
        prefix = tokenizer.model.continuing_subword_prefix  # "##" in BERT's own
        continuation = [piece.startswith(prefix) for piece in pieces]
        self.continuation = torch.tensor(continuation, device=device)  # (V,)


class Texts:
    """The texts of a corpus as one array on the device: (n, L) ids, all of the same length or
    padded with the tokenizer's [PAD]."""

    def __init__(self, input_ids: Tensor, vocab: Vocab, token_type_ids: Tensor | None = None):
        self.input_ids, self.vocab, self.token_type_ids = input_ids, vocab, token_type_ids
        self.padded = bool((input_ids == vocab.pad_id).any())
        self.lengths = torch.full((len(input_ids),), input_ids.shape[1])  # (n,)
        if self.padded:
            # The last column with a token, not their number: text may hold the word "[PAD]". On the
            # CPU, so that cutting a batch does not wait for a GPU.
            columns = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
            self.lengths = ((input_ids != vocab.pad_id) * columns).amax(1).cpu()

    def __len__(self):
        return len(self.input_ids)

    def batch(self, index: Tensor) -> Batch:
        """Returns texts number `index` (B,), a tensor on the CPU, cut to the longest of them."""
        longest, device = int(self.lengths[index].max()), self.input_ids.device
        if device.type == "cuda":  # from pinned memory a GPU fetches it while the program goes on
            index = index.pin_memory()
        index = index.to(device, non_blocking=True)
        ids = self.input_ids[index, :longest].long()  # (B, L)
        types, attention_mask = self.token_type_ids, None
        if types is not None:
            types = types[index, :longest].long()
        if self.padded:
            attention_mask = ids != self.vocab.pad_id
        return Batch(ids, self.vocab.ordinary[ids], index, attention_mask, types)

    def digest(self) -> str:
        """Returns the sha256 of the token ids, which tells these texts from others."""
        return hashlib.sha256(self.input_ids.cpu().numpy().tobytes()).hexdigest()

    def token_counts(self) -> Tensor:
        """Returns how often each ordinary type occurs, (V,)."""
        counts = torch.bincount(self.input_ids.flatten(), minlength=self.vocab.size)
        return counts * self.vocab.ordinary


def train_tokenizer(documents: list[list[str]], vocab_size: int) -> Tokenizer:
    """Returns a lower-case WordPiece vocabulary of the documents; the same one every time."""
    # The time grows with the square of a word's length: cut what is too long to be a word.
    unbroken = re.compile(r"\S{1000}")
    texts = [unbroken.sub(r"\g<0> ", text) for document in documents for text in document]
    tokenizer, letters = wordpiece_tokenizer({}), set()
    for text in with_bar(texts, "counting letters"):
        letters.update(tokenizer.normalizer.normalize_str(text))
    # The trainer numbers the one-letter continuations in the order of a hash table that each
    # process seeds anew. Named beforehand, they have an order of their own.
    normalize, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    continuations = sorted("##" + letter for letter in letters
                           if len(split(normalize(f"a{letter}a"))) == 1)  # inside a word
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, show_progress=False,
                                        special_tokens=[*SPECIAL_TOKENS, *continuations])
    tokenizer.train_from_iterator(with_bar(texts, "training the vocabulary"), trainer)
    return wordpiece_tokenizer(tokenizer.get_vocab())


def tokenised_windows(data: Data, tokenizer: Tokenizer | None):
    """Returns a tokenizer, the one given or else one of --vocab-size trained on the text; the text
    in its word pieces, "train" (n, L) and "held_out" (m, L), m at most 1,000; and the number of
    words. The first two are made once and kept."""
    if rank() > 0:
        barrier()  # rank 0 goes first; the others find its files
    parts = dict(zip(("train", "held_out"), read_corpus(data.corpus, data.corpus_fraction)))
    words, digest = 0, hashlib.sha256()
    for name, part in parts.items():
        for piece in part:
            words += sum(len(text.split()) for text in piece)
            digest.update(json.dumps([name, piece]).encode())
    size = data.vocab_size or VOCAB_SIZE

    def build():
        pieces = tokenizer or train_tokenizer(parts["train"], size)
        train, held_out = (torch.from_numpy(pack(part, pieces, data.seq_len, name))
                           for name, part in parts.items())
        return {"train": train, "held_out": held_out[:1000], "tokenizer": pieces.to_str()}

    key = [digest.hexdigest(), data.seq_len, tokenizer.to_str() if tokenizer else size]
    windows = cached("text", key, build)
    if rank() == 0:
        barrier()
    return Tokenizer.from_str(windows["tokenizer"]), windows, words


def pack(documents: list[list[str]], tokenizer: Tokenizer, seq_len: int, name: str) -> np.ndarray:
    """Returns windows [CLS] … [SEP] of seq_len tokens, (n, seq_len) int32; n may be 0. Documents
    follow one another with a [SEP] between them, without padding; the last, unfilled window is
    dropped."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    stream = []
    for document in with_bar(documents, f"tokenising: {name}"):
        for pieces in tokenizer.encode_batch_fast(document, add_special_tokens=False):
            stream.append(np.array(pieces.ids, dtype=np.int32))
        stream.append(np.array([sep], dtype=np.int32))
    tokens = np.concatenate(stream)
    inner = seq_len - 2
    body = tokens[:len(tokens) // inner * inner].reshape(-1, inner)  # (n, seq_len - 2)
    return np.pad(body, ((0, 0), (1, 1)), constant_values=((0, 0), (cls, sep)))  # (n, seq_len)


def cached(kind: str, key: object, build):
    """Returns `build()`, kept under data/cache by what it was made from."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = Path(f"data/cache/{kind}-{name}.pt")
    if not path.exists():
        save(path, build())
    return load(path)


# --- files and signals ----------------------------------------------------------------------------

def free_directory(args: Options) -> str:
    """Returns the first of runs/entropy, runs/entropy_2, ... that is not there."""
    stem = "runs/" + strategy_label(args.masking) + "-kd" * bool(args.kd_weight)
    names = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def save(path: Path, values):
    """Writes a file for `load`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path):
    """Returns what `save` has written, on the CPU. Raises InputError where the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise InputError(f"{path} is damaged ({type(error).__name__}): delete it") from None


def load_checkpoint(run: Path, trainer: Trainer, settings: dict) -> dict:
    """Loads the trainer's state and returns the rest, {} where no checkpoint is written yet. Raises
    InputError where text or teacher have changed since."""
    stored, path = read_json(run / "train_args.json"), run / "checkpoint.pt"
    if any(stored.get(name) != settings[name] for name in ("windows", "teacher_weights")):
        raise InputError(f"{run}: its corpus, vocabulary or teacher is not what it was before")
    if not path.exists():
        return {}
    state = load(path)
    for name, part in state.pop("trainer").items():
        trainer.parts[name].load_state_dict(part)
    return state


def versions() -> dict[str, str]:
    """Returns the versions of Python and the packages."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers")}
    return {"python": platform.python_version(), **packages}


@contextlib.contextmanager
def on_signal(handler):
    """While the block runs, SIGINT and SIGTERM call handler(number, frame)."""
    before = {caught: signal.signal(caught, handler) for caught in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for caught, previous in before.items():
            signal.signal(caught, previous)


def agreed_signal(received: list[int], step: int, device: torch.device) -> int:
    """Returns a signal that any rank has received, 0 for none; the same on every rank. Ranks have
    to wait for the answer, so they ask one another in every tenth step only."""
    mine = max(received, default=0)
    if world_size() == 1:
        return mine
    if step % 10:
        return 0
    number = torch.tensor(mine, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


# --- ranks and devices ----------------------------------------------------------------------------
# torchrun starts the program once for each rank, and tells it so in the environment.

def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def reduce_sum(tensor: Tensor) -> Tensor:
    """Sums a tensor over the ranks, in place, and returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier():
    """Waits until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def say(text: str):
    """Prints on rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


def with_bar(items, what: str) -> tqdm:
    """Returns an iterator over items with a bar on rank 0's terminal that is gone when it ends."""
    return tqdm(items, desc=what, leave=False, disable=rank() > 0 or None)


def pick_device(name: str) -> torch.device:
    """Returns the device of that name; auto is a GPU or another accelerator, or else the CPU. Under
    torchrun each rank has a GPU of its own. Raises InputError where there is none."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and world_size() > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # not there, or PyTorch was built without it
        reason = str(error).partition("\n")[0]  # CUDA adds lines of advice for its programmers
        raise InputError(f"--device {name} cannot be used here ({reason}): choose auto, cpu, cuda, "
                         "cuda:N or mps") from None
    return device


def use_bf16(device: torch.device, asked: bool | None) -> bool:
    """Returns what was asked for; by default (None), whether this is a GPU that has bfloat16."""
    if asked is not None:
        return asked
    # NVIDIA's have it from 8.0 on. Emulated, as on a T4 (7.5), it is slower than float32.
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# --- the command line -----------------------------------------------------------------------------

@dataclass
class Data:
    """The text."""
    corpus: list[str] = option(
        ["docs"], f"any of docs, {', '.join(WIKITEXT)}, folders, files (text, or .jsonl with a "
        "\"text\" in each line)", nargs="+")
    corpus_fraction: float = option(1.0, "train on this share", number(float, above=0, high=1))
    vocab_size: int | None = option(
        None, f"default: {VOCAB_SIZE}, or the teacher's", number(int, low=100))
    seq_len: int = option(128, "tokens a window, [CLS] included",
                          number(int, low=3, high=BertConfig.max_position_embeddings))


@dataclass
class Options(Recipe, Data):
    """All options of a run."""
    masking: str = option("random", f"{', '.join(STRATEGIES)}, or FILE.py:CLASS of your own",
                          strategy_name, metavar="STRATEGY")
    teacher: str | None = option(None, "default: trained first if needed", metavar="MODEL")
    teacher_steps: int = option(2400, "steps of the teacher trained first", COUNT)
    teacher_seed: int = option(0, "its seed, whatever --seed is", number(int, low=0, below=2 ** 31))
    student_init: str = option("random", "what is copied from the teacher; random: nothing",
                               choices=["random", "embeddings", "layers"])
    preset: str = option("tiny", "size of a fresh model", choices=list(PRESETS))
    plain_start: bool = option(False, "a fresh model attends to all tokens alike, as BERT does",
                               action=BooleanOptionalAction)
    init: str | None = option(None, "start from a run, directory or hub name", metavar="MODEL")
    dropout: float = option(0.0, "0 suits short runs; BERT has 0.1", FRACTION)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    compile: bool = option(False, "torch.compile the model", action=BooleanOptionalAction)
    out: str | None = option(None, "default: the first free runs/STRATEGY_N", metavar="RUN")
    resume: str | None = option(None, "go on with this run; takes --device alone", metavar="RUN")
    log_every: int = option(100, "steps between lines of log.jsonl", COUNT)
    eval_every: int | None = option(None, "steps between exams; default: a tenth", COUNT)
    save_every: int | None = option(
        None, "steps between checkpoints (1.3 GB at base); default: a tenth", COUNT)


def add_options(add, group: type, **defaults):
    """Adds a class's own options to a parser; add: its add_argument; defaults: other ones."""
    for name in inspect.get_annotations(group):  # those of its bases are not among them
        settings = dict(group.__dataclass_fields__[name].metadata)
        settings["default"] = defaults.get(name, settings["default"])
        add("--" + name.replace("_", "-"), **settings)


def make_parser() -> Parser:
    parser = Parser(description="Pretrain a masked language model.")
    for group in (Options, Masking, Data, Recipe):
        add_options(parser.add_argument_group(group.__name__.lower()).add_argument, group)
    return parser


def parse_args(argv=None) -> Options:
    """Returns the options; with --resume the run's own. Raises InputError where they do not fit one
    another. Models and devices are not looked for."""
    nothing = Namespace(**dict.fromkeys(each.name for each in fields(Options)))
    parsed = vars(make_parser().parse_args(argv, nothing))
    given = {name: value for name, value in parsed.items() if value is not None}
    args = resumed(given) if "resume" in given else Options(**given)
    if abs(sum(args.corruption) - 1) > 1e-6:
        raise InputError("--corruption wants three shares that sum to 1, such as 0.8 0.1 0.1")
    if args.batch_size % (world_size() * args.accumulate):
        raise InputError(f"--batch-size {args.batch_size} cannot be shared by {world_size()} ranks "
                         f"× {args.accumulate} micro-batches")
    corpus_files(args.corpus)
    if args.out and not args.resume:
        out = Path(args.out)
        if not can_write(out / "log.jsonl") or (out.exists() and any(out.iterdir())):
            raise InputError(f"--out {out} must be a new or an empty folder, or --resume {out}")
    return args


def resumed(given: dict) -> Options:
    """Returns the options that a run was started with; given: --resume, and perhaps --device."""
    run = given["resume"]
    for name in given.keys() - {"resume", "device"}:
        raise InputError("--resume takes no other option than --device: drop --"
                         f"{name.replace('_', '-')}, or start a new run with --init {run}")
    stored = read_json(Path(run) / "train_args.json")
    if stored.get("ranks") != world_size():  # each rank draws masks of its own
        raise InputError(f"{run} was started with {stored.get('ranks')} ranks, not {world_size()}")
    known = {each.name: stored[each.name] for each in fields(Options) if each.name in stored}
    return Options(**known | given | {"out": run})


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    if world_size() > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=6))  # in which rank 0 may tokenise
    try:
        with on_signal(signal.default_int_handler):  # it raises KeyboardInterrupt
            pretrain(args)
    except torch.cuda.OutOfMemoryError:
        raise RunError(f"the GPU's memory is full at --batch-size {args.batch_size}, --seq-len "
                       f"{args.seq_len}: lower one of them, or raise --accumulate") from None
    except RuntimeError as error:
        if isinstance(error, dist.DistBackendError) or (world_size() > 1 and "gloo" in str(error)):
            raise RunError("another process of this run was lost, and its own messages say why; "
                           "--resume goes on from the last checkpoint, if there is one") from None
        raise
    if dist.is_initialized():  # not after an error: with NCCL the others would be waited for
        dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
