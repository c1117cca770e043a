"""Process groups of trainings that listen on the loopback address only, on a cluster that is on this machine only.

torch's key-value store has no password. It listens on all interfaces, whatever address its clients use.
"""

import importlib
import ipaddress
import socket
from typing import Any

import ray.train.torch


class TorchConfig(ray.train.torch.TorchConfig):
    """Settings of a process group whose store listens on the address that its clients use, if that is a loopback address."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(ray.train.torch.TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_replace_store)
        super().on_start(worker_group, backend_config)


def _replace_store() -> None:
    """Make the process groups of this process create their store by `_store`."""
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # a function has the same name
    rendezvous.TCPStore = _store


def _store(host_name: str, port: int, is_master: bool, **options: Any) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if is_master and ipaddress.ip_address(host_name).is_loopback:
        options["master_listen_fd"] = socket.create_server((host_name, port)).detach()
    return TCPStore(host_name, port, is_master=is_master, **options)
