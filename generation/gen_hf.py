r"""Generate K responses per prompt by asking vLLM's API servers, as `register_server.sh` starts them.

In:  prompts (hub name, a data set's folder, .jsonl, .json, .parquet, .csv) and the ports of servers of one
     model.
Out: `--output_dir`, a JSON Lines file with `id`, `prompt`, `responses`, `finish_reasons`, `num_tokens`, the
     token ids that were read and sampled, and the prompt's other fields, in the order of the prompt file.

    python generation/gen_hf.py --ports 8000 8001 8002 8003 --tokenizer RLHFlow/LLaMA3-SFT \
        --dataset_name_or_path RLHFlow/test_generation_2k --output_dir data/gen_data.jsonl \
        --K 4 --temperature 1.0

Token ids and every sampling field are sent, so the answers are those of `get_hf2.py`. Each answer is saved as
it arrives; a stopped run continues with the same command. A failed request is asked again, at another server
where one works. A server that fails gets one request at a time, with growing pauses, until it answers; one
that is lost is probed and used again when it is back.
"""

import asyncio
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common import models
from common.chat import ChatTemplate
from common.cli import UserError, arg, count, parse, run
from common.manifest import Output, beside, with_date, write_json
from common.progress import Progress, duration
from generation import get_hf2, sampling
from generation.dispatch import Failure, Run, Server, agree, ask, client


@dataclasses.dataclass(kw_only=True)
class ClientArguments:
    """Where the servers are, and how they are asked."""

    ports: list[int] = arg([8000], "the servers' ports", shapes=False)
    hosts: list[str] = arg(["127.0.0.1"], "their machines: one for all, or one a port", shapes=False)
    concurrency: int = arg(
        64, "prompts in flight per server, each as many requests as a mixture has parts", shapes=False
    )
    timeout: float = arg(1800.0, "seconds that one request may take", shapes=False)
    retries: int = arg(8, "how often one prompt may fail before the run ends", shapes=False)
    give_up_after: float = arg(120.0, "seconds of failures alone after which the run ends", shapes=False)


@dataclasses.dataclass(kw_only=True)
class Arguments(sampling.SamplingArguments, ClientArguments):
    tokenizer: str = arg(help="the served model's tokenizer and generation config: hub name or folder")

    shares_section = get_hf2.Arguments  # a YAML section may serve both scripts


async def check_tokenizer(work: Run, template: ChatTemplate, item: sampling.Item):
    """Refuse a tokenizer that encodes a prompt otherwise than the served model's own."""
    args, model = work.args, work.serves[0]
    text = template.render(item.record["prompt"], True, item.record.get("tools"))
    body = {"model": model, "prompt": text}
    body |= {"add_special_tokens": False}
    try:
        answer = await ask(work.session, f"{work.servers[0].url}/tokenize", body, 60.0)
        if not isinstance(answer, dict) or not isinstance(answer.get("tokens"), list):
            raise Failure(f"it answers {str(answer)[:60]}")
    except (Failure, UserError) as error:
        what = f"--tokenizer {args.tokenizer} is not checked against the served model's"
        print(f"note: {what}, /tokenize gives no tokens: {error}")
        return
    if answer["tokens"] != item.token_ids:
        raise UserError(
            f"--tokenizer {args.tokenizer} is not that of the served model {model}: "
            "they encode the first prompt differently"
        )


def servers_of(args: ClientArguments) -> list[Server]:
    """The servers; a UserError where their ports and hosts do not go together."""
    hosts = args.hosts * len(args.ports) if len(args.hosts) == 1 else args.hosts
    places = list(zip(hosts, args.ports))
    if not places or len(hosts) != len(args.ports) or len(set(places)) < len(places):
        raise UserError(
            "--ports and --hosts must name each server once, with one host for all or as many hosts as ports"
        )
    return [Server(f"http://{host}:{port}") for host, port in places]


def check(args: ClientArguments):
    """A UserError where what is told of servers and client cannot work."""
    servers_of(args)
    if args.concurrency < 1 or args.timeout <= 0 or args.retries < 0 or args.give_up_after <= 0:
        raise UserError("--concurrency, --timeout, --give_up_after must be above 0, --retries not negative")


async def generate(args: Arguments, holds: str | None = None):
    """Answer the prompts and write the output.

    Args:
        holds: the model whose weights the servers have, where it is not the one that they were started with.

    Raises:
        UserError: what is wrong with prompts, servers or what is there already.
    """
    args, servers = with_date(args, args.output_dir), servers_of(args)
    settings, inputs = sampling.shaping(args, "tokenizer")
    there = Path(args.output_dir).exists() and not args.overwrite
    records = [] if there else sampling.load_prompts(args)  # bad ones are refused before anything is written
    async with client() as session:
        try:
            model, root, limit = serves = await agree(session, servers)
            inputs["model"] = holds or root or model
        except UserError:
            if not there:
                raise  # a finished output needs no server any more
        output = Output(args.output_dir, "generation/gen_hf.py", settings, inputs, args.overwrite)
        if output.complete:
            print(f"{args.output_dir} is complete, nothing to do")
            return
        before = output.manifest.get("max_model_len", limit)
        if output.done and before != limit:  # it decides what is too long, and how long an answer may be
            raise UserError(
                f"{args.output_dir} is half done with servers of max_model_len {before}, now it is {limit}; "
                "start them as before, choose another --output_dir or give --overwrite"
            )
        output.manifest["max_model_len"] = limit
        write_json(beside(args.output_dir, ".manifest.json"), output.manifest)
        if args.tokenizer not in (model, root, holds):
            print(f"note: the servers serve {model}, the tokenizer is {args.tokenizer}'s")
        tokenizer = models.load_tokenizer(args.tokenizer, args.revision, args.trust_remote_code)
        template = ChatTemplate(tokenizer, args)
        stops = sampling.stop_ids(args.tokenizer, template, args)
        prompts = sampling.Prompts(args, template, output, limit, records)
        left = len(prompts.items)
        if output.done:
            print(f"continuing: {count(len(output.done), 'record is', 'records are')} there, {left} to do")
        requests = ((item, sampling.requests_of(args, item, stops, limit)) for item in prompts.items)
        progress = Progress(left, "generate", "prompts")
        work = Run(args, session, servers, serves, output, progress)
        if prompts.items:
            await check_tokenizer(work, template, prompts.items[0])
            await work.all(requests)
        seconds = progress.close()
    prompts.finish(seconds)
    if work.tokens:
        print(f"sampled {work.tokens} tokens in {duration(seconds)}, {work.tokens / seconds:.0f} tokens/s")


def main():
    args = parse(Arguments, __doc__)
    sampling.check_sampling(args)
    models.check_model(args.tokenizer, "--tokenizer")
    check(args)
    asyncio.run(generate(args))


if __name__ == "__main__":
    run(main)
