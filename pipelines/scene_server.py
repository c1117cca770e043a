"""HTTP server of procedural images on this machine, which stands in for the internet in the demo; some URLs fail on purpose.

An image is a pure function of (variant, seed, index), rendered on request; the path of a URL says how it fails.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import http.server
import io
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from PIL import Image

from tasks import tables
from unclip.config import require
from unclip.errors import InputError
from unclip.evaluation import scenes

HOST = "127.0.0.1"
FAULTS = (
    "missing",  # HTTP 404
    "truncated",  # a JPEG that ends in the middle
    "short",  # fewer bytes than announced
    "html",  # a page instead of an image
    "stalled",  # accepts the connection, never answers
    "redirect",  # redirects to an internal address
    "duplicate",  # the bytes of another URL's image
    "small",  # 8x8 pixels
    "no_caption",  # a valid image with an empty caption
    "file",  # a file: URL
)


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    num_images: int = 3000
    """Number of valid images on the list."""
    side: int = 64
    """Resolution of the images, pixels."""
    seed: int = 0
    """Random seed of the images."""
    variant: scenes.Variant = "single"
    """Kind of scene: one object, or two objects in a relation."""
    port: int = 8765
    """Port of the server, which listens on 127.0.0.1 only."""
    broken: float = 0.03
    """Number of broken rows added to the list, as a fraction of `num_images`."""

    def __post_init__(self) -> None:
        require(self.num_images >= 1, "num_images", self.num_images, "at least 1")
        require(8 <= self.side <= 2048, "side", self.side, "8 to 2048 pixels")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(1 <= self.port <= 65535, "port", self.port, "1 to 65535")
        require(0 <= self.broken <= 1, "broken", self.broken, "a fraction from 0 to 1")

    @property
    def address(self) -> str:
        """Entry needed in `download.allow_hosts`."""
        return f"{HOST}:{self.port}"

    @property
    def prefix(self) -> str:
        return f"/{self.variant}-{self.side}-{self.seed}"


class SceneServer(http.server.ThreadingHTTPServer):
    """Serves the images of one configuration and counts requests."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, config: ScenesConfig) -> None:
        self.config = config
        self.requests: collections.Counter[str] = collections.Counter()
        """Number of requests by path."""
        self.closing = threading.Event()
        super().__init__((HOST, config.port), _Handler)

    def count(self, kind: str) -> int:
        """Count requests of one kind: "picture" for valid images, or one of `FAULTS`."""
        return sum(number for path, number in list(self.requests.items()) if path.split("/")[-2] == kind)


def write_url_list(config: ScenesConfig, path: str) -> None:
    """Write the list (url, caption) as Parquet; a longer list starts with the same rows."""
    num_broken = round(config.num_images * config.broken)
    listed = [("picture", index) for index in range(config.num_images)]
    listed += [(FAULTS[number % len(FAULTS)], number // len(FAULTS)) for number in range(num_broken)]
    urls = [_url(config, kind, index) for kind, index in listed]
    captions = ["" if kind == "no_caption" else render(config, index)[1] for kind, index in listed]
    tables.write_file(path, pa.table({"url": urls, "caption": captions}))


def check_port(port: int, setting: str) -> None:
    """Check that a port of this machine is free.

    Raises:
        InputError: another program listens on it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            flag = f"--set {setting}={port + 1}" if "." in setting else f"{setting} {port + 1}"
            raise InputError(f"{setting}: {port} is in use by another program. Choose another: {flag}") from None


@contextlib.contextmanager
def serve(config: ScenesConfig) -> Iterator[SceneServer]:
    """Run the server in the background.

    Raises:
        InputError: the port is in use.
    """
    check_port(config.port, "scenes.port")
    server = SceneServer(config)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def render(config: ScenesConfig, index: int) -> tuple[np.ndarray, str]:
    """Render an image, uint8 [S, S, 3], and write its caption."""
    scene_rng, image_rng, caption_rng = (np.random.default_rng([config.seed, index, use]) for use in range(3))
    scene = scenes.random_scene(scene_rng, variant=config.variant)
    return scenes.render(scene, image_rng, config.side), scenes.caption(scene, caption_rng)


@functools.lru_cache(maxsize=64)
def jpeg(config: ScenesConfig, index: int) -> bytes:
    """Render an image as JPEG bytes."""
    return _encode(render(config, index)[0])


def _encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _url(config: ScenesConfig, kind: str, index: int) -> str:
    if kind == "file":
        return f"file:///etc/passwd?{index}"
    return f"http://{config.address}{config.prefix}/{kind}/{index}.jpg"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: SceneServer
    timeout = 30

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        config = self.server.config
        prefix, _, name = self.path.rpartition("/")
        prefix, _, kind = prefix.rpartition("/")
        if prefix != config.prefix or kind == "missing":
            return self.send_error(404)
        if kind == "stalled":
            self.server.closing.wait()
            return
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.2:{config.port}{config.prefix}/picture/{name}")
            return self.end_headers()
        if kind == "html":
            return self._send(b"<!doctype html><title>Sold out</title><p>This picture is gone.", "text/html")
        index = int(name.removesuffix(".jpg"))
        if kind == "small":
            return self._send(_encode(render(dataclasses.replace(config, side=8), index)[0]))
        data = jpeg(config, index)
        if kind == "truncated":
            return self._send(data[: len(data) // 2])
        self._send(data[: len(data) // 2] if kind == "short" else data, announced=len(data))

    def _send(self, data: bytes, content_type: str = "image/jpeg", announced: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data) if announced is None else announced))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass
