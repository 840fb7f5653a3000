"""What sizing found, as tables of text for a terminal of 100 columns. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from quantkit.report import format_numbers
from quantkit.report.tables import Table
from quantkit.serve.sizing.batch import RESERVE, MaxBatchedTokens
from quantkit.serve.sizing.fit import Fit, NoFit
from quantkit.serve.sizing.gpus import GIB, Gpu, GpuCatalog
from quantkit.serve.sizing.memory import MemoryEstimate, told_users
from quantkit.serve.sizing.memory_fraction import GPU_ENGINES, Server, share_of
from quantkit.serve.sizing.model import Model
from quantkit.serve.sizing.roofline import (
    Bound,
    Bounds,
    active_bytes,
    active_parameters,
    link_bytes,
)

READ = {
    "headers": "exact, from the files' headers",
    "plan": "exact, from the recipe's plan",
    "config": "computed from config.json",
}
LINKS = {
    "nvlink": "NVLink",
    "xgmi": "xGMI",
    "ethernet": "Ethernet",
    "pcie": "PCIe",
    "none": "no link",
}
BATCHES = (1, 8, 32, 128, 512)
BOUND = "Computed upper bounds from peak figures; nothing was measured."


def gb(n_bytes: float) -> str:
    """Both readings: "673.15 GB (626.92 GiB)"."""
    return f"{format_numbers.format_size(round(n_bytes))} ({n_bytes / GIB:,.2f} GiB)"


def rate(bound: Bound) -> str:
    """Tokens per second to three digits: "1,234" or "12.3"."""
    value = bound.tokens_per_s
    return f"{value:,.0f}" if value >= 100 else format_numbers.format_digits(value)


def format_headline(model: Model) -> str:
    """What the model is: "671.03 B parameters, 37.55 B at work per token; FP8 128x128"."""
    active = format_numbers.format_parameters(active_parameters(model))
    return f"{format_numbers.format_parameters(model.weights.parameters)} parameters, {active} at work per token; {model.scheme}"


def make_memory_table(needs: MemoryEstimate) -> Table:
    """Weights, cache and margin, with their arithmetic."""
    model = needs.model
    kinds = {layer.attention.kind for layer in model.layers}
    kind = "MLA" if kinds == {"latent"} else attention_name(model)
    windows = sum(layer.attention.window is not None for layer in model.layers)
    kept = f"; {windows} of {len(model.layers)} layers keep a window only" if windows else ""
    per_user = f"{needs.kv_bytes_per_token:,} B per token x {needs.context:,} tokens x {told_users(needs.users)}"
    rows = (
        ("weights", READ[model.read_from], gb(needs.weights_bytes)),
        ("KV cache", f"{kind}, {needs.kv}: {per_user}{kept}", gb(needs.kv_bytes)),
        (
            "margin",
            f"{100 * needs.margin:g} % of both, for activations and engine",
            gb(needs.margin_bytes),
        ),
        ("total", "on all cards together", gb(needs.total_bytes)),
    )
    return Table(title="Memory", columns=("part", "how", ">bytes"), rows=rows, note=mtp_note(needs))


def attention_name(model: Model) -> str:
    """MHA, GQA or MQA, by the heads of the first layer."""
    attention = model.layers[0].attention
    if attention.kv_heads == attention.heads:
        return "MHA"
    return "MQA" if attention.kv_heads == 1 else f"GQA {attention.heads}/{attention.kv_heads}"


def mtp_note(needs: MemoryEstimate) -> str:
    """Whether the block that predicts further tokens is counted."""
    if not needs.model.mtp.n_bytes:
        return ""
    size = format_numbers.format_size(needs.model.mtp.n_bytes)
    if needs.speculative:
        return f"The MTP block ({size}) is counted: speculative decoding loads it."
    return f"The MTP block ({size}) is not counted: engines load it for speculative decoding alone (--mtp)."


def make_gpu_table(found: Sequence[tuple[Fit, Bounds | None]], dated: GpuCatalog) -> Table:
    """Each card: what it takes, what it leaves room for, how fast it can be at most."""
    rows = []
    for fit, made in found:
        name = fit.card.short + ("" if fit.card.served else " **")
        placement = fit.placement
        if placement is None or made is None:
            rows.append((name, f"no: {fit.least_cards}+", *("-",) * 7))
            continue
        split = f"TP{placement.tp}" + (f" x PP{placement.pp}" if placement.pp > 1 else "")
        rows.append((
            name,
            str(placement.cards),
            str(placement.nodes),
            split,
            format_numbers.format_count(fit.max_context),
            format_numbers.format_count(fit.max_users),
            rate(made.one),
            rate(made.all),
            f"{rate(made.prefill)}{'*' if made.prefill.limit == 'interconnect' else ''}",
        ))
    columns = (
        "card", ">cards", ">nodes", "split", ">context", ">users", ">1 user t/s", ">all t/s", ">prefill t/s",
    )  # fmt: skip
    needs = found[0][0].needs if found else None
    asked = told_asked(needs) if needs else ""
    asked += cheapest([fit for fit, _ in found])
    note = f"{BOUND} Cards as of {dated.updated}, {len(dated.sources)} sources (cards.yaml).{asked}"
    star = " * links between cards are the limit." if any("*" in row[-1] for row in rows) else ""
    star += (
        ""
        if all(fit.card.served for fit, _ in found)
        else " ** neither vLLM nor SGLang runs there."
    )
    return Table(title="Cards", columns=columns, rows=tuple(rows), note=note + star)


def told_asked(needs: MemoryEstimate) -> str:
    """What the columns of a table of cards are of."""
    users, tokens = told_users(needs.users), f"{needs.context:,} tokens"
    return (
        f" context: longest for {users}; users: most at {tokens}; 1 user t/s: alone, at the first tokens; all t/s: "
        f"{users} at {tokens}."
    )


def cheapest(fits: Sequence[Fit]) -> str:
    """The cards that cost least of those that engines run on, in one node where one is enough; nothing where there is
    no choice."""
    placed = [(fit.placement, fit.card) for fit in fits if fit.placement and fit.card.served]
    inside = [pair for pair in placed if pair[0].nodes == 1] or placed
    if len(placed) < 2:
        return ""
    placement, card = min(inside, key=lambda pair: pair[0].cards * pair[1].price_usd.value)
    price, where = (
        placement.cards * card.price_usd.value,
        " in one node" if placement.nodes == 1 else "",
    )
    return f" Cheapest{where}: {placement.cards} x {card.short}, {price:,.0f} USD."


# ------------------------------------------------------------------------------------------------------- of one card


def make_gpu_facts_table(card: Gpu, dated: GpuCatalog) -> Table:
    """A card's figures with source and date."""
    link = card.link
    one_way = f"{card.link.one_way / 1e9:g} GB/s each way" if link.gb_s else "none"
    figures = [
        (
            "memory",
            f"{card.memory_gb.value:g} GB = {card.memory_gb.value * 1e9 / GIB:.1f} GiB",
            card.memory_gb,
        ),
        *(
            [("driver reports", f"{card.reported_mib.value:,.0f} MiB", card.reported_mib)]
            if card.reported_mib
            else []
        ),
        *([("usable", f"{100 * card.usable.value:g} %", card.usable)] if card.usable else []),
        ("bandwidth", f"{card.bandwidth_gb_s.value:,.0f} GB/s", card.bandwidth_gb_s),
        *(
            (name, f"{figure.value:,.1f} T{'OP' if name == 'INT8' else 'FLOP'}/s", figure)
            for name, figure in (
                ("BF16", card.tflops.bf16),
                ("FP8", card.tflops.fp8),
                ("INT8", card.tflops.int8),
            )
            if figure
        ),
        *([(LINKS[link.kind], one_way, link.gb_s)] if link.gb_s else []),
        ("power", f"{card.watts.value:g} W", card.watts),
        ("price", f"{card.price_usd.value:,.0f} USD", card.price_usd),
    ]
    rows = tuple(
        (name, value, source_told(dated, figure.source or card.source), figure.note)
        for name, value, figure in figures
    )
    return Table(
        title=card.name, columns=("figure", "value", "source", "note"), rows=rows, note=card.note
    )


def source_told(dated: GpuCatalog, key: str) -> str:
    """Name and date of a source."""
    source = dated.sources[key]
    return f"{source.name}, {source.read}"


def make_bounds_table(fit: Fit, made: Bounds) -> Table:
    """Each bound and what sets it."""
    needs = fit.needs
    rows = (
        ("decode, one user", "first tokens, nobody else served", rate(made.one), made.one.limit),
        (
            "decode, all users",
            f"{needs.users} at {needs.context:,} tokens each",
            rate(made.all),
            made.all.limit,
        ),
        ("prefill", f"prompts of {needs.context:,} tokens", rate(made.prefill), made.prefill.limit),
    )
    return Table(
        title="Bounds", columns=("what", "of", ">tokens/s", "limit"), rows=rows, note=BOUND
    )


def make_parallelism_table(fit: Fit) -> Table:
    """Tensor-parallel degrees, and why some are refused."""
    rows = tuple(
        (str(degree.tp), "allowed" if degree.fault is None else "refused", degree.fault or "")
        for degree in fit.degrees
    )
    note = "By heads, KV heads, widths and the groups, words and FP8 blocks of the stored weights."
    if any(degree.tp > 1 and fit.needs.model.vocabulary % degree.tp for degree in fit.degrees):
        note += " Engines pad the vocabulary, which forbids nothing."
    return Table(title="Tensor parallelism", columns=(">ranks", "", "why"), rows=rows, note=note)


def make_batch_table(fit: Fit) -> Table | None:
    """What batches of a mixture read: experts hit, bytes per step and per token; None for a dense model."""
    model = fit.needs.model
    if model.mixture is None:
        return None
    rows = []
    for batch in BATCHES:
        read = active_bytes(model, batch)
        hit = model.mixture.distinct(batch)
        rows.append((
            str(batch),
            f"{hit:.1f} of {model.mixture.count}",
            format_numbers.format_size(round(read)),
            format_numbers.format_size(round(read / batch)),
        ))
    note = "Expected of a router that spreads tokens evenly: E (1 - (1 - k/E)^n); a skewed one hits fewer."
    columns = (">tokens in a step", ">experts hit per layer", ">weights read", ">per token")
    return Table(title="Batches", columns=columns, rows=tuple(rows), note=note)


def make_batched_tokens_table(found: Mapping[Server, MaxBatchedTokens], fit: Fit) -> Table:
    """How many tokens a step of each engine may hold, and what of a card that takes."""
    assert fit.placement is not None
    of = {server: share_of(fit, fit.placement, server).value for server in found}
    free = {"vllm": "{:.2f} x card - weights - cache", "sglang": "(1 - {:.2f}) x card"}
    told = "; ".join(
        f"{GPU_ENGINES[server]} {free[server].format(share)}" for server, share in of.items()
    )
    one = next(iter(found.values()))
    needs, sides = fit.needs, found.values()
    each = f"{one.per_token:,} B a token, {one.routed_per_token:,} B of it copies for experts"
    reserve = f"{100 * RESERVE:g} % of the first line on purpose, for fragmentation"
    rows = (
        (
            "left to a step",
            told,
            *(format_numbers.format_size(max(0, side.free_bytes)) for side in sides),
        ),
        (
            "engine",
            "CUDA context, buffers, graphs: assumed",
            *(f"-{format_numbers.format_size(s.runtime_bytes)}" for s in sides),
        ),
        (
            "logits",
            f"{told_users(needs.users)} x {needs.model.vocabulary:,} x 4 B",
            *(f"-{format_numbers.format_size(side.logits_bytes)}" for side in sides),
        ),
        ("activations", each, *(f"-{format_numbers.format_size(side.used)}" for side in sides)),
        ("left", reserve, *(format_numbers.format_size(max(0, side.left)) for side in sides)),
        ("safe tokens", "whichever experts they hit", *(f"{side.safe:,}" for side in sides)),
    )
    note = (
        "Safe: all experts lie in memory, and under tensor parallelism the workspace depends on a step's tokens alone "
        "(--max-num-batched-tokens, --chunked-prefill-size)."
    )
    if fit.placement.tp > 1:
        even = " and ".join(f"{side.even:,}" for side in sides)
        worst = " and ".join(f"{side.worst:,}" for side in sides)
        note += (
            f" With expert parallelism {even} tokens per rank if the router spreads them evenly, {worst} if one rank "
            "is sent all."
        )
    columns = ("part", "how", *(f">{GPU_ENGINES[server]}" for server in found))
    return Table(title="Tokens per step", columns=columns, rows=rows, note=note)


def format_shortfall(found: NoFit) -> str:
    """Why stages are taken, and what makes them needless: "TP8 alone misses 0.2 GB a card; it fits with --kv fp8"."""
    ways = [
        *(["--kv fp8"] if found.fp8 else []),
        *([f"--users {found.users}"] if found.users else []),
    ]
    why = " (MLA's cache lies whole on every rank)" if found.latent else ""
    return f"TP{found.tp} alone misses {format_numbers.format_size(found.n_bytes)} a card{why}; it fits with {' or '.join(ways)}"


def format_single_gpu(fit: Fit) -> str | None:
    """What one card would do where more are taken; None where it does not hold the weights."""
    if fit.one_card or not fit.one_card_context:
        return None
    context, users = format_numbers.format_count(fit.one_card_context), told_users(fit.needs.users)
    return f"On one card: at most {context} tokens for {users} (--context {fit.one_card_context})."


def iterate_link_notes(fit: Fit, made: Bounds) -> Iterator[str]:
    """Sentences on what the links between cards allow."""
    placement, card = fit.placement, fit.card
    if placement is None or placement.tp == 1:
        return
    layers = -(-len(fit.needs.model.layers) // placement.pp)
    sent = link_bytes(fit.needs.model, placement.tp, layers)
    told = f"{sent / 1e6:.2f} MB per token and card over {LINKS[card.link.kind]}, {card.link.one_way / 1e9:g} GB/s a way"
    if made.prefill.limit == "interconnect":
        yield (
            f"The interconnect is the limit of prefill: {told}, {rate(made.prefill)} tokens/s, where arithmetic "
            f"allows {rate(made.prefill_without_link)}."
        )
    else:
        yield f"The interconnect is not the limit of prefill: {told}."
    if made.all.limit == "interconnect":
        yield "The interconnect is the limit of decoding for all users too."
    if placement.nodes > 1:
        yield "Stages on other nodes pass one vector per token; the network between nodes is not in these bounds."
