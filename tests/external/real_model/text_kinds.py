"""`make bench-texts`: how far calibration carries over to kinds of text, on SmolLM2-135M-Instruct.

    PYTHONPATH=tests .venv/bin/python -m external.real_model.text_kinds \\
        [--model FOLDER] [--place FOLDER] [--recipe gptq4 awq4] [--only NAME ...] [--shrinkage A]

Each build calibrates on 128 x 512 tokens of one set and is measured on the same seven kinds of
text, of which none of the sets contains a document. Sets: the interpreter's text, WikiText-2
alone, a mixture of all seven kinds, the mixture without one kind in turn, text of the model itself.
RTN is the reference. Reports of earlier runs are read and not built again; remove an artifact to
repeat it. The texts are those of QUANTKIT_DATA, or next to the checkout; nothing is run without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from external.real_model.bench import (
    PLACE,
    ROOT,
    Bench,
    Build,
    build_artifact,
    get_artifact_path,
    print_line,
    print_table,
)
from external.real_model.texts import Sets

from quantkit.artifact.read_report import read_report
from quantkit.texts import corpora

SEQUENCES, LENGTH = 128, 512
SHARED_SEQUENCES = 32
"""For the comparison with other tools."""
WINDOWS = 8
"""Windows of each kind in the fidelity text: 4,096 tokens."""
MBPP_TRAIN = range(601, 975)
"""Task ids that no evaluation uses."""


@dataclass(frozen=True, kw_only=True)
class TextKind:
    """A kind of text with a file to calibrate on and one to measure on, below QUANTKIT_DATA."""

    part: str
    kind: str
    language: str
    calibration: str
    fidelity: str
    template: tuple[str, str] = ("{text}", "{text}")

    @property
    def label(self) -> str:
        """The label of the report."""
        return self.kind if self.language == "en" else f"{self.kind}-{self.language}"


KINDS = (
    TextKind(
        part="encyclopedia",
        kind="prose",
        language="en",
        calibration="wikitext-2/valid.tokenized.txt",
        fidelity="wikitext-2/wiki.test.raw",
    ),
    TextKind(
        part="web",
        kind="web",
        language="en",
        calibration="ud/en-web-dev.txt",
        fidelity="ud/en-web-test.txt",
    ),
    TextKind(
        part="math",
        kind="math",
        language="en",
        calibration="gsm8k/train.jsonl",
        fidelity="gsm8k/test.jsonl",
        template=("{question}\n{answer}", "{question}\n{answer}"),
    ),
    TextKind(
        part="code",
        kind="code",
        language="en",
        calibration="mbpp/train.jsonl",
        fidelity="humaneval/HumanEval.jsonl",
        template=("{text}\n{code}", "{prompt}{canonical_solution}"),
    ),
    TextKind(
        part="chinese",
        kind="web",
        language="zh",
        calibration="zh/zh_gsdsimp-ud-dev.txt",
        fidelity="zh/zh_gsdsimp-ud-test.txt",
    ),
    TextKind(
        part="german",
        kind="web",
        language="de",
        calibration="ud/de-dev.txt",
        fidelity="ud/de-test.txt",
    ),
    TextKind(
        part="french",
        kind="web",
        language="fr",
        calibration="ud/fr-dev.txt",
        fidelity="ud/fr-test.txt",
    ),
)
SEED_SETS = {"today": "general-math-code", "self": "self"}


def find_data() -> Path | None:
    """Return the folder of the texts, or None."""
    folders = [ROOT.parent / "shared" / "data"]
    if data := os.environ.get("QUANTKIT_DATA"):
        folders.insert(0, Path(data))
    names = {name for kind in KINDS for name in (kind.calibration, kind.fidelity)}
    names = {name.replace("mbpp/train", "mbpp/mbpp") for name in names}
    return next((p for p in folders if all((p / name).is_file() for name in names)), None)


def copy_texts(data: Path, place: Path) -> None:
    """Copy the texts to `place`, next to the specs; of MBPP only what may be calibrated on."""
    for kind in KINDS:
        for name in (kind.calibration, kind.fidelity):
            target = place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name != "mbpp/train.jsonl":
                shutil.copyfile(data / name, target)
    rows = (data / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [row for row in rows if json.loads(row)["task_id"] in MBPP_TRAIN]
    (place / "mbpp" / "train.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")


def write_mixture(place: Path, name: str, kinds: Sequence[TextKind], *, held_out: bool) -> Path:
    """Write the spec of a mixture in which all kinds have equal shares."""
    parts = [
        {
            "name": kind.part,
            "kind": kind.kind,
            "language": kind.language,
            "licence": "see the file's source",
            "file": kind.fidelity if held_out else kind.calibration,
            "template": kind.template[held_out],
        }
        for kind in kinds
    ]
    path = place / f"{name}.yaml"
    path.write_text(json.dumps({"version": 2, "name": name, "parts": parts}), encoding="utf-8")
    return path


def list_sets(place: Path) -> Iterator[tuple[str, str]]:
    """Write the specs; yield the name of each build and its calibration set."""
    yield "today", SEED_SETS["today"]
    yield "wikitext", str(write_mixture(place, "wikitext", KINDS[:1], held_out=False))
    yield "mixture", str(write_mixture(place, "mixture", KINDS, held_out=False))
    yield "self", SEED_SETS["self"]
    for left_out in KINDS:
        kinds = [kind for kind in KINDS if kind != left_out]
        name = f"without {left_out.label}"
        yield name, str(write_mixture(place, name.replace(" ", "-"), kinds, held_out=False))


def prepare_mixture_bench(model: Path, place: Path) -> Bench | None:
    """Cut the mixture for tools that share one text: 32 x 512 tokens of all seven kinds.

    Print a message and return None if the texts are not available.
    """
    data = find_data()
    if data is None:
        print_line("skipped: the texts are not on this machine (set QUANTKIT_DATA)")
        return None
    model, place = model.resolve(), (place / "texts").resolve()
    copy_texts(data, place)
    sets = Sets(
        calibration=write_mixture(place, "mixture", KINDS, held_out=False),
        fidelity=write_mixture(place, "kinds", KINDS, held_out=True),
        form="",
    )
    tokenizer = corpora.load_tokenizer(model)
    corpus = corpora.load_set(str(sets.calibration), place)
    rows = corpora.sample_sequences(corpus, tokenizer, SHARED_SEQUENCES, LENGTH, 0)
    tokens = place / "calibration-tokens.json"
    sequences = [list(row.ids) for row in rows.select(range(rows.n_sequences))]
    tokens.write_text(json.dumps(sequences))
    return Bench(
        model=model,
        sets=sets,
        tokens=tokens,
        place=place,
        sequences=SHARED_SEQUENCES,
        windows=WINDOWS * len(KINDS),
    )


def list_builds(place: Path, recipe: str, shrinkage: str = "") -> Iterator[Build]:
    """Yield RTN and a build for each calibration set, with `calibration.shrinkage` if given."""
    fidelity = str(write_mixture(place, "kinds", KINDS, held_out=True))
    common = {
        "fidelity.set": fidelity,
        "fidelity.windows": str(WINDOWS * len(KINDS)),
        "fidelity.length": str(LENGTH),
    }
    rtn = {"quantize.method": "rtn", "quantize.rounding": "nearest", "calibration": "null"}
    name = f"smollm2-135m-{recipe}"
    yield Build(name=f"{recipe} RTN", recipe=name, changes={**common, **rtn})
    for title, calibration in list_sets(place):
        text = {"calibration.set": calibration, "calibration.sequences": str(SEQUENCES)}
        text |= {"calibration.shrinkage": "0"} if title == "today" else {}
        text |= {"calibration.shrinkage": shrinkage} if shrinkage else {}
        mark = f" shrinkage {shrinkage}" if shrinkage else ""
        yield Build(name=f"{recipe} {title}{mark}", recipe=name, changes={**common, **text})


def read_kinds(folder: Path) -> dict[str, float]:
    """Return the mean KL of each kind of text in an artifact's report."""
    report = read_report(folder)
    return {
        row.domain: row.kl_mean.value
        for row in report.distribution
        if row.domain and row.kl_mean and row.kl_mean.value is not None
    }


def print_figures(bench: Bench, builds: Sequence[Build]) -> None:
    """Print the mean KL of each build and kind, and its ratio to RTN."""
    labels = [kind.label for kind in KINDS]
    rows = list[list[str]]()
    rtn = dict[str, dict[str, float]]()
    for build in builds:
        folder = get_artifact_path(bench, build, measured=True)
        if not (folder / "quantkit").exists():
            continue
        recipe, figures = build.name.split()[0], read_kinds(folder)
        rtn.setdefault(recipe, figures)
        cells = [
            f"{figures[label]:.3f} ({figures[label] / rtn[recipe][label]:.2f})" for label in labels
        ]
        mean = sum(figures[label] for label in labels) / len(labels)
        rows.append([build.name, *cells, f"{mean:.3f}", f"{max(figures.values()):.3f}"])
    print_table("mean KL (ratio to RTN)", ["build", *labels, "mean", "worst"], rows)


def main() -> None:
    """Build missing artifacts, print the table after each build."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=PLACE / "smollm2-135m")
    parser.add_argument("--place", type=Path, default=PLACE / "texts")
    parser.add_argument("--recipe", nargs="+", choices=("gptq4", "awq4"), default=["gptq4", "awq4"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="builds, as in the first column")
    parser.add_argument("--shrinkage", default="", help="of grams; adds its builds to the table")
    options = parser.parse_args()
    data = find_data()
    if data is None:
        print_line("skipped: the texts are not on this machine (set QUANTKIT_DATA)")
        return
    place = options.place.resolve()
    copy_texts(data, place)
    unused = Sets(calibration=place, fidelity=place, form="")
    bench = Bench(model=options.model.resolve(), sets=unused, tokens=place, place=place)
    marks = ("", options.shrinkage) if options.shrinkage else ("",)
    listed = [x for recipe in options.recipe for a in marks for x in list_builds(place, recipe, a)]
    builds = list({build.name: build for build in listed}.values())  # RTN once
    for build in builds:
        title = build.name.partition(" ")[2]
        if options.only and title not in options.only:
            continue
        if not (get_artifact_path(bench, build, measured=True) / "quantkit").exists():
            print_line(f"{build.name} ...")
            cost = build_artifact(bench, build, measured=True)
            print_line(f"{build.name}: {cost.cpu_s:.0f} CPU s")
    print_figures(bench, builds)


if __name__ == "__main__":
    main()
