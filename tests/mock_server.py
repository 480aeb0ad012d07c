"""An API server in a thread that refuses, hangs, breaks off and comes back as a test asks it to."""

import asyncio
import socket
import threading
import time

from aiohttp import web
from engine import policy

BODIES = {"garbage": "<html>", "deep": "[" * 200000, "null": "null", "list": "[]"}


def listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return value


class Mock:
    """A server in a thread.

    `behave(count, body)` names what the count-th completion request meets; None is an answer.
    """

    def __init__(
        self, behave=lambda count, body: None, model="mock", length=512, port=0, tokens=None, pause=0.0
    ):
        self.behave, self.model, self.length, self.port = behave, model, length, port
        self.tokens, self.pause = tokens, pause
        self.bodies, self.in_flight, self.most = [], 0, 0
        self.root = str(policy())  # made now: the first request should not have to wait for it

    def __enter__(self):
        self.loop, self.up = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.up.wait(20)
        return self

    def __exit__(self, *_):
        if self.loop.is_running():
            self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join(20)

    def _run(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())

    async def _serve(self):
        self.stopped = asyncio.Event()
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/v1/completions", self.complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self.up.set()
        await self.stopped.wait()
        await runner.cleanup()

    async def models(self, request):
        card = {"id": self.model, "root": self.root, "max_model_len": self.length}
        return web.json_response({"data": [card]})

    async def tokenize(self, request):
        if self.tokens is None:
            return web.Response(status=404)
        return web.json_response({"tokens": self.tokens})

    async def complete(self, request):
        body = await request.json()
        probe = body["prompt"] == [0]
        if not probe:
            self.bodies.append(body)
        what = None if probe else self.behave(len(self.bodies), body)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await asyncio.sleep(0 if isinstance(what, int | tuple) else self.pause)
            if what == "hang":
                await asyncio.sleep(3600)
            if what == "cut":
                request.transport.close()
            if what == "half":
                response = web.StreamResponse(headers={"Content-Length": "1000"})
                await response.prepare(request)
                await response.write(b'{"choices": [')
                request.transport.close()
                return response
            if isinstance(what, str) and what in BODIES:
                return web.Response(text=BODIES[what])
            if isinstance(what, tuple):
                return web.Response(status=what[0], headers={"Retry-After": what[1]})
            if isinstance(what, int):
                return web.json_response({"error": {"message": f"the server says {what}"}}, status=what)
            count = 1 if probe else body["n"] - (what == "fewer")
            reason = "abort" if what == "abort" else "stop"
            same = {"finish_reason": reason, "token_ids": [1, 2]}
            choices = [{"index": i, "text": f"{body.get('seed')}/{i}"} | same for i in range(count)]
            if isinstance(what, dict):  # the first choice otherwise
                choices[0] |= what
            model = "another" if what == "another" else self.model
            return web.json_response({"model": model, "choices": choices[::-1]})
        finally:
            self.in_flight -= 1
