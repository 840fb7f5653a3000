"""Logins of each ecosystem, and secrets that must not be seen."""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.places.here import RemoteFixture, make_registry
from support.places.hub import SIGNATURE as SIGNED_QUERY
from support.places.hub import TOKEN
from support.places.registry import PASSWORD, USER, FakeRegistry
from support.places.using import Record, publish_to, pull_from, read_files, run_command

from quantkit.publish.remote import remove_secrets

# ------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    "text",
    [
        "https://user:pa55word@host/x", "https://host/x?X-Amz-Signature=pa55word&y=1",
        "Authorization: Bearer pa55word1", "https://pa55word@host/", "see https://a/b?sig=pa55word.",
        "'authorization': 'Basic pa55word'", "hf_pa55word12345", "key AKIAPA55WORDPA55WORD,",
        "x-amz-security-token: pa55word",
    ],
)  # fmt: skip
def test_remove_secrets_removes_credentials(text: str) -> None:
    assert "pa55word" not in remove_secrets(text).lower()


def test_remove_secrets_removes_environment_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    assert remove_secrets("bad key wJalrXUtnFEMI/K7MDENG.") == "bad key ...."


def test_remove_secrets_keeps_other_text() -> None:
    for text in (
        "s3://bucket/a/b: expected it",
        "oci://host:5000/a/b:v1@sha256:00",
        "model.safetensors: 12 of 13 bytes",
    ):
        assert remove_secrets(text) == text


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Writes docker's config.json."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()

    def write(config: dict[str, Any]) -> None:
        (tmp_path / "docker/config.json").write_text(json.dumps(config))

    return write


@pytest.mark.parametrize("login", ["basic", "bearer"])
@pytest.mark.parametrize("where", ["auths", "https", "credHelpers", "credsStore"])
def test_docker_login(
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    docker: Callable[[dict[str, Any]], None],
    login: str,
    where: str,
) -> None:
    """A password with a colon, in the file or with a helper."""
    server = FakeRegistry(login)
    there = make_registry(server)
    host = f"127.0.0.1:{server.port}"
    auth = {"auth": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}
    helper = tmp_path / "bin/docker-credential-robot"
    helper.parent.mkdir()
    answer = json.dumps({"ServerURL": host, "Username": USER, "Secret": PASSWORD})
    helper.write_text(f'#!/bin/sh\n[ "$1" = get ] && [ "$(cat)" = {host} ] && echo \'{answer}\'\n')
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    docker({
        "auths": {"auths": {host: auth}},
        "https": {"auths": {f"https://{host}": auth}},
        "credHelpers": {"credHelpers": {host: "robot"}, "auths": {host: {}}},
        "credsStore": {"credsStore": "robot", "auths": {host: {}}},
    }[where])  # fmt: skip
    publish_to(built, there.address)
    pull_from(there.address, tmp_path / "got")
    assert read_files(tmp_path / "got") == read_files(built)
    server.close()


@pytest.mark.parametrize("login", ["basic", "bearer"])
@pytest.mark.parametrize("known", [None, "wrong", "no-base64"])
def test_oci_reports_wrong_login(
    built: Path,
    tmp_path: Path,
    docker: Callable[[dict[str, Any]], None],
    login: str,
    known: str | None,
    record_property: Record,
) -> None:
    server = FakeRegistry(login)
    there = make_registry(server)
    word = (
        base64.b64encode(f"{USER}:{PASSWORD}-wrong".encode()).decode()
        if known == "wrong"
        else "%%%"
    )
    docker({"auths": {f"127.0.0.1:{server.port}": {"auth": word}}} if known else {})
    for words in (
        ("publish", "--force", built, there.address),
        ("pull", there.address, tmp_path / "got"),
    ):
        done = run_command(*words)
        assert (
            done.exit_code == 1 and "docker login" in done.stderr or "log in again" in done.stderr
        )
        assert (
            PASSWORD not in done.output
            and word not in done.output
            and len(done.stderr.splitlines()) == 1
        )
    assert not (tmp_path / "got").exists()
    server.close()
    record_property("fault", f"oci: {login} login is {known or 'missing'}")


def test_hub_reports_wrong_token(
    built: Path,
    tmp_path: Path,
    make: Callable[[str], RemoteFixture],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    there = make("hf")
    wrong = "hf_" + "wr0ng" * 6
    monkeypatch.setenv("HF_TOKEN", wrong)
    done = run_command("publish", "--force", built, there.address)
    assert done.exit_code == 1 and "hf auth login" in done.stderr
    assert (
        wrong not in done.output and TOKEN not in done.output and len(done.stderr.splitlines()) == 1
    )
    record_property("fault", "hf: the token is wrong")


def test_messages_hide_signed_addresses(
    built: Path,
    tmp_path: Path,
    make: Callable[[str], RemoteFixture],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub's store refuses a signed address."""
    there = make("hf")
    monkeypatch.setattr("support.places.hub.SIGNATURE", "X-Amz-Signature=an0ther5ignature")
    real = there.server._cdn

    def refusing(request: Any, rest: list[str]) -> Any:
        request.query.clear()
        return real(request, rest)

    monkeypatch.setattr(there.server, "_cdn", refusing)
    done = run_command("publish", "--force", built, there.address)
    assert (
        done.exit_code == 1 and "Signature=" not in done.output and "5ignature" not in done.output
    )
    assert TOKEN not in done.output and SIGNED_QUERY not in done.output


def test_messages_hide_keys(
    built: Path,
    tmp_path: Path,
    make: Callable[[str], RemoteFixture],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = make("s3")
    for words in (
        ("publish", "--force", built, there.address),
        ("pull", "s3://no-such-bucket/x", tmp_path / "x"),
    ):
        done = run_command(*words)
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in done.output
        assert os.environ["AWS_ACCESS_KEY_ID"] not in done.output
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run_command("pull", there.address, tmp_path / "got")
    assert (
        done.exit_code == 1
        and "credentials" in done.stderr.lower()
        and len(done.stderr.splitlines()) == 1
    )
