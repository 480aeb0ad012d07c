"""OpenRLHF's published wheel for tests: its real parser and validation, and a STUB where it would use GPUs.

`captured` runs the real cli/train_ppo_ray.py from the wheel, as `__main__`, with ray and OpenRLHF's Ray
actors mocked, until it has validated its arguments. `install` makes a folder for PYTHONPATH in which that
same file is followed by STUB_TRAINING below, which trains nothing: it writes checkpoints and a model folder
as OpenRLHF's source says, and asks for rewards as its agent.py does.
"""

import argparse
import functools
import os
import sys
import types
import zipfile
from pathlib import Path
from unittest import mock

import yaml

from dpo_iteration.memory import GIB, shape_like
from ppo.openrlhf import arguments as openrlhf_arguments
from ppo.openrlhf.placement import Machine, place
from ppo.openrlhf.plan import OPENRLHF

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"model_size_b": 0.5}
# What the command's module imports and a machine without GPUs lacks.
MOCKED = (
    "ray ray.util ray.util.placement_group openrlhf openrlhf.utils openrlhf.trainer openrlhf.trainer.ray "
    "openrlhf.trainer.ray.launcher openrlhf.trainer.ray.ppo_actor openrlhf.trainer.ray.ppo_critic"
)

STUB_TRAINING = """
# STUB: no OpenRLHF training runs here. It leaves what OpenRLHF 0.11.2 leaves, and tells that it is a stub.
import json, os, shutil, sys, time, urllib.request
from pathlib import Path


def reward_of(args, record):
    query = record["prompt"] + "a STUB answer.<|eot_id|>"
    urls = args.reward.remote_url
    if not urls:
        return None
    body = json.dumps({"query": [query], "prompts": [record["prompt"]], "labels": [record["label"]]}).encode()
    request = urllib.request.Request(urls[0], body, {"Content-Type": "application/json"})
    # Its aiohttp does not look for proxies.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return json.load(direct.open(request, timeout=60))["rewards"]


def log(args, step, reward):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    global writer
    if writer is None:
        writer = EventFileWriter(os.path.join(args.logger.tensorboard_dir, args.logger.wandb.run_name))
    told = {"kl": 0.01 * step, "rollout/reward_mean": reward or 0.5, "rollout/response_length_mean": 6.0,
            "rollout/num_samples": 8.0, "timing/step_total": 2.0, "timing/generation": 1.5, "actor_lr": 1e-6}
    for tag, value in told.items():
        summary = Summary(value=[Summary.Value(tag="train/" + tag, simple_value=value)])
        writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
    writer.flush()


writer = None


def train(args):
    lines = [json.loads(line) for line in Path(args.data.prompt_dataset).read_text().split("\\n")[:-1]]
    rollouts = len(lines) // args.rollout.batch_size * args.train.num_episodes
    first, checkpoints = 0, Path(args.ckpt.path)
    roles = ("_actor", "_critic") if args.critic.model_name_or_path else ("_actor",)
    if args.ckpt.load_enable and (checkpoints / "_actor").exists():
        at = {(checkpoints / role / "latest").read_text() for role in roles}
        assert len(at) == 1, at
        first = int(at.pop().removeprefix("global_step"))
    print(f"STUB reward {reward_of(args, lines[0])}, from {first} to {rollouts}", flush=True)
    for step in range(first + 1, rollouts + 1):
        print(f"STUB step {step}", flush=True)
        log(args, step, None)
        if args.ckpt.save_steps > 0 and step % args.ckpt.save_steps == 0:
            for role in roles:
                folder = checkpoints / role / f"global_step{step}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "state").write_text("STUB")
                (folder.parent / "latest").write_text(folder.name)
                if os.environ.get("STUB_TORN") == f"{role}{step}":
                    os._exit(9)
        if os.environ.get("STUB_FAIL") == str(step):
            import traceback  # the real one's bars come behind its traceback
            try:
                raise RuntimeError("STUB: CUDA out of memory")
            except RuntimeError:
                traceback.print_exc()
            sys.stderr.flush()
            print("\\033[36m(Actor pid=7)\\033[0m Train epoch [1/1]:   0%| | 0/32", flush=True)
            os._exit(1)
        if os.environ.get("STUB_HANG") == str(step):
            print("STUB hangs", flush=True)
            time.sleep(600)
    ignored = shutil.ignore_patterns("chat_template*", "generation*")
    shutil.copytree(args.actor.model_name_or_path, args.ckpt.output_dir, ignore=ignored)
    config = Path(args.ckpt.output_dir, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_cache": False, "pad_token_id": 7}))


"""


def settings(**more):
    """configs/ppo_llama3_8b.yaml as run_openrlhf.py gets it."""
    run = yaml.safe_load((ROOT / "configs/ppo_llama3_8b.yaml").read_text())
    decided = {key: run[key] for key in ("model_name_or_path", "reward_name_or_path", "seed", "model_size_b")}
    decided |= {key: run["generation"][key] for key in ("max_input_length", "max_new_tokens")}
    decided |= {"dataset_name_or_path": run["prompts"], "output_dir": "out/model"}
    return run["ppo"] | run["openrlhf"] | decided | more


def arguments(**more):
    return openrlhf_arguments.arguments(settings(**more))


def placed(args, gpus, gib=80, billions=8.03, reward=True, memory=None):
    """(Placement, note) of models of so many billion parameters on nodes of up to 8 GPUs of `gib` GiB."""
    shape = shape_like(billions)
    critic = shape if "critic" in args.learners else None
    shapes = {"actor": shape, "ref": shape, "critic": critic, "reward": shape if reward else None}
    return place(args, Machine(gpus, min(gpus, 8), gib * GIB, memory and memory * GIB), shapes)


def fake_gpus(folder, count, gib=80):
    """PATH of a machine whose nvidia-smi, in `folder`/bin, lists so many GPUs."""
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    listed = "".join(f"GPU {i}: fake\n" for i in range(count))
    sizes = f"{gib * 1024}\n" * count
    cases = f'-L) printf "{listed}" ;;\n*memory.total*) printf "{sizes}" ;;'
    smi.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}\nesac\n')
    smi.chmod(0o755)
    return f"{smi.parent}:{os.environ['PATH']}"


def wheel():
    """The wheel that tests/run.sh has fetched."""
    tools = Path(os.environ.get("TOOLS") or ROOT / ".envs" / "tools")
    found = sorted((tools / "wheels").glob("openrlhf-0.11.2-*.whl"))
    assert found, f"no openrlhf-0.11.2-*.whl in {tools / 'wheels'}: start the tests with bash tests/run.sh"
    return found[-1]


def unzip(folder):
    """The package's folder, unzipped; returns the folder that holds `openrlhf`."""
    with zipfile.ZipFile(wheel()) as archive:
        archive.extractall(folder)
    return next(folder.glob("openrlhf-*.data")) / "purelib"


class Validated(Exception):
    """Carries the arguments out of the command's module, parsed and validated."""


def captured(source, arguments, monkeypatch):
    """Arguments (nested namespace) that the real module at `source`/openrlhf/cli has parsed and validated.

    An abbreviated option, which argparse would take, ends as an unknown one.
    """

    def get_strategy(args):
        raise Validated(args)

    loaded = {name: mock.MagicMock() for name in MOCKED.split()}
    loaded["openrlhf.utils"].get_strategy = get_strategy
    config = types.ModuleType("openrlhf.utils.config")
    exec((source / "openrlhf/utils/config.py").read_text(), config.__dict__)
    loaded["openrlhf.utils.config"] = config
    path = source / "openrlhf/cli/train_ppo_ray.py"
    parser = functools.partialmethod(argparse.ArgumentParser.__init__, allow_abbrev=False)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "__init__", parser)
        for name, module in loaded.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(sys, "argv", [str(path), *arguments])
        try:
            exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
        except Validated as found:
            return found.args[0]
    raise AssertionError("the command's module ended without training")


def install(source, folder):
    """Put the real parser with the stub training behind it, and two packages in name, into `folder`."""
    for package, version in (("openrlhf", OPENRLHF), ("flash_attn", "2.8.3")):
        info = folder / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    # A machine with GPUs has more cores than the tests'.
    (folder / "sitecustomize.py").write_text("import os\nos.sched_getaffinity = lambda pid: set(range(16))\n")
    for name in ("openrlhf", "openrlhf/cli", "openrlhf/utils"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "__init__.py").write_text("")
    (folder / "openrlhf/utils/config.py").write_text((source / "openrlhf/utils/config.py").read_text())
    text = (source / "openrlhf/cli/train_ppo_ray.py").read_text()
    head, main = text.split("\ndef train(args):", 1)
    main = main[main.index('if __name__ == "__main__":') :]
    (folder / "openrlhf/cli/train_ppo_ray.py").write_text(
        "import argparse\nfrom datetime import datetime\n" + STUB_TRAINING + main
    )
    return folder
