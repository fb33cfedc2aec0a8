"""A rehearsal on a GPU that is not there: the CPU's numbers, no mix-up of devices, and few waits.

What a wait costs is the work that the GPU could have had meanwhile. An optimizer step may wait once
a micro-batch, for the number of masked tokens is a shape, and self-entropy once more, for its
candidates."""
import json
import signal
from collections import defaultdict
from pathlib import Path

import glue
import numpy as np
import pytest
import torch
import train
from masking import STRATEGIES, Context
from model import (BertConfig, BertForMaskedLM, load_pretrained, save_pretrained,
                   wordpiece_tokenizer)
from pretend_gpu import CPU, CUDA, pretended_gpu, waits
from torch.optim.optimizer import register_optimizer_step_post_hook
from train import Recipe, Texts, Trainer, Vocab

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the cat dog sat on a mat and ran so quick ##ly home . good bad".split()


@pytest.fixture
def tokenizer():
    return wordpiece_tokenizer({word: i for i, word in enumerate(SPECIAL + WORDS)})


@pytest.fixture
def optimizer_steps():
    """What `waits` held after each step, by optimizer."""
    seen = defaultdict(list)
    hook = register_optimizer_step_post_hook(lambda one, *_: seen[one].append(list(waits)))
    yield seen
    hook.remove()


def small_model(seed):
    """A masked LM with weights large enough that predictions and entropies differ."""
    torch.manual_seed(seed)
    model = BertForMaskedLM(BertConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24, max_position_embeddings=40,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def assert_same_weights(found, expected):
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].cpu(), weight, atol=1e-5, rtol=1e-4, msg=name)


# --- the pretence ---------------------------------------------------------------------------------

def test_it_refuses_what_cuda_refuses():
    with pretended_gpu():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.device == CUDA and (there + here.sum()).is_cuda  # a number may be anywhere
        for mixed in (lambda: here + there, lambda: there.add_(here), lambda: here[there.long()],
                      lambda: torch.stack([there[0], here[0]]), lambda: here.sum().add_(there[0]),
                      lambda: there.gather(0, torch.tensor([0])),
                      lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
                      lambda: torch.rand(3, generator=torch.Generator("cuda")),
                      lambda: there.uniform_(generator=torch.Generator())):
            with pytest.raises(RuntimeError):
                mixed()
        with pytest.raises(TypeError):
            there.numpy()


@pytest.mark.parametrize("expected, use", [
    (1, lambda x: x[0].item()), (1, lambda x: int(x[0])), (1, lambda x: bool(x.any())),
    (1, lambda x: x.tolist()), (1, lambda x: x.cpu()), (1, lambda x: f"{x[0]:.2f}"),
    (1, lambda x: x.nonzero()), (1, lambda x: x[x > 0]), (1, lambda x: x[x[0].long()]),
    (1, lambda x: x.masked_select(x > 0)), (1, lambda x: x[[0, 1]]),
    (1, lambda x: x.long().bincount()), (1, lambda x: torch.equal(x, x)),
    (1, lambda x: torch.ones(3).to(x.device)),
    (1, lambda x: torch.tensor([1], device=x.device)), (1, lambda x: x.copy_(torch.ones(3))),
    (0, lambda x: torch.ones(3).to(x.device, non_blocking=True)), (0, lambda x: x[x.long()]),
    (0, lambda x: x.to(x)), (0, lambda x: x.masked_fill(x > 0, 0)), (0, lambda x: x.sort()),
    (0, lambda x: torch.zeros(3, device=x.device)), (0, lambda x: x[:2] * 2)])
def test_it_notes_what_makes_the_host_wait(expected, use):
    with pretended_gpu():
        use(torch.ones(3, device="cuda"))
        assert len(waits) == expected, waits


# --- the step -------------------------------------------------------------------------------------

def two_steps(device, name, tokenizer, **numbers):
    """Two optimizer steps: what they return, the weights, and where they waited."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(SPECIAL + WORDS), (24, 12), generator=draw)
    ids[:, 0], ids[:, -1] = 2, 3
    texts = Texts(ids.to(device), Vocab(tokenizer, len(SPECIAL + WORDS), device))
    model, teacher = (small_model(seed).to(device) for seed in (0, 1))
    context = Context(0.3, model, texts.token_counts(), texts.vocab.continuation,
                      texts.vocab.mask_id, torch.rand(ids.shape, generator=draw).to(device))
    recipe = Recipe(steps=6, batch_size=8, lr=1e-2, **numbers)
    trainer = Trainer(model, texts, STRATEGIES[name](context), recipe, teacher.eval())
    waits.clear()
    results = [trainer.step(step) for step in range(2)]
    waited = list(waits)
    return torch.stack(results).cpu(), model.state_dict(), waited


@pytest.mark.parametrize("numbers", [{}, {"kd_weight": 0.5, "accumulate": 2}],
                         ids=["plain", "distilled, accumulated"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_gives_the_cpus_numbers_and_hardly_waits(name, numbers, tokenizer):
    expected, weights, _ = two_steps(CPU, name, tokenizer, **numbers)
    with pretended_gpu():
        results, found, waited = two_steps(CUDA, name, tokenizer, **numbers)
        assert_same_weights(found, weights)
    torch.testing.assert_close(results, expected, atol=1e-5, rtol=1e-5)
    a_micro_batch = 2 if name == "self-entropy" else 1
    assert len(waited) <= 2 * numbers.get("accumulate", 1) * a_micro_batch, waited


# --- the programs ---------------------------------------------------------------------------------

@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 20)) for _ in range(200)]
    Path("text.txt").write_text("\n\n".join(texts), encoding="utf-8")


@pytest.mark.parametrize("masking, extra", [("entropy", []), ("typhoon", ["--bf16"])])
def test_the_main_job_with_distillation_exam_and_resume(masking, extra, corpus, tokenizer):
    save_pretrained(small_model(0), tokenizer, "start")
    save_pretrained(small_model(1), tokenizer, "teacher")
    arguments = ["--masking", masking, "--kd-weight", "0.5", "--corpus", "text.txt", "--init",
                 "start", "--teacher", "teacher", "--seq-len", "16", "--steps", "6", "--save-every",
                 "2", "--eval-every", "6", *extra]
    train.main([*arguments, "--device", "cpu", "--out", "cpu"])
    taken = []

    def stop_after_the_third(*_):
        taken.append(1)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGTERM)

    with pretended_gpu():
        hook = register_optimizer_step_post_hook(stop_after_the_third)
        with pytest.raises(SystemExit):
            train.main([*arguments, "--device", "cuda", "--out", "gpu"])
        hook.remove()
        train.main(["--resume", "gpu"])
    found, expected = (load_pretrained(run, "mlm")[0].state_dict() for run in ("gpu", "cpu"))
    assert_same_weights(found, expected)
    found, expected = (json.loads(Path(run, "exam.json").read_text()) for run in ("gpu", "cpu"))
    assert found["last"] == pytest.approx(expected["last"], abs=1e-4)


def test_the_main_job_trains_a_teacher_of_its_own(corpus):
    with pretended_gpu():
        train.main(["--masking", "entropy", "--corpus", "text.txt", "--vocab-size", "100",
                    "--seq-len", "16", "--steps", "2", "--teacher-steps", "2", "--dropout",
                    "0.1", "--device", "cuda", "--out", "run"])
    assert load_pretrained("run", "mlm")


@pytest.mark.parametrize("adapt", ["typhoon", "entropy"])
def test_glue_adapts_and_fine_tunes(adapt, tokenizer, optimizer_steps, tmp_path):
    save_pretrained(small_model(0), tokenizer, tmp_path / "model")
    save_pretrained(small_model(1), tokenizer, tmp_path / "teacher")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for i in range(80)]
    examples = [glue.Example(a, b, i % 2) for i, (a, b) in enumerate(zip(texts, texts[40:]))]
    data = glue.Data(examples[:32], {"dev": examples[32:]}, {})
    arguments = ["--task", "mrpc", "--model", str(tmp_path / "model"), "--teacher",
                 str(tmp_path / "teacher"), "--adapt", adapt, "--adapt-epochs", "1",
                 "--adapt-batch-size", "8", "--epochs", "1", "--batch-size", "8", "--lr", "1e-2",
                 "--dropout", "0", "--seq-len", "24", "--device"]
    expected, model, _ = glue.finetune(glue.parse_args([*arguments, "cpu"]), data)
    optimizer_steps.clear()
    with pretended_gpu():
        found, on_gpu, _ = glue.finetune(glue.parse_args([*arguments, "cuda"]), data)
        assert_same_weights(on_gpu.state_dict(), model.state_dict())
    assert found["device"] == "cuda" and found["last"] == expected["last"]
    for name in ("loss", "masked"):
        assert found["adaptation"][name] == pytest.approx(expected["adaptation"][name], rel=1e-4)
    *adaptation, fine_tuning = optimizer_steps.values()
    for seen in adaptation:  # of the encoder, and with typhoon of the probe's head
        assert len(seen[-1]) - len(seen[0]) <= len(seen) - 1, seen[-1][len(seen[0]):]
    assert fine_tuning[0] == fine_tuning[-1], fine_tuning[-1][len(fine_tuning[0]):]
