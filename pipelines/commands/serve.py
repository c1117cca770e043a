"""Command that serves published stacks over HTTP."""

import errno
import socket
from pathlib import Path

import click

from pipelines.options import STORAGE
from tasks.store import DEFAULT_ROOT
from unclip.errors import InputError

MIN_TOKEN = 16


@click.command()
@click.option(
    "--model",
    "models",
    metavar="NAME",
    multiple=True,
    help="Registered model, as NAME, NAME@ALIAS or NAME/VERSION, or a folder; repeatable, the first is the default.  "
    "[default: champions and challengers]",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than loopback need a token."
)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to serve on.")
@click.option("--token-file", metavar="FILE", help="File with the token that requests must send.")
@click.option("--num-replicas", type=click.IntRange(1), default=1, show_default=True, help="Processes that sample.")
@click.option(
    "--gpus", type=click.FloatRange(0), help="GPUs of each replica.  [default: 1 if there are enough, else 0]"
)
@click.option("--max-batch", type=click.IntRange(1), default=16, show_default=True, help="Images sampled together.")
@click.option(
    "--pad-batches",
    is_flag=True,
    help="Fill every batch up to --max-batch images, so that an image depends on its request alone, bit for bit.",
)
@click.option(
    "--wait-ms",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Time that a request waits for others to join its batch.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests that may wait or be sampled.",
)
@STORAGE
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    token_file: str | None,
    num_replicas: int,
    gpus: float | None,
    max_batch: int,
    pad_batches: bool,
    wait_ms: int,
    max_requests: int,
    storage: str | None,
) -> None:
    """Serve published stacks: an HTTP API like OpenAI's images API, and a page."""
    root = storage or DEFAULT_ROOT
    token = None if token_file is None else _read_token(token_file)
    is_loopback = _is_loopback(host)
    if token is None and not is_loopback:
        raise InputError(
            f"--host: {host} can be reached by other machines, so requests must send a token. Write one to a file and add "
            "--token-file FILE."
        )
    from pipelines.serving.models import Models, find_published

    find_published(root, models)
    from pipelines.serving import deployment

    try:
        bound = deployment.bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"--port: {port} is in use by another program. Choose another: --port {port + 1}"
            ) from None
        raise InputError(f"--host: cannot listen on {host}:{port}: {error.strerror}.") from None
    import asyncio
    import logging

    from pipelines.cluster import connect
    from pipelines.serving.app import Api, create_app
    from pipelines.serving.requests import Limits

    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("unclip.serving").setLevel(logging.INFO)
    total = connect()
    if gpus is None:
        gpus = 1 if total.get("GPU", 0) >= num_replicas else 0
    if gpus * num_replicas > total.get("GPU", 0):  # Ray would wait for them for ever
        raise InputError(
            f"--gpus: {num_replicas} replicas of {gpus:g} need more GPUs than the cluster's {total.get('GPU', 0):g}. Use "
            "--gpus 0 to sample on CPUs."
        )
    sampler = deployment.Replicas(num_replicas, gpus, max_batch, wait_ms / 1000, max_requests)
    try:
        hosts = frozenset({"127.0.0.1", "localhost", "::1", host.lower()}) if is_loopback else None
        served = Models(sampler, root, models)
        api = Api(sampler, served, Limits(max_requests=max_requests), token, hosts, max_batch if pad_batches else None)

        async def run() -> None:
            await served.refresh()
            shown = f"[{host}]" if ":" in host else host
            click.echo(f"serving {', '.join(model.id for model in served.served)} at http://{shown}:{port}")
            await deployment.Server(create_app(api), api).serve(sockets=[bound])

        asyncio.run(run())
    finally:
        sampler.close()
    click.echo("stopped")


COMMANDS = (serve,)


def _read_token(path: str) -> str:
    """Read the token of a file; messages do not show it."""
    try:
        with Path(path).open("rb") as file:
            token = file.read(1 << 12).decode("ascii").strip()
    except OSError as error:
        raise InputError(f"--token-file: {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        token = ""
    if len(token) < MIN_TOKEN or not token.isprintable() or " " in token:
        raise InputError(
            f"--token-file: {path} must hold one token of at least {MIN_TOKEN} ASCII letters, digits and signs, such as "
            "the output of `openssl rand -hex 32`."
        )
    return token


def _is_loopback(host: str) -> bool:
    """Return True if an address can be reached from this machine only."""
    import ipaddress

    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise InputError(f"--host: {host} is no address: {error.strerror}.") from None
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)
