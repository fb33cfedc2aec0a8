"""Knowledge distillation: a student learns from a teacher's whole prediction.

Hinton et al. 2015 (1503.02531) §2; DistilBERT (1910.01108) §3, which also starts the student from
its teacher's weights. [E] (masking.py) reports its best results with both distillation and a
teacher's entropy. `train.py --kd-weight 0.5` adds distillation to any strategy.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import InputError


def kd_loss(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, alpha: float,
            temperature: float) -> Tensor:
    """Returns α T² KL(softmax(z_t / T) ‖ softmax(z_s / T)) + (1 − α) CE, a scalar in nats.

    It is the mean over N masked positions. student_logits z_s and teacher_logits z_t (N, V), labels
    (N,). At α = 0 it is the plain MLM loss and teacher_logits may be None.

    With a teacher that says 3 : 1, a student that says 1 : 1 and T = 1, the divergence is 0.131 and
    the cross-entropy ln 2 = 0.693; α = 1/2 takes their mean:

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    >>> round(kd_loss(student, teacher, torch.tensor([0]), alpha=0.5, temperature=1.0).item(), 3)
    0.412
    """
    student_logits = student_logits.float()  # bf16 has too few digits for logarithms
    cross_entropy = F.cross_entropy(student_logits, labels)
    if alpha == 0:
        return cross_entropy
    # A checkpoint may have logits of −inf, as on spare rows of its vocabulary. Clamped, ln 0 stays
    # a number, and p_t ln p_t is 0, not nan.
    log_student, log_teacher = (
        F.log_softmax(logits.float() / temperature, dim=-1).clamp(min=torch.finfo().min)
        for logits in (student_logits, teacher_logits))  # (N, V) each
    # log_target: the teacher comes as logarithms too, which stay finite where a probability is 0 in
    # float32. batchmean is the mean over positions; "mean" would divide by V as well.
    kl = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    # At large T the gradient of the KL shrinks as 1 / T². T² cancels this, so that the gradient's
    # size settles as T grows instead of vanishing beside the cross-entropy's (Hinton et al. §2).
    return alpha * temperature ** 2 * kl + (1 - alpha) * cross_entropy


@torch.no_grad()
def init_student(student: nn.Module, teacher: nn.Module, how: str):
    """Copies a teacher's weights into a student of the same width, in place (DistilBERT §3).

    how: "embeddings" copies the word, position and token-type embeddings and their LayerNorm;
    "layers" also copies evenly spaced encoder layers, student layer i from teacher layer ⌊i T / S⌋
    (at T = 2 S every second one, as DistilBERT). With "embeddings" give a student the start that
    its teacher had: `local_start` makes queries and keys for positions that are sines. Raises
    InputError where something does not fit."""
    if how not in ("embeddings", "layers"):
        raise ValueError(f"unknown how {how!r}: embeddings or layers")
    copy(student.bert.embeddings, teacher.bert.embeddings)
    if how == "layers":
        S, T = len(student.bert.layers), len(teacher.bert.layers)
        heads, its_heads = (bert.config.num_attention_heads for bert in (student, teacher))
        if S > T or heads != its_heads:  # of other heads the shapes are the same
            raise InputError(f"the student has {S} layers of {heads} heads, the teacher {T} of "
                             f"{its_heads}: choose another --preset or --teacher")
        for i, layer in enumerate(student.bert.layers):
            copy(layer, teacher.bert.layers[i * T // S])


def copy(to: nn.Module, source: nn.Module):
    """Copies every weight that `to` has. Raises InputError, with both shapes, where one differs."""
    ours, theirs = to.state_dict(), source.state_dict()
    for name, weight in ours.items():
        found = tuple(theirs[name].shape) if name in theirs else "nothing"
        if found != tuple(weight.shape):
            raise InputError(f"{name} is {tuple(weight.shape)} in the student and {found} in the "
                             "teacher: choose a --preset of the teacher's width, another --teacher "
                             "or another --student-init")
    to.load_state_dict(theirs, strict=False)  # the teacher may have weights that the student lacks
