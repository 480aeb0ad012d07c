"""Servers that take new weights while they run, and sleep while a trainer has their GPUs: what is asked of
them. `register_server.sh` starts such with VLLM_SERVER_DEV_MODE=1 in front, whose routes let anybody who
reaches the port change the model: they stay bound to 127.0.0.1.
"""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from common.cli import UserError
from generation.dispatch import Failure, Server, agree, ask, client

if TYPE_CHECKING:
    import httpx

PATIENCE = 600.0  # seconds that weights may take to be read, and a sequence to be computed
WEIGHTS, CACHE = "weights", "kv_cache"  # what sleeps, as vLLM calls it
LOOK = 5.0  # seconds to wait for a connection


def check_there(servers: list[Server]):
    """Refuse to go on where nobody listens on a server's port any more; a busy server is there.

    Raises:
        UserError: names the server.
    """
    for server in servers:
        place = urlsplit(server.url)
        try:
            socket.create_connection((place.hostname, place.port), LOOK).close()
        except ConnectionRefusedError:
            raise UserError(
                f"{server.url} has ended: nothing listens there any more. Its log may say why; start it "
                "again (run_online.sh does) and the same command"
            ) from None
        except OSError:
            pass  # whatever this is, it is not gone


async def _order(
    session: "httpx.AsyncClient",
    server: Server,
    path: str,
    what: str,
    body: dict | None = None,
    remedy: str = "see its log",
) -> Any:
    """The answer to a POST at one of these routes. `what` it makes the server do and the `remedy` are for the
    message.
    """
    try:
        return await ask(session, f"{server.url}{path}", body or {}, PATIENCE)
    except Failure as failure:
        if failure.lost:
            raise UserError(f"{server.url} does not answer ({failure}); is it there? See its log") from None
        raise UserError(f"{server.url} does not {what}: {failure}; {remedy}") from None
    except UserError as error:
        if "HTTP 404" not in str(error):
            raise
        raise UserError(
            f"{server.url} cannot {what}: start it with VLLM_SERVER_DEV_MODE=1 in front of register_server.sh"
        ) from None


def _of_all(servers: list[Server], order: Callable) -> list:
    """What `order(session, server)` gives for each server, all of them at once."""

    async def of_all() -> list:
        async with client() as session:
            return await asyncio.gather(*(order(session, server) for server in servers))

    return asyncio.run(of_all())


def reload_weights(servers: list[Server], folder: Path):
    """Let all servers read the weights in `folder`, and forget the prefixes that they computed by others.

    Raises:
        UserError: one does not answer, or does not take them.
    """

    async def order(session: "httpx.AsyncClient", server: Server):
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        await _order(session, server, "/collective_rpc", "take new weights", body)
        await _order(session, server, "/reset_prefix_cache", "take new weights")

    _of_all(servers, order)


def sleep(servers: list[Server]):
    """Let all servers give back their GPUs' memory and wait; one that sleeps already goes on to.

    Their weights move to the machine's own memory (vLLM's level 1). Level 2 would drop them, and with them
    whatever a model holds beside its parameters and buffers: reports of wrong answers afterwards are open
    (vLLM 0.32). Requests that come meanwhile wait until it is awake.

    Raises:
        UserError: one does not answer, or cannot sleep.
    """

    async def order(session: "httpx.AsyncClient", server: Server):
        await _order(session, server, "/sleep?level=1", "sleep")

    _of_all(servers, order)


def wake(servers: list[Server], part: str):
    """Let all servers have a part of their GPUs' memory again; one that is awake stays so.

    Args:
        part: WEIGHTS, and when these are the right ones CACHE, which is empty then: the server is awake.

    Raises:
        UserError: one does not answer, or does not wake.
    """

    async def order(session: "httpx.AsyncClient", server: Server):
        remedy = "see its log; where its GPU has no room for it, lower gpu_memory_utilization of generation"
        answer = await _order(session, server, f"/wake_up?tags={part}", "wake up", remedy=remedy)
        if part == CACHE and answer["status"] != "awake":
            raise UserError(f"{server.url} does not wake up; {remedy}")

    _of_all(servers, order)


async def _log_probs(session: "httpx.AsyncClient", server: Server, model: str, ids: list[int]) -> list[float]:
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    try:
        answer = await ask(session, f"{server.url}/v1/completions", body, PATIENCE)
        places = answer["choices"][0]["prompt_logprobs"][1:]  # the first token has none
        return [float(place[str(token)]["logprob"]) for place, token in zip(places, ids[1:], strict=True)]
    except Failure as failure:
        raise UserError(f"{server.url} does not answer ({failure}); is it there? See its log") from None
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(f"{server.url} gives no log-probabilities of a prompt: no vLLM server?") from None


def log_probs(servers: list[Server], sequences: list[list[int]]) -> dict[str, list[list[float]]]:
    """{a server's URL: for each sequence of token ids the log-probability of every token but the first}.

    Sequences are asked for one after the other, so that a server computes them alike each time.

    Raises:
        UserError: a server does not answer, or serves something else than the others.
    """

    async def of_one(session: "httpx.AsyncClient", server: Server, model: str) -> list[list[float]]:
        return [await _log_probs(session, server, model, ids) for ids in sequences]

    async def of_all() -> dict:
        async with client() as session:
            model, *_ = await agree(session, servers)
            found = await asyncio.gather(*(of_one(session, server, model) for server in servers))
        return {server.url: values for server, values in zip(servers, found)}

    return asyncio.run(of_all())
