"""`make survey`: which types of transformers does quantkit quantize, and are its figures true?

    PYTHONPATH=tests .venv/bin/python -m external.survey.run RESULTS.jsonl \\
        [--groups dense,mixtures,wrappers,variants] [--only A,B] [--plan-only] [--set KEY=VALUE]

For each type: a small random checkpoint of transformers' own class, `quantkit plan`, `quantkit
build`, then transformers loads source and artifact and computes the KL again. RESULTS.jsonl gets
one line per type; types that have a line are skipped, so that an interrupted survey continues.
`external.survey.table` prints the table of tests/external/survey/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from click.testing import CliRunner
from external.survey.checkpoints import get_auto_class, write_random_model
from external.survey.families import GROUPS, resolve_type
from safetensors import safe_open
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import quantkit
from quantkit import pipeline
from quantkit.cli.main import main as quantkit_command
from quantkit.library_settings import BOUNDED, REPRODUCIBLE
from quantkit.plan.plan import match_source
from quantkit.plan.sources import resolve_source_facts
from quantkit.recipe.parse import parse_recipe

LARGEST_DIFFERENCE = 0.1
"""Between the KL of the report and the one that transformers finds, relative to the report's."""
SMALLEST_KL = 1e-5
MAX_MESSAGE = 600

SETTINGS = {**REPRODUCIBLE, **BOUNDED, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""Environment of the survey, as of the command line; without the network."""

RECIPE: Mapping[str, str] = {
    "version": "1",
    "quantize": "{method: gptq, bits: 4, group_size: 32, symmetric: true}",
    "format": "compressed_tensors",
    "rules": "all-linear",
    "calibration": "{set: tiny-v3, sequences: 8, length: 128, min_expert_tokens: 8}",
    "fidelity": "{set: tiny-v3-heldout, windows: 4, length: 128}",
    "memory": "4GB",
    "compute": "{device: cpu}",
}


LATENT_RULES = '[{match: "*.kv_b_proj", keep: source}, {match: "*", quantize: default}]'
"""SGLang looks for kv_b_proj's plain weight in compressed-tensors files."""


def make_recipe(source: Path, output: Path, keys: Mapping[str, str]) -> str:
    """Return a recipe of every linear, with some keys replaced; kv_b_proj is kept."""
    own = {"source": f"{{model: {source}}}", "output": f"{{path: {output}}}"}
    with safe_open(next(source.glob("*.safetensors")), "pt") as file:
        if any(name.endswith(".kv_b_proj.weight") for name in file.keys()):  # noqa: SIM118
            own["rules"] = LATENT_RULES
    return "\n".join(f"{k}: {v}" for k, v in {**RECIPE, **own, **keys}.items()) + "\n"


def run_command(arguments: Sequence[str]) -> tuple[int, str]:
    """Run quantkit in this process; return exit code and output with any traceback."""
    done = CliRunner().invoke(quantkit_command, list(arguments))
    output = " ".join(done.output.split())
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        output += "Traceback: " + "".join(traceback.format_exception(done.exception))[-MAX_MESSAGE:]
    return done.exit_code, output


def shorten(output: str) -> str:
    """Return the error in a command's output."""
    _, mark, message = output.partition("error: ")
    return message[:MAX_MESSAGE] if mark else output[-MAX_MESSAGE:]


def survey_type(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write, plan, build and compare one type in `folder`; return its line of results."""
    model_type, _ = resolve_type(name)
    if model_type not in CONFIG_MAPPING:
        return {
            "status": "absent",
            "message": f"not part of transformers {transformers.__version__}",
        }
    source, output, file = folder / "source", folder / "artifact", folder / "recipe.yaml"
    try:
        write_random_model(name, source)
    except Exception as fault:  # noqa: BLE001  # whatever transformers raises
        return {"status": "not made", "message": f"{type(fault).__name__}: {fault}"[:MAX_MESSAGE]}
    text = make_recipe(source, output, dict(options.set))
    file.write_text(text, encoding="utf-8")
    result: dict[str, Any] = {}
    for command in ("plan",) if options.plan_only else ("plan", "build"):
        code, printed = run_command([command, str(file)])
        if "Traceback" in printed:
            return {"status": "traceback", "stage": command, "message": printed[-MAX_MESSAGE:]}
        if code:
            return {"status": "refused", "stage": command, "message": shorten(printed)}
        result["derived"] = "generic: " in printed
    if options.plan_only:
        return {**result, "status": "planned"}
    result["scaled"] = count_scaled_inputs(text)
    try:
        result |= compare(model_type, source, output, text)
    except Exception as fault:  # noqa: BLE001  # transformers does not load every packed family
        message = f"{type(fault).__name__}: {fault}"[:MAX_MESSAGE]
        return {**result, "status": "not loaded", "message": message}
    reported, measured = result["kl_reported"], result["kl_transformers"]
    is_true = abs(reported - measured) <= LARGEST_DIFFERENCE * max(reported, SMALLEST_KL)
    return {**result, "status": "built" if is_true else "wrong"}


def count_scaled_inputs(recipe: str) -> str:
    """Return how many inputs of linears have a tensor that absorbs their scale: "12 of 16"."""
    facts = resolve_source_facts(parse_recipe(recipe, "recipe.yaml"))
    blocks = match_source(facts).layout.blocks
    absorbed = [group.absorber is not None for block in blocks for group in block.groups]
    absorbed += [block.experts.scales_down for block in blocks if block.experts]
    return f"{sum(absorbed)} of {len(absorbed)}"


def compute_log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Return the distribution of the next token at each position: [tokens - 1, vocabulary]."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits
    return logits[0, :-1].double().log_softmax(-1)


def compute_kl(source: Any, artifact: Any, sequences: Sequence[Tensor]) -> float:
    """Return the mean KL of two transformers models over token sequences."""
    parts = []
    for ids in sequences:
        p, q = (compute_log_probabilities(model, ids) for model in (source, artifact))
        parts.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(parts).mean())


def compare(model_type: str, source: Path, output: Path, recipe: str) -> dict[str, Any]:
    """Return the reported KL, and that of transformers' model with the weights of the artifact.

    They are loaded by transformers with compressed-tensors, and by quantkit. Only the latter counts
    where transformers has no name for them, as for single experts that it knows stacked.
    """
    figures = json.loads((output / "quantkit" / "fidelity.json").read_text(encoding="utf-8"))
    tokens = pipeline.tokenize(parse_recipe(recipe, "recipe.yaml"), source).tokens["fidelity"]
    sequences = [tokens.sequence(i).long() for i in range(tokens.n_sequences)]
    auto = get_auto_class(model_type)
    original = auto.from_pretrained(source, dtype=torch.float32).eval()
    result = {
        "kl_reported": figures["distribution"][0]["kl_mean"]["value"],
        "modules": len(figures["modules"]),
    }
    ours = quantkit.load(output, device="cpu", dtype="float32")
    result["kl_load"] = compute_kl(original, ours, sequences)
    del ours
    fault, artifact = load_artifact(auto, output)
    if fault:
        return {
            **result,
            "loader": "quantkit",
            "fault": fault,
            "kl_transformers": result["kl_load"],
        }
    return {**result, "kl_transformers": compute_kl(original, artifact, sequences)}


def load_artifact(auto: Any, folder: Path) -> tuple[str, Any]:
    """Load an artifact with transformers and run it; return why that fails or "", and it."""
    try:
        model, about = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        model.eval()
        compute_log_probabilities(model, torch.tensor([3, 4, 5]))
    except Exception as fault:  # noqa: BLE001  # transformers does not load every packed family
        return f"{type(fault).__name__}: {fault}"[:MAX_MESSAGE], None
    missing = sorted(map(str, about["missing_keys"]))
    return (f"missing {missing[0]}" if missing else ""), model


def run_forked(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Survey one type in a process of its own, which is killed after --timeout seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        answer, log = folder / "answer.json", folder / "log"
        child = os.fork()
        if not child:
            write_answer(name, folder, options, answer, log)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() - began > options.timeout:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.1)
        result = json.loads(answer.read_text()) if answer.exists() else {"status": "killed"}
        if options.keep:
            shutil.copytree(folder, options.keep / name, dirs_exist_ok=True)
    return {"type": name, **result, "seconds": round(time.monotonic() - began, 1)}


def write_answer(
    name: str, folder: Path, options: argparse.Namespace, answer: Path, log: Path
) -> None:
    """Survey one type and end this process."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.chdir(folder)  # a recipe may write below the working folder only
    try:
        result = survey_type(name, folder, options)
    except BaseException:  # noqa: BLE001  # the process ends here
        result = {
            "status": "traceback",
            "stage": "load",
            "message": traceback.format_exc()[-MAX_MESSAGE:],
        }
    answer.write_text(json.dumps(result))
    os._exit(0)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--groups", default="dense", type=lambda x: x.split(","))
    parser.add_argument("--only", type=lambda x: x.split(","))
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--keep", type=Path, help="keep source and artifact of each type here")
    parser.add_argument("--set", action="append", default=[], type=lambda x: x.split("=", 1))
    return parser.parse_args()


def main() -> None:
    """Survey the types that have no line in the results yet."""
    options = parse_options()
    if missing := {k: v for k, v in SETTINGS.items() if k not in os.environ}:
        # torch reads them when it is imported
        os.execve(sys.executable, [*sys.orig_argv], {**os.environ, **missing})
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    done = set[str]()
    if options.results.exists():
        lines = options.results.read_text(encoding="utf-8").splitlines()
        done = {json.loads(line)["type"] for line in lines}
    names = options.only or [name for group in options.groups for name in GROUPS[group]]
    for name in names:
        if name in done:
            continue
        result = run_forked(name, options)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        figures = f"{result.get('kl_reported')} {result.get('kl_transformers')}"
        message = str(result.get("message", ""))[:200]
        sys.stdout.write(f"{name:24s} {result['status']:10s} {figures} {message}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
