"""The artifacts that `make test-vllm` asks vLLM to read: every format it knows, for each kind of model."""

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
"""What is read, and the rules: a dense student, a mixture whose router must be left alone, DeepSeek-V3."""
REAL = "smollm2-135m"
NOT_RUN = {
    "8 bits": "gptq, compressed_tensors: vLLM reads 4-bit codes only on CPUs (CPUWNA16LinearKernel, CPUExpertsInt4)",
    "FP8 beside INT4": "compressed_tensors: vLLM's FP8 kernels for CPUs require AMX tiles",
    "asymmetric experts": "compressed_tensors: the plan refuses what transformers cannot load; awq has them",
}
"""What formats hold and this table cannot show, and why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One artifact: the model ("qwen3", "tiny-v3", ...), the format, and keys of its recipe."""

    model: str
    format: str
    keys: dict[str, str]
    note: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.model, self.format, self.note)))

    def recipe(self, place: Path, output: Path) -> str:
        """The recipe's text; a student that is not under `place` yet is taught first."""
        source: Path | str = "builtin:tiny-v3" if self.model == "tiny-v3" else place / self.model
        if self.model in students.STUDENTS:
            source = students.make_student(self.model, place)
        return make_recipe_text(source, output, format=self.format, **self.keys)


def list_cases(real: bool) -> list[Case]:
    """The matrix, smallest models first; with `real` also SmolLM2, rounded to nearest because it is only read."""
    made = [
        Case(model=model, format=name, keys={"quantize": quantize, "rules": rules})
        for model, rules in MODELS.items()
        for name, quantize in FORMATS.items()
    ]
    keys = {"quantize": FORMATS["awq"], "rules": "all-linear"}
    made.insert(3, Case(model="qwen3", format="compressed_tensors", keys=keys, note="asymmetric"))
    plain = {"rules": "all-linear", "fidelity": "none"}
    nearest = {
        name: text.replace("awq", "rtn").replace("gptq", "rtn") for name, text in FORMATS.items()
    }
    return made + [
        Case(model=REAL, format=name, keys={**plain, "quantize": quantize})
        for name, quantize in nearest.items()
        if real
    ]
