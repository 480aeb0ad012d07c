"""Servers that take new weights while they run: what is asked of them. `register_server.sh` starts such with
VLLM_SERVER_DEV_MODE=1 in front, whose routes let anybody who reaches the port change the model: they stay
bound to 127.0.0.1.
"""

import asyncio
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from common.cli import UserError
from generation.dispatch import Failure, Server, agree, ask, client

if TYPE_CHECKING:
    import httpx

PATIENCE = 600.0  # seconds that weights may take to be read, and a sequence to be computed
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


async def _reload(session: "httpx.AsyncClient", server: Server, folder: Path):
    try:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        await ask(session, f"{server.url}/collective_rpc", body, PATIENCE)
        await ask(session, f"{server.url}/reset_prefix_cache", {}, PATIENCE)
    except Failure as failure:
        raise UserError(f"{server.url} does not take new weights: {failure}; see its log") from None
    except UserError as error:
        if "HTTP 404" not in str(error):
            raise
        raise UserError(
            f"{server.url} cannot take new weights: start it with VLLM_SERVER_DEV_MODE=1 in front of "
            "register_server.sh"
        ) from None


def reload_weights(servers: list[Server], folder: Path):
    """Let all servers read the weights in `folder`, and forget the prefixes that they computed by others.

    Raises:
        UserError: one does not answer, or does not take them.
    """

    async def all_of_them():
        async with client() as session:
            await asyncio.gather(*(_reload(session, server, folder) for server in servers))

    asyncio.run(all_of_them())


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
