"""A micro policy and one vLLM engine for all tests of generation in a process."""

import functools
import json
import sys
import tempfile
from pathlib import Path

import micro

from common import models
from generation import get_hf2


@functools.cache
def policy():
    """A folder with a micro Llama in fp32, made once a session."""
    return micro.make_policy(Path(tempfile.mkdtemp(prefix="policy-")) / "model")


@functools.cache
def shared_engine():
    """The engine as get_hf2 itself starts it, once a session."""
    args = get_hf2.Arguments(model_name_or_path=str(policy()), dtype="float32", kv_cache_gib=0.5)
    return get_hf2.start_engine(args, 512, 512)


def get_hf2_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["get_hf2.py", *map(str, argv)])
    get_hf2.main()


def arguments(prompts, output, **more):
    """The command line of a small run."""
    settings = {"model_name_or_path": policy(), "dataset_name_or_path": prompts, "output_dir": output}
    settings |= {"dtype": "float32", "K": 2, "max_new_tokens": 8} | more
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def records(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def write(path, *contents):
    rows = [{"prompt": c} if isinstance(c, str) else {"messages": c} for c in contents]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@functools.cache
def engine_vocabulary():
    return models.load_tokenizer(str(policy()))
