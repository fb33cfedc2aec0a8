"""Statistics: is one masking strategy better than another, or was it the seed?

A single fine-tuning run proves little: [T] (Typhoon, arXiv 2303.15619 v2) found that the advantage
of one run did not survive five seeds. So `sweep` runs a grid of tasks, models, strategies and
seeds, one JSON file a run, and `report` compares the strategies seed by seed and claims no more
than the numbers do. The ideas come first, down to the report; then what serves them: run files,
sweep, command line.

    python stats.py sweep --preset typhoon --jobs 2        # [T]'s 90 runs; kill it, start it again
    python stats.py sweep --preset entropy --pretrain      # [E]: pretrain 18 models, then GLUE
    python stats.py sweep --tasks mlm --models 'runs/{masking}-{seed}' --pretrain \\
        --strategies random entropy                        # train.py's held-out exam, no GLUE
    python stats.py report runs/sweep-typhoon --effect 0.01    # and the seeds that would find 0.01
    python stats.py report runs/sweep-typhoon --against typhoon    # [T]'s 12 comparisons alone

Scores and differences are fractions, not percent: 0.01 is one point. Shapes: n seeds, m dev
examples (of the task mlm: held-out windows), R resamples.
"""
import argparse
import html
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, groupby, product
from operator import attrgetter, itemgetter
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

import glue
import train
from masking import STRATEGIES, strategy_label
from model import (InputError, Parser, RunError, find_pretrained, number, read_json, run_cli,
                   weight_file, weights_digest, write_atomic)

ALPHA, POWER, LEVEL = 0.05, 0.8, 0.95


# --- Student's t ----------------------------------------------------------------------------------

def mean_sd(values) -> tuple[float, float]:
    """Mean and sample standard deviation; the sd of one value is nan. A spread below 1e-10 of the
    values counts as none: rounding leaves it (0.81 - 0.80 is not quite 0.83 - 0.82)."""
    values = [float(value) for value in values]
    mean = math.fsum(values) / len(values)  # fsum rounds once: the same digits on every machine
    if len(values) < 2:
        return mean, math.nan
    # n - 1: the values lie closer to their own mean than to the true one, which costs one of them
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, 0.0 if sd <= 1e-10 * max(map(abs, values)) else sd


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


def least(reached) -> float:
    """The least x > 0 with reached(x), which holds from there on; by bisection, to the last bit."""
    low, high = 0.0, 1.0
    while not reached(high):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


@cache
def t_critical(df: int, alpha: float) -> float:
    """The |t| that a two-sided test at level alpha must exceed: 2.776 for df = 4, alpha = 0.05."""
    return least(lambda t: t_tail(t, df) <= alpha)


@cache
def detectable_shift(n: int, power: float, alpha: float) -> float:
    """The shift √n · mean / sd at which the two-sided t test on n pairs has this power."""
    threshold = t_critical(n - 1, alpha)
    return least(lambda shift: t_tail(threshold, n - 1, shift) >= power)


# --- paired statistics: a and b hold one score per seed, the same seeds in the same order ---------

def paired_t_test(a, b) -> tuple[float, float]:
    """t = mean(d) / (sd(d) / √n) of d = a - b, and its two-sided p with n - 1 df (Student 1908).

    >>> t, p = paired_t_test([3, 5, 7], [2, 3, 4])  # differences 1, 2, 3: mean 2, sd 1, t = 2 √3
    >>> round(t, 3), round(p, 3)
    (3.464, 0.074)

    One seed gives (nan, nan), and so do equal differences: without a spread there is nothing to
    judge them by, and p = 0 would be a claim. Raises ValueError when a and b differ in length."""
    # pairing: what a seed gives to both (data order, a lucky head) cancels in the difference
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, sd = mean_sd(differences)
    if not sd > 0:
        return math.nan, math.nan
    t = mean / (sd / math.sqrt(len(differences)))
    return t, t_tail(t, len(differences) - 1)  # the sd was estimated, with n - 1 degrees of freedom


def confidence_interval(differences, level: float = LEVEL) -> tuple[float, float]:
    """Student's interval for the mean difference, mean ± t* sd / √n; (nan, nan) without a spread.
    It covers the mean over all seeds in `level` of such experiments, if differences are normal."""
    mean, sd = mean_sd(differences)
    if not sd > 0:
        return math.nan, math.nan
    half = t_critical(len(differences) - 1, 1 - level) * sd / math.sqrt(len(differences))
    return mean - half, mean + half


def sign_flip_test(differences, flips: int = 100_000, seed: int = 0) -> float:
    """Two-sided p of Fisher's randomisation test (1935): the share of sign patterns as extreme.

    If the two names meant nothing, each difference could as well have had the other sign: of all
    2^n patterns of signs, how many have an |sum| at least as large as the one seen? That assumes no
    normality, but the pattern seen and its mirror image always count, so that p is never below
    2 / 2^n: with 5 seeds 0.0625, however large the difference. Above 20 seeds: `flips` random
    patterns, and the one seen with them, so that p is never 0 (Phipson and Smyth 2010). nan where
    a difference is nan."""
    differences = np.asarray(differences, dtype=float)
    if np.isnan(differences).any():
        return math.nan
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


def minimum_detectable_effect(differences, power: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest true mean difference that a paired t test with this n and sd finds so often.

    Exact if they are normal, but only as good as the sd, and before any correction for many
    comparisons. nan without a spread."""
    n, (_, sd) = len(differences), mean_sd(differences)
    return detectable_shift(n, power, alpha) * sd / math.sqrt(n) if sd > 0 else math.nan


def seeds_needed(sd: float, effect: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """The least n >= 2 that finds `effect` so often; nan without an sd, inf past a million."""
    if not sd > 0:
        return math.nan
    # a known sd would ask for ((z + z') sd / effect)² seeds, an estimated one for a few more
    z, z_power = (NormalDist().inv_cdf(share) for share in (1 - alpha / 2, power))
    n = max(2, math.ceil(((z + z_power) * sd / effect) ** 2))
    if n > 1_000_000:
        return math.inf
    while t_tail(t_critical(n - 1, alpha), n - 1, math.sqrt(n) * effect / sd) < power:
        n += 1
    return n


# --- the dev set is a sample too ------------------------------------------------------------------

def multi_bootstrap(a: np.ndarray, b: np.ndarray, level: float = LEVEL, seed: int = 0):
    """(low, high) of the mean difference over other seeds *and* other examples: the multi-bootstrap
    for paired seeds (Sellam et al. 2022, 2106.16163). (nan, nan) for one seed.

    a, b (n, R): row s, column r is the score of seed s on the r-th resample of the dev examples,
    the same examples on both sides (`resampled_scores`).

    Approximate for few seeds. The 95% interval of five covers (`pytest -m slow -k coverage`) 92%
    where seeds and examples add alike to the mean's variance, up to 97% where each run also errs at
    random, and 85% where the sd that seeds add is four times the examples': there read the t
    interval."""
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
    metrics: dict[str, float] = field(default_factory=dict)  # with the score where it is a mean
    constant: dict[str, float] = field(default_factory=dict)  # the constant answer's; {}: not known
    masked: float = math.nan  # share of the ordinary tokens that were masked; nan where not known
    answers: list = field(default_factory=list)  # to each dev set; see `read_row`
    resampled: np.ndarray | None = None  # (R,) the score on resampled dev examples
    run: dict = field(default_factory=dict)  # the whole JSON file


def grouped(rows: list[Row], *fields: str) -> dict:
    """{value of the fields: its rows}, in the rows' order; several fields make a tuple."""
    groups, value = {}, attrgetter(*fields)
    for row in rows:
        groups.setdefault(value(row), []).append(row)
    return groups


def means_over_tasks(rows: list[Row]) -> list[Row]:
    """The GLUE score: for each model with several tasks their mean, of seeds that ran every task.
    The task mlm is no GLUE task and stays out."""
    means = []
    for model, group in grouped([row for row in rows if row.task != "mlm"], "model").items():
        n = len(grouped(group, "task"))
        for (strategy, seed), found in grouped(group, "strategy", "seed").items():
            if n == 1 or len(found) < n:
                continue
            scores = {row.task: row.score for row in found}
            scores["score"] = sum(scores.values()) / n
            mean = Row(f"mean of {n} tasks", model, strategy, seed, scores["score"], scores,
                       masked=mean_sd([row.masked for row in found])[0])
            if all(row.constant for row in found):
                mean.constant = {row.task: row.constant["score"] for row in found}
                mean.constant["score"] = sum(mean.constant.values()) / n
            if all(row.resampled is not None for row in found):
                mean.resampled = np.mean([row.resampled for row in found], axis=0)
            means.append(mean)
    return means


def compare(new: list[Row], baseline: list[Row]) -> dict:
    """Every statistic of one pair of strategies, on the seeds that both have."""
    pairs = [(row, other) for row in new for other in baseline if row.seed == other.seed]
    a, b = [row.score for row, _ in pairs], [other.score for _, other in pairs]
    differences = [x - y for x, y in zip(a, b)]
    mean, sd = mean_sd(differences)
    t, p = paired_t_test(a, b)
    low, high = confidence_interval(differences)
    bootstrap_low, bootstrap_high = math.nan, math.nan
    if all(row.resampled is not None for row in new + baseline):
        bootstrap_low, bootstrap_high = multi_bootstrap(
            *(np.stack([row.resampled for row in side]) for side in zip(*pairs)))
    return {"n": len(pairs), "mean": mean, "sd": sd, "low": low, "high": high,
            "bootstrap_low": bootstrap_low, "bootstrap_high": bootstrap_high, "t": t, "p": p,
            "dz": mean / sd if sd > 0 else math.nan,  # Cohen 1988, §2.3
            "sign_flip_p": sign_flip_test(differences),
            "mde": minimum_detectable_effect(differences),
            "masked": mean_sd([row.masked for row, _ in pairs])[0],
            "baseline_masked": mean_sd([other.masked for _, other in pairs])[0]}


def compare_all(rows: list[Row], against: str | None = None) -> list[dict]:
    """Every pair of strategies of every task and model, or those with the strategy `against`: one
    family for Holm. Two strategies without a seed in common are no pair."""
    pairs = []
    for (task, model), group in grouped(rows, "task", "model").items():
        strategies = grouped(group, "strategy")
        for baseline, new in combinations(strategies, 2):
            common = grouped(strategies[new], "seed").keys() & grouped(strategies[baseline], "seed")
            if common and against in (None, baseline, new):
                names = {"task": task, "model": model, "strategy": new, "baseline": baseline}
                pairs.append(names | compare(strategies[new], strategies[baseline]))
    for pair, adjusted in zip(pairs, holm([pair["p"] for pair in pairs])):
        pair["holm_p"] = adjusted
    return pairs


def missing_notes(rows: list[Row]) -> list[str]:
    """A note on each strategy that lacks, in a task or in the mean, seeds that another has."""
    notes = []
    for (task, model), group in grouped(rows, "task", "model").items():
        seeds, found = sorted(grouped(group, "seed")), grouped(group, "strategy", "seed")
        for strategy in grouped(grouped(rows, "model")[model], "strategy"):
            if missing := [str(seed) for seed in seeds if (strategy, seed) not in found]:
                notes.append(f"{task}, {model}: {strategy} lacks seed {', '.join(missing)}; "
                             "its pairs go without")
    return notes


# Runs that are compared must be equal in every setting but these: names, and what the grid varies.
IGNORED = {"label", "pattern", "json", "predict", "save", "out", "resume", "data_dir", "log_every",
           "eval_every", "save_every", "versions", "commit", "task", "model", "seed",
           "teacher_dir", "teacher_seed", "teacher_weights"}
OF_THE_STRATEGY = {"masking", "adapt", "kd_weight", "kd_temperature", "kd_start", "student_init",
                   "strategy_start", "entropy_select", "entropy_input", "typhoon_spread",
                   "typhoon_ema", "typhoon_loss", "teacher"}  # equal within a strategy


def differing(rows: list[Row], part: str) -> list[str]:
    """`steps: 60, 100` for each setting in the runs' "args" or "pretraining" that is not equal."""
    rows, lines = [row for row in rows if row.run.get(part)], []
    for name in sorted({name for row in rows for name in row.run[part]} - IGNORED):
        groups = grouped(rows, "strategy").values() if name in OF_THE_STRATEGY else [rows]
        for group in groups:
            values = sorted({json.dumps(row.run[part].get(name)) for row in group})
            if len(values) > 1:
                lines.append(f"{name}: {', '.join(values)}")
    return lines


def provenance_notes(rows: list[Row]) -> list[str]:
    """A note on everything that runs differ in and the grid does not vary, in their pretraining
    too. Raises InputError where two seeds started from the same weights."""
    notes = []
    for (task, model), group in grouped(rows, "task", "model").items():
        if task != "mlm":  # whose arguments are those of the pretraining
            notes += [f"{task}, {model}: the runs differ in {line}"
                      for line in differing(group, "args")]
    for model, group in grouped(rows, "model").items():
        notes += [f"{model}: the pretraining of the runs differs in {line}"
                  for line in differing(group, "pretraining")]
        weights_of, seed_of, teachers = {}, {}, {}
        for row in group:
            if not (weights := row.run.get("weights")):
                continue
            if weights_of.setdefault(row.run["model"], weights) != weights:
                notes.append(f"{model}: {row.run['model']} was trained again between its runs")
            first = seed_of.setdefault((row.strategy, weights), row.seed)
            if first != row.seed and ("{seed}" in model or row.task == "mlm"):
                raise InputError(f"{model}, {row.strategy}: seeds {first} and {row.seed} have the "
                                 "same weights, and a copy is no independent seed: remove one")
            if first != row.seed and "{masking}" in model:
                notes.append(f"{model}: a strategy's seeds share one pretrained model, and the "
                             "intervals are given these models; put {seed} into the pattern")
            if teacher := (row.run.get("pretraining") or {}).get("teacher_weights"):
                teachers.setdefault(row.seed, set()).add(teacher)
        notes += [f"{model}: its strategies had different teachers for seed {seed}"
                  for seed, found in teachers.items() if len(found) > 1]
        if len(teachers) > 1 and len(set().union(*teachers.values())) == 1:
            notes.append(f"{model}: its pretraining runs share one teacher, and the intervals are "
                         "given that teacher; without --teacher a sweep trains one a seed")
    return list(dict.fromkeys(notes))  # each once


def verdict(pairs: list[dict]) -> str:
    """One sentence. It claims a difference only where Holm's adjusted p is below 0.05, and else
    says what could have been found."""
    if not pairs:
        return "Nothing was compared: that takes two strategies with a seed in common."
    judged = [pair for pair in pairs if pair["sd"] > 0]
    if not judged:
        return "No claim can be made: no comparison has two seeds whose differences vary."
    among = f"of {len(pairs)} comparison{'s' * (len(pairs) > 1)}"
    if claims := [pair for pair in judged if pair["holm_p"] < ALPHA]:
        said = (f"For other seeds on these same examples, a difference shows in {len(claims)} "
                f"{among} (Holm-adjusted p < {ALPHA}, marked * in the tables)")
        if doubtful := sum(pair["bootstrap_low"] <= 0 <= pair["bootstrap_high"] for pair in claims):
            said += (f"; other examples may not bear out {doubtful} of them, whose multi-bootstrap "
                     "interval contains 0")
        return said + "."
    smallest = show_p(min(pair["holm_p"] for pair in judged))
    return (f"No strategy is reliably better: none {among} is significant (smallest Holm-adjusted "
            f"p {smallest}), and none would find a true difference below "
            f"{min(pair['mde'] for pair in judged):.4f} four times in five.")


def analyse(folder: Path, *, effect: float | None = None, metric: str | None = None,
            against: str | None = None, resamples: int = 1000) -> dict:
    """Everything a report says, as data: verdict, notes, pairs, and the rows that they come from.
    metric: the score, in place of the mean of a task's metrics; against: the one strategy to
    compare with. Raises InputError where there is none."""
    rows, notes = read_rows(folder, metric)
    notes += provenance_notes(rows)
    if against and against not in grouped(rows, "strategy"):
        raise InputError(f"--against {against}: {folder} has no such strategy, but "
                         f"{', '.join(grouped(rows, 'strategy'))}")
    notes += resample(rows, metric, resamples)
    every = rows + means_over_tasks(rows)
    pairs = compare_all(rows if against else every, against)
    return {"runs": len(rows), "effect": effect, "metric": metric, "verdict": verdict(pairs),
            "notes": notes + missing_notes(every), "pairs": pairs, "rows": every}


# --- the report as text ---------------------------------------------------------------------------

READING = (
    "Compared is {score}; mean ± sd over seeds. A difference is strategy minus baseline, seed by "
    "seed; masked is the share of the tokens that the two really masked. The t interval covers "
    "other seeds on these same examples; the multi-bootstrap interval covers other seeds and other "
    "examples, roughly. p: paired t, sign flip, and Holm's adjustment of the former over every "
    "comparison of this report (*: below 0.05). d_z: mean / sd of the differences. MDE: the true "
    "difference one such test would find with 80% power, from an sd that is itself uncertain for "
    "few seeds.")
READING_MLM = (
    "The exam of train.py: random held-out positions, all of them [MASK]. common, middle and rare "
    "are the accuracy on the word pieces that make up the commonest third of the text, the next "
    "and the rarest; log_likelihood is in nats a position. All of them: the higher, the better.")


def show(value: float, form: str = "z.4f") -> str:
    """The number in this format, `n/a` where there is none; z: no -0.0000."""
    return format(value, form) if math.isfinite(value) else "n/a"


def show_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else show(p, ".3f")


def show_interval(low: float, high: float) -> str:
    return "n/a" if math.isnan(low) else f"[{low:+z.4f}, {high:+z.4f}]"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell_table(rows: list[Row]) -> str:
    """A row per strategy, a column per metric, and last what the constant answer scores."""
    names, lines = list(rows[0].metrics), []
    for strategy, group in grouped(rows, "strategy").items():
        columns = [mean_sd([row.metrics[name] for row in group]) for name in names]
        numbers = [f"{show(mean)} ± {show(sd)}" for mean, sd in columns]
        lines.append([strategy, str(len(group)), *numbers])
    if all(row.constant for row in rows):  # with --fraction it is another answer for each seed
        title = "frequency alone" if rows[0].task == "mlm" else "the constant answer"
        constant = [np.mean([row.constant.get(name, math.nan) for row in rows]) for name in names]
        lines.append([title, "", *map(show, constant)])
    return markdown_table(["strategy", "n", *names], lines)


def pair_table(pairs: list[dict], effect: float | None) -> str:
    """A row per comparison; `*` after Holm's p where a difference is claimed."""
    rows = []
    for pair in pairs:
        row = {"strategy − baseline": "{strategy} − {baseline}".format_map(pair),
               "n": str(pair["n"]),
               "masked": f"{show(pair['masked'], '.2%')}, {show(pair['baseline_masked'], '.2%')}",
               "difference": show(pair["mean"], "+z.4f"),
               "95% t interval": show_interval(pair["low"], pair["high"]),
               "multi-bootstrap": show_interval(pair["bootstrap_low"], pair["bootstrap_high"]),
               "t": show(pair["t"], ".2f"),
               "p": show_p(pair["p"]),
               "sign-flip p": show_p(pair["sign_flip_p"]),
               "Holm p": show_p(pair["holm_p"]) + " *" * (pair["holm_p"] < ALPHA),
               "d_z": show(pair["dz"], ".2f"),
               "MDE": show(pair["mde"])}
        if effect:
            needed = seeds_needed(pair["sd"], effect)
            row[f"seeds for {effect:g}"] = "> 1,000,000" if needed > 1e6 else show(needed, ",.0f")
        rows.append(row)
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


def to_markdown(report: dict, picture: str) -> str:
    """The report as a person reads it, in Markdown and on the terminal; picture: its file name."""
    score = report["metric"] or "the mean of a task's metrics (of the exam the accuracy)"
    parts = ["# Report", f"**Verdict.** {report['verdict']}",
             f"{report['runs']} runs; metrics of the last epoch. {READING.format(score=score)}"]
    if report["pairs"]:
        parts.append(f"![Each difference with its interval]({picture})")
    for (task, model), rows in grouped(report["rows"], "task", "model").items():
        parts.append(f"## {task}, {model}")
        if task == "mlm":
            parts.append(READING_MLM)
        parts.append(cell_table(rows))
        pairs = [pair for pair in report["pairs"] if (pair["task"], pair["model"]) == (task, model)]
        if pairs:
            parts.append(pair_table(pairs, report["effect"]))
    if report["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
    return "\n\n".join(parts) + "\n"


# --- the report as a picture ----------------------------------------------------------------------

FOREST_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" \
viewBox="0 0 {0} {1}" role="img">
<title>Differences between masking strategies, with their intervals</title>
<style>
svg {{ --page: #fff; --ink: #1f2328; --grid: #d1d9e0 }}
@media (prefers-color-scheme: dark) {{ svg {{ --page: #0d1117; --ink: #e6edf3; --grid: #30363d }} }}
text {{ font: 13px sans-serif; fill: var(--ink) }} .title {{ font-weight: bold }}
.name {{ text-anchor: end }} .tick {{ text-anchor: middle; font-size: 11px }}
.grid {{ stroke: var(--grid) }} .zero {{ stroke: var(--ink) }}
.open {{ stroke: #77818c; stroke-width: 2; fill: var(--page) }}
.claimed {{ stroke: #218bff; stroke-width: 2; fill: #218bff }}
</style>
<rect width="100%" height="100%" style="fill: var(--page)"/>"""


def forest_svg(pairs: list[dict], metric: str | None) -> str:
    """The pairs as a picture, the largest difference first: a line for the t interval and a dot for
    the mean, filled where it is claimed. Those of a task and model share one scale. An outlier must
    not squeeze the others: an arrow at the end of the scale stands for what lies beyond."""
    several = [name for name in ("task", "model") if len({pair[name] for pair in pairs}) > 1]
    baseline, *others = {pair["baseline"] for pair in pairs}
    name_of = ("{strategy} − {baseline}" if others else "{strategy}").format_map
    left = 34 + 7 * max(len(name_of(pair)) for pair in pairs)  # where the scale begins, in pixels
    width, drawn, y = 340, [], 40

    def text(x, y, kind, words):
        drawn.append(f'<text x="{x:.1f}" y="{y}" class="{kind}">{html.escape(words)}</text>')

    def line(x, y, to_x, to_y, kind):
        drawn.append(f'<line x1="{x:.1f}" y1="{y}" x2="{to_x:.1f}" y2="{to_y}" class="{kind}"/>')

    def ends_of(pair):
        return [pair[end] for end in ("low", "mean", "high") if math.isfinite(pair[end])]

    text(12, 22, "title", "Mean difference over seeds, with its 95% t interval")
    text(12, 40, "", f"filled: Holm-adjusted p < {ALPHA}; comparisons: {len(pairs)}")
    for (task, _), found in groupby(pairs, itemgetter("task", "model")):
        here = sorted(found, key=lambda pair: -pair["mean"])
        far = 3 * np.median([abs(end) for pair in here for end in ends_of(pair) if end] or [0])
        near = [end for pair in here for end in ends_of(pair) if abs(pair["mean"]) <= far] + [0]
        low, high = min(near), max(near)
        power = 10 ** math.floor(math.log10(high - low or 1))
        step = next(part * power for part in (0.2, 0.5, 1, 2) if high - low <= 6 * part * power)
        low, high = min(low, -step), max(high, step)  # a tick on either side of 0

        def at(value):
            return left + width * (min(max(value, low), high) - low) / (high - low)

        y, bottom = y + 30, y + 46 + 20 * len(here)
        score = " and ".join(scored(task, TASK_METRICS.get(task, ()), metric)) or "score"
        title = [here[0][name] for name in several] + [score]
        text(12, y, "title", f"{', '.join(title)}, strategy − {'baseline' if others else baseline}")
        for i in range(math.ceil(low / step), math.floor(high / step) + 1):
            line(at(i * step), y + 8, at(i * step), bottom, "grid" if i else "zero")
            text(at(i * step), bottom + 13, "tick", f"{i * step:+.3g}" if i else "0")
        for pair in here:
            y += 20
            kind, ends = "claimed" if pair["holm_p"] < ALPHA else "open", ends_of(pair)
            text(left - 16, y + 4, "name", name_of(pair))
            line(at(min(ends)), y, at(max(ends)), y, kind)
            if low <= pair["mean"] <= high:
                drawn.append(f'<circle cx="{at(pair["mean"]):.1f}" cy="{y}" r="4" class="{kind}"/>')
            for edge, tip, beyond in ((low, -6, min(ends) < low), (high, 6, max(ends) > high)):
                if beyond:
                    drawn.append(f'<path d="M{at(edge):.1f} {y - 4}v8l{tip}-4z" class="{kind}"/>')
            text(left + width + 12, y + 4, "", f"{show(pair['mean'], '+z.4f')} "
                 + show_interval(pair["low"], pair["high"]))
        y = bottom + 20
    return "\n".join([FOREST_HEAD.format(left + width + 210, y + 4), *drawn, "</svg>\n"])


def write_report(folder: Path, **options) -> str:
    """Analyses a folder and writes report.md and report.svg into it, or against-STRATEGY.md and
    .svg; options as for `analyse`. Returns the Markdown."""
    report = analyse(folder, **options)
    name = f"against-{options['against']}" if options.get("against") else "report"
    text = to_markdown(report, f"{name}.svg")
    write_atomic(folder / f"{name}.md", text)
    if report["pairs"]:
        write_atomic(folder / f"{name}.svg", forest_svg(report["pairs"], report["metric"]))
    return text


# --- run files ------------------------------------------------------------------------------------

EXAM = ("accuracy", "common", "middle", "rare", "log_likelihood")
TASK_METRICS = {name: task.metrics for name, task in glue.TASKS.items()} | {"mlm": EXAM}


def scored(task: str, names: list[str], metric: str | None) -> list[str]:
    """Which metrics' mean is the score: `metric`, or the exam's accuracy, or all of a GLUE task."""
    wanted = metric or ("accuracy" if task == "mlm" else None)
    return [name for name in names if wanted in (None, name.removesuffix("_mm"))]  # _mm: MNLI's


def row_score(task: str, metrics: dict[str, float], metric: str | None) -> float:
    values = [metrics[name] for name in scored(task, metrics, metric)]
    return sum(values) / len(values) if values else math.nan


def read_row(path: Path, metric: str | None) -> Row:
    """A run of glue.py, or an exam that train.py took. Its answers to a dev set: predictions and
    labels (m,), or right and count (m, 3) and log_likelihood (m,). Raises InputError, with the
    file's name, on anything else, on a damaged file and on metrics that are not finite."""
    run = {"baseline": {}} | read_json(path)
    try:
        task, metrics, constant, args = run["task"], run["last"], run["baseline"], run["args"]
        names = ("right", "count", "log_likelihood") if task == "mlm" else ("predictions", "labels")
        answers = [[np.array(run[dev][name], dtype=float) for name in names]
                   for dev in ("dev", "dev_mismatched") if dev in run]
        if not ({name.removesuffix("_mm") for name in metrics} == set(TASK_METRICS[task])
                and all(map(math.isfinite, [*metrics.values(), *constant.values()]))
                and all(0 < len(column) == len(each[0]) for each in answers for column in each)):
            raise ValueError
        # what came of defaults, and the versions, are settings as well
        args |= {name: run[name] for name in ("device", "bf16", "lr") if name in run}
        args |= run.get("versions") or {}
        if pretraining := run.get("pretraining"):
            pretraining |= pretraining.get("versions") or {}
            pretraining.pop("teacher", None)  # one a seed; its weights are compared
        score = row_score(task, metrics, metric)
        if len(scored(task, metrics, metric)) > 1:
            metrics = metrics | {"score": score}
        if constant:
            constant = constant | {"score": row_score(task, constant, metric)}
        return Row(task, run.get("pattern") or run["model"], str(run["strategy"]), int(run["seed"]),
                   score, metrics, constant, float(run.get("masked") or math.nan), answers, run=run)
    except (AttributeError, KeyError, TypeError, ValueError):  # a part is missing or of other kind
        raise InputError(f"{path} is no run of glue.py or train.py with finite metrics and whole "
                         "answers: remove it") from None


def read_rows(folder: Path, metric: str | None) -> tuple[list[Row], list[str]]:
    """The table of a folder's runs, and notes on collapsed runs and on tasks without the metric.
    Raises InputError where there is nothing to report, and where two files claim to be one run."""
    rows, notes, claimed = [], [], {}
    for path in sorted(folder.glob("*.json")):
        row = read_row(path, metric)
        cell = f"{row.task}, {row.model}, {row.strategy}, seed {row.seed}"
        if (first := claimed.setdefault(cell, path.name)) != path.name:
            raise InputError(f"{first} and {path.name} both claim to be {cell}: remove one of them")
        if row.run.get("collapsed"):
            notes.append(f"{path.stem} collapsed: it gives every dev example the same answer")
        rows.append(row)
    if not rows:
        raise InputError(f"{folder} holds no finished run: python stats.py sweep --out {folder} "
                         "makes them")
    if not (kept := [row for row in rows if not math.isnan(row.score)]):
        known = dict.fromkeys(name for row in rows for name in TASK_METRICS[row.task])
        raise InputError(f"--metric {metric}: no task here has it: choose from {', '.join(known)}")
    without = sorted({row.task for row in rows} - {row.task for row in kept})
    notes += [f"{task} has no {metric} and is left out" for task in without]
    # strategies in masking.py's order, so that a difference is new minus baseline
    place = {name: i for i, name in enumerate(["none", *STRATEGIES])}
    kept.sort(key=lambda row: (row.task, row.model, place.get(row.strategy, len(place)),
                               row.strategy, row.seed))
    return kept, notes


def resample(rows: list[Row], metric: str | None, resamples: int) -> list[str]:
    """Gives each row its scores on resampled dev examples, in place (of MNLI's two dev sets their
    mean; of the exam whole windows, since one text's positions are alike). Returns a note for each
    task and model whose runs kept no answers to the same examples."""
    notes = []
    for (task, model), group in grouped(rows, "task", "model").items():
        def score(*columns):
            found = train.exam_metrics(*columns) if task == "mlm" else glue.metrics(task, *columns)
            return row_score(task, found, metric)

        # the second column is the same for all: labels, or how many tokens an exam asked for
        asked = [[found[1].tolist() for found in row.answers] for row in group]
        if not all(found and found == asked[0] for found in asked):
            notes.append(f"{task}, {model}: no multi-bootstrap, the runs did not keep predictions "
                         "on the same dev examples")
            continue
        for row in group:
            row.resampled = np.mean([
                resampled_scores(score, *columns, resamples=resamples,
                                 seed=zlib.crc32(f"{task} {name}".encode()))
                for name, columns in zip(("dev", "dev_mismatched"), row.answers)], axis=0)
    return notes


# --- the sweep ------------------------------------------------------------------------------------

GRIDS = {
    "typhoon": {  # [T] v2: 2 × 3 × 3 × 5 = 90 runs; 12 comparisons of Typhoon on one task
        "tasks": ["mrpc", "cola"],
        "models": ["huawei-noah/TinyBERT_General_4L_312D", "distilbert-base-uncased",
                   "bert-base-uncased"],
        "strategies": ["random", "whole-word", "typhoon"]},
    "entropy": {  # [E]: which strategy pretrains better, with and without distillation
        "tasks": glue.NINE,
        "models": ["runs/{masking}-{seed}"],
        "strategies": ["random", "entropy", "self-entropy",
                       "random-kd", "entropy-kd", "self-entropy-kd"],
        "seeds": [0, 1, 2]},
}
WEIGHTS = "model.safetensors"  # train.py writes it last: a directory without it was interrupted


def plan(*, tasks: list[str], models: list[str], strategies: list[tuple], seeds: list[int],
         folder: Path, pretrain: list[str] | None = None, extra: list[str] = ()) -> list[dict]:
    """Returns what is missing of a grid: three {output: command}, of teachers, models and runs, and
    {output: what is added to a model's exam.json} of the task mlm. Whole comparisons come early.

    models: names, directories, or patterns with {masking} and {seed}; strategies: as `strategy`
    reads them; pretrain: train.py's options for the models of a pattern, None to make none; extra:
    glue.py's. Raises InputError on what cannot be a run, or is there with other options, and ends
    as they do on bad ones."""
    teachers, trained, runs, exams = {}, {}, {}, {}
    for model, task, seed, strategy in product(models, tasks, seeds, strategies):
        label, pretraining, adaptation = strategy

        def fill(text, masking=label):
            return text.replace("{masking}", masking).replace("{seed}", str(seed))

        name = re.sub(r"[^\w.]+", "-", model).strip("-")
        output = folder / f"{task}--{name}--{label}--{seed}.json"
        if output in runs or output in exams:
            raise InputError(f"two runs of this grid would both write {output}")
        is_pretraining, checkpoint = "{masking}" in model, Path(fill(model))
        weights = checkpoint / WEIGHTS
        if is_pretraining and pretrain is not None:
            if "{seed}" not in model and len(seeds) > 1:
                raise InputError(f"--models {model}: put {{seed}} into it, for a model a seed")
            common = list(map(fill, pretrain))
            options = [*common, *map(fill, pretraining), "--seed", str(seed)]
            args, teacher = train.parse_args(options), None
            if train.wants_teacher(args):  # one a seed, made without the strategy's options
                teacher = args.teacher = fill(model, masking="teacher")
            refuse_another_model(checkpoint, args, output)
            if not (output.exists() or weights.exists()):
                if teacher:
                    plan_teacher(Path(teacher), teachers, [*common, *train.teacher_options(args),
                                 "--seed", str(train.TEACHER_SEEDS + seed)])
                    options += ["--teacher", teacher]
                trained[weights] = training(checkpoint, options)
        needed = weights if task == "mlm" else checkpoint
        if "{" in model and not (output.exists() or needed.exists() or weights in trained):
            raise InputError(f"{needed} is not there" + ": --pretrain makes it" * is_pretraining)
        if task == "mlm":
            if not is_pretraining:
                raise InputError(f"--tasks mlm compares pretraining, and --models {model} has no "
                                 "{masking}: give a pattern such as 'runs/{masking}-{seed}'")
            if output.exists() and weights.exists():
                glue.refuse_difference(output, read_json(output),
                                       {"weights": weights_digest(checkpoint)}, {"weights"},
                                       "choose another --out, or delete that file")
            elif not output.exists():
                exams[output] = {"model": str(checkpoint), "strategy": label, "pattern": model,
                                 "seed": seed}
            continue
        options = [*extra, *(["--label", label] if is_pretraining else adaptation)]
        if "{" in model:  # by it the report knows the checkpoints of all seeds as one model
            options += ["--pattern", model]
        options += ["--task", task, "--model", str(checkpoint), "--seed", str(seed),
                    "--json", str(output)]
        glue.refuse_to_replace(glue.parse_args(options), weights=weights.exists())
        if not output.exists():
            runs[output] = [sys.executable, glue.__file__, *options]
    return [teachers, trained, runs, exams]


def plan_teacher(directory: Path, teachers: dict[Path, list[str]], options: list[str]):
    """Adds a seed's teacher to `teachers` unless it is there. Raises InputError where it is there,
    or planned, with other options."""
    refuse_another_model(directory, train.parse_args(options))
    weights, command = directory / WEIGHTS, training(directory, options)
    if not weights.exists() and teachers.setdefault(weights, command) != command:
        raise InputError(f"{directory}: --teacher-steps goes to --pretrain, as all strategies of a "
                         "seed have one teacher")


def refuse_another_model(directory: Path, args: train.Options, output: Path | None = None):
    """Raises InputError where a model is there that was made with other options than these, or its
    result: a sweep must not take it for the one that is asked for."""
    before, where = None, directory
    if (path := directory / "train_args.json").exists():
        before = read_json(path)
    elif output and output.exists():  # the model is no longer there
        before, where = read_json(output).get("pretraining"), output
    if before:
        now = json.loads(json.dumps(vars(args)))  # as a file has it
        now["teacher"] = args.teacher or args.init
        names = now.keys() - IGNORED - {"device"} | {"seed"}  # a directory is one seed's
        if not train.uses_teacher(args):
            names -= {"teacher", "teacher_steps"}
        glue.refuse_difference(where, before, now, names, "choose other --models, or delete it")


def training(directory: Path, options: list[str]) -> list[str]:
    """The command that makes a model, or goes on with one that was interrupted."""
    interrupted = (directory / "train_args.json").exists()
    options = ["--resume"] if interrupted else [*options, "--out"]
    return [sys.executable, train.__file__, *options, str(directory)]


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


def run_stage(commands: dict[Path, list[str]], parallel: int) -> list[str]:
    """Runs the commands, `parallel` at once, each a process of its own with its output in NAME.log.
    Returns why each that failed did; a failure stops no other. If this process ends, however it
    does, those in flight end too: a sweep that starts again must not meet them in a directory."""
    threads = max(1, (os.cpu_count() or 1) // parallel)  # those that share cores must not fight
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    reader, writer = os.pipe()  # the writing end closes with this process: see CHILD

    def run(output, command):
        name = output.parent if output.name == WEIGHTS else output.with_suffix("")
        log = Path(f"{name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            ended = subprocess.run([sys.executable, "-uc", CHILD, *command[1:]], env=environment,
                                   stdin=reader, stdout=file, stderr=file)  # -u: in order
        if ended.returncode == 0 and output.exists():
            print(f"{name} is done", flush=True)
            return None
        reason = (log.read_text(errors="replace").strip() or "it said nothing").splitlines()[-1]
        print(f"{name} failed: {reason}", flush=True)
        return reason

    pool = ThreadPoolExecutor(parallel)
    try:
        return list(filter(None, pool.map(run, commands, commands.values())))
    finally:
        os.close(writer)  # after an interruption: ends those in flight
        pool.shutdown(cancel_futures=True)  # and waits for their end
        os.close(reader)


# --- command line ---------------------------------------------------------------------------------

def strategy(text: str) -> tuple[str, list[str], list[str]]:
    """An argparse type: NAME, NAME-kd, FILE.py:CLASS or NAME=OPTIONS. Returns the name in files and
    reports, the options for train.py, where it pretrains, and for glue.py, where it adapts."""
    name, is_own, options = text.partition("=")
    label = strategy_label(name)
    if not re.fullmatch(r"[\w.+-]+", label) or label == "teacher":
        raise argparse.ArgumentTypeError(f"{label!r} cannot name a strategy")
    if is_own:
        return label, shlex.split(options), [*shlex.split(options), "--label", label]
    masking = name.removesuffix("-kd")
    distilled = ["--kd-weight", "0.5"] if masking != name else []
    return label, ["--masking", masking, *distilled], ["--adapt", name]


def parse_args(argv=None):
    """Returns the arguments of `sweep` or `report`; sweep's `extra` are glue.py's options."""
    parser = Parser(prog="stats.py", description="Compare masking strategies over seeds.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{sweep,report}")
    add = commands.add_parser("sweep", help="run a grid; what is done is skipped").add_argument
    add("--preset", choices=list(GRIDS), help="a paper's grid; the next four replace parts of it")
    add("--tasks", nargs="+", choices=[*glue.NINE, "mlm"], metavar="TASK",
        help=f"{' '.join(glue.NINE)}, or mlm, the held-out exam of train.py")
    add("--models", nargs="+",
        help="names or directories; runs/{masking}-{seed} compares pretraining strategies")
    add("--strategies", nargs="+", type=strategy, metavar="STRATEGY",
        help="of adaptation, or what {masking} stands for: NAME, NAME-kd (distilled), none, "
             "FILE.py:CLASS, or options of train.py or glue.py by a name of your own: "
             "kd8='--masking random --kd-weight 0.8'")
    add("--seeds", nargs="+", type=number(int, low=0), metavar="SEED",
        help="the seeds themselves, not how many (default: 0 1 2 3 4; of --preset entropy 0 1 2)")
    add("--out", type=Path, help="folder of the JSON files (default: runs/sweep[-PRESET])")
    add("--jobs", type=number(int, low=1), default=1, help="commands at once")
    add("--dry-run", action="store_true", help="print the commands")
    add("extra", nargs="*", metavar="-- OPTION", help="glue.py's: --preset typhoon -- --epochs 2")
    add("--pretrain", nargs="?", const=[], type=shlex.split, metavar="OPTIONS",
        help="first make the models of a {masking} pattern with train.py and these options, in "
             "which {seed} is replaced (one alone: --pretrain=--compile); a teacher, where one is "
             "wanted, is made for each seed")

    add = commands.add_parser("report", help="the statistics of a folder of runs").add_argument
    add("folder", type=Path, help="where sweep or glue.py --json wrote")
    add("--effect", type=number(float, above=0), help="count the seeds that would find it: 0.01")
    add("--metric",
        help="compare by this one, such as f1 (default: the mean of a task's; mlm: the accuracy)")
    add("--against", metavar="STRATEGY",
        help="compare only with this one, on single tasks: they are the family for Holm")
    return parser.parse_args(argv)


def sweep(args):
    """Plans the sweep, then runs it or prints its commands."""
    grid = {"seeds": [0, 1, 2, 3, 4]} | GRIDS.get(args.preset, {})
    if args.preset:
        grid["strategies"] = list(map(strategy, grid["strategies"]))
    names = ("tasks", "models", "strategies", "seeds")
    grid |= {name: getattr(args, name) for name in names if getattr(args, name)}
    if missing := [f"--{name}" for name in names if name not in grid]:
        raise InputError(f"{' and '.join(missing)} missing: give them, or --preset "
                         f"{' or '.join(GRIDS)}")
    if args.pretrain is not None and not any("{masking}" in model for model in grid["models"]):
        raise InputError("--pretrain makes the models of a pattern, and --models has none with "
                         "{masking}")
    folder = args.out or Path("runs") / "-".join(filter(None, ("sweep", args.preset)))
    *stages, exams = plan(**grid, folder=folder, pretrain=args.pretrain, extra=args.extra)
    if args.dry_run:
        for stage in stages:
            print("".join(shlex.join(command) + "\n" for command in stage.values()), end="")
        return
    for model in grid["models"]:
        if "{" not in model:  # downloaded once, or refused, before processes start
            weight_file(find_pretrained(model))
    # SIGTERM as an exception, so that run_stage ends its processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failures = [failure for stage in stages for failure in run_stage(stage, args.jobs)]
    for output, cell in exams.items():
        model = Path(cell["model"])
        if (model / WEIGHTS).exists():  # else its training has failed
            exam = read_json(model / "exam.json") | cell | {"weights": weights_digest(model)}
            write_atomic(output, json.dumps(exam) + "\n")
    if failures:
        raise RunError(f"{len(failures)} failed, first: {failures[0]}. The same sweep tries again")
    print(f"all runs are in {folder}: python stats.py report {folder}")


def main(argv=None):
    args = parse_args(argv)
    if args.command == "sweep":
        sweep(args)
    else:
        print(write_report(args.folder, effect=args.effect, metric=args.metric,
                           against=args.against), end="")


if __name__ == "__main__":
    run_cli(main)
