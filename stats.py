"""Statistics: is one masking strategy better than another, or was it the seed?

A single fine-tuning run proves little: [T] (Typhoon, arXiv 2303.15619 v2) found that the advantage
of one run did not survive five seeds. So `sweep` runs a grid of tasks, models, strategies and
seeds, one JSON file a run, and `report` compares the strategies seed by seed and claims no more
than the numbers do. In order: the paired statistics, the two-way bootstrap, the analysis, the
report as text; then the run files, the grid, the sweep and the command line, which serve them.

    python stats.py sweep --preset typhoon --jobs 2        # [T]'s 90 runs; kill it, start it again
    python stats.py sweep --preset entropy --pretrain      # [E]: pretrain 18 models, then GLUE
    python stats.py sweep --tasks mlm --models 'runs/{masking}-{seed}' --pretrain \\
        --strategies random entropy                        # train.py's held-out exam, no GLUE
    python stats.py report runs/sweep-typhoon              # reads the JSON files, needs no model
    python stats.py report runs/sweep-typhoon --against typhoon      # [T]'s 12 comparisons alone
    python stats.py report runs/sweep-typhoon --effect 0.01          # seeds that would find 0.01

Scores and differences are fractions, not percent: 0.01 is one point. Shapes: n seeds, m dev
examples (of the task mlm: held-out windows), R resamples.
"""
import argparse
import contextlib
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
import zlib
from bisect import bisect_left
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import glue
import train
from masking import STRATEGIES, find_strategy, strategy_label
from model import (InputError, Parser, RunError, number, read_json, run_cli, weights_digest,
                   write_atomic)

ALPHA, POWER, LEVEL = 0.05, 0.8, 0.95


# --- Student's t ----------------------------------------------------------------------------------

def mean_sd(values) -> tuple[float, float]:
    """Mean and sample standard deviation; the sd of one value is nan.

    A spread below 1e-10 of the values is what subtracting two scores leaves behind (0.81 - 0.80 is
    not quite 0.83 - 0.82): it counts as none."""
    values = [float(value) for value in values]
    mean = math.fsum(values) / len(values)  # fsum rounds once: the same digits on every machine
    if len(values) < 2:
        return mean, math.nan
    # n - 1: the values lie closer to their own mean than to the true one, which costs one of them
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, sd if sd > 1e-10 * max(map(abs, values)) else 0.0


def t_tail(t: float, df: int, shift: float = 0.0) -> float:
    """P(|T| >= |t|) of Student's t, T = (Z + shift) / S: Z is normal, df·S² chi-squared with df
    degrees of freedom. A shift other than 0 makes T noncentral.

    Given S, the probability is two tails of Z. Their mean over S is an integral, taken over
    u = ln S: the integrand falls to 0 at both ends, where a plain sum converges exponentially."""
    # the integrand lies around S = 1; the far tail of a large t comes from smaller S, near `peak`
    peak = math.log(df / (df + t * t)) / 2
    start, end = peak - 32 / df - 8 / math.sqrt(df), math.log1p(10 / math.sqrt(df))
    u, step = np.linspace(start, end, 2001, retstep=True)
    log_norm = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    density = np.exp(log_norm + df * u - df / 2 * np.exp(2 * u))  # of u
    limit = torch.from_numpy(abs(t) * np.exp(u))  # |Z + shift| must exceed it
    tails = sum(torch.erfc((limit + side * shift) / math.sqrt(2)) / 2 for side in (-1, 1))
    return float((density * tails.numpy()).sum() * step)


def solve(increasing, target: float) -> float:
    """The x >= 0 where an increasing function reaches the target, by bisection to the last bit."""
    low, high = 0.0, 1.0
    while increasing(high) < target:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:  # until no number lies between the two
        if increasing(middle) < target:
            low = middle
        else:
            high = middle
    return high


@lru_cache(maxsize=None)
def t_critical(df: int, alpha: float) -> float:
    """The |t| that a two-sided test at level alpha must exceed: 2.776 for df = 4, alpha = 0.05."""
    return solve(lambda t: -t_tail(t, df), -alpha)  # the tail falls with t, its negative rises


# --- paired statistics: a and b hold one score per seed, the same seeds in the same order ---------

def paired_t_test(a, b) -> tuple[float, float]:
    """t = mean(d) / (sd(d) / √n) of d = a - b, and its two-sided p with n - 1 df (Student 1908).

    >>> t, p = paired_t_test([3, 5, 7], [2, 3, 4])  # differences 1, 2, 3: mean 2, sd 1, t = 2 √3
    >>> round(t, 3), round(p, 3)
    (3.464, 0.074)

    One seed gives (nan, nan). Equal differences other than 0 give (±inf, nan): without a spread
    there is nothing to judge them by, and p = 0 would be a claim. Differences that are all 0 give
    (0, 1). Raises ValueError when a and b differ in length."""
    # pairing: what a seed gives to both (data order, a lucky head) cancels in the difference
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, sd = mean_sd(differences)
    if math.isnan(sd):
        return math.nan, math.nan
    if sd == 0:
        return (math.copysign(math.inf, mean), math.nan) if mean else (0.0, 1.0)
    t = mean / (sd / math.sqrt(len(differences)))
    return t, t_tail(t, len(differences) - 1)  # the sd was estimated, with n - 1 degrees of freedom


def confidence_interval(differences, level: float = LEVEL) -> tuple[float, float]:
    """Student's interval for the mean difference, mean ± t* sd / √n; (nan, nan) for one seed.

    It covers the mean over all seeds in `level` of such experiments, if the differences are about
    normal. Equal differences give an interval without width: that is no knowledge."""
    mean, sd = mean_sd(differences)
    if math.isnan(sd):
        return math.nan, math.nan
    half = t_critical(len(differences) - 1, 1 - level) * sd / math.sqrt(len(differences))
    return mean - half, mean + half


def sign_flip_test(differences, flips: int = 100_000, seed: int = 0) -> float:
    """Two-sided p of Fisher's randomisation test (1935): the share of sign patterns as extreme.

    If the two names meant nothing, each difference could as well have had the other sign: of all
    2^n patterns of signs, how many have an |sum| at least as large as the one seen? That assumes no
    normality, but the pattern seen and its mirror image always count, so that p is never below
    2 / 2^n: with 5 seeds 0.0625, however large the difference. Above 20 seeds: `flips` random
    patterns, and the one seen with them, so that p is never 0 (Phipson and Smyth 2010)."""
    differences = np.asarray(differences, dtype=float)
    seen = abs(differences.sum()) - 1e-9 * abs(differences).sum()  # a tie, even after rounding
    if len(differences) <= 20:
        sums = np.zeros(1)
        for difference in differences:  # each difference doubles the patterns: with + and with -
            sums = np.concatenate([sums + difference, sums - difference])  # (2^i,)
        return float((abs(sums) >= seen).mean())
    coins = np.random.Generator(np.random.PCG64(seed))
    signs = coins.choice([-1.0, 1.0], size=(flips, len(differences)))
    return float(1 + (abs(signs @ differences) >= seen).sum()) / (1 + flips)


def holm(p_values) -> list[float]:
    """p-values adjusted for having made m comparisons: Holm's step-down method (1979).

    The i-th smallest is multiplied by m - i + 1, and is never below the one before it. Claiming
    where the result is below alpha keeps the chance of any false claim among the m under alpha.

    >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03, 0.005])]
    [0.03, 0.06, 0.06, 0.02]

    A nan stays nan and counts in m: a comparison that was made and could not be judged."""
    adjusted = [math.nan] * len(p_values)
    judged = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for rank, (p, i) in enumerate(judged):
        # Bonferroni's factor is m throughout, as if no comparison had a true difference. The step
        # down: if the smallest p is claimed and that claim is false, the error is made already; if
        # it is true, only m - 1 comparisons are left to err on. Where a p does not pass, no larger
        # one may: hence the maximum.
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        adjusted[i] = largest
    return adjusted


def cohen_dz(differences) -> float:
    """Cohen's d_z (1988, §2.3): the mean difference in units of its sd; nan without a spread."""
    mean, spread = mean_sd(differences)
    return mean / spread if spread > 0 else math.nan


@lru_cache(maxsize=None)
def detectable_shift(n: int, power: float, alpha: float) -> float:
    """The shift √n · mean / sd at which the two-sided t test on n pairs has this power."""
    threshold = t_critical(n - 1, alpha)
    return solve(lambda shift: t_tail(threshold, n - 1, shift), power)


def minimum_detectable_effect(differences, power: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest true mean difference that a paired t test with this n and sd finds so often.

    Exact under normality: the normal approximation is a quarter too small for 5 seeds. But only as
    good as the sd it is given, and before any correction for many comparisons. nan for one seed."""
    n, (_, sd) = len(differences), mean_sd(differences)
    return math.nan if n < 2 else detectable_shift(n, power, alpha) * sd / math.sqrt(n)


def seeds_needed(sd: float, effect: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """The least n >= 2 that finds `effect` so often; nan without an sd, inf past a million."""
    if not sd > 0:
        return math.nan

    def enough(n):
        return detectable_shift(n, power, alpha) * sd <= effect * math.sqrt(n)

    counts = range(2, 1_000_001)
    place = bisect_left(counts, True, key=enough)  # False for few seeds, True from some n on
    return counts[place] if place < len(counts) else math.inf


# --- the dev set is a sample too ------------------------------------------------------------------

def multi_bootstrap(a: np.ndarray, b: np.ndarray, level: float = LEVEL, seed: int = 0):
    """(low, high) of the mean difference over other seeds *and* other examples: the multi-bootstrap
    for paired seeds (Sellam et al. 2022, 2106.16163). (nan, nan) for one seed.

    a, b (n, R): row s, column r is the score of seed s on the r-th resample of the dev examples,
    the same examples on both sides (`resampled_scores`).

    Approximate for few seeds. Measured coverage of the 95% interval with five of them
    (`pytest -m slow -k coverage`): 92% where seeds and examples add alike to the mean's variance,
    94 to 97% where each run also errs at random (both resamplings then count that noise), 89% and
    85% where the sd that seeds add is two and four times the examples'. Where seeds vary so much
    more than examples, read the t interval."""
    n, resamples = a.shape
    if n < 2:
        return math.nan, math.nan
    rng = np.random.Generator(np.random.PCG64(seed))
    # each column has its own draw of examples already; a draw of seeds on top makes both vary, as
    # in a new experiment. With the examples alone five lucky seeds would pass for the truth.
    drawn = rng.integers(n, size=(n, resamples))
    means = np.take_along_axis(a - b, drawn, axis=0).mean(axis=0)  # (R,)
    # weibull: R draws cut the line into R + 1 pieces, each as likely to hold one more draw
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="weibull")
    return float(low), float(high)


def resampled_scores(score, *columns, resamples: int, seed: int) -> np.ndarray:
    """(R,): score(*columns) on R samples of the m examples, drawn with replacement.

    columns: arrays with a row per example, such as predictions and labels. A seed draws the same
    examples whatever they hold, so that two runs are compared on equal samples."""
    columns = [np.asarray(column) for column in columns]  # (m, ...)
    rng = np.random.Generator(np.random.PCG64(seed))
    m = len(columns[0])
    samples = (rng.integers(m, size=m) for _ in range(resamples))
    return np.array([score(*(column[sample] for column in columns)) for sample in samples])


# --- the analysis ---------------------------------------------------------------------------------

@dataclass
class Row:
    """A line of the one table that everything below reads: a run, or a seed's mean over tasks."""
    task: str
    model: str  # where the sweep made it from a pattern, the pattern: one model in the report
    strategy: str
    seed: int
    score: float  # what is compared; the higher the better
    metrics: dict[str, float] = field(default_factory=dict)
    masked: float = math.nan  # share of the ordinary tokens that were masked; nan where not known
    resampled: np.ndarray | None = None  # (R,) the score on resampled dev examples
    run: dict = field(default_factory=dict)  # the whole JSON file


def grouped(rows: list[Row], *fields: str) -> dict:
    """{value of the fields: its rows}, in the rows' order; several fields make a tuple."""
    groups = {}
    for row in rows:
        values = tuple(getattr(row, name) for name in fields)
        groups.setdefault(values if len(fields) > 1 else values[0], []).append(row)
    return groups


def by_order(row: Row) -> tuple:
    """Sorting key of the table; strategies in masking.py's order, so that a difference is new minus
    baseline."""
    order = ["none", *STRATEGIES]
    place = order.index(row.strategy) if row.strategy in order else len(order)
    return row.task, row.model, place, row.strategy, row.seed


def means_over_tasks(rows: list[Row]) -> list[Row]:
    """The GLUE score: for each model with several tasks their mean, of seeds that ran every task.
    The task mlm is no GLUE task and stays out."""
    means = []
    rows = [row for row in rows if row.task != "mlm"]
    for model, group in sorted(grouped(rows, "model").items()):
        tasks = len(grouped(group, "task"))
        for (strategy, seed), found in grouped(group, "strategy", "seed").items():
            if tasks == 1 or len(found) < tasks:
                continue
            drawn = [row.resampled for row in found]
            complete = all(sample is not None for sample in drawn)
            means.append(Row(f"mean of {tasks} tasks", model, strategy, seed,
                             score=sum(row.score for row in found) / tasks,
                             metrics={row.task: row.score for row in found},
                             masked=mean_sd([row.masked for row in found])[0],
                             resampled=np.mean(drawn, axis=0) if complete else None))
    return sorted(means, key=by_order)


def compare(new: list[Row], baseline: list[Row]) -> dict:
    """Every statistic of one pair of strategies, on the seeds that both have."""
    pairs = [(row, other) for row in new for other in baseline if row.seed == other.seed]
    a, b = [row.score for row, _ in pairs], [other.score for _, other in pairs]
    differences = [x - y for x, y in zip(a, b)]
    mean, spread = mean_sd(differences)
    t, p = paired_t_test(a, b)
    low, high = confidence_interval(differences)
    bootstrap_low, bootstrap_high = math.nan, math.nan
    if all(row.resampled is not None for row in new + baseline):
        bootstrap_low, bootstrap_high = multi_bootstrap(
            np.stack([row.resampled for row, _ in pairs]),
            np.stack([other.resampled for _, other in pairs]))
    return {"n": len(pairs), "mean": mean, "sd": spread, "low": low, "high": high,
            "bootstrap_low": bootstrap_low, "bootstrap_high": bootstrap_high, "t": t, "p": p,
            "sign_flip_p": sign_flip_test(differences), "dz": cohen_dz(differences),
            "mde": minimum_detectable_effect(differences),
            "masked": mean_sd([row.masked for row, _ in pairs])[0],
            "baseline_masked": mean_sd([other.masked for _, other in pairs])[0]}


def compare_all(rows: list[Row], notes: list[str], against: str | None = None) -> list[dict]:
    """Every pair of strategies of every task and model, or those with the strategy `against`: one
    family for Holm. Adds notes on missing seeds."""
    pairs = []
    for (task, model), group in grouped(rows, "task", "model").items():
        every = sorted(grouped(group, "seed"))
        strategies = grouped(group, "strategy")
        for strategy, found in strategies.items():
            if missing := [str(seed) for seed in every if seed not in grouped(found, "seed")]:
                notes.append(f"{task}, {model}: {strategy} lacks seed {', '.join(missing)}; "
                             "its pairs go without")
        for baseline, new in combinations(strategies, 2):
            if against not in (None, baseline, new):
                continue
            if not grouped(strategies[new], "seed").keys() & grouped(strategies[baseline], "seed"):
                notes.append(f"{task}, {model}: {new} and {baseline} have no seed in common; "
                             "no comparison")
                continue
            names = {"task": task, "model": model, "strategy": new, "baseline": baseline}
            pairs.append(names | compare(strategies[new], strategies[baseline]))
    for pair, adjusted in zip(pairs, holm([pair["p"] for pair in pairs])):
        pair["holm_p"] = adjusted
    return pairs


# Runs that are compared must be equal in every setting but these.
NO_SETTING = {"label", "pattern", "json", "predict", "save", "out", "resume", "device", "data_dir",
              "compile", "log_every", "eval_every", "save_every", "versions"}
OF_THE_GRID = {"task", "model", "seed", "adapt", "teacher", "teacher_dir", "teacher_seed",
               "teacher_weights"}  # teachers: see teacher_notes
OF_THE_STRATEGY = {"masking", "kd_weight", "kd_temperature", "kd_start", "student_init",
                   "strategy_start", "entropy_select", "entropy_input", "typhoon_spread",
                   "typhoon_ema"}  # equal within a strategy


def differing(rows: list[Row], part: str) -> list[str]:
    """`steps: 60, 100` for each setting in run[part] that must be equal and is not."""
    rows, lines = [row for row in rows if row.run.get(part)], []
    names = {name for row in rows for name in row.run[part]}
    for name in sorted(names - NO_SETTING - OF_THE_GRID):
        groups = grouped(rows, "strategy").values() if name in OF_THE_STRATEGY else [rows]
        for group in groups:
            values = sorted({json.dumps(row.run[part].get(name)) for row in group})
            if len(values) > 1:
                lines.append(f"{name}: {', '.join(values)}")
    return lines


def check_same(what: str, stored: dict, asked: dict):
    """Raises InputError, with the setting, where `what` was made with others than this sweep's. A
    setting that an earlier version did not have is not compared."""
    for name in sorted((stored.keys() & asked) - NO_SETTING):
        if stored[name] != asked[name]:
            raise InputError(f"{what} was made with --{name.replace('_', '-')} {stored[name]}, and "
                             f"this sweep asks for {asked[name]}: remove it, or choose other names")


def provenance_notes(rows: list[Row]) -> list[str]:
    """A note on everything that runs differ in and the grid does not vary: arguments, how their
    models were pretrained, by which teachers, and which weights they started from. Raises
    InputError where two seeds started from the same weights: a copy is no independent seed."""
    notes = []
    for (task, model), group in grouped(rows, "task", "model").items():
        if task != "mlm":  # whose arguments are those of the pretraining
            notes += [f"{task}, {model}: the runs differ in {line}"
                      for line in differing(group, "args")]
    for model, group in grouped(rows, "model").items():
        notes += [f"{model}: the pretraining of the runs differs in {line}"
                  for line in differing(group, "pretraining")]
        notes += teacher_notes(model, group)
        weights_of, seed_of = {}, {}
        for row in (row for row in group if row.run.get("weights")):
            weights = row.run["weights"]
            if weights_of.setdefault(row.run["model"], weights) != weights:
                notes.append(f"{model}: {row.run['model']} was trained again between its runs")
            first = seed_of.setdefault((row.strategy, weights), row.seed)
            if "{seed}" in model and first != row.seed:
                raise InputError(f"{model}, {row.strategy}: seeds {first} and {row.seed} have the "
                                 "same weights, and a copy is no independent seed: remove the runs "
                                 "of one of them")
    if old := sum("weights" not in row.run for row in rows):
        notes.append(f"{old} runs are of an earlier version, which did not record the weights they "
                     "started from: whether their models match is not known")
    return list(dict.fromkeys(notes))  # each once


def teacher_notes(model: str, rows: list[Row]) -> list[str]:
    """What the teachers of a model's pretraining runs mean for its intervals."""
    teachers = {}  # seed -> digests
    for row in rows:
        if teacher := (row.run.get("pretraining") or {}).get("teacher_weights"):
            teachers.setdefault(row.seed, set()).add(teacher)
    if mixed := [str(seed) for seed, found in teachers.items() if len(found) > 1]:
        return [f"{model}: its strategies had different teachers for seed {', '.join(mixed)}"]
    if len(teachers) > 1 and len(set().union(*teachers.values())) == 1:
        return [f"{model}: all its pretraining runs share one teacher, and the intervals are given "
                "that teacher; --pretrain '--teacher-seed {seed}' makes it vary"]
    return []


def verdict(pairs: list[dict]) -> str:
    """One sentence. It claims a winner only where Holm's adjusted p is below 0.05, and else says
    what could have been found."""
    if not pairs:
        return "Nothing was compared: that takes two strategies with a seed in common."
    judged = [pair for pair in pairs if pair["sd"] > 0]
    if not judged:
        return "No claim can be made: no comparison has two seeds whose differences vary."
    among = f"of {len(pairs)} comparison{'s' * (len(pairs) > 1)}"
    winners = [pair for pair in judged if pair["holm_p"] < ALPHA]
    if winners:
        claims = [f"on {pair['task']} with {pair['model']}, {better(pair)}" for pair in winners]
        return (f"For other seeds on these same examples, {len(winners)} {among} "
                f"show{'s' * (len(winners) == 1)} a difference (Holm-adjusted p < {ALPHA}): "
                f"{'; '.join(claims)}.")
    seeds = [pair["n"] for pair in judged]
    n = f"{min(seeds)} to {max(seeds)}" if min(seeds) < max(seeds) else str(seeds[0])
    effects = sorted(pair["mde"] for pair in judged)
    span = f"{effects[0]:.4f}"
    if len(effects) > 1:
        span += f" to {effects[-1]:.4f}, by comparison"
    smallest = show_p(min(pair["holm_p"] for pair in judged))
    return (f"No strategy is reliably better: none {among} is significant (smallest Holm-adjusted "
            f"p {smallest}), and with n = {n} seeds the smallest true difference that a single "
            f"test finds four times in five is {span}.")


def better(pair: dict) -> str:
    """`typhoon beats random by 0.0123 [0.0061, 0.0185]`, the better one first; and a warning where
    other dev examples might well say otherwise."""
    names, sign = (pair["strategy"], pair["baseline"]), 1
    if pair["mean"] < 0:
        names, sign = names[::-1], -1
    low, high = sorted((sign * pair["low"], sign * pair["high"]))
    said = f"{names[0]} beats {names[1]} by {sign * pair['mean']:.4f} [{low:.4f}, {high:.4f}]"
    if pair["bootstrap_low"] <= 0 <= pair["bootstrap_high"]:
        said += " (other examples may not bear it out: its multi-bootstrap interval contains 0)"
    return said


def analyse(folder: Path, *, epoch: str = "last", effect: float | None = None,
            metric: str | None = None, against: str | None = None, resamples: int = 1000) -> dict:
    """Everything a report says, as data: notes, cells (mean and sd of each metric), pairs, verdict,
    and what the constant answer scores. metric: the score, in place of the mean of a task's
    metrics; against: the one strategy to compare with. Raises InputError where there is none."""
    rows, notes = read_rows(folder, epoch, metric)
    notes += provenance_notes(rows)
    if against and against not in grouped(rows, "strategy"):
        raise InputError(f"--against {against}: {folder} has no such strategy, but "
                         f"{', '.join(grouped(rows, 'strategy'))}")
    if epoch == "last":  # the predictions kept are those of the last epoch
        notes += resample(rows, metric, resamples)
    cells, means = [], means_over_tasks(rows)
    every = rows + means
    for (task, model, strategy), group in grouped(every, "task", "model", "strategy").items():
        columns = {name: [row.metrics[name] for row in group] for name in group[0].metrics}
        columns["score"] = [row.score for row in group]
        cells.append({"task": task, "model": model, "strategy": strategy,
                      "seeds": [row.seed for row in group],
                      "metrics": {name: mean_sd(values) for name, values in columns.items()}})
    pairs = compare_all(rows if against else every, notes, against)
    for pair in pairs if effect else ():
        pair["seeds_needed"] = seeds_needed(pair["sd"], effect)
    constants = {row.task: row.run["baseline"] for row in rows if row.run["baseline"]}
    constants = {task: values | {"score": score(task, values, metric)}
                 for task, values in constants.items()}
    for row in means:
        if row.metrics.keys() <= constants.keys():
            floors = {task: constants[task]["score"] for task in row.metrics}
            constants[row.task] = floors | {"score": score(row.task, floors, None)}
    return {"runs": len(rows), "epoch": epoch, "effect": effect, "metric": metric,
            "against": against, "verdict": verdict(pairs), "notes": notes, "cells": cells,
            "pairs": pairs, "constants": constants}


# --- the report as text ---------------------------------------------------------------------------

READING = (
    "Scores are fractions, {score}; mean ± sd over seeds. A difference is strategy minus baseline, "
    "seed by seed; masked is the share of the tokens that the two really masked. The t interval "
    "covers other seeds on these same examples; the multi-bootstrap interval covers other seeds "
    "and other examples, roughly. p: paired t, sign flip, and Holm's adjustment of the former over "
    "every comparison of this report. d_z: mean / sd of the differences. MDE: the true difference "
    "one such test would find with 80% power, from an sd that is itself uncertain for few seeds.")
READING_MLM = (
    "The exam of train.py: random held-out positions, all of them [MASK]. The accuracy is "
    "compared; common, middle and rare are those on the word pieces that make up the commonest "
    "third of the text, the next and the rarest; log_likelihood is in nats a position. All of "
    "them: the higher, the better.")


def show(value: float, form: str = "z.4f") -> str:
    """The number in this format, `n/a` where there is none; z: no -0.0000."""
    return format(value, form) if math.isfinite(value) else "n/a"


def show_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else show(p, ".3f")


def show_interval(low: float, high: float) -> str:
    if high - low <= 1e-12:
        return "no spread"
    return "n/a" if math.isnan(low) else f"[{low:+z.4f}, {high:+z.4f}]"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell_table(cells: list[dict], constant: dict | None, metric: str | None) -> str:
    """A row per strategy, a column per metric, and last what the constant answer scores."""
    task, names = cells[0]["task"], list(cells[0]["metrics"])
    if len(scored(task, names[:-1], metric)) == 1:
        names.pop()  # the score is one of the metrics
    rows = []
    for cell in cells:
        numbers = [f"{show(mean)} ± {show(sd)}" for mean, sd in map(cell["metrics"].get, names)]
        rows.append([cell["strategy"], str(len(cell["seeds"])), *numbers])
    if constant:
        title = "frequency alone" if task == "mlm" else "the constant answer"
        rows.append([title, "", *(show(constant.get(name, math.nan)) for name in names)])
    return markdown_table(["strategy", "n", *names], rows)


def pair_table(pairs: list[dict], effect: float | None) -> str:
    """A row per comparison."""
    header = ["strategy − baseline", "n", "masked", "difference", "95% t interval",
              "multi-bootstrap", "t", "p", "sign-flip p", "Holm p", "d_z", "MDE"]
    if effect:
        header.append(f"seeds for {effect:g}")
    rows = []
    for pair in pairs:
        rows.append([
            f"{pair['strategy']} − {pair['baseline']}", str(pair["n"]),
            f"{show(pair['masked'], '.2%')}, {show(pair['baseline_masked'], '.2%')}",
            show(pair["mean"], "+z.4f"), show_interval(pair["low"], pair["high"]),
            show_interval(pair["bootstrap_low"], pair["bootstrap_high"]), show(pair["t"], ".2f"),
            show_p(pair["p"]), show_p(pair["sign_flip_p"]), show_p(pair["holm_p"]),
            show(pair["dz"], ".2f"), show(pair["mde"]) if pair["sd"] > 0 else "n/a"])
        if effect:
            needed = pair["seeds_needed"]
            rows[-1].append("> 1,000,000" if needed == math.inf else show(needed, ",.0f"))
    return markdown_table(header, rows)


def forest(pairs: list[dict], width: int = 41) -> str:
    """A line per pair: `-` spans the t interval, `o` is the mean difference, `|` is zero; all pairs
    of the group share one scale."""
    ends = [end for pair in pairs for end in (pair["mean"], pair["low"], pair["high"])]
    scale = max(abs(end) for end in ends if math.isfinite(end)) or 1.0
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
    axis = f"{-scale:+.4f}{'0':^{width - 14}}{scale:+.4f}"
    return "\n".join([*lines, f"{'':{margin}}  {axis}"])


def to_markdown(report: dict) -> str:
    """The report as a person reads it, in Markdown and on the terminal."""
    epochs = {"last": "last epoch",
              "best": "best epoch, chosen on the dev set it is scored on: optimistic"}
    reading = READING.format(score=report["metric"] or "the mean of a task's metrics")
    parts = ["# Report", f"**Verdict.** {report['verdict']}",
             f"{report['runs']} runs; metrics of the {epochs[report['epoch']]}. {reading}"]
    for task, model in dict.fromkeys((cell["task"], cell["model"]) for cell in report["cells"]):
        def here(found):
            return (found["task"], found["model"]) == (task, model)

        cells = list(filter(here, report["cells"]))
        pairs = list(filter(here, report["pairs"]))
        parts.append(f"## {task}, {model}")
        if task == "mlm":
            parts.append(READING_MLM)
        parts.append(cell_table(cells, report["constants"].get(task), report["metric"]))
        if any(len(cell["seeds"]) == 1 for cell in cells):
            parts.append("One seed has no sd and gives no interval and no test.")
        if pairs:
            parts += [pair_table(pairs, report["effect"]), f"```text\n{forest(pairs)}\n```"]
        parts += [f"{pair['strategy']} − {pair['baseline']}: all {pair['n']} differences are "
                  f"{pair['mean']:+z.4f}; without a spread, an interval and a t test say nothing."
                  for pair in pairs if pair["sd"] == 0]
    if report["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
    return "\n\n".join(parts) + "\n"


def to_csv(report: dict) -> str:
    """A row per cell and metric, without a baseline, and one per pair: metric `score`, mean and sd
    of the differences."""
    rows = [{"task": cell["task"], "model": cell["model"], "strategy": cell["strategy"],
             "baseline": None, "metric": metric, "n": len(cell["seeds"]), "mean": mean, "sd": sd}
            for cell in report["cells"] for metric, (mean, sd) in cell["metrics"].items()]
    rows += [{"metric": "score"} | pair for pair in report["pairs"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row),
                            lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain(rows))
    return text.getvalue()


def plain(value):
    """For JSON and CSV: six significant digits, which every machine agrees on, and None where there
    is no number."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_report(folder: Path, **options) -> str:
    """Analyses a folder and writes report.md, report.csv and report.json into it; options as for
    `analyse`. Returns the Markdown."""
    report = analyse(folder, **options)
    text = to_markdown(report)
    write_atomic(folder / "report.md", text)
    write_atomic(folder / "report.csv", to_csv(report))
    write_atomic(folder / "report.json", json.dumps(plain(report), indent=1) + "\n")
    return text


# --- run files ------------------------------------------------------------------------------------

EXAM = ("accuracy", "common", "middle", "rare", "log_likelihood")
METRICS = {name: task.metrics for name, task in glue.TASKS.items()} | {"mlm": EXAM}
DEV_SETS = ("dev", "dev_mismatched")
FIELDS = {"task": str, "model": str, "strategy": str, "seed": int, "args": dict, "last": dict,
          "best": dict, "baseline": dict, "seconds": (int, float)}


def scored(task: str, names: list[str], metric: str | None) -> list[str]:
    """Which metrics' mean is the score: `metric`, or the exam's accuracy, or all of a GLUE task."""
    wanted = metric or ("accuracy" if task == "mlm" else None)
    return [name for name in names if wanted in (None, name.removesuffix("_mm"))]  # _mm: MNLI's


def score(task: str, metrics: dict[str, float], metric: str | None) -> float:
    values = [metrics[name] for name in scored(task, list(metrics), metric)]
    return sum(values) / len(values) if values else math.nan


def answers(run: dict, dev_set: str) -> list[np.ndarray]:
    """What a run answered to a dev set: predictions and labels (m,); in the exam right and count
    (m, 3) and log_likelihood (m,). Raises InputError on damaged ones."""
    exam = run["task"] == "mlm"
    names = ("right", "count", "log_likelihood") if exam else ("predictions", "labels")
    try:
        columns = [np.array(run[dev_set][name], dtype=float) for name in names]
        m = len(columns[0])
        shapes = [(m, 3), (m, 3), (m,)] if exam else [(m,), (m,)]
        sound = m > 0 and [column.shape for column in columns] == shapes
    except (KeyError, TypeError, ValueError):  # a column is missing, ragged, or holds no numbers
        sound = False
    if not sound:
        raise InputError("its dev predictions are damaged")
    return columns


def read_run(path: Path) -> dict:
    """A run of glue.py, or an exam.json of train.py. Raises InputError, without the file's name, on
    anything else."""
    try:
        run = read_json(path)
    except InputError:
        raise InputError("not JSON") from None
    run = {"best": run.get("last"), "baseline": {}} | run  # the exam is taken once
    sound = all(isinstance(run.get(name), kind) for name, kind in FIELDS.items()) \
        and all(isinstance(value, (int, float)) for value in run["baseline"].values())
    if not sound or run["task"] not in METRICS:
        raise InputError("not a run of glue.py")
    for name in DEV_SETS:
        if name in run:
            answers(run, name)
    return run


def make_row(run: dict, epoch: str, metric: str | None) -> Row:
    """A run as a line of the table. Raises InputError where a metric is not a number."""
    metrics = {name: value for name, value in run[epoch].items() if name != "epoch"}
    if {name.removesuffix("_mm") for name in metrics} != set(METRICS[run["task"]]):
        raise InputError(f"its metrics are not those of {run['task']}")
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError(f"its {name} is not a finite number")
    masked = run.get("masked", (run.get("adaptation") or {}).get("masked"))
    return Row(run["task"], run.get("pattern") or run["model"], run["strategy"], run["seed"],
               score=score(run["task"], metrics, metric), metrics=metrics,
               masked=math.nan if masked is None else masked, run=run)


def read_rows(folder: Path, epoch: str, metric: str | None) -> tuple[list[Row], list[str]]:
    """The table of a folder's runs, and a note on every file that could not be used.

    Raises InputError where there is nothing to report, and where two files claim the same run:
    which of them to believe is not for a program to choose."""
    rows, notes, claimed = [], [], {}
    for path in sorted(path for path in folder.glob("*.json") if path.name != "report.json"):
        if path.name.endswith(".error.json"):
            notes.append(f"{path.name.removesuffix('.error.json')} failed")
            continue
        try:
            row = make_row(read_run(path), epoch, metric)
        except InputError as error:
            notes.append(f"{path.name} is left out: {error}")
            continue
        cell = f"{row.task}, {row.model}, {row.strategy}, seed {row.seed}"
        if cell in claimed:
            raise InputError(f"{claimed[cell]} and {path.name} both claim to be {cell}: remove one "
                             "of them")
        claimed[cell] = path.name
        if row.run.get("collapsed"):
            notes.append(f"{path.stem} collapsed: it gives every dev example the same answer")
        rows.append(row)
    if not rows:
        raise InputError(f"{folder} holds no finished run: python stats.py sweep --out {folder} "
                         "makes them")
    kept = sorted((row for row in rows if not math.isnan(row.score)), key=by_order)
    if not kept:
        known = dict.fromkeys(name for row in rows for name in METRICS[row.task])
        raise InputError(f"--metric {metric}: no task here has it: choose from {', '.join(known)}")
    without = sorted({row.task for row in rows} - {row.task for row in kept})
    return kept, notes + [f"{task} has no {metric} and is left out" for task in without]


def resample(rows: list[Row], metric: str | None, resamples: int) -> list[str]:
    """Gives each row its scores on resampled dev examples, in place. Returns a note for each task
    and model whose runs did not all keep their answers to the same examples."""
    notes = []
    for (task, model), group in grouped(rows, "task", "model").items():
        asked = "count" if task == "mlm" else "labels"
        sets = [[row.run[name][asked] for name in DEV_SETS if name in row.run] for row in group]
        if all(found and found == sets[0] for found in sets):
            for row in group:
                row.resampled = resampled_task_scores(row.run, metric, resamples)
        else:
            notes.append(f"{task}, {model}: no multi-bootstrap, the runs did not keep predictions "
                         "on the same dev examples")
    return notes


def resampled_task_scores(run: dict, metric: str | None, resamples: int) -> np.ndarray:
    """(R,): a run's score on resampled dev sets. MNLI has two sets, each with samples of its own,
    and their mean counts. Of the exam whole windows are drawn: one text's positions are alike."""
    task = run["task"]

    def task_score(*columns):
        found = train.exam_metrics(*columns) if task == "mlm" else glue.metrics(task, *columns)
        return score(task, found, metric)

    return np.mean([resampled_scores(task_score, *answers(run, name), resamples=resamples,
                                     seed=zlib.crc32(f"{task} {name}".encode()))
                    for name in DEV_SETS if name in run], axis=0)


# --- the grid -------------------------------------------------------------------------------------

PRESETS = {
    "typhoon": {  # [T] v2: 2 × 3 × 3 × 5 = 90 runs; 12 comparisons of Typhoon on one task
        "tasks": ["mrpc", "cola"],
        "models": ["huawei-noah/TinyBERT_General_4L_312D", "distilbert-base-uncased",
                   "bert-base-uncased"],
        "strategies": ["random", "whole-word", "typhoon"],
        "seeds": [0, 1, 2, 3, 4]},
    "entropy": {  # [E]: which strategy pretrains better, with and without distillation
        "tasks": glue.NINE,
        "models": ["runs/{masking}-{seed}"],
        "strategies": ["random", "entropy", "self-entropy",
                       "random-kd", "entropy-kd", "self-entropy-kd"],
        "seeds": [0, 1, 2]},
}
PRETRAINING = {name: ["--masking", name] for name in STRATEGIES}  # what {masking} stands for
PRETRAINING |= {f"{name}-kd": ["--masking", name, "--kd-weight", "0.5"] for name in STRATEGIES}
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """A cell of the grid. model: a name, a directory, or a pattern with {masking} and {seed};
    strategy: a name or FILE.py:CLASS."""
    task: str
    model: str
    strategy: str
    seed: int

    @property
    def label(self) -> str:
        return strategy_label(self.strategy)

    @property
    def name(self) -> str:
        """`mrpc--runs-masking-seed--entropy--3`: the run's file, without .json."""
        return "--".join([self.task, slug(self.model), self.label, str(self.seed)])

    @property
    def checkpoint(self) -> str:
        return self.model.replace("{masking}", self.label).replace("{seed}", str(self.seed))

    def command(self, output: Path, extra: list[str], script: Path = HERE / "glue.py") -> list[str]:
        """A model that {masking} pretrained is not adapted again. The pattern is passed on: by it
        the report knows the checkpoints of all seeds as one model."""
        command = [sys.executable, str(script), "--task", self.task, "--model", self.checkpoint,
                   "--seed", str(self.seed), "--json", str(output)]
        if self.checkpoint != self.model:
            command += ["--pattern", self.model]
        if "{masking}" in self.model:
            command += ["--label", self.label]
        elif self.strategy != "none":
            command += ["--adapt", self.strategy]
        return [*command, *extra]


def slug(model: str) -> str:
    """A model in a file name: `runs/{masking}-{seed}` becomes `runs-masking-seed`."""
    return re.sub(r"[^\w.]+", "-", model).strip("-")


def plan(*, tasks: list[str], models: list[str], strategies: list[str], seeds: list[int]):
    """The runs of a grid, in an order that finishes whole comparisons early. Raises InputError on
    a brace or a character that a name cannot have, and where two runs would share a name."""
    runs = [Run(task, model, strategy, seed) for model in models for task in tasks
            for seed in seeds for strategy in strategies]
    for run in runs:
        if re.search(r"[{}]", run.checkpoint):
            raise InputError(f"--models {run.model}: a pattern holds {{masking}} and {{seed}} and "
                             "no other brace")
        if not re.fullmatch(r"[\w.+-]+", run.label):
            raise InputError(f"--strategies {run.strategy}: a name has letters, digits, and "
                             ". + - _ only")
        if run.task == "mlm" and "{masking}" not in run.model:
            raise InputError(f"--tasks mlm compares pretraining, and --models {run.model} has no "
                             "{masking}: give a pattern such as 'runs/{masking}-{seed}'")
    name, count = Counter(run.name for run in runs).most_common(1)[0]
    if count > 1:
        raise InputError(f"two runs of this grid would both write {name}.json: name each value "
                         "once")
    return runs


def weights_now(checkpoint: str) -> str | None:
    """The digest of a model directory's weights as they are; None where there are none."""
    files = [Path(checkpoint) / name for name in ("model.safetensors", "pytorch_model.bin")]
    return weights_digest(checkpoint) if any(file.exists() for file in files) else None


def finished_runs(runs: list[Run], folder: Path) -> dict[Run, dict]:
    """The results that need not be made: they can be read, and their model has not been trained
    again since."""
    weights = {name: weights_now(name) for name in {run.checkpoint for run in runs}}
    done = {}
    for run in runs:
        with contextlib.suppress(InputError):  # no file, or a damaged one
            found = read_run(folder / f"{run.name}.json")
            now = weights[run.checkpoint]
            if now is None or found.get("weights") in (None, now):
                done[run] = found
    return done


# --- the sweep ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """A process to run: done when `output` is there; a failure is recorded in `error`."""
    command: list[str]
    output: Path
    error: Path
    turn: int = 0  # 0: it trains a teacher, 1: it needs none, 2: it waits for a teacher of turn 0


def pretraining_jobs(runs: list[Run], folder: Path, *, extra: list[str] = (),
                     arms: dict | None = None, done: dict | None = None,
                     parse=train.parse_args) -> list[Job]:
    """A job for every checkpoint of a {masking} pattern that is not there yet. train.py writes
    model.safetensors last; a directory without it was interrupted, and goes on.

    extra: options for all, in which {seed} is replaced; arms: {strategy: its options}; done: the
    finished runs; parse: how train.py reads its options. Raises InputError on what that refuses,
    and where a checkpoint, or the model of a finished run, was pretrained with other options: it is
    no run of this grid."""
    known = PRETRAINING | (arms or {})
    jobs, teachers = {}, set()
    for run in (run for run in runs if "{masking}" in run.model):
        weights = Path(run.checkpoint) / "model.safetensors"
        settings = weights.parent / "train_args.json"
        arm = known.get(run.strategy)
        if run.strategy != run.label:  # FILE.py:CLASS
            arm = ["--masking", run.strategy]
        if weights.exists() and not (arm and settings.exists()):
            continue  # made by other means: it is taken as it is
        if not arm:
            raise InputError(f"--pretrain knows no strategy {run.strategy}: choose from "
                             f"{', '.join(known)}, FILE.py:CLASS, or give an --arm")
        common = [option.replace("{seed}", str(run.seed)) for option in extra]
        options = [*common, *arm, "--seed", str(run.seed)]
        if not weights.exists():
            options += ["--out", run.checkpoint]
            options += ["--resume", run.checkpoint] if settings.exists() else []
        asked = parsed(parse, options, "train.py")
        if settings.exists():
            check_same(run.checkpoint, read_json(settings), vars(asked))
        if result := (done or {}).get(run, {}).get("pretraining"):
            check_same(f"the model of {run.name}.json", result, vars(asked))
        wants_teacher = not asked.teacher and (
            find_strategy(asked.masking).needs_teacher or asked.kd_weight > 0)
        teacher = shlex.join(common) if wants_teacher else None  # what its weights depend on
        if not weights.exists() and run.checkpoint not in jobs:
            turn = 1
            if wants_teacher:
                turn = 2 if teacher in teachers else 0
            jobs[run.checkpoint] = Job(
                [sys.executable, str(HERE / "train.py"), *options], weights,
                folder / f"pretrain--{slug(run.checkpoint)}.error.json", turn)
        teachers.add(teacher)
    return list(jobs.values())


def parsed(parse, options: list[str], program: str) -> argparse.Namespace:
    """What another program's `parse` makes of its options. Raises InputError on what it refuses."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(options)
    except SystemExit as end:
        if not end.code:
            raise  # --help
        reason = said.getvalue().strip().partition(": ")[2]  # without the name of this program
        raise InputError(f"the options for {program}: {reason}") from None


CHILD = """
import os, runpy, signal, sys, threading
def end_with_the_sweep():
    os.read(0, 1)  # returns when the pipe's other end closes: with the sweep, even on kill -9
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end_with_the_sweep, daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def finish(job: Job, returncode: int, stderr: str) -> list[str]:
    """Records how a job ended. Returns why it failed; nothing where its output is there."""
    for left_over in job.output.parent.glob(f".{job.output.name}.*"):  # of a killed attempt
        left_over.unlink(missing_ok=True)
    if returncode == 0 and job.output.exists():
        job.error.unlink(missing_ok=True)
        return []
    reason = (stderr.strip().splitlines() or ["it said nothing"])[-1]
    record = {"error": reason, "command": job.command, "returncode": returncode}
    write_atomic(job.error, json.dumps(record) + "\n")
    return [reason]


def run_jobs(jobs: list[Job], parallel: int, bar: tqdm) -> list[str]:
    """Runs the jobs, `parallel` at once, each a process of its own. Returns why each that failed
    did; a failure stops no other. If this process ends, however it does, the jobs in flight end
    with it; they are the only ones to run again."""
    parallel = max(1, min(parallel, len(jobs)))
    threads = max(1, (os.cpu_count() or 1) // parallel)  # jobs that share cores must not fight
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    reader, writer = os.pipe()  # the writing end closes with this process: see CHILD

    def run(job):
        return job, subprocess.run(
            [sys.executable, "-c", CHILD, *job.command[1:]], env=environment, stdin=reader,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")

    pool, failures = ThreadPoolExecutor(parallel), []
    try:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            job, ended = future.result()
            failures += finish(job, ended.returncode, ended.stderr)
            bar.set_postfix(failed=len(failures))
            bar.update()
    finally:
        os.close(writer)  # after an interruption: ends the jobs in flight
        pool.shutdown(cancel_futures=True)  # and waits for their end
        os.close(reader)
    return failures


def copy_exam(run: Run, output: Path) -> list[str]:
    """Copies the exam of a pretrained model, as a run of this grid. Returns why it could not."""
    path = Path(run.checkpoint) / "exam.json"
    try:
        exam = read_run(path)
    except InputError:
        return [f"{path} is not there, or damaged"]
    cell = {"model": run.checkpoint, "strategy": run.label, "pattern": run.model, "seed": run.seed,
            "weights": weights_now(run.checkpoint)}
    write_atomic(output, json.dumps(exam | cell) + "\n")
    return []


def sweep(runs: list[Run], folder: Path, *, extra: list[str] = (), parallel: int = 1,
          pretraining: list[Job] = (), script: Path = HERE / "glue.py") -> list[str]:
    """Pretrains, then makes what is missing of the grid: folder/NAME.json. Returns the reason of
    each failure.

    A file is there whole or not at all (glue.py renames it into place), so a sweep killed at any
    moment goes on where it was. A file that cannot be read, or whose model has been trained again
    since, is made again."""
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(pretraining) + len(runs), desc="sweep", unit="run", smoothing=0) as bar:
        pretraining = sorted(pretraining, key=lambda job: job.turn)
        failures = run_jobs([job for job in pretraining if job.turn < 2], parallel, bar)
        failures += run_jobs([job for job in pretraining if job.turn == 2], parallel, bar)
        done = finished_runs(runs, folder)  # now that the models are what they will be
        bar.update(len(done))
        jobs = []
        for run in [run for run in runs if run not in done]:
            output = folder / f"{run.name}.json"
            if output.exists():
                bar.write(f"{output} is made again: it is damaged, or {run.checkpoint} has been "
                          "trained since")
                output.unlink()  # else a failed run would seem to have made it
            if run.task == "mlm":
                failures += copy_exam(run, output)
                bar.update()
            else:
                jobs.append(Job(run.command(output, extra, script), output,
                                folder / f"{run.name}.error.json"))
        return failures + run_jobs(jobs, parallel, bar)


def dry_run(runs: list[Run], folder: Path, parallel: int, pretraining: list[Job],
            downloads: list[str]):
    """Prints every run with its state, what would be downloaded, and the time that is left."""
    done = finished_runs(runs, folder)
    lines = [f"pretrain  {job.output.parent}" for job in pretraining]
    for run in runs:
        state = "failed" if (folder / f"{run.name}.error.json").exists() else "missing"
        lines.append(f"{'done' if run in done else state:8}  {run.name}")
    lines += [f"download  {name}" for name in downloads]
    missing, time_left = len(runs) - len(done), "no estimate before the first run is finished"
    if done:
        seconds = missing * mean_sd([result["seconds"] for result in done.values()])[0] / parallel
        time_left = (f"about {seconds / 60:.0f} minutes with --jobs {parallel}, from {len(done)} "
                     "finished runs")
    print(*lines, f"{missing} of {len(runs)} runs to do: {time_left}"
          + "; pretraining not counted" * bool(pretraining), sep="\n")


# --- command line ---------------------------------------------------------------------------------

def strategy(text: str) -> str:
    """An argparse type: any name, or FILE.py:CLASS where that can be read."""
    if ":" in text:
        find_strategy(text)
    return text


def arm(text: str) -> tuple[str, str]:
    """An argparse type: NAME=OPTIONS."""
    name, _, options = text.partition("=")
    if not options or name in PRETRAINING:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME='OPTIONS' with a name of its own")
    return name, options


def options_of(option: str, text: str | list[str], *taken: str) -> list[str]:
    """The options for another program that `option` was given, split as a shell would. Raises
    InputError where that fails, or one of them is `taken`: the sweep sets it."""
    try:
        options = shlex.split(text) if isinstance(text, str) else text
    except ValueError as error:
        raise InputError(f"{option} {text}: {error}, so where do its options end?") from None
    for name in [word.split("=")[0] for word in options]:
        if name in taken:
            raise InputError(f"{name} is set by the sweep: leave it out of what {option} passes on")
    return options


def parse_args(argv=None):
    """The arguments; `extra` holds what follows `--`, for glue.py."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(prog="stats.py", description="Compare masking strategies over seeds.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{sweep,report}")

    add = commands.add_parser(
        "sweep", help="run a grid; what is done is skipped",
        epilog="What follows -- goes to glue.py: sweep --preset typhoon -- --epochs 2. A finished "
               "run that was made with other options is refused.").add_argument
    add("--preset", choices=list(PRESETS), help="a paper's grid; the next four replace parts of it")
    add("--tasks", nargs="+", choices=[*glue.NINE, "mlm"], metavar="TASK",
        help=f"{' '.join(glue.NINE)}, or mlm, the held-out exam of train.py")
    add("--models", nargs="+",
        help="names or directories; runs/{masking}-{seed} compares pretraining strategies")
    add("--strategies", nargs="+", type=strategy,
        help="of adaptation, FILE.py:CLASS, or none; what {masking} in --models stands for")
    add("--seeds", nargs="+", type=number(int, low=0), help="(default: 0 1 2 3 4)")
    add("--out", type=Path, help="folder of the JSON files (default: runs/sweep[-PRESET])")
    add("--jobs", type=number(int, low=1), default=1, help="runs at once")
    add("--shard", metavar="I/N", help="only every N-th run, from the I-th on: for a job array")
    add("--dry-run", action="store_true", help="list the runs, the downloads, the time they take")
    add("--pretrain", nargs="?", const="", metavar="OPTIONS",
        help="first make the models of a {masking} pattern with train.py and these options, in "
             "which {seed} is replaced: '--steps 2000 --teacher-seed {seed}'")
    add("--arm", type=arm, action="append", default=[], metavar="NAME=OPTIONS",
        help="one more strategy: pretraining with these options, "
             "kd8='--masking random --kd-weight 0.8'")

    add = commands.add_parser("report", help="the statistics of a folder of runs").add_argument
    add("folder", type=Path, help="where sweep or glue.py --json wrote")
    add("--epoch", choices=["last", "best"], default="last",
        help="best is chosen on the dev set: optimistic")
    add("--effect", type=number(float, above=0), help="count the seeds that would find it: 0.01")
    add("--metric", help="compare by this one, such as f1 (default: the mean of a task's metrics)")
    add("--against", metavar="STRATEGY",
        help="compare only with this one, on single tasks: they are the family for Holm")
    args = parser.parse_args(argv[:split])
    args.extra = argv[split + 1:]
    return args


def grid(args) -> list[Run]:
    """The runs that the arguments ask for. Raises InputError where one of the four lists is
    missing, or --shard is wrong."""
    lists = {"seeds": [0, 1, 2, 3, 4]} | PRESETS.get(args.preset, {})
    for name in ("tasks", "models", "strategies", "seeds"):
        if given := getattr(args, name):
            lists[name] = given
    if args.arm:
        lists["strategies"] = list(dict.fromkeys([*lists.get("strategies", []), *dict(args.arm)]))
    missing = [f"--{name}" for name in ("tasks", "models", "strategies") if name not in lists]
    if missing:
        raise InputError(f"{' and '.join(missing)} missing: give them, or --preset "
                         f"{' or '.join(PRESETS)}")
    runs = plan(**lists)
    if not args.shard:
        return runs
    # of the whole grid, not of what is missing now: jobs that start at different times must
    # neither share a run nor lose one
    first, _, step = args.shard.partition("/")
    if not (first.isdecimal() and step.isdecimal() and 1 <= int(first) <= int(step)):
        raise InputError(f"--shard {args.shard}: write it as 1/4, 2/4, 3/4, 4/4")
    if args.pretrain is not None:
        raise InputError("--pretrain with --shard would train a model twice: first sweep "
                         "--pretrain, then the shards")
    return runs[int(first) - 1::int(step)]


def check_models(runs: list[Run], pretraining: list[Job]) -> list[str]:
    """The models that come from the hub. Raises InputError on any other that has no weights and
    that `pretraining` does not make."""
    made, from_hub = {str(job.output.parent) for job in pretraining}, {}
    for run in (run for run in runs if str(Path(run.checkpoint)) not in made):
        path = Path(run.checkpoint)
        hub_name = run.checkpoint == run.model and len(path.parts) <= 2  # NAME or OWNER/NAME
        if hub_name and not Path(path.parts[0]).exists():
            from_hub[run.checkpoint] = None
        elif not weights_now(run.checkpoint):
            raise InputError(f"{run.checkpoint} is not there, or has no weights: train.py --out "
                             f"{run.checkpoint} or --pretrain makes it")
        if run.task == "mlm" and not (path / "exam.json").exists():
            raise InputError(f"{run.checkpoint} has no exam.json, so an earlier version made it: "
                             "pretrain again, under another name")
    return list(from_hub)


def sweep_command(args):
    """Checks what can be known beforehand, options for glue.py and train.py by their own rules;
    then sweeps."""
    runs = grid(args)
    folder = args.out or Path("runs") / "-".join(filter(None, ("sweep", args.preset)))
    options_of("--", args.extra, "--task", "--model", "--seed", "--adapt", "--label", "--pattern",
               "--json")
    done = finished_runs(runs, folder)
    downloads = {}
    for run in (run for run in runs if run.task != "mlm"):
        command = run.command(folder / f"{run.name}.json", args.extra)
        asked = vars(parsed(glue.parse_args, command[2:], "glue.py"))
        if run in done:
            check_same(f"{folder / run.name}.json", done[run]["args"], asked)
        if not (Path(asked["data_dir"]) / glue.TASKS[run.task].folder).is_dir():
            downloads[f"the data of {run.task}, which are not in {asked['data_dir']}"] = None
    pretraining = []
    if args.pretrain is not None:
        if not any("{masking}" in run.model for run in runs):
            raise InputError("--pretrain makes the models of a pattern, and --models has none with "
                             "{masking}")
        taken = ("--seed", "--out", "--resume")
        options = options_of("--pretrain", args.pretrain, "--masking", "--kd-weight", *taken)
        arms = {name: options_of("--arm", text, *taken) for name, text in args.arm}
        # train.py's full check downloads the corpus, its parser alone does not
        parse = train.make_parser().parse_args if args.dry_run else train.parse_args
        pretraining = pretraining_jobs(runs, folder, extra=options, arms=arms, done=done,
                                       parse=parse)
    models = check_models(runs, pretraining)
    if args.dry_run:
        return dry_run(runs, folder, args.jobs, pretraining, [*models, *downloads])
    # SIGTERM as an exception, so that run_jobs ends its processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failures = sweep(runs, folder, extra=args.extra, parallel=args.jobs, pretraining=pretraining)
    if failures:
        reasons = [f"{count} × {reason}" for reason, count in Counter(failures).most_common(3)]
        raise RunError(f"{len(failures)} failed: {'; '.join(reasons)}. {folder}/*.error.json hold "
                       "the commands, and the same sweep tries them again")
    print(f"{len(runs)} runs in {folder}: python stats.py report {folder}")


def main(argv=None):
    args = parse_args(argv)
    if args.command == "sweep":
        sweep_command(args)
    else:
        print(write_report(args.folder, epoch=args.epoch, effect=args.effect, metric=args.metric,
                           against=args.against), end="")


if __name__ == "__main__":
    run_cli(main)
