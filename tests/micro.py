"""Micro models with random weights for tests: a byte-level tokenizer, chat templates, real file formats.

Random weights are enough to test plumbing and numerics; what learning looks like is tested on `tiny/`.
"""

import json
from pathlib import Path

# Templates in the shape of the families' own: the control tokens, the order and the refusals.
TEMPLATES = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
    ),
    "phi": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}
LLAMA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS = {  # bos, eos, pad, others
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", LLAMA),
    "chatml": (None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"]),
    "gemma": ("<bos>", "<eos>", "<pad>", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": ("<s>", "</s>", "<pad>", ["[INST]", "[/INST]"]),
    "phi": (None, "<|endoftext|>", "<|pad|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
}


def make_tokenizer(family="llama3", adds_bos=True):
    """A byte-level BPE tokenizer without merges; it prepends BOS to plain text as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    bos, eos, pad, others = SPECIALS[family]
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([t for t in (bos, eos, pad, *others) if t])
    if bos and adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=pad, additional_special_tokens=others
    )
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


def make_config(tokenizer, architecture="llama", **overrides):
    """A two-layer config of the architecture: `llama`, `qwen2`, `qwen3`, `mistral`, `gemma2`, `phi3`."""
    from transformers import AutoConfig

    shape = {
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return AutoConfig.for_model(architecture, **(shape | overrides))


def make_policy(path, family="llama3", architecture="llama", seed=0, dtype="float32", **overrides):
    """A causal language model's folder as a user has one; `dtype`: of the stored weights."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = make_tokenizer(family)
    torch.manual_seed(seed)
    config = make_config(tokenizer, architecture, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    end = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi": "<|end|>"}.get(family)
    eos = [tokenizer.eos_token_id] + ([tokenizer.convert_tokens_to_ids(end)] if end else [])
    model.generation_config = GenerationConfig(
        eos_token_id=eos, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def make_reward_model(path, family="llama3", architecture="llama", **overrides):
    """A Bradley-Terry reward model's folder: one label, a score head by which rewards differ visibly."""
    import torch
    from transformers import AutoModelForSequenceClassification

    tokenizer = make_tokenizer(family)
    torch.manual_seed(1)
    config = make_config(tokenizer, architecture, num_labels=1, **overrides)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=1.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def make_armorm(path, shards=1):
    """ArmoRM's published architecture and parameter names, with fewer and smaller layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaModel

    path, tokenizer, objectives, width = Path(path), make_tokenizer("llama3"), 5, 24
    torch.manual_seed(2)
    config = make_config(tokenizer, "llama", max_position_embeddings=768)
    hidden = config.hidden_size
    tensors = {f"model.{key}": value.contiguous() for key, value in LlamaModel(config).state_dict().items()}
    tensors["regression_layer.weight"] = torch.randn(objectives, hidden)
    tensors["reward_transform_matrix"] = torch.eye(objectives) + 0.3 * torch.randn(objectives, objectives)
    tensors["gating.logit_scale"] = torch.tensor([1.7])
    for i, (rows, columns) in enumerate([(width, hidden), (width, width), (objectives, width)]):
        tensors[f"gating.layers.{i}.weight"] = torch.randn(rows, columns)
        tensors[f"gating.layers.{i}.bias"] = torch.randn(rows)
    tokenizer.save_pretrained(path)
    values = config.to_dict() | {"architectures": ["LlamaForRewardModelWithGating"], "dtype": "float32"}
    values |= {"gating_hidden_dim": width, "gating_n_hidden": 2, "gating_temperature": 3}
    values |= {"num_objectives": objectives, "id2label": {str(i): f"LABEL_{i}" for i in range(objectives)}}
    values["label2id"] = {label: int(i) for i, label in values["id2label"].items()}
    # The published config names remote code, which is not here.
    values["auto_map"] = {
        "AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"
    }
    (path / "config.json").write_text(json.dumps(values))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    places = {}
    for n in range(shards):
        name = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = {key: value for i, (key, value) in enumerate(sorted(tensors.items())) if i % shards == n}
        save_file(part, path / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def make_pair_preference(path, family="llama3", architecture="llama"):
    """A pair-preference model folder: a causal language model whose logits of "A" and "B" differ visibly."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer(family)
    torch.manual_seed(3)
    config = make_config(tokenizer, architecture, max_position_embeddings=1024, initializer_range=0.15)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def write_prompts(path, count):
    """`count` short prompts, some with several turns and one in another script; returns them."""
    rows = []
    for i in range(count):
        messages = [{"role": "user", "content": f"Question {i}: what is {i} plus {i + 1}?"}]
        if i % 5 == 3:
            earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
            messages = earlier + messages
        if i % 7 == 5:
            messages[-1]["content"] = f"数字 {i} の次は\u2028何ですか"
        rows.append({"context_messages": messages, "number": i})
    Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return rows
