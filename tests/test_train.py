"""Pretraining: what a step computes, what a run leaves behind, that an interrupted run ends as an
unbroken one; the exam, the teacher, the text; ranks and options. In the order of train.py."""
import copy
import hashlib
import json
import math
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from masking import STRATEGIES, Context, Strategy, random_mask, top_k
from model import (BertConfig, BertForMaskedLM, InputError, load_pretrained, load_tokenizer,
                   run_cli, save_pretrained, weights_digest, wordpiece_tokenizer)
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from train import Recipe, Texts, Trainer, Vocab

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = ["--preset", "tiny", "--vocab-size", "300", "--seq-len", "16", "--batch-size", "8",
         "--steps", "12", "--device", "cpu", "--log-every", "3", "--save-every", "4",
         "--eval-every", "6", "--teacher-steps", "6"]


def without(option: str) -> list[str]:
    """SMALL without one of its options."""
    i = SMALL.index(option)
    return SMALL[:i] + SMALL[i + 2:]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A file of 400 short documents."""
    path, rng = tmp_path_factory.mktemp("corpus") / "text.txt", np.random.default_rng(0)
    words = ["the", "cat", "dog", "sat", "on", "a", "mat", "and", "ran", "unbelievably", "quickly",
             "home", "."]
    documents = [" ".join(rng.choice(words, 20)) for _ in range(400)]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def command(*arguments, cwd, **options):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True, timeout=300, **options)


def weights(run):
    return (Path(run) / "model.safetensors").read_bytes()


# --- the step -------------------------------------------------------------------------------------

def trainer(model, texts, name="random", **numbers):
    entropy = torch.rand(texts.input_ids.shape, generator=torch.Generator().manual_seed(0))
    context = Context(0.3, model, texts.token_counts(), texts.vocab.continuation,
                      texts.vocab.mask_id, entropy)
    recipe = Recipe(**{"steps": 10, "batch_size": 8, "lr": 1e-3, **numbers})
    return Trainer(model, texts, STRATEGIES[name](context), recipe)


def numbered_texts(n=24, L=12, seed=0):
    """Texts of the word pieces w5 to w59."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{i}" for i in range(5, 60))]
    tokenizer = wordpiece_tokenizer({word: i for i, word in enumerate(words)})
    ids = torch.randint(5, 60, (n, L), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = 2, 3
    return Texts(ids, Vocab(tokenizer, 60, CPU))


def test_one_step_is_adamw_on_the_mean_loss_of_the_masked_tokens(model):
    """The step against the same thing written out with plain PyTorch calls."""
    texts, twin = numbered_texts(), copy.deepcopy(model)
    ours = trainer(model, texts, corruption=(1, 0, 0), clip=0.5, warmup=0.5, weight_decay=0.1)
    mask = random_mask(texts.vocab.ordinary[texts.input_ids], 0.3, torch.Generator().manual_seed(1))
    ours.strategy.mask = ours.random.mask = lambda batch, generator: mask[batch.index]
    stats = ours.step(0)

    index = torch.cat(ours.text_numbers(0))
    ids, chosen = texts.input_ids[index], mask[index]
    logits = twin(ids.masked_fill(chosen, 4))
    loss = F.cross_entropy(logits[chosen], ids[chosen])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    matrices = [p for n, p in twin.named_parameters()
                if n.endswith("weight") and "norm" not in n.lower()]
    rest = [p for p in twin.parameters() if all(p is not m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-3 / 5,  # the first of five warm-up steps
                      betas=(0.9, 0.98), eps=1e-6).step()
    assert stats.tolist() == pytest.approx(
        [loss.item(), norm.item(), chosen.sum().item(), 8 * 10], rel=1e-5)
    for (name, ours_now), theirs in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(ours_now, theirs, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["whole-word", "typhoon"])
def test_accumulation_changes_nothing_though_micro_batches_hold_different_numbers(name, model):
    texts, runs = numbered_texts(), []
    masks = torch.rand(4, *texts.input_ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    for accumulate in (1, 4):
        one = trainer(copy.deepcopy(model), texts, name, accumulate=accumulate,
                      corruption=(1, 0, 0), lr=1e-4)
        for step in range(4):
            one.strategy.mask = lambda batch, generator: masks[step][batch.index] & batch.maskable
            one.step(step)
        runs.append(one)
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    if name == "typhoon":
        typhoons = [run.strategy.typhoon for run in runs]
        torch.testing.assert_close(typhoons[0].weight, typhoons[1].weight, atol=1e-6, rtol=1e-4)
        assert typhoons[0].seen.any()


def test_micro_batches_without_a_masked_token_change_nothing(model):
    texts, runs = numbered_texts(), []
    for accumulate in (1, 8):  # with 8, most micro-batches have nothing to guess
        one = trainer(copy.deepcopy(model), texts, "typhoon", accumulate=accumulate,
                      corruption=(1, 0, 0), lr=1e-4)
        first = one.text_numbers(0)[0][0]
        one.strategy.mask = lambda batch, _: batch.maskable & (batch.index == first)[:, None]
        loss, _, masked, _ = one.step(0)
        assert masked == 10 and torch.isfinite(loss)
        runs.append(one.model)
    for a, b in zip(runs[0].parameters(), runs[1].parameters()):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_every_epoch_reads_every_text_once_in_its_own_order(model):
    one = trainer(model, numbered_texts(n=24), batch_size=8)
    read = [torch.cat(one.text_numbers(step)) for step in range(6)]
    epochs = [torch.cat(read[:3]), torch.cat(read[3:])]
    assert [sorted(epoch.tolist()) for epoch in epochs] == [list(range(24))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    uneven = trainer(model, numbered_texts(n=20), batch_size=8)
    stream = torch.cat([torch.cat(uneven.text_numbers(step)) for step in range(5)])
    assert sorted(stream[:20].tolist()) == sorted(stream[20:].tolist()) == list(range(20))


def padded_texts(n=24, L=12):
    """Texts of 12 or 9 tokens, in two segments, with the word pieces of `numbered_texts`."""
    texts = numbered_texts(n, L)
    ids = texts.input_ids.clone()
    ids[::2, 8], ids[::2, 9:] = 3, 0
    types = (torch.arange(L) >= 5).long().expand(n, L)
    return Texts(ids, texts.vocab, types)


def other_model(model, seed=7):
    """A copy with other weights."""
    twin = copy.deepcopy(model)
    torch.manual_seed(seed)
    for p in twin.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return twin


def test_a_micro_step_with_distillation_is_the_formula_written_out(model):
    """Teacher and student read the same corrupted text with its padding and its token types, the
    weight of the distillation term is the argument's, and T is the recipe's."""
    texts, teacher, twin = padded_texts(), other_model(model), copy.deepcopy(model)
    one = trainer(model, texts, corruption=(1, 0, 0), kd_weight=0.9, kd_temperature=3.0)
    one.teacher = teacher
    batch = texts.batch(torch.arange(8))
    mask = random_mask(batch.maskable, 0.4, torch.Generator().manual_seed(3))
    loss = one.micro_step(batch, mask, torch.tensor(50), kd_weight=0.3)

    inputs = (batch.input_ids.masked_fill(mask, 4), batch.attention_mask, batch.token_type_ids)
    student, targets = twin(*inputs)[mask], batch.input_ids[mask]
    z_t = teacher(*inputs)[mask].detach()
    p_t = (z_t / 3).softmax(-1)
    kl = (p_t * (p_t.log() - (student / 3).log_softmax(-1))).sum(-1).mean()
    mean = 0.3 * 9 * kl + 0.7 * F.cross_entropy(student, targets)
    (mean * len(targets) / 50).backward()
    assert loss.item() == pytest.approx((mean * len(targets)).item(), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert all(p.grad is None for p in teacher.parameters())


def corrupted_text(one, monkeypatch):
    """What the model of a trainer reads from now on, a tensor a micro-batch."""
    seen = []
    words = one.model.bert.embeddings.word_embeddings
    words.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    return seen


def test_swapped_tokens_are_never_special_and_kept_ones_count_as_visible(model, monkeypatch):
    """What `observe` gets as unseen is what the model did not see: kept tokens are chosen, yet
    visible."""
    texts = numbered_texts(n=200)
    one = trainer(model, texts, "typhoon", corruption=(0.3, 0.4, 0.3), batch_size=200)
    read, observed = corrupted_text(one, monkeypatch), []
    monkeypatch.setattr(one.strategy, "observe", lambda *given: observed.append(given))
    masks = []
    draw = one.strategy.mask
    monkeypatch.setattr(one.strategy, "mask", lambda *given: masks.append(draw(*given)) or masks[0])
    one.step(0)
    (batch, unseen, gradient), mask, corrupted = observed[0], masks[0], read[0]
    assert torch.equal(unseen, corrupted != batch.input_ids) and gradient.abs().sum() > 0
    assert (mask & ~unseen).sum() > 100 and not (unseen & ~mask).any()
    swapped = corrupted[unseen & (corrupted != 4)]
    assert len(swapped) > 100 and swapped.min() >= 5


def test_bf16_is_for_student_teacher_and_the_strategys_own_pass(model, monkeypatch):
    texts = numbered_texts()
    one = trainer(model, texts, "self-entropy", bf16=True, kd_weight=0.5)
    one.teacher, kinds = other_model(model), []
    for part in (one.model, one.teacher):
        part.head.register_forward_hook(lambda head, _, logits: kinds.append((head, logits.dtype)))
    one.step(0)
    assert {head for head, _ in kinds} == {one.model.head, one.teacher.head} and len(kinds) >= 3
    assert {dtype for _, dtype in kinds} == {torch.bfloat16}


def test_a_step_with_nothing_to_guess_changes_no_weight_and_is_finite(model):
    before = copy.deepcopy(model.state_dict())
    one = trainer(model, numbered_texts(), accumulate=2, weight_decay=0.0)
    one.strategy.mask = lambda batch, generator: torch.zeros_like(batch.maskable)
    assert one.step(0).tolist() == [0, 0, 0, 80]
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_learning_rate_by_hand():
    factors = [train.lr_at(step, 10, 0.2) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_strategy_start_and_kd_start_wait_for_their_share_of_the_steps(model):
    texts, calls = numbered_texts(), []
    one = trainer(model, texts, "random", strategy_start=0.5, kd_weight=0.5, kd_start=0.7)

    def teacher(*given, **named):
        calls.append(("teacher", now))
        return model(*given, **named).detach()

    def mask(batch, generator):
        calls.append(("strategy", now))
        return drawn(batch, generator)

    drawn, one.strategy.mask, one.teacher = one.strategy.mask, mask, teacher
    for now in range(10):
        one.step(now)
    assert [now for who, now in calls if who == "strategy"] == [5, 6, 7, 8, 9]
    assert [now for who, now in calls if who == "teacher"] == [7, 8, 9]


def test_a_strategy_is_told_how_far_the_run_is(model):
    one = trainer(model, numbered_texts(), steps=4)
    told, drawn = [], one.strategy.mask

    def mask(batch, generator):
        told.append(one.strategy.context.progress)
        return drawn(batch, generator)

    one.strategy.mask = mask
    for step in range(4):
        one.step(step)
    assert told == [0, 0.25, 0.5, 0.75]


def test_a_sixth_strategy_is_a_class_and_a_row(model, monkeypatch):
    """The README's example: the rarest tokens first."""
    class Rarest(Strategy):
        def mask(self, batch, generator=None):
            rarity = -self.context.token_counts[batch.input_ids].float()
            k = torch.full((len(batch.input_ids),), 2)
            return top_k(rarity, batch.maskable, k)

    monkeypatch.setitem(STRATEGIES, "rarest", Rarest)
    one = trainer(model, numbered_texts(), "rarest")
    assert one.step(0)[2] == 16


# --- a run ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("extra", [[], ["--kd-weight", "0.5"]], ids=["plain", "kd"])
@pytest.mark.parametrize("masking", STRATEGIES)
def test_every_strategy_trains_with_and_without_distillation(masking, extra, corpus, tmp_path,
                                                             monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--masking", masking, "--corpus", str(corpus), *SMALL, *extra])
    run, said = tmp_path / "runs" / (masking + ("-kd" if extra else "")), capsys.readouterr().out
    assert "word-piece frequency alone" in said and f"this model ({masking})" in said
    assert ("the teacher" in said) == (masking == "entropy" or bool(extra))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in log if "exam" in line] == [6, 12]
    model, tokenizer = load_pretrained(run, head="mlm")
    assert tokenizer.get_vocab_size() == model.config.vocab_size
    settings = json.loads((run / "train_args.json").read_text())
    assert settings["masking"] == masking and settings["versions"]["torch"] == torch.__version__


def test_a_run_leaves_its_exam_and_what_it_was_made_from(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--masking", "entropy", "--corpus", str(corpus), *SMALL, "--steps", "30",
                "--kd-weight", "0.5"])
    record = json.loads(Path("runs/entropy-kd/exam.json").read_text())
    settings = json.loads(Path("runs/entropy-kd/train_args.json").read_text())
    assert (record["task"], record["strategy"], record["pattern"]) == ("mlm", "entropy-kd", None)
    assert record["model"] == "runs/entropy-kd"
    assert record["args"] == record["pretraining"] == settings
    assert settings["teacher_weights"] == weights_digest(settings["teacher"])
    assert settings["ranks"] == 1 and 0.29 < record["masked"] < 0.31
    assert settings["ran_on"] == "cpu, float32"  # where --device says auto and --bf16 nothing
    assert record["last"].keys() == record["baseline"].keys() == {
        "accuracy", "common", "middle", "rare", "log_likelihood"}
    rows = {name: np.array(part) for name, part in record["dev"].items()}
    assert train.exam_metrics(**rows) == record["last"]
    last = json.loads(Path("runs/entropy-kd/log.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 30, "exam": record["last"]}  # taken once
    tokens = json.loads(Path("runs/entropy-kd/log.jsonl").read_text().splitlines()[-2])
    assert tokens["masked_so_far"] == pytest.approx(30 * 8 * 14 * 0.3, rel=0.1)
    assert tokens["max_grad_norm"] > 0


def test_a_default_run_sits_ten_exams_and_its_log_holds_numbers(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", str(corpus), *without("--eval-every"), "--steps", "25", "--out", "run"])
    text = Path("run/log.jsonl").read_text()
    exams = [json.loads(line)["step"] for line in text.splitlines() if "exam" in line]
    assert exams == [*range(2, 25, 2), 25] and "null" not in text and "NaN" not in text


def test_reference_files_open_the_run(corpus, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", str(corpus), *SMALL])
    theirs = transformers.AutoModelForMaskedLM.from_pretrained("runs/random").eval()
    ours, tokenizer = load_pretrained("runs/random", head="mlm")
    ids = torch.tensor([tokenizer.encode("the cat sat").ids])
    pieces = transformers.AutoTokenizer.from_pretrained("runs/random")
    assert pieces("the cat sat")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.eval()(ids), atol=1e-5, rtol=1e-5)


def test_training_from_a_model_and_to_a_teacher_of_another_kind(tmp_path, monkeypatch):
    """--init takes a DistilBERT; its recorded vocabulary knows no words but w0, w1, ..."""
    monkeypatch.chdir(tmp_path)
    texts = [" ".join(f"w{i * j % 50}" for i in range(60)) for j in range(1, 80)]
    Path("numbers.txt").write_text("\n\n".join(texts))
    reference = Path(__file__).parent / "data" / "reference"
    train.main(["--corpus", "numbers.txt", *without("--vocab-size"), "--kd-weight", "1",
                "--init", str(reference / "distilbert-mlm"),
                "--teacher", str(reference / "bert-mlm")])
    model, _ = load_pretrained("runs/random-kd", head="mlm")
    assert model.config.model_type == "distilbert"


def test_a_fresh_model_attends_to_neighbours_unless_told_otherwise(corpus, tmp_path, monkeypatch):
    """Its key matrices start as copies of the query matrices; a step of 1e-9 hardly moves them."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--corpus", str(corpus), *SMALL, "--steps", "1", "--lr", "1e-9"]
    train.main([*arguments, "--out", "local"])
    train.main([*arguments, "--out", "plain", "--plain-start"])
    for run, alike in (("local", True), ("plain", False)):
        attention = load_pretrained(run, head="mlm")[0].bert.layers[0].attention
        assert torch.allclose(attention.query.weight, attention.key.weight, atol=1e-5) == alike


OWN = """
from masking import Strategy, budget, top_k, uniform
class First(Strategy):
    def mask(self, batch, generator=None):
        scores = -uniform(batch.maskable, generator).cumsum(1)
        return top_k(scores, batch.maskable, budget(batch.maskable, self.context.rate))
"""


def test_a_strategy_in_a_file_of_the_users_own_trains(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    train.main(["--masking", "own.py:First", "--corpus", str(corpus), *SMALL])
    record = json.loads(Path("runs/First/exam.json").read_text())
    assert record["strategy"] == "First" and record["args"]["masking"] == "own.py:First"


def test_a_run_says_where_its_figures_mean_little(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", str(corpus), *SMALL, "--lr", "10"])
    said = capsys.readouterr().out
    words = 20 * 400
    assert f"{words:,} words; " in said and "So few words teach a model little" in said
    assert re.search(r"With \d+ questions chance decides", said)
    assert "worse than guessing by frequency alone" in said and "lower --lr" in said
    Path("text.txt").write_text("\n\n".join(f"{i} the cat sat on the mat ." for i in range(400)))
    train.main(["--corpus", "text.txt", *SMALL, "--steps", "60"])
    assert "worse than guessing" not in capsys.readouterr().out


# --- interrupted runs -----------------------------------------------------------------------------

VARIANTS = [("random", []), ("whole-word", ["--accumulate", "2"]),
            ("entropy", ["--entropy-select", "sample"]), ("self-entropy", ["--dropout", "0.1"]),
            ("typhoon", ["--kd-weight", "0.5", "--accumulate", "2"])]


def stop_at(number: int, monkeypatch, kind=signal.SIGTERM, steps=12):
    """Sends this process a signal while a run of so many steps takes step `number`."""
    step = Trainer.step

    def stopping(self, now):
        if now == number and self.recipe.steps == steps:
            signal.raise_signal(kind)
        return step(self, now)

    monkeypatch.setattr(Trainer, "step", stopping)


@pytest.mark.parametrize("masking, extra", VARIANTS, ids=[v[0] for v in VARIANTS])
def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(masking, extra, corpus, tmp_path,
                                                           monkeypatch, capsys):
    """Stopped by a signal after step 5, between two saves and between two log lines."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--masking", masking, "--corpus", str(corpus), *SMALL, *extra]
    train.main([*arguments, "--out", "whole"])
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(SystemExit) as stop:
            train.main([*arguments, "--out", "my run"])
    assert stop.value.code == 143
    assert capsys.readouterr().out.endswith(
        "stopped after step 5 and saved; to go on: python train.py --resume 'my run'\n")
    train.main(["--resume", "my run"])
    assert weights("whole") == weights("my run")
    assert Path("whole/log.jsonl").read_bytes() == Path("my run/log.jsonl").read_bytes()


def test_a_log_goes_back_to_the_checkpoint(corpus, tmp_path, monkeypatch):
    """An end without notice in step 11 leaves a log line of step 9 and the checkpoint of step 8."""
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", str(corpus), *SMALL, "--out", "whole"])
    step = Trainer.step

    def ending(self, now):
        if now == 10:
            raise KeyboardInterrupt
        return step(self, now)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", ending)
        train.main(["--corpus", str(corpus), *SMALL, "--out", "run"])
    assert '"step": 9' in Path("run/log.jsonl").read_text()
    train.main(["--resume", "run"])
    assert Path("run/log.jsonl").read_text() == Path("whole/log.jsonl").read_text()


@pytest.mark.parametrize("name, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_names_the_command_that_goes_on(name, status, corpus, tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--corpus", str(corpus),
                                *SMALL, "--steps", "100000", "--out", "run"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(name)
    out, error = process.communicate(timeout=60)
    assert process.returncode == status and error == ""  # no progress bar in a pipe
    assert "python train.py --resume run" in out
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 3


def test_a_signal_before_the_first_step_says_something(corpus, tmp_path, monkeypatch, capsys):
    """While the teacher's entropies are computed, say."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--masking", "entropy", "--corpus", str(corpus), *SMALL]

    monkeypatch.setattr(train, "entropy_table", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: train.main(arguments))
    assert stop.value.code == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")


def kill_and_resume(arguments, cwd, kills, rng):
    """Starts a run, SIGKILLs it `kills` times at random moments of its training, resuming each
    time; lets it end. At least one kill must have met a run at work."""
    log, landed = cwd / "broken" / "log.jsonl", 0
    for kill in range(kills + 1):
        start = [*arguments, "--out", "broken"]
        if (cwd / "broken" / "train_args.json").exists():
            start = ["--resume", "broken"]
        before = log.stat().st_mtime_ns if log.exists() else 0
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *start], cwd=cwd,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kill < kills:
            while process.poll() is None and not (
                    log.exists() and log.stat().st_mtime_ns > before):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
        _, error = process.communicate(timeout=240)
        assert process.returncode in (0, -signal.SIGKILL), error
        landed += process.returncode == -signal.SIGKILL
    assert process.returncode == 0 and landed, error


@pytest.mark.parametrize("masking, extra, kills", [
    ("typhoon", [], 1),
    *(pytest.param(*variant, 20, marks=pytest.mark.slow) for variant in VARIANTS)])
def test_killed_at_random_moments(masking, extra, kills, corpus, tmp_path, monkeypatch):
    arguments = ["--masking", masking, "--corpus", corpus, *SMALL, "--steps", 100 * kills, *extra]
    monkeypatch.chdir(tmp_path)
    train.main([*map(str, arguments), "--out", "whole"])
    kill_and_resume(list(map(str, arguments)), tmp_path, kills, np.random.default_rng(0))
    assert weights(tmp_path / "whole") == weights(tmp_path / "broken")
    assert (tmp_path / "whole/log.jsonl").read_bytes() == \
        (tmp_path / "broken/log.jsonl").read_bytes()


def test_a_run_goes_on_with_its_own_text_and_teacher_alone(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(corpus.read_bytes())
    train.main(["--masking", "entropy", "--corpus", "text.txt", *SMALL, "--out", "run"])
    before, teachers = weights("run"), list(Path("runs").iterdir())
    Path("run/checkpoint.pt").unlink()
    train.main(["--resume", "run"])
    assert weights("run") == before and list(Path("runs").iterdir()) == teachers
    documents = corpus.read_text().split("\n\n")
    held_out = next(text for text in documents if train.draw(f"1 {text}") < train.HELD_OUT)
    for changed in (corpus.read_text().replace("cat", "dog"),
                    "\n\n".join(text for text in documents if text != held_out)):  # another exam
        Path("text.txt").write_text(changed)
        with pytest.raises(InputError, match="its corpus, vocabulary or teacher is not what it"):
            train.main(["--resume", "run"])
    Path("text.txt").write_bytes(corpus.read_bytes())
    train.main(["--corpus", "text.txt", *SMALL, "--seed", "1", "--out", "other"])
    shutil.copy("other/model.safetensors", teachers[0])
    with pytest.raises(InputError, match="its corpus, vocabulary or teacher is not what it was"):
        train.main(["--resume", "run"])


def test_a_run_that_goes_on_elsewhere_says_where_it_was_before(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", str(corpus), *SMALL, "--out", "run"])
    state = train.load(Path("run/checkpoint.pt"))
    for before, said in [("cuda, bf16", "cuda, bf16, then cpu, float32"),
                         ("cpu, float32", "cpu, float32")]:
        train.save(Path("run/checkpoint.pt"), state | {"ran_on": before})
        train.main(["--resume", "run"])
        assert json.loads(Path("run/train_args.json").read_text())["ran_on"] == said


def test_bf16_is_the_default_on_a_gpu_that_has_it_whichever_is_asked_for(monkeypatch):
    cards = {0: (7, 5), 1: (8, 0)}  # a T4, an A100
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[device.index])
    assert [train.use_bf16(torch.device(name), None) for name in ("cpu", "cuda:0", "cuda:1")] == [
        False, False, True]
    assert train.use_bf16(torch.device("cuda:0"), True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(corpus, tmp_path,
                                                                          monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = Trainer.step

    def poisoned(self, number):
        if number == 9:
            self.model.head.bias.data[7] = math.nan
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(train.RunError, match="by step 12 .* not finite: .* is in run"):
        train.main(["--corpus", str(corpus), *SMALL, "--out", "run"])
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 8
    assert not Path("run/model.safetensors").exists()


@pytest.mark.parametrize("damage", [b"", b"nonsense", "cut"])
def test_a_damaged_checkpoint_is_named(damage, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", str(corpus), *SMALL, "--out", "run"])
    path = Path("run/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:-2000] if damage == "cut" else damage)
    with pytest.raises(InputError, match="checkpoint.pt is damaged .* delete it"):
        train.main(["--resume", "run"])


# --- the exam -------------------------------------------------------------------------------------

def metrics(exam, answers):
    return train.exam_metrics(**exam.per_window(answers))


def test_frequency_alone_by_hand():
    texts = numbered_texts(n=6)
    counts = torch.zeros(60)
    counts[[10, 11]] = torch.tensor([44.0, 1.0])  # + 1 over 55 words: 45, 2 and 1 of 100
    texts.input_ids[:, 1:-1] = torch.tensor([10, 11, 12, 10, 11, 12, 10, 11, 12, 10])
    exam = train.Exam(texts, counts)
    words = torch.cat([batch.input_ids[mask] for batch, mask in exam.questions]).tolist()
    expected = np.mean([math.log({10: 0.45, 11: 0.02, 12: 0.01}[word]) for word in words])
    found = metrics(exam, exam.frequency_alone())
    assert found["log_likelihood"] == pytest.approx(expected, rel=1e-6) and len(words) > 4
    assert found["accuracy"] == pytest.approx(words.count(10) / len(words))


def test_the_exam_is_the_mean_over_fixed_positions_all_masked(model):
    texts = numbered_texts(n=70)
    exam = train.Exam(texts, texts.token_counts())
    found = metrics(exam, exam.take(model))
    losses, right = [], []
    for batch, mask in exam.questions:
        with torch.no_grad():
            logits = model.eval()(batch.input_ids.masked_fill(mask, 4))[mask]
        losses += F.cross_entropy(logits, batch.input_ids[mask], reduction="none").tolist()
        right += (logits.argmax(-1) == batch.input_ids[mask]).tolist()
    assert found["log_likelihood"] == pytest.approx(-np.mean(losses), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(right))
    again = train.Exam(texts, texts.token_counts())
    assert found == metrics(again, again.take(model))


def test_bands_by_hand_and_they_sum_up_to_the_whole(model):
    """Six types with 5, 4, 3, 2, 2, 2 of 18 held-out tokens, commonest first in the training text:
    5 | 4 | 3 2 2 2. The second type's share, 5 to 9, has its middle at 7, in the second third."""
    training, held_out = torch.tensor([60, 50, 40, 30, 20, 10]), torch.tensor([5, 4, 3, 2, 2, 2])
    assert train.frequency_bands(training, held_out).tolist() == [0, 1, 1, 2, 2, 2]
    assert train.frequency_bands(training.flip(0), held_out.flip(0)).tolist() == [2, 2, 2, 1, 1, 0]
    texts = numbered_texts(n=70)
    exam = train.Exam(texts, texts.token_counts())
    answers = exam.take(model)
    loss, right, _ = answers
    rows = exam.per_window(answers)
    assert rows["count"].shape == rows["right"].shape == (70, 3)
    assert rows["count"].sum() == len(loss) and rows["right"].sum() == right.sum()
    assert rows["log_likelihood"].sum() == pytest.approx(-loss.sum())
    found, asked = train.exam_metrics(**rows), rows["count"].sum(0)
    bands = np.array([found[name] for name in train.BANDS])
    assert found["accuracy"] == pytest.approx((bands * asked).sum() / asked.sum())
    assert (asked > asked.sum() / 4).all()


def test_a_window_counts_its_own_answers():
    """Two windows of one type each: whoever always says the first is right in the first alone."""
    texts = numbered_texts(n=2)
    texts.input_ids[0, 1:-1], texts.input_ids[1, 1:-1] = 10, 11
    counts = torch.zeros(60)
    counts[10], counts[11] = 9, 1
    exam = train.Exam(texts, counts)
    rows = exam.per_window(exam.frequency_alone())
    asked = [int(mask.sum()) for mask in exam.questions[0][1]]
    assert [sum(row) for row in rows["count"]] == asked
    assert [sum(row) for row in rows["right"]] == [asked[0], 0]
    assert rows["right"][0][0] == asked[0]  # the commoner type is in the common band


def test_the_entropy_line_by_hand():
    """Losses ranked 1 2 3 4, entropies 1 3 2 4: Spearman 1 - 6 * 2 / (4 * 15) = 0.8."""
    loss, entropy = np.array([0.1, 0.2, 0.3, 9.0]), np.array([1.0, 3.0, 2.0, 4.0])
    line = train.entropy_line(np.array([loss, np.zeros(4), entropy]))
    assert "sd 1.12 nats, Spearman with the loss 0.80" in line


# --- the teacher ----------------------------------------------------------------------------------

def test_the_teacher_and_its_tables_are_made_once(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main(["--masking", "entropy", "--corpus", str(corpus), *SMALL])
    said = capsys.readouterr().out
    assert said.count("6 --teacher-steps, 0.5 times this run's") == 1
    assert len(list(Path("runs").glob("reference-*"))) == 1
    assert weights("runs/entropy") == weights("runs/entropy_2")
    kinds = [path.name.split("-")[0] for path in Path("data/cache").iterdir()]
    assert kinds.count("entropy") == 1 and set(kinds) == {"entropy", "text"}


def test_runs_share_a_teacher_where_it_would_have_the_same_weights(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def teachers(*extra) -> int:
        train.main(["--corpus", str(corpus), *SMALL, "--steps", "2", "--teacher-steps", "2",
                    "--kd-weight", "0.5", *extra])
        return len(list(Path("runs").glob("reference-*")))

    shared = [[], ["--seed", "3", "--steps", "3", "--log-every", "1", "--masking", "entropy"],
              ["--mask-rate", "0.2", "--corruption", "1", "0", "0", "--strategy-start", "0.5"]]
    assert [teachers(*extra) for extra in shared] == [1] * 3
    others = [["--teacher-seed", "1"], ["--teacher-steps", "3"], ["--plain-start"],
              ["--dropout", "0.1"], ["--accumulate", "2"], ["--bf16"], ["--corpus-fraction", "0.9"]]
    assert [teachers(*extra) for extra in others] == list(range(2, 9))


def test_the_default_vocabulary_named_is_the_default(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--masking", "entropy", "--corpus", str(corpus), *without("--vocab-size")]
    train.main(arguments)
    train.main([*arguments, "--vocab-size", str(train.VOCAB_SIZE)])
    assert len(list(Path("runs").glob("reference-*"))) == 1


def test_the_same_command_goes_on_with_a_teacher_that_was_stopped(corpus, tmp_path, monkeypatch,
                                                                  capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--masking", "entropy", "--corpus", str(corpus), *SMALL]
    train.main([*arguments, "--out", "whole"])
    shutil.rmtree("runs")
    with monkeypatch.context() as patch:
        stop_at(3, patch, signal.SIGINT, steps=6)
        with pytest.raises(SystemExit) as stop:
            train.main([*arguments, "--out", "run"])
    assert stop.value.code == 130 and not Path("run").exists()
    assert capsys.readouterr().out.endswith("after step 4 and saved; to go on: the same command\n")
    train.main([*arguments, "--out", "run"])
    assert weights("run") == weights("whole")


def test_the_options_of_a_teachers_own_run_make_the_automatic_teacher(corpus, tmp_path,
                                                                      monkeypatch):
    """What a sweep does: `teacher_options` after a run's own options, with the seed."""
    monkeypatch.chdir(tmp_path)
    run = ["--masking", "entropy", "--kd-weight", "0.5", "--corpus", str(corpus), *SMALL]
    assert train.wants_teacher(train.parse_args(run))
    for model in ("--teacher", "--init"):
        assert not train.wants_teacher(train.parse_args(["--masking", "entropy", model, "any"]))
    assert not train.wants_teacher(train.parse_args(["--masking", "rarity"]))
    train.main(run)
    options = train.teacher_options(train.parse_args(run))
    train.main([*run, *options, "--seed", str(train.TEACHER_SEEDS), "--out", "teacher"])
    automatic, = Path("runs").glob("reference-*")
    assert weights("teacher") == weights(automatic)
    train.main([*run, "--teacher", "teacher"])  # a sweep's student; the text has no 300 word pieces
    assert load_tokenizer(Path("teacher")).get_vocab_size() < 300


@pytest.mark.parametrize("seed", [0, 1])
def test_a_teacher_starts_from_other_weights_than_its_student(corpus, seed, tmp_path, monkeypatch):
    """PyTorch draws weights from the last 32 bits of a seed, so that other seeds may be equal."""
    monkeypatch.chdir(tmp_path)
    started, fresh_model = [], train.fresh_model

    def noticed(*args):
        model = fresh_model(*args)
        started.append(model.bert.embeddings.word_embeddings.weight.detach().clone())
        return model

    monkeypatch.setattr(train, "fresh_model", noticed)
    train.main(["--masking", "entropy", "--corpus", str(corpus), *SMALL,
                "--seed", str(seed), "--teacher-seed", str(seed)])
    teacher, student = started
    correlation = torch.corrcoef(torch.stack([teacher.flatten(), student.flatten()]))[0, 1]
    assert abs(correlation) < 0.1


def test_a_student_has_its_teachers_word_pieces_and_pad(tmp_path, monkeypatch):
    """A teacher whose [PAD] is word piece 6, as some vocabularies have it."""
    monkeypatch.chdir(tmp_path)
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "sat", "[PAD]", "dog", "##s", "the", "."]
    tokenizer = wordpiece_tokenizer({word: i for i, word in enumerate(words)})
    config = BertConfig.preset("tiny", vocab_size=len(words), pad_token_id=6)
    save_pretrained(BertForMaskedLM(config), tokenizer, tmp_path / "teacher")
    lines = [" ".join("dogs" if digit == "1" else "cat" for digit in f"{i:b}") for i in range(99)]
    Path("text.txt").write_text("\n\n".join(lines))
    train.main(["--teacher", "teacher", "--kd-weight", "0.5", "--corpus", "text.txt",
                *without("--vocab-size")])
    student, pieces = load_pretrained("runs/random-kd", head="mlm")
    assert pieces.get_vocab() == load_tokenizer(tmp_path / "teacher").get_vocab()
    assert student.config.pad_token_id == pieces.token_to_id("[PAD]") == 6
    vocab = Vocab(pieces, len(words), CPU)
    ids = torch.tensor([[1, 4, 2, 6], [1, 0, 5, 2]])  # [UNK] is id 0: no padding
    batch = Texts(ids, vocab).batch(torch.tensor([0, 1]))
    assert batch.attention_mask.tolist() == [[True, True, True, False], [True] * 4]


def test_the_table_is_the_direct_computation_to_float16(model):
    texts = numbered_texts(n=70)
    table = train.entropy_table(model.eval(), texts, "visible", 0.15, bf16=False)
    with torch.no_grad():
        direct = torch.distributions.Categorical(logits=model(texts.input_ids)).entropy()
    ordinary = texts.vocab.ordinary[texts.input_ids]
    assert table.dtype == torch.float16 and (table[~ordinary] == 0).all()
    torch.testing.assert_close(table[ordinary].float(), direct[ordinary], rtol=1e-3, atol=1e-4)


# --- text -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def docs():
    """(training pieces, held-out pieces) of the default corpus."""
    return train.read_corpus(["docs"], 1.0)


def word_count(pieces):
    return sum(len(paragraph.split()) for piece in pieces for paragraph in piece)


def test_the_default_corpus_is_real_english(docs):
    training, held_out = docs
    text = " ".join(paragraph for piece in training + held_out for paragraph in piece)
    assert 200_000 < len(text.split()) < 400_000 and "\n" not in text
    assert "Return a string" in text


def test_the_exam_hardly_repeats_the_training_text(docs):
    """The share of the held-out 8-grams, words and marks, that stand in the training text too; with
    whole documents by position and paragraphs as they are it was 15%."""
    def grams(pieces):
        for piece in pieces:
            tokens = re.findall(r"\w+|[^\w\s]", " ".join(piece).lower())
            yield from zip(*(tokens[i:] for i in range(8)))

    training, held_out = docs
    known = set(grams(training))
    asked = list(grams(held_out))
    assert sum(gram in known for gram in asked) / len(asked) <= 0.08
    assert 0.06 <= word_count(held_out) / word_count(held_out + training) <= 0.12


def test_another_document_moves_no_piece():
    """Taken away, first, in the middle or last, each leaves all other pieces on their side."""
    rng = np.random.default_rng(0)
    documents = [[" ".join(map(str, rng.integers(10 ** 6, size=rng.integers(1, 300))))
                  for _ in range(rng.integers(1, 20))] for _ in range(60)]
    whole = {piece[0]: (u, piece) for u, piece in train.draw_pieces(documents)}
    assert 100 < len(whole) and 0.03 < np.mean([u < 0.1 for u, _ in whole.values()]) < 0.2
    for gone in (0, 31, 59):
        rest = train.draw_pieces(documents[:gone] + documents[gone + 1:])
        assert all(whole[piece[0]] == (u, piece) for u, piece in rest)
        assert len(rest) < len(whole)


def test_long_documents_are_cut_at_paragraphs_and_each_paragraph_is_kept_once():
    """Pieces end with the paragraph that brings them to 500 words; what stood before is dropped."""
    paragraphs = [f"{i} " * 240 for i in range(5)]  # 240 words each: three fill a piece
    pieces = train.draw_pieces([paragraphs, ["new", paragraphs[1]], [paragraphs[2]]])
    assert sorted(piece for _, piece in pieces) == sorted([paragraphs[:3], paragraphs[3:], ["new"]])


def test_documents_that_begin_alike_are_drawn_apart():
    """Front matter, say: else all of them would be held out, or none."""
    pieces = train.draw_pieces([["---", str(i)] for i in range(1000)])
    assert 0.05 < np.mean([u < 0.1 for u, _ in pieces]) < 0.15


def test_rulers_shrink_to_three_marks():
    said = "a ------ b === c ........ d ____ e aaaa f -=-=-=-= 1000000"
    (_, piece), = train.draw_pieces([[said]])
    assert piece == ["a --- b === c ... d ___ e aaaa f -=-=-=-= 1000000"]


def test_documents_and_paragraphs_of_odd_text(tmp_path):
    path = tmp_path / "odd.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n\r\n\r\nعربي 😀\x07\rlast line".encode())
    assert train.read_documents(path) == [["one", "two"], ["عربي 😀\x07", "last line"]]


def test_corpora_and_formats_mix_and_a_fraction_keeps_the_held_out_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("# a title\n\nsome text")
    Path("folder").mkdir()
    Path("folder/lines.jsonl").write_text('{"text": "one\\ntwo"}\n\n{"text": "three", "id": 3}\n')
    Path("folder/plain.txt").write_text("\n\n".join(f"text {i}" for i in range(200)))
    Path("folder/code.py").write_text("not read")
    Path("folder/old.txt").mkdir()
    training, held_out = train.read_corpus(["notes.md", "folder"], 1.0)
    found = [*training, *held_out]
    assert len(found) == 204 and 8 < len(held_out) < 40
    for document in (["# a title"], ["some text"], ["one", "two"], ["three"], ["text 9"]):
        assert document in found
    half, held_again = train.read_corpus(["notes.md", "folder"], 0.5)
    assert held_again == held_out and half == training[:math.ceil(len(training) / 2)]


def test_two_pieces_are_enough_whatever_they_draw(tmp_path):
    """Here both drew to be held out."""
    text = tmp_path / "text.txt"
    names = [str(i) for i in range(200) if train.draw(f"1 {i}") < train.HELD_OUT]
    text.write_text("\n\n".join(names[:2]))
    training, held_out = train.read_corpus([str(text)], 1.0)
    assert len(training) == len(held_out) == 1 and len(names) > 1


def test_a_fraction_takes_as_much_of_wikitext_as_of_other_text(tmp_path, monkeypatch):
    articles = [[f"wiki {i}"] for i in range(1000)]
    monkeypatch.setattr(train, "read_wikitext", lambda _: (articles, []))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"own {i}" for i in range(1000)))
    training, _ = train.read_corpus([str(text), "wikitext-2"], 0.1)
    own = sum("own" in piece[0] for piece in training)
    assert 60 < own < 120 and 60 < len(training) - own < 140


def test_wikitext_keeps_its_own_held_out_articles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    archive = Path("data/wikitext-2-raw-v1.zip")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("wikitext-2-raw/wiki.train.raw", " \n = Title = \n \n A well @-@ known "
                      "1 @,@ 000 . \n = = Section = = \n More . \n \n = Next = \n x \n")
        file.writestr("wikitext-2-raw/wiki.valid.raw", " \n = Held = \n out \n")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(train.WIKITEXT, "wikitext-2", (train.WIKITEXT["wikitext-2"][0], digest))
    training, held_out = train.read_corpus(["wikitext-2"], 1.0)
    assert sorted(training) == [["= Next =", "x"], ["= Title =", "A well-known 1,000 .",
                                                    "= = Section = =", "More ."]]
    assert held_out == [["= Held =", "out"]]


# --- tokens, windows, caches ----------------------------------------------------------------------

def test_windows_hold_every_token_in_order(english):
    tokenizer, texts = english
    assert (texts.input_ids[:, 0] == 2).all() and (texts.input_ids[:, -1] == 3).all()
    inner = texts.input_ids[:, 1:-1].flatten()[:200].tolist()
    topics = pytest.importorskip("pydoc_data.topics").topics
    first = " ".join(next(iter(topics.values())).split())
    expected = tokenizer.encode(first, add_special_tokens=False).ids
    assert inner[:min(200, len(expected))] == expected[:200]


def test_the_vocabulary_is_the_same_in_every_process(corpus):
    """The library's trainer alone orders pieces by a hash that each process seeds anew."""
    code = (f"import train; d, _ = train.read_corpus([{str(corpus)!r}], 1.0); "
            "print(sorted(train.train_tokenizer(d, 300).get_vocab().items()))")
    first, second = (subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                                    text=True, check=True) for _ in range(2))
    assert first.stdout == second.stdout and "'##e'" in first.stdout


def test_no_piece_continues_a_word_with_a_letter_that_stands_alone():
    """A Chinese character is a word of its own. Letters of words have an order, however many."""
    yi = "".join(map(chr, range(0xa000, 0xa000 + 1100)))
    vocab = train.train_tokenizer([["he 好 好 met", yi[:550], yi[550:]]], 4000).get_vocab()
    assert "好" in vocab and "##好" not in vocab and "##e" in vocab
    numbers = [vocab[f"##{letter}"] for letter in yi]
    assert numbers == sorted(numbers)


def test_a_special_token_of_the_tokenizers_own_is_no_text():
    tokenizer = train.train_tokenizer([["he met her"]], 100)
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.add_tokens(["covid19"])
    vocab = Vocab(tokenizer, tokenizer.get_vocab_size(), CPU)
    ordinary = {name: vocab.ordinary[tokenizer.token_to_id(name)].item()
                for name in ("<image>", "covid19", "[MASK]", "h")}
    assert ordinary == {"<image>": False, "covid19": True, "[MASK]": False, "h": True}
    assert tokenizer.token_to_id("<image>") in vocab.special_ids


def test_what_continues_a_word_is_known_from_the_tokenizer():
    """Some vocabularies write "@@" where BERT's writes "##"."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "tele", "@@phone", "##"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]",
                                           continuing_subword_prefix="@@"))
    assert Vocab(tokenizer, 8, CPU).continuation.tolist() == [False] * 6 + [True, False]


def test_a_text_with_the_word_pad_in_it_is_not_cut_at_its_end():
    texts = numbered_texts()
    texts.input_ids[:, 5] = 0
    batch = Texts(texts.input_ids, texts.vocab).batch(torch.tensor([0]))
    assert batch.input_ids.shape == batch.attention_mask.shape == (1, 12)
    assert not batch.attention_mask[0, 5]


def test_a_copy_of_a_corpus_is_the_same_corpus(corpus, tmp_path, monkeypatch):
    """Wherever it lies and whatever its name is; other text is not."""
    monkeypatch.chdir(tmp_path)

    def texts_kept(name: str, text: str) -> int:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
        train.main(["--corpus", name, *SMALL, "--steps", "1"])
        return len(list(Path("data/cache").iterdir()))

    text = corpus.read_text()
    assert texts_kept("a.txt", text) == texts_kept("folder/b.md", text) == 1
    assert texts_kept("a.txt", text.replace("cat", "cow")) == 2


def test_a_damaged_cache_is_named(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--corpus", str(corpus), *SMALL, "--steps", "1"]
    train.main(arguments)
    path, = Path("data/cache").iterdir()
    for damaged in (b"", b"PK\x03\x04 half a zip", path.read_bytes()[:-40]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{path} is damaged \(.*\): delete it"):
            train.main(arguments)


# --- ranks and devices ----------------------------------------------------------------------------

TWO_RANKS = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
import train
from test_train import metrics, numbered_texts, trainer
from model import BertConfig, BertForMaskedLM
if train.world_size() > 1:
    dist.init_process_group("gloo")
for name in ("whole-word", "typhoon"):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24, max_position_embeddings=40,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    texts = numbered_texts(n=48)
    one = trainer(model, texts, name, accumulate=2, corruption=(1, 0, 0), steps=20, lr=1e-4)
    for step in range(20):
        draws = torch.rand(texts.input_ids.shape, generator=torch.Generator().manual_seed(step))
        one.strategy.mask = lambda batch, generator: (draws < 0.3)[batch.index] & batch.maskable
        results = one.step(step)
    exam = train.Exam(texts, texts.token_counts())
    exam = metrics(exam, exam.take(model))
    torch.save({{"model": model.state_dict(), "strategy": one.strategy.state_dict(), "exam": exam,
                "results": results}},
               f"{out}-{{name}}-{{train.world_size()}}-{{train.rank()}}.pt")
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What TWO_RANKS leaves as one process and as two: 20 steps of 8 texts in two micro-batches,
    the same masks, for two strategies."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    script = out.with_name("script.py")
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(out)))
    runpy.run_path(str(script))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", script], check=True, timeout=120, capture_output=True)
    return out


@pytest.mark.parametrize("name", ["whole-word", "typhoon"])
def test_two_ranks_give_the_weights_of_one(name, two_ranks):
    """To 1e-6, Typhoon's state on every rank included."""
    one, first, second = (torch.load(f"{two_ranks}-{name}-{which}.pt")
                          for which in ("1-0", "2-0", "2-1"))
    for key in one["model"]:
        torch.testing.assert_close(first["model"][key], one["model"][key], atol=1e-6, rtol=1e-6)
        assert torch.equal(first["model"][key], second["model"][key])
    for key in one["strategy"]:
        ours, theirs = first["strategy"][key], second["strategy"][key]
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, one["strategy"][key], atol=1e-6, rtol=1e-5)
    assert first["exam"] == second["exam"]
    # Adam's step is blind to the gradient's size, its norm is not: what is averaged is the sum.
    torch.testing.assert_close(first["results"], one["results"], atol=1e-6, rtol=1e-5)
    assert first["exam"] == pytest.approx(one["exam"], rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_main_job_runs_on_cuda(corpus, tmp_path):
    arguments = ["--masking", "entropy", "--corpus", str(corpus), *without("--device"), "--device",
                 "cuda"]
    assert train.parse_args(arguments).device == "cuda"
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and "this model (entropy)" in done.stdout, done.stderr
    assert "masked, on cuda" in done.stdout and "teacher" in done.stdout


def test_of_a_device_that_is_not_there_the_first_line_is_quoted(monkeypatch):
    """CUDA's errors go on with advice for its programmers."""
    def fail(*_, **__):
        raise RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range.")

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(InputError, match=r"here \(CUDA error: invalid device ordinal\): choose"):
        train.pick_device("cuda:99")


# --- the command line -----------------------------------------------------------------------------

def test_every_option_stands_in_the_help_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "share of the tokens masked (default: 0.3)" in said
    args = train.parse_args([])
    assert all(f"--{name.replace('_', '-')}" in said for name in vars(args))
    assert args.mask_rate == 0.3 and args.corruption == [0.8, 0.1, 0.1] and args.bf16 is None
    assert train.parse_args(["--no-bf16", "--corruption", "1", "0", "0"]).corruption == [1, 0, 0]


def test_the_shared_options_take_other_defaults():
    parser = train.Parser()
    train.add_options(parser.add_argument, train.Masking, corruption=[1.0, 0.0, 0.0])
    args = parser.parse_args(["--typhoon-ema", "0.5"])
    assert vars(args) == {"mask_rate": 0.3, "corruption": [1.0, 0.0, 0.0], "entropy_select": None,
                          "entropy_input": "masked", "typhoon_spread": 0.4, "typhoon_ema": 0.5}


def test_resuming_takes_the_runs_own_options_and_a_device(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", str(corpus), *SMALL, "--out", "run"])
    args = train.parse_args(["--resume", "run", "--device", "auto"])
    assert (args.steps, args.vocab_size, args.out, args.device) == (12, 300, "run", "auto")
    with pytest.raises(InputError, match="drop --steps, or start a new run with --init run"):
        train.parse_args(["--resume", "run", "--steps", "12"])
