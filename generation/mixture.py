"""Which parts the K responses to a prompt have: one sampling setting, or a mixture of several.

`temperature: [1.0, 0.7]` shares K out evenly; `mixture` says more of each part. A part's responses are those
of its setting alone: it is a request of its own with the prompt's own seed. Parts of another model than the
policy are sampled by a start of their own, and `join_parts.py` puts them into the records. Nothing here
imports anything heavy.
"""

import dataclasses
from typing import TYPE_CHECKING

from common.cli import UserError, arg, build

if TYPE_CHECKING:
    from generation.sampling import SamplingArguments


MODELS = ("policy", "previous", "start")  # what a part may be sampled from; previous: the policy before it


@dataclasses.dataclass(kw_only=True, frozen=True)
class Part:
    """A part of a mixture. None: as the setting of that name beside the mixture."""

    K: int | None = arg(None, "responses; None: an equal share of what the other parts leave")
    temperature: float | None = arg(None, "sampling temperature")
    top_p: float | None = arg(None, "nucleus sampling")
    top_k: int | None = arg(None, "sample from the k likeliest tokens")
    system_prompt: str | None = arg(None, "in place of the prompt's system turn, or before a prompt without")
    model: str = arg("policy", "which it is sampled from", choices=MODELS)


SETTINGS = tuple(field.name for field in dataclasses.fields(Part) if field.name != "K")


def is_mixed(args: "SamplingArguments") -> bool:
    """Whether the responses to a prompt may differ in how they were sampled."""
    return bool(args.mixture) or isinstance(args.temperature, list)


def names_here(args: "SamplingArguments") -> list[str]:
    """What the mixture calls the model that is sampled here; the first name stands for all of them. Without a
    mixture there is none but the policy.
    """
    return (args.mixture and args.parts_of) or ["policy"]


def parts_of(args: "SamplingArguments", names: list[list[str]] | None = None) -> list[Part]:
    """The parts, complete but for `system_prompt`, in the order in which they were named.

    Parts of equal settings are one: the engine would give both the same responses.

    Args:
        names: the names of each model, where several are one; None: those of the model that is sampled here.

    Raises:
        UserError: a key of a part is unknown or wrong, or the parts' K do not add up to `--K`.
    """
    if args.mixture and isinstance(args.temperature, list):
        raise UserError(
            "--mixture and several values of --temperature were given: name each part in --mixture"
        )
    found, called = {}, {name: one[0] for one in names or [names_here(args)] for name in one}
    for part in _with_K(_named(args), args):
        given = {key: getattr(part, key) for key in SETTINGS}
        given["model"] = called.get(part.model, part.model)
        for key in ("temperature", "top_p", "top_k"):
            given[key] = getattr(args, key) if given[key] is None else given[key]
        settings = tuple(given.values())
        found[settings] = found.get(settings, 0) + part.K
    return [Part(K=K, **dict(zip(SETTINGS, settings))) for settings, K in found.items()]


def own_parts(args: "SamplingArguments") -> list[Part]:
    """Those of the parts that the model here is asked for.

    Raises:
        UserError: there is none; and as `parts_of`.
    """
    names = names_here(args)
    found = [part for part in parts_of(args) if part.model == names[0]]
    if not found:
        todo = f"--parts_of {' '.join(models_of(args))}" if args.parts_of else "one of them without model"
        raise UserError(f"--mixture has no part of {' or '.join(names)}: give {todo}")
    return found


def models_of(args: "SamplingArguments") -> list[str]:
    """The names of the models that the parts are sampled from, in the order of MODELS."""
    named = {part.model for part in parts_of(args)}
    return [name for name in MODELS if name in named]


def _named(args):
    """The parts as they are given."""
    if not args.mixture:
        several = args.temperature if isinstance(args.temperature, list) else [args.temperature]
        return [Part(temperature=temperature) for temperature in several]
    parts = []
    for number, given in enumerate(args.mixture, 1):
        where = f"part {number} of --mixture"
        parts.append(build(Part, given, where))
        if parts[-1].system_prompt == "":
            raise UserError(f"{where} has an empty system_prompt: leave it out")
    return parts


def _with_K(parts, args):
    """The same, each with its K."""
    given, open_parts = sum(part.K or 0 for part in parts), [part for part in parts if part.K is None]
    if any(part.K is not None and part.K < 1 for part in parts):
        raise UserError("a part of --mixture has K below 1")
    if not open_parts:
        if given != args.K:
            raise UserError(
                f"the parts of --mixture have K {given} together and --K is {args.K}: give --K {given}"
            )
        return parts
    if given >= args.K:
        raise UserError(
            f"the parts of --mixture have K {given} together, which leaves nothing of --K {args.K} for the "
            f"{len(open_parts)} without a K: give another K"
        )
    share, rest = divmod(args.K - given, len(open_parts))
    if rest or share < 1:
        left = f"the {args.K - given} responses that the others leave of " if given else ""
        many = f"{len(open_parts)} parts"
        what = f"--temperature has {many}" if not args.mixture else f"--mixture has {many} without a K"
        raise UserError(
            f"{what}, over which {left}--K {args.K} cannot be shared out evenly: give another K"
            + ("" if given else f", a multiple of {len(open_parts)},")
            + " or --mixture with a K for each part"
        )
    return [part if part.K else dataclasses.replace(part, K=share) for part in parts]


def check_parts(args: "SamplingArguments") -> None:
    """Refuse a part whose sampling settings cannot work; see `parts_of` for the rest."""
    names = args.parts_of or ["policy"]
    if not set(names) <= set(MODELS) or len(set(names)) < len(names):
        raise UserError(f"--parts_of {' '.join(names)}: some of {', '.join(MODELS)} were expected, each once")
    own_parts(args)
    for part in parts_of(args):
        if not 0 <= part.temperature < float("inf") or not 0 < part.top_p <= 1:
            raise UserError("--temperature must not be negative and --top_p must be above 0 and at most 1")
        if part.top_k < -1:
            raise UserError(f"--top_k {part.top_k}: a number of tokens was expected, or -1 for all")
        if part.temperature == 0 and part.K > 1:
            todo = f"give {'--K 1' if part.K == args.K else 'it K 1'} or a temperature"
            raise UserError(f"--temperature 0 is greedy, {part.K} equal responses: {todo}")


def repeats_plain(parts: list[Part], system_prompt: str) -> bool:
    """Whether a prompt whose own system turn is `system_prompt` would get the same responses twice: from a
    part with it, and from one that has no system prompt and is equal else.
    """
    keys = [key for key in SETTINGS if key != "system_prompt"]
    settings = {part.system_prompt: set() for part in parts}
    for part in parts:
        settings[part.system_prompt].add(tuple(getattr(part, key) for key in keys))
    return not settings[system_prompt].isdisjoint(settings.get(None, ()))


def sources(args: "SamplingArguments") -> list[dict]:
    """Where each response came from that the model here gives, for `response_sources`: its part's
    temperature, and what else differs between all parts.
    """
    parts = parts_of(args)
    differs = [key for key in SETTINGS if len({getattr(part, key) for part in parts}) > 1]
    keys = [key for key in SETTINGS if key == "temperature" or key in differs]
    return [{key: getattr(part, key) for key in keys} for part in own_parts(args) for _ in range(part.K)]
