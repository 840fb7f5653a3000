"""Contracts: frozen values that every module may use, and the plug-in interfaces.

    Method        how codes are chosen        methods/<name>.py        METHOD
    Rounding      how weights become codes    roundings/<name>.py      ROUNDING
    Format        how codes are stored        formats/<name>.py        FORMAT
    Architecture  layout of a model family    architectures/<type>.py  ARCHITECTURE
    InputStats    calibration statistics      gram, mean |x|, tokens

Methods return `Quantized`, formats store it; neither imports the other. torch, which is slow to
import, is imported for types only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal, TypeAlias

from quantkit.dtypes import DTYPE_BYTES, FloatDtype
from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["attention", "mlp", "shared_expert", "routed_expert",
               "router", "embedding", "head", "mtp_projection"]  # fmt: skip
PROTECTED_ROLES: frozenset[Role] = frozenset({"router", "embedding", "head", "mtp_projection"})
"""Roles that a rule quantizes only if its pattern names them (recipe.schema.Rule)."""

ScaleDtype = Literal[FloatDtype, "uint8", "float8_e4m3fn"]  # the last: of mxfp4 and nvfp4
SchemeKind = Literal["int", "nf4", "fp8", "int8", "mxfp4", "nvfp4"]
"""int, nf4, mxfp4, nvfp4: codes that quantkit makes; fp8, int8: only copied from a source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name, safetensors dtype ("BF16", "F8_E4M3", "I32", ...) and shape of one tensor; no data."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Number of bytes."""
        return self.n_elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The source's config.json with typed access; a wrong key raises CheckpointError.

    `read_missing` returns a value that config.json has under another name than `key`, or None."""

    values: Mapping[str, object]
    where: str = "config.json"
    read_missing: Callable[[Config, str], object] | None = field(default=None, compare=False)

    def _read(self, key: str) -> object:
        value = self.values.get(key)
        return self.read_missing(self, key) if value is None and self.read_missing else value

    def _make_error(self, key: str, expected: str, value: object) -> CheckpointError:
        actual = "nothing; add it" if value is None else f"{repr(value)[:80]}; repair the value"
        return CheckpointError(f"{self.where}: {key}: expected {expected}, found {actual}")

    def integer(self, key: str, default: int | None = None) -> int:
        """Return the integer of `key`, from 0 to 2**31 - 1; `default` if the key is absent."""
        if self.values.get(key) is None and default is not None:
            return default
        value = self._read(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise self._make_error(key, "an integer from 0 to 2**31 - 1", value)
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """Return the boolean of `key`; `default` if the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._make_error(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return the string of `key`; `default` if the key is absent."""
        if self.values.get(key) is None and default is not None:
            return default
        value = self._read(key)
        if not isinstance(value, str):
            raise self._make_error(key, "a string", value)
        return value

    def has(self, key: str) -> bool:
        """Return whether `key` is present and not null."""
        return self.values.get(key) is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One weight matrix [out_features, in_features] that a rule can select."""

    name: str  # the module's full dotted name in the checkpoint, without ".weight"
    out_features: int
    in_features: int
    role: Role
    bias: bool = False

    @property
    def n_parameters(self) -> int:
        """Number of weights, without the bias."""
        return self.out_features * self.in_features


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadRows:
    """The row of an attention projection that feeds each input channel of o_proj.

    Channel `head * width + d` of o_proj comes from row
    `(head // (heads // kv_heads)) * stride + offset + d`.
    """

    heads: int
    kv_heads: int
    width: int  # value channels per head
    stride: int  # rows per key/value head in the absorbing matrix
    offset: int  # first value row within a head

    def index(self) -> list[int]:
        """Return [in_features of o_proj] row numbers of the absorbing matrix."""
        repeat = self.heads // self.kv_heads
        first = [head // repeat * self.stride + self.offset for head in range(self.heads)]
        return [row + d for row in first for d in range(self.width)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Absorber:
    """The earlier tensor that is divided by a group's scale.

    A norm weight [in] is divided by channel, a linear by row: row c for channel c, or that of rows.
    """

    module: str
    rows: HeadRows | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearGroup:
    """Linears with the same input, and the earlier tensor that may absorb their scale.

    `readers` lists every module that reads the input, including the router: a missing reader would
    silently read a rescaled input. The input is observed at the first reader. With
    `routed_experts`, gate and up of every routed expert of the block read it too. `adds_to` is the
    norm whose input, the residual stream, the readers' output is added to unchanged; None if an
    operation lies between.
    """

    name: str
    readers: tuple[str, ...]
    absorber: Absorber | None = None
    routed_experts: bool = False
    adds_to: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The routed experts of a block: `count` MLPs down(act(gate x) * up x), or down(act(up x)).

    scales_down: rows of up absorb down's input scale. inside: the block does more than to add their
    sum to its output. scaled_inputs: the router's weight multiplies the input of the only expert.
    bias: each projection has one. single_methods: each quant_method of quantization_config with
    which transformers loads experts by their own names; None: any, and none at all.
    """

    module: str  # "model.layers.3.mlp.experts"; expert e is module.e
    router: str  # module that picks experts: "model.layers.3.mlp.gate"
    count: int
    top_k: int
    hidden: int
    intermediate: int
    gate: str | None = "gate_proj"  # None: experts without a gate
    up: str = "up_proj"
    down: str = "down_proj"
    scales_down: bool = True
    inside: bool = False
    scaled_inputs: bool = False
    bias: bool = False
    single_methods: tuple[str, ...] | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Projections that read the expert's input."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def projections(self) -> tuple[str, ...]:
        """Projections of an expert in the order of a checkpoint."""
        return (*self.inputs, self.down)

    @property
    def first(self) -> str:
        """Full module name of a projection that reads the input: all have one decision."""
        return self.linear(0, self.inputs[0])

    @property
    def kinds(self) -> tuple[Literal["weight", "bias"], ...]:
        """Local names of the tensors of a projection."""
        return ("weight", "bias") if self.bias else ("weight",)

    def linear(self, expert: int, projection: str) -> str:
        """Return the full module name of one projection of one expert."""
        return f"{self.module}.{expert}.{projection}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StackedTensor:
    """A stored tensor with a matrix of each expert: [out, in], or [in, out] if `transposed`; or a
    bias [out] of each.

    Projections follow one another, or alternate if `interleaved`; experts too, if `flat`.
    """

    name: str
    projections: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    flat: bool = False
    kind: Literal["weight", "bias"] = "weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One repeated block of the model: the unit that is read, calibrated, quantized and written.

    `linears` holds every matrix, the experts' included (experts last, expert by expert); `others`
    all further tensors (norms, biases of routers); `fused` the sets that an engine fuses at load,
    which must share one decision. kind "mtp" is a multi-token-prediction block that transformers
    does not run. `renames`: modules or tensors with another name in transformers, (stored, there):
    the first that fits applies. `module`: the block's own name there, if it is another.
    `joined`: those of transformers' layer stored in parts along the rows, (name there, full names).
    `stacked`: stored tensors with matrices of all experts.
    """

    name: str  # "model.layers.3"
    kind: Literal["decoder", "mtp"]
    linears: tuple[Linear, ...]
    others: tuple[TensorSpec, ...]
    groups: tuple[LinearGroup, ...]
    fused: tuple[tuple[str, ...], ...]
    experts: Experts | None = None
    renames: tuple[tuple[str, str], ...] = ()
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()
    stacked: tuple[StackedTensor, ...] = ()
    module: str = ""

    @property
    def path(self) -> str:
        """The block's name in transformers' model."""
        return self.module or self.name

    def stores_together(self, linear: Linear) -> bool:
        """Return whether the checkpoint stores a linear in a tensor with those of all experts."""
        return bool(self.stacked) and linear.role == "routed_expert"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPart:
    """A part that text does not run through, such as an image encoder; copied bit for bit."""

    name: str  # "model.visual"
    tensors: tuple[str, ...]  # by their names in the checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Every tensor of a model in checkpoint order: embedding, blocks, final tensors, head, parts.

    `final_tensors` are all others outside the blocks, in most models the final norm.
    `equal_lengths`: a batch must hold sequences of one length, because padding changes the states
    of a shorter one. `parts`: those of a wrapper next to its text model. `renames`: tensors
    outside the blocks with another name in transformers. `output`: a classifier or reward model
    returns labels, an embedding model states; both have no language head. `eager_heads`: heads of
    an attention that transformers only runs with a matrix of scores [heads, tokens, tokens] per
    sequence. `state_width`: numbers per token between two blocks, if they are more than a token's
    embedding: several streams, or token ids that blocks read; 0 otherwise. `tables`: final tensors
    on which the arguments of blocks depend, such as a learned factor of rotary tables.
    """

    embedding: Linear
    blocks: tuple[Block, ...]
    final_tensors: tuple[TensorSpec, ...]
    head: Linear | None  # None: tied to the embedding
    equal_lengths: bool = False
    parts: tuple[ModelPart, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    output: Literal["logits", "labels", "states"] = "logits"
    eager_heads: int = 0
    state_width: int = 0
    tables: tuple[str, ...] = ()

    def get_path(self, name: str) -> str:
        """Return a tensor's name in transformers' model; `name` is that in the checkpoint."""
        return dict(self.renames).get(name, name)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every matrix of the model."""
        in_blocks = (linear for block in self.blocks for linear in block.linears)
        return (self.embedding, *in_blocks, *((self.head,) if self.head else ()))


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Layout and options of a model family; the file name is its `model_type`."""

    layout: Callable[[Config], Layout]
    tiny: Mapping[str, object]  # a config.json small enough for contract tests
    experts_only: bool = False  # default rules: quantize routed experts only
    # hub id -> file in architectures/published/ for offline plans
    published: Mapping[str, str] | None = None
    serving_notes: tuple[str, ...] = ()  # flags an operator must know, for the model card
    # globs of checkpoint tensors that no engine reads; the plan lists the tensors it drops
    dropped: tuple[str, ...] = ()
    derived: str | None = None  # without a table: how the layout was derived and checked
    classes: tuple[str, ...] = ()  # of a family without a table: its models in transformers


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """Quantization parameters of a matrix.

    Groups run along the input dimension; group_size -1 is one group per row. scale_dtype uint8 is
    E8M0, of mxfp4. nf4 only: `double_quant`, the format stores the scales in 8 bits;
    `source_dtype`, the weight's dtype in the source.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: ScaleDtype
    kind: SchemeKind = "int"
    double_quant: bool = False
    source_dtype: ScaleDtype | None = None

    def groups(self, in_features: int) -> int:
        """Return the number of groups in a row of `in_features` weights."""
        return 1 if self.group_size == -1 else in_features // self.group_size


@dataclass(frozen=True, kw_only=True, slots=True)
class InputStats:
    """Calibration statistics of one group's input x: sums over tokens, float32.

    gram: x xT, [in, in]; mean_abs: mean |x|, [in]; n_tokens: one number per gram. If the original
    model ran too, with input o and residual stream s, and r is the stream that the readers' output
    is added to: cross: (o - x) xT, [in, in]; residual: (s - r) xT, [out, in]. Batches have
    [experts] in front.
    """

    gram: Tensor
    mean_abs: Tensor
    n_tokens: Tensor
    cross: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """A quantized weight, from a method to a format.

    w ~ (codes - zero) * scale; nf4: codebook[codes] * scale; mxfp4, nvfp4: e2m1[codes] * scale /
    global_scale. codes [..., out, in] uint8 in 0 .. 2**bits - 1; scale [..., out, n_groups] in
    scheme.scale_dtype, rounded before the codes were chosen; zero like it, uint8, None for
    symmetric (the middle code); global_scale [..., 1, 1] float32, of nvfp4 only.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    global_scale: Tensor | None = None


Solve: TypeAlias = "Callable[[Tensor, InputStats | None, Scheme], Quantized]"
"""A method's `solve`: weight [..., out, in] float32, statistics or None, scheme -> Quantized."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundedWeight:
    """A quantized weight, and the fallbacks of its rounding (build.quantize_linear.FALLBACKS)."""

    quantized: Quantized
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rescale:
    """AWQ-like input scaling, split so that a group's error can be summed over waves of experts.

    candidates(mean_abs [in]) -> [n, in] float32, the first row all ones;
    error(weight [..., out, in], gram [..., in, in], candidate [in] or [..., in], scheme or None)
    -> [...] float64, the error under the gram after scaling, rounding and unscaling. Scheme None is
    a matrix that stays in the source dtype (its rounding counts too).
    """

    candidates: Callable[[Tensor], Tensor]
    error: Callable[[Tensor, Tensor, Tensor, Scheme | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How codes are chosen: `solve`, batched; kinds: of the schemes that it makes codes of."""

    solve: Solve
    rescale: Rescale | None = None
    needs_stats: bool = True
    kinds: tuple[SchemeKind, ...] = ("int",)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How weights become codes after the method's input scaling.

    round_weight(weight [..., out, in] float32, stats or None, scheme, solve of the recipe's method)
    -> RoundedWeight, batched. A rounding that chooses the codes itself does not call `solve`.
    """

    round_weight: Callable[[Tensor, InputStats | None, Scheme, Solve], RoundedWeight]
    needs_stats: bool = True


FALLBACK_ROUNDING = "nearest"
"""The rounding without statistics: a recipe's default, and the fallback for unseen inputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """Contents of an artifact, for the format's entry in config.json.

    schemes: of each quantized linear; kept: the others; fp8: those of `kept` in FP8 blocks of
    `fp8_block` by `fp8_block`. parts: of a wrapper, the modules of each part that text does not run
    through; text_prefixes: where its text model lies in the checkpoint and in transformers;
    aliases: names in transformers of modules whose names differ in more than that.
    """

    schemes: Mapping[str, Scheme]
    kept: Sequence[str]
    fp8: Sequence[str] = ()
    fp8_block: int | None = None
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    text_prefixes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Format:
    """How codes are stored, and which engines read them.

    accepts: None, or why the format cannot store this linear, with the engines that would fail;
    layout: the tensors that store one linear, before any data exists; full names;
    pack: Quantized of one linear [out, in] -> tensors by local name ("qweight");
    dequantize: back to [out, in] float32;
    quantization_config: the entry for config.json, or None for an ordinary unquantized checkpoint;
    fp8_scale: local name of a kept FP8 weight's block scales; None: it becomes BF16;
    copies_codes: whether a kept linear's codes of compressed-tensors are stored unchanged;
    accepts_fp8: None, or why this linear of a block that transformers runs cannot stay in FP8
    blocks of that side;
    holds_codes: whether `dequantize` gives (codes - zero) * scale in float32: equal codes are equal
    weights in such formats;
    limits: of a model type, its quantized and kept linears (without MTP): engine -> why it fails.
    """

    accepts: Callable[[Scheme, Linear], str | None]
    layout: Callable[[Linear, Scheme], tuple[TensorSpec, ...]]
    pack: Callable[[Quantized, Scheme], dict[str, Tensor]]
    dequantize: Callable[[Mapping[str, Tensor], Scheme], Tensor]
    quantization_config: Callable[[Contents], dict[str, object] | None]
    one_scheme: bool  # the config has room for one bits/group_size only
    # engine -> the exact command that serves the artifact, "{path}" for its folder
    engines: Mapping[str, str]
    fp8_scale: str | None = None
    copies_codes: Callable[[Scheme, Linear], bool] | None = None
    accepts_fp8: Callable[[Linear, int], str | None] | None = None
    holds_codes: bool = True
    ordinary: bool = False  # stores plain weights, which engines may fuse in any case
    limits: Callable[[str, Mapping[Linear, Scheme], Sequence[Linear]], Mapping[str, str]] | None = (
        None
    )
    quant_method: str = ""  # of quantization_config; "" for plain weights
    packages: tuple[str, ...] = ()  # imports beyond quantkit's own dependencies
