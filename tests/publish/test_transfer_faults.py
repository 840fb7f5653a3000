"""What goes wrong on the way: each fault is survived, or refused with one sentence, and nothing
unverified has a name.

Every fault is recorded (`record_property("fault", ...)`), for `make reliability` to count.
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from _pytest.mark import ParameterSet
from support.places.here import WIRED, RemoteFixture
from support.places.using import (
    LAST,
    Record,
    flip_last_bit,
    make_other_artifact,
    publish_to,
    pull_from,
    read_files,
)
from support.places.wire import Cuts, Flips, Slow

from quantkit.errors import QuantkitError, UsageError
from quantkit.io.retry import RetryPolicy
from quantkit.publish import publish
from quantkit.publish.staging_dir import StagingDir, open_staging_dir
from quantkit.verify.shallow import verify_artifact

CUTS = 8
CUT_EVERY = 350_000  # bytes, in the mean; an artifact has six million
PATIENT = RetryPolicy(first_wait=0.01, tries=8)

Make = Callable[[str], RemoteFixture]


@pytest.fixture
def make(make: Make, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Libraries that wait seconds between tries wait a hundredth of it."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    brief = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 100), time=time.time)
    monkeypatch.setattr("huggingface_hub.utils._http.time", brief)
    return make


def some(*kinds: str) -> list[ParameterSet]:
    """Kinds of places; those that take longer are left to the slow tests."""
    return [
        pytest.param(kind, marks=pytest.mark.slow if kind in {"s3", "oci-real"} else ())
        for kind in kinds
    ]


def sentence(work: Callable[[], object]) -> str:
    """Return the single-line message of a refusal."""
    with pytest.raises(QuantkitError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------- the wire


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", WIRED)
def test_transfer_resumes_after_cut_connections(
    built: Path, make: Make, tmp_path: Path, kind: str, seed: int, record_property: Record
) -> None:
    """Eight times while publishing, eight times while pulling, at drawn places of the stream."""
    there = make(kind)
    up, down = Cuts(seed, CUTS, CUT_EVERY), Cuts(seed + 100, CUTS, CUT_EVERY)
    with there.through_proxy(up=up) as (address, _):
        publish_to(built, address, PATIENT)
    with there.through_proxy(down=down) as (address, _):
        pull_from(address, tmp_path / "got", PATIENT)
    assert read_files(tmp_path / "got") == read_files(built)
    assert (up.made, down.made) == (CUTS, CUTS)
    for way in ("publishing", "pulling"):
        for number in range(CUTS):
            record_property(
                "fault", f"{kind}: connection cut while {way}, seed {seed}, cut {number}"
            )


@pytest.mark.parametrize("kind", some("s3", "oci", "hf"))
def test_pull_gives_up_when_every_connection_is_cut(
    built: Path, make: Make, tmp_path: Path, kind: str, record_property: Record
) -> None:
    """The pull fails with one sentence, keeps received data, and the next pull resumes."""
    there = make(kind)
    publish_to(built, there.address)
    hurried = RetryPolicy(first_wait=0.01, tries=2)
    with there.through_proxy(down=Cuts(3, 10**6, 1_000)) as (address, _):
        said = sentence(lambda: pull_from(address, tmp_path / "got", hurried))
    assert "2 failures in a row" in said and "run the same command again to resume" in said
    assert not (tmp_path / "got").exists()
    pull_from(there.address, tmp_path / "got")
    assert read_files(tmp_path / "got") == read_files(built)
    record_property("fault", f"{kind}: every connection is cut")


def test_transfer_completes_over_short_connections(built: Path, make: Make, tmp_path: Path) -> None:
    """S3 returns complete ranges only: after a cut, a shorter range is requested."""
    there = make("s3")
    publish_to(built, there.address)

    def short(piece: bytes, offset: int) -> bytes | None:
        return piece if offset + len(piece) < 300_000 else None

    with there.through_proxy(down=short) as (address, _):
        pull_from(address, tmp_path / "got", RetryPolicy(first_wait=0.01, tries=3))
    assert read_files(tmp_path / "got") == read_files(built)


def test_pull_fetches_only_missing_bytes_after_cut(
    built: Path, make: Make, tmp_path: Path, record_property: Record
) -> None:
    there = make("oci")
    publish_to(built, there.address)
    total = sum(map(len, read_files(built).values()))
    with there.through_proxy(down=Cuts(5, 10**6, 2_000_000)) as (address, _):
        sentence(lambda: pull_from(address, tmp_path / "got", RetryPolicy(tries=1), jobs=1))
    kept = sum(map(len, read_files(tmp_path / "got.pulling" / "artifact").values()))
    with there.through_proxy() as (address, wire):
        done = pull_from(address, tmp_path / "got", jobs=1)
        carried = wire.carried
    assert kept > 10_000 and carried < total - kept + 100_000  # plus HTTP headers
    assert done.present_bytes == kept
    assert done.n_bytes + done.present_bytes == total
    assert read_files(tmp_path / "got") == read_files(built)
    record_property("fault", "oci: a pull breaks off in a file")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("kind", WIRED)
def test_pull_detects_changed_bytes(
    built: Path, make: Make, tmp_path: Path, kind: str, way: str, record_property: Record
) -> None:
    """Once is survived; always is refused, and nothing has the name."""
    there = make(kind)
    once, always = Flips(1), Flips(10**6)
    if way == "up":
        with there.through_proxy(up=always) as (address, _):
            sentence(lambda: publish_to(built, address, RetryPolicy(first_wait=0.01, tries=2)))
        sentence(lambda: pull_from(there.address, tmp_path / "got"))
        with there.through_proxy(up=once) as (address, _):
            publish_to(built, address)
        pull_from(there.address, tmp_path / "got")
    else:
        publish_to(built, there.address)
        with there.through_proxy(down=always) as (address, _):
            sentence(lambda: pull_from(address, tmp_path / "got"))
        assert not (tmp_path / "got").exists()
        with there.through_proxy(down=once) as (address, _):
            pull_from(address, tmp_path / "got")
    assert always.made and once.made == 1
    assert read_files(tmp_path / "got") == read_files(built)
    record_property("fault", f"{kind}: a byte changes on the way {way}")
    record_property("fault", f"{kind}: bytes always change on the way {way}")


@pytest.mark.parametrize("kind", some(*WIRED))
def test_transfer_reports_closed_port(
    built: Path, make: Make, tmp_path: Path, kind: str, record_property: Record
) -> None:
    there = make(kind)
    with there.through_proxy(up=lambda _piece, _at: None) as (address, wire):
        wire.close()
        hurried = RetryPolicy(first_wait=0.01, tries=2)
        assert "2 failures in a row" in sentence(lambda: publish_to(built, address, hurried))
        assert "2 failures in a row" in sentence(
            lambda: pull_from(address, tmp_path / "got", hurried)
        )
    assert not (tmp_path / "got").exists()
    record_property("fault", f"{kind}: closed port")


# ---------------------------------------------------------------------------------------- the place


@pytest.mark.parametrize("kind", some("file", "s3", "memory", "oci"))
def test_publish_detects_file_lost_before_manifest(
    built: Path,
    make: Make,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    """The artifact is not made one; publishing again sends the file again."""
    there = make(kind)
    real = publish.run_in_parallel

    def losing(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        if kind == "oci":
            blobs = there.server.blobs
            del blobs[max(blobs, key=lambda digest: len(blobs[digest]))]
        else:
            there.write(LAST, None)

    monkeypatch.setattr(publish, "run_in_parallel", losing)
    assert "publish again" in sentence(lambda: publish_to(built, there.address))
    monkeypatch.setattr(publish, "run_in_parallel", real)
    assert "its publication did not finish" in sentence(
        lambda: pull_from(there.address, tmp_path / "got")
    )
    assert len(publish_to(built, there.address).files) == 2
    pull_from(there.address, tmp_path / "got")
    assert read_files(tmp_path / "got") == read_files(built)
    record_property("fault", f"{kind}: a file is lost while publishing")


@pytest.mark.parametrize("kind", some("file", "s3", "memory", "oci", "hf"))
def test_pull_refuses_file_that_changes_meanwhile(
    built: Path,
    make: Make,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    """The hub's commit is immutable; other remotes refuse the file."""
    there = make(kind)
    publish_to(built, there.address)
    from quantkit.publish import pull

    real = pull.run_in_parallel

    def changing(*args: object) -> None:
        there.write(LAST, flip_last_bit(there.read(LAST)))
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pull, "run_in_parallel", changing)
    if kind == "hf":
        pull_from(there.address, tmp_path / "got")
        assert read_files(tmp_path / "got") == read_files(built)
    else:
        assert LAST in sentence(lambda: pull_from(there.address, tmp_path / "got"))
        assert not (tmp_path / "got").exists()
    record_property("fault", f"{kind}: a file changes while it is pulled")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_transfer_survives_temporary_registry_failures(
    built: Path, make: Make, tmp_path: Path, status: int, record_property: Record
) -> None:
    there = make("oci")
    there.server.failing = random.Random(status), status
    publish_to(built, there.address, PATIENT)
    pull_from(there.address, tmp_path / "got", PATIENT)
    assert read_files(tmp_path / "got") == read_files(built)
    record_property("fault", f"oci: every fifth answer is {status}")


def test_publish_refuses_concurrent_commit(
    built: Path, make: Make, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    there = make("hf")
    there.server.make("team/tiny")
    real = publish.run_in_parallel

    def meanwhile(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        there.write(".gitattributes", b"other")

    monkeypatch.setattr(publish, "run_in_parallel", meanwhile)
    assert "found a newer commit" in sentence(lambda: publish_to(built, there.address))
    assert "config.json" not in there.server.files("team/tiny")
    record_property("fault", "hf: another commit while publishing")


def test_publish_reports_file_excluded_by_gitignore(
    built: Path, make: Make, tmp_path: Path, record_property: Record
) -> None:
    there = make("hf")
    there.server.ignored.add(LAST)
    assert f"{LAST!r}: expected the file that was committed" in sentence(
        lambda: publish_to(built, there.address)
    )
    assert LAST in sentence(lambda: pull_from(there.address, tmp_path / "got"))
    assert not (tmp_path / "got").exists()
    record_property("fault", "hf: the repository ignores a file")


# ------------------------------------------------------------------------------------- this machine


def run(*words: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command line, with files of at most `limit` bytes."""

    def limit_file_size() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "quantkit", *words],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit_file_size,
    )


@pytest.mark.parametrize("limit", [100_000, 2_500_000])
def test_pull_reports_full_disk(
    built: Path, tmp_path: Path, limit: int, record_property: Record
) -> None:
    publish_to(built, str(tmp_path / "there"))
    done = run("pull", str(tmp_path / "there"), str(tmp_path / "got"), limit=limit)
    assert done.returncode == 1
    assert "cannot be written: file too large" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "got").exists()
    again = pull_from(str(tmp_path / "there"), tmp_path / "got")
    assert again.present_bytes > 100_000
    assert read_files(tmp_path / "got") == read_files(built)
    record_property("fault", f"file: the disk is full at {limit} bytes while pulling")


def test_publish_reports_full_disk(built: Path, tmp_path: Path, record_property: Record) -> None:
    done = run("publish", "--force", str(built), str(tmp_path / "there"), limit=2_500_000)
    assert done.returncode == 1
    assert "cannot be written: file too large" in done.stderr and "Traceback" not in done.stderr
    assert "its publication did not finish" in sentence(
        lambda: pull_from(str(tmp_path / "there"), tmp_path / "got")
    )
    publish_to(built, str(tmp_path / "there"))
    verify_artifact(tmp_path / "there")
    record_property("fault", "file: the disk is full while publishing")


def test_pull_reports_missing_space_before_fetching(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    publish_to(built, str(tmp_path / "there"))
    monkeypatch.setattr("quantkit.publish.pull.get_free_bytes", lambda _path: 1_000_000)
    assert "found 1.0 MB; free some space" in sentence(
        lambda: pull_from(str(tmp_path / "there"), tmp_path / "got")
    )
    assert not [path for path in (tmp_path / "got.pulling").rglob("*") if path.is_file()]
    record_property("fault", "file: too little room to pull")


def test_second_pull_into_folder_is_refused(
    built: Path, tmp_path: Path, record_property: Record
) -> None:
    publish_to(built, str(tmp_path / "there"))
    with open_staging_dir(tmp_path / "got"):
        done = run("pull", str(tmp_path / "there"), str(tmp_path / "got"))
    assert done.returncode == 2
    assert "expected to be the only pull here, found another at work (process " in done.stderr
    assert not (tmp_path / "got").exists()
    pull_from(str(tmp_path / "there"), tmp_path / "got")
    record_property("fault", "two pulls into one folder")


def test_pull_accepts_result_of_faster_pull(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """Another artifact got the name between the check and the lock: it is not
    replaced.
    """
    from quantkit.publish import pull

    publish_to(built, str(tmp_path / "there"))
    second = make_other_artifact(Path(shutil.copytree(built, tmp_path / "copy")))
    real = pull.open_staging_dir
    for source, refused in ((built, False), (second, True)):
        got = tmp_path / f"got-{refused}"

        @contextmanager
        def late(path: Path, source: Path = source) -> Iterator[StagingDir]:
            shutil.copytree(source, path)
            with real(path) as place:
                yield place

        monkeypatch.setattr(pull, "open_staging_dir", late)
        if refused:
            assert "exists already" in sentence(lambda: pull_from(str(tmp_path / "there"), got))  # noqa: B023
        else:
            assert pull_from(str(tmp_path / "there"), got).files == ()
        assert (
            read_files(got) == read_files(source)
            and not got.with_name(got.name + ".pulling").exists()
        )
    record_property("fault", "another pull was faster")


def test_second_publication_into_folder_is_refused(
    built: Path, tmp_path: Path, record_property: Record
) -> None:
    from quantkit.io.lock import hold_lock

    with (
        hold_lock(tmp_path / "there.publishing.lock"),
        pytest.raises(UsageError, match="the only publication here"),
    ):
        publish_to(built, str(tmp_path / "there"))
    publish_to(built, str(tmp_path / "there"))
    verify_artifact(tmp_path / "there")
    record_property("fault", "two publications into one folder")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_one_of_two_concurrent_pulls_succeeds(
    built: Path, make: Make, tmp_path: Path, seed: int, record_property: Record
) -> None:
    """Whichever comes second is refused, or finds it there; both leave a whole artifact."""
    there = make("oci")
    publish_to(built, there.address)
    with there.through_proxy(down=Slow(6e6)) as (address, _):
        words = [sys.executable, "-m", "quantkit", "pull", address, str(tmp_path / "got")]
        first = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        time.sleep(random.Random(seed).uniform(0, 1.5))
        second = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        errors = [first.communicate()[1], second.communicate()[1]]
    assert 0 in {first.returncode, second.returncode} <= {0, 2}, errors
    assert not any("Traceback" in text for text in errors)
    assert read_files(tmp_path / "got") == read_files(built)
    record_property("fault", f"two pulls at the same time, seed {seed}")


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["publish", "pull"])
@pytest.mark.parametrize("kind", ["oci", "s3"])
def test_transfer_resumes_after_killed_process(
    built: Path,
    make: Make,
    tmp_path: Path,
    kind: str,
    command: str,
    end: signal.Signals,
    record_property: Record,
) -> None:
    """Three times at drawn moments, then it is left to finish."""
    there = make(kind)
    if command == "pull":
        publish_to(built, there.address)
    moments = random.Random(f"{kind}{command}{end}")
    for time_around in range(3):
        slow = Slow(2.5e6)
        with there.through_proxy(up=slow, down=slow) as (address, wire):
            words = (
                (command, "--force", str(built), address)
                if command == "publish"
                else (command, address, str(tmp_path / "got"))
            )
            process = subprocess.Popen(
                [sys.executable, "-m", "quantkit", *words], stderr=subprocess.PIPE, text=True
            )
            goal = moments.uniform(1e5, 1.5e6)
            while wire.carried < goal and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(end)
            said = process.communicate()[1]
        if time_around and process.returncode == 0:
            break  # there was little left
        assert process.returncode in {-9, 130, 143}, said
        assert "Traceback" not in said
        assert (
            end == signal.SIGKILL or "received data is kept; run the same command to resume" in said
        )
        if command == "publish":
            assert "no quantkit/manifest.json" in sentence(
                lambda: pull_from(there.address, tmp_path / "got")
            )
        assert not (tmp_path / "got").exists()
        record_property("fault", f"{kind}: {command} is ended by {end.name}")
    if command == "publish":
        publish_to(built, there.address)
    done = pull_from(there.address, tmp_path / "got")
    assert (
        command == "publish" or kind == "s3" or done.present_bytes
    )  # S3's ranges arrive whole or not at all
    assert read_files(tmp_path / "got") == read_files(built)
