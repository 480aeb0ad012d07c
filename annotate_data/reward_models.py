"""Reward models: what a response is worth. A scorer is four methods, whatever kind of model stands behind it:

    encode(messages, response)  text → one `Row`; checks the turns, needs no weights
    load()                      the weights, on this process's device
    score_rows(rows)            one forward pass → a float for each row; MemoryError when the batch is too large
    score(pairs)                all of that for a list of (messages, response)

`BradleyTerry` is any `*ForSequenceClassification` of transformers with one label (FsfairX, Skywork-Reward, …). The
reward is its raw logit, for the text that these models were trained on: the reward model's own chat template over
prompt and response, one literal BOS string stripped from the front, then the tokenizer's own special tokens.
"""

import os
from array import array
from pathlib import Path
from typing import NamedTuple

from common import chat
from common.cli import UserError


class Row(NamedTuple):
    """One sequence for the model: its token ids, and how many were cut off at the left to make it fit."""

    ids: array
    cut: int


def in_batches(scorer, rows, batch_tokens):
    """Yield (indices into `rows`, their rewards) batch by batch, longest first, of `batch_tokens` padded tokens.

    Longest first, so that rows of a batch are alike and a batch that is too large for the memory shows at once: then
    batches are halved for good. A row longer than the budget is a batch of its own.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    at = 0
    while at < len(order):
        longest = max(1, len(rows[order[at]].ids))
        batch = order[at : at + max(1, batch_tokens // longest)]
        try:
            rewards = scorer.score_rows([rows[i] for i in batch])
        except MemoryError:
            if len(batch) == 1:
                raise UserError(f"out of memory on one sequence of {longest} tokens: lower --max_length") from None
            batch_tokens = len(batch) // 2 * longest
            print(f"out of memory with {len(batch)} × {longest} tokens, now {batch_tokens} a batch", flush=True)
            continue
        yield batch, rewards
        at += len(batch)


def one_line(error, limit=300):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


class BradleyTerry:
    """A sequence classifier with one label; reads config and tokenizer now, the weights in `load`.

    Args:
        name: local folder or hub name.
        max_length: tokens of a sequence, BOS included; capped by what the model and its tokenizer can take.
        dtype: `auto` (bfloat16 on a GPU, float32 on the CPU), `float32`, `bfloat16` or `float16`.
        chat_template: jinja file in place of the tokenizer's own template.
        attn_implementation: as transformers names it; `auto` takes flash_attention_2 where it is installed.

    Raises:
        UserError: not there, not a sequence classifier, several labels, no chat template.
    """

    def __init__(
        self,
        name,
        max_length=4096,
        dtype="auto",
        revision=None,
        chat_template=None,
        template_kwargs=None,
        trust_remote_code=False,
        attn_implementation="auto",
    ):
        import transformers

        transformers.logging.set_verbosity_error()  # its load report is judged in `load`
        transformers.utils.logging.disable_progress_bar()
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise UserError(f"no such reward model folder: {name}")
        self.name, self.dtype, self.attention, self.template_kwargs = name, dtype, attn_implementation, template_kwargs
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            self.config = transformers.AutoConfig.from_pretrained(name, **self.source)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, **self.source)
        except Exception as error:  # hub, file and remote code fail in many ways
            raise UserError(f"cannot load the reward model {name}: {one_line(error)}") from None
        kind = (self.config.architectures or ["no architecture"])[0]
        if not kind.endswith("ForSequenceClassification"):
            raise UserError(
                f"{name} is not a reward model of a kind known here: its config says {kind}, "
                "a ...ForSequenceClassification with one label is needed"
            )
        if self.config.num_labels != 1:
            raise UserError(f"{name} has num_labels = {self.config.num_labels}; a Bradley-Terry reward model has 1")
        chat.use_template(self.tokenizer, chat_template)
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(max_length, positions or max_length, self.tokenizer.model_max_length or max_length)
        self.largest_id = 0

    def encode(self, messages, response):
        """The `Row` of a response to `messages`, truncated on the left to `max_length`; a BOS in front stays."""
        try:
            turns = [*messages, {"role": "assistant", "content": response}]
            text = chat.render(self.tokenizer, turns, False, self.template_kwargs)
        except UserError as error:
            todo = "; give a template that takes them with --chat_template FILE, or leave out the turn it refuses"
            raise UserError(" ".join(str(error).split()) + (todo if self.tokenizer.chat_template else "")) from None
        bos = self.tokenizer.bos_token
        ids = self.tokenizer(text.removeprefix(bos) if bos else text, verbose=False)["input_ids"]
        cut = max(0, len(ids) - self.max_length)
        if cut:
            keep = 1 if ids[0] == self.tokenizer.bos_token_id else 0
            ids = ids[:keep] + ids[keep + cut :]
        self.largest_id = max(self.largest_id, *ids, 0)
        return Row(array("i", ids), cut)

    def load(self):
        """Put the weights on this rank's GPU, or on the CPU where there is none.

        Raises:
            UserError: does not load or fit, or weights are missing: a score head that was never trained gives noise.
        """
        import torch
        import transformers

        gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(self.device)
        elif "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
            cores = len(os.sched_getaffinity(0))  # accelerate's one thread a process is meant for GPUs
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        if self.dtype == "auto":
            self.dtype = "bfloat16" if gpu else "float32"
        if self.attention == "auto":
            # transformers' sdpa drops the soft-cap of Gemma-2's attention without a word
            softcap = getattr(self.config.get_text_config(), "attn_logit_softcapping", None)
            flash = gpu and self.dtype != "float32" and transformers.utils.is_flash_attn_2_available()
            self.attention = "flash_attention_2" if flash else "eager" if softcap else "sdpa"
        try:
            self.model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                self.name,
                dtype=getattr(torch, self.dtype),
                attn_implementation=self.attention,
                output_loading_info=True,
                device_map={"": self.device} if gpu else None,
                **self.source,
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.name} in {self.dtype} does not fit {self.device}: free it, or use a smaller model"
            ) from None
        except Exception as error:
            raise UserError(f"cannot load the reward model {self.name}: {one_line(error)}") from None
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"], key=lambda key: ("score" not in key, key))
            others = f" (and {len(missing) - 1} other weights)" if missing[1:] else ""
            raise UserError(
                f"{self.name} has no trained {missing[0]}{others}: its rewards would be random; "
                "give a checkpoint that was trained as a reward model"
            )
        if self.largest_id >= self.model.get_input_embeddings().num_embeddings:
            raise UserError(f"{self.name}: the tokenizer gives token {self.largest_id}, beyond the model's embeddings")
        self.model.eval()

    def score_rows(self, rows):
        """Raw logits of a list of `Row`s, in one padded forward pass.

        The last token is found by length: transformers looks for the last token that is not padding, and misses the
        true one where padding and end of turn are the same token.
        """
        import torch

        lengths = torch.tensor([len(row.ids) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), self.config.get_text_config().pad_token_id or 0)
        for i, row in enumerate(rows):
            ids[i, : lengths[i]] = torch.frombuffer(row.ids, dtype=torch.int32)
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        ids, mask, head = ids.to(self.device), mask.to(self.device), getattr(self.model, "score", None)
        try:
            with torch.inference_mode():
                if not isinstance(head, torch.nn.Linear):  # an encoder pools its first token: no trap there
                    return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
                hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                last = hidden[torch.arange(len(rows), device=self.device), lengths.to(self.device) - 1]
                bias = None if head.bias is None else head.bias.float()
                # the head in fp32: bf16 logits have 8 bits, and responses would tie that do not
                return torch.nn.functional.linear(last.float(), head.weight.float(), bias)[:, 0].tolist()
        except RuntimeError as error:  # the GPU's is OutOfMemoryError, the CPU allocator has only this text
            if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error).lower():
                raise
        torch.cuda.empty_cache()  # here the failed pass and its tensors are gone
        raise MemoryError

    def score(self, pairs, batch_tokens=16384):
        """Rewards of a list of (messages, response), in its order."""
        rows = [self.encode(messages, response) for messages, response in pairs]
        rewards = {}
        for batch, values in in_batches(self, rows, batch_tokens):
            rewards.update(zip(batch, values, strict=True))
        return [rewards[i] for i in range(len(rows))]
