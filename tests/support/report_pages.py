"""The example report as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from support.report_example import FIDELITY
from support.report_large import make_item, write_samples
from support.report_variants import GATES

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.report import gates

LIMIT_BYTES = 3_000_000


HOSTILE = (
    "</script><script>hacked=1</script>",
    "<img src=x onerror=hacked=1>",
    '"><svg onload=hacked=1>',
    "{{ 7 * 7 }}",
    "'-alert(1)-'",
    "<!--",
    "]]>",
    "javascript:alert(1)",
    "\x00\x1b[2J\u202edrawkcab\ud800",
    "</pre></article></main>",
)


class Page(HTMLParser):
    """A parsed page: tags with attribute names, text by element, links, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.marks: list[str] = []
        self.words: list[str] = []
        self.inside: str = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.values += [(name, value or "") for name, value in attrs]
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words.append(data)
        if self.inside == "mark":
            self.marks.append(data)

    @property
    def drawings(self) -> dict[str, Any]:
        """The data of the plots."""
        values: dict[str, Any] = json.loads(self.scripts[0])
        return values


def make_judged_example(changes: Mapping[str, Any] | None = None) -> Fidelity:
    return gates.apply_gates(GATES, Fidelity.model_validate({**FIDELITY, **(changes or {})}))


def write_artifact_folder(place: Path, fidelity: Fidelity, items: int = 0) -> Path:
    """Write the files of an artifact that the page reads."""
    (place / "quantkit").mkdir(parents=True, exist_ok=True)
    (place / "quantkit/fidelity.json").write_text(fidelity.to_json())
    if items:
        write_samples(place, items)
    return place


def make_hostile_report(text: str, long: str) -> tuple[Fidelity, list[dict[str, object]]]:
    """Return a report and samples with `text` wherever a model, checkpoint or recipe can
    supply it."""
    artifact: dict[str, Any] = dict(FIDELITY["artifact"])  # type: ignore[call-overload]
    source: dict[str, Any] = dict(FIDELITY["source"])  # type: ignore[call-overload]
    names = ("name", "format", "scheme")
    rule = {
        "label": text,
        "match": text,
        "action": text,
        "modules": 1,
        "parameters": 8,
        "bytes_before": 8,
    }
    module = {
        "name": f"a.1.{text}",
        "rule": text,
        "method": text,
        "scheme": text,
        "relative_error": 0.1,
    }
    fidelity = Fidelity.model_validate({
        **FIDELITY,
        "artifact": {
            **artifact,
            **dict.fromkeys(names, text),
            "notes": [text],
            "tags": [text],
            "rules": [{**rule, "bytes_after": 4, "bits_per_weight": 4.0}],
            "serving": [{"engine": text, "command": text}],
            "roles": [{**artifact["roles"][0], "role": text, "stored": text, "reason": text}],
        },
        "source": {
            **source,
            "model": text,
            "revision": text,
            "hash": text,
            "baseline": text,
            "license": {"id": text, "name": text},
        },
        "calibration": {**dict(FIDELITY["calibration"]), "set": text, "description": text},  # type: ignore[call-overload]
        "distribution": [{"domain": text, "tokens": 3, "kl_mean": {"value": 0.1}}],
        "blocks": [{"block": text, "relative_error": 0.1}],
        "routers": [{"block": text, "agreement": 0.1}],
        "modules": [
            {**module, "fallback": text},
            {**module, "output_relative_error": 0.2, "rounding": text},
        ],
        "experts": {
            "min_tokens": 9,
            "policy": text,
            "layers": [{"block": text, "tokens": [1, 20]}],
        },
        "fallbacks": [{"kind": text, "meaning": text, "modules": [text]}],
        "benchmarks": [
            {"task": text, "metric": text, "n": 2, "verdict": text, "data_sha256": text},
            {"task": "gsm8k", "status": "not run", "reason": text},
        ],
        "gates": [{"figure": text, "bound": text, "value": 1.0, "ok": None, "reason": text}],
        "versions": {text: text},
        "hashes": {text: text},
        "command": text,
    })
    items = []
    for number in range(4):
        row = {
            **make_item(number * 3, ""),
            "task": text,
            "filter": text,
            "prompt": long,
            "target": long[:100],
        }
        row |= {
            "base_response": f"same {long}",
            "quant_response": f"sane {long}",
            "base_outcome": text,
        }
        items.append({**row, "quant_outcome": text})
    return fidelity, items
