"""Reading and writing tensors: the `safetensors` library reads our files, and we read its files."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.checkpoint import tensors
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.tensors import (
    TORCH_DTYPES,
    ShardWriter,
    get_dtype_name,
    read_rows,
    read_tensor,
)
from quantkit.contracts import TensorSpec
from quantkit.errors import ArtifactError, CheckpointError, QuantkitError

SAMPLES = {
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(1.5),
    "odd": torch.arange(5, dtype=torch.uint8),
    **{
        f"t.{name}": torch.arange(12).reshape(4, 3).to(dtype)
        for name, dtype in TORCH_DTYPES.items()
    },
}


def are_equal(actual: Tensor, expected: Tensor) -> bool:
    return (
        actual.dtype == expected.dtype
        and actual.shape == expected.shape
        and torch.equal(
            actual.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
        )
    )


def make_specs(samples: dict[str, Tensor]) -> list[TensorSpec]:
    return [
        TensorSpec(name=n, dtype=get_dtype_name(t.dtype), shape=tuple(t.shape))
        for n, t in samples.items()
    ]


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(SAMPLES, path)
    header = read_header(path)
    for name, tensor in SAMPLES.items():
        assert are_equal(read_tensor(path, header, name), tensor)
        if tensor.dim() == 2:
            assert are_equal(
                read_rows(path, header, name, 0, tensor.shape[0] // 2),
                tensor[: tensor.shape[0] // 2],
            )
    assert are_equal(read_rows(path, header, "t.BF16", 1, 3), SAMPLES["t.BF16"][1:3])
    with pytest.raises(
        CheckpointError, match=r"tensor 't.BF16': expected rows within \(4, 3\), found 3:5"
    ):
        read_rows(path, header, "t.BF16", 3, 5)


def test_shard_writer_equals_the_library(tmp_path: Path) -> None:
    path, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_file(SAMPLES, theirs, metadata={"format": "pt"})
    with ShardWriter(path, make_specs(SAMPLES)) as writer:
        for name in reversed(SAMPLES):
            writer.write(name, SAMPLES[name])
            assert are_equal(writer.read(name), SAMPLES[name])
        written = writer.finish()
    assert path.read_bytes() == theirs.read_bytes()
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written.n_bytes == path.stat().st_size
    assert [entry.name for entry in tmp_path.glob("ours*")] == ["ours.safetensors"]
    for name, tensor in load_file(path).items():
        assert are_equal(tensor, SAMPLES[name])


def test_hash_does_not_depend_on_the_order_of_writes(tmp_path: Path) -> None:
    digests = set()
    for order in (sorted(SAMPLES), sorted(SAMPLES, reverse=True)):
        with ShardWriter(tmp_path / "x.safetensors", make_specs(SAMPLES)) as writer:
            for name in order:
                writer.write(name, SAMPLES[name])
            digests.add(writer.finish().sha256)
    assert len(digests) == 1


def test_transposed_view_is_written_contiguously(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    with ShardWriter(tmp_path / "x.safetensors", make_specs({"a": tensor})) as writer:
        writer.write("a", tensor)
        writer.finish()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], tensor)


def test_writer_rejects_unplanned_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, [TensorSpec(name="a", dtype="BF16", shape=(2,))]) as writer:
        disagree = "the plan and the format's pack disagree"
        for name, tensor, message in (
            ("b", torch.zeros(2), "expected a planned tensor, found one not in the plan"),
            ("a", torch.zeros(2), f"expected BF16 [2], found F32 [2]; {disagree}"),
            ("a", torch.zeros(3).bfloat16(), f"expected BF16 [2], found BF16 [3]; {disagree}"),
        ):
            with pytest.raises(ArtifactError) as caught:
                writer.write(name, tensor)
            assert str(caught.value) == f"{path}: tensor '{name}': {message}"
        with pytest.raises(ArtifactError) as caught:
            writer.finish()
        assert (
            str(caught.value) == f"{path}: expected 1 tensors, found 1 not written, the first 'a'"
        )
        writer.write("a", torch.zeros(2).bfloat16())
        with pytest.raises(ArtifactError, match="tensor 'a': expected once, found a second time"):
            writer.write("a", torch.zeros(2).bfloat16())
    with pytest.raises(
        ArtifactError,
        match="expected a tensor of one of F64, .*, found torch.complex64; convert it",
    ):
        get_dtype_name(torch.complex64)


def test_failure_leaves_a_part_file_that_is_continued(tmp_path: Path) -> None:
    path, part = tmp_path / "x.safetensors", tmp_path / "x.safetensors.part"
    with (
        pytest.raises(RuntimeError, match="crash"),
        ShardWriter(path, make_specs(SAMPLES)) as writer,
    ):
        writer.write("odd", SAMPLES["odd"])
        writer.flush()
        raise RuntimeError("crash")
    assert not path.exists()
    assert part.exists()
    with ShardWriter(path, make_specs(SAMPLES), written=["odd"]) as writer:
        for name in SAMPLES:
            if name != "odd":
                writer.write(name, SAMPLES[name])
        written = writer.finish()
    assert are_equal(load_file(path)["odd"], SAMPLES["odd"])
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    writer = ShardWriter(path, make_specs(SAMPLES))
    writer.discard()
    assert not part.exists()


def test_part_of_another_plan_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    ShardWriter(path, make_specs({"a": torch.zeros(2)})).close()
    with pytest.raises(
        ArtifactError,
        match=r"x.safetensors.part: expected the part of this plan, found another file",
    ):
        ShardWriter(path, make_specs({"a": torch.zeros(3)}), written=["a"])
    with pytest.raises(
        ArtifactError, match="expected a part of the same plan, found 'b' written; start again"
    ):
        ShardWriter(path, make_specs({"a": torch.zeros(2)}), written=["b"])


def test_full_disk_is_detected_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.os, "posix_fallocate", full)
    monkeypatch.setattr("quantkit.io.files.get_free_bytes", lambda path: 5_000_000_000)
    with pytest.raises(QuantkitError) as caught:
        ShardWriter(tmp_path / "x.safetensors", make_specs(SAMPLES))
    assert str(caught.value) == (
        f"{tmp_path}/x.safetensors.part: cannot be written: no space left on device (5.0 GB free); "
        "free some space or choose another folder"
    )
    assert list(tmp_path.iterdir()) == []


def test_shrinking_file_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    header = read_header(path)
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError) as caught:
        read_tensor(path, header, "a")
    assert str(caught.value) == (
        f"{path}: tensor 'a': expected 400 bytes, found 390; the file became shorter while it was "
        "read, fetch it again"
    )


MEMORY = """
import os, sys
from pathlib import Path
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.tensors import read_tensor
from quantkit.io.host import get_peak_memory, return_freed_memory
return_freed_memory()
path = Path(sys.argv[1])
header = read_header(path)
read_tensor(path, header, "warm")
before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
for name in header.specs:
    tensor = read_tensor(path, header, name)
    del tensor
print(get_peak_memory() - before)
"""


FAULTS = """
import resource, sys
import torch
from quantkit.io import host
assert getattr(host, sys.argv[1])()
torch.ones(1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    torch.ones(2 << 20)  # 8 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("how", "pages"), [("keep_freed_memory", 20_000), ("return_freed_memory", 205_000)]
)
def test_freed_memory_is_kept_or_returned(how: str, pages: int) -> None:
    """Page faults of 100 tensors of 2,048 pages; the C library may use huge pages of 512."""
    faults = int(
        subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout
    )
    assert faults <= pages
    if how == "return_freed_memory":
        assert faults >= 100 * 2048 // 512


def test_reading_a_large_file_needs_memory_for_one_tensor(tmp_path: Path) -> None:
    """200 MB in ten tensors, read one by one in a new process: memory rises by one tensor."""
    path = tmp_path / "x.safetensors"
    tensor_bytes = 20_000_000
    specs = [TensorSpec(name=f"t{i}", dtype="U8", shape=(tensor_bytes,)) for i in range(10)]
    with ShardWriter(path, [*specs, TensorSpec(name="warm", dtype="U8", shape=(1,))]) as writer:
        for spec in specs:
            writer.write(spec.name, torch.ones(tensor_bytes, dtype=torch.uint8))
        writer.write("warm", torch.ones(1, dtype=torch.uint8))
        writer.finish()
    command = [sys.executable, "-c", MEMORY, str(path)]
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(process.stdout) < 1.25 * tensor_bytes
