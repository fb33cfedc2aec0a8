"""The public checks of the exercises. A student runs those of one: python -m pytest -m exercise_6

They find mistakes in formulas and prove nothing: the grader has further checks. A check says in one
sentence what is wrong. None of them asks for one particular draw of random numbers: where a
function draws, it is called many times and the shares are compared with the probabilities. None of
them minds the type of a number: results are compared as float64, whatever they are made of.
"""
import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import distill
import glue
import masking
import model
import stats
import train


# --- what the checks share ------------------------------------------------------------------------

def exercise(number):
    """Returns the marker of an exercise."""
    return getattr(pytest.mark, f"exercise_{number}")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*lengths, width=None):
    """Returns maskable (B, L): True on the first n tokens of every row."""
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


def plain(value):
    """Returns numbers as a float64 tensor: of Python, numpy or torch, one of them or lists."""
    assert value is not None, "the result is None: is a return missing?"
    if isinstance(value, torch.Tensor):
        return value.detach().double()
    if isinstance(value, (list, tuple)) and value:
        return torch.stack([plain(part) for part in value])
    return torch.from_numpy(np.array(value, dtype=np.float64))


def near(got, expected, tolerance=1e-5):
    """Returns whether numbers are equal up to rounding, and of the same shape."""
    got, expected = plain(got), plain(expected)
    return got.shape == expected.shape and torch.allclose(got, expected, tolerance, tolerance)


def same(got, expected):
    """Returns whether numbers are equal, and of the same shape."""
    return torch.equal(plain(got), plain(expected))


def as_mask(got, like, name):
    """Returns a mask of 0s and 1s of any type as bool. like: a mask of the shape it must have."""
    mask = plain(got)
    assert mask.shape == like.shape and ((mask == 0) | (mask == 1)).all(), \
        f"{name}: not a (B, L) bool mask"
    return mask.bool()


def shown(got, expected, digits=3):
    """Returns a wrong number with as many digits as tell it from the right one.

    >>> shown(0.5, 1.4), shown(1.38633, 1.38629)
    ('0.5', '1.38633')
    """
    text = f"{float(got):.{digits}g}"
    return text if text != f"{expected:.{digits}g}" or digits > 8 else shown(
        got, expected, digits + 1)


def check(subject, got, expected, mistakes, otherwise, tolerance=1e-4):
    """Fails where the result is not the expected one, and names the mistake whose value it has; the
    nearest, where several come close. mistakes: sentence -> value, or a function that makes it."""
    got, expected = plain(got), plain(expected)
    if near(got, expected, tolerance / 100):
        return
    mistakes = {words: value() if callable(value) else value for words, value in mistakes.items()}

    def off(value):
        value = plain(value)
        return (got - value).abs().max().item() if value.shape == got.shape else math.inf

    # What this input does not tell from the right result is no candidate.
    told = {words: value for words, value in mistakes.items()
            if near(got, value, tolerance) and not near(value, expected, tolerance / 10)}
    likeliest = min(told, key=lambda words: off(told[words]), default=None)
    assert likeliest is None or off(expected) <= 2 * off(told[likeliest]), \
        f"{subject}: {likeliest}"
    if not near(got, expected, tolerance):
        factor = 0.0
        if got.shape == expected.shape and got.numel() > 3:
            factor = ((got * expected).sum() / (expected * expected).sum()).item()
        multiple = near(got, factor * expected, tolerance) and abs(factor) > tolerance
        times = f" (it is {factor:.4g} times the right result)" if multiple else ""
        raise AssertionError(f"{subject}: {otherwise}{times}")


def raises(kind, function, *arguments):
    """Returns whether function(*arguments) raises this kind of error."""
    try:
        function(*arguments)
    except kind:
        return True
    return False


def likely(share, probability, draws):
    """Returns whether shares of so many draws are within five standard deviations of what they
    should be; a right solution fails this less than once in a million."""
    share, probability = plain(share), plain(probability)
    sd = (probability * (1 - probability) / draws).sqrt()
    return bool(((share - probability).abs() <= 5 * sd + 1e-9).all())


def follows_generator(draw):
    """Checks that draw(generator) takes its random numbers from there and from nowhere else."""
    state = torch.get_rng_state()
    first, second, third = draw(generator(1)), draw(generator(1)), draw(generator(2))
    assert torch.equal(torch.get_rng_state(), state), \
        "it draws from PyTorch's global generator: pass generator= on to everything that draws"
    assert same(first, second), "the same generator state gives another result"
    assert not same(first, third), "another generator gives the same result: it is ignored"


def small_config(**fields):
    """Returns a configuration with 2 layers, width 12, 3 heads, 40 word pieces, no dropout."""
    small = {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
             "intermediate_size": 20, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0}
    return model.BertConfig(**small | fields)


def randomised(module, seed=0):
    """Returns the module with random weights and biases, large enough to tell mistakes apart."""
    g = generator(seed)
    for name, parameter in module.named_parameters():
        mean = 1.0 if name.lower().endswith("norm.weight") else 0.0
        scale = 0.2 if parameter.dim() == 1 else 0.6
        parameter.data = mean + torch.randn(parameter.shape, generator=g) * scale
    return module


# --- 1: the budget and random masking -------------------------------------------------------------

@exercise(1)
def test_the_budget_is_the_expected_number_rounded_up_or_down():
    counts = torch.tensor([0, 1, 3, 10, 20, 126])
    maskable = rows(*counts.tolist())
    for seed in range(50):
        k = plain(masking.budget(maskable, 0.15, generator(seed)))
        assert k.shape == (6,) and (k == k.round()).all(), "budget: k must hold one integer a row"
        assert k[0] == 0, "budget: a row without maskable tokens has a budget above 0"
        off = (k - 0.15 * counts).abs()
        assert (off < 1 + 1e-4).all(), "budget: k is not rate × count rounded up or down; " \
            f"of {counts[off.argmax()]} tokens at rate 0.15 it takes {k[off.argmax()]:.0f}"


@exercise(1)
def test_top_k_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [-1.0, -2.0, -3.0, -4.0]])
    maskable = torch.tensor([[True, False, True, True], [True, True, True, True]])
    got = as_mask(masking.top_k(scores, maskable, torch.tensor([2, 1])), maskable, "top_k")
    assert not (got & ~maskable).any(), "top_k: it chooses a position that is not maskable"
    assert got.tolist() == [[False, False, True, True], [True, False, False, False]], \
        "top_k: not the k highest scores of each row"


@exercise(1)
def test_random_masks_ordinary_tokens_only():
    maskable = rows(20, 7, 0, 1)
    for seed in range(30):
        mask = as_mask(masking.random_mask(maskable, 0.3, generator(seed)), maskable, "random_mask")
        assert not (mask & ~maskable).any(), "random_mask: it masks special tokens or padding"
        assert mask[0].sum() == 6, "random_mask: 20 tokens at rate 0.3 must have 6 masked, " \
            f"and {mask[0].sum()} are"


# --- 2: corruption --------------------------------------------------------------------------------

def corrupt(*arguments, **options):
    """Returns the two results of masking.corrupt as long tensors."""
    return [plain(part).long() for part in masking.corrupt(*arguments, **options)]


@exercise(2)
def test_labels_are_the_original_tokens_of_the_masked_positions():
    ids, mask = torch.arange(10, 30).reshape(2, 10), rows(4, 7, width=10)
    original = ids.clone()
    corrupted, labels = corrupt(ids, mask, 4, 40, generator=generator(), special_ids=(0, 4))
    assert torch.equal(ids, original), "corrupt: it changes input_ids in place"
    assert torch.equal(corrupted[~mask], ids[~mask]), "corrupt: it changes tokens off the mask"
    assert (labels[~mask] == -100).all(), "corrupt: labels off the mask are not −100"
    assert torch.equal(labels[mask], ids[mask]), \
        "corrupt: labels on the mask are not the original tokens"


@exercise(2)
def test_pure_splits():
    ids, mask = torch.arange(10, 20)[None], rows(4, width=10)
    got, _ = corrupt(ids, mask, 4, 40, (1, 0, 0), generator())
    assert got[0, :4].tolist() == [4, 4, 4, 4], "corrupt: with split (1, 0, 0) all become [MASK]"
    got, labels = corrupt(ids, mask, 4, 40, (0, 0, 1), generator())
    assert torch.equal(got, ids), "corrupt: with split (0, 0, 1) every token stays"
    assert torch.equal(labels[mask], ids[mask]), "corrupt: a token that stays has no label"
    got, _ = corrupt(ids, mask, 4, 40, (0, 1, 0), generator(), special_ids=(4,))
    assert (got[mask] != 4).all() and not torch.equal(got, ids), \
        "corrupt: with split (0, 1, 0) all become random tokens"


# --- 3: attention ---------------------------------------------------------------------------------

def attention(heads=3, width=12, dropout=0.0, seed=0):
    """Returns an attention layer with random weights, in evaluation mode."""
    config = small_config(hidden_size=width, num_attention_heads=heads,
                          attention_probs_dropout_prob=dropout)
    return randomised(model.SelfAttention(config), seed).eval()


def hidden_states(*shape, seed=5):
    return torch.randn(shape, generator=generator(seed))


@exercise(3)
@torch.no_grad()
def test_attention_weights_sum_to_one():
    layer, hidden = attention(), hidden_states(2, 5, 12)
    layer.value.weight[:], layer.value.bias[:] = 0, 1  # a mean of values is a sum of weights
    got = layer(hidden, hidden)
    assert got.shape == (2, 5, 12), f"attention: the result is {tuple(got.shape)}, not (B, L, H)"
    ones = torch.ones(2, 5, 12)
    assert not near(got, ones), "attention: the output layer is left out"
    assert near(got, layer.output(ones), 1e-4), \
        "attention: where all values are 1, the result is not the output layer's of ones: the " \
        "weights of a query do not sum to 1 over the keys, or the values are not `self.value`'s"


@exercise(3)
@torch.no_grad()
def test_attention_does_not_mind_the_order_of_the_tokens():
    layer, hidden = attention(), hidden_states(2, 5, 12)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = layer(hidden[:, order], hidden[:, order])
    assert near(moved, layer(hidden, hidden)[:, order], 1e-4), \
        "attention: the same tokens in another order give other results: look at the axes, where " \
        "heads are taken apart and where they are put together"


@exercise(3)
@torch.no_grad()
def test_nobody_reads_a_masked_key():
    layer, hidden = attention(), hidden_states(2, 5, 12)
    key_mask = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()[:, None, None, :]
    changed = hidden.clone()
    changed[0, 3] += 2
    before, after = layer(hidden, hidden, key_mask), layer(changed, changed, key_mask)
    assert not before.isnan().any(), "attention: with key_mask the result is nan"
    assert near(before[0, [0, 1, 2, 4]], after[0, [0, 1, 2, 4]]), \
        "attention: a key that key_mask hides still has weight"


@exercise(3)
@torch.no_grad()
def test_attention_by_hand():
    """Two heads of width 4. At the first token the first head scores 2 ln 3 / √4 = ln 3 and the
    second one −ln 3, at the second token both score 0: weights of 3/4 and 1/4, 1/4 and 3/4."""
    layer, hidden = attention(heads=2, width=8), torch.zeros(1, 2, 8)
    for part in (layer.query, layer.key, layer.value, layer.output):
        part.weight[:], part.bias[:] = torch.eye(8), 0
    layer.query.weight[:] = 0
    layer.query.bias[[0, 4]] = 1
    layer.value.weight[[0, 4]] = 0
    hidden[0, 0, [0, 1, 4, 5]] = torch.tensor([2 * math.log(3), 1, -2 * math.log(3), 1])

    def two_heads(first, second=None):
        return [[[0, first, 0, 0, 0, 1 - first if second is None else second, 0, 0]]]

    check("attention", layer(hidden[:, 1:], hidden), two_heads(3 / 4), {
        "the scores lack the 1 / √d": two_heads(9 / 10),
        "the scores are divided by √H: d is the width of one head":
            two_heads(1 / (1 + 3 ** -(0.5 ** 0.5))),
        "the scores are divided by d, not by √d": two_heads(1 / (1 + 3 ** -0.5)),
        "all keys have the same weight: is it one head, or are queries and keys swapped?":
            two_heads(1 / 2),
        "the second head's values come with the first head's weights": two_heads(3 / 4, 3 / 4)},
        "not softmax(Q Kᵀ / √d) V in each head, the heads side by side")


# --- 4: the block ---------------------------------------------------------------------------------

def block(dropout=0.0, seed=0):
    """Returns a block with random weights, in evaluation mode."""
    return randomised(model.Block(small_config(hidden_dropout_prob=dropout)), seed).eval()


@exercise(4)
@torch.no_grad()
def test_the_blocks_output_is_normalised():
    layer = block()
    layer.output_norm.weight[:], layer.output_norm.bias[:] = 1, 0
    got = layer(hidden_states(2, 5, 12))
    assert got.shape == (2, 5, 12), f"block: the result is {tuple(got.shape)}, not (B, L, H)"
    assert near(got.mean(-1), torch.zeros(2, 5), 1e-4) \
        and near(got.var(-1, unbiased=False), torch.ones(2, 5), 1e-3), \
        "block: where output_norm has weight 1 and bias 0, the output is not normalised"


@exercise(4)
@torch.no_grad()
def test_the_block_by_hand():
    """Attention adds (0, 0, 2, −2), and the feed-forward (0, 2, −2, 0) since GELU(1) = 0.841345."""
    config = small_config(hidden_size=4, num_attention_heads=1)
    layer = randomised(model.Block(config)).eval()
    for part in (layer.attention.output, layer.intermediate, layer.output):
        part.weight[:], part.bias[:] = 0, 0
    layer.attention.output.bias[:] = torch.tensor([0.0, 0, 2, -2])
    layer.intermediate.bias[0] = 1
    layer.output.weight[1:3, 0] = torch.tensor([2, -2]) / 0.841345
    for norm, scale in ((layer.attention_norm, 1), (layer.output_norm, 2)):
        norm.weight[:], norm.bias[:] = scale, 0

    def normal(*row):
        return 2 * F.layer_norm(torch.tensor([[row]]), (4,))

    check("block", layer(torch.tensor([[[2.0, -2, 0, 0]]])), [[[2, 2, -2, -2]]], {
        "LayerNorm comes before attention: BERT normalises after the sum": normal(2.0, 0, 0, -2),
        "attention's output is not added to its input": normal(0.0, 2, 2 ** 0.5 - 2, -2 ** 0.5),
        "the feed-forward's output is not added to its input": normal(0.0, 2, -2, 0),
        "the feed-forward's output is added to the block's input, and not to its own":
            normal(2.0, 0, -2, 0),
        "attention_norm stands in output_norm's place": [[[1, 1, -1, -1]]],
        "the feed-forward has a ReLU, not GELU, or neither":
            normal(1.0, 2 / 0.841345 - 1, 1 - 2 / 0.841345, -1)},
        "not the post-LayerNorm formula")


@exercise(4)
@torch.no_grad()
def test_asked_for_columns_are_the_same_columns():
    layer, hidden = block(), hidden_states(2, 5, 12)
    columns = torch.tensor([[3, 1], [0, 4]])
    got = layer(hidden, queries=columns)
    assert got.shape == (2, 2, 12), f"block: with queries (B, M) the result is {tuple(got.shape)}"
    expected = torch.stack([layer(hidden)[row, columns[row]] for row in range(2)])
    assert near(got, expected), "block: with queries the result is not the full result's columns"


# --- 5: the masked-LM head ------------------------------------------------------------------------

def small_mlm(seed=0, **fields):
    """Returns a masked language model with random weights, in evaluation mode."""
    return randomised(model.BertForMaskedLM(small_config(**fields)), seed).eval()


@exercise(5)
@torch.no_grad()
def test_one_row_of_logits_a_chosen_position():
    mlm, ids = small_mlm(), torch.arange(5, 17).reshape(2, 6)
    positions = torch.zeros(2, 6, dtype=torch.bool)
    positions[0, [4, 1]], positions[1, 3] = True, True
    got, full = mlm(ids, positions=model.query_positions(positions)), mlm(ids)
    assert full.shape == (2, 6, 40), f"head: logits of all positions are {tuple(full.shape)}"
    assert got.shape == (3, 40), f"head: logits of 3 positions are {tuple(got.shape)}, not (3, V)"
    assert near(got, full[positions]), "head: the rows are not those of full_logits[positions]"


@exercise(5)
@torch.no_grad()
def test_the_decoder_is_tied():
    mlm = small_mlm()
    rows_of_hidden = hidden_states(3, 12)
    before = mlm.logits(rows_of_hidden)
    mlm.bert.embeddings.word_embeddings.weight[7] = 0
    after = mlm.logits(rows_of_hidden)
    assert near(after[:, 7], mlm.head.bias[7].expand(3)), \
        "head: a word whose embedding is 0 must have its bias as logit (tied decoder, plus bias)"
    assert near(after[:, :7], before[:, :7]), "head: one word's embedding changes another's logit"


@exercise(5)
@torch.no_grad()
def test_the_head_by_hand():
    """Four words whose embeddings are the axes. The dense layer makes (1, −1, 0, 0), and GELU
    makes 0.841345 of 1 and −0.158655 of −1."""
    head = model.MaskedLMHead(small_config(vocab_size=4, hidden_size=4, num_attention_heads=1))
    head.dense.weight[:], head.dense.bias[:] = 0, 0
    head.dense.weight[:2, 3] = torch.tensor([1, -1])
    head.bias[:] = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def normal(*row):
        return F.layer_norm(torch.tensor([row]), (4,))

    bare = torch.tensor([[0.841345, -0.158655, 0, 0]])
    right = normal(*bare[0])
    check("head", head(torch.tensor([[0.0, 0, 1, 1]]), torch.eye(4)), right + head.bias, {
        "the activation is a ReLU, not GELU": normal(1.0, 0, 0, 0) + head.bias,
        "LayerNorm comes before the activation":
            torch.tensor([[1.302986, -0.111227, 0, 0]]) + head.bias,
        "LayerNorm is left out": bare + head.bias,
        "the dense layer is left out": normal(0.0, 0, 1, 1) + head.bias,
        "the activation is left out": normal(1.0, -1, 0, 0) + head.bias,
        "the bias of each word is left out": right,
        "the products are divided by √H: that belongs into attention": right / 2 + head.bias},
        "not LayerNorm(GELU(W h)) Eᵀ + b")


# --- 6: whole-word masking ------------------------------------------------------------------------

SENTENCE = [0, 1, 1, 2, 3, 4, 4, 4, 5, 0]  # the word of each position, 0 for a special token


def sentence_of_words(copies):
    """Returns maskable and continuation (copies, 10) for five words of 2, 1, 1, 3 and 1 pieces."""
    word = torch.tensor(SENTENCE)
    continuation = torch.cat([torch.tensor([False]), word[1:] == word[:-1]])
    return (word > 0).repeat(copies, 1), continuation.repeat(copies, 1)


@exercise(6)
def test_no_word_is_split():
    maskable, continuation = sentence_of_words(300)
    mask = masking.whole_word_mask(maskable, continuation, 0.4, generator())
    mask = as_mask(mask, maskable, "whole-word")
    assert not (mask & ~maskable).any(), "whole-word: it masks a special token"
    assert torch.equal(mask[:, 1], mask[:, 2]) and torch.equal(mask[:, 5], mask[:, 7]) \
        and torch.equal(mask[:, 5], mask[:, 6]), "whole-word: it splits a word"
    words = mask[:, [1, 3, 4, 5, 8]].sum(1)
    assert (words == 2).all(), "whole-word: of 5 words at rate 0.4 exactly 2 must be masked, " \
        f"and in one row {words[words != 2][:1].tolist()} are"


@exercise(6)
def test_a_piece_after_a_special_token_begins_a_word():
    maskable = torch.tensor([[False, True, False, True, False]]).repeat(100, 1)
    continuation = torch.tensor([[False, False, False, True, False]]).repeat(100, 1)
    mask = masking.whole_word_mask(maskable, continuation, 0.5, generator())
    assert (as_mask(mask, maskable, "whole-word").sum(1) == 1).all(), \
        "whole-word: a \"##\" piece after a special token is a word: of that one and another " \
        "exactly one must be masked at rate 0.5"


# --- 7: entropy -----------------------------------------------------------------------------------

@exercise(7)
def test_entropy_between_sure_and_ignorant():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [math.log(3), 0, -60, -60]])
    got = plain(masking.token_entropy(logits))
    assert got.shape == (3,), f"entropy: (3, 4) logits give {tuple(got.shape)}, not (3,)"
    assert near(got[0], math.log(4)), "entropy: four equally likely words must have ln 4 = " \
        f"1.38629 nats, not {shown(got[0], math.log(4))}"
    assert near(got[1], 0.0), "entropy: where the model is sure, the entropy is 0"
    assert near(got[2], 0.5623351), "entropy: of p = (3/4, 1/4) it is 0.562335 nats, not " \
        f"{shown(got[2], 0.5623351)}"


# --- 8: the five selections -----------------------------------------------------------------------

@exercise(8)
def test_high_low_and_middle_by_hand():
    entropy = torch.tensor([[9.0, 0.5, 3.0, 1.0, 8.0, 0.2, -9.0, 9.0]])
    maskable = torch.tensor([[False, True, True, True, True, True, False, False]])
    for select, expected in (("high", [2, 4]), ("low", [1, 5]), ("middle", [1, 3])):
        got = masking.select_positions(entropy, maskable, torch.tensor([2]), select)
        got = as_mask(got, maskable, f"selections: {select}")
        taken = got[0].nonzero()[:, 0].tolist()
        assert taken == expected, \
            f"selections: {select} of 2 takes positions {taken}, not {expected}"


@exercise(8)
def test_mixed_and_sample_spend_the_budget():
    entropy, maskable = torch.arange(12.0).repeat(200, 1), rows(11, width=12).repeat(200, 1)
    for select in ("mixed", "sample"):
        k = torch.tensor([5, 6]).repeat(100)
        got = masking.select_positions(entropy, maskable, k, select, generator())
        got = as_mask(got, maskable, f"selections: {select}")
        assert not (got & ~maskable).any(), f"selections: {select} takes what is not maskable"
        assert same(got.sum(1), k), f"selections: {select} does not take k positions"
        assert len(got[1::2].unique(dim=0)) > 1, \
            f"selections: {select} takes the same positions in each of 100 rows"
        if select == "mixed":
            assert got[:, 9:11].all() and got[1::2, 8].all(), \
                "selections: mixed does not take the k/2 most uncertain"


@exercise(8)
def test_an_unknown_selection_is_an_error():
    raised = raises(ValueError, masking.select_positions, torch.zeros(1, 4), rows(4),
                    torch.tensor([1]), "highest")
    assert raised, "selections: an unknown one does not raise ValueError"


# --- 9: masked entropy ----------------------------------------------------------------------------

MASK = 4  # the [MASK] token of the small models; 0 to 4 are special


def small_batch(*lengths, seed=3):
    """Returns a batch of random texts of so many ordinary tokens, between two special ones."""
    L = max(lengths) + 2
    ids = torch.randint(5, 40, (len(lengths), L), generator=generator(seed))
    ids[:, 0] = 2
    there = rows(*(n + 2 for n in lengths))
    for row, n in enumerate(lengths):
        ids[row, n + 1] = 3
    ids = ids.masked_fill(~there, 0)
    attention_mask = None if there.all() else there
    return masking.Batch(ids, ids > 4, torch.arange(len(lengths)), attention_mask)


@exercise(9)
def test_masked_entropies_are_those_of_maskable_positions():
    mlm, batch = small_mlm(), small_batch(12, 9, 4)
    got = plain(masking.masked_entropy(mlm, batch, 0.3, MASK, generator()))
    assert got.shape == batch.input_ids.shape, "masked entropy: the result is not (B, L)"
    assert (got[~batch.maskable] == 0).all(), "masked entropy: not 0 off the maskable positions"
    for entropy in got[batch.maskable].tolist():
        assert 0 < entropy <= math.log(40) + 1e-4, \
            f"masked entropy: an entropy is {entropy:.4g}, not between 0 and ln V = 3.689"


@exercise(9)
def test_a_hidden_token_does_not_say_its_entropy():
    """Texts of one token, which is hidden: what it is makes no difference."""
    mlm, batch = small_mlm(), small_batch(*[1] * 20)
    got = plain(masking.masked_entropy(mlm, batch, 0.3, MASK, generator()))[:, 1]
    assert near(got, got[:1].expand(20)), \
        "masked entropy: in a text of one token the entropy depends on that token: it is not hidden"


# --- 10: self-entropy -----------------------------------------------------------------------------

def self_entropy(mlm, rate, **options):
    """Returns the strategy over a model, as the training loop would build it."""
    return masking.STRATEGIES["self-entropy"](
        masking.Context(rate, mlm, None, None, MASK, **options))


@exercise(10)
def test_self_entropy_spends_the_budget():
    mlm, batch = small_mlm(), small_batch(12, 8, 4)
    for entropy_input in ("masked", "visible"):
        strategy = self_entropy(mlm, 0.25, entropy_input=entropy_input)
        mask = as_mask(strategy.mask(batch, generator()), batch.maskable, "self-entropy")
        assert not (mask & ~batch.maskable).any(), \
            "self-entropy: it masks special tokens or padding"
        assert mask.sum(1).tolist() == [3, 2, 1], \
            "self-entropy: 12, 8 and 4 tokens at rate 0.25 must have 3, 2 and 1 masked, " \
            f"and {mask.sum(1).tolist()} are"


@exercise(10)
def test_self_entropy_selects_by_the_entropies_that_it_asks_for():
    """At rate 1/2 every token is a candidate."""
    mlm, batch = small_mlm(), small_batch(12, 8, 4)
    for entropy_input, ids in (("masked", batch.input_ids.masked_fill(batch.maskable, MASK)),
                               ("visible", batch.input_ids)):
        entropy = masking.position_entropy(mlm, batch, ids, batch.maskable)
        for select, highest in (("high", True), ("low", False)):
            strategy = self_entropy(mlm, 0.5, entropy_input=entropy_input, entropy_select=select)
            mask = as_mask(strategy.mask(batch, generator()), batch.maskable, "self-entropy")
            for row, there in enumerate(batch.maskable):
                k = int(there.sum()) // 2
                order = sorted(there.nonzero()[:, 0].tolist(), key=lambda i: entropy[row, i],
                               reverse=highest)
                assert sorted(order[:k]) == mask[row].nonzero()[:, 0].tolist(), \
                    f"self-entropy: at rate 1/2, with entropy_input {entropy_input} and " \
                    f"entropy_select {select} it does not take the k {select}est entropies"


# --- 11: the KD loss ------------------------------------------------------------------------------

@exercise(11)
def test_kd_loss_by_hand():
    student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    label = torch.tensor([0])
    got = distill.kd_loss(student, teacher, label, 1.0, 1.0)
    assert near(got, 0.1308120), "kd_loss: with α = 1 and T = 1 the loss is KL((3/4, 1/4) ‖ " \
        f"(1/2, 1/2)) = 0.130812, not {shown(got, 0.1308120)}"
    got = distill.kd_loss(student, teacher, label, 0.25, 1.0)
    assert near(got, 0.5525635), \
        "kd_loss: with α = 1/4 and T = 1 the loss is 0.130812 / 4 + ln 2 · 3/4 = 0.552564, not " \
        f"{shown(got, 0.5525635)}"
    same = torch.randn(4, 9, generator=generator())
    got = distill.kd_loss(same, same, torch.arange(4), 1.0, 2.0)
    assert near(got, 0.0), "kd_loss: with α = 1 a student that equals its teacher has a loss of " \
        f"0, not {shown(got, 0.0)}"


# Of two words the first is right. With T = 3 a teacher of logits (ln 27, 0) says (3/4, 1/4) and a
# student of logits (0, ln 64) says (1/5, 4/5); KL is their divergence. At T = 1 the student says
# (1/65, 64/65); CE is ln 65. At α = 1/2 the loss is 1/2 · 9 KL + 1/2 CE.
STUDENT, TEACHER, KL, CE = (0, math.log(64)), (math.log(27), 0), 0.700529, math.log(65)
KD_MISTAKES = {
    "the factor T² is missing": (KL + CE) / 2, "the factor is T, not T²": (3 * KL + CE) / 2,
    "the divergence is KL(student ‖ teacher): the teacher comes first": (9 * 0.666169 + CE) / 2,
    "the student's logits are not divided by T": (9 * 2.572331 + CE) / 2,
    "the teacher's logits are not divided by T": (9 * 1.405851 + CE) / 2,
    "neither side's logits are divided by T": (9 * 3.871780 + CE) / 2,
    "T is 1, and not what is asked for": (3.871780 + CE) / 2,
    "the divergence is a mean over words too, not a sum over words": (9 * KL / 2 + CE) / 2,
    "the cross-entropy is divided by T as well": (9 * KL + math.log(5)) / 2,
    "the cross-entropy is not weighted by 1 − α": (9 * KL + 2 * CE) / 2}


@exercise(11)
def test_kd_loss_at_another_temperature():
    """The mean over two positions that are alike."""
    student, teacher = (torch.tensor([side, side]) for side in (STUDENT, TEACHER))
    got = distill.kd_loss(student, teacher, torch.tensor([0, 0]), 0.5, 3.0)
    check("kd_loss", got, (9 * KL + CE) / 2, KD_MISTAKES | {
        "the divergence is a sum over positions, not their mean": (18 * KL + CE) / 2},
        f"with α = 1/2 and T = 3 the loss is 5.23957, not {shown(got, 5.23957)}")


@exercise(11)
def test_kd_loss_without_a_teacher():
    student, labels = torch.randn(4, 9, generator=generator()), torch.tensor([0, 8, 3, 3])
    got = distill.kd_loss(student, None, labels, 0.0, 2.0)
    assert plain(got).shape == (), f"kd_loss: the result is {tuple(got.shape)}, not a scalar"
    assert near(got, F.cross_entropy(student, labels)), \
        "kd_loss: at α = 0 it is not the cross-entropy of the labels"


# --- 12: embedding saliency -----------------------------------------------------------------------

@exercise(12)
def test_saliency_by_hand():
    gradient = torch.tensor([[[1.0, 2.0], [-0.5, -1.0]]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, -1.0]])
    got = plain(masking.embedding_saliency(gradient, weight, torch.tensor([[2, 0]])))
    assert got.shape == (1, 2), f"saliency: the result is {tuple(got.shape)}, not (B, L)"
    assert near(got, [[1.0, -0.5]]), "saliency: not ∂L/∂onehot(x_i)[v] at v = token_ids_i: " \
        f"{[round(x, 3) for x in got[0].tolist()]}, not [1.0, -0.5]"


# --- 13: Typhoon's average ------------------------------------------------------------------------

def update(typhoon, *batch):
    """A step of one batch."""
    typhoon.accumulate(*batch)
    typhoon.step()


@exercise(13)
def test_two_updates_by_hand():
    """Type 1 is visible with dots 1 and 3, then masked with 4; type 2 is visible with 5."""
    typhoon = masking.Typhoon(torch.tensor([0, 2, 1, 1]), rate=0.25, ema_weight=0.75)
    every = torch.ones(1, 3, dtype=torch.bool)
    update(typhoon, torch.tensor([[1, 1, 2]]), torch.tensor([[1.0, 3.0, 5.0]]), every, None)
    assert same(typhoon.seen, [False, True, True, False]), "average: the wrong types are seen"
    assert near(typhoon.weight, [0, -2, -5, 0]), \
        "average: after one update the weights are " \
        f"{plain(typhoon.weight).tolist()}, not [0, -2, -5, 0]"
    update(typhoon, torch.tensor([[1, 0, 0]]), torch.tensor([[4.0, 9.0, 9.0]]),
           torch.tensor([[True, False, False]]), torch.tensor([[True, False, False]]))
    assert near(typhoon.weight, [0, 0.25 * -2 + 0.75 * 4, -5, 0]), \
        f"average: after two updates they are {plain(typhoon.weight).tolist()}, not [0, 2.5, -5, 0]"


@exercise(13)
def test_a_step_of_two_batches_by_hand():
    """Type 1 is visible with dots 2 and 4, one in each batch, and masked with 7."""
    typhoon = masking.Typhoon(torch.tensor([0, 2]), rate=0.25)
    every = torch.ones(1, 2, dtype=torch.bool)
    typhoon.accumulate(torch.tensor([[1]]), torch.tensor([[2.0]]), every[:, :1])
    typhoon.accumulate(torch.tensor([[1, 1]]), torch.tensor([[4.0, 7.0]]), every,
                       torch.tensor([[False, True]]))
    typhoon.step()
    check("average", typhoon.weight, [0, -3 + 7], {
        "one mean over visible and masked tokens, not the sum of two": [0, 1 / 3],
        "only the last batch of a step counts": [0, -4 + 7]},
        f"after a step of two batches the weights are {plain(typhoon.weight).tolist()}, not [0, 4]")


# --- 14: Typhoon's rates --------------------------------------------------------------------------

def typhoon_with(weight, seen, counts, rate, spread):
    """Returns a Typhoon whose average is known."""
    typhoon = masking.Typhoon(torch.as_tensor(counts), rate, spread)
    typhoon.weight = torch.as_tensor(weight, dtype=torch.double)
    typhoon.seen = torch.as_tensor(seen)
    return typhoon


@exercise(14)
def test_rates_by_hand():
    rates = masking.Typhoon(torch.tensor([3, 4, 5]), 0.3).rates()
    assert near(rates, [0.3, 0.3, 0.3]), "rates: before any update every type has the rate"
    typhoon = typhoon_with([-1.0, -5.0, -3.0, 0.0], [True, True, True, False], [4, 2, 2, 2], 0.3,
                           0.6)
    got = plain(typhoon.rates())  # u = 1, 0.4, 0.7 and 1; Σ f u = 0.82
    expected = [0.3 / 0.82 * u for u in (1, 0.4, 0.7, 1)]
    assert near(got, expected), f"rates: {[round(x, 4) for x in got.tolist()]}, " \
        f"not {[round(x, 4) for x in expected]}"


@exercise(14)
def test_the_expected_rate_is_the_budget():
    weight, counts = torch.randn(50, generator=generator()), torch.arange(50)
    for rate in (0.15, 0.4, 0.9):
        typhoon = typhoon_with(weight, torch.ones(50).bool(), counts, rate, 0.6)
        rates = plain(typhoon.rates())
        assert rates.min() >= 0 and rates.max() <= 1, "rates: a rate is not between 0 and 1"
        expected = (rates * counts / counts.sum()).sum()
        assert near(expected, rate), f"rates: the expected rate Σ f r is {expected:.4f}, not " \
            f"{rate}, and {(rates == 1).sum()} of the 50 rates are at the cap of 1"


# --- 15: one training step ------------------------------------------------------------------------

def small_trainer(kd=False, strategy=masking.Random, texts=(14, 9, 11, 14), types=True, **recipe):
    """Returns a trainer over small random texts, and the batch of all of them."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, 40))]
    tokenizer = model.wordpiece_tokenizer({piece: i for i, piece in enumerate(pieces)})
    batch = small_batch(*texts)
    token_types = (batch.input_ids % 2) if types else None
    corpus = train.Texts(batch.input_ids, train.Vocab(tokenizer, 40, torch.device("cpu")),
                         token_types)
    student, teacher = small_mlm(0).train(), small_mlm(1) if kd else None
    numbers = {"steps": 10, "batch_size": len(texts), "lr": 0.1, "kd_weight": 0.9} | recipe
    context = masking.Context(0.3, student, corpus.token_counts(), corpus.vocab.continuation, MASK)
    trainer = train.Trainer(student, corpus, strategy(context), train.Recipe(**numbers), teacher)
    trainer.seed(0)
    return trainer, corpus.batch(torch.arange(len(texts)))


@contextmanager
def world_of(ranks):
    """Pretends that there are so many data-parallel ranks."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(ranks)
    try:
        yield
    finally:
        os.environ.pop("WORLD_SIZE") if before is None else os.environ.update(WORLD_SIZE=before)


def half_of(batch):
    """Returns a mask on every other maskable token."""
    return batch.maskable & (torch.arange(batch.maskable.shape[1]) % 2 == 0)


@exercise(15)
def test_two_micro_batches_are_one_batch():
    gradients, losses = [], []
    for parts in ([[0, 1, 2, 3]], [[0], [1, 2, 3]]):
        trainer, batch = small_trainer(corruption=(1, 0, 0))
        total, loss = half_of(batch).sum(), 0
        for part in parts:
            piece = trainer.texts.batch(torch.tensor(part))
            loss = loss + trainer.micro_step(piece, half_of(piece), total, 0.0)
        assert plain(loss).shape == () and not getattr(loss, "requires_grad", False), \
            "step: the returned loss is not a scalar without a graph"
        losses.append(loss)
        gradients.append([p.grad for p in trainer.model.parameters()])
    assert all(p is not None for p in gradients[0]), "step: some parameter has no gradient"
    assert near(losses[0], losses[1], 1e-4), \
        f"step: the losses of two micro-batches add up to {shown(losses[1], losses[0])}, and the " \
        f"loss of one batch with both is {shown(losses[0], losses[1])}"
    assert all(near(a, b, 1e-4) for a, b in zip(*gradients)), \
        "step: the gradients of two micro-batches do not add up to those of one batch"


@exercise(15)
def test_the_teacher_stays_out_of_the_gradients():
    trainer, batch = small_trainer(kd=True)
    plain = trainer.micro_step(batch, half_of(batch), half_of(batch).sum(), 0.0)
    trainer.seed(0)
    distilled = trainer.micro_step(batch, half_of(batch), half_of(batch).sum(), 0.5)
    assert not near(plain, distilled), "step: the loss is the same with kd_weight 0 and 0.5"
    assert all(p.grad is None for p in trainer.teacher.parameters()), \
        "step: the teacher has gradients"


def says(mlm, logits):
    """Changes a model, in place: whatever it reads, these are its logits for words 5 and 6, and no
    other word is possible."""
    mlm.bert.embeddings.word_embeddings.weight.data[:] = 0
    mlm.head.bias.data[:] = -1e4
    mlm.head.bias.data[5:7] = torch.tensor(logits)


@exercise(15)
def test_the_loss_and_the_gradient_of_a_step_by_hand():
    """Student and teacher say what they say in exercise 11's check; the right word is always 5."""
    for kd_weight in (0.0, 0.5):
        trainer, batch = small_trainer(kd=True, kd_temperature=3.0)
        batch.input_ids = batch.input_ids.masked_fill(batch.maskable, 5)
        says(trainer.model, STUDENT)
        says(trainer.teacher, TEACHER)
        mask = half_of(batch)
        N, each = mask.sum(), (9 * KL + CE) / 2 if kd_weight else CE
        with world_of(2):
            loss = trainer.micro_step(batch, mask, 4 * N, kd_weight)
        mistakes = KD_MISTAKES | {
            "a temperature of 2, whatever the recipe has": (4 * 1.419654 + CE) / 2,
            "the labels count alone": CE, "the labels do not count: α is 1": 9 * KL,
            "kd_weight is the recipe's, and not the argument": 0.9 * 9 * KL + 0.1 * CE}
        check("step", loss, N * each, {words: N * value for words, value in mistakes.items()} | {
            "the loss is the mean over the masked positions: return their sum": each},
            "the loss is not exercise 11's, summed over the masked positions")
    # With the logit of word 6 a position's loss grows by α T (4/5 − 1/4) + (1 − α) 64/65.
    slope = (3 * (4 / 5 - 1 / 4) + 64 / 65) / 2
    check("step", trainer.model.head.bias.grad[6], 2 * slope / 4, {
        "the factor world_size() is missing: ranks are averaged": slope / 4,
        "the gradient is divided by world_size()": slope / 8,
        "the loss is divided by this micro-batch's masked positions, not by masked_in_all":
            2 * slope,
        "the loss is not divided by masked_in_all": 2 * slope * N},
        "the gradient is not that of loss · world_size() / masked_in_all")


@exercise(15)
def test_nobody_reads_the_hidden_tokens():
    """Every masked token becomes [MASK], and at kd_weight 1 its label does not count."""
    for reader in ("model", "teacher"):
        losses = []
        for hidden in (5, 6):
            trainer, batch = small_trainer(kd=True, corruption=(1, 0, 0))
            if reader == "model":
                says(trainer.teacher, TEACHER)
            mask = half_of(batch)
            batch.input_ids = batch.input_ids.masked_fill(mask, hidden)
            losses.append(trainer.micro_step(batch, mask, mask.sum(), 1.0))
        assert near(*losses), "step: with other tokens under the masks the divergence is " \
            f"another: the {reader} reads the text before corruption"


# --- 16: Matthews' correlation --------------------------------------------------------------------

@exercise(16)
def test_matthews_by_hand():
    """Of ten examples: 5 true positives, 2 false positives, 1 false negative, 2 true negatives."""
    predictions = np.array([1, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 1, 0, 0])
    got = glue.matthews(predictions, labels)
    assert near(got, 0.3563483), "matthews: 5 TP, 2 FP, 1 FN, 2 TN give 0.356348, not " \
        f"{shown(got, 0.3563483)}"
    assert near(glue.matthews(labels, labels), 1.0), "matthews: all right must be 1"
    assert near(glue.matthews(1 - labels, labels), -1.0), "matthews: all wrong must be −1"
    assert near(glue.matthews(np.ones(10, int), labels), 0.0), \
        "matthews: a constant prediction must give 0"
    assert near(glue.matthews(predictions, np.ones(10, int)), 0.0), \
        "matthews: labels that are all equal must give 0"
    got = glue.matthews(np.array([5, 6, 7, 7]), np.array([5, 6, 7, 6]))
    assert near(got, 0.7), "matthews: of predictions 5, 6, 7, 7 and labels 5, 6, 7, 6 it is 0.7, " \
        f"not {shown(got, 0.7)}"


# --- 17: the paired t test and its interval -------------------------------------------------------

SLEEP = ([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],  # Student 1908: hours of sleep
         [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])  # gained with two drugs


@exercise(17)
def test_students_own_data():
    t, p = stats.paired_t_test(*SLEEP)
    assert near(abs(t), 4.0621277, 1e-4), \
        f"paired t: of Student's sleep data |t| is 4.06213, not {shown(abs(t), 4.0621277)}"
    assert t < 0, "paired t: t has the sign of a − b"
    assert near(p, 0.0028329, 1e-6), \
        f"paired t: of Student's sleep data p is 0.00283289, not {shown(p, 0.00283289)}"
    low, high = stats.confidence_interval([x - y for x, y in zip(*SLEEP)])
    assert near([low, high], [-2.4598858, -0.7001142], 1e-4), \
        "interval: of Student's sleep data it is [-2.45989, -0.700114], not " \
        f"[{shown(low, -2.4598858)}, {shown(high, -0.7001142)}]"
    low, high = stats.confidence_interval([x - y for x, y in zip(*SLEEP)], 0.9)  # t* is 1.833113
    assert near([low, high], [-2.2930053, -0.8669947], 1e-4), \
        "interval: of Student's sleep data at level 0.9 it is [-2.29301, -0.866995], not " \
        f"[{shown(low, -2.2930053)}, {shown(high, -0.8669947)}]"


# --- 18: Holm -------------------------------------------------------------------------------------

@exercise(18)
def test_holm_by_hand():
    got = plain(stats.holm([0.01, 0.04, 0.03, 0.005]))
    assert got.shape == (4,), "holm: not one adjusted p for each p"
    assert near(got, [0.03, 0.06, 0.06, 0.02]), \
        f"holm: 0.01, 0.04, 0.03, 0.005 become {[round(p, 4) for p in got.tolist()]}, " \
        "not 0.03, 0.06, 0.06, 0.02"
    got = plain(stats.holm([0.7, 0.6]))
    assert near(got, [1.0, 1.0]), f"holm: 0.7, 0.6 become {got.tolist()}, not 1, 1"
    assert len(stats.holm([])) == 0, "holm: of no p-values there are none"


# --- 19: the two-way bootstrap --------------------------------------------------------------------

@exercise(19)
def test_resampled_scores_by_their_mean():
    values = np.array([0.0, 0.0, 1.0, 4.0])
    got = plain(stats.resampled_scores(np.mean, values, resamples=2000, seed=1))
    assert got.shape == (2000,), f"bootstrap: {tuple(got.shape)} scores, not (R,)"
    assert abs(got.mean() - 1.25) < 0.1 and abs(got.std() - values.std() / 2) < 0.06, \
        "bootstrap: the mean of 4 resampled examples must have mean 1.25 and sd 0.82, not " \
        f"{got.mean():.2f} and {got.std():.2f}"
    again = stats.resampled_scores(np.mean, values + 1, resamples=2000, seed=1)
    assert near(again, got + 1), "bootstrap: the same seed does not draw the same examples"


@exercise(19)
def test_an_interval_without_any_spread():
    a, b = np.full((3, 50), 0.75), np.full((3, 50), 0.5)
    assert near(stats.multi_bootstrap(a, b), [0.25, 0.25]), \
        "bootstrap: where a − b is 0.25 everywhere, the interval is [0.25, 0.25]"
    assert plain(stats.multi_bootstrap(a[:1], b[:1])).isnan().all(), \
        "bootstrap: one seed must give (nan, nan)"


@exercise(19)
def test_an_interval_by_hand():
    """a − b is 0 with one seed and 1 with the other, and 10 more in every second column: two drawn
    seeds have a mean of 0, 1/2 or 1 in a quarter, a half and a quarter of the columns."""
    b = np.array([[0.0], [100.0]]) + np.zeros((2, 4000))
    a = b + [[0.0], [1.0]] + 10 * (np.arange(4000) % 2)
    for level, expected in ((0.6, [0.5, 10.5]), (0.9, [0.0, 11.0])):
        got = plain(stats.multi_bootstrap(a, b, level=level))
        assert near(got, expected), f"bootstrap: the interval at level {level} is " \
            f"{[round(x, 3) for x in got.tolist()]}, not {expected}"


# --- 20: Typhoon from the task's labels -----------------------------------------------------------

def small_task(labels, texts=(12, 9, 12, 5)):
    """Returns [T]'s strategy for the task of these labels, and the batch of all texts. Labels that
    are floats are scores, as in STS-B."""
    batch, labels = small_batch(*texts), torch.tensor(labels)
    batch.token_type_ids = batch.input_ids % 2
    classes = 1 if labels.is_floating_point() else 3
    classifier = randomised(model.BertForSequenceClassification(small_config(), classes), 1)
    context = masking.Context(0.3, small_mlm().train(), torch.ones(40),
                              torch.zeros(40, dtype=torch.bool), MASK)
    return glue.TaskTyphoon(context, classifier, labels, 0.1, 0.0), batch


@exercise(20)
def test_the_head_learns_from_the_labels_and_the_encoder_does_not():
    strategy, batch = small_task([0, 2, 1, 0])
    encoder = strategy.context.model.bert
    before = [p.detach().clone() for p in (*encoder.parameters(), *strategy.head)]
    strategy.learn_from_labels(batch)
    assert strategy.typhoon.totals.any(), \
        "task: nothing was added to the averages: call observe with the gradient"
    after = [*encoder.parameters(), *strategy.head]
    moved = [not same(p, q) for p, q in zip(after, before)]
    assert not any(moved[:-len(strategy.head)]), "task: the labels train the encoder"
    assert all(moved[-len(strategy.head):]), "task: the probe's head does not learn"
    assert all(p.requires_grad for p in after), "task: it freezes what the masked LM trains"
    assert all(p.grad is None or not p.grad.any() for p in encoder.parameters()), \
        "task: gradients are left in the encoder, which the masked LM's step would use"


@exercise(20)
def test_the_saliency_is_a_slope():
    """When the embeddings of the ordinary words grow, the loss changes by the sum of −s over their
    tokens, which were all seen."""
    for labels in ([0, 2, 1, 0], [0.5, 4.0, 2.5, 1.0]):
        strategy, batch = small_task(labels)
        batch.index = torch.tensor([2, 0, 1, 3])  # the batch holds the texts in another order
        words, losses = strategy.probe.bert.embeddings.word_embeddings.weight, []
        before = words.detach().clone()
        for growth in (0.99, 1.01):
            words.data[5:] = before[5:] * growth
            logits = strategy.probe(batch.input_ids, batch.attention_mask, batch.token_type_ids)
            losses.append(glue.task_loss(logits, strategy.labels[batch.index]).item())
        words.data[:] = before
        strategy.learn_from_labels(batch)
        assert not strategy.typhoon.totals[1, 40:].any(), \
            "task: tokens count as masked: the model saw every one"
        slope, got = (losses[1] - losses[0]) / 0.02, -strategy.typhoon.totals[0].sum()
        check("task", got, slope, {"the sign of the gradient is turned": -slope,
                                   "the loss is a sum over the texts, not their mean": 4 * slope},
              f"the average does not get the gradient of task_loss: a slope of {got:.4f}, not "
              f"{slope:.4f}", 1e-2)


# --- 21: the milestone ----------------------------------------------------------------------------

@exercise(21)
def test_the_run_beats_word_frequencies():
    """Not all that the grader asks: see the table in ASSIGNMENT.md."""
    folder = Path(__file__).resolve().parent.parent / "milestone"
    if not folder.is_dir():
        pytest.skip("there is no folder milestone here")
    path = folder / "exam.json"
    assert path.is_file(), "milestone: exam.json is not there: the run is not over, or not begun"
    record = json.loads(path.read_text())
    frequency, loss = (-record[name]["log_likelihood"] for name in ("baseline", "last"))
    assert loss < frequency, f"milestone: this model's loss is {loss:.2f}, not below that of " \
        f"word-piece frequency alone, {frequency:.2f}: it learnt nothing of the context"
