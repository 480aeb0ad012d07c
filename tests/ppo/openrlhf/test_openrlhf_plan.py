"""What would end a launch after minutes, or never: GPUs, clusters, cores, tokens of the reward model."""

import os
import re
from pathlib import Path

import micro
import pytest
from openrlhf_stub import ROOT, arguments

from common.chat import ChatTemplate
from common.cli import UserError
from common.models import load_tokenizer
from ppo.openrlhf import plan
from ppo.openrlhf.placement import Machine


def test_the_requirements_are_what_the_wheel_asks_for(source):
    asked = next(source.parents[1].glob("*.dist-info")).joinpath("METADATA").read_text()
    lines = (ROOT / "ppo/requirements-ppo.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+(?:\[default\])?)(?:\[vllm\])?==([\w.]+)", lines, re.MULTILINE))
    assert pins.pop("openrlhf") == plan.OPENRLHF and pins.pop("pyyaml") and len(pins) == 5
    assert all(f"{package}=={version}" in asked for package, version in pins.items())


def test_what_is_installed(monkeypatch):
    there = {"openrlhf": plan.OPENRLHF, "flash-attn": "2.8.3"}
    monkeypatch.setattr(plan, "installed", there.get)
    assert plan.check_installed() == []
    there["openrlhf"] = "0.12.0"
    assert "openrlhf 0.12.0 is installed" in plan.check_installed()[0]
    there["flash-attn"] = None
    with pytest.raises(UserError, match="flash-attn is not installed .*make_envs ppo_train"):
        plan.check_installed()


def test_ray_clusters(monkeypatch):
    args = arguments(ray_address="head:6379")
    monkeypatch.setattr(plan, "cluster_gpus", lambda address: [8, 8])
    found = plan.machine_of(args)
    assert (found.gpus, found.gpus_per_node, found.memory) == (16, 8, None)
    args.num_gpus = 24
    with pytest.raises(UserError, match="num_gpus 24, but 16 GPUs are of the Ray cluster head:6379"):
        plan.machine_of(args)
    monkeypatch.setattr(plan, "cluster_gpus", lambda address: [4, 8])
    with pytest.raises(UserError, match="nodes have 4, 8 GPUs"):
        plan.machine_of(arguments(ray_address="head:6379"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="no Ray cluster answers"):
        plan.cluster_gpus("127.0.0.1:1")


def test_a_ray_cluster_of_our_own(monkeypatch):
    """It is asked, though its GPUs are known: a machine may have fewer. This machine is one of it."""
    args = arguments(ray_address="own", num_gpus=4, gpus_per_node=2)
    with pytest.raises(UserError, match="ray_address own: .* sbatch configs/ppo.slurm"):
        plan.machine_of(args)
    asked = []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:20000")
    monkeypatch.setattr(plan, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(plan, "gpu_memory", lambda: 80)
    monkeypatch.setattr(plan, "cluster_gpus", lambda address: asked.append(address) or [2, 2])
    found = plan.machine_of(args)
    assert (found.gpus, found.gpus_per_node, found.gpu) == (4, 2, 80 * plan.GIB) and found.memory
    assert asked == ["10.0.0.1:20000"]
    monkeypatch.setattr(plan, "cluster_gpus", lambda address: [2, 1])
    with pytest.raises(UserError, match="num_gpus 4, but 3 GPUs are of the Ray cluster 10.0.0.1:20000"):
        plan.machine_of(args)
    args.dry_run = True
    assert plan.machine_of(args) == found
    plan.check_surroundings(arguments(ray_address="own"), found)
    arguments(ray_address="own", reward_backend="server")  # as on one machine; on another's cluster not


def test_what_openrlhf_would_wait_for_or_join(monkeypatch):
    """Ray waits for ever for a core that is not there, and joins the cluster that a variable names."""
    monkeypatch.setattr(plan.os, "sched_getaffinity", lambda pid: set(range(8)))
    eight, six = Machine(8, 8, None, None), Machine(6, 6, None, None)
    with pytest.raises(UserError, match="on 8 GPUs needs 10 CPU cores and this process may use 8"):
        plan.check_surroundings(arguments(), eight)
    plan.check_surroundings(arguments(), six)
    monkeypatch.setenv("RAY_ADDRESS", "somebodys:6379")
    with pytest.raises(UserError, match="RAY_ADDRESS is somebodys:6379: .* set ray_address somebodys:6379"):
        plan.check_surroundings(arguments(), six)
    plan.check_surroundings(arguments(ray_address="ours:6379"), eight)
    monkeypatch.delenv("RAY_ADDRESS")
    note = Path(os.environ["RAY_TMPDIR"], "ray/ray_current_cluster")
    note.parent.mkdir()
    note.write_text("1.2.3.4:6379\n")
    with pytest.raises(UserError, match="names a Ray cluster at 1.2.3.4:6379: .* set ray_address 1.2.3.4"):
        plan.check_surroundings(arguments(), six)
    plan.check_surroundings(arguments(ray_address="1.2.3.4:6379"), six)


def test_tokens_and_templates_are_compared(models, monkeypatch):
    def loaded(name, template=None):
        tokenizer = load_tokenizer(str(models[name]))
        tokenizer.chat_template = template or tokenizer.chat_template
        return tokenizer

    def why(policy, reward, name="same", **more):
        monkeypatch.setattr(plan, "load_tokenizer", lambda *args, **kwargs: reward)
        return plan.why_not_local(
            arguments(reward_name_or_path=[str(models[name])], **more), ChatTemplate(policy)
        )

    policy = loaded("policy")
    mute = policy.chat_template.replace("{{ bos_token }}", "")
    assert why(policy, loaded("same")) is None
    assert "another id or none" in why(policy, loaded("chatml"))
    assert "reads other tokens" in why(policy, loaded("same", policy.chat_template.replace("\n\n", "\n")))
    bare = loaded("same")  # adds no BOS itself; the template writes it, whoever else would
    bare.add_bos_token, bare._tokenizer.post_processor = False, None
    assert why(policy, bare) is None
    bare.chat_template = mute
    assert why(loaded("policy", mute), bare) is None
    assert "reads other tokens" in why(loaded("policy", mute), loaded("same", mute))
    grown = loaded("same")
    grown.add_special_tokens({"pad_token": "[PAD]"})  # as FsfairX has
    assert why(policy, grown) is None
    no_bos = micro.make_tokenizer(adds_bos=False)  # one tokenizer for both, as the tiny models have
    assert why(no_bos, no_bos) is None and why(policy, no_bos) is None
    assert "behind a turn" in why(loaded("chatml"), loaded("chatml"))
    assert "no classifier" in why(policy, loaded("armorm"), "armorm")
    assert "no weights head.weight" in why(
        policy, loaded("same"), extra_flags={"ds.value_head_prefix": "head"}
    )


@pytest.fixture
def elsewhere(monkeypatch):
    """No GPUs are here, and the hub is out of reach."""

    def gone(name, **more):
        raise UserError(f"{name} is out of reach")

    for name, stand_in in (("visible_gpus", list), ("gpu_name", lambda: None), ("load_tokenizer", gone)):
        monkeypatch.setattr(plan, name, stand_in)


def test_a_reward_server_that_cannot_keep_up_is_told_with_the_sum(elsewhere, monkeypatch):
    """Planned for eight A100."""

    def told(*models, **more):
        how = {"num_gpus": 8, "gpu_memory_gib": 80, "model_size_b": 8.0, "dry_run": True} | more
        args = arguments(model_name_or_path="o/policy", reward_name_or_path=list(models), **how)
        notes = plan.plan(args).notes
        assert ("our reward server shares one of the GPUs that train" in notes) == (len(models) > 1)
        return [note for note in notes if "would keep up" in note]

    assert told("o/one") == []  # OpenRLHF's own model is on all GPUs
    [note] = told("o/one", "o/two", reward_weights=[1.0, 1.0])
    # 350 tokens at 2,500 a second and GPU; 2 operations for each of 550 tokens and 16e9 parameters.
    assert "1,024 responses in about 17s " in note and "scores them in about 2m08s" in note
    assert "550 tokens each × 2 × 16.0 billion" in note and "8 servers would keep up" in note
    assert "five times" not in note
    [note] = told("o/one", "o/two", reward_weights=[1.0, 1.0], samples_per_prompt=4)
    assert "in about 8m33s" in note and "after 180 s, five times in all; 8 servers" in note
    assert told("o/one", "o/two", reward_weights=[1.0, 1.0], reward_size_b=0.5) == []
    short = {"max_new_tokens": 50, "max_input_length": 50}
    [note] = told("o/one", "o/two", reward_weights=[1.0, 1.0], **short)
    assert "100 tokens each" in note
    monkeypatch.setattr(plan, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    [note] = told("o/one", "o/two", reward_weights=[1.0, 1.0])
    assert "989 TFLOPS of one H100" in note and "4 servers" in note


def test_every_model_of_a_reward_server_takes_its_memory(elsewhere):
    def sampling(*sizes):
        names = [f"o/{n}" for n in range(len(sizes))]
        more = {"reward_weights": [1.0] * len(names)} if names[1:] else {"reward_backend": "server"}
        how = {"num_gpus": 8, "gpu_memory_gib": 141, "model_size_b": 8.0, "dry_run": True, "zero_stage": 3}
        args = arguments(model_name_or_path="o/policy", reward_name_or_path=names, **how, **more)
        return int(re.search(r"about (\d+) GiB while training", plan.plan(args).notes[-1])[1])

    assert 14 <= sampling(8, 8) - sampling(8) <= 16
