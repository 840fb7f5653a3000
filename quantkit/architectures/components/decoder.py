"""The parts of decoder blocks that most families share, so that an architecture file stays a table.

A block is the sum of two parts, attention and MLP. Each part lists its linears, the groups of
linears that read the same input, and the sets that engines merge. Layers, modules and keys of
config.json have the names of the Hugging Face hub.
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
"""Keys that all TINY configs share; the sizes fill AWQ's groups and words, and FP8's blocks."""

MAX_BLOCKS, MAX_LINEARS = 4_000, 200_000
"""Published models have less than half of either: DeepSeek-V3 has 62 blocks and 45,872 linears."""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPart:
    """The attention or the MLP of a block; the fields are those of Block."""

    linears: tuple[Linear, ...]
    others: tuple[TensorSpec, ...] = ()
    groups: tuple[LinearGroup, ...] = ()
    fused: tuple[tuple[str, ...], ...] = ()
    experts: Experts | None = None


# --- small parts


def make_rms_norm(module: str, width: int, dtype: str = "BF16") -> TensorSpec:
    """Return the weight vector [width] of an RMS norm."""
    return TensorSpec(name=f"{module}.weight", dtype=dtype, shape=(width,))


def make_gated_mlp(
    module: str,
    hidden: int,
    intermediate: int,
    role: Role,
    bias: bool = False,
    projections: tuple[str, str, str] = PROJECTIONS,
) -> tuple[Linear, ...]:
    """Return the gate, up and down projections of a gated MLP: down(act(gate x) * up x)."""
    gate, up, down = (f"{module}.{projection}" for projection in projections)
    return (
        Linear(name=gate, out_features=intermediate, in_features=hidden, role=role, bias=bias),
        Linear(name=up, out_features=intermediate, in_features=hidden, role=role, bias=bias),
        Linear(name=down, out_features=hidden, in_features=intermediate, role=role, bias=bias),
    )


# --- attention


def make_grouped_query_attention(
    config: Config,
    name: str,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
) -> BlockPart:
    """Return grouped-query attention (GQA, arXiv 2305.13245) of block `name`.

    With `qk_norm`, queries and keys pass a norm per head. Values do not, so v_proj absorbs o_proj's
    input scale in either case.
    """
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if not heads or not kv_heads or heads % kv_heads:
        raise CheckpointError(
            f"{config.where}: expected num_attention_heads to be a multiple of "
            f"num_key_value_heads, found {heads} and {kv_heads}; repair them"
        )
    width = config.integer("head_dim", hidden // heads)
    module = f"{name}.self_attn"
    q, k, v, o = (f"{module}.{letter}_proj" for letter in "qkvo")

    def make_linear(name: str, out: int, width: int, bias: bool) -> Linear:
        return Linear(name=name, out_features=out, in_features=width, role="attention", bias=bias)

    return BlockPart(
        linears=(
            make_linear(q, heads * width, hidden, qkv_bias),
            make_linear(k, kv_heads * width, hidden, qkv_bias),
            make_linear(v, kv_heads * width, hidden, qkv_bias),
            make_linear(o, hidden, heads * width, o_bias),
        ),
        others=(make_rms_norm(f"{module}.q_norm", width), make_rms_norm(f"{module}.k_norm", width))
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


def make_latent_projections(config: Config, module: str) -> tuple[Linear, ...]:
    """Return the projections of MLA; if `q_lora_rank` is null, q_proj replaces q_a and q_b_proj."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    value, rank = config.integer("v_head_dim"), config.integer("kv_lora_rank")
    bias = config.flag("attention_bias")

    def make_linear(name: str, out: int, width: int, has_bias: bool = False) -> Linear:
        return Linear(
            name=f"{module}.{name}",
            out_features=out,
            in_features=width,
            role="attention",
            bias=has_bias,
        )

    if config.has("q_lora_rank"):
        q_rank = config.integer("q_lora_rank")
        queries = [
            make_linear("q_a_proj", q_rank, hidden, bias),
            make_linear("q_b_proj", heads * (nope + rope), q_rank),
        ]
    else:
        queries = [make_linear("q_proj", heads * (nope + rope), hidden)]
    return (
        *queries,
        make_linear("kv_a_proj_with_mqa", rank + rope, hidden, bias),
        make_linear("kv_b_proj", heads * (nope + value), rank),
        make_linear("o_proj", hidden, heads * value, bias),
    )


def make_latent_attention(config: Config, name: str) -> BlockPart:
    """Return multi-head latent attention (MLA, arXiv 2405.04434) of block `name`.

    The value rows of kv_b_proj absorb o_proj's input scale.
    """
    module, has_q_lora = f"{name}.self_attn", config.has("q_lora_rank")
    heads, value = config.integer("num_attention_heads"), config.integer("v_head_dim")
    nope, kv_a = config.integer("qk_nope_head_dim"), f"{module}.kv_a_proj_with_mqa"
    first = f"{module}.q_a_proj" if has_q_lora else f"{module}.q_proj"
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
    kv_norm = make_rms_norm(f"{module}.kv_a_layernorm", config.integer("kv_lora_rank"))
    linears = make_latent_projections(config, module)
    if not has_q_lora:
        return BlockPart(linears=linears, others=(kv_norm,), groups=(into, kv_b, out))
    q_norm = make_rms_norm(f"{module}.q_a_layernorm", config.integer("q_lora_rank"))
    return BlockPart(
        linears=linears,
        others=(kv_norm, q_norm),
        groups=(into, q_b, kv_b, out),
        fused=((first, kv_a),),
    )


# --- MLP


def make_dense_mlp(config: Config, name: str, bias: bool = False) -> BlockPart:
    """Return the gated MLP of block `name`."""
    module = f"{name}.mlp"
    linears = make_gated_mlp(
        module, config.integer("hidden_size"), config.integer("intermediate_size"), "mlp", bias
    )
    gate, up, down = (linear.name for linear in linears)
    before = f"{name}.post_attention_layernorm"
    return BlockPart(
        linears=linears,
        groups=(
            LinearGroup(name=f"{module}.in", readers=(gate, up), absorber=Absorber(module=before)),
            LinearGroup(
                name=f"{module}.down", readers=(down,), absorber=Absorber(module=up), adds_to=before
            ),
        ),
        fused=((gate, up),),
    )


# --- blocks and models


def make_decoder_block(config: Config, name: str, attention: BlockPart, mlp: BlockPart) -> Block:
    """Return a pre-norm block: one RMS norm before attention and one before the MLP."""
    hidden = config.integer("hidden_size")
    norms = (
        make_rms_norm(f"{name}.input_layernorm", hidden),
        make_rms_norm(f"{name}.post_attention_layernorm", hidden),
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


def make_mtp_block(config: Config, block: Block) -> Block:
    """Return an MTP block (multi-token prediction, arXiv 2412.19437, section 2.2).

    A decoder block with its own embedding, a projection of [embedding, hidden], and its own head.
    """
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
    norms = (
        make_rms_norm(f"{name}.{module}", hidden)
        for module in ("enorm", "hnorm", "shared_head.norm")
    )
    return replace(
        block, kind="mtp", linears=(*extra, *block.linears), others=(*norms, *block.others)
    )


def make_layout(
    config: Config, block: Callable[[Config, int], Block], predictions: int = 0
) -> Layout:
    """Return embedding, blocks, `predictions` MTP blocks, final norm, and the head unless tied.

    Raises CheckpointError for more linears than any model has, which would need the memory that a
    config's numbers ask for.
    """
    count, blocks, linears = config.integer("num_hidden_layers"), list[Block](), 0
    if not 0 < count + predictions <= MAX_BLOCKS or not count:
        raise CheckpointError(
            f"{config.where}: num_hidden_layers: expected a model of 1 to {MAX_BLOCKS:,} blocks, "
            f"found {count + predictions:,}; repair it"
        )
    for layer in range(count + predictions):
        blocks.append(block(config, layer))
        linears += len(blocks[-1].linears)
        if linears > MAX_LINEARS:
            raise CheckpointError(
                f"{config.where}: expected a model of at most {MAX_LINEARS:,} linears, found more "
                f"in the first {layer + 1:,} of {count + predictions:,} blocks; repair "
                "num_hidden_layers and the number of experts"
            )
    hidden, vocabulary = config.integer("hidden_size"), config.integer("vocab_size")
    head = Linear(name="lm_head", out_features=vocabulary, in_features=hidden, role="head")
    return Layout(
        embedding=Linear(
            name="model.embed_tokens", out_features=vocabulary, in_features=hidden, role="embedding"
        ),
        blocks=(*blocks[:count], *(make_mtp_block(config, extra) for extra in blocks[count:])),
        final_tensors=(make_rms_norm("model.norm", hidden),),
        head=None if config.flag("tie_word_embeddings") else head,
    )
