"""The Ray cluster of a run: an existing one, or one started on this machine."""

import os
import secrets
import socket
from typing import Any

from pipelines.dataset import PipelineConfig
from pipelines.pipeline import compose
from tasks.stage import Resources
from unclip.errors import ConfigError
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


def start_ray(config: PipelineConfig) -> dict[str, float]:
    """Start or join the cluster; return its resources."""
    import logging

    import ray

    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    # Workers' output stays in Ray's logs; their errors come back as the stage's message.
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        try:
            ray.init(address=address, runtime_env={"env_vars": WORKER_ENVIRONMENT}, **options)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"cluster.address: no Ray cluster answers at {address}: {reason_of(error)}. Start the cluster first."
            ) from None
    else:
        needed = max(each.cpus_per_worker * each.num_workers for each in worker_resources(config).values())
        num_cpus = config.cluster.num_cpus or max(os.cpu_count() or 1, needed)
        # A private cluster: it ends with this process, joins no existing cluster and survives a change of network. Its
        # workers inherit this process's environment; a runtime_env would cost one second per worker.
        _use_loopback()
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            # Ray would leave a token in the home folder, for all to read.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        # Ray retries a task that runs out of memory without limit by default.
        os.environ.setdefault("RAY_task_oom_retries", "5")
        os.environ.setdefault(*KEEP_WORKERS)
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **options)
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for stage, resources in worker_resources(config).items():
        for name, amount in resources.per_worker().items():
            if total.get(name, 0) < amount:
                raise ConfigError(
                    f"resources: one worker of {stage} needs {amount:g} {name}, but the cluster has {total.get(name, 0):g} "
                    f"in total. Lower resources.cpus_per_worker or resources.gpus_per_worker, or join another cluster."
                )
    return total


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


def worker_resources(config: PipelineConfig) -> dict[str, Resources]:
    """Worker resources by stage, for the stages that have workers."""
    return {name: config.resources.of(name) for name, node in compose(config).items() if node.stage.has_workers}
