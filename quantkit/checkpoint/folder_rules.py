"""Rules of a model folder: one set of weights, an allow-list of files, no redirecting keys.

Engines choose weight files by name, each by its own rule, so a folder with two sets is two models.
`quantkit/verify/README.md` has the rules of transformers, vLLM and SGLang. File names only, no
file access: `pull` applies the rules before it downloads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from quantkit.checkpoint.file_names import INDEX, SINGLE
from quantkit.io.files import shorten_repr

SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
"""The name of a shard, as `format_shard_name` makes it."""

MODULES = "modules.json"
"""The list of modules of sentence-transformers."""

_NAMED_SIDECARS = re.compile(
    "|".join((
        r"generation_config\.json",
        r"tokenizer(_config|\.\d+(\.\d+)*)?\.json",  # tokenizer.4.0.json: for newer transformers
        r"(special_tokens_map|added_tokens|tekken|vocab)\.json",
        r"(vocab|merges)\.txt",
        r"\w[\w.-]*\.(model(\.v\d+)?|tiktoken)",  # SentencePiece, Mistral's versions, tiktoken
        r"chat_template\.(jinja|json)",
        r"additional_chat_templates/\w[\w.-]*\.jinja",
        r"([a-z]+_)*(preprocessor|processor)_config\.json",
        r"[A-Za-z_]\w*\.py",
        r"(LICEN[CS]E|NOTICE)([-_.][A-Z0-9]+([-_][A-Z0-9]+|\.\d+)*)?(\.(txt|md|rst|pdf|html))?",
    )),
    re.ASCII,
)
_DATA = re.compile(
    r"([A-Za-z0-9_][\w+-]*(\.[\w+-]+)*/){0,3}[A-Za-z0-9_][\w+-]*(\.[\w+-]+)*"
    r"\.(json|jsonl|jinja|txt|md|rst|yaml|yml|csv|tsv|pdf|png|jpe?g|gif|webp|model|tiktoken)",
    re.ASCII,
)
"""Documents, images, tables and settings: data that no engine runs, also in subfolders."""
_LICENSE_NAMES = re.compile(
    r"([A-Za-z0-9_-]+/)?[\w-]*(licen[cs]e|notice|copying|copyright|policy|agreement|terms)[\w-]*",
    re.ASCII | re.IGNORECASE,
)
"""Licenses under other names, without a suffix."""
_MODULE_CONFIG = re.compile(r"\d+_[A-Za-z]+/config\.json", re.ASCII)
"""Settings of a module of sentence-transformers, 1_Pooling/config.json."""
_MODULE_WEIGHTS = re.compile(r"\d+_[A-Za-z]+/model\.safetensors", re.ASCII)
"""Weights of a module of sentence-transformers, 2_Dense/model.safetensors."""
_MODULE_PICKLE = re.compile(r"(\d+_[A-Za-z]+)/pytorch_model\.bin", re.ASCII)
_OTHER_MODELS = re.compile(
    r"(.*/)?(config(\.[\w.-]+)?|params|model_index|adapter\w*|lora\w*|.*quant(ize)?_config"
    r"|.*\.index(\..*)?|.*safetensors.*)\.json",
    re.ASCII | re.IGNORECASE,
)
"""Files by which an engine would load another model, other weights or another quantization."""
_OWN_NAMES = re.compile(
    r"readme\.md|recipe\.yaml|(.*/)?modules\.json|quantkit(/.*)?", re.ASCII | re.IGNORECASE
)
"""Names of the artifact's own files; modules.json belongs into the model's folder only."""
_PICKLES = (
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle"),
    *(".mar", ".npy", ".npz"),  # archives and arrays that may hold pickles
)
_WEIGHTS = (
    *(".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".hdf5", ".keras"),
    *(".msgpack", ".tflite", ".mlmodel", ".mlpackage", ".engine", ".plan", ".ot", ".exl2"),
)
_ADAPTERS = ("adapter_", "lora_", "adapter.")

_REDIRECTS: Mapping[str, str] = {
    "transformers_weights": "makes transformers load another file than model.safetensors",
    "configuration_files": "makes transformers read another file than config.json",
    "speculators_config": "makes vLLM serve another model, the one that it names",
    "compression_config": "is read by vLLM in place of quantization_config",
}
"""Keys of config.json with which an engine reads another file or model than the folder's own."""
_KERNELS = ("attn_implementation", "experts_implementation")
_TOKENIZER_FILES = ("tokenizer_file", "vocab_file", "merges_file", "spm_file")


def is_sidecar(name: str) -> bool:
    """Return whether a file next to weights and config.json is copied into an artifact.

    name: relative to the model's folder. Never indexes, config.json, the model card or weights, but
    for those of a module of sentence-transformers.
    """
    if is_module_weights(name):
        return True
    if name.casefold().endswith((*_PICKLES, *_WEIGHTS)):
        return False
    if name == MODULES or _MODULE_CONFIG.fullmatch(name) or _NAMED_SIDECARS.fullmatch(name):
        return True
    is_other = _OTHER_MODELS.fullmatch(name) or _OWN_NAMES.fullmatch(name)
    return not is_other and bool(_DATA.fullmatch(name) or _LICENSE_NAMES.fullmatch(name))


def is_module_config(name: str) -> bool:
    """Return whether a file has the settings of a module of sentence-transformers.

    Engines read it if modules.json names the module; without one it belongs to nothing.
    """
    return _MODULE_CONFIG.fullmatch(name) is not None


def is_module_weights(name: str) -> bool:
    """Return whether a file has the weights of a module of sentence-transformers.

    Only sentence-transformers, and vLLM for embeddings, read it, and only if modules.json names the
    module.
    """
    return _MODULE_WEIGHTS.fullmatch(name) is not None


def is_weight_file(name: str) -> bool:
    """Return whether a name is one of an artifact's weight files or of their index."""
    return name in {SINGLE, INDEX} or SHARD.fullmatch(name) is not None


def find_weight_set_faults(names: Collection[str]) -> Iterator[str]:
    """Yield why files do not hold exactly one set of weights: a single file, or index and shards.

    names: all files of the folder; those that are no weight file are skipped.
    """
    parsed = {name: match for name in sorted(names) if (match := SHARD.fullmatch(name))}
    shards = list(parsed)
    if SINGLE in names:
        if other := next((name for name in (INDEX, *shards) if name in names), None):
            yield (
                f"{SINGLE}: expected one set of weights, found {other} too: transformers loads "
                f"{SINGLE} alone, vLLM the files of the index"
            )
        return
    if INDEX in names and not shards:
        yield f"{INDEX}: expected the shards that it names, found none"
    counts = {int(match[2]) for match in parsed.values()}
    if len(counts) > 1:
        yield f"{shards[0]}: expected shards of one set, found {shards[-1]} too"
    elif counts and {int(match[1]) for match in parsed.values()} != set(range(1, max(counts) + 1)):
        yield f"{shards[0]}: expected shards 1 to {max(counts)}, found {len(shards)} of them"


def describe_foreign_file(name: str) -> str:
    """Return why an artifact does not hold a file of this name, which is in no list."""
    folded = name.casefold()
    base = folded.rpartition("/")[2]
    if module := _MODULE_PICKLE.fullmatch(name):
        return (
            f"a pickle, which runs code when it is loaded; without it sentence-transformers does "
            f"not load the module {module[1]}: save the model with sentence-transformers "
            "(save_pretrained writes safetensors) and use that folder"
        )
    if folded.endswith(_PICKLES):
        return "a pickle, which runs code when it is loaded; an artifact holds safetensors only"
    if base.startswith(_ADAPTERS):
        return "an adapter, which engines may add to the weights; an artifact holds none"
    if folded.endswith(_WEIGHTS):
        return "a second set of weights, which engines may load in place of the first"
    if folded.endswith(".index.json"):
        return f"an index of a second set of weights; an artifact has {INDEX} only"
    if folded.endswith((".py", ".pyc", ".ipynb", ".sh", ".so")):
        return "code that no auto_map names; an artifact holds none"
    if _OTHER_MODELS.fullmatch(name) or base == MODULES:
        return "a file by which an engine would load something else than this model"
    if _OWN_NAMES.fullmatch(name):
        return "the name of a file that the artifact writes itself"
    return "a kind of file that an artifact does not hold"


def find_redirects(config: Mapping[str, object], where: str) -> Iterator[str]:
    """Yield the keys of a config.json with which an engine loads something else than this folder.

    Nested configurations are searched too.
    """
    pending: list[tuple[str, Mapping[str, object]]] = [("", config)]
    while pending:
        prefix, values = pending.pop()
        for key, value in values.items():
            name = f"{prefix}{key}"
            if key in _REDIRECTS and value not in (None, {}, []):
                yield (
                    f"{where}: {name}: expected none, found {shorten_repr(value)}, which "
                    f"{_REDIRECTS[key]}; remove the key"
                )
            elif key.strip("_").removesuffix("_internal") in _KERNELS and "/" in str(value):
                yield (
                    f"{where}: {name}: expected an implementation of transformers, found "
                    f"{shorten_repr(value)}, code of another repository; remove the key"
                )
            elif isinstance(value, Mapping):
                pending.append((f"{name}.", value))


def find_tokenizer_redirects(config: Mapping[str, object], where: str) -> Iterator[str]:
    """Yield the keys of a tokenizer_config.json that name a file in another folder."""
    for key in _TOKENIZER_FILES:
        value = config.get(key)
        if isinstance(value, str) and ("/" in value or "\\" in value):
            yield (
                f"{where}: {key}: expected a file of this folder, found {shorten_repr(value)}; "
                "remove the key"
            )


def find_remote_code(config: Mapping[str, object]) -> Iterator[str]:
    """Yield the classes of an auto_map that are code of another repository."""
    auto_map = config.get("auto_map")
    entries = list(auto_map.values()) if isinstance(auto_map, Mapping) else [auto_map]
    for entry in entries:
        for name in entry if isinstance(entry, list) else [entry]:
            if isinstance(name, str) and "--" in name:
                yield name
