"""The loop: what a step computes, what a run leaves behind, and that an interrupted run ends as an unbroken one."""
import contextlib
import copy
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from masking import STRATEGIES, Context, Strategy, random_mask, top_k
from model import (SPECIAL_TOKENS, BertConfig, BertForMaskedLM, InputError, load_pretrained,
                   load_tokenizer, save_pretrained, weights_digest, wordpiece_tokenizer)
from torch.nn import functional as F
from train import Recipe, Texts, Trainer, Vocab

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = ["--preset", "tiny", "--vocab-size", "300", "--seq-len", "16", "--batch-size", "8", "--steps", "12", "--device",
         "cpu", "--log-every", "3", "--save-every", "4", "--eval-every", "6", "--teacher-steps", "6"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A file of 400 short documents."""
    path, rng = tmp_path_factory.mktemp("corpus") / "text.txt", np.random.default_rng(0)
    words = ["the", "cat", "dog", "sat", "on", "a", "mat", "and", "ran", "unbelievably", "quickly", "home", "."]
    path.write_text("\n\n".join(" ".join(rng.choice(words, 20)) for _ in range(400)), encoding="utf-8")
    return path


def command(*arguments, cwd, **options):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True, timeout=300, **options)


def weights(run):
    return (Path(run) / "model.safetensors").read_bytes()


# --- the step -------------------------------------------------------------------------------------

def trainer(model, texts, name="random", **numbers):
    context = Context(0.3, model, texts.token_counts(), texts.vocab.continuation, texts.vocab.mask_id,
                      torch.rand(texts.input_ids.shape, generator=torch.Generator().manual_seed(0)))
    recipe = Recipe(**{"steps": 10, "batch_size": 8, "lr": 1e-3, **numbers})
    return Trainer(model, texts, STRATEGIES[name](context), recipe)


def numbered_texts(n=24, L=12, seed=0):
    class Pieces:
        id_to_token = staticmethod(lambda i: ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"][i] if i < 5 else f"w{i}")
        token_to_id = staticmethod({"[PAD]": 0, "[MASK]": 4}.get)

    ids = torch.randint(5, 60, (n, L), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = 2, 3
    return Texts(ids, Vocab(Pieces, 60, CPU))


def test_a_text_with_the_word_pad_in_it_is_not_cut_at_its_end():
    texts = numbered_texts()
    texts.input_ids[:, 5] = 0
    batch = Texts(texts.input_ids, texts.vocab).batch(torch.tensor([0]))
    assert batch.input_ids.shape == batch.attention_mask.shape == (1, 12) and not batch.attention_mask[0, 5]


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
    matrices = [p for n, p in twin.named_parameters() if n.endswith("weight") and "norm" not in n.lower()]
    rest = [p for p in twin.parameters() if all(p is not m for m in matrices)]
    torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                      lr=1e-3 / 5, betas=(0.9, 0.98), eps=1e-6).step()  # the first of five warm-up steps
    assert stats.tolist() == pytest.approx([loss.item(), norm.item(), chosen.sum().item(), 8 * 10], rel=1e-5)
    for (name, ours_now), theirs in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(ours_now, theirs, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["whole-word", "typhoon"])
def test_accumulation_changes_nothing_though_micro_batches_hold_different_numbers(name, model):
    texts, runs = numbered_texts(), []
    masks = torch.rand(4, *texts.input_ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    for accumulate in (1, 4):
        one = trainer(copy.deepcopy(model), texts, name, accumulate=accumulate, corruption=(1, 0, 0), lr=1e-4)
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
        one = trainer(copy.deepcopy(model), texts, "typhoon", accumulate=accumulate, corruption=(1, 0, 0), lr=1e-4)
        first = one.text_numbers(0)[0][0]
        one.strategy.mask = lambda batch, generator: batch.maskable & (batch.index == first)[:, None]
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
    """observe's `hidden` is what the model did not see: kept tokens are chosen, yet visible."""
    texts = numbered_texts(n=200)
    one = trainer(model, texts, "typhoon", corruption=(0.3, 0.4, 0.3), batch_size=200)
    read, observed = corrupted_text(one, monkeypatch), []
    monkeypatch.setattr(one.strategy, "observe", lambda *given: observed.append(given))
    masks = []
    draw = one.strategy.mask
    monkeypatch.setattr(one.strategy, "mask", lambda *given: masks.append(draw(*given)) or masks[0])
    one.step(0)
    (batch, hidden, gradient), mask, corrupted = observed[0], masks[0], read[0]
    assert torch.equal(hidden, corrupted != batch.input_ids) and gradient.abs().sum() > 0
    assert (mask & ~hidden).sum() > 100 and not (hidden & ~mask).any()
    swapped = corrupted[hidden & (corrupted != 4)]
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
    one.teacher = lambda *args, **kwargs: calls.append(("teacher", now)) or model(*args, **kwargs).detach()
    masked = one.strategy.mask
    one.strategy.mask = lambda batch, generator: calls.append(("strategy", now)) or masked(batch, generator)
    for now in range(10):
        one.step(now)
    assert [now for who, now in calls if who == "strategy"] == [5, 6, 7, 8, 9]
    assert [now for who, now in calls if who == "teacher"] == [7, 8, 9]


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


# --- text -----------------------------------------------------------------------------------------

def test_the_default_corpus_is_real_english():
    documents = train.python_docs()
    text = " ".join(paragraph for document in documents for paragraph in document)
    assert len(documents) > 300 and 1_000_000 < len(text) < 4_000_000
    assert "Return a string" in text and "\n" not in text


def test_documents_paragraphs_and_odd_text(tmp_path):
    path = tmp_path / "odd.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n\r\n\r\nعربي 😀\x07\rlast\u2028line".encode())
    assert [d for d in train.read_documents(path) if d] == [["one", "two"], ["عربي 😀\x07", "last\u2028line"]]


def test_wikitext_titles_begin_documents(tmp_path):
    path = tmp_path / "wiki.train.raw"
    path.write_text(" \n = Title = \n \n A well @-@ known 1 @,@ 000 . \n = = Section = = \n More . \n \n = Next = \n x \n")
    documents = [d for d in train.read_documents(path) if d]
    assert documents == [["= Title =", "A well-known 1,000 .", "= = Section = =", "More ."], ["= Next =", "x"]]


def test_windows_hold_every_token_in_order(english):
    tokenizer, texts = english
    assert (texts.input_ids[:, 0] == 2).all() and (texts.input_ids[:, -1] == 3).all()
    inner = texts.input_ids[:, 1:-1].flatten()[:200].tolist()
    topics = pytest.importorskip("pydoc_data.topics").topics
    first = " ".join(next(iter(topics.values())).split())
    expected = tokenizer.encode(first, add_special_tokens=False).ids
    assert inner[:min(200, len(expected))] == expected[:200]


def test_the_vocabulary_is_the_same_in_every_process(tmp_path):
    """The library's trainer alone orders pieces by a hash that each process seeds anew."""
    code = ("import train; d, _ = train.read_corpus(['docs'], 0.1); "
            "print(sorted(train.train_tokenizer(d, 600).get_vocab().items()))")
    first, second = (subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
                     for _ in range(2))
    assert first.stdout == second.stdout and "'##e'" in first.stdout


def test_fraction_keeps_the_held_out_documents(corpus):
    whole, held = train.read_corpus([str(corpus)], 1.0)
    half, held_again = train.read_corpus([str(corpus)], 0.5)
    assert len(whole) == 380 and len(held) == 20 and len(half) == 190 and held == held_again
    assert half == whole[:190]


def test_a_damaged_cache_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CACHE", tmp_path)
    built = []
    for damage in (None, b"", b"PK\x03\x04 half a zip", "cut"):
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:-40] if damage == "cut" else damage)
        got = train.cached("x", ["key"], lambda: built.append(1) or {"a": np.arange(9)})
        assert got["a"].tolist() == list(range(9))
    assert len(built) == 4
    train.cached("x", ["key"], lambda: pytest.fail("the cache was there"))


# --- the entropy table and the exam ---------------------------------------------------------------

def test_the_table_is_the_direct_computation_to_float16(model):
    texts = numbered_texts(n=70)
    table = train.entropy_table(model.eval(), texts, "visible", 0.15, bf16=False)
    with torch.no_grad():
        direct = torch.distributions.Categorical(logits=model(texts.input_ids)).entropy()
    ordinary = texts.vocab.ordinary[texts.input_ids]
    assert table.dtype == torch.float16 and (table[~ordinary] == 0).all()
    torch.testing.assert_close(table[ordinary].float(), direct[ordinary], rtol=1e-3, atol=1e-4)


def test_frequency_alone_by_hand():
    texts = numbered_texts(n=6)
    counts = torch.zeros(60)
    counts[[10, 11]] = torch.tensor([44.0, 1.0])  # + 1 each over 55 words: 45 / 100, 2 / 100, 1 / 100
    texts.input_ids[:, 1:-1] = torch.tensor([10, 11, 12, 10, 11, 12, 10, 11, 12, 10])
    exam = train.Exam(texts, counts)
    words = torch.cat([batch.input_ids[mask] for batch, mask in exam.questions]).tolist()
    expected = np.mean([math.log({10: 0.45, 11: 0.02, 12: 0.01}[word]) for word in words])
    metrics = exam.metrics(exam.frequency_alone())
    assert metrics["log_likelihood"] == pytest.approx(expected, rel=1e-6) and len(words) > 4
    assert metrics["accuracy"] == pytest.approx(words.count(10) / len(words))


def test_the_exam_is_the_mean_over_fixed_positions_all_masked(model):
    texts = numbered_texts(n=70)
    exam = train.Exam(texts, texts.token_counts())
    metrics = exam.metrics(exam.take(model))
    losses, right = [], []
    for batch, mask in exam.questions:
        with torch.no_grad():
            logits = model.eval()(batch.input_ids.masked_fill(mask, 4))[mask]
        losses += F.cross_entropy(logits, batch.input_ids[mask], reduction="none").tolist()
        right += (logits.argmax(-1) == batch.input_ids[mask]).tolist()
    assert metrics["log_likelihood"] == pytest.approx(-np.mean(losses), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean(right))
    again = train.Exam(texts, texts.token_counts())
    assert metrics == again.metrics(again.take(model))


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
    metrics, asked = train.exam_metrics(**rows), rows["count"].sum(0)
    bands = np.array([metrics[name] for name in train.BANDS])
    assert metrics["accuracy"] == pytest.approx((bands * asked).sum() / asked.sum())
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


# --- whole runs -----------------------------------------------------------------------------------

@pytest.mark.parametrize("extra", [[], ["--kd-weight", "0.5"]], ids=["plain", "kd"])
@pytest.mark.parametrize("masking", STRATEGIES)
def test_every_strategy_trains_with_and_without_distillation(masking, extra, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--masking", masking, "--corpus", str(corpus), *SMALL, *extra])
    run = tmp_path / "runs" / (masking + ("-kd" if extra else ""))
    said = capsys.readouterr().out
    assert "word-piece frequency alone" in said and f"this model ({masking})" in said and "[MASK]" in said
    assert ("the teacher" in said) == (masking == "entropy" or bool(extra))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in log if "exam" in line] == [6, 12]
    model, tokenizer = load_pretrained(run, head="mlm")
    assert tokenizer.get_vocab_size() == model.config.vocab_size
    settings = json.loads((run / "train_args.json").read_text())
    assert settings["masking"] == masking and settings["versions"]["torch"] == torch.__version__


def test_the_teacher_and_its_tables_are_made_once(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main(["--masking", "entropy", "--corpus", str(corpus), *SMALL])
    assert len(list((tmp_path / "runs").glob("reference-*"))) == 1
    assert weights("runs/entropy") == weights("runs/entropy_2")
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "data/cache").iterdir()) == \
        ["entropy", "vocabulary", "windows"]


def test_a_resumed_run_keeps_its_teacher(corpus, tmp_path, monkeypatch):
    """An automatic teacher's name holds what decides the corpus, Python's version say, and that may change."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(corpus.read_bytes())
    train.main(["--masking", "entropy", "--corpus", "text.txt", *SMALL])
    before = weights("runs/entropy")
    monkeypatch.setattr(train, "corpus_state", lambda names: ["another Python"])
    Path("runs/entropy/checkpoint.pt").unlink()
    train.main(["--resume", "runs/entropy"])
    assert weights("runs/entropy") == before and len(list(Path("runs").iterdir())) == 2


def test_reference_files_open_the_run(corpus, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", str(corpus), *SMALL])
    theirs = transformers.AutoModelForMaskedLM.from_pretrained("runs/random").eval()
    ours, tokenizer = load_pretrained("runs/random", head="mlm")
    ids = torch.tensor([tokenizer.encode("the cat sat").ids])
    assert transformers.AutoTokenizer.from_pretrained("runs/random")("the cat sat")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.eval()(ids), atol=1e-5, rtol=1e-5)


def test_training_from_a_model_and_to_a_teacher_of_another_kind(tmp_path, monkeypatch, corpus, caplog):
    """--init takes a DistilBERT; its recorded vocabulary knows none of the words, so the text is made of w0, w1 ..."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "numbers.txt"
    path.write_text("\n\n".join(" ".join(f"w{i * j % 50}" for i in range(60)) for j in range(1, 80)))
    reference = Path(__file__).parent / "data" / "reference"
    arguments = [a for a in SMALL if a not in ("--preset", "tiny", "--vocab-size", "300")]
    train.main(["--corpus", str(path), *arguments, "--init", str(reference / "distilbert-mlm"), "--teacher",
                str(reference / "bert-mlm"), "--kd-weight", "1"])
    model, _ = load_pretrained("runs/random-kd", head="mlm")
    assert model.config.model_type == "distilbert"


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


def test_a_run_leaves_its_exam_its_provenance_and_its_times(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--masking", "entropy", "--corpus", str(corpus), *SMALL, "--steps", "30",
                "--kd-weight", "0.5"])
    record = json.loads(Path("runs/entropy-kd/exam.json").read_text())
    settings = json.loads(Path("runs/entropy-kd/train_args.json").read_text())
    assert record["task"] == "mlm" and record["strategy"] == "entropy-kd"
    assert record["pattern"] is None
    assert record["model"] == "runs/entropy-kd"
    assert record["args"] == record["pretraining"] == settings
    assert settings["teacher_weights"] == weights_digest(settings["teacher_dir"])
    assert settings["ranks"] == 1 and 0.29 < record["masked"] < 0.31
    assert record["last"].keys() == record["baseline"].keys() == {
        "accuracy", "common", "middle", "rare", "log_likelihood"}
    rows = {name: np.array(part) for name, part in record["dev"].items()}
    assert train.exam_metrics(**rows) == record["last"]
    text = Path("runs/entropy-kd/timing.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == list(range(3, 31, 3))
    assert all(line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    assert "cpu" in lines[0]["device"]


def test_a_default_run_sits_ten_exams_and_its_log_holds_numbers(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = list(SMALL)
    del arguments[arguments.index("--eval-every"):arguments.index("--eval-every") + 2]
    train.main(["--corpus", str(corpus), *arguments, "--steps", "25", "--out", "run"])
    text = Path("run/log.jsonl").read_text()
    exams = [json.loads(line)["step"] for line in text.splitlines() if "exam" in line]
    assert exams == [*range(2, 25, 2), 25] and "null" not in text and "NaN" not in text


def test_fresh_models_get_the_local_start_unless_told_otherwise(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(train, "local_start", started.append)
    for extra in ([], ["--plain-start"], ["--init", "runs/random"]):
        train.main(["--corpus", str(corpus), *SMALL[:2], *SMALL[4:], *extra])
    assert len(started) == 1


def test_a_run_worse_than_frequency_alone_says_so(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", str(corpus), *SMALL, "--lr", "10"])
    said = capsys.readouterr().out
    assert "worse than guessing by frequency alone" in said and "lower --lr" in said
    Path("text.txt").write_text("the cat sat on the mat .\n\n" * 200)
    train.main(["--corpus", "text.txt", *SMALL[:2], *SMALL[4:], "--steps", "60"])
    assert "worse than guessing" not in capsys.readouterr().out


def test_a_named_corpus_files_and_formats_mix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "python_docs", lambda: [[f"doc {i}"] for i in range(40)])
    Path("notes.md").write_text("# a title\n\nsome text")
    Path("folder").mkdir()
    Path("folder/lines.jsonl").write_text('{"text": "one\\ntwo"}\n\n{"text": "three", "id": 3}\n')
    Path("folder/plain.txt").write_text("four")
    training, held_out = train.read_corpus(["docs", "notes.md", "folder"], 1.0)
    found = [*training, *held_out]
    assert len(found) == 45 and len(held_out) == 3
    for document in (["doc 0"], ["# a title"], ["some text"], ["one", "two"], ["three"], ["four"]):
        assert document in found


# --- the automatic teacher ------------------------------------------------------------------------

def test_the_teachers_own_tokenizer_is_the_students(corpus, tmp_path, monkeypatch):
    """runs/ is kept, data/cache is lost, and another version of the library trains another
    vocabulary: the same size, other numbers."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--masking", "entropy", "--corpus", str(corpus), *SMALL]
    train.main(arguments)
    shutil.rmtree("data")
    trained = train.train_tokenizer

    def other_numbers(documents, size):
        vocab = trained(documents, size).get_vocab()
        ordinary = sorted(piece for piece in vocab if piece not in SPECIAL_TOKENS)
        ids = sorted(vocab[piece] for piece in ordinary)
        renumbered = dict(zip(ordinary, ids[1:] + ids[:1]))
        return wordpiece_tokenizer({token: vocab[token] for token in SPECIAL_TOKENS} | renumbered)

    monkeypatch.setattr(train, "train_tokenizer", other_numbers)
    train.main(arguments)
    teacher_dir, = Path("runs").glob("reference-*")
    teacher, student = (load_tokenizer(path) for path in (teacher_dir, Path("runs/entropy_2")))
    assert teacher.get_vocab() == student.get_vocab()
    assert weights("runs/entropy") == weights("runs/entropy_2")


def test_all_that_decides_the_teachers_weights_is_in_its_name(corpus, monkeypatch):
    def name(*extra):
        args = train.parse_args(["--masking", "entropy", "--corpus", str(corpus), *SMALL, *extra])
        return train.teacher_args(args).out

    same = [name(), name("--seed", "3"), name("--mask-rate", "0.3"), name("--kd-weight", "1"),
            name("--steps", "99"), name("--log-every", "1")]
    others = [name("--accumulate", "2"), name("--bf16"), name("--teacher-seed", "1"),
              name("--plain-start"), name("--teacher-steps", "7"), name("--dropout", "0.1")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    others.append(name())
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(train, "pick_device", lambda _: torch.device("mps"))
    others.append(name())
    assert len(set(same)) == 1 and len({same[0], *others}) == 1 + len(others)


def test_a_copy_of_a_corpus_is_the_same_corpus(tmp_path):
    """Wherever it lies and whenever it was written; other text of the same length and time is not."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("one two\n")
    (tmp_path / "there" / "a.txt").rename(tmp_path / "there" / "b.txt")
    os.utime(tmp_path / "there" / "b.txt", (0, 0))
    here, there = (train.corpus_state([str(tmp_path / name)]) for name in ("here", "there"))
    assert here == there
    (tmp_path / "there" / "b.txt").write_text("one six\n")
    os.utime(tmp_path / "there" / "b.txt", (0, 0))
    assert train.corpus_state([str(tmp_path / "there")]) != here
    (tmp_path / "here" / "a.txt").rename(tmp_path / "here" / "a.jsonl")  # is read in another way
    assert train.corpus_state([str(tmp_path / "here")]) != here


def test_the_entropy_tables_name_holds_precision_and_device(model, tmp_path, monkeypatch):
    texts, keys = numbered_texts(), []
    args = train.parse_args([])
    monkeypatch.setattr(train, "cached", lambda kind, key, build: keys.append(key) or build())
    for bf16 in (False, True):
        train.cached_entropies(model, "digest", texts, args, bf16)
    assert keys[0] != keys[1] and all("cpu" in key and "digest" in key for key in keys)


def test_another_teacher_seed_is_another_teacher(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--masking", "entropy", "--corpus", str(corpus), *SMALL]
    for seed in ("0", "1"):
        train.main([*arguments, "--teacher-seed", seed])
    first, second = Path("runs").glob("reference-*")
    assert weights(first) != weights(second)


def test_the_teachers_price_is_said_and_ctrl_c_names_the_command_that_was_given(
        corpus, tmp_path, monkeypatch, capsys):
    """The same command goes on with the teacher where it stopped, and then does what it says."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--masking", "entropy", "--corpus", str(corpus), *SMALL]
    train.main([*arguments, "--out", "whole"])
    assert "6 steps, 0.5 times this run's own 12" in capsys.readouterr().out
    shutil.rmtree("runs")
    step, steps = Trainer.step, []

    def stopping(self, number):
        steps.append(number)
        if number == 3 and len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments, "--out", "my run"])
    said = capsys.readouterr().out
    assert stop.value.code == 130 and not Path("my run").exists()
    assert said.rstrip().endswith(f"python train.py {shlex.join([*arguments, '--out', 'my run'])}")
    train.main(shlex.split(said.rstrip().split("train.py ")[-1]))
    assert steps == [*range(6), *range(12)]
    assert weights("my run") == weights("whole")


def test_a_student_has_its_tokenizers_pad(tmp_path, monkeypatch):
    """A teacher whose [PAD] is word piece 6, as some vocabularies have it."""
    monkeypatch.chdir(tmp_path)
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "sat", "[PAD]", "dog", "##s", "the", "."]
    tokenizer = wordpiece_tokenizer({word: i for i, word in enumerate(words)})
    config = BertConfig.preset("tiny", vocab_size=len(words), pad_token_id=6)
    save_pretrained(BertForMaskedLM(config), tokenizer, tmp_path / "teacher")
    Path("text.txt").write_text("the cat sat .\n\nthe dogs sat .\n\n" * 100)
    train.main(["--teacher", "teacher", "--kd-weight", "0.5", "--corpus", "text.txt", *SMALL[:2],
                *SMALL[4:]])
    student, pieces = load_pretrained("runs/random-kd", head="mlm")
    assert student.config.pad_token_id == pieces.token_to_id("[PAD]") == 6
    vocab = Vocab(pieces, len(words), CPU)
    ids = torch.tensor([[1, 4, 2, 6], [1, 0, 5, 2]])  # [UNK] is id 0: no padding
    batch = Texts(ids, vocab).batch(torch.tensor([0, 1]))
    assert batch.attention_mask.tolist() == [[True, True, True, False], [True] * 4]


# --- interrupted runs -----------------------------------------------------------------------------

VARIANTS = [("random", []), ("whole-word", ["--accumulate", "2"]), ("entropy", ["--entropy-select", "sample"]),
            ("self-entropy", ["--dropout", "0.1"]), ("typhoon", ["--kd-weight", "0.5", "--accumulate", "2"])]


@pytest.mark.parametrize("masking, extra", VARIANTS, ids=[v[0] for v in VARIANTS])
def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(masking, extra, corpus, tmp_path, monkeypatch):
    """Stopped by a signal after step 5, between two saves and between two log lines."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--masking", masking, "--corpus", str(corpus), *SMALL, *extra]
    train.main([*arguments, "--out", "whole"])
    step = Trainer.step

    def stopping(self, number):
        if number == 4 and self.recipe.steps == 12:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments, "--out", "broken"])
    assert stop.value.code == 143
    monkeypatch.setattr(Trainer, "step", step)
    train.main(["--resume", "broken"])
    assert weights("whole") == weights("broken")
    assert Path("whole/log.jsonl").read_bytes() == Path("broken/log.jsonl").read_bytes()
    steps = [json.loads(line)["step"] for line in open("broken/timing.jsonl", encoding="utf-8")]
    assert steps == [3, 6, 9, 12]


def test_resuming_cuts_both_logs_back_to_the_checkpoint(model, tmp_path):
    made_from = {"windows": "a", "teacher_weights": None}
    (tmp_path / "train_args.json").write_text(json.dumps(made_from))
    one = trainer(model, numbered_texts())
    for step in (1, 2):
        for name in ("log.jsonl", "timing.jsonl"):
            train.append_line(tmp_path / name, step=step)
        if step == 1:
            train.save(tmp_path, one, step=step)
    assert train.restore(tmp_path, one, made_from)["step"] == 1
    for name in ("log.jsonl", "timing.jsonl"):
        assert (tmp_path / name).read_text() == '{"step": 1}\n'
    with pytest.raises(InputError, match="the teacher is not the one"):
        train.restore(tmp_path, one, made_from | {"teacher_weights": "another"})


def test_the_command_that_goes_on_is_said_last(corpus, tmp_path, monkeypatch):
    """Under torchrun, after the ranks have parted."""
    monkeypatch.chdir(tmp_path)
    said = []

    @contextlib.contextmanager
    def ranks(device):
        try:
            yield
        finally:
            said.append("parted")

    monkeypatch.setattr(train, "connected_ranks", ranks)
    monkeypatch.setattr(train, "say", said.append)
    monkeypatch.setattr(Trainer, "step", lambda *_: signal.raise_signal(signal.SIGINT) or
                        torch.ones(4))
    with pytest.raises(SystemExit):
        train.main(["--corpus", str(corpus), *SMALL, "--out", "run"])
    assert said[-2] == "parted" and said[-1].endswith("python train.py --resume run")


@pytest.mark.parametrize("name, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_names_the_command_that_goes_on(name, status, corpus, tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--corpus", str(corpus), *SMALL, "--steps", "100000",
                                "--out", "run"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(name)
    out, error = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in error
    assert "python train.py --resume run" in out
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 4


def kill_and_resume(arguments, cwd, kills, rng):
    """Starts a run, SIGKILLs it `kills` times at random moments of its training, resuming each time; lets it end."""
    log = cwd / "broken" / "log.jsonl"
    for kill in range(kills + 1):
        start = ["--resume", "broken"] if (cwd / "broken" / "train_args.json").exists() else [*arguments, "--out", "broken"]
        before = log.stat().st_mtime_ns if log.exists() else 0
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *start], cwd=cwd, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        if kill < kills:
            while process.poll() is None and not (log.exists() and log.stat().st_mtime_ns > before):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        _, error = process.communicate(timeout=240)
        assert process.returncode in (0, -signal.SIGKILL), error
    assert process.returncode == 0, error


@pytest.mark.parametrize("masking, extra, kills", [
    ("typhoon", [], 2), *(pytest.param(*variant, 20, marks=pytest.mark.slow) for variant in VARIANTS)])
def test_killed_at_random_moments(masking, extra, kills, corpus, tmp_path):
    arguments = ["--masking", masking, "--corpus", corpus, *SMALL, "--steps", str(100 * kills), *extra]
    whole = command(*arguments, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    kill_and_resume(list(map(str, arguments)), tmp_path, kills, np.random.default_rng(0))
    assert weights(tmp_path / "whole") == weights(tmp_path / "broken")
    assert (tmp_path / "whole/log.jsonl").read_bytes() == (tmp_path / "broken/log.jsonl").read_bytes()


def test_resuming_with_other_arguments_names_the_argument(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", str(corpus), *SMALL, "--out", "run"])
    with pytest.raises(InputError, match="--lr is 0.1, but run was started with 0.002"):
        train.parse_args(["--resume", "run", "--lr", "0.1"])
    args = train.parse_args(["--resume", "run", "--steps", "12", "--log-every", "7"])
    assert (args.steps, args.log_every, args.vocab_size) == (12, 7, 300)


def test_resuming_on_another_corpus_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(corpus.read_bytes())
    train.main(["--corpus", "text.txt", *SMALL, "--out", "run"])
    Path("text.txt").write_text(corpus.read_text().replace("cat", "dog"))
    with pytest.raises(InputError, match="corpus or its vocabulary is not the one"):
        train.main(["--resume", "run"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = Trainer.step

    def poisoned(self, number):
        if number == 9:
            self.model.head.bias.data[7] = math.nan
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(train.RunError, match="step 10: .* last good checkpoint is kept in run"):
        train.main(["--corpus", str(corpus), *SMALL, "--out", "run"])
    with pytest.raises(train.RunError, match="step 10: .* No checkpoint had been saved yet"):
        train.main(["--corpus", str(corpus), *SMALL, "--save-every", "99", "--out", "other"])
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 8
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 10, "error": "the loss or its gradient is not finite"}
    assert not Path("run/model.safetensors").exists()


@pytest.mark.parametrize("damage", [b"", b"nonsense", "cut"])
def test_a_damaged_checkpoint_is_named(damage, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", str(corpus), *SMALL, "--out", "run"])
    path = Path("run/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:-2000] if damage == "cut" else damage)
    with pytest.raises(InputError, match="checkpoint.pt is damaged .* delete it"):
        train.main(["--resume", "run"])


# --- data-parallel --------------------------------------------------------------------------------

TWO_RANKS = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
import train
from test_train import numbered_texts, trainer
from model import BertConfig, BertForMaskedLM
if train.world_size() > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
model = BertForMaskedLM(BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
texts = numbered_texts(n=48)
one = trainer(model, texts, {name!r}, accumulate=2, corruption=(1, 0, 0), steps=20, lr=1e-4)
for step in range(20):
    fixed = torch.rand(texts.input_ids.shape, generator=torch.Generator().manual_seed(step)) < 0.3
    one.strategy.mask = lambda batch, generator: fixed[batch.index] & batch.maskable
    results = one.step(step)
exam = train.Exam(texts, texts.token_counts())
exam = exam.metrics(exam.take(model))
torch.save({{"model": model.state_dict(), "strategy": one.strategy.state_dict(), "exam": exam,
            "results": results}},
           f"{out}-{{train.world_size()}}-{{train.rank()}}.pt")
"""


@pytest.mark.parametrize("name", ["whole-word", "typhoon"])
def test_two_ranks_give_the_weights_of_one(name, tmp_path):
    """20 steps of 8 texts in two micro-batches, the same masks: 1e-6, Typhoon's state on every rank included."""
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), name=name, out=str(tmp_path / "out")))
    subprocess.run([sys.executable, script], check=True, timeout=120)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script],
                   check=True, timeout=120, capture_output=True)
    one, first, second = (torch.load(tmp_path / f"out-{which}.pt") for which in ("1-0", "2-0", "2-1"))
    for key in one["model"]:
        torch.testing.assert_close(first["model"][key], one["model"][key], atol=1e-6, rtol=1e-6)
        assert torch.equal(first["model"][key], second["model"][key])
    for key in one["strategy"]:
        assert torch.equal(first["strategy"][key], second["strategy"][key])
        torch.testing.assert_close(first["strategy"][key], one["strategy"][key], atol=1e-6, rtol=1e-5)
    assert first["exam"] == second["exam"]
    # Adam's step is blind to the gradient's size, its norm is not: what is averaged is the sum.
    torch.testing.assert_close(first["results"], one["results"], atol=1e-6, rtol=1e-5)
    assert first["exam"] == pytest.approx(one["exam"], rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_main_job_runs_on_cuda(corpus, tmp_path):
    done = command("--masking", "entropy", "--device", "cuda", "--corpus", corpus, *SMALL[:-6], cwd=tmp_path)
    assert done.returncode == 0 and "this model (entropy)" in done.stdout, done.stderr
