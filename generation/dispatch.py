"""Which server gets which prompt, what is asked again, when to give up; gen_hf.py owns the output."""

import asyncio
import collections
import contextlib
import random
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from common import tokens
from common.cli import UserError
from generation import sampling

if TYPE_CHECKING:
    import httpx

RETRIED = (408, 429)  # and all from 500 on
PATIENCE = (429, 503)  # these may come with Retry-After
LONGEST_PAUSE = 10.0  # seconds
LOOK = 0.05  # seconds after which ends of pauses are looked for
AHEAD = 2  # prompts in flight or waiting, per slot of a server


class Failure(Exception):
    """A request that may succeed when it is asked again.

    `lost`: the server itself did not answer; `busy`: it asks for patience, which is not held against the
    prompt; `wait`: for how many seconds.
    """

    def __init__(self, reason, lost=False, busy=False, wait=0.0):
        super().__init__(reason)
        self.lost, self.busy, self.wait = lost, busy, wait


class Request:
    """A prompt to be answered, in as many parts as its mixture has, and how that went so far."""

    def __init__(self, item, parts):
        self.item, self.parts = item, parts
        self.failures, self.rest = 0, 0.0  # rest: until when it is not asked again, see Run.fits
        self.failed_at = set()  # servers


class Server:
    """One server and what is known of its health; times are `time.monotonic()`.

    After a failure it rests, longer each time, and then has one request at a time, its trial, until it
    answers. It is `silent` from its first failure on, once no request is left that it may still answer. A
    probe that succeeds ends that too, but once only: a server that answers nothing but probes is of no use.
    """

    def __init__(self, url):
        self.url, self.up, self.in_flight, self.trial = url, True, 0, None
        self.failures = 0  # in a row
        self.rest, self.wait = 0.0, 0.0  # until when it rests, and asks to be left alone
        self.silent, self.last, self.reason = None, 0.0, ""  # since when; time and reason of the last failure
        self.probed = False  # it was lost and back, and has not answered since

    def healthy(self, now: float) -> bool:
        return self.up and not self.failures and now >= self.wait

    def open(self, now: float, concurrency: int) -> bool:
        """Whether it may have another request."""
        ready = not self.failures or (self.trial is None and now >= self.rest)
        return self.up and ready and now >= self.wait and self.in_flight < concurrency

    def silent_for(self) -> float:
        """Seconds between the failures since when it is silent."""
        return 0.0 if self.silent is None else self.last - self.silent

    def answered(self):
        self.failures, self.trial, self.silent, self.probed = 0, None, None, False

    def returned(self):
        """A probe has succeeded."""
        self.up, self.rest = True, 0.0
        if not self.probed:
            self.silent, self.probed = None, True
        print(f"note: {self.url} is back", flush=True)

    def failed(self, failure: Failure, tried: bool):
        """Note a failure; `tried`: of a trial or a probe. Other requests that fail at once count as one."""
        now = time.monotonic()
        if failure.lost or not self.in_flight:
            self.silent = now if self.silent is None else self.silent
        self.last, self.reason, self.wait = now, str(failure), max(self.wait, now + failure.wait)
        if tried or not self.failures:
            self.failures += 1
            self.rest = now + pause(self.failures)
        if failure.lost and self.up:
            self.up = False
            print(f"note: lost {self.url} ({failure}); the others do its work until it is back", flush=True)


def pause(failures: int) -> float:
    """Seconds to wait after failures in a row: doubled each time, with jitter between clients."""
    return min(LONGEST_PAUSE, 0.25 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0)


def client() -> "httpx.AsyncClient":
    """Connections to servers, never through a proxy; a library that both environments have.

    No kept connections: one that the server has closed meanwhile looks like a lost server.
    """
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(limits=limits, trust_env=False, timeout=None)


async def ask(session: "httpx.AsyncClient", url: str, body: dict | None = None, timeout: float = 10.0) -> Any:
    """GET, or POST `body` as JSON; the answer's JSON, None for an empty one.

    Raises:
        Failure: no connection, a timeout, 408, 429, 5xx, or an answer that is torn.
        UserError: another 4xx, with the server's own message.
    """
    import httpx

    method = "GET" if body is None else "POST"
    try:
        async with asyncio.timeout(timeout):
            response = await session.request(method, url, json=body)
        if response.status_code in RETRIED or response.status_code >= 500:
            wait = response.headers.get("Retry-After", "") if response.status_code in PATIENCE else ""
            wait = float(wait) if wait.isdecimal() else 0.0  # its other form, a date, is not heeded
            busy = response.status_code == 429 or wait > 0
            raise Failure(f"HTTP {response.status_code}", busy=busy, wait=wait)
        if response.status_code >= 400:
            said = " ".join(response.text.split())[:400]
            raise UserError(f"{url} refuses the request (HTTP {response.status_code}): {said}")
        return response.json() if response.content.strip() else None
    except TimeoutError:
        raise Failure(f"no answer within {timeout:.0f}s", lost=True) from None
    except httpx.HTTPError as error:
        raise Failure(str(error) or type(error).__name__, lost=True) from None
    except (ValueError, RecursionError):  # RecursionError: nested a thousand deep
        raise Failure("the answer is not JSON") from None


async def served_model(session: "httpx.AsyncClient", server: Server) -> tuple[str, str | None, int]:
    """(name, folder or hub name, tokens of context) of what a server serves."""
    try:
        card = (await ask(session, f"{server.url}/v1/models"))["data"][0]
        return card["id"], card.get("root"), card["max_model_len"]
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{server.url}/v1/models tells no model and max_model_len: no vLLM server?") from None


async def agree(session: "httpx.AsyncClient", servers: list[Server]) -> tuple[str, str | None, int]:
    """What all servers serve; a UserError names the one that does not answer or differs."""
    answers = await asyncio.gather(*(served_model(session, s) for s in servers), return_exceptions=True)
    for server, answer in zip(servers, answers):
        if isinstance(answer, Failure):
            todo = "start it (register_server.sh), or leave its port out"
            raise UserError(f"{server.url} does not answer ({answer}); {todo}")
        if isinstance(answer, BaseException):
            raise answer
        if answer != answers[0]:
            told = (
                f"{s.url} serves {a[0]} (max_model_len {a[2]})"
                for s, a in zip(servers, answers)
                if not isinstance(a, BaseException)
            )
            raise UserError(f"{', '.join(told)}; all must serve the same")
    return answers[0]


class Run:
    """Prompts waiting, servers, and the output."""

    def __init__(self, args, session, servers, serves, output, progress):
        self.args, self.session, self.servers, self.serves = args, session, servers, serves
        self.output, self.progress = output, progress
        # Prompts are read and tokenised as `room` is free, a little ahead of the servers.
        self.room = asyncio.Semaphore(AHEAD * args.concurrency * len(servers))
        self.fresh, self.again = collections.deque(), []  # requests that wait: never asked, failed
        self.changed = asyncio.Event()  # something may be handed out
        self.tasks, self.probes, self.tokens = None, [], 0

    def failed(self, server: Server, failure: Failure, tried: bool):
        """Note a failure; end the run when every server has done nothing but fail for too long."""
        was_up = server.up
        failure.wait = min(failure.wait, self.args.give_up_after)
        server.failed(failure, tried)
        if all(s.silent_for() >= self.args.give_up_after for s in self.servers):
            told = "; ".join(f"{s.url}: {s.reason}" for s in self.servers)
            raise UserError(
                f"no server has answered for {self.args.give_up_after:.0f}s ({told}). "
                f"{len(self.output.done)} records are kept; start servers and the same command again"
            )
        if was_up and not server.up:
            self.probes.append(self.tasks.create_task(self.probe(server)))

    async def probe(self, server: Server):
        """Ask a lost server until it is usable again."""
        while not server.up:
            await asyncio.sleep(max(server.rest, server.wait) - time.monotonic())
            try:
                serves = await served_model(self.session, server)
                if serves != self.serves:
                    raise Failure(f"it now serves {serves[0]} (max_model_len {serves[2]})", lost=True)
                # /health can be well before this works.
                body = {"model": serves[0], "prompt": [0], "max_tokens": 1}
                await ask(self.session, f"{server.url}/v1/completions", body, 60.0)
            except (Failure, UserError) as error:
                failure = error if isinstance(error, Failure) else Failure(error, lost=True)
                self.failed(server, failure, tried=True)
            else:
                server.returned()
                self.changed.set()

    async def answer(self, server: Server, request: Request) -> dict:
        """The record of one prompt, all parts of which are answered by one server at once.

        A part that fails fails the prompt, whose other parts are given up.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.samples(server, part)) for part in request.parts]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        samples = [sample for task in tasks for sample in task.result()]
        return sampling.answered(self.args, request.item, samples)

    async def samples(self, server: Server, part: sampling.Request) -> list[sampling.Sample]:
        """The responses of one part of a prompt."""
        body = part.fields | {"model": self.serves[0], "prompt": part.prompt_ids}
        body |= {"add_special_tokens": False, "return_token_ids": True}
        answer = await ask(self.session, f"{server.url}/v1/completions", body, self.args.timeout)
        try:
            model = answer.get("model")
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [
                sampling.Sample(
                    c["text"],
                    c["finish_reason"],
                    c["token_ids"],
                    c["stop_reason"] if isinstance(c.get("stop_reason"), str) else None,
                )
                for c in choices
            ]
            in_order = [c["index"] for c in choices] == list(range(len(choices)))
            if (
                not in_order
                or not all(isinstance(one.finish_reason, str) for one in found)
                or not all(tokens.are_ids(one.token_ids) for one in found)
            ):
                raise ValueError
            "".join(one.text for one in found).encode("utf-8")  # texts they are, and no half surrogates
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Failure(f"the answer is not of the API's form: {str(answer)[:100]}") from None
        if model not in (None, self.serves[0]):
            raise Failure(f"an answer of {str(model)[:100]} instead of {self.serves[0]}")
        if len(found) != part.fields["n"]:
            raise Failure(f"{len(found)} responses instead of {part.fields['n']}")
        if not {one.finish_reason for one in found} <= {"stop", "length"}:
            raise Failure(f"the server gave up on the request ({[one.finish_reason for one in found]})")
        return found

    async def send(self, server: Server, request: Request):
        """Have one prompt answered by one server, and save it; what fails waits again."""
        name = request.item.record["id"]
        try:
            record = await self.answer(server, request)
        except Failure as failure:
            self.leave(server, request, failure)
            if request.failures > self.args.retries:
                raise UserError(
                    f"prompt {name} failed {request.failures} times, last at {server.url}: {failure}. "
                    f"{len(self.output.done)} records are kept; repair the servers and start the same "
                    "command again"
                ) from None
        else:
            self.leave(server, request)
            self.room.release()
            self.output.append(record)
            self.tokens += sum(record["num_tokens"])
            rate = self.tokens / max(time.monotonic() - self.progress.start, 1e-9)
            self.progress.update(1, f"{rate:.0f} tokens/s")

    def leave(self, server: Server, request: Request, failure: Failure | None = None):
        """A request is back from a server."""
        server.in_flight -= 1
        self.changed.set()
        if failure is None:
            server.answered()
            return
        tried = request is server.trial
        if tried:
            server.trial = None
        if not failure.busy:
            request.failures += 1
            request.rest = time.monotonic() + pause(request.failures)
        request.failed_at.add(server)
        self.again.append(request)
        self.failed(server, failure, tried)

    def fits(self, request: Request, server: Server, now: float) -> bool:
        """Whether a request that has failed may go to this server now.

        While there are healthy servers at which it has not failed, it is for them. The first failure may be
        the server's fault, so another one gets it at once; then it rests between failures.
        """
        untried = [s for s in self.servers if s not in request.failed_at]
        if any(s.healthy(now) for s in untried) and not (server in untried and server.healthy(now)):
            return False
        return now >= request.rest or (request.failures < 2 and server in untried)

    def choose(self, server: Server, now: float) -> Request | None:
        """Take the request that a server shall have next from those that wait, if there is one for it."""
        fitting = [request for request in self.again if self.fits(request, server, now)]
        if self.fresh and (server.failures or not fitting):  # a trial should not fail by the prompt's fault
            return self.fresh.popleft()
        if not fitting:
            return None
        request = min(fitting, key=lambda request: request.failures)
        self.again.remove(request)
        return request

    def hand_out(self):
        """Send what waits to servers that are free: healthy ones first, the least busy of them."""
        while self.fresh or self.again:
            now = time.monotonic()
            free = [s for s in self.servers if s.open(now, self.args.concurrency)]
            for server in sorted(free, key=lambda s: (s.failures > 0, s.in_flight)):
                request = self.choose(server, now)
                if request is not None:
                    break
            else:
                return
            server.in_flight += 1
            if server.failures:
                server.trial = request
            self.tasks.create_task(self.send(server, request))

    def is_idle(self) -> bool:
        return not (self.fresh or self.again or any(s.in_flight for s in self.servers))

    async def feed(self, requests: Iterable[tuple[sampling.Item, list[sampling.Request]]]):
        """Let requests wait as there is room."""
        for item, parts in requests:
            await self.room.acquire()
            self.fresh.append(Request(item, parts))
            self.changed.set()
            await asyncio.sleep(0)  # reading and tokenising takes turns with the answers

    async def all(self, requests: Iterable[tuple[sampling.Item, list[sampling.Request]]]):
        """Answer all requests; the first error ends the run."""
        try:
            async with asyncio.TaskGroup() as self.tasks:
                feeding = self.tasks.create_task(self.feed(requests))
                while not (feeding.done() and self.is_idle()):
                    self.changed.clear()
                    self.hand_out()
                    self.progress.tick()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK):
                            await self.changed.wait()
                for task in self.probes:
                    task.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
