"""The server's app in this process, with a real engine on a small untrained stack."""

import asyncio
import contextlib
import dataclasses
import io
import json
import random
import shutil
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from pipelines.serving.app import Api, create_app
from pipelines.serving.engine import Engine
from pipelines.serving.jobs import Job, Progress, Sampled
from pipelines.serving.models import Models
from pipelines.serving.requests import Limits
from tasks.database import database_uri
from tasks.tracking import client
from tests.unclip.systems import tiny_stacks
from unclip.errors import InputError, StageError
from unclip.imaging import to_uint8
from unclip.systems.system import load_system, sample_captions

RESOLUTION = 16
CAPTION = "a red circle"
GENERATIONS, VARIATIONS, EDITS = (f"/v1/images/{kind}" for kind in ("generations", "variations", "edits"))
LIMITS = Limits(max_requests=8, max_image_bytes=1 << 20, max_image_pixels=1 << 20, body_seconds=5)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    tiny_stacks.publish(folder)
    return folder


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


class Server:
    """An app, and a client that talks to it."""

    def __init__(self, storage: Path, **options: Any) -> None:
        self.engine = Engine(max_images=8, wait_seconds=0.02)
        self.models = Models(self.engine, str(storage), options.pop("models", ()))
        options = {"limits": LIMITS, "token": None, "hosts": frozenset({"test"}), **options}
        self.api = Api(self.engine, self.models, **options)
        self.app = create_app(self.api)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test", timeout=60)

    async def generate(self, **values: Any) -> httpx.Response:
        return await self.client.post(GENERATIONS, json={"prompt": CAPTION, **values})


@pytest.fixture(scope="module")
def server(storage: Path, loop: asyncio.Runner) -> Iterator[Server]:
    server = Server(storage)
    loop.run(server.models.refresh())
    yield server
    server.api.close()


def pixels(item: Any) -> np.ndarray:
    """Pixels of an image of an answer."""
    data = item["b64_json"] if isinstance(item, dict) else item.b64_json
    return np.asarray(Image.open(io.BytesIO(b64decode(data)))).astype(int)


def expected(storage: Path, seed: int, num: int = 1, caption: str = CAPTION) -> np.ndarray:
    """Images of `unclip sample`."""
    return to_uint8(sample_captions(load_system(storage / "stack"), [caption] * num, seed=seed)).astype(int)


def png(*size: int, opacity: np.ndarray | None = None) -> bytes:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (*(size or (RESOLUTION, RESOLUTION)), 3), np.uint8)
    if opacity is not None:
        array = np.dstack([array, opacity])
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def hole() -> np.ndarray:
    """Opacity of a mask with a transparent square."""
    opacity = np.full((RESOLUTION, RESOLUTION), 255, np.uint8)
    opacity[4:12, 3:9] = 0
    return opacity


def test_images_are_those_of_unclip_sample_whatever_their_batch(
    server: Server, loop: asyncio.Runner, storage: Path
) -> None:
    """A request alone gives the same bits; one of a batch has the same noise and differs by rounding only."""

    async def ask() -> tuple[Any, list[Any]]:
        alone = await server.generate(seed=3, n=2)
        together = await asyncio.gather(*(server.generate(seed=seed, n=2) for seed in (3, 4, 5)))
        return alone.json(), [response.json() for response in together]

    alone, together = loop.run(ask())
    assert alone["model"] == server.models.served[0].id and [item["seed"] for item in alone["data"]] == [3, 3]
    assert [
        (pixels(item) == image).all() for item, image in zip(alone["data"], expected(storage, 3, 2), strict=True)
    ] == [True] * 2
    for seed, answer in zip((3, 4, 5), together, strict=True):
        for item, image in zip(answer["data"], expected(storage, seed, 2), strict=True):
            assert abs(pixels(item) - image).max() <= 1
    text = loop.run(server.client.get("/metrics")).text
    assert 'unclip_batch_images_bucket{le="4.0"} 1.0' in text  # the first; the others were sampled together
    assert 'unclip_images_total{kind="generations"' in text


def test_with_padded_batches_images_are_those_of_unclip_sample_bit_for_bit(loop: asyncio.Runner, storage: Path) -> None:
    server = Server(storage, pad_to=8)
    system = load_system(storage / "stack")
    sampling = dataclasses.replace(system.sampling, batch_size=8, pad_batches=True)

    async def ask() -> list[httpx.Response]:
        await server.models.refresh()
        return await asyncio.gather(*(server.generate(seed=seed, n=1 + seed % 3) for seed in range(7)))

    with contextlib.closing(server.api):
        answers = loop.run(ask())
        for seed, answer in enumerate(answers):
            images = to_uint8(sample_captions(system, [CAPTION] * (1 + seed % 3), seed=seed, sampling=sampling)).astype(
                int
            )
            assert np.array_equal(images, [pixels(item) for item in answer.json()["data"]])
        assert loop.run(server.generate(n=9)).status_code == 400
    text = loop.run(server.client.get("/metrics")).text
    assert 'unclip_batch_images_bucket{le="2.0"} 0.0' in text  # none was sampled alone


def test_openais_client_generates_varies_and_edits(server: Server, loop: asyncio.Runner) -> None:
    client = openai.AsyncOpenAI(
        api_key="none",
        base_url="http://test/v1",
        max_retries=0,
        http_client=server.client,
        _strict_response_validation=True,
    )
    mask = png(opacity=hole())

    async def use() -> list[Any]:
        [model] = [each.id async for each in client.models.list()]
        return [
            await client.images.generate(prompt=CAPTION, n=2, size="16x16", response_format="b64_json", model=model),  # type: ignore[call-overload]
            await client.images.generate(
                prompt=CAPTION,
                quality="high",
                extra_body={"seed": 7, "steps": 2, "guidance_scale": 2, "partial_images": 2},
            ),
            await client.images.create_variation(image=png(), n=2),
            await client.images.edit(image=png(), mask=mask, prompt=CAPTION, n=2, response_format="b64_json"),
            await client.images.edit(image=[("a.png", mask)], prompt=CAPTION),
        ]

    answers = loop.run(use())
    assert [len(answer.data) for answer in answers] == [2, 1, 2, 2, 1]
    given = np.asarray(Image.open(io.BytesIO(png())).convert("RGB"))
    for answer in answers[3:]:
        changed = pixels(answer.data[0]) != given
        assert not changed[hole() == 255].any() and changed[hole() == 0].mean() > 0.5
    with pytest.raises(openai.BadRequestError, match="response_format: got 'url'"):
        loop.run(client.images.generate(prompt=CAPTION, response_format="url"))
    with pytest.raises(openai.NotFoundError, match="model: got 'dall-e-2', which is not served here"):
        loop.run(client.images.generate(prompt=CAPTION, model="dall-e-2"))


def test_variations_edits_and_interpolations_are_those_of_the_commands(
    server: Server, loop: asyncio.Runner, storage: Path
) -> None:
    from unclip.imaging import from_uint8
    from unclip.systems.inpainting import inpaint
    from unclip.systems.unclip import manipulations

    stack: Any = load_system(storage / "stack")
    given = from_uint8(np.asarray(Image.open(io.BytesIO(png())))[None])
    known = torch.from_numpy(hole() == 255)[None, None]
    wanted = {
        VARIATIONS: manipulations.variations(stack, given, 2, seed=6)[0],
        EDITS: inpaint(stack, given.expand(2, -1, -1, -1), known.expand(2, -1, -1, -1), [CAPTION] * 2, seed=6),
        "/v1/interpolations": manipulations.interpolate(stack, given, given.flip(3), [0, 0.5, 1], seed=6)[0],
    }
    mirrored = io.BytesIO()
    Image.open(io.BytesIO(png())).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored, "PNG")
    forms: dict[str, Any] = {
        VARIATIONS: ({"n": "2", "seed": "6"}, {"image": png()}),
        EDITS: ({"n": "2", "seed": "6", "prompt": CAPTION}, {"image": png(), "mask": png(opacity=hole())}),
        "/v1/interpolations": (
            {"n": "3", "seed": "6"},
            [("image[]", ("a.png", png())), ("image[]", ("b.png", mirrored.getvalue()))],
        ),
    }
    for route, (values, files) in forms.items():
        response = loop.run(server.client.post(route, data=values, files=files))
        assert response.status_code == 200, response.text
        for item, image in zip(response.json()["data"], to_uint8(wanted[route]).astype(int), strict=True):
            assert abs(pixels(item) - image).max() <= 1, route


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert response.headers["content-type"].startswith("text/event-stream") and lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_tells_every_step_and_ends_with_the_plain_answer(server: Server, loop: asyncio.Runner) -> None:
    plain = loop.run(server.generate(seed=3)).json()
    *progress, last = events(loop.run(server.generate(seed=3, stream=True)))
    total = 6 + 2  # of the decoder and the upsampler
    assert [(event["type"], event["step"], event["steps"]) for event in progress] == [
        ("image.progress", step, total) for step in range(1, total + 1)
    ]
    assert last["type"] == "image.completed"
    assert {**last, "created": 0} == {"type": "image.completed", **plain, "created": 0}
    form = {"image": png(), "mask": png(opacity=hole())}
    values = {"prompt": CAPTION, "stream": "true"}
    edited = events(loop.run(server.client.post(EDITS, data=values, files=form)))
    assert [event["step"] for event in edited[:-1]] == list(range(1, total + 1)) and len(edited[-1]["data"]) == 1


def test_requests_are_sampled_while_another_stack_is_loaded(server: Server, loop: asyncio.Runner) -> None:
    loop.run(server.generate())
    with server.engine._lock:  # as while a stack is loaded
        assert loop.run(asyncio.wait_for(server.generate(), 60)).status_code == 200


def test_a_request_without_a_seed_gets_one_that_repeats_it(server: Server, loop: asyncio.Runner) -> None:
    first, second = (loop.run(server.generate()).json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = loop.run(server.generate(seed=first["seed"])).json()["data"][0]
    assert again["b64_json"] == first["b64_json"] != second["b64_json"]


def test_models_say_what_they_support(server: Server, loop: asyncio.Runner) -> None:
    [model] = loop.run(server.client.get("/v1/models")).json()["data"]
    kinds = ["generations", "variations", "interpolations", "edits", "negative_prompt", "guidance_scale", "steps"]
    assert (model["supports"], model["image_size"], model["system"]) == (kinds, RESOLUTION, "unclip")
    assert model["defaults"] == {"steps": 6, "guidance_scale": 1.5}
    assert loop.run(server.client.get(f"/v1/models/{model['aliases'][0]}")).json()["id"] == model["id"]
    health = loop.run(server.client.get("/healthz")).json()
    assert health == {"status": "ok", "models": [model["id"]]}


# ------------------------------------------------------------------------------------------------- hostile requests


def json_requests() -> Iterator[tuple[bytes, str]]:
    """Bodies of generations that are refused, each with a word of the message."""
    bad: dict[str, list[Any]] = {
        "prompt": ["", "  ", None, 5, ["a"], {}, "x" * 1001, "\ud800", True],
        "n": [0, -1, 11, 1.5, "2.5", "many", True, 10**30, [1], float("nan"), float("inf")],
        "size": ["1024x1024", "0x0", "16", 16, "x" * 100, "-16x16"],
        "response_format": ["url", "png", 1, "x" * 100],
        "model": ["none", "../../etc", "a@b@c", 5, "x" * 400, "unclip-demo/999", ["a"]],
        "seed": [-1, 2**64, 1.5, "x", "1e9", True, [1]],
        "steps": [0, -3, 251, 2.5, "many", True, 10**12],
        "guidance_scale": [-1, 101, float("nan"), float("-inf"), "strong", True, [2], "9" * 50],
        "stream": ["maybe", 2, [True]],
        "negative_prompt": [3, "x" * 1001, ["a"]],
        "output_format": ["jpeg", 4],
        "strange": [1, "x", {}],
        "__proto__": [1],
        "image": ["a"],
    }
    for name, values in bad.items():
        for value in values:
            yield json.dumps({"prompt": CAPTION, name: value}).encode(), name
    whole = json.dumps({"prompt": CAPTION}).encode()
    yield from ((whole[:length], "body") for length in (0, 1, 5, len(whole) - 1))
    yield from ((text, "body") for text in (b"[]", b'"a"', b"5", b"null", b"\xff\xfe", b"[" * 50_000, b"9" * 5_000))
    yield rb'{"prompt": "a", "\ud800": 1}', "ud800"
    yield b'{"prompt": "' + b"x" * (1 << 17) + b'"}', "body"


def form_requests() -> Iterator[tuple[str, bytes, str]]:
    """Routes and bodies of forms that are refused, each with a word of the message."""
    head = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    field = b'--x\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    image, end = head + png() + b"\r\n", b"--x--\r\n"
    whole = image + end
    bombs = {
        "text": b"not an image",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "html": b"<html>",
        "zip": b"PK\x03\x04" + bytes(100),
        "half": png()[: len(png()) // 2],
        "empty": b"",
        "many pixels": png(1200, 1200),
        "claim": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\xff\xff\xff\x00\xff\xff\xff\x08\x02\x00\x00\x00" + bytes(64),
    }
    for content in bombs.values():
        yield VARIATIONS, head + content + b"\r\n" + end, "image"
    yield VARIATIONS, head + bytes(2 << 20) + b"\r\n" + end, "image"
    yield VARIATIONS, head + bytes(4 << 20) + b"\r\n" + end, "body"
    yield VARIATIONS, image + image + end, "image"
    yield VARIATIONS, end, "image"
    yield VARIATIONS, field % (b"image", b"text") + end, "image"
    yield VARIATIONS, whole.replace(b"--x", b"--y"), "form"
    yield VARIATIONS, b"", "form"
    yield VARIATIONS, b"--x", "form"
    yield VARIATIONS, field % (b"n", b"1") * 100 + end, "form"
    yield VARIATIONS, b"--x\r\n\r\nnothing\r\n" + end, "form"
    yield VARIATIONS, b'--x\r\ncontent-disposition: form-data; name="' + b"a" * 9999 + b'"\r\n\r\n1\r\n' + end, "form"
    for name, value in (
        (b"n", b"0"), (b"n", b"x"), (b"seed", b"-1"), (b"prompt", b"a"), (b"mask", b"a"), (b"n", b"\xff\xfe"),
        (b"steps", b"9999"), (b"guidance_scale", b"nan"), (b"guidance_scale", b"1e999"), (b"stream", b"perhaps"),
        (b"size", b"1x1"), (b"model", b"other"), (b"strange", b"1"), (b"response_format", b"url"),
    ):  # fmt: skip
        yield VARIATIONS, field % (name, value) + whole, name.decode()
    for length in range(1, len(whole), len(whole) // 40):
        yield VARIATIONS, whole[:length], ""
    rng = random.Random(0)
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[rng.randrange(len(head))] = rng.randrange(256)
        if not damaged.startswith(b'--x\r\ncontent-disposition: form-data; name="image"'):
            yield VARIATIONS, bytes(damaged), ""
    prompt = field % (b"prompt", CAPTION.encode())
    mask = head.replace(b'"image"', b'"mask"')
    yield EDITS, prompt + whole, "image"  # no transparent pixel
    yield EDITS, whole, "prompt"
    yield (
        EDITS,
        prompt + image + mask + png(16, 17, opacity=np.zeros((16, 17), np.uint8)) + b"\r\n" + end,
        "mask",
    )
    yield EDITS, prompt + image + mask + b"nothing\r\n" + end, "mask"
    yield "/v1/interpolations", whole, "image"
    yield "/v1/interpolations", field % (b"n", b"1") + image + image + end, "n"


def test_f160_hostile_requests_are_refused_and_the_server_lives(server: Server, loop: asyncio.Runner) -> None:
    """More than 200 malformed, huge and hostile requests: each gets 4xx with a message that names the parameter."""

    async def send() -> list[tuple[bytes, str, httpx.Response]]:
        form = {"content-type": "multipart/form-data; boundary=x"}
        sent: list[tuple[bytes, str, httpx.Response]] = []
        for body, word in json_requests():
            response = await server.client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
            sent.append((body, word, response))
        for route, body, word in form_requests():
            sent.append((body, word, await server.client.post(route, content=body, headers=form)))
        for kind in ("", "text/plain", "multipart/form-data", "application/jsonx", "a" * 5000):
            for route in (GENERATIONS, VARIATIONS):
                sent.append(
                    (
                        b"",
                        "content-type",
                        await server.client.post(route, content=b"{}", headers={"content-type": kind}),
                    )
                )
        for path in (
            "/v1",
            "/v2/models",
            "/v1/models/none",
            "/../../etc/passwd",
            "/%2e%2e/%2e%2e/app.py",
            "/..%2fapp.py",
            "/a\0b",
        ):
            sent.append((path.encode(), "", await server.client.get(path.replace("\0", "%00"))))
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            sent.append((method.encode(), "", await server.client.request(method, GENERATIONS)))
        for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}):
            sent.append((str(headers).encode(), "", await server.client.get("/v1/models", headers=headers)))
        return sent

    sent = loop.run(send())
    assert len(sent) >= 200
    for body, word, response in sent:
        shown = f"{body[:120]!r}: {response.status_code} {response.text[:200]}"
        assert 400 <= response.status_code < 500, shown
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and word in error["message"], shown
        assert len(error["message"]) < 800 and error["message"].isprintable(), shown
    assert loop.run(server.generate()).status_code == 200 and server.api._active == 0


def test_answers_name_the_methods_of_a_path_and_the_scheme_of_the_token(
    server: Server, loop: asyncio.Runner, storage: Path
) -> None:
    for method, path, allowed in (("GET", GENERATIONS, "POST"), ("DELETE", "/v1/models", "GET"), ("POST", "/", "GET")):
        response = loop.run(server.client.request(method, path))
        assert response.status_code == 405 and allowed in response.headers["allow"].split(", ")
    guarded = Server(storage, token="a-long-secret-token", hosts=None)
    assert loop.run(guarded.client.get("/v1/models")).headers["www-authenticate"] == "Bearer"


def test_a_child_that_does_not_start_is_no_fault_of_the_image(
    server: Server, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise StageError("sandbox: the child process did not start.")

    monkeypatch.setattr("tasks.untrusted.given.decode_bytes", fail)
    response = loop.run(server.client.post(VARIATIONS, files={"image": png()}))
    assert response.status_code == 500 and "sandbox" not in response.text


# ------------------------------------------------------------------------------------------------- limits and places


class Slow:
    """Sampler that waits until it is told to go on."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.go, self.jobs = engine, asyncio.Event(), 0
        self.load, self.keep = engine.load, engine.keep

    async def sample(self, job: Job) -> AsyncIterator[Progress | Sampled]:
        self.jobs += 1
        try:
            await self.go.wait()
            async for event in self.engine.sample(job):
                yield event
        finally:
            self.jobs -= 1


def with_slow_sampler(server: Server, use: Callable[[Slow], Coroutine[Any, Any, None]], loop: asyncio.Runner) -> None:
    async def run() -> None:
        slow = Slow(server.engine)
        server.api.sampler = slow
        try:
            await asyncio.wait_for(use(slow), 60)
        finally:
            server.api.sampler = server.engine

    loop.run(run())


def test_f161_a_full_queue_refuses_with_429_and_says_when_to_come_back(server: Server, loop: asyncio.Runner) -> None:
    async def use(slow: Slow) -> None:
        waiting = [asyncio.create_task(server.generate(stream=index % 2 == 0)) for index in range(LIMITS.max_requests)]
        while slow.jobs < LIMITS.max_requests:
            await asyncio.sleep(0.01)
        refused = await server.generate()
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        slow.go.set()
        assert {(await each).status_code for each in waiting} == {200}
        assert (await server.generate()).status_code == 200

    with_slow_sampler(server, use, loop)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_f164_a_client_that_leaves_frees_its_place(server: Server, loop: asyncio.Runner, is_streamed: bool) -> None:
    body = json.dumps({"prompt": CAPTION, "stream": is_streamed}).encode()
    headers = [(b"host", b"test"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": GENERATIONS, "raw_path": GENERATIONS.encode(), "query_string": b"",
        "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("test", 80),
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip

    async def use(slow: Slow) -> None:
        left = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        request = asyncio.create_task(server.app(scope, receive, send))
        while not slow.jobs:
            await asyncio.sleep(0.01)
        assert server.api._active == 1
        left.set()
        await request
        assert (slow.jobs, server.api._active) == (0, 0)

    with_slow_sampler(server, use, loop)


def test_f162_a_request_that_takes_too_long_ends_with_503(server: Server, loop: asyncio.Runner) -> None:
    async def use(slow: Slow) -> None:
        server.api.limits = dataclasses.replace(LIMITS, request_seconds=0.2)
        try:
            plain, streamed = await asyncio.gather(server.generate(), server.generate(stream=True))
        finally:
            server.api.limits = LIMITS
        assert plain.status_code == 503 and "retry-after" in plain.headers
        [error] = events(streamed)
        assert error["type"] == "error" and error["error"]["code"] == "timeout"
        assert (slow.jobs, server.api._active) == (0, 0)

    with_slow_sampler(server, use, loop)


def test_f165_a_server_with_a_token_answers_nobody_without_it(
    server: Server, loop: asyncio.Runner, storage: Path
) -> None:
    guarded = Server(storage, token="a-long-secret-token", hosts=None)
    guarded.models = guarded.api.models = server.models

    async def ask(token: str | None, path: str, **headers: str) -> int:
        headers |= {} if token is None else {"authorization": f"Bearer {token}"}
        return (await guarded.client.get(path, headers=headers)).status_code

    for path in ("/v1/models", "/metrics", "/v1/images/generations", "/v1/nothing"):
        for token in (None, "", "wrong", "a-long-secret-toke", "a-long-secret-token2"):
            assert loop.run(ask(token, path)) == 401
        for host in ("test/?", "test/healthz?", "test#", "evil.example"):
            assert loop.run(ask(None, path, host=host)) == 401
    assert loop.run(ask("a-long-secret-token", "/v1/models")) == 200
    assert [loop.run(ask(None, path)) for path in ("/healthz", "/", "/app.js")] == [200, 200, 200]
    assert loop.run(guarded.client.get("/healthz")).json()["models"] == []


def test_a_named_model_is_served_without_a_storage(
    loop: asyncio.Runner, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its folder, or by its name in the MLflow of `MLFLOW_TRACKING_URI`."""
    stack, uri = str(storage / "stack"), database_uri(str(tmp_path / "mlflow.db"))
    mlflow = client(uri)
    run = mlflow.create_run(mlflow.create_experiment("other"))
    mlflow.create_registered_model("theirs")
    version = mlflow.create_model_version("theirs", stack, run.info.run_id).version
    mlflow.set_registered_model_alias("theirs", "champion", version)
    alone, unnamed = Server(tmp_path / "none", models=(stack, "theirs")), Server(tmp_path / "none")

    async def use() -> None:
        with pytest.raises(InputError, match="no such folder"):
            await alone.models.refresh()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for _ in range(2):
            await alone.models.refresh()
            assert [model.id for model in alone.models.served] == ["stack", "theirs/1"]
        assert (await alone.generate()).status_code == 200
        with pytest.raises(InputError, match="no such folder"):
            await unnamed.models.refresh()

    with contextlib.closing(alone.api), contextlib.closing(unnamed.api):
        loop.run(use())
    assert not (tmp_path / "none").exists()


def test_f166_a_new_champion_is_taken_up_without_dropping_a_request(
    loop: asyncio.Runner, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that run end with the old stack; a stack that is damaged changes nothing."""
    for name in ("stack", "published"):
        shutil.copytree(storage / name, tmp_path / name)
    record_path = next((tmp_path / "published").iterdir())
    changing = Server(tmp_path)

    def promote(folder: Path, digest: str) -> None:
        record = json.loads(record_path.read_text())
        record = {**record, "stack": str(folder), "digest": digest, "at": record["at"] + 1}
        record.pop("checksum", None)
        record_path.write_text(json.dumps(record))

    async def use() -> None:
        await changing.models.refresh()
        before = changing.models.served[0]
        slow = Slow(changing.engine)
        changing.api.sampler = slow
        running = asyncio.create_task(changing.generate(seed=1))
        while not slow.jobs:
            await asyncio.sleep(0.01)
        shutil.copytree(tmp_path / "stack", tmp_path / "damaged")
        (tmp_path / "damaged" / "stack.json").write_text("{}")
        promote(tmp_path / "damaged", "d" * 64)
        with pytest.raises(Exception, match=r"stack\.json"):
            await changing.models.refresh()
        assert changing.models.served == [before]
        shutil.copytree(tmp_path / "stack", tmp_path / "second")
        promote(tmp_path / "second", "e" * 64)
        await changing.models.refresh()
        after = changing.models.served[0]
        assert after.id != before.id and after.stack == str(tmp_path / "second")
        slow.go.set()
        old, new = (await running).json(), (await changing.generate(seed=1)).json()
        assert (old["model"], new["model"]) == (before.id, after.id)
        assert old["data"] == new["data"]  # the same weights
        await changing.models.refresh()
        assert len(changing.engine._loaded) == 2  # the old one stays for requests that wait
        monkeypatch.setattr("pipelines.serving.models.KEEP_SECONDS", 0)
        await changing.models.refresh()
        assert list(changing.engine._loaded) == [after.stack]

    with contextlib.closing(changing.api):
        loop.run(use())
