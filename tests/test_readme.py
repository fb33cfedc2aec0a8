"""What the README shows is what the code does."""
import re
import shutil
from pathlib import Path

import pytest
import stats
import torch
import train
from masking import Context, find_strategy
from model import BertConfig, BertForMaskedLM
from test_train import SMALL, corpus  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "tests" / "data" / "results"


@pytest.fixture
def spans(tmp_path):
    """The README's strategy in a file; its name as --masking takes it."""
    code, = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    (tmp_path / "spans.py").write_text(code)
    return f"{tmp_path}/spans.py:Spans"


def test_the_readmes_strategy_masks_runs_of_three_at_the_rate(spans, english):
    _, texts = english
    batch = texts.batch(torch.arange(400))
    config = BertConfig(vocab_size=2000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    context = Context(0.3, BertForMaskedLM(config), texts.token_counts(),
                      texts.vocab.continuation, texts.vocab.mask_id)
    mask = find_strategy(spans)(context).mask(batch, torch.Generator().manual_seed(0))
    assert not (mask & ~batch.maskable).any()
    assert mask.sum().item() / batch.maskable.sum().item() == pytest.approx(0.3, rel=0.01)
    alone = mask[:, 1:-1] & ~mask[:, 2:] & ~mask[:, :-2]  # masked, and neither neighbour is
    assert alone.sum() < 0.06 * mask.sum()  # 0.49 if each token were drawn by itself


def test_the_readmes_strategy_trains(spans, corpus, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    train.main(["--masking", spans, "--corpus", str(corpus), *SMALL])
    assert "this model (Spans)" in capsys.readouterr().out
    assert (tmp_path / "runs" / "Spans" / "exam.json").exists()


def test_the_readmes_report_is_that_of_its_runs(tmp_path):
    """Table and comparisons byte for byte, and how many of them show a difference."""
    shutil.copytree(RESULTS / "strategies", tmp_path / "strategies")
    report = stats.write_report(tmp_path / "strategies", against="random")
    tables = re.findall(r"\| strategy.*?(?=\n\n)", report, flags=re.S)
    assert len(tables) == 2 and all(table in README for table in tables)
    verdict, = re.findall(r"\*\*Verdict\.\*\* (.*?):", report)
    assert verdict in " ".join(README.split())


@pytest.mark.parametrize("against, better, worse", [
    ("rarity", "entropy", "rarity"), ("random-kd", "random-kd", "entropy-kd")])
def test_the_readmes_two_other_comparisons_are_those_of_its_runs(against, better, worse, tmp_path):
    shutil.copytree(RESULTS / "strategies", tmp_path / "strategies")
    report = stats.write_report(tmp_path / "strategies", against=against)
    claim, = re.findall(rf"{better} beats {worse} (by [^;.]*\.[^;.]*\.[^;.]*\.\d+\])", report)
    assert claim.removeprefix("by ") in " ".join(README.split())


@pytest.mark.parametrize("preset", ["tiny", "mini"])
def test_the_readmes_worth_of_the_start_is_that_of_its_runs(preset, tmp_path):
    shutil.copytree(RESULTS / f"start-{preset}", tmp_path / "runs")
    report = stats.write_report(tmp_path / "runs")
    row, = re.findall(rf"\| {preset}, [\d,]+ \| (.*) \|", README)
    local, plain, difference, likelihood, plain_likelihood = row.split(" | ")
    assert re.search(rf"\| random \| 3 \| {local} \|.* \| {likelihood} \|", report)
    assert re.search(rf"\| plain \| 3 \| {plain} \|.* \| {plain_likelihood} \|", report)
    mean, interval = difference.split(" ", 1)
    assert f"| {mean} | {interval} |" in report.replace("+", "")


def test_the_readme_can_be_read_in_one_sitting():
    assert README.count("\n") <= 300
