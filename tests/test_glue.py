"""What is true of fine-tuning, batches, adaptation, metrics, GLUE's files and the run's own.

Each test compares with something outside glue.py: official counts, hand-computed values,
scikit-learn and SciPy where they are installed, a brute-force version. GLUE_DIR names a folder of
official files; without it their tests skip. The sections follow glue.py's.
"""
import http.server
import io
import json
import math
import os
import resource
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import glue
from glue import TASKS, Example, load_task, metrics
from masking import STRATEGIES, Context, find_strategy
from model import (BertConfig, BertForMaskedLM, BertForSequenceClassification, InputError, RunError,
                   load_pretrained, load_tokenizer, save_pretrained, wordpiece_tokenizer)
from train import Recipe

GLUE_DIR = os.environ.get("GLUE_DIR", "")
needs_glue = pytest.mark.skipif(not GLUE_DIR, reason="GLUE_DIR is not set")


# --- the tasks, small ones in their official form -------------------------------------------------

@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(folder: Path, name: str, *rows: str, end="\n") -> Path:
    """A file of tab-separated rows, the tabs written as bars."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(("\n".join(row.replace("|", "\t") for row in rows) + end).encode())
    return folder / name


WORDS = ("the cat sat on a mat and so did dog good bad very not is was film it this "
         "##s ##ed .").split()


@pytest.fixture
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return wordpiece_tokenizer({word: i for i, word in enumerate(words)})


def tiny(model_type="bert", num_labels=2, **fields):
    torch.manual_seed(0)
    fields = {"vocab_size": 5 + len(WORDS), "max_position_embeddings": 128, "hidden_size": 64,
              "intermediate_size": 128, "hidden_dropout_prob": 0.0,
              "attention_probs_dropout_prob": 0.0, "model_type": model_type, **fields}
    return BertForSequenceClassification(BertConfig.preset("tiny", **fields), num_labels)


def sentences(n: int, seed: int) -> list[str]:
    """Half of them hold the word "good", the others "bad"."""
    rng = np.random.default_rng(seed)
    return [" ".join([*rng.choice(WORDS[:8], rng.integers(1, 9)), ("bad", "good")[i % 2]])
            for i in range(n)]


def write_split(folder: Path, name: str, split: str, n: int):
    """n examples, labelled by whether the first text is good: a score of 0 or 5, not entailed or
    entailed."""
    task, test = TASKS[name], split.startswith("test")
    a, b = sentences(n, seed=len(split)), sentences(n, seed=99)
    good = [i % 2 for i in range(n)]
    if name == "stsb":
        labels = ["5.0" if is_good else "0.0" for is_good in good]
    else:
        first = 0 if task.labels[0] == "0" else 1  # where class 0 is entailment
        labels = [task.labels[is_good ^ first] for is_good in good]
    if name == "cola" and not test:
        return write(folder, f"CoLA/{split}.tsv", *(f"x|{labels[i]}||{a[i]}" for i in range(n)))
    columns = ["index", task.text_a] + [task.text_b] * bool(task.text_b) + [task.label] * (not test)
    rows = ["|".join([str(i), a[i]] + [b[i]] * bool(task.text_b) + [labels[i]] * (not test))
            for i in range(n)]
    return write(folder, f"{task.folder}/{split}.tsv", "|".join(columns), *rows)


@pytest.fixture
def data_dir(tmp_path):
    """All ten tasks: 64 examples to learn from, 32 on dev, 5 on test."""
    for name, task in TASKS.items():
        for split in task.sizes:
            write_split(tmp_path / "glue", name, split, {"tr": 64, "de": 32, "te": 5}[split[:2]])
        (tmp_path / "glue/AX").mkdir(exist_ok=True)
    (tmp_path / "glue/AX/test.tsv").rename(tmp_path / "glue/AX/AX.tsv")
    return tmp_path / "glue"


@pytest.fixture
def model_dir(tmp_path, tokenizer):
    """A tiny masked LM with random weights and no dropout, as train.py keeps one."""
    torch.manual_seed(1)
    save_pretrained(BertForMaskedLM(tiny().config), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def arguments(data_dir, model_dir):
    """A function: options of the command line -> arguments for `finetune`."""
    def parse(*options, task="sst2"):
        return glue.parse_args(["--task", task, "--model", str(model_dir), "--data-dir",
                                str(data_dir), "--device", "cpu", "--epochs", "1",
                                "--adapt-epochs", "1", "--lr", "1e-3", *options])
    return parse


def command(*options: str, args) -> list[str]:
    """A command line; the learning rate is the default."""
    return ["--task", args.task, "--model", args.model, "--data-dir", args.data_dir,
            "--device", "cpu", "--epochs", "1", *options]


def finetune(*given) -> dict:
    """What the run's file holds."""
    return glue.finetune(*given)[0]


def without_times(run: dict) -> dict:
    return {key: value for key, value in json.loads(json.dumps(run)).items() if key != "seconds"}


# --- fine-tuning ----------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["sst2", "rte", "stsb"])  # a sentence, a pair, a regression
def test_a_task_that_can_be_learnt_is_learnt(arguments, task):
    run = finetune(arguments("--epochs", "10", "--batch-size", "4", "--lr", "3e-3", task=task))
    assert glue.score(run["last"]) > 0.9 > 0.51 > glue.score(run["baseline"])
    assert run["epochs"][-1]["train_loss"] < run["epochs"][0]["train_loss"] / 2


def test_the_run_file_holds_what_the_statistics_read(arguments):
    run = without_times(finetune(arguments("--epochs", "3", "--seed", "4", task="mrpc")))
    assert (run["task"], run["strategy"], run["seed"]) == ("mrpc", "none", 4)
    assert [entry["epoch"] for entry in run["epochs"]] == [1, 2, 3]
    assert run["last"] == run["epochs"][2]["metrics"] == metrics("mrpc", **run["dev"])
    assert run["dev"]["labels"] == [i % 2 for i in range(32)]
    assert (run["args"]["lr"], run["lr"], run["device"], run["bf16"]) == (1e-3, 1e-3, "cpu", False)
    assert run["versions"]["torch"] == torch.__version__
    assert finetune(arguments("--label", "mine"))["strategy"] == "mine"


@pytest.mark.parametrize("width, lr", [(64, 3e-4), (256, 3e-4), (320, 2e-5)])
def test_the_default_learning_rate_suits_the_width(data_dir, tokenizer, tmp_path, width, lr):
    """[T] fine-tunes models from TinyBERT, 312 wide, at 2e-5; Turc et al. small ones at 3e-4."""
    model = tiny(hidden_size=width, num_attention_heads=width // 64, num_hidden_layers=1)
    save_pretrained(BertForMaskedLM(model.config), tokenizer, tmp_path / "model")
    args = ["--task", "sst2", "--model", str(tmp_path / "model"), "--data-dir", str(data_dir),
            "--device", "cpu", "--epochs", "1"]
    run = finetune(glue.parse_args(args))
    assert (run["lr"], run["args"]["lr"]) == (lr, None)
    same, other = (finetune(glue.parse_args([*args, "--lr", str(rate)])) for rate in (lr, 2 * lr))
    assert same["epochs"] == run["epochs"] != other["epochs"]


def test_the_run_file_says_where_the_weights_come_from(arguments, model_dir, tokenizer, tmp_path):
    run = finetune(arguments())
    digest = sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()
    assert (run["weights"], run["teacher_weights"], run["pretraining"]) == (digest, None, None)
    pretraining = {"masking": "entropy", "seed": 3, "teacher_weights": "ab" * 32}
    (model_dir / "train_args.json").write_text(json.dumps(pretraining))
    config = tiny().config
    torch.manual_seed(5)
    save_pretrained(BertForMaskedLM(config), tokenizer, tmp_path / "teacher")
    options = ("--adapt", "entropy", "--teacher", str(tmp_path / "teacher"),
               "--pattern", "runs/{masking}-{seed}")
    run = without_times(finetune(arguments(*options)))
    teacher = sha256((tmp_path / "teacher/model.safetensors").read_bytes()).hexdigest()
    assert (run["weights"], run["teacher_weights"]) == (digest, teacher) and teacher != digest
    assert run["pretraining"] == pretraining and run["pattern"] == "runs/{masking}-{seed}"
    assert run["masked"] == run["adaptation"]["masked"] > 0.2


def test_mnli_is_scored_on_both_dev_sets(arguments):
    run = finetune(arguments(task="mnli"))
    assert run["last"] == {"accuracy": metrics("mnli", **run["dev"])["accuracy"],
                           "accuracy_mm": metrics("mnli", **run["dev_mismatched"])["accuracy"]}
    for name, key in (("accuracy", "dev"), ("accuracy_mm", "dev_mismatched")):
        labels = run[key]["labels"]
        assert run["baseline"][name] in [labels.count(label) / len(labels) for label in range(3)]


@pytest.mark.parametrize("options", [
    "--warmup 1", "--weight-decay 5", "--seq-len 8", "--dropout 0.5", "--batch-size 4",
    "--adapt random --corruption 0 0 1", "--adapt random --adapt-lr 1e-2",
    "--adapt random --mask-rate 0.9", "--adapt random --adapt-batch-size 4",
    "--adapt entropy --entropy-input visible", "--adapt entropy --entropy-select low",
    "--adapt typhoon --typhoon-ema 0.1", "--adapt typhoon --typhoon-spread 0.9"])
def test_an_option_has_an_effect(arguments, options):
    without = options.rpartition(" --")[0]
    plain, other = (finetune(arguments(*chosen.split())) for chosen in (without, options))
    changed = "adaptation" if "--adapt" in without else "epochs"
    assert plain[changed] != other[changed]


@pytest.mark.parametrize("adapt", ["none", "random", "typhoon"])
def test_a_seed_fixes_everything(arguments, adapt):
    options = ("--adapt", adapt, "--fraction", "0.5")
    run = without_times(finetune(arguments(*options)))
    torch.rand(7)  # whatever else went on in the process
    assert without_times(finetune(arguments(*options))) == run
    other = finetune(arguments(*options, "--seed", "1"))
    assert other["epochs"][0]["train_loss"] != run["epochs"][0]["train_loss"]


def test_dropout_is_the_same_with_and_without_adaptation(arguments):
    """At a learning rate of 1e-30 adaptation changes no weight."""
    plain = finetune(arguments())
    adapted = finetune(arguments("--adapt", "random", "--adapt-lr", "1e-30"))
    other = finetune(arguments("--dropout", "0"))
    loss = plain["epochs"][0]["train_loss"]
    assert adapted["epochs"][0]["train_loss"] == pytest.approx(loss, abs=1e-6)
    assert other["epochs"][0]["train_loss"] != pytest.approx(loss, abs=1e-6)  # there is dropout


def test_the_learning_rate_rises_and_falls_over_all_epochs_and_gradients_are_clipped(tokenizer):
    """2 epochs of 4 steps; the first quarter of the steps is the warm-up. Every score is 5, far
    from a fresh model's 0, so that the gradient of the squared error is larger than 1."""
    rates, norms, model = [], [], tiny(num_labels=1)

    def note(optimizer, *_):
        rates.append({group["lr"] for group in optimizer.param_groups})
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())

    examples = [Example(text, "so", 5.0) for text in sentences(64, seed=0)]
    train = glue.tokenise(examples, tokenizer, 64, model)
    recipe = Recipe(steps=8, batch_size=16, lr=6e-4, warmup=0.25)
    hook = register_optimizer_step_pre_hook(note)
    try:
        glue.fit("stsb", model, train, {"dev": train}, recipe)
    finally:
        hook.remove()
    expected = [3e-4, 6e-4, 6e-4, 5e-4, 4e-4, 3e-4, 2e-4, 1e-4]
    assert [rate for one in rates for rate in one] == pytest.approx(expected)
    assert norms == pytest.approx([1.0] * 8, rel=1e-3)


def test_the_loss_is_the_mean_cross_entropy_or_squared_error():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    loss = glue.task_loss(logits, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    loss = glue.task_loss(torch.tensor([[1.0], [4.0]]), torch.tensor([3.0, 5.0]))
    assert loss.item() == pytest.approx((4 + 1) / 2)


def test_a_diverging_run_is_stopped(arguments):
    with pytest.raises(RunError, match="at step 4 or a little before: lower --lr"):
        finetune(arguments("--lr", "1e30"))
    with pytest.raises(RunError, match="at step 4 .* lower --adapt-lr"):
        finetune(arguments("--adapt", "random", "--adapt-lr", "1e30"))


def test_bf16_is_asked_for_and_heard_on_a_cpu(arguments, tokenizer, data_dir):
    """In adapting, in the probe of Typhoon's task loss, in fine-tuning and in predicting."""
    options = ("--adapt", "typhoon", "--adapt-batch-size", "64")  # one step: the probe is the first
    half, full, default = (finetune(arguments(*options, *asked, task="stsb"))
                           for asked in (["--bf16"], ["--no-bf16"], []))
    assert half["bf16"] and not full["bf16"] and not default["bf16"]
    for name in ("adaptation", "epochs", "dev"):
        assert half[name] != full[name] == default[name], name
    assert half["adaptation"]["loss"] != full["adaptation"]["loss"]
    assert half["adaptation"]["typhoon"] != full["adaptation"]["typhoon"]
    run, model, _ = glue.finetune(arguments("--bf16", task="stsb"))
    data = glue.tokenise(load_task("stsb", "dev", data_dir), tokenizer, 128, model)
    batch = data.texts.batch(torch.arange(32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)[:, 0]
    assert run["dev"]["predictions"] == glue.predict(model, data, bf16=True).tolist()
    assert glue.predict(model, data, bf16=True) == pytest.approx(expected.tolist(), abs=1e-2)
    assert glue.predict(model, data).tolist() != run["dev"]["predictions"]


@pytest.mark.parametrize("kind", [{}, {"model_type": "distilbert"}, {"type_vocab_size": 1}])
def test_a_prediction_does_not_depend_on_the_batch_it_is_in(tokenizer, kind):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[:19], rng.integers(1, 25))) for _ in range(40)]
    model = tiny(num_labels=1, **kind).eval()
    for parameter in model.parameters():  # weights large enough that predictions differ
        parameter.data += 0.1 * torch.randn_like(parameter)
    examples = [Example(a, b, 0) for a, b in zip(texts, reversed(texts))]
    together = glue.predict(model, glue.tokenise(examples, tokenizer, 64, model), size=16)
    alone = [glue.predict(model, glue.tokenise([example], tokenizer, 64, model)).item()
             for example in examples]
    assert together == pytest.approx(alone, abs=1e-5) and np.ptp(together) > 0.1


def test_a_collapsed_run_is_named_as_such(arguments, data_dir):
    data = glue.load_data("mrpc", data_dir)
    data = replace(data, train=[example._replace(label=1) for example in data.train])
    run = finetune(arguments("--epochs", "5", "--lr", "3e-3", task="mrpc"), data)
    assert set(run["dev"]["predictions"]) == {1}
    assert run["collapsed"] and "the same answer" in glue.describe(run)
    assert "(collapsed)" in glue.score_table([run])
    run = finetune(arguments("--epochs", "10", "--batch-size", "4", "--lr", "3e-3"))
    assert not run["collapsed"] and "the same answer" not in glue.describe(run)
    assert "(collapsed)" not in glue.score_table([run])


@pytest.mark.parametrize("predictions, expected", [
    ([1, 1, 1], True), ([0, 0, 1], False), ([2.5, 2.5, 2.5], True), ([2.5, 2.504, 2.496], True),
    ([2.5, 2.5, 2.6], False), ([1], False)])
def test_a_constant_score_is_one_to_two_decimals(predictions, expected):
    assert glue.is_constant(predictions) == expected


def test_a_fraction_is_fixed_by_the_seed_and_part_of_a_larger_one():
    whole = list(range(1000))
    some, more = glue.subset(whole, 0.2, seed=3), glue.subset(whole, 0.5, seed=3)
    assert len(some) == 200 and some == sorted(set(some)) and set(some) < set(more)
    assert some == glue.subset(whole, 0.2, seed=3) != glue.subset(whole, 0.2, seed=4)
    assert glue.subset(whole, 1.0, seed=3) == whole
    assert 400 < np.mean(some) < 600  # not the head of the file


@pytest.mark.parametrize("what, frozen", [
    ("none", ()), ("embeddings", ("bert.embeddings",)), ("0", ("bert.embeddings",)),
    ("1", ("bert.embeddings", "bert.layers.0")), ("2", ("bert.embeddings", "bert.layers")),
    ("encoder", ("bert.embeddings", "bert.layers"))])
def test_frozen_weights_do_not_move_by_a_bit(tokenizer, data_dir, what, frozen):
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    glue.freeze(model, what)
    train = glue.tokenise(load_task("rte", "train", data_dir), tokenizer, 64, model)
    glue.fit("rte", model, train, {"dev": train}, Recipe(steps=4, batch_size=16, lr=1e-3))
    after = model.state_dict()
    still = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert still == {name for name in before if frozen and name.startswith(frozen)}
    assert all((p.grad is None) == (name in still) for name, p in model.named_parameters())


# --- batches --------------------------------------------------------------------------------------

def test_pairs_are_encoded_as_hugging_face_encodes_them(tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    examples = [Example("the cat sat", "a dog is not a cat .", 1), Example("very good", None, 0),
                Example("", "so", 1)]
    data = glue.tokenise(examples, tokenizer, 64, tiny())
    for i, (a, b, _) in enumerate(examples):
        expected = theirs(*[text for text in (a, b) if text is not None],
                          return_token_type_ids=True)
        batch = data.texts.batch(torch.tensor([i]))
        assert batch.input_ids.tolist() == [expected["input_ids"]]
        assert batch.token_type_ids.tolist() == [expected["token_type_ids"]]


def rows(data) -> list[list[int]]:
    """The word pieces of each example."""
    found = zip(data.texts.input_ids.tolist(), data.texts.lengths.tolist())
    return [ids[:length] for ids, length in found]


@pytest.mark.parametrize("a, b, room, expected", [  # an odd room's last piece is the longer text's
    (5, 3, 8, (5, 3)), (5, 3, 7, (4, 3)), (5, 3, 6, (3, 3)), (5, 3, 5, (3, 2)), (3, 5, 5, (2, 3)),
    (9, 1, 5, (4, 1)), (9, 0, 5, (5, 0)), (0, 9, 5, (0, 5))])
def test_the_longer_text_is_truncated_first(tokenizer, a, b, room, expected):
    example = Example("cat " * a, "dog " * b, 0)
    ids, = rows(glue.tokenise([example], tokenizer, room + 3, tiny()))
    cat, dog = tokenizer.token_to_id("cat"), tokenizer.token_to_id("dog")
    assert (ids.count(cat), ids.count(dog)) == expected and len(ids) == sum(expected) + 3


def test_no_row_is_longer_than_asked(tokenizer):
    examples = [Example("the cat " * 50, "a dog " * 3, 0), Example("the cat " * 50, None, 0)]
    found = rows(glue.tokenise(examples, tokenizer, 16, tiny()))
    sep = tokenizer.token_to_id("[SEP]")
    assert [(len(ids), ids.count(sep), ids[-1]) for ids in found] == [(16, 2, sep), (16, 1, sep)]


def test_tokenising_leaves_the_tokenizer_as_it_was(tokenizer):
    before = tokenizer.to_str()
    glue.tokenise([Example("the cat " * 50, "a dog", 0)], tokenizer, 16, tiny())
    assert tokenizer.to_str() == before  # it is saved with the model


def test_special_tokens_are_added_whatever_the_tokenizer_file_says(tokenizer, tmp_path):
    examples = [Example("the cat", "a dog", 0)]
    fields = json.loads(tokenizer.to_str()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    expected = rows(glue.tokenise(examples, tokenizer, 16, tiny()))
    found = rows(glue.tokenise(examples, load_tokenizer(tmp_path), 16, tiny()))
    assert found == expected and found[0][0] == tokenizer.token_to_id("[CLS]")


def test_a_batch_is_padded_to_its_longest_and_typed_where_the_model_has_types(tokenizer):
    examples = [Example("the cat", "a dog", 0), Example("cat", "the dog", 0),
                Example("a very good cat", "so", 1), Example("a very good cat so", "so", 1)]
    batch = glue.tokenise(examples, tokenizer, 64, tiny()).texts.batch(torch.tensor([2, 0]))
    assert batch.input_ids.shape == (2, 8) and batch.input_ids[1, 7] == 0
    assert batch.attention_mask.tolist() == [[1] * 8, [1] * 7 + [0]]
    assert batch.token_type_ids.tolist() == [[0] * 6 + [1] * 2, [0] * 4 + [1] * 3 + [0]]
    untyped = glue.tokenise(examples, tokenizer, 64, tiny(type_vocab_size=1)).texts
    assert untyped.batch(torch.tensor([0])).token_type_ids is None
    single = [Example("the cat", None, 0), Example("a cat", None, 0)]
    batch = glue.tokenise(single, tokenizer, 64, tiny()).texts.batch(torch.tensor([0, 1]))
    assert batch.token_type_ids is None and batch.attention_mask is None


def test_batches_hold_every_example_once_and_depend_on_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(4, 100, 1003)
    def batches(*seed):
        return glue.bucketed_batches(lengths, 16, np.random.default_rng(seed))
    drawn = batches(3, 1)
    assert sorted(np.concatenate(drawn)) == list(range(1003)) and len(drawn) == math.ceil(1003 / 16)
    assert all(np.array_equal(one, two) for one, two in zip(drawn, batches(3, 1)))
    for other in (batches(3, 2), batches(4, 1)):
        assert not np.array_equal(np.concatenate(drawn), np.concatenate(other))


def test_bucketing_saves_most_of_the_padding():
    lengths = np.random.default_rng(0).integers(4, 100, 3200)
    def padded(batches):
        return sum(len(batch) * lengths[batch].max() for batch in batches) / lengths.sum() - 1
    plain = np.split(np.random.default_rng(1).permutation(3200), 200)
    bucketed = glue.bucketed_batches(lengths, 16, np.random.default_rng(1))
    assert padded(plain) > 0.7 and padded(bucketed) < 0.05
    firsts = [lengths[batch].mean() for batch in bucketed[:20]]
    assert np.std(firsts) > 15  # and the batches come in no order of length


# --- adaptation -----------------------------------------------------------------------------------

@pytest.fixture
def task_typhoon(tokenizer, data_dir):
    """Typhoon with the task's loss on MRPC's 64 examples, their texts, and the classifier that its
    head is a copy of."""
    classifier = tiny()
    data = glue.tokenise(load_task("mrpc", "train", data_dir), tokenizer, 64, classifier)
    texts, masked_lm = data.texts, BertForMaskedLM(tiny().config)
    context = Context(0.3, masked_lm, texts.token_counts(), texts.vocab.continuation,
                      texts.vocab.mask_id)
    return glue.TaskTyphoon(context, classifier, data.targets(), 1e-2, 0.0), texts, classifier


def test_typhoon_follows_the_one_hot_gradient_of_the_task_loss(task_typhoon):
    """Brute force: the one-hot tensor is built, and the loss differentiated with respect to it
    ([T]). All is visible: a saliency is minus the gradient, averaged over a type's tokens."""
    strategy, texts, classifier = task_typhoon
    strategy.probe.eval()
    batch = texts.batch(torch.arange(16))
    strategy.mask(batch, torch.Generator().manual_seed(0))
    strategy.end_step()

    encoder = strategy.context.model.bert
    weight = encoder.embeddings.word_embeddings.weight.detach()
    one_hot = torch.nn.functional.one_hot(batch.input_ids, len(weight)).float()  # (B, L, V)
    one_hot.requires_grad_()
    hidden = encoder(None, batch.attention_mask, batch.token_type_ids,
                     inputs_embeds=one_hot @ weight)
    logits = classifier.classifier(classifier.bert.pooler(hidden[:, 0]).tanh())
    torch.nn.functional.cross_entropy(logits, torch.arange(16) % 2).backward()
    for token in range(5, len(weight)):
        where = batch.input_ids == token
        if where.any():
            expected = -one_hot.grad[..., token][where].mean().item()
            found = strategy.typhoon.weight[token].item()
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert strategy.typhoon.seen[5:].any() and not strategy.typhoon.seen[:5].any()


def test_the_task_loss_trains_the_head_and_never_the_encoder(task_typhoon):
    strategy, texts, classifier = task_typhoon
    encoder = strategy.context.model.state_dict()
    before = {name: value.clone() for name, value in encoder.items()}
    head = [parameter.clone() for parameter in strategy.head]
    for step in range(3):
        strategy.mask(texts.batch(torch.arange(16)), torch.Generator().manual_seed(step))
        strategy.end_step()
    assert all(torch.equal(value, before[name]) for name, value in encoder.items())
    assert all(parameter.grad is None for parameter in strategy.context.model.parameters())
    assert all(parameter.grad is None for parameter in strategy.probe.parameters())
    assert all(not torch.equal(one, two) for one, two in zip(strategy.head, head))
    copies = [*classifier.bert.pooler.parameters(), *classifier.classifier.parameters()]
    # What fine-tuning starts from has not moved.
    assert all(torch.equal(one, two) for one, two in zip(copies, head))


@pytest.mark.parametrize("loss", ["task", "mlm"])
def test_typhoon_looks_at_labels_by_the_task_loss_alone(arguments, data_dir, loss):
    data = glue.load_data("sst2", data_dir)
    flipped = replace(data, train=[example._replace(label=(i // 2) % 2)
                                   for i, example in enumerate(data.train)])
    args = arguments("--adapt", "typhoon", "--typhoon-loss", loss)
    one, two = (dict_of(finetune(args, which)["adaptation"]["typhoon"])
                for which in (data, flipped))
    assert (one == two) == (loss == "mlm")


def dict_of(extremes: dict) -> dict:
    return {piece: rate for rows in extremes.values() for piece, rate, _ in rows}


@pytest.mark.parametrize("strategy", [*STRATEGIES, "typhoon by mlm"])
def test_every_strategy_adapts_and_keeps_to_the_budget(arguments, strategy):
    name, _, loss = strategy.partition(" by ")
    options = ("--adapt", name, "--typhoon-loss", loss or "task", "--adapt-epochs", "10")
    run = finetune(arguments(*options, task="mrpc"))
    adaptation = run["adaptation"]
    assert run["strategy"] == name and adaptation["steps"] == 10 * 64 / 16
    # typhoon, and whole words at times, keep to it only on average
    assert adaptation["masked"] == pytest.approx(0.3, abs=0.03)
    assert ("typhoon" in adaptation) == (name == "typhoon")
    assert "adapted in 40 steps" in glue.describe(run)
    if name == "typhoon":
        rates = [rate for _, rate, _ in adaptation["typhoon"]["highest"]]
        assert rates == sorted(rates, reverse=True)
        assert {"good", "bad"} & set(dict_of(adaptation["typhoon"]))


def test_a_strategy_of_the_users_own_adapts_under_its_short_name(arguments, tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("from masking import Strategy, random_mask\n\n\n"
                    "class Halves(Strategy):\n"
                    "    def mask(self, batch, generator=None):\n"
                    "        return random_mask(batch.maskable, 0.5, generator)\n")
    args = arguments("--adapt", f"{file}:Halves")
    run = finetune(args)
    assert run["strategy"] == "Halves" and run["masked"] == pytest.approx(0.5, abs=0.05)
    name = glue.run_file(args).name
    assert name.endswith("-Halves-0.json") and "mine" not in name


def test_adaptation_trains_the_encoder_by_the_masked_lm_and_leaves_the_head(arguments):
    """At a learning rate of 1e-30 fine-tuning moves no weight: what moved, adaptation did."""
    plain, random, typhoon = (
        glue.finetune(arguments("--adapt", strategy, "--lr", "1e-30", task="mrpc"))[1].state_dict()
        for strategy in ("none", "random", "typhoon"))
    for adapted in (random, typhoon):
        for name, value in adapted.items():
            is_head = name.startswith(("bert.pooler", "classifier"))
            assert torch.allclose(value, plain[name], rtol=0, atol=1e-20) == is_head, name
    weight = "bert.layers.0.output.weight"
    assert not torch.equal(random[weight], typhoon[weight])


@pytest.mark.parametrize("results, loss, masked", [
    ([[2.0, 1.0, 3.0, 10.0], [0.0, 0.0, 0.0, 10.0], [4.0, 1.0, 1.0, 10.0], [0.0] * 4], 2.5, 4 / 30),
    ([[9.0, 1.0, 2.0, 10.0]] + [[0.0, 0.0, 0.0, 10.0]] * 4, 0.0, 2 / 50)])
def test_a_step_that_masks_nothing_does_not_lower_the_loss(results, loss, masked):
    """Of each step: the mean loss, the gradient's norm, masked tokens, maskable tokens. The last
    epoch has four steps."""
    trainer = SimpleNamespace(recipe=Recipe(steps=len(results), batch_size=16, lr=1.0),
                              texts=range(64), strategy=None,
                              step=lambda step: torch.tensor(results[step]))
    found = glue.adapt(trainer, None, "a title")
    assert (found["loss"], found["masked"]) == pytest.approx((loss, masked))
    assert found["steps"] == len(results)


def padding_vocabulary(pad_at: int) -> dict[str, int]:
    """[PAD] is number `pad_at`; number 0 is a word."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words.insert(0, words.pop(words.index("cat")))
    words.insert(pad_at, "[PAD]")
    return {word: i for i, word in enumerate(words)}


@pytest.mark.parametrize("pad_at", [0, 6])
def test_adaptation_does_not_train_on_padding(arguments, data_dir, tmp_path, pad_at):
    """The tokenizer says what [PAD] is. The config of this model says 0, whatever it is."""
    tokenizer = wordpiece_tokenizer(padding_vocabulary(pad_at))
    torch.manual_seed(1)
    save_pretrained(BertForMaskedLM(tiny().config), tokenizer, tmp_path / "padded")
    watching = f"{tmp_path / 'watching.py'}:Watching"
    (tmp_path / "watching.py").write_text(
        "from masking import Strategy, random_mask\n\n\n"
        "class Watching(Strategy):\n"
        "    seen = []\n\n"
        "    def mask(self, batch, generator=None):\n"
        "        self.seen.append(batch)\n"
        "        return random_mask(batch.maskable, 0.3, generator)\n")
    finetune(arguments("--adapt", watching, "--model", str(tmp_path / "padded"),
                       "--adapt-batch-size", "64"))
    texts = [example.text_a.split() for example in load_task("sst2", "train", data_dir)]
    batch, = find_strategy(watching).seen  # of all 64 texts
    assert batch.maskable.sum(1).sort().values.tolist() == sorted(map(len, texts))
    assert torch.equal(batch.attention_mask.sum(1), batch.maskable.sum(1) + 2)


def test_the_teacher_is_the_model_before_it_is_adapted_unless_one_is_given(
        model_dir, tokenizer, tmp_path):
    mlm = load_pretrained(model_dir, "mlm")[0].train()
    teacher = glue.frozen_teacher(mlm, tokenizer, None)
    with torch.no_grad():
        mlm.head.bias += 1
    assert not teacher.training and not torch.equal(teacher.head.bias, mlm.head.bias)
    torch.manual_seed(2)
    other = BertForMaskedLM(mlm.config)
    save_pretrained(other, tokenizer, tmp_path / "teacher")
    given = glue.frozen_teacher(mlm, tokenizer, str(tmp_path / "teacher"))
    assert torch.equal(given.head.dense.weight, other.head.dense.weight)
    vocab = {word: i for i, word in enumerate(sorted(tokenizer.get_vocab()))}
    save_pretrained(other, wordpiece_tokenizer(vocab), tmp_path / "stranger")
    message = "--teacher has 27 word pieces, --model 27, and they are not the same"
    with pytest.raises(InputError, match=message):
        glue.frozen_teacher(mlm, tokenizer, str(tmp_path / "stranger"))


def test_a_checkpoint_without_a_masked_lm_head_gets_a_fresh_one_and_says_so(
        arguments, tokenizer, tmp_path, caplog):
    save_pretrained(tiny(), tokenizer, tmp_path / "encoder")
    run = finetune(arguments("--adapt", "random", "--model", str(tmp_path / "encoder")))
    assert "freshly initialised: head.bias" in caplog.text and run["adaptation"]["steps"] == 4


def test_extreme_rates_leave_out_rare_word_pieces(tokenizer):
    rates, counts = torch.linspace(0.1, 0.5, 27), torch.full((27,), 9)
    counts[:5] = 0
    counts[26], counts[5] = 4, 4  # the highest, "." and the lowest, "the"
    found = glue.extreme_rates(rates, counts, tokenizer, most=2)
    assert found == {"highest": [["##ed", 0.4846, 9], ["##s", 0.4692, 9]],
                     "lowest": [["cat", 0.1923, 9], ["sat", 0.2077, 9]]}


# --- metrics --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, predictions, labels, expected", [
    ("sst2", [1, 0, 1, 1], [1, 0, 0, 1], {"accuracy": 3 / 4}),
    # TP 2, FP 1, FN 1
    ("mrpc", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], {"f1": 2 / 3, "accuracy": 3 / 5}),
    # (TP TN − FP FN) / √(3·3·3·3)
    ("cola", [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1], {"matthews": (2 * 2 - 1) / 9}),
    # R_K by hand
    ("ax", [0, 1, 2, 2], [0, 1, 2, 1], {"matthews": (3 * 4 - 5) / math.sqrt((16 - 6) * (16 - 6))}),
    # with unequal margins, so that no wrong denominator comes out right: TP 2, FP 3, FN 1, TN 4
    ("mrpc", [1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1, 0, 0, 0, 0],
     {"f1": 4 / 8, "accuracy": 6 / 10}),
    # TP 5, FP 3, FN 1, TN 1: (TP TN − FP FN) / √((TP+FP) (TP+FN) (TN+FP) (TN+FN))
    ("cola", [1, 1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 1, 0],
     {"matthews": (5 - 3) / math.sqrt(8 * 6 * 4 * 2)}),
    # 7 examples, 4 right; predicted 1, 2, 4 times, truly 3, 2, 2 times: Σ p t = 3 + 4 + 8
    ("ax", [0, 1, 1, 2, 2, 2, 2], [0, 1, 0, 2, 2, 0, 1],
     {"matthews": (4 * 7 - 15) / math.sqrt((49 - 21) * (49 - 17))}),
    ("stsb", [1, 2, 3, 4], [1, 3, 2, 4], {"pearson": 0.8, "spearman": 0.8}),
    # ranks 4, 1, 2.5, 5, 2.5 and 4, 5, 2, 1, 3; deviations from the means, multiplied and summed
    ("stsb", [3, 1, 2, 10, 2], [4, 5, 1, 0, 3.5],
     {"pearson": -22.6 / math.sqrt(53.2 * 17.8), "spearman": -6.5 / math.sqrt(9.5 * 10)}),
    ("stsb", [1, 1, 2, 8], [1, 2, 3, 4],
     {"pearson": 11 / math.sqrt(34 * 5), "spearman": 4.5 / math.sqrt(4.5 * 5)}),
])
def test_metrics_by_hand(name, predictions, labels, expected):
    assert metrics(name, predictions, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("predictions, labels", [
    ([0, 0, 0], [0, 1, 1]), ([1, 1, 1], [0, 1, 1]), ([0, 1, 1], [0, 0, 0]), ([0, 0], [0, 0]),
    ([0], [1]), ([], []),
    # the mean of three 0.1 is not 0.1
    ([0.1, 0.1, 0.1], [0.3, 0.7, 0.1]), ([0.3, 0.7, 0.1], [0.1, 0.1, 0.1])])
def test_degenerate_correlations_are_zero_and_never_nan(predictions, labels):
    for name in ("cola", "ax", "stsb"):
        assert set(metrics(name, predictions, labels).values()) == {0}, name
    assert glue.f1(np.zeros(3), np.zeros(3)) == 0
    assert all(math.isfinite(value) for value in metrics("mrpc", predictions, labels).values())


def test_ranks_share_the_mean_on_ties():
    ranks = glue.ranks(np.array([10.0, 20.0, 10.0, 5.0, 20.0, 20.0]))
    assert ranks.tolist() == [2.5, 5.0, 2.5, 1.0, 5.0, 5.0]


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="not one length"):
        metrics("sst2", [1], [1, 1, 1])  # numpy would broadcast


@pytest.mark.parametrize("seed", range(20))
def test_metrics_agree_with_scikit_learn_and_scipy(seed):
    sklearn, scipy = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 400))
    p, y = rng.integers(0, 2, n), rng.integers(0, 2, n)
    expected = {"f1": sklearn.f1_score(y, p, zero_division=0),
                "accuracy": sklearn.accuracy_score(y, p)}
    assert metrics("mrpc", p, y) == pytest.approx(expected, abs=1e-9)
    expected = {"matthews": sklearn.matthews_corrcoef(y, p)}
    assert metrics("cola", p, y) == pytest.approx(expected, abs=1e-9)
    p, y = rng.integers(0, 3, n), rng.integers(0, 3, n)
    expected = {"matthews": sklearn.matthews_corrcoef(y, p)}
    assert metrics("ax", p, y) == pytest.approx(expected, abs=1e-9)
    # With ties; half of the time with a large offset; never constant.
    p, y = rng.normal(size=n).round(1) + 1e3 * (seed % 2), rng.integers(0, 26, n) / 5
    p[0], y[:2] = p[1:].max() + 1, (0, 1)
    expected = {"pearson": scipy.pearsonr(p, y)[0], "spearman": scipy.spearmanr(p, y)[0]}
    assert metrics("stsb", p, y) == pytest.approx(expected, abs=1e-9)


def test_the_glue_score_averages_metrics_then_tasks():
    assert glue.score({"f1": 0.9, "accuracy": 0.8}) == pytest.approx(0.85)
    # A constant answer on MRPC dev, as in GLUE's table of baselines: accuracy 68.4, F1 81.2.
    def dev(labels):
        return {"dev": SimpleNamespace(labels=np.array(labels))}

    train, labels = np.repeat([1, 0], [2474, 1194]), np.repeat([1, 0], [279, 129])
    assert glue.baseline("mrpc", train, dev(labels)) == pytest.approx(
        {"f1": 0.8122, "accuracy": 0.6838}, abs=1e-4)
    scores = glue.baseline("stsb", np.array([0.5, 4.0]), dev([1.0, 2.0, 3.0]))
    assert scores == {"pearson": 0, "spearman": 0}


# --- loading: the official files ------------------------------------------------------------------

@needs_glue
@pytest.mark.parametrize("name, split, counts", [
    # as published; the 68.4% of MRPC dev are in many papers
    ("cola", "train", {0: 2528, 1: 6023}), ("cola", "dev", {0: 322, 1: 721}),
    ("cola", "test", {None: 1063}),
    ("sst2", "train", {0: 29780, 1: 37569}), ("sst2", "dev", {0: 428, 1: 444}),
    ("sst2", "test", {None: 1821}),
    ("mrpc", "train", {0: 1194, 1: 2474}), ("mrpc", "dev", {0: 129, 1: 279}),
    ("mrpc", "test", {None: 1725}),
    ("rte", "train", {0: 1249, 1: 1241}), ("rte", "dev", {0: 146, 1: 131}),
    ("rte", "test", {None: 3000}),
])
def test_official_files_have_the_official_counts(name, split, counts, caplog):
    examples = load_task(name, split, GLUE_DIR)
    assert Counter(example.label for example in examples) == counts
    assert all(example.text_a.strip() and (example.text_b is not None) == (name in ("mrpc", "rte"))
               for example in examples)
    assert not caplog.records  # no warning about row counts


@needs_glue
def test_first_and_last_examples_of_real_files():
    mrpc = load_task("mrpc", "dev", GLUE_DIR)
    assert mrpc[0].text_a.startswith("He said the foodservice pie business doesn 't fit")
    last = Example("John talked to Bill about himself.", None, 1)
    assert load_task("cola", "dev", GLUE_DIR)[-1] == last
    assert load_task("rte", "dev", GLUE_DIR)[0].label == 1  # not_entailment


@needs_glue
def test_the_table_has_the_hashes_of_the_real_mrpc():
    for url, digest in TASKS["mrpc"].sha256.items():
        data = (Path(GLUE_DIR) / "MRPC" / url.rpartition("/")[2]).read_bytes()
        assert sha256(data).hexdigest() == digest


# --- loading: files in their official form, warts included ----------------------------------------

TREES = "( a ( b c ) )|( d e )|(ROOT (S a b c))|(ROOT (S d e))"
MNLI = ("index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|"
        "sentence1_parse|sentence2_parse|sentence1|sentence2")
STSB = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2"
QQP = "id|qid1|qid2|question1|question2|is_duplicate"
MRPC = "\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String"


def test_mnli_has_two_dev_and_two_test_sets(tmp_path):
    write(tmp_path, "MNLI/train.tsv", MNLI + "|label1|gold_label",  # a quotation mark never closed
          f'0|31193|31193n|government|{TREES}|He said "no.|She said so.|neutral|neutral')
    genres = {"matched": ("slate", "contradiction"), "mismatched": ("letters", "entailment")}
    for split, (genre, label) in genres.items():
        start, others = f"0|63735|63735n|{genre}|{TREES}", "neutral|neutral|neutral|entailment"
        write(tmp_path, f"MNLI/dev_{split}.tsv",
              MNLI + "|label1|label2|label3|label4|label5|gold_label",
              f"{start}|One.|Two.|{others}|neutral|{label}")
        write(tmp_path, f"MNLI/test_{split}.tsv", MNLI, f"{start}|{genre} one.|Two.", end="")
    assert load_task("mnli", "train", tmp_path) == [Example('He said "no.', "She said so.", 1)]
    assert load_task("mnli", "dev_matched", tmp_path) == [Example("One.", "Two.", 2)]
    assert load_task("mnli", "dev_mismatched", tmp_path) == [Example("One.", "Two.", 0)]
    assert load_task("mnli", "test_mismatched", tmp_path) == [Example("letters one.", "Two.", None)]


def test_stsb_labels_are_scores(tmp_path):
    write(tmp_path, "STS-B/train.tsv", STSB + "|score",
          "0|main-captions|MSRvid|2012test|0001|none|none|A plane.|An air plane.|5.000",
          '7|main-news|headlines|2013|0002|none|none|"A|B"|0.200', end="")
    write(tmp_path, "STS-B/test.tsv", STSB,
          "0|main-captions|MSRvid|2012test|0024|none|none|A girl.|A woman.")
    assert load_task("stsb", "train", tmp_path) == [
        Example("A plane.", "An air plane.", 5.0), Example('"A', 'B"', 0.2)]
    assert load_task("stsb", "test", tmp_path) == [Example("A girl.", "A woman.", None)]


def test_qqp_skips_and_counts_the_rows_with_too_few_columns(tmp_path, caplog):
    write(tmp_path, "QQP/train.tsv", QQP, "1|3|4|Why?|Why not?|1",
          "2|5|6|broken off", " here|in two|0", "3|7|8|How?|When?|0")
    assert [example.label for example in load_task("qqp", "train", tmp_path)] == [1, 0]
    assert "skipped 2 rows" in caplog.text
    write(tmp_path, "QQP/dev.tsv", QQP, "1|3|4|Why?|Why not?|1|more")
    with pytest.raises(InputError, match=r"dev.tsv, line 2: this row does not have 6 columns"):
        load_task("qqp", "dev", tmp_path)
    write(tmp_path, "QQP/test.tsv", "id|question1|question2", "0|Why?|Why not?", "1|cut")
    # a test row must not get lost: the server counts them
    with pytest.raises(InputError, match="line 3: this row does not have 3 columns"):
        load_task("qqp", "test", tmp_path)


def test_qnli_rte_and_wnli_spell_labels_in_their_own_ways(tmp_path):
    write(tmp_path, "QNLI/dev.tsv", "index|question|sentence|label",
          '0|Who?|He "did.|not_entailment', "1|Where?|There.|entailment")
    write(tmp_path, "RTE/dev.tsv", "index|sentence1|sentence2|label", "0|One.|Two.|not_entailment")
    write(tmp_path, "WNLI/dev.tsv", "\ufeffindex|sentence1|sentence2|label",
          "0|It fell.|The cup fell.|1")
    assert load_task("qnli", "dev", tmp_path) == [
        Example("Who?", 'He "did.', 1), Example("Where?", "There.", 0)]
    assert load_task("rte", "dev", tmp_path) == [Example("One.", "Two.", 1)]
    assert load_task("wnli", "dev", tmp_path) == [Example("It fell.", "The cup fell.", 1)]


@pytest.mark.parametrize("file", ["AX/AX.tsv", "diagnostic/diagnostic.tsv"])
def test_ax_under_either_of_its_names(tmp_path, file):
    write(tmp_path, file, "index|sentence1|sentence2", "0|The cat sat.|The cat did not sit.")
    example = Example("The cat sat.", "The cat did not sit.", None)
    assert load_task("ax", "test", tmp_path) == [example]


def test_mrpc_is_split_by_the_pairs_of_ids(tmp_path):
    write(tmp_path, "MRPC/msr_paraphrase_train.txt", MRPC,
          "1|10|11|a|b", '0|11|10|"c|d', "0|12|13|e|f")
    write(tmp_path, "MRPC/msr_paraphrase_test.txt", MRPC, "1|20|21|g|h")
    write(tmp_path, "MRPC/mrpc_dev_ids.tsv", "11|10")
    assert load_task("mrpc", "train", tmp_path) == [Example("a", "b", 1), Example("e", "f", 0)]
    # The pair (11, 10), not (10, 11).
    assert load_task("mrpc", "dev", tmp_path) == [Example('"c', "d", 0)]
    # No label, though the file has it.
    assert load_task("mrpc", "test", tmp_path) == [Example("g", "h", None)]


def test_mrpc_as_older_scripts_wrote_it(tmp_path):
    for split in ("train", "dev"):
        write(tmp_path, f"MRPC/{split}.tsv", MRPC.strip("\ufeff"), f"1|10|11|{split} a|b")
    write(tmp_path, "MRPC/test.tsv", "index|#1 ID|#2 ID|#1 String|#2 String", "0|20|21|g|h")
    assert load_task("mrpc", "dev", tmp_path) == [Example("dev a", "b", 1)]
    assert load_task("mrpc", "test", tmp_path) == [Example("g", "h", None)]


def test_a_wrong_row_count_is_a_warning_that_names_both(tmp_path, caplog):
    write(tmp_path, "CoLA/dev.tsv", "gj04|1||They ran.", "", "gj04|0|*|They runned.", end="")
    assert [example.label for example in load_task("cola", "dev", tmp_path)] == [1, 0]
    assert "has 2 examples here, officially 1,043" in caplog.text


def test_a_text_may_have_any_length(tmp_path):
    write(tmp_path, "SST-2/dev.tsv", "sentence|label", "fine " * 40_000 + "|1")
    assert load_task("sst2", "dev", tmp_path) == [Example("fine " * 40_000, None, 1)]


def test_windows_line_ends_and_odd_separators_inside_a_text(tmp_path):
    write(tmp_path, "CoLA/dev.tsv", "gj04|1||A\u2028B\x0b C\r", "gj04|0|*|Ünï🙂\r", end="")
    texts = [example.text_a for example in load_task("cola", "dev", tmp_path)]
    assert texts == ["A\u2028B\x0b C", "Ünï🙂"]


@pytest.mark.parametrize("file, rows, message", [
    ("SST-2/dev.tsv", ["text|label", "fine|1"], "line 1: the header lacks 'sentence'"),
    ("SST-2/dev.tsv", [""], "line 1: the header lacks 'sentence'"),
    ("SST-2/dev.tsv", ["sentence", "fine"], "line 1: the header lacks 'label'"),
    ("SST-2/dev.tsv", ["sentence|label", "fine|1", "fine"],
     "line 3: this row does not have 2 columns"),
    ("SST-2/dev.tsv", ["sentence|label", "fine|1", "fi|ne|1"],
     "line 3: this row does not have 2 columns"),
    ("SST-2/dev.tsv", ["sentence|label", "fine|2"], "line 2: label '2' is not one of 0, 1"),
    ("SST-2/dev.tsv", ["sentence|label", "", "fine|"], "line 3: label '' is not one of 0, 1"),
    ("CoLA/dev.tsv", ["source|label|star|sentence"], "line 1: label 'label' is not one of 0, 1"),
    ("RTE/dev.tsv", ["index|sentence1|sentence2|label", "0|a|b|neutral"],
     "line 2: label 'neutral' is not one of entail"),
    ("STS-B/dev.tsv", [STSB + "|score", "0|a|b|c|d|e|f|g|h|5.1"],
     "line 2: score '5.1' is not a number from 0 to 5"),
    ("STS-B/dev.tsv", [STSB + "|score", "0|a|b|c|d|e|f|g|h|nan"],
     "line 2: score 'nan' is not a number from 0 to 5"),
    ("STS-B/dev.tsv", [STSB + "|score", "0|a|b|c|d|e|f|g|h|x"],
     "line 2: score 'x' is not a number from 0 to 5"),
])
def test_a_malformed_file_is_named_with_its_line(tmp_path, file, rows, message):
    write(tmp_path, file, *rows)
    name = next(name for name, task in TASKS.items() if task.folder == file.split("/")[0])
    with pytest.raises(InputError, match=file + ", " + message) as error:
        load_task(name, "dev", tmp_path)
    assert "\n" not in str(error.value)


def test_a_malformed_list_of_mrpc_dev_ids_is_named(tmp_path):
    write(tmp_path, "MRPC/msr_paraphrase_train.txt", MRPC, "1|10|11|a|b")
    write(tmp_path, "MRPC/mrpc_dev_ids.tsv", "10|11", "12")
    with pytest.raises(InputError, match="dev_ids.tsv, line 2: this row does not have 2 columns"):
        load_task("mrpc", "dev", tmp_path)


def test_a_file_without_an_example_is_named(tmp_path):
    write(tmp_path, "SST-2/dev.tsv", "sentence|label")
    with pytest.raises(InputError, match="SST-2/dev.tsv holds nothing of sst2 dev"):
        load_task("sst2", "dev", tmp_path)


@pytest.mark.parametrize("before", [
    b"sentence\tlabel\n", b"\xef\xbb\xbfsentence\tlabel\n",
    b"sentence\tlabel\n" + 5000 * b"fine \t1\n"])
def test_invalid_utf8_is_named_with_its_line(tmp_path, before):
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2/dev.tsv").write_bytes(before + b"caf\xe9\t1\n")
    line = before.count(b"\n") + 1
    with pytest.raises(InputError, match=f"dev.tsv, line {line}: this is not UTF-8:"):
        load_task("sst2", "dev", tmp_path)


@pytest.mark.parametrize("task, split, unknown", [("mrcp", "dev", "mrcp"), ("ax", "dev", "dev")])
def test_unknown_tasks_and_splits_are_named_before_any_download(task, split, unknown):
    """The command line offers the known ones alone; this is for a program that calls glue.py."""
    with pytest.raises(KeyError, match=unknown):  # a download that fails is an InputError
        load_task(task, split, "nowhere")


# --- loading: downloads ---------------------------------------------------------------------------

class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; a name in `cut` breaks off half-way, once."""
    files: dict[str, bytes] = {}
    cut: set[str] = set()

    def do_GET(self):
        name, data = self.path[1:], self.files[self.path[1:]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:len(data) // 2] if name in self.cut else data)
        self.cut.discard(name)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """A function: puts files on a local server and their addresses and sha256 into the table."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def put(task, sha256_of=None, cut=(), **files):
        Server.cut = set(cut)
        Server.files = {name.replace("__", "."): data for name, data in files.items()}
        downloads = {f"http://127.0.0.1:{server.server_port}/{name}":
                     sha256(sha256_of or data).hexdigest() for name, data in Server.files.items()}
        monkeypatch.setitem(TASKS, task, replace(TASKS[task], sha256=downloads))
    yield put
    server.shutdown()
    server.server_close()


def zipped(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in members.items():
            file.writestr(name.replace("__", "/") + ".tsv", text)
    return buffer.getvalue()


RTE = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n"


def test_a_missing_task_is_downloaded_checked_and_unpacked(serve, tmp_path):
    serve("rte", RTE__zip=zipped(RTE__dev=RTE, RTE__train=RTE))
    assert load_task("rte", "dev", tmp_path) == [Example("a", "b", 0)]
    found = sorted(path.name for path in tmp_path.rglob("*"))
    assert found == ["RTE", "dev.tsv", "train.tsv"]  # no archive is left
    Server.files = {}
    assert load_task("rte", "train", tmp_path) == [Example("a", "b", 0)]  # already there


def test_a_download_leaves_the_folder_to_those_who_share_it(serve, tmp_path):
    serve("rte", RTE__zip=zipped(RTE__dev=RTE, RTE__train=RTE))
    tmp_path.chmod(0o775)
    load_task("rte", "dev", tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o775
    assert (tmp_path / "RTE").stat().st_mode & 0o005 == 0o005


def test_mrpc_comes_as_three_files(serve, tmp_path):
    text = (MRPC + "\n1|10|11|a|b\n0|12|13|c|d\n").replace("|", "\t").encode()
    serve("mrpc", msr_paraphrase_train__txt=text, msr_paraphrase_test__txt=text,
          mrpc_dev_ids__tsv=b"12\t13\n")
    assert load_task("mrpc", "dev", tmp_path) == [Example("c", "d", 0)]
    assert len(list((tmp_path / "MRPC").iterdir())) == 3


def test_a_wrong_hash_leaves_nothing_behind(serve, tmp_path):
    serve("rte", sha256_of=b"something else", RTE__zip=zipped(RTE__dev=RTE))
    with pytest.raises(InputError, match="invalid hash value") as error:
        load_task("rte", "dev", tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.*"))


def test_a_broken_transfer_leaves_nothing_behind_and_can_be_repeated(serve, tmp_path):
    serve("rte", cut=["RTE.zip"], RTE__zip=zipped(RTE__dev=RTE))
    with pytest.raises(InputError):
        load_task("rte", "dev", tmp_path)
    assert not list(tmp_path.rglob("*.*"))
    assert load_task("rte", "dev", tmp_path) == [Example("a", "b", 0)]


def test_a_member_that_leads_out_of_the_folder_is_not_written(serve, tmp_path):
    serve("rte", RTE__zip=zipped(RTE__dev=RTE, **{"..__evil": "text"}))
    load_task("rte", "dev", tmp_path / "data")
    assert list(tmp_path.rglob("*.tsv")) == [tmp_path / "data/RTE/dev.tsv"]


def test_without_a_network_one_line_says_which_file_to_put_where(serve, tmp_path, monkeypatch):
    nowhere = replace(TASKS["rte"], sha256={"http://127.0.0.1:9/RTE.zip": "0"})
    monkeypatch.setitem(TASKS, "rte", nowhere)
    message = f"could not fetch http://127.0.0.1:9/RTE.zip .* at {tmp_path}/RTE.zip"
    with pytest.raises(InputError, match=message) as error:
        load_task("rte", "dev", tmp_path)
    assert "\n" not in str(error.value)


def test_an_archive_without_the_split_is_named(serve, tmp_path):
    serve("rte", RTE__zip=zipped(RTE__train=RTE))
    with pytest.raises(InputError, match="RTE.zip did not hold dev.tsv"):
        load_task("rte", "dev", tmp_path)


# --- results --------------------------------------------------------------------------------------

def test_a_submission_numbers_the_answers_and_clips_scores():
    scores = glue.server_file(TASKS["stsb"], np.array([-1.0, 2.34567, 5.5]))
    assert scores == "index\tprediction\n0\t0.000\n1\t2.346\n2\t5.000\n"
    classes = glue.server_file(TASKS["rte"], np.array([1, 0]))
    assert classes == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"


def test_all_nine_tasks_their_score_and_the_eleven_files_of_a_submission(
        arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ("--predict", "out", "--save", "models")
    glue.main(command(*options, args=arguments(task="all")))
    runs = {path.name.split("-")[0]: json.loads(path.read_text())
            for path in Path("runs/glue").glob("*.json")}
    assert set(runs) == set(TASKS) - {"ax"}
    printed = capsys.readouterr().out
    for column, kind in enumerate(("last", "baseline"), start=2):  # GLUE score ... ...
        score = np.mean([np.mean(list(run[kind].values())) for run in runs.values()])
        line, = (line for line in printed.splitlines() if line.startswith("GLUE score"))
        assert line.split()[column] == f"{score:.4f}"
    assert {path.name for path in Path("models").iterdir()} == set(runs)
    assert all((path / "model.safetensors").exists() for path in Path("models").iterdir())
    words = {"MNLI-m": "entailment neutral contradiction", "QNLI": "entailment not_entailment"}
    words |= {"MNLI-mm": words["MNLI-m"], "AX": words["MNLI-m"], "RTE": words["QNLI"]}
    assert {path.name for path in Path("out").iterdir()} == {f"{name}.tsv" for name in [
        "CoLA", "SST-2", "MRPC", "STS-B", "QQP", "WNLI", *words]}
    for path in Path("out").iterdir():
        header, *lines = [line.split("\t") for line in path.read_text().splitlines()]
        assert header == ["index", "prediction"]
        assert [line[0] for line in lines] == ["0", "1", "2", "3", "4"]
        if path.name != "STS-B.tsv":
            assert {line[1] for line in lines} <= set(words.get(path.stem, "0 1").split())


def test_the_run_file_is_named_after_the_run(arguments):
    args = arguments("--adapt", "typhoon", "--seed", "7", "--model", "runs/entropy tiny")
    assert glue.run_file(args) == Path("runs/glue/sst2-runs-entropy-tiny-typhoon-7.json")
    assert glue.run_file(arguments("--json", "here.json")) == Path("here.json")


@pytest.mark.parametrize("options, message", [
    (["--lr", "1e-3"], "holds a run that differs in lr (the default there, 0.001 here)"),
    (["--seed", "1"], "differs in seed (0 there, 1 here)"),
    (["--adapt", "random"], "differs in adapt (none there, random here)"),
    (["--bf16"], "differs in bf16 (the default there, True here)"),
    (["--corruption", ".8", ".1", ".1"], "differs in corruption ([1.0, 0.0, 0.0] there"),
    (["--task", "rte"], "differs in task (sst2 there, rte here)"),
])
def test_a_result_with_other_settings_is_never_replaced(arguments, tmp_path, options, message):
    """It is refused before the data are read: there are none in `nowhere`."""
    args, file = arguments(), tmp_path / "run.json"
    glue.main(command("--json", str(file), args=args))
    before = file.read_bytes()
    with pytest.raises(InputError) as error:
        glue.main(command("--json", str(file), "--data-dir", "nowhere", *options, args=args))
    assert str(file) in str(error.value) and message in str(error.value)
    assert "choose another --json" in str(error.value) and file.read_bytes() == before


def test_a_result_from_other_weights_is_never_replaced(arguments, model_dir, tokenizer, tmp_path):
    args, file = arguments(), tmp_path / "run.json"
    glue.main(command("--json", str(file), args=args))
    config = tiny().config
    torch.manual_seed(9)
    save_pretrained(BertForMaskedLM(config), tokenizer, model_dir)  # trained again in place
    with pytest.raises(InputError, match=f"{file} holds a run that differs in weights"):
        glue.main(command("--json", str(file), args=args))
    file.write_text(json.dumps({"steps": 3}))  # some other program's
    with pytest.raises(InputError, match=f"{file} is not a result of glue.py"):
        glue.main(command("--json", str(file), args=args))
    assert file.read_text() == '{"steps": 3}'


def test_the_same_run_may_be_written_again_and_a_damaged_file_too(arguments, tmp_path, capsys):
    args, file = arguments(), tmp_path / "run.json"
    glue.main(command("--json", str(file), args=args))
    first = json.loads(file.read_text())
    glue.main(command("--json", str(file), "--predict", str(tmp_path / "out"), args=args))
    again = json.loads(file.read_text())
    assert again["last"] == first["last"] and again["args"]["predict"]
    file.write_text(json.dumps(first)[:50])
    glue.main(command("--json", str(file), args=args))
    assert without_times(json.loads(file.read_text())) == without_times(first)


def test_the_fine_tuned_model_is_kept_and_predicts_the_same_again(arguments, data_dir, tmp_path):
    file = tmp_path / "run.json"
    options = ("--save", str(tmp_path / "kept"), "--json", str(file), "--lr", "1e-3")
    glue.main(command(*options, args=arguments(task="rte")))
    run = json.loads(file.read_text())
    model, tokenizer = load_pretrained(tmp_path / "kept", "classification")
    data = glue.tokenise(load_task("rte", "dev", data_dir), tokenizer, 128, model)
    assert glue.predict(model, data).tolist() == run["dev"]["predictions"]
    assert tokenizer.truncation is None


def test_a_full_disk_takes_the_saved_model_but_not_the_scores(arguments, tmp_path):
    """No file may grow beyond 100 kB: the model's weights do not fit, the run's file does."""
    kept = ("--save", str(tmp_path / "kept"), "--json", str(tmp_path / "run.json"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunError, match="model.safetensors cannot be written"):
            glue.main(command(*kept, args=arguments()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads((tmp_path / "run.json").read_text())["task"] == "sst2"


# --- the command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (["--task", "mrcp"], "argument --task: invalid choice: 'mrcp'"),
    (["--task", "ax"], "argument --task: invalid choice: 'ax'"),
    (["--epochs", "0"], "argument --epochs: 0 is not at least 1"),
    (["--batch-size", "0"], "argument --batch-size: 0 is not"),
    (["--adapt-epochs", "-1"], "argument --adapt-epochs: -1 is not"),
    (["--lr", "0"], "argument --lr: 0 is not above 0"), (["--lr", "nan"], "argument --lr: nan"),
    (["--adapt-lr", "inf"], "argument --adapt-lr: inf"),
    (["--warmup", "1.5"], "--warmup: 1.5 is not at least 0 and at most 1"),
    (["--dropout", "1"], "--dropout: 1 is not at least 0 and below 1"),
    (["--fraction", "0"], "--fraction: 0 is not at most 1 and above 0"),
    (["--mask-rate", "1"], "--mask-rate: 1 is not"),
    (["--corruption", "1", "1", "0"], "three shares that sum to 1"),
    (["--weight-decay", "-1"], "--weight-decay: -1"), (["--seed", "-1"], "--seed: -1"),
    (["--seq-len", "7"], "--seq-len: 7"),
    (["--freeze", "all"], "--freeze: 'all' is not none, embeddings, encoder or a number"),
    (["--adapt", "mask"], "argument --adapt: 'mask' is unknown: choose from random"),
    (["--typhoon-loss", "kd"], "--typhoon-loss: invalid choice"),
    (["--entropy-select", "top"], "--entropy-select: invalid choice"),
    (["--task", "all", "--json", "x.json"], "--json x.json: leave it out"),
])
def test_wrong_arguments_are_named_in_one_line(arguments, options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments(*options)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and message in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("options, message", [
    (["--freeze", "3"], "--freeze 3: the model has 2 layers"),
    (["--model", "nowhere/at/all"], "nowhere/at/all is not a model directory"),
    (["--seq-len", "129"], "has 128 positions: lower --seq-len"),
    (["--device", "cuda:99"], "cuda:99"),
])
def test_what_does_not_fit_the_model_or_the_machine_is_named_before_anything_slow(
        arguments, options, message):
    nothing = glue.Data([], {"dev": []}, {})  # so that going on is another error
    with pytest.raises(InputError, match=message) as error:
        finetune(arguments(*options), nothing)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_model_directory_that_lacks_a_file_is_named(arguments, model_dir, file):
    (model_dir / file).unlink()
    with pytest.raises(InputError, match=file):
        finetune(arguments())


def test_a_bad_file_of_the_last_task_stops_all_before_the_first(
        arguments, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(data_dir, "WNLI/dev.tsv", "index|sentence1|sentence2|label", "0|a|b|2")
    with pytest.raises(InputError, match="WNLI/dev.tsv, line 2: label '2' is not one of 0, 1"):
        glue.main(command(args=arguments(task="all")))
    assert not Path("runs").exists()


@pytest.mark.parametrize("place, message", [
    ("full", "this folder is not empty"), ("full/file", "not a folder that can be written")])
def test_a_model_is_never_saved_over_something(arguments, tmp_path, place, message, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(SystemExit):
        arguments("--save", str(tmp_path / place))
    assert message in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    arguments("--save", str(tmp_path / "empty"))


def test_the_command_ends_in_one_line_and_status_2(tmp_path):
    write(tmp_path, "SST-2/train.tsv", "sentence|label", "fine|1", "fine|one")
    command = [sys.executable, glue.__file__, "--task", "sst2", "--model", "m",
               "--data-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("glue.py: ") and "line 3: label 'one'" in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["SST-2", "train.tsv"]


def test_options_are_listed_in_groups(capsys):
    with pytest.raises(SystemExit):
        glue.main(["--help"])
    text = capsys.readouterr().out
    groups = ["what to run:", "fine-tuning:", "adaptation before it:", "what to keep:"]
    where = [text.index("\n" + group) for group in groups]
    assert where == sorted(where) and where[2] < text.index("--adapt-lr", where[2]) < where[3]
