"""What is true of the GLUE files, metrics, batches and fine-tuning.

Each test compares with something outside glue.py: official counts, hand-computed values, scikit-learn and SciPy where
they are installed, a brute-force version. GLUE_DIR names a folder of official files; without it their tests skip.
"""
import http.server
import io
import json
import math
import os
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import glue
from glue import TASKS, Example, load_task, metrics
from masking import STRATEGIES
from model import (BertConfig, BertForMaskedLM, BertForSequenceClassification, InputError, RunError, save_pretrained,
                   wordpiece_tokenizer)

GLUE_DIR = os.environ.get("GLUE_DIR", "")
needs_glue = pytest.mark.skipif(not GLUE_DIR, reason="GLUE_DIR is not set")


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


# --- the official files ----------------------------------------------------------------------------------------------

@needs_glue
@pytest.mark.parametrize("name, split, counts", [  # counts as published; the 68.4% of MRPC dev are in many papers
    ("cola", "train", {0: 2528, 1: 6023}), ("cola", "dev", {0: 322, 1: 721}), ("cola", "test", {None: 1063}),
    ("sst2", "train", {0: 29780, 1: 37569}), ("sst2", "dev", {0: 428, 1: 444}), ("sst2", "test", {None: 1821}),
    ("mrpc", "train", {0: 1194, 1: 2474}), ("mrpc", "dev", {0: 129, 1: 279}), ("mrpc", "test", {None: 1725}),
    ("rte", "train", {0: 1249, 1: 1241}), ("rte", "dev", {0: 146, 1: 131}), ("rte", "test", {None: 3000}),
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
    assert load_task("cola", "dev", GLUE_DIR)[-1] == Example("John talked to Bill about himself.", None, 1)
    assert load_task("rte", "dev", GLUE_DIR)[0].label == 1  # not_entailment


# --- files in their official form, warts included --------------------------------------------------------------------

TREES = "( a ( b c ) )|( d e )|(ROOT (S a b c))|(ROOT (S d e))"
MNLI = f"index|promptID|pairID|genre|{'|'.join('sentence%d_%s_parse' % (i, p) for p in ('binary', '') for i in (1, 2))}"
MNLI = MNLI.replace("__", "_") + "|sentence1|sentence2"
STSB = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2"
QQP = "id|qid1|qid2|question1|question2|is_duplicate"


def test_mnli_has_two_dev_and_two_test_sets(tmp_path):
    write(tmp_path, "MNLI/train.tsv", MNLI + "|label1|gold_label",
          f'0|31193|31193n|government|{TREES}|He said "no.|She said so.|neutral|neutral')  # a quote never closed
    for split, genre, label in (("matched", "slate", "contradiction"), ("mismatched", "letters", "entailment")):
        write(tmp_path, f"MNLI/dev_{split}.tsv", MNLI + "|label1|label2|label3|label4|label5|gold_label",
              f"0|63735|63735n|{genre}|{TREES}|One.|Two.|neutral|neutral|neutral|entailment|neutral|{label}")
        write(tmp_path, f"MNLI/test_{split}.tsv", MNLI, f"0|31493|31493|{genre}|{TREES}|{genre} one.|Two.", end="")
    assert load_task("mnli", "train", tmp_path) == [Example('He said "no.', "She said so.", 1)]
    assert load_task("mnli", "dev", tmp_path) == load_task("mnli", "dev_matched", tmp_path)
    assert load_task("mnli", "dev_matched", tmp_path) == [Example("One.", "Two.", 2)]
    assert load_task("mnli", "dev_mismatched", tmp_path) == [Example("One.", "Two.", 0)]
    assert load_task("mnli", "test_mismatched", tmp_path) == [Example("letters one.", "Two.", None)]


def test_stsb_labels_are_scores(tmp_path):
    write(tmp_path, "STS-B/train.tsv", STSB + "|score",
          "0|main-captions|MSRvid|2012test|0001|none|none|A plane is taking off.|An air plane is taking off.|5.000",
          '7|main-news|headlines|2013|0002|none|none|"A|B"|0.200', end="")
    write(tmp_path, "STS-B/test.tsv", STSB, "0|main-captions|MSRvid|2012test|0024|none|none|A girl.|A woman.")
    assert load_task("stsb", "train", tmp_path) == [
        Example("A plane is taking off.", "An air plane is taking off.", 5.0), Example('"A', 'B"', 0.2)]
    assert load_task("stsb", "test", tmp_path) == [Example("A girl.", "A woman.", None)]


def test_qqp_skips_and_counts_the_rows_with_too_few_columns(tmp_path, caplog):
    write(tmp_path, "QQP/train.tsv", QQP, "1|3|4|Why?|Why not?|1", "2|5|6|broken off", " here|in two|0",
          "3|7|8|How?|When?|0")
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
    write(tmp_path, "QNLI/dev.tsv", "index|question|sentence|label", '0|Who?|He "did.|not_entailment',
          "1|Where?|There.|entailment")
    write(tmp_path, "RTE/dev.tsv", "index|sentence1|sentence2|label", "0|One.|Two.|not_entailment")
    write(tmp_path, "WNLI/dev.tsv", "\ufeffindex|sentence1|sentence2|label", "0|It fell.|The cup fell.|1")
    assert load_task("qnli", "dev", tmp_path) == [Example("Who?", 'He "did.', 1), Example("Where?", "There.", 0)]
    assert load_task("rte", "dev", tmp_path) == [Example("One.", "Two.", 1)]
    assert load_task("wnli", "dev", tmp_path) == [Example("It fell.", "The cup fell.", 1)]


@pytest.mark.parametrize("file", ["AX/AX.tsv", "diagnostic/diagnostic.tsv"])
def test_ax_under_either_of_its_names(tmp_path, file):
    write(tmp_path, file, "index|sentence1|sentence2", "0|The cat sat.|The cat did not sit.")
    assert load_task("ax", "test", tmp_path) == [Example("The cat sat.", "The cat did not sit.", None)]


MRPC = "\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String"


def test_mrpc_is_split_by_the_pairs_of_ids(tmp_path):
    write(tmp_path, "MRPC/msr_paraphrase_train.txt", MRPC, "1|10|11|a|b", '0|11|10|"c|d', "0|12|13|e|f")
    write(tmp_path, "MRPC/msr_paraphrase_test.txt", MRPC, "1|20|21|g|h")
    write(tmp_path, "MRPC/mrpc_dev_ids.tsv", "11|10")
    assert load_task("mrpc", "train", tmp_path) == [Example("a", "b", 1), Example("e", "f", 0)]
    assert load_task("mrpc", "dev", tmp_path) == [Example('"c', "d", 0)]  # the pair (11, 10), not (10, 11)
    assert load_task("mrpc", "test", tmp_path) == [Example("g", "h", None)]  # though the file has its label


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
    assert [example.text_a for example in load_task("cola", "dev", tmp_path)] == ["A\u2028B\x0b C", "Ünï🙂"]


@pytest.mark.parametrize("file, rows, message", [
    ("SST-2/dev.tsv", ["text|label", "fine|1"], "line 1: the header lacks 'sentence'"),
    ("SST-2/dev.tsv", [""], "line 1: the header lacks 'sentence'"),
    ("SST-2/dev.tsv", ["sentence", "fine"], "line 1: the header lacks 'label'"),  # labels missing on dev
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
def test_unknown_tasks_and_splits_are_named_before_any_download(task, split, unknown, monkeypatch):
    """The command line offers the known ones alone; this is for a program that calls glue.py."""
    monkeypatch.setattr(glue, "fetch", lambda *_: pytest.fail("it had begun"))
    with pytest.raises(KeyError, match=unknown):
        load_task(task, split, "nowhere")


# --- metrics ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, predictions, labels, expected", [
    ("sst2", [1, 0, 1, 1], [1, 0, 0, 1], {"accuracy": 3 / 4}),
    ("mrpc", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], {"f1": 2 / 3, "accuracy": 3 / 5}),       # TP 2, FP 1, FN 1
    ("cola", [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1], {"matthews": (2 * 2 - 1) / 9}),    # (TP TN − FP FN) / √(3·3·3·3)
    ("ax", [0, 1, 2, 2], [0, 1, 2, 1], {"matthews": (3 * 4 - 5) / math.sqrt((16 - 6) * (16 - 6))}),  # R_K by hand
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
    ("stsb", [1, 1, 2, 8], [1, 2, 3, 4], {"pearson": 11 / math.sqrt(34 * 5), "spearman": 4.5 / math.sqrt(4.5 * 5)}),
])
def test_metrics_by_hand(name, predictions, labels, expected):
    assert metrics(name, predictions, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("predictions, labels", [
    ([0, 0, 0], [0, 1, 1]), ([1, 1, 1], [0, 1, 1]), ([0, 1, 1], [0, 0, 0]), ([0, 0], [0, 0]), ([0], [1]), ([], []),
    ([0.1, 0.1, 0.1], [0.3, 0.7, 0.1]), ([0.3, 0.7, 0.1], [0.1, 0.1, 0.1])])  # the mean of three 0.1 is not 0.1
def test_degenerate_correlations_are_zero_and_never_nan(predictions, labels):
    for name, values in [(name, metrics(name, predictions, labels)) for name in ("cola", "ax", "stsb")]:
        assert all(value == 0 for value in values.values()), name
    assert glue.f1(np.zeros(3), np.zeros(3)) == 0
    assert all(math.isfinite(value) for value in metrics("mrpc", predictions, labels).values())


def test_ranks_share_the_mean_on_ties():
    assert glue.ranks(np.array([10.0, 20.0, 10.0, 5.0, 20.0, 20.0])).tolist() == [2.5, 5.0, 2.5, 1.0, 5.0, 5.0]


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="not one length"):
        metrics("sst2", [1], [1, 1, 1])  # numpy would broadcast


@pytest.mark.parametrize("seed", range(20))
def test_metrics_agree_with_scikit_learn_and_scipy(seed):
    sklearn, scipy = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 400))
    p, y = rng.integers(0, 2, n), rng.integers(0, 2, n)
    assert metrics("mrpc", p, y) == pytest.approx(
        {"f1": sklearn.f1_score(y, p, zero_division=0), "accuracy": sklearn.accuracy_score(y, p)}, abs=1e-9)
    assert metrics("cola", p, y)["matthews"] == pytest.approx(sklearn.matthews_corrcoef(y, p), abs=1e-9)
    p, y = rng.integers(0, 3, n), rng.integers(0, 3, n)
    assert metrics("ax", p, y)["matthews"] == pytest.approx(sklearn.matthews_corrcoef(y, p), abs=1e-9)
    p, y = rng.normal(size=n).round(1) + 1e3 * (seed % 2), rng.integers(0, 26, n) / 5  # ties; a large offset
    p[0], y[:2] = p[1:].max() + 1, (0, 1)  # never constant
    assert metrics("stsb", p, y) == pytest.approx(
        {"pearson": scipy.pearsonr(p, y)[0], "spearman": scipy.spearmanr(p, y)[0]}, abs=1e-9)


def test_the_glue_score_averages_metrics_then_tasks():
    assert glue.score({"f1": 0.9, "accuracy": 0.8}) == pytest.approx(0.85)
    # a constant answer on MRPC dev, as in GLUE's table of baselines: accuracy 68.4, F1 81.2
    constant = glue.baseline("mrpc", np.array([1] * 2474 + [0] * 1194), np.array([1] * 279 + [0] * 129))
    assert constant == pytest.approx({"f1": 0.8122, "accuracy": 0.6838}, abs=1e-4)
    assert glue.baseline("stsb", np.array([0.5, 4.0]), np.array([1.0, 2.0, 3.0])) == {"pearson": 0, "spearman": 0}


# --- batches ---------------------------------------------------------------------------------------------------------

WORDS = "the cat sat on a mat and so did dog good bad very not is was film it this ##s ##ed .".split()


@pytest.fixture
def tokenizer():
    return wordpiece_tokenizer({word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])})


def test_pairs_are_encoded_as_hugging_face_encodes_them(tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    examples = [Example("the cat sat", "a dog is not a cat .", 1), Example("very good", None, 0), Example("", "so", 1)]
    data = glue.encode(examples, tokenizer, max_length=64)
    for example, ids, second in zip(examples, data.input_ids, data.second):
        expected = theirs(*[text for text in example[:2] if text is not None], return_token_type_ids=True)
        assert ids.tolist() == expected["input_ids"]
        if example.text_b:
            assert (torch.arange(len(ids)) >= second).int().tolist() == expected["token_type_ids"]


@pytest.mark.parametrize("a, b, room, expected", [  # an odd room's last piece is the longer text's
    (5, 3, 8, (5, 3)), (5, 3, 7, (4, 3)), (5, 3, 6, (3, 3)), (5, 3, 5, (3, 2)), (3, 5, 5, (2, 3)),
    (9, 1, 5, (4, 1)), (9, 0, 5, (5, 0)), (0, 9, 5, (0, 5))])
def test_the_longer_text_is_truncated_first(tokenizer, a, b, room, expected):
    example = Example("cat " * a, "dog " * b, 0)
    ids = glue.encode([example], tokenizer, max_length=room + 3).input_ids[0].tolist()
    cat, dog = tokenizer.token_to_id("cat"), tokenizer.token_to_id("dog")
    assert (ids.count(cat), ids.count(dog)) == expected and len(ids) == sum(expected) + 3


def test_encoding_leaves_the_tokenizer_as_it_was(tokenizer):
    before = tokenizer.to_str()
    glue.encode([Example("the cat " * 50, "a dog", 0)], tokenizer, max_length=16)
    assert tokenizer.to_str() == before  # it is saved with the model


def test_special_tokens_are_added_whatever_the_tokenizer_file_says(tokenizer):
    expected = glue.encode([Example("the cat", "a dog", 0)], tokenizer, 16).input_ids[0].tolist()
    fields = json.loads(tokenizer.to_str()) | {"post_processor": None}
    bare = Tokenizer.from_str(json.dumps(fields))
    found = glue.encode([Example("the cat", "a dog", 0)], bare, 16).input_ids[0].tolist()
    assert found == expected and found[0] == tokenizer.token_to_id("[CLS]")


def test_no_row_is_longer_than_asked(tokenizer):
    examples = [Example("the cat " * 50, "a dog " * 3, 0), Example("the cat " * 50, None, 0)]
    data = glue.encode(examples, tokenizer, max_length=16)
    assert data.lengths.tolist() == [16, 16]
    sep = tokenizer.token_to_id("[SEP]")
    assert [row.tolist().count(sep) for row in data.input_ids] == [2, 1] and all(row[-1] == sep for row in data.input_ids)


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
        return sum(len(rows) * lengths[rows].max() for rows in batches) / lengths.sum() - 1
    plain = np.split(np.random.default_rng(1).permutation(3200), 200)
    bucketed = glue.bucketed_batches(lengths, 16, np.random.default_rng(1))
    assert padded(plain) > 0.7 and padded(bucketed) < 0.05
    firsts = [lengths[rows].mean() for rows in bucketed[:20]]  # and the batches come in no order of length
    assert np.std(firsts) > 15


def tiny(model_type="bert", num_labels=2, **fields):
    torch.manual_seed(0)
    fields = {"vocab_size": 5 + len(WORDS), "max_position_embeddings": 128, "hidden_dropout_prob": 0.0, "hidden_size": 64,
              "intermediate_size": 128, "attention_probs_dropout_prob": 0.0, "model_type": model_type, **fields}
    return BertForSequenceClassification(BertConfig.preset("tiny", **fields), num_labels)


def test_a_batch_is_padded_to_its_longest_and_masked_only_then(tokenizer):
    data = glue.encode([Example("the cat", "a dog", 0), Example("cat", "the dog", 0), Example("a very good cat", "so", 1)],
                       tokenizer, 64)
    batch = glue.collate(data, np.array([2, 0]), tiny())
    assert batch["input_ids"].shape == (2, 8) and batch["input_ids"][1, 7] == 0
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 7 + [0]]
    assert batch["token_type_ids"].tolist() == [[0] * 6 + [1] * 2, [0] * 4 + [1] * 3 + [0]]
    assert glue.collate(data, np.array([0]), tiny())["attention_mask"] is None
    assert glue.collate(data, np.array([0]), tiny("distilbert"))["token_type_ids"] is None
    assert glue.collate(data, np.array([0]), tiny(type_vocab_size=1))["token_type_ids"] is None
    single = glue.encode([Example("the cat", None, 0), Example("cat", None, 0)], tokenizer, 64)
    assert glue.collate(single, np.array([0, 1]), tiny())["token_type_ids"] is None


def test_a_prediction_does_not_depend_on_the_batch_it_is_in(tokenizer):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[:19], rng.integers(1, 25))) for _ in range(40)]
    data = glue.encode([Example(a, b, 0) for a, b in zip(texts, reversed(texts))], tokenizer, 64)
    model = tiny(num_labels=1).eval()
    for parameter in model.parameters():  # weights large enough that predictions differ
        parameter.data += 0.1 * torch.randn_like(parameter)
    together = glue.predict(model, data, size=16)
    with torch.no_grad():
        alone = [model(**glue.collate(data, np.array([i]), model)).item() for i in range(40)]
    assert together == pytest.approx(alone, abs=1e-5) and np.ptp(together) > 0.1


# --- small tasks in their official form ------------------------------------------------------------------------------

def sentences(n: int, seed: int) -> list[str]:
    """Half of them hold the word "good", the others "bad"."""
    rng = np.random.default_rng(seed)
    return [" ".join([*rng.choice(WORDS[:8], rng.integers(1, 9)), ("bad", "good")[i % 2]]) for i in range(n)]


def write_split(folder: Path, name: str, split: str, n: int):
    """n examples, labelled by whether the first text is good (a score of 0 or 5; not entailed or entailed)."""
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
    rows = ["|".join([str(i), a[i]] + [b[i]] * bool(task.text_b) + [labels[i]] * (not test)) for i in range(n)]
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
        return glue.parse_args(["--task", task, "--model", str(model_dir), "--data-dir", str(data_dir), "--device", "cpu",
                                "--epochs", "1", "--adapt-epochs", "1", "--lr", "1e-3", *options])
    return parse


def finetune(*given) -> dict:
    """What the run's file holds."""
    return glue.finetune(*given)[0]


def without_times(run: dict) -> dict:
    return {key: value for key, value in json.loads(json.dumps(run)).items() if key != "seconds"}


# --- fine-tuning -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["sst2", "rte", "stsb"])  # a sentence, a pair, a regression
def test_a_task_that_can_be_learnt_is_learnt(arguments, task):
    run = finetune(arguments("--epochs", "10", "--batch-size", "4", "--lr", "3e-3", task=task))
    assert glue.score(run["last"]) > 0.9 > 0.51 > glue.score(run["baseline"])
    assert run["epochs"][-1]["train_loss"] < run["epochs"][0]["train_loss"] / 2


def test_the_run_file_holds_what_the_statistics_read(arguments):
    run = without_times(finetune(arguments("--epochs", "3", "--seed", "4", task="mrpc")))
    assert (run["task"], run["strategy"], run["seed"]) == ("mrpc", "none", 4)
    assert [entry["epoch"] for entry in run["epochs"]] == [1, 2, 3] and run["args"]["lr"] == 1e-3
    assert run["last"] == run["epochs"][2]["metrics"] == metrics("mrpc", **run["dev"])
    assert run["dev"]["labels"] == [i % 2 for i in range(32)] and run["versions"]["torch"] == torch.__version__
    assert finetune(arguments("--label", "mine"))["strategy"] == "mine"


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


def test_bf16_is_asked_for_and_heard_on_a_cpu(arguments, monkeypatch):
    """In fine-tuning, in the probe of Typhoon's task loss, in predicting and in adapting."""
    seen = {"logits": set(), "predict": set(), "recipe": set()}
    loss, step = glue.task_loss, glue.Trainer.step
    forward = BertForSequenceClassification.forward

    def spy(self, *inputs, **named):
        logits = forward(self, *inputs, **named)
        seen["predict"].add(logits.dtype) if not torch.is_grad_enabled() else None
        return logits

    monkeypatch.setattr(glue, "task_loss", lambda logits, labels: (
        seen["logits"].add(logits.dtype), loss(logits, labels))[1])
    monkeypatch.setattr(BertForSequenceClassification, "forward", spy)
    monkeypatch.setattr(glue.Trainer, "step", lambda self, number: (
        seen["recipe"].add(self.recipe.bf16), step(self, number))[1])
    for options, dtype in ((("--bf16",), torch.bfloat16), (("--no-bf16",), torch.float32),
                           ((), torch.float32)):
        run = finetune(arguments("--adapt", "typhoon", *options))
        assert run["bf16"] == (dtype == torch.bfloat16)
        assert seen == {"logits": {dtype}, "predict": {dtype}, "recipe": {run["bf16"]}}
        for found in seen.values():
            found.clear()


def test_the_fine_tuned_model_is_kept_and_predicts_the_same_again(arguments, data_dir, tmp_path):
    file = tmp_path / "run.json"
    options = ("--save", str(tmp_path / "kept"), "--json", str(file), "--lr", "1e-3")
    glue.main(command(*options, args=arguments(task="rte")))
    run = json.loads(file.read_text())
    model, tokenizer = glue.load_pretrained(tmp_path / "kept", "classification")
    data = glue.encode(load_task("rte", "dev", data_dir), tokenizer, 128)
    assert glue.predict(model, data).tolist() == run["dev"]["predictions"]
    assert tokenizer.truncation is None


def test_a_full_disk_takes_the_saved_model_but_not_the_scores(arguments, tmp_path, monkeypatch):
    def fail(*_):
        raise RunError("no room")

    monkeypatch.setattr(glue, "save_pretrained", fail)
    args = arguments("--save", str(tmp_path / "kept"), "--json", str(tmp_path / "run.json"))
    options = [["--" + name.replace("_", "-"), str(getattr(args, name))]
               for name in ("task", "model", "data_dir", "device", "epochs", "save", "json")]
    with pytest.raises(RunError, match="no room"):
        glue.main(sum(options, []))
    assert json.loads((tmp_path / "run.json").read_text())["task"] == "sst2"


def test_the_last_epoch_is_the_headline_and_the_best_is_beside_it(arguments, monkeypatch):
    scripted = iter([{"f1": 0.8, "accuracy": 0.6}, {"f1": 0.7, "accuracy": 0.9}, {"f1": 0.85, "accuracy": 0.7}])
    dev = {"dev": {"predictions": [0, 1], "labels": [1, 1]}}
    monkeypatch.setattr(glue, "evaluate", lambda *_: (next(scripted), dev))
    run = finetune(arguments("--epochs", "3", task="mrpc"))
    assert run["last"] == {"f1": 0.85, "accuracy": 0.7}
    assert run["best"] == {"epoch": 2, "f1": 0.7, "accuracy": 0.9}  # by the mean of the two


def test_mnli_is_scored_on_both_dev_sets(arguments):
    run = finetune(arguments(task="mnli"))
    assert run["last"] == {"accuracy": metrics("mnli", **run["dev"])["accuracy"],
                           "accuracy_mm": metrics("mnli", **run["dev_mismatched"])["accuracy"]}


@pytest.mark.parametrize("adapt", ["none", "random", "typhoon"])
def test_a_seed_fixes_everything(arguments, adapt):
    options = ("--adapt", adapt, "--fraction", "0.5")
    run = without_times(finetune(arguments(*options)))
    torch.rand(7)  # whatever else went on in the process
    assert without_times(finetune(arguments(*options))) == run
    other = finetune(arguments(*options, "--seed", "1"))
    assert other["epochs"][0]["train_loss"] != run["epochs"][0]["train_loss"]


@pytest.mark.parametrize("what, frozen", [
    ("none", ()), ("embeddings", ("bert.embeddings",)), ("0", ("bert.embeddings",)),
    ("1", ("bert.embeddings", "bert.layers.0")), ("2", ("bert.embeddings", "bert.layers")),
    ("encoder", ("bert.embeddings", "bert.layers"))])
def test_frozen_weights_do_not_move_by_a_bit(arguments, tokenizer, data_dir, what, frozen, monkeypatch):
    optimizers = []
    make = glue.make_optimizer
    monkeypatch.setattr(glue, "make_optimizer", lambda *args: optimizers.append(make(*args)) or optimizers[-1])
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    glue.freeze(model, what)
    train = glue.encode(load_task("rte", "train", data_dir), tokenizer, 64)
    glue.fit(model, train, {"dev": train}, arguments(task="rte"))
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert still == {name for name in before if frozen and name.startswith(frozen)}
    assert all((p.grad is None) == (name in still) for name, p in model.named_parameters())
    assert len(optimizers[0].state) == len(before) - len(still)


def test_the_rate_rises_and_falls_over_all_epochs_and_gradients_are_clipped(
        arguments, tokenizer, data_dir, monkeypatch):
    """2 epochs of 4 steps; the first quarter of the steps is the warm-up."""
    rates, norms, make = [], [], glue.make_optimizer

    def spied(model, *settings):
        def note(optimizer, *_):
            rates.append(optimizer.param_groups[0]["lr"])
            gradients = [p.grad.norm() for p in model.parameters()]
            norms.append(torch.stack(gradients).norm().item())

        optimizer = make(model, *settings)
        optimizer.register_step_pre_hook(note)
        return optimizer

    monkeypatch.setattr(glue, "make_optimizer", spied)
    monkeypatch.setattr(glue, "task_loss", lambda logits, labels: 1e3 * logits.float().sum())
    train = glue.encode(load_task("rte", "train", data_dir), tokenizer, 64)
    args = arguments("--epochs", "2", "--warmup", ".25", "--lr", "6e-4", task="rte")
    glue.fit(tiny(), train, {"dev": train}, args)
    assert rates == pytest.approx([3e-4, 6e-4, 6e-4, 5e-4, 4e-4, 3e-4, 2e-4, 1e-4])
    assert norms == pytest.approx([1.0] * 8, rel=1e-3)


def test_a_fraction_is_fixed_by_the_seed_and_part_of_a_larger_one():
    whole = list(range(1000))
    some, more = glue.subset(whole, 0.2, seed=3), glue.subset(whole, 0.5, seed=3)
    assert len(some) == 200 and some == sorted(set(some)) == glue.subset(whole, 0.2, seed=3) and set(some) < set(more)
    assert some != glue.subset(whole, 0.2, seed=4) and glue.subset(whole, 1.0, seed=3) == whole
    assert 400 < np.mean(some) < 600  # not the head of the file


def test_the_loss_is_the_mean_cross_entropy_or_squared_error():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    assert glue.task_loss(logits, torch.tensor([1, 0])).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert glue.task_loss(torch.tensor([[1.0], [4.0]]), torch.tensor([3.0, 5.0])).item() == pytest.approx((4 + 1) / 2)


def test_a_diverging_run_is_stopped(arguments):
    with pytest.raises(RunError, match="at step 4 or a little before: lower --lr"):
        finetune(arguments("--lr", "1e30"))
    with pytest.raises(RunError, match="at step 4 .* lower --adapt-lr"):
        finetune(arguments("--adapt", "random", "--adapt-lr", "1e30"))


# --- adaptation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("strategy", [*STRATEGIES, "typhoon by mlm"])
def test_every_strategy_adapts_and_keeps_to_the_budget(arguments, strategy):
    name, _, loss = strategy.partition(" by ")
    run = finetune(arguments("--adapt", name, "--typhoon-loss", loss or "task", "--adapt-epochs", "10", task="mrpc"))
    adaptation = run["adaptation"]
    assert run["strategy"] == name and adaptation["steps"] == 10 * 64 / 16
    assert adaptation["masked"] == pytest.approx(0.3, abs=0.03)  # typhoon, and whole words at times, only on average
    assert ("typhoon" in adaptation) == (name == "typhoon") and "adapted in 40 steps" in glue.describe(run)
    if name == "typhoon":
        rates = [rate for _, rate, _ in adaptation["typhoon"]["highest"]]
        assert rates == sorted(rates, reverse=True) and {"good", "bad"} & set(dict_of(adaptation["typhoon"]))


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


def dict_of(extremes: dict) -> dict:
    return {piece: rate for rows in extremes.values() for piece, rate, _ in rows}


@pytest.mark.parametrize("loss", ["task", "mlm"])
def test_typhoon_looks_at_labels_by_the_task_loss_alone(arguments, data_dir, loss):
    data = glue.load_data("sst2", data_dir)
    flipped = replace(data, train=[example._replace(label=(i // 2) % 2) for i, example in enumerate(data.train)])
    args = arguments("--adapt", "typhoon", "--typhoon-loss", loss)
    one, two = (dict_of(finetune(args, which)["adaptation"]["typhoon"]) for which in (data, flipped))
    assert (one == two) == (loss == "mlm")


def test_adaptation_trains_the_encoder_by_the_masked_lm_and_leaves_the_head(arguments, tokenizer, data_dir):
    data = glue.encode(load_task("mrpc", "train", data_dir), tokenizer, 64)
    encoders = []
    for strategy in ("random", "typhoon"):
        model = tiny()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        glue.adapt(model, tokenizer, data, arguments("--adapt", strategy, task="mrpc"))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) == name.startswith(("bert.pooler", "classifier")), name
        encoders.append(model.bert.layers[0].output.weight)
    assert not torch.equal(*encoders)


@pytest.mark.parametrize("steps, loss, masked", [
    ([[2.0, 1.0, 3.0, 10.0], [0.0, 0.0, 0.0, 10.0], [4.0, 1.0, 1.0, 10.0], [0.0] * 4], 2.5, 4 / 30),
    ([[0.0] * 4] * 4, 0.0, 0.0)])
def test_a_step_that_masks_nothing_does_not_lower_the_loss(
        arguments, tokenizer, data_dir, steps, loss, masked, monkeypatch):
    """Of each step: the mean loss, the gradient's norm, masked tokens, maskable tokens."""
    results = iter(steps)
    monkeypatch.setattr(glue.Trainer, "step", lambda *_: torch.tensor(next(results)))
    data = glue.encode(load_task("sst2", "train", data_dir), tokenizer, 64)
    found = glue.adapt(tiny(), tokenizer, data, arguments("--adapt", "random"))
    assert (found["loss"], found["masked"]) == pytest.approx((loss, masked))


def padding_vocabulary(pad_at: int) -> dict[str, int]:
    """[PAD] is number `pad_at`; number 0 is a word."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words.insert(0, words.pop(words.index("cat")))
    words.insert(pad_at, "[PAD]")
    return {word: i for i, word in enumerate(words)}


@pytest.mark.parametrize("pad_at", [0, 6])
def test_adaptation_does_not_train_on_padding(arguments, data_dir, tmp_path, pad_at, monkeypatch):
    """The tokenizer says what [PAD] is. The config of this model says 0, whatever it is."""
    tokenizer = wordpiece_tokenizer(padding_vocabulary(pad_at))
    torch.manual_seed(1)
    save_pretrained(BertForMaskedLM(tiny().config), tokenizer, tmp_path / "padded")
    trainers, step = [], glue.Trainer.step
    monkeypatch.setattr(glue.Trainer, "step", lambda self, number: (
        trainers.append(self), step(self, number))[1])
    run = finetune(arguments("--adapt", "random", "--model", str(tmp_path / "padded"),
                                  "--adapt-batch-size", "64"))
    words = sum(len(example.text_a.split()) for example in load_task("sst2", "train", data_dir))
    batch = trainers[0].texts.batch(torch.arange(64))
    assert batch.maskable.sum() == words and batch.attention_mask.sum() == words + 2 * 64
    assert run["masked"] == pytest.approx(0.3, abs=0.03)


@pytest.fixture
def task_typhoon(tokenizer, data_dir):
    """Typhoon with the task's loss on MRPC's 64 examples; the classifier that its head is a copy of."""
    data, mlm, classifier = glue.encode(load_task("mrpc", "train", data_dir), tokenizer, 64), tiny(), tiny()
    masked_lm = BertForMaskedLM(mlm.config)
    vocab = glue.Vocab(tokenizer, mlm.config.vocab_size, torch.device("cpu"))
    inputs = glue.collate(data, np.arange(64), classifier)
    texts = glue.Texts(inputs["input_ids"].int(), vocab, inputs["token_type_ids"])
    context = glue.Context(0.3, masked_lm, texts.token_counts(), vocab.continuation, vocab.mask_id)
    return glue.TaskTyphoon(context, classifier, data.targets(slice(None), "cpu"), 1e-2, 0.0), texts, classifier


def test_typhoon_follows_the_one_hot_gradient_of_the_task_loss(task_typhoon):
    """Brute force: the one-hot tensor is built, and the loss differentiated with respect to it ([T])."""
    strategy, texts, classifier = task_typhoon
    strategy.probe.eval()
    batch = texts.batch(torch.arange(16))
    strategy.mask(batch, torch.Generator().manual_seed(0))
    strategy.end_step()

    encoder = strategy.context.model.bert
    weight = encoder.embeddings.word_embeddings.weight.detach()
    one_hot = torch.nn.functional.one_hot(batch.input_ids, len(weight)).float().requires_grad_()  # (B, L, V)
    hidden = encoder(None, batch.attention_mask, batch.token_type_ids, inputs_embeds=one_hot @ weight)
    logits = classifier.classifier(classifier.bert.pooler(hidden[:, 0]).tanh())
    torch.nn.functional.cross_entropy(logits, torch.arange(16) % 2).backward()
    for token in range(5, len(weight)):
        where = batch.input_ids == token
        if where.any():
            expected = -one_hot.grad[..., token][where].mean().item()  # visible: minus the gradient, averaged
            assert strategy.typhoon.weight[token].item() == pytest.approx(expected, rel=1e-3, abs=1e-9)
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
    assert all(torch.equal(one, two) for one, two in zip(copies, head))  # what fine-tuning starts from has not moved


def test_the_teacher_is_the_model_before_it_is_adapted_unless_one_is_given(arguments, model_dir, tokenizer, tmp_path):
    mlm = glue.load_pretrained(model_dir, "mlm")[0].train()
    teacher = glue.frozen_teacher(mlm, tokenizer, arguments())
    with torch.no_grad():
        mlm.head.bias += 1
    assert not teacher.training and not torch.equal(teacher.head.bias, mlm.head.bias)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    torch.manual_seed(2)
    other = BertForMaskedLM(mlm.config)
    save_pretrained(other, tokenizer, tmp_path / "teacher")
    given = glue.frozen_teacher(mlm, tokenizer, arguments("--teacher", str(tmp_path / "teacher")))
    assert torch.equal(given.head.dense.weight, other.head.dense.weight)
    vocab = {word: i for i, word in enumerate(sorted(tokenizer.get_vocab()))}
    save_pretrained(other, wordpiece_tokenizer(vocab), tmp_path / "stranger")
    with pytest.raises(InputError, match="--teacher has 27 word pieces, --model 27, and they are not the same"):
        glue.frozen_teacher(mlm, tokenizer, arguments("--teacher", str(tmp_path / "stranger")))


def test_a_checkpoint_without_a_masked_lm_head_gets_a_fresh_one_and_says_so(arguments, tokenizer, tmp_path, caplog):
    save_pretrained(tiny(), tokenizer, tmp_path / "sentence-encoder")
    run = finetune(arguments("--adapt", "random", "--model", str(tmp_path / "sentence-encoder")))
    assert "freshly initialised: head.bias" in caplog.text and run["adaptation"]["steps"] == 4


def test_extreme_rates_leave_out_rare_word_pieces(tokenizer):
    rates, counts = torch.linspace(0.1, 0.5, 27), torch.full((27,), 9)
    counts[26], counts[5] = 4, 4  # the highest, "." and the lowest, "the"
    found = glue.extreme_rates(rates, counts * (torch.arange(27) > 4), tokenizer, show=2)
    assert [row[0] for row in found["highest"]] == ["##ed", "##s"] and [row[0] for row in found["lowest"]] == ["cat", "sat"]


# --- all of GLUE -----------------------------------------------------------------------------------------------------

def test_all_nine_tasks_their_score_and_the_eleven_files_of_a_submission(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = arguments()
    glue.main(["--task", "all", "--model", args.model, "--data-dir", args.data_dir, "--device", "cpu", "--epochs", "1",
               "--predict", "out", "--save", "models"])
    runs = {path.name.split("-")[0]: json.loads(path.read_text()) for path in Path("runs/glue").glob("*.json")}
    assert set(runs) == set(TASKS) - {"ax"}
    score = np.mean([np.mean(list(run["last"].values())) for run in runs.values()])
    printed = capsys.readouterr().out
    assert {path.name for path in Path("models").iterdir()} == set(runs)
    assert all((path / "model.safetensors").exists() for path in Path("models").iterdir())
    assert f"GLUE score{score:>10.4f}" in printed and "it overstates" in printed
    words = {"MNLI-m": "entailment neutral contradiction", "QNLI": "entailment not_entailment"}
    words |= {"MNLI-mm": words["MNLI-m"], "AX": words["MNLI-m"], "RTE": words["QNLI"]}
    assert {path.name for path in Path("out").iterdir()} == {f"{name}.tsv" for name in [
        "CoLA", "SST-2", "MRPC", "STS-B", "QQP", "WNLI", *words]}
    for path in Path("out").iterdir():
        header, *rows = [line.split("\t") for line in path.read_text().splitlines()]
        assert header == ["index", "prediction"] and [row[0] for row in rows] == ["0", "1", "2", "3", "4"]
        if path.name != "STS-B.tsv":
            assert {row[1] for row in rows} <= set(words.get(path.stem, "0 1").split())


def test_submitted_scores_are_clipped(arguments, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(glue, "predict", lambda *_: np.array([-1.0, 2.34567, 5.5]))
    args = arguments("--predict", str(tmp_path), task="stsb")
    glue.write_predictions(None, tokenizer, {"STS-B.tsv": [Example("a", "b", None)] * 3}, args)
    assert (tmp_path / "STS-B.tsv").read_text() == "index\tprediction\n0\t0.000\n1\t2.346\n2\t5.000\n"


# --- download --------------------------------------------------------------------------------------------------------

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
        Server.files, Server.cut = {name.replace("__", "."): data for name, data in files.items()}, set(cut)
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
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["RTE", "dev.tsv", "train.tsv"]  # no archive left
    Server.files = {}
    assert load_task("rte", "train", tmp_path) == [Example("a", "b", 0)]  # already there


def test_mrpc_comes_as_three_files(serve, tmp_path):
    text = (MRPC + "\n1|10|11|a|b\n0|12|13|c|d\n").replace("|", "\t").encode()
    serve("mrpc", msr_paraphrase_train__txt=text, msr_paraphrase_test__txt=text, mrpc_dev_ids__tsv=b"12\t13\n")
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
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tsv")] == ["data/RTE/dev.tsv"]


def test_without_a_network_one_line_says_which_file_to_put_where(serve, tmp_path, monkeypatch):
    nowhere = replace(TASKS["rte"], sha256={"http://127.0.0.1:9/RTE.zip": "0"})
    monkeypatch.setitem(TASKS, "rte", nowhere)
    with pytest.raises(InputError, match=f"could not fetch http://127.0.0.1:9/RTE.zip .* at {tmp_path}/RTE.zip") as error:
        load_task("rte", "dev", tmp_path)
    assert "\n" not in str(error.value)


def test_an_archive_without_the_split_is_named(serve, tmp_path):
    serve("rte", RTE__zip=zipped(RTE__train=RTE))
    with pytest.raises(InputError, match="RTE.zip did not hold dev.tsv"):
        load_task("rte", "dev", tmp_path)


@needs_glue
def test_the_table_has_the_hashes_of_the_real_mrpc():
    for url, digest in TASKS["mrpc"].sha256.items():
        data = (Path(GLUE_DIR) / "MRPC" / url.rpartition("/")[2]).read_bytes()
        assert sha256(data).hexdigest() == digest


# --- the command line ------------------------------------------------------------------------------------------------

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
        arguments, options, message, monkeypatch):
    monkeypatch.setattr(glue, "encode", lambda *_: pytest.fail("it had begun"))
    with pytest.raises(InputError, match=message) as error:
        finetune(arguments(*options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_model_directory_that_lacks_a_file_is_named(arguments, model_dir, file):
    (model_dir / file).unlink()
    with pytest.raises(InputError, match=file):
        finetune(arguments())


def test_a_bad_file_of_the_last_task_stops_all_before_the_first(arguments, data_dir, tmp_path, monkeypatch):
    write(data_dir, "WNLI/dev.tsv", "index|sentence1|sentence2|label", "0|a|b|2")
    monkeypatch.setattr(glue, "finetune", lambda *_: pytest.fail("it had begun"))
    with pytest.raises(InputError, match="WNLI/dev.tsv, line 2: label '2' is not one of 0, 1"):
        glue.main(["--task", "all", "--model", "m", "--data-dir", str(data_dir)])


def test_the_command_ends_in_one_line_and_status_2(tmp_path):
    write(tmp_path, "SST-2/train.tsv", "sentence|label", "fine|1", "fine|one")
    script = Path(glue.__file__)
    done = subprocess.run([sys.executable, str(script), "--task", "sst2", "--model", "m", "--data-dir", str(tmp_path)],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("glue.py: ") and "line 3: label 'one'" in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["SST-2", "train.tsv"]


def command(*options: str, args) -> list[str]:
    return ["--task", args.task, "--model", args.model, "--data-dir", args.data_dir,
            "--device", "cpu", "--epochs", "1", *options]


@pytest.mark.parametrize("options, message", [
    (["--lr", "1e-3"], "holds a run that differs in lr (2e-05 there, 0.001 here)"),
    (["--seed", "1"], "differs in seed (0 there, 1 here)"),
    (["--adapt", "random"], "differs in adapt (none there, random here)"),
    (["--bf16"], "differs in bf16 (None there, True here)"),
    (["--corruption", ".8", ".1", ".1"], "differs in corruption ([1.0, 0.0, 0.0] there"),
    (["--task", "rte"], "differs in task (sst2 there, rte here)"),
])
def test_a_result_with_other_settings_is_never_replaced(arguments, tmp_path, options, message,
                                                        monkeypatch):
    args, file = arguments(), tmp_path / "run.json"
    glue.main(command("--json", str(file), args=args))
    before = file.read_bytes()
    monkeypatch.setattr(glue, "load_data", lambda *_: pytest.fail("it had begun"))
    with pytest.raises(InputError) as error:
        glue.main(command("--json", str(file), *options, args=args))
    assert str(file) in str(error.value) and message in str(error.value)
    assert file.read_bytes() == before


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


def test_options_are_listed_in_groups():
    text = glue.make_parser().format_help()
    groups = ["what to run:", "fine-tuning:", "adaptation before it:", "what to keep:"]
    where = [text.index("\n" + group) for group in groups]
    assert where == sorted(where) and text.index("--adapt-lr", where[2]) < where[3]


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


def test_the_run_file_is_named_after_the_run(arguments):
    args = arguments("--adapt", "typhoon", "--seed", "7", "--model", "runs/entropy tiny")
    assert glue.run_file(args) == Path("runs/glue/sst2-runs-entropy-tiny-typhoon-7.json")
    assert glue.run_file(arguments("--json", "here.json")) == Path("here.json")
