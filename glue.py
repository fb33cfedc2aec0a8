"""GLUE: its tasks, files and metrics, fine-tuning, and adapting a model to a task's text beforehand.

GLUE is Wang et al. 2018 (arXiv 1804.07461); fine-tuning follows BERT (1810.04805, §4.1). `--adapt` first trains the
masked LM on the task's own text with one of masking.py's strategies, as [T] does (Typhoon, 2303.15619). In order: the
table of tasks, loading, download, metrics, batches, fine-tuning, adaptation, test predictions, the command line.

    python glue.py --task mrpc --model runs/entropy                   # one task: fine-tune and evaluate
    python glue.py --task all --model bert-base-uncased               # the nine tasks and the GLUE score
    python glue.py --task mrpc --model runs/random --adapt typhoon    # [T]'s pipeline
    python glue.py --task all --model runs/entropy --predict out/     # the files that gluebenchmark.com takes

Shapes: B batch, L tokens of the batch's longest example, H hidden, C classes, n examples.
"""
import copy
import json
import math
import os
import re
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from masking import STRATEGIES, Context, TyphoonStrategy, find_strategy
from model import (InputError, Parser, RunError, can_write, load_pretrained, log, run_cli,
                   write_atomic)
from train import (Recipe, Texts, Trainer, Vocab, build_strategy, download, entropy_table, lr_at, make_optimizer,
                   pick_device, unpack, versions)


# --- the tasks -------------------------------------------------------------------------------------------------------

class Example(NamedTuple):
    text_a: str
    text_b: str | None          # None where the task is about single sentences
    label: int | float | None   # index of the class; STS-B: the score; None on test


@dataclass(frozen=True)
class Task:
    """A row of the table: how a task is scored, what its files hold, where they come from."""
    folder: str                  # in the data folder and in the archive; the server's name for the task
    metrics: tuple[str, ...]     # names in METRICS
    labels: tuple[str, ...]      # the classes in the order of their indices; () for regression
    text_a: str                  # names of columns
    text_b: str | None
    label: str | None
    rows: dict[str, int]         # split -> official number of rows, without those that skip_short skips
    downloads: tuple[tuple[str, str], ...]                 # address, sha256
    words: bool = False          # files and server spell a class by its name, not by its index
    header: tuple[str, ...] = ()  # columns of train and dev where these files have no header
    skip_short: bool = False     # train and dev are known to have rows with too few columns
    files: dict[str, tuple] = field(default_factory=dict)  # split -> sets of files, where not FOLDER/SPLIT.tsv

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1

    @property
    def spelled(self) -> tuple[str, ...]:
        """The classes as files and server spell them."""
        return self.labels if self.words else tuple(str(i) for i in range(len(self.labels)))

    def splits(self, kind: str) -> list[str]:
        """kind: "train", "dev" or "test". MNLI has two of dev and test: matched (train's genres) and mismatched."""
        return [split for split in self.rows if split.split("_")[0] == kind]


def archive(name: str, sha256: str) -> tuple:
    return (("https://dl.fbaipublicfiles.com/glue/data/" + name, sha256),)


SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
MRPC_TRAIN = ("MRPC/msr_paraphrase_train.txt", "MRPC/mrpc_dev_ids.tsv")
PAIR, NLI = ("sentence1", "sentence2"), ("entailment", "neutral", "contradiction")

TASKS = {  # sizes and sha256 as the public GLUE loader's dataset_infos.json publishes them
    "cola": Task(
        "CoLA", ("matthews",), ("unacceptable", "acceptable"), "sentence", None, "label",
        {"train": 8551, "dev": 1043, "test": 1063},
        archive("CoLA.zip", "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
        header=("source", "label", "star", "sentence")),
    "sst2": Task(
        "SST-2", ("accuracy",), ("negative", "positive"), "sentence", None, "label",
        {"train": 67349, "dev": 872, "test": 1821},
        archive("SST-2.zip", "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")),
    "mrpc": Task(
        "MRPC", ("f1", "accuracy"), ("not_equivalent", "equivalent"), "#1 String", "#2 String", "Quality",
        {"train": 3668, "dev": 408, "test": 1725},
        archive("mrpc_dev_ids.tsv", "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7") +
        ((SENTEVAL + "msr_paraphrase_train.txt",
          "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
         (SENTEVAL + "msr_paraphrase_test.txt",
          "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784")),
        files={"train": (MRPC_TRAIN, ("MRPC/train.tsv",)), "dev": (MRPC_TRAIN, ("MRPC/dev.tsv",)),
               "test": (("MRPC/msr_paraphrase_test.txt",), ("MRPC/test.tsv",))}),
    "stsb": Task(
        "STS-B", ("pearson", "spearman"), (), *PAIR, "score", {"train": 5749, "dev": 1500, "test": 1379},
        archive("STS-B.zip", "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")),
    "qqp": Task(
        "QQP", ("f1", "accuracy"), ("not_duplicate", "duplicate"), "question1", "question2", "is_duplicate",
        {"train": 363846, "dev": 40430, "test": 390965},
        archive("QQP-clean.zip", "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
        skip_short=True),
    "mnli": Task(
        "MNLI", ("accuracy",), NLI, *PAIR, "gold_label",
        {"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832, "test_matched": 9796, "test_mismatched": 9847},
        archive("MNLI.zip", "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"), words=True),
    "qnli": Task(
        "QNLI", ("accuracy",), ("entailment", "not_entailment"), "question", "sentence", "label",
        {"train": 104743, "dev": 5463, "test": 5463},
        archive("QNLIv2.zip", "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
        words=True),
    "rte": Task(
        "RTE", ("accuracy",), ("entailment", "not_entailment"), *PAIR, "label",
        {"train": 2490, "dev": 277, "test": 3000},
        archive("RTE.zip", "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"), words=True),
    "wnli": Task(
        "WNLI", ("accuracy",), ("not_entailment", "entailment"), *PAIR, "label",
        {"train": 635, "dev": 71, "test": 146},
        archive("WNLI.zip", "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46")),
    "ax": Task(  # the diagnostic set: nothing to train on, an MNLI model predicts it
        "AX", ("matthews",), NLI, *PAIR, None, {"test": 1104},
        archive("AX.tsv", "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"), words=True,
        files={"test": (("AX/AX.tsv",), ("diagnostic/diagnostic.tsv",))}),
}
NINE = [name for name in TASKS if name != "ax"]


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    return TASKS[name]


# --- loading ---------------------------------------------------------------------------------------------------------

def load_task(name: str, split: str, data_dir: str | Path) -> list[Example]:
    """A split's examples in the file's order; a task whose files are not in data_dir is downloaded there.

    split: "train", "dev", "test"; MNLI's "dev" is "dev_matched", its other one "dev_mismatched". On test the labels
    are None, even where the file has them. Logs a row count that is not the official one. Raises InputError, naming
    file and line, on a wrong header, a wrong number of columns or a label outside the task's."""
    task = find_task(name)
    split = next(iter(task.splits(split)), split)
    if split not in task.rows:
        raise InputError(f"{name} has no split {split!r}: choose from {', '.join(task.rows)}")
    path, *dev_ids = locate(task, split, Path(data_dir))
    labelled, rows = not split.startswith("test"), read_rows(path)
    header = list(task.header) if labelled and task.header else next(rows, (1, []))[1]
    rows = of_width(len(header), rows, path, task.skip_short and labelled)
    if dev_ids:
        ids = {tuple(row) for _, row in of_width(2, read_rows(dev_ids[0]), dev_ids[0])}
        one, two = find_columns(path, header, ["#1 ID", "#2 ID"])
        rows = ((line, row) for line, row in rows if ((row[one], row[two]) in ids) == (split == "dev"))
    examples = list(parse_rows(task, path, header, rows, labelled))
    if not examples:
        raise InputError(f"{path} holds nothing of {name} {split}: copy or download it again")
    if len(examples) != task.rows[split]:
        log.warning("%s: %s %s has %s examples here, officially %s", path, name, split,
                    f"{len(examples):,}", f"{task.rows[split]:,}")
    return examples


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields of a tab-separated file without quoting; passes over a BOM and empty lines. Lines end
    where Python's text files have them end, as they did when the official rows were counted."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line := line.removesuffix("\n"):
                    yield number, line.split("\t")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 at byte {bad_byte(path)}: copy or download it again") from None


def bad_byte(path: Path) -> int | None:
    """Offset of the first byte that is not UTF-8. (An open file's decoder counts from the start of its buffer.)"""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start


def of_width(width: int, rows, path: Path, skip_short: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Passes on the rows of `width` fields; skips shorter ones if asked to, and logs how many."""
    skipped = 0
    for line, row in rows:
        if len(row) == width:
            yield line, row
        elif skip_short and len(row) < width:
            skipped += 1
        else:
            raise InputError(f"{path}, line {line}: {len(row)} columns instead of {width}: "
                             "correct it, or copy or download the file again")
    if skipped:
        log.warning("%s: skipped %d rows with too few columns", path, skipped)


def find_columns(path: Path, header: list[str], names: list[str]) -> list[int]:
    """Where the named columns are. Raises InputError with what the header is instead."""
    if missing := [name for name in names if name not in header]:
        raise InputError(f"{path}, line 1: the header lacks {missing[0]!r}, it is {' | '.join(header)[:200]!r}: "
                         "copy or download the official file")
    return [header.index(name) for name in names]


def parse_rows(task: Task, path: Path, header: list[str], rows, labelled: bool) -> Iterator[Example]:
    """Examples from (line number, columns) pairs. Raises InputError, naming the line, on a label that is none."""
    names = [task.text_a] + [task.text_b] * bool(task.text_b) + [task.label] * labelled
    columns = dict(zip(names, find_columns(path, header, names)))
    for line, row in rows:
        try:
            label = parse_label(task, row[columns[task.label]]) if labelled else None
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {error}: correct it, or copy or download the file again") from None
        yield Example(row[columns[task.text_a]], row[columns[task.text_b]] if task.text_b else None, label)


def parse_label(task: Task, text: str) -> int | float:
    """A class's index, or a score. Raises ValueError, saying what it should have been."""
    if task.labels and text in task.spelled:
        return task.spelled.index(text)
    if task.labels:
        raise ValueError(f"label {text!r} is none of {', '.join(task.spelled)}")
    if not re.fullmatch(r"\d+(\.\d*)?", text) or float(text) > 5:
        raise ValueError(f"score {text!r} is no number from 0 to 5")
    return float(text)


# --- download --------------------------------------------------------------------------------------------------------

def locate(task: Task, split: str, data_dir: Path) -> list[Path]:
    """The files of a split: one of the sets that the table names, downloaded if none is there. A second file lists the
    dev examples by their pairs of ids, where train and dev share the first. Raises InputError."""
    sets = [[data_dir / file for file in files] for files in task.files.get(split, ((f"{task.folder}/{split}.tsv",),))]

    def here():
        return next((paths for paths in sets if all(path.is_file() for path in paths)), None)

    if not here():
        fetch(task, data_dir)
    if found := here():
        return found
    raise InputError(f"{task.downloads[0][0]} did not hold {sets[0][0].name}: put that file at {sets[0][0]}")


def fetch(task: Task, data_dir: Path):
    """Downloads the task; size and sha256 are checked before anything is unpacked or used."""
    for url, sha256 in task.downloads:
        name = url.rpartition("/")[2]
        if name.endswith(".zip"):  # it holds the task's folder
            unpack(download(url, data_dir / name, sha256), data_dir)
            (data_dir / name).unlink(missing_ok=True)
        else:
            download(url, data_dir / task.folder / name, sha256)


# --- metrics ---------------------------------------------------------------------------------------------------------
# Predictions and labels: (n,) class indices, or scores. Where a ratio's denominator is 0 the metric is 0, never NaN.

def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels)) if len(labels) else 0.0


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of class 1."""
    hits = np.sum((predictions == 1) & (labels == 1))
    claims = np.sum(predictions == 1) + np.sum(labels == 1)  # 2 TP + FP + FN
    return float(2 * hits / claims) if claims else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two classes, in the form that also takes more (R_K, Gorodkin 2004): with n examples,
    c of them right, p_k said to be class k and t_k truly of it, (c n − Σ p t) / √((n² − Σ p²)(n² − Σ t²))."""
    classes, coded = np.unique(np.concatenate([predictions, labels]), return_inverse=True)
    p, t = (np.bincount(part, minlength=len(classes)).astype(float) for part in np.split(coded, 2))
    n, right = len(labels), np.sum(predictions == labels)
    scale = math.sqrt((n**2 - p @ p) * (n**2 - t @ t))
    return float((right * n - p @ t) / scale) if scale else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    x, y = (values - values.mean() for values in (predictions.astype(float), labels.astype(float)))
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of the ranks."""
    return pearson(ranks(predictions), ranks(labels))


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal values share the mean of the ranks they take up."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def metrics(name: str, predictions, labels) -> dict[str, float]:
    """The task's official metrics, as fractions. Raises ValueError where the lengths differ."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} must be two lists of one length")
    return {metric: METRICS[metric](predictions, labels) for metric in find_task(name).metrics}


def score(values: dict[str, float]) -> float:
    """A task's score is the mean of its metrics; the GLUE score is the mean of the nine tasks' (GLUE §4)."""
    return sum(values.values()) / len(values)


def baseline(name: str, train_labels: np.ndarray, dev_labels: np.ndarray) -> dict[str, float]:
    """What a model that has seen no text scores: it always says the commonest class of train (STS-B: the mean)."""
    values, counts = np.unique(train_labels, return_counts=True)
    constant = values[counts.argmax()] if TASKS[name].labels else train_labels.mean()
    return metrics(name, np.full(len(dev_labels), constant), dev_labels)


# --- batches ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Encoded:
    """A split as word pieces, [CLS] a [SEP] or [CLS] a [SEP] b [SEP] (BERT §3.2, figure 1)."""
    input_ids: list[np.ndarray]  # n rows of int32, each as long as its example
    second: np.ndarray           # (n,) where the second text starts, its token type being 1; the row's end if none
    labels: np.ndarray           # (n,) int64 classes or float64 scores; zeros on test

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.input_ids])

    def targets(self, rows, device: torch.device) -> Tensor:
        """Classes (B,) long, or scores (B,) float32."""
        labels = torch.from_numpy(self.labels[rows])
        return (labels.float() if labels.is_floating_point() else labels).to(device)


def truncate(a: list[int], b: list[int], room: int):
    """Shortens the two lists in place to `room` word pieces together: one at a time off the end of the longer, off b
    where they are equal (BERT's own rule)."""
    while len(a) + len(b) > room:
        (a if len(a) > len(b) else b).pop()


def encode(examples: list[Example], tokenizer, max_length: int, chunk: int = 4096) -> Encoded:
    """Tokenises; no row is longer than max_length, special tokens included."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    ids, second = [], []
    for start in tqdm(range(0, len(examples), chunk), "tokenize", leave=False, disable=None):
        part = examples[start:start + chunk]
        firsts = tokenizer.encode_batch([example.text_a for example in part], add_special_tokens=False)
        others = tokenizer.encode_batch([example.text_b or "" for example in part], add_special_tokens=False)
        for example, one, two in zip(part, firsts, others):
            a, b, paired = one.ids, two.ids, example.text_b is not None
            truncate(a, b, max_length - 2 - paired)
            ids.append(np.array([cls, *a, sep, *b, *[sep] * paired], dtype=np.int32))
            second.append(len(a) + 2)
    labels = [0 if example.label is None else example.label for example in examples]
    return Encoded(ids, np.array(second), np.array(labels))


def bucketed_batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator, pool: int = 50) -> list:
    """The examples' indices in random batches of similar length, so that little is padding: shuffled, sorted within
    pools of `pool` batches, cut into batches, the batches shuffled."""
    order, batches = rng.permutation(len(lengths)), []
    for start in range(0, len(order), pool * batch_size):
        part = order[start:start + pool * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.split(part, range(batch_size, len(part), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def collate(data: Encoded, rows: np.ndarray, model: nn.Module) -> dict[str, Tensor | None]:
    """The model's arguments for some examples, padded to the longest of them, on the model's device. The mask is None
    where nothing is padded, the token types are None where the model or the examples have but one."""
    types, device = model.bert.embeddings.token_type_embeddings, next(model.parameters()).device
    lengths = torch.tensor([len(data.input_ids[row]) for row in rows])
    input_ids = torch.full((len(rows), int(lengths.max())), model.config.pad_token_id)  # (B, L)
    for line, row in zip(input_ids, rows):
        line[:len(data.input_ids[row])] = torch.from_numpy(data.input_ids[row])
    column = torch.arange(input_ids.shape[1])
    real = column < lengths[:, None]                                                    # (B, L)
    in_second = (column >= torch.from_numpy(data.second[rows])[:, None]) & real         # (B, L)
    typed = types is not None and types.num_embeddings > 1 and bool(in_second.any())
    return {"input_ids": input_ids.to(device),
            "attention_mask": None if real.all() else real.to(device),
            "token_type_ids": in_second.long().to(device) if typed else None}


# --- fine-tuning -----------------------------------------------------------------------------------------------------

@dataclass
class Data:
    """A task's examples, read before anything slow begins."""
    train: list[Example]
    dev: dict[str, list[Example]]   # "dev"; for MNLI, whose "dev" is the matched one, also "dev_mismatched"
    test: dict[str, list[Example]]  # by the file that a submission has for them


def load_data(name: str, data_dir: str | Path, test: bool = False) -> Data:
    """All that a run needs. Raises InputError where there is nothing to train on."""
    task = find_task(name)
    if "train" not in task.rows:
        raise InputError(f"{name} has only a test set: an MNLI model predicts it")
    train = load_task(name, "train", data_dir)
    dev = {split.replace("dev_matched", "dev"): load_task(name, split, data_dir) for split in task.splits("dev")}
    return Data(train, dev, {file: load_task(*source, data_dir) for file, source in submissions(name).items() if test})


def subset(examples: list, fraction: float, seed: int) -> list:
    """A fixed random share of the examples for each seed, in their order; a smaller share is part of a larger one."""
    keep = np.random.default_rng(seed).permutation(len(examples))[:max(1, round(fraction * len(examples)))]
    return [examples[i] for i in np.sort(keep)]


def freeze(model: nn.Module, what: str):
    """Takes gradients away ([E]'s ablation). what: "none"; "embeddings"; a number N, the embeddings and the N layers
    above them; "encoder", all but the pooler and the classifier, which are the head. Raises InputError."""
    layers = model.bert.layers
    depth = {"none": -1, "embeddings": 0, "encoder": len(layers)}.get(what)
    depth = int(what) if depth is None else depth
    if depth > len(layers):
        raise InputError(f"--freeze {what}: the model has {len(layers)} layers")
    for module in [model.bert.embeddings, *layers][:depth + 1]:
        module.requires_grad_(False)


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats of logits (B, C) and classes (B,); the squared error of (B, 1) and scores (B,)."""
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0].float(), labels)
    return F.cross_entropy(logits.float(), labels)


def finite(loss: Tensor, step: int, remedy: str) -> float:
    """The loss as a number. Raises RunError where it is none; weights that are not finite stay so, a later look finds
    them too."""
    if not math.isfinite(value := loss.item()):
        raise RunError(f"the loss is {value} at step {step} or a little before: lower {remedy}")
    return value


def autocast(device: torch.device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def train_epoch(model: nn.Module, data: Encoded, batches: list, optimizer, rates: Iterator, bar: tqdm) -> float:
    """One pass over the batches; `rates` yields each step's number and learning rate. Returns the mean loss per example.
    Raises RunError when the loss is no longer finite, within 50 steps."""
    model.train()
    total, parameters = 0.0, [p for p in model.parameters() if p.requires_grad]
    for rows in batches:
        step, rate = next(rates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs = collate(data, rows, model)
        labels = data.targets(rows, inputs["input_ids"].device)
        with autocast(labels.device):
            loss = task_loss(model(**inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total = total + loss.detach() * len(rows)  # on the device: reading it at every step would wait for it
        bar.update()
        if step % 50 == 0 or rows is batches[-1]:
            bar.set_postfix(loss=f"{finite(loss, step, '--lr'):.3f}", lr=f"{rate:.1e}")
    return float(total) / len(data.labels)


@torch.no_grad()
def predict(model: nn.Module, data: Encoded, batch_size: int = 128) -> np.ndarray:
    """Class indices (n,) int64, or scores (n,) float64, in the examples' order."""
    model.eval()
    order, predictions = np.argsort(data.lengths, kind="stable"), np.empty(len(data.labels))
    for rows in np.split(order, range(batch_size, len(order), batch_size)):
        inputs = collate(data, rows, model)
        with autocast(inputs["input_ids"].device):
            logits = model(**inputs).float()  # (B, C)
        if not logits.isfinite().all():
            raise RunError("the model's outputs are not finite: lower --lr")
        predictions[rows] = (logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)).cpu().numpy()
    return predictions if logits.shape[1] == 1 else predictions.astype(np.int64)


def evaluate(name: str, model: nn.Module, dev: dict[str, Encoded]) -> tuple[dict[str, float], dict[str, dict]]:
    """The metrics on dev, where accuracy_mm is MNLI's mismatched accuracy; and each set's predictions and labels."""
    values, sets = {}, {}
    for key, data in dev.items():
        predictions = predict(model, data)
        ending = "_mm" if key == "dev_mismatched" else ""
        values |= {metric + ending: value for metric, value in metrics(name, predictions, data.labels).items()}
        sets[key] = {"predictions": predictions.tolist(), "labels": data.labels.tolist()}
    return values, sets


def fit(model: nn.Module, train: Encoded, dev: dict[str, Encoded], args: Namespace) -> tuple[list[dict], dict]:
    """Fine-tunes `model` in place. Returns an entry for each epoch, and predictions and labels of the last."""
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    steps = args.epochs * math.ceil(len(train.labels) / args.batch_size)
    rates = enumerate((args.lr * lr_at(step, steps, args.warmup) for step in range(steps)), 1)
    epochs = []
    with tqdm(total=steps, desc=args.task, leave=False, disable=None) as bar:
        for epoch in range(1, args.epochs + 1):
            batches = bucketed_batches(train.lengths, args.batch_size, np.random.default_rng((args.seed, epoch)))
            loss = train_epoch(model, train, batches, optimizer, rates, bar)
            values, sets = evaluate(args.task, model, dev)
            epochs.append({"epoch": epoch, "train_loss": loss, "metrics": values})
    return epochs, sets


def finetune(args: Namespace, data: Data | None = None) -> dict:
    """One run, from the checkpoint to what its JSON file holds. args: as `parse_args` returns them.

    The seed fixes the head's initialisation, the share of the data, its order, the masks of --adapt and dropout. The
    last epoch is the headline: the best one is chosen on the examples it is scored on, and overstates."""
    started, device, task = time.time(), pick_device(args.device), find_task(args.task)
    data = data or load_data(args.task, args.data_dir, test=bool(args.predict))
    torch.manual_seed(args.seed)
    model, tokenizer = load_pretrained(args.model, "classification", task.num_labels, args.dropout)
    if args.seq_len > model.config.max_position_embeddings:
        raise InputError(f"{args.model} has {model.config.max_position_embeddings} positions: lower --seq-len")
    freeze(model.to(device), args.freeze)
    train = encode(subset(data.train, args.fraction, args.seed), tokenizer, args.seq_len)
    dev = {key: encode(examples, tokenizer, args.seq_len) for key, examples in data.dev.items()}
    adaptation = adapt(model, tokenizer, train, args) if args.adapt != "none" else None
    torch.manual_seed(args.seed)  # the same dropout whatever came before
    epochs, sets = fit(model, train, dev, args)
    if args.predict:
        write_predictions(model, tokenizer, data.test, args)
    best = max(epochs, key=lambda entry: score(entry["metrics"]))
    return {"task": args.task, "model": args.model, "strategy": args.label or args.adapt, "pattern": args.pattern, "seed": args.seed,
            "args": vars(args), "versions": versions(), "epochs": epochs, "last": epochs[-1]["metrics"],
            "best": {"epoch": best["epoch"], **best["metrics"]},
            "baseline": baseline(args.task, train.labels, dev["dev"].labels), "adaptation": adaptation, **sets,
            "seconds": round(time.time() - started, 1)}


# --- adaptation: the masked LM on the task's own text ([T]) ----------------------------------------------------------

class TaskTyphoon(TyphoonStrategy):
    """Typhoon as [T]'s abstract words it: fed with the gradient of the task's supervised loss on the uncorrupted text.

    That loss runs through the encoder in training and a head of its own. It trains the head and only the head: the
    encoder learns from the masked LM alone, as it does under every other strategy."""
    wants_gradient = False  # not that of the masked LM

    def __init__(self, context: Context, classifier: nn.Module, labels: Tensor, lr: float, weight_decay: float):
        """classifier: a model of the same shape, whose head is copied; labels (n,): of the texts by their number."""
        super().__init__(context)
        self.labels, self.probe = labels, copy.deepcopy(classifier)
        self.probe.bert.embeddings, self.probe.bert.layers = context.model.bert.embeddings, context.model.bert.layers
        head = nn.ModuleList([self.probe.bert.pooler, self.probe.classifier])
        self.head, self.optimizer = list(head.parameters()), make_optimizer(head, lr, weight_decay)

    def mask(self, batch, generator=None):
        """Adds this batch's supervised gradient to the averages and leaves the head's for `end_step`; draws the mask."""
        words = self.probe.bert.embeddings.word_embeddings(batch.input_ids).detach().requires_grad_()  # (B, L, H)
        logits = self.probe(None, batch.attention_mask, batch.token_type_ids, inputs_embeds=words)
        loss = task_loss(logits, self.labels[batch.index])
        gradient, *of_head = torch.autograd.grad(loss, [words, *self.head])
        self.observe(batch, None, gradient)  # every token was visible
        for parameter, its_gradient in zip(self.head, of_head):
            parameter.grad = its_gradient
        return super().mask(batch, generator)

    def end_step(self, reduce=None):
        super().end_step(reduce)
        self.optimizer.step()


def frozen_teacher(mlm: nn.Module, tokenizer, args: Namespace) -> nn.Module:
    """--teacher, or else the model before it is adapted; frozen. Raises InputError on another vocabulary."""
    if not args.teacher:
        return copy.deepcopy(mlm).eval().requires_grad_(False)
    teacher, its_tokenizer = load_pretrained(args.teacher, "mlm", whole=True)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--teacher has {its_tokenizer.get_vocab_size():,} word pieces, --model "
                         f"{tokenizer.get_vocab_size():,}, and they are not the same: choose another --teacher")
    return teacher.to(mlm.head.bias.device).eval().requires_grad_(False)


def adapt(model: nn.Module, tokenizer, data: Encoded, args: Namespace) -> dict:
    """Trains the masked LM on the task's training text with train.py's loop, then copies the encoder into `model`.

    Returns steps, masked (the share of the ordinary tokens), loss (nats, the last epoch's mean; not comparable between
    strategies: hard tokens cost more) and for Typhoon the word pieces with the most extreme rates."""
    mlm = load_pretrained(args.model, "mlm", dropout=args.dropout)[0].to(model.classifier.weight.device).train()
    device = mlm.head.bias.device
    vocab, inputs = Vocab(tokenizer, mlm.config.vocab_size, device), collate(data, np.arange(len(data.labels)), model)
    texts, bf16 = Texts(inputs["input_ids"].int(), vocab, inputs["token_type_ids"]), device.type == "cuda"

    table = None
    if find_strategy(args.adapt).needs_teacher:
        teacher = frozen_teacher(mlm, tokenizer, args)
        table = entropy_table(teacher, texts, args.entropy_input, args.mask_rate, bf16)
    strategy = build_strategy(args.adapt, mlm, texts, args, table)
    if args.adapt == "typhoon" and args.typhoon_loss == "task":
        targets = data.targets(slice(None), device)
        strategy = TaskTyphoon(strategy.context, model, targets, args.adapt_lr, args.weight_decay)
    epoch = math.ceil(len(texts) / args.adapt_batch_size)
    recipe = Recipe(args.adapt_epochs * epoch, args.adapt_batch_size, args.adapt_lr, weight_decay=args.weight_decay,
                    corruption=tuple(args.corruption), strategy_start=0.0, seed=args.seed, bf16=bf16)
    trainer = Trainer(mlm, texts, strategy, recipe)
    log_of_steps = run_steps(trainer, f"{args.task}, adapting by {args.adapt}")  # (steps, 4)
    model.bert.load_state_dict(mlm.bert.state_dict(), strict=False)  # all but the pooler, which the masked LM has not
    loss, _, masked, maskable = log_of_steps.T
    found = {"steps": recipe.steps, "loss": loss[-epoch:].mean().item(),
             "masked": (masked.sum() / maskable.sum()).item()}
    if args.adapt == "typhoon":
        found["typhoon"] = extreme_rates(strategy.typhoon.rates(), texts.token_counts(), tokenizer)
    return found


def run_steps(trainer: Trainer, title: str) -> Tensor:
    """All steps of the trainer's recipe. Returns what each gave, (steps, 4) on the CPU. Raises RunError within 50 steps
    of a loss that is not finite."""
    log_of_steps = []
    with tqdm(range(trainer.recipe.steps), title, leave=False, disable=None) as bar:
        for step in bar:
            log_of_steps.append(trainer.step(step))
            if step % 50 == 49 or step + 1 == len(bar):
                bar.set_postfix(loss=f"{finite(log_of_steps[-1][0], step + 1, '--adapt-lr'):.3f}")
    return torch.stack(log_of_steps).cpu()


def extreme_rates(rates: Tensor, counts: Tensor, tokenizer, least: int = 5, show: int = 12) -> dict[str, list]:
    """The word pieces that the task's text holds at least `least` times with the highest and the lowest masking rates:
    {"highest": [[piece, rate, count], ...], "lowest": ...}. rates, counts (V,)."""
    order = rates.argsort(descending=True).tolist()
    order = [i for i in order if counts[i] >= least]
    rows = [[tokenizer.id_to_token(i), round(rates[i].item(), 4), int(counts[i])] for i in order]
    return {"highest": rows[:show], "lowest": rows[::-1][:show]}


# --- test predictions ------------------------------------------------------------------------------------------------

def submissions(name: str) -> dict[str, tuple[str, str]]:
    """The files that the GLUE server wants of this task's model: name -> (task, split). MNLI's model also does AX."""
    task, ending = find_task(name), {"test": "", "test_matched": "-m", "test_mismatched": "-mm"}
    files = {f"{task.folder}{ending[split]}.tsv": (name, split) for split in task.splits("test")}
    return files | ({"AX.tsv": ("ax", "test")} if name == "mnli" else {})


def write_predictions(model: nn.Module, tokenizer, tests: dict[str, list[Example]], args: Namespace):
    """Writes the files of `submissions` into args.predict: a header, then index and prediction."""
    spelled = TASKS[args.task].spelled
    for file, examples in tests.items():
        predictions = predict(model, encode(examples, tokenizer, args.seq_len))
        if spelled:
            words = [spelled[prediction] for prediction in predictions]
        else:
            words = [f"{prediction:.3f}" for prediction in predictions.clip(0, 5)]
        lines = [f"{i}\t{word}\n" for i, word in enumerate(words)]
        write_atomic(Path(args.predict) / file, "index\tprediction\n" + "".join(lines))


# --- the command line ------------------------------------------------------------------------------------------------

def shown(values: dict[str, float]) -> str:
    return "  ".join(f"{metric} {value:.4f}" for metric, value in values.items() if metric != "epoch")


def describe(run: dict) -> str:
    """A run for the terminal."""
    lines = [f"{run['task']}, {run['model']}, strategy {run['strategy']}, seed {run['seed']}: {run['seconds']:.0f} s"]
    if found := run["adaptation"]:
        lines.append(f"  adapted in {found['steps']:,} steps, {found['masked']:.1%} masked; masked-LM loss "
                     f"{found['loss']:.2f} nats in the last epoch (harder masks cost more: no measure of a strategy)")
        for end, rows in found.get("typhoon", {}).items():
            lines.append(f"  {end} masking rates: " + ", ".join(f"{piece} {rate:.3f}" for piece, rate, _ in rows))
    return "\n".join(lines + [
        f"  last epoch ({len(run['epochs'])})     {shown(run['last'])}",
        f"  best epoch ({run['best']['epoch']})     {shown(run['best'])}   (chosen on dev itself: it overstates)",
        f"  constant answer    {shown(run['baseline'])}"])


def table(runs: list[dict]) -> str:
    """The tasks' scores and the GLUE score: of the last epoch, which counts, of the best, and of a constant answer."""
    def scores(run):
        best = {metric: value for metric, value in run["best"].items() if metric != "epoch"}
        return [score(run["last"]), score(best), score(run["baseline"])]

    rows = [(run["task"], *scores(run), shown(run["last"])) for run in runs]
    means = [sum(column) / len(column) for column in list(zip(*rows))[1:4]]
    lines = [f"{'task':<12}{'last':>8}{'best':>8}{'constant':>10}   metrics of the last epoch"]
    lines += ["{:<12}{:>8.4f}{:>8.4f}{:>10.4f}   {}".format(*row) for row in [*rows, ("GLUE score", *means, "")]]
    return "\n".join(line.rstrip() for line in lines)


def make_parser() -> Parser:
    """Every option of the command line, with its default."""
    parser = Parser(description="Fine-tune and evaluate on GLUE.")
    add = parser.add_argument
    add("--task", required=True, help=f"{', '.join(NINE)}, or all: these nine")
    add("--model", required=True, help="a run of train.py, a Hugging Face directory or a hub name")
    add("--data-dir", default=os.environ.get("GLUE_DIR", "data/glue"), help="what is missing there is downloaded")
    add("--seed", type=int, default=0, help="of the head, the data's order, the masks and dropout")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--epochs", type=int, default=3, help="passes over the training examples")
    add("--batch-size", type=int, default=16, help="examples an optimizer step")
    add("--lr", type=float, default=2e-5, help="peak learning rate of AdamW")
    add("--warmup", type=float, default=0.1, help="fraction of the steps in which it rises; then it falls to 0")
    add("--weight-decay", type=float, default=0.01, help="not on biases and LayerNorms; --adapt has it too")
    add("--dropout", type=float, default=0.1, help="while fine-tuning, whatever the model was pretrained with")
    add("--seq-len", type=int, default=128, help="word pieces an example; the longer text is cut first")
    add("--fraction", type=float, default=1.0, help="train on this share of the examples, the same for every strategy")
    add("--freeze", default="none", help="none, embeddings, a number of layers (and the embeddings), or encoder")
    add("--adapt", default="none", help=f"first the masked LM on the task's text: {', '.join(STRATEGIES)}, or none")
    add("--adapt-epochs", type=int, default=3, help="passes over the text of the training examples")
    add("--adapt-batch-size", type=int, default=16, help="examples an optimizer step of --adapt")
    add("--adapt-lr", type=float, default=1e-4, help="peak learning rate of --adapt")
    add("--mask-rate", type=float, default=0.3, help="of --adapt, for every strategy")
    add("--corruption", type=float, nargs=3, default=[1.0, 0.0, 0.0], metavar=("MASK", "SWAP", "KEEP"),
        help="shares of the chosen tokens that become [MASK], become a random token, stay")
    add("--typhoon-loss", default="task", help="whose gradient feeds Typhoon: task (the labels) or mlm")
    add("--typhoon-spread", type=float, default=0.4, help="the lowest rate is 1 - spread times the highest")
    add("--typhoon-ema", type=float, default=0.8, help="weight of the new value in the moving average")
    add("--teacher", help="for --adapt entropy (default: the model itself before it is adapted, frozen)")
    add("--entropy-select", default="high", help="high, low, mixed or sample")
    add("--entropy-input", default="masked", help="entropy of a token that the model sees (visible) or not (masked)")
    add("--predict", metavar="DIR", help="write the GLUE server's files of test predictions")
    add("--json", metavar="FILE", help="the run's file (default: runs/glue/TASK-MODEL-STRATEGY-SEED.json)")
    add("--label", help="what the run's file calls the strategy (default: that of --adapt)")
    add("--pattern", help="set by stats.py: the pattern with {masking} or {seed} that --model comes from")
    return parser


def parse_args(argv=None) -> Namespace:
    args = make_parser().parse_args(argv)
    check(args)
    return args


def check(args: Namespace):
    """Everything that can be wrong with the arguments alone. Raises InputError."""
    def require(name, holds, expected):
        if not holds(value := getattr(args, name)):
            raise InputError(f"--{name.replace('_', '-')} {value} is wrong: it must be {expected}")

    choices = {"task": [*NINE, "all"], "adapt": [*STRATEGIES, "none"], "typhoon_loss": ["task", "mlm"],
               "entropy_select": ["high", "low", "mixed", "sample"], "entropy_input": ["visible", "masked"]}
    for name, known in choices.items():
        require(name, known.__contains__, "one of " + ", ".join(known))
    for name in ("epochs", "batch_size", "adapt_epochs", "adapt_batch_size"):
        require(name, lambda n: n >= 1, "at least 1")
    for name in ("lr", "adapt_lr"):
        require(name, lambda x: 0 < x < math.inf, "above 0")
    for name in ("warmup", "typhoon_ema"):
        require(name, lambda x: 0 <= x <= 1, "from 0 to 1")
    for name in ("dropout", "typhoon_spread"):
        require(name, lambda x: 0 <= x < 1, "from 0 to below 1")
    require("mask_rate", lambda x: 0 < x < 1, "between 0 and 1")
    require("fraction", lambda x: 0 < x <= 1, "above 0 and at most 1")
    require("weight_decay", lambda x: 0 <= x < math.inf, "at least 0")
    require("seed", lambda n: 0 <= n < 2**63, "from 0 to 2^63 - 1")
    require("seq_len", lambda n: n >= 8, "at least 8")
    require("corruption", lambda split: min(split) >= 0 and math.isclose(sum(split), 1, abs_tol=1e-6),
            "three shares that sum to 1")
    require("freeze", re.compile(r"none|embeddings|encoder|\d+").fullmatch, "none, embeddings, a number or encoder")
    require("json", lambda file: not (file and args.task == "all"), "left out: --task all writes nine files")
    require("json", lambda file: not file or (can_write(file) and not Path(file).is_dir()), "a file that can be written")
    require("predict", lambda folder: not folder or can_write(Path(folder) / "x"), "a folder that can be written")


def run_file(args: Namespace) -> Path:
    if args.json:
        return Path(args.json)
    name = "-".join([args.task, args.model, args.label or args.adapt, str(args.seed)])
    return Path("runs/glue") / (re.sub(r"[^\w.-]+", "-", name) + ".json")


def main(argv=None):
    args = parse_args(argv)
    names = NINE if args.task == "all" else [args.task]
    data = {name: load_data(name, args.data_dir, test=bool(args.predict)) for name in names}  # bad files show up now
    runs = []
    for name in names:
        one = Namespace(**vars(args) | {"task": name})
        try:
            runs.append(finetune(one, data.pop(name)))
        except torch.cuda.OutOfMemoryError:
            raise RunError(f"the GPU's memory is full at --batch-size {args.batch_size}, --adapt-batch-size "
                           f"{args.adapt_batch_size}, --seq-len {args.seq_len}: lower one of them") from None
        print(describe(runs[-1]), flush=True)  # first: a full disk must not take the figures
        write_atomic(run_file(one), json.dumps(runs[-1]) + "\n")
        print(f"  kept in {run_file(one)}", flush=True)
    if args.task == "all":
        print(table(runs))
    if args.predict:
        print(f"test predictions are in {args.predict}")


if __name__ == "__main__":
    run_cli(main)
