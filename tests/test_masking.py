"""What is true of each strategy."""
import argparse
import math
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import masking
import numpy as np
import pytest
import torch
from masking import (STRATEGIES, Batch, Context, Strategy, Typhoon, budget, corrupt,
                     embedding_saliency, entropy_mask, evaluating, find_strategy, masked_entropy,
                     position_entropy, random_mask, strategy_label, token_entropy, top_k,
                     whole_word_mask)
from model import BertConfig, BertForMaskedLM, query_positions
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch.nn import functional as F
from train import Recipe, Texts, Trainer, Vocab, train_tokenizer

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "tests" / "data" / "reference" / "bert-mlm"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*lengths, width=None):
    """maskable (B, L): the first n of every row."""
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


def batch_of(ids, special=(0,)):
    return Batch(ids, ~torch.isin(ids, torch.tensor([*special])), torch.arange(len(ids)))


@contextmanager
def texts_read(model):
    """The list of the input_ids (B, L) that the model reads meanwhile, one for each pass."""
    passes = []
    words = model.bert.embeddings.word_embeddings
    hook = words.register_forward_hook(lambda module, inputs, output: passes.append(inputs[0]))
    yield passes
    hook.remove()


# --- the budget -----------------------------------------------------------------------------------

def test_budget_by_hand():
    """A whole number of expected tokens leaves nothing to chance; an empty row gets none."""
    for seed in range(20):
        assert budget(rows(0, 10, 20, 5), 0.4, generator(seed)).tolist() == [0, 4, 8, 2]


def test_budget_is_rounded_up_or_down_so_that_its_mean_is_the_rate():
    """Rows of 1, 3, 10 and 126 tokens at 15%: 0.15, 0.45, 1.5 and 18.9 tokens, no floor of one."""
    k = budget(rows(1, 3, 10, 126).repeat(20_000, 1), 0.15, generator()).view(-1, 4).float()
    assert [sorted(set(column.tolist())) for column in k.T] == [[0, 1], [0, 1], [1, 2], [18, 19]]
    expected = torch.tensor([0.15, 0.45, 1.5, 18.9])
    fraction = expected - expected.floor()
    assert ((k.mean(0) - expected).abs() < 4 * (fraction * (1 - fraction) / 20_000).sqrt()).all()


def test_budget_follows_its_generator_alone():
    maskable, state = rows(*range(50)), torch.get_rng_state()
    first, again, other = (budget(maskable, 0.15, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_top_k_is_numpys_sort():
    scores = torch.rand(50, 20, generator=generator())
    scores[:, ::4] = -math.inf  # the last to be taken, but before what is not maskable
    maskable = torch.rand(50, 20, generator=generator(1)) < 0.7
    k = torch.randint(0, 25, (50,), generator=generator(2))
    got = top_k(scores, maskable, k)
    for row in range(50):
        where = np.flatnonzero(maskable[row])
        best = where[np.argsort(-scores[row].numpy()[where], kind="stable")][:k[row]]
        assert sorted(best) == np.flatnonzero(got[row]).tolist()


def test_top_k_takes_equal_scores_from_the_left():
    scores = torch.tensor([1.0, 2.0] * 50).expand(3, 100)
    got = top_k(scores, torch.ones(3, 100, dtype=torch.bool), torch.tensor([0, 7, 60]))
    assert got[1].nonzero()[:, 0].tolist() == [1, 3, 5, 7, 9, 11, 13] and not got[0].any()
    assert got[2].nonzero()[:, 0].tolist() == [*range(20), *range(21, 100, 2)]


# --- random and whole-word ------------------------------------------------------------------------

def test_random_masks_exactly_k_and_every_position_alike():
    maskable = rows(20, 7, 0).repeat(4000, 1)
    mask = random_mask(maskable, 0.15, generator())
    k = mask.sum(1).view(-1, 3)
    assert (k[:, 0] == 3).all() and (k[:, 1] // 2 <= 1).all() and (k[:, 2] == 0).all()
    assert k[:, 1].float().mean().item() == pytest.approx(1.05, abs=0.02)
    assert not (mask & ~maskable).any()
    share = mask[0::3].float().mean(0)  # 4,000 draws of 3 from 20
    assert (share - 3 / 20).abs().max() < 4 * math.sqrt(0.15 * 0.85 / 4000)


def test_random_follows_its_generator_alone():
    maskable, state = rows(50).repeat(3, 1), torch.get_rng_state()
    first, again, other = (random_mask(maskable, 0.15, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def words_of(row, maskable, continuation):
    """A row's words as lists of positions, by the definition, one token at a time."""
    words = []
    for i in range(len(row)):
        if maskable[i]:
            joins = continuation[i] and i > 0 and maskable[i - 1]
            words[-1].append(i) if joins else words.append([i])
    return words


def test_no_word_is_ever_split(english):
    _, texts = english
    batch = texts.batch(torch.arange(200))
    continuation = texts.vocab.continuation[batch.input_ids]
    mask = whole_word_mask(batch.maskable, continuation, 0.15, generator())
    for row in range(200):
        words = words_of(batch.input_ids[row], batch.maskable[row], continuation[row])
        whole = [all(mask[row, i] for i in word) for word in words]
        assert whole == [any(mask[row, i] for i in word) for word in words]
        assert abs(sum(whole) - 0.15 * len(words)) < 1


def test_words_of_every_length_are_equally_likely_and_the_share_is_the_rate(english):
    """To 3% and 1%: 60,000 draws and more of every kind of word, over real text."""
    _, texts = english
    batch = texts.batch(torch.arange(400))
    continuation = texts.vocab.continuation[batch.input_ids]
    draws, g = torch.zeros(batch.maskable.shape), generator()
    for _ in range(300):
        draws += whole_word_mask(batch.maskable, continuation, 0.15, g)
    chosen, there = Counter(), Counter()
    for row in range(400):
        for word in words_of(batch.input_ids[row], batch.maskable[row], continuation[row]):
            chosen[min(len(word), 3)] += draws[row, word[0]].item()
            there[min(len(word), 3)] += 300
    share = {length: chosen[length] / there[length] for length in there}
    assert set(share) == {1, 2, 3} and min(there.values()) > 60_000
    for length in share:
        assert share[length] == pytest.approx(share[1], rel=0.03), share
    assert draws[batch.maskable].mean().item() / 300 == pytest.approx(0.15, rel=0.01)


def test_a_piece_that_follows_a_special_token_begins_a_word():
    maskable = torch.tensor([[False, True, True, False, True, True]])
    continuation = torch.tensor([[False, True, True, False, True, False]])
    seen = set()
    for seed in range(50):
        mask = whole_word_mask(maskable, continuation, 1 / 3, generator(seed))  # one of three words
        seen.add("".join("01"[masked] for masked in mask[0]))
    assert seen == {"011000", "000010", "000001"}


# --- entropy --------------------------------------------------------------------------------------

def test_entropy_is_torch_distributions_entropy():
    logits = torch.randn(40, 5, 300, generator=generator()) * 4
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(token_entropy(logits), expected, atol=1e-5, rtol=1e-5)


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0],
                           [math.log(3), 0.0, -math.inf, -math.inf]])
    expected = [math.log(4), 0.0, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    assert token_entropy(logits).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("select, sign", [("high", 1), ("low", -1)])
def test_high_and_low_take_the_extremes_and_nothing_special(select, sign):
    entropy = torch.rand(30, 40, generator=generator())
    maskable = torch.rand(30, 40, generator=generator(1)) < 0.6
    entropy[~maskable] = 9.0 * sign  # tempting
    mask = entropy_mask(entropy, maskable, 0.2, select, generator())
    assert ((mask.sum(1) - 0.2 * maskable.sum(1)).abs() < 1).all() and not (mask & ~maskable).any()
    for row in range(30):
        chosen, rest = entropy[row, mask[row]], entropy[row, maskable[row] & ~mask[row]]
        assert (chosen * sign).min() > (rest * sign).max()


def test_middle_takes_the_nearest_to_the_median_by_hand():
    """Of 1, 2.5, 3, 4, 9 the median is 3; of 1, 2, 7.5, 8 it is 4.75, the middle of 2 and 7.5."""
    entropy = torch.tensor([[9.0, 1.0, 3.0, 2.5, 4.0], [8.0, 2.0, 4.0, 1.0, 7.5]])
    maskable = torch.tensor([[True] * 5, [True, True, False, True, True]])
    first = entropy_mask(entropy[:1], maskable[:1], 0.6, "middle")
    second = entropy_mask(entropy[1:], maskable[1:], 0.5, "middle")
    assert torch.cat([first, second]).int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 1]]


def test_middle_is_numpys_median():
    """Rows of all lengths, the empty one included; a table in half precision."""
    entropy = (torch.rand(60, 30, generator=generator()) * 5).half()
    maskable = torch.rand(60, 30, generator=generator(1)) < torch.linspace(0, 1, 60)[:, None]
    mask = entropy_mask(entropy, maskable, 0.3, "middle", generator())
    assert ((mask.sum(1) - 0.3 * maskable.sum(1)).abs() < 1).all() and not (mask & ~maskable).any()
    for row in range(60):
        known = entropy[row].float().numpy()
        far = np.abs(known - np.median(known[maskable[row]])) if maskable[row].any() else known
        rest = far[maskable[row] & ~mask[row]]
        assert far[mask[row]].max(initial=0) <= rest.min(initial=np.inf) + 1e-6


def test_mixed_is_half_the_highest_and_half_anyone():
    entropy, maskable = torch.arange(40.0).expand(2000, 40), rows(40).repeat(2000, 1)
    mask = entropy_mask(entropy, maskable, 0.2, "mixed", generator())  # k = 8
    assert (mask.sum(1) == 8).all() and mask[:, 36:].all()
    rest = mask[:, :36].float().mean(0)  # 4 of the other 36
    assert (rest - 4 / 36).abs().max() < 4.5 * math.sqrt(4 / 36 * 32 / 36 / 2000)


def test_mixed_halves_an_odd_budget_without_a_bias():
    """k = 1 of 10 tokens: the highest one in half of the rows, else any, the highest included."""
    mask = entropy_mask(torch.arange(10.0).expand(8000, 10), rows(10).repeat(8000, 1), 0.1, "mixed",
                        generator())
    assert (mask.sum(1) == 1).all()
    share, expected = mask.float().mean(0), torch.tensor([0.05] * 9 + [0.55])
    assert ((share - expected).abs() < 4.5 * (expected * (1 - expected) / 8000).sqrt()).all()


H = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.0])  # the entropies of five tokens


def test_sample_draws_in_proportion_to_entropy():
    """With k = 1 the chance of a position is H_i / Σ H."""
    mask = entropy_mask(H.expand(20_000, 5), rows(5).repeat(20_000, 1), 0.2, "sample", generator())
    assert (mask.sum(1) == 1).all()
    share, expected = mask.float().mean(0), H / H.sum()
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_sample_draws_one_after_another_without_replacement():
    """With k = 2 a pair has the chance p_i p_j / (1 − p_i) + p_j p_i / (1 − p_j)."""
    p = (H / H.sum()).tolist()
    mask = entropy_mask(H.expand(40_000, 5), rows(5).repeat(40_000, 1), 0.4, "sample", generator())
    drawn = Counter(tuple(row.nonzero()[:, 0].tolist()) for row in mask)
    assert all(len(pair) == 2 for pair in drawn)
    for i in range(5):
        for j in range(i + 1, 5):
            expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
            noise = math.sqrt(expected * (1 - expected) / 40_000)
            assert drawn[i, j] / 40_000 == pytest.approx(expected, abs=4 * noise + 1e-9), (i, j)


def test_sample_keeps_the_budget_where_entropies_are_zero():
    mask = entropy_mask(torch.zeros(3, 10), rows(10, 4, 0, width=10), 0.5, "sample", generator())
    assert mask.sum(1).tolist() == [5, 2, 0]


def test_an_unknown_select_is_named():
    with pytest.raises(ValueError, match="'highest'"):
        entropy_mask(torch.zeros(1, 4), rows(4), 0.5, "highest")


def test_evaluating_puts_modes_back_after_an_error(model):
    model.train()
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()


def test_entropy_of_visible_positions_is_the_direct_computation_in_chunks(model):
    batch = batch_of(torch.randint(0, 60, (5, 17), generator=generator()))
    with torch.no_grad():
        direct = torch.distributions.Categorical(logits=model.eval()(batch.input_ids)).entropy()
    for rows_at_a_time in (0, 1, 7, 512):  # 60 logits of 4 bytes in a row
        got = position_entropy(model, batch, batch.input_ids, batch.maskable, rows_at_a_time * 240)
        torch.testing.assert_close(got, direct * batch.maskable, atol=1e-5, rtol=1e-5)


def test_masked_entropy_hides_every_position_once(model):
    """Each position's entropy is what a pass with it masked gives; the passes partition the row."""
    batch = batch_of(torch.randint(5, 60, (3, 40), generator=generator()), special=range(5, 25))
    with texts_read(model.eval()) as passes:
        got = masked_entropy(model, batch, 0.3, mask_token_id=4, generator=generator())
    hidden = [input_ids == 4 for input_ids in passes]
    assert len(passes) == math.ceil(1 / 0.3)
    assert torch.equal(sum(mask.int() for mask in hidden), batch.maskable.int())
    for input_ids, mask in zip(passes, hidden):
        assert torch.equal(input_ids[~mask], batch.input_ids[~mask])
        with torch.no_grad():
            direct = torch.distributions.Categorical(logits=model(input_ids)).entropy()
        torch.testing.assert_close(got[mask], direct[mask], atol=1e-5, rtol=1e-5)
    assert not got[~batch.maskable].any()
    sizes = torch.stack(hidden).sum(2)  # (passes, rows)
    assert (sizes.amax(0) - sizes.amin(0)).max() <= 1


def test_masked_entropy_deals_new_groups_each_time_from_its_generator_alone(model):
    """Which tokens are hidden together changes from call to call, and with the seed alone."""
    batch = batch_of(torch.randint(5, 60, (2, 20), generator=generator()))
    state = torch.get_rng_state()

    def groups(g):
        with texts_read(model) as passes:
            masked_entropy(model, batch, 0.25, 4, g)
        return torch.stack(passes) == 4

    g = generator()
    first, second = groups(g), groups(g)
    assert torch.equal(first, groups(generator())) and not torch.equal(first, second)
    assert not torch.equal(first[:, 0], first[:, 1])  # rows are dealt apart from each other
    assert torch.equal(state, torch.get_rng_state())


# --- Typhoon --------------------------------------------------------------------------------------

def test_saliency_is_the_gradient_with_respect_to_an_explicit_one_hot(model):
    """Autograd through onehot @ W, in float64, at every visible and every masked token."""
    model.double()
    weight = model.bert.embeddings.word_embeddings.weight
    ids = torch.randint(5, 60, (4, 12), generator=generator())
    mask = random_mask(torch.ones(4, 12, dtype=torch.bool), 0.3, generator())
    corrupted, labels = corrupt(ids, mask, 4, 60, (1, 0, 0))
    one_hot = F.one_hot(corrupted, 60).double().requires_grad_()
    F.cross_entropy(model(inputs_embeds=one_hot @ weight)[mask], labels[mask]).backward()
    expected = one_hot.grad.gather(2, ids[..., None])[..., 0]  # the original token's entry

    words = model.bert.embeddings.word_embeddings(corrupted)
    words.retain_grad()
    logits = model(inputs_embeds=words, positions=query_positions(mask))
    F.cross_entropy(logits, labels[mask]).backward()
    got = embedding_saliency(words.grad, weight, ids)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-6


def test_saliency_is_detached_and_computed_in_float32():
    """In bf16 the products of 300 terms would lose most digits; the weight must get no gradient."""
    g = generator()
    gradient = torch.randn(4, 300, generator=g).bfloat16()[None]
    weight = torch.nn.Parameter(torch.randn(9, 300, generator=g).bfloat16())
    ids = torch.tensor([[1, 5, 8, 1]])
    got = embedding_saliency(gradient, weight, ids)
    exact = (gradient.double() * weight[ids].double()).sum(-1)
    assert got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got.double(), exact.detach(), rtol=1e-5, atol=1e-5)


def update(typhoon: Typhoon, *batch):
    """A step of one batch."""
    typhoon.accumulate(*batch)
    typhoon.step()


def test_two_updates_by_hand():
    """Types 1, 2, 3 of five. First batch: type 1 visible with dots 0.25 and 0.75, type 2 visible
    with 0.5 and masked with −0.25. s_1 = −0.5; s_2 = −0.5 − 0.25 = −0.75. Second: type 1 masked
    with 1.0, type 3 visible with −2. w_1 = 0.25·(−0.5) + 0.75·1."""
    typhoon = Typhoon(torch.tensor([0, 2, 1, 1, 0]), rate=0.25, spread=0.5, ema_weight=0.75)
    every = torch.ones(1, 4, dtype=torch.bool)
    update(typhoon, torch.tensor([[1, 1, 2, 2]]), torch.tensor([[0.25, 0.75, 0.5, -0.25]]), every,
           torch.tensor([[False, False, False, True]]))
    assert typhoon.weight.tolist() == [0, -0.5, -0.75, 0, 0]
    assert typhoon.seen.tolist() == [0, 1, 1, 0, 0]
    # ŵ = 1 for type 1, 0 for type 2, 1 unseen; u = 1, .5, 1; f = .5, .25, .25; Σ f u = .875
    expected = [0.25 / 0.875 * u for u in (1, 1, 0.5, 1, 1)]
    assert typhoon.rates().tolist() == pytest.approx(expected, rel=1e-12)
    update(typhoon, torch.tensor([[1, 3, 0, 0]]), torch.tensor([[1.0, -2.0, 9.0, 9.0]]),
           torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, False, False]]))
    assert typhoon.weight.tolist() == [0, 0.25 * -0.5 + 0.75 * 1, -0.75, 2.0, 0]
    # ŵ = (0.625 + 0.75) / 2.75 = 0.5 for type 1, 0 and 1: u = .75, .5, 1; Σ f u = .75
    expected = [0.25 / 0.75 * u for u in (1, 0.75, 0.5, 1, 1)]
    assert typhoon.rates().tolist() == pytest.approx(expected, rel=1e-12)


def test_accumulated_micro_batches_are_one_batch():
    g = generator()
    ids, dot = torch.randint(0, 9, (8, 11), generator=g), torch.randn(8, 11, generator=g)
    maskable, masked = torch.rand(8, 11, generator=g) < 0.8, torch.rand(8, 11, generator=g) < 0.3
    masked &= maskable
    whole, parts = (Typhoon(torch.ones(9), 0.3) for _ in range(2))
    update(whole, ids, dot, maskable, masked)
    for piece in torch.arange(8).split(3):
        parts.accumulate(ids[piece], dot[piece], maskable[piece], masked[piece])
    parts.step()
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-12, atol=1e-12)


def test_typhoons_defaults_are_those_of_the_papers_code():
    typhoon = Typhoon(torch.tensor([1, 1]), 0.3)
    update(typhoon, torch.tensor([[0, 1]]), torch.tensor([[0.0, 1.0]]), rows(2))
    update(typhoon, torch.tensor([[0, 1]]), torch.tensor([[0.0, 2.0]]), rows(2))
    assert typhoon.weight.tolist() == pytest.approx([0.0, -(0.2 * 1 + 0.8 * 2)])
    low, high = sorted(typhoon.rates().tolist())
    assert low / high == pytest.approx(1 - 0.4)


def test_before_any_update_every_type_has_the_rate():
    assert Typhoon(torch.tensor([3, 4, 5]), 0.3).rates().tolist() == pytest.approx([0.3] * 3)


def test_one_type_seen_has_the_rate_of_the_unseen():
    """Its highest and lowest average are the same, so that nothing can be scaled; no 0 / 0."""
    typhoon = Typhoon(torch.tensor([3, 4, 5]), 0.3)
    update(typhoon, torch.tensor([[1]]), torch.tensor([[2.0]]), torch.tensor([[True]]))
    assert typhoon.seen.tolist() == [False, True, False]
    assert typhoon.rates().tolist() == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3, 0.7, 0.8, 0.9, 0.99])
def test_the_expected_rate_is_the_budget_also_where_the_cap_binds(rate):
    g = generator(1)
    counts = (torch.rand(500, generator=g) ** 8 * 1000).long()
    typhoon = Typhoon(counts, rate, spread=0.6)
    typhoon.weight = torch.randn(500, generator=g).double()
    typhoon.seen = torch.rand(500, generator=g) < 0.9
    rates = typhoon.rates()
    assert (rates * counts / counts.sum()).sum().item() == pytest.approx(rate, abs=1e-9)
    assert rates.min() >= 0 and rates.max() <= 1
    assert (rates.max() == 1) == (rate >= 0.8)  # this test sees both sides of the cap
    free = rates < 1  # below the cap the shape is untouched: rates are proportional to 1 − σ + σ ŵ
    low, high = typhoon.weight[typhoon.seen].min(), typhoon.weight[typhoon.seen].max()
    u = torch.where(typhoon.seen, 0.4 + 0.6 * (typhoon.weight - low) / (high - low), 1)
    ratio = rates[free] / u[free]
    assert (ratio.max() - ratio.min()) / ratio.max() < 1e-9


def test_typhoon_masks_at_its_rates():
    typhoon = Typhoon(torch.tensor([1, 1, 2]), 0.3)
    typhoon.weight = torch.tensor([0.0, 1.0, 0.5]).double()
    typhoon.seen = torch.ones(3, dtype=torch.bool)
    ids = torch.arange(3).repeat(20_000, 1)
    strategy = STRATEGIES["typhoon"](Context(0.3, None, torch.tensor([1, 1, 2]), None, 4))
    strategy.typhoon = typhoon
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(20_000), None, None)
    share = strategy.mask(batch, generator()).float().mean(0)
    assert ((share - typhoon.rates()).abs() < 4 * (0.21 / 20_000) ** 0.5).all()


# --- corruption -----------------------------------------------------------------------------------

def test_the_split_is_80_10_10_and_nothing_special_appears():
    ids = torch.randint(5, 40, (400, 100), generator=generator())
    mask = random_mask(torch.ones_like(ids, dtype=torch.bool), 0.5, generator())
    special = (0, 1, 2, 3, 4, 17)
    ids[ids == 17] = 18
    got, labels = corrupt(ids, mask, 4, 40, generator=generator(1), special_ids=special)
    n = mask.sum().item()
    masked, kept = (got[mask] == 4).sum().item(), (got[mask] == ids[mask]).sum().item()
    assert masked / n == pytest.approx(0.8, abs=4 * (0.16 / n) ** 0.5)
    kept_or_hit = 0.1 + 0.1 / 34  # a swap may draw the token itself
    assert kept / n == pytest.approx(kept_or_hit, abs=4 * (0.09 / n) ** 0.5)
    assert torch.equal(got[~mask], ids[~mask])
    assert torch.equal(labels[mask], ids[mask]) and (labels[~mask] == -100).all()
    swapped = got[mask & (got != 4) & (got != ids)]
    assert set(swapped.tolist()) == set(range(40)) - set(special)  # every ordinary word, no other


def test_corruption_follows_its_generator_alone():
    ids, mask = torch.arange(5, 45).repeat(20, 1), torch.ones(20, 40, dtype=torch.bool)
    state = torch.get_rng_state()
    for split in ((0.5, 0.0, 0.5), (0.0, 1.0, 0.0)):  # the dice, and the random words
        first, again, other = (corrupt(ids, mask, 4, 60, split, generator(seed))[0]
                               for seed in (5, 5, 6))
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_pure_mask_masks_everything():
    ids, mask = torch.arange(10, 20)[None], rows(4, width=10)
    got, _ = corrupt(ids, mask, 4, 40, (1, 0, 0))
    assert got.tolist() == [[4, 4, 4, 4, 14, 15, 16, 17, 18, 19]]
    assert torch.equal(corrupt(ids, mask, 4, 40, (0, 0, 1))[0], ids)


# --- the strategies as the training loop sees them ------------------------------------------------

def context(model, texts, rate=0.15, **options):
    table = torch.rand(texts.input_ids.shape, generator=generator()) * 5
    return Context(rate, model, texts.token_counts(), texts.vocab.continuation, texts.vocab.mask_id,
                   table, **options)


def small_model(vocab_size, positions):
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=positions))


@pytest.fixture
def english_model():
    return small_model(2000, 64)


WAYS = [("random", None), ("whole-word", None), ("typhoon", None),
        *((name, select) for name in ("entropy", "self-entropy", "rarity")
          for select in ("high", "middle", "low", "mixed", "sample"))]


def masked_share(name, select, model, texts, rate, passes=1, **options):
    """The share of maskable tokens that a strategy masks, over a corpus; nothing else is masked."""
    strategy = STRATEGIES[name](context(model, texts, rate, entropy_select=select, **options))
    if name == "typhoon":  # as in the middle of a run: rates that differ, a few types not seen
        strategy.typhoon.weight.copy_(torch.randn(texts.vocab.size, generator=generator(3)))
        strategy.typhoon.seen |= torch.rand(texts.vocab.size, generator=generator(4)) < 0.9
    masked, maskable, g = 0, 0, generator()
    for index in [*torch.arange(len(texts)).split(256)] * passes:
        batch = texts.batch(index)
        mask = strategy.mask(batch, g)
        assert mask.shape == batch.maskable.shape and not (mask & ~batch.maskable).any()
        masked, maskable = masked + mask.sum().item(), maskable + batch.maskable.sum().item()
    return masked / maskable


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_spends_the_budget(name, english, english_model):
    """Over a corpus of windows the masked share is the rate within 1%, also above one half."""
    _, texts = english
    for rate in (0.15, 0.6):
        share = masked_share(name, None, english_model, texts, rate)
        assert share == pytest.approx(rate, rel=0.01)


@pytest.fixture(scope="module")
def short_texts():
    """12,000 rows of 0 to 8 words of one or two pieces, and [PAD] behind them."""
    g = generator()
    ids = torch.randint(5, 60, (12_000, 12), generator=g)
    length = torch.randint(0, 9, (12_000, 1), generator=g)
    column = torch.arange(12)
    ids[:, 0], ids[column > length] = 2, 0
    ids.scatter_(1, length + 1, 3)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, 40)),
              *(f"##{i}" for i in range(40, 60))]
    return Texts(ids, Vocab(tokenizer_of(pieces), 60, torch.device("cpu")))


def tokenizer_of(pieces):
    return Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))


@pytest.mark.parametrize("name, select", WAYS)
def test_short_texts_are_masked_at_the_rate(name, select, short_texts, model):
    """Rows of four words on average: a floor of one a row would mask 28% instead of 15%."""
    share = masked_share(name, select, model, short_texts, 0.15, passes=4)
    assert share == pytest.approx(0.15, rel=0.01)


def test_short_texts_are_masked_at_the_rate_by_visible_entropies(short_texts, model):
    share = masked_share("self-entropy", "high", model, short_texts, 0.15, entropy_input="visible")
    assert share == pytest.approx(0.15, rel=0.01)


@pytest.mark.parametrize("task", ["sst2", "cola", "mrpc", "rte"])
def test_real_short_texts_are_masked_at_the_rate(task, glue_dir):
    """500 texts of a GLUE task, over and over, until the draws' own noise is far below 1%."""
    from glue import load_task
    examples = load_task(task, "train", glue_dir)[:500]
    pairs = [(e.text_a, e.text_b) if e.text_b else e.text_a for e in examples]
    tokenizer = train_tokenizer([[text] for pair in pairs for text in
                                 (pair if isinstance(pair, tuple) else [pair])], 2000)
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding()
    ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(pairs)])
    texts = Texts(ids, Vocab(tokenizer, 2000, torch.device("cpu")))
    model = small_model(2000, 64)
    for name, select in WAYS:
        draws = 60_000 if name == "self-entropy" else 200_000  # the others are quick
        passes = math.ceil(draws / texts.token_counts().sum().item())
        share = masked_share(name, select, model, texts, 0.15, passes)
        assert share == pytest.approx(0.15, rel=0.01), (name, select)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_batch_in_which_nothing_is_masked_is_no_error(name, model, short_texts):
    """Single words at 1%: with this seed the budget of all of them is zero."""
    strategy = STRATEGIES[name](context(model, short_texts, 0.01))
    single = torch.where(short_texts.vocab.ordinary[short_texts.input_ids].sum(1) == 1)[0][:3]
    mask = strategy.mask(short_texts.batch(single), generator())
    assert mask.shape[0] == 3 and mask.dtype == torch.bool and not mask.any()


def test_the_registry_is_in_the_order_of_the_readme():
    assert list(STRATEGIES) == ["random", "whole-word", "entropy", "self-entropy", "typhoon",
                                "rarity"]


@pytest.mark.parametrize("name", ["entropy", "self-entropy", "rarity"])
def test_the_selection_is_the_users_or_the_strategys_own(name, short_texts, model):
    own = STRATEGIES[name](context(model, short_texts)).select
    assert own == ("high" if name == "self-entropy" else "mixed")
    assert STRATEGIES[name](context(model, short_texts, entropy_select="low")).select == "low"


@pytest.mark.parametrize("name, select", WAYS)
def test_a_strategy_leaves_the_scores_by_which_it_decided(name, select, short_texts, model):
    """With `high` the masked tokens have the highest scores, with `low` the lowest."""
    strategy = STRATEGIES[name](context(model, short_texts, 0.4, entropy_select=select))
    batch = short_texts.batch(torch.arange(200))
    mask = strategy.mask(batch, generator())
    if name in ("random", "whole-word"):
        assert strategy.scores is None
        return
    assert strategy.scores.shape == mask.shape
    for row in range(200):
        rest = batch.maskable[row] & ~mask[row] & ~strategy.scores[row].isnan()
        if strategy.select == "high" and name != "typhoon" and mask[row].any() and rest.any():
            assert strategy.scores[row, mask[row]].min() >= strategy.scores[row, rest].max()
        if strategy.select == "low" and mask[row].any() and rest.any():
            assert strategy.scores[row, mask[row]].max() <= strategy.scores[row, rest].min()


class Falling(Strategy):
    """The masking rate falls from 60 to 30% in the course of the run."""
    def mask(self, batch, generator=None):
        return random_mask(batch.maskable, 0.6 - 0.3 * self.context.progress, generator)


def test_a_rate_may_fall_in_the_course_of_the_run(model, short_texts):
    trainer = Trainer(model, short_texts, Falling(context(model, short_texts)),
                      Recipe(steps=4, batch_size=2000, lr=1e-3))
    for step, rate in enumerate((0.6, 0.525, 0.45, 0.375)):
        _, _, masked, maskable = trainer.step(step).tolist()
        assert masked / maskable == pytest.approx(rate, abs=0.015)


@pytest.mark.parametrize("entropy_input", ["visible", "masked"])
def test_self_entropy_leaves_the_model_as_it_was(model, entropy_input):
    model.train()
    model.bert.layers[0].eval()  # a mixed state, as with frozen layers
    modes = [module.training for module in model.modules()]
    model.head.bias.grad = torch.ones(60)
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    batch = batch_of(torch.randint(0, 60, (4, 20), generator=generator()))
    given = Context(0.2, model, None, None, 4, entropy_input=entropy_input)
    strategy = STRATEGIES["self-entropy"](given)
    mask = strategy.mask(batch, generator())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert [p is model.head.bias for p in model.parameters() if p.grad is not None] == [True]
    assert torch.equal(model.head.bias.grad, torch.ones(60)) and not mask.requires_grad


def test_self_entropy_takes_the_more_uncertain_half_of_twice_as_many(model):
    batch = batch_of(torch.randint(5, 60, (6, 20), generator=generator()))
    with texts_read(model) as passes:
        mask = STRATEGIES["self-entropy"](Context(0.2, model, None, None, 4)).mask(batch,
                                                                                   generator())
    ids, = passes
    candidates = ids == 4
    assert (candidates.sum(1) == 8).all() and torch.equal(ids[~candidates],
                                                          batch.input_ids[~candidates])
    with torch.no_grad():
        H = torch.distributions.Categorical(logits=model.eval()(ids)).entropy()
    for row in range(6):
        assert mask[row].sum() == 4 and not (mask & ~candidates).any()
        assert H[row, mask[row]].min() > H[row, candidates[row] & ~mask[row]].max()


def test_a_kept_token_is_visible():
    """[T]'s rule by hand: type 1 is masked with dot 1.0; type 2 is kept, so that its s is −0.5."""
    ids = torch.tensor([[1, 2, 3]])
    strategy = STRATEGIES["typhoon"](Context(0.3, WithWeight(torch.eye(4)), torch.ones(4), None, 0))
    gradient = torch.tensor([[[0, 1.0, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 0.25]]])
    mask, corrupted = torch.tensor([[True, True, False]]), torch.tensor([[0, 2, 3]])
    assert (corrupted != ids).tolist() == [[True, False, False]] != mask.tolist()
    batch = Batch(ids, torch.ones(1, 3, dtype=torch.bool), None)
    strategy.observe(batch, corrupted != ids, gradient)
    strategy.end_step()
    assert strategy.typhoon.weight.tolist() == [0, 1.0, -0.5, -0.25]


class WithWeight:
    """A model that is its word embeddings alone."""

    def __init__(self, weight):
        self.bert = self.embeddings = self.word_embeddings = self
        self.weight = weight


class Listening(STRATEGIES["typhoon"]):
    """Keeps what it chose and what it was told."""
    def mask(self, batch, generator=None):
        self.masked = super().mask(batch, generator)
        return self.masked

    def observe(self, batch, unseen, embedding_grad):
        self.unseen = unseen


def test_the_training_step_tells_typhoon_that_a_kept_token_was_visible(model, short_texts):
    """The corruption splits the mask: what became [MASK] is hidden, what stayed is not."""
    recipe = Recipe(steps=2, batch_size=64, lr=1e-3, corruption=(0.5, 0.0, 0.5))
    strategy = Listening(context(model, short_texts, 0.4))
    Trainer(model, short_texts, strategy, recipe).step(0)
    assert not (strategy.unseen & ~strategy.masked).any()
    half = 0.5 * strategy.masked.sum().item()
    assert strategy.unseen.sum().item() == pytest.approx(half, rel=0.4)


def test_rarity_by_hand():
    """−ln of the frequency; a type that never occurs is as rare as one that occurs once."""
    expected = [math.log(10 / 6), math.log(10 / 3), math.log(10), math.log(10)]
    strategy = STRATEGIES["rarity"](Context(0.3, None, torch.tensor([6, 3, 1, 0]), None, 4))
    assert strategy.rarity.tolist() == pytest.approx(expected, rel=1e-6)


def test_rarity_masks_the_rarest_or_the_commonest():
    ids = torch.arange(10)[None]
    counts = torch.tensor([5, 9, 1, 7, 3, 8, 2, 10, 6, 4])
    for select, expected in (("high", {2, 6, 4}), ("low", {7, 1, 5})):
        strategy = STRATEGIES["rarity"](Context(0.3, None, counts, None, 4, entropy_select=select))
        mask = strategy.mask(Batch(ids, torch.ones_like(ids, dtype=torch.bool), None), generator())
        assert set(mask[0].nonzero()[:, 0].tolist()) == expected


# --- a strategy by its name -----------------------------------------------------------------------

MINE = """
    from __future__ import annotations
    from dataclasses import dataclass
    from masking import Strategy, budget, top_k

    @dataclass
    class Settings:
        share: int = 1

    class Longest(Strategy):
        def mask(self, batch, generator=None):
            self.scores = batch.input_ids  # integers
            return top_k(self.scores * Settings().share, batch.maskable,
                         budget(batch.maskable, self.context.rate, generator))

    class Idle(Strategy):
        pass

    class Stranger:
        def mask(self, batch, generator=None):
            return batch.maskable

    three = 3
    """


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(MINE))
    return path


def test_a_strategy_in_a_file_masks(mine):
    ids = torch.tensor([[0, 7, 9, 8, 6]])
    found = find_strategy(f"{mine}:Longest")
    strategy = found(Context(0.5, None, None, None, 4))
    assert isinstance(strategy, Strategy) and find_strategy(f"{mine}:Longest") is found
    assert strategy.mask(batch_of(ids), generator()).tolist() == [[False, False, True, True, False]]
    assert strategy_label(f"{mine}:Longest") == "Longest" and strategy_label("random") == "random"


@pytest.mark.parametrize("name, said", [
    ("rnd", "'rnd' is unknown: choose from random, whole-word"), ("mine.py", "is unknown"),
    ("mine:Longest", "is unknown"), ("no.py:Longest", "no.py cannot be imported: FileNotFound"),
    ("mine.py:Shortest", "mine.py has no class Shortest that derives from masking.Strategy"),
    ("mine.py:", "mine.py has no class"), ("mine.py:Idle", "Idle that derives"),
    ("mine.py:Stranger", "Stranger that derives"), ("mine.py:three", "mine.py has no class three"),
    ("mine.py:Settings", "Settings that derives"),
    ("broken.py:Longest", "broken.py cannot be imported: SyntaxError"),
    ("leaves.py:Longest", "cannot be imported: SystemExit(3)")])
def test_what_is_not_a_strategy_gets_one_line(name, said, mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    Path("broken.py").write_text("class Longest(\n")
    Path("leaves.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(argparse.ArgumentTypeError) as error:
        find_strategy(name)
    assert said in str(error.value) and "\n" not in str(error.value)


# --- the demo -------------------------------------------------------------------------------------

TEXT = "w1 w2 w3 w4 w5 w6 w7 w8 w9"


def shown_cells(lines):
    """The demo's table: {strategy: [(masked, number or None) for each word]}."""
    names, table = lines[1].split(), {line.split()[0]: line for line in lines[2:13]}
    assert list(table) == ["[CLS]", *TEXT.split(), "[SEP]"]
    assert "MASK" not in table["[CLS]"] + table["[SEP]"]
    width, found = len("[CLS]") + 2, {}
    for i, name in enumerate(names):
        column = [table[word][width + 15 * i:width + 15 * (i + 1)] for word in TEXT.split()]
        numbers = [cell.replace("[MASK]", "").strip() for cell in column]
        found[name] = [("[MASK]" in cell, float(said) if said else None)
                       for cell, said in zip(column, numbers)]
    return found


def test_the_demo_shows_every_strategy_side_by_side(capsys):
    """On a recorded model."""
    masking.main([TEXT, "--model", str(REFERENCE), "--mask-rate", "0.3"])
    found = shown_cells(capsys.readouterr().out.splitlines())
    assert list(found) == list(STRATEGIES)
    for name, column in found.items():
        k = sum(masked for masked, _ in column)
        assert k in (range(10) if name == "typhoon" else (2, 3))  # 0.3 · 9 = 2.7
        numbers = [number for _, number in column if number is not None]
        known = {"random": 0, "whole-word": 0, "self-entropy": 2 * k}.get(name, 9)
        assert len(numbers) == known and all(number > 0 for number in numbers)
        if name in ("entropy", "self-entropy", "rarity"):  # the highest
            assert sorted(n for masked, n in column if masked) == sorted(numbers)[-k:]


def test_the_demos_numbers_are_those_that_decided(monkeypatch, capsys):
    """Self-entropy's come from its own pass over its candidates, not from another one."""
    decided = {}
    for name, build in STRATEGIES.items():
        class Spy(build):
            def mask(self, batch, generator=None, name=name):
                mask = super(type(self), self).mask(batch, generator)
                decided[name] = self.scores
                return mask
        monkeypatch.setitem(STRATEGIES, name, Spy)
    masking.main([TEXT, "--model", str(REFERENCE), "--mask-rate", "0.3"])
    for name, column in shown_cells(capsys.readouterr().out.splitlines()).items():
        scores = [math.nan] * 9 if decided[name] is None else decided[name][0, 1:10].tolist()
        for (_, number), score in zip(column, scores):
            assert (number is None) == math.isnan(score)
            assert number is None or number == pytest.approx(score, abs=0.006)


def test_a_strategy_in_a_file_is_a_column_of_the_demo(mine):
    """As a program of its own, where masking.py is __main__ and the file imports it again."""
    done = subprocess.run([sys.executable, ROOT / "masking.py", TEXT, "--model", REFERENCE,
                           "--mask-rate", "0.3", "--masking", f"{mine}:Longest"],
                          cwd=mine.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = shown_cells(done.stdout.splitlines())
    assert list(found) == [*STRATEGIES, "Longest"] and sum(m for m, _ in found["Longest"]) in (2, 3)


SVG = "{http://www.w3.org/2000/svg}"


def test_the_drawing_is_xml_that_shows_what_the_terminal_shows(tmp_path, capsys):
    path = tmp_path / "picture.svg"
    masking.main([TEXT, "--model", str(REFERENCE), "--mask-rate", "0.3", "--svg", str(path)])
    said = capsys.readouterr().out
    found, text = shown_cells(said.splitlines()), path.read_text(encoding="utf-8")
    root = ET.fromstring(text)
    cells = [box for box in root.iter(SVG + "rect") if "heat" in box.get("class")]
    everything = [cell for column in found.values() for cell in column]
    framed = sum("masked" in box.get("class") for box in cells)
    coloured = sum(float(box.get("fill-opacity")) > 0 for box in cells)
    assert framed == sum(masked for masked, _ in everything) > 0
    assert coloured == sum(number is not None for _, number in everything) > 0
    drawn = [element.text for element in root.iter(SVG + "text")]
    assert drawn == said.splitlines()[1:13]
    assert "prefers-color-scheme: dark" in text
    assert not any(word in text for word in ("<script", "@import", "url(", "href"))


def test_a_colour_is_the_place_of_a_score_between_the_lowest_and_the_highest_of_its_column():
    """2 of 1 to 5 is a quarter of the way from 0.08 to 0.80; none where there is no score."""
    column = [(True, 2.0), (False, 1.0), (False, math.nan), (True, 5.0)]
    root = ET.fromstring(masking.demo_svg(["a", "b", "c", "d"], {"one": column}))
    boxes = [box for box in root.iter(SVG + "rect") if "heat" in box.get("class")]
    assert [box.get("fill-opacity") for box in boxes] == ["0.26", "0.08", "0.00", "0.80"]
    assert ["masked" in box.get("class") for box in boxes] == [True, False, False, True]


def test_the_drawing_escapes_what_it_shows():
    pieces, name = ["<b>", "&amp;", '"', "]]>"], "<i>"
    root = ET.fromstring(masking.demo_svg(pieces, {name: [(True, 1.0)] * 4}))
    said = [element.text.split() for element in root.iter(SVG + "text")]
    assert said == [[name], *([piece, "[MASK]", "1.00"] for piece in pieces)]
    boxes = [box for box in root.iter(SVG + "rect") if "heat" in box.get("class")]
    assert {box.get("fill-opacity") for box in boxes} == {"0.08"}  # all are equal: the lowest


# --- on a GPU -------------------------------------------------------------------------------------

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_on_cuda_and_follows_its_generator(name, model):
    device, ids = torch.device("cuda"), torch.randint(5, 60, (8, 20), generator=generator())
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, 60))]
    texts = Texts(ids.to(device), Vocab(tokenizer_of(pieces), 60, device))
    table = torch.rand(8, 20, device=device)
    strategy = STRATEGIES[name](Context(0.2, model.to(device), texts.token_counts(),
                                        texts.vocab.continuation, 4, table))
    batch = texts.batch(torch.arange(8))
    first, second = (strategy.mask(batch, torch.Generator(device).manual_seed(1)) for _ in range(2))
    assert first.device.type == "cuda" and torch.equal(first, second) and first.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_generator_on_the_cpu_draws_the_same_on_cuda(model):
    ids = torch.randint(5, 60, (8, 20), generator=generator())
    maskable = torch.ones_like(ids, dtype=torch.bool)
    there = [tensor.cuda() for tensor in (ids, maskable)]
    assert torch.equal(random_mask(there[1], 0.15, generator()).cpu(),
                       random_mask(maskable, 0.15, generator()))
    here = corrupt(ids, maskable, 4, 60, generator=generator())[0]
    assert torch.equal(corrupt(*there, 4, 60, generator=generator())[0].cpu(), here)
    entropy = masked_entropy(model.eval(), batch_of(ids), 0.15, 4, generator())
    on_gpu = Batch(*there, index=None)
    got = masked_entropy(model.cuda(), on_gpu, 0.15, 4, generator()).cpu()
    torch.testing.assert_close(got, entropy, rtol=1e-3, atol=1e-3)
