"""The YAML specs of the sets, every key commented."""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass
from textwrap import wrap


@dataclass(frozen=True, kw_only=True, slots=True)
class SetText:
    """What a spec says of its set."""

    name: str
    title: str
    licence: str
    licence_note: str
    origin: str
    packing: str
    end: str


TINY = SetText(
    name="tiny-v3",
    title="Calibration text for tiny-v3: items of its training mix, none of them held out.",
    licence="Apache-2.0",
    licence_note="generated, the project's own",
    origin="tools.tiny_v3.corpus, seed 20",
    packing="documents",
    end="eos",
)
TINY_HELD_OUT = SetText(
    name="tiny-v3-heldout",
    title="Fidelity text for tiny-v3: items that it was never trained on, disjoint from the set tiny-v3.",
    licence="Apache-2.0",
    licence_note="generated, the project's own",
    origin="tools.tiny_v3.held_out (eval_text.jsonl), then corpus items of seed 21",
    packing="documents",
    end="eos",
)
GENERAL_ORIGIN = (
    f"CPython {platform.python_version()}, standard library: pydoc topics and docstrings (prose), modules (code); "
    "math from tools.calibration_sets, seed {seed}"
)
GENERAL = SetText(
    name="general-math-code",
    title="Calibration text for real models: documentation, worked mathematics, Python sources.",
    licence="PSF-2.0 AND Apache-2.0",
    licence_note="prose and code are PSF-2.0 (PSF-LICENSE.txt), math is the project's own",
    origin=GENERAL_ORIGIN.format(seed=30),
    packing="windows",
    end="none",
)
GENERAL_HELD_OUT = SetText(
    name="general-heldout",
    title="Fidelity text for real models: the kinds of general-math-code, from other modules, topics and seeds.",
    licence="PSF-2.0 AND Apache-2.0",
    licence_note="prose and code are PSF-2.0 (PSF-LICENSE.txt), math is the project's own",
    origin=GENERAL_ORIGIN.format(seed=31),
    packing="windows",
    end="none",
)

SPEC = """\
# {title}

# of the keys of this file
version: 1
name: {name}
# SPDX; {licence_note}
licence: {licence}
# where the text comes from
origin: >-
  {origin}
# beside this file; one {{"domain": ..., "text": ...}} a line
file: {name}.jsonl
# of that file; checked on every read
sha256: {sha256}
# scores are reported for each of them
domains: [{domains}]
# documents: one a sequence; windows: joined and cut to equal length
packing: {packing}
# eos: documents end with the tokenizer's EOS; none: they do not
end: {end}
"""
DOMAINS = ("prose", "math", "code")


def format_spec(text: SetText, sha256: str, domains: Collection[str]) -> str:
    """The spec of a set as YAML."""
    return SPEC.format(
        title=text.title,
        name=text.name,
        licence=text.licence,
        licence_note=text.licence_note,
        origin="\n  ".join(wrap(text.origin, 110)),
        sha256=sha256,
        domains=", ".join(domain for domain in DOMAINS if domain in domains),
        packing=text.packing,
        end=text.end,
    )
