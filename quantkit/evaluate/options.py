"""Options of `quantkit eval`: backend, number of items, seeds and decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from quantkit.errors import UsageError
from quantkit.evaluate.lm_eval_tasks import LoadedTasks
from quantkit.evaluate.target import BackendName
from quantkit.evaluate.task_runner import BATCH_SIZE

if TYPE_CHECKING:
    from quantkit.evaluate.openai_client import ServerOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """Decoding settings. Temperature 0 is greedy; max_tokens None keeps the task's own limit.

    chat: apply the model's chat template to prompts; think_end: see LMEvalAdapter.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None
    chat: bool = False
    think_end: str = ""

    def apply(self, loaded: LoadedTasks, seed: int) -> None:
        """Override the generation settings of the tasks with these."""
        changes: dict[str, object] = {}
        if self.temperature:
            changes |= {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "seed": seed,
            }
        if self.max_tokens is not None:
            changes["max_gen_toks"] = self.max_tokens
        for task in loaded.lm_eval_tasks.values():
            if changes and task.OUTPUT_TYPE == "generate_until":
                task.set_config(
                    "generation_kwargs", {**(task.config.generation_kwargs or {}), **changes}
                )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of one evaluation. device_map, dtype: "" selects them.

    Engine: arguments of vLLM; server: for openai. trusted_code: sha256 of Python files that tasks
    may run.
    """

    backend: BackendName = "transformers"
    limit: int | None = None
    seeds: int = 1
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int = BATCH_SIZE
    device_map: str = ""
    dtype: str = ""
    native: bool = False
    engine: Mapping[str, object] = field(default_factory=dict)
    server: ServerOptions | None = None
    trusted_code: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UsageError if options contradict each other."""
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit: expected 1 or more items, found {self.limit}")
        if self.seeds > 1 and not self.decoding.temperature:
            raise UsageError(
                "--seeds: expected --temperature above 0, found greedy decoding, which has one "
                "answer; set a temperature"
            )
        if (self.backend == "openai") != (self.server is not None):
            raise UsageError(
                "--endpoint: expected with --backend openai and with no other backend; name the "
                "server's address"
            )


def describe_settings(options: EvaluationOptions) -> dict[str, object]:
    """Return the settings that results.json records."""
    return {"limit": options.limit, "seeds": options.seeds, **asdict(options.decoding)}
