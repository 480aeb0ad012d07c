"""Log-probabilities that a causal language model gives to responses, token by token."""

import math
import sys
from array import array
from collections.abc import Iterable, Iterator

from annotate_data.backbone import Backbone
from common.cli import UserError
from common.tokens import Encoder, answers_of


class Policy(Backbone):
    """A causal language model and the log-probabilities that it gives to responses, its logits divided by
    `temperature`.
    """

    what = "model"
    too_long = "nothing is cut here, so give it a GPU with more free memory"

    def __init__(self, name, temperature, **options):
        super().__init__(name, max_length=sys.maxsize, **options)
        self.temperature = temperature
        self.positions = self.positions or sys.maxsize

    def refuse_missing(self, missing: Iterable[str]):
        if missing:
            raise UserError(
                f"{self.name} lacks the weights {', '.join(sorted(missing)[:3])}: it is no whole causal "
                "language model"
            )

    def load(self):
        import transformers
        from trl.trainer.utils import add_fused_lm_head

        self.load_weights(transformers.AutoModelForCausalLM)
        add_fused_lm_head(self.model, temperature=self.temperature)
        self.only_wanted = None

    def logps(self, groups: list[tuple[list[int], list]]) -> Iterator[tuple[int, list[list[float]]]]:
        """Log-probabilities of each response's tokens.

        Args:
            groups: list of (prompt's ids, list of responses' ids), none of them empty.

        Yields:
            (index of a group, list of lists of floats), in any order.
        """
        sequences = [[array("i", [*prompt, *ids]) for ids in responses] for prompt, responses in groups]
        starts = [[[len(prompt)]] * len(responses) for prompt, responses in groups]
        return self._in_passes(sequences, starts, self._padded_logps, self._shared_logps)

    def _padded_logps(self, rows, ids, mask):
        starts = ids.new_tensor([row.positions[0] for row in rows])
        places = mask.cumsum(1) - 1
        labels = ids.masked_fill((mask == 0) | (places < starts[:, None]), -100)
        found = self.model(
            input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True
        ).log_probs.float()
        return [found[i, row.positions[0] - 1 : len(row.ids) - 1].tolist() for i, row in enumerate(rows)]

    def _shared_logps(self, groups, starts):
        import torch

        from common import shared_prompts

        if self.only_wanted is None:
            self.only_wanted = shared_prompts.only_wanted(self.model.base_model)
        packed = shared_prompts.pack(groups, labelled=True)
        # the columns that predict the responses' tokens
        spans = [at[start - 1 : -1] for at, [start] in zip(packed.columns(), starts, strict=True)]
        ids = [ids for group in groups for ids in group]
        following = torch.zeros(packed.ids.shape[1], dtype=torch.long)
        for at, one, [start] in zip(spans, ids, starts, strict=True):  # alike where sequences share a column
            following[at] = torch.tensor(one[start:], dtype=torch.long)
        packed.wanted = torch.cat(spans).unique()
        place = torch.zeros(packed.ids.shape[1], dtype=torch.long)
        place[packed.wanted] = torch.arange(len(packed.wanted))
        row = packed.to(self.device)
        outputs = self.model(
            input_ids=row.ids,
            position_ids=row.positions,
            shift_labels=following[packed.wanted][None].to(self.device),
            fused_lm_head=True,
            shared_prompts=row,
        )
        found = outputs.log_probs[0].float().cpu()
        return [found[place[at]].tolist() for at in spans]


def score(records: list, policy: Policy, encode: Encoder, limit: int, source: str) -> list[dict]:
    """The log-probabilities of a chunk's records, a list of (number in the file, record).

    Returns:
        for each record `id`, its number; `logps`, K lists of floats, null for a response that is left out;
        `retokenised` and `from_text`, numbers of responses; `dtype`, in which it was computed.
    """
    entries, groups, places = [], [], []
    for i, record in records:
        try:
            prompt, responses, made = encode(record, answers_of(record))
        except UserError as error:
            raise UserError(f"{source} record {i + 1}: {' '.join(str(error).split())}") from None
        known = [k for k, ids in enumerate(responses) if ids and len(prompt) + len(ids) <= limit and prompt]
        entry = {"id": i, "logps": [None] * len(responses), "dtype": policy.dtype}
        entry |= {"retokenised": made["retokenised"], "from_text": len(responses) - made["as_sampled"]}
        entries.append(entry)
        if known:
            groups.append((prompt, [responses[k] for k in known]))
            places.append((entry, known))
    for g, found in policy.logps(groups) if groups else ():
        entry, known = places[g]
        for k, values in zip(known, found, strict=True):
            if not all(map(math.isfinite, values)):
                raise UserError(
                    f"{policy.name} gives log-probabilities that are no numbers: is it damaged, or trained "
                    "in another dtype?"
                )
            entry["logps"][k] = [round(value, 6) for value in values]
    return entries
