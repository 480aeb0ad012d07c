"""Models of random weights, which are as fast as trained ones, with a tokenizer of one token a byte."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.models import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ': ' + m.content }}</s>{% endfor %}"


def make_tokenizer(folder: str | Path, vocabulary: int = 259) -> "PreTrainedTokenizerBase":
    """A tokenizer of bytes; beyond these its vocabulary has words that no text meets, which decode all the
    same.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"Ġw{i}" for i in range(vocabulary - 259))]
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    raw.add_special_tokens([*special.values()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(
    folder: str | Path,
    auto_class: str = "AutoModelForCausalLM",
    vocabulary: int = 259,
    dtype: str = "float32",
    seed: int = 0,
    **shape: object,
):
    """Save a Llama of `shape` (settings of its config; 8 layers of 512 hidden units) and its tokenizer.

    Args:
        auto_class: class of transformers that makes it. A classifier gives rewards of a few units.
    """
    quiet_libraries()
    import torch
    import transformers

    tokenizer = make_tokenizer(folder, vocabulary)
    given = {
        "vocab_size": len(tokenizer),
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    } | {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**given | shape)
    model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32)
    if hasattr(model, "score"):
        torch.nn.init.normal_(model.score.weight, std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
