"""The grader's own checks of the exercises; the hand-out does not hold them.

They compare with brute force, with exact probabilities, and with variants of the formula that hold
one known mistake each, so that the sentence can name it. They run against the reference as well, as
a part of the test suite.
"""
import inspect
import itertools
import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import distill
import glue
import masking
import model
import stats
import train
from test_public import (MASK, as_mask, attention, block, check, corrupt, exercise,
                         follows_generator, generator, half_of, hidden_states, likely, near, plain,
                         raises, rows, same, self_entropy, sentence_of_words,
                         small_batch, small_mlm, small_task, small_trainer,
                         typhoon_with, world_of)


def same_gradients(subject, got, expected, tensors):
    """Checks that a result passes the same gradients on to `tensors` as the formula does."""
    assert got.requires_grad, f"{subject}: the result has no gradient: is something detached?"
    draws = torch.randn(got.shape, generator=generator(8)).to(got.dtype)
    found, right = (torch.autograd.grad((result * draws).sum(), tensors, allow_unused=True)
                    for result in (got, expected))
    for one, other in zip(found, right):
        assert one is not None and near(one, other, 1e-3), \
            f"{subject}: the result is right and its gradient is not: is something detached?"


# --- 1: the budget and random masking -------------------------------------------------------------

@exercise(1)
def test_the_mean_of_the_budget_is_the_rate():
    for length in (1, 3, 10, 13):
        maskable = rows(length, width=20).repeat(5000, 1)
        k = plain(masking.budget(maskable, 0.15, generator(length)))
        up = k.mean() - math.floor(0.15 * length)
        assert likely(up, 0.15 * length - math.floor(0.15 * length), 5000), \
            f"budget: its mean for rows of {length} tokens is {k.mean():.3f}, not rate × count = " \
            f"{0.15 * length:.3f}: round up or down at random, for each row by itself"


@exercise(1)
def test_a_whole_budget_is_left_alone():
    k = plain(masking.budget(rows(8, 16, width=20).repeat(2000, 1), 0.25, generator()))
    assert (k.reshape(-1, 2) == torch.tensor([2, 4])).all(), \
        "budget: where rate × count is a whole number, k must be that number"


@exercise(1)
def test_top_k_is_a_sort():
    scores = torch.randn(60, 15, generator=generator())
    maskable = torch.rand(60, 15, generator=generator(1)) < 0.6
    scores[~maskable] += 9  # tempting
    k = torch.randint(0, 15, (60,), generator=generator(2))
    got = as_mask(masking.top_k(scores, maskable, k), maskable, "top_k")
    assert not (got & ~maskable).any(), "top_k: it chooses a position that is not maskable"
    for row in range(60):
        there = maskable[row].nonzero()[:, 0].tolist()
        best = sorted(there, key=lambda i: -scores[row, i])[:k[row]]
        assert sorted(best) == got[row].nonzero()[:, 0].tolist(), \
            f"top_k: not the {k[row]} highest of {len(there)} maskable positions"


@exercise(1)
def test_equal_scores_share_the_budget():
    scores = torch.tensor([[2.0, 1, 2, 2, 1, 2, 2, 9], [0.0] * 8]).repeat_interleave(9, 0)
    maskable, k = rows(7, width=8).repeat(18, 1), torch.arange(9).repeat(2)
    got = as_mask(masking.top_k(scores, maskable, k), maskable, "top_k")
    assert same(got.sum(1), k.clamp(max=7)), \
        "top_k: where scores are equal it takes more or fewer than k"
    best = got & (scores == 2)
    assert same(best[:9].sum(1), k[:9].clamp(max=5)), \
        "top_k: where scores are equal it takes lower ones before they are used up"


@exercise(1)
def test_every_set_of_positions_is_equally_likely():
    maskable = torch.tensor([[True, False, True, True, True]]).repeat(5000, 1)
    mask = as_mask(masking.random_mask(maskable, 0.5, generator()), maskable, "random_mask")
    assert (mask.sum(1) == 2).all(), "random_mask: 4 tokens at rate 0.5 must have 2 masked " \
        "(k positions without replacement, not a coin for each)"
    there = (0, 2, 3, 4)
    for pair in itertools.combinations(there, 2):
        share = mask[:, pair].all(1).double().mean()
        assert likely(share, 1 / 6, 5000), f"random_mask: the pair {pair} is chosen in " \
            f"{share:.3f} of the draws, not in a sixth: not uniform without replacement"
    same = (mask[0::2] == mask[1::2]).all(1).double().mean()
    assert likely(same, 1 / 6, 2500), "random_mask: rows of a batch are not drawn independently"


@exercise(1)
def test_random_masking_follows_its_generator():
    follows_generator(lambda g: masking.budget(rows(10).repeat(200, 1), 0.15, g))
    follows_generator(lambda g: masking.random_mask(rows(40).repeat(3, 1), 0.15, g))


# --- 2: corruption --------------------------------------------------------------------------------

@exercise(2)
def test_shares_of_the_three_fates():
    ids = torch.randint(10, 40, (400, 100), generator=generator())
    mask = rows(50, width=100).repeat(400, 1)
    n, special = int(mask.sum()), (0, 1, 2, 3, 4)
    for split in ((0.8, 0.1, 0.1), (0.5, 0.4, 0.1)):
        given = {} if split == (0.8, 0.1, 0.1) else {"split": split}  # that is the default
        got, _ = corrupt(ids, mask, 4, 40, generator=generator(1), special_ids=special, **given)
        words = 35  # a random word is the original one now and then
        masked, kept = (got[mask] == 4).sum() / n, (got[mask] == ids[mask]).sum() / n
        assert likely(masked, split[0], n), \
            f"corrupt: {masked:.3f} of the masked positions become " \
            f"[MASK], not split[0] = {split[0]}"
        assert likely(kept, split[2] + split[1] / words, n), f"corrupt: {kept:.3f} of the masked " \
            f"positions keep their token, not split[2] = {split[2]}; random words have split[1]"


@exercise(2)
def test_a_random_word_is_any_ordinary_one():
    ids, special = torch.full((300, 200), 18), (0, 1, 2, 3, 4, 17, 39)
    everything = torch.ones_like(ids, dtype=torch.bool)
    got, _ = corrupt(ids, everything, 4, 40, (0, 1, 0), generator(2), special)
    share = torch.bincount(got.flatten(), minlength=40)[:40] / got.numel()
    assert share[list(special)].sum() == 0, "corrupt: a random token may be a special one"
    ordinary = [i for i in range(40) if i not in special]
    assert likely(share[ordinary], 1 / 33, got.numel()), \
        "corrupt: random tokens are not uniform over all ordinary word pieces"
    assert likely((got[:, 0::2] == got[:, 1::2]).double().mean(), 1 / 33, 30_000), \
        "corrupt: random tokens are not drawn independently for each position"


@exercise(2)
def test_corruption_follows_its_generator_and_masks_each_position_by_itself():
    ids = torch.randint(10, 40, (300, 40), generator=generator())
    mask = torch.ones_like(ids, dtype=torch.bool)
    follows_generator(lambda g: corrupt(ids, mask, 4, 40, generator=g)[0])
    follows_generator(lambda g: corrupt(ids, mask, 4, 40, (0, 1, 0), generator=g)[0])
    got, labels = corrupt(ids, mask, 4, 40, (0.5, 0, 0.5), generator())
    both = ((got[:, 0::2] == 4) & (got[:, 1::2] == 4)).double().mean()
    assert likely(both, 0.25, 2500), "corrupt: the fates of positions are not independent"
    assert torch.equal(labels, ids), "corrupt: labels are not the original tokens"


@exercise(2)
def test_each_fate_is_drawn_by_itself_however_few_there_are():
    ids, g = torch.full((1, 6), 20), generator(3)
    for masked, split, words in ((1, (0.8, 0.1, 0.1), "a lone masked token becomes [MASK]"),
                                 (2, (0.5, 0.25, 0.25), "both of two masked tokens become [MASK]")):
        mask = rows(masked, width=6)
        all_of_them = [(corrupt(ids, mask, 4, 40, split, g)[0][mask] == 4).all().item()
                       for _ in range(600)]
        share, expected = sum(all_of_them) / 600, split[0] ** masked
        assert likely(share, expected, 600), \
            f"corrupt: {words} in {share:.2f} of the calls, not in {expected:.2f}: " \
            "the shares are probabilities of each token, not numbers of tokens"


# --- 3: attention ---------------------------------------------------------------------------------

def attention_by_hand(layer, hidden, key_mask=None, mistake=None):
    """Returns softmax(Q Kᵀ / √d) V for each head by loops, in float64, with a mistake if wanted."""
    B, L, H = hidden.shape
    d = H // layer.heads
    q, k, v = (hidden.double() @ part.weight.double().T + part.bias.double()
               for part in (layer.query, layer.key, layer.value))
    if mistake == "swapped":
        q, k = k, q
    scale = {"no scale": 1.0, "√H": math.sqrt(H), "d": d}.get(mistake, math.sqrt(d))
    mixed = torch.zeros(B, L, H, dtype=torch.double)
    for b, head, i in itertools.product(range(B), range(layer.heads), range(L)):
        part = slice(head * d, (head + 1) * d)
        scores = torch.stack([q[b, i, part] @ k[b, j, part] for j in range(L)]) / scale
        if key_mask is not None:
            scores[~key_mask[b, 0, 0]] = -math.inf
        mixed[b, i, part] = scores.softmax(0) @ v[b, :, part]
    return mixed @ layer.output.weight.double().T + layer.output.bias.double()


@exercise(3)
@torch.no_grad()
def test_attention_is_the_formula():
    layer, hidden = attention(), hidden_states(2, 5, 12)
    got = layer(hidden, hidden)
    alone = layer(hidden[:1], hidden[:1])
    assert near(got[:1], alone, 1e-4), "attention: a text's result depends on the batch's others"
    named = {"swapped": "queries and keys are swapped", "no scale": "the scores lack the 1 / √d",
             "√H": "the scores are divided by √H: d is the width of one head",
             "d": "the scores are divided by d, not by √d"}
    uniform = attention()
    uniform.query.weight[:], uniform.query.bias[:] = 0, 0  # every query reads all keys alike
    mean = uniform.output(uniform.value(hidden).mean(1, keepdim=True))
    assert near(uniform(hidden, hidden), mean.expand(2, 5, 12), 1e-4), \
        "attention: with equal scores the result is not the mean of the values: heads are put " \
        "together in another order than they were taken apart, or values are mixed wrongly"
    mistakes = {words: attention_by_hand(layer, hidden, None, mistake)
                for mistake, words in named.items()}
    check("attention", got, attention_by_hand(layer, hidden), mistakes,
          "not softmax(Q Kᵀ / √d) V in each head")


@exercise(3)
def test_gradients_flow_through_attention():
    layer, hidden = attention(), hidden_states(2, 5, 12).requires_grad_()
    key_mask = rows(5, 3).view(2, 1, 1, 5)
    same_gradients("attention", layer(hidden, hidden, key_mask),
                   attention_by_hand(layer, hidden, key_mask), [hidden, *layer.parameters()])


@exercise(3)
@torch.no_grad()
def test_masked_attention_is_the_formula():
    hidden, key_mask = hidden_states(3, 5, 12), rows(5, 3, 1).view(3, 1, 1, 5)
    for layer in (attention(), attention(dropout=1e-9).train()):  # which drops nothing
        got, expected = layer(hidden, hidden, key_mask), attention_by_hand(layer, hidden, key_mask)
        assert near(got, expected, 1e-4), \
            "attention: with key_mask the weights are not a softmax over the visible keys alone"


@exercise(3)
@torch.no_grad()
def test_queries_ask_and_all_tokens_answer():
    layer, hidden = attention(), hidden_states(2, 5, 12)
    key_mask = rows(5, 4).view(2, 1, 1, 5)
    got = layer(hidden[:, [3, 0]], hidden, key_mask)
    assert got.shape == (2, 2, 12), f"attention: of two queries the result is {tuple(got.shape)}"
    assert near(got, layer(hidden, hidden, key_mask)[:, [3, 0]], 1e-4), \
        "attention: query_hidden must ask, and every token of hidden must answer"


@exercise(3)
@torch.no_grad()
def test_dropout_falls_on_the_weights():
    layer = attention(dropout=0.5)
    for part in (layer.query, layer.key, layer.value):
        part.weight[:], part.bias[:] = 0, 1
    layer.output.weight[:], layer.output.bias[:] = torch.eye(12), 0
    hidden = hidden_states(40, 50, 12)
    assert near(layer(hidden, hidden), torch.ones(40, 50, 12)), \
        "attention: dropout in evaluation mode"
    got = layer.train()(hidden, hidden)  # the sum of a head's weights, in each of its columns
    assert not near(got, torch.ones(40, 50, 12), 1e-3), \
        "attention: no dropout on the attention weights in training"
    heads = got.unflatten(-1, (3, 4))
    assert near(heads, heads[..., :1].expand(40, 50, 3, 4)), \
        "attention: dropout falls on the output, not on the attention weights"
    assert not near(heads[:, :, 0], heads[:, :, 1]), "attention: all heads drop the same weights"
    assert abs(got.mean() - 1) < 0.02, "attention: dropout changes the weights' mean"
    assert abs(got[..., 0].std() - math.sqrt(1 / 50)) < 0.02, \
        "attention: dropout with another probability than attention_probs_dropout_prob"


# --- 4: the block ---------------------------------------------------------------------------------

def block_by_hand(layer, hidden, mistake=None):
    """Returns the block's formula from its parts, without dropout, with a mistake if wanted."""
    act = {"relu": F.relu, "tanh": lambda x: F.gelu(x, approximate="tanh")}.get(mistake, F.gelu)
    middle, last = layer.attention_norm, layer.output_norm
    if mistake == "pre":
        read = middle(hidden)
        hidden = hidden + layer.attention(read, read)
        return last(hidden + layer.output(act(layer.intermediate(hidden))))
    attended = layer.attention(hidden, hidden)
    x = middle(attended if mistake == "first residual" else hidden + attended)
    fed = layer.output(act(layer.intermediate(x)))
    second = {"second residual": 0, "old residual": hidden}.get(mistake, x)
    return (middle if mistake == "one norm" else last)(second + fed)


@exercise(4)
@torch.no_grad()
def test_the_block_is_the_formula():
    layer, hidden = block(), hidden_states(2, 5, 12)
    got = layer(hidden)
    named = {"pre": "LayerNorm comes before attention: BERT normalises after the sum",
             "first residual": "attention's output is not added to its input",
             "second residual": "the feed-forward's output is not added to its input",
             "old residual": "the feed-forward's output is added to the block's input, and not to "
                             "its own",
             "one norm": "attention_norm stands in output_norm's place",
             "relu": "the feed-forward has a ReLU, not GELU",
             "tanh": "GELU is the tanh approximation; BERT's is exact"}
    mistakes = {words: block_by_hand(layer, hidden, mistake) for mistake, words in named.items()}
    check("block", got, block_by_hand(layer, hidden), mistakes, "not the post-LayerNorm formula")


@exercise(4)
def test_gradients_flow_through_the_block():
    layer, hidden = block(), hidden_states(2, 5, 12).requires_grad_()
    same_gradients("block", layer(hidden), block_by_hand(layer, hidden),
                   [hidden, *layer.parameters()])


@exercise(4)
@torch.no_grad()
def test_the_block_passes_the_key_mask_on():
    layer, hidden = block(), hidden_states(2, 5, 12)
    key_mask = rows(5, 3).view(2, 1, 1, 5)
    assert near(layer(hidden, key_mask)[1:, :3], layer(hidden[1:, :3]), 1e-4), \
        "block: padding changes a text's result: key_mask is not passed on to attention"
    columns = torch.tensor([[4, 0], [2, 1]])
    expected = torch.stack([layer(hidden, key_mask)[row, columns[row]] for row in range(2)])
    assert near(layer(hidden, key_mask, columns), expected, 1e-4), \
        "block: with queries and a key_mask the result is not the full result's columns"


@exercise(4)
@torch.no_grad()
def test_dropout_falls_on_both_outputs_before_the_sum():
    layer, hidden = block(dropout=1.0).train(), hidden_states(2, 5, 12)  # drops whole outputs
    got = layer(hidden)
    fed = layer.output(F.gelu(layer.intermediate(layer.attention_norm(hidden))))
    alone = layer.attention_norm(hidden + layer.attention(hidden, hidden))
    assert not near(got, layer.output_norm.bias.expand_as(got), 1e-4), \
        "block: dropout falls on the last sum, and not on what is added to it"
    assert not near(got, layer.output_norm(layer.attention_norm(hidden) + fed), 1e-4), \
        "block: no dropout on the feed-forward's output"
    assert not near(got, layer.output_norm(alone), 1e-4), "block: no dropout on attention's output"
    assert not near(got, block_by_hand(layer, hidden), 1e-4), "block: no dropout in training"
    nothing = layer.output_norm(layer.attention_norm.bias).expand_as(got)
    assert not near(got, nothing, 1e-4), \
        "block: dropout falls on the sum, and not on what is added to it"
    assert near(got, layer.output_norm(layer.attention_norm(hidden)), 1e-4), \
        "block: with dropout 1 nothing but the two LayerNorms must be left"
    assert near(layer.eval()(hidden), block_by_hand(layer, hidden), 1e-4), \
        "block: dropout in evaluation mode"
    half = block(dropout=0.5).train()
    half.output.weight[:] = 0
    half.output.bias[:], half.attention.output.weight[:], half.attention.output.bias[:] = 1, 0, 0
    half.attention_norm.weight[:], half.attention_norm.bias[:] = 0, 0
    half.output_norm.weight[:], half.output_norm.bias[:] = 1, 0
    got = half(hidden_states(50, 20, 12))  # what is kept is above the mean of its token
    assert likely((got > 0).double().mean(), 0.5 - 0.5 ** 12, 12_000), \
        "block: dropout with another probability than hidden_dropout_prob"


# --- 5: the masked-LM head ------------------------------------------------------------------------

@exercise(5)
@torch.no_grad()
def test_the_head_is_the_formula():
    mlm = small_mlm()
    head, words = mlm.head, mlm.bert.embeddings.word_embeddings.weight
    for hidden in (hidden_states(7, 12), hidden_states(2, 3, 12)):
        got, dense = head(hidden, words), head.dense(hidden)
        assert got.shape == (*hidden.shape[:-1], 40), "head: logits are not (..., V)"

        def variant(x):
            return x @ words.T + head.bias

        named = {"the activation is a ReLU, not GELU": variant(head.norm(F.relu(dense))),
                 "GELU is the tanh approximation; BERT's is exact":
                     variant(head.norm(F.gelu(dense, approximate="tanh"))),
                 "LayerNorm comes before the activation": variant(F.gelu(head.norm(dense))),
                 "LayerNorm is left out": variant(F.gelu(dense)),
                 "the dense layer is left out": variant(head.norm(F.gelu(hidden))),
                 "the activation is left out": variant(head.norm(dense)),
                 "the bias of each word is left out": head.norm(F.gelu(dense)) @ words.T,
                 "the products are divided by √H: that belongs into attention":
                     head.norm(F.gelu(dense)) @ words.T / math.sqrt(12) + head.bias}
        check("head", got, variant(head.norm(F.gelu(dense))), named, "not the formula")


@exercise(5)
@torch.no_grad()
def test_the_head_runs_on_the_chosen_rows_alone():
    mlm, seen = small_mlm(), []
    mlm.head.register_forward_hook(lambda layer, inputs, out: seen.append(inputs[0].shape))
    ids = torch.randint(5, 40, (3, 8), generator=generator())
    positions = torch.rand(3, 8, generator=generator(1)) < 0.3
    got = mlm(ids, positions=model.query_positions(positions))
    assert [math.prod(shape[:-1]) for shape in seen] == [int(positions.sum())], \
        "head: it runs on other rows than the chosen ones"
    assert near(got, mlm(ids)[positions], 1e-4), "head: the rows are not full_logits[mask]"
    empty = mlm(ids, positions=model.query_positions(torch.zeros_like(positions)))
    assert empty.shape == (0, 40), "head: where no position is chosen, logits are not (0, V)"


@exercise(5)
@torch.no_grad()
def test_the_encoder_is_given_all_its_inputs():
    mlm = small_mlm()
    ids, mask = torch.randint(5, 40, (3, 8), generator=generator()), rows(8, 5, 6)
    types = torch.randint(0, 2, (3, 8), generator=generator(2))
    chosen = (torch.rand(3, 8, generator=generator(1)) < 0.4) & mask
    positions, full = model.query_positions(chosen), mlm(ids, mask, types)
    assert not near(mlm(ids, mask, types, positions=positions),
                    mlm(ids, None, types, positions=positions)), "head: attention_mask is lost"
    assert not near(mlm(ids, mask, types, positions=positions),
                    mlm(ids, mask, positions=positions)), "head: token_type_ids are lost"
    assert near(full, mlm.logits(mlm.bert(ids, mask, types)), 1e-4), \
        "head: without positions the logits are not those of the encoder's output"
    assert near(mlm(ids, mask, types, positions=positions), full[chosen], 1e-4), \
        "head: with positions the logits are not full_logits[mask]"
    words = mlm.bert.embeddings.word_embeddings(ids)
    assert near(mlm(None, mask, types, words, positions), full[chosen], 1e-4), \
        "head: inputs_embeds are lost"


@exercise(5)
def test_gradients_flow_through_the_head():
    mlm, ids = small_mlm(), torch.randint(5, 40, (2, 6), generator=generator())
    head, words = mlm.head, mlm.bert.embeddings.word_embeddings.weight
    positions = half_of(small_batch(4, 4))
    for chosen in (None, positions):
        hidden = mlm.bert(ids) if chosen is None else mlm.bert(ids)[chosen]
        right = head.norm(F.gelu(head.dense(hidden))) @ words.T + head.bias
        queries = None if chosen is None else model.query_positions(chosen)
        same_gradients("head", mlm(ids, positions=queries), right, list(mlm.parameters()))


# --- 6: whole-word masking ------------------------------------------------------------------------

@exercise(6)
def test_whole_words_follow_their_generator():
    maskable, continuation = sentence_of_words(50)
    follows_generator(lambda g: masking.whole_word_mask(maskable, continuation, 0.3, g))


@exercise(6)
def test_every_pair_of_words_is_equally_likely():
    maskable, continuation = sentence_of_words(1500)
    mask = masking.whole_word_mask(maskable, continuation, 0.4, generator())
    mask = as_mask(mask, maskable, "whole-word")
    assert torch.equal(mask[:, 1], mask[:, 2]) and torch.equal(mask[:, 5], mask[:, 7]), \
        "whole-word: it splits a word"
    first = mask[:, [1, 3, 4, 5, 8]]  # words of 2, 1, 1, 3, 1 pieces
    share = first.double().mean(0)
    assert likely(share, 0.4, 1500), \
        "whole-word: words are not equally likely: of 2, 1, 1, 3 and " \
        f"1 pieces, they are masked in {', '.join(f'{x:.3f}' for x in share)} of the draws, not 0.4"
    for pair in itertools.combinations(range(5), 2):
        assert likely(first[:, pair].all(1).double().mean(), 0.1, 1500), \
            "whole-word: words are not drawn uniformly without replacement"


@exercise(6)
def test_the_number_of_words_is_right_on_average():
    maskable, continuation = sentence_of_words(1500)
    mask = masking.whole_word_mask(maskable, continuation, 0.15, generator())
    words = as_mask(mask, maskable, "whole-word")[:, [1, 3, 4, 5, 8]]
    share = words.double().mean()
    assert likely(share * 5, 0.75, 1500), f"whole-word: {share:.3f} of the words are masked, not " \
        "the rate 0.15: round the number of words up or down at random, for each row by itself"
    assert (words.sum(1) <= 1).all(), "whole-word: 0.75 words are not rounded up or down"


@exercise(6)
def test_where_words_begin():
    maskable = torch.tensor([[False, True, True, False, True, True]]).repeat(600, 1)
    continuation = torch.tensor([[False, True, True, False, True, False]]).repeat(600, 1)
    mask = as_mask(masking.whole_word_mask(maskable, continuation, 1 / 3, generator()), maskable,
                   "whole-word")
    seen = {"".join("x" if x else "." for x in row) for row in mask.tolist()}
    assert seen <= {".xx...", "....x.", ".....x"}, \
        "whole-word: a piece after a special token must begin a word, whatever it looks like"
    assert len(seen) == 3, "whole-word: some word is never chosen"
    first = torch.ones(600, 3, dtype=torch.bool)  # no special token in front, and nothing else
    mask = as_mask(masking.whole_word_mask(first, first, 0.5, generator()), first, "whole-word")
    assert {tuple(row) for row in mask.tolist()} == {(False,) * 3, (True,) * 3}, \
        "whole-word: the first token of a row must begin a word"
    empty = torch.zeros(2, 5, dtype=torch.bool)
    none = as_mask(masking.whole_word_mask(empty, empty, 0.5, generator()), empty, "whole-word")
    assert not none.any(), "whole-word: it masks in a text without ordinary tokens"


# --- 7: entropy -----------------------------------------------------------------------------------

@exercise(7)
def test_entropy_is_torch_distributions_entropy():
    logits = torch.randn(4, 5, 200, generator=generator()) * 4
    expected = torch.distributions.Categorical(logits=logits).entropy()
    got = plain(masking.token_entropy(logits))
    assert got.shape == (4, 5), f"entropy: (4, 5, V) logits give {tuple(got.shape)}"
    check("entropy", got, expected, {
        "bits, not nats": expected / math.log(2), "the sign is wrong": -expected,
        "a mean over the words, not their sum": expected / 200},
        "not −Σ p ln p over the last axis")


@exercise(7)
def test_entropy_of_extreme_logits():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [1e4, 1e4, -1e4], [1e4, 0, 0]])
    got = plain(masking.token_entropy(logits))
    assert not got.isnan().any(), "entropy: nan where a probability is 0 (0 · ln 0 counts as 0)"
    assert near(got, [math.log(2), math.log(2), 0], 1e-5), \
        "entropy: large logits overflow, or words of probability 0 count"
    half = (torch.randn(6, 500, generator=generator()) * 3).bfloat16()
    assert near(masking.token_entropy(half), masking.token_entropy(half.float()), 1e-4), \
        "entropy: bfloat16 logits are not converted to float32 first"


# --- 8: the five selections -----------------------------------------------------------------------

@exercise(8)
def test_high_and_low_are_the_extremes():
    entropy = torch.rand(60, 12, generator=generator())
    maskable = torch.rand(60, 12, generator=generator(1)) < 0.7
    k = torch.randint(0, 10, (60,), generator=generator(2))
    for select, sign in (("high", 1), ("low", -1)):
        tempting = entropy.masked_fill(~maskable, 9.0 * sign)
        got = masking.select_positions(tempting, maskable, k, select)
        got = as_mask(got, maskable, f"selections: {select}")
        assert not (got & ~maskable).any(), f"selections: {select} takes what is not maskable"
        for row in range(60):
            there = maskable[row].nonzero()[:, 0].tolist()
            best = sorted(there, key=lambda i: -sign * entropy[row, i])[:k[row]]
            assert got[row].nonzero()[:, 0].tolist() == sorted(best), \
                f"selections: {select} does not take the k {select}est entropies"


@exercise(8)
def test_middle_is_nearest_the_median():
    entropy = torch.rand(60, 12, generator=generator()) ** 3
    maskable = torch.rand(60, 12, generator=generator(1)) < 0.7
    k = torch.randint(0, 10, (60,), generator=generator(2))
    got = masking.select_positions(entropy, maskable, k, "middle")
    got = as_mask(got, maskable, "selections: middle")
    assert not (got & ~maskable).any(), "selections: middle takes what is not maskable"
    for row in range(60):
        there = entropy[row][maskable[row]]
        assert got[row].sum() == min(len(there), k[row]), "selections: middle does not take k"
        if 0 < k[row] < len(there):
            off = (entropy[row] - float(np.median(there.numpy()))).abs()
            assert off[got[row]].max() <= off[maskable[row] & ~got[row]].min() + 1e-6, \
                "selections: middle does not take the k nearest the median of the row's maskable " \
                "positions"


@exercise(8)
def test_random_selections_follow_their_generator():
    entropy, k = torch.rand(20, 12, generator=generator()) + 0.1, torch.full((20,), 4)
    for select in ("mixed", "sample"):
        follows_generator(
            lambda g: masking.select_positions(entropy, rows(12).repeat(20, 1), k, select, g))


@exercise(8)
def test_sample_with_entropies_of_zero():
    entropy = torch.tensor([[0.0, 3.0, 0.0, 0.0, 1.0], [0.0] * 5]).half()
    maskable = torch.tensor([[True, True, True, False, True]]).repeat(2, 1)
    for seed in range(30):
        k = torch.tensor([3, 2])
        got = masking.select_positions(entropy, maskable, k, "sample", generator(seed))
        got = as_mask(got, maskable, "selections: sample")
        assert got.sum(1).tolist() == [3, 2] and not got[:, 3].any(), \
            "selections: sample does not spend the budget where entropies are 0"
        assert got[0, 1] and got[0, 4], "selections: sample takes an entropy of 0 before others"


@exercise(8)
def test_mixed_is_half_the_highest_and_half_anyone():
    entropy, maskable = torch.arange(10.0).repeat(1500, 1), rows(9, width=10).repeat(1500, 1)
    def mixed(entropy, maskable, k):
        got = masking.select_positions(entropy, maskable, k, "mixed", generator())
        return as_mask(got, maskable, "selections: mixed")

    got = mixed(entropy, maskable, torch.full((1500,), 4))
    assert (got.sum(1) == 4).all(), \
        "selections: mixed does not take k positions: its random half " \
        "may fall on the positions that are taken already"
    assert got[:, 7:9].all(), "selections: mixed does not take the k/2 most uncertain"
    share = got[:, :7].double().mean(0)
    assert likely(share, 2 / 7, 1500), \
        "selections: mixed's second half is not uniform over the rest"
    pair = got[:, :2].all(1).double().mean()
    assert likely(pair, 1 / 21, 1500), "selections: mixed's second half is not drawn independently"
    odd = mixed(entropy, maskable, torch.full((1500,), 5))
    assert (odd.sum(1) == 5).all() and odd[:, 7:9].all(), "selections: mixed loses one of an odd k"
    short = mixed(entropy[:2], rows(3, 0, width=10), torch.tensor([5, 2]))
    assert short.sum(1).tolist() == [3, 0], "selections: mixed in a row with fewer than k tokens"


def chances(weights, draws):
    """Returns the probability of every set when items are drawn one after the other, each in
    proportion to its weight among what is left; by enumeration."""
    found = {}
    for order in itertools.permutations(range(len(weights)), draws):
        probability, left = 1.0, sum(weights)
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        key = frozenset(order)
        found[key] = found.get(key, 0) + probability
    return found


@exercise(8)
def test_sample_draws_each_time_in_proportion_to_what_is_left():
    H, n = [0.5, 1.0, 2.0, 4.0], 1500
    entropy = torch.tensor([9.0, *H]).repeat(n, 1)
    maskable = torch.tensor([False, True, True, True, True]).repeat(n, 1)
    for draws in (1, 2, 3):
        k = torch.full((n,), draws)
        got = masking.select_positions(entropy, maskable, k, "sample", generator(draws))
        got = as_mask(got, maskable, "selections: sample")
        assert not got[:, 0].any(), "selections: sample takes what is not maskable"
        assert (got.sum(1) == draws).all(), "selections: sample takes more or fewer than k"
        for chosen, probability in chances(H, draws).items():
            pattern = torch.tensor([i in chosen for i in range(4)])
            share = (got[:, 1:] == pattern).all(1).double().mean()
            assert likely(share, probability, n), \
                f"selections: sample of {draws} from entropies {H} takes {sorted(chosen)} in " \
                f"{share:.3f} of the draws, not in {probability:.3f}: each draw must be in " \
                "proportion to the entropies that are left"


# --- 9: masked entropy ----------------------------------------------------------------------------

@contextmanager
def texts_read(mlm):
    """Yields a list to which every text that the encoder reads is added, (L,) each."""
    seen = []

    def hook(encoder, arguments, named):
        seen.extend((arguments[0] if arguments else named["input_ids"]).clone())

    handle = mlm.bert.register_forward_pre_hook(hook, with_kwargs=True)
    yield seen
    handle.remove()


def versions(batch, seen):
    """Returns for each text of the batch the versions that were read, some of it hidden."""
    def of(text):
        return [ids for ids in seen if ((ids == MASK) | (ids == text)).all()]

    return [of(text) for text in batch.input_ids]


def entropy_alone(mlm, batch, row, ids):
    """Returns the entropies of one version of a text, read by itself, (L,)."""
    n = len(ids) if batch.attention_mask is None else batch.attention_mask[row].sum()
    modes = mlm.training
    logits = mlm.eval()(ids[None, :n])
    mlm.train(modes)
    entropy = torch.distributions.Categorical(logits=logits[0].double()).entropy()
    return F.pad(entropy, (0, len(ids) - len(entropy)))


@exercise(9)
@torch.no_grad()
def test_every_position_is_hidden_once():
    mlm = small_mlm(hidden_dropout_prob=0.5).train()
    for lengths, rate, groups in (((16, 16, 16), 0.3, 4), ((14, 9, 12), 0.5, 2)):
        batch = small_batch(*lengths)
        with texts_read(mlm) as seen:
            got = plain(masking.masked_entropy(mlm, batch, rate, MASK, generator()))
        assert not any((ids[~batch.maskable.any(0)] == MASK).any() for ids in seen), \
            "masked entropy: it masks a special token"
        for row, read in enumerate(versions(batch, seen)):
            none = torch.zeros_like(batch.maskable[0])
            hidden = torch.stack([*(ids == MASK for ids in read), none])
            assert hidden.any(), "masked entropy: no position is hidden from the model"
            assert len(read) == groups, f"masked entropy: at rate {rate} a text is read " \
                f"{len(read)} times, not ⌈1/rate⌉ = {groups}"
            times = hidden.sum(0)
            assert not (times > batch.maskable[row]).any(), \
                "masked entropy: a position is hidden in more than one pass, or not maskable"
            assert torch.equal(times.bool(), batch.maskable[row]), \
                "masked entropy: a maskable position is never hidden"
            sizes = hidden[:-1].sum(1)
            assert sizes.max() - sizes.min() <= 1, "masked entropy: a text's groups have " \
                f"{sizes.tolist()} positions: they must be as equal as can be"
            for ids in read:
                there = ids == MASK
                assert near(got[row][there], entropy_alone(mlm, batch, row, ids)[there], 1e-3), \
                    "masked entropy: not the entropy at the positions that are hidden in that " \
                    "pass (padding seen? dropout on?)"
    assert mlm.training, "masked entropy: the model is left in evaluation mode"


@exercise(9)
def test_groups_are_dealt_at_random():
    mlm, batch = small_mlm(num_hidden_layers=1), small_batch(*[12] * 1000)
    with texts_read(mlm) as seen:
        got = masking.masked_entropy(mlm, batch, 0.25, MASK, generator())
    assert not getattr(got, "requires_grad", False), "masked entropy: the result has a gradient"
    hidden = torch.stack(seen) == MASK  # 12 positions, 4 groups: two share one in 2 of 11 cases
    for i, j in ((1, 2), (1, 5), (4, 12)):
        share = (hidden[:, i] & hidden[:, j]).sum() / 1000
        assert likely(share, 2 / 11, 1000), \
            "masked entropy: positions are not dealt into the groups at random, for each text anew"
    few = small_batch(12, 12)
    follows_generator(lambda g: masking.masked_entropy(mlm, few, 0.3, MASK, g))


# --- 10: self-entropy -----------------------------------------------------------------------------

@exercise(10)
@torch.no_grad()
def test_the_most_uncertain_of_twice_as_many():
    mlm, batch = small_mlm(hidden_dropout_prob=0.5).train(), small_batch(13, 16, 6)
    for select, sign in (("high", 1), ("low", -1)):
        strategy, original = self_entropy(mlm, 0.25, entropy_select=select), batch.input_ids.clone()
        with texts_read(mlm) as seen:
            mask = as_mask(strategy.mask(batch, generator()), batch.maskable, "self-entropy")
        assert torch.equal(batch.input_ids, original), "self-entropy: it changes the batch in place"
        assert len(seen) == 3, f"self-entropy: the model reads {len(seen)} texts, not each once"
        for row, ids in enumerate(seen):
            candidates = ids == MASK
            assert candidates.any(), "self-entropy: the candidates are not hidden from the model"
            assert not (candidates & ~batch.maskable[row]).any(), \
                "self-entropy: a candidate is not maskable"
            k = mask[row].sum()
            assert not (mask[row] & ~candidates).any(), \
                "self-entropy: it chooses a position that is no candidate"
            assert candidates.sum() == 2 * k, f"self-entropy: {candidates.sum()} candidates for " \
                f"a budget of {k}, not twice as many"
            entropy = sign * entropy_alone(mlm, batch, row, ids)
            assert entropy[mask[row]].min() >= entropy[candidates & ~mask[row]].max() - 1e-4, \
                f"self-entropy: with entropy_select {select} it does not take the k {select}est " \
                "entropies of the candidates"
    assert mlm.training, "self-entropy: the model is left in evaluation mode"


@exercise(10)
@torch.no_grad()
def test_visible_entropies_are_read_off_the_text_as_it_is():
    mlm, batch = small_mlm().train(), small_batch(12, 16, 8)
    with texts_read(mlm) as seen:
        mask = self_entropy(mlm, 0.25, entropy_input="visible").mask(batch, generator())
        mask = as_mask(mask, batch.maskable, "self-entropy")
    assert torch.equal(torch.stack(seen), batch.input_ids), \
        "self-entropy: with entropy_input visible the model must read each text as it is, once"
    for row, ids in enumerate(seen):
        entropy = entropy_alone(mlm, batch, row, ids)
        assert entropy[mask[row]].min() >= entropy[batch.maskable[row] & ~mask[row]].max() - 1e-4, \
            "self-entropy: with entropy_input visible it does not take the k highest entropies"


@exercise(10)
def test_candidates_are_drawn_uniformly():
    mlm, batch = small_mlm(num_hidden_layers=1), small_batch(*[8] * 2000)
    with texts_read(mlm) as seen:
        self_entropy(mlm, 0.25).mask(batch, generator())
    assert all(p.grad is None for p in mlm.parameters()), \
        "self-entropy: gradients are left behind"
    candidates = torch.stack(seen) == MASK  # 4 of 8
    for i, j in ((1, 2), (3, 8)):
        assert likely(candidates[:, i].double().mean(), 1 / 2, 2000) \
            and likely((candidates[:, i] & candidates[:, j]).double().mean(), 3 / 14, 2000), \
            "self-entropy: the candidates are not drawn uniformly, for each text by itself"
    for tokens, rate in ((3, 0.15), (1, 0.3)):
        short = small_batch(*[tokens] * 2000)
        share = plain(self_entropy(mlm, rate).mask(short, generator())).sum() / 2000
        assert likely(share, rate * tokens, 2000), f"self-entropy: of {tokens} tokens at rate " \
            f"{rate} it masks {share:.3f} on average, not {rate * tokens:.2f}: k is drawn once, " \
            "and may be 0"
    crowded = small_batch(10, 10)
    assert same(plain(self_entropy(mlm, 0.6).mask(crowded, generator())).sum(1), [6, 6]), \
        "self-entropy: where 2k is more than a text has, it does not spend the budget"
    few = small_batch(12, 12)
    follows_generator(lambda g: self_entropy(mlm, 0.25).mask(few, g))


# --- 11: the KD loss ------------------------------------------------------------------------------

def kl(p, log_p, log_q):
    """Returns KL(p ‖ q) of each row by the definition."""
    return (p * (log_p - log_q)).sum(-1)


@exercise(11)
def test_kd_loss_is_the_formula():
    g = generator()
    z_s, z_t = torch.randn(6, 11, generator=g) * 3, torch.randn(6, 11, generator=g) * 3
    labels, alpha, T = torch.tensor([0, 3, 10, 2, 2, 7]), 0.3, 2.5

    def loss(student=z_s, teacher=z_t, alpha=alpha, s_T=T, t_T=T, factor=T * T, reverse=False,
             over=6, ce_T=1.0):
        log_s = (student.double() / s_T).log_softmax(-1)
        log_t = (teacher.double() / t_T).log_softmax(-1)
        divergence = kl(log_s.exp(), log_s, log_t) if reverse else kl(log_t.exp(), log_t, log_s)
        cross_entropy = F.cross_entropy(student.double() / ce_T, labels)
        return alpha * factor * divergence.sum() / over + (1 - alpha) * cross_entropy

    got = distill.kd_loss(z_s, z_t, labels, alpha, T)
    check("kd_loss", got, loss(), {
        "the factor T² is missing": loss(factor=1), "the factor is T, not T²": loss(factor=T),
        "the divergence is KL(student ‖ teacher): the teacher comes first": loss(reverse=True),
        "the student's logits are not divided by T": loss(s_T=1),
        "the teacher's logits are not divided by T": loss(t_T=1),
        "neither side's logits are divided by T": loss(s_T=1, t_T=1),
        "student and teacher are exchanged": loss(z_t, z_s),
        "α weighs the cross-entropy, 1 − α the divergence": loss(alpha=1 - alpha),
        "the divergence is a mean over words too, not a sum over words": loss(over=66),
        "the divergence is a sum over positions, not their mean": loss(over=1),
        "the cross-entropy is divided by T as well": loss(ce_T=T),
        "the cross-entropy is not weighted by 1 − α":
            loss() + alpha * F.cross_entropy(z_s.double(), labels)},
        "not α T² KL(softmax(z_t / T) ‖ softmax(z_s / T)) + (1 − α) CE")
    assert near(distill.kd_loss(z_s, z_t, labels, 1.0, T), loss(alpha=1.0), 1e-4), \
        "kd_loss: at α = 1 it is not T² KL"


@exercise(11)
def test_kd_loss_stays_finite_and_exact():
    labels = torch.tensor([0, 1])
    z_s = torch.tensor([[200.0, 0, -200], [0, 400, 0]])
    z_t = torch.tensor([[0.0, 300, 0], [0, 99, 0]])
    got = distill.kd_loss(z_s, z_t, labels, 0.5, 1.0)
    assert plain(got).isfinite(), "kd_loss: it overflows at large logits: use log_softmax"
    assert near(got, 0.5 * 200 / 2, 1e-3), "kd_loss: wrong at large logits, where exp overflows " \
        "or probabilities are 0"
    g = generator(4)
    half = [(torch.randn(40, 300, generator=g) * 4).bfloat16() for _ in range(2)]
    labels = torch.arange(40)
    got = distill.kd_loss(*half, labels, 0.5, 2.0)
    expected = distill.kd_loss(half[0].float(), half[1].float(), labels, 0.5, 2.0)
    assert near(got, expected, 1e-4), \
        "kd_loss: bfloat16 logits are not converted to float32 first"
    student, teacher = z_s.clone().requires_grad_(), z_t / 100
    log_s, log_t = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    right = 0.5 * 4 * kl(log_t.exp(), log_t, log_s).mean() \
        + 0.5 * F.cross_entropy(student, labels[:2])
    same_gradients("kd_loss", distill.kd_loss(student, teacher, labels[:2], 0.5, 2.0), right,
                   [student])


# --- 12: embedding saliency -----------------------------------------------------------------------

class LargestResult(TorchFunctionMode):
    """Notes the largest tensor that any operation makes."""
    entries = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.entries = max(self.entries, value.numel())
        return result


@exercise(12)
def test_saliency_is_the_gradient_at_an_explicit_one_hot():
    mlm = small_mlm().double()
    weight, ids = mlm.bert.embeddings.word_embeddings.weight, small_batch(9, 9).input_ids
    one_hot = F.one_hot(ids, 40).double().requires_grad_()
    embeddings = (one_hot @ weight).detach().requires_grad_()
    gradient, = torch.autograd.grad(mlm(inputs_embeds=embeddings).square().sum(), embeddings)
    full, = torch.autograd.grad(mlm(inputs_embeds=one_hot @ weight).square().sum(), one_hot)
    other = ids.flip(1)
    product = gradient * weight[other]
    got = masking.embedding_saliency(gradient, weight, other)
    assert not getattr(got, "requires_grad", False), \
        "saliency: the result has a gradient: detach the embeddings"
    check("saliency", got, full.gather(2, other[..., None])[..., 0], {
        "the sign is turned; the class Typhoon applies the signs": -product.sum(-1),
        "the absolute value": product.sum(-1).abs(), "a mean over the width": product.mean(-1),
        "the norm of the gradient": gradient.norm(dim=-1),
        "a cosine: neither side is normalised": F.cosine_similarity(gradient, weight[other], -1),
        "the absolute terms are summed": product.abs().sum(-1)},
        "not ∂L/∂onehot(x_i)[v] = ⟨∂L/∂e_i, W_v⟩ at v = token_ids_i", 1e-3)


@exercise(12)
def test_saliency_in_float32_and_without_a_one_hot_tensor():
    g = generator()
    gradient, weight = torch.randn(4, 16, 8, generator=g), torch.randn(1000, 8, generator=g)
    ids = torch.randint(0, 1000, (4, 16), generator=g)
    with LargestResult() as largest:
        masking.embedding_saliency(gradient, weight, ids)
    assert largest.entries < 4 * 16 * 1000, "saliency: it builds a (B, L, V) tensor"
    half = gradient.bfloat16(), weight.bfloat16()
    expected = (half[0].double() * half[1].double()[ids]).sum(-1)
    assert near(masking.embedding_saliency(*half, ids), expected, 1e-4), \
        "saliency: bfloat16 is not converted to float32 before the product"
    assert near(masking.embedding_saliency(half[0], half[1].float(), ids), expected, 1e-4), \
        "saliency: a bfloat16 gradient is not converted to float32 before the product"


# --- 13: Typhoon's average ------------------------------------------------------------------------

def average_by_hand(steps, types, beta, visible=-1, masked=1, pooled=False, decay=False,
                    from_zero=False, off=False):
    """Returns (weight, seen) after some steps of one or more batches, by loops over the tokens."""
    weight, seen = [0.0] * types, [False] * types
    for batches in steps:
        values = {}
        for ids, dot, maskable, hidden in batches:
            for i in range(ids.numel()):
                if maskable.flatten()[i] or off:
                    is_masked = hidden is not None and bool(hidden.flatten()[i])
                    sign = masked if is_masked else visible
                    group = False if pooled else is_masked
                    of_type = values.setdefault(int(ids.flatten()[i]), {})
                    of_type.setdefault(group, []).append(sign * float(dot.flatten()[i]))
        for v in range(types):
            s = sum(sum(group) / len(group) for group in values.get(v, {}).values())
            if v in values or decay:
                first = not seen[v] and not from_zero
                weight[v] = s if first else (1 - beta) * weight[v] + beta * s
            seen[v] = seen[v] or v in values
    return torch.tensor(weight, dtype=torch.double), seen


def random_steps(g, counts, types=6):
    """Returns steps of batches (ids, dot, maskable, masked), with a few tokens a type."""
    steps = []
    for count in counts:
        batches = []
        for _ in range(count):
            ids = torch.randint(0, types, (2, 5), generator=g)
            dot = torch.randn(2, 5, generator=g)
            maskable = torch.rand(2, 5, generator=g) < 0.8
            masked = (torch.rand(2, 5, generator=g) < 0.4) & maskable
            batches.append((ids, dot, maskable, masked))
        steps.append(batches)
    return steps


@exercise(13)
def test_the_average_is_the_formula():
    mistakes = {"the sign of visible tokens is turned": {"visible": 1},
                "the sign of masked tokens is turned": {"masked": -1},
                "both signs are turned": {"visible": 1, "masked": -1},
                "one mean over visible and masked tokens, not the sum of two": {"pooled": True},
                "types that do not occur in a step decay": {"decay": True},
                "a type's first value does not set its weight": {"from_zero": True},
                "special tokens and padding count": {"off": True},
                "β weighs the old value: it is the weight of the new one": {"beta": 1 - 0.7}}
    for counts, words in (([1, 1, 1, 1], "not (1 − β) w + β s of the types of each step"),
                          ([2, 3, 2], "batches that are accumulated are not one large batch: "
                                      "sums and counts add up, means do not")):
        steps = random_steps(generator(len(counts)), counts)
        typhoon = masking.Typhoon(torch.ones(6), 0.3, ema_weight=0.7)
        for batches in steps:
            for batch in batches:
                typhoon.accumulate(*batch)
            typhoon.step()
        values = {name: average_by_hand(steps, 6, **{"beta": 0.7} | options)[0]
                  for name, options in mistakes.items()}
        expected, seen = average_by_hand(steps, 6, 0.7)
        check("average", typhoon.weight, expected, values, words)
        assert same(typhoon.seen, seen), "average: the wrong types are seen"


@exercise(13)
def test_seen_types_without_masks_and_empty_steps():
    steps = [[(ids, dot, maskable, None)] for (ids, dot, maskable, _), in
             random_steps(generator(7), [1, 1], types=20)]
    typhoon = masking.Typhoon(torch.ones(20), 0.3, ema_weight=0.7)
    for (batch,) in steps:
        typhoon.accumulate(*batch)
        typhoon.step()
    expected, seen = average_by_hand(steps, 20, 0.7)
    assert near(typhoon.weight, expected), "average: with masked None every token counts as visible"
    assert same(typhoon.seen, seen), "average: types that never occurred count as seen"
    typhoon.step()
    assert near(typhoon.weight, expected), "average: a step without tokens changes the average, " \
        "or the sums of a step are not cleared"


@exercise(13)
def test_ranks_add_up_to_one_process():
    ours, theirs = random_steps(generator(9), [1, 1])
    first, second = (masking.Typhoon(torch.ones(6), 0.3, ema_weight=0.7) for _ in range(2))
    first.accumulate(*ours[0])
    second.accumulate(*theirs[0])
    sent = []
    second.step(lambda tensor: sent.append(tensor.clone()))
    assert sent, "average: step does not call reduce"
    waiting = iter(sent)
    first.step(lambda tensor: tensor.add_(next(waiting)))
    expected, seen = average_by_hand([ours + theirs], 6, 0.7)
    assert near(first.weight, expected) and same(first.seen, seen), \
        "average: data-parallel ranks do not add up: reduce sums and counts before the means"


# --- 14: Typhoon's rates --------------------------------------------------------------------------

def shape_by_hand(typhoon, unseen=1.0, over_all=False, turned=False):
    """Returns u = 1 − σ + σ ŵ of each type."""
    weight, seen, sigma = typhoon.weight, typhoon.seen, typhoon.spread
    known = weight if over_all else weight[seen]
    scaled = (weight - known.min()) / (known.max() - known.min())
    scaled = torch.where(seen, 1 - scaled if turned else scaled, unseen)
    return 1 - sigma + sigma * scaled


def rates_by_hand(typhoon, u):
    """Returns min(1, c u) with the c that meets the budget, by bisection."""
    low, high = 0.0, 1e9
    for _ in range(200):
        c = (low + high) / 2
        expected = (typhoon.frequency * (c * u).clamp(max=1)).sum()
        low, high = (c, high) if expected < typhoon.rate else (low, c)
    return (low * u).clamp(max=1)


@exercise(14)
def test_rates_are_the_formula():
    g = generator(1)
    counts = (torch.rand(60, generator=g) ** 6 * 1000).long()
    spread, seen = torch.randn(60, generator=g).double(), torch.rand(60, generator=g) < 0.8
    for rate, mean in ((0.15, 5), (0.3, -5), (0.7, 5), (0.9, -5), (0.97, 5)):
        weight = torch.where(seen, spread + mean, 0)
        typhoon = typhoon_with(weight, seen, counts, rate, 0.7)
        u, f = shape_by_hand(typhoon), typhoon.frequency
        uncapped = rate / (f * u).sum() * u
        once = uncapped.clamp(max=1)
        free = uncapped < 1
        missing = (rate - (f * once).sum()) / f[free].sum().clamp(min=1e-9)
        given = once + torch.where(free, missing, 0)
        scaled_once = torch.where(free, once * (rate - f[~free].sum()) / (f * once)[free].sum(), 1)
        got = plain(typhoon.rates())
        assert got.shape == (60,), f"rates: {tuple(got.shape)}, not (V,)"

        def variant(**options):
            return rates_by_hand(typhoon, shape_by_hand(typhoon, **options))

        check("rates", got, rates_by_hand(typhoon, u), {
            "no cap at 1": uncapped,
            "what the cap at 1 cuts off is lost: give it back to the others": once,
            "what the cap cuts off is added evenly: the others' rates must stay proportional to u":
                given,
            "after giving back once, others pass 1, and are not capped again": scaled_once,
            "after giving back once, others pass 1, and that is lost": scaled_once.clamp(max=1),
            "a type not seen yet counts 0, not 1": variant(unseen=0.0),
            "ŵ is scaled over all types, and not over those seen": variant(over_all=True),
            "ŵ is turned around: the highest weight has the highest rate": variant(turned=True),
            "the mean over types is the rate, not the mean over the corpus":
                rates_by_hand(typhoon_with(weight, seen, torch.ones(60), rate, 0.7), u),
            "the spread is turned around: u = σ + (1 − σ) ŵ":
                rates_by_hand(typhoon, 1 - 0.3 + 0.3 * (u - 0.3) / 0.7)},
            f"not min(1, c u) with the c that meets the budget {rate}")


@exercise(14)
def test_rates_where_there_is_nothing_to_scale_by():
    one = plain(typhoon_with([0.0, 7.0, 0.0], [False, True, False], [5, 3, 2], 0.3, 0.4).rates())
    assert not one.isnan().any(), "rates: nan where one type has been seen"
    assert near(one, [0.3, 0.3, 0.3]), "rates: where one type has been seen, all have the rate"
    same = typhoon_with([2.0, 2.0, 0.0], [True, True, False], [5, 3, 2], 0.3, 0.4).rates()
    assert near(same, [0.3, 0.3, 0.3]), "rates: where all weights are equal, all have the rate"
    absent = typhoon_with([1.0, 5.0, 2.0], [True, True, True], [5, 0, 5], 0.9, 0.9)
    absent = plain(absent.rates())
    assert near((absent[0] + absent[2]) / 2, 0.9) and absent.max() <= 1, \
        "rates: a type that never occurs in the corpus takes a share of the budget"


# --- 15: one training step ------------------------------------------------------------------------

@contextmanager
def replaced(owner, name, value):
    """Puts a value in the place of an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


def run_step(trainer, batch, mask, kd_weight, masked_in_all=None):
    """Returns (loss, corrupted ids, the arguments of corrupt, by name) of one micro-step."""
    calls, corrupt = [], train.corrupt

    def spy(*arguments, **named):
        result = corrupt(*arguments, **named)
        bound = inspect.signature(corrupt).bind(*arguments, **named)
        bound.apply_defaults()
        calls.append((result[0].clone(), bound.arguments))
        return result

    with replaced(train, "corrupt", spy), replaced(masking, "corrupt", spy):
        total = mask.sum() if masked_in_all is None else torch.tensor(masked_in_all)
        loss = trainer.micro_step(batch, mask, total, kd_weight)
    assert len(calls) == 1, f"step: it calls corrupt {len(calls)} times, not once"
    return plain(loss), *calls[0]


def loss_by_hand(trainer, batch, mask, corrupted, alpha, T=2.0, lost=(), lost_by_teacher=(),
                 clean_teacher=False, relabelled=False, words=None):
    """Returns the sum of the loss over the masked positions, by the formulas; `lost` inputs are not
    given to the student."""
    options = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids}
    logits = trainer.model(corrupted, inputs_embeds=words,
                           **options | dict.fromkeys(lost))[mask]
    labels = (corrupted if relabelled else batch.input_ids)[mask]
    loss = (1 - alpha) * F.cross_entropy(logits, labels, reduction="sum")
    if alpha:
        with torch.no_grad():
            teacher = trainer.teacher(batch.input_ids if clean_teacher else corrupted,
                                      **options | dict.fromkeys(lost_by_teacher))
        log_t, log_s = (teacher[mask] / T).log_softmax(-1), (logits / T).log_softmax(-1)
        loss = loss + alpha * T * T * kl(log_t.exp(), log_t, log_s).sum()
    return loss


@exercise(15)
def test_the_loss_of_a_step_is_the_formula():
    for kd_weight in (0.0, 0.6):
        trainer, batch = small_trainer(kd=True, corruption=(0.5, 0.25, 0.25), kd_temperature=3.0)
        mask, reads = half_of(batch), []
        trainer.teacher.bert.register_forward_hook(lambda *_: reads.append(torch.is_grad_enabled()))
        loss, corrupted, given = run_step(trainer, batch, mask, kd_weight)
        assert torch.equal(given["input_ids"], batch.input_ids), \
            "step: corrupt is not given the batch's text"
        assert torch.equal(given["mask"], mask), "step: corrupt is not given the mask"
        assert (given["mask_token_id"], given["vocab_size"]) == (MASK, 40), \
            "step: corrupt is not given the vocabulary's [MASK] and size"
        assert tuple(given["split"]) == (0.5, 0.25, 0.25), \
            "step: corrupt is not given the recipe's corruption"
        assert set(given["special_ids"]) == {0, 1, 2, 3, 4}, \
            "step: corrupt is not given the special ids, and may put them in"
        assert given["generator"] is trainer.generator, \
            "step: corrupt is not given the trainer's generator"
        assert bool(reads) == bool(kd_weight), \
            "step: the teacher runs at kd_weight 0, or does not run above it"

        def by_hand(alpha=kd_weight, T=3.0, **options):
            return partial(loss_by_hand, trainer, batch, mask, corrupted, alpha, T, **options)

        expected = by_hand()()
        mistakes = {"the loss is the mean over the masked positions: return their sum":
                    expected / mask.sum(),
                    "the labels are not the original tokens": by_hand(relabelled=True)}
        for name in ("attention_mask", "token_type_ids"):
            mistakes[f"{name} is not passed on"] = by_hand(lost=[name], lost_by_teacher=[name])
            mistakes[f"{name} is not passed on to the model"] = by_hand(lost=[name])
            mistakes[f"{name} is not passed on to the teacher"] = by_hand(lost_by_teacher=[name])
        if kd_weight:
            clean = by_hand(clean_teacher=True)
            mistakes |= {"the teacher reads the text before corruption": clean,
                         "the recipe's temperature is lost": by_hand(T=1.0),
                         "a temperature of 2, whatever the recipe has": by_hand(T=2.0),
                         "there is no distillation": by_hand(0.0),
                         "the labels do not count: α is 1": by_hand(1.0),
                         "kd_weight is the recipe's, and not the argument": by_hand(0.9),
                         "kd_weight weighs the labels, not the teacher": by_hand(1 - kd_weight)}
        check("step", loss, expected, mistakes,
              "the returned loss is not the sum over the masked positions")
    alone, batch = small_trainer()
    alone.micro_step(batch, half_of(batch), half_of(batch).sum(), 0.0)  # without any teacher


class Ranks(torch.nn.Module):
    """Stands in for DistributedDataParallel: notes every forward pass that will have a gradient."""

    def __init__(self, module):
        super().__init__()
        self.module, self.passes = module, 0

    def forward(self, *inputs, **named):
        self.passes += torch.is_grad_enabled()
        return self.module(*inputs, **named)


@exercise(15)
def test_the_gradient_of_a_step():
    trainer, batch = small_trainer(kd=True)
    trainer.parallel = Ranks(trainer.model)
    mask, parameters = half_of(batch), list(trainer.model.parameters())
    with world_of(2):
        loss, corrupted, _ = run_step(trainer, batch, mask, 0.5, masked_in_all=100)
    assert trainer.parallel.passes == 1, "step: the model's forward pass does not go through " \
        "self.parallel once: ranks would not average their gradients"
    assert all(p.grad is None for p in trainer.teacher.parameters()), \
        "step: the teacher has gradients"
    assert all(p.grad is not None for p in parameters), "step: some parameter has no gradient"
    got = torch.cat([p.grad.flatten() for p in parameters])
    expected = torch.autograd.grad(loss_by_hand(trainer, batch, mask, corrupted, 0.5), parameters)
    expected = torch.cat([part.flatten() for part in expected]) / 100
    check("step", got, 2 * expected, {
        "the factor world_size() is missing: ranks are averaged": expected,
        "the gradient is divided by world_size()": expected / 2,
        "the loss is divided by this micro-batch's masked positions, not by masked_in_all":
            2 * expected * 100 / mask.sum(),
        "the loss is not divided by masked_in_all": 200 * expected,
        "the mean of the micro-batch is divided by masked_in_all once more":
            2 * expected / mask.sum()},
        "the gradient is not that of loss · world_size() / masked_in_all", 1e-3)


@exercise(15)
def test_a_step_without_masked_tokens():
    for kd_weight in (0.0, 0.5):
        trainer, batch = small_trainer(kd=True)
        mask = torch.zeros_like(batch.maskable)
        loss = trainer.micro_step(batch, mask, torch.tensor(7), kd_weight)
        assert near(loss, 0.0), f"step: where nothing is masked the loss is {loss}, not 0"
        gradients = [p.grad for p in trainer.model.parameters()]
        assert all(g is not None and near(g, torch.zeros_like(g)) for g in gradients), \
            "step: where " \
            "nothing is masked, a gradient is missing or not 0: data-parallel ranks wait for all"


class Watching(masking.Random):
    """A strategy that notes what it is shown."""
    wants_gradient = True

    def observe(self, batch, unseen, embedding_grad):
        self.shown = getattr(self, "shown", []) + [(batch, unseen, embedding_grad)]


@exercise(15)
def test_what_the_strategy_is_shown():
    trainer, batch = small_trainer(strategy=Watching, corruption=(0.4, 0.3, 0.3))
    mask = half_of(batch)
    with world_of(2):
        loss, corrupted, _ = run_step(trainer, batch, mask, 0.0, masked_in_all=50)
    shown = getattr(trainer.strategy, "shown", [])
    assert len(shown) == 1, f"step: observe is called {len(shown)} times, not once"
    seen, unseen, gradient = shown[0]
    assert torch.equal(seen.input_ids, batch.input_ids), "step: observe is not given the batch"
    assert not torch.equal(unseen, mask), \
        "step: observe is given the mask: a token that corruption kept is visible"
    assert torch.equal(unseen, corrupted != batch.input_ids), \
        "step: `unseen` is not True exactly where the model did not see the token itself"
    words = trainer.model.bert.embeddings.word_embeddings(corrupted).detach().requires_grad_()
    by_hand = loss_by_hand(trainer, batch, mask, None, 0.0, words=words) / 50
    expected, = torch.autograd.grad(by_hand, words)
    assert gradient is not None, "step: the word embeddings have no gradient: retain_grad"
    check("step", gradient, expected, {
        "the gradient that observe is given still has the factor world_size()": 2 * expected,
        "the gradient that observe is given is not divided by masked_in_all": 50 * expected},
        "observe is not given the loss's gradient at the word embeddings", 1e-3)
    quiet, batch = small_trainer()
    quiet.strategy.observe = lambda *_: pytest.fail("observed")
    assert not raises(pytest.fail.Exception, quiet.micro_step, batch, mask, mask.sum(), 0.0), \
        "step: observe is called although the strategy does not want the gradient"


@exercise(15)
def test_a_step_in_bfloat16():
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        trainer, batch = small_trainer(kd=True, bf16=bf16)
        found = {}
        for name in ("model", "teacher"):
            getattr(trainer, name).head.dense.register_forward_hook(
                lambda layer, inputs, out, name=name: found.update({name: out.dtype}))
        trainer.micro_step(batch, half_of(batch), half_of(batch).sum(), 0.5)
        assert found["model"] == dtype, f"step: with bf16 {bf16} the model computes in " \
            f"{found['model']}: use self.autocast()"
        assert found["teacher"] == dtype, f"step: with bf16 {bf16} the teacher computes in " \
            f"{found['teacher']}: use self.autocast()"


# --- 16: Matthews' correlation --------------------------------------------------------------------

@exercise(16)
def test_matthews_is_the_correlation_coefficient():
    rng = np.random.default_rng(0)
    for size in (20, 50, 200):
        labels = (rng.random(size) < 0.3).astype(int)
        predictions = np.where(rng.random(size) < 0.6, labels, (rng.random(size) < 0.8).astype(int))
        tp, tn = (predictions & labels).sum(), ((1 - predictions) & (1 - labels)).sum()
        fp, fn = (predictions & (1 - labels)).sum(), ((1 - predictions) & labels).sum()
        cross = float(tp * tn - fp * fn)
        expected = np.corrcoef(predictions, labels)[0, 1]
        check("matthews", glue.matthews(predictions, labels), expected, {
            "the denominator has the labels' margins twice and the predictions' not at all":
                cross / ((tp + fn) * (tn + fp)),
            "the denominator has the predictions' margins twice and the labels' not at all":
                cross / ((tp + fp) * (tn + fn)),
            "the denominator lacks its square root":
                cross / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
            "that is accuracy": (predictions == labels).mean(),
            "that is F1": 2 * tp / (2 * tp + fp + fn),
            "the sign is turned": -expected},
            "of two classes it is not their correlation coefficient")


@exercise(16)
def test_matthews_of_three_classes():
    rng = np.random.default_rng(1)
    labels = rng.choice(3, 150, p=[0.6, 0.3, 0.1])
    predictions = np.where(rng.random(150) < 0.5, labels, rng.choice(3, 150, p=[0.2, 0.2, 0.6]))
    x, y = np.eye(3)[predictions], np.eye(3)[labels]

    def covariance(x, y):
        return ((x - x.mean(0)) * (y - y.mean(0))).sum()

    expected = covariance(x, y) / math.sqrt(covariance(x, x) * covariance(y, y))
    check("matthews", glue.matthews(predictions, labels), expected, {
        "the class numbers are correlated: classes have no order":
            np.corrcoef(predictions, labels)[0, 1],
        "the denominator has the labels' part twice": covariance(x, y) / covariance(y, y),
        "the denominator has the predictions' part twice": covariance(x, y) / covariance(x, x)},
        "of three classes it is not R_K")
    assert near(glue.matthews(predictions + 5, labels + 5), expected), \
        "matthews: the numbers of the classes change the result"
    few = np.minimum(labels, 1)
    y = np.eye(3)[few]
    expected = covariance(x, y) / math.sqrt(covariance(x, x) * covariance(y, y))
    assert near(glue.matthews(predictions, few), expected), \
        "matthews: wrong where a class is predicted that no label has"
    with np.errstate(all="ignore"):
        for constant in (np.zeros(9, int), np.full(9, 2)):
            for pair in ((constant, np.arange(9) % 3), (np.arange(9) % 3, constant),
                         (constant, constant), (constant, constant + 1)):
                assert near(glue.matthews(*pair), 0.0), \
                    "matthews: where one side is constant it is not 0"


@exercise(16)
def test_matthews_of_many_examples():
    for n in (1043, 200_000):  # CoLA's dev, and more than any product of counts in int64 can hold
        labels = np.arange(n) % 3 == 0
        predictions = labels ^ (np.arange(n) % 7 == 0)
        with np.errstate(all="ignore"):
            got = glue.matthews(predictions.astype(int), labels.astype(int))
        assert near(got, np.corrcoef(predictions, labels)[0, 1]), \
            f"matthews: wrong for {n:,} examples: do products of counts overflow an integer?"


# --- 17: the paired t test and its interval -------------------------------------------------------

@exercise(17)
def test_t_is_the_formula():
    rng = np.random.default_rng(3)
    for n in (2, 5, 9):
        b = rng.normal(0.7, 0.1, n)
        a = b + rng.normal(0.02, 0.03, n)
        d, p = a - b, None
        mean, sd = d.mean(), d.std(ddof=1)
        t = mean / (sd / math.sqrt(n))
        got, p = stats.paired_t_test(a.tolist(), b.tolist())
        check("paired t", got, t, {
            "the sign is lost or turned": -t, "the difference is b − a": -t,
            "the sd is divided by n, not by n − 1": mean / (d.std() / math.sqrt(n)),
            "the standard error is sd / n": mean / (sd / n), "√n is missing": mean / sd,
            "the seeds are not paired": mean / math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / n)},
            "not mean(d) / (sd(d) / √n)")
        check("paired t", p, stats.t_tail(t, n - 1), {
            "p is one-sided": stats.t_tail(t, n - 1) / 2,
            "the degrees of freedom are n, not n − 1": stats.t_tail(t, n),
            "p is a normal distribution's": math.erfc(abs(t) / math.sqrt(2)),
            "p is 1 − p": 1 - stats.t_tail(t, n - 1)}, "not the two-sided p with n − 1 degrees")
        turned = stats.paired_t_test(b.tolist(), a.tolist())
        assert near(turned, [-t, p]), "paired t: exchanging a and b must change t's sign alone"


@exercise(17)
def test_the_interval_is_the_formula():
    d = [0.01, -0.02, 0.04, 0.03, 0.02]
    mean, sd = np.mean(d), np.std(d, ddof=1)
    for level, z in ((0.95, 1.959964), (0.8, 1.281552)):
        error = sd / math.sqrt(5)

        def around(width):
            return [mean - width, mean + width]

        def quantile(alpha, df=4):
            return around(stats.t_critical(df, alpha) * error)

        half = stats.t_critical(4, 1 - level) * error
        mistakes = {"the normal quantile in place of Student's": around(z * error),
                    "√n is missing": around(half * math.sqrt(5)),
                    "n in place of √n": around(half / math.sqrt(5)),
                    "the sd is divided by n, not by n − 1": around(half * math.sqrt(0.8)),
                    "n degrees of freedom, not n − 1": quantile(1 - level, df=5),
                    "the error is halved for two-sided t_critical": quantile((1 - level) / 2),
                    "a level of 0.95, whatever is asked for": quantile(0.05)}
        got = stats.confidence_interval(d, level)
        check("interval", got, around(half), mistakes, "not mean ± t* sd / √n", 1e-6)


@exercise(17)
def test_where_there_is_no_spread():
    """One seed; equal differences, also up to rounding: 0.2 twice; differences that are all 0."""
    for words, a, b in (("one seed", [0.8], [0.7]), ("equal differences", [0.75, 0.5], [0.5, 0.25]),
                        ("differences that are equal up to rounding: mean_sd takes care of that",
                         [0.1 + 0.2, 0.5], [0.1, 0.3]),
                        ("differences that are all 0", [0.5, 0.7], [0.5, 0.7])):
        with np.errstate(all="ignore"):
            assert plain(stats.paired_t_test(a, b)).isnan().all(), \
                f"paired t: (nan, nan) is wanted of {words}"
            differences = [x - y for x, y in zip(a, b)]
            assert plain(stats.confidence_interval(differences)).isnan().all(), \
                f"interval: (nan, nan) is wanted of {words}"
    for a, b in (([1, 2, 3], [1, 2]), ([1], [1, 2, 3])):
        assert raises(ValueError, stats.paired_t_test, a, b), \
            "paired t: a and b of different length do not raise ValueError"


# --- 18: Holm -------------------------------------------------------------------------------------

def closed_testing(p_values):
    """Returns the adjusted p-values by their definition: a hypothesis falls when every set that
    holds it falls by Bonferroni. nan stands for a p of 1, and stays nan."""
    p = [1.0 if math.isnan(value) else value for value in p_values]
    adjusted = []
    for i in range(len(p)):
        others = [j for j in range(len(p)) if j != i]
        sets = [(i, *some) for r in range(len(p)) for some in itertools.combinations(others, r)]
        adjusted.append(max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets))
    return [math.nan if math.isnan(value) else q for value, q in zip(p_values, adjusted)]


def stepped(p, factor, running=True, up=False, top=1.0):
    """Returns step-wise adjusted p-values with another factor(m, rank)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    scaled = [min(top, p[i] * factor(len(p), rank)) for rank, i in enumerate(order)]
    for k in range(1, len(p)):
        if running and not up:
            scaled[k] = max(scaled[k], scaled[k - 1])
        elif up:
            scaled[-k - 1] = min(scaled[-k - 1], scaled[-k])
    return [scaled[order.index(i)] for i in range(len(p))]


@exercise(18)
def test_holm_is_closed_testing():
    rng = np.random.default_rng(0)
    for m in (1, 2, 3, 5, 7):
        for power in (1, 2, 4):
            p = (rng.random(m) ** power).tolist()
            check("holm", stats.holm(p), closed_testing(p), {
                "that is Bonferroni: m is the factor of every p": stepped(p, lambda m, k: m),
                "an adjusted p may be below that of a smaller p": stepped(
                    p, lambda m, k: m - k, running=False),
                "the factors are off by one": stepped(p, lambda m, k: m - k - 1),
                "the factors are off by one, the other way": stepped(p, lambda m, k: m - k + 1),
                "the largest p has the largest factor": stepped(p, lambda m, k: k + 1),
                "that is Hochberg, which needs independence": stepped(
                    p, lambda m, k: m - k, up=True),
                "that is Benjamini and Hochberg, which bounds another error": stepped(
                    p, lambda m, k: m / (k + 1), up=True),
                "an adjusted p is above 1": stepped(p, lambda m, k: m - k, top=math.inf),
                "the results are in the order of the p-values, not of the input":
                    sorted(closed_testing(p))}, "not Holm's step-down adjustment", 1e-9)


@exercise(18)
def test_holm_counts_what_could_not_be_judged():
    got = plain(stats.holm([math.nan, 0.02, 0.01, math.nan]))
    assert same(got.isnan(), [True, False, False, True]), \
        "holm: nan must stay nan, at its place"
    assert not near(got[1:3], [0.02, 0.02]), "holm: a nan must count in m"
    assert near(got[1:3], [0.06, 0.04]), "holm: with nans the others are wrong"
    p = [0.03, 0.01]
    stats.holm(p)
    assert p == [0.03, 0.01], "holm: it changes its argument"
    assert near(stats.holm([0.02, 0.02, 0.02]), [0.06, 0.06, 0.06]), "holm: equal p-values"


# --- 19: the two-way bootstrap --------------------------------------------------------------------

def exact_interval(values, level, middle=np.mean):
    """Returns the exact percentiles of the mean of n seeds drawn with replacement, by enumeration,
    over all columns of values (n, R)."""
    n = len(values)
    means = [middle(values[list(drawn)], 0) for drawn in itertools.product(range(n), repeat=n)]
    return np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])


@exercise(19)
def test_the_interval_covers_seeds_and_examples():
    rng = np.random.default_rng(0)
    R, effects = 8000, np.array([0.0, 0.2, 0.7])
    noise = rng.normal(0, 0.2, (1, R)) + rng.normal(0, 0.02, (3, R))
    b = rng.normal(0.6, 0.3, (3, R))
    a = b + effects[:, None] + noise
    for level in (0.95, 0.6):
        expected = exact_interval(a - b, level)
        seeds_only = exact_interval((a - b).mean(1, keepdims=True), level)
        tails = [(1 - level) / 2, (1 + level) / 2]
        examples_only = np.quantile((a - b).mean(0), tails)
        mean = (a - b).mean()
        mistakes = {"only the seeds are drawn: examples vary too": seeds_only,
                    "only the examples vary: each column must draw its n seeds": examples_only,
                    "the difference is b − a": -expected[::-1],
                    "each tail has 1 − level, not half of it": exact_interval(a - b, 2 * level - 1),
                    "the median of the n seeds, not their mean":
                        exact_interval(a - b, level, np.median),
                    "single seeds, not means of n": np.quantile(a - b, tails)}
        got = plain(stats.multi_bootstrap(a, b, level=level, seed=3))
        assert got.shape == (2,) and got[0] < mean < got[1], \
            f"bootstrap: ({got[0]:.3f}, {got[1]:.3f}) is no interval around the mean {mean:.3f}"
        check("bootstrap", got, expected, mistakes,
              "not the percentiles of the means over n seeds, drawn anew for each column, the same "
              "seeds on both sides", 0.03)


@exercise(19)
def test_seeds_are_drawn_in_pairs():
    lucky = np.array([[0.2], [0.5], [0.8]]) + np.zeros((3, 500))
    got = stats.multi_bootstrap(lucky + 0.1, lucky)
    assert near(got, [0.1, 0.1], 1e-9), \
        "bootstrap: seeds are drawn for each side by itself: what " \
        "a seed gives to both must cancel"
    low, high = stats.multi_bootstrap(lucky[:2] * lucky[:2], 0 * lucky[:2])
    assert near([low, high], [0.04, 0.25], 1e-9), "bootstrap: two seeds must have an interval"
    rng = np.random.default_rng(1)
    a = rng.normal(size=(4, 300))
    first, again, other = (stats.multi_bootstrap(a, 0 * a, seed=seed) for seed in (1, 1, 2))
    assert same(first, again), "bootstrap: the same seed gives another interval"
    assert not same(first, other), "bootstrap: the argument seed is ignored"
    spread = a[:, :1] * np.ones((1, 300))  # the columns are equal: what varies are the drawn seeds
    low, high = stats.multi_bootstrap(spread, 0 * spread)
    assert high - low > 0.3, "bootstrap: all columns draw the same seeds"


@exercise(19)
def test_columns_are_resampled_together():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 40)

    def accuracy(predictions, labels):
        return (predictions == labels).mean()

    got = stats.resampled_scores(accuracy, labels, labels, resamples=300, seed=0)
    assert near(got, np.ones(300)), \
        "bootstrap: predictions and labels are not drawn together, example by example"
    sizes = stats.resampled_scores(lambda x, y: len(x) + len(y), labels, labels, resamples=5,
                                   seed=0)
    assert near(sizes, np.full(5, 80.0)), \
        "bootstrap: a sample has not as many examples as there are"
    wrong = labels.copy()
    wrong[:8] = 1 - wrong[:8]
    got = plain(stats.resampled_scores(accuracy, wrong, labels, resamples=4000, seed=0)).numpy()
    assert abs(got.std() - math.sqrt(0.8 * 0.2 / 40)) < 0.005, \
        f"bootstrap: of 40 examples with 80% right the accuracy's sd is 0.063, not {got.std():.3f}"
    assert abs(got.mean() - 0.8) < 0.005, "bootstrap: not all examples are equally likely"
    other = stats.resampled_scores(accuracy, wrong, labels, resamples=4000, seed=1)
    assert not near(other, got), "bootstrap: the argument seed is ignored"
    paired = stats.resampled_scores(lambda x: x.sum(), wrong, resamples=300, seed=1)
    first = stats.resampled_scores(lambda x, y: x.sum(), wrong, labels, resamples=300, seed=1)
    assert near(paired, first), "bootstrap: the same seed does not draw the same examples"
    rows_of_three = stats.resampled_scores(lambda x: x.sum(), np.eye(3), resamples=50, seed=0)
    assert near(rows_of_three, np.full(50, 3.0)), "bootstrap: rows of a table are not kept whole"


# --- 20: Typhoon from the task's labels -----------------------------------------------------------

def task_by_hand(strategy, batch, labels, over=None, unseen=None, lost=()):
    """Returns (the sums that the average must get, the gradients of the head), with a mistake if
    wanted: other labels, a sum in place of the mean, inputs that are lost."""
    probe, mlm = strategy.probe, strategy.context.model
    weight = mlm.bert.embeddings.word_embeddings.weight
    one_hot = F.one_hot(batch.input_ids, 40).float().requires_grad_()
    options = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids}
    hidden = mlm.bert(inputs_embeds=one_hot @ weight, **options | dict.fromkeys(lost))
    logits = probe.classifier(probe.bert.pooler(hidden[:, 0]).tanh())
    if labels.is_floating_point():
        losses = (logits[:, 0] - labels) ** 2
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    gradient, *head = torch.autograd.grad(losses.sum() / (over or len(labels)),
                                          [one_hot, *strategy.head])
    dot = gradient.gather(2, batch.input_ids[..., None])[..., 0]
    typhoon = masking.Typhoon(torch.ones(40), 0.3)
    typhoon.accumulate(batch.input_ids, dot, batch.maskable, unseen)
    return typhoon.totals[0], torch.cat([part.flatten() for part in head])


@exercise(20)
def test_the_saliency_is_that_of_the_task_loss():
    for given in ([0, 2, 1, 0], [0.5, 4.0, 2.5, 1.0]):
        strategy, batch = small_task(given)
        batch.index = torch.tensor([2, 0, 1, 3])  # the batch holds the texts in another order
        labels, steps = strategy.labels[batch.index], []
        strategy.end_step()
        step = strategy.head_optimizer.step

        def spy():
            steps.append(torch.cat([p.grad.flatten() for p in strategy.head]).clone())
            return step()

        strategy.head_optimizer.step = spy
        for turn in range(2):  # what the first call leaves behind shows in the second
            def sums(labels=labels, **options):
                return task_by_hand(strategy, batch, labels, **options)[0]

            expected, head = task_by_hand(strategy, batch, labels)
            mistakes = {
                "labels are taken in the order of the batch, not by batch.index":
                    sums(strategy.labels),
                "the loss is a sum over the texts, not their mean": sums(over=1),
                "the model saw every token: unseen must be None": sums(unseen=batch.maskable),
                "attention_mask is not passed on": sums(lost=["attention_mask"]),
                "token_type_ids are not passed on": sums(lost=["token_type_ids"])}
            strategy.typhoon.totals.zero_()
            strategy.learn_from_labels(batch)
            check("task", strategy.typhoon.totals[0], expected, mistakes,
                  "the average does not get the gradient of task_loss at the text's own tokens",
                  1e-5)
            assert len(steps) == turn + 1, "task: head_optimizer does not take one step a call"
            assert all(m.training for m in strategy.context.model.modules()), \
                "task: the encoder, which the masked LM shares, is left in evaluation mode"
            assert near(steps[-1], head, 1e-4), "task: the head's step does not follow the " \
                "gradient of this batch's loss: is an earlier one left?"
