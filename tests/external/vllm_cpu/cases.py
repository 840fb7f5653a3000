"""Artifacts that `make test-vllm` loads in vLLM: every format vLLM supports, for each kind of
model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from external.vllm_cpu import students
from support.checkpoints import make_recipe_text

FORMATS = {
    "awq": "{method: awq, bits: 4, group_size: 64}",
    "gptq": "{method: gptq, bits: 4, group_size: 64, symmetric: true}",
    "compressed_tensors": "{method: gptq, bits: 4, group_size: 64, symmetric: true}",
}
EXPERTS_IN_BF16 = '[{match: "*.mlp.experts.*", quantize: {}}, {match: "*", keep: bf16}]'
MODELS = {"qwen3": "all-linear", "qwen3_moe": "all-linear", "tiny-v3": EXPERTS_IN_BF16}
"""Model -> rules: a dense student, an MoE whose router must stay unquantized, DeepSeek-V3."""
REAL = "smollm2-135m"
NOT_RUN = {
    "8 bits": "gptq, compressed_tensors: on CPUs vLLM reads only 4-bit codes "
    "(CPUWNA16LinearKernel, CPUExpertsInt4)",
    "FP8 next to INT4": "compressed_tensors: vLLM's FP8 kernels for CPUs require AMX tiles",
    "asymmetric experts": "compressed_tensors: the plan refuses artifacts that transformers "
    "cannot load; awq has them",
}
"""Combinations that a format supports but this test does not run, and why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One artifact: the model ("qwen3", "tiny-v3", ...), the format, and the recipe's keys."""

    model: str
    format: str
    keys: dict[str, str]
    note: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.model, self.format, self.note)))

    def make_recipe(self, place: Path, output: Path) -> str:
        """Return the recipe's text. Train the student first if `place` does not hold it."""
        source: Path | str = "builtin:tiny-v3" if self.model == "tiny-v3" else place / self.model
        if self.model in students.STUDENTS:
            source = students.make_student(self.model, place)
        return make_recipe_text(source, output, format=self.format, **self.keys)


def list_cases(real: bool) -> list[Case]:
    """Return the matrix, smallest models first.

    real: add SmolLM2, with rounding to nearest: only loading and inference are tested.
    """
    matrix = [
        Case(model=model, format=name, keys={"quantize": quantize, "rules": rules})
        for model, rules in MODELS.items()
        for name, quantize in FORMATS.items()
    ]
    keys = {"quantize": FORMATS["awq"], "rules": "all-linear"}
    matrix.insert(3, Case(model="qwen3", format="compressed_tensors", keys=keys, note="asymmetric"))
    plain = {"rules": "all-linear", "fidelity": "none"}
    nearest = {
        name: text.replace("awq", "rtn").replace("gptq", "rtn") for name, text in FORMATS.items()
    }
    return matrix + [
        Case(model=REAL, format=name, keys={**plain, "quantize": quantize})
        for name, quantize in nearest.items()
        if real
    ]
