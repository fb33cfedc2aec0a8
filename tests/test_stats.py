"""What is true of stats.py: each statistic against something outside it, then the report, the sweep, the command line.

The golden report: after a wanted change, `python stats.py report tests/data/stats/runs` and move its report.* one
folder up.
"""
import json
import math
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import stats
from model import InputError, RunError

DATA = Path(__file__).parent / "data" / "stats"


# --- Student's t ----------------------------------------------------------------------------------

@pytest.mark.parametrize("df, alpha, printed", [
    (1, 0.05, 12.706), (2, 0.05, 4.303), (3, 0.05, 3.182), (4, 0.05, 2.776), (9, 0.05, 2.262), (30, 0.05, 2.042),
    (120, 0.05, 1.980), (4, 0.01, 4.604), (9, 0.01, 3.250), (4, 0.10, 2.132), (9, 0.001, 4.781)])
def test_critical_values_are_those_of_the_printed_tables(df, alpha, printed):
    assert stats.t_critical(df, alpha) == pytest.approx(printed, abs=5e-4)


@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 1.0, 2.0, 7.0, 100.0, 1e5])
def test_the_tail_is_the_closed_form_for_one_two_and_four_degrees_of_freedom(t):
    assert stats.t_tail(t, 1) == pytest.approx(2 / math.pi * math.atan(1 / t), rel=1e-10)
    root = math.sqrt(2 + t * t)
    assert stats.t_tail(t, 2) == pytest.approx(2 / (root * (root + t)), rel=1e-10)
    if t < 50:  # the closed form for 4 cancels in the far tail
        x = t / math.sqrt(4 + t * t)
        assert stats.t_tail(t, 4) == pytest.approx(1 - x * (3 - x * x) / 2, abs=1e-12)


def test_t_p_and_interval_agree_with_scipy_on_1000_samples():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(1000):
        n = int(rng.integers(2, 41))
        a = rng.normal(rng.normal(), 1, n)
        b = rng.random() * a + rng.normal(3 * rng.normal(), rng.random() + 0.01, n)
        expected = scipy_stats.ttest_rel(a, b)
        assert stats.paired_t_test(a, b) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)
        assert stats.confidence_interval(a - b) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)


def test_a_paired_t_test_by_hand():
    t, p = stats.paired_t_test([3, 5, 7], [2, 3, 4])  # differences 1, 2, 3: mean 2, sd 1, t = 2 √3
    assert t == pytest.approx(2 * math.sqrt(3))
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert stats.cohen_dz([1, 2, 3]) == 2


def test_the_sign_of_t_says_which_of_the_two_is_better():
    better, worse = [3, 5, 7], [2, 3, 4]
    t, p = stats.paired_t_test(worse, better)
    assert t == pytest.approx(-2 * math.sqrt(3)) and 0 < p < 0.1
    assert stats.cohen_dz([-1, -2, -3]) == -2
    low, high = stats.confidence_interval([-1, -2, -3])
    assert (low, high) == pytest.approx((-2 - 2.484, -2 + 2.484), abs=1e-3)


def test_one_seed_gives_no_test_and_no_interval():
    assert all(map(math.isnan, stats.paired_t_test([0.8], [0.7]) + stats.confidence_interval([0.1])))
    assert math.isnan(stats.minimum_detectable_effect([0.1]))
    assert stats.sign_flip_test([0.1]) == 1


def test_differences_that_are_all_zero_are_no_evidence():
    assert stats.paired_t_test([0.5, 0.6, 0.7], [0.5, 0.6, 0.7]) == (0, 1)
    assert stats.confidence_interval([0, 0, 0]) == (0, 0)
    assert stats.sign_flip_test([0, 0, 0]) == 1
    assert math.isnan(stats.cohen_dz([0, 0, 0]))


def test_a_constant_difference_has_no_p_value_even_where_rounding_makes_it_vary():
    a, b = [0.81, 0.15, 0.7], [0.80, 0.14, 0.69]
    assert len({x - y for x, y in zip(a, b)}) > 1  # rounding
    t, p = stats.paired_t_test(a, b)
    assert t == math.inf and math.isnan(p)
    assert stats.paired_t_test(b, a)[0] == -math.inf
    assert stats.sign_flip_test(np.subtract(a, b)) == 0.25  # 2 / 2^3


def test_scores_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError):
        stats.paired_t_test([1.0], [1.0, 2.0])


# --- sign flips, Holm, power ----------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(20))
def test_sign_flip_counts_what_brute_force_counts(seed):
    rng = np.random.default_rng(seed)
    differences = rng.integers(-4, 6, size=rng.integers(1, 11)) / 10  # many ties
    sums = [abs(sum(s * d for s, d in zip(signs, differences)))
            for signs in product((1, -1), repeat=len(differences))]
    assert stats.sign_flip_test(differences) == np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)


def test_sign_flip_of_five_equal_signs_cannot_go_below_one_in_sixteen():
    assert stats.sign_flip_test([0.1, 0.2, 0.3, 0.1, 0.5]) == 2 / 32


def test_sign_flip_counts_every_pattern_up_to_20_seeds():
    assert stats.sign_flip_test(np.ones(20)) == 2 / 2 ** 20


def test_sign_flip_above_20_seeds_is_a_seeded_sample_of_the_same_distribution():
    differences = np.random.default_rng(1).normal(0.2, 1, 22)
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    exact = (abs(sums) >= abs(differences.sum()) - 1e-9).mean()
    assert 0.01 < exact < 0.5
    assert stats.sign_flip_test(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 1e5))
    assert stats.sign_flip_test(differences) == stats.sign_flip_test(differences)
    assert stats.sign_flip_test(np.ones(25)) == pytest.approx(1e-5, rel=0.01)  # never 0


def test_holm_on_a_worked_example():
    # sorted 0.005 0.01 0.03 0.04, times 4 3 2 1: 0.02 0.03 0.06 0.04, and the last no smaller than the one before
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.6]) == [1, 1]
    assert stats.holm([]) == []


def test_holm_counts_a_comparison_without_p():
    assert stats.holm([0.01, math.nan, 0.02])[::2] == pytest.approx([0.03, 0.04])
    assert math.isnan(stats.holm([0.01, math.nan])[1])


def power(n, shift, alpha):
    return stats.t_tail(stats.t_critical(n - 1, alpha), n - 1, shift)


def test_power_of_the_t_test_agrees_with_scipys_noncentral_t():
    scipy_stats = pytest.importorskip("scipy.stats")
    for n, shift, alpha in product((3, 5, 20, 300), (0.0, 0.5, 2.0, 5.0), (0.01, 0.05)):
        critical = scipy_stats.t.ppf(1 - alpha / 2, n - 1)
        expected = scipy_stats.nct.sf(critical, n - 1, shift) + scipy_stats.nct.cdf(-critical, n - 1, shift)
        assert power(n, shift, alpha) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n, alpha", list(product((3, 5, 20, 300), (0.01, 0.05))))
def test_without_a_true_difference_the_power_is_alpha_in_both_directions(n, alpha):
    assert power(n, 0.0, alpha) == pytest.approx(alpha, abs=1e-9)
    assert power(n, -2.0, alpha) == pytest.approx(power(n, 2.0, alpha))


@pytest.mark.parametrize("d_z, published", [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_needed_are_the_published_sample_sizes_for_80_percent_power(d_z, published):
    assert stats.seeds_needed(1.0, d_z) == published


def test_two_seeds_are_enough_for_a_huge_difference():
    assert stats.seeds_needed(1.0, 100.0) == 2


def test_the_minimum_detectable_effect_is_found_four_times_in_five():
    rng = np.random.default_rng(2)
    differences = rng.normal(0, 0.02, 5)
    effect, sd = stats.minimum_detectable_effect(differences), differences.std(ddof=1)
    found = [stats.paired_t_test(effect + sd * rng.normal(size=5), np.zeros(5))[1] < 0.05 for _ in range(2000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_more_seeds_than_anyone_has_are_called_infinite():
    assert stats.seeds_needed(1.0, 1e-6) == math.inf
    assert stats.seeds_needed(1.0, 2.80159 / math.sqrt(700_000)) == pytest.approx(700_000, rel=1e-4)  # (1.95996 + 0.84162)²
    assert math.isnan(stats.seeds_needed(0.0, 0.01))


# --- calibration ----------------------------------------------------------------------------------

def test_without_a_true_difference_the_error_rates_are_the_promised_ones():
    """2,000 sweeps of three equal strategies and five seeds, which share the seeds' luck. The long-run rates are 5%,
    95% and 4.7% (200,000 sweeps), give or take half a point over 2,000: another seed may land just outside."""
    rng = np.random.default_rng(1)
    rejected, covered, claimed = 0, 0, 0
    for _ in range(2000):
        luck = rng.normal(0, 0.02, 5)
        rows = [stats.Row("mrpc", "m", name, seed, score)
                for name in ("random", "entropy", "typhoon")
                for seed, score in enumerate(0.8 + luck + rng.normal(0, 0.01, 5))]
        pairs = stats.compare_all(rows, [])
        rejected += pairs[0]["p"] < 0.05
        covered += pairs[0]["low"] <= 0 <= pairs[0]["high"]
        claimed += "beats" in stats.verdict(pairs)
    assert 0.04 <= rejected / 2000 <= 0.06
    assert 0.94 <= covered / 2000 <= 0.96
    assert 0.005 <= claimed / 2000 <= 0.05


SLOPES, SEED_SD, STRATEGY_SD, NOISE_SD, POSITIVE = (1.2, 1.0), 0.2, 0.5, 0.1, 0.65


def f1_and_matthews(predictions, labels):
    tn, fp, fn, tp = np.bincount(2 * labels + predictions, minlength=4).tolist()
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return 2 * tp / (2 * tp + fp + fn), (tp * tn - fp * fn) / scale if scale else 0.0


def true_scores(slope):
    """Expected F1 and Matthews over all seeds and examples: a seed shifts every score by u."""
    u = np.linspace(-6, 6, 601) * SEED_SD
    weight = np.exp(-(u / SEED_SD) ** 2 / 2)
    spread = math.sqrt(2 * (1 + STRATEGY_SD**2 + NOISE_SD**2))
    hit, false_alarm = (np.array([math.erfc(-x / spread) / 2 for x in u + side * slope]) for side in (1, -1))
    tp, fp = POSITIVE * hit, (1 - POSITIVE) * false_alarm
    fn, tn = POSITIVE - tp, 1 - POSITIVE - fp
    matthews = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return [np.average(metric, weights=weight) for metric in (2 * tp / (2 * tp + fp + fn), matthews)]


def test_the_multi_bootstrap_covers_the_true_difference_over_seeds_and_examples():
    """500 trials: 150 examples, each of some difficulty, in part a strategy's own; 6 seeds, each with a shift."""
    rng, seeds, examples, trials = np.random.default_rng(0), 6, 150, 500
    target, covered = np.subtract(*map(true_scores, SLOPES)), np.zeros(2)
    for trial in range(trials):
        labels, difficulty = (rng.random(examples) < POSITIVE).astype(int), rng.normal(size=examples)
        drawn = []
        for slope in SLOPES:
            score = ((2 * labels - 1) * slope + difficulty + rng.normal(0, STRATEGY_SD, examples)
                     + rng.normal(0, SEED_SD, (seeds, 1)) + rng.normal(0, NOISE_SD, (seeds, examples)))
            runs = [stats.resampled_scores(f1_and_matthews, predictions, labels, resamples=199,
                                           seed=trial) for predictions in (score > 0).astype(int)]
            drawn.append(np.stack(runs))  # (seeds, 199, 2)
        for metric in range(2):
            low, high = stats.multi_bootstrap(drawn[0][..., metric], drawn[1][..., metric], seed=trial)
            covered[metric] += low <= target[metric] <= high
    assert np.all((0.93 <= covered / trials) & (covered / trials <= 0.97)), covered / trials


@pytest.mark.slow
@pytest.mark.parametrize("seed_sd, noise_sd, percent", [
    (1, 0, 92.4), (1, 1, 93.6), (1, 2, 96.8), (2, 0, 88.8), (4, 0, 85.4)])
def test_the_coverage_that_the_multi_bootstrap_states_for_five_seeds(seed_sd, noise_sd, percent):
    """2,000 trials of 200 examples, give or take half a point. Each example has a difference of its
    own (sd 1), each seed one that it adds to all (in units that make 1 add as much to the variance
    of the mean as the examples do), each run noise of its own on each example."""
    rng, seeds, examples, covered = np.random.default_rng(0), 5, 200, 0
    for trial in range(2000):
        differences = seed_sd * math.sqrt(seeds / examples) * rng.normal(size=(seeds, 1)) \
            + rng.normal(size=examples) + noise_sd * rng.normal(size=(seeds, examples))
        counts = rng.multinomial(examples, np.full(examples, 1 / examples), size=499)
        scores = differences @ counts.T / examples  # (seeds, 499)
        low, high = stats.multi_bootstrap(scores, np.zeros_like(scores), seed=trial)
        covered += low <= 0 <= high
    assert 100 * covered / 2000 == pytest.approx(percent, abs=1.5)


def test_the_multi_bootstrap_draws_seeds_where_examples_make_no_difference():
    scores = np.repeat([[0.0], [1.0]], 999, axis=1)  # two seeds: both drawn alike half of the time
    assert stats.multi_bootstrap(scores, np.zeros((2, 999))) == (0, 1)
    assert stats.multi_bootstrap(np.zeros((2, 999)), scores) == (-1, 0)


def test_the_multi_bootstraps_ends_leave_out_as_many_draws_as_the_level_says():
    scores = np.tile(np.arange(1.0, 1000.0), (2, 1))  # 1 to 999, both seeds alike
    assert stats.multi_bootstrap(scores, np.zeros((2, 999))) == pytest.approx((25, 975))


def test_the_multi_bootstrap_of_one_seed_is_no_interval():
    assert all(map(math.isnan, stats.multi_bootstrap(np.ones((1, 9)), np.zeros((1, 9)))))


def test_two_runs_are_scored_on_the_same_resampled_examples():
    labels = np.arange(50) % 2
    first, second = (stats.resampled_scores(lambda p: p.sum(), labels, resamples=20, seed=3)
                     for _ in range(2))
    assert (first == second).all() and len(set(first)) > 1


# --- the report -----------------------------------------------------------------------------------

def write_run(folder, strategy, seed, score, task="cola", model="m", name=None, **fields):
    folder.mkdir(exist_ok=True)
    run = {"task": task, "model": model, "strategy": strategy, "seed": seed, "args": {"epochs": 3}, "seconds": 60.0,
           "last": {"matthews": score}, "best": {"epoch": 1, "matthews": score}} | fields
    (folder / f"{name or f'{task}-{model}-{strategy}-{seed}'}.json").write_text(json.dumps(run))


def write_cells(folder, **scores):
    for strategy, values in scores.items():
        for seed, score in enumerate(values):
            write_run(folder, strategy, seed, score)


def test_the_golden_report_comes_out_byte_for_byte(tmp_path):
    """MRPC and CoLA with dev predictions, pretraining strategies by pattern, a missing seed, a NaN, a broken file, a
    failed run, runs with other arguments."""
    shutil.copytree(DATA / "runs", tmp_path / "runs")
    for _ in range(2):  # its own output is no input
        text = stats.write_report(tmp_path / "runs", effect=0.01)
        for name in ("report.md", "report.csv", "report.json"):
            assert (tmp_path / "runs" / name).read_bytes() == (DATA / name).read_bytes()
    assert text.encode() == (DATA / "report.md").read_bytes()


def test_report_json_is_strict_json(tmp_path):
    write_cells(tmp_path, random=[0.5], typhoon=[0.6])
    stats.write_report(tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert report["pairs"][0]["p"] is None and report["pairs"][0]["mean"] == 0.1


def test_a_clear_winner_is_claimed_with_its_interval(tmp_path):
    write_cells(tmp_path, random=[0.50, 0.51, 0.49, 0.50, 0.52], typhoon=[0.60, 0.62, 0.59, 0.60, 0.61])
    sentence = stats.analyse(tmp_path)["verdict"]
    assert "typhoon beats random by 0.1000 [0.0912, 0.1088]" in sentence and "same examples" in sentence


def test_the_winner_may_be_the_baseline(tmp_path):
    write_cells(tmp_path, random=[0.60, 0.62, 0.59, 0.60, 0.61], typhoon=[0.50, 0.51, 0.49, 0.50, 0.52])
    assert "random beats typhoon by 0.1000 [0.0912, 0.1088]" in stats.analyse(tmp_path)["verdict"]


def test_no_winner_is_claimed_on_an_unadjusted_p(tmp_path):
    """p = 0.03 alone, 0.09 among three."""
    write_cells(tmp_path, random=[0.50, 0.51, 0.49, 0.50], entropy=[0.52, 0.48, 0.5, 0.51],
                typhoon=[0.52, 0.55, 0.50, 0.53])
    report = stats.analyse(tmp_path)
    assert min(pair["p"] for pair in report["pairs"]) < 0.05 <= min(pair["holm_p"] for pair in report["pairs"])
    assert "No strategy is reliably better" in report["verdict"] and "4 seeds" in report["verdict"]


def test_numbers_are_shown_without_a_negative_zero():
    shown = [stats.show(value) for value in (-1e-9, 0.12345, math.nan)]
    assert shown == ["0.0000", "0.1235", "n/a"]
    assert stats.show_interval(-1e-9, 0.1) == "[+0.0000, +0.1000]"


def test_a_winner_that_other_examples_may_not_bear_out_is_marked():
    pair = {"strategy": "typhoon", "baseline": "random", "mean": -0.02, "low": -0.03, "high": -0.01}
    assert stats.better(pair | {"bootstrap_low": -0.05, "bootstrap_high": 0.01}).endswith("contains 0)")
    assert stats.better(pair | {"bootstrap_low": -0.05, "bootstrap_high": -0.01}).endswith("0.0300]")


def test_the_constant_answer_stands_under_the_scores(tmp_path):
    """Always "paraphrase" on MRPC's dev set: accuracy 0.6838, F1 0.8122 (279 of 408)."""
    values = {"accuracy": 0.7, "f1": 0.8}
    for seed, baseline in enumerate(({"accuracy": 279 / 408, "f1": 2 * 279 / (279 + 408)}, [0.7], {"accuracy": "0.7"})):
        write_run(tmp_path, "random", seed, 0.0, task="mrpc", last=values, best=values, baseline=baseline)
    report = stats.analyse(tmp_path)
    assert "| the constant answer |  | 0.6838 | 0.8122 | 0.7480 |" in stats.to_markdown(report)
    assert sum("left out: not a run of glue.py" in note for note in report["notes"]) == 2


def test_damaged_dev_predictions_are_named(tmp_path):
    write_cells(tmp_path, random=[0.5, 0.6])
    for seed, dev in enumerate((None, {}, {"predictions": [1], "labels": [1, 0]}, {"predictions": [], "labels": []},
                                {"predictions": ["a"], "labels": [1]})):
        write_run(tmp_path, "typhoon", seed, 0.5, dev=dev)
    assert sum("dev predictions are damaged" in note for note in stats.analyse(tmp_path)["notes"]) == 5


def test_one_seed_is_said_to_prove_nothing(tmp_path):
    write_cells(tmp_path, random=[0.5], typhoon=[0.9])
    text = stats.write_report(tmp_path)
    assert "No claim can be made" in text and "One seed has no sd" in text and "nan" not in text


def test_equal_scores_and_constant_differences_claim_nothing(tmp_path):
    write_cells(tmp_path, none=[0.5, 0.5, 0.6], random=[0.5, 0.5, 0.6], typhoon=[0.51, 0.51, 0.61])
    text = stats.write_report(tmp_path)
    assert "No claim can be made" in text and "all 3 differences are +0.0100" in text and "inf" not in text
    assert "-0.0000" not in text and "no spread" in text


def test_a_missing_seed_is_named_and_the_pair_uses_the_others(tmp_path):
    write_cells(tmp_path, random=[0.5, 0.6, 0.7], typhoon=[0.6, 0.8])
    report = stats.analyse(tmp_path)
    assert "cola, m: typhoon lacks seed 2; its pairs go without" in report["notes"]
    assert report["pairs"][0]["n"] == 2 and report["pairs"][0]["mean"] == pytest.approx(0.15)


def test_strategies_without_a_common_seed_are_not_compared(tmp_path):
    write_run(tmp_path, "random", 0, 0.5)
    write_run(tmp_path, "typhoon", 1, 0.6)
    report = stats.analyse(tmp_path)
    assert not report["pairs"] and any("no seed in common" in note for note in report["notes"])
    assert "Nothing was compared" in stats.to_markdown(report)


@pytest.mark.parametrize("content, why", [
    ('{"task": "cola", ', "not JSON"), ("", "not JSON"), ("[1, 2]", "not JSON"), ("\xff\x00", "not JSON"),
    ('{"task": "cola"}', "not a run of glue.py"), ('{"task": ["cola"]}', "not a run of glue.py")])
def test_a_file_that_is_no_run_is_named_and_left_out(tmp_path, content, why):
    write_cells(tmp_path, random=[0.5, 0.6], typhoon=[0.6, 0.8])
    (tmp_path / "broken.json").write_bytes(content.encode("latin-1"))
    report = stats.analyse(tmp_path)
    assert f"broken.json is left out: {why}" in report["notes"] and report["runs"] == 4


@pytest.mark.parametrize("metrics, why", [
    ({"matthews": math.nan}, "matthews is not a finite"), ({"matthews": "x"}, "matthews is not a finite"),
    ({"f1": 0.5}, "metrics are not those of cola"), ({}, "metrics are not those of cola")])
def test_a_run_without_a_usable_metric_is_named_and_left_out(tmp_path, metrics, why):
    write_cells(tmp_path, random=[0.5, 0.6], typhoon=[0.6, 0.8])
    write_run(tmp_path, "typhoon", 1, 0, last=metrics)
    report = stats.analyse(tmp_path)
    assert any(why in note and "typhoon-1" in note for note in report["notes"])
    assert report["pairs"][0]["n"] == 1


def test_two_files_that_claim_one_run_are_an_error_that_names_both(tmp_path):
    write_run(tmp_path, "random", 0, 0.5)
    write_run(tmp_path, "random", 0, 0.6, name="copy")
    with pytest.raises(InputError, match="cola-m-random-0.json and copy.json both claim"):
        stats.analyse(tmp_path)


def test_runs_with_other_arguments_are_noted(tmp_path):
    write_cells(tmp_path, random=[0.5, 0.6])
    write_run(tmp_path, "typhoon", 0, 0.5, args={"epochs": 2, "seed": 7})
    assert "cola, m: the runs differ in epochs: 2, 3" in stats.analyse(tmp_path)["notes"]


def write_pretrained(folder, strategy, seed, score=0.5, weights=None, teacher="t", steps=60):
    """A run of a model that `sweep --pretrain` made."""
    pretraining = {"masking": strategy, "steps": steps, "seed": seed, "teacher_weights": teacher}
    write_run(folder, strategy, seed, score, model=f"runs/{strategy}-{seed}",
              name=f"{strategy}-{seed}", pattern="runs/{masking}-{seed}",
              weights=weights or f"{strategy}{seed}", pretraining=pretraining)


def notes_of(folder):
    return stats.analyse(folder)["notes"]


def test_models_pretrained_otherwise_are_noted_but_not_what_their_strategy_implies(tmp_path):
    for strategy, seed in product(("random", "entropy"), range(2)):
        write_pretrained(tmp_path, strategy, seed, teacher="t" if strategy == "entropy" else None)
    assert not [note for note in notes_of(tmp_path) if "differ" in note]
    write_pretrained(tmp_path, "entropy", 1, steps=120)
    assert "runs/{masking}-{seed}: the pretraining of the runs differs in steps: 120, 60" \
        in notes_of(tmp_path)


def test_a_setting_of_a_strategy_that_changes_from_seed_to_seed_is_noted(tmp_path):
    for seed, select in enumerate(("high", "mixed")):
        write_run(tmp_path, "entropy", seed, 0.5, pretraining={"entropy_select": select})
    assert 'm: the pretraining of the runs differs in entropy_select: "high", "mixed"' \
        in notes_of(tmp_path)


def test_a_copied_model_is_no_independent_seed(tmp_path):
    for seed in range(2):
        write_pretrained(tmp_path, "random", seed, weights="copied")
    with pytest.raises(InputError, match="random: seeds 0 and 1 have the same weights"):
        stats.analyse(tmp_path)


def test_one_backbone_with_several_fine_tuning_seeds_is_fine_unless_it_changed(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "random", seed, 0.5, weights="one")
    assert notes_of(tmp_path) == [
        "cola, m: no multi-bootstrap, the runs did not keep predictions on the same dev examples"]
    write_run(tmp_path, "random", 2, 0.5, weights="two")
    assert "m: m was trained again between its runs" in notes_of(tmp_path)


def test_intervals_are_said_to_be_given_the_one_teacher(tmp_path):
    for seed in range(3):
        write_pretrained(tmp_path, "entropy", seed, teacher="one")
        write_pretrained(tmp_path, "random", seed, teacher=None)
    assert any("share one teacher" in note for note in notes_of(tmp_path))
    for seed in range(3):
        write_pretrained(tmp_path, "entropy", seed, teacher=f"of seed {seed}")
    assert not any("teacher" in note for note in notes_of(tmp_path))
    write_pretrained(tmp_path, "random", 2, teacher="another")
    assert any("had different teachers for seed 2" in note for note in notes_of(tmp_path))


def test_runs_of_an_earlier_version_without_weights_are_noted(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "random", seed, 0.5)
    assert any("2 runs are of an earlier version" in note for note in notes_of(tmp_path))


def test_a_collapsed_run_is_named(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "random", seed, 0.0, collapsed=seed == 1)
    found = [note for note in notes_of(tmp_path) if "collapsed" in note]
    assert [note.split()[0] for note in found] == ["cola-m-random-1"]


def test_the_share_really_masked_stands_beside_the_comparison(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "random", seed, 0.5, adaptation={"masked": 0.30 + 0.002 * seed})
        write_run(tmp_path, "typhoon", seed, 0.6 + seed / 10, adaptation={"masked": 0.25})
        write_run(tmp_path, "none", seed, 0.6, adaptation=None)
    text = stats.write_report(tmp_path)
    assert "| typhoon − random | 2 | 25.00%, 30.10% |" in text
    assert "| random − none | 2 | 30.10%, n/a |" in text


def test_one_metric_is_compared_where_asked(tmp_path):
    dev = {"predictions": [1, 1, 0, 0], "labels": [1, 0, 1, 1]}
    for strategy, seed in product(("random", "typhoon"), range(3)):
        values = {"f1": 0.5 + 0.1 * seed * (strategy == "typhoon"), "accuracy": 0.25}
        write_run(tmp_path, strategy, seed, 0, task="mrpc", last=values, best=values, dev=dev,
                  baseline={"f1": 0.8, "accuracy": 0.6})
    write_cells(tmp_path, random=[0.5], typhoon=[0.5])
    report = stats.analyse(tmp_path, metric="f1")
    (pair,) = report["pairs"]
    assert pair["task"] == "mrpc" and pair["mean"] == pytest.approx(0.1)
    assert report["constants"]["mrpc"]["score"] == 0.8
    assert "cola has no f1 and is left out" in report["notes"]
    rows = stats.read_rows(tmp_path, "last", "f1")[0]
    stats.resample(rows, "f1", 500)
    assert rows[0].resampled.mean() == pytest.approx(0.4, abs=0.05)  # 2 TP / (2 TP + FP + FN) = 2/5
    with pytest.raises(InputError, match="--metric pearson: no task here has it: choose from"):
        stats.analyse(tmp_path, metric="pearson")


def test_both_accuracies_of_mnli_are_one_metric():
    both = {"accuracy": 0.6, "accuracy_mm": 0.8}
    assert stats.score("mnli", both, "accuracy") == pytest.approx(0.7)
    assert stats.score("mrpc", {"f1": 0.6, "accuracy": 0.8}, None) == pytest.approx(0.7)


def test_the_family_is_the_comparisons_with_one_strategy_where_asked(tmp_path):
    """[T]'s 12: 2 tasks, 3 models, 2 baselines."""
    names = ("random", "whole-word", "typhoon")
    for task, model, strategy, seed in product(("cola", "rte"), "abc", names, range(2)):
        metric = "matthews" if task == "cola" else "accuracy"
        write_run(tmp_path, strategy, seed, 0, task=task, model=model,
                  last={metric: 0.5 + seed * names.index(strategy) / 10}, best={metric: 0.5})
    pairs = stats.analyse(tmp_path, against="typhoon")["pairs"]
    assert len(pairs) == 12 and all(pair["strategy"] == "typhoon" for pair in pairs)
    assert pairs[0]["holm_p"] == pytest.approx(min(1, 12 * pairs[0]["p"]))
    assert len(stats.analyse(tmp_path)["pairs"]) == 27
    with pytest.raises(InputError, match="--against entropy: .* has no such strategy, but random"):
        stats.analyse(tmp_path, against="entropy")


# --- the exam as a task ---------------------------------------------------------------------------

def exam(strategy="random", seed=0, right=((3, 1, 0), (1, 1, 2)), **fields):
    """An exam.json of two held-out windows, ten positions each."""
    count, log_likelihood = [[4, 3, 3], [4, 3, 3]], [-20.0, -30.0]
    last = stats.train.exam_metrics(*map(np.array, (right, count, log_likelihood)))
    return {"task": "mlm", "model": f"runs/{strategy}-{seed}", "strategy": strategy,
            "pattern": None, "seed": seed, "args": {"steps": 10}, "versions": {}, "last": last,
            "baseline": dict.fromkeys(stats.EXAM, 0.1), "masked": 0.15, "seconds": 9.0,
            "weights": None, "pretraining": {"steps": 10},
            "dev": {"right": right, "count": count, "log_likelihood": log_likelihood}} | fields


def write_exam(folder, *arguments, **fields):
    found = exam(*arguments, **fields)
    (folder / f"mlm-{found['strategy']}-{found['seed']}.json").write_text(json.dumps(found))


def test_the_exam_is_compared_by_its_accuracy_and_shows_its_bands(tmp_path):
    for seed, more in product(range(3), (0, 1)):
        strategy = ("random", "entropy")[more]
        right = [[3, 1, more], [1, 1 + (seed > 0), 2 + more]]
        write_exam(tmp_path, strategy, seed, right, pattern="runs/{masking}-{seed}",
                   weights=f"{strategy}{seed}")
    report = stats.analyse(tmp_path)
    (pair,) = report["pairs"]
    assert (pair["task"], pair["strategy"], pair["n"]) == ("mlm", "entropy", 3)
    assert pair["masked"] == 0.15
    assert pair["mean"] == pytest.approx(2 / 20)  # two more right of twenty positions
    assert pair["bootstrap_low"] == pytest.approx(0.1) == pair["bootstrap_high"]  # one a window
    text = stats.to_markdown(report)
    assert "| strategy | n | accuracy | common | middle | rare | log_likelihood |" in text
    assert "| frequency alone |  | 0.1000 |" in text and "no GLUE" not in text
    assert stats.analyse(tmp_path, metric="rare")["pairs"][0]["mean"] == pytest.approx(2 / 6)


def test_windows_are_drawn_whole_and_the_score_is_a_ratio_of_sums():
    """One window with 9 of 10 right, one with 0 of 2: 9/10, 9/12 or 0/2, in shares of 1, 2, 1."""
    run = exam(right=[[3, 3, 3], [0, 0, 0]])
    run["dev"]["count"] = [[4, 3, 3], [1, 1, 0]]
    scores = stats.resampled_task_scores(run, None, 400)
    values, counts = np.unique(scores.round(6), return_counts=True)
    assert values.tolist() == [0, 0.75, 0.9]
    assert counts / 400 == pytest.approx([0.25, 0.5, 0.25], abs=0.08)


def test_the_mean_over_tasks_leaves_the_exam_out(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "random", seed, 0.5)
        write_run(tmp_path, "random", seed, 0, task="rte", last={"accuracy": 0.7},
                  best={"accuracy": 0.7})
        write_exam(tmp_path, "random", seed, model="m")
    cells = stats.analyse(tmp_path)["cells"]
    assert [cell["task"] for cell in cells] == ["cola", "mlm", "rte", "mean of 2 tasks"]
    assert cells[-1]["metrics"]["score"][0] == pytest.approx(0.6)


@pytest.mark.parametrize("dev", [
    None, {}, {"right": [[1, 1]], "count": [[1, 1]], "log_likelihood": [1]},
    {"right": [[1, 1, 1]], "count": [[1, 1, 1]], "log_likelihood": [1, 2]},
    {"right": [[1, 1, 1], [1]], "count": [[1, 1, 1], [1, 1, 1]], "log_likelihood": [1, 2]}])
def test_a_damaged_exam_is_named(tmp_path, dev):
    write_exam(tmp_path, "random", 0, dev=dev)
    write_exam(tmp_path, "random", 1)
    assert any("random-0.json is left out: its dev predictions are damaged" in note
               for note in notes_of(tmp_path))


def test_the_best_epoch_is_reported_on_demand_and_called_optimistic(tmp_path):
    dev = {"predictions": [0, 1, 1], "labels": [0, 1, 0]}
    for seed, best in enumerate((0.7, 0.8)):
        write_run(tmp_path, "random", seed, 0.5, best={"epoch": 2, "matthews": best}, dev=dev)
        write_run(tmp_path, "typhoon", seed, 0.5, dev=dev)
    assert stats.analyse(tmp_path)["cells"][0]["metrics"]["score"][0] == 0.5
    report = stats.analyse(tmp_path, epoch="best")
    assert math.isnan(report["pairs"][0]["bootstrap_low"])  # the predictions are not those of the best epoch
    assert report["cells"][0]["metrics"]["score"][0] == 0.75 and "optimistic" in stats.to_markdown(report)


def test_the_mean_over_tasks_takes_the_seeds_that_ran_them_all(tmp_path):
    for seed, (cola, rte) in enumerate([(0.1, 0.5), (0.2, 0.8), (0.3, None)]):
        write_run(tmp_path, "random", seed, cola)
        if rte:
            write_run(tmp_path, "random", seed, 0, task="rte", last={"accuracy": rte})
    cell = stats.analyse(tmp_path)["cells"][-1]
    assert cell["task"] == "mean of 2 tasks" and cell["seeds"] == [0, 1]
    assert cell["metrics"]["score"][0] == pytest.approx((0.3 + 0.5) / 2)


def test_the_table_of_the_mean_has_a_column_for_each_task(tmp_path):
    for seed, rte in enumerate((0.5, 0.7)):
        write_run(tmp_path, "random", seed, 0.1, baseline={"matthews": 0.0})
        write_run(tmp_path, "random", seed, 0, task="rte", last={"accuracy": rte},
                  baseline={"accuracy": 0.53})
    for against in (None, "random"):
        assert '''
| strategy | n | cola | rte | score |
| --- | --- | --- | --- | --- |
| random | 2 | 0.1000 ± 0.0000 | 0.6000 ± 0.1414 | 0.3500 ± 0.0707 |
| the constant answer |  | 0.0000 | 0.5300 | 0.2650 |
''' in stats.to_markdown(stats.analyse(tmp_path, against=against))


def test_the_multi_bootstrap_of_a_report_is_left_out_where_dev_sets_differ(tmp_path):
    dev = {"predictions": [0, 1, 1, 0], "labels": [0, 1, 0, 1]}
    for strategy, seed in product(("random", "typhoon"), range(3)):
        write_run(tmp_path, strategy, seed, 0.1 * seed, dev=dev)
    assert math.isfinite(stats.analyse(tmp_path)["pairs"][0]["bootstrap_low"])
    write_run(tmp_path, "typhoon", 2, 0.2, dev=dev | {"labels": [0, 1, 0, 0]})
    report = stats.analyse(tmp_path)
    assert math.isnan(report["pairs"][0]["bootstrap_low"])
    assert any("no multi-bootstrap" in note for note in report["notes"])


def test_both_dev_sets_of_mnli_are_resampled():
    labels = [0, 1, 2] * 30
    run = {"task": "mnli", "dev": {"predictions": labels, "labels": labels},
           "dev_mismatched": {"predictions": [0] * 90, "labels": labels}}
    scores = stats.resampled_task_scores(run, None, 200)
    assert scores.mean() == pytest.approx((1 + 1 / 3) / 2, abs=0.01) and scores.std() > 0


def test_the_forest_plot_puts_zero_mean_and_interval_where_they_are():
    pair = {"strategy": "b", "baseline": "a", "mean": 0.5, "low": 0.0, "high": 1.0}
    text = stats.forest([pair, pair | {"mean": -1.0, "low": math.nan, "high": math.nan}], width=21)
    line, axis = text.splitlines()[::2]
    assert line == "b − a  " + " " * 10 + "|" + "-" * 4 + "o" + "-" * 5
    assert axis.split() == ["-1.0000", "0", "+1.0000"]


# --- the sweep ------------------------------------------------------------------------------------

FAKE_GLUE = """
import hashlib, json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(os.path.join(os.path.dirname(__file__), "started"), "a") as file:
    file.write(options["--json"] + "\\n")
time.sleep(0.03)
if options["--seed"] == options.get("--fail"):
    sys.exit("first line\\nout of luck\\n")
strategy = options.get("--label", options.get("--adapt", "none"))
run = {"task": options["--task"], "model": options["--model"], "strategy": strategy,
       "pattern": options.get("--pattern"), "seed": int(options["--seed"]), "args": {},
       "seconds": 60, "last": {"matthews": 0.5}, "best": {"epoch": 1, "matthews": 0.5}}
weights = os.path.join(options["--model"], "model.safetensors")
if os.path.exists(weights):
    run["weights"] = hashlib.sha256(open(weights, "rb").read()).hexdigest()
with open(options["--json"] + ".tmp", "w") as file:
    json.dump(run, file)
os.replace(options["--json"] + ".tmp", options["--json"])
"""


@pytest.fixture
def fake_glue(tmp_path):
    script = tmp_path / "fake" / "glue.py"
    script.parent.mkdir()
    script.write_text(FAKE_GLUE)
    return script


def started(script):
    return (script.parent / "started").read_text().splitlines()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


GRID = stats.plan(tasks=["cola"], models=["m"], strategies=["random", "typhoon"],
                  seeds=list(range(10)))


def test_a_sweep_writes_one_file_a_run_and_then_has_nothing_to_do(tmp_path, fake_glue):
    assert stats.sweep(GRID, tmp_path / "out", parallel=2, script=fake_glue) == []
    assert sorted(contents(tmp_path / "out")) == sorted(f"cola--m--{s}--{i}.json" for s in ("random", "typhoon")
                                                        for i in range(10))
    assert stats.sweep(GRID, tmp_path / "out", script=fake_glue) == []
    assert len(started(fake_glue)) == 20


def test_a_failed_run_is_recorded_and_tried_again_and_stops_no_other(tmp_path, fake_glue):
    out = tmp_path / "out"
    failures = stats.sweep(GRID, out, extra=["--fail", "3"], parallel=2, script=fake_glue)
    assert failures == ["out of luck"] * 2
    assert len(contents(out)) == 20
    error = json.loads((out / "cola--m--random--3.error.json").read_text())
    assert error["error"] == "out of luck" and error["returncode"] == 1 and "--fail" in error["command"]
    assert "cola--m--random--3 failed" in stats.read_rows(out, "last", None)[1]
    assert stats.sweep(GRID, out, script=fake_glue) == []
    assert len(contents(out)) == 20 and not list(out.glob("*.error.json"))


def test_an_unreadable_result_is_made_again_and_what_a_killed_write_left_is_removed(tmp_path, fake_glue):
    broken = tmp_path / "out" / "cola--m--random--3.json"
    broken.parent.mkdir()
    broken.write_text('{"task": "co')
    (broken.parent / ".cola--m--random--3.json.x1y2").write_text("half a fi")
    assert stats.sweep(GRID, tmp_path / "out", script=fake_glue) == []
    assert json.loads(broken.read_text())["seed"] == 3 and len(list(broken.parent.iterdir())) == 20


def test_ten_sigkills_lose_nothing_but_the_runs_in_flight(tmp_path, fake_glue):
    """The sweep alone is killed, as a process that runs out of memory is; what it started ends by itself."""
    grid = stats.plan(tasks=["cola"], models=["m"], strategies=["random", "typhoon"],
                      seeds=list(range(20)))
    stats.sweep(grid, tmp_path / "unbroken", parallel=2, script=fake_glue)
    (fake_glue.parent / "started").unlink()
    out, pause, fork = tmp_path / "out", random.Random(0), multiprocessing.get_context("fork")
    for _ in range(10):
        before = contents(out)
        process = fork.Process(target=stats.sweep, args=(grid, out),
                               kwargs={"parallel": 2, "script": fake_glue})
        process.start()
        time.sleep(pause.uniform(0.03, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it was in the middle of it
        assert before.items() <= contents(out).items()
    time.sleep(0.5)
    assert stats.sweep(grid, out, parallel=2, script=fake_glue) == []
    assert contents(out) == contents(tmp_path / "unbroken") and len(contents(out)) == len(list(out.iterdir()))
    assert len(started(fake_glue)) <= len(grid) + 10 * 2


def test_sigterm_ends_the_runs_in_flight_too(tmp_path, fake_glue, monkeypatch):
    fake_glue.write_text(FAKE_GLUE.replace("time.sleep(0.03)", "time.sleep(30)"))
    monkeypatch.setattr(stats, "sweep", partial(stats.sweep, script=fake_glue))
    process = multiprocessing.get_context("fork").Process(target=stats.main, args=(
        ["sweep", "--tasks", "cola", "--models", "m", "--strategies", "none", "--out", str(tmp_path / "out")],))
    process.start()
    while not (fake_glue.parent / "started").exists():
        time.sleep(0.05)
    process.terminate()
    process.join(timeout=10)
    assert process.exitcode == 143  # it waits for its children: were they alive, this would take 30 s


def is_running(pid):
    """A killed process whose parent is gone may stay as a zombie where nothing collects those."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip() not in ("", "Z")


def test_kill_9_of_a_sweep_ends_its_children(tmp_path, fake_glue):
    fake_glue.write_text(FAKE_GLUE.replace("time.sleep(0.03)", """
with open(os.path.join(os.path.dirname(__file__), "pids"), "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(60)"""))
    process = multiprocessing.get_context("fork").Process(
        target=stats.sweep, args=(GRID, tmp_path / "out"),
        kwargs={"parallel": 2, "script": fake_glue})
    process.start()
    pids = fake_glue.parent / "pids"
    while not pids.exists() or len(pids.read_text().splitlines()) < 2:
        time.sleep(0.05)
    children = pids.read_text().split()
    assert len(children) == 2 and all(map(is_running, children))
    process.kill()
    process.join()
    deadline = time.time() + 10
    while any(map(is_running, children)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))


def test_a_common_reason_of_failures_is_said_once(tmp_path, fake_glue, monkeypatch):
    sweep = partial(stats.sweep, script=fake_glue)
    monkeypatch.setattr(stats, "sweep", lambda *args, extra, **options: sweep(
        *args, extra=["--fail", "3"], **options))
    with pytest.raises(RunError) as error:
        stats.main(["sweep", "--tasks", "cola", "--models", "m", "--out", str(tmp_path / "out"),
                    "--strategies", "random", "typhoon", "--seeds", "1", "3"])
    assert str(error.value).startswith("2 failed: 2 × out of luck. ")


def test_a_finished_run_of_other_options_is_refused_by_name(tmp_path):
    arguments = ["--epochs", "2", "--lr", "0.1"]
    cell = ["sweep", "--tasks", "cola", "--models", "m", "--strategies", "none", "--seeds", "0",
            "--out", str(tmp_path), "--dry-run", "--"]
    write_run(tmp_path, "none", 0, 0.5, name="cola--m--none--0",
              args=vars(stats.glue.parse_args(["--task", "cola", "--model", "m", *arguments])))
    stats.main([*cell, *arguments])
    with pytest.raises(InputError, match="cola--m--none--0.json was made with --lr 0.1, and this "
                                         "sweep asks for 0.2: remove it"):
        stats.main([*cell, "--epochs", "2", "--lr", "0.2"])


def test_a_result_whose_model_was_trained_again_is_made_again(tmp_path, fake_glue, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrained("runs/random-0")
    grid = stats.plan(tasks=["cola"], models=["runs/{masking}-{seed}"], strategies=["random"],
                      seeds=[0])
    for _ in range(2):
        assert stats.sweep(grid, Path("out"), script=fake_glue) == []
    assert len(started(fake_glue)) == 1
    Path("runs/random-0/model.safetensors").write_text("retrained in place")
    assert not stats.finished_runs(grid, Path("out"))
    assert stats.sweep(grid, Path("out"), script=fake_glue) == []
    assert len(started(fake_glue)) == 2
    assert list(stats.finished_runs(grid, Path("out"))) == grid


def test_a_finished_run_whose_model_was_pretrained_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = stats.plan(tasks=["cola"], models=["runs/{masking}-{seed}"], strategies=["random"],
                      seeds=[0])
    done = {runs[0]: {"pretraining": {"steps": 60, "masking": "random", "seed": 0}}}
    assert stats.pretraining_jobs(runs, Path("o"), extra=["--steps", "60"], done=done)
    with pytest.raises(InputError, match="the model of cola--runs-masking-seed--random--0.json was "
                                         "made with --steps 60, and this sweep asks for 100"):
        stats.pretraining_jobs(runs, Path("o"), extra=["--steps", "100"], done=done)


# --- pretraining in a sweep -----------------------------------------------------------------------

FAKE_TRAIN = """
import json, os, sys, time
import numpy as np
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
log = os.path.join(os.path.dirname(__file__), "log")
def note(what):
    with open(log, "a") as file:
        file.write(f"{what} {options['--out']} {os.environ['OMP_NUM_THREADS']}\\n")
note("begin")
time.sleep(0.5)
os.makedirs(options["--out"])
seed = int(options["--seed"])
exam = json.loads(os.environ["EXAM"]) | {"strategy": "?", "model": "?", "seed": seed}
exam["last"]["accuracy"] += seed / 10 + len(options["--masking"]) / 100
with open(os.path.join(options["--out"], "exam.json"), "w") as file:
    json.dump(exam, file)
with open(os.path.join(options["--out"], "model.safetensors"), "w") as file:
    file.write(" ".join(sys.argv))
note("end")
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    script = tmp_path / "fake" / "train.py"
    script.parent.mkdir()
    script.write_text(FAKE_TRAIN)
    monkeypatch.setattr(stats, "HERE", script.parent)
    monkeypatch.setenv("EXAM", json.dumps(exam()))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(stats.os, "cpu_count", lambda: 6)
    monkeypatch.chdir(tmp_path)
    return script.parent / "log"


MLM = ["sweep", "--tasks", "mlm", "--models", "runs/{masking}-{seed}", "--seeds", "0", "1",
       "--out", "out"]


def test_the_exam_is_swept_and_reported_with_a_strategy_and_an_arm_of_ones_own(fake_train, capsys):
    Path("mine.py").write_text("from masking import Random\nclass Rarest(Random):\n    pass\n")
    arguments = [*MLM, "--strategies", "random", "entropy", "mine.py:Rarest", "--jobs", "3",
                 "--arm", "seen=--masking entropy --entropy-input visible",
                 "--pretrain", "--steps 7"]
    stats.main(arguments)
    files = sorted(path.name for path in Path("out").iterdir())
    assert files == [f"mlm--runs-masking-seed--{label}--{seed}.json"
                     for label in ("Rarest", "entropy", "random", "seen") for seed in range(2)]
    result = json.loads(Path("out", files[-1]).read_text())
    assert (result["model"], result["strategy"], result["pattern"], result["seed"]) == (
        "runs/seen-1", "seen", "runs/{masking}-{seed}", 1)
    command = Path("runs/seen-1/model.safetensors").read_text()
    assert command.endswith("--steps 7 --masking entropy --entropy-input visible --seed 1 "
                            "--out runs/seen-1")
    assert result["weights"] == stats.weights_digest("runs/seen-1")
    log = fake_train.read_text().splitlines()
    assert all(line.endswith(" 2") for line in log)  # three at once share six cores
    assert [line.split()[0] for line in log[:3]] == ["begin"] * 3
    trained = log.index("end runs/entropy-0 2")  # with the teacher; who shares it comes after
    waited = [log.index(f"begin runs/{name} 2") for name in ("entropy-1", "seen-0", "seen-1")]
    assert log.index("begin runs/entropy-0 2") < 3 and trained < min(waited)
    assert log.index("begin runs/random-0 2") < trained  # who needs none uses the other cores
    stats.main(arguments)  # nothing is left to do
    assert len(fake_train.read_text().splitlines()) == len(log)
    stats.main(["report", "out"])
    assert "| seen − entropy | 2 | 15.00%, 15.00% |" in capsys.readouterr().out


def test_a_seed_in_the_options_makes_the_teacher_vary(fake_train):
    runs = stats.plan(tasks=["mlm"], models=["runs/{masking}-{seed}"], seeds=[0, 1],
                      strategies=["random", "entropy", "entropy-kd"])
    jobs = stats.pretraining_jobs(runs, Path("out"), extra=["--lr", "0.{seed}1"])
    assert [job.command[3] for job in jobs] == ["0.01"] * 3 + ["0.11"] * 3
    assert [job.turn for job in jobs] == [1, 0, 2] * 2  # two teachers
    jobs = stats.pretraining_jobs(runs, Path("out"))
    assert [job.turn for job in jobs] == [1, 0, 2] + [1, 2, 2]


def test_a_dry_run_of_pretraining_lists_the_models_and_downloads_no_corpus(fake_train, monkeypatch,
                                                                         capsys):
    monkeypatch.setattr(stats.train, "corpus_files", lambda _: pytest.fail("it would download"))
    stats.main([*MLM, "--strategies", "random", "--pretrain", "--corpus wikitext-2", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["pretrain  runs/random-0", "pretrain  runs/random-1"]
    assert lines[-1].startswith("2 of 2 runs to do") and "download" not in str(lines)
    assert not Path("out").exists() and not Path("runs").exists()


def test_an_exam_that_is_missing_is_refused_or_a_failure(fake_train):
    pretrained("runs/random-0")
    with pytest.raises(InputError, match="runs/random-0 has no exam.json"):
        stats.main([*MLM, "--strategies", "random", "--seeds", "0"])
    runs = stats.plan(tasks=["mlm"], models=["runs/{masking}-{seed}"], seeds=[0],
                      strategies=["random"])
    assert stats.sweep(runs, Path("out")) == ["runs/random-0/exam.json is not there, or damaged"]


def test_the_shards_of_a_sweep_are_the_grid_each_run_once():
    def shard(text):
        return stats.grid(stats.parse_args(["sweep", "--preset", "typhoon"] + (["--shard", text] if text else [])))

    shards = [shard(f"{i}/7") for i in range(1, 8)]
    assert sorted(map(len, shards)) == [12, 13, 13, 13, 13, 13, 13]
    assert sorted(run.name for part in shards for run in part) == sorted(run.name for run in shard(None))


def test_the_typhoon_preset_is_the_papers_grid():
    runs = stats.plan(**stats.PRESETS["typhoon"])
    assert len(runs) == 90
    rows = [stats.Row(run.task, run.model, run.strategy, run.seed, 0.0) for run in runs]
    assert len(stats.compare_all(rows, [], against="typhoon")) == 12


def test_the_entropy_preset_pretrains_18_models_and_labels_their_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = stats.plan(**stats.PRESETS["entropy"])
    jobs = stats.pretraining_jobs(runs, Path("runs/entropy"), extra=["--steps", "10"])
    assert len(runs) == 9 * 18 and len(jobs) == 18
    command = next(job.command for job in jobs if job.output == Path("runs/self-entropy-kd-2/model.safetensors"))
    assert command[2:] == ["--steps", "10", "--masking", "self-entropy", "--kd-weight", "0.5",
                           "--seed", "2", "--out", "runs/self-entropy-kd-2"]
    run = next(run for run in runs if run.strategy == "self-entropy-kd" and run.seed == 2 and run.task == "rte")
    command = run.command(Path("out.json"), ["--epochs", "2"], Path("glue.py"))
    assert command[1:] == [
        "glue.py", "--task", "rte", "--model", "runs/self-entropy-kd-2", "--seed", "2",
        "--json", "out.json", "--pattern", "runs/{masking}-{seed}", "--label", "self-entropy-kd",
        "--epochs", "2"]


def pretrained(checkpoint, *options, weights="weights", **fields):
    """A directory as train.py leaves it; without weights as an interrupted run leaves it."""
    folder = Path(checkpoint)
    folder.mkdir(parents=True)
    settings = vars(stats.train.parse_args(list(options))) | fields
    (folder / "train_args.json").write_text(json.dumps(settings))
    if weights:
        (folder / "model.safetensors").write_text(f"{checkpoint} {weights}")
    return settings


def pretraining_commands(strategies, seeds, **options):
    runs = stats.plan(tasks=["cola"], models=["runs/{masking}-{seed}"], strategies=strategies,
                      seeds=seeds)
    return [job.command[2:] for job in stats.pretraining_jobs(runs, Path("out"), **options)]


def test_a_finished_model_is_not_pretrained_again_and_an_interrupted_one_goes_on(tmp_path,
                                                                                 monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrained("runs/random-0")
    pretrained("runs/random-1", "--seed", "1", weights="")
    commands = pretraining_commands(["random"], [0, 1, 2])
    assert [command[-2:] for command in commands] == [["--resume", "runs/random-1"],
                                                      ["--out", "runs/random-2"]]


@pytest.mark.parametrize("made_with, asked_for, said", [
    (["--steps", "60"], ["--steps", "100"], "--steps 60, and this sweep asks for 100"),
    (["--seed", "5"], [], "--seed 5, and this sweep asks for 0"),
    (["--masking", "typhoon"], [], "--masking typhoon, and this sweep asks for random"),
    (["--mask-rate", "0.4"], [], "--mask-rate 0.4, and this sweep asks for 0.3")])
def test_a_model_that_was_pretrained_otherwise_is_no_run_of_the_grid(
        tmp_path, monkeypatch, made_with, asked_for, said):
    monkeypatch.chdir(tmp_path)
    pretrained("runs/random-0", *made_with)
    with pytest.raises(InputError, match="runs/random-0 was made with " + said):
        pretraining_commands(["random"], [0], extra=asked_for)


def test_a_pattern_is_one_model_in_the_report(tmp_path, fake_glue):
    runs = stats.plan(tasks=["cola"], models=["runs/{masking}-{seed}"],
                      strategies=["random", "entropy"], seeds=[0, 1])
    stats.sweep(runs, tmp_path / "out", parallel=2, script=fake_glue)
    (pair,) = stats.analyse(tmp_path / "out")["pairs"]
    assert (pair["model"], pair["strategy"], pair["n"]) == ("runs/{masking}-{seed}", "entropy", 2)


def test_adaptation_strategies_go_to_adapt_and_none_adapts_nothing():
    random_run, none = stats.plan(tasks=["cola"], models=["bert-base-uncased"],
                                  strategies=["random", "none"], seeds=[0])
    assert random_run.command(Path("o"), [], Path("g"))[-2:] == ["--adapt", "random"]
    assert "--adapt" not in none.command(Path("o"), [], Path("g"))


def test_a_dry_run_lists_and_estimates_and_writes_nothing(tmp_path, capsys):
    write_run(tmp_path, "random", 0, 0.5, name="cola--m--random--0", seconds=90,
              args={"adapt": "random"})
    stats.main(["sweep", "--tasks", "cola", "--models", "m", "--strategies", "random", "typhoon",
                "--seeds", "0", "1", "2", "--out", str(tmp_path), "--jobs", "2", "--dry-run",
                "--", "--data-dir", "nowhere"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "done      cola--m--random--0" and lines[1] == "missing   cola--m--typhoon--0"
    assert lines[6] == "download  m"
    assert lines[7] == "download  the data of cola, which are not in nowhere"
    assert lines[-1] == "5 of 6 runs to do: about 4 minutes with --jobs 2, from 1 finished runs"  # 5 × 90 s / 2
    assert len(list(tmp_path.iterdir())) == 1


# --- the command line -----------------------------------------------------------------------------

CELL = ["--tasks", "cola", "--models", "m", "--strategies", "random"]


@pytest.mark.parametrize("arguments, said", [
    (["report", "nowhere"], "nowhere holds no finished run"),
    (["report", ".", "--effect", "0"], "--effect: 0 is not above 0"),
    (["report", ".", "--effect", "nan"], "--effect: nan is not above 0"),
    (["sweep"], "--tasks and --models and --strategies missing"),
    (["sweep", *CELL, "--jobs", "0"], "--jobs: 0 is not at least 1"),
    (["sweep", *CELL, "--shard", "0/4"], "--shard 0/4"),
    (["sweep", *CELL, "--shard", "5/4"], "--shard 5/4"),
    (["sweep", *CELL, "--shard", "2"], "--shard 2"),
    (["sweep", *CELL, "--tasks", "cloa"], "--tasks: invalid choice: 'cloa'"),
    (["sweep", *CELL, "--strategies", "rnadom"], "rnadom"),
    (["sweep", *CELL, "--models", "runs/{mask}"], "no other brace"),
    (["sweep", *CELL, "--models", "a/b", "a-b"], "both write cola--a-b--random--0.json"),
    (["sweep", *CELL, "--models", "runs/{masking}"], "runs/random is not there"),
    (["sweep", *CELL, "--models", "runs/x/y"], "runs/x/y is not there"),
    (["sweep", *CELL, "--models", "runs/x/y", "--dry-run"], "runs/x/y is not there"),
    (["sweep", *CELL, "--tasks", "mlm"], "--tasks mlm compares pretraining"),
    (["sweep", *CELL, "--arm", "random=--masking random"], "'random=--masking random' is not"),
    (["sweep", *CELL, "--arm", "x"], "--arm: 'x' is not NAME='OPTIONS'"),
    (["sweep", "--preset", "entropy", "--arm", "x='", "--pretrain"], "No closing quotation"),
    (["sweep", "--preset", "entropy", "--arm", "x=--seed 3", "--pretrain"], "--seed is set by"),
    (["sweep", "--preset", "entropy", "--strategies", "no.py:X", "--pretrain"], "no.py cannot be imported"),
    (["sweep", *CELL, "--models", "runs/{masking}", "--strategies", "a b"], "--strategies a b"),
    (["sweep", *CELL, "--", "--epochs", "0"], "the options for glue.py: argument --epochs: 0 is"),
    (["sweep", *CELL, "--", "--corruption", "1", "1", "0"], "for glue.py: --corruption [1.0, 1.0"),
    (["sweep", *CELL, "--", "--seed=3"], "--seed is set by the sweep"),
    (["sweep", "--preset", "entropy", "--strategies", "x", "--pretrain"], "--pretrain knows no strategy x"),
    (["sweep", "--preset", "entropy", "--pretrain", "--out x"], "--out is set by the sweep"),
    (["sweep", "--preset", "entropy", "--pretrain", "--steps 0"],
     "the options for train.py: argument --steps: 0 is"),
    (["sweep", "--preset", "entropy", "--pretrain", "--shard", "1/2"], "first sweep --pretrain, then the shards")])
def test_bad_input_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, arguments,
                                                         said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stats, "sweep", None)  # it would run for hours
    with pytest.raises((InputError, SystemExit)) as error:
        stats.main(arguments)
    message = capsys.readouterr().err.rstrip("\n") or str(error.value)
    assert said in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_it_in_one_line_with_status_2(tmp_path):
    for arguments in (["report", str(tmp_path)], ["report"], ["sweep", "--preset", "x"]):
        result = subprocess.run([sys.executable, stats.__file__, *arguments], capture_output=True, text=True)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and not result.stdout
