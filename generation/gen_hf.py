"""Generate K responses per prompt by asking OpenAI-compatible vLLM servers, as `register_server.sh` starts them.

In:  prompts (hub name, save_to_disk folder, .jsonl, .json, .parquet, .csv) and the ports of servers of one model.
Out: `--output_dir`, a JSON Lines file with `id`, `prompt`, `responses`, `finish_reasons`, `num_tokens` and the
     prompt's other fields, in the order of the prompt file.

    python generation/gen_hf.py --ports 8000 8001 8002 8003 --tokenizer RLHFlow/LLaMA3-SFT \
        --dataset_name_or_path RLHFlow/test_generation_2k --output_dir data/gen_data.jsonl --K 4 --temperature 1.0

Token ids and every sampling field are sent, so the answers are those of `get_hf2.py`. Each answer is saved as it
arrives; a stopped run continues with the same command. A failed request is asked again, at whichever server is free;
a server that dies is probed and used again when it is back.
"""

import asyncio
import dataclasses
import itertools
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common import chat
from common.cli import UserError, arg, check_model, parse, run
from common.manifest import Output, beside, write_json
from common.progress import Progress, duration
from generation import sampling


@dataclasses.dataclass(kw_only=True)
class Arguments(sampling.SamplingArguments):
    tokenizer: str = arg(help="the served model's tokenizer and generation config: hub name or folder")
    ports: list[int] = arg([8000], "the servers' ports")
    hosts: list[str] = arg(["127.0.0.1"], "the servers' machines: one for all ports, or one a port")
    concurrency: int = arg(64, "requests in flight per server")
    timeout: float = arg(1800.0, "seconds that one request may take")
    retries: int = arg(8, "how often one prompt may fail before the run ends")
    give_up_after: float = arg(120.0, "seconds of failures at every server after which the run ends")


HOW = {"ports", "hosts", "concurrency", "timeout", "retries", "give_up_after"}  # not what
RETRIED = (408, 429)  # and all from 500 on
LONGEST_PAUSE = 10.0  # seconds
AHEAD = 2  # prompts in work or waiting, per slot of a server


class Failure(Exception):
    """A request that may succeed when it is asked again.

    `lost` where the server itself did not answer, `busy` where it asks for patience, which is not held against the prompt.
    """

    def __init__(self, reason, lost=False, busy=False):
        super().__init__(reason)
        self.lost, self.busy = lost, busy


class Server:
    """One server and what is known of its health; times are `time.monotonic()`."""

    def __init__(self, url):
        self.url, self.up, self.lock = url, True, asyncio.Lock()
        self.failures, self.first, self.last, self.reason = 0, 0.0, 0.0, ""

    def failed(self, failure):
        now = time.monotonic()
        self.first = self.first if self.failures else now
        self.failures, self.last, self.reason = self.failures + 1, now, str(failure)
        if failure.lost and self.up:
            self.up = False
            print(f"note: lost {self.url} ({failure}); its work goes to the others until it is back", flush=True)


def pause(failures):
    """Seconds to wait after failures in a row: doubled each time, with jitter so that clients do not march in step."""
    return min(LONGEST_PAUSE, 0.25 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0)


async def ask(session, url, body=None, timeout=10.0):
    """GET, or POST `body` as JSON; the answer's JSON.

    Raises:
        Failure: no connection, a timeout, 408, 429, 5xx, or an answer that is torn.
        UserError: another 4xx, with the server's own message.
    """
    import aiohttp

    method, limit = ("GET" if body is None else "POST"), aiohttp.ClientTimeout(total=timeout)
    try:
        async with session.request(method, url, json=body, timeout=limit) as response:
            if response.status in RETRIED or response.status >= 500:
                raise Failure(f"HTTP {response.status}", busy=response.status == 429)
            if response.status >= 400:
                text = await response.text()
                raise UserError(f"{url} refuses the request (HTTP {response.status}): {' '.join(text.split())[:400]}")
            return await response.json(content_type=None)
    except TimeoutError:
        raise Failure(f"no answer within {timeout:.0f}s", lost=True) from None
    except aiohttp.ClientError as error:
        raise Failure(str(error) or type(error).__name__, lost=True) from None
    except (ValueError, RecursionError):  # RecursionError: nested a thousand deep
        raise Failure("the answer is not JSON") from None


async def served_model(session, server):
    """(name, folder or hub name, tokens of context) of what a server serves."""
    try:
        card = (await ask(session, f"{server.url}/v1/models"))["data"][0]
        return card["id"], card.get("root"), card["max_model_len"]
    except (KeyError, IndexError, TypeError):
        raise UserError(
            f"{server.url}/v1/models does not tell a model and its max_model_len; is it a vLLM server?"
        ) from None


async def agree(session, servers):
    """What all servers serve; a UserError names the one that does not answer or differs."""
    answers = await asyncio.gather(*(served_model(session, s) for s in servers), return_exceptions=True)
    for server, answer in zip(servers, answers):
        if isinstance(answer, Failure):
            raise UserError(
                f"{server.url} does not answer ({answer}); start it (register_server.sh), or leave its port out"
            )
        if isinstance(answer, BaseException):
            raise answer
        if answer != answers[0]:
            (a, _, length), (b, _, other) = answers[0], answer
            raise UserError(
                f"{servers[0].url} serves {a} (max_model_len {length}), {server.url} serves {b} "
                f"(max_model_len {other}); "
                "all must serve the same"
            )
    return answers[0]


async def check_tokenizer(session, server, model, args, tokenizer, item):
    """Refuse a tokenizer that encodes a prompt otherwise than the served model's own."""
    text = chat.render(tokenizer, item.record["prompt"], True, args.template_kwargs)
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        answer = await ask(session, f"{server.url}/tokenize", body, 60.0)
    except (Failure, UserError) as error:
        print(
            f"note: --tokenizer {args.tokenizer} is not checked against the served model's, "
            f"/tokenize does not answer: {error}"
        )
        return
    if not isinstance(answer, dict) or not isinstance(answer.get("tokens"), list):
        print(f"note: --tokenizer {args.tokenizer} is not checked against the served model's, /tokenize answers {str(answer)[:60]}")
        return
    if answer["tokens"] != item.token_ids:
        raise UserError(
            f"--tokenizer {args.tokenizer} is not that of the served model {model}: "
            "they encode the first prompt differently"
        )


class Run:
    """Prompts waiting, servers, and the output; the workers share it."""

    def __init__(self, args, session, servers, serves, output, progress):
        self.args, self.session, self.servers, self.serves = args, session, servers, serves
        self.output, self.progress = output, progress
        # Prompts are read and tokenised as `room` is free, a little ahead of the servers; what has failed goes first.
        self.queue, self.turn = asyncio.PriorityQueue(), itertools.count()
        self.room = asyncio.Semaphore(AHEAD * args.concurrency * len(servers))
        self.failures, self.tokens = {}, 0

    def failed(self, server, failure):
        """Note a failure; end the run when every server has done nothing but fail for too long."""
        server.failed(failure)
        if all(s.failures and s.last - s.first >= self.args.give_up_after for s in self.servers):
            told = "; ".join(f"{s.url}: {s.reason}" for s in self.servers)
            raise UserError(
                f"no server has answered for {self.args.give_up_after:.0f}s ({told}). "
                f"{len(self.output.done)} records are kept; "
                "start servers and the same command again"
            )

    async def ready(self, server):
        """Return when the server is usable; of its workers one probes a lost server and the others wait for it."""
        async with server.lock:
            while not server.up:
                await asyncio.sleep(pause(server.failures))
                try:
                    serves = await served_model(self.session, server)
                    if serves != self.serves:
                        raise Failure(f"it now serves {serves[0]} (max_model_len {serves[2]})", lost=True)
                    probe = {
                        "model": serves[0],
                        "prompt": [0],
                        "max_tokens": 1,
                    }  # /health can be well before this works
                    await ask(self.session, f"{server.url}/v1/completions", probe, 60.0)
                except (Failure, UserError) as error:
                    self.failed(server, error if isinstance(error, Failure) else Failure(error, lost=True))
                else:
                    server.up = True
                    print(f"note: {server.url} is back", flush=True)

    async def answer(self, server, item, fields):
        """The record of one prompt, answered by one server."""
        body = fields | {
            "model": self.serves[0],
            "prompt": item.token_ids,
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        answer = await ask(self.session, f"{server.url}/v1/completions", body, self.args.timeout)
        try:
            model = answer.get("model")
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            texts, reasons = [c["text"] for c in choices], [c["finish_reason"] for c in choices]
            counts = [len(c["token_ids"]) for c in choices]
            if [c["index"] for c in choices] != list(range(len(choices))) or not all(isinstance(r, str) for r in reasons):
                raise ValueError
            "".join(texts).encode("utf-8")  # texts they are, and no half surrogates
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Failure(f"the answer is not of the API's form: {str(answer)[:100]}") from None
        if model not in (None, self.serves[0]):
            raise Failure(f"an answer of {str(model)[:100]} instead of {self.serves[0]}")
        if len(choices) != fields["n"]:
            raise Failure(f"{len(choices)} responses instead of {fields['n']}")
        if not set(reasons) <= {"stop", "length"}:
            raise Failure(f"the server gave up on the request ({reasons})")
        return sampling.answered(item, texts, reasons, counts)

    async def work(self, server):
        """One slot of a server: take a prompt when free, ask, save; what fails goes back into the queue."""
        while True:
            await self.ready(server)
            _, _, (item, fields) = await self.queue.get()
            name = item.record["id"]
            try:
                if not server.up:  # lost while this slot waited for a prompt
                    self.put_back(item, fields)
                    continue
                record = await self.answer(server, item, fields)
            except Failure as failure:
                self.failures[name] = self.failures.get(name, 0) + (not failure.busy)
                self.failed(server, failure)
                if self.failures[name] > self.args.retries:
                    raise UserError(
                        f"prompt {name} failed {self.failures[name]} times, last at {server.url}: {failure}. "
                        f"{len(self.output.done)} records are kept; mend the servers and start the same command again"
                    ) from None
                if not failure.lost:  # a lost server's work is free for the others at once
                    await asyncio.sleep(pause(server.failures if failure.busy else self.failures[name]))
                self.put_back(item, fields)
            else:
                server.failures = 0
                self.failures.pop(name, None)
                self.room.release()
                self.output.append(record)
                self.tokens += sum(record["num_tokens"])
                rate = self.tokens / max(time.monotonic() - self.progress.start, 1e-9)
                self.progress.update(1, f"{rate:.0f} tokens/s")
            finally:
                self.queue.task_done()

    def put_back(self, item, fields):
        self.queue.put_nowait((0, next(self.turn), (item, fields)))

    async def feed(self, requests):
        """Hand requests to the workers as there is room; return when all are answered."""
        for request in requests:
            await self.room.acquire()
            self.queue.put_nowait((1, next(self.turn), request))
            await asyncio.sleep(0)  # reading and tokenising takes turns with the answers
        await self.queue.join()

    async def all(self, requests):
        """Answer all requests; the first error of a worker ends the run."""
        finished = asyncio.create_task(self.feed(requests))
        workers = [asyncio.create_task(self.work(s)) for s in self.servers for _ in range(self.args.concurrency)]
        try:
            done, _ = await asyncio.wait([finished, *workers], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (finished, *workers):
                task.cancel()
            await asyncio.gather(finished, *workers, return_exceptions=True)


async def generate(args):
    hosts = args.hosts * len(args.ports) if len(args.hosts) == 1 else args.hosts
    servers = [Server(f"http://{host}:{port}") for host, port in zip(hosts, args.ports)]
    inputs = {
        "dataset_name_or_path": args.dataset_name_or_path,
        "tokenizer": args.tokenizer,
        "chat_template": args.chat_template,
    }
    settings = {k: v for k, v in sampling.shaping_settings(args).items() if k not in HOW}
    there = Path(args.output_dir).exists() and not args.overwrite
    count = 0 if there else sampling.count_prompts(args)  # refuses bad records before anything is loaded or written
    import aiohttp

    # No kept connections: one that the server has closed meanwhile looks like a lost server.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        try:
            model, root, limit = serves = await agree(session, servers)
            inputs["model"] = root or model
        except UserError:
            if not there:
                raise  # a finished output needs no server any more
        output = Output(args.output_dir, "generation/gen_hf.py", settings, inputs, args.overwrite)
        if output.complete:
            print(f"{args.output_dir} is complete, nothing to do")
            return
        before = output.manifest.setdefault("max_model_len", limit)
        if output.done and before != limit:  # it decides what is too long, and how long an answer may be
            raise UserError(
                f"{args.output_dir} is half done with servers of max_model_len {before}, now it is {limit}; "
                "start them as before, choose another --output_dir or give --overwrite"
            )
        output.manifest["max_model_len"] = limit
        write_json(beside(args.output_dir, ".manifest.json"), output.manifest)
        if args.tokenizer not in (model, root):
            print(f"note: the servers serve {model}, the tokenizer is {args.tokenizer}'s")
        tokenizer = sampling.load_tokenizer(args.tokenizer, args)
        stops = sampling.stop_ids(args.tokenizer, tokenizer, args)
        prompts = sampling.Prompts(args, tokenizer, output, limit, count)
        left = prompts.size - len(output.done)
        if output.done:
            print(f"continuing: {len(output.done)} records are there, {left} to do")
        requests = ((item, sampling.sampling_fields(args, item, stops, limit)) for item in prompts)
        first, progress = next(requests, None), Progress(left, "generate", "prompts")
        work = Run(args, session, servers, serves, output, progress)
        if first is not None:
            await check_tokenizer(session, servers[0], model, args, tokenizer, first[0])
            await work.all(itertools.chain([first], requests))
        seconds = progress.close()
    prompts.finish(seconds)
    if work.tokens:
        print(f"sampled {work.tokens} tokens in {duration(seconds)}, {work.tokens / seconds:.0f} tokens/s")


def main():
    args = parse(Arguments, __doc__)
    sampling.check_sampling(args)
    check_model(args.tokenizer, "--tokenizer")
    if not args.ports or len(set(zip(args.hosts * (len(args.ports) if len(args.hosts) == 1 else 1), args.ports))) < len(
        args.ports
    ):
        raise UserError(
            "--ports and --hosts must name each server once, with one host for all or as many hosts as ports"
        )
    if args.concurrency < 1 or args.timeout <= 0 or args.retries < 0 or args.give_up_after <= 0:
        raise UserError("--concurrency, --timeout and --give_up_after must be above 0 and --retries not negative")
    asyncio.run(generate(args))


if __name__ == "__main__":
    run(main)
