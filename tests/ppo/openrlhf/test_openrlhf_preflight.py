"""What would end a launch after minutes, or never: versions, clusters, cores, tokens of the reward model."""

import micro
import pytest
from openrlhf_stub import arguments

from common.cli import UserError
from dpo_iteration.memory import GIB
from ppo.openrlhf import preflight
from ppo.openrlhf.preflight import differs, has_value_head
from ppo.openrlhf.prompts import load_tokenizer


def test_versions_are_looked_at(monkeypatch):
    there = dict(preflight.pins())
    monkeypatch.setattr(preflight, "installed", lambda package: there.get(package))
    preflight.check_versions()
    wrong = {
        "openrlhf": ("0.11.0", "openrlhf 0.11.0 is installed, 0.11.2 is needed"),
        "flash-attn": (None, "--no-build-isolation"),
        "ray": (None, "make_envs ppo_train"),
        "vllm": ("0.28.1", "0.29.0 is needed"),
        "transformers": ("5.19.0", "5.15.0"),
    }
    for package, (version, expected) in wrong.items():
        there[package] = version
        with pytest.raises(UserError, match=expected):
            preflight.check_versions()
        there[package] = preflight.pins()[package]
    there["vllm"] = "0.30.0+cu129"
    preflight.check_versions()


def test_the_requirements_are_what_the_wheel_asks_for(source):
    asked = next(source.parents[1].glob("*.dist-info")).joinpath("METADATA").read_text()
    pins = preflight.pins()
    assert {"openrlhf", "vllm", "ray", "deepspeed", "transformers", "flash-attn"} <= pins.keys()
    for package in pins.keys() - {"openrlhf", "pyyaml"}:
        named = (f"{package}=={pins[package]}", f"{package}[default]=={pins[package]}")
        assert any(name in asked for name in named), package


def test_ray_clusters(monkeypatch):
    args = arguments(ray_address="head:6379")
    monkeypatch.setattr(preflight, "cluster_gpus", lambda address: [0, 8, 8])
    assert preflight.count_gpus(args)[:2] == (16, 8)
    args.num_gpus = 24
    with pytest.raises(UserError, match="num_gpus 24, but 16 GPUs are of the Ray cluster head:6379"):
        preflight.count_gpus(args)
    monkeypatch.setattr(preflight, "cluster_gpus", lambda address: [4, 8])
    with pytest.raises(UserError, match="nodes have 4, 8 GPUs"):
        preflight.count_gpus(arguments(ray_address="head:6379"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="no Ray cluster answers"):
        preflight.cluster_gpus("127.0.0.1:1")


def test_a_ray_cluster_that_nobody_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "somebodys:6379")
    with pytest.raises(UserError, match="RAY_ADDRESS is somebodys:6379: .* set ray_address somebodys:6379"):
        preflight.check_ray(arguments())
    assert preflight.check_ray(arguments(ray_address="ours:6379")) == []
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert preflight.check_ray(arguments()) == []
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("10.0.0.1:6379")
    assert "ray stop" in preflight.check_ray(arguments())[0]


def test_too_few_cores_for_ray(monkeypatch):
    """Ray waits for ever for a core that is not there."""
    monkeypatch.setattr(preflight.os, "sched_getaffinity", lambda pid: set(range(8)))
    with pytest.raises(UserError, match="on 8 GPUs needs 10 CPU cores and this process may use 8"):
        preflight.check_cores(arguments(), 8)
    preflight.check_cores(arguments(), 6)
    preflight.check_cores(arguments(ray_address="head:6379"), 8)


def test_the_memory_of_a_node(monkeypatch):
    assert preflight.machine_memory(arguments(machine_memory_gib=64)) == 64 * GIB
    assert preflight.machine_memory(arguments(ray_address="head:6379")) is None
    monkeypatch.setattr(preflight, "visible_gpus", lambda: ["0"])
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert preflight.machine_memory(arguments()) == pytest.approx(total, rel=0.01)


def test_tokens_and_templates_are_compared(models, tmp_path):
    def loaded(name, template=None):
        tokenizer = load_tokenizer(str(models[name]))
        tokenizer.chat_template = template or tokenizer.chat_template
        return tokenizer

    policy = loaded("policy")
    mute = policy.chat_template.replace("{{ bos_token }}", "")
    assert differs(policy, loaded("same")) is None
    assert "another id or none" in differs(policy, loaded("chatml"))
    assert "write the same turns differently" in differs(
        policy, loaded("same", policy.chat_template.replace("\n\n", "\n"))
    )
    bare = loaded("same")  # adds no BOS itself; the template writes it, whoever else would
    bare.add_bos_token, bare._tokenizer.post_processor = False, None
    assert differs(policy, bare) is None
    bare.chat_template = mute
    assert differs(loaded("policy", mute), bare) is None
    assert "other special tokens in front" in differs(loaded("policy", mute), loaded("same", mute))
    grown = loaded("same")
    grown.add_special_tokens({"pad_token": "[PAD]"})  # as FsfairX has
    assert differs(policy, grown) is None
    no_bos = micro.make_tokenizer(adds_bos=False)  # one tokenizer for both, as the tiny models have
    assert differs(no_bos, no_bos) is None and differs(policy, no_bos) is None
    chatml = loaded("chatml")
    assert "behind a turn" in differs(chatml, chatml)
    assert has_value_head(models["same"], "score") and has_value_head("org/name", "score") is None
    assert has_value_head(models["policy"], "score") is False
    policy.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template: put a chat_template.jinja"):
        load_tokenizer(str(tmp_path / "bare"))
