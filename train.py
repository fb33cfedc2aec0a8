"""Pretrains a masked language model with any of the masking strategies.

    python train.py --masking entropy --device cuda          the main job
    python train.py --masking typhoon --kd-weight 0.5        another strategy, with distillation
    python train.py --corpus docs my_texts/ --preset mini    your own text too, a larger model
    torchrun --nproc_per_node=8 train.py --masking random    data-parallel

With no other argument the corpus is the English that ships with Python, a WordPiece vocabulary is
trained on it, and where a teacher is wanted, one is first trained with random masking and kept for
the next run.

In order: the recipe and one training step (BERT §3.1, with the distillation of distill.py and the
strategies of masking.py); the loop; the exam that every model sits; the teacher and its entropies;
text, tokens and windows; ranks; the run directory; the command line. Shapes: B texts, L tokens,
H hidden, V vocabulary, N masked tokens, P exam positions.
"""
from __future__ import annotations

import sys

if __name__ == "__main__" and sys.stderr.isatty():
    print("importing PyTorch ...", end="\r", file=sys.stderr, flush=True)  # takes some seconds

import ast
import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from argparse import BooleanOptionalAction, Namespace
from collections import Counter
from dataclasses import dataclass, fields
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
from masking import (STRATEGIES, Batch, Context, Random, Strategy, corrupt, evaluating,
                     find_strategy, hidden_entropy, position_entropy, random_mask, strategy_label,
                     strategy_name, token_entropy)
from model import (PRESETS, SPECIAL_TOKENS, BertConfig, BertForMaskedLM, InputError, Parser,
                   RunError, can_write, load_pretrained, local_start, log, number, query_positions,
                   read_json, run_cli, save_pretrained, weights_digest, wordpiece_tokenizer,
                   write_atomic)

EXAM_RATE = 0.15  # masked share of the held-out exam, whatever the run's own rate
CACHE = Path("data/cache")


# --- the recipe -----------------------------------------------------------------------------------

@dataclass
class Recipe:
    """The numbers of the training loop."""
    steps: int
    batch_size: int  # texts an optimizer step, over all ranks and micro-batches
    lr: float
    accumulate: int = 1  # micro-batches that a rank cuts its share of a step into
    warmup: float = 0.1  # a fraction of the steps
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    corruption: tuple[float, float, float] = (0.8, 0.1, 0.1)  # [MASK], a random token, kept
    strategy_start: float = 0.0  # random masks for this fraction of the steps
    kd_weight: float = 0.0  # alpha
    kd_temperature: float = 2.0  # T
    kd_start: float = 0.0  # no distillation for this fraction of the steps
    seed: int = 0
    bf16: bool = False


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Returns AdamW (Loshchilov and Hutter 2019, 1711.05101) over what is not frozen. As in BERT,
    biases and LayerNorms, which are the vectors among the parameters, do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
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
    return max(0.0, (steps - step) / max(1, steps - rising))


# --- the training step ----------------------------------------------------------------------------

class Trainer:
    """A model, its optimizer and a strategy, one optimizer step at a time.

    All randomness of a step is a function of (seed, rank, step), and the order of the texts one of
    (seed, epoch). So a resumed run goes on exactly as it would have, and stores no generator."""

    def __init__(self, model: BertForMaskedLM, texts: Texts, strategy: Strategy, recipe: Recipe,
                 teacher: BertForMaskedLM | None = None):
        self.model, self.texts, self.strategy, self.recipe = model, texts, strategy, recipe
        self.teacher = teacher
        self.device = model.head.bias.device
        self.random = Random(strategy.context)  # stands in before `start`
        self.generator = torch.Generator(self.device)
        self.optimizer = make_optimizer(model, recipe.lr, recipe.weight_decay)
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
        # The next two lines need N. Student and teacher share them, so that nothing waits again.
        targets = labels[mask]  # (N,)
        inputs = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids,
                  "positions": query_positions(mask)}
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
            hidden = corrupted != batch.input_ids  # [T]: a kept token is visible although guessed
            self.strategy.observe(batch, hidden, words.grad / world_size())
        return loss.detach()

    def step(self, step: int) -> Tensor:
        """One optimizer step. Returns a tensor (4,) on the device, over all ranks: the mean loss
        (nats a masked token), the gradient's norm, masked tokens, maskable tokens."""
        recipe, progress = self.recipe, step / self.recipe.steps
        self.seed(step)
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
        for i, (batch, mask) in enumerate(zip(batches, masks)):
            wait = contextlib.nullcontext()
            if world_size() > 1 and i + 1 < len(batches):
                wait = self.parallel.no_sync()  # gradients travel once a step, with the last batch
            with wait:
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
        """Returns which texts this rank reads in this step: a tensor for each micro-batch. The
        ranks' shares together are the next batch_size texts, whatever the number of ranks."""
        size, n = self.recipe.batch_size, len(self.texts)
        places = np.arange(step * size, (step + 1) * size)  # in the stream of all epochs
        numbers = [epoch_order(n, self.recipe.seed, place // n)[place % n] for place in places]
        shares = np.array(numbers).reshape(world_size(), self.recipe.accumulate, -1)
        return list(torch.from_numpy(shares[rank()]).to(self.texts.input_ids.device))

    def seed(self, step: int):
        """Seeds dropout and masks. SeedSequence turns neighbouring steps into unrelated seeds."""
        sequence = np.random.SeedSequence([self.recipe.seed, rank(), step])
        for_dropout, for_masks = sequence.generate_state(2)
        torch.manual_seed(int(for_dropout))
        self.generator.manual_seed(int(for_masks))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16)

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "strategy": self.strategy.state_dict()}

    def load_state_dict(self, state: dict):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.strategy.load_state_dict(state["strategy"])


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the numbers 0 to n - 1 in the order in which this epoch reads them."""
    return np.random.default_rng([seed, epoch]).permutation(n)


# --- the loop -------------------------------------------------------------------------------------

def pretrain(args: Namespace):
    """One run, from text to summary. Raises Stopped where a signal ended it."""
    say(f"{strategy_label(args.masking)} masking, {args.steps:,} steps: preparing text and model")
    trainer, exam, tokenizer, provenance = set_up(args)
    args.out = args.resume or new_directory(args)
    run = Path(args.out)
    state = restore(run, trainer, provenance) if args.resume else {}
    settings = vars(args) | {"resume": None, **provenance}
    if rank() == 0:
        write_atomic(run / "train_args.json", json.dumps(settings, indent=1) + "\n")
    parameters = sum(p.numel() for p in trainer.model.parameters())
    say(f"{run}: {len(trainer.texts):,} windows of {args.seq_len} tokens, {parameters:,} "
        f"parameters, {args.mask_rate:.0%} of the tokens masked, on {trainer.device}")
    totals, seconds = training_loop(trainer, exam, run, args, state)
    finish(trainer, exam, tokenizer, run, settings, totals, seconds)


def training_loop(trainer: Trainer, exam: Exam, run: Path, args: Namespace, state: dict):
    """Takes the steps, with a log, the exam and checkpoints. state: the checkpoint's, {} for a new
    run. Returns the masked and the maskable tokens (2,) and the seconds of the whole run.

    Raises RunError on a loss that is not finite, and Stopped on a signal, with everything saved."""
    first, began = state.get("step", 0), time.perf_counter() - state.get("seconds", 0.0)
    results = state.get("results", [])  # what the steps since the last log line returned
    totals = state.get("totals", torch.zeros(2, dtype=torch.float64))  # up to the last log line
    eval_every = args.eval_every or max(1, args.steps // 10)
    tokens, device = args.batch_size * args.seq_len, trainer.device  # tokens in a step
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    bar = tqdm(total=args.steps * tokens, initial=first * tokens, unit="tok", unit_scale=True,
               desc=run.name, mininterval=1, disable=rank() > 0)
    trainer.model.train()
    with caught_signals() as signals, bar:
        for index in range(first, args.steps):
            results.append(trainer.step(index))
            step, stop = index + 1, agreed_signal(signals, index, device)
            log_now, eval_now, save_now = (step % every == 0 or step == args.steps for every in
                                           (args.log_every, eval_every, args.save_every))
            if stop or log_now or eval_now or save_now:
                # Reading a result waits for the GPU: not in every step.
                results = [result.cpu() for result in results]
                stop_if_not_finite(results, step, run)
            seconds = time.perf_counter() - began
            if log_now:
                loss, norm, masked, maskable = torch.stack(results).T  # (steps,) each
                mean = ((loss * masked).sum() / masked.sum().clamp(min=1)).item()
                totals = totals + torch.stack([masked.double().sum(), maskable.double().sum()])
                lr = trainer.optimizer.param_groups[0]["lr"]
                append_line(run / "log.jsonl", step=step, loss=mean, lr=lr,
                            grad_norm=norm.max().item(), masked=int(totals[0]))
                append_line(run / "timing.jsonl", step=step, seconds=seconds, device=device_name,
                            tokens_per_second=step * tokens / seconds)
                bar.set_postfix(step=step, loss=f"{mean:.3f}", lr=f"{lr:.1e}")
                results = []
            if eval_now:
                answers = exam.take(trainer.model, trainer.recipe.bf16)
                append_line(run / "log.jsonl", step=step, exam=exam.metrics(answers))
            if save_now or stop:
                save(run, trainer, step=step, results=results, totals=totals, seconds=seconds)
            bar.update(tokens)
            if stop:
                barrier()  # rank 0 has saved
                raise Stopped(stop, step, args.out)
    return totals, time.perf_counter() - began


def stop_if_not_finite(results: list[Tensor], step: int, run: Path):
    """Raises RunError where one of the results is not finite; the last one is that of `step`."""
    for failed, result in enumerate(results, start=step - len(results) + 1):
        if not result.isfinite().all():
            error = "the loss or its gradient is not finite"
            append_line(run / "log.jsonl", step=failed, error=error)
            kept = "No checkpoint had been saved yet"
            if (run / "checkpoint.pt").exists():
                kept = f"The last good checkpoint is kept in {run}"
            raise RunError(f"step {failed}: {error}: lower --lr, lengthen --warmup or drop --bf16. "
                           f"{kept}")


def set_up(args: Namespace) -> tuple[Trainer, Exam, Tokenizer, dict]:
    """Returns what a run needs before its first step: trainer, exam, tokenizer, and what it is made
    from and with (provenance), for train_args.json."""
    device = pick_device(args.device)
    bf16 = use_bf16(device, args.bf16)
    init, teacher, tokenizer, teacher_dir = load_models(args)
    # The corpus is read once, and only where data/cache lacks what is made from it.
    read = functools.cache(lambda: read_corpus(args.corpus, args.corpus_fraction))
    tokenizer = tokenizer or trained_tokenizer(args, read)
    # The model comes before the windows: a --student-init that does not fit is refused early.
    model = build_model(args, tokenizer, init, teacher).to(device)
    windows = tokenised_windows(args, tokenizer, read)
    vocab = Vocab(tokenizer, model.config.vocab_size, device)
    texts, held_out = (Texts(torch.from_numpy(windows[part]).to(device), vocab)
                       for part in ("train", "held_out"))
    if not args.init:
        start_at_frequency(model, texts.token_counts())
    teacher_weights = table = None
    if teacher:
        teacher_weights = weights_digest(teacher_dir)
        teacher.to(device).eval().requires_grad_(False)
        if find_strategy(args.masking).needs_teacher:
            table = cached_entropies(teacher, teacher_weights, texts, args, bf16)
    strategy = build_strategy(args.masking, model, texts, args, table)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    recipe.bf16 = bf16
    if args.compile:
        model.bert.compile()
        model.head.compile()
    provenance = {"teacher_dir": teacher_dir, "teacher_weights": teacher_weights,
                  "windows": texts.digest(), "ranks": world_size(), "versions": versions()}
    return (Trainer(model, texts, strategy, recipe, teacher), Exam(held_out, texts.token_counts()),
            tokenizer, provenance)


def build_model(args: Namespace, tokenizer: Tokenizer, init: BertForMaskedLM | None,
                teacher: BertForMaskedLM | None) -> BertForMaskedLM:
    """Returns the student: --init's model or a fresh one of --preset, then what --student-init
    copies from the teacher. Raises InputError where the teacher's shapes do not fit."""
    torch.manual_seed(args.seed)
    model = init
    if model is None:
        size = teacher.config.vocab_size if teacher else tokenizer.get_vocab_size()
        config = BertConfig.preset(args.preset, vocab_size=size, hidden_dropout_prob=args.dropout,
                                   attention_probs_dropout_prob=args.dropout,
                                   pad_token_id=tokenizer.token_to_id("[PAD]"))
        model = BertForMaskedLM(config)
        if not args.plain_start:
            local_start(model)
    if args.student_init != "random":
        init_student(model, teacher, args.student_init)
    return model


@torch.no_grad()
def start_at_frequency(model: BertForMaskedLM, token_counts: Tensor):
    """Sets the decoder's bias to the log of each word piece's frequency; token_counts (V,). With
    zero weights the softmax of that bias is the frequency itself, which is the first thing that a
    model from scratch learns: a short run saves those steps."""
    counts = token_counts + 1
    model.head.bias.copy_((counts / counts.sum()).log())


def build_strategy(name: str, model: BertForMaskedLM, texts: Texts, args: Namespace,
                   teacher_entropy: Tensor | None = None) -> Strategy:
    """Returns the strategy `name` for these texts; teacher_entropy (n, L), where it needs one. args
    holds the options of `add_masking_options`."""
    context = Context(rate=args.mask_rate, model=model, token_counts=texts.token_counts(),
                      continuation=texts.vocab.continuation, mask_token_id=texts.vocab.mask_id,
                      teacher_entropy=teacher_entropy, entropy_select=args.entropy_select,
                      entropy_input=args.entropy_input, spread=args.typhoon_spread,
                      ema_weight=args.typhoon_ema)
    return find_strategy(name)(context)


def finish(trainer: Trainer, exam: Exam, tokenizer: Tokenizer, path: Path, settings: dict,
           totals: Tensor, seconds: float):
    """Writes exam.json and the model, and says in plain words what came of the run."""
    label, masked = strategy_label(settings["masking"]), totals[0] / totals[1].clamp(min=1)
    baseline = exam.metrics(exam.frequency_alone())
    rows = {"word-piece frequency alone": baseline}
    if trainer.teacher:
        rows["the teacher"] = exam.metrics(exam.take(trainer.teacher, trainer.recipe.bf16))
    answers = exam.take(trainer.model, trainer.recipe.bf16)
    mine = rows[f"this model ({label})"] = exam.metrics(answers)
    per_window = {name: array.tolist() for name, array in exam.per_window(answers).items()}
    record = {"task": "mlm", "model": str(path), "pattern": None, "seed": settings["seed"],
              "strategy": label + ("-kd" if settings["kd_weight"] else ""), "args": settings,
              "versions": settings["versions"], "last": mine, "baseline": baseline,
              "dev": per_window, "masked": masked.item(), "seconds": seconds,
              "pretraining": settings}
    if rank() == 0:
        write_atomic(path / "exam.json", json.dumps(record) + "\n")
        save_pretrained(trainer.model, tokenizer, path)  # last: its weights mark a finished run
    say(f"\n{path}: {settings['steps']:,} steps, {seconds:.0f} s\n"
        f"masked {masked:.2%} of the ordinary tokens (asked for: {settings['mask_rate']:.2%}), "
        f"{totals[0]:,.0f} guesses in all\n\n{exam_table(rows)}\n\n{entropy_line(answers)}\n"
        "The same exam for every strategy. A strategy's own training loss is no measure: hard "
        "tokens cost more.")
    if not mine["log_likelihood"] >= baseline["log_likelihood"]:  # worse, or NaN
        say("This model is worse than guessing by frequency alone: its training diverged (lower "
            "--lr or lengthen --warmup), was too short, or asked for rare word pieces too often.")
    say("\nWhat it fills in:\n" + "\n".join(fill_in(trainer.model, tokenizer, trainer.device)))


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

    Answers are an array (3, P): the loss (nats), 1 where the guess is right, else 0, and the
    entropy of the model's prediction (nats)."""

    def __init__(self, texts: Texts, token_counts: Tensor):
        self.texts, self.token_counts = texts, token_counts
        generator = torch.Generator().manual_seed(0)  # on the CPU: the same on every device
        indices = torch.arange(len(texts), device=texts.input_ids.device).split(64)
        batches = [texts.batch(index) for index in indices]
        self.questions = [(batch, random_mask(batch.maskable, EXAM_RATE, generator))
                          for batch in batches]
        self.tokens = torch.cat([batch.input_ids[mask] for batch, mask in self.questions])  # (P,)
        rows = [batch.index[mask.nonzero()[:, 0]] for batch, mask in self.questions]
        window = torch.cat(rows)  # (P,)
        band = frequency_bands(token_counts, texts.token_counts())[self.tokens]  # (P,)
        self.cell = (3 * window + band).cpu().numpy()  # (P,), one number for window and band

    def take(self, model: BertForMaskedLM, bf16: bool = False) -> np.ndarray:
        """Returns the model's answers, (3, P). Ranks share the batches."""
        sizes = [int(mask.sum()) for _, mask in self.questions]
        answers = torch.zeros(3, len(self.tokens), device=self.tokens.device)
        parts = list(zip(self.questions, answers.split(sizes, dim=1), self.tokens.split(sizes)))
        with evaluating(model), torch.autocast(answers.device.type, torch.bfloat16, enabled=bf16):
            for (batch, mask), part, tokens in parts[rank()::world_size()]:
                hidden = batch.input_ids.masked_fill(mask, self.texts.vocab.mask_id)
                logits = model(hidden, batch.attention_mask, batch.token_type_ids,
                               positions=mask).float()  # (N, V)
                part[0] = F.cross_entropy(logits, tokens, reduction="none")
                part[1] = logits.argmax(-1) == tokens
                part[2] = token_entropy(logits)
        # Only the rank that took a batch has other numbers than zeros for it.
        return reduce_sum(answers).cpu().double().numpy()

    def frequency_alone(self) -> np.ndarray:
        """Returns the answers, (2, P), of whoever knows nothing but how often each word piece
        occurs in the training corpus."""
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

    def metrics(self, answers: np.ndarray) -> dict[str, float]:
        """Returns `exam_metrics`."""
        return exam_metrics(**self.per_window(answers))


def entropy_line(answers: np.ndarray) -> str:
    """Says how far a model's entropies differ, and whether they go with its mistakes: what a
    strategy that ranks positions by them has to work with. answers: of `Exam.take`."""
    loss, _, entropy = answers
    ranks = [values.argsort().argsort() for values in (loss, entropy)]
    spearman = np.corrcoef(ranks)[0, 1] if len(loss) > 1 else 0.0
    return (f"entropy of hidden held-out tokens: sd {entropy.std():.2f} nats, "
            f"Spearman with the loss {spearman:.2f}")


def exam_table(rows: dict[str, dict]) -> str:
    """Returns the summary's table: a line for each name and its `exam_metrics`."""
    title, heads = "held-out text, random positions, all [MASK]", ("accuracy", *BANDS)
    lines = [f"{title:<44}  loss (nats)" + "".join(f"{head:>10}" for head in heads)]
    for name, metrics in rows.items():
        shares = "".join(f"{metrics[head]:>10.1%}" for head in heads)
        lines.append(f"  {name:<42}{-metrics['log_likelihood']:>13.2f}{shares}")
    return "\n".join(lines)


def fill_in(model: BertForMaskedLM, tokenizer: Tokenizer, device: torch.device) -> list[str]:
    """Returns SENTENCES, each with the three likeliest words for its gap."""
    lines = []
    for sentence in SENTENCES:
        ids = torch.tensor([tokenizer.encode(sentence).ids], device=device)  # (1, L)
        with evaluating(model):
            logits = model(ids, positions=ids == tokenizer.token_to_id("[MASK]"))[0]  # (V,)
        best = logits.float().softmax(-1).topk(3)
        words = [f"{tokenizer.id_to_token(i)} {p:.0%}"
                 for p, i in zip(best.values.tolist(), best.indices.tolist())]
        lines.append(f"  {sentence:<40} {', '.join(words)}")
    return lines


# --- the teacher and its entropies ----------------------------------------------------------------

def load_models(args: Namespace):
    """Returns --init's model, the teacher, their tokenizer and the teacher's directory or hub name,
    None for what is not there. The same id must mean the same word piece to teacher and student.

    Where a teacher is wanted and none is given, it is --init's model, or else one that is trained
    here and now. Raises InputError where --teacher, --init and the options do not fit together."""
    wanted = (find_strategy(args.masking).needs_teacher or args.kd_weight > 0
              or args.student_init != "random")
    teacher_dir = args.teacher or (args.init if wanted else None)
    if args.resume:
        teacher_dir = read_json(Path(args.resume) / "train_args.json").get("teacher_dir")
    elif wanted and not teacher_dir:
        teacher_dir = train_teacher(args)
    torch.manual_seed(args.seed)  # of a masked-LM head that --init may lack
    init = teacher = tokenizer = None
    if args.init:
        init, tokenizer = load_pretrained(args.init, "mlm", dropout=args.dropout,
                                          whole=args.init == teacher_dir)
    if teacher_dir:
        teacher, pieces = load_pretrained(teacher_dir, "mlm", whole=True)
        sizes = [model.config.vocab_size for model in (teacher, init or teacher)]
        if init and (sizes[0] != sizes[1] or pieces.get_vocab() != tokenizer.get_vocab()):
            raise InputError(f"the teacher predicts {sizes[0]:,} word pieces, --init {sizes[1]:,}, "
                             "and they are not the same")
        tokenizer = pieces
    given = args.teacher or args.init
    if given and args.vocab_size not in (None, tokenizer.get_vocab_size()):
        raise InputError(f"{given} has {tokenizer.get_vocab_size():,} word pieces, not "
                         f"{args.vocab_size:,}: drop --vocab-size or choose another model")
    for option, model in (("--init", init), ("--teacher", teacher)):
        if model and model.config.max_position_embeddings < args.seq_len:
            raise InputError(f"{option} has {model.config.max_position_embeddings} positions: "
                             "lower --seq-len")
    return init, teacher, tokenizer, teacher_dir


def train_teacher(args: Namespace) -> str:
    """Trains the automatic teacher, or goes on with it, unless it is there. Returns its directory,
    which all later runs share that want the same teacher (--teacher-seed makes another)."""
    teacher = teacher_args(args)
    if not (Path(teacher.out) / "model.safetensors").exists():
        say(f"No --teacher is given, so one is trained first and kept in {teacher.out}: "
            f"{teacher.steps:,} steps, {teacher.steps / args.steps:.1f} times this run's own "
            f"{args.steps:,} (--teacher-steps makes it shorter)")
        pretrain(teacher)
    barrier()  # rank 0 has written the model
    return teacher.out


def teacher_args(args: Namespace) -> Namespace:
    """Returns the arguments of the run that makes the automatic teacher: this run's, with random
    masks and a seed of its own. Everything that decides its weights is in its directory's name."""
    changed = {"masking": "random", "mask_rate": 0.3, "steps": args.teacher_steps,
               "corruption": [0.8, 0.1, 0.1], "kd_weight": 0.0, "student_init": "random",
               # A student with this seed would start from the same weights and see the same masks.
               "seed": 2 ** 32 + args.teacher_seed}
    teacher = Namespace(**vars(args) | changed)
    decides = ("mask_rate", "corruption", "seed", "corpus_fraction", "vocab_size", "preset",
               "plain_start", "seq_len", "steps", "batch_size", "accumulate", "lr", "warmup",
               "weight_decay", "clip", "dropout")
    device = pick_device(args.device)
    key = [corpus_state(args.corpus), use_bf16(device, args.bf16), device.type, world_size(),
           *(getattr(teacher, name) for name in decides)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
    if args.teacher_seed:
        name += f"-{args.teacher_seed}"
    teacher.out = str(Path("runs") / f"reference-{name}")
    started = (Path(teacher.out) / "train_args.json").exists()
    teacher.resume = teacher.out if started else None
    return teacher


def entropy_table(teacher: BertForMaskedLM, texts: Texts, entropy_input: str, rate: float,
                  bf16: bool) -> Tensor:
    """Returns the frozen teacher's entropy at every position of every text, (n, L) float16 in nats,
    0 where nothing is maskable. They never change, so a run looks them up.

    entropy_input: "visible", one pass over the text as it is; "masked", each position while it is
    hidden, a share `rate` of a text at a time."""
    device, rows = texts.input_ids.device, []
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same groups on every device
    for index in progress(torch.arange(len(texts)).split(64), "the teacher's entropies"):
        batch = texts.batch(index.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if entropy_input == "visible":
                entropy = position_entropy(teacher, batch, batch.input_ids, batch.maskable)
            else:
                entropy = hidden_entropy(teacher, batch, rate, texts.vocab.mask_id, generator)
        rows.append(F.pad(entropy.half(), (0, texts.input_ids.shape[1] - entropy.shape[1])))
    return torch.cat(rows)


def cached_entropies(teacher: BertForMaskedLM, teacher_weights: str, texts: Texts, args: Namespace,
                     bf16: bool) -> Tensor:
    """Returns `entropy_table`, kept on disk by everything that it depends on."""
    device = texts.input_ids.device
    rate = args.mask_rate if args.entropy_input == "masked" else 0.0
    key = [teacher_weights, texts.digest(), args.entropy_input, rate, bf16, device.type]

    def build():
        table = entropy_table(teacher, texts, args.entropy_input, rate, bf16)
        return {"entropy": table.cpu().numpy()}

    return torch.from_numpy(cached("entropy", key, build)["entropy"]).to(device)


# --- text -----------------------------------------------------------------------------------------
# A corpus is a list of documents, a document a list of paragraphs. Every 20th document is held out.

WIKITEXT = {  # name: address, sha256 of the archive
    "wikitext-2": ("https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
                   "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
    "wikitext-103": ("https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
                     "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"),
}
SUFFIXES = (".txt", ".md", ".jsonl")  # what is read of a folder


def read_corpus(names: list[str], fraction: float) -> tuple[list[list[str]], list[list[str]]]:
    """Returns (training documents, held-out documents). `fraction` keeps that share of the training
    documents, always the same ones, and leaves the held-out ones alone. WikiText brings held-out
    documents of its own. Raises InputError where there is not enough text."""
    documents = python_docs() if "docs" in names else []
    training, held_out = [], []  # WikiText's
    for path in progress(corpus_files(names), "reading the corpus"):
        part = {"wiki.train.raw": training, "wiki.valid.raw": held_out}.get(path.name, documents)
        part.extend(read_documents(path))
    if len(documents) == 1 and not training:  # one long text: cut it by paragraphs
        documents = [[paragraph] for paragraph in documents[0]]
    if len(documents + training) < 2:
        raise InputError(f"--corpus {' '.join(names)} has fewer than two paragraphs of text")
    held_out += documents[::20]
    training += [document for i, document in enumerate(documents) if i % 20]
    random.Random(0).shuffle(training)
    return training[:math.ceil(fraction * len(training))], held_out


def python_docs() -> list[list[str]]:
    """Returns the docstrings of the standard library, a document a module, and the language
    reference that `help()` shows."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo",
            "pydoc_data"}
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = []
    for path in progress(sorted(root.rglob("*.py")), "reading Python's docstrings"):
        if skip.isdisjoint(path.relative_to(root).parts):
            nodes = ast.walk(ast.parse(path.read_bytes()))
            found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, holders)]
            texts.append("\n\n".join(found))
    with contextlib.suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics
        texts += topics.values()
    documents = [[" ".join(part.split()) for part in text.split("\n\n")] for text in texts]
    return [document for document in documents if any(document)]


def corpus_files(names: list[str]) -> list[Path]:
    """Returns the files of every FILE, DIR, GLOB and WikiText name, downloaded if need be; `docs`
    has none. Raises InputError on a name that stands for no file."""
    files = []
    for name in names:
        if name == "docs":
            continue
        if name in WIKITEXT:
            folder = Path("data") / f"{name}-raw"
            found = [folder / "wiki.train.raw", folder / "wiki.valid.raw"]
            if not all(path.is_file() for path in found):
                url, sha256 = WIKITEXT[name]
                unpack(download(url, Path("data") / Path(url).name, sha256), Path("data"))
        elif Path(name).is_dir():
            found = sorted(path for path in Path(name).rglob("*") if path.suffix in SUFFIXES)
        elif Path(name).is_file():  # before globs: a file's name may hold brackets
            found = [Path(name)]
        else:
            found = sorted(map(Path, glob.glob(name, recursive=True)))
        if not found:
            raise InputError(f"--corpus {name}: no such file, folder with {', '.join(SUFFIXES)} "
                             f"files or glob (named corpora: docs, {', '.join(WIKITEXT)})")
        files += [path for path in found if path.is_file()]
    return files


def corpus_state(names: list[str]) -> list:
    """Returns what changes when the corpus's text does: Python's version, and each file's sha256
    with the suffix that says how it is read. A copy of a corpus is the same corpus."""
    state = [platform.python_version()] if "docs" in names else []
    for path in corpus_files(names):
        with path.open("rb") as file:
            state.append([path.suffix, hashlib.file_digest(file, "sha256").hexdigest()])
    return state


def read_documents(path: Path) -> list[list[str]]:
    """Returns the documents of a file: a paragraph a line, a blank line between documents. In a
    .jsonl file each line's `text` is a document; in WikiText's .raw files a title begins one."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}): convert it first") from None
    if "\0" in text:
        raise InputError(f"{path} is binary (it holds a zero byte): give plain UTF-8 text")
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        parts = [json_text(path, i, line) for i, line in lines if line.strip()]
    elif path.suffix == ".raw":
        for escape, mark in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
            text = text.replace(escape, mark)
        parts = re.split(r"\n(?= = [^=])", text)
    else:
        parts = re.split(r"\n\s*\n", text)
    documents = [[line.strip() for line in part.split("\n") if line.strip()] for part in parts]
    return [document for document in documents if document]


def json_text(path: Path, i: int, line: str) -> str:
    """Returns the `text` of line i of a .jsonl file. Raises InputError where there is none."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        if isinstance(text := json.loads(line)["text"], str):
            return text
    raise InputError(f"{path}, line {i}: no JSON object with a \"text\": correct that line")


def download(url: str, path: Path, sha256: str) -> Path:
    """Sees to it that the file at `url` is at `path`, and returns path. The file appears there only
    when its sha256 is right; one that is there already is checked too. Raises InputError."""
    if path.exists():
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise InputError(f"{path} is not the file of {url} (sha256 {found[:12]}...): delete it")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, ValueError, RuntimeError) as error:  # no network, a bad address, the hash
        raise InputError(f"could not fetch {url} ({error}): put that file at {path} "
                         "yourself") from None
    return path


def unpack(archive: Path, folder: Path):
    """Unpacks a .zip whose sha256 is right into `folder`: what an interruption leaves there is no
    file cut short. Members that lead out of the folder are left out."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        shutil.unpack_archive(archive, temporary)
        shutil.copytree(temporary, folder, dirs_exist_ok=True, copy_function=os.replace)


# --- tokens, windows, caches ----------------------------------------------------------------------

class Vocab:
    """What masking must know of a tokenizer, as tensors on a device."""

    def __init__(self, tokenizer: Tokenizer, size: int, device: torch.device):
        pieces = [tokenizer.id_to_token(i) or "" for i in range(size)]  # a model may have spare ids
        self.size = size
        self.mask_id, self.pad_id = tokenizer.token_to_id("[MASK]"), tokenizer.token_to_id("[PAD]")
        self.special_ids = tuple(i for i, piece in enumerate(pieces)
                                 if piece in SPECIAL_TOKENS or not piece)
        self.ordinary = torch.ones(size, dtype=torch.bool, device=device)  # (V,)
        self.ordinary[list(self.special_ids)] = False
        continuation = [piece.startswith("##") for piece in pieces]
        self.continuation = torch.tensor(continuation, device=device)  # (V,)


class Texts:
    """The texts of a corpus as one array on the device: (n, L) ids, all of the same length or
    padded with the tokenizer's [PAD]."""

    def __init__(self, input_ids: Tensor, vocab: Vocab, token_type_ids: Tensor | None = None):
        self.input_ids, self.vocab, self.token_type_ids = input_ids, vocab, token_type_ids
        self.padded = bool((input_ids == vocab.pad_id).any())

    def __len__(self):
        return len(self.input_ids)

    def batch(self, index: Tensor) -> Batch:
        """Returns texts number `index` (B,), cut to the longest of them."""
        ids = self.input_ids[index].long()  # (B, L)
        types = None if self.token_type_ids is None else self.token_type_ids[index].long()
        attention_mask = None
        if self.padded:
            attention_mask = ids != self.vocab.pad_id
            # The last column with a token, not the largest count: text may hold the word "[PAD]".
            longest = 1 + int(attention_mask.any(0).nonzero().max())
            ids, attention_mask = ids[:, :longest], attention_mask[:, :longest]
            types = None if types is None else types[:, :longest]
        return Batch(ids, self.vocab.ordinary[ids], index, attention_mask, types)

    def digest(self) -> str:
        """Returns the sha256 of the token ids, which tells these texts from others."""
        return hashlib.sha256(self.input_ids.cpu().numpy().tobytes()).hexdigest()

    def token_counts(self) -> Tensor:
        """Returns how often each ordinary type occurs, (V,)."""
        counts = torch.bincount(self.input_ids.flatten(), minlength=self.vocab.size)
        return counts * self.vocab.ordinary


def trained_tokenizer(args: Namespace, read) -> Tokenizer:
    """Returns a vocabulary of --vocab-size for the corpus, trained once and kept. `read()` gives
    what `read_corpus` does."""
    size = args.vocab_size or 8192
    key = [corpus_state(args.corpus), args.corpus_fraction, size]

    def build():
        return {"tokenizer": np.array(train_tokenizer(read()[0], size).to_str())}

    return Tokenizer.from_str(str(cached("vocabulary", key, build)["tokenizer"]))


def train_tokenizer(documents: list[list[str]], vocab_size: int) -> Tokenizer:
    """Returns a lower-case WordPiece vocabulary of the documents; the same one every time."""
    # The time grows with the square of a word's length: cut what is too long to be a word.
    unbroken = re.compile(r"\S{1000}")
    texts = [unbroken.sub(r"\g<0> ", text) for document in documents for text in document]
    tokenizer, letters = wordpiece_tokenizer({}), Counter()
    for text in progress(texts, "counting letters"):
        letters.update(tokenizer.normalizer.normalize_str(text))
    # The trainer numbers the one-letter continuations in the order of a hash table that each
    # process seeds anew. Named beforehand, they have an order of their own.
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    inside_words = [letter for letter, _ in letters.most_common(1000)
                    if len(split(f"a{letter}a")) == 1]
    continuations = sorted("##" + letter for letter in inside_words)
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, show_progress=False,
                                        special_tokens=[*SPECIAL_TOKENS, *continuations])
    tokenizer.train_from_iterator(progress(texts, "training the vocabulary"), trainer)
    return wordpiece_tokenizer(tokenizer.get_vocab())


def tokenised_windows(args: Namespace, tokenizer: Tokenizer, read) -> dict[str, np.ndarray]:
    """Returns {"train": (n, L), "held_out": (m, L)}, m at most 1,000, made once and kept. Raises
    InputError where the corpus is too short for a window of each."""
    tokenizer_digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    key = [corpus_state(args.corpus), args.corpus_fraction, args.seq_len, tokenizer_digest]

    def build():
        training, held_out = read()
        windows = {"train": pack(training, tokenizer, args.seq_len, "the corpus"),
                   "held_out": pack(held_out, tokenizer, args.seq_len, "the held-out text")[:1000]}
        if not all(len(part) for part in windows.values()):
            raise InputError(f"--corpus {' '.join(args.corpus)} is too short for one window of "
                             f"{args.seq_len} tokens, or its held-out twentieth is")
        return windows

    return cached("windows", key, build)


def pack(documents: list[list[str]], tokenizer: Tokenizer, seq_len: int, name: str) -> np.ndarray:
    """Returns windows [CLS] … [SEP] of seq_len tokens, (n, seq_len) int32; n may be 0. Documents
    follow one another with a [SEP] between them, without padding; the last, unfilled window is
    dropped."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    stream = []
    for document in progress(documents, f"tokenising {name}"):
        for pieces in tokenizer.encode_batch_fast(document, add_special_tokens=False):
            stream.append(np.array(pieces.ids, dtype=np.int32))
        stream.append(np.array([sep], dtype=np.int32))
    tokens = np.concatenate(stream)
    inner = seq_len - 2
    body = tokens[:len(tokens) // inner * inner].reshape(-1, inner)  # (n, seq_len - 2)
    return np.pad(body, ((0, 0), (1, 1)), constant_values=((0, 0), (cls, sep)))  # (n, seq_len)


def cached(kind: str, key: object, build) -> dict[str, np.ndarray]:
    """Returns `build()`, a dict of arrays, kept under data/cache by what it was made from. A
    damaged file is built again; of two processes that build the same file, either may win."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path, arrays = CACHE / f"{kind}-{name}.npz", None
    if rank() > 0:
        barrier()  # rank 0 goes first; the others find its file
    if path.exists():
        try:
            with np.load(path) as file:
                arrays = dict(file)
        except Exception:  # a damaged file can raise nearly anything
            log.warning("%s is damaged: building it again", path)
    if arrays is None:
        buffer, arrays = io.BytesIO(), build()
        np.savez(buffer, **arrays)
        write_atomic(path, buffer.getvalue())
    if rank() == 0:
        barrier()
    return arrays


# --- data-parallel --------------------------------------------------------------------------------
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


@contextlib.contextmanager
def connected_ranks(device: torch.device):
    """Connects the ranks while the block runs."""
    if world_size() > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        patience = timedelta(hours=6)  # the others wait while rank 0 tokenises a large corpus
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def say(text: str):
    """Prints on rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


def progress(items, what: str) -> tqdm:
    """Returns an iterator over items with a bar on rank 0 that is gone when it ends."""
    return tqdm(items, desc=what, leave=False, disable=rank() > 0)


# --- devices --------------------------------------------------------------------------------------

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
        raise InputError(f"--device {name} cannot be used here ({error}): choose auto, cpu, cuda, "
                         "cuda:N or mps") from None
    return device


def use_bf16(device: torch.device, asked: bool | None) -> bool:
    """Returns what was asked for; by default (None), whether this is a GPU that has bfloat16."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return has_it if asked is None else asked


# --- the run directory, signals -------------------------------------------------------------------

# A checkpoint holds log.jsonl and timing.jsonl as they were; resuming puts them back. log.jsonl has
# no times, so that a resumed run's is the same to the byte.

def append_line(path: Path, **fields):
    """Appends a line to one of the logs."""
    if rank() == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")


def save(run: Path, trainer: Trainer, **state):
    """Writes checkpoint.pt, whole or not at all: the trainer's state, `state` and the logs."""
    if rank() == 0:
        logs = {path.name: path.read_text() for path in run.glob("*.jsonl")}
        buffer = io.BytesIO()
        torch.save({**trainer.state_dict(), **state, "logs": logs}, buffer)
        write_atomic(run / "checkpoint.pt", buffer.getvalue())


def restore(run: Path, trainer: Trainer, provenance: dict) -> dict:
    """Loads the checkpoint, if there is one yet, and the logs in it. Returns what `save` got.
    Raises InputError on a damaged one, and where windows or teacher have changed."""
    stored, state, path = read_json(run / "train_args.json"), {}, run / "checkpoint.pt"
    for name, what in (("windows", "the corpus or its vocabulary"),
                       ("teacher_weights", "the teacher")):
        if stored.get(name) != provenance[name]:
            raise InputError(f"{run}: {what} is not the one that it was started with")
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            trainer.load_state_dict(state)
        except Exception as error:  # a damaged file can raise nearly anything
            raise InputError(f"{path} is damaged ({type(error).__name__}): delete it, and --resume "
                             "starts from the first step") from None
    if rank() == 0:
        for log_file in run.glob("*.jsonl"):
            log_file.write_text(state.get("logs", {}).get(log_file.name, ""))
    return state


def new_directory(args: Namespace) -> str:
    """Makes and returns --out, or else the first free of runs/entropy, runs/entropy_2, ..."""
    stem = "runs/" + strategy_label(args.masking) + ("-kd" if args.kd_weight else "")
    chosen, i = [args.out], 0
    while rank() == 0 and not chosen[0]:
        i += 1
        name = stem if i == 1 else f"{stem}_{i}"
        with contextlib.suppress(FileExistsError):
            Path(name).mkdir(parents=True)  # of two runs that begin at once, one gets it
            chosen = [name]
    if world_size() > 1:
        dist.broadcast_object_list(chosen)  # the ranks take what rank 0 chose
    return chosen[0]


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and the packages, and this code's commit if git can tell."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers")}
    command, commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], ""
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {"python": platform.python_version(), **packages, "commit": commit or None}


class Stopped(SystemExit):
    """A signal ended the run in the directory `out` after it had saved."""

    def __init__(self, number_of_signal: int, step: int, out: str):
        super().__init__(128 + number_of_signal)  # as a shell reports it
        self.step, self.out = step, out


@contextlib.contextmanager
def caught_signals():
    """Collects SIGINT and SIGTERM in a list, so that the step under way is finished and saved."""
    received = []
    before = {caught: signal.signal(caught, lambda caught, _: received.append(caught))
              for caught in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


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


# --- the command line -----------------------------------------------------------------------------

def add_masking_options(add, corruption: list[float], entropy_select: str | None = None):
    """Adds the options that glue.py has too, there with other defaults; add: add_argument."""
    fraction = number(float, low=0, high=1)
    add("--mask-rate", type=number(float, above=0, below=1), default=0.3,
        help="the budget: the share of the tokens that is masked")
    add("--corruption", type=fraction, nargs=3, default=corruption,
        metavar=("MASK", "SWAP", "KEEP"),
        help="shares of the chosen tokens that become [MASK], become a random token, stay")
    add("--entropy-select", choices=["high", "low", "mixed", "sample"], default=entropy_select,
        help="which entropies are masked; train.py: mixed for entropy and rarity, else high")
    add("--entropy-input", choices=["visible", "masked"], default="masked",
        help="entropy of a token that the model sees, or of one that is hidden from it")
    add("--typhoon-spread", type=number(float, low=0, below=1), default=0.4,
        help="the lowest rate is 1 - spread times the highest")
    add("--typhoon-ema", type=fraction, default=0.8, help="moving average: weight of a new value")


def make_parser() -> Parser:
    """Returns every option of the command line, with its default."""
    parser = Parser(description="Pretrain a masked language model.")
    fraction, count = number(float, low=0, high=1), number(int, low=1)
    positive = number(float, above=0)

    add = parser.add_argument_group("masking").add_argument
    add("--masking", default="random", type=strategy_name, metavar="STRATEGY",
        help=f"{', '.join(STRATEGIES)}, or FILE.py:CLASS of your own")
    add_masking_options(add, corruption=[0.8, 0.1, 0.1])
    add("--strategy-start", type=fraction, default=0.0,
        help="random masks for this fraction of the steps, then the strategy's")

    add = parser.add_argument_group("distillation and the teacher").add_argument
    add("--teacher", metavar="MODEL", help="default, where one is needed: trained first, and kept")
    add("--teacher-steps", type=count, default=2500, help="steps of the teacher trained first")
    add("--teacher-seed", type=number(int, low=0, below=2 ** 31), default=0,
        help="its seed; runs with the same one share their teacher, whatever their own --seed")
    add("--kd-weight", type=fraction, default=0.0, help="alpha: distillation's share of the loss")
    add("--kd-temperature", type=positive, default=2.0, help="T: softens teacher and student")
    add("--kd-start", type=fraction, default=0.0, help="distil after this fraction of the steps")
    add("--student-init", choices=["random", "embeddings", "layers"], default="random",
        help="what is copied from the teacher; random: nothing")

    add = parser.add_argument_group("data").add_argument
    add("--corpus", nargs="+", default=["docs"],
        help=f"any of docs, {', '.join(WIKITEXT)}, folders, globs, files (text, or .jsonl with a "
             "\"text\" in each line)")
    add("--corpus-fraction", type=number(float, above=0, high=1), default=1.0,
        help="train on this share of the documents")
    add("--vocab-size", type=number(int, low=100), help="default: 8192, or the teacher's")
    add("--seq-len", type=number(int, low=3, high=BertConfig.max_position_embeddings), default=128,
        help="tokens a window, [CLS] included")

    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=list(PRESETS), default="tiny", help="size of a fresh model")
    add("--plain-start", action=BooleanOptionalAction, default=False,
        help="start a fresh model as BERT does, not with attention to neighbours")
    add("--init", metavar="MODEL", help="start from this run, Hugging Face directory or hub name")
    add("--dropout", type=fraction, default=0.0, help="0 suits short runs; BERT has 0.1")

    add = parser.add_argument_group("loop").add_argument
    add("--steps", type=count, default=1400, help="optimizer steps")
    add("--batch-size", type=count, default=8, help="windows an optimizer step, over all ranks")
    add("--accumulate", type=count, default=1, help="micro-batches that a rank cuts its share into")
    add("--lr", type=positive, default=2e-3, help="peak learning rate of AdamW")
    add("--warmup", type=fraction, default=0.1, help="fraction of the steps in which it rises")
    add("--weight-decay", type=number(float, low=0), default=0.01, help="of matrices only")
    add("--clip", type=positive, default=1.0, help="largest gradient norm")
    add("--seed", type=number(int, low=0, below=2 ** 63), default=0,
        help="of weights, order, masks and dropout")

    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--bf16", action=BooleanOptionalAction, help="default: on a GPU that has it")
    add("--compile", action=BooleanOptionalAction, default=False, help="torch.compile the model")
    add("--out", metavar="RUN", help="default: runs/STRATEGY, or the first free runs/STRATEGY_N")
    add("--resume", metavar="RUN", help="go on with this run, with its own arguments")
    add("--log-every", type=count, default=100, metavar="STEPS")
    add("--eval-every", type=count, metavar="STEPS", help="the exam; default: a tenth of --steps")
    add("--save-every", type=count, default=500, metavar="STEPS")
    return parser


MAY_CHANGE = {"resume", "out", "device", "compile", "log_every", "eval_every", "save_every"}


def parse_args(argv=None) -> Namespace:
    """Returns the arguments; with --resume the run's own. Raises InputError on what cannot be."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        found = read_json(Path(args.resume) / "train_args.json")
        ranks = found.get("ranks")
        if ranks not in (None, world_size()):  # each rank draws masks of its own
            raise InputError(f"{args.resume} was started with {ranks} ranks, not {world_size()}")
        stored = {name: found[name] for name in vars(args) if name in found}
        args = parser.parse_args(argv, Namespace(**stored))  # the given over the stored
        for name, before in stored.items():
            given = getattr(args, name)
            if given != before and name not in MAY_CHANGE:
                raise InputError(f"--{name.replace('_', '-')} is {given}, but {args.resume} was "
                                 f"started with {before}: drop it, or start a new run from its "
                                 f"weights: --init {args.resume}")
        args.out = args.resume
    check_together(args)
    return args


def check_together(args: Namespace):
    """Raises InputError where the arguments do not fit one another, or this machine."""
    if abs(sum(args.corruption) - 1) > 1e-6:
        raise InputError("--corruption wants three shares that sum to 1, such as 0.8 0.1 0.1")
    if args.batch_size % (world_size() * args.accumulate):
        raise InputError(f"--batch-size {args.batch_size} cannot be shared by {world_size()} ranks "
                         f"× {args.accumulate} micro-batches")
    if rank() == 0:  # the other ranks go on when rank 0, and with it any download, is ready
        corpus_files(args.corpus)
    if args.out and not args.resume:
        out = Path(args.out)
        if not can_write(out / "log.jsonl") or (out.exists() and any(out.iterdir())):
            raise InputError(f"--out {out} must be a new or an empty folder, or --resume {out}")
    pick_device(args.device)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        with connected_ranks(pick_device(args.device)):
            pretrain(args)
    except Stopped as stop:  # the ranks have parted, so that this is the last thing on the screen
        # In the teacher's training, the same command goes on with the teacher and then this run.
        options = ["--resume", stop.out] if stop.out == args.out else argv
        ranks = world_size()
        program = "python" if ranks == 1 else f"torchrun --nproc_per_node={ranks}"
        say(f"stopped after step {stop.step} and saved; to go on: "
            f"{program} train.py {shlex.join(options)}")
        raise
    except torch.cuda.OutOfMemoryError:
        raise RunError(f"the GPU's memory is full at --batch-size {args.batch_size}, --seq-len "
                       f"{args.seq_len}, --preset {args.preset}: lower one of them, or raise "
                       "--accumulate") from None
    except RuntimeError as error:
        if isinstance(error, dist.DistBackendError) or (world_size() > 1 and "gloo" in str(error)):
            raise RunError("another process of this run was lost, and its own messages say why; "
                           "--resume goes on from the last checkpoint, if there is one") from None
        raise


if __name__ == "__main__":
    run_cli(main)
