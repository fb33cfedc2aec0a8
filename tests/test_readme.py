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
REPORTS = {"strategies": None, "start-tiny": None, "start-mini": None, "english-exam": None,
           "english": None, "adaptation": "f1"}  # folder: --metric


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


@pytest.fixture
def runs(tmp_path):
    """A copy of the kept runs, so that a report is written beside the copy."""
    return shutil.copytree(RESULTS, tmp_path / "results")


@pytest.mark.parametrize("name", REPORTS)
def test_the_kept_reports_are_those_of_their_runs(name, runs):
    stats.write_report(runs / name, metric=REPORTS[name])
    assert (runs / name / "report.md").read_bytes() == (RESULTS / name / "report.md").read_bytes()


def test_every_kept_run_is_in_a_report():
    assert sorted(folder.name for folder in RESULTS.iterdir()) == sorted(REPORTS)


def test_the_readmes_tables_are_those_of_the_reports():
    tables = re.findall(r"\| strategy .*?(?=\n\n)", README, flags=re.S)
    reports = "".join(path.read_text() for path in RESULTS.glob("*/report.md"))
    assert len(tables) == 2 and all(table in reports for table in tables)


def quote(strategy, baseline, task, difference, low, high):
    task = "" if task == "mlm" else f", {task}"
    return f"{strategy} − {baseline}{task}: {difference:+z.4f} [{low:+z.4f}, {high:+z.4f}]"


def test_the_readmes_differences_are_those_of_their_runs(runs):
    """`entropy − rarity: +0.0119 [+0.0028, +0.0211]`, either way round, of the folders that the
    section names; for a GLUE task, `entropy − rarity, sst2: ...`."""
    text = " ".join(README.split())
    checked = 0
    for section in re.split(" ##+ ", text):
        found = set()
        for name in (name for name in REPORTS if f"tests/data/results/{name}`" in section):
            report = stats.analyse(runs / name, metric=REPORTS[name], resamples=2)  # 2: t alone
            for pair in report["pairs"]:
                one, other, task = pair["strategy"], pair["baseline"], pair["task"]
                mean, low, high = pair["mean"], pair["low"], pair["high"]
                found.add(quote(one, other, task, mean, low, high))
                found.add(quote(other, one, task, -mean, -high, -low))
        for quoted in re.findall(r"[\w-]+ − [\w-]+(?:, [\w ]+)?: [-+][\d.]+ \[.*?\]", section):
            assert quoted in found
            checked += 1
    assert checked == len(re.findall(r"\[[-+][\d.]+, [-+][\d.]+\]", text)) > 0  # none escapes


def test_the_readme_can_be_read_in_one_sitting():
    assert README.count("\n") <= 300
