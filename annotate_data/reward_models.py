"""Reward models that judge one response: Bradley-Terry classifiers and ArmoRM.

Both kinds see the reward model's own chat template over prompt and response (common/chat.py:
encode_for_classifier), cut on the left. The last token is found by length: transformers looks for the last
token that is not padding, and misses the true one where padding and end of turn are the same token.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from annotate_data.backbone import Backbone
from common.cli import UserError, one_line

if TYPE_CHECKING:
    import torch


class BradleyTerry(Backbone):
    """A sequence classifier with one label (FsfairX, Skywork-Reward, …); the reward is its raw logit."""

    def load(self):
        import transformers

        self.load_weights(transformers.AutoModelForSequenceClassification)
        known = ("score", "classifier", "v_head", "value_head", "reward_head")
        heads = [key for key in self.unplaced if key.split(".")[0] in known]
        where = f"no place in its architecture, {type(self.model).__name__}"
        if heads == ["score.bias"]:
            print(f"note: {self.name}: its score.bias has {where}; rewards are off by that constant")
        elif heads:
            what = f"its {', '.join(heads[:3])} have {where}"
            raise UserError(f"{self.name}: {what}: the rewards would not be those it was trained to give")

    def score(self, records: list[dict]) -> Iterator[tuple[int, dict]]:
        import torch

        groups, cuts = self.encode_all(records)
        last = [[[len(ids) - 1] for ids in group] for group in groups]
        head = getattr(self.model, "score", None)
        if not isinstance(head, torch.nn.Linear):  # encoders and others with a head of their own
            for g, logits in self._in_passes(groups, last, self._logits):
                yield g, {"rewards": logits, "cut": cuts[g]}
            return
        # the head in fp32: bf16 logits have 8 bits, and responses would tie that do not
        weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
        for g, states in self.hidden_states(groups, last):
            rewards = torch.nn.functional.linear(states[:, 0], weight, bias)[:, 0]
            yield g, {"rewards": rewards.tolist(), "cut": cuts[g]}

    def _logits(self, rows, ids, mask):
        """Raw logits by the model's own head.

        A decoder's looks for the last token that is not padding, so a row that ends in that token goes alone
        and without any; an encoder-decoder's wants as many ends in each row.
        """
        config = self.model.config.get_text_config()
        pad = config.pad_token_id
        if not self.config.is_encoder_decoder and all(row.ids[-1] != pad for row in rows):
            return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
        found = []
        try:
            config.pad_token_id = pad if self.config.is_encoder_decoder else -1  # an id that no token has
            for i, row in enumerate(rows):
                alone = slice(i, i + 1), slice(0, len(row.ids))
                logits = self.model(input_ids=ids[alone], attention_mask=mask[alone]).logits
                found.append(logits[0, 0].float().item())
        finally:
            config.pad_token_id = pad
        return found


class ArmoRM(Backbone):
    """RLHFlow/ArmoRM-Llama3-8B-v0.1: a mixture of objectives, gated by the prompt (arXiv 2406.12845).

    With h_end the last hidden state of the sequence's last token and h_prompt that of the `<|eot_id|>` before
    the last assistant header, and the published parameter names,

        rewards = regression_layer(h_end)                                        [objectives]
        gating = logit_scale · softmax(MLP(h_prompt) / gating_temperature)       [objectives]
        score = Σ gating · (rewards @ reward_transform_matrix)

    The MLP, `gating.layers`, has `gating_n_hidden` hidden layers with ReLU. A response so long that
    truncation took the header away has no score (null).
    """

    HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"

    def __init__(self, name, **options):
        super().__init__(name, **options)
        self.header = self.tokenizer(self.HEADER, add_special_tokens=False)["input_ids"]
        if sum(i in self.tokenizer.added_tokens_decoder for i in self.header) != 3:
            raise UserError(f"{name}: its tokenizer lacks Llama-3's header tokens, which ArmoRM looks for")

    def load(self):
        import torch
        import transformers

        self.load_weights(transformers.LlamaModel)
        config, layers = self.config, getattr(self.config, "gating_n_hidden", 3) + 1
        objectives, width = getattr(config, "num_objectives", 19), getattr(config, "gating_hidden_dim", 1024)
        shapes = {
            "regression_layer.weight": [objectives, config.hidden_size],
            "reward_transform_matrix": [objectives, objectives],
            "gating.logit_scale": [1],
        }
        for i in range(layers):
            rows, columns = objectives if i == layers - 1 else width, width if i else config.hidden_size
            shapes |= {f"gating.layers.{i}.weight": [rows, columns], f"gating.layers.{i}.bias": [rows]}
        self.head = {key: value.to(self.device, torch.float32) for key, value in self._read(shapes).items()}
        for key, shape in shapes.items():
            if (found := list(self.head[key].shape)) != shape:
                raise UserError(f"{self.name}: {key} is {found}, its config makes it {shape}")

    def _read(self, names):
        """Tensors of the checkpoint's safetensors files, sharded or not, by name."""
        import huggingface_hub
        import safetensors

        folder, found = Path(self.name), {}
        try:
            if not folder.is_dir():  # the files are in the cache, the backbone has just been read from them
                wanted = ["*.safetensors", "*.safetensors.index.json"]
                source = {"revision": self.source["revision"], "allow_patterns": wanted}
                folder = Path(huggingface_hub.snapshot_download(self.name, **source))
            index = folder / "model.safetensors.index.json"
            if index.is_file():
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted({folder / places[name] for name in names if name in places})
            else:
                files = sorted(folder.glob("*.safetensors"))
            for path in files:
                with safetensors.safe_open(path, framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in file.keys() if name in names}
        except Exception as error:
            raise UserError(f"cannot load the reward model {self.name}: {one_line(error)}") from None
        self.refuse_missing([name for name in names if name not in found])
        return found

    def unload(self):
        self.head = None
        super().unload()

    def gate(self, ids: Iterable[int]) -> int | None:
        """Position of the token before the last assistant header, or None."""
        ids, header = list(ids), self.header
        places = range(len(ids) - len(header), -1, -1)
        return next((j for j in places if ids[j : j + len(header)] == header), None)

    def score(self, records: list[dict]) -> Iterator[tuple[int, dict]]:
        groups, cuts = self.encode_all(records)
        gates = [[self.gate(ids) for ids in group] for group in groups]
        places = [
            [[at or 0, len(ids) - 1] for at, ids in zip(*pair, strict=True)]
            for pair in zip(gates, groups, strict=True)
        ]
        for g, states in self.hidden_states(groups, places):
            scores = self.mix(states[:, 0], states[:, 1]).tolist()
            rewards = [None if at is None else x for at, x in zip(gates[g], scores, strict=True)]
            yield g, {"rewards": rewards, "cut": cuts[g]}

    def mix(self, prompt: "torch.Tensor", end: "torch.Tensor") -> "torch.Tensor":
        """Scores [n] of hidden states [n, hidden] at the prompt's end and at the sequence's, in fp32."""
        import torch

        head, x = self.head, prompt
        last = getattr(self.config, "gating_n_hidden", 3)
        for i in range(last + 1):
            layer = f"gating.layers.{i}"
            x = torch.nn.functional.linear(x, head[f"{layer}.weight"], head[f"{layer}.bias"])
            x = x if i == last else torch.relu(x)
        gating = torch.softmax(x / getattr(self.config, "gating_temperature", 10), dim=1)
        gating *= head["gating.logit_scale"]
        rewards = end @ head["regression_layer.weight"].T
        return (gating * (rewards @ head["reward_transform_matrix"])).sum(1)
