"""The KD loss against numpy and its limits; student initialisation."""
import math

import numpy as np
import pytest
import torch
from distill import init_student, kd_loss
from model import BertConfig, BertForMaskedLM, InputError


def logits(seed, rows=6, words=11):
    return torch.randn(rows, words, generator=torch.Generator().manual_seed(seed)) * 3


LABELS = torch.tensor([0, 3, 10, 2, 2, 7])


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("alpha, temperature", [(0.0, 1.0), (0.5, 2.0), (1.0, 4.0), (0.3, 0.5)])
def test_it_is_the_formula_in_numpy(alpha, temperature):
    s, t = logits(0).double().numpy(), logits(1).double().numpy()
    ps, pt = softmax(s / temperature), softmax(t / temperature)
    kl = (pt * (np.log(pt) - np.log(ps))).sum(-1).mean()
    ce = -np.log(softmax(s)[np.arange(6), LABELS]).mean()
    expected = alpha * temperature ** 2 * kl + (1 - alpha) * ce
    got = kd_loss(logits(0), logits(1), LABELS, alpha, temperature).item()
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    student = logits(0).requires_grad_()
    loss = kd_loss(student, logits(0), LABELS, alpha=1.0, temperature=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and student.grad.abs().max() < 1e-6


def test_at_alpha_zero_it_is_cross_entropy_and_wants_no_teacher():
    expected = torch.nn.functional.cross_entropy(logits(0), LABELS)
    assert torch.equal(kd_loss(logits(0), None, LABELS, alpha=0.0, temperature=2.0), expected)


def test_hot_gradients_match_logits():
    """Hinton et al. §2.1: T → ∞, zero-mean logits, ∂(T² KL)/∂z = (z_s − z_t) / V, over N rows."""
    s, t = (z - z.mean(-1, keepdim=True) for z in (logits(0).double(), logits(1).double()))
    s.requires_grad_()
    for temperature, tolerance in ((100.0, 0.05), (1000.0, 0.005)):
        gradient, = torch.autograd.grad(kd_loss(s, t, LABELS, 1.0, temperature), s)
        limit = (s - t).detach() / s.shape[1] / len(s)
        assert (gradient - limit).norm() / limit.norm() < tolerance


def test_the_size_of_the_gradient_settles_as_the_temperature_grows():
    """Not at its size at T = 1; without T² each doubling would divide it by four for ever."""
    norms = []
    for temperature in (1.0, 64.0, 128.0):
        s = logits(0).double().requires_grad_()
        loss = kd_loss(s, logits(1).double(), LABELS, 1.0, temperature)
        norms.append(torch.autograd.grad(loss, s)[0].norm().item())
    assert norms[0] != pytest.approx(norms[1], rel=0.2)
    assert norms[2] == pytest.approx(norms[1], rel=0.02)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_large_logits_do_not_overflow(temperature):
    """A probability that is 0 in float32 has a finite logarithm: the teacher is sure of another."""
    student = torch.tensor([[300.0, 0.0]]).requires_grad_()
    loss = kd_loss(student, -student.detach(), torch.tensor([1]), 0.5, temperature)
    loss.backward()
    kl = 600.0 / temperature - 300.0 / temperature  # ln p_t − ln p_s of the teacher's sure token
    expected = 0.5 * temperature ** 2 * kl + 0.5 * 300.0
    assert loss.item() == pytest.approx(expected, rel=1e-5) and student.grad.isfinite().all()


@pytest.mark.parametrize("student, expected", [  # ln 3 and ln 2 less the entropy of (1, e)
    ([0.0, 0.0, 0.0], 0.5164), ([0.0, 0.0, -math.inf], 0.1109)])
def test_a_logit_of_minus_infinity_is_a_probability_of_nothing(student, expected):
    """As a padded vocabulary has them; the student's gradient is p_s − p_t all the same."""
    student = torch.tensor([student]).requires_grad_()
    teacher = torch.tensor([[0.0, 1.0, -math.inf]])
    loss = kd_loss(student, teacher, torch.tensor([1]), alpha=1.0, temperature=1.0)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    loss.backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_bf16_logits_are_computed_in_float32(alpha):
    """Under autocast logits come as bf16; their loss is that of the same numbers in float32."""
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    got = kd_loss(student, teacher, LABELS, alpha, 2.0)
    expected = kd_loss(student.float(), teacher.float(), LABELS, alpha, 2.0)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def model(layers, hidden=16, seed=0, heads=2, **fields):
    torch.manual_seed(seed)
    return BertForMaskedLM(BertConfig(
        vocab_size=30, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=24, max_position_embeddings=16, **fields))


def test_layers_are_copied_evenly_spaced():
    """DistilBERT: six layers from twelve are every second one."""
    student, teacher = model(6, seed=0), model(12, seed=1)
    init_student(student, teacher, "layers")
    for i, layer in enumerate(student.bert.layers):
        assert torch.equal(layer.output.weight, teacher.bert.layers[2 * i].output.weight)
    ours, theirs = student.bert.embeddings, teacher.bert.embeddings
    assert torch.equal(ours.word_embeddings.weight, theirs.word_embeddings.weight)


def test_embeddings_alone_leave_the_layers():
    student, teacher, untouched = model(2, seed=0), model(4, seed=1), model(2, seed=0)
    init_student(student, teacher, "embeddings")
    ours, theirs = student.bert.embeddings.state_dict(), teacher.bert.embeddings.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert torch.equal(student.bert.layers[0].output.weight, untouched.bert.layers[0].output.weight)


def test_same_depth_copies_the_whole_encoder():
    student, teacher = model(3, seed=0).eval(), model(3, seed=1).eval()
    init_student(student, teacher, "layers")
    ids = torch.arange(8)[None]
    assert torch.equal(student.bert(ids), teacher.bert(ids))


def test_what_does_not_fit_names_both_shapes():
    both = r"\(30, 16\) in the student and \(30, 32\) in the teacher"
    with pytest.raises(InputError, match=both):
        init_student(model(2), model(2, hidden=32), "embeddings")
    with pytest.raises(InputError, match="3 layers of 2 heads, the teacher 2 of 2"):
        init_student(model(3), model(2), "layers")
    few, many = model(2), model(2, heads=4)
    with pytest.raises(InputError, match="2 layers of 2 heads, the teacher 2 of 4"):
        init_student(few, many, "layers")
    init_student(few, many, "embeddings")  # which have none


def test_what_does_not_fit_leaves_the_student_as_it_was():
    student, untouched = model(2), model(2)
    with pytest.raises(InputError):
        init_student(student, model(2, hidden=32, seed=1), "layers")
    ours, before = student.state_dict(), untouched.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in ours.items())


def test_a_student_without_token_types_takes_the_rest():
    """DistilBERT has none. As a teacher of BERT it lacks them, and the error says so."""
    bert, distilbert = model(2, seed=1), model(2, model_type="distilbert")
    init_student(distilbert, bert, "embeddings")
    assert torch.equal(distilbert.bert.embeddings.position_embeddings.weight,
                       bert.bert.embeddings.position_embeddings.weight)
    with pytest.raises(InputError, match=r"token_type_embeddings.weight is \(2, 16\) .* nothing"):
        init_student(bert, distilbert, "embeddings")
