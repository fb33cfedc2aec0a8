"""Speed, ours against Hugging Face's transformers: the same weights, the same batch, one process, alternating order,
medians. Same mathematics, less work; every part first checks that both sides compute the same.

    python tests/benchmark.py                 every part that this machine can run, as one Markdown table
    python tests/benchmark.py steps masking   some parts

Parts: steps, profile, masking, memory, finetuning (wants $GLUE_DIR), gpu (wants CUDA). What is not installed is skipped, and
said so. A ratio above 1 means that ours is faster, or that a strategy costs more than random masking.
"""
import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import glue
import masking
import train
from model import BertConfig, BertForMaskedLM, BertForSequenceClassification, config_to_hf, from_hf, to_hf

try:
    import transformers
except ImportError:
    transformers = None

SIZES = {"2/128, V 8,192": ("tiny", 8192), "4/256, V 8,192": ("mini", 8192), "4/256, V 30,522": ("mini", 30522)}
ROWS, LENGTH, RATE = 32, 128, 0.15


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(*contenders, rounds: int = 15, warmup: int = 3) -> list[float]:
    """Median seconds of each contender, called in turn, the order reversed every other round."""
    times = [[] for _ in contenders]
    for turn in range(warmup + rounds):
        for i in range(len(contenders))[::1 if turn % 2 else -1]:
            sync()
            start = time.perf_counter()
            contenders[i]()
            sync()
            if turn >= warmup:
                times[i].append(time.perf_counter() - start)
    return [statistics.median(each) for each in times]


class Pieces:
    """A tokenizer of `size` made-up word pieces, every fourth one a continuation."""

    def __init__(self, size):
        self.size = size

    def id_to_token(self, i):
        return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"][i] if i < 5 else f"##w{i}" if i % 4 == 0 else f"w{i}"

    def token_to_id(self, token):
        return {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}[token]


def random_texts(vocab_size, rows, length, device) -> train.Texts:
    """Windows of word pieces whose frequencies fall as 1 / rank."""
    chance = 1 / np.arange(1, vocab_size - 4)
    ids = np.random.default_rng(0).choice(np.arange(5, vocab_size), (rows, length), p=chance / chance.sum())
    ids[:, 0], ids[:, -1] = 2, 3
    return train.Texts(torch.from_numpy(ids.astype(np.int32)).to(device),
                       train.Vocab(Pieces(vocab_size), vocab_size, torch.device(device)))


def pair(preset, vocab_size, dropout, device="cpu"):
    """Our model and the reference with the same weights."""
    torch.manual_seed(0)
    ours = BertForMaskedLM(BertConfig.preset(preset, vocab_size=vocab_size, hidden_dropout_prob=dropout,
                                             attention_probs_dropout_prob=dropout)).to(device)
    theirs = None
    if transformers:
        theirs = transformers.BertForMaskedLM(transformers.BertConfig(**config_to_hf(ours))).to(device)
        theirs.load_state_dict(to_hf(ours), strict=False)
    return ours, theirs


def ordinary_step(model, loss_of, bf16, device):
    """Forward, backward, AdamW; the fused optimizer on both sides."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss
    return step


def forward_flops(config: BertConfig, tokens: int, rows: int) -> float:
    """Matrix products of a forward pass over `tokens` whose last block and head answer for `rows` of them."""
    H, inner = config.hidden_size, config.intermediate_size
    asking = 4 * H * H + 4 * H * inner + 4 * H * LENGTH  # a position's query, output, feed-forward, attention
    keys_and_values = 4 * H * H
    return (config.num_hidden_layers * tokens * keys_and_values + (config.num_hidden_layers - 1) * tokens * asking
            + rows * (asking + 2 * H * (H + config.vocab_size)))


def matmul_peak(n: int, dtype: torch.dtype, device="cpu") -> float:
    """FLOP/s of an n × n × n matrix product, measured here and now."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds, = alternate(lambda: a @ b)
    return 2 * n ** 3 / seconds


class Duel:
    """One batch, masked, and the two ways to a loss on it."""

    def __init__(self, vocab_size, rows, device="cpu"):
        texts = random_texts(vocab_size, rows, LENGTH, device)
        batch = texts.batch(torch.arange(rows, device=device))
        self.mask = masking.random_mask(batch.maskable, RATE)
        self.ids, self.labels = masking.corrupt(batch.input_ids, self.mask, 4, vocab_size,
                                                special_ids=texts.vocab.special_ids)

    def ours(self, model):
        return F.cross_entropy(model(self.ids, positions=self.mask).float(), self.labels[self.mask])

    def theirs(self, model):
        return model(input_ids=self.ids, labels=self.labels).loss

    def flops(self, config) -> tuple[float, float]:
        """Of a step, ours and the reference's: a backward pass is two forward ones."""
        tokens = self.ids.numel()
        return tuple(3 * forward_flops(config, tokens, rows) for rows in (int(self.mask.sum()), tokens))


def steps():
    """The MLM step: ours (head and last block on masked rows only) against the reference, dropout 0.1 on both sides."""
    if transformers is None:
        yield "MLM step: reference / ours", "not measured", "transformers is not installed"
        return
    top, half = (matmul_peak(2048, dtype) for dtype in (torch.float32, torch.bfloat16))
    yield "matrix product, 2,048³, fp32 · bf16", f"{top / 1e9:.0f} · {half / 1e9:.0f} GFLOP/s", ""
    for name, (preset, vocab_size) in SIZES.items():
        duel = Duel(vocab_size, ROWS)
        ours, theirs = pair(preset, vocab_size, 0.0)
        torch.testing.assert_close(duel.ours(ours), duel.theirs(theirs), atol=1e-4, rtol=1e-4)
        ours, theirs = pair(preset, vocab_size, 0.1)
        jobs = [(ours, duel.ours, False), (theirs, duel.theirs, False)] + [(ours, duel.ours, True)] * (half > top)
        mine, reference, *rest = alternate(*(ordinary_step(*job, "cpu") for job in jobs))
        needed, reference_flops = duel.flops(ours.config)
        yield f"MLM step, {name}: reference / ours", f"{reference / mine:.1f}×", \
            f"{reference * 1e3:.0f} / {mine * 1e3:.0f} ms; FLOPs {reference_flops / needed:.1f}×; " \
            f"share of the matrix peak {reference_flops / reference / top:.0%}, ours {needed / mine / top:.0%}"
        yield "the same, ours in bf16 autocast", f"{reference / rest[0]:.1f}×" if rest else "not measured", \
            f"{reference * 1e3:.0f} / {rest[0] * 1e3:.0f} ms" if rest else "no bf16 unit in this CPU: see the first row"


KINDS = {"matrix products": ("mm", "addmm", "bmm"),
         "softmax over the vocabulary": ("_log_softmax", "_log_softmax_backward_data"), "dropout's coins": ("random_", "ge")}


def profile():
    """What our step's time goes to, in shares of the whole."""
    for name, (preset, vocab_size) in SIZES.items():
        duel = Duel(vocab_size, ROWS)
        step = ordinary_step(pair(preset, vocab_size, 0.1)[0], duel.ours, False, "cpu")
        alternate(step, rounds=3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            alternate(step, rounds=5, warmup=0)
        seconds = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in found.key_averages()}
        shares = [sum(seconds.get(name, 0) for name in names) / sum(seconds.values()) for names in KINDS.values()]
        yield f"MLM step, {name}: shares of our time", " · ".join(f"{share:.0%}" for share in shares), " · ".join(KINDS)


def self_entropy_floor(config: BertConfig, tokens: int, masked: int) -> float:
    """FLOPs of a self-entropy step over those of a random step: a step is a forward pass and twice as much backward;
    self-entropy adds a forward pass that answers for twice as many positions as are masked."""
    return 1 + forward_flops(config, tokens, 2 * masked) / (3 * forward_flops(config, tokens, masked))


def make_trainer(name, preset, vocab_size, device="cpu", bf16=False, rows=ROWS):
    texts = random_texts(vocab_size, rows * 4, LENGTH, device)
    model = pair(preset, vocab_size, 0.1, device)[0]
    table = torch.rand(texts.input_ids.shape, device=device) * 9
    context = masking.Context(RATE, model, texts.token_counts(), texts.vocab.continuation, 4, table)
    recipe = train.Recipe(steps=10_000, batch_size=rows, lr=1e-5, bf16=bf16)
    return train.Trainer(model, texts, masking.STRATEGIES[name](context), recipe)


def step_of(trainer):
    def step():
        step.number += 1
        trainer.step(step.number)
    step.number = 0
    return step


def masking_alone(trainer):
    batch = trainer.texts.batch(torch.arange(ROWS, device=trainer.device))
    return lambda: trainer.strategy.mask(batch, trainer.generator)


def masking_part():
    """What the strategies cost, as whole steps of the training loop."""
    for name, (preset, vocab_size) in SIZES.items():
        trainers = {strategy: make_trainer(strategy, preset, vocab_size) for strategy in masking.STRATEGIES}
        times = dict(zip(trainers, alternate(*(step_of(trainer) for trainer in trainers.values()))))
        alone = dict(zip(trainers, alternate(*(masking_alone(trainer) for trainer in trainers.values()))))
        for strategy in ("random", "whole-word"):
            yield f"{strategy} masking alone, {name}: share of a step", f"{alone[strategy] / times['random']:.2%}", \
                f"{alone[strategy] * 1e3:.2f} of {times['random'] * 1e3:.0f} ms"
        for strategy in ("entropy", "self-entropy", "typhoon"):
            ratio, detail = times[strategy] / times["random"], f"{times[strategy] * 1e3:.0f} / {times['random'] * 1e3:.0f} ms"
            if strategy == "self-entropy":
                k = round(RATE * (LENGTH - 2)) * ROWS
                floor = self_entropy_floor(trainers[strategy].model.config, ROWS * LENGTH, k)
                detail += f"; FLOP floor {floor:.2f}×, so {ratio / floor:.2f} of it"
            yield f"{strategy} step, {name}: over a random step", f"{ratio:.2f}×", detail
    yield from collator()


def collator():
    """Whole-word masking of one batch against the reference's collator."""
    if transformers is None:
        yield "whole-word masking, reference collator / ours", "transformers is not installed", ""
        return
    texts = random_texts(8192, ROWS, LENGTH, "cpu")
    batch = texts.batch(torch.arange(ROWS))
    pieces = [Pieces(8192).id_to_token(i) for i in range(8192)]
    tokenizer = transformers.BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)})
    collate = transformers.DataCollatorForLanguageModeling(  # it does not swap words where it masks whole ones
        tokenizer, whole_word_mask=True, mlm_probability=RATE, mask_replace_prob=1.0, random_replace_prob=0.0)
    rows = batch.input_ids.tolist()
    examples = [{"input_ids": row, "offset_mapping": offsets(row, pieces)} for row in rows]

    def ours():
        mask = masking.whole_word_mask(batch.maskable, texts.vocab.continuation[batch.input_ids], RATE)
        masking.corrupt(batch.input_ids, mask, 4, 8192, (1, 0, 0))

    mine, theirs = alternate(ours, lambda: collate([dict(example) for example in examples]),
                             rounds=50)
    yield "whole-word masking of 32 × 128, reference collator / ours", f"{theirs / mine:.0f}×", \
        f"{theirs * 1e3:.1f} / {mine * 1e3:.2f} ms"


def offsets(row: list[int], pieces: list[str]) -> list[tuple[int, int]]:
    """Where each piece would lie in a text: continuations touch the piece before, words stand apart."""
    found, end = [], 0
    for i in row:
        start = end if pieces[i].startswith("##") else end + 1
        end = start + len(pieces[i].removeprefix("##"))
        found.append((start, end))
    return found


def peak(strategy: str):
    """The peak memory of a process that runs five steps with a strategy, in MiB (the child side)."""
    step = step_of(make_trainer(strategy, "mini", 30522))
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory():
    found = {strategy: float(subprocess.run([sys.executable, __file__, "--peak", strategy], capture_output=True, text=True,
                                            check=True).stdout.split()[-1]) for strategy in ("random", "typhoon")}
    yield "typhoon, 4/256, V 30,522: peak memory over random", f"{found['typhoon'] / found['random']:.2f}×", \
        f"{found['typhoon']:.0f} / {found['random']:.0f} MiB"


def finetuning(device="cpu"):
    """An epoch of MRPC: ours against batches in random order, padded to the longest of each, through the reference."""
    if transformers is None or not os.environ.get("GLUE_DIR"):
        yield "fine-tuning, an epoch of MRPC", "not run", "wants transformers and $GLUE_DIR"
        return
    examples = glue.load_task("mrpc", "train", os.environ["GLUE_DIR"])[:1024]
    dev = {"dev": glue.load_task("mrpc", "dev", os.environ["GLUE_DIR"])}
    documents = [[example.text_a, example.text_b] for example in examples]
    tokenizer = train.train_tokenizer(documents, 8192)
    torch.manual_seed(0)
    ours = BertForSequenceClassification(BertConfig.preset("mini", vocab_size=8192), 2).to(device)
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**config_to_hf(ours))).to(device)
    theirs.load_state_dict(to_hf(ours))
    data = glue.encode(examples, tokenizer, 128)
    dev = {key: glue.encode(part, tokenizer, 128) for key, part in dev.items()}
    optimizer = train.make_optimizer(theirs, 5e-5, 0.01)
    settings = argparse.Namespace(
        task="mrpc", epochs=1, batch_size=16, lr=5e-5, weight_decay=0.01, warmup=0.0, seed=0)

    def our_epoch():
        glue.fit(ours, data, {}, settings)  # evaluates on nothing

    def their_epoch():
        theirs.train()
        order = np.random.default_rng(0).permutation(len(examples))
        for rows in np.split(order, range(16, len(order), 16)):
            inputs = glue.collate(data, rows, ours)
            optimizer.zero_grad()
            logits = theirs(**{key: value for key, value in inputs.items() if value is not None}).logits
            F.cross_entropy(logits, data.targets(rows, device)).backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()

    mine, reference = alternate(our_epoch, their_epoch, rounds=3, warmup=0)
    scores = [glue.score(glue.evaluate("mrpc", ours, dev)[0])]
    from_hf(ours, theirs.state_dict(), "the reference")
    scores.append(glue.score(glue.evaluate("mrpc", ours, dev)[0]))
    yield "fine-tuning, 1,024 pairs of MRPC, 4/256: reference / ours", f"{reference / mine:.1f}×", \
        f"{reference:.1f} / {mine:.1f} s; score after three epochs {scores[1]:.3f} / {scores[0]:.3f}"


def gpu():
    if not torch.cuda.is_available():
        yield "GPU rows", "not measured", "no CUDA device here: python tests/benchmark.py gpu"
        return
    top, rows = matmul_peak(8192, torch.bfloat16, "cuda"), 256
    tokens = rows * LENGTH
    yield "GPU: bf16 matrix product, 8,192³", f"{top / 1e12:.0f} TFLOP/s", torch.cuda.get_device_name()
    duel = Duel(30522, rows, "cuda")
    ours, theirs = pair("base", 30522, 0.1, "cuda")
    eager = ordinary_step(ours, duel.ours, True, "cuda")
    if theirs:
        mine, reference = alternate(eager, ordinary_step(theirs, duel.theirs, True, "cuda"))
        yield "GPU: MLM step, base, bf16: reference / ours, both eager", f"{reference / mine:.1f}×", \
            f"{reference * 1e3:.0f} / {mine * 1e3:.0f} ms"
    ours.bert.compile()
    ours.head.compile()
    compiled, = alternate(eager, warmup=8)
    needed, _ = duel.flops(ours.config)
    yield "GPU: MLM step, base, bf16, compiled: share of the matrix peak", f"{needed / compiled / top:.0%}", \
        f"{compiled * 1e3:.0f} ms, {needed / 1e12:.1f} TFLOP"
    for preset in ("tiny", "mini", "small", "medium", "base"):
        for strategy in masking.STRATEGIES:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            trainer = make_trainer(strategy, preset, 30522, "cuda", bf16=True, rows=rows)
            eager, = alternate(step_of(trainer))
            memory_used = torch.cuda.max_memory_allocated() / 2 ** 30
            trainer.model.bert.compile()
            trainer.model.head.compile()
            compiled, = alternate(step_of(trainer), warmup=8)
            alone, = alternate(masking_alone(trainer))
            yield f"GPU {preset}, {strategy}: tokens/s, eager · compiled", f"{tokens / eager:,.0f} · {tokens / compiled:,.0f}", \
                f"{memory_used:.1f} GiB; masking {alone / compiled:.1%} of a compiled step"


PARTS = {"steps": steps, "profile": profile, "masking": masking_part, "memory": memory, "finetuning": finetuning, "gpu": gpu}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return peak(args.peak)
    versions = f"torch {torch.__version__}" + (f", transformers {transformers.__version__}" if transformers else "")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}\n")
    print("| what | figure | detail |\n|---|---|---|")
    for part in args.parts:
        for row in PARTS[part]():
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
