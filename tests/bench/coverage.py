"""Coverage of kinds of text by calibration sets, for several dampings.

    PYTHONPATH=.:tests python -m bench.coverage --model FOLDER --data ../shared/data

FOLDER holds SmolLM2-135M, DATA the files that DATA/LICENSES.md lists. Two calibration sets, the
built-in kinds alone and a mixture, are run through the first blocks of the model in float32. At
every input of a tapped block the shares follow from an eigendecomposition in float64, so one pass
gives every damping. Printed per damping and set: the mean over inputs and the share at the worst
input of each kind of text; `separation` is the smallest share of a kind that the built-in set does
not have, divided by the largest of a kind that is like it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.io.package_data import locate_folder
from quantkit.texts import corpora
from quantkit.texts.corpora import Tokens

DAMPINGS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
TAPPED = (0, 2, 5, 8, 11)
INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
LENGTH = 512
LICENSE = "see LICENSES.md"
FILES = {
    "wikitext-2/wiki.test.raw": "wiki-test.txt",
    "wikitext-2/valid.tokenized.txt": "wiki-valid.txt",
    "gsm8k/test.jsonl": "gsm8k-test.jsonl",
    "gsm8k/train.jsonl": "gsm8k-train.jsonl",
    "humaneval/HumanEval.jsonl": "humaneval.jsonl",
    "ud/en-web-test.txt": "web-test.txt",
    "ud/de-test.txt": "de-test.txt",
    "ud/fr-test.txt": "fr-test.txt",
    "zh/zh_gsdsimp-ud-test.txt": "zh-test.txt",
    "zh/zh_gsdsimp-ud-dev.txt": "zh-dev.txt",
}
LIKE_BUILT_IN = ("docs", "problems", "sources", "humaneval", "gsm8k")
OTHERS = ("wikitext", "web", "web-de", "web-fr", "web-zh")
SETS = {
    "built-in": """
  - {name: docs, kind: docs, builtin: python-topics, draw: calibration}
  - {name: problems, kind: problems, builtin: word-problems, draw: calibration}
  - {name: sources, kind: sources, builtin: python-modules, draw: calibration}
""",
    "mixture": """
  - {name: wikitext, kind: wikitext, file: wiki-valid.txt}
  - {name: chinese, kind: web, language: zh, file: zh-dev.txt}
  - {name: gsm8k, kind: gsm8k, file: gsm8k-train.jsonl,
     template: "{question}\\n{answer}"}
  - {name: mbpp, kind: mbpp, file: mbpp-train.jsonl,
     template: "{text}\\n{code}"}
""",
    "fidelity": """
  - {name: docs, kind: docs, builtin: python-topics, draw: heldout}
  - {name: problems, kind: problems, builtin: word-problems, draw: heldout}
  - {name: sources, kind: sources, builtin: python-modules, draw: heldout}
  - {name: humaneval, kind: humaneval, file: humaneval.jsonl,
     template: "{prompt}{canonical_solution}"}
  - {name: gsm8k, kind: gsm8k, file: gsm8k-test.jsonl,
     template: "{question}\\n{answer}"}
  - {name: wikitext, kind: wikitext, file: wiki-test.txt}
  - {name: web, kind: web, file: web-test.txt}
  - {name: german, kind: web, language: de, file: de-test.txt}
  - {name: french, kind: web, language: fr, file: fr-test.txt}
  - {name: chinese, kind: web, language: zh, file: zh-test.txt}
""",
}


def write_sets(data: Path, place: Path) -> None:
    """Copy the texts to `place` and write the specs next to them."""
    for source, name in FILES.items():
        shutil.copy(data / source, place / name)
    rows = [json.loads(line) for line in (data / "mbpp/mbpp.jsonl").open(encoding="utf-8")]
    train = [json.dumps(row) + "\n" for row in rows if row["task_id"] >= 601]
    (place / "mbpp-train.jsonl").write_text("".join(train), encoding="utf-8")
    for name, parts in SETS.items():
        licensed = parts.replace("{name:", f"{{licence: {LICENSE}, name:")
        (place / f"{name}.yaml").write_text(f"version: 2\nname: {name}\nparts:{licensed}")


class Observer:
    """A model cut to its first blocks, and the inputs of its tapped modules."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model
        self.model.layers = self.model.layers[: TAPPED[-1] + 1]
        self.inputs: dict[str, Tensor] = {}
        for block in TAPPED:
            for name in INPUTS:
                module = self.model.layers[block].get_submodule(name)
                module.register_forward_pre_hook(self._make_hook(f"{block}.{name}"))

    def _make_hook(self, key: str) -> Callable[[object, tuple[Tensor, ...]], None]:
        def hook(_: object, args: tuple[Tensor, ...]) -> None:
            self.inputs[key] = args[0][0]

        return hook

    def run(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the inputs [n, in] of one sequence [n]."""
        with torch.no_grad():
            self.model(ids.long()[None], use_cache=False)
        return dict(self.inputs)


def sum_grams(observer: Observer, tokens: Tokens) -> dict[str, Tensor]:
    """Return the gram of every input."""
    grams = dict[str, Tensor]()
    for i in range(tokens.n_sequences):
        for key, x in observer.run(tokens.sequence(i)).items():
            grams[key] = x.T @ x + grams.get(key, torch.zeros(()))
    return grams


def measure(grams: Mapping[str, Tensor], observer: Observer, text: Tokens) -> dict[str, Tensor]:
    """Return kind -> mean unspanned shares [inputs, dampings]."""
    dampings, parts = torch.tensor(DAMPINGS, dtype=torch.float64), {}
    for key, gram in grams.items():
        sizes = gram.double().diagonal().sqrt()
        values, directions = torch.linalg.eigh(gram.double() / sizes[:, None] / sizes)
        parts[key] = (sizes, directions, dampings / (values.clamp_min(0)[:, None] + dampings))
    shares = dict[str, list[Tensor]]()
    for i in range(text.n_sequences):
        inputs, rows = observer.run(text.sequence(i)), []
        for key, (sizes, directions, weights) in parts.items():
            energy = ((inputs[key].double() / sizes) @ directions).square()  # [n, in]
            rows.append((energy @ weights / energy.sum(1, keepdim=True)).mean(0))  # [dampings]
        shares.setdefault(text.domains[i], []).append(torch.stack(rows))
    return {kind: torch.stack(each).mean(0) for kind, each in shares.items()}


def print_table(shares: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Print a row per damping, set and reduction over inputs."""
    kinds = (*LIKE_BUILT_IN, *OTHERS)
    print(" | ".join(("damping", "set", "over inputs", *kinds, "separation")))
    for index, damping in enumerate(DAMPINGS):
        for name, by_kind in shares.items():
            for how in ("mean", "worst"):
                column = {kind: by_kind[kind][:, index] for kind in kinds}
                row = {
                    kind: float(x.mean() if how == "mean" else x.max())
                    for kind, x in column.items()
                }
                split = min(row[kind] for kind in OTHERS) / max(row[kind] for kind in LIKE_BUILT_IN)
                cells = (f"{damping:g}", name, how, *(f"{row[kind]:.3f}" for kind in kinds))
                print(" | ".join((*cells, f"{split:.2f}")), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=24, help="of a calibration set")
    parser.add_argument("--windows", type=int, default=30, help="of the fidelity text")
    options = parser.parse_args()
    tokenizer, observer = corpora.load_tokenizer(options.model), Observer(options.model)
    with tempfile.TemporaryDirectory() as place:
        write_sets(options.data, Path(place))
        texts = {
            name: corpora.sample_sequences(
                corpora.load_set(f"{place}/{name}.yaml", locate_folder("calibration")),
                tokenizer,
                options.windows if name == "fidelity" else options.sequences,
                LENGTH,
                0,
            )
            for name in SETS
        }
    fidelity = texts.pop("fidelity")
    print_table({
        name: measure(sum_grams(observer, text), observer, fidelity) for name, text in texts.items()
    })


if __name__ == "__main__":
    main()
