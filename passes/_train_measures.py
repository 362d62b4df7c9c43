"""The measures that training losses are made of: tensors in, one fp32 number a sample out.

A sample is an entry of the first axis. Each measure is a mean inside the sample, and a loss the mean over samples, so
that a batch cut into equal parts gives the same sum.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_opt.passes._train_graph import Meaning

SMALLEST_SQUARE = 1e-6
"""The least mean square that `relative` divides by, so that a reference of zeros gives a finite loss."""
_SMALLEST_PROBABILITY = 1e-20  # its logarithm has a gradient that fp32 holds
_LOWEST = -1e4  # stands for log 0: exp gives exactly 0, and 0 · −1e4 is 0 where 0 · −∞ is no number
_FORBIDDEN = 100.0  # an entry so far below its row's largest has the probability e⁻¹⁰⁰: a mask, no score
_HUGE = 1e4  # larger scores are masks too, as in a row that is masked throughout


def sample_means(x: Tensor, keep: Tensor | None = None) -> Tensor:
    """The mean over everything but the first axis, of the entries to `keep` (0 where there are none): [n].

    Args:
        x: [n, ...].
        keep: booleans that broadcast to x.
    """
    rows = x.reshape(x.shape[0] if x.ndim else 1, -1)
    if keep is None:
        return rows.mean(1)
    kept = keep.expand_as(x).reshape(rows.shape)
    return torch.where(kept, rows, 0).sum(1) / kept.sum(1).clamp(min=1)


def square_error(student: Tensor, reference: Tensor, keep: Tensor | None = None) -> Tensor:
    """The mean of (s − r)²: [n]."""
    return sample_means(_difference(student, reference, keep).square(), keep)


def relative_error(student: Tensor, reference: Tensor, keep: Tensor | None = None) -> Tensor:
    """The mean of (s − r)² over the mean of r²: [n]. No value outweighs another by its scale (ours)."""
    reference = reference.float()
    signal = reference if keep is None else torch.where(keep, reference, 0)
    scale = sample_means(signal.square(), keep).clamp(min=SMALLEST_SQUARE)
    return square_error(student, reference, keep) / scale


def _difference(student: Tensor, reference: Tensor, keep: Tensor | None) -> Tensor:
    difference = student.float() - reference.float()
    # Before the square, whose gradient at an infinite difference would be no number.
    return difference if keep is None else torch.where(keep, difference, 0)


def log_scores(x: Tensor, meaning: Meaning, axis: int, temperature: float = 1.0) -> Tensor:
    """log softmax(z / T) of the logits z behind an output, whether it holds z, softmax(z) or its logarithm."""
    x = x.float()
    if meaning == "probabilities":
        x = x.clamp(min=_SMALLEST_PROBABILITY).log()
    return F.log_softmax(x / temperature, axis)


def divergence(student: Tensor, reference: Tensor, axis: int, keep: Tensor | None = None) -> Tensor:
    """The mean over rows of KL(r ‖ s) = Σ exp(r)·(r − s) of log-probabilities along an axis: [n]."""
    likelihood = reference.clamp(min=_LOWEST) - student.clamp(min=_LOWEST)
    return sample_means((reference.exp() * likelihood).sum(axis, keepdim=True), keep)


def seen_scores(reference: Tensor, axis: int) -> Tensor:
    """Which attention scores are scores: the rest is there to be masked, and as large as a type allows."""
    reference = reference.float()
    below = reference.amax(axis, keepdim=True) - reference
    return reference.isfinite() & (below <= _FORBIDDEN) & (reference.abs() < _HUGE)


def tokens_kept(mask: Tensor | None, x: Tensor, axis: int = 1) -> Tensor | None:
    """A mask [n, s] of tokens as one that broadcasts to x: [n, ...] with s tokens along `axis`; None if unfit."""
    axis %= max(x.ndim, 1)
    fits = mask is not None and x.ndim > 2 and axis > 0 and tuple(mask.shape) == (x.shape[0], x.shape[axis])
    if mask is None or not fits:
        return None
    return (mask != 0).reshape([x.shape[a] if a in (0, axis) else 1 for a in range(x.ndim)])


def cross_entropy(scores: Tensor, label: Tensor, keep: Tensor | None = None) -> Tensor:
    """The mean of −log p(label) over positions: [n]; negative labels are padding.

    Args:
        scores: log-probabilities (or logits) [n, c, ...].
        label: classes [n, ...].
        keep: booleans [n, ...].
    """
    real = label >= 0
    loss = F.cross_entropy(scores, torch.where(real, label, -1), ignore_index=-1, reduction="none")
    return sample_means(loss, real if keep is None else real & keep)


def next_token(scores: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of −log p(next token): [n]; tokens [n, s] that a mask [n, s] leaves out are no targets.

    Args:
        scores: log-probabilities (or logits) [n, s, v].
        tokens: [n, s].
        mask: [n, s], 0 at padding.
    """
    keep = None if mask is None else mask[:, 1:] != 0
    return cross_entropy(scores[:, :-1].movedim(-1, 1), tokens[:, 1:].long(), keep)


def ctc(scores: Tensor, label: Tensor, layout: Literal["ntc", "tnc"], blank: int) -> Tensor:
    """−log p(label) over all alignments, divided by the label's length: [n] (Graves et al. 2006).

    A label that cannot be aligned, being longer than the frames allow, counts 0.

    Args:
        scores: log-probabilities [n, t, c], or [t, n, c].
        label: classes [n, l], padded at the end with negative numbers.
        layout: the order of the scores' axes.
        blank: the class of no symbol.
    """
    if layout == "ntc":
        scores = scores.transpose(0, 1)
    frames = torch.full((scores.shape[1],), scores.shape[0], dtype=torch.long, device=scores.device)
    lengths = (label >= 0).sum(1)
    loss = F.ctc_loss(scores, label.clamp(min=0), frames, lengths, blank=blank, reduction="none", zero_infinity=True)
    return loss / lengths.clamp(min=1)
