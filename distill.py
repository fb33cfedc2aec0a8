"""Knowledge distillation: a student learns from a teacher's whole prediction, and may start from its weights.

Hinton et al. 2015 (1503.02531) §2; DistilBERT (1910.01108) §3. [E] reports its best results with both distillation
and a teacher's entropy. `train.py --kd-weight 0.5` uses it with any strategy.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import InputError


def kd_loss(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, alpha: float,
            temperature: float) -> Tensor:
    """α T² KL(softmax(z_t / T) ‖ softmax(z_s / T)) + (1 − α) CE, the mean over N masked positions, in nats.

    student_logits z_s and teacher_logits z_t (N, V), labels (N,). T² keeps the size of the gradient the same whatever T
    (Hinton et al. §2). At α = 0 this is the plain MLM loss and teacher_logits may be None."""
    cross_entropy = F.cross_entropy(student_logits.float(), labels)
    if alpha == 0:
        return cross_entropy
    log_student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    kl = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return alpha * temperature ** 2 * kl + (1 - alpha) * cross_entropy


@torch.no_grad()
def init_student(student: nn.Module, teacher: nn.Module, how: str):
    """Copies a teacher's weights into a student of the same width, in place (DistilBERT §3).

    how: "embeddings" copies word, position and token-type embeddings and their LayerNorm; "layers" also evenly spaced
    encoder layers, student layer i from teacher layer ⌊i T / S⌋ (DistilBERT, with T = 2 S, takes every second). Raises
    InputError, naming both shapes, where something does not fit."""
    if how not in ("embeddings", "layers"):
        raise ValueError(f"unknown how {how!r}: embeddings or layers")
    copy(student.bert.embeddings, teacher.bert.embeddings)
    if how == "layers":
        S, T = len(student.bert.layers), len(teacher.bert.layers)
        if S > T:
            raise InputError(f"the student has {S} layers, the teacher {T}: choose a smaller student")
        for i, layer in enumerate(student.bert.layers):
            copy(layer, teacher.bert.layers[i * T // S])


def copy(to: nn.Module, source: nn.Module):
    """Copies every parameter that `to` has. Raises InputError, naming both shapes, where one does not fit."""
    theirs = dict(source.named_parameters())
    for name, ours in to.named_parameters():
        if name not in theirs or theirs[name].shape != ours.shape:
            found = tuple(theirs[name].shape) if name in theirs else "nothing"
            raise InputError(f"{name} is {tuple(ours.shape)} in the student and {found} in the teacher: "
                             "choose a --preset of the teacher's width, another --teacher or another --student-init")
        ours.copy_(theirs[name])
