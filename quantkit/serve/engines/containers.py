"""The command of an engine in a container: a docker command, a Kubernetes manifest. Pure text.

Images are the engines' own, of the versions whose flags were read. Weights are mounted read-only at
/model. In Kubernetes an engine runs without root and without capabilities, and asks clients for the
key of a secret.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

from quantkit.errors import UsageError
from quantkit.serve.engines.launch import MASTER, Launch
from quantkit.version import __version__

IMAGES: Mapping[str, str] = {
    "vllm": "vllm/vllm-openai:v0.32.0",
    "sglang": "lmsysorg/sglang:v0.5.23",
}
MODEL_MOUNT = "/model"
TEMPLATE_MOUNT = "/templates/chat.jinja"
"""The path in a container of a chat template that is not part of the model."""
POD_RANK = "$(POD_INDEX)"
KEY_VARIABLES: Mapping[str, str] = {"vllm": "VLLM_API_KEY", "sglang": "ENGINE_API_KEY"}
"""Engine -> the environment variable of its key. vLLM reads its own; SGLang's is put into the flag
`--api-key` by Kubernetes."""
PULL_IMAGE = f"quantkit:{__version__}"
PULL_MOUNT = "/data"
USER_ID = 1000
HOST_REQUEST_GIB, HOST_MARGIN_GIB = 16, 32
"""Host memory of an engine: requested, and its limit beyond the weights, which page caches and
pinned buffers hold while they are loaded. Assumptions, not measurements."""


def render_docker(launch: Launch, folder: str, host: str, port: int, template: str = "") -> str:
    """Return one `docker run` command per node.

    The launch's path must be /model and its host 0.0.0.0 (inside the container). host: the address
    on which the machine publishes the port. template: the machine's file for TEMPLATE_MOUNT.
    """
    image = get_image(launch)
    network = (
        ["--network", "host"]
        if len(launch.per_node) > 1
        else ["-p", f"{format_publish_address(host)}:{port}:{port}"]
    )
    mounts = [f"{folder}:{MODEL_MOUNT}:ro"]
    mounts += [f"{template}:{TEMPLATE_MOUNT}:ro"] if template else []
    commands = []
    for node in range(len(launch.per_node)):
        command = launch.get_command(node)
        lines = [
            "docker run --rm --gpus all --ipc=host",  # ipc: ranks share memory
            shlex.join(network),
            *("-v " + shlex.quote(mount) for mount in mounts),
            f"--entrypoint {shlex.quote(command[0])} {image}",
            *(shlex.join(group) for group in group_by_flag(command[1:])),
        ]
        commands.append(" \\\n  ".join(lines))
    return "\n\n".join(commands) + "\n"


def format_publish_address(host: str) -> str:
    """Return an address for docker's -p: no host name, IPv6 in brackets."""
    if host == "localhost":
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def group_by_flag(arguments: list[str]) -> list[list[str]]:
    """Group arguments: each flag with its value."""
    groups: list[list[str]] = [[]]
    for word in arguments:
        if word.startswith("--") and groups[-1]:
            groups.append([])
        groups[-1].append(word)
    return groups


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """Values of a manifest next to the launch.

    template: the machine's file for TEMPLATE_MOUNT, "" for none. pull: the address from which an
    init container pulls and verifies the artifact, "" if the volume has the weights.
    """

    name: str
    port: int
    weights_bytes: int
    template: str = ""
    pull: str = ""

    @property
    def label(self) -> str:
        """The name of its objects."""
        return make_label(self.name)


def render_kubernetes(launch: Launch, options: KubernetesOptions) -> str:
    """Return YAML documents: a Service with a Deployment, or with a StatefulSet for several nodes.

    Comments at the top name the prerequisites. UsageError if several nodes would pull at once.
    """
    from ruamel.yaml import YAML

    has_several_nodes = len(launch.per_node) > 1
    if options.pull and has_several_nodes:
        raise UsageError(
            f"--pull: expected a model for one node, found {len(launch.per_node)} nodes, whose "
            "pods would pull into one volume at the same time; pull into the volume beforehand"
        )
    yaml, text = YAML(), StringIO()
    yaml.default_flow_style, yaml.width = False, 110
    documents = [make_service(options.label, options.port)]
    if has_several_nodes:
        headless = make_headless_service(options.label)
        documents += [headless, make_stateful_set(launch, options)]
    else:
        documents += [make_deployment(launch, options)]
    yaml.dump_all(documents, text)
    return "".join(f"# {line}\n" for line in list_prerequisites(launch, options)) + text.getvalue()


def list_prerequisites(launch: Launch, options: KubernetesOptions) -> list[str]:
    """Return what must exist in the cluster, one line each."""
    label = options.label
    claim = f"The claim {name_volume_claim(label)} must exist"
    size = -(-options.weights_bytes // 2**30)
    lines = [
        f"{claim}, writable, with {size} GiB free: an init container pulls the model into it."
        if options.pull
        else f"{claim}, with the files of the model's folder at its top level."
    ]
    if options.pull:
        lines.append(
            f"Make the image {PULL_IMAGE}: FROM python:3.12-slim, RUN pip install "
            f"'quantkit=={__version__}'."
        )
    keys = f"kubectl create secret generic {name_key_secret(label)} --from-literal=api-key=KEY"
    lines.append(f"Create the secret of the engine's API key: {keys}")
    if options.pull:
        lines.append("Other entries of that secret, such as HF_TOKEN, are variables of the pull.")
    if options.template:
        key = TEMPLATE_MOUNT.rpartition("/")[2]
        create = (
            f"kubectl create configmap {name_template_config_map(label)} "
            f"--from-file={key}={shlex.quote(options.template)}"
        )
        lines.append(f"Create the config map of the chat template: {create}")
    if len(launch.per_node) > 1:
        lines.append("Several nodes need Kubernetes 1.28 or later, for the index of a pod.")
    return lines


def name_key_secret(label: str) -> str:
    """Return the name of the secret with the engine's API key."""
    return f"{label}-keys"


def make_label(name: str) -> str:
    """Return a valid Kubernetes name.

    Lower-case letters, digits and hyphens, a letter first, at most 50 characters.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"model-{plain}")[:50].strip("-")


def name_volume_claim(label: str) -> str:
    """Return the name of the volume claim of the weights."""
    return f"{label}-weights"


def name_template_config_map(label: str) -> str:
    """Return the name of the config map of the chat template."""
    return f"{label}-templates"


def get_image(launch: Launch) -> str:
    """Return the image of an engine; UsageError if it has none."""
    if launch.engine not in IMAGES:
        raise UsageError(
            "--docker, --kubernetes: expected --engine vllm or sglang, found transformers; "
            "name one of them"
        )
    return IMAGES[launch.engine]


def make_metadata(name: str, label: str) -> dict[str, Any]:
    """Return the metadata of an object."""
    return {"name": name, "labels": {"app": label}}


def make_service(label: str, port: int) -> dict[str, Any]:
    """Return the Service for clients; of several pods only the first is ever ready."""
    ports = [{"name": "http", "port": port, "targetPort": port}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": make_metadata(label, label),
        "spec": {"selector": {"app": label}, "ports": ports},
    }


def make_headless_service(label: str) -> dict[str, Any]:
    """Return the Service that names the pods of a StatefulSet before they are ready.

    The pods need each other to become ready.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": make_metadata(f"{label}-nodes", label),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"app": label},
        },
    }


def make_deployment(launch: Launch, options: KubernetesOptions) -> dict[str, Any]:
    """Return a Deployment: one pod with all GPUs of a node.

    Its strategy is Recreate: no node has GPUs for a second pod of a rolling update.
    """
    label, container = options.label, make_container(launch, launch.get_command(), options)
    if launch.engine == "sglang":
        container["command"] += ["--api-key", f"$({KEY_VARIABLES['sglang']})"]
    spec = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": {"app": label}},
        "template": {
            "metadata": {"labels": {"app": label}},
            "spec": make_pod(options, container),
        },
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": make_metadata(label, label),
        "spec": spec,
    }


def make_stateful_set(launch: Launch, options: KubernetesOptions) -> dict[str, Any]:
    """Return a StatefulSet: one pod per node.

    A pod's index is its node's rank; the first pod's name is the rendezvous address.
    """
    label, first = options.label, f"{options.label}-0.{options.label}-nodes"
    arguments = [word.replace(MASTER, first) for word in launch.get_command(0)]
    arguments[arguments.index("--node-rank") + 1] = POD_RANK
    command = shlex.join(arguments).replace(shlex.quote(POD_RANK), '"$POD_INDEX"')
    if launch.engine == "vllm":
        command += ' $(if [ "$POD_INDEX" != 0 ]; then echo --headless; fi)'
    else:
        command += f' --api-key "${KEY_VARIABLES["sglang"]}"'
    container = make_container(launch, ["/bin/sh", "-c", f"exec {command}"], options)
    index = {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}
    container["env"] = [{"name": "POD_INDEX", "valueFrom": index}, *container["env"]]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        del container[probe]  # only the first pod has an API
    container["readinessProbe"] = {
        "exec": {"command": ["/bin/sh", "-c", make_readiness_script(options.port)]},
        "periodSeconds": 10,
        "timeoutSeconds": 10,
    }
    spec = {
        "replicas": len(launch.per_node),
        "serviceName": f"{label}-nodes",
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": {"app": label}},
        "template": {"metadata": {"labels": {"app": label}}, "spec": make_pod(options, container)},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": make_metadata(label, label),
        "spec": spec,
    }


def make_readiness_script(port: int) -> str:
    """Return a probe that succeeds only in the first pod, so that only it gets requests."""
    url = f"http://127.0.0.1:{port}/health"
    return (
        '[ "$POD_INDEX" = 0 ] && python3 -c "import urllib.request; '
        f"urllib.request.urlopen('{url}', timeout=5)\""
    )


def make_container(
    launch: Launch, command: list[str], options: KubernetesOptions
) -> dict[str, Any]:
    """Return the container of an engine.

    Its startup may take an hour: loading hundreds of gigabytes takes long.
    """
    port = options.port
    gpus = launch.placement.gpus // launch.placement.nodes if launch.placement else 1
    templates = {
        "name": "templates",
        "mountPath": TEMPLATE_MOUNT.rpartition("/")[0],
        "readOnly": True,
    }
    return {
        "name": "engine",
        "image": get_image(launch),
        "command": command,
        "ports": [{"name": "http", "containerPort": port}],
        "env": make_environment(launch.engine, options.label),
        "securityContext": make_security_context(),
        "resources": make_resources(gpus, options.weights_bytes // len(launch.per_node)),
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
            {"name": "weights", "mountPath": MODEL_MOUNT, "readOnly": True}
            | ({"subPath": options.label} if options.pull else {}),
            {"name": "home", "mountPath": "/home/engine"},
            {"name": "shm", "mountPath": "/dev/shm"},  # ranks share memory
            *([templates] if TEMPLATE_MOUNT in launch.get_command() else []),
        ],
    }


def make_health_check(port: int) -> dict[str, Any]:
    """Return the request of a probe: a new dict each time, since YAML anchors shared ones."""
    return {"path": "/health", "port": port}


def make_environment(engine: str, label: str) -> list[dict[str, Any]]:
    """Return the variables of an engine: its key, and a home folder that its user may write to."""
    key = {"secretKeyRef": {"name": name_key_secret(label), "key": "api-key"}}
    return [
        {"name": KEY_VARIABLES[engine], "valueFrom": key},
        {"name": "HOME", "value": "/home/engine"},
        {"name": "USER", "value": "engine"},  # its number has no entry in the image's passwd
    ]


def make_security_context() -> dict[str, Any]:
    """Return the security context of a container."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def make_resources(gpus: int, weights_bytes: int) -> dict[str, Any]:
    """Return requests and limits of an engine; weights_bytes: of its node."""
    limit = HOST_MARGIN_GIB + -(-weights_bytes // 2**30)
    return {
        "requests": {"cpu": "4", "memory": f"{HOST_REQUEST_GIB}Gi", "nvidia.com/gpu": gpus},
        "limits": {"memory": f"{limit}Gi", "nvidia.com/gpu": gpus},
    }


def make_init_container(options: KubernetesOptions) -> dict[str, Any]:
    """Return the container that pulls the artifact and verifies it before the engine starts.

    An artifact that is there already is verified and not fetched again.
    """
    return {
        "name": "pull",
        "image": PULL_IMAGE,
        "command": ["quantkit", "pull", options.pull, f"{PULL_MOUNT}/{options.label}"],
        "envFrom": [{"secretRef": {"name": name_key_secret(options.label)}}],
        "env": [{"name": "HOME", "value": "/home/engine"}],
        "securityContext": make_security_context(),
        "resources": {
            "requests": {"cpu": "1", "memory": "1Gi"},
            "limits": {"memory": "4Gi"},
        },
        "volumeMounts": [
            {"name": "weights", "mountPath": PULL_MOUNT},
            {"name": "home", "mountPath": "/home/engine"},
        ],
    }


def make_pod(options: KubernetesOptions, container: dict[str, Any]) -> dict[str, Any]:
    """Return the spec of a pod: the containers and their volumes."""
    label = options.label
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    templates = {"name": "templates", "configMap": {"name": name_template_config_map(label)}}
    claim = {"claimName": name_volume_claim(label), "readOnly": not options.pull}
    return {
        # A Service called vllm would set VLLM_PORT, which vLLM takes for its own setting.
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **({"initContainers": [make_init_container(options)]} if options.pull else {}),
        "containers": [container],
        "terminationGracePeriodSeconds": 120,
        "volumes": [
            {"name": "weights", "persistentVolumeClaim": claim},
            {"name": "home", "emptyDir": {"sizeLimit": "20Gi"}},  # caches of compiled kernels
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
            *([templates] if "templates" in mounted else []),
        ],
    }
