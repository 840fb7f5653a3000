"""Whatever a manifest, an image or docker's configuration holds, publish and pull answer with a
sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.artifact.layout import MANIFEST
from quantkit.errors import QuantkitError
from quantkit.io.path_safety import find_name_faults
from quantkit.io.retry import RetryPolicy
from quantkit.publish.docker_login import find_login
from quantkit.publish.oci_client import OciClient
from quantkit.publish.publish import parse_manifest_names
from quantkit.publish.pull import list_expected_files
from quantkit.publish.remote import Remote
from quantkit.publish.remotes.oci import TITLE, OciRemote

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
HASH = st.text("0123456789abcdef", min_size=64, max_size=64)
ENTRIES = (
    st.fixed_dictionaries({"sha256": HASH | VALUES, "bytes": st.integers(-1, 9) | VALUES}) | VALUES
)
NAMES = st.text(max_size=12) | st.sampled_from([
    "config.json",
    "../x",
    "/x",
    "a/b",
    "A/b",
    MANIFEST,
    "x.part",
])
GOOD = st.dictionaries(
    st.sampled_from(["config.json", "a/b", "\u6a21\u578b"]),
    st.fixed_dictionaries({"sha256": HASH, "bytes": st.integers(0, 9)}),
    min_size=1,
)
FILES = GOOD | st.dictionaries(NAMES, ENTRIES, max_size=4) | VALUES
MANIFESTS = st.fixed_dictionaries(
    {"files": FILES, "schema_version": st.sampled_from([1, 1, 1, 2, "1"])},
    optional={"unhashed": st.just(["timings.json"]) | st.lists(NAMES) | VALUES, "status": VALUES},
)
LAYERS = st.fixed_dictionaries(
    {},
    optional={
        "digest": HASH.map(lambda text: f"sha256:{text}") | VALUES,
        "size": st.integers(-1, 9) | VALUES,
        "annotations": st.fixed_dictionaries({TITLE: NAMES | VALUES}) | VALUES,
    },
)


@given(MANIFESTS, st.dictionaries(NAMES, st.integers(0, 9), max_size=6), st.booleans())
def test_a_manifest(values: dict[str, Any], present: dict[str, int], whole: bool) -> None:
    """Only files of the folder are fetched, with hash
    and size.
    """
    if whole and isinstance(values["files"], dict):
        entries = values["files"].items()
        present |= {
            name: entry["bytes"]
            for name, entry in entries
            if isinstance(entry, dict) and "bytes" in entry
        }
    remote = cast(Remote, SimpleNamespace(where="there", sizes=lambda: present))
    content = json.dumps(values).encode()
    try:
        wanted, status = list_expected_files(remote, content, RetryPolicy())
    except QuantkitError as fault:
        assert "\n" not in str(fault)
    else:
        names = [entry.name for entry in wanted]
        assert (
            not list(find_name_faults(names))
            and len(set(names)) == len(names)
            and isinstance(status, str)
        )
        assert all(present[entry.name] == entry.n_bytes for entry in wanted)
        assert {entry.name for entry in wanted if entry.sha256} == set(values["files"])
    assert not list(find_name_faults(parse_manifest_names(content)))


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_bytes_that_are_no_manifest(content: bytes) -> None:
    remote = cast(Remote, SimpleNamespace(where="there", sizes=dict))
    with pytest.raises(QuantkitError) as caught:
        list_expected_files(remote, content, RetryPolicy())
    assert "\n" not in str(caught.value)


@given(
    st.fixed_dictionaries({"layers": st.lists(LAYERS | VALUES, max_size=4) | VALUES}) | st.none()
)
def test_an_image(image: dict[str, Any] | None) -> None:
    registry = cast(OciClient, SimpleNamespace(where="there", manifest=lambda _reference: image))
    try:
        sizes = OciRemote(registry, "v1").sizes()
    except QuantkitError as fault:
        assert "\n" not in str(fault)
    else:
        assert all(
            isinstance(name, str) and type(size) is int and size >= 0
            for name, size in sizes.items()
        )


AUTHS = st.dictionaries(
    st.sampled_from(["host", "https://host"]),
    st.fixed_dictionaries({"auth": st.text(max_size=12)}) | VALUES,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {"auths": AUTHS | VALUES}, optional={"credHelpers": VALUES, "credsStore": VALUES}
    )
)
def test_find_login_reads_docker_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        login = find_login("host")
    except QuantkitError as fault:
        assert "\n" not in str(fault)
    else:
        assert login is None or all(isinstance(part, str) for part in login)
