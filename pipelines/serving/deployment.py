"""The engine on Ray Serve, and the app on a port.

The replicas of the engine are Ray actors, which the app calls by a handle. The app itself runs in the process of the command: it
binds the one socket that others may reach. Ray Serve's own HTTP proxies are switched off.
"""

import asyncio
import contextlib
import importlib
import ipaddress
import logging
import signal
import socket
from collections.abc import AsyncIterator, Collection, Iterator
from types import FrameType
from typing import Any

import h11
import ray
import uvicorn
from ray import serve
from ray.exceptions import RayError, RayTaskError
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipelines.serving.app import Api
from pipelines.serving.engine import Engine
from pipelines.serving.jobs import Job, Loaded, Progress, Sampled
from pipelines.serving.requests import RequestError
from unclip.background import usable_cpus
from unclip.errors import UnclipError

APP = "unclip"
"""Name of the application in Ray Serve."""
GRACE_SECONDS = 30
"""Time that running requests get when the server stops."""
MAX_CONNECTIONS = 1000
HEADER_SECONDS = 30
"""Time until the headers of a request are there."""
READ_SECONDS = 60
"""Time that a client may leave a part of an answer unread; then its connection ends, where the system can do so (Linux)."""


class Replica:
    """One engine in an actor."""

    def __init__(self, max_images: int, wait_seconds: float, num_threads: int | None) -> None:
        import torch

        _listen_on_loopback()
        if num_threads is not None:
            torch.set_num_threads(num_threads)  # Ray leaves one to an actor that reserves no CPUs
        self._engine = Engine(max_images, wait_seconds, "cpu" if num_threads is not None else "cuda")

    async def sample(self, job: Job) -> AsyncIterator[Progress | Sampled | UnclipError]:
        """Events of a job; its error is the last one, since Ray Serve logs what is raised, which may name the caption."""
        try:
            async with contextlib.aclosing(self._engine.sample(job)) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
        except UnclipError as error:
            yield error

    async def load(self, stack: str) -> Loaded:
        return await self._engine.load(stack)

    async def keep(self, stacks: Collection[str]) -> None:
        await self._engine.keep(stacks)


def _listen_on_loopback() -> None:
    """Make the gRPC server of this replica, which listens on all interfaces otherwise, listen as the node does."""
    replica: Any = importlib.import_module("ray.serve._private.replica")
    address, add_port = _node_address(), replica.add_port_to_grpc_server
    if ipaddress.ip_address(address).is_loopback:
        replica.add_port_to_grpc_server = lambda server, _: add_port(server, f"{address}:0")


def _node_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


class Replicas:
    """Replicas of the engine on Ray Serve; a `jobs.Sampler`."""

    def __init__(self, num_replicas: int, gpus: float, max_images: int, wait_seconds: float, max_requests: int) -> None:
        """Start the replicas and wait for them."""
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        num_threads = None if gpus else max(1, usable_cpus() // num_replicas)
        deployment = serve.deployment(
            Replica,
            name="sampler",
            num_replicas=num_replicas,
            ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
            max_ongoing_requests=2 * max_requests,  # the app has refused what is too much
            graceful_shutdown_timeout_s=1,  # the app has waited for running requests
        )
        application = deployment.bind(max_images, wait_seconds, num_threads)  # type: ignore[attr-defined]
        self._is_shared = not ipaddress.ip_address(_node_address()).is_loopback
        self._handle = serve.run(application, name=APP, route_prefix=None)

    async def sample(self, job: Job) -> AsyncIterator[Progress | Sampled]:
        events: Any = self._handle.options(method_name="sample", stream=True).remote(job)
        try:
            async for event in events:
                if isinstance(event, UnclipError):
                    raise event
                yield event
        except RayTaskError as error:
            raise error.cause from None
        except RayError:
            raise RequestError(503, "the process that sampled this has ended. Try again.", retry_after=10) from None
        finally:
            events.cancel()

    async def load(self, stack: str) -> Loaded:
        """Load a stack in all replicas."""
        try:
            results: list[Loaded] = await self._handle.broadcast("load", stack).results_async()
        except RayTaskError as error:
            raise error.cause from None
        return results[0]

    async def keep(self, stacks: Collection[str]) -> None:
        await self._handle.broadcast("keep", list(stacks)).results_async()

    def close(self) -> None:
        if self._is_shared:
            serve.delete(APP)
        ray.shutdown()  # ends a private cluster, with everything in it


class _Connection(H11Protocol):
    """Connection that ends if the headers of a request do not arrive in time; uvicorn waits for ever.

    h11 takes 64 KiB of them, other parsers of uvicorn any number.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_headers()

    def _limit_headers(self) -> None:
        is_waiting = self.conn.their_state is h11.IDLE
        if is_waiting and self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        elif not is_waiting and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Server that ends with a normal return on SIGINT and SIGTERM, once running requests have ended."""

    def __init__(self, app: ASGIApp, api: Api) -> None:
        options: dict[str, Any] = {"access_log": False, "log_level": "warning", "server_header": False}
        options |= {"http": _Connection, "ws": "none"}
        super().__init__(
            uvicorn.Config(
                app,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=GRACE_SECONDS,
                timeout_keep_alive=30,
                **options,
            )
        )
        self._api = api

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._api.is_stopping = True
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """Reserve a port; the server accepts connections later.

    Raises:
        OSError: it is taken, or the host is no address of this machine.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, READ_SECONDS * 1000)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
