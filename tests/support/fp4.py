"""Slow float64 references of MXFP4 and NVFP4, which share no code with quantkit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from support.oracle import Array

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of E2M1; a code is its index, plus 8 for a minus sign."""


def back(values: Array, step: float) -> Array:
    """Return weights after rounding to the nearest value times step, an even code on ties."""
    size = np.abs(values) / step
    distance = np.abs(size[..., None] - np.array(VALUES))
    nearest = distance == distance.min(-1, keepdims=True)
    even = nearest & (np.arange(8) % 2 == 0)
    index = np.where(even.any(-1), even.argmax(-1), nearest.argmax(-1))
    return np.sign(values) * np.array(VALUES)[index] * step


def decode_e4m3(bits: int) -> float:
    """Return the value of a positive E4M3 byte."""
    exponent, mantissa = bits >> 3, bits & 7
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def scale_step(kind: str) -> Callable[[int], float]:
    """Return the value of a scale's byte, by the kind of a scheme."""
    return decode_e4m3 if kind == "nvfp4" else lambda bits: 2.0 ** (int(bits) - 127)


def search(target: Array, counts: Array, first: int, kind: str, whole: float) -> dict[int, float]:
    """Return the squared error, times counts, of each scale that is tried around `first`."""
    steps = range(-3, 6) if kind == "nvfp4" else range(-1, 2)
    top = 126 if kind == "nvfp4" else 254
    return {
        bits: float((counts * (back(target, scale_step(kind)(bits) / whole) - target) ** 2).sum())
        for bits in (min(max(first + step, 1), top) for step in steps)
    }


def textbook(weight: Array, x: Array, steps: Array, group: int, damping: float) -> Array:
    """Return the weight of float64 GPTQ with an inverse Hessian, column by column, act-order.

    steps [out, n_groups]: what values of codes are multiplied by.
    """
    hessian = x.T @ x
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    order = np.argsort(-np.diag(hessian), kind="stable")
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    factor = np.linalg.cholesky(inverse).T  # upper
    left, result = weight[:, order].copy(), np.empty_like(weight)
    for k, column in enumerate(order):
        for row in range(len(weight)):
            result[row, column] = back(left[row, k : k + 1], steps[row, column // group])[0]
            wrong = (left[row, k] - result[row, column]) / factor[k, k]
            left[row, k:] -= wrong * factor[k, k:]
    return result
