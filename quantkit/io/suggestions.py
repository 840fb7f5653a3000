"""Sentences for names that do not exist, with the nearest one that does."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def format_unknown_name(noun: str, name: str, known: Sequence[str]) -> str:
    """Return the sentence: "no method named 'gtpq'. Did you mean 'gptq'? Known: gptq, rtn."."""
    return (
        f"no {noun} named {name!r}.{suggest_name(name, known)} Known: {', '.join(known) or 'none'}."
    )


def suggest_name(name: str, known: Sequence[str]) -> str:
    """Return " Did you mean 'gptq'?" with its leading space; "" if no known name is close."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
