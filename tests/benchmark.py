"""Speed, ours against Hugging Face's transformers: the same weights, the same batch, one process,
alternating order, medians. Same mathematics, less work: `steps` first checks that both sides
compute the same.

    python tests/benchmark.py                 all that this machine can run, as a Markdown table
    python tests/benchmark.py steps masking   some parts
    python tests/benchmark.py gpu --json F    the rows into a file as well, each as it comes

Parts: steps, profile, masking, memory, finetuning (wants $GLUE_DIR), gpu (wants CUDA). What is not
installed is skipped, and said so. A ratio above 1 means that ours is faster, or that a strategy
costs more than random masking.
"""
import argparse
import json
import math
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
from model import (SPECIAL_TOKENS, BertConfig, BertForMaskedLM, BertForSequenceClassification,
                   config_to_hf, from_hf, query_positions, to_hf, wordpiece_tokenizer)

try:
    import transformers
except ImportError:
    transformers = None

SIZES = {"2/128, V 8,192": ("tiny", 8192), "4/256, V 8,192": ("mini", 8192),
         "4/256, V 30,522": ("mini", 30522)}
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


def made_up_pieces(size) -> list[str]:
    """A vocabulary, every fourth word piece a continuation."""
    return [*SPECIAL_TOKENS, *(f"##w{i}" if i % 4 == 0 else f"w{i}" for i in range(5, size))]


def random_texts(vocab_size, rows, length, device) -> train.Texts:
    """Windows of word pieces whose frequencies fall as 1 / rank."""
    chance = 1 / np.arange(1, vocab_size - 4)
    draws = np.random.default_rng(0)
    ids = draws.choice(np.arange(5, vocab_size), (rows, length), p=chance / chance.sum())
    ids[:, 0], ids[:, -1] = 2, 3
    numbered = {piece: i for i, piece in enumerate(made_up_pieces(vocab_size))}
    vocab = train.Vocab(wordpiece_tokenizer(numbered), vocab_size, torch.device(device))
    return train.Texts(torch.from_numpy(ids.astype(np.int32)).to(device), vocab)


def fresh_model(preset, vocab_size, dropout, device="cpu"):
    torch.manual_seed(0)
    config = BertConfig.preset(preset, vocab_size=vocab_size, hidden_dropout_prob=dropout,
                               attention_probs_dropout_prob=dropout)
    return BertForMaskedLM(config).to(device)


def pair(preset, vocab_size, dropout, device="cpu"):
    """Our model and the reference with the same weights."""
    ours = fresh_model(preset, vocab_size, dropout, device)
    theirs = None
    if transformers:
        config = transformers.BertConfig(**config_to_hf(ours))
        theirs = transformers.BertForMaskedLM(config).to(device)
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
    """The matrix products of a forward pass over `tokens`, in FLOPs; the last block and the head
    answer for `rows` of them."""
    H, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    # Of one position: query and output, feed-forward, attention; then keys and values.
    asking = 4 * H * H + 4 * H * inner + 4 * H * LENGTH
    asked = 4 * H * H
    head = 2 * H * (H + config.vocab_size)
    return layers * tokens * asked + (layers - 1) * tokens * asking + rows * (asking + head)


def matmul_peak(n: int, dtype: torch.dtype, device="cpu") -> float:
    """FLOP/s of an n × n × n matrix product, measured here and now."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds, = alternate(lambda: a @ b)
    return 2 * n ** 3 / seconds


class Duel:
    """One batch, masked, and the two ways to a loss on it."""

    def __init__(self, vocab_size, rows, device="cpu"):
        texts = random_texts(vocab_size, rows, LENGTH, device)
        batch = texts.batch(torch.arange(rows))
        self.mask = masking.random_mask(batch.maskable, RATE)
        self.ids, self.labels = masking.corrupt(batch.input_ids, self.mask, 4, vocab_size,
                                                special_ids=texts.vocab.special_ids)

    def ours(self, model):
        queries = query_positions(self.mask)
        logits = model(self.ids, positions=queries).float()
        return F.cross_entropy(logits, queries.pick(self.labels))

    def theirs(self, model):
        return model(input_ids=self.ids, labels=self.labels).loss

    def flops(self, config) -> tuple[float, float]:
        """Of a step, ours and the reference's: a backward pass is two forward ones."""
        tokens = self.ids.numel()
        masked = int(self.mask.sum())
        return tuple(3 * forward_flops(config, tokens, rows) for rows in (masked, tokens))


def steps():
    """The MLM step: ours (head and last block on masked rows only) against the reference, with
    train.py's dropout, 0, on both sides."""
    if transformers is None:
        yield "MLM step: reference / ours", "not measured", "transformers is not installed"
        return
    # A CPU without a bf16 unit is slow at it: a small product, or this would take minutes.
    top, half = matmul_peak(2048, torch.float32), matmul_peak(256, torch.bfloat16)
    yield ("matrix product, fp32 (2,048³) · bf16 (256³)",
           f"{top / 1e9:.0f} · {half / 1e9:.0f} GFLOP/s", "")
    for name, (preset, vocab_size) in SIZES.items():
        duel = Duel(vocab_size, ROWS)
        ours, theirs = pair(preset, vocab_size, 0.0)
        torch.testing.assert_close(duel.ours(ours), duel.theirs(theirs), atol=1e-4, rtol=1e-4)
        jobs = [(ours, duel.ours, False), (theirs, duel.theirs, False)]
        if half > top:  # the CPU has a bf16 unit
            jobs.append((ours, duel.ours, True))
        mine, reference, *rest = alternate(*(ordinary_step(*job, "cpu") for job in jobs))
        needed, reference_flops = duel.flops(ours.config)
        yield (f"MLM step, {name}: reference / ours", f"{reference / mine:.1f}×",
               f"{reference * 1e3:.0f} / {mine * 1e3:.0f} ms; "
               f"FLOPs {reference_flops / needed:.1f}×; "
               f"share of the matrix peak {reference_flops / reference / top:.0%}, "
               f"ours {needed / mine / top:.0%}")
        for bf16 in rest:
            yield ("the same, ours in bf16 autocast", f"{reference / bf16:.1f}×",
                   f"{reference * 1e3:.0f} / {bf16 * 1e3:.0f} ms")


KINDS = {"matrix products": ("mm", "addmm", "bmm"),
         "softmax over the vocabulary": ("_log_softmax", "_log_softmax_backward_data"),
         "dropout": ("native_dropout", "bernoulli_")}


def profile():
    """What our step's time goes to, in shares of the whole."""
    for name, (preset, vocab_size) in SIZES.items():
        duel = Duel(vocab_size, ROWS)
        step = ordinary_step(pair(preset, vocab_size, 0.1)[0], duel.ours, False, "cpu")
        alternate(step, rounds=3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            alternate(step, rounds=5, warmup=0)
        seconds = {event.key.removeprefix("aten::"): event.self_cpu_time_total
                   for event in found.key_averages()}
        total = sum(seconds.values())
        shares = [sum(seconds.get(name, 0) for name in names) / total for names in KINDS.values()]
        yield (f"MLM step, {name}: shares of our time",
               " · ".join(f"{share:.0%}" for share in shares), " · ".join(KINDS))


def self_entropy_floor(config: BertConfig, tokens: int, masked: int) -> float:
    """FLOPs of a self-entropy step over those of a random step: a step is a forward pass and twice
    as much backward; self-entropy adds a forward pass that answers for twice as many positions as
    are masked."""
    added = forward_flops(config, tokens, 2 * masked)
    return 1 + added / (3 * forward_flops(config, tokens, masked))


def make_trainer(name, preset, vocab_size, device="cpu", bf16=False, rows=ROWS, distil=False):
    """A trainer with train.py's defaults; distil: its teacher has the student's size."""
    texts = random_texts(vocab_size, rows * 4, LENGTH, device)
    model = fresh_model(preset, vocab_size, 0.0, device)
    teacher = fresh_model(preset, vocab_size, 0.0, device).eval() if distil else None
    table = torch.rand(texts.input_ids.shape, device=device) * 9
    context = masking.Context(RATE, model, texts.token_counts(), texts.vocab.continuation, 4, table)
    recipe = train.Recipe(steps=10_000, batch_size=rows, lr=1e-5, bf16=bf16,
                          kd_weight=0.5 * distil)
    return train.Trainer(model, texts, masking.STRATEGIES[name](context), recipe, teacher)


def step_of(trainer):
    def step():
        step.number += 1
        trainer.step(step.number)
    step.number = 0
    return step


def masking_alone(trainer):
    """A strategy's `mask` on as many rows, and under the same autocast, as in a step."""
    rows = trainer.recipe.batch_size
    batch = trainer.texts.batch(torch.arange(rows))

    def mask():
        with trainer.autocast():
            trainer.strategy.mask(batch, trainer.generator)
    return mask


def masking_part():
    """What the strategies cost, as whole steps of the training loop."""
    for name, (preset, vocab_size) in SIZES.items():
        trainers = {strategy: make_trainer(strategy, preset, vocab_size)
                    for strategy in masking.STRATEGIES}
        each = trainers.values()
        times = dict(zip(trainers, alternate(*(step_of(trainer) for trainer in each))))
        alone = dict(zip(trainers, alternate(*(masking_alone(trainer) for trainer in each))))
        base = times["random"]
        for strategy in ("random", "whole-word"):
            yield (f"{strategy} masking alone, {name}: share of a step",
                   f"{alone[strategy] / base:.2%}",
                   f"{alone[strategy] * 1e3:.2f} of {base * 1e3:.0f} ms")
        for strategy in ("entropy", "self-entropy", "typhoon"):
            ratio = times[strategy] / base
            detail = f"{times[strategy] * 1e3:.0f} / {base * 1e3:.0f} ms"
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
    batch, pieces = texts.batch(torch.arange(ROWS)), made_up_pieces(8192)
    tokenizer = transformers.BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)})
    collate = transformers.DataCollatorForLanguageModeling(
        tokenizer, whole_word_mask=True, mlm_probability=RATE,
        mask_replace_prob=1.0, random_replace_prob=0.0)  # whole words it does not swap
    rows = batch.input_ids.tolist()
    examples = [{"input_ids": row, "offset_mapping": offsets(row, pieces)} for row in rows]

    def ours():
        continuation = texts.vocab.continuation[batch.input_ids]
        mask = masking.whole_word_mask(batch.maskable, continuation, RATE)
        masking.corrupt(batch.input_ids, mask, 4, 8192, (1, 0, 0))

    mine, theirs = alternate(ours, lambda: collate([dict(example) for example in examples]),
                             rounds=50)
    yield ("whole-word masking of 32 × 128, reference collator / ours", f"{theirs / mine:.0f}×",
           f"{theirs * 1e3:.1f} / {mine * 1e3:.2f} ms")


def offsets(row: list[int], pieces: list[str]) -> list[tuple[int, int]]:
    """Where each piece would lie in a text: a continuation touches the piece before it, words stand
    apart."""
    found, end = [], 0
    for i in row:
        start = end if pieces[i].startswith("##") else end + 1
        end = start + len(pieces[i].removeprefix("##"))
        found.append((start, end))
    return found


def peak(strategy: str):
    """Prints the peak memory of this process after five steps with a strategy, in MiB."""
    step = step_of(make_trainer(strategy, "mini", 30522))
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory():
    found = {}
    for strategy in ("random", "typhoon"):
        command = [sys.executable, __file__, "--peak", strategy]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[strategy] = float(printed.split()[-1])
    yield ("typhoon, 4/256, V 30,522: peak memory over random",
           f"{found['typhoon'] / found['random']:.2f}×",
           f"{found['typhoon']:.0f} / {found['random']:.0f} MiB")


def finetuning():
    """An epoch of MRPC: ours, against batches in random order, padded to the longest of each,
    through the reference."""
    if transformers is None or not os.environ.get("GLUE_DIR"):
        yield "fine-tuning, an epoch of MRPC", "not run", "wants transformers and $GLUE_DIR"
        return
    examples = glue.load_task("mrpc", "train", os.environ["GLUE_DIR"])[:1024]
    dev = {"dev": glue.load_task("mrpc", "dev", os.environ["GLUE_DIR"])}
    documents = [[example.text_a, example.text_b] for example in examples]
    tokenizer = train.train_tokenizer(documents, 8192)
    torch.manual_seed(0)
    ours = BertForSequenceClassification(BertConfig.preset("mini", vocab_size=8192), 2)
    config = transformers.BertConfig(**config_to_hf(ours))
    theirs = transformers.BertForSequenceClassification(config)
    theirs.load_state_dict(to_hf(ours))
    data = glue.tokenise(examples, tokenizer, 128, ours)
    dev = {key: glue.tokenise(part, tokenizer, 128, ours) for key, part in dev.items()}
    optimizer, targets = train.make_optimizer(theirs, 5e-5, 0.01), data.targets()
    recipe = train.Recipe(steps=math.ceil(len(examples) / 16), batch_size=16, lr=5e-5, warmup=0.0)

    def our_epoch():
        glue.fit("mrpc", ours, data, {}, recipe)  # evaluates on nothing

    def their_epoch():
        theirs.train()
        order = np.random.default_rng(0).permutation(len(examples))
        for rows in np.split(order, range(16, len(order), 16)):
            batch = data.texts.batch(torch.from_numpy(rows))
            optimizer.zero_grad()
            logits = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                            token_type_ids=batch.token_type_ids).logits
            F.cross_entropy(logits, targets[batch.index]).backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()

    mine, reference = alternate(our_epoch, their_epoch, rounds=3, warmup=0)
    scores = [glue.score(glue.evaluate("mrpc", ours, dev)[0])]
    from_hf(ours, theirs.state_dict(), "the reference")
    scores.append(glue.score(glue.evaluate("mrpc", ours, dev)[0]))
    yield ("fine-tuning, 1,024 pairs of MRPC, 4/256: reference / ours", f"{reference / mine:.1f}×",
           f"{reference:.1f} / {mine:.1f} s; score after three epochs {scores[1]:.3f} / "
           f"{scores[0]:.3f}")


def gpu():
    """On a GPU, bf16, 256 × 128 tokens a step: the step against the reference's, then whole steps
    of the training loop. The compiled rows come last, since compiling takes most of the time."""
    if not torch.cuda.is_available():
        yield "GPU rows", "not measured", "no CUDA device here"
        return
    rows, vocab_size = 256, 30522
    top = matmul_peak(8192, torch.bfloat16, "cuda")
    yield "matrix product, 8,192³, bf16", f"{top / 1e12:.0f} TFLOP/s", torch.cuda.get_device_name()
    for preset in ("small", "base"):
        duel = Duel(vocab_size, rows, "cuda")
        ours, theirs = pair(preset, vocab_size, 0.1, "cuda")
        needed, reference_flops = duel.flops(ours.config)
        steps = [ordinary_step(ours, duel.ours, True, "cuda")]
        if theirs:
            steps.append(ordinary_step(theirs, duel.theirs, True, "cuda"))
        mine, *reference = alternate(*steps)
        detail = f"ours {mine * 1e3:.1f} ms, {needed / mine / top:.0%} of the matrix peak"
        ratio = "transformers is not installed"
        if reference:
            ratio = f"{reference[0] / mine:.1f}×"
            detail += (f"; reference {reference[0] * 1e3:.1f} ms, "
                       f"{reference_flops / reference[0] / top:.0%}")
        yield f"MLM step, {preset}, eager: reference / ours", ratio, detail
        del duel, ours, theirs, steps  # or else their memory is in every row below
    for preset in ("tiny", "small", "base"):
        for strategy in (*masking.STRATEGIES, "random-kd"):
            yield gpu_row(preset, strategy, vocab_size, rows, compiled=False)
    for preset in ("tiny", "small", "base"):
        yield gpu_row(preset, "random", vocab_size, rows, compiled=True)


def gpu_row(preset: str, strategy: str, vocab_size: int, rows: int, compiled: bool) -> tuple:
    """Whole training steps of one strategy, with a fresh compiler and nothing else in memory."""
    torch.compiler.reset()  # it gives up on a function that it has compiled eight times
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(strategy.removesuffix("-kd"), preset, vocab_size, "cuda", bf16=True,
                           rows=rows, distil=strategy.endswith("-kd"))
    if compiled:
        trainer.model.bert.compile()
        trainer.model.head.compile()
    seconds, = alternate(step_of(trainer), warmup=8)
    memory_used = torch.cuda.max_memory_allocated() / 2 ** 30
    alone, = alternate(masking_alone(trainer))
    how = "compiled" if compiled else "eager"
    return (f"GPU {preset}, {strategy}, {how}: tokens/s", f"{rows * LENGTH / seconds:,.0f}",
            f"{seconds * 1e3:.1f} ms a step, {memory_used:.1f} GiB; "
            f"masking alone {alone * 1e3:.2f} ms")


PARTS = {"steps": steps, "profile": profile, "masking": masking_part, "memory": memory,
         "finetuning": finetuning, "gpu": gpu}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART",
                        help=", ".join(PARTS))
    parser.add_argument("--json", type=Path, help="also write the rows into this file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return peak(args.peak)
    versions = f"torch {torch.__version__}"
    if transformers:
        versions += f", transformers {transformers.__version__}"
    machine = (f"{platform.machine()}, {torch.get_num_threads()} threads, "
               f"Python {platform.python_version()}, {versions}")
    print(f"{machine}\n\n| what | figure | detail |\n|---|---|---|")
    rows = []
    for part in args.parts:
        for row in PARTS[part]():
            print("| " + " | ".join(row) + " |", flush=True)
            rows.append(row)
            if args.json:  # after every row: a run that is cut short keeps what it has
                args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
