"""What every reward model shares: its files, its tokenizer and template, its device, and one forward pass.

A scorer, of whatever kind, is

    name                       how it is called in `reward_parts`
    check(messages, tools)     refuses turns that it cannot take; needs no weights
    left_out(messages, tools)  what of a prompt's tools it does not see, in words
    load(), unload()           the weights, on this process's device
    score(records)             yields (index into `records`, {"rewards": K floats, "cut": sequences cut})

A record has `prompt` (messages) and `responses` (K texts). What is wrong with one record is a `BadRecord`.
"""

import gc
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from annotate_data.batches import WINDOW, Batches, Row, windows
from common import models
from common.chat import ChatTemplate, added_specials, encode_for_classifier
from common.cli import UserError, one_line
from common.devices import keep_memory

if TYPE_CHECKING:
    import torch

GPU_TOKENS, CPU_TOKENS = 16384, 2048  # of a forward pass; a CPU's caches like small ones
TRIED = 3  # sequences of the first group on which shared prompts are compared with the model's own attention


class BadRecord(UserError):
    """A record that cannot be scored; `index` is its place in the list that `score` was given."""

    def __init__(self, index, message):
        super().__init__(message)
        self.index = index


class Sequence(NamedTuple):
    """Token ids, and the positions whose hidden states are asked for."""

    ids: array
    positions: list


class Backbone:
    """A transformer and its tokenizer; reads config and tokenizer now, the weights in `load`.

    Args:
        name: local folder or hub name.
        max_length: tokens of a sequence, BOS included; capped by what the model and its tokenizer can take.
        dtype: `auto` (bfloat16 on a GPU, float32 on the CPU), `float32`, `bfloat16` or `float16`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with the model.
        attn_implementation: as transformers names it; `auto` takes flash_attention_2 where it is installed.
        batch_tokens: tokens of a forward pass; None: 16,384 on a GPU, 2,048 without.
        share_prompts: compute what the sequences of a group have in common once, where the architecture
            allows it.
        template: how its chat template is used; None: as it is.

    Raises:
        UserError: not there, or its config or tokenizer does not load.
    """

    what = "reward model"  # in errors
    compares = False  # whether a response's reward depends on the prompt's other responses
    too_long = "lower --max_length, and sequences are cut"  # what to do about one that does not fit

    def __init__(
        self,
        name,
        max_length=4096,
        dtype="auto",
        revision=None,
        trust_remote_code=False,
        attn_implementation="auto",
        batch_tokens=None,
        share_prompts=True,
        template=None,
    ):
        self.name, self.dtype, self.attention = name, dtype, attn_implementation
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.batches, self.model = Batches(batch_tokens, self.too_long), None
        self.share_prompts, self.before = share_prompts, None
        self.config = models.load_config(name, **self.source, what=self.what)
        self.tokenizer = models.load_tokenizer(name, **self.source)
        self.template = ChatTemplate(self.tokenizer, template)
        self.added = added_specials(self.tokenizer)
        self.apart = models.encoding_of_length(self.config)
        self.positions, told = models.positions(self.config), self.tokenizer.model_max_length
        if told and told * models.stretch(self.config) == self.positions:  # the length before stretching
            told = self.positions
        self.max_length = min(max_length, self.positions or max_length, told or max_length)

    def check(self, messages: list[dict], tools: list[dict] | None = None) -> None:
        """Refuse a prompt whose turns the chat template does not take."""
        self.render([*messages, {"role": "assistant", "content": "a"}], tools)

    def left_out(self, messages: list[dict], tools: list[dict] | None = None) -> list[str]:
        """What the chat template leaves out of a prompt's tools; see common/chat.py."""
        turns = [*messages, {"role": "assistant", "content": "a"}]
        return self.template.left_out(turns, False, tools)

    def render(self, turns: list[dict], tools: list[dict] | None = None) -> str:
        """The templated text of whole turns."""
        try:
            return self.template.render(turns, False, tools)
        except UserError as error:
            if not self.tokenizer.chat_template:
                raise
            todo = "give one that takes them with --chat_template FILE, or leave out the turn it refuses"
            raise UserError(f"{error}; {todo}") from None

    def encode(self, messages: list[dict], response: str, tools: list[dict] | None = None) -> Row:
        """The `Row` of a response, truncated on the left to `max_length`; a BOS or CLS in front stays."""
        text = self.render([*messages, {"role": "assistant", "content": response}], tools)
        ids = encode_for_classifier(self.tokenizer, text, self.added)
        if not ids:
            raise UserError("the chat template and the tokenizer make no token of it")
        cut = max(0, len(ids) - self.max_length)
        if cut:  # an encoder's head reads its CLS; a tokenizer may have either, or neither
            first = (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)
            keep = len(self.added[0]) or int(ids[0] in first)
            ids = ids[:keep] + ids[keep + cut :]
        return Row(array("i", ids), cut)

    def encode_all(self, records: list[dict]) -> tuple[list, list[int]]:
        """(groups of token ids, truncated sequences of each group) of records."""
        groups, cuts = [], []
        for index, record in enumerate(records):
            prompt, tools = record["prompt"], record.get("tools")
            try:
                rows = [self.encode(prompt, response, tools) for response in record["responses"]]
            except UserError as error:
                raise BadRecord(index, str(error)) from None
            groups.append([row.ids for row in rows])
            cuts.append(sum(row.cut > 0 for row in rows))
        return groups, cuts

    def load_weights(self, auto_class: type):
        """Put the weights on this rank's GPU, or on the CPU where there is none.

        Args:
            auto_class: class of transformers whose `from_pretrained` builds the model.

        Raises:
            UserError: does not load or fit, or weights are missing: what was never trained gives noise.
        """
        import torch

        gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu else "cpu")
        if gpu:
            torch.cuda.set_device(self.device)
        elif "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
            cores = len(os.sched_getaffinity(0))  # accelerate's one thread a process is meant for GPUs
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        if self.dtype == "auto":
            self.dtype = "bfloat16" if gpu else "float32"
        if self.attention == "auto":
            flash = gpu and self.dtype != "float32"
            self.attention = models.choose_attention(self.config, auto_class, flash)
        self.model, report = models.load_weights(
            auto_class,
            self.name,
            self.what,
            dtype=getattr(torch, self.dtype),
            attn_implementation=self.attention,
            device_map={"": self.device} if gpu else None,
            **self.source,
        )
        self.refuse_missing(report["missing_keys"])
        self.unplaced = report["unexpected_keys"]
        self.attention = self.attention or getattr(self.model.config, "_attn_implementation", None)
        embeddings = getattr(self.model.base_model, "embeddings", None)
        places, first = (getattr(embeddings, key, None) for key in ("position_embeddings", "padding_idx"))
        if isinstance(places, torch.nn.Embedding) and first is not None:  # RoBERTa's kind counts from there
            self.max_length = min(self.max_length, places.num_embeddings - first - 1)
        self.model.eval()
        self.batches.tokens = self.batches.tokens or (GPU_TOKENS if gpu else CPU_TOKENS)
        if not gpu:
            keep_memory()

    def refuse_missing(self, missing: Iterable[str]):
        """Refuse a checkpoint that lacks the weights `missing` (names)."""
        if missing:
            missing = sorted(missing, key=lambda key: ("score" not in key, key))
            others = f" (and {len(missing) - 1} other weights)" if missing[1:] else ""
            raise UserError(
                f"{self.name} has no trained {missing[0]}{others}: its rewards would be random; "
                "give a checkpoint that was trained as a reward model"
            )

    def unload(self):
        """Free the weights, so that the next model fits."""
        import torch

        self.model = self.before = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def hidden_states(
        self, groups: list[list[array]], positions: list[list[list[int]]]
    ) -> Iterator[tuple[int, "torch.Tensor"]]:
        """Last hidden states of groups of sequences; a group's share a prompt.

        Args:
            groups: list of groups, a group a list of token-id arrays.
            positions: for each sequence of each group the positions asked for; equally many everywhere.

        Yields:
            (index of a group, fp32 tensor [sequences, positions, hidden size] on the device), in any order.
        """
        import torch

        for g, states in self._in_passes(groups, positions, self._hidden, self._hidden_shared):
            yield g, torch.stack(states)

    def _in_passes(
        self,
        groups: list[list[array]],
        positions: list[list[list[int]]],
        padded: Callable,
        shared: Callable | None = None,
    ) -> Iterator[tuple[int, list]]:
        """What forward passes give for groups of sequences, in passes as large as the memory allows.

        Args:
            groups, positions: see `hidden_states`.
            padded: (list of `Sequence`s, their padded ids, their mask) → a result for each of them.
            shared: (groups of sequences, for each sequence its positions) → a result for each sequence, what
                a group has in common computed once; None: always `padded`.

        Yields:
            (index of a group, the results of its sequences), in any order.
        """
        self._check_ids(ids for group in groups for ids in group)
        if shared and self.share_prompts and self._prepared(groups):
            yield from self._in_shared_passes(groups, positions, shared)
        else:
            yield from self._in_padded_passes(groups, positions, padded)

    def _prepared(self, groups):
        """Whether the model computes shared prompts; the first call tries it, against its own attention."""
        import torch

        from annotate_data.packed_linear import pack_linears
        from common import shared_prompts

        while self.before is None and self.share_prompts:
            fits = [group for group in groups if sum(map(len, group)) <= self.batches.tokens]
            example = max(fits or groups, key=lambda group: max(map(len, group)))[:TRIED]
            lengths = [len(ids) for ids in example]
            try:
                self.before = self._in_memory(
                    lambda example=example: shared_prompts.prepare(self.model, example)
                )
                if self.device.type == "cpu":
                    pack_linears(getattr(self.model.base_model, "layers", torch.nn.ModuleList()))
            except (MemoryError, shared_prompts.Unsupported) as reason:
                if isinstance(reason, MemoryError) and fits and example[1:]:  # shorter ones may do
                    self.batches.shrink(len(example), max(lengths), sum(lengths))
                    continue
                self.share_prompts = False
                told = reason if str(reason) else f"no memory to try {max(lengths)} tokens"
                print(f"note: {self.name} computes each response's prompt separately: {told}", flush=True)
        return self.share_prompts

    def _in_shared_passes(self, groups, positions, forward):
        from common import shared_prompts

        found, left = {}, {g: list(range(len(group))) for g, group in enumerate(groups)}
        while left:
            planned = list(left.items())
            sequences = [[groups[g][k] for k in numbers] for g, numbers in planned]
            for batch in shared_prompts.plan(sequences, self.batches.tokens):
                places = [(planned[n][0], planned[n][1][i]) for n, part in batch for i in part]
                parts = [[sequences[n][i] for i in part] for n, part in batch]
                asked = [positions[g][k] for g, k in places]
                try:
                    results = self._in_memory(lambda parts=parts, asked=asked: forward(parts, asked))
                except MemoryError:
                    size = sum(map(shared_prompts.packed_tokens, parts))
                    self.batches.shrink(len(places), max(len(groups[g][k]) for g, k in places), size)
                    break  # what is left is planned again
                found.update(zip(places, results, strict=True))
                for g in dict.fromkeys(g for g, _ in places):
                    left[g] = [k for k in left[g] if (g, k) not in found]
                    if not left[g]:
                        del left[g]
                        yield g, [found.pop((g, k)) for k in range(len(groups[g]))]

    def _in_padded_passes(self, groups, positions, forward):
        def guarded(rows: list[Sequence]) -> list:
            return self._guarded(forward, rows)

        for window in windows(groups, WINDOW * self.batches.tokens):
            places = [(g, k) for g in window for k in range(len(groups[g]))]
            rows = [Sequence(groups[g][k], positions[g][k]) for g, k in places]
            found = {}
            for batch, results in self.batches.run(guarded, rows, self.apart):
                found.update(zip((places[i] for i in batch), results, strict=True))
            for g in window:
                yield g, [found[g, k] for k in range(len(groups[g]))]

    def _check_ids(self, sequences):
        """Refuse a tokenizer that gives more tokens than the model has embeddings."""
        largest = max((max(ids, default=0) for ids in sequences), default=0)
        models.check_embeddings(self.name, largest, self.model.get_input_embeddings().num_embeddings)

    def _guarded(self, forward, rows):
        """`forward` of padded rows; MemoryError where they are too many."""
        try:
            if self.apart:  # a short pass: else transformers goes on with the frequencies of a longer one
                self._in_memory(lambda: self.model.base_model(input_ids=self._padded(rows)[0][:1, :1]))
            return self._in_memory(lambda: forward(rows, *self._padded(rows)))
        except (RuntimeError, ValueError, IndexError) as error:  # the model's own code
            what = f"{len(rows)} sequences of up to {max(len(row.ids) for row in rows)} tokens"
            raise UserError(f"{self.name} fails on {what}: {one_line(error)}; {self.too_long}") from None

    def _in_memory(self, action):
        """`action()` without gradients; running out of memory is a MemoryError."""
        import torch

        try:
            with torch.inference_mode():
                return action()
        except RuntimeError as error:  # the GPU's is OutOfMemoryError, the CPU allocator has only this text
            if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error).lower():
                raise
        torch.cuda.empty_cache()  # here the failed pass and its tensors are gone
        raise MemoryError

    def _padded(self, rows):
        """Token ids and attention mask [rows, longest] of rows, padded on the right, on the device."""
        import torch

        lengths = torch.tensor([len(row.ids) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), self.config.get_text_config().pad_token_id or 0)
        for i, row in enumerate(rows):
            ids[i, : lengths[i]] = torch.frombuffer(row.ids, dtype=torch.int32)
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        return ids.to(self.device), mask.to(self.device)

    def _hidden(self, rows, ids, mask):
        import torch

        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        at = torch.tensor([row.positions for row in rows], device=hidden.device)
        return list(hidden[torch.arange(len(rows), device=hidden.device)[:, None], at].float())

    def _hidden_shared(self, groups, positions):
        from common import shared_prompts

        packed = shared_prompts.pack(groups, self.device)
        last = [[len(ids) - 1] for group in groups for ids in group]
        if positions == last:
            return shared_prompts.last_states(self.model.base_model, packed)[:, None].float()
        hidden = shared_prompts.hidden_states(self.model.base_model, packed)
        return [hidden[at[asked]].float() for at, asked in zip(packed.columns(), positions, strict=True)]
