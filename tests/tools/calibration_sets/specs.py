"""The YAML specs of the generated sets, every key with a comment."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from textwrap import wrap


@dataclass(frozen=True, kw_only=True, slots=True)
class SetText:
    """The texts of one spec."""

    name: str
    title: str
    license: str
    license_note: str
    origin: str
    packing: str
    end: str


TINY = SetText(
    name="tiny-v3",
    title="Calibration text for tiny-v3: items of its training mix, none of them held out.",
    license="Apache-2.0",
    license_note="generated, the project's own",
    origin="tools.tiny_v3.corpus, seed 20",
    packing="documents",
    end="eos",
)
TINY_HELD_OUT = SetText(
    name="tiny-v3-heldout",
    title="Fidelity text for tiny-v3: items that it was never trained on, disjoint from the set "
    "tiny-v3.",
    license="Apache-2.0",
    license_note="generated, the project's own",
    origin="tools.tiny_v3.held_out (eval_text.jsonl), then corpus items of seed 21",
    packing="documents",
    end="eos",
)

SPEC = """\
# {title}

# version of the keys of this file
version: 1
name: {name}
# SPDX; {license_note}
licence: {license}
# source of the text
origin: >-
  {origin}
# next to this file; one {{"domain": ..., "text": ...}} per line
file: {name}.jsonl
# sha256 of that file; checked on every read
sha256: {sha256}
# scores are reported per domain
domains: [{domains}]
# documents: one per sequence; windows: joined and cut to equal length
packing: {packing}
# eos: documents end with the tokenizer's EOS; none: without
end: {end}
"""
DOMAINS = ("prose", "math", "code")


def format_spec(text: SetText, sha256: str, domains: Collection[str]) -> str:
    """Return the spec of a set as YAML."""
    return SPEC.format(
        title=text.title,
        name=text.name,
        license=text.license,
        license_note=text.license_note,
        origin="\n  ".join(wrap(text.origin, 110)),
        sha256=sha256,
        domains=", ".join(domain for domain in DOMAINS if domain in domains),
        packing=text.packing,
        end=text.end,
    )
