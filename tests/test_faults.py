"""What goes wrong: bad input, a full disk, odd text, two processes at once, a lost process. One
line says so."""
import contextlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import glue
import masking
import pytest
import stats
import torch
import train
from model import (SPECIAL_TOKENS, BertConfig, BertForMaskedLM, load_tokenizer, read_safetensors,
                   run_cli, save_pretrained, wordpiece_tokenizer, write_safetensors)
from test_train import ROOT, SMALL, corpus, weights  # noqa: F401 (corpus is a fixture)

WORDS = ["good", "bad", "cat", "sat", "##s", "."]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 40}


# --- a folder with everything that can be wrong ---------------------------------------------------

def save_model(directory: Path, words=WORDS, **fields):
    torch.manual_seed(0)
    vocab = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *words])}
    config = BertConfig(**{"vocab_size": len(vocab), **SIZES, **fields})
    save_pretrained(BertForMaskedLM(config), wordpiece_tokenizer(vocab), directory)


def change_json(path: Path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop_weights(path: Path, prefix: str):
    kept = {name: w for name, w in read_safetensors(path).items() if not name.startswith(prefix)}
    write_safetensors(path, kept)


def change_weight(path: Path, name: str, value: torch.Tensor):
    write_safetensors(path, read_safetensors(path) | {name: value})


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
DAMAGE = {  # name of a model directory -> what is done to it
    "cut": lambda d: os.truncate(path := d / "model.safetensors", path.stat().st_size - 7),
    "no-config": lambda d: (d / "config.json").unlink(),
    "no-weights": lambda d: (d / "model.safetensors").unlink(),
    "no-tokenizer": lambda d: (d / "tokenizer.json").unlink(),
    "bad-tokenizer": lambda d: (d / "tokenizer.json").write_text('{"version": '),
    "bad-vocab": lambda d: ((d / "tokenizer.json").unlink(), (d / "tokenizer_config.json").unlink(),
                            (d / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")),
    "stray-id": lambda d: change_json(
        d / "tokenizer.json", model=json.loads((d / "tokenizer.json").read_text())["model"] |
        {"vocab": load_tokenizer(d).get_vocab() | {"cat": 999}}),
    "not-json": lambda d: (d / "config.json").write_text("{'vocab_size': 11}"),
    "no-heads": lambda d: change_json(d / "config.json", num_attention_heads=0),
    "minus": lambda d: change_json(d / "config.json", intermediate_size=-24),
    "wide": lambda d: change_json(d / "config.json", hidden_size=32),
    "deep": lambda d: change_json(d / "config.json", num_hidden_layers=10 ** 9),
    "huge": lambda d: change_json(d / "config.json", vocab_size=10 ** 12),
    "huger": lambda d: change_json(d / "config.json", intermediate_size=10 ** 18),
    "headless": lambda d: drop_weights(d / "model.safetensors", "cls."),
    "text-size": lambda d: change_json(d / "config.json", hidden_size="16"),
    "dropout": lambda d: change_json(d / "config.json", hidden_dropout_prob=1.5),
    "roberta": lambda d: change_json(d / "config.json", model_type="roberta"),
    "scalar": lambda d: change_weight(d / "model.safetensors", QUERY, torch.tensor(1.0)),
    "narrow": lambda d: change_weight(d / "model.safetensors", QUERY, torch.zeros(16, 3)),
    "pickle": lambda d: ((d / "model.safetensors").unlink(),
                         (d / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'ls'\ntR."))}
TEXTS = {
    "text.txt": b"".join(b"the cat sat on mat %d .\n\n" % i for i in range(200)),
    "empty.txt": b"", "blank.txt": b"\n \n\n", "short.txt": b"one\n\ntwo",
    "line.txt": b"the cat sat on the mat . " * 9999, "again.txt": b"the cat sat .\n\n" * 9999,
    "binary.txt": b"text\0text", "latin.txt": "the cat\n\ncaf\u00e9".encode("latin-1"),
    "marked.txt": b"\xef\xbb\xbfcat \xff", "utf16.txt": "the cat\n\nsat".encode("utf-16"),
    "foreign.txt": "".join(f"{chr(0x4e00 + i)}\n\n" for i in range(9999)).encode(),
    "full/file": b"x", "bad.jsonl": b'{"text": "the cat"}\nthe dog\n',
    "textless.jsonl": b'{"body": "the cat"}\n', "half.jsonl": b'{"text": "a \\ud83d"}\n' * 2}
COLUMNS = {  # folder of data -> the lines of its SST-2/train.tsv and dev.tsv
    "sst2": ("sentence\tlabel\ngood\t1\nbad\t0", "sentence\tlabel\ngood\t1\nbad\t0"),
    "sst2-header": ("text\tlabel\ngood\t1", "sentence\tlabel\ngood\t1"),
    "sst2-columns": ("sentence\tlabel\ngood\t1\nbad\t0\t0", "sentence\tlabel\ngood\t1"),
    "sst2-label": ("sentence\tlabel\ngood\t2", "sentence\tlabel\ngood\t1"),
    "sst2-unlabelled": ("sentence\tlabel\ngood\t1", "index\tsentence\n0\tgood"),
    "sst2-empty": ("", ""), "sst2-rowless": ("sentence\tlabel\n", "sentence\tlabel\n"),
    "sst2-latin": ("sentence\tlabel\ncaf\udce9\t1", "sentence\tlabel\ngood\t1")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Sound and damaged models, runs, texts and GLUE folders, under the names that CASES use."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "model")
    save_model(root / "other", words=["dog", *WORDS])
    save_model(root / "swapped", words=WORDS[::-1])
    save_model(root / "padded-vocab", vocab_size=16)
    for name, damage in DAMAGE.items():
        shutil.copytree(root / "model", root / name)
        damage(root / name)
    for name, data in TEXTS.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    for name, files in COLUMNS.items():
        (root / name / "SST-2").mkdir(parents=True)
        for split, text in zip(("train", "dev"), files):
            path = root / name / "SST-2" / f"{split}.tsv"
            path.write_text(text, encoding="utf-8", errors="surrogateescape")
    (root / "empty").mkdir()
    settings = vars(train.parse_args(["--corpus", str(root / "text.txt"), *SMALL, "--out",
                                      str(root / "run")])) | {"ranks": 1}
    for name, text in (("run", json.dumps(settings)), ("run-not-json", "{"), ("run-list", "[]"),
                       ("run-ranks", json.dumps(settings | {"ranks": 8})),
                       ("run-lost", json.dumps(settings | {"masking": "lost.py:Lost"}))):
        (root / name).mkdir()
        (root / name / "train_args.json").write_text(text)
    shutil.copytree(root / "model", root / "demo")
    (root / "demo/train_args.json").write_text("not JSON")
    (root / "results/report.md").mkdir(parents=True)  # where the report should go
    run = {"task": "cola", "model": "m", "strategy": "none", "seed": 0, "args": {}, "versions": {},
           "epochs": [], "last": {"matthews": 0.5},
           "dev": {"predictions": [1], "labels": [1]}, "seconds": 1.0}
    (root / "results/one.json").write_text(json.dumps(run))
    (root / "damaged-results").mkdir()
    (root / "damaged-results/one.json").write_text(json.dumps(run)[:50])
    return root


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


def run(module, arguments: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """Runs a command line in this process. Returns its exit status and stderr."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    status = 0
    try:
        run_cli(lambda: module.main(arguments))
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


def last_line(stderr: str) -> str:
    """What remains of stderr on a terminal where a progress bar stood."""
    return stderr.rstrip("\n").split("\n")[-1].rpartition("\r")[2]


def tree(root: Path) -> dict[str, int]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in files}


# --- bad input ------------------------------------------------------------------------------------

SST2 = "--task sst2 --seq-len 16 --data-dir"
CELL = "sweep --tasks cola --models model --strategies random"
CASES = {
    train: [
        ("--masking rnd", "argument --masking: 'rnd' is unknown: choose from random, whole"),
        ("--preset huge", "argument --preset: invalid choice: 'huge' (choose from"),
        ("--entropy-select top", "invalid choice: 'top'"),
        ("--entropy-input seen", "invalid choice: 'seen'"),
        ("--student-init all", "invalid choice: 'all'"),
        ("--device tpu", "--device tpu cannot be used here"),
        ("--device cuda:99", "--device cuda:99 cannot be used here"),
        ("--mask-rate 0", "--mask-rate: 0 is not above 0 and below 1"),
        ("--mask-rate 1", "--mask-rate: 1 is not"), ("--mask-rate nan", "--mask-rate: nan is not"),
        ("--mask-rate -.1", "--mask-rate: -.1 is not"),
        ("--corruption .8 .1 .2", "three shares that sum to 1"),
        ("--corruption 2 -1 0", "--corruption: 2 is not"),
        ("--corruption nan 0 1", "--corruption: nan is not"),
        ("--corruption .5 .5", "expected 3 arguments"),
        ("--steps 0", "--steps: 0 is not at least 1"),
        ("--steps many", "invalid int value: 'many'"), ("--lr nan", "--lr: nan"),
        ("--lr 0", "--lr: 0 is not above 0"), ("--lr inf", "--lr: inf"),
        ("--clip -1", "--clip: -1 is not above 0"), ("--warmup 2", "--warmup: 2 is not at least 0"),
        ("--kd-weight nan", "--kd-weight: nan is not"),
        ("--kd-temperature 0", "--kd-temperature: 0"),
        ("--weight-decay inf", "--weight-decay: inf"), ("--weight-decay -1", "--weight-decay: -1"),
        ("--seed -1", "--seed: -1"), ("--seed 9223372036854775808", "--seed: 9223372036854775808"),
        ("--teacher-seed -1", "--teacher-seed: -1"), ("--eval-every 0", "--eval-every: 0"),
        ("--typhoon-spread 1", "--typhoon-spread: 1 is not at least 0 and below 1"),
        ("--seq-len 2", "--seq-len: 2 is not at least 3"),
        ("--seq-len 600", "--seq-len: 600 is not at least 3 and at most 512"),
        ("--vocab-size 99", "--vocab-size: 99 is not at least 100"),
        ("--batch-size 32 --accumulate 5", "--batch-size 32 cannot be shared by 1 ranks"),
        ("--corpus-fraction 0", "--corpus-fraction: 0 is not at most 1 and above 0"),
        ("--maskin random", "unrecognized arguments: --maskin"),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("--corpus nowhere.txt", "nowhere.txt: no such file, nor a folder with .txt, .md, .jsonl"),
        ("--corpus empty", "--corpus empty: no such file, nor a folder with .txt"),
        ("--corpus '*.md'", "--corpus *.md: no such file"),
        ("--corpus empty.txt", "has 0 words in one piece"),
        ("--corpus blank.txt", "has 0 words in one piece"),
        ("--corpus line.txt", "has 69,993 words in one piece, and the exam needs another: a line "
         "is a paragraph, a blank line ends a document"),
        ("--corpus again.txt", "has 4 words in one piece"),
        ("--corpus short.txt", "too short for windows of 128 tokens"),
        ("--corpus foreign.txt --teacher model --seq-len 16", "leaves nothing to guess"),
        ("--corpus docs nowhere.txt", "--corpus nowhere.txt: no such file"),
        ("--corpus bad.jsonl", 'bad.jsonl, line 2: no JSON object with a "text"'),
        ("--corpus textless.jsonl", 'textless.jsonl, line 1: no JSON object with a "text"'),
        ("--corpus half.jsonl", 'half.jsonl, line 1: no JSON object with a "text" that is valid'),
        ("--corpus utf16.txt", "utf16.txt is binary or not UTF-8"),
        ("--corpus binary.txt", "binary.txt is binary or not UTF-8"),
        ("--corpus latin.txt", "latin.txt is binary or not UTF-8"),
        ("--corpus marked.txt", "marked.txt is binary or not UTF-8"),
        ("--corpus wikitext-2",
         "could not fetch https://wikitext.smerity.com/wikitext-2-raw-v1.zip"),
        ("--out full", "--out full must be a new or an empty folder, or --resume full"),
        ("--out text.txt", "--out text.txt must be a new or an empty folder"),
        ("--out text.txt/run", "--out text.txt/run must be a new or an empty folder"),
        ("--resume nowhere", "nowhere has no train_args.json"),
        ("--resume run --lr .1", "--resume takes no other option than --device: drop --lr"),
        ("--resume run --masking typhoon", "drop --masking, or start a new run with --init run"),
        ("--resume run-not-json", "train_args.json is not a JSON object"),
        ("--resume run-list", "is not a JSON object (but a list)"),
        ("--resume run-ranks", "run-ranks was started with 8 ranks, not 1"),
        ("--resume run-lost", "lost.py cannot be imported"),
        ("--vocab-size 100 --teacher model", "model has 11 word pieces, not 100: drop --vocab"),
        ("--teacher model --init other --seq-len 16",
         "model and other do not predict the same word pieces"),
        ("--teacher model --init swapped --seq-len 16", "do not predict the same word pieces"),
        ("--teacher model --init padded-vocab --seq-len 16", "do not predict the same word pieces"),
        ("--teacher model", "--teacher has 40 positions: lower --seq-len"),
        ("--init model --seq-len 41", "--init has 40 positions: lower --seq-len"),
        ("--teacher model --student-init embeddings --seq-len 16 --corpus text.txt",
         "(11, 128) in the student and (11, 16) in the teacher"),
        ("--teacher nowhere/at/all", "is not a model directory"),
        ("--teacher run/nothing", "run/nothing is not a model directory"),
        ("--init text.txt", "text.txt is not a model directory"),
        ("--init owner/bert-name", "the hub did not give it"),
        ("--teacher cut", "cut/model.safetensors is no sound file of tensors"),
        ("--teacher no-config", "no-config has no config.json"),
        ("--teacher no-weights", "neither model.safetensors nor pytorch_model.bin"),
        ("--teacher no-tokenizer", "no-tokenizer/tokenizer.json cannot be read (No such file"),
        ("--teacher bad-tokenizer", "bad-tokenizer/tokenizer.json cannot be read"),
        ("--teacher bad-vocab", "bad-vocab/vocab.txt cannot be read ('utf-8' codec"),
        ("--teacher stray-id", "the tokenizer has 1,000 word pieces, the model 11"),
        ("--teacher not-json", "not-json/config.json is not a JSON object"),
        ("--teacher no-heads", "no-heads/config.json makes no model here"),
        ("--teacher minus", "minus/config.json makes no model here"),
        ("--teacher wide", "its config.json asks for (11, 32)"),
        ("--teacher text-size", "text-size/config.json makes no model here"),
        ("--teacher dropout", "dropout probability has to be between 0 and 1"),
        ("--teacher roberta", "model_type is 'roberta'"),
        ("--teacher narrow", "query.weight is (16, 3)"),
        ("--teacher deep", "1,000,000,000 layers"),
        ("--teacher huge", "huge/config.json makes no model here"),
        ("--teacher huger", "huger/config.json makes no model here"),
        ("--teacher headless", "no whole masked-LM head"),
        ("--teacher scalar", "query.weight is ()"),
        ("--teacher pickle", "is no sound file of tensors")],
    masking: [
        ("", "the following arguments are required: text"),
        ("text", "there is no run here yet: run train.py first"),
        ("'the cat' --model nowhere", "nowhere is not a model directory"),
        ("'' --model model", "no word to mask"), ("zzz\udcff --model model", "no word to mask"),
        ("'the cat' --model model --mask-rate 1", "--mask-rate: 1 is not"),
        ("'the cat' --model headless", "no whole masked-LM head"),
        ("'the cat' --model model --seed -1", "--seed: -1 is not"),
        ("'the cat' --model model --masking rnd", "'rnd' is unknown: choose from random"),
        ("'the cat' --model model --masking no.py:Mine", "no.py cannot be imported: FileNotFound"),
        ("'the cat' --model demo", "demo/train_args.json is not a JSON object")],
    glue: [
        (f"--model headless {SST2} sst2 --adapt entropy", "no whole masked-LM head"),
        ("--model model", "the following arguments are required: --task"),
        (f"{SST2} sst2", "required: --model"),
        ("--model model --task mrcp", "argument --task: invalid choice: 'mrcp'"),
        (f"--model model {SST2} empty",
         "could not fetch https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"),
        (f"--model model {SST2} sst2-header",
         "SST-2/train.tsv, line 1: the header lacks 'sentence', it is 'text | label'"),
        (f"--model model {SST2} sst2-columns",
         "SST-2/train.tsv, line 3: this row does not have 2 columns"),
        (f"--model model {SST2} sst2-label",
         "SST-2/train.tsv, line 2: label '2' is not one of 0, 1"),
        (f"--model model {SST2} sst2-unlabelled",
         "SST-2/dev.tsv, line 1: the header lacks 'label'"),
        (f"--model model {SST2} sst2-empty", "the header lacks"),
        (f"--model model {SST2} sst2-rowless", "holds nothing of"),
        (f"--model model {SST2} sst2-latin", "train.tsv, line 2: this is not UTF-8"),
        (f"--model run/nothing {SST2} sst2", "run/nothing is not a model directory"),
        (f"--model no-weights {SST2} sst2", "neither model.safetensors"),
        (f"--model no-config {SST2} sst2", "no config.json"),
        (f"--model model {SST2} sst2 --device cuda:99", "cuda:99"),
        (f"--model model {SST2} sst2 --freeze 3", "has 2 layers"),
        (f"--model model {SST2} sst2 --seq-len 41", "has 40 positions"),
        (f"--model model {SST2} sst2 --lr nan", "argument --lr: nan"),
        (f"--model model {SST2} sst2 --epochs 0", "argument --epochs: 0 is not at least 1"),
        (f"--model model {SST2} sst2 --fraction nan", "argument --fraction: nan"),
        (f"--model model {SST2} sst2 --seed 9223372036854775808",
         "argument --seed: 9223372036854775808 is not"),
        (f"--model model {SST2} sst2 --corruption 1 1 0", "three shares"),
        (f"--model model {SST2} sst2 --adapt x", "argument --adapt: 'x' is unknown"),
        (f"--model model {SST2} sst2 --mask-rate 1", "argument --mask-rate: 1 is not"),
        (f"--model model {SST2} sst2 --typhoon-spread 1", "argument --typhoon-spread: 1 is not"),
        (f"--model model {SST2} sst2 --json full", "--json full: this is not a file"),
        (f"--model model {SST2} sst2 --json text.txt/x.json",
         "--json text.txt/x.json: this is not a file"),
        (f"--model model {SST2} sst2 --json results/one.json",
         "results/one.json holds a run that differs in adapt"),
        (f"--model model {SST2} sst2 --json run/train_args.json",
         "run/train_args.json is not a result of glue.py"),
        (f"--model model {SST2} sst2 --save full", "--save full: this folder is not empty"),
        (f"--model model {SST2} sst2 --save text.txt", "--save text.txt: this is not a folder"),
        (f"--model model {SST2} sst2 --adapt {ROOT}/masking.py:Nothing", "has no class Nothing"),
        (f"--model model {SST2} sst2 --predict text.txt",
         "--predict text.txt: this is not a folder"),
        (f"--model model {SST2} sst2 --adapt entropy --teacher other",
         "--teacher has 12 word pieces, --model 11")],
    stats: [
        ("", "the following arguments are required"),
        ("repot x", "invalid choice: 'repot'"),
        ("report nowhere", "nowhere holds no finished run: python stats.py sweep"),
        ("report empty", "holds no finished run"),
        ("report text.txt", "holds no finished run"),
        ("report damaged-results", "damaged-results/one.json is not a JSON object"),
        ("report results --effect nan", "--effect: nan is not above 0"),
        ("report results --metric f1", "--metric f1: no task here has it: choose from matthews"),
        ("report results --against x", "--against x: results has no such strategy, but none"),
        ("sweep", "--tasks and --models and --strategies missing"),
        ("sweep --preset typhon", "invalid choice: 'typhon'"),
        (f"{CELL} --jobs 0", "--jobs: 0 is not at least 1"),
        (f"{CELL} --seeds -1", "--seeds: -1 is not at least 0"),
        (f"{CELL} --seeds x", "invalid int value: 'x'"),
        (f"{CELL} --tasks cloa", "--tasks: invalid choice: 'cloa'"),
        (f"{CELL} --tasks mlm", "--models model has no {masking}: give a pattern"),
        (f"{CELL} --strategies rnd", "argument --adapt: 'rnd' is unknown"),
        (f"{CELL} --strategies 'a/b=--lr 1'", "'a/b' cannot name a strategy"),
        (f"{CELL} --strategies \"x=--lr '1\"", "argument --strategies: invalid strategy value"),
        (f"{CELL} --models 'runs/{{seeds}}'", "runs/{seeds} is not there"),
        (f"{CELL} --models 'runs/{{masking}}'", "runs/random is not there: --pretrain makes it"),
        (f"{CELL} --models nowhere/at/all", "nowhere/at/all is not a model directory"),
        (f"{CELL} --models no-weights", "no-weights has neither model.safetensors"),
        (f"{CELL} --pretrain", "--models has none with {masking}"),
        (f"{CELL} -- --lr nan", "--lr"),
        (f"{CELL} -- --see 5", "unrecognized arguments: --see 5"),
        (f"{CELL} --out text.txt", "text.txt/cola--model--random--0.json"),
        ("sweep --preset entropy --pretrain \"--steps '3\"", "invalid split value"),
        ("sweep --preset entropy --pretrain '--steps 0'", "--steps")]}


@pytest.mark.parametrize("module, line, said", [
    pytest.param(module, *case, id=f"{module.__name__} {case[0]}".encode(errors="replace").decode())
    for module, cases in CASES.items() for case in cases])
def test_bad_input_gets_one_line_and_status_2_and_leaves_nothing(module, line, said, world,
                                                                 no_network, monkeypatch, capsys):
    """None of the cases gets as far as a training step."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(train.Trainer, "step", lambda *_: pytest.fail("it had begun"))
    monkeypatch.setattr(glue, "fit", lambda *_: pytest.fail("it had begun"))
    monkeypatch.setattr(stats, "run_stage", lambda *_: pytest.fail("it had begun"))
    before = tree(world)
    status, stderr = run(module, shlex.split(line), monkeypatch, capsys)
    shutil.rmtree("data/cache", ignore_errors=True)  # the text's tokens may stay
    assert status == 2 and stderr.endswith("\n") and stderr.count("\n") == 1
    assert last_line(stderr).startswith(f"{module.__name__}.py") and said in stderr
    assert tree(world) == before


@pytest.mark.parametrize("line, said", [
    ("train.py --masking rnd", "train.py: argument --masking: 'rnd' is unknown"),
    ("train.py --steps", "train.py: argument --steps"),
    ("masking.py text --model no-config", "masking.py: no-config has no config.json"),
    (f"glue.py --model model {SST2} sst2-label", "glue.py: sst2-label/SST-2/train.tsv, line 2"),
    ("stats.py report empty", "stats.py: empty holds no finished run")])
def test_the_same_from_a_shell(line, said, world):
    before = tree(world)
    script, *arguments = shlex.split(line)
    done = subprocess.run([sys.executable, ROOT / script, *arguments], cwd=world,
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(said)
    assert tree(world) == before


def test_where_only_the_world_is_wrong_the_status_is_1(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = tree(world)
    status, stderr = run(stats, ["report", "results"], monkeypatch, capsys)
    assert status == 1 and stderr.count("\n") == 1
    assert "results/report.md cannot be written (Is a directory)" in stderr
    assert tree(world) == before


# --- a full disk ----------------------------------------------------------------------------------

@contextlib.contextmanager
def largest_file(size: int):
    """No file may grow beyond `size` bytes: what a full disk does to a write, without a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_from_it(
        corpus, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    arguments = ["--corpus", str(corpus), *SMALL]
    train.main([*arguments, "--out", "whole"])
    step = train.Trainer.step

    def filling(self, number):
        if number == 9:
            before.append(Path("run/checkpoint.pt").read_bytes())
            disk.enter_context(largest_file(20_000))
        return step(self, number)

    before = []
    with contextlib.ExitStack() as disk:
        monkeypatch.setattr(train.Trainer, "step", filling)
        status, stderr = run(train, [*arguments, "--out", "run"], monkeypatch, capsys)
    assert status == 1 and "Traceback" not in stderr
    assert last_line(stderr).startswith(
        "train.py: run/checkpoint.pt cannot be written (File too large): make room")
    assert before == [Path("run/checkpoint.pt").read_bytes()]
    assert sorted(os.listdir("run")) == ["checkpoint.pt", "log.jsonl", "train_args.json"]
    monkeypatch.setattr(train.Trainer, "step", step)
    train.main(["--resume", "run"])
    assert weights("run") == weights("whole")
    assert tree(Path("run")).keys() == tree(Path("whole")).keys()
    assert Path("run/log.jsonl").read_bytes() == Path("whole/log.jsonl").read_bytes()


def test_a_full_disk_leaves_no_half_cache(corpus, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    with largest_file(5_000):
        status, stderr = run(train, ["--corpus", str(corpus), *SMALL], monkeypatch, capsys)
    assert status == 1 and "Traceback" not in stderr and not tree(tmp_path)
    assert last_line(stderr).startswith("train.py: data/cache/text-")
    assert "make room" in last_line(stderr)


def test_a_full_disk_leaves_the_old_results(world, tmp_path, monkeypatch, capsys):
    """glue.py's run file, and a report."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "results", "results", ignore=shutil.ignore_patterns("report.md"))
    Path("old.json").write_text("old")
    Path("results/report.md").write_text("old")
    before = tree(tmp_path)
    fine_tuning = f"--model {world}/model {SST2} {world}/sst2 --device cpu --json old.json"
    for module, line in ((glue, fine_tuning), (stats, "report results")):
        with largest_file(500):
            status, stderr = run(module, line.split(), monkeypatch, capsys)
        assert status == 1 and "Traceback" not in stderr
        assert "cannot be written (File too large)" in last_line(stderr)
    assert tree(tmp_path) == before


# --- two at once ----------------------------------------------------------------------------------

def test_two_runs_that_start_at_once_share_teacher_and_tables(corpus, tmp_path):  # noqa: F811
    arguments = [sys.executable, str(ROOT / "train.py"), "--masking", "entropy", "--corpus",
                 str(corpus), *SMALL]
    pair = [subprocess.Popen([*arguments, "--out", name], cwd=tmp_path, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True) for name in ("one", "two")]
    errors = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    kinds = [path.name.split("-")[0] for path in (tmp_path / "data/cache").iterdir()]
    assert kinds.count("entropy") == 1 and set(kinds) == {"entropy", "text"}
    assert [path.name.split("-")[0] for path in (tmp_path / "runs").iterdir()] == ["reference"]


# --- odd text -------------------------------------------------------------------------------------

SAID = "".join(f"the cat sat {i}\n\n" for i in range(50))
ODD = {
    "emoji.txt": "the 😀 sat 👩‍👩‍👧‍👦 on the mat 🇪🇺 .\n\n" + SAID,
    "arabic.txt": "القط جلس على الحصيرة . \u202eab\u202c\n\n" + SAID,
    "control.txt": "".join(map(chr, [*range(1, 32), 127, *range(128, 160)])) + SAID + "a\x1b[31m",
    "line.txt": "the cat sat on the mat . " * 40_000, "word.txt": "x" * 1_000_000, "empty.txt": "",
    "breaks.txt": "\n\n\n" * 50, "windows.txt": "the dog\r\nsat\r\n\r\n" * 50,
    "mac.txt": "the cow\rlay\r\r" * 50, "mark.txt": "\ufeffthe mark\n\nsat",
    "specials.txt": "[CLS] [MASK] [PAD] [SEP] ##the \ufffd \ufeff \u2028 \U0010ffff\n\n" * 50}


def test_any_utf8_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in ODD.items():
        Path("texts").mkdir(exist_ok=True)
        Path("texts", name).write_bytes(text.encode())
    documents, held_out = train.read_corpus(["texts"], 1.0)
    lines = {paragraph for document in documents + held_out for paragraph in document}
    assert {"the dog", "the cow", "lay", "sat", "the mark", ODD["line.txt"].strip()} <= lines
    assert ODD["word.txt"] in lines
    assert not any("\r" in line or line.startswith("\ufeff") or not line for line in lines)
    train.main(["--corpus", "texts", "--masking", "whole-word", *SMALL])
    assert "this model (whole-word)" in capsys.readouterr().out


# --- memory, and a lost process -------------------------------------------------------------------

@pytest.mark.parametrize("module, line, step", [
    (train, "--corpus text.txt --out {tmp}/run " + " ".join(SMALL), "train.Trainer.step"),
    (glue, f"--model model {SST2} sst2 --json {{tmp}}/run.json", "glue.fit"),
    (glue, f"--model model {SST2} sst2 --json {{tmp}}/run.json --adapt random",
     "train.Trainer.step")])
def test_a_full_gpu_names_what_to_lower(module, line, step, world, tmp_path, monkeypatch, capsys):
    def fill(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\n"
                                          "GPU 0 has 1 GiB in all.")

    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setattr(step, fill)
    status, stderr = run(module, line.format(tmp=tmp_path).split(), monkeypatch, capsys)
    batch = "--batch-size 8" if module is train else "--batch-size 16"
    assert status == 1 and "Traceback" not in stderr
    for part in ("the GPU's memory is full", batch, "--seq-len 16", "lower one of"):
        assert part in last_line(stderr)
    assert not (tmp_path / "run.json").exists()


LOSE_RANK_1 = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
step = train.Trainer.step
def dying(self, number):
    if number == 5 and train.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)
train.Trainer.step = dying
train.run_cli(train.main)
"""


def test_a_lost_process_ends_the_others_with_a_line(corpus, tmp_path):  # noqa: F811
    script = tmp_path / "train.py"
    script.write_text(LOSE_RANK_1.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", script, "--corpus", corpus, *SMALL, "--out",
                           "run"], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0
    assert "train.py: another process of this run was lost" in done.stderr, done.stderr
    assert "[rank0]: Traceback" not in done.stderr
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 4
