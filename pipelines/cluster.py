"""The Ray cluster of a run: an existing one, or one started on this machine."""

import contextlib
import dataclasses
import datetime
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any

from pipelines.console import say
from pipelines.dataset import PipelineConfig
from pipelines.pipeline import compose
from tasks import nodes, signals
from tasks.stage import Resources
from unclip.background import usable_cpus, within
from unclip.errors import ConfigError, StoppedError
from unclip.messages import reason_of

WORKER_ENVIRONMENT = {
    # No telemetry.
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "disabled",
    # Hide Ray's own messages, which do not help the user.
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_maximum_startup_concurrency": "8",  # also the threshold of its warning about many workers
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    # Keep freed memory for the next training step: returning it to the system and faulting it in again costs a tenth of
    # a step on CPUs.
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
"""Environment variables of Ray workers."""

KEEP_WORKERS = "RAY_idle_worker_killing_time_threshold_ms", "20000"
"""Variable of Ray's processes. A worker beyond the number of CPUs would end after an idle second; downloads use some now and
then, to wait for servers, and each costs more than a second of CPU time to start."""
PATIENCE_SECONDS = 10.0
"""Time for an existing cluster to answer; Ray itself waits for a quarter of an hour."""
_FOREIGN_VARIABLES = (
    "RAY_RUNTIME_ENV_HOOK",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_OVERRIDE_RESOURCES",
    "RAY_GCS_SERVER_PORT",
    "RAY_REDIS_ADDRESS",
    "RAY_CLIENT_MODE",
    "RAY_USE_TLS",
)
"""Variables by which the environment of other clusters would change the cluster of a run."""
_SHORT_FOLDER = "/tmp/ray"
_SOCKET_MARGIN = 16  # for names of sockets that are longer, in other versions of Ray
_REMEDY = "Lower resources.cpus_per_worker, gpus_per_worker or gib_per_worker, or join another cluster."
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4  # type of the first frame of every HTTP/2 server; gRPC is HTTP/2


def check_cluster(config: PipelineConfig) -> None:
    """Check that the existing cluster of a run answers, if it has one; takes seconds.

    Raises:
        ConfigError: it does not.
    """
    setting, address = _existing(config)
    if address is None:
        return
    try:
        within(PATIENCE_SECONDS, lambda: _probe(address))
    except Exception as error:
        raise ConfigError(
            f"{setting}: no Ray cluster answers at {address}: {reason_of(error)}. Start the cluster first, or "
            f"{'unset' if setting == 'RAY_ADDRESS' else 'leave out'} {setting} to use this machine."
        ) from None


def start_ray(configs: Sequence[PipelineConfig]) -> bool:
    """Start or join a cluster for one run, or for several side by side, whose first names its address.

    Returns:
        False if this process was in a cluster already, which others may use.

    Raises:
        ConfigError: it does not start or answer.
    """
    import ray

    if ray.is_initialized():
        return False
    setting, address = _existing(configs[0])
    with signals.kept_handlers():
        if address:
            _join(setting, address)
        else:
            _start_here(max(_own_cpus(config) for config in configs))
    return True


def _own_cpus(config: PipelineConfig) -> int:
    """CPUs of a cluster that a run starts for itself."""
    needed = max(each.cpus_per_worker * each.num_workers for each in worker_resources(config).values())
    return config.cluster.num_cpus or max(usable_cpus(), needed)


def wait_for_resources(config: PipelineConfig, stages: Collection[str]) -> dict[str, float]:
    """Wait until the cluster, which was joined, offers what a run needs; return the cluster's resources.

    Args:
        stages: names of the stages that it will run.

    Raises:
        ConfigError: it lacks what the workers of a stage need.
    """
    if _existing(config)[1]:
        return _wait_for_nodes(config, stages)
    missing = _missing(config, stages)
    if missing:
        raise ConfigError(f"resources: {missing[0][1]}. {_REMEDY}")
    return _total(config)


def connect() -> dict[str, float]:
    """Join the cluster at RAY_ADDRESS, or start one on this machine; return its resources. For work without settings of a run.

    Raises:
        ConfigError: it does not start or answer.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        _join("RAY_ADDRESS", address)
    else:
        _start_here(usable_cpus())
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return total


def _options() -> dict[str, Any]:
    """Options of `ray.init`: workers' output stays in Ray's logs; their errors come back as the stage's message."""
    import logging

    return {"logging_level": logging.ERROR, "log_to_driver": False}


def _join(setting: str, address: str) -> None:
    """Join an existing cluster.

    Raises:
        ConfigError: it does not answer.
    """
    import ray

    _pin_uv(os.environ.get("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0").lower() in ("1", "true"))
    try:
        ray.init(address=address, runtime_env={"env_vars": WORKER_ENVIRONMENT}, **_options())
    except Exception as error:
        raise ConfigError(
            f"{setting}: the Ray cluster at {address} cannot be joined: {reason_of(error)}. It needs this version of Ray "
            f"and Python on its nodes, and its token in RAY_AUTH_TOKEN if it has one."
        ) from None


def _start_here(num_cpus: int) -> None:
    """Start a private cluster: it ends with this process, joins no existing cluster and survives a change of network.

    Its workers inherit this process's environment; a runtime_env would cost one second per worker.

    Raises:
        ConfigError: it does not start.
    """
    import ray

    _use_loopback()
    _pin_uv(False)
    for name in _FOREIGN_VARIABLES:
        os.environ.pop(name, None)
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        # Ray would leave a token in the home folder, for all to read.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    # Ray retries a task that runs out of memory without limit by default.
    os.environ.setdefault("RAY_task_oom_retries", "5")
    os.environ.setdefault(*KEEP_WORKERS)
    options = _options() | {
        "num_cpus": num_cpus,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        **_folders(),
    }
    try:
        ray.init(address="local", **options)
    except Exception as error:
        raise ConfigError(
            f"cluster: Ray does not start on this machine: {reason_of(error)}. Its logs are in session_latest/logs of "
            f"{options.get('_temp_dir') or _default_folder()}; RAY_TMPDIR names another folder."
        ) from None


def _existing(config: PipelineConfig) -> tuple[str, str | None]:
    """Setting that names an existing cluster, and its address; None for a cluster of this run's own."""
    setting = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    return setting, None if address == "local" else address or None


def _probe(address: str) -> None:
    """Check that a gRPC server answers at an address, as those of Ray's clusters are, and a control store its first call.

    Raises:
        Exception: none does, or the address has another form.
    """
    import ray
    from ray._private import services

    if "://" in address:
        host_and_port = address.partition("://")[2].partition("/")[0]
    else:
        host_and_port = services.canonicalize_bootstrap_address(address) or ""  # finds the cluster of `auto`
    host, _, port = host_and_port.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError("expected an address such as 10.0.0.1:6379")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE_SECONDS / 2) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
            connection.sendall(_HTTP2)
            frame = connection.recv(9, socket.MSG_WAITALL)
            if len(frame) < 9 or frame[3] != _SETTINGS:
                raise ValueError("the server there is not one of Ray")
    if "://" not in address:
        # A control store that hangs may accept connections; Ray would try again for minutes.
        with contextlib.suppress(ray.exceptions.AuthenticationError):  # an answer; whoever joins it says what to do
            ray._raylet.GcsClient(address=host_and_port)  # type: ignore[attr-defined]


def _pin_uv(forwards: bool) -> None:
    """Let Ray upload the working folder and start workers by `uv run`, if this process was started so, or keep it from that."""
    from ray._private import ray_constants

    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = str(int(forwards))  # for Ray's processes
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = forwards  # for this process, which has imported Ray already


def _default_folder() -> str:
    from ray._common import utils

    return str(utils.get_default_ray_temp_dir())  # type: ignore[no-untyped-call]


def _folders() -> dict[str, Any]:
    """Options for Ray's folders: its own default, or /tmp if the paths of its sockets there would be too long.

    Schedulers set long temporary folders. Objects that do not fit into memory still go there.
    """
    folder = _default_folder()
    socket_name = f"/session_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}/sockets/plasma_store"
    longest = (103 if sys.platform == "darwin" else 107) - _SOCKET_MARGIN
    if len(os.fsencode(folder + socket_name)) <= longest:
        return {}
    return {"_temp_dir": _SHORT_FOLDER, "object_spilling_directory": folder}


def _use_loopback() -> None:
    """Make the cluster that this process starts listen on the loopback address only.

    Its processes listen on all interfaces otherwise: Ray replaces 127.0.0.1 by the machine's own address, unless clusters of
    several machines are disabled, as they are by default on macOS.
    """
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for Ray's processes
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this process, which has imported Ray already
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    for library in ("GLOO", "NCCL") if loopback else ():
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", min(loopback))


@dataclasses.dataclass(frozen=True)
class _Need:
    """Resources and labels that one node must offer."""

    of: str
    """Process that needs them, for messages."""
    amounts: dict[str, float]
    labels: dict[str, str] = dataclasses.field(default_factory=dict)

    def lacking(self, offers: Sequence[nodes.Node]) -> str | None:
        """Explain why no node offers it; None if one does."""
        for label, value in self.labels.items():
            if not any(node.labels.get(label) == value for node in offers):
                return f"{self.of} needs a node with the label {label}={value}, but the cluster has none"
        for name, amount in self.amounts.items():
            total = sum(node.amounts.get(name, 0) for node in offers)
            if total < amount:
                unit, shown = (1 << 30, "GiB of memory") if name == "memory" else (1, name)
                has = f"{total / unit:.3g}"
                return f"{self.of} needs {amount / unit:g} {shown}, but the cluster has {has} in total"
        if any(node.offers(self.amounts, self.labels) for node in offers):
            return None
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in self.amounts.items())
        return f"{self.of} needs {wanted} on one node, but no node of the cluster has that"


def _missing(config: PipelineConfig, stages: Collection[str]) -> list[tuple[_Need, str]]:
    """Needs of stages that no node of the cluster offers, with explanations."""
    workers = worker_resources(config).items()
    needs = [_Need(f"one worker of {name}", each.per_worker()) for name, each in workers if name in stages]
    offers = nodes.alive()
    if "download" in stages:
        needs.append(_Need("download", {"CPU": 1}, nodes.egress_labels(offers)))
    return [(need, why) for need in needs if (why := need.lacking(offers))]


def _wait_for_nodes(config: PipelineConfig, stages: Collection[str]) -> dict[str, float]:
    """Wait until nodes of an existing cluster offer what this run needs; return the resources of the cluster.

    Raises:
        ConfigError: after `cluster.wait_seconds` they do not.
        StoppedError: asked to stop.
    """
    limit, started, has_asked = config.cluster.wait_seconds, time.monotonic(), False
    with contextlib.ExitStack() as stack:
        is_stopping = stack.enter_context(signals.stop_on_signal())
        while missing := _missing(config, stages):
            if is_stopping():
                raise StoppedError("stopped as asked, while waiting for nodes. Run the same command again.")
            if time.monotonic() - started >= limit:
                raise ConfigError(
                    f"resources: {missing[0][1]}, after {limit:g} s. {_REMEDY} If nodes need longer to start, raise "
                    f"cluster.wait_seconds."
                )
            if not has_asked:
                has_asked = True
                others = f", and {len(missing) - 1} others lack resources" if len(missing) > 1 else ""
                why = f"{missing[0][1]}{others}"
                say(f"waiting up to {limit:g} s (cluster.wait_seconds) for nodes to join: {why}")
                stack.callback(_ask_for, [])  # tasks will ask for themselves
                _ask_for([need for need, _ in missing])
            time.sleep(1)
    return _total(config)


_asked: dict[int, list[_Need]] = {}
"""Needs for which runs wait, by thread: a request to Ray replaces those of others."""
_asking = threading.Lock()


def _ask_for(needs: list[_Need]) -> None:
    """Ask autoscaling for nodes with what this thread's run needs, and what others of this process wait for."""
    from ray.autoscaler.sdk import request_resources

    with _asking:
        _asked.pop(threading.get_ident(), None)
        if needs:
            _asked[threading.get_ident()] = needs
        wanted = [need for each in _asked.values() for need in each]
        request_resources(
            bundles=[need.amounts for need in wanted], bundle_label_selectors=[need.labels for need in wanted]
        )


def _total(config: PipelineConfig) -> dict[str, float]:
    """Resources of the cluster; says so if it has GPUs that the run will not use."""
    import ray

    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = worker_resources(config).values()
    if total.get("GPU", 0) and not any(each.gpus_per_worker for each in workers):
        say(f"the cluster has {total['GPU']:g} GPUs, but resources.gpus_per_worker is 0: models run on CPUs")
    return total


def worker_resources(config: PipelineConfig) -> dict[str, Resources]:
    """Worker resources by stage, for the stages that have workers."""
    return {name: config.resources.of(name) for name, node in compose(config).items() if node.stage.has_workers}
