"""`make bench-texts`: does the report's mean KL hold for text that calibration and report lack?

    PYTHONPATH=tests .venv/bin/python -m external.real_model.unseen_kinds \\
        [--model FOLDER] [--place FOLDER] [--recipe gptq4]

For each finished build of text_kinds.py without one kind: the mean over the kinds of the shipped
held-out set `everyday-local-heldout` without that kind, which is the mean of a report that lacks
it, next to the KL of the kind that was left out. An independent reader runs source and artifact in
float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import fmean

from external.real_model.against_peers import compute_figures
from external.real_model.bench import PLACE, Bench, get_artifact_path, print_line, print_table
from external.real_model.measure import ModelComparer
from external.real_model.text_kinds import KINDS, LENGTH, find_data, list_builds, read_kinds
from external.real_model.texts import Sets

from quantkit.io.package_data import locate_folder
from quantkit.texts import corpora

HELD_OUT, WINDOWS = "everyday-local-heldout", 60
"""The set and the windows of the recipe."""
PREFIX = "kl_mean@"


def make_comparer(model: Path) -> ModelComparer:
    """Return a comparer on the held-out set of the recipe, half of it of unseen kinds."""
    corpus = corpora.load_set(HELD_OUT, locate_folder("calibration"))
    tokenizer = corpora.load_tokenizer(model)
    calibrated = [kind.label for kind in KINDS]
    return ModelComparer(
        model, corpora.sample_sequences(corpus, tokenizer, WINDOWS, LENGTH, 0, calibrated)
    )


def compute_report_mean(kinds: Mapping[str, float], left_out: Collection[str] = ()) -> float:
    """Return the mean over kinds, which count equally, of a report without some of them."""
    return fmean(value for label, value in kinds.items() if label not in left_out)


def main() -> None:
    """Print the report's mean and the KL of the kind that it lacks, for each kind left out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=PLACE / "smollm2-135m")
    parser.add_argument("--place", type=Path, default=PLACE / "texts")
    parser.add_argument("--recipe", choices=("gptq4", "awq4"), default="gptq4")
    options = parser.parse_args()
    if find_data() is None:
        print_line("skipped: the texts are not on this machine (set QUANTKIT_DATA)")
        return
    place = options.place.resolve()
    unused = Sets(calibration=place, fidelity=place, form="")
    bench = Bench(model=options.model.resolve(), sets=unused, tokens=place, place=place)
    comparer, labels = make_comparer(bench.model), {kind.label for kind in KINDS}
    rows, reports, lost = list[list[str]](), list[float](), list[float]()
    for build in list_builds(place, options.recipe):
        folder, left_out = get_artifact_path(bench, build, measured=True), build.name.split()[-1]
        if not (folder / "quantkit").exists():
            continue
        figures = compute_figures(comparer, folder)
        kinds = {
            name.removeprefix(PREFIX): figures[name].value
            for name in figures
            if name.startswith(PREFIX)
        }
        report = compute_report_mean(kinds, (left_out,))
        cells = [f"{compute_report_mean(kinds, x):.3f}" for x in (kinds.keys() - labels, labels)]
        row = [build.name, f"{report:.3f}", *cells]
        if "without" in build.name:
            reports.append(report)
            lost.append(read_kinds(folder)[left_out])
            row += [f"{lost[-1]:.3f}", f"{report / lost[-1]:.2f}"]
        rows.append(row)
    if lost:
        ratio = fmean(reports) / fmean(lost)
        rows.append(["mean", f"{fmean(reports):.3f}", "", "", f"{fmean(lost):.3f}", f"{ratio:.2f}"])
    columns = ["build", "report", "its seven kinds", "its other kinds", "left out", "ratio"]
    print_table("mean KL over kinds of a report that lacks a kind, and of that kind", columns, rows)


if __name__ == "__main__":
    main()
