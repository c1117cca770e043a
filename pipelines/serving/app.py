"""HTTP API in the shape of OpenAI's images API, and the page.

Every request that needs images becomes a `Job` for a `Sampler`, once its values are checked and its images decoded in a confined
child process.
"""

import asyncio
import base64
import contextlib
import dataclasses
import hmac
import json
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving import requests
from pipelines.serving.jobs import Job, Kind, Progress, Sampled, Sampler
from pipelines.serving.metrics import CONTENT_TYPE, Metrics
from pipelines.serving.models import Model, Models
from pipelines.serving.requests import Fields, Limits, RequestError
from tasks.untrusted import given
from tasks.untrusted.sandbox import Sandbox
from unclip import config
from unclip.errors import ConfigError, InputError, ShapeError, UnclipError
from unclip.messages import reason_of, without_credentials

log = logging.getLogger("unclip.serving")

PAGE = Path(__file__).parent / "page"
"""Files of the page."""
REFRESH_SECONDS = 5.0
"""Time between two looks at what is published."""
_SHARED = frozenset(
    {"model", "n", "size", "response_format", "seed", "guidance_scale", "steps", "stream", "output_format"}
)
_NAMES: dict[Kind, frozenset[str]] = {
    "generations": _SHARED | {"prompt", "negative_prompt"},
    "variations": _SHARED | {"image"},
    "edits": _SHARED | {"prompt", "negative_prompt", "image", "mask"},
    "interpolations": _SHARED | {"image"},
}
_CLOSED = ("/v1/", "/metrics")
"""Start of paths that need the token."""


class Api:
    """State of a server, and one method for each route."""

    def __init__(
        self,
        sampler: Sampler,
        models: Models,
        limits: Limits,
        token: str | None,
        hosts: frozenset[str] | None,
        pad_to: int | None = None,
    ) -> None:
        """Args:
        pad_to: size that every batch of generations is filled up to, so that its images depend on their own requests alone.
        """
        self.sampler, self.models, self.limits, self.token, self.hosts = sampler, models, limits, token, hosts
        self.pad_to = pad_to
        self.metrics = Metrics()
        self.is_stopping = False
        self._active = 0
        self._usual_seconds = 1.0
        self._sandbox: Sandbox | None = None
        self._starting = threading.Lock()

    # -------------------------------------------------------------------------------------------------- information

    async def health(self, request: Request) -> Response:
        if self.is_stopping or not self.models.served:
            raise RequestError(503, "the server is starting or stopping.", retry_after=5)
        is_trusted = self.token is None or self._has_token(request)
        names = [model.id for model in self.models.served] if is_trusted else []
        return JSONResponse({"status": "ok", "models": names})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model.describe() for model in self.models.served]})

    async def show_model(self, request: Request) -> Response:
        try:
            return JSONResponse(self.models.find(request.path_params["name"]).describe())
        except UnclipError as error:
            raise RequestError(404, str(error), "model", "model_not_found") from None

    # ------------------------------------------------------------------------------------------------------- images

    async def generations(self, request: Request) -> Response:
        return await self._answer(request, "generations")

    async def variations(self, request: Request) -> Response:
        return await self._answer(request, "variations")

    async def edits(self, request: Request) -> Response:
        return await self._answer(request, "edits")

    async def interpolations(self, request: Request) -> Response:
        return await self._answer(request, "interpolations")

    async def _answer(self, request: Request, kind: Kind) -> Response:
        if self.is_stopping or not self.models.served:
            raise RequestError(503, "the server is starting or stopping. Try again.", retry_after=5)
        if self._active >= self.limits.max_requests:
            wait = max(1, math.ceil(self._usual_seconds))
            raise RequestError(
                429,
                f"{self._active} requests wait already. Try again in {wait} s.",
                code="queue_full",
                retry_after=wait,
            )
        place = _Place(self)
        try:
            job, model, is_streamed = await self._read(request, kind)
            if is_streamed:
                response, place = _EventStream(self._events(job, model), place), _Place(None)
                return response
            sampled = await _unless_disconnected(request, self._sample(job))
            return JSONResponse(self._body(job, model, sampled), headers={"cache-control": "no-store"})
        except (RequestError, ClientDisconnect):
            raise
        except Exception as error:
            log.error("sampling failed: %s", without_credentials(reason_of(error)))
            raise _internal() from None
        finally:
            place.free()

    async def _read(self, request: Request, kind: Kind) -> tuple[Job, Model, bool]:
        """Read and check a request."""
        content_type = request.headers.get("content-type", "")
        is_json = kind == "generations"
        limit = 1 << 16 if is_json else self.limits.max_body_bytes
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                body = await requests.read_body(request, limit)
        except TimeoutError:
            raise RequestError(408, f"body: not all there after {self.limits.body_seconds:g} s.") from None
        fields = (
            requests.parse_json(content_type, body) if is_json else requests.parse_form(content_type, body, self.limits)
        )
        fields.check_names(_NAMES[kind])
        try:
            model = self.models.find(fields.text("model", 300) or None)
        except UnclipError as error:
            raise RequestError(404, str(error), "model", "model_not_found") from None
        if kind not in model.supports:
            raise RequestError(
                400, f"{kind}: not supported by the model {model.id} of the system {model.system}.", "model"
            )
        self._check_format(fields, model)
        num, is_padded = self._num(fields, model, kind), self._is_padded(model, kind)
        job = Job(
            stack=model.stack,
            kind=kind,
            settings=self._settings(fields, model, kind),
            num=num,
            seed=fields.seed(),
            max_batch=self._max_batch(model) if is_padded or self.pad_to is None else num,
        )
        if kind in ("generations", "edits"):
            caption = fields.text("prompt", self.limits.max_caption, required=True) or ""
            negative = fields.text("negative_prompt", self.limits.max_caption) or None
            if negative is not None and "negative_prompt" not in model.supports:
                raise RequestError(400, f"negative_prompt: not supported by the model {model.id}.", "negative_prompt")
            job = dataclasses.replace(job, caption=caption, negative=negative)
        if kind != "generations":
            job = await self._with_images(job, fields, model)
        return job, model, fields.boolean("stream")

    def _check_format(self, fields: Fields, model: Model) -> None:
        size, own = fields.text("size", 40), model.loaded.image_size
        if size not in (None, "auto", f"{own}x{own}"):
            raise RequestError(
                400,
                f"size: got {size!a}, expected {own}x{own}, the size of this model's images.",
                "size",
                "invalid_value",
            )
        response_format = fields.text("response_format", 40)
        if response_format not in (None, "b64_json"):
            raise RequestError(
                400,
                f"response_format: got {response_format!a}, expected b64_json: no image is kept that a URL could name.",
                "response_format",
                "invalid_value",
            )
        if fields.text("output_format", 40) not in (None, "png"):
            raise RequestError(400, "output_format: expected png.", "output_format", "invalid_value")

    def _num(self, fields: Fields, model: Model, kind: Kind) -> int:
        most = min(self.limits.max_num, self._max_batch(model))
        if kind != "interpolations":
            return fields.integer("n", 1, most, 1)
        most = max(2, most)
        return fields.integer("n", 2, most, min(5, most))

    def _is_padded(self, model: Model, kind: Kind) -> bool:
        """Return True if batches are filled up. Requests whose batches cannot be are sampled one at a time: the same bits."""
        return self.pad_to is not None and kind == "generations" and "pad_batches" in model.values

    def _max_batch(self, model: Model) -> int:
        published = int(model.values["batch_size"])
        return published if self.pad_to is None else min(published, self.pad_to)

    def _settings(self, fields: Fields, model: Model, kind: Kind) -> str:
        """Published sampling settings with those of the request, as JSON."""
        values: Any = model.values
        if self._is_padded(model, kind):
            values = {**values, "batch_size": self._max_batch(model), "pad_batches": True}
        given_values = {
            "steps": None
            if fields.values.get("steps") is None
            else fields.integer("steps", 1, self.limits.max_steps, 1),
            "guidance_scale": fields.number("guidance_scale", 0, 100),
        }
        for name, value in given_values.items():
            if value is None:
                continue
            if name not in model.shortcuts:
                raise RequestError(400, f"{name}: not supported by the model {model.id}.", name)
            values = config.override(values, f"{model.shortcuts[name]}={value}")
        return json.dumps(values, sort_keys=True)

    async def _with_images(self, job: Job, fields: Fields, model: Model) -> Job:
        size = model.loaded.image_size
        count = 2 if job.kind == "interpolations" else 1
        contents = fields.images("image", count, count)
        if job.kind != "edits":
            images = [await self._decode(data, size, "image") for data in contents]
            return dataclasses.replace(job, images=tuple(image.pixels for image in images))
        masks = fields.images("mask", 0, 1)
        image = await self._decode(contents[0], size, "image", with_opacity=True)
        mask = await self._decode(masks[0], size, "mask", with_opacity=True) if masks else image
        if (mask.width, mask.height) != (image.width, image.height):
            raise RequestError(
                400,
                f"mask: got {mask.width} x {mask.height} pixels, expected {image.width} x {image.height} as in the image.",
                "mask",
            )
        assert mask.opacity is not None
        known: np.ndarray = mask.opacity >= 128
        if known.all():
            raise RequestError(
                400,
                f"{'mask' if masks else 'image'}: has no transparent pixels. Make those transparent that are to be painted.",
                "mask",
            )
        return dataclasses.replace(job, images=(image.pixels,), known=known)

    async def _decode(self, data: bytes, size: int, name: str, with_opacity: bool = False) -> given.GivenImage:
        def decode() -> given.GivenImage:
            with self._starting:
                self._sandbox = self._sandbox or Sandbox(given.answer, num_children=2)
            return given.decode_bytes(self._sandbox, data, size, self.limits.max_image_pixels, with_opacity)

        try:
            return await asyncio.to_thread(decode)
        except InputError as error:  # any other is the server's
            raise RequestError(400, f"{name}: {error}. Send another image.", name, "invalid_image") from None

    async def _sample(self, job: Job) -> Sampled:
        async with contextlib.aclosing(self._sampling(job)) as events:
            async for event in events:
                if isinstance(event, Sampled):
                    return event
        raise AssertionError("the last event has images")

    async def _sampling(self, job: Job) -> AsyncGenerator[Progress | Sampled]:
        """Events of a job, within the time of a request; counts it."""
        started = time.monotonic()
        try:
            async with contextlib.aclosing(self.sampler.sample(job)) as events:  # type: ignore[type-var]
                event: Progress | Sampled | None = None
                while not isinstance(event, Sampled):
                    async with asyncio.timeout(started + self.limits.request_seconds - time.monotonic()):
                        event = await anext(events)
                    if isinstance(event, Sampled):
                        self._count(job, event, time.monotonic() - started)
                    yield event
        except TimeoutError:
            limit = self.limits.request_seconds
            raise RequestError(
                503, f"not sampled within {limit:g} s.", code="timeout", retry_after=math.ceil(limit)
            ) from None
        except (ConfigError, InputError, ShapeError) as error:
            raise RequestError(400, str(error), code="invalid_value") from None

    def _count(self, job: Job, sampled: Sampled, seconds: float) -> None:
        self._usual_seconds = 0.9 * self._usual_seconds + 0.1 * seconds
        name = next((model.id for model in self.models.served if model.stack == job.stack), "replaced")
        self.metrics.images.labels(name, job.kind).inc(job.num)
        self.metrics.batch_size.observe(sampled.batch_size)
        self.metrics.batch_seconds.observe(sampled.seconds)

    async def _events(self, job: Job, model: Model) -> AsyncGenerator[str]:
        """Server-sent events of a job."""
        try:
            async with contextlib.aclosing(self._sampling(job)) as events:
                async for event in events:
                    if isinstance(event, Progress):
                        yield _event({"type": "image.progress", "step": event.step, "steps": event.steps})
                    else:
                        yield _event({"type": "image.completed", **self._body(job, model, event)})
        except RequestError as error:
            yield _event({"type": "error", **error.body()})
        except Exception as error:
            log.error("sampling failed: %s", without_credentials(reason_of(error)))
            yield _event({"type": "error", **_internal().body()})
        yield "data: [DONE]\n\n"

    def _body(self, job: Job, model: Model, sampled: Sampled) -> dict[str, Any]:
        data = [{"b64_json": base64.b64encode(png).decode(), "seed": job.seed} for png in sampled.pngs]
        return {"created": int(time.time()), "data": data, "model": model.id}

    # -------------------------------------------------------------------------------------------------------- access

    def check(self, request: Request) -> None:
        """Refuse requests without the token, and those that a page of another site makes a browser send."""
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self.hosts is not None and name.strip("[]").lower() not in self.hosts:
            raise RequestError(403, f"host: got {ascii(host)[:80]}, which is not the name of this server.")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise RequestError(403, f"origin: got {ascii(origin)[:80]}, expected pages of this server only.")
        path = request.scope["path"]  # that of `request.url` depends on the header `Host`
        if self.token is not None and path.startswith(_CLOSED) and not self._has_token(request):
            raise RequestError(401, "the token is missing or wrong. Send the header `Authorization: Bearer TOKEN`.")

    def _has_token(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        assert self.token is not None
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self.token.encode())

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()


class _Place:
    """Place of a request in the queue, freed once."""

    def __init__(self, api: Api | None) -> None:
        self._api = api
        self._move(1)

    def free(self) -> None:
        self._move(-1)
        self._api = None

    def _move(self, number: int) -> None:
        if self._api is not None:
            self._api._active += number
            self._api.metrics.waiting.set(self._api._active)


class _EventStream(StreamingResponse):
    """Server-sent events, which end when the client leaves; their request then frees its place."""

    def __init__(self, events: AsyncGenerator[str], place: _Place) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._events, self._place = events, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._place.free()
            await self._events.aclose()


def create_app(api: Api, refresh_seconds: float = REFRESH_SECONDS) -> ASGIApp:
    """Make the ASGI app of a server, which also takes up new champions while it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        refreshing = asyncio.create_task(_refresh(api, refresh_seconds))
        try:
            yield
        finally:
            api.is_stopping = True
            refreshing.cancel()
            api.close()

    routes = [
        Route("/healthz", api.health),
        Route("/metrics", api.show_metrics),
        Route("/v1/models", api.list_models),
        Route("/v1/models/{name:path}", api.show_model),
        Route("/v1/images/generations", api.generations, methods=["POST"]),
        Route("/v1/images/variations", api.variations, methods=["POST"]),
        Route("/v1/images/edits", api.edits, methods=["POST"]),
        Route("/v1/images/interpolations", api.interpolations, methods=["POST"]),
        Route("/v1/interpolations", api.interpolations, methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.router.redirect_slashes = False
    app.router.default = StaticFiles(directory=PAGE, html=True, check_dir=False)  # a route would hide 405 of the others
    return _Guarded(app, api)


class _Guarded:
    """Checks access, turns errors into answers, counts and logs requests."""

    def __init__(self, app: Starlette, api: Api) -> None:
        self._app, self._api = app, api
        for kind in (RequestError, HTTPException, ClientDisconnect, Exception):
            app.add_exception_handler(kind, _to_response)
        app.state.routes = {route.path for route in app.routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 499
        route = scope["path"] if scope["path"] in self._app.state.routes else "other"

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS.items()]}
            await send(message)

        try:
            try:
                self._api.check(Request(scope))
            except RequestError as error:
                await _to_response(Request(scope), error)(scope, receive, watch)
                return
            await self._app(scope, receive, watch)
        finally:
            seconds = time.monotonic() - started
            self._api.metrics.requests.labels(route, status).inc()
            self._api.metrics.seconds.labels(route).observe(seconds)
            log.info("%s %s %d %.3f s", ascii(scope["method"])[1:-1][:20], route, status, seconds)


async def _refresh(api: Api, seconds: float) -> None:
    """Take up new champions, for ever."""
    told = ""
    while True:
        await asyncio.sleep(seconds)
        before = [model.id for model in api.models.served]
        try:
            await api.models.refresh()
        except Exception as error:  # the models that are loaded go on answering
            api.metrics.problems.inc()
            problem = without_credentials(reason_of(error))
            if problem != told:  # once, not at every look
                log.warning("models: cannot be refreshed: %s", problem)
            told = problem
        else:
            told = ""
            after = [model.id for model in api.models.served]
            if after != before:
                log.info("models: now %s", ", ".join(after))


async def _unless_disconnected(request: Request, work: Awaitable[Sampled]) -> Sampled:
    """Wait for work, but not longer than the client does."""

    async def disconnection() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnection())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _to_response(request: Request, error: Exception) -> Response:
    """Answer of an error."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers |= error.headers or {}  # `Allow` of 405
        error = RequestError(
            error.status_code, f"{request.method[:20]} {ascii(request.scope['path'])[:100]}: {error.detail}."
        )
    if not isinstance(error, RequestError):
        log.error("request failed: %s", without_credentials(reason_of(error)))
        error = _internal()
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def _internal() -> RequestError:
    return RequestError(500, "the server could not sample this; its log says why.")


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}
"""Headers of all answers; the page loads nothing from elsewhere."""
