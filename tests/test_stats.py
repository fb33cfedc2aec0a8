"""What is true of stats.py: each statistic against something outside it, then the report, the
picture, the sweep and the command line, in the order of the source.

The golden report: after a wanted change, `python stats.py report tests/data/stats/runs --effect
0.01` and move its report.* one folder up.
"""
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import stats
import train
from model import InputError

DATA = Path(__file__).parent / "data" / "stats"


# --- Student's t ----------------------------------------------------------------------------------

@pytest.mark.parametrize("df, alpha, printed", [
    (1, 0.05, 12.706), (2, 0.05, 4.303), (3, 0.05, 3.182), (4, 0.05, 2.776), (9, 0.05, 2.262),
    (30, 0.05, 2.042), (120, 0.05, 1.980), (4, 0.01, 4.604), (9, 0.01, 3.250), (4, 0.10, 2.132),
    (9, 0.001, 4.781)])
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


# --- paired statistics ----------------------------------------------------------------------------

def test_t_p_and_interval_agree_with_scipy_on_1000_samples():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(1000):
        n = int(rng.integers(2, 41))
        a = rng.normal(rng.normal(), 1, n)
        b = rng.random() * a + rng.normal(3 * rng.normal(), rng.random() + 0.01, n)
        expected = scipy_stats.ttest_rel(a, b)
        assert stats.paired_t_test(a, b) == pytest.approx(
            (expected.statistic, expected.pvalue), rel=1e-9)
        assert stats.confidence_interval(a - b) == pytest.approx(
            tuple(expected.confidence_interval(0.95)), rel=1e-9)


def test_a_paired_t_test_by_hand():
    t, p = stats.paired_t_test([3, 5, 7], [2, 3, 4])  # differences 1, 2, 3: mean 2, sd 1, t = 2 √3
    assert t == pytest.approx(2 * math.sqrt(3))
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_the_sign_of_t_says_which_of_the_two_is_better():
    better, worse = [3, 5, 7], [2, 3, 4]
    t, p = stats.paired_t_test(worse, better)
    assert t == pytest.approx(-2 * math.sqrt(3)) and 0 < p < 0.1
    low, high = stats.confidence_interval([-1, -2, -3])
    assert (low, high) == pytest.approx((-2 - 2.484, -2 + 2.484), abs=1e-3)


def test_one_seed_gives_no_test_and_no_interval():
    assert all(map(math.isnan, stats.paired_t_test([0.8], [0.7])))
    assert all(map(math.isnan, stats.confidence_interval([0.1])))
    assert math.isnan(stats.minimum_detectable_effect([0.1]))
    assert stats.sign_flip_test([0.1]) == 1


@pytest.mark.parametrize("a, b", [
    ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7]), ([0.81, 0.15, 0.7], [0.80, 0.14, 0.69])])
def test_without_a_spread_there_is_no_test_no_interval_and_no_effect(a, b):
    """0.81 - 0.80, 0.15 - 0.14 and 0.70 - 0.69 are three different floats."""
    differences = np.subtract(a, b)
    assert all(map(math.isnan, stats.paired_t_test(a, b) + stats.confidence_interval(differences)))
    assert math.isnan(stats.minimum_detectable_effect(differences))
    assert stats.sign_flip_test(differences) == (0.25 if differences.any() else 1)  # 2 / 2^3


def test_a_nan_comes_out_as_nan():
    for differences in ([math.nan, 0.01, 0.02], [0.01, 0.02, math.nan], [0.1] * 24 + [math.nan]):
        assert math.isnan(stats.sign_flip_test(differences))
        assert math.isnan(stats.minimum_detectable_effect(differences))
        tested = stats.paired_t_test(differences, [0.0] * len(differences))
        assert all(map(math.isnan, tested + stats.confidence_interval(differences)))


def test_scores_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError):
        stats.paired_t_test([1.0], [1.0, 2.0])


@pytest.mark.parametrize("seed", range(20))
def test_sign_flip_counts_what_brute_force_counts(seed):
    rng = np.random.default_rng(seed)
    differences = rng.integers(-4, 6, size=rng.integers(1, 11)) / 10  # many ties
    sums = [abs(sum(s * d for s, d in zip(signs, differences)))
            for signs in product((1, -1), repeat=len(differences))]
    as_extreme = np.array(sums) >= abs(differences.sum()) - 1e-12
    assert stats.sign_flip_test(differences) == np.mean(as_extreme)


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
    four_errors = 4 * math.sqrt(exact * (1 - exact) / 1e5)
    assert stats.sign_flip_test(differences) == pytest.approx(exact, abs=four_errors)
    assert stats.sign_flip_test(differences) == stats.sign_flip_test(differences)
    assert stats.sign_flip_test(np.ones(25)) == pytest.approx(1e-5, rel=0.01)  # never 0


def test_holm_on_a_worked_example():
    # sorted 0.005 0.01 0.03 0.04, times 4 3 2 1: 0.02 0.03 0.06 0.04; none below the one before
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
        expected = (scipy_stats.nct.sf(critical, n - 1, shift)
                    + scipy_stats.nct.cdf(-critical, n - 1, shift))
        assert power(n, shift, alpha) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n, alpha", list(product((3, 5, 20, 300), (0.01, 0.05))))
def test_without_a_true_difference_the_power_is_alpha_in_both_directions(n, alpha):
    assert power(n, 0.0, alpha) == pytest.approx(alpha, abs=1e-9)
    assert power(n, -2.0, alpha) == pytest.approx(power(n, 2.0, alpha))


def test_the_minimum_detectable_effect_is_found_four_times_in_five():
    rng = np.random.default_rng(2)
    differences = rng.normal(0, 0.02, 5)
    effect, sd = stats.minimum_detectable_effect(differences), differences.std(ddof=1)
    found = [stats.paired_t_test(effect + sd * rng.normal(size=5), np.zeros(5))[1] < 0.05
             for _ in range(2000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("d_z, published", [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_needed_are_the_published_sample_sizes_for_80_percent_power(d_z, published):
    assert stats.seeds_needed(1.0, d_z) == published


def test_seeds_needed_are_the_least_that_scipys_noncentral_t_finds_enough():
    scipy_stats = pytest.importorskip("scipy.stats")

    def power(n, effect):
        critical, shift = scipy_stats.t.ppf(0.975, n - 1), effect * math.sqrt(n)
        return (scipy_stats.nct.sf(critical, n - 1, shift)
                + scipy_stats.nct.cdf(-critical, n - 1, shift))

    for effect in (3.0, 2.0, 1.5, 1.0, 0.7, 0.4, 0.21, 0.13, 0.05):
        n = stats.seeds_needed(1.0, effect)
        assert power(n, effect) >= 0.8 > power(n - 1, effect)


def test_many_seeds_are_counted_exactly():
    counts = [stats.seeds_needed(0.02 + 0.01 * i, 0.001) for i in range(5)]
    assert counts == sorted(counts) and counts[0] == 3142  # 2.80158² 20² + 1.92 = 3141.5


def test_two_seeds_are_enough_for_a_huge_difference():
    assert stats.seeds_needed(1.0, 100.0) == 2


def test_more_seeds_than_anyone_has_are_called_infinite():
    assert stats.seeds_needed(1.0, 1e-6) == math.inf
    effect = 2.80159 / math.sqrt(700_000)  # (1.95996 + 0.84162)
    assert stats.seeds_needed(1.0, effect) == pytest.approx(700_000, rel=1e-4)
    assert math.isnan(stats.seeds_needed(0.0, 0.01))


# --- the dev set is a sample too ------------------------------------------------------------------

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
    hit, false_alarm = (np.array([math.erfc(-x / spread) / 2 for x in u + side * slope])
                        for side in (1, -1))
    tp, fp = POSITIVE * hit, (1 - POSITIVE) * false_alarm
    fn, tn = POSITIVE - tp, 1 - POSITIVE - fp
    matthews = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    f1 = 2 * tp / (2 * tp + fp + fn)
    return [np.average(metric, weights=weight) for metric in (f1, matthews)]


def test_the_multi_bootstrap_covers_the_true_difference_over_seeds_and_examples():
    """500 trials: 150 examples, each of some difficulty, in part a strategy's own; 6 seeds, each
    with a shift."""
    rng, seeds, examples, trials = np.random.default_rng(0), 6, 150, 500
    target, covered = np.subtract(*map(true_scores, SLOPES)), np.zeros(2)
    for trial in range(trials):
        labels = (rng.random(examples) < POSITIVE).astype(int)
        difficulty = rng.normal(size=examples)
        drawn = []
        for slope in SLOPES:
            score = ((2 * labels - 1) * slope + difficulty + rng.normal(0, STRATEGY_SD, examples)
                     + rng.normal(0, SEED_SD, (seeds, 1))
                     + rng.normal(0, NOISE_SD, (seeds, examples)))
            runs = [stats.resampled_scores(f1_and_matthews, predictions, labels, resamples=99,
                                           seed=trial) for predictions in (score > 0).astype(int)]
            drawn.append(np.stack(runs))  # (seeds, 99, 2)
        for metric in range(2):
            low, high = stats.multi_bootstrap(*(runs[..., metric] for runs in drawn), seed=trial)
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


# --- the analysis ---------------------------------------------------------------------------------

def test_without_a_true_difference_the_error_rates_are_the_promised_ones():
    """2,000 sweeps of three equal strategies and five seeds, which share the seeds' luck. The
    long-run rates are 5%, 95% and 4.7% (200,000 sweeps), give or take half a point over 2,000:
    another seed may land just outside."""
    rng = np.random.default_rng(1)
    rejected, covered, claimed = 0, 0, 0
    for _ in range(2000):
        luck = rng.normal(0, 0.02, 5)
        rows = [stats.Row("mrpc", "m", name, seed, score)
                for name in ("random", "entropy", "typhoon")
                for seed, score in enumerate(0.8 + luck + rng.normal(0, 0.01, 5))]
        pairs = stats.compare_all(rows)
        rejected += pairs[0]["p"] < 0.05
        covered += pairs[0]["low"] <= 0 <= pairs[0]["high"]
        claimed += "a difference shows" in stats.verdict(pairs)
    assert 0.04 <= rejected / 2000 <= 0.06
    assert 0.94 <= covered / 2000 <= 0.96
    assert 0.005 <= claimed / 2000 <= 0.05


def write_run(folder, strategy, seed, score, task="cola", model="m", name=None, **fields):
    folder.mkdir(exist_ok=True)
    run = {"task": task, "model": model, "strategy": strategy, "seed": seed,
           "args": {"epochs": 3}, "last": {"matthews": score}} | fields
    (folder / f"{name or f'{task}-{model}-{strategy}-{seed}'}.json").write_text(json.dumps(run))


def write_cells(folder, **scores):
    for strategy, values in scores.items():
        for seed, score in enumerate(values):
            write_run(folder, strategy, seed, score)


def notes_of(folder, **options):
    return stats.analyse(folder, **options)["notes"]


def test_a_clear_difference_is_claimed_and_marked_in_the_table(tmp_path):
    write_cells(tmp_path, none=[0.40, 0.61, 0.55, 0.52, 0.50],
                random=[0.50, 0.51, 0.49, 0.50, 0.52], typhoon=[0.60, 0.62, 0.59, 0.60, 0.61])
    text = stats.write_report(tmp_path)
    assert ("For other seeds on these same examples, a difference shows in 1 of 3 comparisons "
            "(Holm-adjusted p < 0.05, marked * in the tables).") in text
    marked, = [line for line in text.splitlines() if " * |" in line]
    assert marked.startswith("| typhoon − random | 5 | n/a, n/a | +0.1000 | [+0.0912, +0.1088] |")


def test_no_difference_is_claimed_on_an_unadjusted_p(tmp_path):
    """p = 0.03 alone, 0.09 among three."""
    write_cells(tmp_path, random=[0.50, 0.51, 0.49, 0.50], entropy=[0.52, 0.48, 0.5, 0.51],
                typhoon=[0.52, 0.55, 0.50, 0.53])
    report = stats.analyse(tmp_path)
    assert min(pair["p"] for pair in report["pairs"]) < 0.05
    assert min(pair["holm_p"] for pair in report["pairs"]) > 0.05
    least = min(pair["mde"] for pair in report["pairs"])
    assert "No strategy is reliably better: none of 3 comparisons" in report["verdict"]
    assert f"none would find a true difference below {least:.4f}" in report["verdict"]


def test_claims_that_other_examples_may_not_bear_out_are_counted():
    pair = {"n": 5, "sd": 0.1, "holm_p": 0.01, "mde": 0.1}
    pairs = [pair | {"bootstrap_low": low, "bootstrap_high": 0.03} for low in (-0.01, 0.01, -0.02)]
    assert stats.verdict(pairs).endswith("; other examples may not bear out 2 of them, whose "
                                         "multi-bootstrap interval contains 0.")
    assert stats.verdict(pairs[1:2]).endswith("marked * in the tables).")


def test_equal_scores_and_constant_differences_claim_nothing(tmp_path):
    write_cells(tmp_path, none=[0.5, 0.5, 0.6], random=[0.5, 0.5, 0.6], typhoon=[0.51, 0.51, 0.61])
    text = stats.write_report(tmp_path)
    assert "No claim can be made" in text and "inf" not in text and "-0.0000" not in text
    assert "| typhoon − random | 3 | n/a, n/a | +0.0100 | n/a |" in text


def test_one_seed_is_said_to_prove_nothing(tmp_path):
    write_cells(tmp_path, random=[0.5], typhoon=[0.9])
    text = stats.write_report(tmp_path)
    assert "No claim can be made" in text and "nan" not in text
    assert "| typhoon | 1 | 0.9000 ± n/a |" in text


def test_a_missing_seed_is_named_and_the_pair_uses_the_others(tmp_path):
    write_cells(tmp_path, random=[0.5, 0.6, 0.7], typhoon=[0.6, 0.8])
    report = stats.analyse(tmp_path)
    assert "cola, m: typhoon lacks seed 2; its pairs go without" in report["notes"]
    assert report["pairs"][0]["n"] == 2 and report["pairs"][0]["mean"] == pytest.approx(0.15)


def test_an_effect_size_is_the_mean_difference_in_units_of_its_sd(tmp_path):
    write_cells(tmp_path, none=[0.3, 0.3, 0.3], random=[0.3, 0.3, 0.3], typhoon=[0.2, 0.1, 0.0])
    sizes = {pair["strategy"]: pair["dz"] for pair in stats.analyse(tmp_path)["pairs"]}
    assert sizes["typhoon"] == pytest.approx(-2) and math.isnan(sizes["random"])


def test_strategies_without_a_common_seed_are_not_compared(tmp_path):
    write_run(tmp_path, "random", 0, 0.5)
    write_run(tmp_path, "typhoon", 1, 0.6)
    report = stats.analyse(tmp_path)
    assert not report["pairs"] and "Nothing was compared" in report["verdict"]
    assert "cola, m: typhoon lacks seed 0; its pairs go without" in report["notes"]
    assert "cola, m: random lacks seed 1; its pairs go without" in report["notes"]


def write_task(folder, task, strategy, seed, score, model="m", **fields):
    last = {name: score for name in stats.glue.TASKS[task].metrics}
    write_run(folder, strategy, seed, 0, task=task, model=model, last=last, **fields)


def test_a_strategy_that_lacks_a_whole_task_is_noted_there_and_in_the_mean(tmp_path):
    for seed, task in product(range(2), ("cola", "rte")):
        write_task(tmp_path, task, "random", seed, 0.5 + seed / 10)
        if task == "cola":
            write_task(tmp_path, task, "typhoon", seed, 0.6)
    notes = notes_of(tmp_path)
    assert "rte, m: typhoon lacks seed 0, 1; its pairs go without" in notes
    assert "mean of 2 tasks, m: typhoon lacks seed 0, 1; its pairs go without" in notes
    assert not [note for note in notes if note.startswith("cola, m: ") and "lacks" in note]


def test_the_mean_over_tasks_takes_the_seeds_that_ran_them_all(tmp_path):
    for seed, (cola, rte) in enumerate([(0.1, 0.5), (0.2, 0.8), (0.3, None)]):
        write_task(tmp_path, "cola", "random", seed, cola)
        if rte:
            write_task(tmp_path, "rte", "random", seed, rte)
    assert "| random | 2 | 0.1500 ± 0.0707 | 0.6500 ± 0.2121 | 0.4000 ± 0.1414 |" in \
        stats.write_report(tmp_path)


def test_the_family_is_the_comparisons_with_one_strategy_where_asked(tmp_path):
    """[T]'s 12: 2 tasks, 3 models, 2 baselines."""
    names = ("random", "whole-word", "typhoon")
    for task, model, strategy, seed in product(("cola", "rte"), "abc", names, range(2)):
        metric = "matthews" if task == "cola" else "accuracy"
        write_run(tmp_path, strategy, seed, 0, task=task, model=model,
                  last={metric: 0.5 + seed * names.index(strategy) / 10})
    pairs = stats.analyse(tmp_path, against="typhoon")["pairs"]
    assert len(pairs) == 12 and all(pair["strategy"] == "typhoon" for pair in pairs)
    assert pairs[0]["holm_p"] == pytest.approx(min(1, 12 * pairs[0]["p"]))
    assert len(stats.analyse(tmp_path)["pairs"]) == 27
    with pytest.raises(InputError, match="--against entropy: .* has no such strategy, but random"):
        stats.analyse(tmp_path, against="entropy")


def test_runs_with_other_arguments_are_noted(tmp_path):
    write_cells(tmp_path, random=[0.5, 0.6])
    write_run(tmp_path, "typhoon", 0, 0.5, args={"epochs": 2, "seed": 7})
    assert "cola, m: the runs differ in epochs: 2, 3" in notes_of(tmp_path)


def test_a_strategy_of_two_files_is_noted(tmp_path):
    for seed, file in enumerate(("a.py:A", "a.py:A", "b.py:B")):
        write_run(tmp_path, "spans", seed, 0.5, args={"adapt": file})
    assert 'cola, m: the runs differ in adapt: "a.py:A", "b.py:B"' in notes_of(tmp_path)


@pytest.mark.parametrize("changed, said", [
    ({"args": {"teacher": "big"}}, 'teacher: "big", "small"'),
    ({"bf16": True}, "bf16: false, true"),
    ({"device": "cuda"}, 'device: "cpu", "cuda"'), ({"lr": 3e-4}, "lr: 0.0003, 2e-05"),
    ({"versions": {"torch": "2.12", "commit": "b"}}, 'torch: "2.12", "2.13"')])
def test_teacher_precision_device_learning_rate_and_versions_are_settings(tmp_path, changed, said):
    usual = {"args": {"teacher": "small", "bf16": None, "lr": None}, "bf16": False, "device": "cpu",
             "lr": 2e-5, "versions": {"torch": "2.13", "commit": "a"}}
    for seed in range(3):
        write_run(tmp_path, "entropy", seed, 0.5, **usual | (changed if seed == 1 else {}))
    found = [note for note in notes_of(tmp_path) if "differ" in note]
    if "args" in changed:  # the others are there as well
        found = [note for note in found if "teacher" in note]
    assert found == [f"cola, m: the runs differ in {said}"]


def write_pretrained(folder, strategy, seed, score=0.5, weights=None, teacher="t", **settings):
    """A run of a model that `sweep --pretrain` made."""
    pretraining = {"masking": strategy, "steps": 60, "seed": seed, "teacher_weights": teacher,
                   "teacher": f"runs/teacher-{seed}"} | settings
    write_run(folder, strategy, seed, score, model=f"runs/{strategy}-{seed}",
              name=f"{strategy}-{seed}", pattern="runs/{masking}-{seed}",
              weights=weights or f"{strategy}{seed}", pretraining=pretraining)


def test_models_pretrained_otherwise_are_noted_but_not_what_their_strategy_implies(tmp_path):
    for strategy, seed in product(("random", "entropy"), range(2)):
        write_pretrained(tmp_path, strategy, seed, teacher="t" if strategy == "entropy" else None)
    assert not [note for note in notes_of(tmp_path) if "differ" in note]
    write_pretrained(tmp_path, "entropy", 1, steps=120, versions={"torch": "2.11"})
    notes = notes_of(tmp_path)
    assert "runs/{masking}-{seed}: the pretraining of the runs differs in steps: 120, 60" in notes
    assert any('differs in torch: "2.11", null' in note for note in notes)


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


def test_a_pattern_without_seeds_has_one_exam_alone(tmp_path):
    for seed in range(2):
        write_exam(tmp_path, "random", seed, model="runs/{masking}", weights="one model")
    with pytest.raises(InputError, match="random: seeds 0 and 1 have the same weights"):
        stats.analyse(tmp_path)


def test_one_backbone_with_several_fine_tuning_seeds_is_fine_unless_it_changed(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "random", seed, 0.5, weights="one")
    assert notes_of(tmp_path) == [
        "cola, m: no multi-bootstrap, the runs did not keep predictions on the same dev examples"]
    write_run(tmp_path, "random", 2, 0.5, weights="two")
    assert "m: m was trained again between its runs" in notes_of(tmp_path)


def test_intervals_are_said_to_be_given_the_one_model_of_each_strategy(tmp_path):
    for name, seed in product(("random", "entropy"), range(2)):
        write_run(tmp_path, name, seed, 0.5, weights=name, model=name, pattern="{masking}")
    assert any("seeds share one pretrained model" in note for note in notes_of(tmp_path))


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


def test_a_collapsed_run_is_named(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "random", seed, 0.0, collapsed=seed == 1)
    found = [note for note in notes_of(tmp_path) if "collapsed" in note]
    assert [note.split()[0] for note in found] == ["cola-m-random-1"]


# --- the report as text ---------------------------------------------------------------------------

def test_the_golden_report_comes_out_byte_for_byte(tmp_path):
    """MRPC and CoLA with dev predictions, pretraining strategies by pattern, missing seeds, a
    constant difference, runs with other arguments."""
    shutil.copytree(DATA / "runs", tmp_path / "runs")
    for _ in range(2):  # its own output is no input
        text = stats.write_report(tmp_path / "runs", effect=0.01)
        for name in ("report.md", "report.svg"):
            assert (tmp_path / "runs" / name).read_bytes() == (DATA / name).read_bytes()
    assert text.encode() == (DATA / "report.md").read_bytes()


def test_numbers_are_shown_without_a_negative_zero():
    shown = [stats.show(value) for value in (-1e-9, 0.12345, math.nan)]
    assert shown == ["0.0000", "0.1235", "n/a"]
    assert stats.show_interval(-1e-9, 0.1) == "[+0.0000, +0.1000]"


def test_the_constant_answer_stands_under_the_scores(tmp_path):
    """Always "paraphrase" on MRPC's dev set: accuracy 0.6838, F1 0.8122 (279 of 408)."""
    constant = {"accuracy": 279 / 408, "f1": 2 * 279 / (279 + 408)}
    write_run(tmp_path, "random", 0, 0, task="mrpc", last={"accuracy": 0.7, "f1": 0.8},
              baseline=constant)
    assert "| the constant answer |  | 0.6838 | 0.8122 | 0.7480 |" in stats.write_report(tmp_path)


def test_the_constant_answers_of_other_training_examples_are_averaged(tmp_path):
    """A share of RTE's training examples may have another commonest class for each seed."""
    for seed, constant in enumerate((0.4729, 0.5271, 0.5271)):
        write_run(tmp_path, "random", seed, 0, task="rte", last={"accuracy": 0.5},
                  baseline={"accuracy": constant})
    assert "| the constant answer |  | 0.5090 |" in stats.write_report(tmp_path)


def test_each_model_has_a_constant_answer_of_its_own(tmp_path):
    """Two corpora, or two pairs of tasks, in one folder."""
    for model, tasks in {"a": {"cola": 0.0, "rte": 0.53}, "b": {"cola": 0.0, "sst2": 0.51}}.items():
        for seed, (task, constant) in product(range(2), tasks.items()):
            name = stats.TASK_METRICS[task][0]
            write_task(tmp_path, task, "random", seed, 0.6, model=model, baseline={name: constant})
        write_exam(tmp_path, "random", 0, model=model, name=model,
                   baseline=dict.fromkeys(stats.EXAM, 0.05 if model == "a" else 0.04))
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", stats.write_report(tmp_path),
                               flags=re.M | re.S))
    assert "| frequency alone |  | 0.0500 |" in sections["mlm, a"]
    assert "| frequency alone |  | 0.0400 |" in sections["mlm, b"]
    assert "| the constant answer |  | 0.0000 | 0.5300 | 0.2650 |" in sections["mean of 2 tasks, a"]
    assert "| the constant answer |  | 0.0000 | 0.5100 | 0.2550 |" in sections["mean of 2 tasks, b"]


def test_the_share_really_masked_stands_beside_the_comparison(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "random", seed, 0.5, masked=0.30 + 0.002 * seed)
        write_run(tmp_path, "typhoon", seed, 0.6 + seed / 10, masked=0.25)
        write_run(tmp_path, "none", seed, 0.6, masked=None)
    text = stats.write_report(tmp_path)
    assert "| typhoon − random | 2 | 25.00%, 30.10% |" in text
    assert "| random − none | 2 | 30.10%, n/a |" in text


def test_one_metric_is_compared_where_asked(tmp_path):
    dev = {"predictions": [1, 1, 0, 0], "labels": [1, 0, 1, 1]}
    for strategy, seed in product(("random", "typhoon"), range(3)):
        values = {"f1": 0.5 + 0.1 * seed * (strategy == "typhoon"), "accuracy": 0.25}
        write_run(tmp_path, strategy, seed, 0, task="mrpc", last=values, dev=dev,
                  baseline={"f1": 0.8, "accuracy": 0.6})
    write_cells(tmp_path, random=[0.5], typhoon=[0.5])
    report = stats.analyse(tmp_path, metric="f1", resamples=500)
    (pair,) = report["pairs"]
    assert pair["task"] == "mrpc" and pair["mean"] == pytest.approx(0.1)
    assert "cola has no f1 and is left out" in report["notes"]
    row = report["rows"][0]
    assert row.resampled.mean() == pytest.approx(0.4, abs=0.05)  # 2 TP / (2 TP + FP + FN) = 2/5
    text = stats.write_report(tmp_path, metric="f1")
    assert "| the constant answer |  | 0.8000 | 0.6000 |" in text
    with pytest.raises(InputError, match="--metric pearson: no task here has it: choose from"):
        stats.analyse(tmp_path, metric="pearson")


def test_an_effect_has_a_column_of_its_own(tmp_path):
    write_cells(tmp_path, random=[0.5, 0.6, 0.7], typhoon=[0.6, 0.8, 0.7], none=[0.5, 0.6, 0.7])
    lines = stats.write_report(tmp_path, effect=0.1).splitlines()
    assert any(line.endswith("| seeds for 0.1 |") for line in lines)
    assert [line.split(" | ")[-1] for line in lines if " − none" in line] == ["n/a |", "10 |"]


# --- the report as a picture ----------------------------------------------------------------------

def drawn(file):
    """A picture's texts, lines, dots and arrows, each as a dictionary."""
    tags = {tag: [] for tag in ("text", "line", "circle", "path")}
    for element in ElementTree.parse(file).getroot().iter():
        kind = element.tag.rpartition("}")[2]
        if kind in tags:
            tags[kind].append(element.attrib | {"words": element.text})
    return tags


@pytest.fixture
def picture(tmp_path):
    """Of four pairs."""
    write_cells(tmp_path, none=[0.5, 0.5, 0.5], random=[0.5, 0.6, 0.4], typhoon=[0.79, 0.81, 0.8])
    write_run(tmp_path, "a<b", 7, 0.5)
    write_run(tmp_path, "random", 7, 0.5)
    stats.write_report(tmp_path)
    return drawn(tmp_path / "report.svg")


def test_the_picture_puts_zero_mean_and_interval_where_they_are(picture):
    """typhoon − none: differences 0.29, 0.31, 0.3; half of the interval is 4.303 · 0.01 / √3."""
    at = {float(text["words"]): float(text["x"]) for text in picture["text"]
          if text["class"] == "tick"}
    zero, = [float(line["x1"]) for line in picture["line"] if line["class"] == "zero"]
    assert zero == at[0.0]
    row, = [text for text in picture["text"] if text["words"] == "typhoon − none"]
    dot, = [dot for dot in picture["circle"] if 0 <= float(row["y"]) - float(dot["cy"]) < 10]
    span, = [line for line in picture["line"] if line["y1"] == line["y2"] == dot["cy"]]
    scale = (at[0.2] - zero) / 0.2
    assert float(dot["cx"]) == pytest.approx(zero + 0.3 * scale, abs=0.3)
    assert float(span["x1"]) == pytest.approx(zero + (0.3 - 0.02484) * scale, abs=0.3)
    assert float(span["x2"]) == pytest.approx(zero + (0.3 + 0.02484) * scale, abs=0.3)
    assert dot["class"] == span["class"] == "claimed"
    assert any(text["words"] == "+0.3000 [+0.2752, +0.3248]" for text in picture["text"])


def test_the_picture_has_a_row_for_each_pair_and_no_interval_where_there_is_none(picture):
    names = [text["words"] for text in picture["text"] if text["class"] == "name"]
    assert names[:2] == ["typhoon − none", "typhoon − random"]  # the largest difference first
    assert sorted(names[2:]) == ["a<b − random", "random − none"]
    assert len(picture["circle"]) == 4 and not picture["path"]
    assert sum(line["y1"] == line["y2"] and line["x1"] != line["x2"]
               for line in picture["line"]) == 3  # a<b has one seed


def test_an_outlier_is_an_arrow_at_the_end_of_a_scale_that_the_others_share(tmp_path):
    """Differences of about 0.1 on both sides, and one of -3."""
    write_cells(tmp_path, random=[0.5, 0.6, 0.7], entropy=[0.6, 0.71, 0.8],
                typhoon=[0.4, 0.49, 0.6], rarity=[-2.5, -2.41, -2.3])
    stats.write_report(tmp_path, against="random")
    picture = drawn(tmp_path / "against-random.svg")
    names = [text["words"] for text in picture["text"] if text["class"] == "name"]
    assert names == ["entropy", "typhoon", "rarity"]
    arrow, = picture["path"]
    start, = re.findall(r"^M([\d.]+)", arrow["d"])
    ticks = {float(text["words"]): float(text["x"]) for text in picture["text"]
             if text["class"] == "tick"}
    assert float(start) <= ticks[min(ticks)] < ticks[0.0] < ticks[max(ticks)]
    assert -1 < min(ticks) and len(picture["circle"]) == 2
    assert any(text["words"].startswith("-3.0033 [") for text in picture["text"])


def test_the_title_names_what_is_compared_and_task_and_model_where_there_are_several(tmp_path):
    def titles():
        stats.write_report(tmp_path, against="random")
        return [text["words"] for text in drawn(tmp_path / "against-random.svg")["text"]
                if text["class"] == "title"][1:]

    write_cells(tmp_path, random=[0.5, 0.6], typhoon=[0.6, 0.8])
    assert titles() == ["matthews, strategy − random"]
    for strategy, seed in product(("random", "typhoon"), range(2)):
        write_task(tmp_path, "mrpc", strategy, seed, 0.5 + seed / 10)
    assert titles() == ["cola, matthews, strategy − random",
                        "mrpc, f1 and accuracy, strategy − random"]
    for strategy, seed in product(("random", "none"), range(2)):
        write_run(tmp_path, strategy, seed, 0.5, model="n")
    assert titles()[:2] == ["cola, m, matthews, strategy − baseline",
                            "cola, n, matthews, strategy − baseline"]


def test_the_picture_is_for_light_and_dark_and_has_no_script():
    text = (DATA / "report.svg").read_text()
    assert "prefers-color-scheme: dark" in text and "script" not in text and "http" not in \
        text.replace("http://www.w3.org/2000/svg", "")


def test_a_comparison_with_one_strategy_is_written_beside_the_whole_report(tmp_path):
    write_cells(tmp_path, none=[0.5, 0.5, 0.6], random=[0.5, 0.6, 0.4], typhoon=[0.8, 0.81, 0.79])
    stats.write_report(tmp_path)
    whole = (tmp_path / "report.svg").read_text()
    text = stats.write_report(tmp_path, against="random")
    assert (tmp_path / "report.svg").read_text() == whole
    assert "](against-random.svg)" in (tmp_path / "against-random.md").read_text() == text
    assert (tmp_path / "against-random.svg").read_text().count("<circle") == 2


# --- run files ------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [
    '{"task": "cola", ', "", "[1, 2]", "\xff\x00", '{"task": "cola"}', '{"task": ["cola"]}'])
def test_a_file_that_is_no_run_stops_the_report_with_its_name(tmp_path, content):
    write_cells(tmp_path, random=[0.5, 0.6], typhoon=[0.6, 0.8])
    (tmp_path / "broken.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="broken.json"):
        stats.analyse(tmp_path)


DEV = {"predictions": [1, 0], "labels": [1, 0]}


@pytest.mark.parametrize("fields", [
    {"last": {"matthews": math.nan}}, {"last": {"matthews": math.inf}}, {"last": {"matthews": "x"}},
    {"last": {"f1": 0.5}}, {"last": {}}, {"last": None}, {"baseline": [0.7]},
    {"baseline": {"matthews": "0"}}, {"baseline": {"matthews": math.nan}}, {"dev": None},
    {"dev": {}}, {"dev": DEV | {"labels": [1]}}, {"dev": {"predictions": [], "labels": []}},
    {"dev": DEV | {"predictions": ["a", "b"]}}, {"args": None}, {"masked": "x"}])
def test_a_damaged_run_stops_the_report_with_its_name(tmp_path, fields):
    write_cells(tmp_path, random=[0.5, 0.6], typhoon=[0.6, 0.8])
    write_run(tmp_path, "typhoon", 1, 0.5, **fields)
    with pytest.raises(InputError, match="cola-m-typhoon-1.json is no run of glue.py or train.py"):
        stats.analyse(tmp_path)


def test_two_files_that_claim_one_run_are_an_error_that_names_both(tmp_path):
    write_run(tmp_path, "random", 0, 0.5)
    write_run(tmp_path, "random", 0, 0.6, name="copy")
    with pytest.raises(InputError, match="cola-m-random-0.json and copy.json both claim"):
        stats.analyse(tmp_path)


def test_both_accuracies_of_mnli_are_one_metric():
    both = {"accuracy": 0.6, "accuracy_mm": 0.8}
    assert stats.row_score("mnli", both, "accuracy") == pytest.approx(0.7)
    assert stats.row_score("mrpc", {"f1": 0.6, "accuracy": 0.8}, None) == pytest.approx(0.7)


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
    name = fields.get("name", found["strategy"])
    (folder / f"mlm-{name}-{found['seed']}.json").write_text(json.dumps(found))


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
    text = stats.write_report(tmp_path)
    assert "| strategy | n | accuracy | common | middle | rare | log_likelihood |" in text
    assert "| frequency alone |  | 0.1000 |" in text and "no GLUE" not in text
    assert stats.analyse(tmp_path, metric="rare")["pairs"][0]["mean"] == pytest.approx(2 / 6)


def test_windows_are_drawn_whole_and_the_score_is_a_ratio_of_sums(tmp_path):
    """One window with 9 of 10 right, one with 0 of 2: 9/10, 9/12 or 0/2, in shares of 1, 2, 1."""
    dev = {"right": [[3, 3, 3], [0, 0, 0]], "count": [[4, 3, 3], [1, 1, 0]],
           "log_likelihood": [-20.0, -30.0]}
    write_exam(tmp_path, "random", 0, dev=dev)
    row, = stats.analyse(tmp_path, resamples=400)["rows"]
    values, counts = np.unique(row.resampled.round(6), return_counts=True)
    assert values.tolist() == [0, 0.75, 0.9]
    assert counts / 400 == pytest.approx([0.25, 0.5, 0.25], abs=0.08)


def test_the_mean_over_tasks_leaves_the_exam_out(tmp_path):
    for seed in range(2):
        write_task(tmp_path, "cola", "random", seed, 0.5)
        write_task(tmp_path, "rte", "random", seed, 0.7)
        write_exam(tmp_path, "random", seed, model="m")
    text = stats.write_report(tmp_path)
    assert re.findall("^## (.*), m", text, flags=re.M) == ["cola", "mlm", "rte", "mean of 2 tasks"]
    assert "| random | 2 | 0.5000 ± 0.0000 | 0.7000 ± 0.0000 | 0.6000 ± 0.0000 |" in text


def test_the_multi_bootstrap_of_a_report_is_left_out_where_dev_sets_differ(tmp_path):
    dev = {"predictions": [0, 1, 1, 0], "labels": [0, 1, 0, 1]}
    for strategy, seed in product(("random", "typhoon"), range(3)):
        write_run(tmp_path, strategy, seed, 0.1 * seed, dev=dev)
    assert math.isfinite(stats.analyse(tmp_path)["pairs"][0]["bootstrap_low"])
    write_run(tmp_path, "typhoon", 2, 0.2, dev=dev | {"labels": [0, 1, 0, 0]})
    report = stats.analyse(tmp_path)
    assert math.isnan(report["pairs"][0]["bootstrap_low"])
    assert any("no multi-bootstrap" in note for note in report["notes"])


def test_both_dev_sets_of_mnli_are_resampled(tmp_path):
    labels = [0, 1, 2] * 30
    write_run(tmp_path, "random", 0, 0, task="mnli", last={"accuracy": 1.0, "accuracy_mm": 1 / 3},
              dev={"predictions": labels, "labels": labels},
              dev_mismatched={"predictions": [0] * 90, "labels": labels})
    row, = stats.analyse(tmp_path, resamples=200)["rows"]
    assert row.resampled.mean() == pytest.approx((1 + 1 / 3) / 2, abs=0.01)
    assert row.resampled.std() > 0


# --- the sweep ------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(options["--started"], "a") as file:
    file.write(f"{os.getpid()} {options['--out']} {os.environ['OMP_NUM_THREADS']}\\n")
time.sleep(float(options.get("--sleep", 0.03)))
print("a line")
if "--fail" in options:
    sys.exit(options["--fail"] + "\\n")
with open(options["--out"] + ".tmp", "w") as file:
    json.dump(options, file)
os.replace(options["--out"] + ".tmp", options["--out"])
"""


@pytest.fixture
def commands(tmp_path):
    """Returns {output: command} of n runs of a script that does next to nothing."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def make(n, *options, folder="out"):
        outputs = [tmp_path / folder / f"run-{i}.json" for i in range(n)]
        return {output: [sys.executable, str(tmp_path / "script.py"), "--out", str(output),
                         "--started", str(tmp_path / "started"), *options] for output in outputs}
    return make


def started(tmp_path):
    """(process, output, threads) of each run that began, in order."""
    path = tmp_path / "started"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


def test_a_stage_makes_each_output_and_keeps_what_was_said(tmp_path, commands, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert stats.run_stage(commands(4), parallel=2) == []
    assert sorted(contents(tmp_path / "out")) == [f"run-{i}.json" for i in range(4)]
    assert (tmp_path / "out" / "run-3.log").read_text() == "a line\n"
    threads = max(1, os.cpu_count() // 2)  # two at once share the cores
    assert [line[2] for line in started(tmp_path)] == [str(threads)] * 4


def test_a_failure_stops_no_other_and_its_last_line_is_the_reason(tmp_path, commands, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # it would put the log's lines in order
    failing = list(commands(5, "--fail", "first\nout of luck").items())[3:]
    assert stats.run_stage(commands(5) | dict(failing), parallel=2) == ["out of luck"] * 2
    assert sorted(contents(tmp_path / "out")) == [f"run-{i}.json" for i in range(3)]
    assert "first\nout of luck" in (tmp_path / "out" / "run-3.log").read_text()


def sweep_process(commands, parallel=2):
    """A process of its own that runs the commands, as main does, those whose output is missing."""
    program = """
import json, signal, sys
from pathlib import Path
import stats
signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
commands = json.loads(sys.stdin.read())
missing = {Path(output): command for output, command in commands.items()
           if not Path(output).exists()}
print("ready", flush=True)
stats.run_stage(missing, int(sys.argv[1]))
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(parallel)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               cwd=Path(stats.__file__).parent)
    process.stdin.write(json.dumps({str(output): command for output, command in commands.items()}))
    process.stdin.close()
    assert process.stdout.readline() == "ready\n"
    return process


def test_sigkills_lose_nothing_but_the_runs_in_flight(tmp_path, commands):
    """The sweep alone is killed, as by a full memory; what it started ends by itself."""
    stats.run_stage(commands(12, folder="unbroken"), 4)
    (tmp_path / "started").unlink()
    out, pause = tmp_path / "out", random.Random(0)
    for _ in range(3):
        before = contents(out)
        process = sweep_process(commands(12, "--sleep", "0.3"))
        time.sleep(pause.uniform(0.3, 0.9))
        process.kill()
        process.wait()
        time.sleep(0.1)  # for what was just being written
        at_once = contents(out)
        time.sleep(0.5)
        assert before.items() <= contents(out).items() == at_once.items()
    stats.run_stage({output: command for output, command in commands(12).items()
                     if not output.exists()}, 2)
    assert contents(out).keys() == contents(tmp_path / "unbroken").keys()
    assert 12 < len(started(tmp_path)) <= 12 + 3 * 2


def is_running(pid):
    """A killed process whose parent is gone may stay as a zombie where nothing collects those."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_end_with_the_sweep(tmp_path, commands, number):
    process = sweep_process(commands(3, "--sleep", "60"))
    deadline = time.time() + 60
    while len(started(tmp_path)) < 2 and time.time() < deadline:
        time.sleep(0.05)
    children = [line[0] for line in started(tmp_path)]
    assert len(children) == 2 and all(map(is_running, children))
    process.send_signal(number)
    assert process.wait(timeout=10) == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
    deadline = time.time() + 10
    while any(map(is_running, children)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children)) and not contents(tmp_path / "out")


PATTERN = "runs/{masking}-{seed}"
TEACHER_SEED = ["--seed", str(train.TEACHER_SEEDS)]  # of seed 0


def planned(*strategies, tasks=("cola",), models=(PATTERN,), seeds=(0,), **options):
    """The stages, as lists of words that follow `python program`."""
    *stages, exams = stats.plan(
        tasks=tasks, models=models, seeds=seeds, folder=Path("out"),
        strategies=[stats.strategy(text) for text in strategies], **options)
    return [{str(output): " ".join([Path(command[1]).name, *command[2:]])
             for output, command in stage.items()} for stage in stages] + [exams]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pretrained(directory, *options, weights="weights"):
    """A directory as train.py leaves it; without weights as an interrupted run leaves it."""
    Path(directory).mkdir(parents=True)
    settings = dict(vars(train.parse_args(options)), ranks=1)
    Path(directory, "train_args.json").write_text(json.dumps(settings))
    if weights:
        Path(directory, "model.safetensors").write_text(f"{directory} {weights}")


def test_models_that_want_a_teacher_share_one_for_each_seed(here):
    teachers, models, runs, _ = planned("random", "entropy", "random-kd", seeds=(0, 3),
                                        pretrain=["--lr", "1e-3", "--corpus", __file__])
    assert list(teachers) == [f"runs/teacher-{seed}/model.safetensors" for seed in (0, 3)]
    teacher = train.parse_args(shlex.split(teachers["runs/teacher-3/model.safetensors"])[1:])
    assert (teacher.masking, teacher.kd_weight, teacher.lr, teacher.out) == (
        "random", 0, 1e-3, "runs/teacher-3")
    assert teacher.steps == train.parse_args([]).teacher_steps and teacher.seed % 2 ** 32 != 3
    assert models["runs/random-3/model.safetensors"] == (
        f"train.py --lr 1e-3 --corpus {__file__} --masking random --seed 3 --out runs/random-3")
    assert models["runs/random-kd-3/model.safetensors"] == (
        f"train.py --lr 1e-3 --corpus {__file__} --masking random --kd-weight 0.5 --seed 3 "
        "--teacher runs/teacher-3 --out runs/random-kd-3")
    assert "--teacher runs/teacher-0" in models["runs/entropy-0/model.safetensors"]
    assert runs["out/cola--runs-masking-seed--entropy--3.json"] == (
        "glue.py --label entropy --pattern runs/{masking}-{seed} --task cola --model "
        "runs/entropy-3 --seed 3 --json out/cola--runs-masking-seed--entropy--3.json")


def test_the_options_of_one_strategy_do_not_reach_the_teacher(here):
    """A student of another size, start or initialisation: today's arms."""
    teachers, models, _, _ = planned(
        "small=--masking entropy --plain-start", "wide=--preset mini --student-init embeddings",
        "given=--masking entropy --teacher data/big", pretrain=[])
    assert list(teachers) == ["runs/teacher-0/model.safetensors"]
    assert "plain-start" not in str(teachers) and "mini" not in str(teachers)
    assert models["runs/small-0/model.safetensors"].endswith(
        "--masking entropy --plain-start --seed 0 --teacher runs/teacher-0 --out runs/small-0")
    assert "--teacher runs/teacher-0" in models["runs/wide-0/model.safetensors"]
    assert models["runs/given-0/model.safetensors"].endswith(
        "--teacher data/big --seed 0 --out runs/given-0")
    with pytest.raises(InputError, match="runs/teacher-0: --teacher-steps goes to --pretrain"):
        planned("entropy", "quick=--masking entropy --teacher-steps 100", pretrain=[])


def test_a_teacher_that_is_named_for_all_is_not_made(here):
    teachers, models, _, _ = planned("entropy", seeds=(0, 1),
                                     pretrain=["--teacher", "runs/teacher-{seed}"])
    assert not teachers and [command.split()[2] for command in models.values()] == [
        "runs/teacher-0", "runs/teacher-1"]


def test_what_is_there_is_not_made_again_and_an_interrupted_model_goes_on(here):
    pretrained("runs/random-0")
    pretrained("runs/random-1", "--seed", "1", weights="")
    pretrained("runs/teacher-0", "--steps", "2400", *TEACHER_SEED)
    Path("out").mkdir()
    Path("out/cola--runs-masking-seed--random--0.json").touch()
    teachers, models, runs, _ = planned("random", "entropy", seeds=(0, 1), pretrain=[])
    assert list(teachers) == ["runs/teacher-1/model.safetensors"]
    assert "runs/random-0/model.safetensors" not in models
    assert models["runs/random-1/model.safetensors"] == "train.py --resume runs/random-1"
    assert [Path(output).name for output in runs] == [
        f"cola--runs-masking-seed--{name}.json" for name in ("entropy--0", "random--1",
                                                             "entropy--1")]


@pytest.mark.parametrize("place, options", [
    ("runs/random-0", ["--steps", "100"]), ("runs/random-0", ["--seed", "1"]),
    ("runs/entropy-0", ["--masking", "random"]),
    ("runs/teacher-0", ["--steps", "100", *TEACHER_SEED]),
    ("runs/teacher-0", ["--seed", "0", "--steps", "2400"])])  # its student's first weights
@pytest.mark.parametrize("weights", ["weights", ""])
def test_a_model_of_other_options_is_not_taken_for_the_sweeps(here, place, options, weights):
    pretrained(place, *options, weights=weights)
    option, value = options[:2]
    said = rf"{place} holds a run that differs in {option[2:]} \({value} there, "
    with pytest.raises(InputError, match=said):
        planned("random", "entropy", pretrain=[])


def test_a_model_of_another_teacher_is_not_taken_for_the_sweeps(here):
    pretrained("runs/entropy-0", "--masking", "entropy", "--teacher", "runs/teacher-0")
    assert not planned("entropy", pretrain=[])[1]
    with pytest.raises(InputError, match=r"entropy-0 .* teacher \(runs/teacher-0 there, big here"):
        planned("entropy", pretrain=["--teacher", "big"])
    with pytest.raises(InputError, match=r"differs in teacher_steps \(2400 there, 800 here\)"):
        planned("entropy", pretrain=["--teacher-steps", "800"])


def test_the_result_of_a_model_that_is_gone_is_not_taken_for_anothers(here):
    pretrained("runs/random-0")
    _, _, runs, _ = planned("random", pretrain=[])
    (output, command), = runs.items()
    run = {"args": vars(stats.glue.parse_args(shlex.split(command)[1:])),
           "pretraining": json.loads(Path("runs/random-0/train_args.json").read_text())}
    Path("out").mkdir()
    Path(output).write_text(json.dumps(run))
    with pytest.raises(InputError, match="differs in weights"):  # made again since
        planned("random", pretrain=[])
    shutil.rmtree("runs/random-0")
    assert planned("random", pretrain=[]) == [{}, {}, {}, {}]
    with pytest.raises(InputError, match=r"differs in steps \(1400 there, 800 here\)"):
        planned("random", pretrain=["--steps", "800"])


def test_the_exam_of_a_model_that_was_made_again_is_not_taken_for_its_own(here):
    pretrained("runs/random-0")
    (output,) = planned("random", tasks=["mlm"], pretrain=[])[3]
    Path("out").mkdir()
    output.write_text(json.dumps({"weights": stats.weights_digest("runs/random-0")}))
    assert planned("random", tasks=["mlm"], pretrain=[]) == [{}, {}, {}, {}]
    Path("runs/random-0/model.safetensors").write_text("others")
    with pytest.raises(InputError, match="differs in weights"):
        planned("random", tasks=["mlm"], pretrain=[])


def test_a_pattern_without_seed_has_no_model_for_two(here):
    with pytest.raises(InputError, match=r"runs/\{masking\}: put \{seed\} into it"):
        planned("random", models=["runs/{masking}"], seeds=(0, 1), pretrain=[])


def test_a_result_of_other_options_is_not_taken_for_the_sweeps(here):
    _, _, runs, _ = planned("random", models=["m"], extra=["--epochs", "1"])
    (output, command), = runs.items()
    run = {"args": vars(stats.glue.parse_args(shlex.split(command)[1:]))}
    Path("out").mkdir()
    Path(output).write_text(json.dumps(run))
    assert not planned("random", models=["m"], extra=["--epochs", "1"])[2]
    with pytest.raises(InputError, match=r"differs in epochs \(1 there, 30 here\)"):
        planned("random", models=["m"], extra=["--epochs", "30"])


def test_the_typhoon_preset_is_the_papers_grid(here, capsys):
    stats.main(["sweep", "--preset", "typhoon", "--dry-run"])
    commands = [stats.glue.parse_args(shlex.split(line)[2:])
                for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == 90 and {args.adapt for args in commands} == {
        "random", "whole-word", "typhoon"}
    rows = [stats.Row(args.task, args.model, args.adapt, args.seed, 0.0) for args in commands]
    assert len(stats.compare_all(rows, against="typhoon")) == 12


def test_the_entropy_preset_pretrains_18_models_with_three_teachers(here, capsys):
    stats.main(["sweep", "--preset", "entropy", "--pretrain", "--steps 10", "--dry-run"])
    lines = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    assert [Path(line[0]).name for line in lines] == ["train.py"] * (3 + 18) + ["glue.py"] * 162
    assert all(line[1:3] == ["--steps", "10"] for line in lines[:21])
    assert not list(here.iterdir())


def test_adaptation_strategies_go_to_adapt_and_a_name_of_ones_own_to_the_label(here):
    Path("mine.py").write_text("from masking import Random\nclass Rare(Random):\n    pass\n")
    _, _, runs, _ = planned("random", "none", "mine.py:Rare", "flat=--adapt typhoon --lr 1e-4",
                            models=["bert-base-uncased"], extra=["--epochs", "2"])
    end = "--task cola --model bert-base-uncased --seed 0 --json out/cola--bert-base-uncased--"
    assert list(runs.values()) == [
        f"glue.py --epochs 2 {options} {end}{label}--0.json" for options, label in (
            ("--adapt random", "random"), ("--adapt none", "none"),
            ("--adapt mine.py:Rare", "Rare"),
            ("--adapt typhoon --lr 1e-4 --label flat", "flat"))]


def test_a_pattern_of_seeds_alone_is_adapted_and_one_model_in_the_report(here):
    Path("runs/wide-4").mkdir(parents=True)
    _, _, runs, _ = planned("random", models=["runs/wide-{seed}"], seeds=(4,))
    assert list(runs.values()) == [
        "glue.py --adapt random --pattern runs/wide-{seed} --task cola --model runs/wide-4 "
        "--seed 4 --json out/cola--runs-wide-seed--random--4.json"]


def test_the_exam_is_swept_and_reported(here, capsys):
    """Real runs of a few steps, with a teacher, a strategy in a file and options of one's own."""
    words = random.Random(0).choices("the a cat dog sat ran on in mat and then".split(), k=9000)
    paragraphs = [" ".join(words[i:i + 30]) for i in range(0, 9000, 30)]
    Path("text.txt").write_text("\n\n".join(paragraphs))
    Path("mine.py").write_text("from masking import Random\nclass Mine(Random):\n    pass\n")
    arguments = ["sweep", "--tasks", "mlm", "--models", PATTERN, "--seeds", "1", "--out", "out",
                 "--jobs", "2", "--strategies", "low=--masking mine.py:Mine --mask-rate 0.1",
                 "random-kd", "--pretrain",
                 "--corpus text.txt --steps 2 --teacher-steps 2 --seq-len 32 "
                 "--batch-size 2 --device cpu"]
    stats.main(arguments)
    assert sorted(contents(here / "out")) == [
        f"mlm--runs-masking-seed--{label}--1.json" for label in ("low", "random-kd")]
    result = json.loads(Path("out/mlm--runs-masking-seed--random-kd--1.json").read_text())
    assert (result["model"], result["strategy"], result["pattern"], result["seed"]) == (
        "runs/random-kd-1", "random-kd", PATTERN, 1)
    assert result["weights"] == stats.weights_digest("runs/random-kd-1")
    assert result["pretraining"]["teacher"] == "runs/teacher-1"
    assert result["pretraining"]["teacher_weights"] == stats.weights_digest("runs/teacher-1")
    assert Path("runs/teacher-1.log").exists() and Path("runs/low-1.log").exists()
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    stats.main(arguments)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before
    stats.main(["report", "out"])
    assert "| random-kd − low | 1 | " in capsys.readouterr().out


# --- the command line -----------------------------------------------------------------------------

CELL = ["sweep", "--tasks", "cola", "--models", "m", "--strategies", "random"]
ENTROPY = ["sweep", "--preset", "entropy", "--pretrain"]


@pytest.mark.parametrize("arguments, said", [
    (["report", "nowhere"], "nowhere holds no finished run"),
    (["report", ".", "--effect", "0"], "--effect: 0 is not above 0"),
    (["report", ".", "--effect", "nan"], "--effect: nan is not above 0"),
    (["sweep"], "--tasks and --models and --strategies missing"),
    ([*CELL, "--jobs", "0"], "--jobs: 0 is not at least 1"),
    ([*CELL, "--seeds", "-1"], "--seeds: -1 is not at least 0"),
    ([*CELL, "--tasks", "cloa"], "--tasks: invalid choice: 'cloa'"),
    ([*CELL, "--strategies", "rnadom"], "rnadom"),
    ([*CELL, "--strategies", "a b"], "'a b' cannot name a strategy"),
    ([*CELL, "--strategies", "teacher=--masking random"], "'teacher' cannot name a strategy"),
    ([*CELL, "--strategies", "x='"], "argument --strategies: invalid"),
    ([*CELL, "--models", "runs/{mask}"], "runs/{mask} is not there"),
    ([*CELL, "--models", "a/b", "a-b"], "both write runs/sweep/cola--a-b--random--0.json"),
    ([*CELL, "--models", "runs/{masking}"], "runs/random is not there: --pretrain makes it"),
    ([*CELL, "--tasks", "mlm"], "--tasks mlm compares pretraining"),
    ([*CELL, "--models", "nowhere/at/all"], "nowhere/at/all is not a model directory"),
    ([*CELL, "--pretrain"], "--models has none with {masking}"),
    ([*CELL, "--", "--epochs", "0"], "--epochs: 0 is"),
    ([*CELL, "--", "--corruption", "1", "1", "0"], "--corruption [1.0, 1.0"),
    ([*CELL, "--", "--see", "3"], "unrecognized arguments: --see 3"),
    ([*ENTROPY, "--strategies", "x"], "argument --masking"),
    ([*ENTROPY, "--strategies", "no.py:X"], "no.py cannot be imported"),
    ([*ENTROPY, "--steps 0"], "argument --steps: 0 is"),
    ([*ENTROPY, "--steps '3"], "argument --pretrain: invalid")])
def test_bad_input_is_refused_before_anything_is_written(here, capsys, arguments, said):
    with pytest.raises((InputError, SystemExit)) as error:
        stats.main(arguments)
    message = capsys.readouterr().err.rstrip("\n") or str(error.value)
    assert said in message and "\n" not in message
    assert not list(here.iterdir())


def test_how_many_failed_and_why_is_said_at_the_end(here, capsys):
    Path("data").mkdir()
    Path("m").mkdir()
    Path("m/model.safetensors").write_text("damaged")
    arguments = [*CELL, "--seeds", "1", "3", "--out", "out", "--", "--data-dir", "data"]
    with pytest.raises(stats.RunError, match="2 failed, .*The same sweep tries again") as error:
        stats.main(arguments)
    reason = Path("out/cola--m--random--3.log").read_text().splitlines()[-1]
    assert reason in str(error.value) and not contents(Path("out"))
    assert capsys.readouterr().out.count(reason) == 2


def test_the_command_line_says_it_in_one_line_with_status_2():
    result = subprocess.run([sys.executable, stats.__file__, "sweep", "--preset", "x"],
                            capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert len(result.stderr.splitlines()) == 1
