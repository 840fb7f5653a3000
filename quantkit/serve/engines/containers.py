"""The command of an engine in a container: a docker line, a Kubernetes manifest. Pure text, nothing is started.

Images are the engines' own, by the versions whose flags were read. Weights are mounted read-only at /model.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from io import StringIO
from typing import Any

from quantkit.errors import UsageError
from quantkit.serve.engines.launch import MASTER, Launch

IMAGES: Mapping[str, str] = {
    "vllm": "vllm/vllm-openai:v0.32.0",
    "sglang": "lmsysorg/sglang:v0.5.23",
}
MODEL_MOUNT = "/model"
TEMPLATE_MOUNT = "/templates/chat.jinja"
"""Where a chat template that the model does not bring lies in a container."""
POD_RANK = "$(POD_INDEX)"


def render_docker(launch: Launch, folder: str, host: str, port: int, template: str = "") -> str:
    """One `docker run` per node. The launch's path must be /model, its host 0.0.0.0, that of the container; `host` is
    where the machine listens for it, `template` the machine's file for TEMPLATE."""
    image = get_image(launch)
    network = (
        ["--network", "host"]
        if len(launch.per_node) > 1
        else ["-p", f"{format_publish_address(host)}:{port}:{port}"]
    )
    mounts = [
        f"{folder}:{MODEL_MOUNT}:ro",
        *([f"{template}:{TEMPLATE_MOUNT}:ro"] if template else []),
    ]
    made = []
    for node in range(len(launch.per_node)):
        words = launch.get_command(node)
        parts = [
            "docker run --rm --gpus all --ipc=host",  # ipc: ranks share memory
            shlex.join(network),
            *("-v " + shlex.quote(mount) for mount in mounts),
            f"--entrypoint {shlex.quote(words[0])} {image}",
            *(shlex.join(line) for line in group_by_flag(words[1:])),
        ]
        made.append(" \\\n  ".join(parts))
    return "\n\n".join(made) + "\n"


def format_publish_address(host: str) -> str:
    """An address as docker's -p takes it: no name, and IPv6 in brackets."""
    if host == "localhost":
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def group_by_flag(words: list[str]) -> list[list[str]]:
    """Words in groups, a flag with its value each."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--") and groups[-1]:
            groups.append([])
        groups[-1].append(word)
    return groups


def render_kubernetes(launch: Launch, name: str, port: int, template: str = "") -> str:
    """A Service and a Deployment, or for several nodes a StatefulSet whose pods are the nodes, as YAML documents.

    Comments on top say what must be there before; `template` is the machine's file for TEMPLATE.
    """
    from ruamel.yaml import YAML

    label = make_label(name)
    several = len(launch.per_node) > 1
    yaml, text = YAML(), StringIO()
    yaml.default_flow_style, yaml.width = False, 110
    documents = [make_service(label, port)]
    if several:
        documents += [make_headless_service(label), make_stateful_set(launch, label, port)]
    else:
        documents += [make_deployment(launch, label, port)]
    yaml.dump_all(documents, text)
    claim = f"# The claim {name_volume_claim(label)} must exist, and hold the files of the model's folder at its top.\n"
    version = (
        "# Several nodes need Kubernetes 1.28 or later: pods know their index since.\n"
        if several
        else ""
    )
    key = TEMPLATE_MOUNT.rpartition("/")[2]
    create = f"kubectl create configmap {name_template_config_map(label)} --from-file={key}={shlex.quote(template)}"
    chat = f"# The chat template must exist too: {create}\n" if template else ""
    return claim + chat + version + text.getvalue()


def make_label(name: str) -> str:
    """A name that Kubernetes takes: lower case, digits and hyphens, a letter first, at most 50 characters."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"model-{plain}")[:50].strip("-")


def name_volume_claim(label: str) -> str:
    """The volume with the weights."""
    return f"{label}-weights"


def name_template_config_map(label: str) -> str:
    """The config map with the chat template."""
    return f"{label}-templates"


def get_image(launch: Launch) -> str:
    """The image of an engine; UsageError for one that has none."""
    if launch.engine not in IMAGES:
        raise UsageError(
            "--docker, --kubernetes: expected --engine vllm or sglang, found transformers; name one of them"
        )
    return IMAGES[launch.engine]


def make_metadata(name: str, label: str) -> dict[str, Any]:
    return {"name": name, "labels": {"app": label}}


def make_service(label: str, port: int) -> dict[str, Any]:
    """Where clients go; of several pods only the first is ever ready."""
    ports = [{"name": "http", "port": port, "targetPort": port}]
    spec = {"selector": {"app": label}, "ports": ports}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": make_metadata(label, label),
        "spec": spec,
    }


def make_headless_service(label: str) -> dict[str, Any]:
    """Names for the pods of a StatefulSet, before they are ready: they need each other to become it."""
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app": label}}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": make_metadata(f"{label}-nodes", label),
        "spec": spec,
    }


def make_deployment(launch: Launch, label: str, port: int) -> dict[str, Any]:
    """One pod with all cards of a node; replaced, not rolled: no node has cards for two."""
    spec = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": {"app": label}},
        "template": {
            "metadata": {"labels": {"app": label}},
            "spec": make_pod(label, make_container(launch, launch.get_command(), port)),
        },
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": make_metadata(label, label),
        "spec": spec,
    }


def make_stateful_set(launch: Launch, label: str, port: int) -> dict[str, Any]:
    """A pod per node; its index is the node's rank, the first pod's name the address where they meet."""
    first = f"{label}-0.{label}-nodes"
    count = len(launch.per_node)
    words = [word.replace(MASTER, first) for word in launch.get_command(0)]
    words[words.index("--node-rank") + 1] = POD_RANK
    command = shlex.join(words).replace(shlex.quote(POD_RANK), '"$POD_INDEX"')
    if launch.engine == "vllm":
        command += ' $(if [ "$POD_INDEX" != 0 ]; then echo --headless; fi)'
    made = make_container(launch, ["/bin/sh", "-c", f"exec {command}"], port)
    index = {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}
    made["env"] = [{"name": "POD_INDEX", "valueFrom": index}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        del made[probe]  # only the first pod has an API
    asked = {"exec": {"command": ["/bin/sh", "-c", make_readiness_script(port)]}}
    made["readinessProbe"] = asked | {"periodSeconds": 10, "timeoutSeconds": 10}
    spec = {
        "replicas": count,
        "serviceName": f"{label}-nodes",
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": {"app": label}},
        "template": {"metadata": {"labels": {"app": label}}, "spec": make_pod(label, made)},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": make_metadata(label, label),
        "spec": spec,
    }


def make_readiness_script(port: int) -> str:
    """A probe that every pod but the first fails, so that the Service sends requests to the first alone."""
    address = f"http://127.0.0.1:{port}/health"
    return f'[ "$POD_INDEX" = 0 ] && python3 -c "import urllib.request; urllib.request.urlopen(\'{address}\', timeout=5)"'


def make_container(launch: Launch, words: list[str], port: int) -> dict[str, Any]:
    """The engine. Loading hundreds of gigabytes takes long: startup may take an hour."""
    cards = launch.placement.gpus // launch.placement.nodes if launch.placement else 1
    templates = {
        "name": "templates",
        "mountPath": TEMPLATE_MOUNT.rpartition("/")[0],
        "readOnly": True,
    }
    return {
        "name": "engine",
        "image": get_image(launch),
        "command": words,
        "ports": [{"name": "http", "containerPort": port}],
        "resources": {"limits": {"nvidia.com/gpu": cards}},
        "startupProbe": {
            "httpGet": make_health_check(port),
            "periodSeconds": 10,
            "failureThreshold": 360,
        },
        "readinessProbe": {
            "httpGet": make_health_check(port),
            "periodSeconds": 10,
            "timeoutSeconds": 10,
        },
        "livenessProbe": {
            "httpGet": make_health_check(port),
            "periodSeconds": 30,
            "failureThreshold": 5,
            "timeoutSeconds": 10,
        },
        "volumeMounts": [
            {"name": "weights", "mountPath": MODEL_MOUNT, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},  # ranks share memory
            *([templates] if TEMPLATE_MOUNT in launch.get_command() else []),
        ],
    }


def make_health_check(port: int) -> dict[str, Any]:
    """Where a probe asks; a dict for each, for YAML makes an anchor of one that stands twice."""
    return {"path": "/health", "port": port}


def make_pod(label: str, made: dict[str, Any]) -> dict[str, Any]:
    """What surrounds the engine."""
    mounted = {mount["name"] for mount in made["volumeMounts"]}
    templates = {"name": "templates", "configMap": {"name": name_template_config_map(label)}}
    return {
        "enableServiceLinks": False,  # of a Service called vllm it makes VLLM_PORT, which vLLM takes for its own
        "containers": [made],
        "terminationGracePeriodSeconds": 120,
        "volumes": [
            {
                "name": "weights",
                "persistentVolumeClaim": {"claimName": name_volume_claim(label), "readOnly": True},
            },
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
            *([templates] if "templates" in mounted else []),
        ],
    }
