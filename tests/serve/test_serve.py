"""`quantkit serve`: commands, errors, containers, and the transformers engine over sockets."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from support.stub_engine import RunningApp, send_half_request
from tools import demo_serve

from quantkit.artifact.load_model import load_model
from quantkit.cli.main import main
from quantkit.errors import UsageError
from quantkit.formats.common.engine_names import has_separate_shared_experts
from quantkit.serve.engines import engine_process
from quantkit.serve.engines.containers import make_label
from quantkit.serve.engines.decoding import Decoder, TextStreamer
from quantkit.serve.engines.launch import Endpoint, fit_or_raise, make_launch
from quantkit.serve.engines.openai_protocol import BadRequest, parse_request
from quantkit.serve.engines.target import read_target
from quantkit.serve.engines.transformers_server import BODY_BYTES, make_app
from quantkit.serve.gateway.api_keys import create_key
from quantkit.serve.sizing.gpus import read_gpus
from quantkit.serve.sizing.memory import estimate_memory

V3 = "deepseek-ai/DeepSeek-V3"
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its config ships too, and is read faster


def serve(*words: str) -> Any:
    return CliRunner().invoke(main, ["serve", *words], prog_name="quantkit")


def dry(*words: str) -> dict[str, Any]:
    result = serve(*words, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.output))


def shell(text: str) -> list[str]:
    """Split a command over several lines into words, without comments."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return shlex.split(" ".join(line.removesuffix("\\") for line in lines))


def values(words: list[str]) -> dict[str, str]:
    """Return flag -> value, "" for a switch."""
    result = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            following = words[place + 1 : place + 2]
            result[word] = following[0] if following and not following[0].startswith("--") else ""
    return result


# -------------------------------------------------------------------------------------- commands


def test_v3_runs_on_two_nodes_of_h100() -> None:
    plan = dry(V3, "--gpu", "h100", "--engine", "vllm")
    first, second = (values(words) for words in plan["commands"])
    assert plan["commands"][0][:3] == ["vllm", "serve", V3]
    assert plan["kv_bytes"] == 61 * 576 * 2 * 32_768 * 10
    expected = {
        "--max-model-len": "32768", "--tensor-parallel-size": "8", "--pipeline-parallel-size": "2",
        "--kv-cache-dtype": "auto", "--enable-prefix-caching": "", "--max-num-seqs": "10",
        "--scheduling-policy": "priority", "--nnodes": "2", "--node-rank": "0",
    }  # fmt: skip
    assert {name: first.get(name) for name in expected} == expected
    assert 0.9 <= float(first["--gpu-memory-utilization"]) <= 0.96
    assert second["--node-rank"] == "1" and "--headless" in second and "--headless" not in first


def test_sglang_gets_equivalent_flags() -> None:
    plan = dry(
        V3,
        "--gpu",
        "h200",
        "--engine",
        "sglang",
        "--kv",
        "fp8",
        "--context",
        "65536",
        "--users",
        "4",
    )
    result = values(plan["commands"][0])
    assert plan["commands"][0][:5] == ["python", "-m", "sglang.launch_server", "--model-path", V3]
    expected = {
        "--context-length": "65536", "--tp-size": "8", "--kv-cache-dtype": "fp8_e4m3",
        "--max-running-requests": "4",
        "--enable-priority-scheduling": "", "--schedule-low-priority-values-first": "",
        "--default-priority-value": "0",
    }  # fmt: skip
    assert {name: result.get(name) for name in expected} == expected
    assert plan["nodes"] == 1 and "--disable-shared-experts-fusion" not in result  # FP8 throughout


def test_separate_shared_experts_are_not_fused(built: Path) -> None:
    assert (
        "--disable-shared-experts-fusion"
        in dry(str(built), "--gpu", "h100", "--engine", "sglang")["commands"][0]
    )
    assert (
        "--disable-shared-experts-fusion"
        not in dry(str(built), "--gpu", "h100", "--engine", "vllm")["commands"][0]
    )
    report = json.loads((built / "quantkit" / "fidelity.json").read_text())["artifact"]
    commands = {entry["engine"]: entry["command"] for entry in report["serving"]}
    assert commands["SGLang"].endswith(" --disable-shared-experts-fusion")
    assert "--disable" not in commands["vLLM"]
    assert any("--disable-shared-experts-fusion" in note for note in report["notes"])
    routed = ["m.0.mlp.experts.0.up_proj.qweight", "m.0.mlp.experts.0.up_proj.scales"]
    shared = ["m.0.mlp.shared_experts.up_proj.qweight", "m.0.mlp.shared_experts.up_proj.scales"]
    assert (
        not has_separate_shared_experts(routed + shared)
        and not has_separate_shared_experts(routed)
        and has_separate_shared_experts(routed + shared[:1])
    )


def test_memory_fraction_grows_with_the_plan() -> None:
    """R1-Distill-Qwen-32B in BF16, 65.5 GB, and 2.15 GB of cache per user on one card of 141 GB."""
    target, card = (
        read_target("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"),
        read_gpus().get_gpu("h200"),
    )
    place = Endpoint(host="x", port=1, name="n", path="p")
    asked = {}
    for users in (10, 22, 26):
        wanted = estimate_memory(target.model, 8192, users)
        made = make_launch("vllm", target, wanted, fit_or_raise(wanted, card), place)
        assert made.placement and made.placement.gpus == 1
        asked[users] = float(values(made.get_command())["--gpu-memory-utilization"])
    # (65.5 + 10 x 2.15) x 1.15 / 141 = .71; with 22 users .92; with 26 .99, above vLLM's maximum
    assert asked == {10: 0.90, 22: 0.92, 26: 0.96}


def test_pipeline_stages_come_with_alternatives() -> None:
    plan = dry(V3, "--gpu", "h200", "--engine", "vllm", "--users", "30")
    assert plan["pipeline_parallel"] > 1
    assert any(
        "TP8 alone misses" in note and "it fits with --kv fp8 or --users 16" in note
        for note in plan["notes"]
    )


def why_of(plan: dict[str, Any], name: str) -> str:
    return next((str(flag["why"]) for flag in plan["flags"] if flag["name"] == name), "")


def test_missing_memory_is_reported() -> None:
    """Mixtral on two H100: with the margin more than vLLM's largest fraction."""
    why = why_of(
        dry("mistralai/Mixtral-8x7B-v0.1", "--gpu", "h100", "--engine", "vllm"),
        "--gpu-memory-utilization",
    )
    assert why.endswith("of 80 GB per GPU = 0.98, limited to 0.96: 1.61 GB are missing")


def test_batched_tokens_are_limited_if_the_default_exceeds_memory() -> None:
    """On eight RTX 4090 vLLM's default of 2,048 tokens does not fit; SGLang's does."""
    words = ("Qwen/Qwen3-30B-A3B", "--gpu", "rtx4090", "--users", "32", "--engine")
    plan = dry(*words, "vllm")
    assert values(plan["commands"][0])["--max-num-batched-tokens"] == "256"
    assert "2,048, the default, exceed the memory that the cache leaves" in why_of(
        plan, "--max-num-batched-tokens"
    )
    assert "--chunked-prefill-size" not in values(dry(*words, "sglang")["commands"][0])
    assert "--max-num-batched-tokens" not in values(
        dry(V3, "--gpu", "h100", "--engine", "vllm")["commands"][0]
    )


def test_dry_run_of_v3_takes_two_seconds_without_torch() -> None:
    code = (
        "import sys\nfrom quantkit.cli.main import main\n"
        f"try: main(['serve', '{V3}', '--dry-run'])\nexcept SystemExit as end: assert end.code == "
        "0, end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "import resource; sys.stderr.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_utime))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stderr) < 2  # of CPU: the machine may be busy
    assert result.stdout.count("vllm serve") == 2


def test_extra_arguments_reach_the_engine_and_reasons_are_comments(built: Path) -> None:
    result = serve(
        str(built),
        "--dry-run",
        "--gpu",
        "rtx4090",
        "--name",
        "tiny",
        "--",
        "--enforce-eager",
        "--seed",
        "3",
    )
    assert result.exit_code == 0
    command = shell(result.output)
    assert (
        command[-3:] == ["--enforce-eager", "--seed", "3"]
        and values(command)["--served-model-name"] == "tiny"
    )
    assert "no chat template" in result.output


def test_small_artifact_is_served_by_transformers_without_gpu(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    plan = dry(str(built))
    assert plan["engine"] == "transformers" and values(plan["commands"][0])["--context"] == "512"
    assert dry(SMALL)["engine"] == "vllm"


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["nowhere"], 2, "nowhere: expected an artifact"),
        ([SMALL], 2, "a config alone cannot be served"),
        (["BUILT", "--context", "513"], 2, "expected a context of at most 512 tokens"),
        ([SMALL, "--dry-run", "--gpu", "h1000"], 2, "no GPU named 'h1000'"),
        (
            [SMALL, "--dry-run", "--gpu", "mac-studio"],
            2,
            "vLLM does not run on it; name another GPU",
        ),
        (
            ["BUILT", "--dry-run", "--gpu", "mac-studio"],
            2,
            "vLLM does not run on it; use --engine transformers",
        ),
        (["v3-awq4", "--dry-run"], 2, "v3-awq4: expected an artifact, found a recipe; build it"),
        (
            ["recipes/v3-awq4.yaml"],
            2,
            "recipes/v3-awq4.yaml: expected an artifact, found a recipe; build it",
        ),
        ([SMALL, "--docker", "--gpu", "mi300x"], 2, "expected an NVIDIA GPU"),
        ([SMALL, "--dry-run", "--users", "100000000"], 2, "fit on no number of NVIDIA H100"),
        ([SMALL, "--engine", "transformers"], 2, "expected an artifact, found none"),
        (["BUILT", "--engine", "transformers", "--", "--tp", "3"], 2, "takes no flags of its own"),
        (["BUILT", "--engine", "transformers", "--docker"], 2, "expected --engine vllm or sglang"),
        (
            ["BUILT", "--engine", "vllm", "--gpu", "h100"],
            2,
            "vLLM: expected in this environment, found none",
        ),
        (["BUILT", "--limit", "waiting=3"], 2, "expected --gateway"),
        (["BUILT", "--gateway", "--limit", "waiting"], 2, "expected NAME=VALUE"),
        (
            ["BUILT", "--gateway", "--limit", "wating=3"],
            2,
            "--limit wating: unknown; known limits: running",
        ),
        (
            ["BUILT", "--gateway", "--fallback", "api.example.com"],
            2,
            "--fallback: expected http://HOST:PORT/v1",
        ),
        (
            ["BUILT", "--gateway", "--docker"],
            2,
            "expected no --gateway, since they print an engine alone",
        ),
        (
            ["http://127.0.0.1:9/v1", "--gateway", "--kubernetes"],
            2,
            "expected no --gateway, since they print an engine alone",
        ),
        (
            [V3, "--gateway", "--gpu", "h100", "--dry-run"],
            2,
            "an engine on this machine alone, found 2 nodes",
        ),
        ([SMALL, "--gateway", "--keys", "no-such-keys.json"], 2, "no-such-keys.json: "),
        (
            ["BUILT", "--gateway", "--fallback-key", "NOT_SET"],
            2,
            "expected an API key in this environment variable",
        ),
        (
            ["BUILT", "--gateway", "--engine-key", "X"],
            2,
            "expected the address of a server as ARTIFACT",
        ),
        (
            ["http://127.0.0.1:9/v1", "--gateway", "--engine-key", "NOT_SET"],
            2,
            "--engine-key NOT_SET: expected an API key",
        ),
        (["http://127.0.0.1:9/v1"], 2, "the address of a server: expected --gateway"),
    ],
)
def test_invalid_options_are_rejected(
    words: list[str], code: int, expected: str, built: Path
) -> None:
    result = serve(*(str(built) if word == "BUILT" else word for word in words))
    assert (
        result.exit_code == code and expected in result.output and "Traceback" not in result.output
    )


def test_nf4_experts_are_served_by_transformers_only(artifact: Path) -> None:
    """The fidelity path names the engines; here neither vLLM nor SGLang."""
    path = artifact / "quantkit/fidelity.json"
    values = json.loads(path.read_text())
    values["artifact"]["serving"] = [{"engine": "transformers", "command": "x"}]
    path.write_text(json.dumps(values))
    result = serve(str(artifact), "--dry-run", "--gpu", "h100")
    assert (
        result.exit_code == 2
        and "neither vLLM nor SGLang reads it; serve it with --engine transformers" in result.output
    )


def test_damaged_artifact_is_not_served(artifact: Path) -> None:
    shard = next(artifact.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = serve(
        str(artifact), "--engine", "transformers", "--port", str(engine_process.find_free_port())
    )
    assert result.exit_code == 1 and "expected sha256" in result.output


def test_occupied_port_is_reported_before_loading(built: Path) -> None:
    with RunningApp(lambda *_: None) as other:
        result = serve(str(built), "--engine", "transformers", "--port", str(other.port))
        assert result.exit_code == 2 and "expected a free port" in result.output


def test_dry_run_before_a_server_prints_the_gateway_only(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [create_key("a")[1].model_dump()]}))
    with RunningApp(lambda *_: None) as taken:  # a start would be refused
        words = [
            "http://127.0.0.1:9/v1",
            "--gateway",
            "--port",
            str(taken.port),
            "--limit",
            "deadline=8",
        ]
        words += ["--keys", str(keys), "--fallback", "http://other/v1=big"]
        plan = dry(*words)["gateway"]
        result = serve(*words, "--dry-run")
    assert (plan["url"], plan["keys"], plan["limits"]["deadline"]) == (
        f"http://127.0.0.1:{taken.port}/v1",
        1,
        8,
    )
    assert [(one["url"], one["model"]) for one in plan["upstreams"]] == [
        ("http://127.0.0.1:9/v1", ""),
        ("http://other/v1", "big"),
    ]
    assert result.exit_code == 0 and plan["url"] in result.output and "1 keys" in result.output
    assert (
        "fallback-1: http://other/v1, model big" in result.output
        and "deadline=8, " in result.output
    )


def test_dry_run_prints_the_gateway_and_its_engine(built: Path) -> None:
    """The engine gets a loopback port, the gateway the port of the option."""
    words = [str(built), "--gateway", "--host", "0.0.0.0", "--port", "9000", "--limit", "waiting=7"]
    for engine in ("vllm", "transformers"):
        plan = dry(*words, "--engine", engine)
        hidden = values(plan["commands"][0])
        assert hidden["--host"] == "127.0.0.1" and hidden["--port"] != "9000"
        assert (
            plan["gateway"]["url"] == "http://0.0.0.0:9000/v1"
            and plan["gateway"]["limits"]["waiting"] == 7
        )
        assert plan["gateway"]["upstreams"][0]["url"] == f"http://127.0.0.1:{hidden['--port']}/v1"
        at_once, priorities = (
            (10, True) if engine == "vllm" else (1, False)
        )  # transformers: as they come
        assert plan["gateway"]["limits"]["running"] == at_once
        assert plan["gateway"]["upstreams"][0]["priorities"] is priorities
    plan = dry(*words, "--engine", "transformers", "--limit", "running=3")
    assert plan["gateway"]["limits"]["running"] == 3
    result = serve(*words, "--engine", "vllm", "--dry-run")
    assert values(shell(result.output))["--host"] == "127.0.0.1"
    assert (
        "# gateway on http://0.0.0.0:9000/v1, 10 concurrent requests, 7 waiting, no keys"
        in result.output
    )
    assert "gateway" not in dry(str(built), "--engine", "vllm")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals a child")
def test_engine_ends_when_quantkit_is_killed() -> None:
    code = (
        "import os, sys\nfrom quantkit.serve.engines.engine_process import run_process\n"
        "with run_process(['sleep', '60'], os.environ) as started:\n"
        "    print(started.pid, flush=True)\n    started.wait()"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert program.stdout
    engine = Path("/proc", program.stdout.readline().strip(), "stat")
    assert "(sleep)" in engine.read_text()
    program.kill()
    program.wait(10)
    end = time.monotonic() + 10
    while engine.exists() and ") Z " not in engine.read_text():
        assert time.monotonic() < end, "the engine is left"
        time.sleep(0.05)


@pytest.mark.parametrize("columns", [80, 120])
def test_reasons_are_comments_that_fit_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = serve(SMALL, "--dry-run", "--gpu", "h100", "--gateway")
    comments = [line for line in result.output.splitlines() if line.startswith("#")]
    assert max(map(len, comments)) <= columns
    assert "body_bytes=8000000" in result.output and "the rest becomes" in result.output
    assert shell(result.output)[:3] == ["vllm", "serve", SMALL]


def test_ipv6_addresses_are_supported() -> None:
    with socket.socket(socket.AF_INET6) as tried:
        here = tried.connect_ex(("::1", 9)) != errno.EADDRNOTAVAIL
    if here:  # a machine may have switched it off
        engine_process.check_port("::1", engine_process.find_free_port())
    result = serve(
        "http://127.0.0.1:9/v1", "--gateway", "--dry-run", "--host", "::1", "--port", "9000"
    )
    assert "gateway on http://[::1]:9000/v1" in result.output
    with pytest.raises(UsageError, match="expected a free port on no.invalid"):
        engine_process.check_port("no.invalid", 9000)


# --------------------------------------------------------------------------------------- containers


def test_docker_runs_the_command_on_mounted_weights(built: Path) -> None:
    result = serve(str(built), "--docker", "--gpu", "rtx4090", "--port", "9000")
    words = shell(result.output)
    place = words.index("--entrypoint")
    assert words[:2] == ["docker", "run"] and f"{built}:/model:ro" in words
    assert words[words.index("-p") + 1] == "127.0.0.1:9000:9000", (
        "no network that was not asked for"
    )
    run = [words[place + 1], *words[place + 3 :]]
    straight = dry(
        str(built), "--gpu", "rtx4090", "--port", "9000", "--host", "0.0.0.0", "--engine", "vllm"
    )
    assert run == ["/model" if word == str(built) else word for word in straight["commands"][0]]


@pytest.mark.parametrize(
    ("host", "published"),
    [
        ("0.0.0.0", "0.0.0.0:8000:8000"),
        ("::1", "[::1]:8000:8000"),
        ("localhost", "127.0.0.1:8000:8000"),
    ],
)
def test_docker_publishes_on_the_host_option(host: str, published: str) -> None:
    words = shell(serve(SMALL, "--docker", "--gpu", "h100", "--host", host).output)
    assert words[words.index("-p") + 1] == published and values(words)["--host"] == "0.0.0.0"


def test_containers_get_the_chat_template(tmp_path: Path) -> None:
    template = tmp_path / "my chat.jinja"
    template.write_text("{{ messages[0].content }}")
    asked = (SMALL, "--gpu", "h100", "--chat-template", str(template))
    words = shell(serve(*asked, "--docker").output)
    inside = values(words)["--chat-template"]
    assert f"{template}:{inside}:ro" in words and inside != str(template)
    text = serve(*asked, "--kubernetes").output
    pod = list(YAML(typ="safe", pure=True).load_all(text))[1]["spec"]["template"]["spec"]
    engine, volumes = pod["containers"][0], {volume["name"]: volume for volume in pod["volumes"]}
    assert values(engine["command"])["--chat-template"] == inside
    folders = {mount["mountPath"]: volumes[mount["name"]] for mount in engine["volumeMounts"]}
    made = shlex.split(next(line for line in text.splitlines() if "create configmap" in line))
    assert (
        folders[str(Path(inside).parent)]["configMap"]["name"] == made[made.index("configmap") + 1]
    )
    assert f"--from-file={Path(inside).name}={template}" in made
    assert "templates" not in serve(SMALL, "--gpu", "h100", "--kubernetes").output


def test_kubernetes_deploys_one_node(built: Path) -> None:
    result = serve(
        str(built), "--kubernetes", "--gpu", "rtx4090", "--engine", "sglang", "--name", "tiny"
    )
    assert "&id" not in result.output and "Kubernetes 1.28" not in result.output
    service, deployment = YAML(typ="safe", pure=True).load_all(result.output)
    pod = deployment["spec"]["template"]["spec"]
    engine = pod["containers"][0]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert engine["command"][:5] == [
        "python",
        "-m",
        "sglang.launch_server",
        "--model-path",
        "/model",
    ]
    resources = engine["resources"]
    assert resources["limits"] == {"memory": "33Gi", "nvidia.com/gpu": 1}
    assert resources["requests"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": 1}
    check_security(pod)
    assert engine["command"][-2:] == ["--api-key", "$(ENGINE_API_KEY)"]
    assert find_secret(engine, "ENGINE_API_KEY") in result.output.partition("apiVersion")[0]
    assert "initContainers" not in pod
    assert {mount["name"] for mount in engine["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert result.output.startswith(f"# The claim {claim} must exist")
    assert engine["readinessProbe"]["httpGet"] == {"path": "/health", "port": 8000}
    assert pod["enableServiceLinks"] is False, "a Service called vllm would set VLLM_PORT"
    assert all(
        engine[probe].get("timeoutSeconds", 1) > 1 for probe in ("readinessProbe", "livenessProbe")
    )


def check_security(pod: dict[str, Any]) -> None:
    """No root, no capabilities, no token of the cluster."""
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        context = container["securityContext"]
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert set(container["resources"]) == {"requests", "limits"}
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts <= {volume["name"] for volume in pod["volumes"]}


def find_secret(container: dict[str, Any], variable: str) -> str:
    """Return the command that makes the secret of a variable."""
    (entry,) = [entry for entry in container["env"] if entry["name"] == variable]
    secret = entry["valueFrom"]["secretKeyRef"]
    return f"kubectl create secret generic {secret['name']} --from-literal={secret['key']}=KEY"


def test_kubernetes_pulls_and_verifies_first(built: Path) -> None:
    """The init container pulls into the folder that the engine mounts, which only it may write."""
    asked = (str(built), "--gpu", "rtx4090", "--engine", "vllm", "--pull", "s3://models/tiny")
    result = serve(*asked, "--kubernetes")
    _, deployment = YAML(typ="safe", pure=True).load_all(result.output)
    pod = deployment["spec"]["template"]["spec"]
    check_security(pod)
    (init,), (engine,) = pod["initContainers"], pod["containers"]
    name = deployment["metadata"]["name"]
    (written,) = [x for x in init["volumeMounts"] if x["name"] == "weights"]
    (read,) = [x for x in engine["volumeMounts"] if x["name"] == "weights"]
    assert init["command"] == [
        "quantkit", "pull", "s3://models/tiny", f"{written['mountPath']}/{name}",
    ]  # fmt: skip
    assert read == {
        "name": "weights", "mountPath": "/model", "readOnly": True, "subPath": name,
    }  # fmt: skip
    assert not pod["volumes"][0]["persistentVolumeClaim"]["readOnly"]
    assert init["envFrom"][0]["secretRef"]["name"] == f"{name}-keys"
    assert init["image"] in result.output.partition("apiVersion")[0]
    refused = serve(V3, "--kubernetes", "--gpu", "h100", "--pull", "s3://m/v3", "--engine", "vllm")
    assert refused.exit_code == 2 and "expected a model for one node, found 2" in refused.output
    alone = serve(*asked)
    assert alone.exit_code == 2 and "--pull: expected --kubernetes" in alone.output


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_kubernetes_deploys_two_nodes(engine: str) -> None:
    """One pod per node; the shell inserts its index into the command, as the shell here does."""
    result = serve(V3, "--kubernetes", "--gpu", "h100", "--engine", engine)
    documents = list(YAML(typ="safe", pure=True).load_all(result.output))
    stateful = documents[-1]
    assert "# Several nodes need Kubernetes 1.28" in result.output and "&id" not in result.output
    assert [document["kind"] for document in documents] == ["Service", "Service", "StatefulSet"]
    assert (
        stateful["spec"]["replicas"] == 2 and stateful["spec"]["podManagementPolicy"] == "Parallel"
    )
    container = stateful["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["resources"]["limits"]["memory"] == "346Gi"  # half of 627 GiB, and 32
    check_security(stateful["spec"]["template"]["spec"])
    find_secret(container, "VLLM_API_KEY" if engine == "vllm" else "ENGINE_API_KEY")
    assert container["readinessProbe"]["timeoutSeconds"] > 5, (
        "a busy engine has the seconds that the probe gives it"
    )
    for rank in ("0", "1"):
        text = container["command"][2].replace("exec ", "printf '%s\\n' ", 1)
        run = subprocess.run(
            ["/bin/sh", "-c", text],
            env={"POD_INDEX": rank, "ENGINE_API_KEY": "k y"},
            capture_output=True,
            text=True,
            check=True,
        )
        words = values(run.stdout.split())
        assert words["--node-rank"] == rank
        assert ("k y" in run.stdout.splitlines()) == (engine == "sglang")
        assert ("--headless" in words) == (engine == "vllm" and rank == "1")
        assert "deepseek-v3-0.deepseek-v3-nodes" in words.get(
            "--master-addr", words.get("--dist-init-addr", "")
        )


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("tiny-v3-awq4", "tiny-v3-awq4"),
        ("70B-awq", "model-70b-awq"),
        ("_", "model"),
        ("9" * 60, "model-" + "9" * 44),
    ],
)
def test_label_begins_with_a_letter(name: str, label: str) -> None:
    assert make_label(name) == label


# ------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"model": "other", "prompt": "x"}, "model: expected 'm', found 'other'"),
        ({"prompt": "x", "logprobs": 3}, "logprobs: not supported by this engine"),
        ({"prompt": "x", "tools": [{}]}, "tools: not supported by this engine"),
        (
            {"prompt": "x", "presence_penalty": 0.5},
            "presence_penalty: not supported by this engine",
        ),
        ({"prompt": "x", "max_tokns": 3}, "max_tokns: unknown"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens: expected a number from 1"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens: expected a number from 1"),
        ({"prompt": "x", "temperature": 3}, "temperature: expected a number from 0 to 2"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature: expected a number"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop: expected a text"),
        ({"prompt": "x", "n": 100}, "n: expected an integer from 1 to 16"),
        ({"prompt": 3}, "prompt: expected a text"),
        ({"prompt": [[1], "x", None]}, "prompt: expected a text"),
        ({}, "prompt: expected a text"),
    ],
)
def test_unsupported_parameter_is_rejected_by_name(asked: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadRequest, match=expected):
        parse_request(asked, "text", "m")


def test_neutral_parameters_are_accepted() -> None:
    ask = parse_request(
        {
            "prompt": ["a", "b"],
            "logprobs": None,
            "user": "x",
            "priority": 3,
            "echo": False,
            "stop": "s",
        },
        "text",
        "m",
    )
    assert (ask.prompts, ask.stop, ask.max_tokens, ask.temperature) == (("a", "b"), ("s",), 16, 1.0)
    assert (
        parse_request(
            {"prompt": "a", "max_completion_tokens": None, "max_tokens": 2}, "text", "m"
        ).max_tokens
        == 2
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = parse_request({"messages": [{"role": "user", "content": parts}]}, "chat", "m")
    assert chat.messages[0]["content"] == "ab" and chat.max_tokens is None
    for messages in (
        [],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "hi",
        [3],
    ):
        with pytest.raises(BadRequest, match="messages"):
            parse_request({"messages": messages}, "chat", "m")


class StubTokenizer:
    """The part of a tokenizer that a TextStreamer needs if it gets text."""

    backend_tokenizer = None


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=4), st.data())
def test_streamer_stops_before_the_stop_string(text: str, stop: str, data: Any) -> None:
    pieces: list[str] = []
    writer = TextStreamer(StubTokenizer(), [stop], pieces.append)
    rest = text
    while rest and not writer.is_stopped:
        size = data.draw(st.integers(1, 3))
        writer._add_text(rest[:size])
        rest = rest[size:]
        assert text.split(stop)[0].startswith("".join(pieces))
    writer.end()
    assert "".join(pieces) == text.split(stop)[0]
    assert writer.is_stopped == (stop in text)


# -------------------------------------------------------------------------- transformers engine


@pytest.fixture(scope="module")
def decoder(built: Path) -> Decoder:
    torch.set_num_threads(1)
    return Decoder(built, name="tiny")


@pytest.fixture(scope="module")
def api(decoder: Decoder) -> Iterator[openai.OpenAI]:
    with RunningApp(make_app(decoder)) as serving:
        yield openai.OpenAI(base_url=serving.url, api_key="none", max_retries=0, timeout=60)


PROMPT = demo_serve.PROMPT


def test_demo_requests_succeed_in_this_process(api: openai.OpenAI) -> None:
    """All requests of `make demo-serve`, without its processes."""
    demo_serve.send_requests(api)


def test_greedy_completion_matches_generate(
    api: openai.OpenAI, decoder: Decoder, built: Path
) -> None:
    ids = decoder.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = load_model(built).generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
    expected = decoder.tokenizer.decode(made, skip_special_tokens=True)
    answer = api.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0)
    assert answer.choices[0].text == expected
    by_ids = api.completions.create(
        model="tiny", prompt=ids[0].tolist(), max_tokens=30, temperature=0
    )
    assert by_ids.choices[0].text == expected
    assert answer.usage and answer.usage.prompt_tokens == ids.shape[1]


def test_prompts_and_choices_have_consecutive_indices(api: openai.OpenAI) -> None:
    answer = api.completions.create(
        model="tiny", prompt=["a", PROMPT], n=2, max_tokens=4, temperature=1, seed=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text != answer.choices[1].text  # another seed each
    pieces: dict[int, str] = {}
    stream = api.completions.create(
        model="tiny", prompt=["a", PROMPT], n=2, max_tokens=4, temperature=1, seed=3, stream=True
    )
    for chunk in stream:
        pieces[chunk.choices[0].index] = (
            pieces.get(chunk.choices[0].index, "") + chunk.choices[0].text
        )
    assert pieces == {choice.index: choice.text for choice in answer.choices}


def test_completion_ends_at_eos_unless_ignored(api: openai.OpenAI) -> None:
    short = api.completions.create(model="tiny", prompt=PROMPT, max_tokens=60, temperature=0)
    assert (
        short.choices[0].finish_reason == "stop"
        and short.usage
        and short.usage.completion_tokens < 60
    )
    full = api.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=60, temperature=0, extra_body={"ignore_eos": True}
    )
    assert (
        full.choices[0].finish_reason == "length"
        and full.usage
        and full.usage.completion_tokens == 60
    )


def test_context_limits_prompt_and_completion(api: openai.OpenAI, decoder: Decoder) -> None:
    tokens = [5] * 500
    answer = api.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a b"}], temperature=0
    )
    assert answer.usage and answer.usage.total_tokens <= decoder.context == 512
    api.completions.create(model="tiny", prompt=tokens, max_tokens=12)
    with pytest.raises(openai.BadRequestError, match="at most 512, found 500"):
        api.completions.create(model="tiny", prompt=tokens, max_tokens=13)
    with pytest.raises(openai.BadRequestError, match="expected token ids from 0 to 767"):
        api.completions.create(model="tiny", prompt=[768])


def test_malformed_bodies_are_rejected(api: openai.OpenAI) -> None:
    """Broken JSON, deep nesting, and a body that would fill the memory."""
    bodies = {b"[": 400, b"[" * 100_000: 400, b"\xff": 400, b"7": 400, b" " * (BODY_BYTES + 1): 413}
    for body, status in bodies.items():
        result = httpx2.post(f"{api.base_url}completions", content=body)
        assert (result.status_code, result.json()["error"]["code"]) == (status, status)
        assert result.json()["error"]["message"].startswith("body: expected ")
    for method, path, status in (("POST", "embeddings", 404), ("GET", "completions", 405)):
        result = httpx2.request(method, f"{api.base_url}{path}")
        assert (result.status_code, result.json()["error"]["code"]) == (status, status)
    result = httpx2.post(
        f"{api.base_url}completions", content=b'{"\\ud800": 1}'
    )  # quoted in the message
    assert result.status_code == 400 and "unknown" in result.json()["error"]["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_half_of_a_surrogate_pair_is_rejected(api: openai.OpenAI, path: str) -> None:
    body = (
        {"prompt": "a\ud800"}
        if path == "completions"
        else {"messages": [{"role": "user", "content": "a\ud800"}]}
    )
    result = httpx2.post(f"{api.base_url}{path}", content=json.dumps(body))
    assert (
        result.status_code == 400
        and "half of a surrogate pair at 1" in result.json()["error"]["message"]
    )


def test_incomplete_body_times_out(api: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.serve.engines.transformers_server.BODY_SECONDS", 0.3)
    answer = send_half_request(str(api.base_url))
    assert answer.startswith(b"HTTP/1.1 408 ") and b"expected its end within 0.3 s" in answer


@pytest.fixture(scope="module")
def whole_seconds(api: openai.OpenAI) -> float:
    """Measure the seconds of an answer of 500 tokens."""
    began = time.monotonic()
    api.completions.create(
        model="tiny", prompt="a", max_tokens=500, extra_body={"ignore_eos": True}
    )
    return time.monotonic() - began


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_engine(
    api: openai.OpenAI, whole_seconds: float, stream: bool
) -> None:
    """Three clients disconnect, one running and two waiting; the fourth is served at once."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": stream}

    def disconnect(_: int) -> None:
        with pytest.raises(httpx2.ReadTimeout):
            if stream:
                with httpx2.stream(
                    "POST", f"{api.base_url}completions", json=body, timeout=httpx2.Timeout(30)
                ) as got:
                    for _piece in got.iter_raw():
                        raise httpx2.ReadTimeout("enough")
            httpx2.post(f"{api.base_url}completions", json=body, timeout=0.3)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(disconnect, range(3)))
    began = time.monotonic()
    api.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert time.monotonic() - began < max(
        1.5, 1.5 * whole_seconds
    )  # three whole answers are twice that


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a b"}], "max_tokens": 2}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE_TEMPLATES = {
    "raises": ("{{ raise_exception('\x1b[31mroles must \\n alternate') }}", "roles must alternate"),
    "code": ("{{ cycler.__init__.__globals__.os.system('touch OWNED') }}", "is unsafe"),
    "loop": (LOOP, "expected at most 1 s of processor time, found more"),
    "memory": ("{{ 'a' * 10**10 }}", "MiB of memory, found more"),
    "output": ("{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "characters, found more"),
    "error": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "syntax": ("{% for", "unexpected .end of template."),
    "type": ("{{ messages + 1 }}", "TypeError"),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_hostile_chat_template_is_a_400(
    api: openai.OpenAI,
    decoder: Decoder,
    name: str,
    stream: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """The sentence of the template is in the response and nowhere else; the engine serves on."""
    template, sentence = HOSTILE_TEMPLATES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quantkit.io.templates.RENDER_SECONDS", 1)
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "template", template)
        url = f"{api.base_url}chat/completions"
        result = httpx2.post(url, json={**CHAT, "stream": stream}, timeout=300)
        completion = api.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert result.status_code == 400
    message = result.json()["error"]["message"]
    assert message.startswith("messages: the model's chat template gives no text for them: ")
    assert re.search(sentence, message) and message.isprintable() and len(message) < 500
    assert completion.choices
    assert api.chat.completions.create(**CHAT).choices
    assert "Traceback" not in "".join(capfd.readouterr()) + caplog.text
    assert not list(tmp_path.iterdir())


def test_chat_template_of_the_tokenizer_is_applied(
    api: openai.OpenAI, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ bos_token }}{{ m.role }}{{ m.content }}{% endfor %}:"
    monkeypatch.setattr(decoder, "template", None)
    monkeypatch.setattr(decoder, "has_own_template", True)
    monkeypatch.setattr(decoder.tokenizer, "chat_template", template)
    request = parse_request(CHAT, "chat", "tiny")
    expected = decoder.tokenizer.apply_chat_template(
        CHAT["messages"], add_generation_prompt=True, tokenize=False
    )
    ids = decoder.tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert decoder.encode_prompts(request) == [ids]


def test_tokenizer_that_fails_is_a_400(
    api: openai.OpenAI, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """Rust's panic, as the tokenizers library raises it."""

    class FailingTokenizer:
        def __call__(self, *_: object, **__: object) -> object:
            raise PanicException("\x1b[31mno such token\nbacktrace")

    monkeypatch.setattr(decoder, "tokenizer", FailingTokenizer())
    with pytest.raises(openai.BadRequestError, match="cannot encode it") as caught:
        api.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert "\x1b" not in str(caught.value) and "backtrace" not in str(caught.value)


@pytest.mark.slow
def test_demo_runs(built: Path) -> None:
    """`quantkit serve --gateway` in a separate process, queried and stopped."""
    demo_serve.main(built)
