"""Slow float64 references in numpy for quantkit's numerics, which share no code with it.

Errors are computed from activations, never from a gram: sum over tokens of |x (W - Q)^T|^2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def bfloat16(values: Array) -> Array:
    """Round to bfloat16, nearest even, on the bits of float32."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def round_scale(scale: float, dtype: str) -> float:
    """Return a positive scale as it is stored."""
    if dtype == "bfloat16":
        return float(bfloat16(np.array([scale]))[0])
    return float(np.dtype(dtype).type(scale))


def range_of(weights: Array, symmetric: bool) -> tuple[float, float]:
    """Return the range of one group, including zero."""
    low, high = min(0.0, float(weights.min())), max(0.0, float(weights.max()))
    return (-max(-low, high), max(-low, high)) if symmetric else (low, high)


def scale_and_zero(weights: Array, bits: int, symmetric: bool, dtype: str) -> tuple[float, int]:
    """Return scale and zero point of one group from its range."""
    low, high = range_of(weights, symmetric)
    if low == high:
        return 1.0, 2 ** (bits - 1)
    scale = round_scale((high - low) / (2**bits - 1), dtype)
    return scale, 2 ** (bits - 1) if symmetric else int(
        np.clip(np.round(-low / scale), 0, 2**bits - 1)
    )


def codes(weights: Array, scale: float, zero: int, bits: int) -> Array:
    """Return the nearest codes."""
    return np.clip(np.round(weights / scale) + zero, 0, 2**bits - 1)


def back(weights: Array, scale: float, zero: int, bits: int) -> Array:
    """Return weights after rounding to codes and back."""
    return (codes(weights, scale, zero, bits) - zero) * scale


def rtn(weight: Array, bits: int, group: int, symmetric: bool, dtype: str) -> tuple[Array, Array]:
    """Round a matrix [out, in] to nearest by groups: codes, dequantized weight."""
    chosen, result = np.empty_like(weight), np.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = slice(start, start + group)
            scale, zero = scale_and_zero(weight[row, part], bits, symmetric, dtype)
            chosen[row, part] = codes(weight[row, part], scale, zero, bits)
            result[row, part] = back(weight[row, part], scale, zero, bits)
    return chosen, result


def output_error(delta: Array, x: Array) -> float:
    """Return the summed squared output change of tokens x [n, in] for a weight error [out, in]."""
    return float(np.square(x @ delta.T).sum())


def clip_search(
    weight: Array, x: Array, bits: int, group: int, symmetric: bool, dtype: str
) -> Array:
    """Search ranges by trying every candidate on the activations, row by row.

    Returns the dequantized weight. First sweep: 11 ratios to the scale from 1 to 0.5, then 9 around
    the best; second sweep: the 9 again. The zero point moves by one code. A candidate that lowers
    the error of the whole row is accepted.
    """
    result = np.empty_like(weight)
    starts = range(0, weight.shape[1], group)
    for row, values in enumerate(weight):
        settings = {
            s: scale_and_zero(values[s : s + group], bits, symmetric, dtype) for s in starts
        }
        current = np.concatenate([back(values[s : s + group], *settings[s], bits) for s in starts])
        for passes in (([1 - 0.05 * i for i in range(11)], FINE), (FINE,)):
            for start in starts:
                for shares in passes:
                    scale, zero = settings[start]
                    for share in shares:
                        for shift in (0,) if symmetric else (0, -1, 1):
                            candidate = (
                                round_scale(scale * share, dtype),
                                int(np.clip(zero + shift, 0, 2**bits - 1)),
                            )
                            new = current.copy()
                            new[start : start + group] = back(
                                values[start : start + group], *candidate, bits
                            )
                            if output_error((new - values)[None], x) < output_error(
                                (current - values)[None], x
                            ):
                                current, settings[start] = new, candidate
        result[row] = current
    return result


FINE = [1 + 0.01 * i for i in range(-4, 5)]


def weighted_search(
    weight: Array, counts: Array, bits: int, group: int, symmetric: bool, dtype: str
) -> Array:
    """Search ranges by squared errors times counts[k] of column k, group by group.

    Returns the dequantized weight. 7 ratios to the min/max scale from 1 to 0.57 with the zero point
    moved by one code, then three times the best scale so far slightly smaller and larger.
    """
    result = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = slice(start, start + group)
            values = weight[row, part]
            scale, zero = scale_and_zero(values, bits, symmetric, dtype)
            coarse = [1.0, *(0.92 - 0.07 * i for i in range(6))]
            best: tuple[float, float, int] = (float("inf"), scale, zero)
            for shares, shifts in [
                (coarse, (0, -1, 1)),
                *(((1 - d, 1 + d), (0,)) for d in (0.035, 0.018, 0.01)),
            ]:
                around, middle = best[1:]
                for share in shares:
                    for shift in (0,) if symmetric else shifts:
                        candidate = (
                            round_scale(around * share, dtype),
                            int(np.clip(middle + shift, 0, 2**bits - 1)),
                        )
                        lost = float(
                            (
                                counts[part] * np.square(back(values, *candidate, bits) - values)
                            ).sum()
                        )
                        best = min(best, (lost, *candidate), key=lambda setting: setting[0])
            result[row, part] = back(values, *best[1:], bits)
    return result


def awq_scales(mean_abs: Array) -> Array:
    """Return AWQ's 20 candidates from their definition: mean|x| ** ratio, over sqrt(max * min)."""
    best_setting = []
    for ratio in np.arange(20) / 20:
        scale = np.maximum(mean_abs / mean_abs.max(), 1e-4) ** ratio
        best_setting.append(scale / np.sqrt(scale.max() * scale.min()))
    return np.array(best_setting)


def awq_error(
    weight: Array, x: Array, scale: Array, bits: int, group: int, symmetric: bool, dtype: str
) -> float:
    """Return the output error after scaling, rounding in clipped ranges, and unscaling.

    Each group's range is clipped by the energies of its inputs.
    """
    wide, result = weight * scale, np.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = slice(start, start + group)
            values, energy = wide[row, part], np.square(x[:, part] / scale[part]).sum(0)
            first, zero = scale_and_zero(values, bits, symmetric, dtype)
            candidate = [
                back(values, round_scale(first * (1 - 0.1 * i), dtype), zero, bits)
                for i in range(5)
            ]
            losses = [float(energy @ np.square(new - values)) for new in candidate]
            result[row, part] = candidate[int(np.argmin(losses))]
    return output_error(result / scale - weight, x)


def kl(p_logits: Array, q_logits: Array) -> float:
    """Return KL(p || q) of one token, in nats, from its definition."""
    p = np.exp(p_logits - p_logits.max())
    q = np.exp(q_logits - q_logits.max())
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / b) for a, b in zip(p, q) if a > 0))
