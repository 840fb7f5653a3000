"""Ways to damage an artifact and to seal it again, so that only its content shows the damage."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.artifact.layout import INDEX, MANIFEST, SIGNATURE, UNHASHED


@dataclass
class StoredTensor:
    """A tensor of a shard."""

    dtype: str
    shape: list[int]
    data: bytes


def read_shard(path: Path) -> dict[str, StoredTensor]:
    """Read every tensor of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    entries.pop("__metadata__", None)
    return {
        n: StoredTensor(e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
        for n, e in entries.items()
    }


def write_shard(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Write a safetensors file of these tensors, widest dtypes first."""
    width = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, at = [], 0
    for name, t in sorted(
        tensors.items(), key=lambda item: (-width.get(item[1].dtype, 1), item[0])
    ):
        entries[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + len(t.data)]}
        data.append(t.data)
        at += len(t.data)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def list_shards(path: Path) -> list[Path]:
    """Return the weight files of an artifact."""
    return sorted(path.glob("*.safetensors"))


def find_shard(path: Path, tensor: str) -> Path:
    """Return the shard that holds a tensor."""
    return next(shard for shard in list_shards(path) if tensor in read_shard(shard))


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensor(path: Path, name: str, change: Callable[[StoredTensor], object]) -> None:
    """Change one tensor in its shard, and its entry in the manifest."""
    file = find_shard(path, name)
    tensors = read_shard(file)
    change(tensors[name])
    write_shard(file, tensors)
    edit_json(
        path / MANIFEST,
        lambda m: m["tensors"].update({name: [tensors[name].dtype, tensors[name].shape]}),
    )


def overwrite_element(path: Path, name: str, element: int, value: bytes) -> None:
    """Overwrite one element of a tensor; negative elements count from the end."""

    def change(tensor: StoredTensor) -> None:
        count = len(tensor.data) // len(value)
        at = (element % count) * len(value)
        tensor.data = tensor.data[:at] + value + tensor.data[at + len(value) :]

    edit_tensor(path, name, change)


def remove_tensor(path: Path, name: str) -> None:
    """Remove a tensor from shard and manifest."""
    file = find_shard(path, name)
    tensors = read_shard(file)
    del tensors[name]
    write_shard(file, tensors)
    edit_json(path / MANIFEST, lambda m: m["tensors"].pop(name))


def add_tensor(path: Path, name: str, tensor: StoredTensor, shard: int = 0) -> None:
    """Add a tensor to a shard and to the manifest."""
    file = list_shards(path)[shard]
    write_shard(file, {**read_shard(file), name: tensor})
    edit_json(path / MANIFEST, lambda m: m["tensors"].update({name: [tensor.dtype, tensor.shape]}))


def rename_tensor(path: Path, old: str, new: str) -> None:
    """Rename a tensor everywhere."""
    tensor = read_shard(find_shard(path, old))[old]
    remove_tensor(path, old)
    add_tensor(path, new, tensor)


def edit_quantization_config(path: Path, change: Callable[[Any], object]) -> None:
    """Change quantization_config in config.json and in the manifest."""
    edit_json(path / "config.json", lambda values: change(values["quantization_config"]))
    edit_json(path / MANIFEST, lambda values: change(values["quantization_config"]))


def edit_model_config(path: Path, **changes: object) -> None:
    """Change the model's own keys in config.json."""
    edit_json(path / "config.json", lambda values: values.update(changes))


def set_status(path: Path, status: str, gates: list[dict[str, object]]) -> None:
    """Change status and gates in report and manifest."""
    edit_json(
        path / "quantkit/fidelity.json", lambda report: report.update(status=status, gates=gates)
    )
    edit_json(path / MANIFEST, lambda manifest: manifest.update(status=status))


def reseal(path: Path) -> None:
    """Update index and hashes to the present files, so that only the content is wrong."""
    if (path / INDEX).is_file():
        held = {n: (s.name, t) for s in list_shards(path) for n, t in read_shard(s).items()}
        total = sum(len(t.data) for _, t in held.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {n: file for n, (file, _) in held.items()},
        }
        (path / INDEX).write_text(json.dumps(index))
    rehash(path)


def rehash(path: Path) -> None:
    """Update the manifest's hashes to the present files."""
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    entries = {}
    for name in sorted(set(names) - {MANIFEST, SIGNATURE, *UNHASHED}):
        with (path / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[name] = {"sha256": digest, "bytes": (path / name).stat().st_size}
    edit_json(path / MANIFEST, lambda manifest: manifest.update(files=entries))


BF16 = {
    "nan": 0x7FC0,
    "inf": 0x7F80,
    "-inf": 0xFF80,
    "0": 0,
    "-1": 0xBF80,
    "subnormal": 1,
    "-0": 0x8000,
}


def encode_bf16(text: str) -> bytes:
    """Return the stored bytes of a bfloat16."""
    return struct.pack("<H", BF16[text])


def encode_f32(value: float) -> bytes:
    """Return the stored bytes of a float32."""
    return struct.pack("<f", value)


def encode_i32(value: int) -> bytes:
    """Return the stored bytes of an int32, given as a signed or an unsigned number."""
    return struct.pack("<I", value & 0xFFFFFFFF)
