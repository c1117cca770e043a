"""Connections of the server's port: clients that are slow, silent or send too much do not stay."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.serving import deployment
from unclip.errors import InputError

HEAD = b"POST / HTTP/1.1\r\nhost: a\r\n"
BYTES = 32 << 20
Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class App:
    """Answers with what it has read, or with many bytes."""

    def __init__(self) -> None:
        self.is_done = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] in ("http", "lifespan")
        if scope["type"] == "lifespan":
            return
        body = (await receive())["body"]
        content = bytes(BYTES) if scope["path"] == "/large" else b"read %b" % body
        headers = [(b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b""})  # waits until the client has read
        self.is_done.set()


def talk(app: ASGIApp, client: Client) -> None:
    """Run a server with an app, and a client that is connected to it."""

    async def main() -> None:
        bound = deployment.bind("127.0.0.1", 0)
        api: Any = None
        server = deployment.Server(app, api)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*bound.getsockname())
        try:
            await asyncio.wait_for(client(reader, writer), 30)
        finally:
            writer.transport.abort()
            server.should_exit = True
            await serving

    asyncio.run(main())


def test_what_a_stack_cannot_sample_is_told_to_the_client_and_not_raised_in_the_replica() -> None:
    """Ray Serve logs what a replica raises, and the message names the caption."""

    class Failing:
        async def sample(self, job: Any) -> AsyncIterator[Any]:
            raise InputError("caption: got 'a secret', which belongs to no class")
            yield

    class Handle:
        def options(self, **_: Any) -> Any:
            return self

        def remote(self, job: Any) -> Any:
            return self

        def __aiter__(self) -> AsyncIterator[Any]:
            return replica.sample(None)  # type: ignore[arg-type]

        def cancel(self) -> None:
            pass

    replica = deployment.Replica.__new__(deployment.Replica)
    replicas = deployment.Replicas.__new__(deployment.Replicas)
    replica._engine, replicas._handle = Failing(), Handle()  # type: ignore[assignment]

    async def events(sampler: Any) -> list[Any]:
        return [event async for event in sampler.sample(None)]

    [event] = asyncio.run(events(replica))
    assert isinstance(event, InputError)
    with pytest.raises(InputError, match="a secret"):
        asyncio.run(events(replicas))


async def rest(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b""


@pytest.mark.parametrize("start", [b"", HEAD])
def test_a_connection_without_whole_headers_ends(monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(deployment, "HEADER_SECONDS", 0.3)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        assert await rest(reader) == b""

    talk(App(), client)


def test_a_body_may_come_later_than_the_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "HEADER_SECONDS", 0.3)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"content-length: 4\r\n\r\n")
        await asyncio.sleep(0.6)
        writer.write(b"late")
        assert await reader.readuntil(b"read late")

    talk(App(), client)


def test_headers_have_a_limit() -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"".join(b"h%d: %b\r\n" % (number, b"x" * 1000) for number in range(200)))
        assert (await rest(reader)).partition(b"\r\n")[0] in (b"HTTP/1.1 400 Bad Request", b"HTTP/1.1 400 ", b"")

    talk(App(), client)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="no TCP_USER_TIMEOUT")
def test_a_client_that_does_not_read_its_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "READ_SECONDS", 1)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transport: Any = writer.transport
        transport.pause_reading()
        writer.write(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
        await app.is_done.wait()

    app = App()
    talk(app, client)
