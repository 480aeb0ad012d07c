"""What is said of a model that does not load."""

import json

import micro
import pytest

from common import cli, models


def test_weights_of_another_shape_are_called_that(tmp_path):
    """transformers' own error points at a report "above", which the scripts do not show."""
    from transformers import AutoModelForCausalLM

    folder = micro.make_policy(tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    with pytest.raises(Exception) as caught:  # of whatever kind it likes
        AutoModelForCausalLM.from_pretrained(folder)
    assert cli.one_line(caught.value).endswith(": its weights have other shapes than its config.json says")
    assert cli.one_line(ValueError("one\n  two"), 6) == "ValueError: one tw"


def test_an_encoder_decoder_is_no_policy(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "t5",
                "architectures": ["T5ForConditionalGeneration"],
                "is_encoder_decoder": True,
            }
        )
    )
    with pytest.raises(cli.UserError, match=r"is an encoder-decoder \(t5\)"):
        models.check_policy(str(tmp_path))
