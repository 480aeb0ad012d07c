"""The model card as the hub's own reader sees it, the last check of a saved model, and pushing to a stand-in
of the hub.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import hub_stub
import huggingface_hub
import micro
import pytest
import torch
import training
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from training import ROOT, read_json, start, weights

from common.chat import ChatTemplate
from common.cli import UserError
from dpo_iteration import card, hub, run_dpo, saved
from dpo_iteration.saved import check_saved, store_once

FEW = "--bf16 false --max_steps 2 --eval_fraction 0.25 --save_steps 1 --beta 0.2"


def write_manifest(path, script, inputs, **settings):
    marks = {key: {"path": str(name)} for key, name in inputs.items()}
    made = {"script": script, "complete": True, "settings": settings, "inputs": marks}
    path.with_suffix(".manifest.json").write_text(json.dumps(made))


@pytest.fixture(scope="module")
def work(work):
    """With manifests that name reward model, answers, prompts, and a start of the hub's."""
    answers = {"dataset_name_or_path": work / "generated.jsonl", "reward_name_or_path": "owner/reward-model"}
    write_manifest(work / "rewarded.jsonl", "annotate_data/get_rewards.py", answers)
    asked = {"dataset_name_or_path": "owner/prompts", "model_name_or_path": "owner/sft"}
    write_manifest(work / "generated.jsonl", "generation/get_hf2.py", asked)
    write_manifest(work / "policy", "dpo_iteration/run_dpo.py", {"model_name_or_path": "owner/sft"})
    return work


@pytest.fixture(scope="module")
def stub():
    with hub_stub.serving() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(work, stub):
    """What run_dpo.py said that trained `work`/trained, a policy with adapters, and pushed it to the stub."""
    to = "--push_to_hub true --hub_model_id dpo --hub_private_repo true --hub_strategy every_save"
    words = training.argv(work, "trained", FEW, "--use_peft true", to, "--hub_token hf_secret")
    return start(*words, HF_HUB_DISABLE_TELEMETRY="1", HF_TOKEN="", **stub.environment)


def test_the_hub_reads_the_card(work, pushed):
    data = ModelCard.load(work / "trained" / "README.md").data
    metrics = read_json(work / "trained.manifest.json")["metrics"]
    assert data.base_model == "owner/sft" and data.datasets == ["owner/prompts"]
    assert data.tags == ["dpo", "online-rlhf", "trl", "lora"]
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.model_name == "trained"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "loss": pytest.approx(metrics["eval_loss"], abs=1e-6),
        "accuracy": metrics["eval_rewards/accuracies"],
        "margin": pytest.approx(metrics["eval_rewards/margins"], abs=1e-6),
    }


def test_the_card_says_what_was_done(work, pushed):
    text, manifest = (work / "trained/README.md").read_text(), read_json(work / "trained.manifest.json")
    counts = manifest["counts"]
    for row in (
        "base model | owner/sft",
        "iteration | 2",
        f"previous iterates | {work / 'policy'}",
        "rewards from | owner/reward-model",
        f"pairs trained on | {counts['train_pairs']}",
        f"pairs held out | {counts['eval_pairs']}",
        "prompts skipped | none",
        f"files | {work / 'rewarded.jsonl'}",
        "beta | `0.2`",
        f"loss | {manifest['metrics']['loss']:.4f} |",
        "use_peft | `True` |",
    ):
        assert f"| {row}" in text, row
    assert "python dpo_iteration/run_dpo.py " in text and "--beta 0.2" in text
    assert f"trl {manifest['versions']['trl']}" in text and "Trained by 1 process:" in text
    assert str(ROOT) not in text.replace(str(ROOT / "configs"), "")


def test_the_card_names_the_batch_that_few_pairs_leave(train, capsys):
    words = "--max_steps 1 --per_device_train_batch_size 1 --gradient_accumulation_steps null"
    out = train("halved", words, "--global_batch_size 128")
    [per_step] = re.findall(r"are few for steps of 128: (\d+) per optimizer step", capsys.readouterr().out)
    assert f"| pairs_per_step | `{per_step}` |" in (out / "README.md").read_text()
    manifest = read_json(f"{out}.manifest.json")  # what was asked for shapes the model, what was taken counts
    assert manifest["settings"]["pairs_per_step"] == 128
    assert manifest["counts"]["pairs_per_step"] == int(per_step) < 128


def test_names_of_the_hub_and_lineage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name, before in (("models/iter1", "owner/sft"), ("models/iter2", "models/iter1")):
        write_manifest(tmp_path / name, "dpo_iteration/run_dpo.py", {"model_name_or_path": before})
    assert card.ancestry("models/iter2") == ["owner/sft", "models/iter1", "models/iter2"]
    names = ("owner/sft", "models/iter1", "./a/b", "a/b/c")
    assert [name for name in names if card.on_hub(name)] == ["owner/sft"]
    (tmp_path / "models" / "iter2.manifest.json").write_text("{torn")
    assert card.ancestry("models/iter2") == ["models/iter2"]


def test_every_model_that_answered_is_named(tmp_path):
    """Also those of a mixture, an engine's or the servers'."""
    rewarded = [tmp_path / f"rewarded{i}.jsonl" for i in (1, 2)]
    inputs = {"model_name_or_path": "iter1/model", "model_name_or_path of previous": "owner/sft"}
    for name, more in zip(rewarded, (inputs, {"tokenizer": "t", "model": "iter2/model"})):
        made = name.with_name(f"of_{name.name}")
        write_manifest(made, "generation/join_parts.py", {"dataset_name_or_path": "p"} | more)
        write_manifest(name, "annotate_data/get_rewards.py", {"dataset_name_or_path": made})
    assert card.answered_by(list(map(str, rewarded))) == ["iter1/model", "owner/sft", "iter2/model"]


@pytest.mark.parametrize("launched", [False, True])
def test_the_command_is_the_one_that_was_typed(tmp_path, launched):
    """Alone, and under a launcher that is installed as accelerate is (test_run_dpo.py has accelerate itself).
    A shell above, which was told all in one word, is none. The token is not shown.
    """
    script = tmp_path / "run_dpo.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom dpo_iteration import card\n"
        "print('typed:', card.command(sys.argv, card.launcher(sys.argv)))\n"
    )
    command, shown = [sys.executable], "python"
    if launched:
        accelerate = tmp_path / "bin" / "accelerate"
        accelerate.parent.mkdir()
        code = "import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[4:]])\n"
        accelerate.write_text(f"#!{sys.executable}\n{code}")
        accelerate.chmod(0o755)
        words = "launch --config_file configs/ddp.yaml"
        command, shown = [accelerate, *words.split()], f"accelerate {words}"
    words = [*map(str, command), str(script), "a.yaml", "--hub_token", "secret", "--run_name", "two words"]
    shell = ["bash", "-c", f"{shlex.join(words)}; true"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=100)
    line = next((line for line in done.stdout.splitlines() if line.startswith("typed: ")), done.stderr)
    assert line == f"typed: {shown} dpo_iteration/run_dpo.py a.yaml --hub_token … --run_name 'two words'"
    assert card.command(["run_dpo.py", "--hub_token=secret"]) == "dpo_iteration/run_dpo.py --hub_token=…"
    assert card.launcher(["run_dpo.py", "of", "nobody"]) == []


# The last check.


def change_weights(folder, **changed):
    """Put weights (None: no weight) in the place of those in the folder's file; `_` in a name is a dot."""
    held = weights(folder) | {name.replace("_", "."): weight for name, weight in changed.items()}
    kept = {name: weight for name, weight in held.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_a_saved_model_may_be_read_by_whom_the_umask_lets(work, tmp_path):
    """safetensors 0.8 writes files of mode 600, so that nobody else could start from the model."""
    shutil.copytree(work / "policy", tmp_path / "model")
    for umask in (0o022, 0o027):
        (tmp_path / "model/model.safetensors").chmod(0o600)
        before = os.umask(umask)
        try:
            check_saved(tmp_path / "model")
        finally:
            os.umask(before)
        assert (tmp_path / "model/model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


INDEX = '{"weight_map": {"a": "model-1.safetensors"}}'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: change_weights(f, model_norm_weight=None), "lacks model.norm.weight"),
        (lambda f: change_weights(f, extra=torch.ones(2)), "has too many: extra"),
        (lambda f: change_weights(f, model_norm_weight=torch.ones(3)), "another shape: model.norm.weight"),
        (
            lambda f: change_weights(f, model_norm_weight=torch.full((64,), torch.nan)),
            "not finite in model.norm.weight",
        ),
        (lambda f: os.truncate(f / "model.safetensors", 50000), "model.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), r"has no \*.safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text(INDEX), "the files differ in model"),
        (lambda f: (f / "config.json").write_text("{}"), "has no config that loads"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "has no tokenizer that loads"),
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
    ],
)
def test_a_spoiled_model_is_refused_by_what_is_wrong(work, tmp_path, change, message):
    shutil.copytree(work / "policy", tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        check_saved(tmp_path / "model")


@pytest.mark.parametrize(
    ("family", "architecture", "more"),
    [
        ("llama3", "llama", {"tie_word_embeddings": True}),
        ("gemma", "gemma2", {}),
        ("llama3", "mixtral", {"num_local_experts": 4}),
    ],
)
def test_whole_models_pass_whatever_their_files_call_the_weights(tmp_path, family, architecture, more):
    check_saved(micro.make_policy(tmp_path / "model", family, architecture, **more))


@pytest.mark.parametrize("shards", [1, 2, 3], ids=["one file", "with others", "a shard of its own"])
def test_the_second_copy_of_a_tied_weight_is_taken_out(tmp_path, shards):
    """As DeepSpeed's users save it; a head that differs, or whose config is not tied, stays."""
    model = micro.make_policy(tmp_path / "model", tie_word_embeddings=True)
    whole = weights(model)

    def stored_once(head):
        """The weights after `store_once` of a model whose file, or first shard, holds `head` too."""
        for file in model.glob("model*"):
            file.unlink()
        parts = [{"lm_head.weight": head}, {}, {}][:shards]
        for i, (name, weight) in enumerate(whole.items()):
            parts[i % (shards - 1) + 1 if shards == 3 else i % shards][name] = weight.clone()
        places = {}
        for i, part in enumerate(parts, 1):
            file = "model.safetensors" if shards == 1 else f"model-{i:05}-of-{shards:05}.safetensors"
            save_file(part, model / file, {"format": "pt"})
            places |= dict.fromkeys(part, file)
        if shards > 1:
            index = {"metadata": {}, "weight_map": places}
            (model / "model.safetensors.index.json").write_text(json.dumps(index))
        store_once(model)
        return {name: one for file in model.glob("*.safetensors") for name, one in load_file(file).items()}

    embeddings = whole["model.embed_tokens.weight"]
    assert training.furthest(stored_once(embeddings.clone()), whole) == 0
    check_saved(model)
    assert "lm_head.weight" in stored_once(embeddings + 1)
    config = read_json(model / "config.json") | {"tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    assert "lm_head.weight" in stored_once(embeddings.clone())


def test_a_tied_weight_is_known_under_the_names_of_its_files(tmp_path):
    """Gemma 3 with its image part: `language_model.lm_head.weight` in the file, `lm_head.weight` in the
    model.
    """
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shape | {"vocab_size": 288, "num_key_value_heads": 1, "head_dim": 16}
    image = shape | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=image, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "once")
    copies = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "twice", state_dict=copies)
    once, twice = (set(weights(tmp_path / name)) for name in ("once", "twice"))
    assert twice - once == {"language_model.lm_head.weight"}
    store_once(tmp_path / "twice")
    assert set(weights(tmp_path / "twice")) == once


# What goes with a model.


def test_a_processor_loads_from_a_trained_folder_as_from_its_start(tmp_path):
    """A real one, of audio, since those of images want torchvision here."""
    from transformers import AutoProcessor, AutoTokenizer, Qwen2AudioProcessor, WhisperFeatureExtractor

    start, made = micro.make_policy(tmp_path / "start"), tmp_path / "made"
    tokenizer = AutoTokenizer.from_pretrained(start)
    Qwen2AudioProcessor(feature_extractor=WhisperFeatureExtractor(), tokenizer=tokenizer).save_pretrained(
        start
    )
    copied = {"processor_config.json", "video_preprocessor_config.json", "tekken.json"}
    for name in ("video_preprocessor_config.json", "tekken.json", "modeling_mine.py", "README.md"):
        (start / name).write_text(f"{{}} # {name}")
    tokenizer.save_pretrained(made)
    (made / "modeling_mine.py").write_text("# transformers' own copy")
    written = {file.name for file in made.iterdir()}
    saved.copy_companions(start, made)
    assert {file.name for file in made.iterdir()} == written | copied
    assert (made / "modeling_mine.py").read_text() == "# transformers' own copy"
    for name in ("tekken.json", "video_preprocessor_config.json"):
        assert (made / name).read_text() == (start / name).read_text()
        (start / name).unlink(), (made / name).unlink()
    before, after = AutoProcessor.from_pretrained(start), AutoProcessor.from_pretrained(made)
    assert type(after) is type(before) and after.to_dict() == before.to_dict()


@pytest.mark.parametrize(
    ("family", "before", "more", "expected"),
    [
        ("llama3", None, [], ["<|end_of_text|>", "<|eot_id|>"]),
        (
            "llama3",
            ["<|eot_id|>"],
            ["<|start_header_id|>"],
            ["<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>"],
        ),
        ("gemma", "<eos>", [], ["<eos>", "<end_of_turn>"]),
        ("chatml", "<|im_end|>", [], "<|im_end|>"),
    ],
)
def test_the_generation_config_names_every_stop(tmp_path, family, before, more, expected):
    tokenizer = micro.make_tokenizer(family)
    ids, others = tokenizer.convert_tokens_to_ids, {}
    if before is not None:
        others = {"temperature": 0.6, "of_a_later_version": 1}
        values = others | {"eos_token_id": ids(before)}
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
    found = saved.generation_config(tmp_path, ChatTemplate(tokenizer), stops=ids(more))
    assert found["eos_token_id"] == ids(expected) and found["pad_token_id"] == tokenizer.pad_token_id
    assert others.items() <= found.items()


def test_the_stops_that_were_given_when_sampling_are_found(tmp_path):
    for i, policy in enumerate(("mine", "another")):
        answers = {"dataset_name_or_path": tmp_path / f"generated{i}.jsonl"}
        write_manifest(tmp_path / f"rewarded{i}.jsonl", "annotate_data/get_rewards.py", answers)
        sampled = {"model_name_or_path": policy}
        write_manifest(tmp_path / f"generated{i}.jsonl", "generation/get_hf2.py", sampled, eos_ids=[i + 7])
    served = {"tokenizer": "mine", "model": "mine"}
    write_manifest(tmp_path / "served.jsonl", "generation/gen_hf.py", served, eos_ids=[5])
    files = [str(tmp_path / f"{name}.jsonl") for name in ("rewarded0", "rewarded1", "served", "without")]
    assert card.sampling_stops(SimpleNamespace(train_dir=files, model_name_or_path="mine")) == [5, 7]


def test_a_model_that_fails_the_check_is_not_complete(work, train, monkeypatch):
    def refuse(*args):
        raise UserError("the saved model is wrong")

    monkeypatch.setattr(run_dpo, "check_saved", refuse)
    with pytest.raises(UserError, match="the saved model is wrong"):
        train("wrong", FEW)
    assert read_json(work / "wrong.manifest.json")["complete"] is False
    assert list((work / "wrong").glob("checkpoint-*")), "a second start could not continue"


# The hub, which cannot be reached from here; see tests/hub_stub.py.


def test_push_uploads_the_merged_model_with_our_card(work, stub, pushed):
    folder = work / "trained"
    assert "pushed to " in pushed.stdout
    assert {(asked["name"], asked["visibility"]) for asked in stub.created} == {("dpo", "private")}
    here = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert set(stub.files) == set(here) > {"model.safetensors", "adapter/adapter_config.json"}
    assert not {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"} & set(here)
    assert stub.files["model.safetensors"] == here["model.safetensors"]
    summaries = [lines[0]["value"]["summary"] for lines in stub.commits]
    assert summaries[-1] == "End of training"
    assert any(summary.startswith("Training in progress") for summary in summaries[:-1])
    early = {line["value"].get("path") for lines in stub.commits[:-1] for line in lines}
    assert "adapter_config.json" in early, "a push on the way has left nothing to be cleared away"
    # The token is in nothing that was written or sent as a file.
    assert not any(b"hf_secret" in content for content in [*here.values(), *stub.large.values()])
    assert not any("hf_secret" in json.dumps(lines) for lines in stub.commits)
    assert "hf_secret" not in (work / "trained.manifest.json").read_text() + pushed.stdout + pushed.stderr


def test_a_hub_that_refuses(work, train, monkeypatch):
    """A wrong token is told before a model is loaded; a push that fails leaves a complete model, and the
    command to push it.
    """

    def refuse(*args, **kwargs):
        raise OSError("Invalid username or password.")

    monkeypatch.setattr(huggingface_hub, "whoami", refuse)
    monkeypatch.setattr(run_dpo, "add_reference", lambda *args: pytest.fail("too late"))
    message = "cannot make or reach the repository dpo; log in with `hf auth login`: OSError: Invalid"
    with pytest.raises(UserError, match=message):
        train("refused", FEW, "--push_to_hub true --hub_model_id dpo")
    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    settings = SimpleNamespace(hub_revision=None)
    trainer = SimpleNamespace(hub_model_id="me/dpo", _finish_current_push=lambda: None, args=settings)
    message = "^out is complete but was not pushed: OSError: .*; later: hf upload me/dpo out$"
    with pytest.raises(UserError, match=message):
        hub.push(trainer, "out")
