"""What fits the GPUs there are: the recommended method, the chosen rows and checkpointing, and what
`--check true` prints.
"""

import sys
from types import SimpleNamespace

import pytest
from training import LLAMA_8B, ROOT, save_config

from common.cli import UserError
from dpo_iteration import fitting, run_dpo
from dpo_iteration.fitting import METHODS, WHOLE, recommend
from dpo_iteration.memory import FOUR_BITS, GIB, need


def test_what_is_recommended(llama):
    def best(gpus, gib, **how):
        return recommend(llama, gpus, gib * GIB, 128, 2048, **how)

    assert best(8, 80)[0] == "zero2" and best(8, 32)[0] == "zero3" and best(1, 80)[0] == "zero3_offload"
    assert best(1, 80, trainable=llama.lora(16))[0] == "ddp"
    assert best(8, 6) is None
    qlora = {"trainable": llama.lora(16), "frozen": FOUR_BITS}
    assert best(1, 24, **qlora)[0] in WHOLE and best(1, 4, **qlora) is None
    assert recommend(llama, 8, 1e15, 8, 2048) == ("ddp", 1)  # 8 pairs a step on 8 GPUs
    assert best(8, 80)[1] >= best(8, 50)[1]
    method, pairs = best(8, 80)
    assert need(method, llama, 8, pairs, 2048).total <= 80 * GIB


def test_what_is_left_open_is_chosen_by_memory(llama):
    def chosen(method, gpus, gib, share_prompts=None, **given):
        values = {"per_device_train_batch_size": 1, "max_length": 2048, "share_prompts": share_prompts}
        args = SimpleNamespace(**values | {"gradient_checkpointing": None, "max_row_tokens": None} | given)
        return fitting.choose(args, method, llama, gpus, gib and gib * GIB)

    assert chosen("zero2", 8, None) == (True, 4096)  # nothing is known
    assert chosen("zero2", 8, 80) == (False, 4096)
    assert chosen("zero2", 8, 141) == (False, 8192) and chosen("zero2", 8, 288) == (False, 16384)
    assert chosen("zero2", 8, 55) == (True, 16384) and chosen("zero2", 8, 44) == (True, 8192)
    assert chosen("zero2", 8, 20) == (True, 4096)  # fits not: that is told elsewhere
    assert chosen("zero2", 8, 80, gradient_checkpointing=True) == (True, 16384)
    assert chosen("zero2", 8, 80, max_row_tokens=5000) == (False, 5000)
    assert chosen("zero2", 8, 288, share_prompts=False) == (False, 4096)  # batches of padded pairs
    for gib in (44, 55, 80, 141, 288):
        on, tokens = chosen("zero2", 8, gib)
        assert need("zero2", llama, 8, tokens / 2, 1, on).total <= 0.95 * gib * GIB


def test_a_training_fits_itself_to_the_gpu(monkeypatch, tmp_path, capsys):
    """STAND-IN: the GPU is a number of GiB. Without one, or where the size is not known, all is as ever."""
    values = {"per_device_train_batch_size": 1, "max_length": 2048, "share_prompts": None, "revision": None}
    values |= {"gradient_checkpointing": None, "max_row_tokens": None, "trust_remote_code": False}
    values |= {"bf16": True, "use_peft": False, "load_in_4bit": False, "loss_type": ["sigmoid"]}

    def fitted(model, gib, **given):
        monkeypatch.setattr(fitting, "gpu_memory", lambda: gib)
        monkeypatch.setattr(fitting, "replace", lambda args, **new: SimpleNamespace(**vars(args) | new))
        args = fitting.fit_to_memory(SimpleNamespace(**values | given, model_name_or_path=str(model)))
        return args.gradient_checkpointing, args.max_row_tokens

    small = save_config(tmp_path / "small", **LLAMA_8B | {"hidden_size": 256, "num_hidden_layers": 2})
    assert fitted(small, None) == (True, None)
    assert fitted(small, 80) == (False, 16384) and "gradient checkpointing off" in capsys.readouterr().out
    assert fitted(small, 80, gradient_checkpointing=True, max_row_tokens=99) == (True, 99)
    assert fitted(tmp_path / "gone", 80) == (True, None) and "note: rows and" in capsys.readouterr().out


def test_the_command(tmp_path, monkeypatch, capsys):
    """Without data, weights or GPUs."""

    def check(model, *words):
        given = (
            f"--check true --model_name_or_path {model} --train_dir none.jsonl --output_dir {tmp_path}/out"
        )
        config = str(ROOT / "configs" / "training.yaml")
        monkeypatch.setattr(sys, "argv", ["run_dpo.py", config, *given.split(), *words])
        run_dpo.main()
        return capsys.readouterr().out

    eight = ("--num_gpus", "8", "--gpu_memory_gib", "80")
    said = check(save_config(tmp_path / "model", **LLAMA_8B), *eight)
    assert "8.03 billion parameters; 8 GPUs of 80 GiB" in said and "take configs/zero2.yaml" in said
    table = {line.split()[1]: line for line in said.splitlines() if "fit" in line and "LoRA" not in line}
    assert set(METHODS) <= set(table) and "does not fit" in table["ddp"] and " 28.0 " in table["zero2"]
    assert not (tmp_path / "out").exists()
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(UserError, match="give --model_size_b"):
        check(bare, *eight)
    said = check(bare, *eight, "--model_size_b", "8.03")
    assert "cannot be read: an estimate" in said and "take configs/zero2.yaml" in said
    with pytest.raises(UserError, match="--num_gpus"):
        check(bare)
