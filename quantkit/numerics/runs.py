"""How many codes fill whole words. Without torch: plans ask too."""

from __future__ import annotations

WORD_BITS = 32


def count_codes_per_run(bits: int) -> int:
    """Codes in the shortest run that ends with a word: one word's, or 32 in `bits` words."""
    return WORD_BITS if WORD_BITS % bits else WORD_BITS // bits
