"""GLUE: fine-tuning a model on its tasks, and adapting it to a task's text beforehand.

GLUE is Wang et al. 2018 (arXiv 1804.07461); fine-tuning follows BERT (1810.04805, §4.1). `--adapt`
first trains the masked LM on the task's own text with one of masking.py's strategies, as [T] does
(Typhoon, 2303.15619). In order: the table of tasks, fine-tuning, batches, adaptation, metrics; then
the files: loading, results; the command line last.

    python glue.py --task mrpc --model runs/entropy                 # fine-tune and evaluate
    python glue.py --task all --model bert-base-uncased             # nine tasks and the GLUE score
    python glue.py --task mrpc --model runs/random --adapt typhoon  # [T]'s pipeline
    python glue.py --task all --model runs/entropy --predict out/   # files for gluebenchmark.com

Shapes: B batch, L tokens of the batch's longest example, H hidden, C classes, n examples.
"""
import argparse
import copy
import json
import math
import os
import re
import shutil
import tempfile
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from masking import (STRATEGIES, Batch, Context, TyphoonStrategy, find_strategy, strategy_label,
                     strategy_name)
from model import (InputError, Parser, RunError, can_write, find_pretrained, load_pretrained, log,
                   number, read_json, run_cli, save_pretrained, weights_digest, write_atomic)
from train import (BELOW_1, COUNT, FRACTION, POSITIVE, Masking, Recipe, Texts, Trainer, Vocab,
                   add_options, build_strategy, download, entropy_table, lr_at, make_optimizer,
                   pick_device, use_bf16, versions)


# --- the tasks ------------------------------------------------------------------------------------

class Example(NamedTuple):
    text_a: str
    text_b: str | None          # None where the task is about single sentences
    label: int | float | None   # index of the class; STS-B: the score; None on test


@dataclass(frozen=True)
class Task:
    """A row of the table: how a task is scored, what its files hold, where they come from."""
    folder: str                       # in the data folder; also the server's name for the task
    metrics: tuple[str, ...]          # names in METRICS
    sizes: dict[str, int]             # split -> official number of examples
    sha256: dict[str, str]            # by address; one without a host stands after GLUE_URL
    labels: tuple = ("0", "1")        # the classes as files and server write them; () for scores
    text_a: str = "sentence1"         # names of columns
    text_b: str | None = "sentence2"
    label: str | None = "label"
    header: tuple[str, ...] = ()      # columns of train and dev where these files have no header
    skip_short: bool = False          # train and dev are known to have rows with too few columns
    # split -> alternative sets of files, where a split is not simply in FOLDER/SPLIT.tsv
    files: dict[str, tuple] = field(default_factory=dict)


GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
SENTEVAL_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
MRPC_IDS = ("#1 ID", "#2 ID")
MRPC_TRAIN_AND_DEV = ("MRPC/msr_paraphrase_train.txt", "MRPC/mrpc_dev_ids.tsv")
NLI = ("entailment", "neutral", "contradiction")

TASKS = {  # sizes and sha256 as the public GLUE loader's dataset_infos.json publishes them
    "cola": Task(  # label 1: acceptable
        folder="CoLA", metrics=("matthews",), sizes={"train": 8551, "dev": 1043, "test": 1063},
        text_a="sentence", text_b=None, header=("source", "label", "star", "sentence"),
        sha256={"CoLA.zip": "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"}),
    "sst2": Task(  # 1: positive
        folder="SST-2", metrics=("accuracy",), sizes={"train": 67349, "dev": 872, "test": 1821},
        text_a="sentence", text_b=None,
        sha256={"SST-2.zip": "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"}),
    "mrpc": Task(  # 1: a paraphrase
        folder="MRPC", metrics=("f1", "accuracy"), sizes={"train": 3668, "dev": 408, "test": 1725},
        text_a="#1 String", text_b="#2 String", label="Quality",
        sha256={
            "mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
            SENTEVAL_URL + "msr_paraphrase_train.txt":
                "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
            SENTEVAL_URL + "msr_paraphrase_test.txt":
                "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"},
        files={"train": (MRPC_TRAIN_AND_DEV, ("MRPC/train.tsv",)),
               "dev": (MRPC_TRAIN_AND_DEV, ("MRPC/dev.tsv",)),
               "test": (("MRPC/msr_paraphrase_test.txt",), ("MRPC/test.tsv",))}),
    "stsb": Task(
        folder="STS-B", metrics=("pearson", "spearman"), labels=(), label="score",
        sizes={"train": 5749, "dev": 1500, "test": 1379},
        sha256={"STS-B.zip": "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"}),
    "qqp": Task(  # 1: the same question
        folder="QQP", metrics=("f1", "accuracy"), skip_short=True,
        sizes={"train": 363846, "dev": 40430, "test": 390965},
        text_a="question1", text_b="question2", label="is_duplicate",
        sha256={
            "QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"}),
    "mnli": Task(
        folder="MNLI", metrics=("accuracy",), labels=NLI, label="gold_label",
        sizes={"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832,
               "test_matched": 9796, "test_mismatched": 9847},
        sha256={"MNLI.zip": "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"}),
    "qnli": Task(
        folder="QNLI", metrics=("accuracy",), labels=("entailment", "not_entailment"),
        sizes={"train": 104743, "dev": 5463, "test": 5463}, text_a="question", text_b="sentence",
        sha256={"QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"}),
    "rte": Task(
        folder="RTE", metrics=("accuracy",), labels=("entailment", "not_entailment"),
        sizes={"train": 2490, "dev": 277, "test": 3000},
        sha256={"RTE.zip": "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"}),
    "wnli": Task(  # 1: entailment
        folder="WNLI", metrics=("accuracy",), sizes={"train": 635, "dev": 71, "test": 146},
        sha256={"WNLI.zip": "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"}),
    "ax": Task(  # the diagnostic set: nothing to train on, a model fine-tuned on MNLI predicts it
        folder="AX", metrics=("matthews",), labels=NLI, label=None,
        sizes={"test": 1104}, files={"test": (("AX/AX.tsv",), ("diagnostic/diagnostic.tsv",))},
        sha256={"AX.tsv": "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"}),
}
NINE = [name for name in TASKS if name != "ax"]


# --- fine-tuning ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Data:
    """A task's examples, read before anything slow begins."""
    train: list[Example]
    dev: dict[str, list[Example]]   # "dev"; for MNLI, whose "dev" is matched, also "dev_mismatched"
    test: dict[str, list[Example]]  # by the file that a submission has for them


def finetune(args: Namespace, data: Data | None = None) -> tuple[dict, nn.Module, Tokenizer]:
    """Returns what the JSON file of one run holds, the fine-tuned model and its tokenizer.

    args: as `parse_args` returns them. data: by default read from args.data_dir. The seed fixes the
    head's first weights, the share of the data, its order, the masks of --adapt and dropout. Raises
    InputError and RunError."""
    started = time.time()
    device = pick_device(args.device)
    bf16 = use_bf16(device, args.bf16)
    data = data or load_data(args.task, args.data_dir, test=bool(args.predict))
    torch.manual_seed(args.seed)  # of the new head's weights
    classes = len(TASKS[args.task].labels) or 1  # a regression has one output
    model, tokenizer = load_pretrained(args.model, "classification", classes, args.dropout)
    if args.seq_len > model.config.max_position_embeddings:
        raise InputError(f"{args.model} has {model.config.max_position_embeddings} positions: "
                         "lower --seq-len")
    origin = provenance(args.model, args.teacher)
    freeze(model.to(device), args.freeze)
    train = tokenise(subset(data.train, args.fraction, args.seed), tokenizer, args.seq_len, model)
    dev = {name: tokenise(examples, tokenizer, args.seq_len, model)
           for name, examples in data.dev.items()}

    adaptation = None
    if args.adapt != "none":
        trainer = adaptation_trainer(args, model, tokenizer, train, bf16)
        adaptation = adapt(trainer, tokenizer, f"{args.task}, {strategy_label(args.adapt)}")
        # Into the encoder under the classifier; the masked LM has no pooler.
        model.bert.load_state_dict(trainer.model.bert.state_dict(), strict=False)
        del trainer  # and with it a second model and its optimizer: a GPU may need the room
    # [T]'s 2e-5. A small model hardly moves with it and may end in a constant answer: for those the
    # highest of the four learning rates that Turc et al. 2019 (1908.08962) tried on theirs.
    lr = args.lr or (3e-4 if model.config.hidden_size <= 256 else 2e-5)
    recipe = Recipe(steps=args.epochs * math.ceil(len(train.labels) / args.batch_size),
                    batch_size=args.batch_size, lr=lr, warmup=args.warmup,
                    weight_decay=args.weight_decay, seed=args.seed, bf16=bf16)
    epochs, answers = fit(args.task, model, train, dev, recipe)

    run = {"task": args.task, "model": args.model, "pattern": args.pattern,
           "strategy": args.label or strategy_label(args.adapt), "seed": args.seed,
           "args": vars(args), "versions": versions(), "device": device.type, "bf16": bf16,
           "lr": lr, **origin, "epochs": epochs, "last": epochs[-1]["metrics"],
           "baseline": baseline(args.task, train.labels, dev),
           "collapsed": is_constant(answers["dev"]["predictions"]),
           "adaptation": adaptation, "masked": adaptation and adaptation["masked"], **answers,
           "seconds": round(time.time() - started, 1)}
    return run, model, tokenizer


def fit(name: str, model: nn.Module, train: "Tokenised", dev: dict[str, "Tokenised"],
        recipe: Recipe) -> tuple[list[dict], dict]:
    """Fine-tunes `model` in place on the task `name` (BERT §4.1). Returns an entry per epoch, with
    the mean loss per example and the metrics on dev, and `evaluate`'s answers after the last one.

    recipe.steps: a whole number of epochs. Raises RunError within 50 steps of a loss that is not
    finite."""
    torch.manual_seed(recipe.seed)  # of dropout: the same with and without --adapt
    optimizer, targets = make_optimizer(model, recipe.lr, recipe.weight_decay), train.targets()
    steps_per_epoch = math.ceil(len(targets) / recipe.batch_size)
    epochs, step = [], 0
    for epoch in range(1, recipe.steps // steps_per_epoch + 1):
        model.train()
        total = torch.zeros((), device=targets.device)
        rng = np.random.default_rng((recipe.seed, epoch))
        batches = bucketed_batches(train.texts.lengths.numpy(), recipe.batch_size, rng)
        bar = tqdm(batches, f"{name}, epoch {epoch}", leave=False, disable=None)
        for index in bar:  # (B,)
            batch = train.texts.batch(torch.from_numpy(index))
            loss = task_loss(logits_of(model, batch, recipe.bf16), targets[batch.index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            lr = recipe.lr * lr_at(step, recipe.steps, recipe.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            # On the device, for a GPU works ahead of Python until a number is read from it.
            total += loss.detach() * len(index)
            step += 1
            if step % 50 == 0 or step % steps_per_epoch == 0:
                bar.set_postfix(loss=f"{finite(loss, step, '--lr'):.3f}", lr=f"{lr:.1e}")
        values, answers = evaluate(name, model, dev, recipe.bf16)
        epochs.append({"epoch": epoch, "train_loss": total.item() / len(targets),
                       "metrics": values})
    return epochs, answers


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, in nats, of logits (B, C) and classes (B,); for scores (B,), the squared error
    of logits (B, 1)."""
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0].float(), labels)
    return F.cross_entropy(logits.float(), labels)


def finite(loss: Tensor, step: int, remedy: str) -> float:
    """The loss as a number. Raises RunError where it is NaN or infinite.

    Looking once in 50 steps is enough: weights that are not finite never become finite again."""
    value = loss.item()
    if not math.isfinite(value):
        raise RunError(f"the loss is {value} at step {step} or a little before: lower {remedy}")
    return value


@torch.no_grad()
def predict(model: nn.Module, data: "Tokenised", bf16: bool = False, size: int = 128) -> np.ndarray:
    """Classes (n,) int64, or scores (n,) float64, in the order of the examples; `size` of them go
    through the model at once. Raises RunError where an output is NaN or infinite."""
    model.eval()
    order = data.texts.lengths.argsort(stable=True)  # short beside short: little padding
    parts = [logits_of(model, data.texts.batch(index), bf16) for index in order.split(size)]
    logits = torch.empty(len(order), model.classifier.out_features)  # (n, C)
    logits[order] = torch.cat(parts).float().cpu()  # a GPU is waited for here, once
    if not logits.isfinite().all():
        raise RunError("the model's outputs are not finite: lower --lr")
    return (logits[:, 0].double() if logits.shape[1] == 1 else logits.argmax(1)).numpy()


def logits_of(model: nn.Module, batch: Batch, bf16: bool | None) -> Tensor:
    """Logits (B, C)."""
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=bool(bf16)):
        return model(batch.input_ids, batch.attention_mask, batch.token_type_ids)


def evaluate(name: str, model: nn.Module, dev: dict[str, "Tokenised"],
             bf16: bool = False) -> tuple[dict[str, float], dict[str, dict]]:
    """Returns the metrics on dev, and each dev set's answers: predictions and labels."""
    answers = {key: {"predictions": predict(model, data, bf16).tolist(),
                     "labels": data.labels.tolist()} for key, data in dev.items()}
    return metrics_on(name, answers), answers


def metrics_on(name: str, answers: dict[str, dict]) -> dict[str, float]:
    """The metrics on every dev set. For MNLI, accuracy_mm is the accuracy on the mismatched set."""
    return {metric + "_mm" * (key == "dev_mismatched"): value for key, given in answers.items()
            for metric, value in metrics(name, **given).items()}


def is_constant(predictions: list) -> bool:
    """True for a collapsed model, which gives all examples the same answer: one class, or scores
    that differ by less than 0.01 (of 5). Its metrics say nothing about the text."""
    return len(predictions) > 1 and max(predictions) - min(predictions) < 0.01


def subset(examples: list, fraction: float, seed: int) -> list:
    """A random share of the examples, in their order. The seed fixes it, and the share for a
    smaller fraction is part of the share for a larger one."""
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in sorted(order[:max(1, round(fraction * len(examples)))])]


def freeze(model: nn.Module, what: str):
    """Excludes the lower part of `model` from fine-tuning ([E]'s ablation).

    what: "none"; "embeddings"; a number N, the embeddings and the N layers above them; "encoder",
    all but the head, which is the pooler and the classifier. Raises InputError on too many."""
    lower = [model.bert.embeddings, *model.bert.layers]
    counts = {"none": 0, "embeddings": 1, "encoder": len(lower)}
    count = counts[what] if what in counts else 1 + int(what)
    if count > len(lower):
        raise InputError(f"--freeze {what}: the model has {len(lower) - 1} layers")
    for module in lower[:count]:
        module.requires_grad_(False)


# --- batches --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Tokenised:
    """Examples as word pieces on the model's device."""
    texts: Texts        # [CLS] a [SEP], or [CLS] a [SEP] b [SEP] (BERT §3.2, figure 1), padded
    labels: np.ndarray  # (n,) int64 classes or float64 scores; zeros on test

    def targets(self) -> Tensor:
        """Classes (n,) long, or scores (n,) float32, on the texts' device."""
        kind = torch.float32 if self.labels.dtype.kind == "f" else torch.int64
        return torch.tensor(self.labels, dtype=kind, device=self.texts.input_ids.device)


def tokenise(examples: list[Example], tokenizer: Tokenizer, max_length: int,
             model: nn.Module) -> Tokenised:
    """The examples as word pieces, each at most max_length long, special tokens included. Of a pair
    that is too long, the longer text is cut first, so that a short second text stays whole."""
    pad, device = tokenizer.token_to_id("[PAD]"), model.classifier.weight.device
    vocab = Vocab(tokenizer, model.config.vocab_size, device)
    tokenizer = copy.deepcopy(tokenizer)  # the caller's is saved with the model, and stays as it is
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    texts = [(a, b) if b is not None else a for a, b, _ in examples]
    ids, types = [], []  # a row for each example
    for start in tqdm(range(0, len(texts), 4096), "tokenising", leave=False, disable=None):
        for encoding in tokenizer.encode_batch_fast(texts[start:start + 4096]):
            ids.append(torch.tensor(encoding.ids, dtype=torch.int32))
            types.append(torch.tensor(encoding.type_ids, dtype=torch.uint8))  # 0 ... 0 1 ... 1
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad).to(device)  # (n, L)
    second = pad_sequence(types, batch_first=True)  # (n, L), 1 on the second text
    typed = model.config.type_vocab_size > 1 and second.any()
    token_type_ids = second.to(device) if typed else None
    labels = np.array([0 if label is None else label for _, _, label in examples])
    return Tokenised(Texts(input_ids, vocab, token_type_ids), labels)


def bucketed_batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator,
                     pool: int = 50) -> list[np.ndarray]:
    """The examples' indices in random batches, each of examples of similar length.

    A batch is padded to its longest example, and attention reads the padding too; with examples of
    any length in a batch, nearly half of the work is padding. Sorting all examples would put the
    same ones together in every epoch, so only pools of `pool` batches are sorted: shuffle the
    examples, sort within each pool, cut into batches, shuffle the batches."""
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), pool * batch_size):
        part = order[start:start + pool * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.split(part, range(batch_size, len(part), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


# --- adaptation: the masked LM on the task's own text ([T]) ---------------------------------------

class TaskTyphoon(TyphoonStrategy):
    """Typhoon as [T]'s abstract words it: the saliency of a token is its gradient in the *task's*
    supervised loss on the uncorrupted text, not in the masked LM's.

    That loss needs a classifier: `probe`, the encoder in training under a head of its own."""
    wants_gradient = False  # not that of the masked LM

    def __init__(self, context: Context, classifier: nn.Module, labels: Tensor, lr: float,
                 weight_decay: float):
        """classifier: a model of the same shape, whose head the probe copies. labels (n,): those of
        the texts, by the text's number."""
        super().__init__(context)
        self.labels = labels
        self.probe = copy.deepcopy(classifier)
        self.probe.bert.embeddings = context.model.bert.embeddings  # shared, not copied
        self.probe.bert.layers = context.model.bert.layers
        head = nn.ModuleList([self.probe.bert.pooler, self.probe.classifier])
        self.head = list(head.parameters())
        self.head_optimizer = make_optimizer(head, lr, weight_decay)

    def mask(self, batch, generator=None):
        """(B, L) bool: each token at its type's rate. What the labels of this batch say enters the
        rates when the step ends."""
        self.learn_from_labels(batch)
        return super().mask(batch, generator)

    def learn_from_labels(self, batch):
        """Adds the batch's task gradient to the averages, and takes one step of the probe's head.

        A fresh head's gradients mean nothing, so it has to learn. Nothing else of the probe may:
        the encoder has to learn from the masked LM alone, as under every other strategy, or else a
        comparison of strategies would be one of masking with and without labels."""
        embeddings = self.probe.bert.embeddings.word_embeddings
        words = embeddings(batch.input_ids).detach().requires_grad_()  # (B, L, H)
        logits = self.probe(None, batch.attention_mask, batch.token_type_ids, inputs_embeds=words)
        loss = task_loss(logits, self.labels[batch.index])
        loss.backward(inputs=[words, *self.head])  # leaves no gradient in the encoder
        self.observe(batch, None, words.grad)      # None: the model saw every token
        self.head_optimizer.step()
        self.head_optimizer.zero_grad()


def adaptation_trainer(args: Namespace, model: nn.Module, tokenizer: Tokenizer, train: Tokenised,
                       bf16: bool) -> Trainer:
    """train.py's trainer for the masked LM of --model, on the task's training text, with the
    strategy --adapt. model: the classifier, whose head Typhoon's probe copies."""
    texts, kind, table = train.texts, find_strategy(args.adapt), None
    mlm = load_pretrained(args.model, "mlm", dropout=args.dropout,
                          whole=kind.needs_teacher and not args.teacher)[0]
    mlm.to(texts.input_ids.device).train()
    if kind.needs_teacher:
        teacher = frozen_teacher(mlm, tokenizer, args.teacher)
        table = entropy_table(teacher, texts, args.entropy_input, args.mask_rate, bf16)
    strategy = build_strategy(args.adapt, mlm, texts, args, table)
    if kind is TyphoonStrategy and args.typhoon_loss == "task":
        strategy = TaskTyphoon(strategy.context, model, train.targets(), args.adapt_lr,
                               args.weight_decay)
    recipe = Recipe(steps=args.adapt_epochs * math.ceil(len(texts) / args.adapt_batch_size),
                    batch_size=args.adapt_batch_size, lr=args.adapt_lr,
                    weight_decay=args.weight_decay, corruption=args.corruption,
                    seed=args.seed, bf16=bf16)
    return Trainer(mlm, texts, strategy, recipe)


def adapt(trainer: Trainer, tokenizer: Tokenizer, title: str) -> dict:
    """Takes the trainer's steps. Returns `steps`; `masked`, a share of the ordinary tokens; `loss`,
    the last epoch's mean in nats (no measure of a strategy: hard tokens cost more); for Typhoon
    the word pieces with the most extreme rates. Raises RunError within 50 steps of a loss
    that is not finite."""
    recipe, texts, results = trainer.recipe, trainer.texts, []
    bar = tqdm(range(recipe.steps), title, leave=False, disable=None)
    for step in bar:
        results.append(trainer.step(step))
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            bar.set_postfix(loss=f"{finite(results[-1][0], step + 1, '--adapt-lr'):.3f}")
    loss, _, masked, maskable = torch.stack(results).cpu().T  # (steps,) each
    # Every masked token counts the same. Short texts may leave a step nothing to guess: its loss is
    # 0 and means nothing.
    last = slice(-math.ceil(len(texts) / recipe.batch_size), None)
    nats, guessed = (loss * masked)[last].sum(), masked[last].sum()
    found = {"steps": recipe.steps, "loss": (nats / guessed.clamp(min=1)).item(),
             "masked": (masked.sum() / maskable.sum().clamp(min=1)).item()}
    if isinstance(trainer.strategy, TyphoonStrategy):
        rates = trainer.strategy.typhoon.rates()
        found["typhoon"] = extreme_rates(rates, texts.token_counts(), tokenizer)
    return found


def frozen_teacher(mlm: nn.Module, tokenizer: Tokenizer, name: str | None) -> nn.Module:
    """The model `name`, by default a copy of the masked LM before it is adapted. Raises InputError
    on a teacher with another vocabulary."""
    teacher = copy.deepcopy(mlm)
    if name:
        teacher, pieces = load_pretrained(name, "mlm", whole=True)
        if pieces.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"--teacher has {pieces.get_vocab_size():,} word pieces, --model "
                             f"{tokenizer.get_vocab_size():,}, and they are not the same: choose "
                             "another --teacher")
    return teacher.to(mlm.head.bias.device).eval()


def extreme_rates(rates: Tensor, counts: Tensor, tokenizer, least: int = 5,
                  most: int = 12) -> dict[str, list]:
    """The word pieces with the highest and the lowest masking rates, of those that the task's text
    holds at least `least` times: {"highest": [[piece, rate, count], ...], "lowest": ...}.

    rates, counts: (V,)."""
    rates, counts = torch.stack([rates, counts.to(rates.dtype)]).tolist()  # read in one go
    known = [i for i, count in enumerate(counts) if count >= least]
    falling = sorted(known, key=lambda i: -rates[i])
    found = [[tokenizer.id_to_token(i), round(rates[i], 4), int(counts[i])] for i in falling]
    return {"highest": found[:most], "lowest": found[::-1][:most]}


# --- metrics --------------------------------------------------------------------------------------
# predictions and labels: (n,) class indices, or scores. Where a denominator is 0, the metric is 0.

def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels)) if len(labels) else 0.0


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN), where class 1 is the positive one."""
    true_positives = np.sum((predictions == 1) & (labels == 1))
    denominator = np.sum(predictions == 1) + np.sum(labels == 1)  # (TP + FP) + (TP + FN)
    return float(2 * true_positives / denominator) if denominator else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of predicted and true classes, from -1 to 1, for any number of classes
    (R_K, Gorodkin 2004).

    Of n examples c are right, p_k are predicted to be of class k, and t_k truly are:
    R_K = (c n − Σ p_k t_k) / √((n² − Σ p_k²) (n² − Σ t_k²)). Divided by n², the numerator is the
    accuracy minus that of guessing with the same frequencies; the denominator makes 1 of all right.
    For two classes it is (TP TN − FP FN) / √((TP+FP) (TP+FN) (TN+FP) (TN+FN))."""
    n, right = float(len(labels)), np.sum(predictions == labels)
    classes = np.union1d(predictions, labels)
    p = np.array([np.sum(predictions == k) for k in classes], dtype=float)
    t = np.array([np.sum(labels == k) for k in classes], dtype=float)
    denominator = math.sqrt((n**2 - p @ p) * (n**2 - t @ t))
    return float((right * n - p @ t) / denominator) if denominator else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation; 0 where either side is constant."""
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions, labels)[0, 1])


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's correlation, which is Pearson's of the ranks."""
    return pearson(ranks(predictions), ranks(labels))


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest value; equal values share the mean of the ranks that they take up."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # the highest rank of each distinct value
    return (last - (counts - 1) / 2)[which]


METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)}


def metrics(name: str, predictions, labels) -> dict[str, float]:
    """The task's official metrics, as fractions. Raises ValueError where the lengths differ."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape:  # numpy would broadcast
        raise ValueError(f"{predictions.shape} predictions, {labels.shape} labels: not one length")
    return {metric: METRICS[metric](predictions, labels) for metric in TASKS[name].metrics}


def score(values: dict[str, float]) -> float:
    """A task's score, which is the mean of its metrics. The GLUE score is the mean of the nine
    tasks' scores (GLUE §4)."""
    return sum(values.values()) / len(values)


def baseline(name: str, train_labels: np.ndarray, dev: dict[str, "Tokenised"]) -> dict[str, float]:
    """The metrics on dev of the constant answer: train's commonest class (STS-B: its mean)."""
    values, counts = np.unique(train_labels, return_counts=True)
    constant = values[counts.argmax()] if TASKS[name].labels else train_labels.mean()
    return metrics_on(name, {key: {"predictions": np.full(len(data.labels), constant),
                                   "labels": data.labels} for key, data in dev.items()})


# --- loading --------------------------------------------------------------------------------------

def load_data(name: str, data_dir: str | Path, test: bool = False) -> Data:
    """All that a run needs, with test=True also what the GLUE server wants predicted: MNLI's model
    predicts AX too."""
    folder, sizes = TASKS[name].folder, TASKS[name].sizes
    loaded = {split: load_task(name, split, data_dir) for split in sizes
              if test or not split.startswith("test")}
    # MNLI has two sets of dev and of test: matched (the genres of train), whose dev is called as
    # any other task's, and mismatched (other genres).
    dev = {split.replace("dev_matched", "dev"): examples for split, examples in loaded.items()
           if split.startswith("dev")}
    endings = {"test": "", "test_matched": "-m", "test_mismatched": "-mm"}
    tests = {f"{folder}{endings[split]}.tsv": examples for split, examples in loaded.items()
             if split in endings}
    if test and name == "mnli":
        tests["AX.tsv"] = load_task("ax", "test", data_dir)
    return Data(loaded["train"], dev, tests)


def load_task(name: str, split: str, data_dir: str | Path) -> list[Example]:
    """A split's examples in the file's order. A task whose files are not in data_dir is downloaded.

    split: one of the task's `sizes`. On test the labels are None, even where the file has them.
    Logs a row count that is not the official one. Raises InputError, naming file and line, on what
    is not the task's."""
    task = TASKS[name]
    official = task.sizes[split]
    path, *dev_ids = locate(task, split, Path(data_dir))
    labelled = not split.startswith("test")
    columns = [task.text_a, task.text_b, task.label if labelled else None]
    header = task.header if labelled else ()
    rows = read_table(path, filter(None, columns), header, task.skip_short and labelled)
    if dev_ids:  # MRPC's train and dev share a file, and another one lists the pairs of dev
        pairs = {tuple(row.values()) for _, row in read_table(dev_ids[0], header=MRPC_IDS)}
        rows = ((place, row) for place, row in rows
                if ((row["#1 ID"], row["#2 ID"]) in pairs) == (split == "dev"))
    examples = [Example(row[task.text_a], row.get(task.text_b),  # None: a task on single texts
                        parse_label(task, row[task.label], place) if labelled else None)
                for place, row in rows]
    if not examples:
        raise InputError(f"{path} holds nothing of {name} {split}: copy or download it again")
    if len(examples) != official:
        log.warning(f"{path}: {name} {split} has {len(examples):,} examples here, officially "
                    f"{official:,}")
    return examples


REPAIR = "correct it, or copy or download the file again"
BAD_BYTE = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of a byte not UTF-8


def read_table(path: Path, columns=(), header=(), skip_short=False) -> Iterator[tuple[str, dict]]:
    """Yields the rows, {column: text}, of a tab-separated file, each after its place, "FILE, line
    N". A BOM and empty lines are passed over; quotation marks mean nothing in GLUE's files.

    columns: those that must be there. header: the names of all, for a file without a first line of
    names. skip_short: pass over the rows with too few columns, and log how many there were. Raises
    InputError, naming the line."""
    skipped = 0
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        names = header or file.readline().rstrip("\n").split("\t")
        for column in columns:
            if column not in names:
                raise InputError(f"{path}, line 1: the header lacks {column!r}, it is "
                                 f"{' | '.join(names)[:200]!r}: copy or download the official file")
        for i, line in enumerate(file, 1 if header else 2):
            place, fields = f"{path}, line {i}", line.rstrip("\n").split("\t")
            if line == "\n":
                continue
            if skip_short and len(fields) < len(names):
                skipped += 1
                continue
            if len(fields) != len(names):
                raise InputError(f"{place}: this row does not have {len(names)} columns: {REPAIR}")
            if BAD_BYTE.search(line):
                raise InputError(f"{place}: this is not UTF-8: {REPAIR}")
            yield place, dict(zip(names, fields))
    if skipped:
        log.warning(f"{path}: skipped {skipped} rows with too few columns")


def parse_label(task: Task, text: str, place: str) -> int | float:
    """A class's index, or a score. Raises InputError."""
    if text in task.labels:
        return task.labels.index(text)
    if task.labels:
        raise InputError(f"{place}: label {text!r} is not one of {', '.join(task.labels)}: "
                         f"{REPAIR}")
    if not re.fullmatch(r"\d+(\.\d*)?", text) or float(text) > 5:
        raise InputError(f"{place}: score {text!r} is not a number from 0 to 5: {REPAIR}")
    return float(text)


def locate(task: Task, split: str, data_dir: Path) -> list[Path]:
    """The files of a split, downloaded if they are not there: one, and for MRPC also the list of
    the pairs that belong to dev. Raises InputError."""
    alternatives = task.files.get(split, ((f"{task.folder}/{split}.tsv",),))
    for downloaded in (False, True):
        for names in alternatives:
            paths = [data_dir / name for name in names]
            if all(path.is_file() for path in paths):
                return paths
        if not downloaded:
            fetch(task, data_dir)
    source, wanted = urljoin(GLUE_URL, next(iter(task.sha256))), data_dir / alternatives[0][0]
    raise InputError(f"{source} did not hold {wanted.name}: put that file at {wanted}")


def fetch(task: Task, data_dir: Path):
    """Downloads a task. The sha256 is checked before anything is unpacked or used."""
    for address, sha256 in task.sha256.items():
        url = urljoin(GLUE_URL, address)  # a whole address stays as it is
        name = url.rpartition("/")[2]
        if not name.endswith(".zip"):
            download(url, data_dir / task.folder / name, sha256)
            continue
        archive = download(url, data_dir / name, sha256)  # it holds the task's folder
        # Unpacked aside, without members that lead out of there: an interruption cuts no file.
        with tempfile.TemporaryDirectory(dir=data_dir) as aside:
            shutil.unpack_archive(archive, aside)
            shutil.copytree(Path(aside, task.folder), data_dir / task.folder, dirs_exist_ok=True,
                            copy_function=os.replace)
        archive.unlink(missing_ok=True)


# --- results --------------------------------------------------------------------------------------

def server_file(task: Task, predictions: np.ndarray) -> str:
    """A file for the GLUE server: a header, then a line an example, its number and prediction."""
    answers = [task.labels[prediction] for prediction in predictions] if task.labels else [
        f"{prediction:.3f}" for prediction in predictions.clip(0, 5)]
    lines = [f"{i}\t{answer}\n" for i, answer in enumerate(answers)]
    return "index\tprediction\n" + "".join(lines)


def provenance(model: str, teacher: str | None) -> dict:
    """Where a run's weights come from: the sha256 of the model's and of the teacher's, and the
    arguments of the model's pretraining, None where it is not a run of train.py."""
    settings = find_pretrained(model) / "train_args.json"
    return {"weights": weights_digest(model),
            "teacher_weights": weights_digest(teacher) if teacher else None,
            "pretraining": read_json(settings) if settings.exists() else None}


def run_file(args: Namespace) -> Path:
    """Where the run's JSON goes."""
    if args.json:
        return Path(args.json)
    strategy = args.label or strategy_label(args.adapt)
    name = "-".join([args.task, args.model, strategy, str(args.seed)])
    return Path("runs/glue") / (re.sub(r"[^\w.-]+", "-", name) + ".json")


# Where a run happens, and goes; and the same weights had the same pretraining.
NO_SETTING = {"device", "data_dir", "json", "predict", "save", "pretraining"}


def refuse_to_replace(args: Namespace, weights: bool = True):
    """Raises InputError where the run's file holds a run with other settings, or from other
    weights: the scores of two different runs must not pass for one."""
    path, remedy = run_file(args), "choose another --json, or delete that file"
    try:
        earlier = read_json(path)
    except InputError:  # no such file, or a damaged one, which may be replaced
        return
    if not isinstance(earlier.get("args"), dict):
        raise InputError(f"{path} is not a result of glue.py: {remedy}")
    now = vars(args) | (provenance(args.model, args.teacher) if weights else {})
    refuse_difference(path, earlier | earlier["args"], now, now.keys() - NO_SETTING, remedy)


def refuse_difference(path: Path, before: dict, now: dict, names: set[str], remedy: str):
    """Raises InputError on the first of these settings that is not what it was before."""
    for name in sorted(names):
        if before.get(name) != now[name]:
            there, here = ("the default" if value is None else value
                           for value in (before.get(name), now[name]))
            raise InputError(f"{path} holds a run that differs in {name} ({there} there, {here} "
                             f"here): {remedy}")


def describe(run: dict) -> str:
    """A run as text for the terminal."""
    lines = [f"{run['task']}, {run['model']}, strategy {run['strategy']}, seed {run['seed']}: "
             f"{run['seconds']:.0f} s"]
    if found := run["adaptation"]:
        lines.append(f"  adapted in {found['steps']:,} steps, {found['masked']:.1%} masked; "
                     f"masked-LM loss {found['loss']:.2f} nats in the last epoch (harder masks "
                     "cost more: no measure of a strategy)")
        for end, pieces in found.get("typhoon", {}).items():
            rates = ", ".join(f"{piece} {rate:.3f}" for piece, rate, _ in pieces)
            lines.append(f"  {end} masking rates: {rates}")
    lines += [f"  last epoch ({len(run['epochs'])})     {format_metrics(run['last'])}",
              f"  constant answer    {format_metrics(run['baseline'])}"]
    if run["collapsed"]:
        lines.append("  collapsed: the model gives every dev example the same answer, whatever its "
                     "text; another --lr or --seed, or more --epochs, may help")
    return "\n".join(lines)


def format_metrics(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def score_table(runs: list[dict]) -> str:
    """The scores of the tasks, the constant answer's beside them, and their means: the first is the
    GLUE score."""
    line = "{:<12}{:>8.4f}{:>10.4f}   {}"
    lines = [f"{'task':<12}{'score':>8}{'constant':>10}   metrics of the last epoch"]
    scores = [(score(run["last"]), score(run["baseline"])) for run in runs]
    for run, both in zip(runs, scores):
        remark = "  (collapsed)" if run["collapsed"] else ""
        lines.append(line.format(run["task"], *both, format_metrics(run["last"]) + remark))
    lines.append(line.format("GLUE score", *np.mean(scores, axis=0), "").rstrip())
    return "\n".join(lines)


# --- the command line -----------------------------------------------------------------------------

def freezable(text: str) -> str:
    """An argparse type: what `freeze` takes."""
    if not re.fullmatch(r"none|embeddings|encoder|\d{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not none, embeddings, encoder or a number")
    return text


def parse_args(argv=None) -> Namespace:
    """The arguments. Ends in one line on stderr and status 2 where they cannot be right."""
    parser = Parser(description="Fine-tune and evaluate on GLUE.")
    add = parser.add_argument_group("what to run").add_argument
    add("--task", required=True, choices=[*NINE, "all"], metavar="TASK",
        help=f"{', '.join(NINE)}, or all: these nine")
    add("--model", required=True, help="a run of train.py, a Hugging Face directory or a hub name")
    add("--data-dir", default=os.environ.get("GLUE_DIR", "data/glue"), help="downloads go there")
    add("--seed", type=number(int, low=0, below=2**32), default=0,
        help="of the head, the data's order, the masks and dropout")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--bf16", action=BooleanOptionalAction, help="bfloat16 (default: on a GPU that has it)")

    add = parser.add_argument_group("fine-tuning").add_argument
    add("--epochs", type=COUNT, default=3, help="passes over the training examples")
    add("--batch-size", type=COUNT, default=16, help="examples an optimizer step")
    add("--lr", type=POSITIVE,
        help="peak learning rate of AdamW (default: 2e-5, or 3e-4 for a model at most 256 wide)")
    add("--warmup", type=FRACTION, default=0.1, help="share of the steps before --lr is reached")
    add("--weight-decay", type=number(float, low=0), default=0.01, help="--adapt has it too")
    add("--dropout", type=BELOW_1, default=0.1, help="in fine-tuning and adaptation")
    add("--seq-len", type=number(int, low=8), default=128, help="word pieces an example")
    add("--fraction", type=number(float, above=0, high=1), default=1.0,
        help="train on this share of the examples, the same for every strategy")
    add("--freeze", type=freezable, default="none",
        help="none, embeddings, a number of layers (and the embeddings), or encoder")

    add = parser.add_argument_group("adaptation before it").add_argument
    add("--adapt", default="none", metavar="STRATEGY",
        type=lambda text: text if text == "none" else strategy_name(text),
        help=f"train the masked LM on the task's text: none, {', '.join(STRATEGIES)}, or "
             "FILE.py:CLASS")
    add("--adapt-epochs", type=COUNT, default=3, help="passes over the text of the examples")
    add("--adapt-batch-size", type=COUNT, default=16, help="examples an optimizer step")
    add("--adapt-lr", type=POSITIVE, default=1e-4, help="peak learning rate")
    add_options(add, Masking, corruption=[1.0, 0.0, 0.0], entropy_select="high")
    add("--typhoon-loss", choices=["task", "mlm"], default="task",
        help="whose gradient feeds typhoon, the labels' or the masked LM's (FILE.py:CLASS: its)")
    add("--teacher", help="for entropy (default: the model before it is adapted, frozen)")

    add = parser.add_argument_group("what to keep").add_argument
    add("--json", metavar="FILE", help="default: runs/glue/TASK-MODEL-STRATEGY-SEED.json")
    add("--save", metavar="DIR", help="keep the fine-tuned model; with --task all a folder a task")
    add("--predict", metavar="DIR", help="write the GLUE server's files of test predictions")
    add("--label", help="what the run's file calls the strategy (default: that of --adapt)")
    add("--pattern", help="the {masking} and {seed} pattern behind --model; stats.py sets it")

    args = parser.parse_args(argv)
    if not math.isclose(sum(args.corruption), 1, abs_tol=1e-6):
        parser.error(f"--corruption {args.corruption}: these must be three shares that sum to 1")
    if args.json and args.task == "all":
        parser.error(f"--json {args.json}: leave it out, --task all writes nine files")
    if (file := run_file(args)).is_dir() or not can_write(file):
        parser.error(f"--json {file}: this is not a file that can be written")
    for option, folder in (("--predict", args.predict), ("--save", args.save)):
        if folder and not can_write(Path(folder) / "file"):
            parser.error(f"{option} {folder}: this is not a folder that can be written")
    if args.save and Path(args.save).exists() and any(Path(args.save).iterdir()):
        parser.error(f"--save {args.save}: this folder is not empty, choose another")
    return args


def run_task(args: Namespace, data: Data) -> dict:
    """Fine-tunes on one task, prints and keeps what comes of it, and returns the run."""
    run, model, tokenizer = finetune(args, data)
    print(describe(run), flush=True)
    # The scores first: a disk that is full by then does not take them.
    write_atomic(run_file(args), json.dumps(run) + "\n")
    print(f"  kept in {run_file(args)}", flush=True)
    for file, examples in data.test.items():
        test = tokenise(examples, tokenizer, args.seq_len, model)
        predictions = predict(model, test, run["bf16"])
        write_atomic(Path(args.predict) / file, server_file(TASKS[args.task], predictions))
    if args.save:
        save_pretrained(model, tokenizer, args.save)
    return run


def main(argv=None):
    args = parse_args(argv)
    tasks = {args.task: args}
    if args.task == "all":
        folders = {name: args.save and str(Path(args.save) / name) for name in NINE}
        tasks = {name: Namespace(**vars(args) | {"task": name, "save": folder})
                 for name, folder in folders.items()}
    for one in tasks.values():
        refuse_to_replace(one)
    # All files are read before the first task is trained, so that a bad one shows up at once.
    data = {name: load_data(name, args.data_dir, test=bool(args.predict)) for name in tasks}
    try:
        runs = [run_task(one, data[name]) for name, one in tasks.items()]
    except torch.cuda.OutOfMemoryError:
        raise RunError(
            f"the GPU's memory is full at --batch-size {args.batch_size}, --adapt-batch-size "
            f"{args.adapt_batch_size}, --seq-len {args.seq_len}: lower one of them") from None
    if args.task == "all":
        print(score_table(runs))


if __name__ == "__main__":
    run_cli(main)
