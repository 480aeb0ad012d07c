"""The model card as the hub's own reader sees it, the last check of a saved model, and pushing to a stand-in
of the hub.
"""

import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import micro
import pytest
import torch
import training
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from training import ROOT, read_json, start

from common.cli import UserError
from dpo_iteration import card, run_dpo, saved
from dpo_iteration.saved import check_saved, store_once

FEW = "--bf16 false --max_steps 2 --eval_fraction 0.25 --save_steps 1 --beta 0.2".split()


@pytest.fixture(scope="module")
def work(work):
    """Manifests that name reward model, answers and prompts."""
    folder = work
    marks = {
        "dataset_name_or_path": {"path": str(folder / "generated.jsonl")},
        "reward_name_or_path": {"path": "owner/reward-model"},
    }
    (folder / "rewarded.manifest.json").write_text(
        json.dumps({"complete": True, "settings": {}, "inputs": marks})
    )
    marks = {"dataset_name_or_path": {"path": "owner/prompts"}, "model_name_or_path": {"path": "owner/sft"}}
    (folder / "generated.manifest.json").write_text(
        json.dumps({"complete": True, "settings": {}, "inputs": marks})
    )
    # As if the policy were the first iterate of a model of the hub's.
    marks = {"model_name_or_path": {"path": "owner/sft"}}
    made = {"script": "dpo_iteration/run_dpo.py", "complete": True, "settings": {}, "inputs": marks}
    (folder / "policy.manifest.json").write_text(json.dumps(made))
    return folder


def argv(work, name, *more):
    return training.argv(work, name, *FEW, *more)


@pytest.fixture(scope="module")
def trained(work):
    done = start(*argv(work, "trained"))
    assert done.returncode == 0, done.stdout + done.stderr
    return work / "trained"


def test_the_hub_reads_the_card(work, trained):
    data, manifest = ModelCard.load(trained / "README.md").data, read_json(work / "trained.manifest.json")
    assert data.base_model == "owner/sft" and data.datasets == ["owner/prompts"]
    assert (
        data.library_name == "transformers" and data.pipeline_tag == "text-generation" and "dpo" in data.tags
    )
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    metrics = manifest["metrics"]
    assert found == {
        "loss": pytest.approx(metrics["eval_loss"], abs=1e-6),
        "accuracy": metrics["eval_rewards/accuracies"],
        "margin": pytest.approx(metrics["eval_rewards/margins"], abs=1e-6),
    }


def test_the_card_says_what_was_done(work, trained):
    text, manifest = (trained / "README.md").read_text(), read_json(work / "trained.manifest.json")
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
        "label_smoothing | `0.1`",
        f"loss | {manifest['metrics']['loss']:.4f} |",
    ):
        assert f"| {row}" in text, row
    assert (
        "dpo_iteration/run_dpo.py " in text
        and "--beta 0.2" in text
        and f"trl {manifest['versions']['trl']}" in text
    )
    assert f"trained by {1}" in text.lower() and str(ROOT) not in text.replace(str(ROOT / "configs"), "")
    assert "| use_peft | `False` |" in text and "lora_r" not in text


def test_names_of_the_hub_and_lineage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name, before in (("models/iter1", "owner/sft"), ("models/iter2", "models/iter1")):
        made = {
            "script": "dpo_iteration/run_dpo.py",
            "settings": {},
            "inputs": {"model_name_or_path": {"path": before}},
        }
        (tmp_path / f"{name}.manifest.json").write_text(json.dumps(made))
    assert card.ancestry("models/iter2") == ["owner/sft", "models/iter1", "models/iter2"]
    assert (
        card.on_hub("owner/sft")
        and not card.on_hub("models/iter1")
        and not card.on_hub("./a/b")
        and not card.on_hub("a/b/c")
    )
    (tmp_path / "models" / "iter2.manifest.json").write_text("{torn")
    assert card.ancestry("models/iter2") == ["models/iter2"]


def test_the_command_is_the_one_that_was_typed(tmp_path):
    """Alone, and under a launcher that is installed as accelerate is (test_run_dpo.py has accelerate itself).
    A shell above, which was
    told all in one word, is none."""
    script = tmp_path / "run_dpo.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom dpo_iteration import card\n"
        "print('typed:', card.command(sys.argv, card.launcher(sys.argv)))\n"
    )
    accelerate = [tmp_path / "bin" / "accelerate", "launch", "--config_file", "configs/ddp.yaml"]
    accelerate[0].parent.mkdir()
    accelerate[0].write_text(
        f"#!{sys.executable}\nimport subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[4:]])\n"
    )
    accelerate[0].chmod(0o755)
    alone, launched = (
        ([sys.executable, script], "python"),
        ([*accelerate, script], f"accelerate {' '.join(map(str, accelerate[1:]))}"),
    )
    for command, shown in (alone, launched):
        words = [*map(str, command), "a.yaml", "--hub_token", "secret", "--run_name", "two words"]
        done = subprocess.run(
            ["bash", "-c", f"{shlex.join(words)}; true"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
        )
        line = next((line for line in done.stdout.splitlines() if line.startswith("typed: ")), done.stderr)
        assert line == f"typed: {shown} dpo_iteration/run_dpo.py a.yaml --hub_token … --run_name 'two words'"
    assert card.launcher(["run_dpo.py", "of", "nobody"]) == []


def test_the_command_does_not_show_the_token():
    for words in (["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]):
        shown = card.command(["/somewhere/run_dpo.py", "a.yaml", *words, "--run_name", "two words"])
        assert (
            "secret" not in shown
            and shown.startswith("dpo_iteration/run_dpo.py a.yaml --hub_token")
            and "'two words'" in shown
        )


# The last check.


def damage(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def spoil(name):
    def change(weights):
        weights[name][3] = float("nan")

    return change


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: damage(f, lambda w: w.pop("model.norm.weight")), "lacks model.norm.weight"),
        (
            lambda f: damage(f, lambda w: w.update({"model.extra.weight": torch.ones(2)})),
            "has too many: model.extra.weight",
        ),
        (
            lambda f: damage(f, lambda w: w.update({"model.norm.weight": torch.ones(3)})),
            "in another shape: model.norm.weight",
        ),
        (lambda f: damage(f, spoil("lm_head.weight")), "not finite in lm_head.weight"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-50]),
            "model.safetensors is damaged",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"has no \*.safetensors"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-1.safetensors"}}'
            ),
            "the files differ in model",
        ),
        (lambda f: (f / "config.json").write_text("{}"), "has no config that loads"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "has no tokenizer that loads"),
        (without_template, "has no chat template"),
    ],
)
def test_a_spoiled_model_is_refused_by_what_is_wrong(work, tmp_path, change, message):
    shutil.copytree(work / "policy", tmp_path / "model")
    check_saved(tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        check_saved(tmp_path / "model")


@pytest.mark.parametrize(
    ("family", "architecture", "more"),
    [
        ("llama3", "llama", {"tie_word_embeddings": True}),
        ("gemma", "gemma2", {}),
        ("chatml", "qwen3", {}),
        ("phi", "phi3", {}),
        ("llama3", "mixtral", {"num_local_experts": 4}),
    ],
)
def test_whole_models_pass_whatever_their_files_call_the_weights(tmp_path, family, architecture, more):
    check_saved(micro.make_policy(tmp_path / "model", family, architecture, **more))


@pytest.mark.parametrize("shards", [1, 2, 3], ids=["one file", "with others", "a shard of its own"])
def test_the_second_copy_of_a_tied_weight_is_taken_out(tmp_path, shards):
    """As DeepSpeed's users save it; a head that differs, or whose config is not tied, stays."""
    model = micro.make_policy(tmp_path / "model", tie_word_embeddings=True)
    whole = load_file(model / "model.safetensors")

    def save(head):
        for file in model.glob("model*"):
            file.unlink()
        parts = [{"lm_head.weight": head}, {}, {}]
        for i, (name, weight) in enumerate(whole.items()):
            parts[i % shards][name] = weight.clone()
        if shards == 3:
            parts[1] |= {name: weight for name, weight in parts[0].items() if name != "lm_head.weight"}
            parts[0] = {"lm_head.weight": head}
        parts, places = [part for part in parts if part], {}
        for i, part in enumerate(parts, 1):
            file = "model.safetensors" if shards == 1 else f"model-{i:05}-of-{len(parts):05}.safetensors"
            save_file(part, model / file, {"format": "pt"})
            places |= dict.fromkeys(part, file)
        if shards > 1:
            (model / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": places})
            )

    def stored():
        return {
            name: weight for file in model.glob("*.safetensors") for name, weight in load_file(file).items()
        }

    save(whole["model.embed_tokens.weight"].clone())
    store_once(model)
    found = stored()
    assert set(found) == set(whole) and all(found[name].equal(whole[name]) for name in whole)
    check_saved(model)
    save(whole["model.embed_tokens.weight"] + 1)
    store_once(model)
    assert "lm_head.weight" in stored()
    config = read_json(model / "config.json")
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    save(whole["model.embed_tokens.weight"].clone())
    store_once(model)
    assert "lm_head.weight" in stored()


def test_a_tied_weight_is_known_under_the_names_of_its_files(tmp_path):
    """Gemma 3 with its image part: `language_model.lm_head.weight` in the file, `lm_head.weight` in the
    model.
    """
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 288,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    image = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text | {"head_dim": 16}, vision_config=image, mm_tokens_per_image=4)
    )
    model.save_pretrained(tmp_path / "once")
    model.save_pretrained(
        tmp_path / "twice", state_dict={name: weight.clone() for name, weight in model.state_dict().items()}
    )
    once, twice = (set(load_file(tmp_path / name / "model.safetensors")) for name in ("once", "twice"))
    assert twice - once == {"language_model.lm_head.weight"}
    store_once(tmp_path / "twice")
    assert set(load_file(tmp_path / "twice" / "model.safetensors")) == once


# What goes with a model.


def test_a_processor_loads_from_a_trained_folder_as_from_its_start(tmp_path):
    """A real one, of audio, since those of images want torchvision here."""
    from transformers import AutoProcessor, AutoTokenizer, Qwen2AudioProcessor, WhisperFeatureExtractor

    start, made = micro.make_policy(tmp_path / "start"), tmp_path / "made"
    Qwen2AudioProcessor(
        feature_extractor=WhisperFeatureExtractor(), tokenizer=AutoTokenizer.from_pretrained(start)
    ).save_pretrained(start)
    for name in (
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "tekken.json",
        "modeling_mine.py",
    ):
        (start / name).write_text(f"{{}} # {name}")
    for name in (
        "trainer_state.json",
        "README.md",
        "params.json",
        "consolidated.safetensors",
        "adapter_config.json",
    ):
        (start / name).write_text("not this")
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.save_pretrained(made)
    (made / "modeling_mine.py").write_text("# transformers' own copy")
    written = {file.name for file in made.iterdir()}
    saved.copy_companions(start, made)
    added = {
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "tekken.json",
    }
    assert {file.name for file in made.iterdir()} == written | added
    assert (made / "modeling_mine.py").read_text() == "# transformers' own copy"
    for name in ("tekken.json", "preprocessor_config.json"):
        assert (made / name).read_text() == (start / name).read_text()
        (start / name).unlink(), (made / name).unlink()
    before, after = AutoProcessor.from_pretrained(start), AutoProcessor.from_pretrained(made)
    assert (
        type(after) is type(before)
        and after.to_dict() == before.to_dict()
        and after.chat_template == before.chat_template
    )


@pytest.mark.parametrize(
    ("family", "before", "more", "expected"),
    [
        ("llama3", None, [], ["<|end_of_text|>", "<|eot_id|>"]),
        ("llama3", "<|end_of_text|>", [], ["<|end_of_text|>", "<|eot_id|>"]),
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
    ids = tokenizer.convert_tokens_to_ids
    if before is not None:
        values = {"eos_token_id": ids(before), "temperature": 0.6, "of_a_later_version": 1}
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
    found = saved.generation_config(tmp_path, tokenizer, stops=ids(more))
    assert found["eos_token_id"] == ids(expected) and found["pad_token_id"] == tokenizer.pad_token_id
    if before is not None:
        assert found["temperature"] == 0.6 and found["of_a_later_version"] == 1


def test_the_stops_that_were_given_when_sampling_are_found(tmp_path):
    def manifest(name, inputs, script="generation/get_hf2.py", **settings):
        marks = {key: {"path": str(path)} for key, path in inputs.items()}
        (tmp_path / f"{name}.manifest.json").write_text(
            json.dumps({"script": script, "settings": settings, "inputs": marks})
        )

    for i, policy in enumerate(("mine", "another")):
        manifest(
            f"rewarded{i}",
            {"dataset_name_or_path": tmp_path / f"generated{i}.jsonl"},
            script="annotate_data/get_rewards.py",
        )
        manifest(f"generated{i}", {"model_name_or_path": policy}, eos_ids=[i + 7])
    manifest("served", {"tokenizer": "mine", "model": "mine"}, script="generation/gen_hf.py", eos_ids=[5])
    files = [str(tmp_path / f"{name}.jsonl") for name in ("rewarded0", "rewarded1", "served", "without")]
    assert card.sampling_stops(SimpleNamespace(train_dir=files, model_name_or_path="mine")) == [5, 7]


def test_a_model_that_fails_the_check_is_not_complete(work, monkeypatch):
    from accelerate.state import AcceleratorState, GradientState

    def refuse(*args):
        raise UserError("the saved model is wrong")

    monkeypatch.setattr(run_dpo, "check_saved", refuse)
    monkeypatch.setattr(sys, "argv", ["run_dpo.py", *argv(work, "wrong")])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with pytest.raises(UserError, match="the saved model is wrong"):
        run_dpo.main()
    assert read_json(work / "wrong.manifest.json")["complete"] is False
    assert list((work / "wrong").glob("checkpoint-*")), "a second start could not continue"


# The hub. It cannot be reached from here, so a stub answers what its real client (HfApi) asks: create_repo,
# preupload, upload of large files, commit, and the list of files. The stub knows nothing of access rights,
# branches or the hub's limits, and the client's newer way of sending large files (xet) is switched off, since
# its other end is a service of its own.


class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == "Bearer hf_secret"
            return (
                self.answer({"name": "someone"})
                if known
                else self.answer({"error": "Invalid username or password."}, 401)
            )
        if "/tree/" in self.path:
            files = [{"type": "file", "path": name, "oid": "0" * 40, "size": 1} for name in self.server.files]
            return self.answer(files)
        return self.answer(
            {
                "id": "someone/dpo",
                "sha": "0" * 40,
                "siblings": [{"rfilename": name} for name in self.server.files],
            }
        )

    def do_PUT(self):
        self.server.large[self.path.split("/")[-1]] = self.body()
        self.answer({})

    def do_POST(self):
        server, body = self.server, self.body()
        server.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_secret" and "/large/" not in self.path:
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            server.created.append(asked)
            return self.answer({"url": f"{server.url}/someone/{asked['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            large = {f["path"]: f["path"].endswith((".safetensors", ".bin", ".pt", ".pth")) for f in files}
            return self.answer(
                {
                    "files": [
                        {"path": p, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
                        for p, is_large in large.items()
                    ]
                }
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [
                o | {"actions": {"upload": {"href": f"{server.url}/large/{o['oid']}"}}} for o in objects
            ]
            return self.answer({"transfer": "basic", "objects": actions})
        if "/commit/" in self.path:
            if server.refuse:
                return self.answer({"error": "the hub is full"}, 507)
            lines = [json.loads(line) for line in body.splitlines()]
            server.commits.append(lines)
            for line in lines:
                value = line["value"]
                if line["key"] == "deletedFile":
                    server.files.pop(value["path"])
                elif line["key"] in ("file", "lfsFile"):
                    server.files[value["path"]] = (
                        server.large[value["oid"]] if line["key"] == "lfsFile" else value["content"]
                    )
            return self.answer(
                {
                    "success": True,
                    "commitUrl": f"{server.url}/someone/dpo/commit/1",
                    "commitOid": "1" * 40,
                    "hookOutput": "",
                }
            )
        return self.answer({"error": f"the stub knows no {self.path}"}, 404)


@pytest.fixture
def stub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.large, server.commits, server.created, server.asked, server.refuse = (
        {},
        {},
        [],
        [],
        [],
        False,
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pushing(stub, token="hf_secret"):
    environment = {
        "HF_ENDPOINT": stub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "",
    }
    return [
        "--push_to_hub",
        "true",
        "--hub_model_id",
        "dpo",
        "--hub_private_repo",
        "true",
        "--hub_token",
        token,
    ], environment


def test_push_uploads_the_merged_model_with_our_card(work, stub):
    settings, environment = pushing(stub)
    done = start(
        *argv(work, "pushed", "--use_peft", "true", "--hub_strategy", "every_save", *settings), **environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pushed to " in done.stdout
    assert {(asked["name"], asked["visibility"]) for asked in stub.created} == {("dpo", "private")}
    here = {
        str(f.relative_to(work / "pushed")): f.read_bytes()
        for f in (work / "pushed").rglob("*")
        if f.is_file()
    }
    assert (
        set(stub.files) == set(here) and "model.safetensors" in here and "adapter/adapter_config.json" in here
    )
    assert not {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"} & set(here)
    assert stub.files["model.safetensors"] == here["model.safetensors"]
    summaries = [lines[0]["value"]["summary"] for lines in stub.commits]
    assert summaries[-1] == "End of training" and any(
        summary.startswith("Training in progress") for summary in summaries[:-1]
    )
    early = {line["value"].get("path") for lines in stub.commits[:-1] for line in lines}
    assert "adapter_config.json" in early, "a push on the way has left nothing to be cleared away"
    # The token is in nothing that was written or sent as a file.
    assert not any(b"hf_secret" in content for content in [*here.values(), *stub.large.values()])
    assert not any("hf_secret" in json.dumps(lines) for lines in stub.commits)
    assert "hf_secret" not in (work / "pushed.manifest.json").read_text() + done.stdout + done.stderr
    assert ModelCard.load(work / "pushed" / "README.md").data.tags == ["dpo", "online-rlhf", "trl", "lora"]
    again = start(
        *argv(work, "pushed", "--use_peft", "true")
    )  # where it is pushed to does not shape the model
    assert again.returncode == 0 and "is complete, nothing to do" in again.stdout


def test_a_wrong_token_is_said_before_the_model_is_loaded(work, stub):
    settings, environment = pushing(stub, "hf_wrong")
    done = start(*argv(work, "refused", *settings), **environment)
    assert done.returncode == 2 and "pairs per optimizer step" not in done.stdout
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (
        "cannot make or reach the repository dpo; log in with `hf auth login`: " in said and "nvalid" in said
    )


def test_a_push_that_fails_leaves_a_complete_model_and_says_how_to_push_it(work, stub):
    stub.refuse = True
    settings, environment = pushing(stub)
    done = start(*argv(work, "unpushed", "--hub_strategy", "end", *settings), **environment)
    assert done.returncode == 2
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(
        r"unpushed is complete but was not pushed: .*; later: hf upload someone/dpo \S+/unpushed$", said
    ), said
    assert read_json(work / "unpushed.manifest.json")["complete"] and not (work / "unpushed.lock").exists()


def test_the_recipes_card_is_valid_yaml(trained):
    front = (trained / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["model-index"][0]["name"] == "trained"
