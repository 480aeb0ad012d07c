"""One forward pass over responses to the same prompt that computes the prompt once, exactly.

    prepare(model, example)               switch a transformers model to it; refuses what it cannot compute
    packed = pack(groups)                 groups of token-id sequences → one row without padding
    hidden = hidden_states(model, packed) [T, hidden], every token's state
    states = last_states(model, packed)   [sequences, hidden], the last tokens' alone: less work in the end
    plan(groups, budget)                  which sequences go into which pass

The sequences of a group share what their token ids have in common from the left. The row is, group by group,
the
shared prefix and then each sequence's own part; positions restart behind the prefix for each of them:

    ids        p0 p1 p2 | a3 a4 | b3 b4 b5 |  q0 …
    positions   0  1  2 |  3  4 |  3  4  5 |   0 …

Layers other than attention work on single tokens, so only attention needs to know. A function of ours stands
in for it (transformers' AttentionInterface) and finds the layout in the keyword argument `shared_prompts`,
which models hand on to their layers. No mask is built: under a name that transformers' masks do not know, it
makes none.

Autograd and gradient checkpointing work through it. Training asks each column for its next token:
`labelled=True` shares one token less, so that the state from which the sequences part stands in each of them.

On a GPU, in half precision, all spans of a row are one call of torch's variable-length attention, with the
keys of each span gathered; elsewhere each span is a call of its own.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
    """Where a group stands in the row: from column `start`, `prefix` shared tokens, then own parts of `own`
    tokens.
    """

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
    """

    ids: torch.Tensor
    positions: torch.Tensor
    groups: list[Group]
    last: torch.Tensor
    wanted: torch.Tensor | None = None
    only_last: torch.nn.Module | None = None  # attention that is wanted at `last` only
    masks: dict = field(
        default_factory=dict
    )  # and layouts of spans, kept for the pass: layers need the same ones

    def to(self, device: torch.device | str) -> "Packed":
        """The same row with its tensors on another device."""
        moved = [
            None if t is None else t.to(device, non_blocking=True)
            for t in (self.ids, self.positions, self.last, self.wanted)
        ]
        return Packed(moved[0], moved[1], self.groups, moved[2], moved[3])

    def spans(self, narrow: bool = False) -> Iterator[tuple[int, int, int, int]]:
        """Queries that attend together: lists of (first column, columns, first column of the prefix, its
        columns).

        Their keys are the prefix and the columns themselves. `narrow` asks only the last column of each
        sequence.
        """
        for start, prefix, own in self.groups:
            if prefix and not narrow:
                yield start, prefix, start, 0
            at = start + prefix
            for length in own:
                yield at, length, start, prefix
                at += length

    def columns(self) -> list[torch.Tensor]:
        """For each sequence, the [length] columns of its tokens: `hidden[columns[s]]` is as if it had been
        alone.
        """
        made = []
        for start, prefix, own in self.groups:
            at = start + prefix
            for length in own:
                made.append(torch.cat([torch.arange(start, start + prefix), torch.arange(at, at + length)]))
                at += length
        return [columns.to(self.ids.device) for columns in made]


def shared(sequences: list[Sequence[int]], labelled: bool = False) -> int:
    """How many tokens a group's sequences have in common from the left, with at least one left over for each.

    `labelled`: so many that each shared token has the same next token in all sequences.

    Raises:
        ValueError: a sequence without tokens.
    """
    shortest = min(map(len, sequences))
    if not shortest:
        raise ValueError("a sequence has no tokens")
    if len(sequences) == 1:
        return 0
    low, high = (
        min(sequences),
        max(sequences),
    )  # all others lie between them, so what these two share all share
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
    output = backbone(
        input_ids=packed.ids, position_ids=packed.positions, use_cache=False, shared_prompts=packed
    )
    return output.last_hidden_state[0]


def last_states(backbone: torch.nn.Module, packed: Packed) -> torch.Tensor:
    """Last hidden states of each sequence's last token, [sequences, hidden].

    What the last layer computes for other tokens after its keys and values would be thrown away, so its
    attention and its projections work on these columns only and leave zeros in the others.
    """
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        return hidden_states(backbone, packed)[packed.last]
    with contextlib.ExitStack() as hooks:
        packed.only_last = layers[-1].self_attn
        hooks.callback(setattr, packed, "only_last", None)
        for module in (getattr(layers[-1].self_attn, "o_proj", None), getattr(layers[-1], "mlp", None)):
            if module is not None:
                hooks.callback(
                    module.register_forward_pre_hook(
                        lambda _, given: (given[0][:, packed.last], *given[1:])
                    ).remove
                )
                hooks.callback(module.register_forward_hook(lambda _, __, made: _spread(made, packed)).remove)
        return hidden_states(backbone, packed)[packed.last]


def only_wanted(backbone: torch.nn.Module) -> RemovableHandle:
    """Let a prepared backbone return the last states of `Packed.wanted` alone, [1, n, hidden], where that is
    set.

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
    """What transformers' layers call: query, key, value [1, heads, T, width] → ([1, T, heads, width],
    None).
    """
    if shared_prompts is None:
        raise RuntimeError(
            "a model prepared for shared prompts was called without `shared_prompts`, or its layers do not "
            "receive it"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or dropout or not causal or s_aux is not None:
        raise Unsupported("its attention has a mask, dropout or sinks, or looks ahead")
    types = getattr(module.config, "layer_types", None)
    if types and types[module.layer_idx] == "sliding_attention" and sliding_window is None:
        raise Unsupported("its layers do not say how wide their windows are")
    if shared_prompts.ids.shape[1] != query.shape[2]:
        raise Unsupported("its attention sees another number of tokens than there are")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (
        query.dtype != value.dtype
    ):  # autocast over fp32 weights: rotary positions made query and key fp32, value is half
        query, key = query.to(value.dtype), key.to(value.dtype)
    narrow = module is shared_prompts.only_last
    if uses_varlen(query, softcap):
        made = _attend_all(query, key, value, scaling, sliding_window, shared_prompts, narrow)
        return _spread(made, shared_prompts) if narrow else made, None
    parts = []
    for at, length, start, before in shared_prompts.spans(narrow):
        end, asked = at + length, 1 if narrow else length
        keys, values = key[:, :, at:end], value[:, :, at:end]
        if before:
            keys = torch.cat([key[:, :, start : start + before], keys], 2)
            values = torch.cat([value[:, :, start : start + before], values], 2)
        queries = query[:, :, end - asked : end]
        parts.append(
            _attend(queries, keys, values, scaling, sliding_window, softcap, shared_prompts.masks).transpose(
                1, 2
            )
        )
    made = torch.cat(parts, 1)
    return _spread(made, shared_prompts) if narrow else made, None


def uses_varlen(query: torch.Tensor, softcap: float | None) -> bool:
    """Whether torch's variable-length attention computes this: flash kernels, so CUDA and half precision, no
    soft-cap.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    return (
        on_gpu(query)
        and half
        and not softcap
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability()[0] >= 8
    )


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether torch's CUDA kernels compute with it; a function, so that a test can take their branches
    without a GPU.
    """
    return tensor.is_cuda


def _attend_all(query, key, value, scaling, window, packed, narrow):
    """All spans in one call: query, key, value [1, heads, T, width] → [1, queries, heads, width].

    The kernel takes a causal mask to end with the last query at the last key, which is what a span behind its
    prefix needs.
    """
    name = "narrow" if narrow else "spans"
    if name not in packed.masks:
        packed.masks[name] = _layout(packed, narrow, query.device)
    columns, starts_q, starts_k, most_q, most_k = packed.masks[name]
    query = query[0].transpose(0, 1)
    if narrow:
        query = query[packed.last]
    key, value = key[0].transpose(0, 1)[columns], value[0].transpose(0, 1)[columns]
    left = -1 if window is None else window - 1
    grouped = query.shape[1] != key.shape[1]
    return varlen_attn(
        query.contiguous(),
        key,
        value,
        starts_q,
        starts_k,
        most_q,
        most_k,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=grouped,
    )[None]


@torch.inference_mode(False)  # see `_mask`
def _layout(packed, narrow, device):
    """(columns of all spans' keys [K], where queries [S + 1] and keys [S + 1] of a span start, the longest of
    each).
    """
    columns, queries, keys = [], [0], [0]
    for at, length, start, before in packed.spans(narrow):
        columns += [torch.arange(start, start + before), torch.arange(at, at + length)]
        queries.append(1 if narrow else length)
        keys.append(before + length)
    starts = [torch.tensor(lengths, device=device).cumsum(0).to(torch.int32) for lengths in (queries, keys)]
    return torch.cat(columns).to(device), *starts, max(queries), max(keys)


def _attend(query, key, value, scaling, window, softcap, masks):
    """Causal attention of the last columns: query i of n sees the keys up to N - n + i, the latest `window`
    of them.
    """
    length, total = query.shape[2], key.shape[2]
    window = window if window and window < total else None
    repeats = query.shape[1] // key.shape[1]
    if softcap:  # no kernel of torch's has it
        scores = softcap * torch.tanh(query @ key.repeat_interleave(repeats, 1).mT * (scaling / softcap))
        weights = (scores + _mask(length, total, window, query, masks)).softmax(-1, dtype=torch.float32)
        return weights.to(value.dtype) @ value.repeat_interleave(repeats, 1)
    if length in (1, total) and not window:
        mask = None
    elif on_gpu(query) and not window:
        mask = causal_lower_right(length, total)
    else:
        mask = _mask(length, total, window, query, masks)
    if on_gpu(query) and repeats > 1 and (window or query.dtype == torch.float32):
        key, value = (
            key.repeat_interleave(repeats, 1),
            value.repeat_interleave(repeats, 1),
        )  # only flash kernels group heads
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and length > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@torch.inference_mode(False)  # else a mask made in scoring could not be used where gradients are wanted
def _mask(length, total, window, like, masks):
    """Added to scores [length, total]: 0 where a query may look, −inf elsewhere."""
    shape = (length, total, window)
    if shape not in masks:
        may = torch.ones(length, total, dtype=torch.bool, device=like.device).tril(total - length)
        if window:
            may = may.triu(total - length - window + 1)
        masks[shape] = torch.zeros(length, total, dtype=like.dtype, device=like.device).masked_fill(
            ~may, float("-inf")
        )
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
    if (
        not all(causal)
        or getattr(config, "is_causal", True) is False
        or getattr(config, "use_bidirectional_attention", False)
    ):
        return "it looks ahead, as encoders do"
    odd = set(getattr(config, "layer_types", None) or ()) - LAYERS
    if odd:
        return f"it has layers of the kind {', '.join(sorted(odd))}"
    odd = {kind for kind in _rope_types(config) if "dynamic" in kind or kind == "longrope"}
    if odd:
        return f"its position encoding ({', '.join(sorted(odd))}) depends on the longest sequence of a pass"
    return ""


def is_rotary(model: PreTrainedModel) -> bool:
    """Whether all that it knows of positions is their distances: moved on together they give the same but for
    rounding.
    """
    return bool(_rope_types(model.config))


def _rope_types(config):
    """Kinds of rotary encoding in a config, which holds one for all layers or one for each kind of layer."""
    found = set()
    for holder in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        for settings in (holder, *holder.values()) if isinstance(holder, dict) else ():
            if isinstance(settings, dict):
                found |= {str(settings[key]) for key in ("rope_type", "type") if key in settings}
    return found


def supports(model: PreTrainedModel) -> bool:
    return not reason_against(model)


def prepare(model: PreTrainedModel, example: list[Sequence[int]] | None = None) -> str:
    """Switch `model` (in evaluation or training) to shared prompts; `hidden_states` is how to call it from
    then on.

    Args:
        model: transformers model, with or without a head.
        example: a group of token-id sequences; the model must give the same hidden states for it as it gives,
            with the
            attention that it has now, for one sequence at a time. Windows show only in sequences longer than
            they are.

    Returns:
        the attention it had: `model.set_attn_implementation(that)` switches back.

    Raises:
        Unsupported: the model is as it was.
    """
    reason = reason_against(model)
    if reason:
        raise Unsupported(reason)
    before = model.own_attention = model.config._attn_implementation
    expected = _one_at_a_time(model.base_model, example) if example else None
    model.set_attn_implementation(NAME)
    if example:
        try:
            apart = _apart(model.base_model, example, expected)
        except Exception as error:
            model.set_attn_implementation(before)
            raise (
                error
                if isinstance(error, Unsupported)
                else Unsupported(f"a trial failed: {type(error).__name__}: {error}")
            ) from error
        limit = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
        if not apart <= limit:
            model.set_attn_implementation(before)
            raise Unsupported(
                f"its states differ by {apart:.2g} from those of one sequence at a time (at most {limit:g} "
                "is rounding)"
            )
    return before


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a prepared model compute with the attention that it had before, for a while: padded batches, as any
    model takes them.
    """
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
    hidden = hidden_states(backbone, packed).float()
    pairs = [
        (hidden[columns], alone.float()) for columns, alone in zip(packed.columns(), expected, strict=True)
    ]
    pairs += [
        (last, alone[-1].float())
        for last, alone in zip(last_states(backbone, packed).float(), expected, strict=True)
    ]
    return max(float((ours - alone).norm() / alone.norm()) for ours, alone in pairs)
