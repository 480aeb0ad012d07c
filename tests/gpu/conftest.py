"""What only a GPU can show: `bash tests/run.sh --gpu`, or with a Python that has torch and transformers
`python -m pytest tests/gpu`, which passes over what needs more. Without a GPU they are skipped.

GPU_TESTS_ON=cpu runs them on micro models without a GPU: whether the tests themselves work, nothing more.
"""

import os

import pytest

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
LARGE = {  # about 250 million parameters
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 64000,
    "max_position_embeddings": 8192,
}


@pytest.fixture(scope="session", autouse=True)
def device():
    torch = pytest.importorskip("torch")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def sizes(device):
    """What a model's config says beside the micro one's."""
    return LARGE if device.type == "cuda" else {}
