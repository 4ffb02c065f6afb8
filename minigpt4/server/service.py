"""The HTTP of the service: keys, limits, and the form of answers.

Input: requests. Output: JSON, or server-sent events. Every error has the form of OpenAI's interface.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from minigpt4.chat.scheduler import Stream
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.config.sections import ServerConfig
from minigpt4.errors import RequestError
from minigpt4.server.replies import DONE, Completion, error_of, event
from minigpt4.server.request import ChatRequest
from minigpt4.server.uploads import Uploads
from minigpt4.server.work import Work

_log = logging.getLogger(__name__)
RETRY_AFTER_SECONDS = "1"
_HIDDEN = "the service failed on this request; its log says why"


class Service:
    """One model behind OpenAI's interface."""

    def __init__(self, loaded: LoadedModel, name: str, key: str = "") -> None:
        """Serve `loaded` as `name`; with a `key`, only to clients that send it."""
        self.limits: ServerConfig = loaded.config.server
        self.name = name
        self._key = key.encode()
        self._defaults = replace(loaded.config.chat, num_beams=1)  # beams can neither join other rows nor stream
        self._started = int(time.time())
        self._work = Work(loaded, self.limits)
        self._uploads = Uploads(self.limits)

    def app(self) -> Starlette:
        """Return the ASGI application; when it ends, decoding stops."""

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            yield
            self._work.close()

        return Starlette(
            routes=[
                Route("/v1/chat/completions", _Endpoint(self), methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/health", self.health),
            ],
            exception_handlers={RequestError: _refuse, HTTPException: _refuse_http, Exception: _refuse},
            lifespan=lifespan,
        )

    async def health(self, _request: Request) -> Response:
        """Report that the service is running; needs no key."""
        return JSONResponse({"status": "ok", "model": self.name, "requests_under_way": self._work.in_progress})

    async def models(self, request: Request) -> Response:
        """List the one model."""
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Describe the one model."""
        self._check_key(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def chat(self, request: Request, send: Send) -> None:
        """Answer one chat request; the work for it stops if the client disconnects."""
        self._check_key(request)
        _check_type(request)
        with self._uploads.upload() as upload:
            body = await upload.receive(request)
            with self._work.place():  # only now: a client that sends nothing takes no place
                asked = await self._work.read(body, self._defaults)
                del body  # the texts of `asked` replace it
                self._check_model(asked.model)
                await _while_connected(request.receive, self._answer(asked, request, send))

    async def _answer(self, asked: ChatRequest, request: Request, send: Send) -> None:
        completion, started = Completion(self.name), time.monotonic()
        async with self._work.answer(asked) as stream:
            if asked.stream:
                await _send_events(send, self._events(asked, completion, stream))
            else:
                text = "".join([piece async for piece in self._work.pieces(stream)])
                await JSONResponse(completion.whole(text, stream))(request.scope, request.receive, send)
            _log.info(
                "chat: %d prompt tokens, %d answer tokens, %.2f s, %s",
                *(stream.prompt_tokens, stream.completion_tokens, time.monotonic() - started, stream.finish_reason),
            )

    async def _events(self, asked: ChatRequest, completion: Completion, stream: Stream) -> AsyncIterator[str]:
        """Yield an answer as server-sent events; an error is an event too, because the status is sent already."""
        yield event(completion.chunk({"role": "assistant", "content": ""}))
        try:
            async for piece in self._work.pieces(stream):
                yield event(completion.chunk({"content": piece}))
        except Exception:
            _log.exception("an answer failed after it began")
            yield event(error_of(RequestError(_HIDDEN, status=500)))
            return
        yield event(completion.chunk({}, stream.finish_reason))
        if asked.include_usage:
            yield event(completion.usage_chunk(stream))
        yield DONE

    def _check_key(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        fits = hmac.compare_digest(given.strip().encode(), self._key)
        if self._key and not (scheme.lower() == "bearer" and fits):
            message = "missing or wrong key; send the header Authorization: Bearer KEY"
            raise RequestError(message, status=401, code="invalid_api_key")

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            message = f"unknown model {name[:60]!r}; this service has {self.name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._started, "owned_by": "minigpt4"}


class _Endpoint:
    """`Service.chat` as an ASGI application, which can watch for a disconnected client while it sends."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._service.chat(Request(scope, receive), send)
        except ClientDisconnect:
            _log.info("chat: the client disconnected before its request was complete")


def _check_type(request: Request) -> None:
    """Accept only JSON: a web page of any origin can make a browser send a form, but not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("the request must be sent as Content-Type: application/json", status=415)


async def _while_connected(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Run `answer` to its end, or until the client disconnects."""
    working, watching = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        else:
            _log.info("chat: the client disconnected")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_events(send: Send, events: AsyncIterator[str]) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for text in events:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _refuse(_request: Request, error: Exception) -> Response:
    refused = error if isinstance(error, RequestError) else RequestError(_HIDDEN, status=500)
    headers = {"Retry-After": RETRY_AFTER_SECONDS} if refused.status == 429 else {}
    headers |= {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
    return JSONResponse(error_of(refused), refused.status, headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """Answer a request with an unknown path, or with the wrong method."""
    if not isinstance(error, HTTPException):
        return await _refuse(request, error)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_of(RequestError(message, status=error.status_code)), error.status_code, error.headers)
