"""A reward function of the user's own: `f(messages, response)` or `f(messages, response, record)`."""

import copy
import inspect
from collections.abc import Callable, Iterator

from annotate_data.backbone import BadRecord
from common.cli import one_line
from common.functions import as_number, load_function

EXAMPLE = "tiny/task.py:gold_score"


def takes_record(function: Callable) -> bool:
    """Whether a function's third positional parameter is the record: without a default, or called so."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins tell nothing
        return False
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(places) > 2 and (places[2].default is inspect.Parameter.empty or places[2].name == "record")


class RewardFunction:
    """The function `path.py:name` as a scorer; see `annotate_data/backbone.py`.

    `messages` is the prompt, a list of `{"role", "content"}`; `record` the record's other fields (`id`,
    `num_tokens` and whatever the data carries). A result that is not finite becomes null.

    Raises:
        UserError: no such file or function, or it does not import.
    """

    compares = False

    def __init__(self, spec):
        self.name, self.function = spec, load_function(spec, "--reward_function", EXAMPLE)
        self.with_record = takes_record(self.function)

    def hint(self) -> str:
        """What to write instead of a function of TRL's form, `f(completions, **kwargs)`; empty for others."""
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):
            return ""
        if "completions" not in parameters:
            return ""
        ours = f"def {self.name.rpartition(':')[2]}(messages, response) → number"
        return f"; its parameters are those of TRL's reward functions, here it is for one response: {ours}"

    def check(self, messages: list[dict], tools: list[dict] | None = None) -> None:
        """A function refuses by itself."""

    def left_out(self, messages: list[dict], tools: list[dict] | None = None) -> list[str]:
        """Nothing: a function is given the messages as they are, and the tools in `record`."""
        return []

    def load(self):
        """There is nothing to load or to unload."""

    unload = load

    def score(self, records: list[dict]) -> Iterator[tuple[int, dict]]:
        """Yield (index, {"rewards", "cut"}) of records; an exception of the function is a `BadRecord`."""
        for index, record in enumerate(records):
            others = {key: value for key, value in record.items() if key not in ("prompt", "responses")}
            more = [others] if self.with_record else []
            try:
                # A copy for each call: what a function does to its arguments must not reach the next.
                rewards = [
                    as_number(self.function(*copy.deepcopy([record["prompt"], response, *more])))
                    for response in record["responses"]
                ]
            except (Exception, SystemExit) as error:
                said = f"the reward function {self.name} fails: {one_line(error)}{self.hint()}"
                raise BadRecord(index, said) from None
            yield index, {"rewards": rewards, "cut": 0}
