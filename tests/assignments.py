"""Course assignments: a hand-out without the solutions, and a grader that says what is wrong.

    python tests/assignments.py list                        the table of exercises
    python tests/assignments.py handout DIR [NUMBERS]       what students get; default: all
    python tests/assignments.py grade DIR [NUMBERS] [--json results.json]    for Gradescope

The table comes first, then the hand-out, then the grader. An exercise is one or two functions of
one file. Its checks are in tests/exercises: test_public.py goes into the hand-out, test_hidden.py
stays here. Each exercise is graded by itself: the student's function stands in the reference's
place, in a process of its own (tests/exercises/grading.py).

[E] Srinivasagan et al. 2026, arXiv 2605.28526; [T] Abdurrahman et al., arXiv 2303.15619. The full
texts of both were not at hand: a definition that is this project's says "ours".
"""
import ast
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EXERCISES_DIR = ROOT / "tests" / "exercises"
sys.path[:0] = [str(ROOT), str(EXERCISES_DIR)]

from grading import CPU_SECONDS, find, helpers, used_names
from model import InputError, Parser, run_cli, write_atomic

WALL_SECONDS = 5 * CPU_SECONDS  # for an exercise that waits, or on a busy machine
FILES = ("model.py", "masking.py", "distill.py", "train.py", "glue.py", "stats.py")


# --- the table ------------------------------------------------------------------------------------

class Exercise(NamedTuple):
    number: int
    title: str
    file: str
    functions: tuple[str, ...]  # "Class.method" or "function"
    source: str  # which paper, which section; what is ours
    text: str  # the task and its equation, Markdown
    points: int
    minutes: int  # for a student who has read the paper
    difficulty: int  # 1 to 3
    hints: tuple[str, ...]
    builds_on: tuple[int, ...] = ()
    forbidden: tuple[str, ...] = ()  # names of library calls that would be the solution
    cut: tuple[str, ...] = ()  # "file:function" that shows the solution: left out, and not graded
    docstrings: dict[str, str] = {}  # function -> its docstring in the hand-out, if another


EXERCISES = (
    Exercise(
        1, "The budget and random masking", "masking.py", ("budget", "top_k", "random_mask"),
        "BERT §3.1; rounding at random is ours", """
Of a row with n maskable tokens k are masked, and k is `rate · n` on average:

    k = ⌊rate · n⌋ + 1 with probability rate · n − ⌊rate · n⌋, else ⌊rate · n⌋

Each row is rounded by itself. `top_k` turns scores into a mask, with another k for each row.
`random_mask` masks k positions uniformly without replacement: every set of k maskable positions is
equally likely. Everything random comes from `generator`.""", 4, 45, 1, (
            "`uniform(like, generator)` is given.",
            "Which scores make `top_k` a uniform draw without replacement?",
            "torch.topk takes one k for all rows. Ranks can be compared with k row by row.")),
    Exercise(
        2, "Corruption", "masking.py", ("corrupt",), "BERT §3.1 and §A.1", """
Of the masked positions a share `split[0]` becomes [MASK], `split[1]` a random token, and `split[2]`
stays as it is; BERT's split is 80/10/10. Each position's fate is drawn by itself. A random token is
uniform over the ordinary word pieces: those from 0 to `vocab_size` − 1 that are not in
`special_ids`. Labels are the original tokens on the mask and −100 off it.""", 5, 45, 1, (
            "One uniform number per position can decide between three fates.",
            "`input_ids` belongs to the caller: leave it as it is.")),
    Exercise(
        3, "Attention", "model.py", ("SelfAttention.forward",), "Vaswani et al. 2017 §3.2", """
In each head softmax(Q Kᵀ / √d) V, where d is the width of one head; the heads side by side, then
the output layer. `key_mask` is True where a key may be read; a hidden key has weight 0. Dropout
falls on the attention weights, in training alone. `query_hidden` (B, K, H) asks and `hidden`
(B, L, H) answers: the same tensor in most layers, and K positions of it in the last.""",
        8, 90, 2, (
            "Bring q, k and v to (B, heads, tokens, d) first.",
            "With all scores equal the result must be the mean of the values.",
            "What must a score be, for its weight to become 0 in the softmax?"),
        forbidden=("scaled_dot_product_attention", "MultiheadAttention",
                   "multi_head_attention_forward"),
        cut=("model.py:SelfAttention.split_heads",)),
    Exercise(
        4, "The post-LayerNorm block", "model.py", ("Block.forward",),
        "Vaswani et al. 2017 §3.1 and §5.4; BERT's activation is the exact GELU", """
    x = LayerNorm(hidden + Dropout(Attention(hidden)))
    y = LayerNorm(x + Dropout(W₂ GELU(W₁ x)))

with `attention_norm` first and `output_norm` last. With `queries` (B, K), column numbers for each
row, the result is y at those columns alone, (B, K, H); all of `hidden` is read still.""",
        5, 40, 1, (
            "Dropout falls on what is added, not on the sum.",
            "`Tensor.gather` takes another set of columns from each row."),
        builds_on=(3,), forbidden=("TransformerEncoderLayer",)),
    Exercise(
        5, "The masked-LM head on chosen rows", "model.py",
        ("MaskedLMHead.forward", "BertForMaskedLM.hidden"),
        "BERT §3.1, task 1; the rows are ours", """
    logits = LayerNorm(GELU(W h)) Eᵀ + b

with the word embeddings E as the decoder (tied weights). Only 15% of the positions have a label, so
`hidden` returns the chosen ones alone: with `positions`, a (B, L) bool mask, (N, H) in the order of
`full[positions]`. `positions` may also be what `query_positions(mask)` returns.""", 4, 40, 1, (
            "The encoder can be given columns to compute alone (`queries`); a right result without "
            "that saving has full points.",
            "Pass everything on: attention_mask, token_type_ids, inputs_embeds."),
        builds_on=(4,)),
    Exercise(
        6, "Whole-word masking", "masking.py", ("whole_word_mask",),
        "BERT's whole-word masking (2019), [T]'s second baseline; counting words is ours", """
A word's pieces are masked together or not at all. Of a row's W words `rate · W` are masked, rounded
up or down at random as in exercise 1, uniformly without replacement, so that a word of three pieces
is as likely as a word of one. A maskable position continues a word where `continuation` is True
**and** the position to its left is maskable; every other maskable position begins one, column 0
among them. ([T] draws each word by itself; a fixed number of words is ours.)""", 6, 75, 3, (
            "First find the pieces that begin a word.",
            "If you knew which of those are drawn, how would the other pieces of a word hear of "
            "it? A running maximum or a running count carries a number along a row.",
            "Why not a budget of pieces, filled word by word? Which words would fit more often?"),
        builds_on=(1,), docstrings={"whole_word_mask": """
Returns a mask on whole words, drawn uniformly without replacement.

Of a row's W words rate · W are masked, rounded up or down at random. That is ours; the sources are
BERT's whole-word masking of 2019 and [T]'s second baseline.

maskable (B, L) bool; continuation (B, L) bool is True on "##" pieces. A piece whose left
neighbour is not maskable begins a word, whatever it looks like. Returns (B, L) bool."""}),
    Exercise(
        7, "Entropy", "masking.py", ("token_entropy",), "[E]'s score; Shannon 1948", """
    H = −Σ_v p(v) ln p(v),  p = softmax(logits)

in nats, over the last axis: 0 where the model is sure, ln V where it knows nothing. Words of
probability 0 add 0. The result is right for large logits, for logits of −∞, and for bfloat16
logits, which are computed in float32.""", 3, 25, 1, (
            "What is 0 · ln 0 in floating point, and what should it be?",),
        forbidden=("Categorical", "distributions", "entr")),
    Exercise(
        8, "The four selections", "masking.py", ("select_positions",),
        "[E] compares several selections; `mixed` and `sample` as defined here are ours", """
Spends a budget k, counted already, by a score (here entropy):

- `high`: the k highest; `low`: the k lowest;
- `mixed`: half of k the highest and half uniformly from the rest; of an odd k either half may have
  the larger part, and k positions are masked in all;
- `sample`: k positions one after the other, each with probability proportional to its score among
  what is left. Scores are never negative; those of 0 come last.

Another `select` raises ValueError.""", 6, 75, 3, (
            "Look up the Gumbel trick, or exponential races: k draws by one sort.",
            "`sample` in proportion in its first draw alone is the most frequent mistake."),
        builds_on=(1,)),
    Exercise(
        9, "The entropy of a hidden token", "masking.py", ("hidden_entropy",),
        "ours, a second reading of [E], which does not say where entropy is read", """
The entropy of a token that the model can see mostly says how rare the token is. So the maskable
positions of each row are dealt at random into ⌈1/rate⌉ groups, as equal in size as can be, and each
group is masked in turn: that many passes. Returns every position's entropy in the pass that hid it,
0 off the maskable positions.""", 6, 60, 2, (
            "`position_entropy` is given: one pass, for some of the positions.",
            "A random order and a remainder make groups of equal size."),
        builds_on=(7,)),
    Exercise(
        10, "Self-entropy", "masking.py", ("SelfEntropy.mask",),
        "[E], self-masking; drawing candidates is ours", """
The model in training is its own reference. With `context.entropy_input == "masked"`: a budget k for
each row, 2k candidates drawn uniformly, all of them masked, one pass, and of the candidates k by
`self.select` (exercise 8). With "visible": one pass over the text as it is, and k of all maskable
positions. The model's mode, its gradients and the batch stay as they were.""", 5, 45, 2, (
            "k is drawn once: the candidates are twice that k.",),
        builds_on=(1, 8)),
    Exercise(
        11, "The distillation loss", "distill.py", ("kd_loss",),
        "Hinton et al. 2015 §2; DistilBERT §3", """
    α T² KL(softmax(z_t / T) ‖ softmax(z_s / T)) + (1 − α) CE(z_s, labels)

the mean over the N masked positions, in nats. At α = 0 there may be no teacher. Large logits
(hundreds) do not overflow, and bfloat16 logits are computed in float32.""", 5, 45, 2, (
            "KL(p ‖ q) = Σ p (ln p − ln q): who is p?",
            "Work with logarithms of probabilities and never with the logarithm of a softmax."),
        forbidden=("kl_div", "KLDivLoss")),
    Exercise(
        12, "Embedding saliency", "masking.py", ("embedding_saliency",),
        "[T]: the gradient with respect to one-hot token inputs; the identity is ours", """
With e_i = onehot(x_i) W, how does the loss L move with the entry v of that one-hot vector?

    ∂L/∂onehot(x_i)[v]  at  v = token_ids_i

from ∂L/∂e (B, L, H) and W (V, H), without a tensor of (B, L, V) entries, in float32, and without a
gradient of its own. No sign and no absolute value: the class Typhoon applies the signs.""",
        4, 30, 2, ("Write the chain rule for one entry of the one-hot vector.",),
        forbidden=("one_hot",), docstrings={"embedding_saliency": """
Returns ∂L/∂onehot(x_i)[v] at v = token_ids_i: how the loss moves with that one-hot entry ([T]).

embedding_grad (B, L, H) is ∂L/∂e with e_i = onehot(x_i) W; embedding_weight W (V, H);
token_ids (B, L). Returns (B, L) float32, without a gradient of its own."""}),
    Exercise(
        13, "Typhoon's moving average", "masking.py", ("Typhoon.accumulate", "Typhoon.step"),
        "[T]'s public code of 2023", """
A token has s = −dot if the model saw it and s = +dot if not; dot is what exercise 12 returns. For
each type v in the batches of one step:

    s_v = mean of s over v's visible tokens + mean of s over v's masked tokens
    w_v ← (1 − β) w_v + β s_v,  and  w_v ← s_v  the first time

A type without visible (or masked) tokens has 0 for that mean. Types that do not occur keep their w.
Tokens that are not maskable never count. `accumulate` adds a batch to `self.totals`. `step` calls
`reduce(tensor)`, if it is given, which sums a tensor in place over data-parallel ranks (which one is
yours to find), updates `self.weight` and `self.seen`, and leaves `self.totals` at zero for the next
step. Several `accumulate` calls before one `step`, or several ranks, must give what one large batch
gives.""", 6, 75, 3, (
            "What can be summed over batches and ranks: sums, counts, or means?",
            "`self.totals` (2, 2V) is given: row 0 holds sums, row 1 counts; columns 0 to V − 1 are "
            "the types where visible, columns V to 2V − 1 the types where masked."),
        docstrings={"Typhoon.step": """
Ends a step: w_v ← (1 − β) w_v + β s_v for each type v that occurred; its first s_v sets its w_v.

s_v is the mean over its visible tokens plus the mean over its masked ones. `reduce` sums a
tensor in place over data-parallel ranks; every rank must end with the mean over the whole
batch, as a single process would."""}),
    Exercise(
        14, "Typhoon's rates", "masking.py", ("Typhoon.rates",),
        "[T]: calibration to a budget; giving back what the cap at 1 cuts off is ours", """
    r(v) = min(1, c u(v)),  u(v) = 1 − σ + σ ŵ(v),  Σ_v f(v) r(v) = rate

where ŵ is w scaled to [0, 1] over the types seen, and 1 for a type not seen yet; where all weights
are equal, ŵ is 1. f is the frequency of a type in the corpus. Find c: what the cap cuts off one
type is given back to all others, whose rates stay in proportion to u.""", 7, 90, 3, (
            "Without the cap c has a closed form.",
            "With it: the expected rate grows with c, so c can be bracketed; or order the types by "
            "u and ask which of them are capped.",
            "Giving back once may push other types over 1."),
        builds_on=(13,)),
    Exercise(
        15, "One training step", "train.py", ("Trainer.micro_step",),
        "BERT §3.1; the teacher's input is ours", """
Corrupts a batch (exercise 2, with the recipe's split, the trainer's generator and the vocabulary's
special ids), runs the model, and the teacher where `kd_weight` is above 0, on the corrupted text at
the masked positions, and makes the gradients of

    world_size() · (sum of the loss over this micro-batch's masked positions) / masked_in_all

The loss is exercise 11's, with α = `kd_weight` and the recipe's temperature. Returns that sum,
without a graph. If the strategy `wants_gradient`, calls `observe(batch, hidden, gradient)`:
`hidden` is True where the model did not see the token itself, and the gradient is that of the
sum / masked_in_all at the word embeddings that went in. Both models run under `self.autocast()`;
the teacher has no gradients. Where nothing is masked the loss is 0 and every parameter has a
gradient of 0.""",
        10, 120, 3, (
            "Two micro-batches must give the gradients of one large batch, whatever each masks.",
            "Give the model `inputs_embeds`, and keep their gradient.",
            "DistributedDataParallel averages gradients over ranks; masked_in_all counts over all.",
            "The mean of no numbers is nan."),
        builds_on=(2, 5, 11), cut=("masking.py:feed",)),
    Exercise(
        16, "Matthews' correlation", "glue.py", ("matthews",), "Gorodkin 2004; GLUE's CoLA", """
    R_K = cov(X, Y) / √(cov(X, X) cov(Y, Y))

where X and Y (n, K) hold a one-hot row for each prediction and each label, and cov sums the
products of the deviations from the columns' means. Any number of classes under any numbers; 0
where one side is constant.""", 4, 40, 2, (
            "For two classes it is Pearson's correlation.",
            "A class may be predicted that no label has."),
        forbidden=("corrcoef", "matthews_corrcoef"), docstrings={"matthews": """
Returns Matthews' correlation of predicted and true classes, from −1 to 1 (R_K, Gorodkin 2004).

predictions, labels (n,), of any number of classes. 0 where one side is constant."""}),
    Exercise(
        17, "The paired t test and its interval", "stats.py",
        ("paired_t_test", "confidence_interval"), "Student 1908", """
    t = mean(d) / (sd(d) / √n),  d = a − b,  p two-sided with n − 1 degrees of freedom
    interval: mean(d) ± t* sd(d) / √n

t* leaves a share 1 − level outside, on both sides together. `mean_sd`, `t_tail` and `t_critical`
are given. The undefined cases are in the docstring; differences are equal where `mean_sd` gives an
sd of 0. Scores are finite, and there is one at least.""",
        5, 45, 2, ("`t_critical(df, alpha)` is two-sided: alpha is the error of both sides.",),
        forbidden=("scipy", "ttest_rel", "ttest_1samp")),
    Exercise(
        18, "Holm's adjustment", "stats.py", ("holm",), "Holm 1979", """
Of m p-values in rising order, p_(k) is significant at level α if p_(j) ≤ α / (m − j + 1) for every
j ≤ k. The adjusted p-value is the smallest α ≤ 1 at which that holds, 1 if there is none. Results
come in the order of the input. A nan stays nan, and counts in m.""", 3, 30, 2, (
            "Solve the condition for α, for one k first.",),
        forbidden=("multipletests", "scipy"), docstrings={"holm": """
Returns the p-values adjusted for m comparisons, by Holm's step-down method (1979).

Claiming where the result is below alpha keeps the chance of any false claim among the m under
alpha. Results are in the order of p_values. A nan stays nan and counts in m: a comparison that
was made and could not be judged."""}),
    Exercise(
        19, "The two-way bootstrap", "stats.py", ("resampled_scores", "multi_bootstrap"),
        "Sellam et al. 2022 (2106.16163), the multi-bootstrap for paired seeds", """
`resampled_scores` gives a run's score on R samples of m examples, drawn with replacement; the same
seed draws the same examples for every run. `multi_bootstrap` has such scores of n seeds on both
sides, (n, R), draws n seeds with replacement for each of the R columns, the same on both sides,
and returns the percentiles (1 − level) / 2 and (1 + level) / 2 of the R mean differences a − b.""",
        4, 60, 2, (
            "What a seed gives to both sides must cancel.",
            "`numpy.take_along_axis` takes another set of rows from each column."),
        forbidden=("scipy",)),
)


class OpenExercise(NamedTuple):
    number: int
    title: str
    text: str
    minutes: int
    rubric: tuple[tuple[int, str], ...]  # points, for what

    @property
    def points(self) -> int:
        return sum(points for points, _ in self.rubric)


OPEN_EXERCISES = (
    OpenExercise(20, "A strategy of your own", """
Think of another answer to the question which tokens a model should guess, and write it as a class
with a `mask` method in a file of its own: `python train.py --masking my_strategy.py:MyStrategy`.
Compare it with random masking over at least five seeds (`python stats.py sweep --tasks mlm`), and
report in at most two pages.""", 600, (
        (4, "the idea, and why it might help, in terms of what the model can learn from a token"),
        (4, "the masked share is the rate on texts of any length, shown by a measurement"),
        (4, "randomness comes from the generator; special tokens and padding are never masked"),
        (4, "five seeds or more, the same for both strategies; interval and p-value, adjusted if "
            "several comparisons were made"),
        (4, "a conclusion that claims no more than the numbers do, and names what was not "
            "tested"))),
    OpenExercise(21, "Does entropy masking do more than rarity masking?", """
The entropy at a visible token mostly says how rare the token is. The strategy `rarity` is the
control (ours): frequency in the entropy's place. Find out whether `entropy` does better than
`rarity`, overall and on common, middling and rare word pieces (the three bands of the exam), with
and without hidden entropies (`--entropy-input`).""", 600, (
        (4, "a hypothesis with a direction, written down before the runs, and the smallest effect "
            "that would matter"),
        (4, "the number of seeds follows from that effect (`stats.py report --effect`)"),
        (4, "equal budget, steps, corpus and teacher on both sides, shown from the runs' records"),
        (4, "overall and by band, with intervals and Holm's adjustment over all comparisons made"),
        (4, "an answer that separates what was found from what could not be decided"))),
)
BY_NUMBER = {exercise.number: exercise for exercise in (*EXERCISES, *OPEN_EXERCISES)}


def chosen(numbers: list[int]) -> list:
    """Returns the exercises of these numbers in order; of no numbers, all. Raises InputError."""
    for number in numbers:
        if number not in BY_NUMBER:
            raise InputError(f"there is no exercise {number}: they are 1 to {max(BY_NUMBER)}")
    return [BY_NUMBER[number] for number in sorted(set(numbers or BY_NUMBER))]


def show_list():
    """Prints the table."""
    print(f"{'':>2}  {'exercise':44} {'points':>6} {'minutes':>7}  {'':3}  {'file':10}  builds on")
    for exercise in EXERCISES:
        before = ", ".join(map(str, exercise.builds_on))
        stars = "*" * exercise.difficulty
        print(f"{exercise.number:2}  {exercise.title:44} {exercise.points:6} {exercise.minutes:7}  "
              f"{stars:3}  {exercise.file:10}  {before}".rstrip())
    for exercise in OPEN_EXERCISES:
        print(f"{exercise.number:2}  {exercise.title:44} {exercise.points:6} {exercise.minutes:7}  "
              "open, graded by its rubric")


# --- the hand-out ---------------------------------------------------------------------------------

def body_lines(text: str, name: str) -> tuple[int, int, int]:
    """Returns where a function's body is in a file: its first line after the docstring, its last
    line (counted from 1), and its indentation."""
    body = find(ast.parse(text), name).body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    first = body[0].end_lineno + 1 if documented else body[0].lineno
    lines = text.splitlines()
    while lines[first - 2].lstrip().startswith("#"):  # a comment above the first statement
        first -= 1
    return first, body[-1].end_lineno, body[0].col_offset


def blank(text: str, name: str, message: str, docstring: str | None = None) -> str:
    """Returns a file's text without one function's body: the signature and the docstring stay, or
    another docstring takes the place of its own."""
    first, last, indent = body_lines(text, name)
    new = [f"raise NotImplementedError({json.dumps(message, ensure_ascii=False)})"]
    if docstring:
        first = find(ast.parse(text), name).body[0].lineno
        new = ['"""' + docstring.strip(), '"""', *new]
    new = textwrap.indent("\n".join(new), " " * indent).splitlines()
    lines = text.splitlines()
    return "\n".join(lines[:first - 1] + new + lines[last:]) + "\n"


def item(text: str) -> str:
    """Returns an item of a Markdown list."""
    return textwrap.fill(f"- {text}", 100, subsequent_indent="  ")


def assignment(exercises: list) -> str:
    """Returns ASSIGNMENT.md."""
    parts = [f"""# Assignment

{sum(e.points for e in exercises)} points. Each exercise is one to three functions without bodies;
their docstrings give shapes, units and errors. Write a body where it says
`raise NotImplementedError("exercise N: ...")`. Helpers that are "left out" need none.

Check yourself with the public part of an exercise's checks, `python -m pytest -m exercise_6` for
exercise 6. The grader has further checks: of probabilities, of extreme inputs, of what is passed
on. It grades each exercise by itself, in a working implementation: a mistake in one costs no point
in another. Your own checks of an exercise fail until those under "Builds on" are written.

- Hand in the six .py files. Only the named functions count, and what they use of your own: imports,
  functions at the top level of the same file, and methods of the same class (no constants, no
  classes).
- Random numbers come from the `generator` that a function is given. No check asks for one
  particular draw; distributions are compared.
- An exercise has {CPU_SECONDS} seconds. Code that prints, exits, writes files or starts programs
  has no points: take such lines out.
- "Ours" marks a definition that is this project's, because the paper leaves it open or its text was
  not at hand. B is the batch, L tokens, K and N chosen tokens, H the width, V the vocabulary.
- [E] is Srinivasagan et al. 2026, arXiv 2605.28526; [T] is Abdurrahman et al., arXiv 2303.15619.\
"""]
    for exercise in exercises:
        if isinstance(exercise, OpenExercise):
            rubric = "\n".join(item(f"{points} points: {what}") for points, what in exercise.rubric)
            parts.append(f"## {exercise.number}. {exercise.title}\n\n{exercise.points} points, "
                         f"about {exercise.minutes // 60} hours, graded by this rubric.\n"
                         f"{exercise.text}\n\n{rubric}")
            continue
        names = ", ".join(f"`{name}`" for name in exercise.functions)
        lines = [f"## {exercise.number}. {exercise.title}", "",
                 f"{exercise.points} points, about {exercise.minutes} minutes, difficulty "
                 f"{'*' * exercise.difficulty} · {names} in {exercise.file}", "",
                 f"Source: {exercise.source}.", exercise.text, ""]
        if exercise.builds_on:
            lines.append("Builds on " + ", ".join(map(str, exercise.builds_on)) + ".")
        if exercise.forbidden:
            calls = ", ".join(f"`{name}`" for name in exercise.forbidden)
            lines.append(f"Not allowed: {calls}.")
        lines += ["", *(item(f"Hint: {hint}") for hint in exercise.hints), "",
                  f"Check: `python -m pytest -m exercise_{exercise.number}`"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


HANDOUT_README = """# minimask, the hand-out

A masked language model from scratch, five ways to choose which tokens it must guess,
distillation, GLUE, and the statistics to compare them. Some functions are yours to write: see
ASSIGNMENT.md.

    pip install -r requirements.txt
    python -m pytest -m exercise_1

| file | holds |
|---|---|
| model.py | the encoder and its heads |
| masking.py | the strategies: what to mask |
| distill.py | distillation |
| train.py | corpus, tokenizer, pretraining |
| glue.py | GLUE: loading, metrics, fine-tuning |
| stats.py | paired statistics over seeds |
"""


def handout_texts(exercises: list) -> dict[str, str]:
    """Returns the files of the hand-out, by path."""
    texts = {name: (ROOT / name).read_text() for name in (*FILES, "requirements.txt", "LICENSE")}
    for exercise in exercises:
        if isinstance(exercise, OpenExercise):
            continue
        for name in exercise.functions:
            texts[exercise.file] = blank(texts[exercise.file], name,
                                         f"exercise {exercise.number}: {name}",
                                         exercise.docstrings.get(name))
        for file, name in (entry.split(":") for entry in exercise.cut):
            message = f"exercise {exercise.number}: {name} shows its solution, and is left out"
            texts[file] = blank(texts[file], name, message)
    markers = "".join(f"    exercise_{e.number}: {e.title}\n" for e in EXERCISES)
    texts["pytest.ini"] = f"[pytest]\ntestpaths = tests\npythonpath = .\nmarkers =\n{markers}"
    texts["README.md"] = HANDOUT_README
    texts["ASSIGNMENT.md"] = assignment(exercises)
    texts["tests/test_public.py"] = (EXERCISES_DIR / "test_public.py").read_text()
    return texts


def handout(folder: Path, numbers: list[int]):
    """Writes the hand-out. Raises InputError where the folder is not empty."""
    exercises = chosen(numbers)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose another folder")
    texts = handout_texts(exercises)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    print(f"{folder}: {len(exercises)} exercises, {sum(e.points for e in exercises)} points")


# --- the grader -----------------------------------------------------------------------------------

class Result(NamedTuple):
    exercise: Exercise
    sentence: str | None  # what is wrong; None where nothing is

    @property
    def points(self) -> int:
        return 0 if self.sentence else self.exercise.points


def is_undone(function: ast.FunctionDef) -> bool:
    """Returns whether a body is still the hand-out's: a docstring and a NotImplementedError."""
    body = [node for node in function.body if not (isinstance(node, ast.Expr)
                                                   and isinstance(node.value, ast.Constant))]
    return len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in \
        used_names(body[0])


def forbidden_calls(exercise: Exercise, tree: ast.Module, reference: ast.Module) -> set[str]:
    """Returns the library calls that the exercise does not allow and the student's code has.

    The reference's own body is exempt: the product may use a fused kernel where a student shows the
    formula."""
    added, methods = helpers(tree, reference, list(exercise.functions))
    code = added + [node for _, node in methods]
    code += [find(tree, name) for name in exercise.functions
             if ast.dump(find(tree, name)) != ast.dump(find(reference, name))]
    return set().union(*map(used_names, code)) & set(exercise.forbidden)


def run_alone(exercise: Exercise, path: Path, seconds: float) -> str | None:
    """Runs an exercise's checks in a process of its own. Returns what is wrong, or None."""
    command = [sys.executable, str(EXERCISES_DIR / "grading.py"), str(exercise.number), str(path)]
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(command + list(exercise.functions), cwd=empty, env=environment,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return f"it does not end within {seconds:.0f} s: is there an endless loop?"
    if process.returncode == -24:  # SIGXCPU
        return f"it does not end within {CPU_SECONDS} s: is there an endless loop?"
    try:
        return json.loads(output.decode().splitlines()[-1])
    except (IndexError, ValueError):
        return f"it ended the process (status {process.returncode}) before the checks were over"


def grade_one(exercise: Exercise, folder: Path, seconds: float = WALL_SECONDS) -> Result:
    """Grades one exercise. Raises InputError where its file or function is not there."""
    path = (folder / exercise.file).resolve()
    if not path.is_file():
        raise InputError(f"{folder} has no {exercise.file}: hand in all six files")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:  # ValueError: a zero byte
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        return Result(exercise, f"{exercise.file} cannot be read{where}: {message}")
    reference = ast.parse((ROOT / exercise.file).read_bytes())
    for name in exercise.functions:
        if find(tree, name) is None:
            raise InputError(f"{path} has no function {name} (exercise {exercise.number})")
    undone = [name for name in exercise.functions if is_undone(find(tree, name))]
    if undone:
        rest = f": {', '.join(undone)}" if len(undone) < len(exercise.functions) else ""
        return Result(exercise, f"not done yet{rest}")
    if calls := forbidden_calls(exercise, tree, reference):
        return Result(exercise, f"it uses {', '.join(sorted(calls))}, which the exercise does not "
                                "allow: write the formula out")
    return Result(exercise, run_alone(exercise, path, seconds))


def grade(folder: Path, exercises: list[Exercise],
          seconds: float = WALL_SECONDS) -> list[Result]:
    """Grades the exercises, two at a time. Raises InputError on a folder that is no hand-out."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda exercise: grade_one(exercise, folder, seconds), exercises))


def gradescope(results: list[Result]) -> dict:
    """Returns Gradescope's results.json."""
    return {"tests": [{
        "number": str(result.exercise.number), "name": result.exercise.title,
        "score": result.points, "max_score": result.exercise.points,
        "status": "failed" if result.sentence else "passed",
        "output": result.sentence or "right",
    } for result in results]}


def show_results(results: list[Result]):
    """Prints a line for each exercise, and the sum."""
    for result in results:
        points = f"{result.points}/{result.exercise.points}"
        print(f"{result.exercise.number:2}  {result.exercise.title:36} {points:>6}  "
              f"{result.sentence or ''}".rstrip())
    total = f"{sum(r.points for r in results)}/{sum(r.exercise.points for r in results)}"
    print(f"    {'':36} {total:>6}")


# --- command line ---------------------------------------------------------------------------------

def parse_args(argv=None):
    """Returns the arguments."""
    parser = Parser(prog="assignments.py", description="Exercises: list, hand out, grade.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,handout,grade}")
    commands.add_parser("list", help="the table of exercises")
    for name, text in (("handout", "write what students get into a new folder"),
                       ("grade", "grade a student's folder")):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path, metavar="DIR")
        command.add_argument("numbers", type=int, nargs="*", metavar="NUMBERS",
                             help="exercises (default: all)")
    command.add_argument("--json", type=Path, metavar="FILE",
                         help="also write Gradescope's results")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs one of the three commands."""
    args = parse_args(argv)
    if args.command == "list":
        return show_list()
    if args.command == "handout":
        return handout(args.folder, args.numbers)
    exercises = [e for e in chosen(args.numbers) if isinstance(e, Exercise)]
    results = grade(args.folder, exercises)
    show_results(results)
    if args.json:
        write_atomic(args.json, json.dumps(gradescope(results), indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
