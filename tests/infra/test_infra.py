"""Deployment files agree with the rest of the repository and with the threat model."""

import importlib.util
import ipaddress
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml

from tasks.nodes import EGRESS
from tasks.stage import Resources
from tasks.untrusted.fetch import Fetcher

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
IGNORED = {INFRA / line.strip("/") for line in (INFRA / ".gitignore").read_text().split()}
FILES = sorted(path for path in INFRA.rglob("*") if path.is_file() and not IGNORED & set(path.parents))
YAML_FILES = [path for path in FILES if path.suffix in (".yaml", ".yml")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK, DEV_LOCK = (
    dict(line.split("==") for line in (ROOT / name).read_text().split())
    for name in ("requirements.lock", "requirements-dev.lock")
)
IMAGE = f"unclip:{PROJECT['version']}"
RAY_ROLES = {"head", "data", "gpu"}


def load(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def relative(path: Path) -> str:
    return str(path.relative_to(INFRA))


COMPOSE = load(INFRA / "compose.yaml")[0]
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
LAUNCHER = load(INFRA / "ray-cluster.yaml")[0]
KUSTOMIZATION = load(KUBERNETES / "kustomization.yaml")[0]
MANIFESTS: list[tuple[str, dict[str, Any]]] = [
    (path.name, document)
    for path in sorted(KUBERNETES.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for document in load(path)
]


def manifest(kind: str, name: str | None = None) -> dict[str, Any]:
    found = [m for _, m in MANIFESTS if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    assert len(found) == 1, f"{kind} {name or ''}: {len(found)} found"
    return found[0]


def ray_job_specs() -> dict[str, dict[str, Any]]:
    return {"RayJob": manifest("RayJob")["spec"], "RayCronJob": manifest("RayCronJob")["spec"]["jobTemplate"]}


def pod_templates(node: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every pod template below `node`: each mapping with a spec that has containers."""
    if isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield where, node
        for key, value in node.items():
            yield from pod_templates(value, f"{where}/{key}")
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from pod_templates(value, f"{where}/{position}")


PODS = [pod for name, m in MANIFESTS for pod in pod_templates(m, f"{name}:{m['metadata']['name']}")]


def container_lines() -> list[list[str]]:
    """Return the instructions of the Containerfile as words, with continuation lines joined."""
    text = re.sub(r"\\\n", " ", (INFRA / "Containerfile").read_text())
    return [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]


# ---- every file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML_FILES, ids=relative)
def test_yaml_parses(path: Path) -> None:
    assert load(path), "no document"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_names_no_package_index_and_no_local_path(path: Path) -> None:
    text = path.read_text()
    options = r"index[-_]url|extra[-_]index|default[-_]index|find[-_]links|--index|UV_INDEX|PIP_[A-Z]+|pip config"
    assert not re.search(options, text), "an option that names a package index"
    assert "py" + "pi" not in text.lower()
    hosts = {urlsplit(url).hostname for url in re.findall(r"https?://[^\s'\"`),]+", text)}
    assert hosts <= {"mlflow", "127.0.0.1", "mlflow_host"}, hosts
    assert not re.search(r"(^|[\s:='\"])/(work|root|home)/", text), "a local path"


def test_holds_no_python() -> None:
    assert [relative(path) for path in FILES if path.suffix in (".py", ".pyi", ".ipynb")] == []


def test_readme_names_every_file() -> None:
    text = (INFRA / "README.md").read_text()
    missing = [relative(path) for path in FILES if path.name != "README.md" and f"`{relative(path)}`" not in text]
    assert missing == []


def test_one_image_everywhere() -> None:
    images = [(name, service["image"]) for name, service in SERVICES.items()]
    images += [(where, c["image"]) for where, pod in PODS for c in pod["spec"]["containers"]]
    assert len(images) >= 12
    assert [(where, image) for where, image in images if image != IMAGE] == []
    [renamed] = KUSTOMIZATION["images"]
    assert f"{renamed['name']}:{renamed['newTag']}" == IMAGE
    for path in (INFRA / "README.md", INFRA / "Containerfile"):
        assert set(re.findall(r"-t (\S+)", path.read_text())) == {IMAGE}


# ---- the image --------------------------------------------------------------------------------------------


def test_containerfile_copies_paths_that_exist() -> None:
    sources = [word.rstrip("/") for line in container_lines() if line[0] == "COPY" for word in line[1:-1]]
    assert set(sources) == {"pyproject.toml", "LICENSE", "requirements.lock", "unclip", "tasks", "pipelines"}
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignore = (INFRA / "Containerfile.dockerignore").read_text().split("\n")
    assert {line[1:] for line in ignore if line.startswith("!")} == set(sources)


def test_containerfile_installs_the_lock_and_nothing_newer() -> None:
    installs = [" ".join(line) for line in container_lines() if line[0] == "RUN" and "install" in line]
    lock, project = (line for line in installs if "uv pip install --system" in line)
    assert lock.endswith("-r requirements.lock")
    assert "--no-deps" in project and "--no-build-isolation" in project and project.endswith(" .")
    assert "setuptools" in LOCK
    [version] = [line[1] for line in container_lines() if line[:1] == ["ARG"] and "UV_VERSION" in line[1]]
    pinned = version.split("=")[1]
    assert any(f"uv=={pinned}" in command for command in LAUNCHER["setup_commands"])


def required(requirements: list[str]) -> set[str]:
    """Return the package names of requirements in pyproject.toml, spelled as in lock files."""
    return {re.split(r"[\[<>=~!]", line)[0].lower().replace("_", "-") for line in requirements}


def test_image_has_the_run_time_packages_and_no_test_packages() -> None:
    extras = required(PROJECT["optional-dependencies"]["interop"] + PROJECT["optional-dependencies"]["dev"])
    assert required(PROJECT["dependencies"]) <= LOCK.keys()
    assert extras - {"unclip"} <= DEV_LOCK.keys()
    # MLflow's server needs these three itself
    assert (extras & LOCK.keys()) == {"flask", "flask-cors", "pyyaml"}
    for package in ("pytest", "moto", "mypy", "ruff", "coverage", "diffusers", "transformers"):
        assert package not in LOCK and package in DEV_LOCK


def test_both_locks_name_the_same_versions() -> None:
    assert LOCK.items() <= DEV_LOCK.items()


def test_containerfile_python_is_one_the_project_supports() -> None:
    [image] = [line[1] for line in container_lines() if line[0] == "ARG" and line[1].startswith("PYTHON_IMAGE=")]
    match = re.fullmatch(r"PYTHON_IMAGE=python:(3\.\d+)-slim", image)
    assert match and match[1] in ("3.11", "3.12")
    assert PROJECT["requires-python"] == ">=3.11,<3.13"


def test_containerfile_runs_as_an_unprivileged_user() -> None:
    users = [line[1] for line in container_lines() if line[0] == "USER"]
    assert users == ["1000:1000"]
    assert [line[0] for line in container_lines()][-2:] == ["USER", "CMD"], "something runs after USER"


def test_telemetry_is_off() -> None:
    wanted = {
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "WANDB_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "HF_HUB_OFFLINE": "1",
    }
    [image] = [line[1:] for line in container_lines() if line[0] == "ENV"]
    machines = " ".join(LAUNCHER["setup_commands"]).split()
    for words in (image, machines):
        assert wanted.items() <= dict(word.split("=", 1) for word in words if "=" in word).items()


# ---- Ray requires a token ---------------------------------------------------------------------------------


def ray_services() -> dict[str, dict[str, Any]]:
    return {name: service for name, service in SERVICES.items() if service["command"][:2] == ["ray", "start"]}


def test_compose_ray_requires_the_token_from_a_file() -> None:
    assert set(ray_services()) == {"ray-head", "ray-worker"}
    token = re.fullmatch(r"\$\{UNCLIP_RAY_TOKEN:-\./(.+)\}", COMPOSE["secrets"]["ray_token"]["file"])
    assert token and IGNORED & set((INFRA / token[1]).parents), "the token would be committed"
    for service in ray_services().values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert service["secrets"] == ["ray_token"]
        assert "RAY_AUTH_TOKEN" not in service["environment"], "a token does not belong in a file of the repository"


def test_launcher_ray_requires_the_token() -> None:
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in LAUNCHER[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert LAUNCHER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in LAUNCHER["setup_commands"]


@pytest.mark.parametrize("kind", ["RayJob", "RayCronJob"])
def test_kuberay_clusters_require_the_token(kind: str) -> None:
    cluster = ray_job_specs()[kind]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 55), "below 2.55 schemas run pickles"


def test_nothing_turns_the_token_off() -> None:
    for path in FILES:
        assert not re.search(r"(RAY_AUTH_MODE\W+|mode:\s*)disabled", path.read_text()), relative(path)


@pytest.mark.parametrize("kind", ["RayJob", "RayCronJob"])
def test_ray_version_is_the_locked_one(kind: str) -> None:
    assert ray_job_specs()[kind]["rayClusterSpec"]["rayVersion"] == LOCK["ray"]


# ---- compose ----------------------------------------------------------------------------------------------


def test_compose_publishes_on_loopback_only() -> None:
    published = [(name, port) for name, service in SERVICES.items() for port in service.get("ports", [])]
    assert [name for name, _ in published] == ["mlflow", "ray-head"]
    for name, port in published:
        host = port.get("host_ip") if isinstance(port, dict) else port.rsplit(":", 2)[0]
        assert host == "127.0.0.1", f"{name} publishes {port}"
    assert not any("network_mode" in service for service in SERVICES.values())


@pytest.mark.parametrize("name", SERVICES)
def test_compose_containers_are_unprivileged(name: str) -> None:
    service = SERVICES[name]
    user, group = service["user"].split(":")
    assert int(user) > 0 and int(group) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pull_policy"] == "never", "an image of that name in a registry is not ours"
    assert not {"privileged", "pid", "ipc", "devices", "userns_mode"} & set(service)
    assert not any("docker.sock" in str(volume) for volume in service.get("volumes", []))


def test_compose_volumes_and_configs_are_declared() -> None:
    for service in SERVICES.values():
        named = {volume.split(":")[0] for volume in service["volumes"] if re.match(r"[a-z]", volume)}
        assert named <= set(COMPOSE["volumes"])
        assert {config["source"] for config in service.get("configs", [])} <= set(COMPOSE["configs"])
        scratch = [volume.split(":")[1] for volume in service["volumes"]] + service.get("tmpfs", [])
        assert "/tmp" in scratch, "the root file system is read-only"


# ---- MLflow -----------------------------------------------------------------------------------------------


def mlflow_servers() -> list[tuple[list[str], dict[str, str]]]:
    [container] = manifest("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    compose = SERVICES["mlflow"]
    return [
        (compose["command"], compose["environment"]),
        (container["command"], {entry["name"]: entry["value"] for entry in container["env"]}),
    ]


@pytest.mark.parametrize("command, environment", mlflow_servers(), ids=["compose", "kubernetes"])
def test_mlflow_is_closed(command: list[str], environment: dict[str, str]) -> None:
    assert command[:2] == ["mlflow", "server"]
    flags = dict(flag.split("=", 1) for flag in command[2:])
    hosts = flags["--allowed-hosts"].split(",")
    assert "mlflow:5000" in hosts
    assert all(re.fullmatch(r"[a-z0-9.-]+:5000", host) for host in hosts), "a pattern could match foreign hosts"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert flags["--backend-store-uri"].startswith("sqlite:////mlflow/")
    assert flags["--artifacts-destination"].startswith("/mlflow/")
    assert "--disable-security-middleware" not in command


def test_mlflow_service_stays_in_the_cluster() -> None:
    assert not [m for _, m in MANIFESTS if m["kind"] == "Ingress"]
    service = manifest("Service", "mlflow")
    assert service["spec"]["type"] == "ClusterIP" and service["spec"]["ports"][0]["port"] == 5000
    labels = manifest("Deployment", "mlflow")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert manifest("ConfigMap", "unclip-environment")["data"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert SERVICES["ray-worker"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


# ---- the Ray cluster launcher -----------------------------------------------------------------------------


def test_launcher_file_fits_ray_s_schema() -> None:
    spec = importlib.util.find_spec("ray")
    assert spec and spec.origin
    schema = json.loads(Path(spec.origin).with_name("autoscaler").joinpath("ray-schema.json").read_text())
    jsonschema.validate(LAUNCHER, schema)
    assert LAUNCHER["provider"]["type"] == "local"
    assert {"head_ip", "worker_ips"} <= set(LAUNCHER["provider"])


def test_launcher_copies_paths_that_exist() -> None:
    sources = [source for source in LAUNCHER["file_mounts"].values() if not source.startswith("~")]
    assert {"pyproject.toml", "LICENSE", "requirements.lock", "unclip", "tasks", "pipelines"} == set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_launcher_dashboard_listens_on_loopback() -> None:
    [head] = [command for command in LAUNCHER["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head.split()


def test_launcher_user_is_not_root() -> None:
    assert LAUNCHER["auth"]["ssh_user"] != "root"


# ---- Kubernetes -------------------------------------------------------------------------------------------


def test_kustomization_lists_exactly_the_files() -> None:
    files = {path.name for path in KUBERNETES.iterdir()} - {"kustomization.yaml"}
    assert sorted(KUSTOMIZATION["resources"]) == sorted(files)
    assert KUSTOMIZATION["namespace"] == manifest("Namespace")["metadata"]["name"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the kustomization")
def test_kustomization_renders_every_object() -> None:
    command = ["kubectl", "kustomize", str(KUBERNETES)]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    objects = [(m["kind"], m["metadata"]["name"]) for m in yaml.safe_load_all(rendered)]
    assert sorted(objects) == sorted((m["kind"], m["metadata"]["name"]) for _, m in MANIFESTS)


@pytest.mark.parametrize("name, document", MANIFESTS, ids=lambda value: value if isinstance(value, str) else "")
def test_manifest_is_a_kubernetes_object(name: str, document: dict[str, Any]) -> None:
    versions = {"RayJob": "ray.io/v1", "RayCronJob": "ray.io/v1", "NetworkPolicy": "networking.k8s.io/v1"}
    versions |= {"Deployment": "apps/v1"}
    assert document["apiVersion"] == versions.get(document["kind"], "v1")
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", document["metadata"]["name"])


def test_object_names_are_unique() -> None:
    names = [(m["kind"], m["metadata"]["name"]) for _, m in MANIFESTS]
    assert len(set(names)) == len(names)


def test_jobs_run_the_command_line() -> None:
    entrypoints = {kind: spec["entrypoint"] for kind, spec in ray_job_specs().items()}
    assert entrypoints == {
        "RayJob": "unclip run text_to_image --config /config/run.toml",
        "RayCronJob": "unclip refresh text_to_image --config /config/run.toml",
    }
    assert set(PROJECT["scripts"]) == {"unclip"}


@pytest.mark.parametrize("kind", ["RayJob", "RayCronJob"])
def test_jobs_clean_up_after_themselves(kind: str) -> None:
    spec = ray_job_specs()[kind]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert isinstance(spec["backoffLimit"], int)
    assert "command" not in spec["submitterPodTemplate"]["spec"]["containers"][0], "KubeRay supplies it"


def test_nightly_runs_do_not_overlap() -> None:
    cron = manifest("RayCronJob")["spec"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", cron["schedule"]), "once a day"
    job = cron["jobTemplate"]
    attempts = job["backoffLimit"] + 1
    assert attempts * job["activeDeadlineSeconds"] + job["ttlSecondsAfterFinished"] < 24 * 3600


@pytest.mark.parametrize("kind", ["RayJob", "RayCronJob"])
def test_cluster_has_a_head_without_work_a_data_group_and_a_gpu_group(kind: str) -> None:
    cluster = ray_job_specs()[kind]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {"data", "gpu"}
    for name, group in groups.items():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["metadata"]["labels"]["unclip/role"] == name
        [container] = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")
    offered = {name: group["labels"]["unclip/egress"] for name, group in groups.items()}
    assert offered == {"data": "public", "gpu": "none"} and cluster["headGroupSpec"]["labels"] == {EGRESS: "none"}
    assert not cluster.get("enableInTreeAutoscaling"), "the autoscaler needs a service account token"


def test_every_role_has_pods() -> None:
    roles = [pod["metadata"]["labels"]["unclip/role"] for _, pod in PODS]
    assert sorted(roles) == sorted(["mlflow"] + 2 * ["submit", "head", "data", "gpu"])


@pytest.mark.parametrize("where, pod", PODS, ids=[where for where, _ in PODS])
def test_pods_are_unprivileged(where: str, pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & set(spec)
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0 and security["runAsGroup"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for volume in spec["volumes"]:
        assert set(volume) - {"name"} <= {"configMap", "emptyDir", "persistentVolumeClaim"}, volume
    for container in spec["containers"] + spec.get("initContainers", []):
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert not own.get("privileged") and own.get("runAsUser", 1000) > 0
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
        names = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= names


def test_data_workers_have_no_credentials() -> None:
    for where, pod in PODS:
        if pod["metadata"]["labels"]["unclip/role"] == "data":
            assert "secret" not in json.dumps(pod).lower(), where


def test_pods_name_objects_that_exist() -> None:
    claims = {m["metadata"]["name"] for _, m in MANIFESTS if m["kind"] == "PersistentVolumeClaim"}
    configs = {m["metadata"]["name"] for _, m in MANIFESTS if m["kind"] == "ConfigMap"}
    for where, pod in PODS:
        for volume in pod["spec"]["volumes"]:
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "mlflow") in claims, where
            assert volume.get("configMap", {}).get("name", "unclip-run") in configs, where
        for container in pod["spec"]["containers"]:
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in configs, where


@pytest.mark.parametrize("kind", ["RayJob", "RayCronJob"])
def test_f115_the_run_file_uses_the_gpus_that_the_pods_reserve(kind: str) -> None:
    run = tomllib.loads(manifest("ConfigMap", "unclip-run")["data"]["run.toml"])
    resources = Resources(**run["resources"])
    [group] = [
        group for group in ray_job_specs()[kind]["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "gpu"
    ]
    [container] = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert resources.num_workers == group["replicas"]
    assert resources.gpus_per_worker == int(limits["nvidia.com/gpu"])
    assert resources.cpus_per_worker <= int(limits["cpu"])
    assert resources.gib_per_worker <= 0.7 * int(limits["memory"].removesuffix("Gi")), "Ray takes 30 % for objects"


def test_namespace_enforces_the_restricted_standard() -> None:
    labels = manifest("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_run_file_parses() -> None:
    run = tomllib.loads(manifest("ConfigMap", "unclip-run")["data"]["run.toml"])
    mounts = {"/data", "/models"}
    paths = [run["storage"], run["ingest"]["urls"], run["clip"]["pretrained"]]
    assert all("/" + path.split("/")[1] in mounts for path in paths)
    for where, pod in PODS:
        if pod["metadata"]["labels"]["unclip/role"] in RAY_ROLES:
            [container] = pod["spec"]["containers"]
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts | {"/config"} <= mounted, where


# ---- the network ------------------------------------------------------------------------------------------

INTERNAL = """
    0.0.0.0 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.1.2.3
    168.63.129.16     169.254.169.254 169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.192 192.0.2.1
    192.88.99.1 192.168.0.1     192.168.255.255 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1
    224.0.0.1 240.0.0.1 255.255.255.255     :: ::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::a00:1
    64:ff9b:1::1 100::1 2001::1 2001:db8::1 2002:a00:1::     3fff::1 fc00::1 fd00:ec2::254 fe80::1 fec0::1
    ff02::1
"""
PUBLIC = """
    1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.254 100.128.0.1 126.255.255.255 128.0.0.1
    168.63.129.15     168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 192.0.1.1
    192.167.255.255 192.169.0.0     198.17.255.255 198.20.0.0 223.255.255.255 2001:4860:4860::8888
    2606:4700:4700::1111 2a00:1450:4001::1
"""


def policies(role: str, direction: str) -> list[dict[str, Any]]:
    """Return the rules of one direction that apply to the pods of a role."""
    found = []
    for _, m in MANIFESTS:
        if m["kind"] != "NetworkPolicy" or direction.capitalize() not in m["spec"]["policyTypes"]:
            continue
        if role in selected(m["spec"]["podSelector"]):
            found += m["spec"].get(direction, [])
    return found


def selected(selector: dict[str, Any]) -> set[str]:
    """Return the roles that a pod selector matches."""
    roles = {"submit", "head", "data", "gpu", "mlflow"}
    for label, value in selector.get("matchLabels", {}).items():
        roles &= {value} if label == "unclip/role" else set()
    for expression in selector.get("matchExpressions", []):
        assert (expression["key"], expression["operator"]) == ("unclip/role", "In")
        roles &= set(expression["values"])
    return roles


def internet_blocks(role: str) -> list[dict[str, Any]]:
    return [peer["ipBlock"] for rule in policies(role, "egress") for peer in rule["to"] if "ipBlock" in peer]


def reaches(role: str, address: str) -> bool:
    ip = ipaddress.ip_address(address)
    for block in internet_blocks(role):
        excepted = any(ip in ipaddress.ip_network(network) for network in block["except"])
        if ip in ipaddress.ip_network(block["cidr"]) and not excepted:
            return True
    return False


def peers(role: str, direction: str) -> set[tuple[str, int | None]]:
    """Return the (role, port) pairs that a role reaches or is reached by; port None stands for all ports."""
    found = set()
    for rule in policies(role, direction):
        ports = [port["port"] for port in rule.get("ports", [])] or [None]
        for peer in rule["to" if direction == "egress" else "from"]:
            if "podSelector" in peer and "namespaceSelector" not in peer:
                found |= {(other, port) for other in selected(peer["podSelector"]) for port in ports}
    return found


def test_network_is_denied_by_default() -> None:
    spec = manifest("NetworkPolicy", "default-deny")["spec"]
    assert spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("address", INTERNAL.split())
def test_data_workers_do_not_reach_internal_addresses(address: str) -> None:
    assert not reaches("data", address)


@pytest.mark.parametrize("address", PUBLIC.split())
def test_data_workers_reach_the_internet(address: str) -> None:
    assert reaches("data", address)


def test_exceptions_cover_all_addresses_that_python_calls_private() -> None:
    """Tests one address of every /12 of IPv4: all addresses that `ipaddress` calls non-global are blocked."""
    reached = [
        str(ip)
        for first in range(256)
        for second in range(0, 256, 16)
        if not (ip := ipaddress.ip_address(f"{first}.{second}.0.9")).is_global and reaches("data", str(ip))
    ]
    assert reached == []


def test_exceptions_lie_within_their_block() -> None:
    """The API server rejects a policy whose exceptions lie outside its block."""
    blocks = internet_blocks("data")
    assert {ipaddress.ip_network(block["cidr"]).version for block in blocks} == {4, 6}
    for block in blocks:
        cidr = ipaddress.ip_network(block["cidr"])
        for network in map(ipaddress.ip_network, block["except"]):
            assert network.subnet_of(cidr) and network != cidr  # type: ignore[arg-type]


def test_only_data_workers_reach_the_internet_and_only_web_ports() -> None:
    for role in ("submit", "head", "gpu", "mlflow"):
        assert internet_blocks(role) == [], role
    [rule] = [r for r in policies("data", "egress") if any("ipBlock" in peer for peer in r["to"])]
    expected = {("TCP", port) for port in Fetcher.allow_ports}
    assert {(port["protocol"], port["port"]) for port in rule["ports"]} == expected


def test_reachability_between_roles() -> None:
    ray = {(role, None) for role in RAY_ROLES}
    expected: dict[str, set[tuple[str, int | None]]] = {
        "submit": {("head", 8265)},
        "head": ray | {("mlflow", 5000)},
        "data": ray | {("mlflow", 5000)},
        "gpu": ray | {("mlflow", 5000)},
        "mlflow": set(),
    }
    assert {role: peers(role, "egress") for role in expected} == expected
    assert peers("mlflow", "ingress") == {(role, 5000) for role in RAY_ROLES}
    assert peers("head", "ingress") == ray | {("submit", 8265)}
    assert peers("submit", "ingress") == set()


def test_other_namespaces_are_only_dns_outwards_and_the_operator_inwards() -> None:
    for role in ("submit", "head", "data", "gpu", "mlflow"):
        outwards = [
            (peer, rule["ports"])
            for rule in policies(role, "egress")
            for peer in rule["to"]
            if "namespaceSelector" in peer
        ]
        assert len(outwards) == (role != "mlflow"), role
        for peer, ports in outwards:
            assert peer["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}
            assert {port["port"] for port in ports} == {53}
        inwards = [
            (peer, rule["ports"])
            for rule in policies(role, "ingress")
            for peer in rule["from"]
            if "namespaceSelector" in peer
        ]
        assert len(inwards) == (role == "head"), role
        for peer, ports in inwards:
            assert peer["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
            assert [port["port"] for port in ports] == [8265]
