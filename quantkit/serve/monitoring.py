"""Monitoring of a served artifact: Prometheus' scrape configuration and alert rules, and a Grafana
dashboard. Pure text.

Every sample and alert has the labels `artifact` and `artifact_sha256` (of its manifest), so that a
change of the served model is visible in every graph. Names of metrics are those of vLLM 0.32
and SGLang 0.5.23, and of the gateway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from quantkit.serve.gateway.metrics import METRIC_PREFIX

SCRAPE, RULES, DASHBOARD = "prometheus.yml", "alerts.yml", "dashboard.json"
DCGM_PORT = 9400
WINDOW = "5m"


@dataclass(frozen=True, kw_only=True)
class EngineMetrics:
    """Queries of an engine's figures."""

    running: str
    waiting: str
    cache: str
    tokens: str
    hits: str
    up: str


ENGINES: Mapping[str, EngineMetrics] = {
    "vllm": EngineMetrics(
        running="sum(vllm:num_requests_running)",
        waiting="sum(vllm:num_requests_waiting)",
        cache="avg(vllm:kv_cache_usage_perc)",
        tokens=f"sum(rate(vllm:generation_tokens_total[{WINDOW}]))",
        hits=f"sum(rate(vllm:prefix_cache_hits_total[{WINDOW}])) / "
        f"sum(rate(vllm:prefix_cache_queries_total[{WINDOW}]))",
        up='up{job="engine"}',
    ),
    "sglang": EngineMetrics(
        running="sum(sglang:num_running_reqs)",
        waiting="sum(sglang:num_queue_reqs)",
        cache="avg(sglang:token_usage)",
        tokens=f"sum(rate(sglang:generation_tokens_total[{WINDOW}]))",
        hits="avg(sglang:cache_hit_rate)",
        up='up{job="engine"}',
    ),
}


@dataclass(frozen=True, kw_only=True)
class MonitoredService:
    """Monitored servers: addresses as HOST:PORT, the gateway's "" without one."""

    artifact: str
    sha256: str
    engine: str  # "vllm" or "sglang"; others have no metrics
    engine_address: str
    gateway_address: str
    gpu_address: str


def render_monitoring(service: MonitoredService) -> dict[str, str]:
    """Return the files: name -> text."""
    return {
        SCRAPE: format_yaml(make_scrape_config(service)),
        RULES: format_yaml(make_rules(service)),
        DASHBOARD: json.dumps(make_dashboard(service), indent=2) + "\n",
    }


def format_yaml(values: Mapping[str, Any]) -> str:
    """Return a YAML document."""
    yaml, text = YAML(), StringIO()
    yaml.default_flow_style, yaml.width = False, 110
    yaml.dump(values, text)
    return text.getvalue()


def make_scrape_config(service: MonitoredService) -> dict[str, Any]:
    """Return Prometheus' configuration."""
    jobs = {"gpu": service.gpu_address}
    if service.engine in ENGINES:
        jobs = {"engine": service.engine_address, **jobs}
    if service.gateway_address:
        jobs = {"gateway": service.gateway_address, **jobs}
    return {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": [RULES],
        "scrape_configs": [
            {
                "job_name": job,
                "static_configs": [{"targets": [address], "labels": make_labels(service)}],
            }
            for job, address in jobs.items()
        ],
    }


def make_labels(service: MonitoredService) -> dict[str, str]:
    """Return the labels of every sample."""
    return {"artifact": service.artifact, "artifact_sha256": service.sha256}


def make_rules(service: MonitoredService) -> dict[str, Any]:
    """Return the alert rules."""
    rules = []
    if service.gateway_address:
        rules += make_gateway_rules()
    if service.engine in ENGINES:
        metrics = ENGINES[service.engine]
        rules += [
            make_rule("EngineDown", f"{metrics.up} == 0", "2m", "critical",
                      "The engine's metrics have not answered for two minutes."),
            make_rule("EngineQueueGrows", f"{metrics.waiting} > 2 * {metrics.running}", "5m",
                      "warning", "More requests wait at the engine than it can soon run."),
            make_rule("KVCacheFull", f"{metrics.cache} > 0.95", "5m", "warning",
                      "The KV cache is full: requests are preempted or wait."),
            make_rule("PrefixCacheMisses", f"{metrics.hits} < 0.1", "30m", "info",
                      "Few prompt tokens come from the prefix cache; conversations reach 0.6."),
        ]  # fmt: skip
    return {"groups": [{"name": "quantkit", "rules": rules}]}


def make_gateway_rules() -> list[dict[str, Any]]:
    """Return the alert rules on the gateway's metrics, the canary's included."""
    requests, canary = f"{METRIC_PREFIX}requests_total", f"{METRIC_PREFIX}canary"
    all_requests = f"sum(rate({requests}[{WINDOW}]))"
    failed = f'sum(rate({requests}{{outcome!~"ok|refused|left"}}[{WINDOW}]))'
    duration = f"sum by (le) (rate({METRIC_PREFIX}request_seconds_bucket[{WINDOW}]))"
    first = f"sum by (le) (rate({METRIC_PREFIX}time_to_first_token_seconds_bucket[{WINDOW}]))"
    late = f"time() - {canary}_last_reading_timestamp_seconds > 3600"
    return [
        make_rule("GatewayDown", 'up{job="gateway"} == 0', "2m", "critical",
                  "The gateway's metrics have not answered for two minutes."),
        make_rule("RequestsFail", f"{failed} / {all_requests} > 0.01", "5m", "critical",
                  "More than 1 % of the requests fail, by deadline, overload or the engine."),
        make_rule("SlowRequests", f"histogram_quantile(0.99, {duration}) > 30", "10m", "warning",
                  "The p99 of the latency is above 30 s."),
        make_rule("SlowFirstToken", f"histogram_quantile(0.5, {first}) > 2", "10m", "warning",
                  "Half of the streams wait more than 2 s for their first token."),
        make_rule("QueueRejects", f'sum(rate({requests}{{outcome=~"busy.*"}}[{WINDOW}])) > 0',
                  "5m", "warning", "The queue is full: requests get 429."),
        make_rule("CanaryDiffers", f"{canary}_difference_nats > {canary}_bound_nats", "0m",
                  "critical", "The served model is not the measured one: its log-probabilities of "
                  "known text differ from the report's. Check files, engine version and flags."),
        make_rule("CanaryFails", f"increase({canary}_failures_total[1h]) > 2 or {late}", "0m",
                  "warning", "The engine does not answer the canary."),
    ]  # fmt: skip


def make_rule(
    name: str, expression: str, duration: str, severity: str, summary: str
) -> dict[str, Any]:
    """Return one alert rule."""
    return {
        "alert": name,
        "expr": expression,
        "for": duration,
        "labels": {"severity": severity},
        "annotations": {"summary": summary},
    }


def list_panels(service: MonitoredService) -> list[tuple[str, str, dict[str, str]]]:
    """Return the panels of the dashboard: title, unit, legend -> query."""
    panels: list[tuple[str, str, dict[str, str]]] = []
    prefix = METRIC_PREFIX
    if service.gateway_address:
        for title, name in (
            ("Latency", "request"),
            ("Time to first token", "time_to_first_token"),
            ("Between tokens", "inter_token"),
        ):
            rates = f"sum by (le) (rate({prefix}{name}_seconds_bucket[{WINDOW}]))"
            queries = {f"p{q}": f"histogram_quantile({q / 100}, {rates})" for q in (50, 99)}
            panels.append((title, "s", queries))
        outcomes = f"sum by (outcome) (rate({prefix}requests_total[{WINDOW}]))"
        panels += [
            ("Requests by outcome", "reqps", {"{{outcome}}": outcomes}),
            ("Queue", "short", {"running": f"{prefix}running", "waiting": f"{prefix}waiting"}),
            ("Canary", "none", {
                "difference, nats": f"{prefix}canary_difference_nats",
                "bound, nats": f"{prefix}canary_bound_nats",
            }),
        ]  # fmt: skip
    if service.engine in ENGINES:
        metrics = ENGINES[service.engine]
        panels += [
            ("Engine: requests", "short",
             {"running": metrics.running, "waiting": metrics.waiting}),
            ("Engine: output tokens per second", "short", {"tokens/s": metrics.tokens}),
            ("Engine: caches", "percentunit",
             {"KV cache in use": metrics.cache, "prefix cache hits": metrics.hits}),
        ]  # fmt: skip
    panels += [
        ("GPU utilization", "percent", {"GPU {{gpu}}": "DCGM_FI_DEV_GPU_UTIL"}),
        ("GPU power", "watt", {"GPU {{gpu}}": "DCGM_FI_DEV_POWER_USAGE"}),
    ]
    return panels


def make_dashboard(service: MonitoredService) -> dict[str, Any]:
    """Return a dashboard of Grafana 9 or later, to be imported; it asks for the data source."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = [
        {
            "id": number + 1,
            "type": "timeseries",
            "title": title,
            "datasource": source,
            "gridPos": {"h": 8, "w": 8, "x": 8 * (number % 3), "y": 8 * (number // 3)},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "targets": [
                {"refId": chr(65 + n), "datasource": source, "expr": query, "legendFormat": legend}
                for n, (legend, query) in enumerate(queries.items())
            ],
        }
        for number, (title, unit, queries) in enumerate(list_panels(service))
    ]
    return {
        "uid": f"quantkit-{service.sha256[:16]}",
        "title": f"{service.artifact} ({service.sha256[:12]})",
        "tags": ["quantkit"],
        "schemaVersion": 37,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": panels,
    }
