"""What is true of each strategy."""
import math
from collections import Counter
from pathlib import Path

import masking
import numpy as np
import pytest
import torch
from model import BertConfig, BertForMaskedLM
from masking import (STRATEGIES, Batch, Context, Typhoon, budget, corrupt, embedding_saliency, entropy_mask, evaluating,
                     hidden_entropy, position_entropy, random_mask, token_entropy, top_k, whole_word_mask)
from torch.nn import functional as F


REFERENCE = Path(__file__).parent / "data" / "reference" / "bert-mlm"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*lengths, width=None):
    """maskable (B, L): the first n of every row."""
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


# --- the budget ------------------------------------------------------------------------------------------------------

def test_budget_by_hand():
    assert budget(rows(0, 1, 3, 10, 126, 40), 0.15).tolist() == [0, 1, 1, 2, 19, 6]
    assert budget(rows(10, 20), 0.4).tolist() == [4, 8]


def test_top_k_is_numpys_sort():
    scores, maskable = torch.rand(50, 20, generator=generator()), torch.rand(50, 20, generator=generator(1)) < 0.7
    k = torch.randint(0, 25, (50,), generator=generator(2))
    got = top_k(scores, maskable, k)
    for row in range(50):
        where = np.flatnonzero(maskable[row])
        best = where[np.argsort(-scores[row].numpy()[where])][:k[row]]
        assert sorted(best) == np.flatnonzero(got[row]).tolist()


def context(model, texts, rate=0.15, **options):
    table = torch.rand(texts.input_ids.shape, generator=generator()) * 5
    return Context(rate, model, texts.token_counts(), texts.vocab.continuation, texts.vocab.mask_id,
                   table, **options)


@pytest.fixture
def english_model(english):
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=2000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=16, max_position_embeddings=64))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_every_strategy_spends_the_budget(name, rate, english, english_model):
    """Over a corpus the masked share is k / count of `random` for all of them, within 2%, and is never special."""
    _, texts = english
    strategy, masked, maskable = STRATEGIES[name](context(english_model, texts, rate)), 0, 0
    g = generator()
    for index in torch.arange(len(texts)).split(64):
        batch = texts.batch(index)
        mask = strategy.mask(batch, g)
        assert mask.shape == batch.maskable.shape and not (mask & ~batch.maskable).any()
        masked, maskable = masked + mask.sum().item(), maskable + batch.maskable.sum().item()
    asked = rate if name in ("typhoon", "whole-word") else round(rate * 62) / 62  # the others: whole tokens of 62
    assert masked / maskable == pytest.approx(asked, rel=0.02)


def test_the_registry_is_in_the_order_of_the_readme():
    assert list(STRATEGIES) == ["random", "whole-word", "entropy", "self-entropy", "typhoon"]


# --- random ----------------------------------------------------------------------------------------------------------

def test_random_masks_exactly_k_and_every_position_alike():
    maskable = rows(20, 7, 0).repeat(4000, 1)
    mask = random_mask(maskable, 0.15, generator())
    assert (mask.sum(1) == budget(maskable, 0.15)).all() and not (mask & ~maskable).any()
    share = mask[0::3].float().mean(0)  # 4,000 draws of 3 from 20
    assert (share - 3 / 20).abs().max() < 4 * math.sqrt(0.15 * 0.85 / 4000)


def test_random_follows_its_generator_alone():
    maskable, state = rows(50).repeat(3, 1), torch.get_rng_state()
    assert torch.equal(random_mask(maskable, 0.15, generator(5)), random_mask(maskable, 0.15, generator(5)))
    assert not torch.equal(random_mask(maskable, 0.15, generator(5)), random_mask(maskable, 0.15, generator(6)))
    assert torch.equal(state, torch.get_rng_state())


# --- whole-word ------------------------------------------------------------------------------------------------------

def words_of(row, maskable, continuation):
    """A row's words as lists of positions, by the definition, one token at a time."""
    words = []
    for i in range(len(row)):
        if maskable[i]:
            joins = continuation[i] and i > 0 and maskable[i - 1]
            words[-1].append(i) if joins else words.append([i])
    return words


def test_no_word_is_ever_split_and_every_row_has_one(english):
    _, texts = english
    batch = texts.batch(torch.arange(200))
    continuation = texts.vocab.continuation[batch.input_ids]
    mask = whole_word_mask(batch.maskable, continuation, 0.15, generator())
    for row in range(200):
        words = words_of(batch.input_ids[row], batch.maskable[row], continuation[row])
        whole = [all(mask[row, i] for i in word) for word in words]
        assert whole == [any(mask[row, i] for i in word) for word in words] and any(whole)


def test_words_of_every_length_are_equally_likely_and_the_share_is_the_rate(english):
    """To 3% and 2%: 60,000 draws and more of every kind of word, over real text."""
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
    assert draws[batch.maskable].mean().item() / 300 == pytest.approx(0.15, rel=0.02)


def test_a_piece_that_follows_a_special_token_begins_a_word():
    maskable = torch.tensor([[False, True, True, False, True, True]])
    continuation = torch.tensor([[False, True, True, False, True, False]])
    seen = {tuple(whole_word_mask(maskable, continuation, 0.25, generator(seed))[0].tolist()) for seed in range(50)}
    F_, T = False, True
    assert seen == {(F_, T, T, F_, F_, F_), (F_, F_, F_, F_, T, F_), (F_, F_, F_, F_, F_, T)}


# --- entropy ---------------------------------------------------------------------------------------------------------

def test_entropy_is_torch_distributions_entropy():
    logits = torch.randn(40, 5, 300, generator=generator()) * 4
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(token_entropy(logits), expected, atol=1e-5, rtol=1e-5)


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -math.inf, -math.inf]])
    expected = [math.log(4), 0.0, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    assert token_entropy(logits).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("select, sign", [("high", 1), ("low", -1)])
def test_high_and_low_take_the_extremes_and_nothing_special(select, sign):
    entropy, maskable = torch.rand(30, 40, generator=generator()), torch.rand(30, 40, generator=generator(1)) < 0.6
    entropy[~maskable] = 9.0 * sign  # tempting
    mask = entropy_mask(entropy, maskable, 0.2, select)
    assert (mask.sum(1) == budget(maskable, 0.2)).all() and not (mask & ~maskable).any()
    for row in range(30):
        chosen, rest = entropy[row, mask[row]] * sign, entropy[row, maskable[row] & ~mask[row]] * sign
        assert chosen.min() > rest.max()


def test_mixed_is_half_the_highest_and_half_anyone():
    entropy, maskable = torch.arange(40.0).expand(2000, 40), rows(40).repeat(2000, 1)
    mask = entropy_mask(entropy, maskable, 0.2, "mixed", generator())  # k = 8
    assert (mask.sum(1) == 8).all() and mask[:, 36:].all()
    rest = mask[:, :36].float().mean(0)  # 4 of the other 36
    assert (rest - 4 / 36).abs().max() < 4.5 * math.sqrt(4 / 36 * 32 / 36 / 2000)


def test_sample_draws_in_proportion_to_entropy():
    """With k = 1 the chance of a position is H_i / Σ H."""
    H = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.0])
    mask = entropy_mask(H.expand(20_000, 5), rows(5).repeat(20_000, 1), 0.1, "sample", generator())
    assert (mask.sum(1) == 1).all()
    share, expected = mask.float().mean(0), H / H.sum()
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_sample_keeps_the_budget_where_entropies_are_zero():
    mask = entropy_mask(torch.zeros(3, 10), rows(10, 4, 0, width=10), 0.5, "sample", generator())
    assert mask.sum(1).tolist() == [5, 2, 0]


def test_an_unknown_select_is_named():
    with pytest.raises(ValueError, match="'highest'"):
        entropy_mask(torch.zeros(1, 4), rows(4), 0.5, "highest")


def batch_of(ids, special=(0,)):
    return Batch(ids, ~torch.isin(ids, torch.tensor(special)), torch.arange(len(ids)))


def test_entropy_of_visible_positions_is_the_direct_computation_in_chunks(model):
    batch = batch_of(torch.randint(0, 60, (5, 17), generator=generator()))
    with torch.no_grad():
        direct = torch.distributions.Categorical(logits=model.eval()(batch.input_ids)).entropy()
    for chunk in (1, 7, 512):
        got = position_entropy(model, batch, batch.input_ids, batch.maskable, chunk)
        torch.testing.assert_close(got, direct * batch.maskable, atol=1e-5, rtol=1e-5)


def test_hidden_entropy_hides_every_position_once(model):
    """Each position's entropy is one that some pass with it masked gives, and the passes partition the row."""
    batch, passes = batch_of(torch.randint(0, 60, (3, 20), generator=generator())), []
    reads = model.hidden

    def spy(input_ids, *rest, positions):
        passes.append((input_ids.clone(), positions))
        return reads(input_ids, *rest, positions=positions)

    model.hidden = spy
    got = hidden_entropy(model.eval(), batch, 0.3, mask_token_id=4, generator=generator())
    model.hidden = reads
    assert len(passes) == math.ceil(1 / 0.3)
    assert torch.equal(sum(positions.int() for _, positions in passes), batch.maskable.int())
    for input_ids, positions in passes:
        assert (input_ids[positions] == 4).all() and torch.equal(input_ids[~positions], batch.input_ids[~positions])
        with torch.no_grad():
            direct = torch.distributions.Categorical(logits=model(input_ids)).entropy()
        torch.testing.assert_close(got[positions], direct[positions], atol=1e-5, rtol=1e-5)
    assert max(p.sum(1).max() for _, p in passes) - min(p.sum(1).min() for _, p in passes) <= 2


@pytest.mark.parametrize("entropy_input", ["visible", "masked"])
def test_self_entropy_leaves_the_model_as_it_was(model, english, entropy_input):
    _, texts = english
    model.train()
    model.bert.layers[0].eval()  # a mixed state, as with frozen layers
    modes = [module.training for module in model.modules()]
    model.head.bias.grad = torch.ones(60)
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    batch = batch_of(torch.randint(0, 60, (4, 20), generator=generator()))
    strategy = STRATEGIES["self-entropy"](Context(0.2, model, None, None, 4, entropy_input=entropy_input))
    mask = strategy.mask(batch, generator())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert [p is model.head.bias for p in model.parameters() if p.grad is not None] == [True]
    assert torch.equal(model.head.bias.grad, torch.ones(60)) and not mask.requires_grad


def test_self_entropy_takes_the_more_uncertain_half_of_twice_as_many(model):
    batch, seen = batch_of(torch.randint(1, 60, (6, 20), generator=generator())), []
    reads = model.hidden
    model.hidden = lambda ids, *rest, positions: seen.append((ids, positions)) or reads(ids, *rest, positions=positions)
    mask = STRATEGIES["self-entropy"](Context(0.2, model, None, None, 4)).mask(batch, generator())
    (ids, candidates), = seen
    model.hidden = reads
    assert (candidates.sum(1) == 8).all() and (ids[candidates] == 4).all()
    with torch.no_grad():
        H = torch.distributions.Categorical(logits=model.eval()(ids)).entropy()
    for row in range(6):
        assert mask[row].sum() == 4 and not (mask & ~candidates).any()
        assert H[row, mask[row]].min() > H[row, candidates[row] & ~mask[row]].max()


def test_evaluating_puts_modes_back_after_an_error(model):
    model.train()
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()


# --- Typhoon ---------------------------------------------------------------------------------------------------------

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
    F.cross_entropy(model(inputs_embeds=words, positions=mask), labels[mask]).backward()
    got = embedding_saliency(words.grad, weight, ids)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-6


def test_two_updates_by_hand():
    """Types 1, 2, 3 of five. First batch: type 1 visible with dots 0.25 and 0.75, type 2 visible 0.5 and masked −0.25.
    s_1 = −0.5; s_2 = −0.5 − 0.25 = −0.75. Second: type 1 masked 1.0, type 3 visible −2. w_1 = 0.25·(−0.5) + 0.75·1."""
    typhoon = Typhoon(torch.tensor([0, 2, 1, 1, 0]), rate=0.25, spread=0.5, ema_weight=0.75)
    every = torch.ones(1, 4, dtype=torch.bool)
    typhoon.update(torch.tensor([[1, 1, 2, 2]]), torch.tensor([[0.25, 0.75, 0.5, -0.25]]), every,
                   torch.tensor([[False, False, False, True]]))
    assert typhoon.weight.tolist() == [0, -0.5, -0.75, 0, 0] and typhoon.seen.tolist() == [0, 1, 1, 0, 0]
    # ŵ = 1 for type 1, 0 for type 2, 1 unseen; u = 1, .5, 1; f = .5, .25, .25; Σ f u = .875
    assert typhoon.rates().tolist() == pytest.approx([0.25 / 0.875 * u for u in (1, 1, 0.5, 1, 1)], rel=1e-12)
    typhoon.update(torch.tensor([[1, 3, 0, 0]]), torch.tensor([[1.0, -2.0, 9.0, 9.0]]),
                   torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, False, False]]))
    assert typhoon.weight.tolist() == [0, 0.25 * -0.5 + 0.75 * 1, -0.75, 2.0, 0]
    # ŵ = (0.625 + 0.75) / 2.75 = 0.5 for type 1, 0 and 1: u = .75, .5, 1; Σ f u = .75
    assert typhoon.rates().tolist() == pytest.approx([0.25 / 0.75 * u for u in (1, 0.75, 0.5, 1, 1)], rel=1e-12)


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3, 0.7, 0.8, 0.9, 0.99])
def test_the_expected_rate_is_the_budget_also_where_the_cap_binds(rate):
    g = generator(1)
    counts = (torch.rand(500, generator=g) ** 8 * 1000).long()
    typhoon = Typhoon(counts, rate, spread=0.6)
    typhoon.weight, typhoon.seen = torch.randn(500, generator=g).double(), torch.rand(500, generator=g) < 0.9
    rates = typhoon.rates()
    assert (rates * counts / counts.sum()).sum().item() == pytest.approx(rate, abs=1e-9)
    assert rates.min() >= 0 and rates.max() <= 1
    assert (rates.max() == 1) == (rate >= 0.8)  # this test sees both sides of the cap
    free = rates < 1  # below the cap the shape is untouched: rates are proportional to 1 − σ + σ ŵ
    low, high = typhoon.weight[typhoon.seen].min(), typhoon.weight[typhoon.seen].max()
    u = torch.where(typhoon.seen, 0.4 + 0.6 * (typhoon.weight - low) / (high - low), 1)
    ratio = rates[free] / u[free]
    assert (ratio.max() - ratio.min()) / ratio.max() < 1e-9


def test_before_any_update_every_type_has_the_rate():
    assert Typhoon(torch.tensor([3, 4, 5]), 0.3).rates().tolist() == pytest.approx([0.3] * 3)


def test_typhoon_masks_at_its_rates():
    typhoon = Typhoon(torch.tensor([1, 1, 2]), 0.3)
    typhoon.weight, typhoon.seen = torch.tensor([0.0, 1.0, 0.5]).double(), torch.ones(3, dtype=torch.bool)
    ids = torch.arange(3).repeat(20_000, 1)
    share = typhoon.mask(ids, torch.ones_like(ids, dtype=torch.bool), generator()).float().mean(0)
    assert ((share - typhoon.rates()).abs() < 4 * (0.21 / 20_000) ** 0.5).all()


def test_accumulated_micro_batches_are_one_batch():
    g = generator()
    ids, dot = torch.randint(0, 9, (8, 11), generator=g), torch.randn(8, 11, generator=g)
    maskable, masked = torch.rand(8, 11, generator=g) < 0.8, torch.rand(8, 11, generator=g) < 0.3
    masked &= maskable
    whole, parts = (Typhoon(torch.ones(9), 0.3) for _ in range(2))
    whole.update(ids, dot, maskable, masked)
    for piece in torch.arange(8).split(3):
        parts.accumulate(ids[piece], dot[piece], maskable[piece], masked[piece])
    parts.step()
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-12, atol=1e-12)


# --- corruption ------------------------------------------------------------------------------------------------------

def test_the_split_is_80_10_10_and_nothing_special_appears():
    ids = torch.randint(5, 40, (400, 100), generator=generator())
    mask = random_mask(torch.ones_like(ids, dtype=torch.bool), 0.5, generator())
    special = (0, 1, 2, 3, 4, 17)
    ids[ids == 17] = 18
    got, labels = corrupt(ids, mask, 4, 40, generator=generator(1), special_ids=special)
    n = mask.sum().item()
    masked, kept = (got[mask] == 4).sum().item(), (got[mask] == ids[mask]).sum().item()
    assert masked / n == pytest.approx(0.8, abs=4 * (0.16 / n) ** 0.5)
    assert kept / n == pytest.approx(0.1 + 0.1 / 34, abs=4 * (0.09 / n) ** 0.5)  # a swap may hit the token itself
    assert torch.equal(got[~mask], ids[~mask])
    assert torch.equal(labels[mask], ids[mask]) and (labels[~mask] == -100).all()
    swapped = got[mask & (got != 4) & (got != ids)]
    assert set(swapped.tolist()) == set(range(40)) - set(special)  # every ordinary word, and no other


def test_pure_mask_masks_everything():
    ids, mask = torch.arange(10, 20)[None], rows(4, width=10)
    got, _ = corrupt(ids, mask, 4, 40, (1, 0, 0))
    assert got.tolist() == [[4, 4, 4, 4, 14, 15, 16, 17, 18, 19]]
    assert torch.equal(corrupt(ids, mask, 4, 40, (0, 0, 1))[0], ids)


# --- the terminal demo -----------------------------------------------------------------------------------------------

def test_the_demo_shows_every_strategy_side_by_side(capsys):
    """On a recorded model; the output is no terminal, so there are markers and no colours."""
    masking.main(["w1 w2 w3 w4 w5 w6 w7 w8 w9", "--model", str(REFERENCE), "--mask-rate", "0.3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == list(STRATEGIES)
    table = {line.split()[0]: line for line in lines[2:13]}
    assert list(table) == ["[CLS]", *(f"w{i}" for i in range(1, 10)), "[SEP]"]
    assert "MASK" not in table["[CLS]"] + table["[SEP]"] and "\x1b" not in "".join(lines)
    width = len("[CLS]") + 2
    for i, name in enumerate(STRATEGIES):
        column = [table[f"w{j}"][width + 15 * i:width + 15 * (i + 1)] for j in range(1, 10)]
        masked = ["[MASK]" in cell for cell in column]
        assert sum(masked) in {"whole-word": (2, 3), "typhoon": range(10)}.get(name, (3,))  # 0.3 · 9 = 2.7
        numbers = [float(cell.replace("[MASK]", "").replace(" . ", "")) for cell in column] if i > 1 else []
        assert all(0 < number < (1 if name == "typhoon" else math.log(60)) for number in numbers)
        if name == "entropy":  # the three highest
            assert min(n for n, m in zip(numbers, masked) if m) >= max(n for n, m in zip(numbers, masked) if not m)


def test_the_demo_colours_a_terminal():
    shown = {"entropy": (torch.tensor([True, False]), torch.tensor([3.0, 1.0]))}
    lines = masking.demo_lines(["hard", "easy"], shown, colour=True)
    assert "\x1b[1m" in lines[1] and "48;5;196" in lines[1] and "48;5;16m" in lines[2]


# --- on a GPU --------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_on_cuda_and_follows_its_generator(name, model):
    from train import Texts, Vocab
    device, ids = torch.device("cuda"), torch.randint(5, 60, (8, 20), generator=generator())
    words = [f"w{i}" for i in range(60)]

    class Pieces:
        id_to_token = staticmethod(lambda i: words[i])
        token_to_id = staticmethod({"[PAD]": 0, "[MASK]": 4}.get)

    texts = Texts(ids.to(device), Vocab(Pieces, 60, device))
    strategy = STRATEGIES[name](Context(0.2, model.to(device), texts.token_counts(), texts.vocab.continuation, 4,
                                        lambda: torch.rand(8, 20, device=device)))
    batch = texts.batch(torch.arange(8, device=device))
    first, second = (strategy.mask(batch, torch.Generator(device).manual_seed(1)) for _ in range(2))
    assert first.device.type == "cuda" and torch.equal(first, second) and first.any()
