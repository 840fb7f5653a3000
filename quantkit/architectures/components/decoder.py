"""The parts that decoder blocks of most families are made of, so that an architecture file stays a table.

A block is a sum of parts: attention and MLP, each with its linears, who reads what, and what engines merge. Layers,
modules and keys of config.json are named as the Hugging Face hub names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from quantkit.contracts import (
    Absorber,
    Block,
    Config,
    Experts,
    HeadRows,
    Layout,
    Linear,
    LinearGroup,
    Role,
    TensorSpec,
)
from quantkit.errors import CheckpointError

TINY_COMMON: Mapping[str, object] = {
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 768,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
"""What the TINY configs have in common; sizes that fill AWQ's groups and words, and FP8's blocks."""

MOST_BLOCKS, MOST_LINEARS = 4_000, 200_000
"""No published model has half of either: DeepSeek-V3 has 62 and 45,872."""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Attention or MLP of a block: the fields are those of Block."""

    linears: tuple[Linear, ...]
    others: tuple[TensorSpec, ...] = ()
    groups: tuple[LinearGroup, ...] = ()
    fused: tuple[tuple[str, ...], ...] = ()
    experts: Experts | None = None


# ------------------------------------------------------------------------------------------------------ small parts


def norm(module: str, width: int, dtype: str = "BF16") -> TensorSpec:
    """The weight vector of an RMS norm."""
    return TensorSpec(name=f"{module}.weight", dtype=dtype, shape=(width,))


def gated_mlp(
    module: str,
    hidden: int,
    intermediate: int,
    role: Role,
    bias: bool = False,
    projections: tuple[str, str, str] = PROJECTIONS,
) -> tuple[Linear, ...]:
    """gate, up and down projection of a gated MLP: down(act(gate x) * up x)."""
    gate, up, down = (f"{module}.{projection}" for projection in projections)
    return (
        Linear(name=gate, out_features=intermediate, in_features=hidden, role=role, bias=bias),
        Linear(name=up, out_features=intermediate, in_features=hidden, role=role, bias=bias),
        Linear(name=down, out_features=hidden, in_features=intermediate, role=role, bias=bias),
    )


# -------------------------------------------------------------------------------------------------------- attention


def grouped_attention(
    config: Config,
    name: str,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
) -> Part:
    """Attention whose query heads share key/value heads (arXiv 2305.13245), `name` being its block.

    With `qk_norm` queries and keys pass a norm per head; the values do not, so o_proj's input scale goes into v_proj
    all the same.
    """
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if not heads or not kv_heads or heads % kv_heads:
        raise CheckpointError(
            f"{config.where}: expected num_attention_heads to be a multiple of num_key_value_heads, found {heads} and "
            f"{kv_heads}; repair them"
        )
    width = config.integer("head_dim", hidden // heads)
    module = f"{name}.self_attn"
    q, k, v, o = (f"{module}.{letter}_proj" for letter in "qkvo")

    def linear(name: str, out: int, into: int, bias: bool) -> Linear:
        return Linear(name=name, out_features=out, in_features=into, role="attention", bias=bias)

    return Part(
        linears=(
            linear(q, heads * width, hidden, qkv_bias),
            linear(k, kv_heads * width, hidden, qkv_bias),
            linear(v, kv_heads * width, hidden, qkv_bias),
            linear(o, hidden, heads * width, o_bias),
        ),
        others=(norm(f"{module}.q_norm", width), norm(f"{module}.k_norm", width))
        if qk_norm
        else (),
        groups=(
            LinearGroup(
                name=f"{module}.qkv",
                readers=(q, k, v),
                absorber=Absorber(module=f"{name}.input_layernorm"),
            ),
            LinearGroup(
                name=f"{module}.o",
                readers=(o,),
                absorber=Absorber(
                    module=v,
                    rows=HeadRows(
                        heads=heads, kv_heads=kv_heads, width=width, stride=width, offset=0
                    ),
                ),
                adds_to=f"{name}.input_layernorm",
            ),
        ),
        fused=((q, k, v),),
    )


def latent_linears(config: Config, module: str) -> tuple[Linear, ...]:
    """MLA projections; with `q_lora_rank` null one q_proj takes the place of q_a_proj and q_b_proj."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    value, rank = config.integer("v_head_dim"), config.integer("kv_lora_rank")
    bias = config.flag("attention_bias")

    def linear(name: str, out: int, into: int, has_bias: bool = False) -> Linear:
        return Linear(
            name=f"{module}.{name}",
            out_features=out,
            in_features=into,
            role="attention",
            bias=has_bias,
        )

    if config.has("q_lora_rank"):
        q_rank = config.integer("q_lora_rank")
        queries = [
            linear("q_a_proj", q_rank, hidden, bias),
            linear("q_b_proj", heads * (nope + rope), q_rank),
        ]
    else:
        queries = [linear("q_proj", heads * (nope + rope), hidden)]
    return (
        *queries,
        linear("kv_a_proj_with_mqa", rank + rope, hidden, bias),
        linear("kv_b_proj", heads * (nope + value), rank),
        linear("o_proj", hidden, heads * value, bias),
    )


def latent_attention(config: Config, name: str) -> Part:
    """Multi-head latent attention (MLA, arXiv 2405.04434) of block `name`.

    o_proj's input scale goes into the value rows of kv_b_proj.
    """
    module, compressed = f"{name}.self_attn", config.has("q_lora_rank")
    heads, value = config.integer("num_attention_heads"), config.integer("v_head_dim")
    nope, kv_a = config.integer("qk_nope_head_dim"), f"{module}.kv_a_proj_with_mqa"
    first = f"{module}.q_a_proj" if compressed else f"{module}.q_proj"
    values = HeadRows(heads=heads, kv_heads=heads, width=value, stride=nope + value, offset=nope)
    into = LinearGroup(
        name=f"{module}.in",
        readers=(first, kv_a),
        absorber=Absorber(module=f"{name}.input_layernorm"),
    )
    q_b = LinearGroup(
        name=f"{module}.q_b",
        readers=(f"{module}.q_b_proj",),
        absorber=Absorber(module=f"{module}.q_a_layernorm"),
    )
    kv_b = LinearGroup(
        name=f"{module}.kv_b",
        readers=(f"{module}.kv_b_proj",),
        absorber=Absorber(module=f"{module}.kv_a_layernorm"),
    )
    out = LinearGroup(
        name=f"{module}.o",
        readers=(f"{module}.o_proj",),
        absorber=Absorber(module=f"{module}.kv_b_proj", rows=values),
        adds_to=f"{name}.input_layernorm",
    )
    kv_norm = norm(f"{module}.kv_a_layernorm", config.integer("kv_lora_rank"))
    linears = latent_linears(config, module)
    if not compressed:
        return Part(linears=linears, others=(kv_norm,), groups=(into, kv_b, out))
    q_norm = norm(f"{module}.q_a_layernorm", config.integer("q_lora_rank"))
    return Part(
        linears=linears,
        others=(kv_norm, q_norm),
        groups=(into, q_b, kv_b, out),
        fused=((first, kv_a),),
    )


# -------------------------------------------------------------------------------------------------------------- MLP


def dense_mlp(config: Config, name: str, bias: bool = False) -> Part:
    """The gated MLP of block `name`."""
    module = f"{name}.mlp"
    linears = gated_mlp(
        module, config.integer("hidden_size"), config.integer("intermediate_size"), "mlp", bias
    )
    gate, up, down = (linear.name for linear in linears)
    before = f"{name}.post_attention_layernorm"
    return Part(
        linears=linears,
        groups=(
            LinearGroup(name=f"{module}.in", readers=(gate, up), absorber=Absorber(module=before)),
            LinearGroup(
                name=f"{module}.down", readers=(down,), absorber=Absorber(module=up), adds_to=before
            ),
        ),
        fused=((gate, up),),
    )


# ------------------------------------------------------------------------------------------------ blocks and models


def decoder(config: Config, name: str, attention: Part, mlp: Part) -> Block:
    """A block with a norm before attention and one before the MLP."""
    hidden = config.integer("hidden_size")
    norms = (
        norm(f"{name}.input_layernorm", hidden),
        norm(f"{name}.post_attention_layernorm", hidden),
    )
    return Block(
        name=name,
        kind="decoder",
        linears=(*attention.linears, *mlp.linears),
        others=(*norms, *attention.others, *mlp.others),
        groups=(*attention.groups, *mlp.groups),
        fused=(*attention.fused, *mlp.fused),
        experts=mlp.experts,
    )


def prediction_block(config: Config, block: Block) -> Block:
    """An MTP block: a decoder block with an embedding, a projection of [embedding, hidden] and a head of its own."""
    name, hidden, vocabulary = (
        block.name,
        config.integer("hidden_size"),
        config.integer("vocab_size"),
    )
    extra = (
        Linear(
            name=f"{name}.embed_tokens",
            out_features=vocabulary,
            in_features=hidden,
            role="embedding",
        ),
        Linear(
            name=f"{name}.eh_proj",
            out_features=hidden,
            in_features=2 * hidden,
            role="mtp_projection",
        ),
        Linear(
            name=f"{name}.shared_head.head",
            out_features=vocabulary,
            in_features=hidden,
            role="head",
        ),
    )
    norms = (norm(f"{name}.{module}", hidden) for module in ("enorm", "hnorm", "shared_head.norm"))
    return replace(
        block, kind="mtp", linears=(*extra, *block.linears), others=(*norms, *block.others)
    )


def model(config: Config, block: Callable[[Config, int], Block], predictions: int = 0) -> Layout:
    """Embedding, blocks 0, 1, ... (then `predictions` MTP blocks), final norm, and a head that is not tied.

    Raises CheckpointError for more linears than any model has: a config must not decide how much memory a plan takes.
    """
    count, made, linears = config.integer("num_hidden_layers"), list[Block](), 0
    if not 0 < count + predictions <= MOST_BLOCKS or not count:
        raise CheckpointError(
            f"{config.where}: num_hidden_layers: expected a model of 1 to {MOST_BLOCKS:,} blocks, found "
            f"{count + predictions:,}; repair it"
        )
    for layer in range(count + predictions):
        made.append(block(config, layer))
        linears += len(made[-1].linears)
        if linears > MOST_LINEARS:
            raise CheckpointError(
                f"{config.where}: expected a model of at most {MOST_LINEARS:,} linears, found more in the first "
                f"{layer + 1:,} of {count + predictions:,} blocks; repair num_hidden_layers and the number of experts"
            )
    hidden, vocabulary = config.integer("hidden_size"), config.integer("vocab_size")
    head = Linear(name="lm_head", out_features=vocabulary, in_features=hidden, role="head")
    return Layout(
        embedding=Linear(
            name="model.embed_tokens", out_features=vocabulary, in_features=hidden, role="embedding"
        ),
        blocks=(*made[:count], *(prediction_block(config, decoder) for decoder in made[count:])),
        final_norm=norm("model.norm", hidden),
        head=None if config.flag("tie_word_embeddings") else head,
    )
