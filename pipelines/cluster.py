"""The Ray cluster of a run: joined, or started on this machine."""

import os
from typing import Any

from pipelines.composition import compose
from pipelines.dataset import PipelineConfig
from tasks.stage import Resources
from unclip.errors import ConfigError

WORKER_ENVIRONMENT = {
    # Nothing that this project uses may call home.
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "disabled",
    # Ray's own messages add nothing for people who run a pipeline.
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_maximum_startup_concurrency": "8",  # also what its warning about many workers starts from
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    # What one training step frees, the next one needs: giving it back to the system and faulting it in again would take a
    # tenth of a step on CPUs.
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
"""Ray's workers get these."""


def start_ray(config: PipelineConfig) -> None:
    import logging

    import ray

    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    # What workers print stays in Ray's logs; what they fail with comes back as the stage's message.
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        try:
            ray.init(address=address, runtime_env={"env_vars": WORKER_ENVIRONMENT}, **options)
        except (ConnectionError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"cluster.address: no Ray cluster answers at {address}: {reason}. Start it first."
            ) from None
    else:
        needed = max(wanted.cpus_per_worker * wanted.num_workers for wanted in worker_resources(config).values())
        num_cpus = config.cluster.num_cpus or max(os.cpu_count() or 1, needed)
        # A cluster of this run alone: it dies with this process, joins no other that happens to be there, and survives a
        # change of network. Its workers inherit this process's environment; a runtime_env would cost each a second.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        # What needs more memory than there is would be tried for ever.
        os.environ.setdefault("RAY_task_oom_retries", "5")
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **options)
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for stage, resources in worker_resources(config).items():
        for name, amount in resources.per_worker().items():
            if total.get(name, 0) < amount:
                raise ConfigError(
                    f"resources: a worker of {stage} wants {amount:g} {name}, but the cluster has {total.get(name, 0):g} "
                    f"in all. Lower resources.cpus_per_worker or resources.gpus_per_worker, or join another cluster."
                )


def worker_resources(config: PipelineConfig) -> dict[str, Resources]:
    """Worker resources by stage, for the stages that have workers."""
    return {name: config.resources.of(name) for name, node in compose(config).items() if node.stage.has_workers}
