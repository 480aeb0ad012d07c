"""The tiny tokenizer, policy and reward model, each made from nothing.

In:  texts, demonstrations and scored responses as plain Python lists.
Out: objects of `transformers`, for tiny/build.py to save.

Run it through:  python tiny/build.py --output_dir tiny/built --seed 0

Trained with transformers' Trainer (SFT, loss on the response only) and TRL's RewardTrainer
(Bradley-Terry). Both receive token ids: applying a chat template to 20,000 short conversations
one by one would cost as much as training.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import RewardConfig, RewardTrainer

BOS, HEADER, END_HEADER, EOT, END, PAD = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|pad|>",
)
# Llama 3's split: line breaks stay whole, so a prompt's tokens do not depend on what follows it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + "
    "'<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
datasets.disable_progress_bars()
torch.set_flush_denormal(True)  # denormal numbers slow small CPU models down severalfold
MAX_POSITIONS = 512
INIT_STD = 0.06  # near 1/sqrt(hidden): the usual 0.02 wastes the first hundred steps of a short run


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama 3's special tokens; end of turn is EOS, and padding is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, END, HEADER, END_HEADER, EOT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system", "user", "assistant", "\n\n"] * len(
        texts
    )  # as frequent as in conversations: one token each
    tokenizer.train_from_iterator(texts + roles, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        additional_special_tokens=[HEADER, END_HEADER, END],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> dict[str, list[int]]:
    """Token ids of each prompt with the chat template applied, up to where the response begins."""
    texts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        tokenize=False,
        add_generation_prompt=True,
    )
    return dict(zip(prompts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))


def response_ids(tokenizer: PreTrainedTokenizerFast, responses: list[str]) -> list[list[int]]:
    ids = tokenizer(responses, add_special_tokens=False)["input_ids"]
    return [tokens + [tokenizer.eos_token_id] for tokens in ids]


def new_policy(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A small Llama with random weights; heads of 64 because vLLM's CPU attention asks for a multiple of
    32.
    """
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            max_position_embeddings=MAX_POSITIONS,
            initializer_range=INIT_STD,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def load_policy(folder: str | Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A policy that was saved, with its tokenizer."""
    return LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def trainer_settings(batch_size: int, learning_rate: float, seed: int, scratch: str) -> dict:
    """What both trainers share: one pass on the CPU, quiet, nothing saved on the way."""
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "adam_beta2": 0.95,
        "num_train_epochs": 1,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 100,
    }


class Imitation(Trainer):
    """SFT with logits for the responses' tokens alone, a third of all here. TRL's SFTTrainer computes all of
    them where there is no Triton, which takes half of its time with a model this small.
    """

    def compute_loss(
        self,
        model: LlamaForCausalLM,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        labels = inputs.pop("labels")[:, 1:]
        hidden, asked = model.model(**inputs).last_hidden_state[:, :-1], labels != -100
        return torch.nn.functional.cross_entropy(model.lm_head(hidden[asked]), labels[asked])


class Progress(TrainerCallback):
    """One line of our own in place of the trainer's dictionaries."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: object,
    ):
        if logs and "loss" in logs:
            told = f", accuracy {float(logs['accuracy']):.2f}" if "accuracy" in logs else ""
            self.say(f"  step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}{told}")


def run(trainer: Trainer, say: Callable[[str], None]) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(say))
    trainer.train()


def train_sft(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
    batch_size: int,
    learning_rate: float,
    seed: int,
    say: Callable,
) -> None:
    """Imitate (prompt, response) pairs, in place."""
    prompts = prompt_ids(tokenizer, sorted({prompt for prompt, _ in pairs}))
    rows = []
    for (prompt, _), response in zip(
        pairs, response_ids(tokenizer, [text for _, text in pairs]), strict=True
    ):
        before = prompts[prompt]
        rows.append({"input_ids": before + response, "labels": [-100] * len(before) + response})
    with tempfile.TemporaryDirectory() as scratch:
        settings = trainer_settings(batch_size, learning_rate, seed, scratch)
        trainer = Imitation(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        run(trainer, say)


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[str]:
    """One sampled response per prompt, prompts of similar length together."""
    torch.manual_seed(seed)
    model.eval()
    ids = prompt_ids(tokenizer, sorted(set(prompts)))
    order = sorted(range(len(prompts)), key=lambda i: len(ids[prompts[i]]))
    responses = [""] * len(prompts)
    for start in range(0, len(order), 512):
        rows = order[start : start + 512]
        batch = tokenizer.pad({"input_ids": [ids[prompts[i]] for i in rows]}, return_tensors="pt")
        width = batch["input_ids"].shape[1]
        out = model.generate(
            **batch,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
        )
        for i, text in zip(
            rows, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), strict=True
        ):
            responses[i] = text
    return responses


def new_reward_model(policy: LlamaForCausalLM, seed: int) -> LlamaForSequenceClassification:
    """A classifier of the policy's shape with one output and fresh weights.

    Fresh, unlike at full size: from the SFT backbone it learned far slower here (after
    200 steps 65% of held-out sample pairs ranked right, against 76%).
    """
    set_seed(seed)
    settings = {
        key: value for key, value in policy.config.to_dict().items() if key not in ("id2label", "label2id")
    }
    return LlamaForSequenceClassification(LlamaConfig(**settings, num_labels=1))


def train_reward_model(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str, str]],
    batch_size: int,
    learning_rate: float,
    seed: int,
    say: Callable,
) -> None:
    """Bradley-Terry on (prompt, better response, worse response), in place."""
    prompts = prompt_ids(tokenizer, sorted({prompt for prompt, _, _ in pairs}))
    better = response_ids(tokenizer, [text for _, text, _ in pairs])
    worse = response_ids(tokenizer, [text for _, _, text in pairs])
    rows = [
        {"chosen_ids": prompts[prompt] + high, "rejected_ids": prompts[prompt] + low}
        for (prompt, _, _), high, low in zip(pairs, better, worse, strict=True)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        settings = trainer_settings(batch_size, learning_rate, seed, scratch)
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(max_length=None, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        run(trainer, say)


@torch.no_grad()
def score(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> list[float]:
    """Raw Bradley-Terry logit of each (prompt, response)."""
    model.eval()
    prompts = prompt_ids(tokenizer, sorted({prompt for prompt, _ in pairs}))
    responses = response_ids(tokenizer, [text for _, text in pairs])
    rows = [prompts[prompt] + response for (prompt, _), response in zip(pairs, responses, strict=True)]
    rewards = []
    for start in range(0, len(rows), 256):
        batch = tokenizer.pad(
            {"input_ids": rows[start : start + 256]}, padding_side="right", return_tensors="pt"
        )
        rewards += model(**batch).logits[:, 0].tolist()
    return rewards
