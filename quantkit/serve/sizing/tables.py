"""Results of sizing as tables of text for a terminal of 100 columns. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from quantkit.report import format_numbers
from quantkit.report.table import Table
from quantkit.serve.sizing.batch import RESERVE_FRACTION, MaxBatchedTokens
from quantkit.serve.sizing.fit import Fit, Placement, TensorParallelShortfall
from quantkit.serve.sizing.gpus import GIB, Gpu, GpuCatalog
from quantkit.serve.sizing.memory import MemoryEstimate, format_users
from quantkit.serve.sizing.memory_fraction import (
    GPU_ENGINES,
    GpuEngine,
    compute_memory_fraction,
)
from quantkit.serve.sizing.model import Model
from quantkit.serve.sizing.roofline import (
    Bound,
    Bounds,
    count_active_bytes,
    count_active_parameters,
    count_link_bytes,
)

WEIGHT_SOURCES = {
    "headers": "exact, from the files' headers",
    "plan": "exact, from the recipe's plan",
    "config": "computed from config.json",
}
LINK_NAMES = {
    "nvlink": "NVLink",
    "xgmi": "xGMI",
    "ethernet": "Ethernet",
    "pcie": "PCIe",
    "none": "no link",
}
BATCH_SIZES = (1, 8, 32, 128, 512)
BOUND_NOTE = "Computed upper bounds from peak figures; nothing was measured."


def format_gb(n_bytes: float) -> str:
    """Format bytes in both units: "673.15 GB (626.92 GiB)"."""
    return f"{format_numbers.format_size(round(n_bytes))} ({n_bytes / GIB:,.2f} GiB)"


def format_rate(bound: Bound) -> str:
    """Format tokens per second to three digits: "1,234" or "12.3"."""
    value = bound.tokens_per_s
    return f"{value:,.0f}" if value >= 100 else format_numbers.format_digits(value)


def format_parallelism(placement: Placement) -> str:
    """Format degrees of parallelism: "TP8 x PP2"."""
    return f"TP{placement.tp}" + (f" x PP{placement.pp}" if placement.pp > 1 else "")


def format_headline(model: Model) -> str:
    """Describe a model: "671.03 B parameters, 37.55 B active per token; FP8 128x128"."""
    total = format_numbers.format_parameters(model.weights.parameters)
    active = format_numbers.format_parameters(count_active_parameters(model))
    return f"{total} parameters, {active} active per token; {model.scheme}"


def make_memory_table(memory: MemoryEstimate) -> Table:
    """Make the table of weights, cache and margin, with their arithmetic."""
    model = memory.model
    kinds = {layer.attention.kind for layer in model.layers}
    kind = "MLA" if kinds == {"latent"} else name_attention(model)
    windows = sum(layer.attention.window is not None for layer in model.layers)
    window_note = f"; {windows} of {len(model.layers)} layers have a window" if windows else ""
    cache = (
        f"{kind}, {memory.kv}: {memory.kv_bytes_per_token:,} B per token x {memory.context:,} "
        f"tokens x {format_users(memory.users)}{window_note}"
    )
    margin = f"{100 * memory.margin:g} % of both, for activations and engine"
    rows = (
        ("weights", WEIGHT_SOURCES[model.read_from], format_gb(memory.weights_bytes)),
        ("KV cache", cache, format_gb(memory.kv_bytes)),
        ("margin", margin, format_gb(memory.margin_bytes)),
        ("total", "over all GPUs", format_gb(memory.total_bytes)),
    )
    note = format_mtp_note(memory)
    return Table(title="Memory", columns=("part", "source", ">bytes"), rows=rows, note=note)


def name_attention(model: Model) -> str:
    """Return MHA, GQA or MQA, by the heads of the first layer."""
    attention = model.layers[0].attention
    if attention.kv_heads == attention.heads:
        return "MHA"
    return "MQA" if attention.kv_heads == 1 else f"GQA {attention.heads}/{attention.kv_heads}"


def format_mtp_note(memory: MemoryEstimate) -> str:
    """Say whether the block for multi-token prediction is counted."""
    if not memory.model.mtp.n_bytes:
        return ""
    size = format_numbers.format_size(memory.model.mtp.n_bytes)
    if memory.speculative:
        return f"The MTP block ({size}) is counted: speculative decoding loads it."
    return (
        f"The MTP block ({size}) is not counted: engines load it only for speculative decoding "
        "(--mtp)."
    )


def make_gpu_table(fits: Sequence[tuple[Fit, Bounds | None]], catalog: GpuCatalog) -> Table:
    """Make the table of GPUs: their number, limits of context and users, speed bounds."""
    rows = []
    for fit, bounds in fits:
        name = fit.gpu.short + ("" if fit.gpu.served else " **")
        placement = fit.placement
        if placement is None or bounds is None:
            rows.append((name, f"no: {fit.min_gpus}+", *("-",) * 7))
            continue
        rows.append((
            name,
            str(placement.gpus),
            str(placement.nodes),
            format_parallelism(placement),
            format_numbers.format_count(fit.max_context),
            format_numbers.format_count(fit.max_users),
            format_rate(bounds.one),
            format_rate(bounds.all),
            f"{format_rate(bounds.prefill)}{'*' if bounds.prefill.limit == 'interconnect' else ''}",
        ))
    columns = (
        "GPU", ">GPUs", ">nodes", "split", ">context", ">users", ">1 user t/s", ">all t/s",
        ">prefill t/s",
    )  # fmt: skip
    note = (
        f"{BOUND_NOTE} GPU data of {catalog.updated}, {len(catalog.sources)} sources (gpus.yaml)."
    )
    note += format_column_note(fits[0][0].memory) if fits else ""
    note += format_cheapest([fit for fit, _ in fits])
    if any("*" in row[-1] for row in rows):
        note += " * limited by the links between GPUs."
    if not all(fit.gpu.served for fit, _ in fits):
        note += " ** not supported by vLLM or SGLang."
    return Table(title="GPUs", columns=columns, rows=tuple(rows), note=note)


def format_column_note(memory: MemoryEstimate) -> str:
    """Explain the columns of a table of GPUs."""
    users, tokens = format_users(memory.users), f"{memory.context:,} tokens"
    return (
        f" context: longest for {users}; users: most at {tokens}; 1 user t/s: one request at its "
        f"first tokens; all t/s: {users} at {tokens}."
    )


def format_cheapest(fits: Sequence[Fit]) -> str:
    """Name the cheapest GPUs that engines support, in one node if one is enough.

    Empty for fewer than two candidates.
    """
    placed = [(fit.placement, fit.gpu) for fit in fits if fit.placement and fit.gpu.served]
    if len(placed) < 2:
        return ""
    single_node = [pair for pair in placed if pair[0].nodes == 1] or placed
    placement, gpu = min(single_node, key=lambda pair: pair[0].gpus * pair[1].price_usd.value)
    price = placement.gpus * gpu.price_usd.value
    where = " in one node" if placement.nodes == 1 else ""
    return f" Cheapest{where}: {placement.gpus} x {gpu.short}, {price:,.0f} USD."


# ---------------------------------------------------------------------------------------- one GPU


def make_gpu_facts_table(gpu: Gpu, catalog: GpuCatalog) -> Table:
    """Make the table of a GPU's specifications with source and date."""
    memory = gpu.memory_gb.value
    values = [("memory", f"{memory:g} GB = {memory * 1e9 / GIB:.1f} GiB", gpu.memory_gb)]
    if gpu.reported_mib:
        values.append(("driver reports", f"{gpu.reported_mib.value:,.0f} MiB", gpu.reported_mib))
    if gpu.usable:
        values.append(("usable", f"{100 * gpu.usable.value:g} %", gpu.usable))
    values.append(("bandwidth", f"{gpu.bandwidth_gb_s.value:,.0f} GB/s", gpu.bandwidth_gb_s))
    peaks = (("BF16", gpu.tflops.bf16), ("FP8", gpu.tflops.fp8), ("INT8", gpu.tflops.int8))
    for name, peak in peaks:
        if peak:
            unit = "TOP/s" if name == "INT8" else "TFLOP/s"
            values.append((name, f"{peak.value:,.1f} {unit}", peak))
    if gpu.link.gb_s:
        one_way = f"{gpu.link.one_way / 1e9:g} GB/s per direction"
        values.append((LINK_NAMES[gpu.link.kind], one_way, gpu.link.gb_s))
    values.append(("power", f"{gpu.watts.value:g} W", gpu.watts))
    values.append(("price", f"{gpu.price_usd.value:,.0f} USD", gpu.price_usd))
    rows = tuple(
        (name, text, format_source(catalog, value.source or gpu.source), value.note)
        for name, text, value in values
    )
    columns = ("figure", "value", "source", "note")
    return Table(title=gpu.name, columns=columns, rows=rows, note=gpu.note)


def format_source(catalog: GpuCatalog, key: str) -> str:
    """Format name and date of a source."""
    source = catalog.sources[key]
    return f"{source.name}, {source.read}"


def make_bounds_table(fit: Fit, bounds: Bounds) -> Table:
    """Make the table of bounds and their limits."""
    memory = fit.memory
    tokens = f"{memory.context:,} tokens"
    workloads = (
        ("decode, one user", "first tokens, no other request", bounds.one),
        ("decode, all users", f"{memory.users} at {tokens} each", bounds.all),
        ("prefill", f"prompts of {tokens}", bounds.prefill),
    )
    rows = tuple(
        (name, workload, format_rate(bound), bound.limit) for name, workload, bound in workloads
    )
    columns = ("bound", "workload", ">tokens/s", "limit")
    return Table(title="Bounds", columns=columns, rows=rows, note=BOUND_NOTE)


def make_parallelism_table(fit: Fit) -> Table:
    """Make the table of tensor-parallel sizes, and of the reasons why some are rejected."""
    rows = tuple(
        (str(config.tp), "rejected" if config.fault else "allowed", config.fault or "")
        for config in fit.parallel_configs
    )
    note = "By heads, KV heads, widths, and groups, words and FP8 blocks of the stored weights."
    vocab_size = fit.memory.model.vocab_size
    if any(config.tp > 1 and vocab_size % config.tp for config in fit.parallel_configs):
        note += " Engines pad the vocabulary, so it is no constraint."
    columns = (">ranks", "", "reason")
    return Table(title="Tensor parallelism", columns=columns, rows=rows, note=note)


def make_batch_table(fit: Fit) -> Table | None:
    """Make the table of batch sizes: experts used, bytes read; None for a dense model."""
    model = fit.memory.model
    if model.moe is None:
        return None
    rows = []
    for batch in BATCH_SIZES:
        read = count_active_bytes(model, batch)
        experts = model.moe.compute_expected_experts(batch)
        rows.append((
            str(batch),
            f"{experts:.1f} of {model.moe.num_experts}",
            format_numbers.format_size(round(read)),
            format_numbers.format_size(round(read / batch)),
        ))
    note = (
        "Expected for a router that spreads tokens evenly: E (1 - (1 - k/E)^n); a skewed router "
        "uses fewer experts."
    )
    columns = (">tokens per step", ">experts used per layer", ">weights read", ">per token")
    return Table(title="Batches", columns=columns, rows=tuple(rows), note=note)


def make_batched_tokens_table(limits: Mapping[GpuEngine, MaxBatchedTokens], fit: Fit) -> Table:
    """Make the table of the tokens per step of each engine, and of the memory they take."""
    assert fit.placement is not None
    formulas = {"vllm": "{:.2f} x GPU - weights - cache", "sglang": "(1 - {:.2f}) x GPU"}
    free = "; ".join(
        f"{GPU_ENGINES[engine]} "
        + formulas[engine].format(compute_memory_fraction(fit, fit.placement, engine).value)
        for engine in limits
    )
    first = next(iter(limits.values()))
    memory, columns = fit.memory, limits.values()
    logits = f"{format_users(memory.users)} x {memory.model.vocab_size:,} x 4 B"
    activations = (
        f"{first.bytes_per_token:,} B per token, {first.expert_bytes_per_token:,} B of it copies "
        "for experts"
    )
    reserve = f"{100 * RESERVE_FRACTION:g} % of the first line, for fragmentation"

    def format_used(n_bytes: int) -> str:
        return f"-{format_numbers.format_size(n_bytes)}"

    def format_left(n_bytes: int) -> str:
        return format_numbers.format_size(max(0, n_bytes))

    rows = (
        ("memory of a step", free, *(format_left(limit.free_bytes) for limit in columns)),
        (
            "engine",
            "CUDA context, buffers, graphs: assumed",
            *(format_used(limit.runtime_bytes) for limit in columns),
        ),
        ("logits", logits, *(format_used(limit.logits_bytes) for limit in columns)),
        ("activations", activations, *(format_used(limit.used_bytes) for limit in columns)),
        ("left", reserve, *(format_left(limit.left_bytes) for limit in columns)),
        ("safe tokens", "for any routing", *(f"{limit.safe:,}" for limit in columns)),
    )
    note = (
        "Safe: all experts are in memory, and under tensor parallelism the workspace depends only "
        "on a step's tokens (--max-num-batched-tokens, --chunked-prefill-size)."
    )
    if fit.placement.tp > 1:
        even = " and ".join(f"{limit.even:,}" for limit in columns)
        worst = " and ".join(f"{limit.worst:,}" for limit in columns)
        note += (
            f" With expert parallelism {even} tokens per rank if the router spreads them evenly, "
            f"{worst} if all are routed to one rank."
        )
    names = ("part", "source", *(f">{GPU_ENGINES[engine]}" for engine in limits))
    return Table(title="Tokens per step", columns=names, rows=rows, note=note)


def format_shortfall(shortfall: TensorParallelShortfall) -> str:
    """Explain pipeline stages: "TP8 alone misses 0.2 GB per GPU; it fits with --kv fp8"."""
    options = ["--kv fp8"] if shortfall.fits_fp8_cache else []
    options += [f"--users {shortfall.max_users}"] if shortfall.max_users else []
    reason = " (every rank holds MLA's whole cache)" if shortfall.is_latent else ""
    missing = format_numbers.format_size(shortfall.missing_bytes)
    return (
        f"TP{shortfall.tp} alone misses {missing} per GPU{reason}; it fits with "
        f"{' or '.join(options)}"
    )


def format_single_gpu(fit: Fit) -> str | None:
    """State the longest context on one GPU if more are needed; None if it cannot hold the model."""
    if fit.fits_single_gpu or not fit.single_gpu_context:
        return None
    context = format_numbers.format_count(fit.single_gpu_context)
    users = format_users(fit.memory.users)
    return f"On one GPU: at most {context} tokens for {users} (--context {fit.single_gpu_context})."


def iterate_link_notes(fit: Fit, bounds: Bounds) -> Iterator[str]:
    """Yield sentences about the limits by the links between GPUs."""
    placement, link = fit.placement, fit.gpu.link
    if placement is None or placement.tp == 1:
        return
    num_layers = -(-len(fit.memory.model.layers) // placement.pp)
    sent = count_link_bytes(fit.memory.model, placement.tp, num_layers)
    traffic = (
        f"{sent / 1e6:.2f} MB per token and GPU over {LINK_NAMES[link.kind]}, "
        f"{link.one_way / 1e9:g} GB/s per direction"
    )
    if bounds.prefill.limit == "interconnect":
        yield (
            f"The interconnect is the limit of prefill: {traffic}, {format_rate(bounds.prefill)} "
            f"tokens/s; arithmetic allows {format_rate(bounds.prefill_without_link)}."
        )
    else:
        yield f"The interconnect is not the limit of prefill: {traffic}."
    if bounds.all.limit == "interconnect":
        yield "The interconnect is the limit of decoding for all users too."
    if placement.nodes > 1:
        yield (
            "Stages on other nodes pass one vector per token; the network between nodes is not in "
            "these bounds."
        )
