"""The sections of a recipe except the scheme, the rules and the gates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from quantkit.io.endpoint_url import normalize_endpoint_url
from quantkit.io.owned_dirs import validate_folder
from quantkit.recipe.value_types import FROZEN, Commit, Count, Seed, Size, TaskNames, Text, describe

AUTO = "auto"
"""The set of a text that is chosen on this machine (plan/choose_texts.py)."""


class Source(BaseModel):
    """The model to quantize."""

    model_config = FROZEN
    model: Annotated[
        Text,
        describe(
            "The source model: a Hub id, a folder, or `builtin:tiny-v3`.", "deepseek-ai/DeepSeek-V3"
        ),
    ]
    revision: Annotated[
        Text | None,
        describe(
            "Commit, branch or tag on the Hub; `null` is the newest commit. The artifact records "
            "the commit in `quantkit/plan.json`.",
            "main",
        ),
    ] = None
    trust_remote_code: Annotated[
        Commit | None,
        describe(
            "Commit whose tokenizer may run its own Python code. Code of a model's layers never "
            "runs.",
            "0123456789abcdef0123456789abcdef01234567",
            "commit (40 hexadecimal digits) or `null`",
        ),
    ] = None


class Endpoint(BaseModel):
    """A server with OpenAI's API that samples text of the model itself (`set: self`)."""

    model_config = FROZEN
    url: Annotated[
        Text,
        AfterValidator(normalize_endpoint_url),
        describe("Address of the API, without user and query.", "http://localhost:8000/v1"),
    ]
    model: Annotated[Text, describe("Name of the model on the server.", "my-model")]
    chat: Annotated[
        bool,
        describe(
            "Use the chat API, with messages only; `false` uses the completions API, with raw "
            "openings and the chat template of the source.",
            "false",
        ),
    ] = True
    max_tokens: Annotated[
        Count, describe("New tokens of an answer, reasoning included, at most.", "512")
    ] = 2048
    concurrency: Annotated[Count, Field(le=1024), describe("Requests at a time.", "64")] = 16
    tries: Annotated[Count, Field(le=100), describe("Tries of a request, in total.", "3")] = 8
    seconds: Annotated[
        Count, Field(le=86_400), describe("Longest silence of the server.", "60")
    ] = 600
    key_variable: Annotated[
        Text, describe("Environment variable that holds the API key.", "MY_API_KEY")
    ] = "OPENAI_API_KEY"


class Calibration(BaseModel):
    """The text whose activations the methods use; `null` if no method needs any."""

    model_config = FROZEN
    set: Annotated[
        Text,
        describe(
            "A text set of calibration/, or the path of a spec or of a text file (.jsonl, "
            ".parquet, .txt). `auto`: the mixture `everyday` "
            "of the hub; without the hub that of local files, text of the model itself, or the "
            "built-in text, in this order.",
            "everyday",
        ),
    ] = AUTO
    sequences: Annotated[
        Count | None, describe("Number of sequences; `null` uses the whole set.", "256")
    ] = None
    length: Annotated[Count, describe("Tokens per sequence.", "512")] = 2048
    seed: Annotated[
        Seed, describe("Seed of the choice of sequences, if the set has more.", "1")
    ] = 0
    shrinkage: Annotated[
        float,
        Field(ge=0, le=0.5, allow_inf_nan=False, strict=False),
        describe(
            "Share of an isotropic input that is mixed into the statistics with which codes are "
            "chosen, for text of kinds that calibration does not have.",
            "0.1",
            "number, 0 to 0.5",
        ),
    ] = 0.0
    experts: Annotated[
        Literal["routed", "all"],
        describe(
            "Tokens that calibrate a routed expert: those routed to it, or all tokens of the "
            "layer.",
            "all",
        ),
    ] = "routed"
    min_expert_tokens: Annotated[
        Seed,
        describe(
            "An expert with fewer tokens is under-calibrated, and reported as a fallback.", "64"
        ),
    ] = 256
    under_calibrated: Annotated[
        Literal["shared_gram", "rtn"],
        describe(
            "Fallback for an under-calibrated expert: the Gram matrix of all tokens of its layer, "
            "or rounding to nearest.",
            "rtn",
        ),
    ] = "shared_gram"
    endpoint: Annotated[
        Endpoint | None,
        describe(
            "A server that samples text of the model itself, for calibration and fidelity; `null` "
            "samples it in this process.",
            "{url: 'http://localhost:8000/v1', model: mine}",
            "mapping or `null`",
        ),
    ] = None

    @model_serializer(mode="wrap")
    def _omit_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an unset endpoint, as in recipes before this key."""
        values: dict[str, Any] = dump(self)
        if values.get("endpoint", 0) is None:
            del values["endpoint"]
        return values


class FidelityText(BaseModel):
    """The text on which source and artifact are compared token by token.

    `none` measures nothing.
    """

    model_config = FROZEN
    set: Annotated[
        Text,
        describe(
            "A text set of calibration/, or the path of a spec or of a text file; never the "
            "calibration set. `auto`: "
            "the held-out set that belongs to the calibration set of `auto`.",
            "everyday-heldout",
        ),
    ] = AUTO
    windows: Annotated[
        Count | None, describe("Number of windows; `null` uses the whole set.", "32")
    ] = None
    length: Annotated[Count, Field(ge=2), describe("Tokens per window.", "512", "integer >= 2")] = (
        2048  # a token and its successor
    )
    yardstick: Annotated[
        Literal["rtn"] | None,
        describe(
            "`rtn` measures in the same pass what rounding to nearest would cost: the same "
            "modules, bits and groups, without calibration. The text runs a third time through "
            "every block.",
            "rtn",
        ),
    ] = None

    keep_text: Annotated[
        bool | None,
        describe(
            "Whether the artifact holds the tokens of this text, which show the worst ones in "
            "report and diff. `null`: for the sets of calibration/, not for text of your own "
            "files, which would be published with the artifact.",
            "true",
        ),
    ] = None

    @model_serializer(mode="wrap")
    def omit_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out keys that are unset, as in recipes before these keys: their hash stays."""
        values: dict[str, Any] = handler(self)
        late = ("yardstick", "keep_text")
        return {key: x for key, x in values.items() if key not in late or x is not None}


class Evaluation(BaseModel):
    """The benchmarks, run on the source and on the artifact as read back."""

    model_config = FROZEN
    tasks: Annotated[
        TaskNames,
        describe("Tasks of evals/, or YAML files of tasks.", "[gsm8k, mbpp]", "list of text"),
    ] = ()
    limit: Annotated[
        Count | None, describe("Use only the first items of each task; `null` uses all.", "100")
    ] = None
    likelihood: Annotated[
        Seed,
        describe(
            "Items of each task whose gold solution is scored in the streaming pass, which also "
            "works for models too large to generate; `0` scores none.",
            "0",
        ),
    ] = 64
    backend: Annotated[
        Literal["transformers"], describe("What runs the models.", "transformers")
    ] = "transformers"
    batch_size: Annotated[Count, describe("Items generated together.", "32")] = 128


class Output(BaseModel):
    """The artifact."""

    model_config = FROZEN
    path: Annotated[
        Text,
        AfterValidator(validate_folder),
        describe(
            "Folder of the artifact. It must not exist yet, except with `--overwrite`. Outside the "
            "working folder, and for a hidden folder, `--output` must name it.",
            "artifacts/mine",
        ),
    ]
    shard_bytes: Annotated[
        Size, describe("Largest safetensors file; GB is decimal, GiB binary.", "2GB")
    ] = 5 * 10**9


class Compute(BaseModel):
    """Device and dtypes of the computation."""

    model_config = FROZEN
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        describe("Device; `auto` uses a GPU if there is one.", "cpu"),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        describe("Dtype of the blocks; `auto` is float32 on a CPU, bfloat16 on a GPU.", "float32"),
    ] = "auto"
    calibration: Annotated[
        Literal["auto", "float32", "bfloat16"],
        describe(
            "Dtype of the calibration stream; `auto` is bfloat16 on a GPU and on CPUs with "
            "bfloat16 matrix products.",
            "float32",
        ),
    ] = "auto"
