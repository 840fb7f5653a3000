"""The safetensors header: damage gives one CheckpointError; the `safetensors` library agrees."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from quantkit.checkpoint.header import build_header, parse_header, read_header
from quantkit.checkpoint.tensors import TORCH_DTYPES
from quantkit.contracts import TensorSpec
from quantkit.dtypes import DTYPE_BYTES
from quantkit.errors import CheckpointError

GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
TWO = {**GOOD, "b": {"dtype": "U8", "shape": [4], "data_offsets": [16, 20]}}
AGAIN = "the file is damaged, fetch or write it again"


def write_file(
    folder: Path, header: bytes | dict[str, object], data: int = 16, length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * data
    )
    return path


def entry(**changes: object) -> dict[str, object]:
    return {"a": {**GOOD["a"], **changes}}


WHOLE = "expected whole numbers from 0 to 2**63 - 1"
FIELDS = "expected an object of dtype, shape, data_offsets"
BEYOND = "expected JSON, found nesting or a number beyond any real file; fetch it again"
KNOWN = f"expected one of {', '.join(DTYPE_BYTES)}"
FEWER = "expected fewer than 2**63 elements"
BEGIN = "data_offsets: expected to begin at"

CORRUPTED = {
    "not json": (
        b'{"a" 1}',
        16,
        "header: expected JSON, found an error (expecting ':' delimiter) at line 1 column 6; "
        "repair or fetch the file",
    ),
    "not an object": (b"[]", 16, f"header: expected to start with '{{', found b'['; {AGAIN}"),
    "empty": (b"", 16, f"header: expected to start with '{{', found b''; {AGAIN}"),
    "not utf-8": (
        b'{"\xff": 1}',
        0,
        "header: expected UTF-8, found byte 0xff at offset 2; save it as UTF-8",
    ),
    "duplicate tensor": (
        b'{"a": 1, "a": 2}',
        0,
        "header: expected every key once, found 'a' twice in one object; remove one of them",
    ),
    "duplicate field": (
        b'{"a": {"dtype": "F32", "dtype": "F16"}}',
        0,
        "header: expected every key once, found 'dtype' twice in one object; remove one of them",
    ),
    "nesting bomb": (b'{"a":' + b"[" * 100_000, 0, f"header: {BEYOND}"),
    "number bomb": (b'{"a":' + b"9" * 10_000 + b"}", 0, f"header: {BEYOND}"),
    "empty name": ({"": GOOD["a"]}, 16, "expected a tensor name, found ''; write the file again"),
    "surrogate name": (
        b'{"\\ud800": {}}',
        0,
        "header: expected text, found half a surrogate pair (\\ud800 to \\udfff); fetch it again",
    ),
    "entry is a list": ({"a": []}, 16, f"tensor 'a': {FIELDS}, found []; {AGAIN}"),
    "entry lacks a key": (
        {"a": {"dtype": "F32"}},
        16,
        f"tensor 'a': {FIELDS}, found ['dtype']; {AGAIN}",
    ),
    "unknown dtype": (
        entry(dtype="F12"),
        16,
        f"tensor 'a': dtype: {KNOWN}, found 'F12'; convert the tensor",
    ),
    "dtype is a list": (
        entry(dtype=["F32"]),
        16,
        f"tensor 'a': dtype: {KNOWN}, found ['F32']; convert the tensor",
    ),
    "negative shape": (
        entry(shape=[-2, -2]),
        16,
        f"tensor 'a': shape: {WHOLE}, found [-2, -2]; {AGAIN}",
    ),
    "bool shape": (
        entry(shape=[True, 4]),
        16,
        f"tensor 'a': shape: {WHOLE}, found [True, 4]; {AGAIN}",
    ),
    "float shape": (
        entry(shape=[2.0, 2]),
        16,
        f"tensor 'a': shape: {WHOLE}, found [2.0, 2]; {AGAIN}",
    ),
    "shape is text": (entry(shape="22"), 16, f"tensor 'a': shape: {WHOLE}, found '22'; {AGAIN}"),
    "overflow": (
        entry(shape=[2**32, 2**32, 4]),
        16,
        f"tensor 'a': shape: {FEWER}, found [4294967296, 4294967296, 4]; {AGAIN}",
    ),
    "overflow after zero": (
        entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0]),
        0,
        f"tensor 'a': shape: {FEWER}, found [4611686018427387904, 4611686018427387904, 0]; {AGAIN}",
    ),
    "65 dimensions": (
        entry(shape=[1] * 65),
        16,
        f"tensor 'a': shape: expected at most 64 dimensions, found 65; {AGAIN}",
    ),
    "three offsets": (
        entry(data_offsets=[0, 8, 16]),
        16,
        f"tensor 'a': data_offsets: expected [begin, end], found [0, 8, 16]; {AGAIN}",
    ),
    "reversed offsets": (
        entry(data_offsets=[16, 0]),
        16,
        f"tensor 'a': data_offsets: expected [begin, end], found [16, 0]; {AGAIN}",
    ),
    "float offsets": (
        entry(data_offsets=[0.0, 16]),
        16,
        f"tensor 'a': data_offsets: {WHOLE}, found [0.0, 16]; {AGAIN}",
    ),
    "wrong length": (
        entry(shape=[3]),
        16,
        f"tensor 'a': expected 12 bytes for F32 [3], found data_offsets of 16 bytes; {AGAIN}",
    ),
    "does not start at 0": (
        entry(data_offsets=[4, 20]),
        20,
        f"tensor 'a': {BEGIN} 0, found 4, which leaves a hole before it; {AGAIN}",
    ),
    "hole": (
        {**TWO, "b": {**TWO["b"], "data_offsets": [20, 24]}},
        24,
        f"tensor 'b': {BEGIN} 16, found 20, which leaves a hole before it; {AGAIN}",
    ),
    "overlap": (
        {**TWO, "b": {**TWO["b"], "data_offsets": [12, 16]}},
        16,
        f"tensor 'b': {BEGIN} 16, found 12, which overlaps the tensor before it; {AGAIN}",
    ),
    "truncated": (
        GOOD,
        15,
        "expected 16 bytes of tensor data, found 15; the file is truncated, fetch or write it "
        "again",
    ),
    "trailing bytes": (
        GOOD,
        17,
        "expected 16 bytes of tensor data, found 17; the file is longer than its header says, "
        "fetch or write it again",
    ),
    "metadata of numbers": (
        {**GOOD, "__metadata__": {"a": 1}},
        16,
        "__metadata__: expected an object of strings, found {'a': 1}; write the file again",
    ),
}


@pytest.mark.parametrize("case", CORRUPTED)
def test_damaged_header_gives_one_error(tmp_path: Path, case: str) -> None:
    header, data, message = CORRUPTED[case]
    path = write_file(tmp_path, header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value) == f"{path}: {message}"


def test_length_is_checked_before_reading(tmp_path: Path) -> None:
    for length, message in (
        (
            100_000_001,
            "header length: expected at most 100000000, found 100000001; this is not a safetensors "
            "file",
        ),
        (
            2**64 - 1,
            f"header length: expected at most 100000000, found {2**64 - 1}; this is not a "
            "safetensors file",
        ),
        (99, f"header length: expected at most 18 (the rest of the file), found 99; {AGAIN}"),
    ):
        path = write_file(tmp_path, b"{}", 16, length)
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        assert str(caught.value) == f"{path}: {message}"
    path.write_bytes(b"abc")
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert (
        str(caught.value) == f"{path}: expected at least 8 bytes of header length, found 3; {AGAIN}"
    )
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "absent.safetensors")
    assert str(caught.value) == (
        f"{tmp_path}/absent.safetensors: expected a readable file, found: no such file or "
        "directory; check the path"
    )


def test_hostile_value_is_shortened_in_the_message(tmp_path: Path) -> None:
    path = write_file(
        tmp_path, {"n" * 10_000: {"dtype": "D" * 10_000, "shape": [], "data_offsets": [0, 0]}}, 0
    )
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert len(str(caught.value)) < 600


SAMPLES = {
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(1.5),
    "bool": torch.tensor([True, False, True]),
    "odd": torch.arange(5, dtype=torch.uint8),
    "fp8": torch.tensor([[448.0, 1, -2, 0.5, 240, 0.0625]]).to(torch.float8_e4m3fn),
    "e5m2": torch.tensor([1.0, -3.0]).to(torch.float8_e5m2),
    **{
        f"t.{name}": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in TORCH_DTYPES.items()
    },
}


def test_file_of_the_library_is_read(tmp_path: Path) -> None:
    save_file(SAMPLES, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert set(header.specs) == set(SAMPLES)
    for name, tensor in SAMPLES.items():
        assert header.specs[name].shape == tuple(tensor.shape)
        assert TORCH_DTYPES[header.specs[name].dtype] == tensor.dtype


def test_build_header_equals_the_library() -> None:
    expected = save(SAMPLES, metadata={"format": "pt"})
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    specs = [
        TensorSpec(name=n, dtype=names[t.dtype], shape=tuple(t.shape)) for n, t in SAMPLES.items()
    ]
    ours = build_header(specs)
    assert ours == expected[: len(ours)]
    assert build_header(reversed(specs)) == ours
    assert len(ours) % 8 == 0


def test_build_header_rejects_wrong_specs() -> None:
    spec = TensorSpec(name="a", dtype="F32", shape=(1,))
    with pytest.raises(
        CheckpointError,
        match="new file: tensor 'a': expected once, found twice; rename one of them",
    ):
        build_header([spec, spec])
    with pytest.raises(
        CheckpointError, match="new file: tensor 'a': dtype: expected one of .*, found 'F12'"
    ):
        build_header([TensorSpec(name="a", dtype="F12", shape=(1,))])
    with pytest.raises(
        CheckpointError, match="new file: expected a tensor name, found '__metadata__'"
    ):
        build_header([TensorSpec(name="__metadata__", dtype="F32", shape=(1,))])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
sizes = st.integers(-1, 5) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64]) | json_values
entries = st.fixed_dictionaries({
    "dtype": st.sampled_from([*DTYPE_BYTES, "F4"]) | json_values,
    "shape": st.lists(sizes, max_size=3) | json_values,
    "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
})
headers = st.dictionaries(
    st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=3
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.binary(max_size=64) | headers.map(lambda value: json.dumps(value).encode()),
    n_data_bytes=st.integers(0, 64),
)
def test_fuzz_parser_raises_only_checkpoint_errors(text: bytes, n_data_bytes: int) -> None:
    try:
        header = parse_header(text, "f", n_data_bytes)
    except CheckpointError:
        return
    assert header.n_data_bytes == n_data_bytes
    assert sum(spec.n_bytes for spec in header.specs.values()) == n_data_bytes


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_fuzz_flipped_byte_is_read_as_by_the_library_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Every header that we accept, the library accepts with the same shapes."""
    content = bytearray(save({"a": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.uint8)}))
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    with safe_open(path, "pt") as theirs:
        assert {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()} == {  # noqa: SIM118
            name: spec.shape for name, spec in header.specs.items()
        }
