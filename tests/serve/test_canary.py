"""The canary, and the monitoring files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML
from support.damage import list_shards, read_shard, write_shard
from support.stub_engine import RunningApp, send_json

from quantkit.artifact.layout import MANIFEST, TEXT_SAMPLES
from quantkit.artifact.load_model import load_model
from quantkit.cli.main import main
from quantkit.errors import QuantkitError, UsageError
from quantkit.serve import monitoring
from quantkit.serve.canary import LEAST_BOUND, TOKENS, ask_canary, read_canary
from quantkit.serve.gateway.app import CanarySchedule, make_app
from quantkit.serve.gateway.metrics import Metrics
from quantkit.serve.gateway.settings import GatewaySettings, Upstream

ENGINE_METRICS = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:generation_tokens_total", "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total", "sglang:num_running_reqs", "sglang:num_queue_reqs",
    "sglang:token_usage", "sglang:generation_tokens_total", "sglang:cache_hit_rate",
    "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_POWER_USAGE", "up",
}  # fmt: skip
"""As in the documentation of vLLM 0.32, SGLang and the DCGM exporter."""


class ScoringEngine:
    """Serves the log-probabilities of prompts as vLLM does, by a model in this process."""

    def __init__(self, model: Any) -> None:
        self.model, self.asked = model, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] == "GET":
            await send_json(send, 200, {"data": [{"id": "stub"}]})
            return
        body = json.loads((await receive())["body"])
        if self.model is None:
            await send_json(send, 400, {"error": {"message": "echo: not supported"}})
            return
        assert body["echo"] and body["logprobs"] == 1 and body["model"] == "stub"
        self.asked += 1
        ids = torch.tensor([body["prompt"]])
        with torch.no_grad():
            logits = self.model(ids).logits[0].float().log_softmax(-1)
        own = logits[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        logprobs = {"token_logprobs": [None, *own, -0.5]}
        await send_json(send, 200, {"choices": [{"text": "", "logprobs": logprobs}]})


@pytest.fixture(scope="module")
def canary_model(built: Path) -> Any:
    return load_model(built, device="cpu")


def double_scales(artifact: Path, projections: tuple[str, ...]) -> None:
    """Double the scales of these projections of all experts: a wrong file."""
    changed = 0
    for shard in list_shards(artifact):
        tensors = read_shard(shard)
        for name, tensor in tensors.items():
            if name.endswith(tuple(f"{projection}.scales" for projection in projections)):
                dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[tensor.dtype]
                values = torch.frombuffer(bytearray(tensor.data), dtype=dtype) * 2
                tensor.data = values.view(torch.uint8).numpy().tobytes()
                changed += 1
        write_shard(shard, tensors)
    assert changed


def test_right_artifact_is_below_the_bound(built: Path, canary_model: Any) -> None:
    """The engine's log-probabilities are those of the report up to the arithmetic."""
    canary = read_canary(built)
    assert canary.bound >= LEAST_BOUND
    assert all(1 < len(prompt.tokens) <= TOKENS for prompt in canary.prompts)
    with RunningApp(ScoringEngine(canary_model)) as serving:
        reading = ask_canary(canary, serving.url)
    assert reading.difference < 0.03 < canary.bound
    assert reading.tokens == sum(len(prompt.positions) for prompt in canary.prompts) > 50


@pytest.mark.parametrize("projections", [("down_proj",), ("gate_proj", "up_proj", "down_proj")])
def test_wrong_file_crosses_the_bound(projections: tuple[str, ...], artifact: Path) -> None:
    canary = read_canary(artifact)
    double_scales(artifact, projections)
    with RunningApp(ScoringEngine(load_model(artifact, device="cpu"))) as serving:
        reading = ask_canary(canary, serving.url)
    assert reading.difference > canary.bound


def test_gateway_exports_the_canary(built: Path, canary_model: Any) -> None:
    """Wait for the metric; the planted difference is exported as it is."""
    canary, engine = read_canary(built), ScoringEngine(canary_model)
    with RunningApp(engine) as serving:
        upstream = Upstream(name="engine", url=serving.url)

        def read() -> float:
            return ask_canary(canary, serving.url).difference

        schedule = CanarySchedule(read=read, bound=canary.bound, seconds=3600)
        app = make_app(GatewaySettings(upstreams=(upstream,)), canary=schedule)
        with RunningApp(app) as gateway:
            address = gateway.url.removesuffix("/v1") + "/metrics"
            ends = time.monotonic() + 60
            while "canary_difference_nats" not in (text := httpx2.get(address).text):
                assert time.monotonic() < ends
                time.sleep(0.05)
    values = {
        sample.name.removeprefix("quantkit_gateway_canary_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert 0 <= values["difference_nats"] < 0.03 and values["bound_nats"] == canary.bound
    assert values["failures_total"] == 0


def test_engine_that_scores_no_prompts_is_one_sentence(built: Path, artifact: Path) -> None:
    expected = "400: echo: not supported; the canary needs"
    with RunningApp(ScoringEngine(None)) as serving, pytest.raises(QuantkitError, match=expected):
        ask_canary(read_canary(built), serving.url)
    (artifact / TEXT_SAMPLES).unlink()
    with pytest.raises(UsageError, match="expected samples of a fidelity text"):
        read_canary(artifact)
    metrics = Metrics()
    assert b"canary" not in metrics.format_text()
    metrics.record_canary(None, 0.1, 5.0)
    text = metrics.format_text().decode()
    assert "canary_difference_nats NaN" in text and "canary_failures_total 1.0" in text


# ------------------------------------------------------------------------------------- monitoring


def make_service(engine: str) -> monitoring.MonitoredService:
    return monitoring.MonitoredService(
        artifact="v3", sha256="ab" * 32, engine=engine, engine_address="127.0.0.1:8001",
        gateway_address="127.0.0.1:8000", gpu_address="127.0.0.1:9400",
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_queries_name_metrics_that_exist(engine: str) -> None:
    """Those of the gateway are the ones that it exports."""
    service = make_service(engine)
    metrics = Metrics()
    metrics.record_canary(0.0, 0.1, 5.0)
    metrics.requests.labels("k", "ok").inc()
    metrics.duration.labels("ok").observe(1)
    exported = {
        sample.name
        for family in text_string_to_metric_families(metrics.format_text().decode())
        for sample in family.samples
    }
    queries = [rule["expr"] for rule in monitoring.make_rules(service)["groups"][0]["rules"]]
    queries += [
        query for _, _, panel in monitoring.list_panels(service) for query in panel.values()
    ]
    names = set()
    for query in queries:
        assert query.count("(") == query.count(")")
        names |= {
            name
            for name in re.findall(
                r"[A-Za-z_][A-Za-z0-9_:]*", re.sub(r'"[^"]*"|\[\w+\]', "", query)
            )
            if ":" in name or "_" in name or name == "up"
        }
    names -= {"histogram_quantile"}
    assert names - exported - ENGINE_METRICS == set()
    assert {name for name in names if name.startswith("quantkit_")} <= exported


def test_command_writes_valid_files(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "monitoring"
    words = ["serve", str(artifact), "--monitoring", str(folder), "--gateway", "--engine", "vllm"]
    result = CliRunner().invoke(main, [*words, "--gpu", "h100"], prog_name="quantkit")
    assert result.exit_code == 0, result.output
    scrape, rules = (
        YAML(typ="safe").load((folder / name).read_text())
        for name in (monitoring.SCRAPE, monitoring.RULES)
    )
    assert [job["job_name"] for job in scrape["scrape_configs"]] == ["gateway", "engine", "gpu"]
    sha256 = hash_file(artifact / MANIFEST)
    for job in scrape["scrape_configs"]:
        (static,) = job["static_configs"]
        assert static["labels"]["artifact_sha256"] == sha256 and len(static["targets"]) == 1
    for rule in rules["groups"][0]["rules"]:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[mh]", rule["for"]) and rule["annotations"]["summary"]
    board = json.loads((folder / monitoring.DASHBOARD).read_text())
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places) == len({p["id"] for p in board["panels"]})
    assert len(board["uid"]) <= 40  # Grafana's limit
    if promtool := shutil.which("promtool"):
        for check, name in (("config", monitoring.SCRAPE), ("rules", monitoring.RULES)):
            subprocess.run([promtool, "check", check, str(folder / name)], check=True)


def hash_file(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ARTIFACT", "--canary", "300"], "expected --gateway with them"),
        (["http://127.0.0.1:9/v1", "--gateway", "--canary", "300"], "expected an artifact"),
    ],
)
def test_canary_without_what_it_needs(words: list[str], expected: str, artifact: Path) -> None:
    words = [str(artifact) if word == "ARTIFACT" else word for word in words]
    result = CliRunner().invoke(main, ["serve", *words], prog_name="quantkit")
    assert result.exit_code == 2 and expected in " ".join(result.output.split())
