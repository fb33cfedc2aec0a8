"""Statistics: is one masking strategy better than another, or was it the seed? The tests, the report, the sweep.

A single fine-tuning run proves little: [T] (Typhoon, arXiv 2303.15619 v2) found that the advantage of one run did not
survive five seeds. So `sweep` runs a grid of tasks, models, strategies and seeds through glue.py, one JSON file a run,
and `report` compares the strategies seed by seed and claims no more than the numbers do. In order: the paired
statistics, the two-way bootstrap, reading runs, the analysis, the report as text, the sweep, the command line.

    python stats.py sweep --preset typhoon --jobs 2            # [T]'s 90 runs; kill it, start it again: it goes on
    python stats.py sweep --preset entropy --pretrain          # [E]: pretrain 18 models, fine-tune each on GLUE
    python stats.py sweep --tasks mrpc --models runs/random-tiny-0 --strategies random typhoon -- --epochs 2
    python stats.py report runs/sweep-typhoon                  # no GPU, no model: reads the JSON files
    python stats.py report runs/sweep-typhoon --effect 0.01    # how many seeds would find a difference of 0.01?

Scores and differences are fractions, not percent: 0.01 is one point. Shapes: n seeds, m dev examples, R resamples.
"""
import csv
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm import tqdm

import glue
import train
from masking import STRATEGIES
from model import InputError, Parser, RunError, read_json, run_cli, write_atomic

ALPHA, POWER, LEVEL = 0.05, 0.8, 0.95


# --- Student's t -----------------------------------------------------------------------------------------------------

def mean_sd(values) -> tuple[float, float]:
    """Mean and sample standard deviation (divided by n - 1); the sd of one value is nan.

    `fsum` rounds once, at the end, so that a report has the same digits on every machine. A spread below 1e-10 of the
    values is what subtracting two scores leaves behind (0.81 - 0.80 is not quite 0.83 - 0.82): it counts as none."""
    values = [float(value) for value in values]
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, sd if sd > 1e-10 * max(map(abs, values)) else 0.0


def incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """Regularised incomplete beta function I_x(a, b), where y = 1 - x is given too, to lose no digits near x = 1.

    The continued fraction DLMF 8.17.22, evaluated from its tail; it converges fast for x < (a + 1) / (a + b + 2),
    and I_x(a, b) = 1 - I_y(b, a) brings every other x there."""
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, y, x)
    if x == 0:
        return 0.0
    fraction = 1.0
    for m in range(100 + int(5 * math.sqrt(a + b)), -1, -1):  # the number of terms grows as the root of a + b
        even = (m + 1) * (b - m - 1) * x / ((a + 2 * m + 1) * (a + 2 * m + 2))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1 + odd / (1 + even / fraction)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log(y) - log_beta) / (a * fraction)


def t_tail(t: float, df: float) -> float:
    """Two-sided P(|T| >= |t|) of Student's t with df degrees of freedom: I_{df/(df+t²)}(df/2, 1/2), DLMF 8.17."""
    return incomplete_beta(df / 2, 0.5, df / (df + t * t), t * t / (df + t * t))


def solve(increasing, target: float) -> float:
    """The x >= 0 where a monotonically increasing function reaches the target, by bisection to the last bit."""
    low, high = 0.0, 1.0
    while increasing(high) < target:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if increasing(middle) < target else (low, middle)
    return high


@lru_cache(maxsize=None)
def t_critical(df: int, alpha: float) -> float:
    """The |t| that a two-sided test at level alpha must exceed: 2.776 for df = 4, alpha = 0.05."""
    return solve(lambda t: -t_tail(t, df), -alpha)


# --- paired statistics: a and b are one score per seed, the same seeds in the same order -----------------------------

def paired_t_test(a, b) -> tuple[float, float]:
    """t = mean(d) / (sd(d) / √n) of the differences d = a - b, n - 1 degrees of freedom, two-sided p (Student 1908).

    Undefined cases stay undefined: one seed gives (nan, nan); differences that are all equal and not 0 give
    (±inf, nan), since without a spread there is nothing to judge them by (p = 0 would be a claim); all 0 give (0, 1).
    Raises ValueError when a and b differ in length."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, sd = mean_sd(differences)
    if math.isnan(sd):
        return math.nan, math.nan
    if sd == 0:
        return (math.copysign(math.inf, mean), math.nan) if mean else (0.0, 1.0)
    t = mean / (sd / math.sqrt(len(differences)))
    return t, t_tail(t, len(differences) - 1)


def confidence_interval(differences, level: float = LEVEL) -> tuple[float, float]:
    """Student's interval for the mean difference: mean ± t* sd / √n. (nan, nan) for one seed.

    It covers the mean over all seeds in `level` of such experiments, if the differences are about normal. Equal
    differences give an interval without width: that is the formula's answer, not knowledge, and the report says so."""
    mean, sd = mean_sd(differences)
    if math.isnan(sd):
        return math.nan, math.nan
    half = t_critical(len(differences) - 1, 1 - level) * sd / math.sqrt(len(differences))
    return mean - half, mean + half


def sign_flip_test(differences, flips: int = 100_000, seed: int = 0) -> float:
    """Fisher's randomisation test (1935): were the two names exchangeable, each difference could have had either sign.

    Two-sided p: the share of all 2^n sign patterns whose |sum| is at least the one seen; so never below 2 / 2^n, which
    is 0.0625 for 5 seeds. Above 20 seeds, `flips` random patterns, and the one seen counted with them, so that p is
    never 0 (Phipson and Smyth 2010). Assumes only that a difference is as likely to be d as -d; no normality."""
    differences = np.asarray(differences, dtype=float)
    seen = abs(differences.sum()) - 1e-9 * abs(differences).sum()  # a tie is a tie even after rounding
    if len(differences) <= 20:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])  # (2^i,)
        return float((abs(sums) >= seen).mean())
    rng = np.random.Generator(np.random.PCG64(seed))
    signs = (rng.choice([-1.0, 1.0], size=(flips // 100, len(differences))) for _ in range(100))
    extreme = sum(int((abs(block @ differences) >= seen).sum()) for block in signs)
    return (1 + extreme) / (1 + flips // 100 * 100)


def holm(p_values) -> list[float]:
    """Holm's step-down adjustment (1979): the i-th smallest of m p-values times m - i + 1, never below the one before.

    Rejecting where the adjusted p is below alpha keeps the chance of any false claim among the m under alpha. A nan
    stays nan and still counts in m: a comparison that was made and could not be judged is no discount for others."""
    adjusted, largest = [math.nan] * len(p_values), 0.0
    judged = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, i) in enumerate(judged):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        adjusted[i] = largest
    return adjusted


def cohen_dz(differences) -> float:
    """Cohen's d_z (1988, §2.3): the mean difference in units of its own sd over seeds. nan without a spread."""
    mean, sd = mean_sd(differences)
    return mean / sd if sd > 0 else math.nan


def t_test_power(shift: float, n: int, alpha: float) -> float:
    """Exact power of the two-sided t test: P(|T'| > t*), T' noncentral t with the `shift` √n · mean / sd.

    T' = (Z + shift) / S, with Z normal and df·S² chi-squared; given S the probability is two normal tails, and their
    mean over S is an integral over u = ln S, by the trapezoid rule, which converges exponentially here: both ends of
    the integrand are 0."""
    df = n - 1
    u, step = np.linspace(-32 / df - 8 / math.sqrt(df), math.log1p(10 / math.sqrt(df)), 2001, retstep=True)
    log_density = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2) + df * u - df / 2 * np.exp(2 * u)
    threshold = t_critical(df, alpha) * np.exp(u)
    tails = normal_tail(threshold - shift) + normal_tail(threshold + shift)
    return float((np.exp(log_density) * tails).sum() * step)


def normal_tail(x: np.ndarray) -> np.ndarray:
    """P(Z > x) for each x."""
    return np.array([math.erfc(value) for value in x / math.sqrt(2)]) / 2


@lru_cache(maxsize=None)
def detectable_shift(n: int, power: float, alpha: float) -> float:
    """The noncentrality at which the t test on n pairs has this power."""
    return solve(lambda shift: t_test_power(shift, n, alpha), power)


def minimum_detectable_effect(differences, power: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest true mean difference that a two-sided paired t test with this n and sd finds with this power.

    Exact under normality (noncentral t, not its normal approximation, which is a quarter too small for 5 seeds), but
    only as good as the sd it is given, and before any correction for many comparisons. nan for one seed."""
    _, sd = mean_sd(differences)
    n = len(differences)
    return math.nan if n < 2 else detectable_shift(n, power, alpha) * sd / math.sqrt(n)


def seeds_needed(sd: float, effect: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """The least n >= 2 whose minimum detectable effect is at most `effect`; nan without an sd, inf past a million."""
    if not sd > 0:
        return math.nan

    def enough(n):
        return detectable_shift(n, power, alpha) * sd <= effect * math.sqrt(n)

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if low > 1_000_000:
            return math.inf
    while high - low > 1:  # never enough at low, always at high
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# --- the dev set is a sample too -------------------------------------------------------------------------------------

def multi_bootstrap(a: np.ndarray, b: np.ndarray, level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean difference over other seeds *and* other examples: the multi-bootstrap for paired seeds.

    a, b (n, R): row s, column r holds the score of seed s on the r-th resample of the dev examples, the same examples
    on both sides (`resampled_scores`). Each column also draws its n seeds with replacement; the interval lies between
    percentiles of the R means (Sellam et al. 2022, 2106.16163). (nan, nan) for one seed.

    Approximate. Measured coverage of the 95% interval on simulated scores with 5 seeds: 95% where seeds and examples
    vary alike, 84% where only the seeds vary (the t interval is the one to read there), 99% where each seed errs on
    other examples at random (pure noise is resampled twice)."""
    n, resamples = a.shape
    if n < 2:
        return math.nan, math.nan
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rng.integers(n, size=(n, resamples))
    means = np.take_along_axis(a - b, drawn, axis=0).mean(axis=0)  # (R,)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="weibull")
    return float(low), float(high)


def resampled_scores(predictions, labels, score, resamples: int, seed: int) -> np.ndarray:
    """(R,): score(predictions, labels) on R samples of the m examples, drawn with replacement. The same seed draws the
    same examples, whatever the predictions, so that two runs are compared on equal samples."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)  # (m,)
    rng = np.random.Generator(np.random.PCG64(seed))
    samples = (rng.integers(len(labels), size=len(labels)) for _ in range(resamples))
    return np.array([score(predictions[sample], labels[sample]) for sample in samples])


def resampled_task_scores(run: dict, resamples: int) -> np.ndarray:
    """(R,): a run's score on resampled dev sets; MNLI has two sets, each with samples of its own, and their mean."""
    def score(predictions, labels):
        return glue.score(glue.metrics(run["task"], predictions, labels))

    sets = [name for name in DEV_SETS if name in run]
    return np.mean([resampled_scores(run[name]["predictions"], run[name]["labels"], score, resamples,
                                     seed=zlib.crc32(f"{run['task']} {name}".encode())) for name in sets], axis=0)


# --- reading runs ----------------------------------------------------------------------------------------------------

DEV_SETS = ("dev", "dev_mismatched")
FIELDS = {"task": str, "model": str, "strategy": str, "seed": int, "args": dict, "last": dict, "best": dict,
          "seconds": (int, float)}
SET_BY_THE_GRID = ("task", "model", "seed", "adapt", "label", "json", "device", "data_dir")


def read_run(path: Path) -> dict:
    """One run of glue.py. Raises InputError, without the name, on a file that is not one."""
    try:
        run = read_json(path)
    except InputError:
        raise InputError("not JSON") from None
    if not all(isinstance(run.get(name), kind) for name, kind in FIELDS.items()) or run["task"] not in glue.TASKS:
        raise InputError("not a run of glue.py")
    if not all(is_dev_set(run[name]) for name in DEV_SETS if name in run):
        raise InputError("its dev predictions are damaged")
    baseline = run.get("baseline", {"accuracy": 0.0})  # glue.py's constant answer
    if not isinstance(baseline, dict) or not baseline or not all(isinstance(n, (int, float)) for n in baseline.values()):
        raise InputError("its baseline is damaged")
    if "@" in run["strategy"]:  # as Run.command labels it: one checkpoint a seed, one model in the report
        run["strategy"], run["model"] = run["strategy"].split("@", 1)
    return run


def is_dev_set(found) -> bool:
    """{"predictions": [number, ...], "labels": [as many numbers, ...]}"""
    lists = [found.get(name) for name in ("predictions", "labels")] if isinstance(found, dict) else [None]
    return (all(isinstance(values, list) and values and all(isinstance(value, (int, float)) for value in values)
                for values in lists) and len(lists[0]) == len(lists[1]))


def run_metrics(run: dict, epoch: str) -> dict[str, float]:
    """The metrics of the last epoch or of the best one, as numbers. Raises InputError where one is not a number."""
    found = {name: value for name, value in run[epoch].items() if name != "epoch"}
    if {name.removesuffix("_mm") for name in found} != set(glue.TASKS[run["task"]].metrics):
        raise InputError(f"its metrics are not those of {run['task']}")
    for name, value in found.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError(f"its {name} is not a finite number")
    return found


def read_runs(folder: Path, epoch: str = "last") -> tuple[list[dict], list[str]]:
    """The runs of a folder, each with its `metrics`, and a note on every file that could not be used.

    Raises InputError where there is nothing to report, and where two files claim the same run: which of them to
    believe is not for a program to choose."""
    paths = sorted(path for path in folder.glob("*.json") if path.name != "report.json")
    runs, notes, claimed = [], [], {}
    for path in paths:
        if path.name.endswith(".error.json"):
            notes.append(f"{path.name.removesuffix('.error.json')} failed")
            continue
        try:
            run = read_run(path)
            run["metrics"] = run_metrics(run, epoch)
        except InputError as error:
            notes.append(f"{path.name} is left out: {error}")
            continue
        cell = f"{run['task']}, {run['model']}, {run['strategy']}, seed {run['seed']}"
        if cell in claimed:
            raise InputError(f"{claimed[cell]} and {path.name} both claim to be {cell}: remove one of them")
        claimed[cell] = path.name
        runs.append(run)
    if not runs:
        raise InputError(f"{folder} holds no finished run: python stats.py sweep --out {folder} makes them")
    return runs, notes


# --- the analysis ----------------------------------------------------------------------------------------------------
# A table is {(task, model): {strategy: {seed: value}}}: a value is a run, its score, or its (R,) resampled scores.

def by_order(strategy: str) -> tuple:
    """Sorting key: no adaptation first, then the order of masking.py, so that a difference is new minus baseline."""
    order = ["none", *STRATEGIES]
    return (order.index(strategy) if strategy in order else len(order)), strategy


def tabulate(runs: list[dict]) -> dict:
    """The table of runs: tasks, models and seeds in alphabetical order, strategies in theirs."""
    table = {}
    for run in sorted(runs, key=lambda run: (run["task"], run["model"], by_order(run["strategy"]), run["seed"])):
        seeds = table.setdefault((run["task"], run["model"]), {}).setdefault(run["strategy"], {})
        seeds[run["seed"]] = run
    return table


def map_table(function, table: dict) -> dict:
    """The same table with function(value) for each value."""
    return {group: {strategy: {seed: function(value) for seed, value in seeds.items()}
                    for strategy, seeds in strategies.items()} for group, strategies in table.items()}


def add_mean_over_tasks(table: dict) -> dict:
    """The table, and for each model with several tasks their mean ("GLUE score"), for seeds that ran every task."""
    result = dict(table)
    for model in sorted({model for _, model in table}):
        tasks = [strategies for (_, name), strategies in table.items() if name == model]
        complete = {}
        for strategy in tasks[0] if len(tasks) > 1 else ():
            per_task = [strategies.get(strategy, {}) for strategies in tasks]
            seeds = [seed for seed in per_task[0] if all(seed in values for values in per_task)]
            if seeds:
                complete[strategy] = {seed: sum(values[seed] for values in per_task) / len(tasks) for seed in seeds}
        if complete:
            result[f"mean of {len(tasks)} tasks", model] = complete
    return result


def can_resample(strategies: dict) -> bool:
    """Whether all runs of a task and model kept their dev predictions, on the same examples."""
    runs = [run for seeds in strategies.values() for run in seeds.values()]
    sets = [[run[name]["labels"] for name in DEV_SETS if name in run] for run in runs]
    return all(found and found == sets[0] for found in sets)


def compare(new: dict, baseline: dict, resampled_new: dict, resampled_baseline: dict) -> dict:
    """Every statistic of one pair of strategies, {seed: score} each, on the seeds both have."""
    seeds = [seed for seed in new if seed in baseline]
    a, b = [new[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    differences = [x - y for x, y in zip(a, b)]
    mean, sd = mean_sd(differences)
    t, p = paired_t_test(a, b)
    bootstrap = (math.nan, math.nan)
    if resampled_new:
        bootstrap = multi_bootstrap(np.stack([resampled_new[seed] for seed in seeds]),
                                    np.stack([resampled_baseline[seed] for seed in seeds]))
    low, high = confidence_interval(differences)
    return {"n": len(seeds), "mean": mean, "sd": sd, "low": low, "high": high,
            "bootstrap_low": bootstrap[0], "bootstrap_high": bootstrap[1], "t": t, "p": p,
            "sign_flip_p": sign_flip_test(differences), "dz": cohen_dz(differences),
            "mde": minimum_detectable_effect(differences)}


def compare_all(scores: dict, resampled: dict, notes: list[str]) -> list[dict]:
    """Every pair of strategies of every task and model, one family for Holm. Adds notes on missing seeds."""
    pairs = []
    for (task, model), strategies in scores.items():
        every = sorted(set().union(*strategies.values()))
        for strategy, seeds in strategies.items():
            if missing := [str(seed) for seed in every if seed not in seeds]:
                notes.append(f"{task}, {model}: {strategy} lacks seed {', '.join(missing)}; its pairs go without")
        for baseline, new in combinations(strategies, 2):
            if not set(strategies[new]) & set(strategies[baseline]):
                notes.append(f"{task}, {model}: {new} and {baseline} have no seed in common; no comparison")
                continue
            drawn = resampled.get((task, model), {})
            pairs.append({"task": task, "model": model, "strategy": new, "baseline": baseline}
                         | compare(strategies[new], strategies[baseline], drawn.get(new), drawn.get(baseline)))
    for pair, adjusted in zip(pairs, holm([pair["p"] for pair in pairs])):
        pair["holm_p"] = adjusted
    return pairs


def settings_notes(table: dict) -> list[str]:
    """A note for each argument in which the runs of one comparison differ beyond what the grid varies."""
    notes = []
    for (task, model), strategies in table.items():
        arguments = [run["args"] for seeds in strategies.values() for run in seeds.values()]
        for name in sorted(set().union(*arguments) - set(SET_BY_THE_GRID)):
            values = {json.dumps(found.get(name), sort_keys=True) for found in arguments}
            if len(values) > 1:
                notes.append(f"{task}, {model}: the runs differ in {name}: {', '.join(sorted(values))}")
    return notes


def verdict(pairs: list[dict]) -> str:
    """One sentence. It claims a winner only where Holm's adjusted p is below 0.05; else, what could have been found."""
    if not pairs:
        return "Nothing was compared: that takes two strategies with a seed in common."
    judged = [pair for pair in pairs if pair["sd"] > 0]
    if not judged:
        return "No claim can be made: no comparison has two seeds whose differences vary."
    among = f"of {len(pairs)} comparison{'s' if len(pairs) > 1 else ''}"
    winners = [pair for pair in judged if pair["holm_p"] < ALPHA]
    if winners:
        claims = "; ".join(f"on {pair['task']} with {pair['model']}, {better(pair)}" for pair in winners)
        return (f"For other seeds on these same examples, {len(winners)} {among} show{'s' * (len(winners) == 1)} a "
                f"difference (Holm-adjusted p < {ALPHA}): {claims}.")
    seeds = sorted({pair["n"] for pair in judged})
    effects = sorted(pair["mde"] for pair in judged)
    span = f"{effects[0]:.4f}" + (f" to {effects[-1]:.4f}, by comparison" if len(effects) > 1 else "")
    return (f"No strategy is reliably better: none {among} is significant (smallest Holm-adjusted p "
            f"{show_p(min(pair['holm_p'] for pair in judged))}), and with n = "
            f"{' to '.join(str(n) for n in sorted({seeds[0], seeds[-1]}))} seeds the smallest true difference that a "
            f"single test finds four times in five is {span}.")


def better(pair: dict) -> str:
    """`typhoon beats random by 0.0123 [0.0061, 0.0185]`, the better one first; and a warning where other dev examples
    might well say otherwise."""
    names, sign = (pair["strategy"], pair["baseline"]), 1
    if pair["mean"] < 0:
        names, sign = names[::-1], -1
    low, high = sorted((sign * pair["low"], sign * pair["high"]))
    doubt = pair["bootstrap_low"] <= 0 <= pair["bootstrap_high"]
    return (f"{names[0]} beats {names[1]} by {sign * pair['mean']:.4f} [{low:.4f}, {high:.4f}]"
            + " (other examples may not bear it out: its multi-bootstrap interval contains 0)" * doubt)


def analyse(folder: Path, epoch: str = "last", effect: float | None = None, resamples: int = 1000) -> dict:
    """Everything a report says, as data: notes, cells (mean and sd of each metric), pairs, verdict, and what the constant
    answer scores on each task."""
    runs, notes = read_runs(folder, epoch)
    table = tabulate(runs)
    notes += settings_notes(table)
    scores = map_table(lambda run: glue.score(run["metrics"]), table)
    resampled = {}
    if epoch == "last":  # the predictions kept are those of the last epoch
        resampled = {group: strategies for group, strategies in table.items() if can_resample(strategies)}
        notes += [f"{task}, {model}: no multi-bootstrap, the runs did not keep predictions on the same dev examples"
                  for task, model in table if (task, model) not in resampled]
        resampled = map_table(lambda run: resampled_task_scores(run, resamples), resampled)
    means, drawn_means = add_mean_over_tasks(scores), add_mean_over_tasks(resampled)
    if len(resampled) < len(table):  # a mean over fewer tasks is another quantity
        drawn_means = resampled
    pairs = compare_all(means, drawn_means, notes)
    for pair in pairs if effect else ():
        pair["seeds_needed"] = seeds_needed(pair["sd"], effect)
    cells = []
    for (task, model), strategies in means.items():
        for strategy, seeds in strategies.items():
            found = [run["metrics"] for run in table.get((task, model), {}).get(strategy, {}).values()]
            columns = {name: [metrics[name] for metrics in found] for name in (found[0] if found else ())}
            statistics = {name: mean_sd(values) for name, values in (columns | {"score": seeds.values()}).items()}
            cells.append({"task": task, "model": model, "strategy": strategy, "seeds": list(seeds),
                          "metrics": statistics})
    constants = {task: run["baseline"] | {"score": glue.score(run["baseline"])} for (task, _), strategies in table.items()
                 for seeds in strategies.values() for run in seeds.values() if "baseline" in run}
    return {"runs": len(runs), "epoch": epoch, "effect": effect, "verdict": verdict(pairs), "notes": notes,
            "cells": cells, "pairs": pairs, "constants": constants}


# --- the report as text ----------------------------------------------------------------------------------------------

READING = (
    "Scores are fractions (the mean of a task's metrics); mean ± sd over seeds. A difference is strategy minus "
    "baseline, seed by seed. The t interval covers other seeds on these same examples; the multi-bootstrap interval "
    "covers other seeds and other examples, roughly. p: paired t, sign flip, and Holm's adjustment of the former "
    "over every comparison of this report. d_z: mean / sd of the differences. MDE: the true difference one such test "
    "would find with 80% power, from an sd that is itself uncertain for few seeds.")


def show(value: float, sign: str = "") -> str:
    """Four decimals, `n/a` where there is no number, and no -0.0000."""
    return f"{round(value, 4) + 0.0:{sign}.4f}" if math.isfinite(value) else "n/a"


def show_p(p: float) -> str:
    return "n/a" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def show_interval(low: float, high: float) -> str:
    if math.isnan(low):
        return "n/a"
    return f"[{show(low, '+')}, {show(high, '+')}]" if high - low > 1e-12 else "no spread"


def show_seeds(n: float) -> str:
    return f"{n:,}" if math.isfinite(n) else "n/a" if math.isnan(n) else "> 1,000,000"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def cell_table(cells: list[dict], constant: dict | None) -> str:
    """A row per strategy, a column per metric, and last what the constant answer scores."""
    names = list(cells[0]["metrics"])
    if len(names) == 2:  # one metric, which is the score
        names = names[1:]
    rows = [[cell["strategy"], str(len(cell["seeds"])),
             *(f"{show(mean)} ± {show(sd)}" for mean, sd in map(cell["metrics"].get, names))] for cell in cells]
    if constant:
        rows.append(["the constant answer", "", *(show(constant.get(name, math.nan)) for name in names)])
    return markdown_table(["strategy", "n", *names], rows)


def pair_table(pairs: list[dict], effect: float | None) -> str:
    """A row per comparison."""
    header = ["strategy − baseline", "n", "difference", "95% t interval", "multi-bootstrap", "t", "p", "sign-flip p",
              "Holm p", "d_z", "MDE"]
    rows = [[f"{pair['strategy']} − {pair['baseline']}", str(pair["n"]), show(pair["mean"], "+"),
             show_interval(pair["low"], pair["high"]), show_interval(pair["bootstrap_low"], pair["bootstrap_high"]),
             f"{pair['t']:.2f}" if math.isfinite(pair["t"]) else "n/a", show_p(pair["p"]), show_p(pair["sign_flip_p"]),
             show_p(pair["holm_p"]), f"{pair['dz']:.2f}" if math.isfinite(pair["dz"]) else "n/a",
             show(pair["mde"]) if pair["sd"] > 0 else "n/a"] for pair in pairs]
    if effect:
        header.append(f"seeds for {effect:g}")
        rows = [[*row, show_seeds(pair["seeds_needed"])] for row, pair in zip(rows, pairs)]
    return markdown_table(header, rows)


def forest(pairs: list[dict], width: int = 41) -> str:
    """A line per pair: `-` spans the t interval, `o` is the mean difference, `|` is zero; one scale for the group."""
    scale = max(abs(end) for pair in pairs for end in (pair["mean"], pair["low"], pair["high"]) if math.isfinite(end))
    scale = scale or 1.0
    names = [f"{pair['strategy']} − {pair['baseline']}" for pair in pairs]
    margin = max(map(len, names))

    def column(value):
        return round((value / scale + 1) / 2 * (width - 1))

    lines = []
    for name, pair in zip(names, pairs):
        line = [" "] * width
        if math.isfinite(pair["low"]):
            low, high = column(pair["low"]), column(pair["high"])
            line[low:high + 1] = "-" * (high - low + 1)
        line[column(0)] = "|"
        line[column(pair["mean"])] = "o"
        lines.append(f"{name:{margin}}  {''.join(line)}".rstrip())
    ends = f"{show(-scale, '+')}{'0':^{width - 14}}{show(scale, '+')}"
    return "\n".join([*lines, f"{'':{margin}}  {ends}"])


def to_markdown(report: dict) -> str:
    """The report as a person reads it, in Markdown and on the terminal."""
    epoch = {"last": "last epoch", "best": "best epoch, chosen on the dev set it is scored on: optimistic"}
    parts = ["# Report", f"**Verdict.** {report['verdict']}",
             f"{report['runs']} runs; metrics of the {epoch[report['epoch']]}. {READING}"]
    for task, model in dict.fromkeys((cell["task"], cell["model"]) for cell in report["cells"]):
        pairs = [pair for pair in report["pairs"] if (pair["task"], pair["model"]) == (task, model)]
        cells = [cell for cell in report["cells"] if (cell["task"], cell["model"]) == (task, model)]
        parts += [f"## {task}, {model}", cell_table(cells, report["constants"].get(task))]
        if any(len(cell["seeds"]) == 1 for cell in cells):
            parts.append("One seed has no sd and gives no interval and no test.")
        if pairs:
            parts += [pair_table(pairs, report["effect"]), f"```text\n{forest(pairs)}\n```"]
        parts += [f"{pair['strategy']} − {pair['baseline']}: all {pair['n']} differences are "
                  f"{show(pair['mean'], '+')}; without a spread, an interval and a t test say nothing."
                  for pair in pairs if pair["sd"] == 0]
    if report["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
    return "\n\n".join(parts) + "\n"


def to_csv(report: dict) -> str:
    """One row per cell and metric (no baseline), and one per pair (metric `score`, mean and sd of the differences)."""
    rows = [{"task": cell["task"], "model": cell["model"], "strategy": cell["strategy"], "metric": metric,
             "n": len(cell["seeds"]), "mean": mean, "sd": sd}
            for cell in report["cells"] for metric, (mean, sd) in cell["metrics"].items()]
    rows += [{"metric": "score"} | pair for pair in report["pairs"]]
    columns = ["task", "model", "strategy", "baseline", "metric", *list(compare({0: 0.0}, {0: 0.0}, None, None)),
               "holm_p", "seeds_needed"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain(rows))
    return text.getvalue()


def plain(value):
    """For JSON and CSV: six significant digits, which every machine agrees on, and None where there is no number."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_report(folder: Path, epoch: str = "last", effect: float | None = None) -> str:
    """Analyses a folder and writes report.md, report.csv and report.json into it. Returns the Markdown."""
    report = analyse(folder, epoch, effect)
    text = to_markdown(report)
    write_atomic(folder / "report.md", text)
    write_atomic(folder / "report.csv", to_csv(report))
    write_atomic(folder / "report.json", json.dumps(plain(report), indent=1) + "\n")
    return text


# --- the sweep -------------------------------------------------------------------------------------------------------

PRESETS = {
    "typhoon": {  # [T] v2: 2 × 3 × 3 × 5 = 90 runs; 12 comparisons of Typhoon on one task
        "tasks": ["mrpc", "cola"],
        "models": ["huawei-noah/TinyBERT_General_4L_312D", "distilbert-base-uncased", "bert-base-uncased"],
        "strategies": ["random", "whole-word", "typhoon"],
        "seeds": [0, 1, 2, 3, 4]},
    "entropy": {  # [E]: which strategy pretrains better, with and without distillation
        "tasks": glue.NINE,
        "models": ["runs/{masking}-{seed}"],
        "strategies": ["random", "entropy", "self-entropy", "random-kd", "entropy-kd", "self-entropy-kd"],
        "seeds": [0, 1, 2]},
}
PRETRAINING = {name: ["--masking", name] for name in STRATEGIES}
PRETRAINING |= {f"{name}-kd": ["--masking", name, "--kd-weight", "0.5"] for name in STRATEGIES}
HERE = Path(__file__).parent


def slug(model: str) -> str:
    """A model's name or path as part of a file name: `runs/{masking}-{seed}` becomes `runs-masking-seed`."""
    return re.sub(r"[^\w.]+", "-", model).strip("-")


@dataclass(frozen=True)
class Run:
    """One cell of the grid. `model` is a name, a directory, or a pattern with {masking} and {seed} in it."""
    task: str
    model: str
    strategy: str
    seed: int

    @property
    def name(self) -> str:
        """`mrpc--runs-masking-seed--entropy--3`: the run's file, without .json."""
        return "--".join([self.task, slug(self.model), self.strategy, str(self.seed)])

    @property
    def checkpoint(self) -> str:
        return self.model.replace("{masking}", self.strategy).replace("{seed}", str(self.seed))

    def command(self, output: Path, extra: list[str], script: Path) -> list[str]:
        """A model that {masking} pretrained is not adapted again. A pattern goes into the label, so that the report
        knows the checkpoints of all seeds as one model."""
        command = [sys.executable, str(script), "--task", self.task, "--model", self.checkpoint,
                   "--seed", str(self.seed), "--json", str(output)]
        if "{masking}" not in self.model and self.strategy != "none":
            command += ["--adapt", self.strategy]
        if self.checkpoint != self.model:
            command += ["--label", f"{self.strategy}@{self.model}"]
        return command + extra


@dataclass(frozen=True)
class Job:
    """A process to run: done when `output` is there; a failure is recorded in `error`."""
    command: list[str]
    output: Path
    error: Path


def plan(tasks: list[str], models: list[str], strategies: list[str], seeds: list[int]) -> list[Run]:
    """The grid, in an order that finishes whole comparisons early. Raises InputError on a cell that has no name."""
    runs = [Run(task, model, strategy, seed)
            for model in models for task in tasks for seed in seeds for strategy in strategies]
    for run in runs:
        if re.search(r"[{}]", run.checkpoint):
            raise InputError(f"--models {run.model}: a pattern holds {{masking}} and {{seed}} and no other brace")
        if not re.fullmatch(r"[\w.+-]+", run.strategy):
            raise InputError(f"--strategies {run.strategy}: a name has letters, digits, and . + - _ only")
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two runs of this grid would both write {twice[0]}.json: name each value once")
    return runs


def finished_run(path: Path) -> dict | None:
    """The run in this file, None where there is none or it cannot be read."""
    try:
        return read_run(path) if path.exists() else None
    except InputError:
        return None


def pretraining_jobs(runs: list[Run], folder: Path, extra: list[str]) -> list[Job]:
    """A job for every checkpoint of a {masking} pattern that is not there yet. train.py writes model.safetensors last;
    a directory without it was interrupted, and goes on. Raises InputError on what train.py would refuse, and on a
    checkpoint that was made with another seed or other options: it is no run of this grid."""
    jobs = {}
    for run in runs:
        weights = Path(run.checkpoint) / "model.safetensors"
        started = (weights.parent / "train_args.json").exists()
        ours = started and run.strategy in PRETRAINING
        if "{masking}" not in run.model or (weights.exists() and not ours):
            continue
        if run.strategy not in PRETRAINING:
            raise InputError(f"--pretrain knows no strategy {run.strategy}: choose from {', '.join(PRETRAINING)}")
        options = [*PRETRAINING[run.strategy], "--seed", str(run.seed), "--out", run.checkpoint, *extra]
        if started:
            options += ["--resume", run.checkpoint]
        train.parse_args(options)
        if not weights.exists():
            jobs[run.checkpoint] = Job([sys.executable, str(HERE / "train.py"), *options], weights,
                                       folder / f"pretrain--{slug(run.checkpoint)}.error.json")
    return list(jobs.values())


def finish(job: Job, returncode: int, stderr: str) -> bool:
    """Records how a job ended. True where its output is there."""
    for left_over in job.output.parent.glob(f".{job.output.name}.*"):  # of an earlier, killed attempt
        left_over.unlink(missing_ok=True)
    if returncode == 0 and job.output.exists():
        job.error.unlink(missing_ok=True)
        return True
    lines = stderr.strip().splitlines() or ["it said nothing"]
    write_atomic(job.error, json.dumps({"error": lines[-1], "command": job.command, "returncode": returncode}) + "\n")
    return False


def run_jobs(jobs: list[Job], parallel: int, bar: tqdm) -> int:
    """Runs the jobs, `parallel` at once, each a process of its own. Returns how many failed; a failure stops no other.
    If this process is interrupted it ends the jobs in flight; they are the only ones to run again."""
    waiting, running, failed = list(jobs), {}, 0
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parallel))}  # jobs that share cores do not fight
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job, stderr = waiting.pop(0), tempfile.TemporaryFile()
                running[subprocess.Popen(job.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                         stderr=stderr, env=threads | os.environ)] = job, stderr
            time.sleep(0.02)
            for process in [process for process in running if process.poll() is not None]:
                job, stderr = running.pop(process)
                stderr.seek(0)
                failed += not finish(job, process.returncode, stderr.read().decode(errors="replace"))
                stderr.close()
                bar.set_postfix(failed=failed)
                bar.update()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed


def sweep(runs: list[Run], folder: Path, extra: list[str] = (), parallel: int = 1, pretraining: list[Job] = (),
          script: Path = HERE / "glue.py") -> int:
    """Pretrains, then runs what is missing of the grid into folder/NAME.json. Returns how many processes failed.

    A file is there whole or not at all (glue.py renames it into place), so a sweep killed at any moment goes on where
    it was; a file that cannot be read is made again. Pretraining is one process at a time: it fills a device, and the
    first may have to train the teacher that the others wait for."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {run: folder / f"{run.name}.json" for run in runs}
    missing = [run for run in runs if not finished_run(outputs[run])]
    for run in missing:
        outputs[run].unlink(missing_ok=True)  # unreadable: else a failed run would seem to have made it
    jobs = [Job(run.command(outputs[run], list(extra), script), outputs[run], folder / f"{run.name}.error.json")
            for run in missing]
    done = len(runs) - len(missing)
    with tqdm(total=len(pretraining) + len(runs), initial=done, desc="sweep", unit="run", smoothing=0) as bar:
        return run_jobs(list(pretraining), 1, bar) + run_jobs(jobs, parallel, bar)


def estimate(missing: list[Run], finished: list[dict]) -> float:
    """Seconds that the missing runs take one after another: the mean of the finished ones of the same task and model,
    or of all where there is none yet; nan where nothing is finished."""
    def seconds(run):
        alike = [done["seconds"] for done in finished if (done["task"], done["model"]) == (run.task, run.model)]
        return mean_sd(alike or [done["seconds"] for done in finished])[0]

    return math.fsum(map(seconds, missing)) if finished else math.nan


def dry_run(runs: list[Run], folder: Path, parallel: int, pretraining: list[Job]):
    """Prints every run with its state, and the time that the missing ones may take."""
    found = {run: finished_run(folder / f"{run.name}.json") for run in runs}
    for job in pretraining:
        print(f"pretrain  {job.output.parent}")
    for run, result in found.items():
        failed = (folder / f"{run.name}.error.json").exists()
        print(f"{'done' if result else 'failed' if failed else 'missing':8}  {run.name}")
    missing, finished = [run for run in runs if not found[run]], [result for result in found.values() if result]
    seconds = estimate(missing, finished) / parallel
    time_left = "no estimate before the first run is finished"
    if finished:
        time_left = f"about {seconds / 60:.0f} minutes with --jobs {parallel}, from {len(finished)} finished runs"
    print(f"{len(missing)} of {len(runs)} runs to do: {time_left}{'; pretraining not counted' if pretraining else ''}")


# --- command line ----------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The arguments; `extra` holds what follows `--`, for glue.py."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(prog="stats.py", description="Compare masking strategies over seeds.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{sweep,report}")

    add = commands.add_parser("sweep", help="run a grid through glue.py; what is done is skipped",
                              epilog="What follows -- goes to glue.py: sweep --preset typhoon -- --epochs 2. A "
                                     "finished run is not run again with other options: give those another --out.").add_argument
    add("--preset", choices=list(PRESETS), help="a paper's grid; the next four replace parts of it")
    add("--tasks", nargs="+", help=f"{' '.join(glue.NINE)}")
    add("--models", nargs="+", help="names or directories; runs/{masking}-{seed} compares pretraining strategies")
    add("--strategies", nargs="+", help="adaptation strategies, or none; what {masking} in --models stands for")
    add("--seeds", nargs="+", type=int, help="(default: 0 1 2 3 4)")
    add("--out", type=Path, help="folder of the JSON files (default: runs/sweep, or runs/sweep-PRESET)")
    add("--jobs", type=int, default=1, help="fine-tuning runs at once")
    add("--shard", metavar="I/N", help="only every N-th run, from the I-th on: for the jobs 1/N to N/N of an array")
    add("--dry-run", action="store_true", help="list the runs, and the time they may take")
    add("--pretrain", nargs="?", const="", metavar="OPTIONS",
        help="first make the models of a {masking} pattern with train.py, and these options: '--steps 2000 --bf16'")

    add = commands.add_parser("report", help="the statistics of a folder of runs").add_argument
    add("folder", type=Path, help="where sweep or glue.py --json wrote")
    add("--epoch", choices=["last", "best"], default="last", help="best is chosen on the dev set: optimistic")
    add("--effect", type=float, help="how many seeds would find a difference of this size, such as 0.01?")
    args = parser.parse_args(argv[:split])
    args.extra = argv[split + 1:]
    return args


def grid(args) -> list[Run]:
    """The runs that the arguments ask for. Raises InputError where they leave one of the lists open."""
    lists = {"seeds": [0, 1, 2, 3, 4]} | PRESETS.get(args.preset, {})
    lists |= {name: given for name in ("tasks", "models", "strategies", "seeds") if (given := getattr(args, name))}
    if open_lists := [f"--{name}" for name in ("tasks", "models", "strategies") if name not in lists]:
        raise InputError(f"{' and '.join(open_lists)} missing: give them, or --preset {' or '.join(PRESETS)}")
    runs = plan(**lists)
    if not args.shard:
        return runs
    # of the whole grid, not of what is missing now: jobs that start at different times must not share or lose a run
    first, _, step = args.shard.partition("/")
    if not (first.isdecimal() and step.isdecimal() and 1 <= int(first) <= int(step)):
        raise InputError(f"--shard {args.shard}: write it as 1/4, 2/4, 3/4, 4/4")
    if args.pretrain is not None:
        raise InputError("--pretrain with --shard would train a model twice: first sweep --pretrain, then the shards")
    return runs[int(first) - 1::int(step)]


def check_extra(extra: list[str], taken: tuple[str, ...]):
    """Raises InputError where the options for another program include one that the sweep sets."""
    for option in extra:
        if option.split("=")[0] in taken:
            raise InputError(f"{option.split('=')[0]} is set by the sweep: leave it out of the options passed on")


def sweep_command(args):
    """Checks what can be known beforehand, options for glue.py and train.py by their own rules; then sweeps."""
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: at least 1")
    runs, folder = grid(args), args.out or Path("runs") / "-".join(filter(None, ("sweep", args.preset)))
    check_extra(args.extra, ("--task", "--model", "--seed", "--adapt", "--label", "--json"))
    for run in runs:
        glue.parse_args(run.command(folder / f"{run.name}.json", args.extra, HERE)[2:])
    pretraining = []
    if args.pretrain is not None:
        if not any("{masking}" in run.model for run in runs):
            raise InputError("--pretrain makes the models of a pattern, and --models has none with {masking}")
        try:
            options = shlex.split(args.pretrain)
        except ValueError as error:
            raise InputError(f"--pretrain {args.pretrain}: {error}, so where do its options end?") from None
        check_extra(options, ("--masking", "--kd-weight", "--seed", "--out", "--resume"))
        pretraining = pretraining_jobs(runs, folder, options)
    if args.dry_run:
        return dry_run(runs, folder, args.jobs, pretraining)
    made = {str(job.output.parent) for job in pretraining}
    for run in runs:
        if run.checkpoint != run.model and not Path(run.checkpoint).exists() and str(Path(run.checkpoint)) not in made:
            raise InputError(f"{run.checkpoint} is not there: train.py --out {run.checkpoint} or --pretrain makes it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that run_jobs ends its processes
    failed = sweep(runs, folder, args.extra, args.jobs, pretraining)
    if failed:
        raise RunError(f"{failed} failed: {folder}/*.error.json say why, and the same command tries them again")
    print(f"{len(runs)} runs in {folder}: python stats.py report {folder}")


def main(argv=None):
    args = parse_args(argv)
    if args.command == "sweep":
        return sweep_command(args)
    if args.effect is not None and not args.effect > 0:
        raise InputError(f"--effect {args.effect}: a difference above 0, such as 0.01")
    print(write_report(args.folder, args.epoch, args.effect), end="")


if __name__ == "__main__":
    run_cli(main)
