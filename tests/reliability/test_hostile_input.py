"""Tests of malicious files on the command line: one error message, in limited time, exit code 1 or
2.

Each case damages a valid source, recipe, text or artifact in one way. `expect_rejection` runs the
command and asserts the common conditions; the case states part of the message.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint

from quantkit.cli.main import main
from quantkit.texts.corpus_spec import MAX_SHOWN_FAULTS

SECONDS = 20  # CPU time, because other tests may run in parallel
MEMORY_BYTES = 1_500_000_000
MESSAGE_CHARACTERS = 1500
Record = Callable[[str, object], None]


def run_command(*arguments: str | Path) -> tuple[int, str]:
    """Run quantkit. Return exit code and output.

    Asserts that there is no traceback and no control character, and checks the time and memory
    limits.
    """
    before, start = read_peak_memory(), time.process_time()
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(
        result.exception
    )[:2000]
    assert time.process_time() - start < SECONDS
    assert read_peak_memory() - before < MEMORY_BYTES
    assert "Traceback" not in result.output
    assert all(line.isprintable() for line in result.output.split("\n"))
    return result.exit_code, result.output


def expect_rejection(*arguments: str | Path, max_lines: int = 1) -> str:
    """Run a command that must reject its input.

    Return its error message, of one line by default.
    """
    code, printed = run_command(*arguments)
    assert code in (1, 2), printed
    head, error, message = printed.partition("error: ")
    assert error and not head, printed
    assert 20 < len(message) < MESSAGE_CHARACTERS, message
    n_lines = message.count("\n")
    assert 1 <= n_lines <= max_lines, f"expected at most {max_lines} lines: {message}"
    return message


def read_peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# --------------------------------------------------------------------------------------- the source


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a small valid llama checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("good") / "source", make_tiny_config("llama"))


@pytest.fixture
def source(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the checkpoint so that a test can damage it; recipes write next to it, in the working
    folder.
    """
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(good, tmp_path / "source"))


def make_plan_arguments(source: Path, **keys: str) -> tuple[str, Path]:
    """Return the arguments of `quantkit plan` for a source."""
    path = source.parent / "recipe.yaml"
    path.write_text(make_recipe_text(source, source.parent / "out", rules="all-linear", **keys))
    return "plan", path


def read_source_header(source: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of the source's weights."""
    whole = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def write_weights(source: Path, text: bytes, data: bytes = b"") -> None:
    """Write weights with this header."""
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_entry(source: Path, name: str, **values: object) -> None:
    """Change the header entry of one tensor."""
    entries, data = read_source_header(source)
    entries[name] |= values
    write_weights(source, json.dumps(entries).encode(), data)


NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
BOMB = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 10_000
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"


def claim_long_header(source: Path) -> None:
    """Claim a header of 100 MB in a short file."""
    (source / "model.safetensors").write_bytes(
        (100_000_000).to_bytes(8, "little") + b"{" + b" " * 1000
    )


def claim_huge_header(source: Path) -> None:
    """Claim a header of 2**63 bytes."""
    (source / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")


def write_zero_header(source: Path) -> None:
    """Write a header of 100 MB of zeros as a sparse file."""
    with (source / "model.safetensors").open("wb") as file:
        file.write((100_000_000).to_bytes(8, "little") + b"{")
        file.truncate(100_000_008)


def write_blank_header(source: Path) -> None:
    """Write a header of 100 MB of blanks inside braces."""
    write_weights(source, b"{" + b" " * 99_999_998 + b"}")


def write_many_tensors(source: Path) -> None:
    """Write a header of 36 MB that lists 600,000 empty tensors."""
    one = '"t%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    write_weights(
        source, ("{" + ",".join(one % number for number in range(600_000)) + "}").encode()
    )


def overlap_tensors(source: Path) -> None:
    """Make two tensors share bytes."""
    entries, _ = read_source_header(source)
    first, second = [name for name in entries if name != "__metadata__"][:2]
    change_entry(
        source, second, data_offsets=entries[first]["data_offsets"], shape=entries[first]["shape"]
    )


def truncate_data(source: Path) -> None:
    """Truncate the data within the last tensor."""
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-10])


def change_dtype_and_size(source: Path) -> None:
    """Declare a BF16 tensor as F32."""
    change_entry(source, NORM, dtype="F32")


def change_dtype(source: Path) -> None:
    """Declare a BF16 matrix as int16, which has the same size."""
    change_entry(source, "model.layers.0.mlp.up_proj.weight", dtype="I16")


def overflow_shape(source: Path) -> None:
    """Set a shape whose product is 0 in 64 bits."""
    change_entry(source, NORM, shape=[2**32, 2**32])


def overflow_empty_shape(source: Path) -> None:
    """Set a shape with a zero, whose strides overflow."""
    change_entry(source, NORM, shape=[0, 2**62, 2**62], data_offsets=[0, 0])


def duplicate_tensor(source: Path) -> None:
    """List a tensor twice in the header."""
    entries, data = read_source_header(source)
    text = json.dumps(entries)
    write_weights(
        source, (text[:-1] + f', "{NORM}": ' + json.dumps(entries[NORM]) + "}").encode(), data
    )


def replace_config(text: str | bytes) -> Callable[[Path], None]:
    """Return a function that replaces config.json with this text."""

    def damage(source: Path) -> None:
        (source / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)

    return damage


def set_config_key(key: str, raw: str) -> Callable[[Path], None]:
    """Return a function that sets a key of config.json to this raw text."""

    def damage(source: Path) -> None:
        values = json.loads((source / "config.json").read_text()) | {key: "@"}
        (source / "config.json").write_text(json.dumps(values).replace('"@"', raw))

    return damage


def add_index(name: str, make: Callable[[Path], object] | None = None) -> Callable[[Path], None]:
    """Return a function that replaces the weights with an index to `name`, which `make` creates."""

    def damage(source: Path) -> None:
        entries, _ = read_source_header(source)
        table = {tensor: name for tensor in entries if tensor != "__metadata__"}
        if make:
            make(source)
        (source / "model.safetensors").unlink()
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))

    return damage


def copy_weights_to(place: str) -> Callable[[Path], object]:
    """Return a function that copies the weights to another path."""
    return lambda source: shutil.copy(source / "model.safetensors", source / place)


def link_outside(source: Path) -> None:
    """Replace the shard with a link to a file outside the folder."""
    shutil.move(source / "model.safetensors", source.parent / "real.safetensors")
    (source / "model.safetensors").symlink_to(source.parent / "real.safetensors")


def link_to_itself(source: Path) -> None:
    """Replace the shard with a link to itself."""
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(source / "model.safetensors")


def replace_with_pipe(source: Path) -> None:
    """Replace the shard with a named pipe without a writer."""
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")


def replace_with_folder(source: Path) -> None:
    """Replace the shard with a folder."""
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").mkdir()


class Payload:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return exec, ("open('/tmp/quantkit-was-unpickled', 'w')",)


def write_pickle(name: str) -> Callable[[Path], object]:
    """Return a function that writes a pickle under that name."""
    return lambda source: (source / name).write_bytes(pickle.dumps(Payload()))


def keep_only_pickle(source: Path) -> None:
    """Replace the weights with pytorch_model.bin."""
    write_pickle("pytorch_model.bin")(source)
    (source / "model.safetensors").unlink()


def add_tensor(name: str) -> Callable[[Path], None]:
    """Return a function that adds a tensor of that name."""

    def damage(source: Path) -> None:
        entries, data = read_source_header(source)
        end = len(data)
        entries[name] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
        write_weights(source, json.dumps(entries).encode(), data + bytes(4))

    return damage


SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "header of 100 MB that is not there": (claim_long_header, "header length: expected at most"),
    "header of 2**63 bytes": (claim_huge_header, "header length: expected"),
    "header of 100 MB of zeros": (write_zero_header, "header: expected JSON"),
    "header of 100 MB of blanks": (write_blank_header, "the tensors do not fit"),
    "header of 600,000 tensors": (write_many_tensors, "expected at most 500,000 tensors"),
    "overlapping offsets": (overlap_tensors, "which overlaps"),
    "offsets past the end": (truncate_data, "the file is truncated"),
    "dtype of other size": (change_dtype_and_size, "bytes for F32"),
    "shape that overflows": (overflow_shape, "fewer than 2**63 elements"),
    "empty shape that overflows": (overflow_empty_shape, "fewer than 2**63 elements"),
    "tensor twice": (duplicate_tensor, "expected every key once"),
    "header nested": (lambda s: write_weights(s, b'{"a":' + BOMB.encode() + b"}"), "nesting"),
    "header of 10,000 digits": (
        lambda s: write_weights(s, b'{"a":' + DIGITS.encode() + b"}"),
        "a number beyond",
    ),
    "header with a BOM": (lambda s: write_weights(s, b"\xef\xbb\xbf{}"), "expected to start with"),
    "header not UTF-8": (lambda s: write_weights(s, b'{"\xff":1}'), "expected UTF-8"),
    "half a surrogate as a name": (
        lambda s: write_weights(s, b'{"\\ud800":1}'),
        "half a surrogate",
    ),
    "NUL as a name": (add_tensor("\0"), "not claimed by the architecture"),
    "escape sequences as a name": (add_tensor(ESCAPES), "not claimed by the architecture"),
    "a name of a megabyte": (add_tensor("A" * 1_000_000), "not claimed by the architecture"),
    "config: BOM": (replace_config(b"\xef\xbb\xbf{}"), "byte order mark"),
    "config: not UTF-8": (replace_config(b'{"model_type": "\xff"}'), "expected UTF-8"),
    "config: UTF-16": (replace_config('{"a": 1}'.encode("utf-16")), "expected UTF-8"),
    "config: NUL bytes": (replace_config(b"\0" * 1000), "expected JSON"),
    "config: a list": (replace_config("[]"), "expected a JSON object"),
    "config: empty": (replace_config(""), "expected JSON"),
    "config: key twice": (
        replace_config('{"model_type": "llama", "model_type": "mixtral"}'),
        "every key once",
    ),
    "config: nested": (set_config_key("rope_scaling", BOMB), "nesting"),
    "config: 10,000 digits": (set_config_key("hidden_size", DIGITS), "a number beyond"),
    "config: 4,000 digits": (
        set_config_key("hidden_size", "9" * 4000),
        "hidden_size: expected an integer",
    ),
    "config: half a surrogate": (set_config_key("model_type", '"\\ud800"'), "half a surrogate"),
    "config: escape sequences": (
        set_config_key("model_type", json.dumps(ESCAPES)),
        "no architecture named",
    ),
    "config: a path as a family": (
        set_config_key("model_type", '"../../x"'),
        "no architecture named",
    ),
    "config: NaN": (
        set_config_key("hidden_size", "NaN"),
        "config.json: expected finite numbers, found 'NaN'",
    ),
    "config: beyond a float": (
        set_config_key("unused", "[-1e999]"),
        "expected finite numbers, found '-1e999'",
    ),
    "config: a billion layers": (
        set_config_key("num_hidden_layers", "1000000000"),
        "1 to 4,000 blocks",
    ),
    "config: no layers": (set_config_key("num_hidden_layers", "0"), "num_hidden_layers"),
    "config: fewer than none": (set_config_key("num_hidden_layers", "-1"), "num_hidden_layers"),
    "config: no heads": (set_config_key("num_attention_heads", "0"), "num_attention_heads"),
    "config: 2**31 wide": (set_config_key("hidden_size", str(2**31)), "hidden_size"),
    "config: a link out": (
        lambda s: (
            shutil.move(s / "config.json", s.parent),
            (s / "config.json").symlink_to(s.parent / "config.json"),
        ),
        "a link that leads out of it",
    ),
    "index: ../": (
        add_index("../real.safetensors", copy_weights_to("../real.safetensors")),
        "leads elsewhere",
    ),
    "index: absolute": (add_index("/etc/model.safetensors"), "leads elsewhere"),
    "index: backslashes": (add_index("..\\real.safetensors"), "leads elsewhere"),
    "index: NUL": (add_index("a\0.safetensors"), "leads elsewhere"),
    "index: empty": (add_index(""), "leads elsewhere"),
    "index: too long": (add_index("a" * 5000 + ".safetensors"), "found none"),
    "index: a pickle": (
        add_index("pytorch_model.bin", write_pickle("pytorch_model.bin")),
        "a .safetensors file",
    ),
    "index: escape sequences": (add_index(ESCAPES + ".safetensors"), "found none"),
    "a pickle as safetensors": (write_pickle("model.safetensors"), "header"),
    "pickles only": (keep_only_pickle, "pickled weights (pytorch_model.bin)"),
    "a link out of the folder": (link_outside, "a link that leads out"),
    "a link to itself": (link_to_itself, "a link that leads out"),
    "a pipe": (replace_with_pipe, "found none"),
    "a folder as weights": (replace_with_folder, "found none"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_hostile_source_is_rejected(name: str, source: Path, record_property: Record) -> None:
    """Rejected by the plan, before any weights are used."""
    damage, words = SOURCES[name]
    damage(source)
    assert words in expect_rejection(*make_plan_arguments(source))
    assert not Path("/tmp/quantkit-was-unpickled").exists()
    record_property("input", f"source: {name}")


def test_wrong_dtype_of_equal_size_is_rejected(source: Path, record_property: Record) -> None:
    """int16 instead of BF16 has the same size but cannot be quantized."""
    change_dtype(source)
    assert "I16" in expect_rejection(*make_plan_arguments(source))
    record_property("input", "source: dtype of the same size")


# --------------------------------------------------------------------------------------- the recipe


LAUGHS = "\n".join([
    "a0: &a0 [lol]",
    *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)),
])
RECIPES: dict[str, tuple[bytes, str]] = {
    "billion laughs": (LAUGHS.encode(), "anchors"),
    "one alias": (b"version: &a 1\nsource: *a\n", "anchors"),
    "a merge key": (b"a: &a {b: 1}\nc: {<<: *a}\n", "anchors"),
    "a tag that runs code": (b"version: !!python/object/apply:os.system [id]\n", "tags"),
    "nested": (b"a: " + b"[" * 50_000, "deep"),
    "nested by blocks": (b"\n".join(b" " * n + b"a:" for n in range(500)), "deep"),
    "key twice": (b"version: 1\nversion: 1\n", "written twice"),
    "not UTF-8": (b"version: \xff\n", "UTF-8"),
    "UTF-16": ("version: 1\n".encode("utf-16"), "UTF-8"),
    "NUL": (b"version: 1\0\n", "not valid YAML"),
    "half a surrogate": (b'version: "\\ud800"\n', "surrogate"),
    "10,000 digits": (b"version: " + DIGITS.encode(), "version"),
    "a megabyte": (b"version: 1 #" + b"x" * 1_000_000, "at most"),
    "escape sequences": (b'version: "\\e[2J\\u202e"\n', "version"),
    "escape sequences as a key": (b'"\\e[2J": 1\n', "unknown key"),
    "a list": (b"- 1\n", "mapping"),
    "empty": (b"", "empty"),
    "two documents": (b"version: 1\n---\nversion: 1\n", "one YAML document"),
    "a directive": (b"%YAML 1.1\n---\nversion: 1\n", "directives"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_hostile_recipe_is_rejected(name: str, tmp_path: Path, record_property: Record) -> None:
    """All errors are listed, so the output may have several lines; one contains the expected
    words.
    """
    content, words = RECIPES[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    for command in ("plan", "build"):
        code, printed = run_command(command, path)
        assert code == 2 and printed.startswith("error: ") and words in printed, printed
        assert len(printed) < 8000
    record_property("input", f"recipe: {name}")


@pytest.mark.parametrize("ends", [b"\r\n", b"\n"])
@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_recipe_with_crlf_or_bom_is_accepted(
    source: Path, ends: bytes, mark: bytes, record_property: Record
) -> None:
    """CRLF and the byte order mark of Windows editors do not change the recipe's meaning."""
    _, path = make_plan_arguments(source)
    path.write_bytes(mark + path.read_bytes().replace(b"\n", ends))
    code, printed = run_command("plan", path)
    assert code == 0 and "all-linear" in printed, printed
    record_property("input", f"recipe: line ends {ends!r}, mark {mark!r}")


@pytest.mark.parametrize(
    "name", ["a" * 300, "a" * 5000 + ".yaml", "x\x1b[2J", "../" * 2000 + "x.yaml", "~nobody/x.yaml"]
)
def test_impossible_recipe_name_is_rejected(name: str, record_property: Record) -> None:
    """Names that no file can have."""
    assert "no such recipe file" in expect_rejection("plan", name)
    record_property("input", "recipe: a name that no file has")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source.model", "a" * 900), ("source.model", "~nobody/model"),
        ("source.model", "../../../../../../etc"),
        ("source.model", "builtin:../../x"), ("source.model", ESCAPES), ("output.path", "a" * 900),
        ("calibration.set", "../../../etc/passwd"), ("calibration.set", "a" * 900 + ".yaml"),
        ("evaluation.tasks", "[" + "a" * 900 + "]"), ("evaluation.tasks", "[../../../etc/passwd]"),
        ("rules", '[{match: "re:(a+)+$", quantize: '
                  'default}]'), ("rules", '[{match: "re:[", quantize: default}]'),
    ],
)  # fmt: skip
def test_hostile_value_is_rejected(
    source: Path, key: str, value: str, record_property: Record
) -> None:
    """Paths outside the folder, paths that do not exist, patterns with exponential backtracking."""
    command, path = make_plan_arguments(source)
    command = "build" if key == "output.path" else command
    code, printed = run_command(command, path, "--set", f"{key}={value}")
    assert code in (1, 2) and "error: " in printed, printed
    assert not (source.parent / "out").exists()
    record_property("input", f"recipe: {key}")


# ----------------------------------------------------------------------------- texts and tokenizers


GOOD_ROWS = b'{"domain": "prose", "text": "' + b"once upon a time " * 40 + b'"}\n'
ROWS: dict[str, tuple[bytes, str]] = {
    "BOM": (b"\xef\xbb\xbf" + GOOD_ROWS, "byte order mark"),
    "CRLF": (GOOD_ROWS.replace(b"\n", b"\r\n"), "CRLF"),
    "not UTF-8": (b'{"domain": "prose", "text": "\xff"}\n', "UTF-8"),
    "nested": (BOMB.encode() + b"\n", "nested"),
    "10,000 digits": (b'{"domain": "prose", "text": ' + DIGITS.encode() + b"}\n", "number"),
    "key twice": (b'{"domain": "prose", "text": "a", "text": "b"}\n', "every key once"),
    "half a surrogate": (b'{"domain": "prose", "text": "a \\ud800 b"}\n', "half a surrogate"),
    "NUL bytes": (b"\0" * 100, "expected one JSON object"),
    "escape sequences": (
        json.dumps({"domain": ESCAPES, "text": "a"}).encode() + b"\n",
        "domain: expected prose",
    ),
    "empty": (b"", "empty file"),
    "no text": (b'{"domain": "prose", "text": " "}\n', "text: expected text"),
}
SPEC = (
    "version: 1\nname: mine\nlicence: CC0\norigin: here\ndomains: [prose]\npacking: documents\n"
    "file: mine.jsonl\n"
)


def make_build_arguments(
    source: Path, rows: bytes, spec: str = SPEC, digest: str | None = None
) -> tuple[str, Path]:
    """Return the arguments of a build that calibrates on these rows."""
    (source.parent / "mine.jsonl").write_bytes(rows)
    digest = hashlib.sha256(rows).hexdigest() if digest is None else digest
    (source.parent / "mine.yaml").write_text(f"{spec}sha256: {digest}\n")
    text = f"{{set: {source.parent / 'mine.yaml'}, sequences: 1, length: 32}}"
    _, path = make_plan_arguments(source, calibration=text, fidelity="none")
    return "build", path


@pytest.mark.parametrize("name", ROWS)
def test_hostile_calibration_text_is_rejected(
    name: str, source: Path, record_property: Record
) -> None:
    """Rejected before any block is built."""
    rows, words = ROWS[name]
    assert words in expect_rejection(*make_build_arguments(source, rows))
    assert not (source.parent / "out").exists()
    record_property("input", f"calibration text: {name}")


SPECS = {
    "billion laughs": (SPEC + LAUGHS + "\n", "alias"),
    "nested": (SPEC + "end: " + "[" * 20_000 + "\n", "nested"),
    "a tag": (SPEC + "end: !!binary aGk=\n", "tags"),
    "key twice": (SPEC + "name: yours\n", "name"),
    "out of the folder": (SPEC.replace("mine.jsonl", "../../../../../../etc/hostname"), "hostname"),
    "too long a name": (SPEC.replace("mine.jsonl", "a" * 900), "no such file"),
}


@pytest.mark.parametrize("name", SPECS)
def test_hostile_spec_is_rejected(name: str, source: Path, record_property: Record) -> None:
    """The YAML file of a calibration set; the message lists the first errors, one per line."""
    spec, words = SPECS[name]
    max_lines = MAX_SHOWN_FAULTS + 1 if name == "billion laughs" else 1
    command = make_build_arguments(source, GOOD_ROWS, spec)
    assert words in expect_rejection(*command, max_lines=max_lines)
    record_property("input", f"calibration spec: {name}")


def change_tokenizer(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a changed tokenizer.json of tiny-v3."""
    from quantkit.io.package_data import locate_model

    values = json.loads((locate_model("builtin:tiny-v3") / "tokenizer.json").read_text())
    change(values)
    return json.dumps(values).encode()


TOKENIZERS: dict[str, tuple[str, bytes]] = {
    "nested": ("tokenizer.json", BOMB.encode()),
    "not JSON": ("tokenizer.json", b"\xff\0"),
    "empty": ("tokenizer.json", b""),
    "a panic of Rust": (
        "tokenizer.json",
        change_tokenizer(lambda v: v["model"].update(continuing_subword_prefix="a" * 50)),
    ),
    "ids beyond": (
        "tokenizer.json",
        change_tokenizer(lambda v: v["model"]["vocab"].update(x=2**63)),
    ),
    "length that is a list": (
        "tokenizer_config.json",
        b'{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": []}',
    ),
    "a BOM": ("tokenizer_config.json", b"\xef\xbb\xbf{}"),
}
NO_JSON = {"nested", "not JSON", "empty", "a BOM"}
"""Cases whose message names the file."""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_hostile_tokenizer_is_rejected(
    name: str, source: Path, record_property: Record, capfd: pytest.CaptureFixture[str]
) -> None:
    """Messages that Rust prints directly are suppressed too."""
    file, content = TOKENIZERS[name]
    (source / file).write_bytes(content)
    command, path = make_build_arguments(source, GOOD_ROWS)
    words = f"{source / file}: expected" if name in NO_JSON else f"{source}: expected a tokenizer"
    assert words in expect_rejection(command, path)
    assert capfd.readouterr() == ("", "")
    record_property("input", f"tokenizer: {name}")


def test_tokenizer_keys_are_not_printed(
    source: Path, record_property: Record, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tokenizers library prints unknown keys unescaped to stdout; quantkit suppresses that."""
    added = {"0": {"content": "<s>", "special": True, ESCAPES: 1}}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added}
    (source / "tokenizer_config.json").write_text(json.dumps(values))
    run_command(*make_build_arguments(source, GOOD_ROWS))
    assert capfd.readouterr() == ("", "")
    record_property("input", "tokenizer: keys that a terminal obeys")


TASK = (
    "task: mine\noutput_type: generate_until\nquantkit:\n  domain: math\n"
    "  local: {test: mine.jsonl}\n"
)
TEMPLATES = "test_split: test\ndoc_to_text: '{}'\ndoc_to_target: x\n"
TASKS = {
    "billion laughs": (TASK + LAUGHS + "\n", b"{}\n", "alias"),
    "nested": (TASK + "x: " + "[" * 20_000 + "\n", b"{}\n", "nested"),
    "bytes": (TASK + "x: !!binary aGk=\n", b"{}\n", "tags"),
    "a key that is a number": (TASK + "1: x\n", b"{}\n", "1: unknown key"),
    "code in a template": (
        TASK + TEMPLATES.format("{{ cycler.__init__ }}"),
        b'{"a": 1}\n',
        "error: mine: doc_to_text",
    ),
    "code of lm-eval": (TASK + "process_docs: utils.f\n", b"{}\n", "not supported; prepare the"),
    "an included file": (TASK + "include: other.yaml\n", b"{}\n", "not supported; copy the keys"),
    "a metric of a script": (TASK + "metric_list: [{metric: ./m.py}]\n", b"{}\n", "exact_match"),
    "not a number": (TASK + "x: .nan\n", b"{}\n", "expected finite numbers"),
    "10,000 digits": (TASK + f"x: {DIGITS}\n", b"{}\n", "mine.yaml"),
    "not UTF-8": (TASK + "x: '\udcff'\n", b"{}\n", "UTF-8"),
    "rows nested": (TASK + TEMPLATES.format("x"), b'{"a": ' + BOMB.encode() + b"}", "mine"),
    "rows of no object": (TASK + TEMPLATES.format("x"), BOMB.encode(), "one JSON object per line"),
}


@pytest.mark.parametrize("name", TASKS)
def test_hostile_task_is_rejected(
    name: str, tmp_path: Path, artifact: Path, record_property: Record
) -> None:
    """Task files of `quantkit eval`."""
    text, rows, words = TASKS[name]
    (tmp_path / "mine.yaml").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_bytes(rows)
    code, printed = run_command(
        "eval",
        artifact,
        "--tasks",
        str(tmp_path / "mine.yaml"),
        "--output",
        tmp_path / "results",
        "--limit",
        "1",
    )
    assert code in (1, 2) and words in printed, printed
    record_property("input", f"evaluation task: {name}")


# ------------------------------------------------------------------------------------- the artifact


def reseal_artifact(folder: Path) -> None:
    """Update the manifest to match the files, as a forger would."""
    manifest = json.loads((folder / "quantkit/manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
    (folder / "quantkit/manifest.json").write_text(json.dumps(manifest))


def write_many_rows(path: Path) -> None:
    """Write fifty million equal rows in a few kilobytes."""
    rows = 2**20
    floats = arrow.array([0.5] * rows)
    columns = {
        "domain": arrow.array(["math"] * rows),
        "kl": floats,
        "nll_source": floats,
        "nll_artifact": floats,
    }
    table = arrow.table({**columns, "same_top": arrow.array([True] * rows)})
    with parquet.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(52):
            writer.write_table(table, row_group_size=rows)


def write_long_text(path: Path) -> None:
    """Write a text of 20 MB, stored once and referenced 500 times: 10 GB when decoded."""
    rows = 500
    text = arrow.DictionaryArray.from_arrays(
        arrow.array([0] * rows, arrow.int32()), ["x" * 20_000_000]
    )
    floats = arrow.array([0.5] * rows)
    columns = {"domain": text, "kl": floats, "nll_source": floats, "nll_artifact": floats}
    parquet.write_table(
        arrow.table({**columns, "same_top": arrow.array([True] * rows)}),
        path,
        compression="zstd",
        store_schema=False,
    )


def write_long_texts(path: Path) -> None:
    """Write three gigabytes of blanks, which zstd stores in a few hundred kilobytes."""
    floats = arrow.array([0.5] * 30)
    texts = arrow.array([f"{n}" + " " * 10_000_000 for n in range(30)])
    table = arrow.table({
        "domain": texts,
        "kl": floats,
        "nll_source": floats,
        "nll_artifact": floats,
        "same_top": arrow.array([True] * 30),
    })
    with parquet.ParquetWriter(
        path, table.schema, compression="zstd", use_dictionary=False
    ) as writer:
        for _ in range(10):
            writer.write_table(table)


BOMBS = {
    "rows": write_many_rows,
    "one long text": write_long_text,
    "many long texts": write_long_texts,
}


@pytest.mark.parametrize("name", BOMBS)
def test_parquet_bomb_is_rejected(name: str, artifact: Path, record_property: Record) -> None:
    """A small file that decodes to gigabytes, with a matching manifest."""
    path = artifact / "quantkit/samples/tokens.parquet"
    BOMBS[name](path)
    assert path.stat().st_size < 20_000_000
    reseal_artifact(artifact)
    for command in (
        ("report", artifact, "--html", "--output", artifact.parent / "x.html"),
        ("diff", artifact, artifact),
    ):
        assert "samples" in expect_rejection(*command)
    record_property("input", f"samples: {name}")


@pytest.mark.parametrize("file", ["manifest.json", "plan.json", "fidelity.json"])
@pytest.mark.parametrize(
    "content",
    [
        BOMB.encode(), b"\xff", b"", b"[]", b"\xef\xbb\xbf{}", b'{"a": ' + DIGITS.encode() + b"}",
        b'{"a": 1, "a": 1}', b'{"schema_version": 1, "files": "\\ud800"}', b"\0" * 100,
    ],
    ids=[
        "nested", "not UTF-8", "empty", "a list", "BOM", "10,000 digits", "key twice",
        "half a surrogate", "NUL",
    ],
)  # fmt: skip
def test_hostile_report_files_are_rejected(
    file: str, content: bytes, artifact: Path, record_property: Record
) -> None:
    """Every command that reads the file rejects it; `runs` does not need it."""
    (artifact / "quantkit" / file).write_bytes(content)
    if file != "manifest.json":
        reseal_artifact(artifact)
    commands: list[tuple[str | Path, ...]] = [("diff", artifact, artifact), ("gate", artifact)]
    if file == "fidelity.json":
        commands.append(("report", artifact))
    if file == "manifest.json":
        commands.append(("verify", artifact))
    for command in commands:
        code, printed = run_command(*command)
        assert code in (1, 2) and "error: " in printed, printed
    code, printed = run_command("runs", artifact.parent)
    assert code == 0
    record_property("input", f"{file}: damaged")


def test_report_names_are_escaped_in_the_output(artifact: Path, record_property: Record) -> None:
    """Tables, Markdown and JSON of a report whose names contain terminal escape sequences."""
    path = artifact / "quantkit/fidelity.json"
    values = json.loads(path.read_text())
    values["artifact"]["name"] = values["source"]["model"] = ESCAPES
    values["modules"][0]["name"] = f"{ESCAPES}.mlp"
    path.write_text(json.dumps(values))
    reseal_artifact(artifact)
    for command in (
        ("report", artifact),
        ("report", artifact, "--json"),
        ("diff", artifact, artifact),
        ("diff", artifact, artifact, "--markdown"),
        ("diff", artifact, artifact, "--json"),
        ("runs", artifact.parent),
        ("runs", artifact.parent, "--json"),
        ("verify", artifact),
    ):
        run_command(*command)
    record_property("input", "report: names that a terminal obeys")


def test_largest_header_fits_in_limited_memory(
    source: Path, tmp_path: Path, record_property: Record
) -> None:
    """A header of 600,000 tensors, read by a process with 4 GB of address space.

    It has 60 s of processor time; how long that takes depends on what else runs.
    """
    write_many_tensors(source)
    command, path = make_plan_arguments(source)
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)); "
    limit += "resource.setrlimit(resource.RLIMIT_CPU, (60, 60)); "
    limit += "from quantkit.cli.main import main; sys.argv = ['quantkit', *sys.argv[1:]]; main()"
    process = subprocess.run(
        [sys.executable, "-c", limit, command, path], capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "at most 500,000 tensors" in process.stderr
    record_property("input", "source: header of 600,000 tensors, a process of its own")
