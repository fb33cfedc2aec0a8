"""What several test files share: a small model, and real English cut into windows."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import train
from model import BertConfig, BertForMaskedLM

torch.set_num_threads(1)  # tiny models: a second thread only waits
os.environ["OMP_NUM_THREADS"] = "1"  # the same for child processes

# Two cores: where the whole suite is asked for, a second process takes these, half of its minutes.
SECOND_HALF = ["tests/test_readme.py", "tests/test_stats.py", "tests/test_train.py"]


def pytest_configure(config):
    config.second = None
    if config.args_source is config.ArgsSource.TESTPATHS and not config.option.collectonly:
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args, *SECOND_HALF]
        config.second_output = tempfile.TemporaryFile("w+", encoding="utf-8")
        config.second = subprocess.Popen(command, cwd=config.rootpath, stdout=config.second_output,
                                         stderr=subprocess.STDOUT)


def pytest_ignore_collect(collection_path, config):
    if config.second and collection_path in [config.rootpath / name for name in SECOND_HALF]:
        return True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    nothing = pytest.ExitCode.NO_TESTS_COLLECTED  # -k may choose tests of one half alone
    if session.config.second and (status := session.config.second.wait()) != nothing:
        if session.exitstatus in (pytest.ExitCode.OK, nothing):
            session.exitstatus = status


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    if config.second:
        terminalreporter.section(" ".join(SECOND_HALF))
        config.second_output.seek(0)
        terminalreporter.write(config.second_output.read())
        terminalreporter.section("the other tests")


@pytest.fixture
def model():
    """2 layers, width 16, 60 word pieces, no dropout; weights so large that predictions differ."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=24, max_position_embeddings=40, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)
    model = BertForMaskedLM(config)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


@pytest.fixture(scope="session")
def english():
    """(tokenizer, Texts): the language reference that ships with Python, in 2,000 word pieces and
    windows of 64."""
    topics = pytest.importorskip("pydoc_data.topics").topics
    documents = train.as_documents(text.split("\n\n") for text in topics.values())
    tokenizer = train.train_tokenizer(documents, 2000)
    vocab = train.Vocab(tokenizer, 2000, torch.device("cpu"))
    windows = torch.from_numpy(train.pack(documents, tokenizer, 64, "test"))
    return tokenizer, train.Texts(windows, vocab)


@pytest.fixture(scope="session")
def glue_dir():
    """The folder with real GLUE files."""
    if not (folder := os.environ.get("GLUE_DIR")):
        pytest.skip("GLUE_DIR is not set")
    return Path(folder)
