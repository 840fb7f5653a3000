"""From a plan to a running engine: verify, start, front, and stay until somebody says so."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, UsageError
from quantkit.io.files import read_bytes, read_json
from quantkit.serve.engines import engine_process
from quantkit.serve.engines.launch import SHOWN
from quantkit.serve.engines.launch_plan import LaunchPlan, installed
from quantkit.serve.gateway.api_keys import Key, parse_keys
from quantkit.serve.gateway.settings import GatewaySettings, Limits, Upstream, limits_from
from quantkit.verify.shallow import verify_artifact

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """The gateway's options.

    host, port: where clients ask, the engine itself where there is no gateway; running: requests at the engine at once
    where no limit says otherwise.
    """

    on: bool
    host: str
    port: int
    limits: Sequence[str]
    keys: Path | None
    fallbacks: Sequence[str]
    key_variable: str
    running: int

    def check(self) -> None:
        """UsageError for options that mean nothing, before anything is read or started."""
        if not self.on and (self.limits or self.keys or self.fallbacks or self.key_variable):
            raise UsageError(
                "--limit, --keys, --fallback, --fallback-key: expected --gateway with them; add it"
            )
        if self.on:
            require("fastapi", "uvicorn", "httpx2", "prometheus_client")
        self.bounds()
        self.stand_ins()
        self.known()

    def bounds(self) -> Limits:
        """The limits, with what --limit changes."""
        pairs = [entry.partition("=") for entry in self.limits]
        if any(not name or not separator for name, separator, _ in pairs):
            raise UsageError("--limit: expected NAME=VALUE, e.g. --limit waiting=200")
        return limits_from(
            {"running": str(self.running)} | {name: value for name, _, value in pairs}
        )

    def before(self, made: LaunchPlan) -> GatewayOptions:
        """The same before this engine: before one that answers in the order of arrival, whoever waits waits here."""
        return replace(self, running=1) if made.launch.engine == "transformers" else self

    def stand_ins(self) -> list[Upstream]:
        """Who is asked when the engine fails, in this order."""
        key = key_in(self.key_variable, "--fallback-key")
        made = []
        for place, entry in enumerate(self.fallbacks):
            url, _, model = entry.partition("=")
            made.append(
                Upstream(
                    name=f"fallback-{place + 1}", url=api(url, "--fallback"), model=model, key=key
                )
            )
        return made

    def known(self) -> tuple[Key, ...]:
        """Who may ask; () where whoever can reach it may."""
        return parse_keys(read_json(self.keys, UsageError), str(self.keys)) if self.keys else ()

    def settings(self, engine: Upstream) -> GatewaySettings:
        """The gateway before this engine."""
        return GatewaySettings(upstreams=(engine, *self.stand_ins()), limits=self.bounds())

    def head(self) -> str:
        """The gateway in a line."""
        limits = self.bounds()
        return (
            f"gateway on {engine_process.url_of(self.host, self.port)}, {limits.running} requests at once, {limits.waiting} "
            f"waiting, {len(self.known()) or 'no'} keys; /health, /ready, /metrics"
        )

    def lines(self, engine: Upstream) -> list[str]:
        """The gateway before this engine, in full."""
        settings = self.settings(engine)
        asked = [
            f"{one.name}: {one.url}" + (f", model {one.model}" if one.model else "")
            for one in settings.upstreams
        ]
        limits = ", ".join(
            f"{name}={value:.15g}" for name, value in settings.limits.model_dump().items()
        )
        return [self.head(), *asked, f"limits: {limits}"]

    def as_values(self, engine: Upstream) -> dict[str, Any]:
        """The gateway before this engine, for machines; no key is in it."""
        settings = self.settings(engine)
        return {
            "url": engine_process.url_of(self.host, self.port),
            "upstreams": [one.model_dump(exclude={"key"}) for one in settings.upstreams],
            "limits": settings.limits.model_dump(),
            "keys": len(self.known()),
        }


def api(url: str, option: str) -> str:
    """The base of an OpenAI-compatible API without its last slash; UsageError when it is no address."""
    if not url.startswith(("http://", "https://")):
        raise UsageError(
            f"{option}: expected http://HOST:PORT/v1, found {url!r}; name the server's API"
        )
    return url.rstrip("/")


def key_in(variable: str, option: str) -> str:
    """The API key in a variable of the environment; "" where none is named, UsageError where it is empty."""
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise UsageError(
            f"{option} {variable}: expected an API key there, found nothing; export it"
        )
    return key


def require(*packages: str) -> None:
    """UsageError when a package of the extra is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)}: expected here, found none; pip install quantkit[serve]"
        )


# ------------------------------------------------------------------------------------------------------------ starting


def start_engine(
    made: LaunchPlan, front: GatewayOptions, *, verified: bool, seconds: float, tell: Tell
) -> None:
    """Verify, start, and stay until the engine ends or somebody says so."""
    wanted, target = made.wanted, made.target
    if target.kind == "config":
        raise UsageError(
            f"{wanted.artifact}: a config alone cannot be served; name a folder with weights"
        )
    if len(made.launch.per_node) > 1:
        raise UsageError(
            f"{target.name}: needs {len(made.launch.per_node)} nodes; print the commands with --dry-run"
        )
    if made.launch.engine != "transformers" and not installed(made.launch.engine):
        raise UsageError(
            f"{SHOWN[made.launch.engine]}: expected in this environment, found none; install it, or --docker"
        )
    engine_process.check_port(front.host, front.port)
    if target.kind == "artifact" and not verified:
        found = verify_artifact(Path(target.path))
        tell(f"verified: {found.files} files, {found.n_bytes / 1e6:,.1f} MB, {found.status}")
    if target.status == "rejected":
        tell("warning: this artifact misses a gate of its recipe; `quantkit report` says which")
    if front.on:
        behind_gateway(made, front, seconds, tell)
    elif made.launch.engine == "transformers":
        small_engine(made, tell)
    else:
        tell(made.launch.text())
        with engine_process.process(made.launch.words(), os.environ) as started:
            ended = started.wait()
        if ended:
            raise QuantkitError(
                f"{SHOWN[made.launch.engine]} ended with {ended}; its messages are above"
            )


def small_engine(made: LaunchPlan, tell: Tell) -> None:
    """transformers in this process."""
    require("fastapi", "uvicorn")
    from quantkit.serve.engines.decoding import Decoder  # torch
    from quantkit.serve.engines.transformers_server import make_app

    wanted = made.wanted
    template = read_template(wanted.chat_template)
    decoder = Decoder(
        Path(made.target.path),
        name=wanted.name or made.target.name,
        context=made.needs.context,
        template=template,
    )
    tell(
        f"serving {decoder.name} on {engine_process.url_of(wanted.host, wanted.port)} ({decoder.context} tokens)"
    )
    for note in made.launch.notes:
        tell(note)
    engine_process.server_of(make_app(decoder), wanted.host, wanted.port).run()


def behind_gateway(made: LaunchPlan, front: GatewayOptions, seconds: float, tell: Tell) -> None:
    """The engine where the plan has it, the gateway where clients ask."""
    words = made.launch.words()
    if made.launch.engine == "transformers":
        words = engine_process.own_command(words)
    tell(f"engine: {shlex.join(words)}")
    with engine_process.process(words, os.environ) as started:
        engine_process.wait_ready(started, made.wanted.port, seconds, tell)
        server = gateway_server(front, make_engine_upstream(made), tell)

        def ended(code: int) -> None:
            tell(f"the engine ended with {code}")
            server.should_exit = not front.fallbacks  # nobody is left to ask

        engine_process.watch(started, ended)
        server.run()
        if started.poll() is not None:
            raise QuantkitError(
                f"the engine ended with {started.returncode}; its messages are above"
            )


def make_engine_upstream(made: LaunchPlan) -> Upstream:
    """The engine as the gateway asks it; UsageError where no gateway can start it."""
    if len(made.launch.per_node) > 1:
        raise UsageError(
            f"--gateway: expected an engine on this machine alone, found {len(made.launch.per_node)} nodes; leave it "
            "out, and put `quantkit serve http://HOST:PORT/v1 --gateway` before the first node"
        )
    ranks = made.launch.engine != "transformers"  # which answers one after the other, as they came
    return Upstream(
        name="engine",
        url=engine_process.url_of(made.wanted.host, made.wanted.port),
        priorities=ranks,
    )


def make_server_upstream(address: str, key_variable: str) -> Upstream:
    """A server that runs already; it is not told priorities, which it may not know."""
    return Upstream(
        name="engine", url=api(address, "ARTIFACT"), key=key_in(key_variable, "--engine-key")
    )


def run_gateway(engine: Upstream, front: GatewayOptions, tell: Tell) -> None:
    """The gateway before a server that runs already."""
    engine_process.check_port(front.host, front.port)
    gateway_server(front, engine, tell).run()


def gateway_server(front: GatewayOptions, engine: Upstream, tell: Tell) -> Any:
    """The gateway, ready to run in this process."""
    from quantkit.serve.gateway.app import make_app

    tell(front.head())
    return engine_process.server_of(
        make_app(front.settings(engine), front.known()), front.host, front.port
    )


def read_template(path: Path | None) -> str | None:
    """A chat template from a file."""
    if path is None:
        return None
    return read_bytes(path, error=UsageError).decode("utf-8", "replace")
