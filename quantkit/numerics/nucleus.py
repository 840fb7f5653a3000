"""Nucleus sampling (Holtzman et al. 2020, "The curious case of neural text degeneration", section
3.1), by the inverse of the cumulative distribution. Pure.

One uniform number per row decides its token: no generator has a state, and rows are independent of
each other. Other rows of a batch change a token only if they change the last bits of its logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 1024
"""Most probable tokens that are sorted first; a nucleus with more sorts the whole vocabulary."""


def sample_nucleus(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Sample one token per row from the nucleus: the fewest tokens with a mass of `top_p` or more.

    Args:
        logits: [rows, vocab], any float dtype.
        uniforms: [rows] float64 in [0, 1).
        temperature: divides the logits; above 0.
        top_p: mass of the nucleus, in (0, 1].

    Returns [rows] int64. The softmax is in float32, its sums in float64.
    """
    probs = torch.softmax(logits.float() / temperature, dim=-1)  # [rows, vocab]
    n_candidates = min(CANDIDATES, probs.shape[-1])
    top, ids = probs.topk(n_candidates, dim=-1)  # [rows, candidates], descending
    if n_candidates < probs.shape[-1] and bool((top.double().sum(-1) < top_p).any()):
        top, ids = probs.sort(dim=-1, descending=True, stable=True)  # [rows, vocab]
    sums = top.double().cumsum(-1)  # [rows, candidates]
    is_inside = (sums - top.double()) < top_p  # [rows, candidates]; the first is always inside
    mass = torch.where(is_inside, sums, 0.0).amax(-1)  # [rows]
    target = (uniforms * mass).unsqueeze(-1)  # [rows, 1]
    place = (sums <= target).sum(-1)  # [rows]
    place = torch.minimum(place, is_inside.sum(-1) - 1)  # [rows]
    return ids.gather(-1, place.unsqueeze(-1)).squeeze(-1)  # [rows]
