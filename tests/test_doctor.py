"""`quantkit doctor`: every check names the effect of a missing part, and no token is printed."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.command_line import read_error, run

from quantkit import doctor
from quantkit.doctor import Check
from quantkit.evaluate.sandbox import Sandbox

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_hub_fault", lambda: "https://hub does not answer")
    monkeypatch.setattr(doctor, "probe_sandbox", lambda: Sandbox(kind="none", reason="no bwrap"))


def by_name(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_every_check_that_is_not_ok_has_an_effect(tmp_path: Path) -> None:
    checks = doctor.check_environment(tmp_path)
    assert all(check.effect for check in checks if check.state != "ok")
    names = by_name(checks)
    assert names["hub"].state == names["sandbox"].state == "note"
    assert "humaneval" in names["sandbox"].effect and "GB free" in names["disk"].value


def test_no_token_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for options in ((), ("--json",)):
        result = run("doctor", *options)
        assert result.exit_code == 0, result.output
        assert TOKEN not in result.output
        assert "a token is stored" in " ".join(result.stdout.split())


def test_json_has_every_check() -> None:
    rows = json.loads(run("doctor", "--json").stdout)
    assert {row["name"] for row in rows} >= {"Python", "torch", "memory", "disk", "sandbox", "hub"}


def test_missing_extra_names_what_it_disables(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = Requirement("surely-absent>=1; extra == 's3'")
    monkeypatch.setattr(doctor, "read_requirements", lambda: (needed,))
    [check] = doctor.check_extras()
    assert check.state == "note" and "surely-absent: expected >=1, found none" in check.value
    assert (
        check.effect
        == "without it: no publishing to and pulling from s3://; pip install 'quantkit[s3]'"
    )


def test_unsupported_version_of_a_dependency_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_requirements", lambda: (Requirement("click>=999"),))
    message = read_error(run("doctor"), 1)
    assert f"click: expected >=999, found {importlib.metadata.version('click')}" in message


def test_extras_are_those_of_the_package() -> None:
    from support.paths import ROOT

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("[project.urls]")[0]
    extras = {line.partition(" = ")[0] for line in section.splitlines() if " = [" in line}
    assert extras - {"test"} == doctor.EXTRAS.keys()
