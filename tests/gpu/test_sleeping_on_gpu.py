"""A server on a trainer's GPU: asleep it gives memory back, and awake it holds the weights that were sent."""

import random
import sys

import faults
import micro
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from generation import live_servers  # noqa: E402
from generation.dispatch import Server  # noqa: E402

pytestmark = pytest.mark.env("vllm")

UTILIZATION = 0.3
FURTHEST = 1e-2  # a token, float32 by kernels that may round to TF32; two policies are much further apart


@pytest.fixture(scope="module")
def policies(tmp_path_factory, sizes):
    folder = tmp_path_factory.mktemp("policies")
    return [micro.make_policy(folder / f"{seed}", seed=seed, **sizes) for seed in (0, 1)]


@pytest.fixture(scope="module")
def server(policies, tmp_path_factory, device):
    folder, port = tmp_path_factory.mktemp("server"), faults.free_ports()
    variables = {"VLLM_SERVER_DEV_MODE": 1, "port": port, "servers": 1, "max_model_len": 512}
    variables |= {"dtype": "float32", "python": sys.executable, "state_dir": folder, "stop_seconds": 5}
    if device.type == "cuda":
        variables |= {"gpu_memory_utilization": UTILIZATION, "engine_args": '{"enable_sleep_mode": true}'}
    else:
        variables |= {"kv_cache_gib": 0.25}
    environment = {key: str(value) for key, value in variables.items()}
    script = ["bash", "generation/register_server.sh"]
    started = faults.ended([*script, policies[0]], environment=environment)
    assert started.returncode == 0, started.stdout + started.stderr
    yield Server(f"http://127.0.0.1:{port}")
    assert faults.ended([*script, "stop", folder], environment=environment).returncode == 0


def sequences():
    rng = random.Random(0)
    return [[rng.randrange(3, 250) for _ in range(length)] for length in (40, 300)]


def exact(policy, device):
    """transformers' log-probabilities, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).to(device).eval()
    found = []
    for ids in sequences():
        row = torch.tensor([ids], device=device)
        with torch.no_grad():
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].double()
        found.append(logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0].cpu())
    return found


def apart(one, other):
    return max((torch.as_tensor(a).double() - b).abs().max().item() for a, b in zip(one, other, strict=True))


def served(server):
    [found] = live_servers.log_probs([server], sequences()).values()
    return [torch.tensor(values).double() for values in found]


def memory():
    """Bytes of the GPU that are free, and all of them."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()


def wake(server, weights=None):
    live_servers.wake([server], live_servers.WEIGHTS)
    if weights:
        live_servers.reload_weights([server], weights)
    live_servers.wake([server], live_servers.CACHE)


def test_asleep_it_gives_memory_back_and_awake_it_holds_what_it_was_sent(policies, server, device):
    own = [exact(policy, device) for policy in policies]
    between, first = apart(*own), served(server)
    assert apart(first, own[0]) < FURTHEST < between / 20
    on_gpu = device.type == "cuda"
    awake = memory() if on_gpu else None
    live_servers.sleep([server])
    if on_gpu:
        given_back, whole = memory()[0] - awake[0], awake[1]
        print(
            f"{given_back / 2**30:.1f} of {whole / 2**30:.0f} GiB came back, {UTILIZATION} was the server's"
        )
        assert given_back > 0.5 * UTILIZATION * whole  # all but graphs and CUDA itself
    wake(server)  # level 1 has kept the weights
    assert apart(served(server), first) < 1e-4
    for turn, number in enumerate((1, 0, 1)):
        live_servers.sleep([server])
        if on_gpu:  # a trainer takes the room, and gives it back
            held = torch.full((int(0.8 * memory()[0]),), turn, dtype=torch.uint8, device=device)
            del held
            memory()
        wake(server, policies[number])
        distance = apart(served(server), own[number])
        print(f"turn {turn}: {distance:.1e} a token from transformers, the policies are {between:.1e} apart")
        assert distance < FURTHEST
