"""run_online.py with a real server: rounds in order, killed and continued, ahead by a round, by two
processes, in turns with a server that sleeps; and what is refused in one line.

vLLM's CPU build takes the calls for sleeping and lets requests wait meanwhile, but gives no memory back: see
tests/gpu for that.
"""

import json
import os
import re
import signal
import statistics
import sys
import time
import urllib.request

import faults
import pytest
import torch
import training
from online import SCRIPT, START, argv, rounds_of, start_server
from training import read_json, read_jsonl
from transformers import AutoModelForCausalLM

from common.cli import UserError, parse
from dpo_iteration.online_arguments import Arguments, memory_folder, read_parts
from dpo_iteration.rounds import sample_heldout
from generation import live_servers
from generation.dispatch import Server

LAUNCH = [sys.executable, SCRIPT]
LETTERS = {  # for what a server was asked
    "/sleep?level=1": "S",
    "/wake_up?tags=weights": "W",
    "/collective_rpc": "R",
    "/reset_prefix_cache": "P",
    "/wake_up?tags=kv_cache": "K",
    "/v1/completions": "c",
}


def train(folder, port, *more, launcher=(), status=0, **settings):
    """Run the training to its end; what it said."""
    words = argv(folder, port, *more, **settings)
    end = training.start(*words, launcher=launcher, status=status, script=SCRIPT)
    return end.stdout + end.stderr


def texts(folder):
    """{file of answers: its bytes}."""
    return {path.parent.name: path.read_bytes() for path in folder.glob("online/round_*/generated.jsonl")}


@pytest.fixture(scope="module", params=[0, 1])
def whole(request, live_port, tmp_path_factory):
    """(staleness, folder of a training that nothing disturbed)."""
    folder = tmp_path_factory.mktemp(f"staleness{request.param}")
    train(folder, live_port, staleness=request.param)
    return request.param, folder


def test_each_round_trains_on_its_own_answers_by_the_weights_it_names(whole):
    staleness, folder = whole
    entries, prompts = rounds_of(folder), []
    assert [entry["round"] for entry in entries] == [0, 1, 2, 3]
    for number, entry in enumerate(entries):
        version = max(0, number - staleness)
        place = folder / "online" / f"round_{number:06}"
        records = read_jsonl(place / "rewarded.jsonl")
        assert {record["version"] for record in records} == {version} == {entry["version"]}
        assert read_json(place / "probe.json")["version"] == version
        prompts += [record["id"] for record in records]
        rewards = [reward for record in records for reward in record["rewards"]]
        assert entry["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-5)
        pairs = read_jsonl(place / "pairs.jsonl")
        assert entry["prompts"] == 10 and entry["pairs"] == len(pairs) == 10 - entry["ties"]
        seconds = entry["seconds"]
        parts = sum(
            seconds.get(k, 0) for k in ("waiting", "sending", "scoring", "reference", "kl", "training")
        )
        assert parts == pytest.approx(seconds["all"], abs=0.1) and seconds["training"] > 0
        assert (abs(entry["kl"]) < 1e-5) == (number == 0) and entry["kl_se"] >= 0
    assert len(prompts) == len(set(prompts)) == 40  # of 450: none twice
    manifest = read_json(folder / "model.manifest.json")
    assert manifest["complete"] and manifest["counts"]["train_pairs"] == sum(e["pairs"] for e in entries)
    assert manifest["metrics"]["step"] == 8 and not list(folder.glob("online/checkpoint-*"))
    assert entries[-1]["learning_rate"] < entries[1]["learning_rate"]  # one schedule over all rounds


@pytest.mark.parametrize("loss", ["sigmoid", "sft"])
def test_one_round_is_run_dpo_on_its_answers(loss, live_port, tmp_path):
    """The same two steps give the same weights; without rejected responses and without a reference, too."""
    trained = f"{{loss_type: {loss}, label_smoothing: 0}}"
    train(tmp_path, live_port, training=trained, rounds=1)
    [entry] = rounds_of(tmp_path)
    assert entry["pairs"] == 10 and ("accuracy" in entry) == (loss != "sft")
    words = [f"{tmp_path}/loop.yaml:training_args", "--model_name_or_path", START, "--seed", 0]
    words += ["--train_dir", tmp_path / "online/round_000000/rewarded.jsonl", "--global_batch_size", 5]
    words += ["--num_train_epochs", 1, "--eval_fraction", 0, "--output_dir", tmp_path / "alone"]
    training.start(*map(str, words))
    alone = training.weights(tmp_path / "alone")
    assert training.furthest(alone, training.weights(tmp_path / "model")) <= 1e-6
    assert training.furthest(alone, training.weights(START)) > 1e-4


def killed(words, when, seconds=0.0):
    """Start a training, and kill -9 it so long after `when()` is true."""
    process = faults.begin([*LAUNCH, *words])
    faults.wait_for(lambda: when() or process.poll() is not None)
    time.sleep(seconds)
    return faults.kill(process)


def check_kl(entry, generated, policy):
    """A round's KL is what evaluation/divergence.py says of the first two answers to each prompt."""
    output = policy.with_name("divergence.jsonl")
    words = ["--dataset_name_or_path", generated, "--model_name_or_path", policy, "--output_dir", output]
    end = faults.ended(
        [sys.executable, "evaluation/divergence.py", *words, "--ref_model_name_or_path", START]
    )
    assert end.returncode == 0, end.stderr
    ratios = [
        [a - b for a, b in zip(line["logps"][:2], line["ref_logps"][:2], strict=True)]
        for line in read_jsonl(output)
    ]
    tokens = sum(sum(line["tokens"][:2]) for line in read_jsonl(output))
    means = [sum(two) / 2 for two in ratios]
    assert entry["kl"] == pytest.approx(statistics.fmean(means), abs=1e-5)
    assert entry["kl_se"] == pytest.approx(statistics.stdev(means) / len(means) ** 0.5, abs=1e-5)
    assert entry["kl_per_token"] == pytest.approx(sum(map(sum, ratios)) / tokens, abs=1e-6)


def test_a_killed_training_ends_as_an_undisturbed_one(whole, live_port, tmp_path):
    """The same answers and the same weights, also where it is made in two starts as run_online.sh does."""
    staleness, undisturbed = whole
    words = argv(tmp_path, live_port, staleness=staleness)
    assert killed(words, lambda: rounds_of(tmp_path), seconds=0.3)
    train(tmp_path, live_port, "--until_round", 2, staleness=staleness)  # a policy on the way
    assert len(rounds_of(tmp_path)) == 2
    second = tmp_path / "model"  # the policy as round 2 begins
    words[words.index("--output_dir") + 1] = f"{tmp_path}/last"
    # while the last answers are sampled: with staleness 1 a round earlier, whose checkpoint is not there yet
    assert killed(words, (tmp_path / "online/round_000003/prompts.jsonl").exists)
    end = training.start(*words, script=SCRIPT)
    assert "continuing from" in end.stdout
    assert texts(tmp_path) == texts(undisturbed)
    apart = training.furthest(training.weights(tmp_path / "last"), training.weights(undisturbed / "model"))
    assert apart <= 1e-6
    assert [entry["round"] for entry in rounds_of(tmp_path)] == [0, 1, 2, 3]
    check_kl(rounds_of(tmp_path)[2], tmp_path / "online/round_000002/generated.jsonl", second)
    again = training.start(*words, script=SCRIPT)
    assert "is complete, nothing to do" in again.stdout


@pytest.fixture
def asked(live_port, tmp_path_factory):
    """What the server was asked since the test began, by its own log, in LETTERS. It is woken in the end."""
    log = next(tmp_path_factory.getbasetemp().glob(f"servers*/server_{live_port}.log"))
    begun = log.stat().st_size
    orders = re.compile(rb'"POST (\S+) HTTP/1.1" 200')
    yield lambda: "".join(LETTERS.get(p.decode(), "") for p in orders.findall(log.read_bytes()[begun:]))
    for part in (live_servers.WEIGHTS, live_servers.CACHE):
        live_servers.wake([Server(f"http://127.0.0.1:{live_port}")], part)


def is_asleep(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/is_sleeping", timeout=60) as answer:
        return json.load(answer)["is_sleeping"]


def test_a_server_sleeps_while_the_trainer_is_at_work(whole, live_port, asked, tmp_path):
    """It is awake from the weights of a round to the probe of its answers, and both are as without that."""
    staleness, undisturbed = whole
    if staleness:
        pytest.skip("nothing is sampled ahead by who sleeps")
    train(tmp_path, live_port, "--share_gpus", "true", *held_out(tmp_path))
    # 4 sequences before and after the answers to 10 prompts, and to those held out; gen_hf.py asks for more
    assert re.fullmatch("S(WRPKc{18,}S){4}WRPKc{32,}S", asked()), asked()
    check_heldout(tmp_path, tmp_path / "model")
    assert is_asleep(live_port) and texts(tmp_path) == texts(undisturbed)
    apart = training.furthest(training.weights(tmp_path / "model"), training.weights(undisturbed / "model"))
    assert apart <= 1e-6


def test_a_server_is_taken_as_a_killed_trainer_left_it(whole, live_port, asked, tmp_path):
    """Asleep, while that trained, or awake, while it sampled."""
    staleness, undisturbed = whole
    if staleness:
        pytest.skip("nothing is sampled ahead by who sleeps")
    words = argv(tmp_path, live_port, "--share_gpus", "true")
    for count, sleeps in ((1, True), (2, False)):
        process = faults.begin([*LAUNCH, *words])
        faults.wait_for(lambda n=count: len(rounds_of(tmp_path)) >= n)
        faults.wait_for(lambda s=sleeps: is_asleep(live_port) is s)
        assert faults.kill(process) and is_asleep(live_port) is sleeps
    before = len(asked())
    end = training.start(*words, script=SCRIPT)
    assert "continuing from" in end.stdout and re.fullmatch("S(WRPKc+S)+", asked()[before:])
    assert texts(tmp_path) == texts(undisturbed)
    apart = training.furthest(training.weights(tmp_path / "model"), training.weights(undisturbed / "model"))
    assert apart <= 1e-6


def held_out(folder):
    """Arguments for twelve held-out prompts, sampled as the rounds are."""
    lines = (faults.ROOT / "tiny/built/prompts/heldout.jsonl").read_bytes().splitlines(keepends=True)
    folder.mkdir(exist_ok=True)
    (folder / "heldout.jsonl").write_bytes(b"".join(lines[:12]))
    return "--heldout_prompts", folder / "heldout.jsonl", "--heldout", f"{folder}/loop.yaml:generation"


@torch.no_grad()
def check_heldout(folder, policy):
    """The held-out answers are there, and the greedy ones are those of transformers, by `policy`."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    sampled, greedy = (
        read_jsonl(folder / f"heldout_{kind}.generated.jsonl") for kind in ("sampled", "greedy")
    )
    assert [record["id"] for record in sampled] == [record["id"] for record in greedy] and len(greedy) == 12
    assert {len(record["responses"]) for record in sampled} == {4}
    for record in greedy:
        prompt, [answer] = record["prompt_token_ids"], record["response_token_ids"]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer
    for kind in ("sampled", "greedy"):
        manifest = read_json(folder / f"heldout_{kind}.generated.manifest.json")
        assert manifest["complete"] and manifest["inputs"]["model"]["path"] == str(policy)


def test_held_out_answers_stand_there_once_servers_have_kept_the_weights(built, live_port, tmp_path):
    parts = read_parts(parse(Arguments, "", argv(tmp_path, live_port, *held_out(tmp_path))))
    live_servers.reload_weights([Server(f"http://127.0.0.1:{live_port}")], faults.ROOT / START)
    assert sample_heldout(parts.heldout, START, lambda: "one lost them") == "one lost them"
    assert {path.name for path in tmp_path.iterdir()} == {"heldout.jsonl", "loop.yaml"}
    (tmp_path / "heldout.unproved").mkdir()
    (tmp_path / "heldout.unproved/heldout_greedy.generated.jsonl").write_text("of a killed start\n")
    assert sample_heldout(parts.heldout, START, lambda: "") == ""
    check_heldout(tmp_path, START)
    assert not (tmp_path / "heldout.unproved").exists()


class Sampled:
    """A training, begun with a server of its own, whose server is killed while it answers a round."""

    def __init__(self, folder, staleness):
        self.folder, self.port, self.servers = folder, faults.free_ports(), folder / "servers"
        self.words = argv(folder, self.port, "--concurrency", 1, staleness=staleness)

    def serve(self):
        return start_server(self.servers, self.port)

    def kill_server(self):
        group = int((self.servers / f"{self.port}.server").read_text().split()[0])
        os.killpg(group, signal.SIGKILL)
        faults.wait_for(lambda: not os.path.exists(f"/proc/{group}"))

    def until_sampling(self, number):
        """Begin it, and wait until it has some answers of round `number`; its process, and its output."""
        log = open(self.folder / "said.log", "w+", encoding="utf-8")  # noqa: SIM115
        process = faults.begin([*LAUNCH, *self.words], log)
        partial = self.folder / "online" / f"round_{number:06}" / "generated.jsonl.partial"

        def some():
            assert process.poll() is None, (self.folder / "said.log").read_text()
            return partial.exists() and partial.stat().st_size > 0

        faults.wait_for(some, pause=0.005)
        return process, self.folder / "said.log"


def test_a_server_that_is_killed_while_it_samples(whole, tmp_path):
    """It is named at once; one that is back meanwhile, with the start's weights, gets no answer of its into
    the training; and the end is that of an undisturbed training.
    """
    staleness, undisturbed = whole
    work = Sampled(tmp_path, staleness)
    work.serve()
    process, said = work.until_sampling(2)
    work.kill_server()
    killed = time.monotonic()
    assert process.wait(200) == 2 and time.monotonic() - killed < 100  # seconds; give_up_after is 120
    [told] = [line for line in said.read_text().split("\n") if line.startswith("error: ")]
    assert told.startswith(f"error: http://127.0.0.1:{work.port} ") and "Traceback" not in said.read_text()

    # What is left of the round may be of any weights: as if another server had answered before the end.
    left = tmp_path / "online/round_000002/generated.jsonl.partial"
    left.write_bytes(left.read_bytes().replace(b'"responses": ["', b'"responses": ["by whom? '))
    work.serve()
    process, said = work.until_sampling(3)
    os.kill(process.pid, signal.SIGSTOP)  # sees nothing of it
    work.kill_server()
    stop = work.serve()
    os.kill(process.pid, signal.SIGCONT)
    status = process.wait(400)
    assert "lost its weights while it sampled" in said.read_text()
    assert status == (2 if staleness else 0), said.read_text()
    if staleness:  # it has trained on: the weights that were to answer are its checkpoint's
        assert "its answers are thrown away; start the same command again" in said.read_text()
        training.start(*work.words, script=SCRIPT)
    assert stop().returncode == 0
    assert texts(tmp_path) == texts(undisturbed)
    apart = training.furthest(training.weights(tmp_path / "model"), training.weights(undisturbed / "model"))
    assert apart <= 1e-6


def test_a_server_that_is_killed_over_held_out_prompts_costs_their_answers_alone(built, tmp_path):
    """The policy is there; an engine can answer by it."""
    work = Sampled(tmp_path, 0)
    work.serve()
    words = [*work.words, "--until_round", "1", *map(str, held_out(tmp_path))]
    with open(tmp_path / "said.log", "w", encoding="utf-8") as log:
        process = faults.begin([*LAUNCH, *words], log)
    faults.wait_for(
        lambda: (tmp_path / "heldout.unproved").exists() or process.poll() is not None, pause=0.005
    )
    work.kill_server()
    assert process.wait(200) == 0
    said = (tmp_path / "said.log").read_text()
    assert "note: the held-out prompts are not answered, generation/get_hf2.py can do it: http" in said, said
    assert read_json(tmp_path / "model.manifest.json")["complete"] and "Traceback" not in said
    assert not list(tmp_path.glob("heldout_*"))


@pytest.mark.long
def test_kto_measures_its_kl_in_every_round(live_port, tmp_path):
    """By answers to other prompts of the round: in the first the policy is the reference still."""
    train(tmp_path, live_port, training="{loss_type: kto, label_smoothing: 0}", rounds=3)
    first, *later = rounds_of(tmp_path)
    assert first["loss"] == pytest.approx(0.5, abs=1e-5) and first["kto_kl"] < 1e-5
    assert len(later) == 2 and all(entry["kto_kl"] > 1e-3 for entry in later)


@pytest.mark.long
def test_two_processes_train_as_one(whole, live_port, tmp_path):
    """ZeRO-2: scoring, reference and pairs are shared out, and the weights are those of one process."""
    staleness, undisturbed = whole
    if staleness:
        pytest.skip("once is enough")
    words = "--until_round", 2, *held_out(tmp_path)
    said = train(tmp_path, live_port, *words, launcher=training.launch("zero2"))
    assert "round 2 of 4" in said
    check_heldout(tmp_path, tmp_path / "model")
    one = tmp_path / "one"
    train(one, live_port, "--until_round", 2)
    assert (
        texts(tmp_path) == texts(one) == {k: v for k, v in texts(undisturbed).items() if k < "round_000002"}
    )
    apart = training.furthest(training.weights(tmp_path / "model"), training.weights(one / "model"))
    assert apart <= 1e-5
    for ours, theirs in zip(rounds_of(tmp_path), rounds_of(one), strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-5)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sync_every": 11}, "a step needs a pair"),
        ({"staleness": 2}, "staleness"),
        ({"staleness": 1, "share_gpus": True}, "take turns on shared GPUs"),
        ({"heldout_prompts": "x.jsonl"}, "--heldout_prompts and --heldout belong together"),
        ({"rounds": 0}, "--rounds 0 must be at least 1"),
        ({"prompts_per_round": 1000}, "the prompt sets hold 450 prompts, fewer than the 1000 of a round"),
        ({"training": "loss_type: aot"}, "computes its losses itself"),
        ({"training": "use_weighting: true"}, "computes its losses itself"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(built, tmp_path, change, said):
    end = train(tmp_path, 1, status=2, **change)
    assert end.count("error: ") == 1 and said in end and "Traceback" not in end, end


def test_parts_of_other_models_are_refused(built, tmp_path):
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text("K: 4\nmixture: [{K: 3}, {model: start}]\n")
    with pytest.raises(UserError, match="parts with model start: .* leave model out"):
        read_parts(parse(Arguments, "", argv(tmp_path, 1, "--generation", mixed)))


def test_held_out_prompts_that_are_not_there_are_refused_before_a_round(built, tmp_path):
    words = held_out(tmp_path)
    words[1].unlink()
    end = train(tmp_path, 1, *words, status=2)
    assert end.count("error: ") == 1 and str(words[1]) in end and "Traceback" not in end, end


def test_servers_elsewhere_and_none_are_refused(built, tmp_path):
    end = train(tmp_path, 1, "--hosts", "10.0.0.1", status=2)
    assert "has its servers on this machine" in end
    end = train(tmp_path, faults.free_ports(), status=2)
    assert "error: http://127.0.0.1:" in end and "Traceback" not in end
    assert not memory_folder(tmp_path / "online").exists()
    end = train(tmp_path, faults.free_ports(), status=2, share_gpus=True)
    assert "does not answer" in end and "is it there?" in end and "Traceback" not in end


def test_other_settings_and_other_answers_are_refused_by_name(whole, live_port, tmp_path):
    staleness, folder = whole
    end = train(folder, live_port, status=2, staleness=staleness, training="beta: 0.3")
    assert "beta was 0.1 and is now 0.3" in end, end
    if staleness:
        return
    for path in folder.glob("online/round_00000[01]/*"):  # the first rounds, of which one is another's
        place = tmp_path / "online" / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        (place / path.name).write_bytes(path.read_bytes())
    (tmp_path / "online.manifest.json").write_bytes((folder / "online.manifest.json").read_bytes())
    generated = tmp_path / "online" / "round_000000" / "generated.jsonl"
    records = [record | {"version": 7} for record in read_jsonl(generated)]
    generated.write_text("".join(json.dumps(record) + "\n" for record in records))
    end = train(tmp_path, live_port, status=2)
    assert "was sampled by version 7 of the weights, and round 0 trains on those of version 0" in end


def test_pairs_of_a_round_are_laid_evenly_into_its_steps():
    """Every pair is in one step; the steps' sizes differ by one at most; scales make a step's mean."""
    from dpo_iteration.round_steps import RoundSteps

    rows = training.make_rows(23)
    given = {"costs": [0], "pairs_per_step": 10, "budget": 200, "at_once": 2, "processes": 2, "seed": 1}
    ranks = [RoundSteps(**given, process=k, sync_every=3, take=lambda epoch: rows) for k in (0, 1)]
    assert ranks[0].accumulation == 3
    passes = [list(rank) for rank in ranks]
    assert [len(one) for one in passes] == [9, 9] == [len(rank) for rank in ranks]
    seen, sizes = [], []
    for step in range(3):
        inside = [key for rank in passes for row in rank[3 * step : 3 * step + 3] for key in row]
        real = [(i, scale) for i, scale, _ in inside if scale]
        assert {scale for _, scale in real} == {6 / len(real)}  # 3 passes × 2 processes
        tokens = [len(rows[i]["chosen_ids"]) for i, _ in real]
        assert {mean for *_, mean in inside} == {sum(tokens) / len(tokens)}
        seen += [i for i, _ in real]
        sizes.append(len(real))
    assert sorted(seen) == list(range(23)) and sorted(sizes) == [7, 8, 8]
    other = RoundSteps(**given, sync_every=3, take=lambda epoch: rows)
    other.set_epoch(1)
    assert list(other) != passes[0]


def test_prompts_are_taken_in_turn_each_pass_in_another_order(tmp_path):
    from types import SimpleNamespace

    from common.records import PromptArguments
    from dpo_iteration.rounds import Prompts

    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}", "id": i}) + "\n" for i in range(7)))
    args = SimpleNamespace(prompts_per_round=3, seed=5, dataset_name_or_path=[str(path)])
    prompts = Prompts(args, PromptArguments())
    asked = [record["source_id"] for number in range(7) for record in prompts.of_round(number)]
    orders = [asked[0:7], asked[7:14], asked[14:21]]
    assert all(sorted(order) == list(range(7)) for order in orders) and len(set(map(tuple, orders))) == 3
    assert [record["source_id"] for record in prompts.of_round(1)] == asked[3:6]  # also out of order
