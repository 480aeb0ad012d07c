"""One forward pass over responses to the same prompt that computes the prompt once, exactly.

    prepare(model, example)               switch a transformers model to it; refuses what it cannot compute
    packed = pack(groups)                 groups of token-id sequences → one row without padding
    hidden = hidden_states(model, packed) [T, hidden], every token's state
    states = last_states(model, packed)   [sequences, hidden], the last tokens' alone: less work
    plan(groups, budget)                  which sequences go into which pass

What the sequences of a group have in common from the left stands once in the row, then comes each sequence's
own part; positions go on from the shared prefix for each of them:

    ids        p0 p1 p2 | a3 a4 | b3 b4 b5 |  q0 …
    positions   0  1  2 |  3  4 |  3  4  5 |   0 …

Layers other than attention work on single tokens, so only attention needs to know. Our own function replaces
it (transformers' AttentionInterface) and finds the layout in the keyword argument `shared_prompts`, which
models hand on to their layers. transformers builds no mask, since its masks do not know the function's name.

Autograd and gradient checkpointing work through it. Training asks each column for its next token:
`labelled=True` shares one token less, so that each sequence has a column for the state from which they part.

On a GPU in half precision all spans of a row are one call of torch's variable-length attention; elsewhere
each span is a call of its own.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import ModelOutput

NAME = "shared_prompts"
LAYERS = {"full_attention", "sliding_attention"}
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of relative distances in `prepare`
HALF_TOLERANCE = 0.05  # bfloat16 and float16, whose rounding depends on the layout


class Unsupported(Exception):
    """Why a model cannot share prompts, in one line; score it with padded batches instead."""


class Group(NamedTuple):
    """A group in the row: from column `start`, `prefix` shared tokens, then own parts of `own` tokens."""

    start: int
    prefix: int
    own: tuple[int, ...]


@dataclass
class Packed:
    """A row of groups.

    ids, positions: [1, T] int64.
    groups: where each group stands; sequences are numbered through all groups, in the order given.
    last: [sequences] column of each sequence's last token.
    wanted: [n] columns whose last states are wanted; None for all. See `only_wanted`.
    only_last: the attention module that is asked for `last` alone.
    masks: masks and layouts of spans, kept for the pass, since layers need the same ones.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    groups: list[Group]
    last: torch.Tensor
    wanted: torch.Tensor | None = None
    only_last: torch.nn.Module | None = None
    masks: dict = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Packed":
        """The same row with its tensors on another device."""
        tensors = {key: getattr(self, key) for key in ("ids", "positions", "last", "wanted")}
        moved = {key: t.to(device, non_blocking=True) for key, t in tensors.items() if t is not None}
        return replace(self, masks={}, **moved)

    def spans(self, narrow: bool = False) -> Iterator[tuple[int, int, int, int]]:
        """Queries that attend together: (first column, columns, first column of the prefix, its columns).

        Their keys are the prefix and the columns themselves. `narrow` asks each sequence's last column only.
        """
        for start, prefix, own in self.groups:
            if prefix and not narrow:
                yield start, prefix, start, 0
            at = start + prefix
            for length in own:
                yield at, length, start, prefix
                at += length

    def columns(self) -> list[torch.Tensor]:
        """Each sequence's columns [length]: `hidden[columns[s]]` is as if sequence s had been alone."""
        device = self.ids.device
        return [
            torch.cat([torch.arange(start, start + prefix), torch.arange(at, at + length)]).to(device)
            for at, length, start, prefix in self.spans(narrow=True)
        ]


def shared(sequences: list[Sequence[int]], labelled: bool = False) -> int:
    """How many tokens a group's sequences have in common from the left, with at least one left for each.

    `labelled`: so many that each shared token has the same next token in all sequences.

    Raises:
        ValueError: a sequence without tokens.
    """
    shortest = min(map(len, sequences))
    if not shortest:
        raise ValueError("a sequence has no tokens")
    if len(sequences) == 1:
        return 0
    low, high = min(sequences), max(sequences)  # what these two share all share: the others lie between
    limit = shortest if labelled else shortest - 1
    common = next((i for i in range(limit) if low[i] != high[i]), limit)
    return max(0, common - 1) if labelled else common


def packed_tokens(sequences: list[Sequence[int]], labelled: bool = False) -> int:
    """Columns that a group takes in a row."""
    return sum(map(len, sequences)) - (len(sequences) - 1) * shared(sequences, labelled)


def plan(groups: list[list[Sequence[int]]], budget: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Batches of at most `budget` columns, largest first, as lists of (group, [its sequences]) by number.

    A group too large for a batch is cut into parts that each bring the prefix; a sequence longer than the
    budget is a batch of its own.
    """
    parts = []
    for g, sequences in enumerate(groups):
        prefix, part, size = shared(sequences), [], 0
        for s, sequence in enumerate(sequences):
            if part and size + len(sequence) - prefix > budget:
                parts.append((size, g, part))
                part, size = [], 0
            size += len(sequence) - (prefix if part else 0)
            part.append(s)
        parts.append((size, g, part))
    batch, total = [], 0
    for size, g, part in sorted(parts, key=lambda part: -part[0]):
        if batch and total + size > budget:
            yield batch
            batch, total = [], 0
        batch.append((g, part))
        total += size
    if batch:
        yield batch


def pack(
    groups: list[list[Sequence[int]]], device: torch.device | str = "cpu", labelled: bool = False
) -> Packed:
    """Lay out groups of token-id sequences (lists or arrays of int) in one row.

    Args:
        groups: each a list of sequences; what they share is found in the ids, so they may be truncated.
        labelled: see `shared`.
    """
    ids, positions, layout, last = [], [], [], []
    for sequences in groups:
        prefix, start = shared(sequences, labelled), len(ids)
        ids.extend(sequences[0][:prefix])
        positions.extend(range(prefix))
        for sequence in sequences:
            ids.extend(sequence[prefix:])
            positions.extend(range(prefix, len(sequence)))
            last.append(len(ids) - 1)
        layout.append(Group(start, prefix, tuple(len(sequence) - prefix for sequence in sequences)))
    ids, positions, last = (torch.tensor(values, device=device) for values in (ids, positions, last))
    return Packed(ids[None], positions[None], layout, last)


def hidden_states(backbone: torch.nn.Module, packed: Packed) -> torch.Tensor:
    """Last hidden states of every column, [T, hidden]; `backbone` is a prepared model without its head."""
    row = {"input_ids": packed.ids, "position_ids": packed.positions, "shared_prompts": packed}
    output = backbone(**row, use_cache=False)
    return output.last_hidden_state[0]


def last_states(backbone: torch.nn.Module, packed: Packed) -> torch.Tensor:
    """Last hidden states of each sequence's last token, [sequences, hidden].

    Behind its keys and values, the last layer's attention and projections work on these columns only and
    leave zeros in the others.
    """
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        return hidden_states(backbone, packed)[packed.last]

    def _narrow(_, given):
        return given[0][:, packed.last], *given[1:]

    with contextlib.ExitStack() as hooks:
        packed.only_last = layers[-1].self_attn
        hooks.callback(setattr, packed, "only_last", None)
        for module in (getattr(layers[-1].self_attn, "o_proj", None), getattr(layers[-1], "mlp", None)):
            if module is not None:
                hooks.callback(module.register_forward_pre_hook(_narrow).remove)
                hook = module.register_forward_hook(lambda _, __, made: _spread(made, packed))
                hooks.callback(hook.remove)
        return hidden_states(backbone, packed)[packed.last]


def only_wanted(backbone: torch.nn.Module) -> RemovableHandle:
    """Let a prepared backbone return the last states of `Packed.wanted` alone, [1, n, hidden], where set.

    A language model's head then works on these columns only. Returns the hook's handle.
    """

    def select(_: torch.nn.Module, given: tuple, named: dict, output: ModelOutput) -> ModelOutput:
        packed = named.get("shared_prompts")
        if packed is not None and packed.wanted is not None:
            output.last_hidden_state = output.last_hidden_state[:, packed.wanted]
        return output

    return backbone.register_forward_hook(select, with_kwargs=True)


def _spread(made, packed):
    """An output at the last columns, [1, sequences, …], with zeros at the others: [1, T, …]."""
    if isinstance(made, tuple):  # mixtures of experts give their router's logits, too
        return (_spread(made[0], packed), *made[1:])
    return made.new_zeros(1, packed.ids.shape[1], *made.shape[2:]).index_copy(1, packed.last, made)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prompts: Packed | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """What layers call with query, key, value [1, heads, T, width]; returns ([1, T, heads, width], None)."""
    packed = shared_prompts
    if packed is None:
        raise RuntimeError("a model prepared for shared prompts was called without `shared_prompts`")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or dropout or not causal or s_aux is not None:
        raise Unsupported("its attention has a mask, dropout or sinks, or looks ahead")
    types = getattr(module.config, "layer_types", None)
    if types and types[module.layer_idx] == "sliding_attention" and sliding_window is None:
        raise Unsupported("its layers do not say how wide their windows are")
    if packed.ids.shape[1] != query.shape[2]:
        raise Unsupported("its attention sees another number of tokens than there are")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.dtype != value.dtype:  # under autocast, rotary positions made query and key fp32
        query, key = query.to(value.dtype), key.to(value.dtype)
    narrow = module is packed.only_last
    if uses_varlen(query, softcap):
        made = _attend_all(query, key, value, scaling, sliding_window, packed, narrow)
        return _spread(made, packed) if narrow else made, None
    parts = []
    for at, length, start, before in packed.spans(narrow):
        end = at + length
        keys, values = key[:, :, at:end], value[:, :, at:end]
        if before:
            keys = torch.cat([key[:, :, start : start + before], keys], 2)
            values = torch.cat([value[:, :, start : start + before], values], 2)
        queries = query[:, :, end - 1 if narrow else at : end]
        part = _attend(queries, keys, values, scaling, sliding_window, softcap, packed.masks)
        parts.append(part.transpose(1, 2))
    made = torch.cat(parts, 1)
    return _spread(made, packed) if narrow else made, None


def uses_varlen(query: torch.Tensor, softcap: float | None) -> bool:
    """Whether torch's variable-length attention (flash kernels) computes this: on a GPU, half precision."""
    if not on_gpu(query) or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not softcap and query.shape[-1] <= 256 and torch.cuda.get_device_capability()[0] >= 8


def on_gpu(tensor: torch.Tensor) -> bool:
    """A function, so that a test can take the GPU's branches without one."""
    return tensor.is_cuda


def _attend_all(query, key, value, scaling, window, packed, narrow):
    """All spans in one call: query, key, value [1, heads, T, width] → [1, queries, heads, width].

    The kernel's causal mask ends with the last query at the last key, as a span behind its prefix needs it.
    """
    name = "narrow" if narrow else "spans"
    if name not in packed.masks:
        packed.masks[name] = _layout(packed, narrow, query.device)
    columns, *lengths = packed.masks[name]
    query = query[0].transpose(0, 1)
    if narrow:
        query = query[packed.last]
    key, value = key[0].transpose(0, 1)[columns], value[0].transpose(0, 1)[columns]
    sizes = (-1 if window is None else window - 1, 0)
    grouped = query.shape[1] != key.shape[1]
    return varlen_attn(
        query.contiguous(), key, value, *lengths, scale=scaling, window_size=sizes, enable_gqa=grouped
    )[None]


@torch.inference_mode(False)  # see `_mask`
def _layout(packed, narrow, device):
    """(columns of all spans' keys [K], starts of queries and of keys [S + 1], the longest of each)."""
    columns, queries, keys = [], [0], [0]
    for at, length, start, before in packed.spans(narrow):
        columns += [torch.arange(start, start + before), torch.arange(at, at + length)]
        queries.append(1 if narrow else length)
        keys.append(before + length)
    starts = [torch.tensor(lengths, device=device).cumsum(0).to(torch.int32) for lengths in (queries, keys)]
    return torch.cat(columns).to(device), *starts, max(queries), max(keys)


def _attend(query, key, value, scaling, window, softcap, masks):
    """Causal attention of the last columns: query i of n sees keys up to N - n + i, the latest `window`."""
    length, total = query.shape[2], key.shape[2]
    window = window if window and window < total else None
    repeats = query.shape[1] // key.shape[1]
    # Only flash kernels group heads.
    if softcap or on_gpu(query) and repeats > 1 and (window or query.dtype == torch.float32):
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if softcap:  # no kernel of torch's has it
        scores = softcap * torch.tanh(query @ key.mT * (scaling / softcap))
        weights = (scores + _mask(length, total, window, query, masks)).softmax(-1, dtype=torch.float32)
        return weights.to(value.dtype) @ value
    if length in (1, total) and not window:
        mask = None
    elif on_gpu(query) and not window:
        mask = causal_lower_right(length, total)
    else:
        mask = _mask(length, total, window, query, masks)
    causal, grouped = mask is None and length > 1, query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
    )


@torch.inference_mode(False)  # else a mask made in scoring could not be used where gradients are wanted
def _mask(length, total, window, like, masks):
    """Added to scores [length, total]: 0 where a query may look, −inf elsewhere."""
    shape = (length, total, window)
    if shape not in masks:
        may = torch.ones(length, total, dtype=torch.bool, device=like.device).tril(total - length)
        if window:
            may = may.triu(total - length - window + 1)
        zeros = torch.zeros(length, total, dtype=like.dtype, device=like.device)
        masks[shape] = zeros.masked_fill(~may, float("-inf"))
    return masks[shape]


AttentionInterface.register(NAME, attention)


def reason_against(model: PreTrainedModel) -> str:
    """Why `model` cannot share prompts, as a phrase; empty when nothing speaks against it."""
    config = model.config
    if config.get_text_config() is not config or getattr(config, "is_encoder_decoder", False):
        return "it is not a model of text alone with one stack of layers"
    if getattr(model, "_is_stateful", False) or getattr(model.base_model, "_is_stateful", False):
        return "its layers are recurrent"
    if not (model._supports_attention_backend and model.base_model._can_set_attn_implementation()):
        return "its attention cannot be replaced"
    causal = [getattr(module, "is_causal", True) for module in model.modules()]
    looks_ahead = not all(causal) or getattr(config, "is_causal", True) is False
    if looks_ahead or getattr(config, "use_bidirectional_attention", False):
        return "it looks ahead, as encoders do"
    odd = set(getattr(config, "layer_types", None) or ()) - LAYERS
    if odd:
        return f"it has layers of the kind {', '.join(sorted(odd))}"
    odd = {kind for kind in _rope_types(config) if "dynamic" in kind or kind == "longrope"}
    if odd:
        return f"its position encoding ({', '.join(sorted(odd))}) depends on the longest sequence of a pass"
    return ""


def is_rotary(model: PreTrainedModel) -> bool:
    """Whether positions count by their distances alone: moved together, they change nothing but rounding."""
    return bool(_rope_types(model.config))


def _rope_types(config):
    """Kinds of rotary encoding in a config, which holds one for all layers or one for each kind of layer."""
    found = set()
    for holder in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        for settings in (holder, *holder.values()) if isinstance(holder, dict) else ():
            if isinstance(settings, dict):
                found |= {str(settings[key]) for key in ("rope_type", "type") if key in settings}
    return found


def prepare(model: PreTrainedModel, example: list[Sequence[int]] | None = None) -> str:
    """Switch `model` (in evaluation or training) to shared prompts; call it by `hidden_states` from then on.

    Args:
        model: transformers model, with or without a head.
        example: a group of token-id sequences, for which the model must give the hidden states that it gives
            for one sequence at a time with its present attention. Windows show only in sequences longer than
            they are.

    Returns:
        the attention it had: `model.set_attn_implementation(that)` switches back.

    Raises:
        Unsupported: the model is as it was; so it is where the trial runs out of a GPU's memory.
    """
    if reason := reason_against(model):
        raise Unsupported(reason)
    before = model.own_attention = model.config._attn_implementation
    expected = _one_at_a_time(model.base_model, example) if example else None
    model.set_attn_implementation(NAME)
    if not example:
        return before
    try:
        apart = _apart(model.base_model, example, expected)
        limit = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
        if not apart <= limit:
            raise Unsupported(
                f"its states differ by {apart:.2g} from those of one sequence at a time (at most {limit:g} "
                "is rounding)"
            )
    except Exception as error:
        model.set_attn_implementation(before)
        if isinstance(error, (Unsupported, torch.OutOfMemoryError)):
            raise
        raise Unsupported(f"a trial failed: {type(error).__name__}: {error}") from error
    return before


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a prepared model compute padded batches for a while, with the attention that it had before."""
    model.set_attn_implementation(model.own_attention)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


@torch.no_grad()
def _one_at_a_time(backbone, sequences):
    device = backbone.get_input_embeddings().weight.device
    rows = (torch.tensor([list(sequence)], device=device) for sequence in sequences)
    return [
        backbone(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).last_hidden_state[0]
        for row in rows
    ]


@torch.no_grad()
def _apart(backbone, sequences, expected):
    """Largest relative distance of a sequence's states, ‖ours − its own‖ / ‖its own‖ over its tokens."""
    packed = pack([sequences], backbone.get_input_embeddings().weight.device)
    hidden, last = hidden_states(backbone, packed), last_states(backbone, packed)
    ours = [*(hidden[columns] for columns in packed.columns()), *last]
    alone = [*expected, *(states[-1] for states in expected)]
    distances = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(ours, alone, strict=True)]
    return max(map(float, distances))
