"""The exercises of the course: tasks, equations, hints, points, rubrics. assignments.py hands them
out and grades them.

Exercises 1 to 20 are functions to write, 21 is a run of the whole, the others are graded by people.

[E] Srinivasagan et al. 2026, arXiv 2605.28526; [T] Abdurrahman et al., arXiv 2303.15619. The full
texts of both were not at hand: a definition that is this project's says "ours".
"""
from typing import NamedTuple


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
    cut: tuple[str, ...] = ()  # "file:function" that shows the solution: blank too
    docstrings: dict[str, str] = {}  # function -> its docstring in the hand-out, if another

    @property
    def places(self) -> list[tuple[str, str]]:
        """File and function of all that is blank in the hand-out."""
        return [(self.file, name) for name in self.functions] \
            + [tuple(entry.split(":")) for entry in self.cut]


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
falls on the attention weights, in training alone. `query_hidden` (B, M, H) asks and `hidden`
(B, L, H) answers: the same tensor in most layers, and M positions of it in the last. Every row has
a key that may be read. The class's `fused` is for the course's own solution: let it be.""",
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

with `attention_norm` first and `output_norm` last. With `queries` (B, M), column numbers for each
row, the result is y at those columns alone, (B, M, H); all of `hidden` is read still.""",
        5, 40, 1, (
            "Dropout falls on what is added, not on the sum.",
            "`Tensor.gather` takes another set of columns from each row."),
        builds_on=(3,), forbidden=("TransformerEncoderLayer",)),
    Exercise(
        5, "The masked-LM head on chosen rows", "model.py",
        ("MaskedLMHead.forward", "BertForMaskedLM.encode"),
        "BERT §3.1, task 1; the rows are ours", """
    logits = LayerNorm(GELU(W h)) Eᵀ + b

with the word embeddings E as the decoder (tied weights). Only 15% of the positions have a label, so
`encode` returns the chosen ones alone: with `positions`, what `query_positions(mask)` gives for a
(B, L) bool mask, (N, H) in the order of `full[mask]`.""", 4, 40, 1, (
            "The encoder can be given columns to compute alone (`queries`); a right result without "
            "that saving has full points.",
            "Pass everything on: attention_mask, token_type_ids, inputs_embeds."),
        builds_on=(3, 4)),
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
        8, "The five selections", "masking.py", ("select_positions",),
        "[E] compares several selections; `mixed` and `sample` as defined here are ours", """
Spends a budget k, counted already, by a score (here entropy). Where a row has fewer than k maskable
positions, it takes all of them.

- `high`: the k highest; `low`: the k lowest; `middle`: the k nearest the median of the maskable
  positions of its row (of an even number, the middle between two);
- `mixed`: half of k the highest and half uniformly from the rest; of an odd k either half may have
  the larger part, and k positions are masked in all;
- `sample`: k positions one after the other, each with probability proportional to its score among
  what is left. Scores are never negative; those of 0 come last.

Another `select` raises ValueError.""", 6, 75, 3, (
            "Look up the Gumbel trick, or exponential races: k draws by one sort.",
            "`sample` in proportion in its first draw alone is the most frequent mistake."),
        builds_on=(1,)),
    Exercise(
        9, "The entropy of a masked token", "masking.py", ("masked_entropy",),
        "ours, a second reading of [E], which does not say where entropy is read", """
The entropy at a token that the model can see answers another question than at one that is hidden.
So the maskable positions of each row are dealt at random into ⌈1/rate⌉ groups, as equal in size as
can be, and each group is masked in turn: that many passes. Returns every position's entropy in the
pass that hid it, 0 off the maskable positions.""", 6, 60, 2, (
            "`position_entropy` is given: one pass, for some of the positions.",
            "A random order and a remainder make groups of equal size."),
        builds_on=(3, 4, 5, 7), docstrings={"masked_entropy": """
Returns the entropy of every maskable position while its token is hidden from the model.

Each row's positions are dealt at random into ⌈1/rate⌉ groups, which are masked one after
another, in as many passes. Returns (B, L) in nats, 0 where nothing is maskable."""}),
    Exercise(
        10, "Self-entropy", "masking.py", ("SelfEntropy.mask",),
        "[E], self-masking; drawing candidates is ours", """
The model in training is its own reference. With `context.entropy_input == "masked"`: a budget k for
each row, 2k candidates drawn uniformly (all, where there are fewer) and masked, one pass, and of
the candidates k by `self.select` (exercise 8). With "visible": one pass over the text as it is, and
k of all maskable positions. The model's mode, its gradients and the batch stay as they were.""", 5, 45, 2, (
            "k is drawn once: the candidates are twice that k.",),
        builds_on=(1, 3, 4, 5, 7, 8)),
    Exercise(
        11, "The distillation loss", "distill.py", ("kd_loss",),
        "Hinton et al. 2015 §2; DistilBERT §3", """
    α T² KL(softmax(z_t / T) ‖ softmax(z_s / T)) + (1 − α) CE(z_s, labels)

the mean over the N masked positions, in nats. At α = 0 there may be no teacher. Large logits
(hundreds) do not overflow, and bfloat16 logits are computed in float32.""", 5, 45, 2, (
            "KL(p ‖ q) = Σ p (ln p − ln q): who is p?",
            "Work with logarithms of probabilities and never with the logarithm of a softmax."),
        forbidden=("kl_div", "KLDivLoss", "kl_divergence", "Categorical", "distributions")),
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
`reduce(tensor)`, if it is given, which sums a tensor in place over data-parallel ranks (which
tensor is yours to find), updates `self.weight` and `self.seen`, and leaves `self.totals` at zero
for the next step. Several `accumulate` calls before one `step`, or several ranks, must give what
one large batch gives.""", 6, 75, 3, (
            "What can be summed over batches and ranks: sums, counts, or means?",
            "`self.totals` (2, 2V) is given: row 0 holds sums, row 1 counts; columns 0 to V − 1 "
            "are the types where visible, columns V to 2V − 1 the types where masked."),
        docstrings={"Typhoon.step": """
Ends a step: w_v ← (1 − β) w_v + β s_v for each type v that occurred; its first s_v sets its w_v.

s_v is the mean over its visible tokens plus the mean over its masked ones. `reduce` sums a
tensor in place over data-parallel ranks; every rank must end with the mean over the whole
batch, as a single process would."""}),
    Exercise(
        14, "Typhoon's rates", "masking.py", ("Typhoon.rates",),
        "[T]: calibration to a budget; giving back what the cap at 1 cuts off is ours", """
    r(v) = min(1, c u(v)),  u(v) = 1 − σ + σ ŵ(v),  Σ_v f(v) r(v) = rate

where ŵ is w, exercise 13's average, scaled to [0, 1] over the types seen, and 1 for a type not seen
yet; where all weights are equal, ŵ is 1. f is the frequency of a type in the corpus. Find c: what
the cap cuts off one type is given back to all others, whose rates stay in proportion to u.""",
        7, 90, 3, (
            "Without the cap c has a closed form.",
            "With it: the expected rate grows with c, so c can be bracketed; or order the types by "
            "u and ask which of them are capped.",
            "Giving back once may push other types over 1.")),
    Exercise(
        15, "One training step", "train.py", ("Trainer.micro_step",),
        "BERT §3.1; the teacher's input is ours", """
Corrupts a batch (exercise 2, with the recipe's split, the trainer's generator and the vocabulary's
special ids), runs the model, and the teacher where `kd_weight` is above 0, on the corrupted text at
the masked positions, with the batch's attention_mask and token_type_ids, and makes the gradients of

    world_size() · (sum of the loss over this micro-batch's masked positions) / masked_in_all

The loss is exercise 11's, with α = `kd_weight` and the recipe's temperature. Returns the sum of the
loss, without a graph. If the strategy `wants_gradient`, calls `observe(batch, unseen, gradient)`:

- `unseen` is True where a masked token was changed; one that corruption kept is seen;
- `gradient` is that of the sum / masked_in_all, without world_size(), with respect to the word
  embeddings that went in.

The model runs as `self.parallel`, which averages gradients over ranks; both models run under
`self.autocast()`; the teacher has no gradients. Where nothing is masked the loss is 0 and every
parameter has a gradient of 0.""",
        10, 120, 3, (
            "Two micro-batches must give the gradients of one large batch, whatever each masks.",
            "Give the model `inputs_embeds`, and keep their gradient; `query_positions(mask)` is "
            "what it takes as positions.",
            "`self.parallel` averages gradients over ranks; masked_in_all counts over all.",
            "The mean of no numbers is nan."),
        builds_on=(2, 3, 4, 5, 11), cut=("masking.py:feed",)),
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
are given. Where there is no spread (one seed, or an sd of 0 by `mean_sd`) both give (nan, nan).
Scores are finite, and there is one at least.""",
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
    Exercise(
        20, "Typhoon from the task's labels", "glue.py", ("TaskTyphoon.learn_from_labels",),
        "[T]'s abstract, \"gradient of the task loss\"; the probe is ours", """
[T]'s pipeline trains a masked LM on a task's own text before it is fine-tuned, and Typhoon's rates
follow the gradient of the task's *supervised* loss. `self.probe` is a classifier that shares the
encoder with that masked LM and has a head of its own. One call, for one batch:

- the loss is `task_loss` of the probe on the text as it is, against the labels of the batch's
  texts (`batch.index` numbers them);
- its gradient at the word embeddings goes to the moving average, by `observe`: every token was
  seen;
- `self.head_optimizer` takes one step on `self.head`.

The encoder learns nothing from the labels: its weights and its mode stay, no gradient is left in
it, and nothing of it is frozen.""", 6, 50, 2, (
            "`loss.backward(inputs=[...])` computes the gradients of these tensors alone.",
            "The probe takes `inputs_embeds`. What must they be, to have a gradient of their own?"),
        builds_on=(3, 4, 12, 13)),
)


# --- the whole at work ----------------------------------------------------------------------------

class Milestone(NamedTuple):
    """The whole at work: graded by the exam of a run that the student hands in."""
    number: int
    title: str
    text: str
    points: int
    minutes: int
    builds_on: tuple[int, ...]


COMMAND = "python train.py --out milestone"

MILESTONE = Milestone(
    21, "Your model learns", f"""
With these exercises solved and all others blank, the whole runs: a model that you wrote learns
English from the documentation that ships with Python, in some minutes on two cores.

    {COMMAND}

The exam at its end masks 15% of a held-out text at random, for everybody alike. A model whose loss
is not below that of "word-piece frequency alone" learnt nothing of the context: a mask, a gradient
or a target is wrong. One that is below it and misses the last column of the table learnt too
little, or saw the answers: a part is still wrong. Where loss and accuracy lie in that column, hand
in milestone/exam.json; the rest of that folder is not needed.

After a crash or Ctrl-C, `python train.py --resume milestone` goes on from the last checkpoint. To
begin again, as after every change of your code, empty the folder first.""",
    10, 30, (1, 2, 3, 4, 5, 7, 11, 15))


# --- graded by people -----------------------------------------------------------------------------

class OpenExercise(NamedTuple):
    number: int
    title: str
    text: str
    minutes: int
    rubric: tuple[tuple[int, str], ...]  # points, for what
    key: str = ""  # for the lecturer alone: what is to be found, or how the rubric is meant
    explains: bool = False  # the rubric holds the answer, and is the lecturer's as well

    @property
    def points(self) -> int:
        return sum(points for points, _ in self.rubric)


OPEN_EXERCISES = (
    OpenExercise(22, "Explain: why T²?", """
The divergence in exercise 11 is multiplied by T². Explain why, starting from its gradient with
respect to one logit of the student. What would go wrong without the factor, and in which limit is
the argument exact?""", 30, (
        (2, "the gradient of KL(p ‖ q) by the student's logit z_v is (q_v − p_v) / T, with p and q "
            "the softened distributions of teacher and student"),
        (1, "for large T both are nearly uniform and q_v − p_v is about (z_v − t_v) / (V T), for "
            "logits with mean 0: the gradient falls as 1 / T², and T² cancels that exactly as T → "
            "∞"),
        (1, "without it, another T would also be another weight of the two terms: the larger T, "
            "the less the teacher would count beside the labels, whatever α is")), explains=True),
    OpenExercise(23, "Explain: why is half of the budget random?", """
`Entropy` selects by `mixed`: half of the budget by the highest entropies, half uniformly from the
rest. Explain what a model misses that must guess nothing but the most uncertain tokens, and what
the random half gives it. What in the exam's figures would show it?""", 30, (
        (2, "high entropies seldom fall on common words, so that their prediction is hardly ever "
            "trained; a model from scratch lacks the frame of the language, on which the rest "
            "builds, and the exam asks for random tokens"),
        (1, "a frozen teacher's highest entropies are the same positions in every epoch: without "
            "a random part most of the text is never a target"),
        (1, "the accuracy on common word pieces and the loss beside that of frequency alone: with "
            "`high` both fall far behind random masks")), explains=True),
    OpenExercise(24, "Explain: the entropy of a visible token", """
A teacher was trained with BERT's corruption, 80% [MASK], 10% random, 10% kept. Its entropy can be
read at a token that it sees, or at one that is hidden from it. Explain what the first one measures,
what the second one does, and what exercise 9 does about it.""", 30, (
        (2, "where it sees a token, the teacher only has to decide whether that one was kept or "
            "swapped: it mostly copies, and doubts rare tokens, which look swapped, so that this "
            "entropy is a measure of rarity"),
        (1, "where the token is hidden, entropy says how much the context leaves open, which is "
            "the question that the student will be asked"),
        (1, "to hide all at once would take the context away: groups of a share `rate` are hidden "
            "one after the other, as many as the student will have masked")), explains=True),
    OpenExercise(25, "A strategy of your own", """
Think of another answer to the question which tokens a model should guess, and write it as a class
with a `mask` method in a file of its own, as the README's example:
`python train.py --masking my_strategy.py:MyStrategy`. Compare it with random masking over at least
five seeds (`python stats.py sweep --tasks mlm`), and report in at most two pages.""", 600, (
        (4, "the idea, and why it might help, in terms of what the model can learn from a token"),
        (4, "the masked share is the one that the strategy promises, on texts of any length, shown "
            "by a measurement; the comparison says so where it is not random masking's"),
        (4, "randomness comes from the generator; special tokens and padding are never masked"),
        (4, "five seeds or more, the same for both strategies; interval and p-value, adjusted if "
            "several comparisons were made"),
        (4, "a conclusion that claims no more than the numbers do, and names what was not "
            "tested")), key="""
Five worked examples are in tests/exercises/strategies: spans, pairs of high PMI, a falling rate,
the hardest tokens by loss, and the baseline of exercise 27."""),
    OpenExercise(26, "Is entropy masking more than rarity?", """
The strategy `rarity` is the control (ours): frequency in the entropy's place. Find out whether
`entropy` does better than `rarity`, overall and on common, middling and rare word pieces (the three
bands of the exam), with and without masked entropies (`--entropy-input`).""", 600, (
        (4, "a hypothesis with a direction, written down before the runs, and the smallest effect "
            "that would matter"),
        (4, "the number of seeds follows from that effect (`stats.py report --effect`)"),
        (4, "equal budget, steps, corpus and teacher on both sides, shown from the runs' records"),
        (4, "overall and by band, with intervals and Holm's adjustment over all comparisons made"),
        (4, "an answer that separates what was found from what could not be decided"))),
    OpenExercise(27, "Find the bug", """
`baseline_2023.py` draws masks as the random baseline of a published comparison does in its code:
`python train.py --masking baseline_2023.py:Baseline`. It does not do what its docstring says. Find
out what it does, by measuring which positions it masks and how many. Say what a masked LM learns
from that, and what it may mean for a classifier that is fine-tuned from it. Then test that, against
`random`, with seeds: as a masked LM, or after `glue.py --adapt baseline_2023.py:Baseline`.""",
        480, (
        (4, "the line, and the masked share of each kind of position, measured"),
        (4, "what the masked LM learns from it, and what the classifier reads that others do not"),
        (4, "a test with five seeds or more that could have found the effect"),
        (4, "a conclusion about the published comparison that claims no more than was tested")),
        key="""
The probabilities are set to 0 on special tokens, and then the draw is compared with the plain rate:
[CLS] and [SEP] are masked as often as words are (so is [T]'s first public code). The masked share
of the ordinary tokens is right; more than the budget is masked, and of the guesses a part teaches
nothing, since column 0 is always [CLS]. The classifier reads the last layer at [CLS], which was
[MASK] in 30% of the texts, and was trained to say "[CLS]" and not to hold the text. That the
comparison's random baseline came last may have to do with it: it was never tested."""),
    OpenExercise(28, "Is it entropy or loss?", """
`self-entropy` takes, of 2k masked candidates, the k of which the model is least sure. A model can
be unsure and right, or sure and wrong. Write the strategy that takes the k candidates with the
highest loss (a file of your own; exercise 10 is the pattern), and find out whether it does better
than `self-entropy`, and whether both choose the same tokens.""", 600, (
        (4, "the strategy: right loss at masked candidates, the budget spent, no gradient left"),
        (4, "a hypothesis with a direction, written down before the runs, with its reason: what is "
            "a wrong and sure prediction a sign of, and what a token that nobody can guess?"),
        (4, "how often both choose the same tokens, early and late in a run, and by band"),
        (4, "five seeds or more, equal in all else, intervals, and Holm's adjustment"),
        (4, "an answer that separates what was found from what could not be decided")), key="""
tests/exercises/strategies/hardest.py is such a strategy."""),
)
ALL_EXERCISES = (*EXERCISES, MILESTONE, *OPEN_EXERCISES)
