"""The start of an engine and its gateway: options, verification, processes."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.artifact.layout import MANIFEST
from quantkit.errors import QuantkitError, UsageError
from quantkit.io.files import describe_os_error, read_bytes, read_json, write_output
from quantkit.serve.canary import ask_canary, read_canary
from quantkit.serve.engines import engine_process
from quantkit.serve.engines.launch import ENGINE_NAMES
from quantkit.serve.engines.launch_plan import LaunchPlan, is_installed
from quantkit.serve.gateway.access import HostPolicy, is_loopback
from quantkit.serve.gateway.api_keys import ApiKey, parse_keys
from quantkit.serve.gateway.settings import GatewaySettings, Limits, Upstream, parse_limits
from quantkit.verify.shallow import VerifyReport, verify_artifact
from quantkit.verify.stamps import check_unchanged

Log = Callable[[str], None]
Check = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """Options of the gateway.

    host, port: the address for clients; of the engine itself without a gateway. allowed_hosts:
    names that browsers may call it by if there are no keys. has_open_metrics: /metrics and /ready
    need no key. running: concurrent turns at the engine if no limit sets them. canary_seconds:
    between two readings of the canary; 0 for none.
    """

    is_enabled: bool
    host: str
    port: int
    limits: Sequence[str]
    keys: Path | None
    fallbacks: Sequence[str]
    key_variable: str
    allowed_hosts: Sequence[str]
    has_open_metrics: bool
    running: int
    canary_seconds: float = 0.0

    def check(self) -> None:
        """Check the options before anything is read or started; UsageError for invalid ones."""
        has_options = (
            self.limits or self.keys or self.fallbacks or self.key_variable or self.has_open_metrics
        ) or self.canary_seconds
        if not self.is_enabled and has_options:
            raise UsageError(
                "--limit, --keys, --fallback, --fallback-key, --open-metrics, --canary: expected "
                "--gateway with them; add it"
            )
        if self.is_enabled:
            require_packages("fastapi", "uvicorn", "httptools", "httpx2", "prometheus_client")
        self.parse_limits()
        self.make_fallbacks()
        self.read_keys()

    def parse_limits(self) -> Limits:
        """Return the limits with the values of --limit."""
        pairs = [entry.partition("=") for entry in self.limits]
        if any(not name or not separator for name, separator, _ in pairs):
            raise UsageError("--limit: expected NAME=VALUE, e.g. --limit waiting=200")
        return parse_limits(
            {"running": str(self.running)} | {name: value for name, _, value in pairs}
        )

    def adapt_to(self, plan: LaunchPlan) -> GatewayOptions:
        """Return the options for this engine.

        The transformers engine serves one request at a time: the gateway queues the others, so that
        their priorities count.
        """
        return replace(self, running=1) if plan.launch.engine == "transformers" else self

    def make_fallbacks(self) -> list[Upstream]:
        """Return the upstreams that are tried in this order if the engine fails."""
        key = read_key_variable(self.key_variable, "--fallback-key")
        upstreams = []
        for index, entry in enumerate(self.fallbacks):
            url, _, model = entry.partition("=")
            upstreams.append(
                Upstream(
                    name=f"fallback-{index + 1}",
                    url=parse_api_url(url, "--fallback"),
                    model=model,
                    key=key,
                )
            )
        return upstreams

    def read_keys(self) -> tuple[ApiKey, ...]:
        """Return the API keys; () if every client is served."""
        return parse_keys(read_json(self.keys, UsageError), str(self.keys)) if self.keys else ()

    def make_settings(self, engine: Upstream) -> GatewaySettings:
        """Return the settings of the gateway for this engine."""
        return GatewaySettings(
            upstreams=(engine, *self.make_fallbacks()),
            limits=self.parse_limits(),
            host=self.host,
            allowed_hosts=tuple(self.allowed_hosts),
            has_open_metrics=self.has_open_metrics,
        )

    def summarize(self) -> str:
        """Describe the gateway in one line."""
        limits = self.parse_limits()
        url = engine_process.format_api_url(self.host, self.port)
        return (
            f"gateway on {url}, {limits.running} concurrent requests, {limits.waiting} waiting, "
            f"{len(self.read_keys()) or 'no'} keys; /health, /ready, /metrics"
        )

    def describe(self, engine: Upstream) -> list[str]:
        """Describe the gateway, its upstreams and its limits."""
        settings = self.make_settings(engine)
        upstreams = [
            f"{upstream.name}: {upstream.url}"
            + (f", model {upstream.model}" if upstream.model else "")
            for upstream in settings.upstreams
        ]
        limits = ", ".join(
            f"{name}={value:.15g}" for name, value in settings.limits.model_dump().items()
        )
        return [self.summarize(), *upstreams, self.describe_access(), f"limits: {limits}"]

    def describe_access(self) -> str:
        """Describe the clients that the gateway serves, and those that may read its metrics."""
        clients = "clients: with a key"
        if not self.keys:
            names = ", ".join(["localhost, IP addresses", *self.allowed_hosts])
            clients = f"clients: all; browsers by {names} (--allow-host adds names)"
        is_open = self.has_open_metrics or is_loopback(self.host)
        return f"{clients}; /metrics and /ready: {'without a key' if is_open else 'with a key'}"

    def to_json(self, engine: Upstream) -> dict[str, Any]:
        """Return the gateway as plain values for JSON, without API keys."""
        settings = self.make_settings(engine)
        return {
            "url": engine_process.format_api_url(self.host, self.port),
            "upstreams": [upstream.model_dump(exclude={"key"}) for upstream in settings.upstreams],
            "limits": settings.limits.model_dump(),
            "keys": len(self.read_keys()),
            "allowed_hosts": list(self.allowed_hosts),
            "open_metrics": self.has_open_metrics,
        }


def parse_api_url(url: str, option: str) -> str:
    """Return the base URL of an OpenAI-compatible API without its last slash."""
    if not url.startswith(("http://", "https://")):
        raise UsageError(
            f"{option}: expected http://HOST:PORT/v1, found {url!r}; name the server's API"
        )
    return url.rstrip("/")


def read_key_variable(variable: str, option: str) -> str:
    """Return the API key in an environment variable.

    "" if no variable is named; UsageError if it is empty.
    """
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise UsageError(
            f"{option} {variable}: expected an API key in this environment variable, found "
            "nothing; export it"
        )
    return key


def require_packages(*packages: str) -> None:
    """Check that the packages of the extra [serve] are installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)}: expected in this environment, found none; "
            "pip install quantkit[serve]"
        )


# --------------------------------------------------------------------------------------- starting


def start_engine(
    plan: LaunchPlan, gateway: GatewayOptions, *, verified: bool, seconds: float, log: Log
) -> None:
    """Verify the artifact, start the engine, and block until it ends or is interrupted."""
    options, target, launch = plan.options, plan.target, plan.launch
    if target.kind == "config":
        raise UsageError(
            f"{options.artifact}: a config alone cannot be served; name a folder with weights"
        )
    if len(launch.per_node) > 1:
        raise UsageError(
            f"{target.name}: needs {len(launch.per_node)} nodes; print the commands with --dry-run"
        )
    if launch.engine != "transformers" and not is_installed(launch.engine):
        raise UsageError(
            f"{ENGINE_NAMES[launch.engine]}: expected in this environment, found none; "
            "install it, or use --docker"
        )
    if gateway.allowed_hosts and not gateway.is_enabled and launch.engine != "transformers":
        raise UsageError(
            f"--allow-host: expected --gateway or the transformers engine, found "
            f"{ENGINE_NAMES[launch.engine]}, which serves every name; add --gateway"
        )
    engine_process.check_port(gateway.host, gateway.port)
    check_loaded: Check = skip_check
    if target.kind == "artifact" and not verified:
        result = verify_artifact(Path(target.path))
        log(f"verified: {result.files} files, {result.n_bytes / 1e6:,.1f} MB, {result.status}")
        check_loaded = make_check(result)
    if target.status == "rejected":
        log("warning: this artifact fails a gate of its recipe; see `quantkit report`")
    if gateway.is_enabled:
        run_with_gateway(plan, gateway, seconds, log, check_loaded)
    elif launch.engine == "transformers":
        run_transformers(plan, gateway.allowed_hosts, log, check_loaded)
    else:
        run_engine(plan, seconds, log, check_loaded)


def skip_check() -> None:
    """Check nothing: the artifact was not verified."""


def make_check(verified: VerifyReport) -> Check:
    """Return the check that an engine has loaded the files that were verified.

    It raises ArtifactError if one was changed or exchanged since, even if it is back in its place.
    """
    return lambda: check_unchanged(
        verified.path,
        verified.stamps,
        "while the engine loaded it, which was stopped",
        "start again, or serve a copy with --private-copy FOLDER",
    )


def run_engine(plan: LaunchPlan, seconds: float, log: Log, check_loaded: Check) -> None:
    """Run an engine alone; its files are checked again when it answers or `seconds` are over."""
    launch, options = plan.launch, plan.options
    command = launch.get_command()
    log(launch.format_command())
    with engine_process.run_process(command, os.environ) as process:
        urls = engine_process.list_health_urls(command, options.host, options.port)
        if not engine_process.wait_answer(process, urls, seconds, log) and process.poll() is None:
            log(f"the engine did not answer at {urls[0]} within {seconds:.0f} s; it keeps running")
        check_loaded()
        status = process.wait()
    if status:
        raise QuantkitError(
            f"{ENGINE_NAMES[launch.engine]} exited with {status}; its messages are above"
        )


def run_transformers(
    plan: LaunchPlan, allowed_hosts: Sequence[str], log: Log, check_loaded: Check
) -> None:
    """Run the transformers engine in this process, for clients but not for other sites' pages."""
    require_packages("fastapi", "uvicorn", "httptools")
    from quantkit.serve.engines.decoding import Decoder  # torch
    from quantkit.serve.engines.transformers_server import make_app
    from quantkit.serve.gateway.host_check import HostCheck

    options = plan.options
    decoder = Decoder(
        Path(plan.target.path),
        name=options.name or plan.target.name,
        context=plan.memory.context,
        template=read_template(options.chat_template),
    )
    check_loaded()
    url = engine_process.format_api_url(options.host, options.port)
    log(f"serving {decoder.name} on {url} ({decoder.context} tokens)")
    for note in plan.launch.notes:
        log(note)
    app = make_app(decoder)
    app.add_middleware(HostCheck, policy=HostPolicy(options.host, tuple(allowed_hosts)))
    engine_process.make_server(app, options.host, options.port, Limits()).run()


def run_with_gateway(
    plan: LaunchPlan, gateway: GatewayOptions, seconds: float, log: Log, check_loaded: Check
) -> None:
    """Run the engine on its planned address and the gateway on the address for clients."""
    command = plan.launch.get_command()
    if plan.launch.engine == "transformers":
        command = engine_process.make_own_command(command)
    log(f"engine: {shlex.join(command)}")
    with engine_process.run_process(command, os.environ) as process:
        engine_process.wait_ready(process, plan.options.port, seconds, log)
        check_loaded()
        upstream = make_engine_upstream(plan)
        canary = make_canary(plan, gateway, upstream)
        server = make_gateway_server(gateway, upstream, log, canary)

        def report_exit(code: int) -> None:
            log(f"the engine exited with {code}")
            server.should_exit = not gateway.fallbacks  # no upstream is left

        engine_process.watch_process(process, report_exit)
        server.run()
        if process.poll() is not None:
            raise QuantkitError(
                f"the engine exited with {process.returncode}; its messages are above"
            )


def make_engine_upstream(plan: LaunchPlan) -> Upstream:
    """Return the engine as an upstream; UsageError if it needs several nodes."""
    if len(plan.launch.per_node) > 1:
        raise UsageError(
            f"--gateway: expected an engine on this machine alone, found "
            f"{len(plan.launch.per_node)} nodes; leave it out, and put "
            "`quantkit serve http://HOST:PORT/v1 --gateway` before the first node"
        )
    return Upstream(
        name="engine",
        url=engine_process.format_api_url(plan.options.host, plan.options.port),
        # The transformers engine serves requests in order of arrival.
        priorities=plan.launch.engine != "transformers",
    )


def make_server_upstream(url: str, key_variable: str) -> Upstream:
    """Return a running server as an upstream. It gets no priorities, which it may not support."""
    return Upstream(
        name="engine",
        url=parse_api_url(url, "ARTIFACT"),
        key=read_key_variable(key_variable, "--engine-key"),
    )


def run_gateway(engine: Upstream, gateway: GatewayOptions, log: Log) -> None:
    """Run the gateway before a running server."""
    engine_process.check_port(gateway.host, gateway.port)
    make_gateway_server(gateway, engine, log).run()


def write_monitoring(plan: LaunchPlan, gateway: GatewayOptions, folder: Path) -> list[Path]:
    """Write the files of `monitoring` for a launch into a folder; return their paths.

    UsageError if the plan is of no artifact, whose hash is a label.
    """
    from quantkit.serve import monitoring

    if plan.target.kind != "artifact":
        raise UsageError(
            f"--monitoring: expected an artifact, found a {plan.target.kind}; build one, or leave "
            "the option out"
        )
    manifest = read_bytes(Path(plan.target.path) / MANIFEST, error=UsageError)
    host = gateway.host if gateway.host != "0.0.0.0" else "localhost"
    options = plan.options
    service = monitoring.MonitoredService(
        artifact=options.name or plan.target.name,
        sha256=hashlib.sha256(manifest).hexdigest(),
        engine=plan.launch.engine,
        engine_address=format_address(options.host, options.port),
        gateway_address=format_address(host, gateway.port) if gateway.is_enabled else "",
        gpu_address=format_address(host, monitoring.DCGM_PORT),
    )
    files = monitoring.render_monitoring(service)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UsageError(
            f"--monitoring {folder}: {describe_os_error(fault)}; name another"
        ) from None
    for name, text in files.items():
        write_output(folder / name, text.encode())
    return [folder / name for name in files]


def format_address(host: str, port: int) -> str:
    """Return HOST:PORT; an IPv6 address gets brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def make_canary(plan: LaunchPlan, gateway: GatewayOptions, engine: Upstream) -> Any:
    """Return the CanarySchedule of an artifact; None without --canary.

    UsageError if the artifact has no samples, or the engine does not score prompts.
    """
    if not gateway.canary_seconds:
        return None
    if plan.launch.engine == "transformers" or plan.target.kind != "artifact":
        raise UsageError(
            "--canary: expected an artifact with vLLM or SGLang, which score prompts; leave it out"
        )
    from quantkit.serve.gateway.app import CanarySchedule

    canary, name = read_canary(Path(plan.target.path)), plan.options.name or plan.target.name
    return CanarySchedule(
        read=lambda: ask_canary(canary, engine.url, engine.key, name).difference,
        bound=canary.bound,
        seconds=gateway.canary_seconds,
    )


def make_gateway_server(
    gateway: GatewayOptions, engine: Upstream, log: Log, canary: Any = None
) -> Any:
    """Make the server of the gateway for this process; canary: a CanarySchedule, or None."""
    from quantkit.serve.gateway.app import make_app

    log(gateway.summarize())
    settings = gateway.make_settings(engine)
    app = make_app(settings, gateway.read_keys(), canary)
    return engine_process.make_server(app, gateway.host, gateway.port, settings.limits)


def read_template(path: Path | None) -> str | None:
    """Read a chat template from a file."""
    if path is None:
        return None
    return read_bytes(path, error=UsageError).decode("utf-8", "replace")
