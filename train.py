"""Pretrains a masked language model with any of the five masking strategies.

    python train.py --masking entropy --device cuda          the main job: corpus, vocabulary and teacher by itself
    python train.py --masking typhoon --kd-weight 0.5        another strategy, with distillation
    python train.py --corpus my_texts/ --preset mini         your own text, a larger model
    torchrun --nproc_per_node=8 train.py --masking random    data-parallel

With no other argument the corpus is the English that ships with Python, a WordPiece vocabulary is trained on it, and
where a teacher is wanted, one is first trained with random masking and kept for the next run. The file reads in the
order of a run: text, tokens, windows; the training step; the yardstick; the run from start to summary; the options.
"""
import ast
import contextlib
import functools
import glob
import hashlib
import io
import itertools
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
import sys
import sysconfig
import tempfile
import time
import warnings
import zipfile
from argparse import BooleanOptionalAction, Namespace
from collections import Counter
from dataclasses import dataclass
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
from masking import (STRATEGIES, Batch, Context, Random, Strategy, corrupt, evaluating, find_strategy, hidden_entropy,
                     position_entropy, random_mask)
from model import (PRESETS, SPECIAL_TOKENS, BertConfig, BertForMaskedLM, InputError, Parser, RunError, can_write,
                   load_pretrained, log, query_positions, read_json, run_cli, save_pretrained, wordpiece_tokenizer, write_atomic)

CACHE = Path("data/cache")
TEACHER_MASK_RATE = 0.15  # of the automatic teacher
YARDSTICK_RATE = 0.15  # of the held-out exam, whatever the run's own rate
WIKITEXT = {  # name: address, sha256 of the archive
    "wikitext-2": ("https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
                   "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
    "wikitext-103": ("https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
                     "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"),
}


# --- text ------------------------------------------------------------------------------------------------------------
# A corpus is a list of documents, a document a list of paragraphs. Every 20th document is held out.

def python_docs() -> list[list[str]]:
    """The docstrings of the standard library, a document a module, and the language reference that `help()` shows."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data"}
    documents = []
    for path in sorted(root.rglob("*.py")):
        if skip.isdisjoint(path.relative_to(root).parts):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in old modules
                tree = ast.parse(path.read_bytes())
            holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            documents.append([ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, holders)])
    with contextlib.suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics
        documents += [[topic] for topic in topics.values()]
    return [[" ".join(part.split()) for text in texts for part in text.split("\n\n")] for texts in documents]


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte-order mark, any line ends. Raises InputError on what is not text."""
    data = path.read_bytes()
    if b"\0" in data:
        raise InputError(f"{path} is binary (a zero byte at offset {data.index(0)}): give plain UTF-8 text")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")  # "utf-8-sig" would count bytes from behind the mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte offset {error.start}): convert it first") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def corpus_files(names: list[str]) -> list[Path]:
    """Files for FILE, DIR (its .txt files), GLOB or a WikiText name, downloaded if need be. Raises InputError."""
    files = []
    for name in names:
        if name in WIKITEXT:
            folder = Path("data") / f"{name}-raw"
            found = [folder / "wiki.train.raw", folder / "wiki.valid.raw"]
            if not all(path.is_file() for path in found):
                url, sha256 = WIKITEXT[name]
                unpack(download(url, Path("data") / Path(url).name, sha256), Path("data"))
        elif Path(name).is_dir():
            found = sorted(Path(name).rglob("*.txt"))
        else:
            found = [Path(name)] if Path(name).is_file() else sorted(map(Path, glob.glob(name, recursive=True)))
        if not found:
            raise InputError(f"--corpus {name}: no such file, folder with .txt files or glob "
                             f"(named corpora: docs, {', '.join(WIKITEXT)})")
        files += [path for path in found if path.is_file()]
    return files


def read_documents(path: Path) -> list[list[str]]:
    """A paragraph a line, a blank line between documents; in WikiText's .raw files a title begins one."""
    text, boundary = read_text(path), r"\n\s*\n"
    if path.suffix == ".raw":
        boundary = r"\n(?= = [^=])"
        for escape, mark in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
            text = text.replace(escape, mark)
    return [[line.strip() for line in part.split("\n") if line.strip()] for part in re.split(boundary, text)]


def read_corpus(names: list[str], fraction: float) -> tuple[list[list[str]], list[list[str]]]:
    """(training documents, held-out documents). `fraction` keeps that share of the training documents, always the
    same ones, and leaves the held-out ones alone. Raises InputError where there is no text."""
    if names == ["docs"]:
        documents, held_out = python_docs(), None
    else:
        files = corpus_files(names)
        documents = [doc for path in files if path.name != "wiki.valid.raw" for doc in read_documents(path)]
        held_out = [doc for path in files if path.name == "wiki.valid.raw" for doc in read_documents(path)] or None
    documents = [doc for doc in documents if any(doc)]
    if len(documents) == 1:  # one long text: cut it by paragraphs
        documents = [[paragraph] for paragraph in documents[0]]
    if len(documents) < 2:
        raise InputError(f"--corpus {' '.join(names)} has fewer than two paragraphs of text: give more")
    if held_out is None:
        held_out, documents = documents[::20], [doc for i, doc in enumerate(documents) if i % 20]
    random.Random(0).shuffle(documents)
    return documents[:math.ceil(fraction * len(documents))], held_out


def download(url: str, path: Path, sha256: str) -> Path:
    """Sees to it that the file at `url` is at `path`. It appears there only when its sha256 is right; one that is there
    already is checked too. Raises InputError, saying which file to put where."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, ValueError, RuntimeError) as error:  # no network, a bad address, another hash
            raise InputError(f"could not fetch {url} ({error}): put that file at {path} yourself") from None
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InputError(f"{path} has sha256 {found[:12]}..., expected {sha256[:12]}...: delete it, or put the right file "
                         f"from {url} there")
    return path


def unpack(archive: Path, folder: Path):
    """Unpacks a .zip into `folder`, whole or not at all; members that lead out of it are left out. Raises InputError."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        try:
            shutil.unpack_archive(archive, temporary)
        except (shutil.ReadError, zipfile.BadZipFile) as error:
            raise InputError(f"{archive} is not a sound .zip ({error}): delete it and try again") from None
        shutil.copytree(temporary, folder, dirs_exist_ok=True, copy_function=os.replace)


# --- tokens and windows ----------------------------------------------------------------------------------------------

def train_tokenizer(documents: list[list[str]], vocab_size: int) -> Tokenizer:
    """A lower-case WordPiece vocabulary on the training documents; the same one every time."""
    unbroken = re.compile(r"\S{1000}")  # training takes the square of a word's length: cut what no one wrote as a word
    texts = [unbroken.sub(r"\g<0> ", paragraph) for document in documents for paragraph in document]
    tokenizer, letters = wordpiece_tokenizer({}), Counter()
    for text in texts:
        letters.update(tokenizer.normalizer.normalize_str(text))
    # The trainer numbers the one-letter continuations as its hash table has them; named beforehand, they have an order.
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    continuations = sorted("##" + letter for letter, _ in letters.most_common(1000) if len(split(f"a{letter}a")) == 1)
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *continuations],
                                        show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return wordpiece_tokenizer(tokenizer.get_vocab())


def pack(documents: list[list[str]], tokenizer: Tokenizer, seq_len: int, name: str) -> np.ndarray:
    """Windows [CLS] … [SEP] of seq_len tokens, packed across documents with a [SEP] between them, no padding; what is
    left over is dropped. Returns (n, seq_len) int32; n may be 0."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    stream = []
    for start in tqdm(range(0, len(documents), 256), desc=f"tokenising {name}", leave=False, disable=rank() > 0):
        block = documents[start:start + 256]
        pieces = iter(tokenizer.encode_batch_fast([p for doc in block for p in doc], add_special_tokens=False))
        for doc in block:
            for _ in doc:
                stream.append(np.array(next(pieces).ids, dtype=np.int32))
            stream.append(np.array([sep], dtype=np.int32))
    tokens = np.concatenate(stream)
    inner = seq_len - 2
    body = tokens[:len(tokens) // inner * inner].reshape(-1, inner)
    return np.pad(body, ((0, 0), (1, 1)), constant_values=((0, 0), (cls, sep)))


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 builds what goes to a file; the others follow and find it there."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


@rank_zero_first()
def cached(kind: str, key: object, build) -> dict[str, np.ndarray]:
    """`build()`, a dict of arrays, kept under data/cache by what it was made from. A damaged file is rebuilt; of two
    processes that build the same one, either may win."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = CACHE / f"{kind}-{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        log.warning("%s is damaged: building it again", path)
    arrays = build()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    if rank() == 0:
        write_atomic(path, buffer.getvalue())
    return arrays


class Vocab:
    """What masking must know of a tokenizer, as tensors on a device."""

    def __init__(self, tokenizer: Tokenizer, size: int, device: torch.device):
        pieces = [tokenizer.id_to_token(i) or "" for i in range(size)]
        self.size, self.mask_id, self.pad_id = size, tokenizer.token_to_id("[MASK]"), tokenizer.token_to_id("[PAD]")
        self.special_ids = tuple(i for i, piece in enumerate(pieces) if piece in SPECIAL_TOKENS or not piece)
        self.ordinary = torch.ones(size, dtype=torch.bool, device=device)  # (V,)
        self.ordinary[list(self.special_ids)] = False
        self.continuation = torch.tensor([piece.startswith("##") for piece in pieces], device=device)  # (V,)


class Texts:
    """The texts of a corpus as one array on the device: (n, L) ids, all of the same length or padded with [PAD]."""

    def __init__(self, input_ids: Tensor, vocab: Vocab, token_type_ids: Tensor | None = None):
        self.input_ids, self.vocab, self.token_type_ids = input_ids, vocab, token_type_ids
        self.padded = bool((input_ids == vocab.pad_id).any())

    def __len__(self):
        return len(self.input_ids)

    def batch(self, index: Tensor) -> Batch:
        """Texts number `index` (B,), cut to the longest of them."""
        ids = self.input_ids[index].long()  # (B, L)
        types = None if self.token_type_ids is None else self.token_type_ids[index].long()
        attention_mask = None
        if self.padded:
            attention_mask = ids != self.vocab.pad_id
            longest = 1 + int(attention_mask.any(0).nonzero().max())  # a text may hold the word "[PAD]"
            ids, attention_mask = ids[:, :longest], attention_mask[:, :longest]
            types = None if types is None else types[:, :longest]
        return Batch(ids, self.vocab.ordinary[ids], index, attention_mask, types)

    @functools.cached_property
    def digest(self) -> str:
        """What tells these texts from others."""
        return hashlib.sha256(self.input_ids.cpu().numpy().tobytes()).hexdigest()

    def token_counts(self) -> Tensor:
        """(V,) how often each ordinary type occurs."""
        return torch.bincount(self.input_ids.flatten(), minlength=self.vocab.size) * self.vocab.ordinary


# --- data-parallel ---------------------------------------------------------------------------------------------------

def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def reduce_sum(tensor: Tensor) -> Tensor:
    """Sums a tensor over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


# --- the training step -----------------------------------------------------------------------------------------------

@dataclass
class Recipe:
    """The numbers of the loop."""
    steps: int
    batch_size: int  # texts an optimizer step, over all ranks and micro-batches
    lr: float
    accumulate: int = 1
    warmup: float = 0.1  # a fraction of the steps
    weight_decay: float = 0.01
    clip: float = 1.0
    corruption: tuple[float, float, float] = (0.8, 0.1, 0.1)
    strategy_start: float | None = None  # random masks for this fraction of the steps; None: the strategy's own
    kd_weight: float = 0.0
    kd_temperature: float = 2.0
    kd_start: float = 0.0
    seed: int = 0
    bf16: bool = False


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) on what is not frozen; no decay on biases and LayerNorms, as BERT."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def lr_at(step: int, steps: int, warmup: float) -> float:
    """The factor on the learning rate: up in a line for `warmup` (a fraction of the steps), then down in a line."""
    first = max(1, round(warmup * steps))
    return (step + 1) / first if step < first else max(0.0, (steps - step) / max(1, steps - first))


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


class Trainer:
    """A model, its optimizer and a strategy, one step at a time.

    All randomness of step t comes from (seed, rank, t), and the order of the texts from (seed, epoch): a resumed run
    needs no generator's state to go on exactly as it would have."""

    def __init__(self, model: BertForMaskedLM, texts: Texts, strategy: Strategy, recipe: Recipe,
                 teacher: BertForMaskedLM | None = None):
        self.model, self.texts, self.strategy, self.recipe, self.teacher = model, texts, strategy, recipe, teacher
        self.device = model.head.bias.device
        self.random = Random(strategy.context)
        self.start = strategy.start if recipe.strategy_start is None else recipe.strategy_start
        self.generator = torch.Generator(self.device)
        self.optimizer = make_optimizer(model, recipe.lr, recipe.weight_decay)
        self.parallel = nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model

    def rows(self, step: int) -> list[Tensor]:
        """Which texts this rank reads in this step: `accumulate` tensors of text numbers."""
        size, n = self.recipe.batch_size, len(self.texts)
        stream = np.arange(step * size, (step + 1) * size)  # epoch after epoch, each in its own order
        index = [epoch_order(n, self.recipe.seed, epoch)[i] for epoch, i in zip(*np.divmod(stream, n))]
        parts = np.array(index).reshape(world_size(), self.recipe.accumulate, -1)[rank()]
        return list(torch.from_numpy(parts).to(self.texts.input_ids.device))

    def seed(self, step: int):
        words = np.random.SeedSequence([self.recipe.seed, rank(), step]).generate_state(2)
        torch.manual_seed(int(words[0]))  # dropout
        self.generator.manual_seed(int(words[1]))  # masks

    def micro_step(self, batch: Batch, mask: Tensor, masked_in_all: Tensor, kd_weight: float) -> Tensor:
        """Forward and backward on one micro-batch. Returns the sum of its loss over its masked positions, in nats."""
        recipe, vocab = self.recipe, self.texts.vocab
        corrupted, labels = corrupt(batch.input_ids, mask, vocab.mask_id, vocab.size, recipe.corruption, self.generator,
                                    vocab.special_ids)
        targets = labels[mask]  # (N,)
        inputs = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids,
                  "positions": query_positions(mask)}
        with self.autocast():
            words = self.model.bert.embeddings.word_embeddings(corrupted)  # (B, L, H)
            if self.strategy.wants_gradient:
                words.retain_grad()
            logits = self.parallel(inputs_embeds=words, **inputs)  # (N, V)
            with torch.no_grad():
                teacher_logits = self.teacher(corrupted, **inputs) if kd_weight else None
            if len(logits):
                loss = kd_loss(logits, teacher_logits, targets, kd_weight, recipe.kd_temperature) * len(logits)
            else:
                loss = logits.sum()  # nothing is masked: zero, with a gradient for every parameter
        (loss * world_size() / masked_in_all).backward()  # ranks are averaged; every masked token counts the same
        if self.strategy.wants_gradient:
            hidden = corrupted != batch.input_ids  # a kept token is visible: [T] counts it as such
            self.strategy.observe(batch, hidden, words.grad / world_size())
        return loss.detach()

    def step(self, step: int) -> Tensor:
        """One optimizer step. Returns a tensor on the device, over all ranks: loss (nats a masked token), gradient
        norm, masked tokens, maskable tokens."""
        recipe, progress = self.recipe, step / self.recipe.steps
        self.seed(step)
        batches = [self.texts.batch(index) for index in self.rows(step)]
        strategy = self.strategy if progress >= self.start else self.random
        with self.autocast():
            masks = [strategy.mask(batch, self.generator) for batch in batches]
        counts = torch.stack([sum(mask.sum() for mask in masks), sum(batch.maskable.sum() for batch in batches)])
        masked, maskable = reduce_sum(counts).clamp(min=1)
        kd_weight = recipe.kd_weight if progress >= recipe.kd_start else 0.0
        loss = 0
        for i, (batch, mask) in enumerate(zip(batches, masks)):
            last = i + 1 == len(batches)
            with contextlib.nullcontext() if last or world_size() == 1 else self.parallel.no_sync():
                loss = loss + self.micro_step(batch, mask, masked, kd_weight)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * lr_at(step, recipe.steps, recipe.warmup)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.strategy.end_step(reduce_sum)
        return torch.stack([reduce_sum(loss) / masked, norm, masked.float(), maskable.float()])

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16)

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "strategy": self.strategy.state_dict()}

    def load_state_dict(self, state: dict):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.strategy.load_state_dict(state["strategy"])


# --- the teacher's entropies -----------------------------------------------------------------------------------------

def entropy_table(teacher: BertForMaskedLM, texts: Texts, entropy_input: str, rate: float, bf16: bool) -> Tensor:
    """The frozen teacher's entropy at every position of every text, (n, L) float16 in nats, 0 off the maskable ones.

    entropy_input: "visible", one pass over the text as it is; "masked", each position while it is hidden."""
    device, rows = texts.input_ids.device, []
    generator = torch.Generator(device).manual_seed(0)
    parts = torch.arange(len(texts), device=device).split(64)
    for index in tqdm(parts, desc="the teacher's entropies", leave=False, disable=rank() > 0):
        batch = texts.batch(index)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if entropy_input == "visible":
                entropy = position_entropy(teacher, batch, batch.input_ids, batch.maskable)
            else:
                entropy = hidden_entropy(teacher, batch, rate, texts.vocab.mask_id, generator)
        rows.append(F.pad(entropy.half(), (0, texts.input_ids.shape[1] - entropy.shape[1])))
    return torch.cat(rows)


def cached_entropies(teacher: BertForMaskedLM, texts: Texts, args: Namespace, bf16: bool) -> Tensor:
    """`entropy_table`, kept on disk by teacher, windows and reading."""
    digest = hashlib.sha256(texts.digest.encode())
    for weight in teacher.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    rate = args.mask_rate if args.entropy_input == "masked" else 0.0
    table = cached("entropy", [digest.hexdigest(), args.entropy_input, rate, bf16], lambda: {
        "entropy": entropy_table(teacher, texts, args.entropy_input, rate, bf16).cpu().numpy()})
    return torch.from_numpy(table["entropy"]).to(texts.input_ids.device)


# --- the yardstick ---------------------------------------------------------------------------------------------------

def yardstick_masks(texts: Texts) -> list[tuple[Batch, Tensor]]:
    """The held-out exam, the same for every strategy: random positions from a fixed seed."""
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same on every device
    exam = []
    for index in torch.arange(len(texts)).split(64):
        batch = texts.batch(index.to(texts.input_ids.device))
        mask = random_mask(batch.maskable.cpu(), YARDSTICK_RATE, generator)
        exam.append((batch, mask.to(texts.input_ids.device)))
    return exam


def yardstick(model: BertForMaskedLM, texts: Texts, bf16: bool = False) -> dict[str, float]:
    """Cross-entropy (nats) and accuracy (fraction) at random held-out positions, all of them [MASK]. With BERT's
    80/10/10 a model that copies what it sees would already score."""
    totals = torch.zeros(3, device=texts.input_ids.device)  # loss, right, count
    with evaluating(model), torch.autocast(totals.device.type, torch.bfloat16, enabled=bf16):
        for batch, mask in yardstick_masks(texts)[rank()::world_size()]:
            corrupted, labels = corrupt(batch.input_ids, mask, texts.vocab.mask_id, texts.vocab.size, (1, 0, 0))
            logits = model(corrupted, batch.attention_mask, batch.token_type_ids, positions=mask).float()  # (N, V)
            loss = F.cross_entropy(logits, labels[mask], reduction="sum")
            totals += torch.stack([loss, (logits.argmax(-1) == labels[mask]).sum(), mask.sum()])
    loss, right, count = reduce_sum(totals).tolist()
    return {"loss": loss / count, "accuracy": right / count, "positions": int(count)}


def frequency_yardstick(texts: Texts, token_counts: Tensor) -> dict[str, float]:
    """The same exam for whoever knows nothing but word-piece frequencies (V,), each raised by one."""
    probability = (token_counts + 1) * texts.vocab.ordinary / (token_counts + 1)[texts.vocab.ordinary].sum()
    words = torch.cat([batch.input_ids[mask] for batch, mask in yardstick_masks(texts)])
    return {"loss": -probability[words].log().mean().item(), "positions": len(words),
            "accuracy": (words == token_counts.argmax()).float().mean().item()}


def exam_metrics(right: np.ndarray, count: np.ndarray, log_likelihood: np.ndarray) -> dict[str, float]:
    """right, count (n, 3), log_likelihood (n,): per window -> accuracy, its three bands, mean nats per position."""
    bands = right.sum(0) / count.sum(0)  # (3,)
    return {"accuracy": float(right.sum() / count.sum()), "common": float(bands[0]), "middle": float(bands[1]),
            "rare": float(bands[2]), "log_likelihood": float(log_likelihood.sum() / count.sum())}


SENTENCES = ("return the [MASK] of the list.", "the file could not be [MASK].", "this is the first [MASK] of the year.")


def fill_in(model: BertForMaskedLM, tokenizer: Tokenizer, device: torch.device) -> list[str]:
    """The three likeliest words for the gap in each of SENTENCES."""
    lines = []
    for sentence in SENTENCES:
        ids = torch.tensor([tokenizer.encode(sentence).ids], device=device)
        with evaluating(model):
            logits = model(ids, positions=ids == tokenizer.token_to_id("[MASK]"))[0]
        best = logits.float().softmax(-1).topk(3)
        words = (f"{tokenizer.id_to_token(i)} {p:.0%}" for p, i in zip(best.values.tolist(), best.indices.tolist()))
        lines.append(f"  {sentence:<40} {', '.join(words)}")
    return lines


# --- a run -----------------------------------------------------------------------------------------------------------

def pick_device(name: str) -> torch.device:
    """auto is cuda, then mps, then cpu; under torchrun each rank has its own GPU. Raises InputError where a device
    that was asked for is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, number = name.partition(":")
    if name == "auto":
        kind = next(kind for kind, found in there.items() if found)
    elif kind not in there or (number and not number.isdigit()):
        raise InputError(f"unknown device {name!r}: auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and world_size() > 1:
        number = os.environ["LOCAL_RANK"]
    if not there[kind] or (kind == "cuda" and number and int(number) >= torch.cuda.device_count()):
        raise InputError(f"--device {name}: this machine has none that PyTorch can use; try --device auto")
    return torch.device(f"{kind}:{number}" if number else kind)


def use_bf16(device: torch.device, asked: bool | None) -> bool:
    """What the user asked for; without a word, bfloat16 on a GPU that has it."""
    return (device.type == "cuda" and torch.cuda.is_bf16_supported()) if asked is None else asked


def corpus_state(names: list[str]) -> list:
    """What changes when the corpus does: the files' names, sizes and times, or Python's version."""
    if names == ["docs"]:
        return [platform.python_version()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in corpus_files(names)]


def prepare_texts(args: Namespace, tokenizer: Tokenizer | None) -> tuple[Tokenizer, dict[str, np.ndarray]]:
    """The tokenizer, trained if none is given, and the windows: {"train": (n, L), "held_out": (m, L), ...}."""
    key = [corpus_state(args.corpus), args.corpus_fraction, args.vocab_size, args.seq_len,
           tokenizer and hashlib.sha256(tokenizer.to_str().encode()).hexdigest()]

    def build():
        """{"train": (n, L), "held_out": (m, L), "tokenizer": its JSON}. Raises InputError on too little text."""
        documents, held_out = read_corpus(args.corpus, args.corpus_fraction)
        pieces = tokenizer or train_tokenizer(documents, args.vocab_size or 8192)
        train, valid = (pack(part, pieces, args.seq_len, name) for part, name in
                        ((documents, "the corpus"), (held_out, "the held-out documents")))
        if not len(train) or not len(valid):
            raise InputError(f"--corpus {' '.join(args.corpus)} is too short for one window of {args.seq_len} tokens, "
                             f"or its held-out twentieth is: give more text or a smaller --seq-len")
        return {"train": train, "held_out": valid[:1000], "tokenizer": np.array(pieces.to_str())}

    arrays = cached("windows", key, build)
    return Tokenizer.from_str(str(arrays.pop("tokenizer"))), arrays


def reference_args(args: Namespace) -> Namespace:
    """The run that makes the automatic teacher: this one with random masks and a seed of its own. Its directory is named
    after what decides its weights, so that the next run finds it."""
    changed = {"masking": "random", "mask_rate": TEACHER_MASK_RATE, "corruption": [0.8, 0.1, 0.1],
               "seed": 2 ** 32,  # no student's: the same seed would mean the same weights, order and masks
               "steps": args.teacher_steps, "kd_weight": 0.0, "student_init": "random"}
    reference = Namespace(**vars(args) | changed)
    decides = ("mask_rate", "corruption", "seed", "corpus_fraction", "vocab_size", "preset", "seq_len", "steps",
               "batch_size", "lr", "warmup", "weight_decay", "clip", "dropout")
    key = [corpus_state(args.corpus), *(getattr(reference, name) for name in decides)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
    reference.out = str(Path("runs") / f"reference-{name}")
    reference.resume = reference.out if (Path(reference.out) / "train_args.json").exists() else None
    return reference


def find_teacher(args: Namespace) -> str | None:
    """The teacher's directory or hub name: --teacher, or else the model that --init starts from, or else one trained
    here and now. None where nobody wants one; a resumed run keeps its own."""
    if args.resume:
        return read_json(Path(args.resume) / "train_args.json").get("teacher_dir")
    wanted = find_strategy(args.masking).needs_teacher or args.kd_weight or args.student_init != "random"
    if not wanted or args.teacher or args.init:
        return args.teacher or (args.init if wanted else None)
    reference = reference_args(args)
    if not (Path(reference.out) / "model.safetensors").exists():
        say(f"no --teacher: training a reference model with random masking first, kept in {reference.out}")
        pretrain(reference)
    if world_size() > 1:
        dist.barrier()
    return reference.out


def say(text: str):
    if rank() == 0:
        tqdm.write(text)


def check_given(args: Namespace, teacher: BertForMaskedLM | None, teacher_pieces: Tokenizer | None,
                init: BertForMaskedLM | None, init_pieces: Tokenizer | None):
    """What --teacher and --init must have in common with each other and with the options, before the corpus is read.
    Raises InputError."""
    for name, model, pieces in (("--teacher", teacher, teacher_pieces), ("--init", init, init_pieces)):
        if model and args.vocab_size not in (None, size := pieces.get_vocab_size()):
            raise InputError(f"{name} has {size:,} word pieces, student {args.vocab_size:,}: drop --vocab-size or choose "
                             f"another {name}")
        if model and model.config.max_position_embeddings < args.seq_len:
            raise InputError(f"{name} has {model.config.max_position_embeddings} positions: lower --seq-len")
    if teacher and init:
        if teacher_pieces.get_vocab() != init_pieces.get_vocab():
            raise InputError(f"teacher has {teacher_pieces.get_vocab_size():,} word pieces, --init "
                             f"{init_pieces.get_vocab_size():,}, and they are not the same: choose another of the two")
        if teacher.config.vocab_size != init.config.vocab_size:
            raise InputError(f"the teacher predicts {teacher.config.vocab_size:,} word pieces, --init "
                             f"{init.config.vocab_size:,}: choose another of the two")
    if teacher and args.student_init != "random":
        build_model(args, init, teacher, teacher.config.vocab_size)


def build_model(args: Namespace, init: BertForMaskedLM | None, teacher: BertForMaskedLM | None,
                vocab_size: int) -> BertForMaskedLM:
    """The student: --init's model or a fresh preset, then what --student-init copies from the teacher."""
    torch.manual_seed(args.seed)
    model = init or BertForMaskedLM(BertConfig.preset(args.preset, vocab_size=vocab_size, hidden_dropout_prob=args.dropout,
                                                      attention_probs_dropout_prob=args.dropout))
    if args.student_init != "random":
        init_student(model, teacher, args.student_init)
    return model


@torch.no_grad()
def start_at_frequency(model: BertForMaskedLM, token_counts: Tensor):
    """Sets the decoder's bias to the log of each word piece's frequency (V,), which is the first thing that a model from
    scratch would learn; in a short run the steps saved are worth having."""
    counts = token_counts + 1
    model.head.bias.copy_((counts / counts.sum()).log())


def build_strategy(name: str, model: BertForMaskedLM, texts: Texts, args: Namespace,
                   teacher_entropy: Tensor | None = None) -> Strategy:
    """A row of STRATEGIES, made for these texts. args: mask_rate, entropy_select, entropy_input, typhoon_spread and
    typhoon_ema; teacher_entropy (n, L): for a strategy that needs a teacher."""
    return find_strategy(name)(Context(args.mask_rate, model, texts.token_counts(), texts.vocab.continuation,
                                    texts.vocab.mask_id, teacher_entropy, args.entropy_select, args.entropy_input,
                                    args.typhoon_spread, args.typhoon_ema))


class Signals:
    """Remembers SIGINT or SIGTERM, so that the step under way can be finished and saved."""

    def __enter__(self):
        self.number = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, _):
        self.number = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, step: int, device: torch.device) -> int:
        """The signal that any rank has received, 0 for none; the same on every rank. Ranks ask one another every tenth
        step, for they have to wait for the answer."""
        if world_size() == 1:
            return self.number
        if step % 10:
            return 0
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)


class RunDirectory:
    """log.jsonl and checkpoint.pt. A checkpoint remembers how long the log was; resuming cuts it back to there."""

    def __init__(self, path: Path):
        self.path, self.log_path, self.checkpoint_path = path, path / "log.jsonl", path / "checkpoint.pt"

    def log(self, **fields):
        """Appends a line. It holds no times, so that a resumed run writes the same bytes."""
        if rank() == 0:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(fields) + "\n")

    def save(self, trainer: Trainer, **state):
        """Writes checkpoint.pt, whole or not at all: the trainer's state, `state`, and the log's length in bytes."""
        if rank() == 0:
            buffer = io.BytesIO()
            with open(self.log_path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())  # the checkpoint must not be on the disk before the lines it counts
                log_bytes = file.tell()
            torch.save({**trainer.state_dict(), **state, "log_bytes": log_bytes}, buffer)
            write_atomic(self.checkpoint_path, buffer.getvalue())

    def restore(self, trainer: Trainer) -> dict:
        """Loads the checkpoint, if there is one yet, and cuts the log back. Raises InputError on a damaged one."""
        state = {}
        if self.checkpoint_path.exists():
            try:
                state = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
                trainer.load_state_dict(state)
            except Exception as error:  # a damaged file can raise nearly anything
                raise InputError(f"{self.checkpoint_path} is damaged ({type(error).__name__}): delete it, and --resume "
                                 "starts from the first step") from None
        if self.log_path.exists() and rank() == 0:
            os.truncate(self.log_path, state.get("log_bytes", 0))
        return state


def new_directory(args: Namespace) -> Path:
    """--out, or else the first free name of the form runs/entropy, runs/entropy_2, ...; made by rank 0. (The seeds of a
    sweep are called runs/entropy-2: see stats.py.)"""
    if args.out or rank() > 0:
        Path(args.out or ".").mkdir(parents=True, exist_ok=True)
        return Path(args.out or ".")
    name = "runs/" + args.masking + ("-kd" if args.kd_weight else "")
    for path in itertools.chain([Path(name)], (Path(f"{name}_{number}") for number in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def versions() -> dict[str, str | None]:
    """Python, PyTorch and tokenizers, and this code's commit where git can tell."""
    import tokenizers
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "tokenizers": tokenizers.__version__, "commit": commit or None}


def set_up(args: Namespace) -> tuple[Trainer, Texts, Tokenizer, str | None]:
    """Everything a run needs before its first step: (trainer, held-out texts, tokenizer, the teacher's directory)."""
    device = pick_device(args.device)
    bf16 = use_bf16(device, args.bf16)
    torch.manual_seed(args.seed)  # of a head that --init may lack
    init, init_pieces = load_pretrained(args.init, "mlm", dropout=args.dropout) if args.init else (None, None)
    teacher, teacher_pieces = load_pretrained(args.teacher, "mlm", whole=True) if args.teacher else (None, None)
    check_given(args, teacher, teacher_pieces, init, init_pieces)
    teacher_dir = find_teacher(args)
    tokenizer, arrays = prepare_texts(args, init_pieces or teacher_pieces)
    if teacher_dir:
        teacher = teacher or load_pretrained(teacher_dir, "mlm", whole=True)[0]
        teacher.to(device).eval().requires_grad_(False)
    model = build_model(args, init, teacher, teacher.config.vocab_size if teacher else tokenizer.get_vocab_size()).to(device)
    vocab = Vocab(tokenizer, model.config.vocab_size, device)
    texts, held_out = (Texts(torch.from_numpy(arrays[part]).to(device), vocab) for part in ("train", "held_out"))
    if not args.init:
        start_at_frequency(model, texts.token_counts())
    needs_table = find_strategy(args.masking).needs_teacher
    table = cached_entropies(teacher, texts, args, bf16) if needs_table else None
    strategy = build_strategy(args.masking, model, texts, args, table)
    recipe = Recipe(**{name: getattr(args, name) for name in Recipe.__dataclass_fields__} | {"bf16": bf16})
    if args.compile:
        model.bert.compile()
        model.head.compile()
    return Trainer(model, texts, strategy, recipe, teacher), held_out, tokenizer, teacher_dir


def pretrain(args: Namespace):
    """One run, from text to summary."""
    trainer, held_out, tokenizer, teacher_dir = set_up(args)
    run, state = RunDirectory(Path(args.resume) if args.resume else new_directory(args)), {}
    if args.resume:
        if read_json(run.path / "train_args.json").get("windows") != trainer.texts.digest:
            raise InputError(f"--resume {run.path}: the corpus is not the one that it was started with: start a new run")
        state = run.restore(trainer)
        if state.get("step", 0) > args.steps:
            raise InputError(f"--steps {args.steps}: {run.path} has {state['step']:,} behind it already")
    settings = vars(args) | {"resume": None, "out": str(run.path), "teacher_dir": teacher_dir,
                             "windows": trainer.texts.digest, "versions": versions()}
    if rank() == 0:
        write_atomic(run.path / "train_args.json", json.dumps(settings, indent=1) + "\n")
    say(f"{run.path}: {args.masking} masking of {args.mask_rate:.0%}, {len(trainer.texts):,} windows of {args.seq_len} "
        f"tokens, {sum(p.numel() for p in trainer.model.parameters()):,} parameters, on {trainer.device}")
    totals, seconds = training_loop(trainer, held_out, run, args, state)
    if rank() == 0:
        save_pretrained(trainer.model, tokenizer, run.path)
    summarise(trainer, held_out, tokenizer, run.path, args, totals, seconds)


def training_loop(trainer: Trainer, held_out: Texts, run: RunDirectory, args: Namespace, state: dict):
    """Steps, with a log, the yardstick and checkpoints. Returns masked and maskable tokens so far, (2,), and the seconds
    that this process trained. Raises RunError on a loss that is not finite; exits on SIGINT and SIGTERM once saved."""
    device, first, began = trainer.device, state.get("step", 0), time.perf_counter()
    since = state.get("since", torch.zeros(4)).to(device)  # loss · masked, largest norm, masked, maskable since the log
    totals = state.get("totals", torch.zeros(2, dtype=torch.float64))  # masked, maskable up to the last log line
    bad = torch.tensor(-1, device=device)  # the first step whose loss or gradient was not finite
    bar = tqdm(total=args.steps, initial=first, desc=run.path.name, disable=rank() > 0, unit="step", mininterval=1)
    trainer.model.train()

    def due(every, step):
        return (step + 1) % every == 0 or step + 1 == args.steps

    with Signals() as signals, bar:
        for step in range(first, args.steps):
            loss, norm, masked, maskable = trainer.step(step)
            bad = torch.where((bad < 0) & ~torch.isfinite(loss + norm), step, bad)
            since = torch.stack([since[0] + loss * masked, torch.maximum(since[1], norm), since[2] + masked,
                                 since[3] + maskable])
            stop = signals.agreed(step, device)
            if stop or any(due(every, step) for every in (args.log_every, args.eval_every, args.save_every)):
                stop_if_bad(int(bad), run)
            if due(args.log_every, step):
                mean = (since[0] / since[2]).item()
                totals = totals + since[2:].cpu().double()
                lr = trainer.optimizer.param_groups[0]["lr"]
                run.log(step=step + 1, loss=mean, lr=lr, grad_norm=since[1].item(), masked=int(totals[0]))
                speed = (step + 1 - first) * args.batch_size * args.seq_len / (time.perf_counter() - began)
                bar.set_postfix(loss=f"{mean:.3f}", lr=f"{lr:.1e}", tokens=f"{speed:,.0f}/s")
                since = torch.zeros_like(since)
            if due(args.eval_every, step):
                run.log(step=step + 1, yardstick=yardstick(trainer.model, held_out, trainer.recipe.bf16))
            if due(args.save_every, step) or stop:
                run.save(trainer, step=step + 1, since=since, totals=totals)
            bar.update()
            if stop:
                bar.close()
                if world_size() > 1:
                    dist.barrier()  # rank 0 has saved
                program = "python" if world_size() == 1 else f"torchrun --nproc_per_node={world_size()}"
                say(f"stopped after step {step + 1} and saved; to go on: {program} train.py --resume "
                    f"{shlex.quote(str(run.path))}")
                sys.exit(128 + stop)
    return totals, time.perf_counter() - began


def stop_if_bad(step: int, run: RunDirectory):
    """step: the first one whose loss or gradient was not finite, −1 for none."""
    if step >= 0:
        run.log(step=step + 1, loss=None, error="the loss or its gradient is not finite")
        raise RunError(f"step {step + 1}: the loss or its gradient is not finite; lower --lr, lengthen --warmup or drop "
                       f"--bf16. The last good checkpoint is kept in {run.path}")


def summarise(trainer: Trainer, held_out: Texts, tokenizer: Tokenizer, path: Path, args: Namespace, totals: Tensor,
              seconds: float):
    """Says in plain words what came of a run."""
    exams = {"word-piece frequency alone": frequency_yardstick(held_out, trainer.strategy.context.token_counts)}
    if trainer.teacher:
        exams["the teacher"] = yardstick(trainer.teacher, held_out, trainer.recipe.bf16)
    exams[f"this model ({args.masking})"] = yardstick(trainer.model, held_out, trainer.recipe.bf16)
    masked, maskable = totals.tolist()
    say(f"\n{path}: {args.steps:,} steps, {seconds:.0f} s\n"
        f"masked {masked / max(1, maskable):.2%} of the ordinary tokens (asked for: {args.mask_rate:.2%}), {masked:,.0f} "
        "guesses in all\n\n"
        f"{'held-out text, random positions, all [MASK]':<46}{'loss (nats)':>12}{'accuracy':>10}")
    for name, exam in exams.items():
        say(f"  {name:<44}{exam['loss']:>12.2f}{exam['accuracy']:>10.1%}")
    say("The same exam for every strategy. A strategy's own training loss is no measure: hard tokens cost more.\n\n"
        "What it fills in:\n" + "\n".join(fill_in(trainer.model, tokenizer, trainer.device)))


# --- the command line ------------------------------------------------------------------------------------------------

def make_parser() -> Parser:
    """Every option of the command line, with its default."""
    parser = Parser(description="Pretrain a masked language model.")
    add = parser.add_argument
    add("--masking", default="random", help=f"who is masked: {', '.join(STRATEGIES)}")
    add("--mask-rate", type=float, default=0.15, help="the budget, a fraction of the ordinary tokens")
    add("--corruption", type=float, nargs=3, default=[0.8, 0.1, 0.1], metavar=("MASK", "SWAP", "KEEP"),
        help="shares of the chosen tokens that become [MASK], become a random token, stay")
    add("--strategy-start", type=float, help="random masks for this fraction of the steps (default: 0.5 for entropy, else 0)")
    add("--entropy-select", help="high, low, mixed or sample (default: mixed for entropy, high for self-entropy)")
    add("--entropy-input", default="masked", help="entropy of a token that the model sees (visible) or not (masked)")
    add("--typhoon-spread", type=float, default=0.4, help="the lowest rate is 1 - spread times the highest")
    add("--typhoon-ema", type=float, default=0.8, help="weight of the new value in the moving average")
    add("--teacher", help="model for entropy masking and distillation (default: trained first, and kept)")
    add("--teacher-steps", type=int, default=2300, help="steps of the teacher that is trained first")
    add("--kd-weight", type=float, default=0.0, help="alpha: share of the distillation term in the loss")
    add("--kd-temperature", type=float, default=2.0, help="T: softens teacher and student")
    add("--kd-start", type=float, default=0.0, help="distil after this fraction of the steps")
    add("--student-init", default="random", help="copy from the teacher: random (nothing), embeddings or layers")
    add("--corpus", nargs="+", default=["docs"], help=f"docs, {', '.join(WIKITEXT)}, or files, folders, globs")
    add("--corpus-fraction", type=float, default=1.0, help="train on this share of the documents")
    add("--vocab-size", type=int, help="word pieces to train (default: 8192, or the teacher's)")
    add("--seq-len", type=int, default=128, help="tokens a window, [CLS] and [SEP] included")
    add("--preset", default="tiny", help=f"size of a fresh model: {', '.join(PRESETS)}")
    add("--init", help="start from this model instead: a run, a Hugging Face directory or a hub name")
    add("--dropout", type=float, default=0.0, help="0 suits short runs from scratch; BERT has 0.1")
    add("--steps", type=int, default=1500, help="optimizer steps")
    add("--batch-size", type=int, default=8, help="windows an optimizer step, over all ranks")
    add("--accumulate", type=int, default=1, help="micro-batches that a rank cuts its share into")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    add("--warmup", type=float, default=0.1, help="fraction of the steps in which it rises")
    add("--weight-decay", type=float, default=0.01, help="not on biases and LayerNorms")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=0, help="of weights, order, masks and dropout")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--bf16", action=BooleanOptionalAction, help="bfloat16 autocast (default: on CUDA)")
    add("--compile", action="store_true", help="torch.compile the encoder and the head")
    add("--out", help="run directory (default: runs/MASKING, or the first free runs/MASKING_N)")
    add("--resume", metavar="RUN", help="go on with this run, with its own arguments")
    add("--log-every", type=int, default=100, metavar="STEPS")
    add("--eval-every", type=int, default=1000, metavar="STEPS")
    add("--save-every", type=int, default=500, metavar="STEPS")
    return parser


MAY_CHANGE = {"resume", "out", "steps", "device", "compile", "log_every", "eval_every", "save_every"}


def parse_args(argv=None) -> Namespace:
    """The arguments; with --resume the run's own, under what is given again. Raises InputError on what cannot be."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        path = Path(args.resume) / "train_args.json"
        if not path.exists():
            raise InputError(f"--resume {args.resume}: no train_args.json there, so it is no run of train.py")
        stored = read_json(path)
        stored = {key: stored.get(key, parser.get_default(key)) for key in vars(args)}
        args = parser.parse_args(argv, Namespace(**stored))
        for key in sorted(set(vars(args)) - MAY_CHANGE):
            if getattr(args, key) != stored[key]:
                raise InputError(f"--{key.replace('_', '-')} is {getattr(args, key)}, but {args.resume} was started with "
                                 f"{stored[key]}: drop it, or start a new run")
        args.out = args.resume
    try:
        check(args)
    except TypeError:  # argparse has the kinds right, train_args.json may not
        raise InputError(f"{args.resume}/train_args.json holds values of the wrong kind: copy it again, or start a new "
                         "run") from None
    return args


def check(args: Namespace):
    """Everything that can be wrong with the arguments alone. Raises InputError."""
    def require(holds, message):
        if not holds:
            raise InputError(message)

    if ":" not in args.masking:
        require(args.masking in STRATEGIES, f"--masking {args.masking!r} is unknown: choose from {', '.join(STRATEGIES)}")
    choices = {"preset": PRESETS, "entropy_select": ("high", "low", "mixed", "sample"),
               "entropy_input": ("visible", "masked"), "student_init": ("random", "embeddings", "layers")}
    for name, known in choices.items():
        value = getattr(args, name)
        require(value is None or value in known, f"--{name.replace('_', '-')} {value!r} is unknown: choose from {', '.join(known)}")
    require(0 < args.mask_rate < 1, f"--mask-rate {args.mask_rate} is not between 0 and 1")
    require(min(args.corruption) >= 0 and math.isclose(sum(args.corruption), 1, abs_tol=1e-6),
            f"--corruption {' '.join(map(str, args.corruption))}: three shares that sum to 1, such as 0.8 0.1 0.1")
    for name in ("strategy_start", "kd_start", "kd_weight", "warmup", "dropout", "typhoon_spread", "typhoon_ema"):
        value = getattr(args, name)
        require(value is None or 0 <= value <= 1, f"--{name.replace('_', '-')} {value} is not in 0 to 1")
    require(args.typhoon_spread < 1, "--typhoon-spread 1 would leave types that are never masked: choose less")
    require(0 < args.corpus_fraction <= 1, f"--corpus-fraction {args.corpus_fraction} is not above 0 and at most 1")
    for name in ("steps", "teacher_steps", "batch_size", "accumulate", "log_every", "eval_every", "save_every"):
        require(getattr(args, name) >= 1, f"--{name.replace('_', '-')} {getattr(args, name)} is not at least 1")
    for name in ("lr", "kd_temperature", "clip"):
        require(0 < getattr(args, name) < math.inf, f"--{name.replace('_', '-')} {getattr(args, name)} is not above 0")
    require(0 <= args.weight_decay < math.inf, f"--weight-decay {args.weight_decay} is not a number from 0 up")
    require(0 <= args.seed < 2 ** 63, f"--seed {args.seed} is not in 0 to 2^63 - 1")
    require(args.seq_len >= 3, f"--seq-len {args.seq_len} leaves no room between [CLS] and [SEP]: 3 at least")
    positions = BertConfig.max_position_embeddings
    require(args.init or args.seq_len <= positions, f"--seq-len {args.seq_len}: a fresh model has {positions} positions")
    require(args.vocab_size is None or args.vocab_size >= 100, f"--vocab-size {args.vocab_size} is too small: 100 at least")
    require(args.batch_size % (world_size() * args.accumulate) == 0,
            f"--batch-size {args.batch_size} cannot be shared by {world_size()} ranks × {args.accumulate} micro-batches")
    if args.corpus != ["docs"] and rank() == 0:  # the others meet it in init_process_group, once the files are there
        corpus_files(args.corpus)
    if args.out and not args.resume:
        out = Path(args.out)
        require(not out.exists() or (out.is_dir() and not any(out.iterdir())),
                f"--out {out} holds something already: choose another, or --resume {out}")
        require(can_write(out / "log.jsonl"), f"--out {out}: no folder can be made or written there")
    pick_device(args.device)


def main(argv=None):
    args = parse_args(argv)
    if world_size() > 1:
        device = pick_device(args.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        patience = timedelta(hours=6)  # the others wait while rank 0 tokenises a large corpus
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        pretrain(args)
    except torch.cuda.OutOfMemoryError:
        raise RunError(f"the GPU's memory is full at --batch-size {args.batch_size}, --seq-len {args.seq_len}, --preset "
                       f"{args.preset}: lower one of them, or raise --accumulate") from None
    except RuntimeError as error:
        if world_size() > 1 and (isinstance(error, dist.DistBackendError) or "gloo" in str(error)):
            raise RunError("another process of this run was lost, and its own messages say why; the last checkpoint is "
                           "kept, --resume goes on from it") from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
