"""`quantkit diff` and `quantkit runs` with artifacts of the built-in model: output and exit
codes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from scipy import stats
from support.command_line import build, read_error, run
from support.constants import FAST

from quantkit.artifact.layout import BENCHMARK_SAMPLES, SOLUTION_SAMPLES, TOKEN_SAMPLES
from quantkit.io.package_data import locate_folder
from quantkit.report import runs

SOURCE = "builtin:tiny-v3"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two artifacts with benchmarks: experts packed in 4 bits, and in 2 bits unpacked, which
    flips a few answers."""
    from quantkit import pipeline
    from quantkit.recipe.parse import parse_recipe

    place = tmp_path_factory.mktemp("both")
    text = (locate_folder("recipes") / "tiny-v3-awq4.yaml").read_text(encoding="utf-8")
    paths = place / "four", place / "two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_CACHE", str(place / "cache"))
        for path, changes in zip(
            paths, ({}, {"quantize.bits": "2", "format": "dense"}), strict=True
        ):
            keys = {
                **FAST,
                "fidelity.length": "512",
                "evaluation.tasks": "[tiny-v3-math]",
                "evaluation.limit": "24",
                "output.path": str(path),
            }
            keys["evaluation.likelihood"] = "8"
            gates = {"gates": "{kl_mean: {max: 0.01}, tiny-v3-math: {margin_pp: 20}}"}
            recipe = parse_recipe(text, "tiny-v3-awq4.yaml", {**keys, **gates, **changes})
            pipeline.build_artifacts(
                recipe,
                text,
                overwrite=False,
                evaluate=True,
                on_plan=lambda _: None,
                on_progress=lambda _: None,
            )
    shutil.rmtree(place / "cache", ignore_errors=True)
    yield paths


def copy_resealed(source: Path, place: Path, change: Callable[[Path], None]) -> Path:
    """Return a copy with changed files and a manifest that agrees with them."""
    copied = Path(shutil.copytree(source, place))
    change(copied)
    manifest = json.loads((copied / "quantkit/manifest.json").read_text())
    for name in manifest["files"]:
        content = (copied / name).read_bytes()
        manifest["files"][name] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
    (copied / "quantkit/manifest.json").write_text(json.dumps(manifest))
    return copied


def replace_column(path: Path, name: str, values: list[Any]) -> None:
    """Replace a column of a Parquet file."""
    table = parquet.read_table(path)
    parquet.write_table(
        table.set_column(table.schema.get_field_index(name), name, arrow.array(values)), path
    )


# ----------------------------------------------------------------------------------------- the diff


def test_figures_match_the_samples(both: tuple[Path, Path]) -> None:
    """Recomputed here from the files with scipy, artifact by artifact."""
    result = run("diff", *both, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    values = json.loads(result.stdout)
    scores = [
        parquet.read_table(path / BENCHMARK_SAMPLES)["quant_score"].to_pylist() for path in both
    ]
    lost = sum(a > b for a, b in zip(*scores, strict=True))
    gained = sum(b > a for a, b in zip(*scores, strict=True))
    (row,) = values["benchmarks"]
    assert (row["n"], row["lost"], row["gained"]) == (24, lost, gained) and lost + gained > 0
    assert row["mcnemar_p"] == pytest.approx(
        stats.binomtest(min(lost, gained), lost + gained).pvalue
    )
    assert len(values["flips"]) == lost + gained and values["compared_items"] == 24
    kl = [parquet.read_table(path / TOKEN_SAMPLES)["kl"].to_numpy() for path in both]
    pooled = next(
        r for r in values["distribution"] if (r["domain"], r["figure"]) == ("all", "kl_mean")
    )
    assert pooled["ratio"]["value"] == pytest.approx(kl[1].mean() / kl[0].mean())
    typical = np.exp((np.log(np.maximum(kl[1], 1e-9)) - np.log(np.maximum(kl[0], 1e-9))).mean())
    assert values["kl"][0]["typical"]["value"] == pytest.approx(typical)
    assert values["kl"][0]["documents"] > 1
    assert pooled["resolved"] == "worse"
    (gold,) = values["likelihood"]
    pairs = [parquet.read_table(path / SOLUTION_SAMPLES)["artifact"].to_numpy() for path in both]
    assert (
        gold["difference"]["value"] == pytest.approx((pairs[1] - pairs[0]).mean())
        and gold["n"] == 8
    )
    assert values["b"]["status"] == "rejected" and values["a"]["status"] == "accepted"


def test_diff_lists_the_changed_keys_and_tensors(both: tuple[Path, Path]) -> None:
    values = json.loads(run("diff", *both, "--json").stdout)
    assert {row["key"]: (row["a"], row["b"]) for row in values["recipe"]} == {
        "quantize.bits": ("4", "2"),
        "format": ('["awq"]', '["dense"]'),
    }
    changed = {(row["change"], row["a"], row["b"]): row["count"] for row in values["tensors"]}
    assert changed["removed", "I32", "none"] == 2 * 144 and changed["added", "none", "BF16"] == 144
    plan = {row["key"]: (row["a"], row["b"]) for row in values["plan"]}
    assert plan["rules[0].action"] == ("rtn int4 g128 asymmetric", "rtn int2 g128 asymmetric")
    assert plan["totals.tensors"] == ("489", "201") and "totals.parameters" not in plan
    (packed,) = values["decisions"]
    assert (packed["a"], packed["b"], packed["count"]) == (
        "rtn int4 g128 asymmetric",
        "rtn int2 g128 asymmetric",
        144,
    )
    assert packed["names"][0] == "model.layers.{1-3}.mlp.experts.{0-15}.gate_proj"
    assert len(values["modules"]) == 144 and {row["by"] for row in values["modules"]} == {"weights"}
    shifts = [abs(row["shift"]) for row in values["modules"]]
    assert shifts == sorted(shifts, reverse=True) and min(shifts) > 0.1


def test_every_view_shows_the_same_result(both: tuple[Path, Path], tmp_path: Path) -> None:
    shown, comment = run("diff", *both), run("diff", *both, "--markdown")
    page = run("diff", *both, "--html", "--output", tmp_path / "diff.html")
    assert {result.exit_code for result in (shown, comment, page)} == {0}
    assert page.stdout == f"{tmp_path / 'diff.html'}\n"
    html = (tmp_path / "diff.html").read_text()
    for words in ("four", "quantize.bits", "int2 g128", "KL of a typical token", "worse"):
        assert (
            words in shown.stdout.replace("\n", " ") and words in comment.stdout and words in html
        ), words
    assert run("diff", *both, "--html").stdout == html
    written = run("diff", *both, "--markdown", "--output", tmp_path / "diff.md")
    assert (written.exit_code, (tmp_path / "diff.md").read_text()) == (0, comment.stdout)


def test_artifact_is_compared_with_its_source(both: tuple[Path, Path]) -> None:
    """Nothing was lost in the source; both orders."""
    values = json.loads(run("diff", SOURCE, both[0], "--json").stdout)
    assert (values["a"]["kind"], values["a"]["name"]) == ("source", SOURCE)
    pooled = next(
        r for r in values["distribution"] if (r["domain"], r["figure"]) == ("all", "kl_mean")
    )
    report = json.loads((both[0] / "quantkit/fidelity.json").read_text())
    (row,), (mine,) = values["benchmarks"], report["benchmarks"]
    assert (row["a"], row["b"], row["lost"], row["gained"]) == (
        mine["source"], mine["artifact"], mine["lost"], mine["gained"],
    )  # fmt: skip
    assert pooled["a"] == 0 and pooled["difference"]["value"] == pytest.approx(pooled["b"])
    assert {(r["change"], r["a"]) for r in values["tensors"]} >= {
        ("removed", "F8_E4M3"),
        ("dtype", "F8_E4M3"),
    }
    back = json.loads(run("diff", both[0], SOURCE, "--json").stdout)
    assert back["benchmarks"][0]["lost"] == row["gained"] and back["b"]["kind"] == "source"


def test_single_reports_are_compared(both: tuple[Path, Path], tmp_path: Path) -> None:
    inside = run(
        "diff", both[0] / "quantkit/fidelity.json", both[1] / "quantkit/fidelity.json", "--json"
    )
    assert json.loads(inside.stdout) == json.loads(run("diff", *both, "--json").stdout), (
        "they lie in artifacts"
    )
    reports = [
        shutil.copy(path / "quantkit/fidelity.json", tmp_path / f"{path.name}.json")
        for path in both
    ]
    for pair in (reports, [reports[0], both[1]]):
        result = run("diff", *pair)
        assert result.exit_code == 0
        assert (
            "is a single fidelity.json" in result.stdout
            and "not paired" in result.stdout.replace("\n", " ")
        )


# ----------------------------------------------------------------------------------------- refusals


def test_different_prompts_are_rejected(both: tuple[Path, Path], tmp_path: Path) -> None:
    def asked_otherwise(path: Path) -> None:
        hashes = parquet.read_table(path / BENCHMARK_SAMPLES)["prompt_hash"].to_pylist()
        replace_column(path / BENCHMARK_SAMPLES, "prompt_hash", ["0" * 64, *hashes[1:]])

    other = copy_resealed(both[1], tmp_path / "other", asked_otherwise)
    message = read_error(run("diff", both[0], other), 1)
    assert message.startswith(
        "tiny-v3-math: the prompt of item 0 differs between four and other (prompt_hash differs)"
    )
    partial = run("diff", both[0], other, "--partial", "--json")
    values = json.loads(partial.stdout)
    assert (
        partial.exit_code == 0
        and values["flips"] == []
        and values["left_out"][0].startswith("tiny-v3-math: the prompt")
    )
    assert values["distribution"][0]["ratio"] is not None


def test_different_sources_are_rejected(both: tuple[Path, Path], tmp_path: Path) -> None:
    def from_elsewhere(path: Path) -> None:
        report = json.loads((path / "quantkit/fidelity.json").read_text())
        report["source"] |= {"hash": "0" * 64, "model": "org/other"}
        (path / "quantkit/fidelity.json").write_text(json.dumps(report))

    other = copy_resealed(both[1], tmp_path / "other", from_elsewhere)
    assert "figures against different sources are not comparable" in read_error(
        run("diff", both[0], other), 1
    )
    values = json.loads(run("diff", both[0], other, "--partial", "--json").stdout)
    assert (
        values["benchmarks"] == values["modules"] == values["distribution"] == []
        and values["tensors"]
        and values["sizes"]
    )
    message = read_error(run("diff", SOURCE, other), 2)
    assert message.startswith(
        f"{SOURCE}: expected other's source org/other (000000000000), found another model"
    )


def test_changed_samples_are_rejected(both: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(both[1], tmp_path / "other"))
    replace_column(other / BENCHMARK_SAMPLES, "quant_score", [1.0] * 24)
    assert read_error(run("diff", both[0], other), 1).startswith(
        f"{other / BENCHMARK_SAMPLES}: expected the file that"
    )


def change_manifest(part: str, value: object) -> Callable[[Path], None]:
    """Return a change of the manifest."""

    def change(path: Path) -> None:
        manifest = json.loads((path / "quantkit/manifest.json").read_text())
        (path / "quantkit/manifest.json").write_text(json.dumps({**manifest, part: value}))

    return change


def change_plan(part: str, value: object) -> Callable[[Path], None]:
    """Return a change of the plan."""

    def change(path: Path) -> None:
        plan = json.loads((path / "quantkit/plan.json").read_text())
        (path / "quantkit/plan.json").write_text(json.dumps({**plan, part: value}))

    return change


def damage_tokens(path: Path) -> None:
    """Replace the token samples by an invalid file."""
    (path / TOKEN_SAMPLES).write_bytes(b"PAR1")


DAMAGED: list[tuple[Callable[[Path], None], str]] = [
    (
        change_manifest("tensors", {"x": ["BF16", ["a"]]}),
        "tensors: expected whole numbers, found 'a'",
    ),
    (change_manifest("tensors", {"x": "BF16"}), "tensors: expected [dtype, shape], found 'BF16'"),
    (change_manifest("versions", []), "versions: expected an object, found list"),
    (change_plan("recipe", 3), "recipe: expected an object, found int"),
    (change_plan("decisions", None), "decisions: expected an object, found NoneType"),
    (
        lambda path: replace_column(path / BENCHMARK_SAMPLES, "quant_score", ["1"] * 24),
        "quant_score: expected double, found string",
    ),
    (
        lambda path: replace_column(path / BENCHMARK_SAMPLES, "prompt", ["x"] * 23 + [None]),
        "prompt: expected no null value",
    ),
    (damage_tokens, "expected samples with the columns"),
]


@pytest.mark.parametrize(("change", "sentence"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_are_named(
    both: tuple[Path, Path], tmp_path: Path, change: Callable[[Path], None], sentence: str
) -> None:
    """Also if the manifest agrees; never a traceback."""
    assert sentence in read_error(
        run("diff", both[0], copy_resealed(both[1], tmp_path / "other", change)), 1
    )


def test_diff_rejects_other_paths(both: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_text("{}")
    assert "expected an artifact or a fidelity.json among the two, found none" in read_error(
        run("diff", SOURCE, SOURCE), 2
    )
    assert "found another folder" in read_error(run("diff", both[0], tmp_path / "empty"), 1)
    assert "x.json: artifact: Field required" in read_error(
        run("diff", both[0], tmp_path / "x.json"), 1
    )
    message = read_error(run("diff", both[0], tmp_path / "absent"), 2)
    assert f"or four's source {SOURCE}, found none" in message
    for options in (["--html", "--json"], ["--json", "--markdown"], ["--output", "x"]):
        assert ": expected " in read_error(run("diff", *both, *options), 2)


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def shelf(both: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two artifacts, one of them nested, and four broken ones."""
    place = tmp_path_factory.mktemp("shelf")
    shutil.copytree(both[0], place / "four")
    shutil.copytree(both[1], place / "more" / "two")
    changed = Path(shutil.copytree(both[0], place / "changed"))
    (changed / "quantkit/fidelity.json").write_text("{")
    (Path(shutil.copytree(both[0], place / "unsealed")) / "quantkit/manifest.json").unlink()
    shutil.copytree(both[0] / "quantkit", place / "half.building" / "quantkit")
    (place / "model").mkdir()
    (place / "model" / "model.safetensors").write_bytes(b"")
    (place / "notes").mkdir()
    return place


def test_runs_lists_artifacts_and_marks_the_front(shelf: Path) -> None:
    """The unpacked 2-bit artifact is larger and has more KL: only the packed one is on the
    front."""
    result = run("runs", shelf, "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert {name: row["status"] for name, row in rows.items()} == {
        "four": "accepted", "more/two": "rejected", "changed": "broken", "unsealed": "broken",
        "half.building": "broken", "model": "broken",
    }  # fmt: skip
    assert (rows["four"]["front"], rows["more/two"]["front"]) == (True, False)
    assert (
        rows["four"]["size"] < rows["more/two"]["size"]
        and rows["four"]["kl"] < rows["more/two"]["kl"]
    )
    report = json.loads((shelf / "four/quantkit/fidelity.json").read_text())
    assert rows["four"]["kl"] == report["distribution"][0]["kl_mean"]["value"]
    assert rows["four"]["tasks"] == {"tiny-v3-math": report["benchmarks"][0]["artifact"]}
    (row,) = report["benchmarks"]
    assert rows["four"]["n"] == {"tiny-v3-math": row["n"]}
    assert rows["four"]["recovery"] == {"tiny-v3-math": row["recovery"]["value"]}
    assert (
        "names, found another" in rows["changed"]["fault"]
        and "interrupted build" in rows["half.building"]["fault"]
    )


def test_runs_table(shelf: Path) -> None:
    shown = run("runs", shelf).stdout
    lines = [line for line in shown.splitlines() if "four" in line or "more/two" in line]
    assert (
        lines[0].startswith("*  four")
        and "accepted" in lines[0]
        and lines[1].startswith("   more/two")
    )
    assert "Broken" in shown and "unsealed" in shown and "not comparable" not in shown
    assert all(" % of " in line and line.rstrip().endswith(" %)") for line in lines[2:])
    assert run("runs", shelf / "notes").stdout == f"{shelf / 'notes'}: no artifact in it\n"


@pytest.mark.parametrize(
    ("options", "first"),
    [([], "four"), (["--sort", "kl"], "four"), (["--sort", "kl", "--reverse"], "more/two"),
     (["--sort", "top1", "--reverse"], "more/two"), (["--sort", "tiny-v3-math"], "four"),
     (["--sort", "name"], "changed"), (["--sort", "top1"], "four"), (["--sort", "format"], "four")],
)  # fmt: skip
def test_runs_are_sorted_by_any_column(shelf: Path, options: list[str], first: str) -> None:
    rows = json.loads(run("runs", shelf, "--json", *options).stdout)
    assert rows[0]["name"] == first and len(rows) == 6
    if options[1:2] != ["name"]:
        assert [row["status"] for row in rows[2:]] == ["broken"] * 4


def test_scores_of_different_items_are_marked(shelf: Path) -> None:
    whole = next(run for run in runs.read_runs(shelf) if run.name == "four")
    assert whole.fidelity is not None
    (row,) = whole.fidelity.benchmarks
    fewer = whole.fidelity.model_copy(
        update={"benchmarks": (row.model_copy(update={"n": row.n + 1}),)}
    )
    content = runs.make_score_table([whole, replace(whole, name="other", fidelity=fewer)])
    assert "Not comparable, because items differ: tiny-v3-math." in content.note
    assert f" of {row.n} (" in content.rows[0][1] and f" of {row.n + 1} (" in content.rows[1][1]


def test_runs_rejects_invalid_folders(shelf: Path, tmp_path: Path) -> None:
    assert "Did you mean 'kl'?" in read_error(run("runs", shelf, "--sort", "kll"), 2)
    assert "expected a folder of artifacts, found none" in read_error(
        run("runs", tmp_path / "absent"), 2
    )
    assert "expected a folder of artifacts, found an artifact" in read_error(
        run("runs", shelf / "four"), 2
    )


def test_build_without_benchmarks_is_listed(tmp_path: Path) -> None:
    assert build(tmp_path / "shelf" / "a", fidelity="none", gates="{}").exit_code == 0
    (row,) = json.loads(run("runs", tmp_path / "shelf", "--json").stdout)
    assert (row["kl"], row["front"], row["tasks"]) == (
        None,
        False,
        {"tiny-v3-math": None, "tiny-v3-code": None},
    )
    assert run("runs", tmp_path / "shelf").exit_code == 0
