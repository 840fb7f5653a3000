"""A refactoring changes no byte: small artifacts against the hashes that tests/golden/artifacts.py
recorded.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from golden.artifacts import (
    RECIPES,
    RECORD_COMMAND,
    TINY,
    build_in_subprocess,
    compare_hashes,
    describe_kind,
    find_machine_kind,
    find_record,
    hash_artifact,
    read_records,
    write_record,
)

OTHER_KIND = {"cpu vendor": "another"}


def test_artifacts_have_the_recorded_bytes() -> None:
    """Every weight file, index and config of every artifact."""
    kind = find_machine_kind()
    record = find_record(read_records(), kind)
    if record is None:
        pytest.skip(
            f"NO BYTE WAS COMPARED: tests/golden/artifacts.json has no record of this machine kind "
            f"({describe_kind(kind)}); on a commit that is known to be good, run: {RECORD_COMMAND}"
        )
    actual = build_in_subprocess(threads=torch.get_num_threads())  # they change no byte
    differences = compare_hashes(record["artifacts"], actual)
    assert not differences, "\n".join(differences)


def test_every_record_holds_every_artifact() -> None:
    """A record of fewer artifacts would compare less than it seems to."""
    assert read_records()
    for record in read_records():
        for name in (*RECIPES, *TINY):
            held = [
                files
                for artifact, files in record["artifacts"].items()
                if artifact.startswith(name)
            ]
            assert held, name
            assert all(
                "config.json" in files and any(f.endswith(".safetensors") for f in files)
                for files in held
            )


def test_a_changed_byte_is_reported(built: Path, artifact: Path) -> None:
    """The comparison names the artifact and the file, and nothing else."""
    recorded = {"tiny": hash_artifact(built), "other": hash_artifact(built)}
    assert compare_hashes(recorded, copy.deepcopy(recorded)) == []
    shard = sorted(artifact.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    actual = {"tiny": hash_artifact(artifact), "other": hash_artifact(built)}
    assert compare_hashes(recorded, actual) == [f"tiny: {shard.name} has other bytes than recorded"]
    shard.unlink()
    actual = {"tiny": hash_artifact(artifact), "other": hash_artifact(built)}
    assert compare_hashes(recorded, actual) == [f"tiny: {shard.name} is recorded and was not built"]
    assert compare_hashes(actual, recorded) == [f"tiny: {shard.name} was built and is not recorded"]


def test_a_record_replaces_that_of_its_machine_kind_alone(tmp_path: Path) -> None:
    """Records of other machine kinds stay."""
    path, kind = tmp_path / "artifacts.json", find_machine_kind()
    write_record(OTHER_KIND, {"a": {"config.json": "0"}}, path)
    for value in ("1", "2"):
        write_record(kind, {"a": {"config.json": value}}, path)
    records = read_records(path)
    assert len(records) == 2
    for wanted, value in ((OTHER_KIND, "0"), (kind, "2")):
        record = find_record(records, wanted)
        assert record is not None and record["artifacts"] == {"a": {"config.json": value}}
    assert find_record(records, {"cpu vendor": "a third"}) is None
