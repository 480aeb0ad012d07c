"""What is said of a missing package, however a library tells it."""

import pytest

from common import cli, packages
from common.cli import UserError

# What a library says where a package is missing: the text as it comes, and what to install.
MISSING = [
    (ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn.ops"), "pip install flash-attn"),
    (ModuleNotFoundError("No module named 'google'", name="google.protobuf"), "pip install protobuf"),
    (
        ModuleNotFoundError("No module named 'surely_not_there'", name="surely_not_there.part"),
        "pip install what brings surely_not_there.part",
    ),
    (ModuleNotFoundError("No module named 'common.nothing'", name="common.nothing"), ""),  # a bug of ours
    (ImportError("cannot import name 'Cache' from 'json'"), ""),
    (
        ImportError(
            "This modeling file requires the following packages that were not found in your environment: "
            "einops, sure_not. "
            "Run `pip install einops sure_not`"
        ),
        "pip install einops",
    ),
    (
        ImportError(
            "\nLlamaTokenizer requires the SentencePiece library but it was not found in your environment. "
            "Check out the instructions"
        ),
        "pip install sentencepiece",
    ),
    (
        ImportError(
            "FlashAttention2 has been toggled on, but it cannot be used due to the following error: "
            "the package for FlashAttention2 doesn't seem to be installed."
        ),
        "pip install flash-attn",
    ),
    (
        ImportError(
            "You need to install `bitsandbytes` in order to use bitsandbytes optimizers: `pip install -U "
            "bitsandbytes`"
        ),
        "pip install bitsandbytes",
    ),
    (
        ValueError(
            "Couldn't instantiate the backend tokenizer. You need to have sentencepiece or tiktoken installed"
        ),
        "pip install sentencepiece tiktoken",
    ),
    (ValueError("the CUDA kernels require more memory"), ""),
    (RuntimeError("mistral-common is not installed"), "pip install mistral-common"),
]


@pytest.fixture
def bare(monkeypatch):
    """As if none of the optional packages were installed; the others are as they are."""
    there = packages.is_there
    monkeypatch.setattr(
        packages, "is_there", lambda module: module not in packages.OPTIONAL and there(module)
    )


@pytest.mark.parametrize(("error", "remedy"), MISSING, ids=lambda value: str(value)[:40])
def test_a_missing_package_is_one_line(error, remedy, bare, capsys):
    assert packages.missing_packages(error) == remedy

    def wrapped():
        try:
            raise error
        except Exception:
            raise UserError("cannot load this/model") from None

    with pytest.raises(SystemExit) as ended:
        cli.run(wrapped)
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and said.count("\n") == 1
        and said.startswith("error: cannot load this/model")
        and said.endswith(remedy + "\n")
    )

    def bare_error():
        raise error

    if isinstance(error, ImportError) and remedy:
        with pytest.raises(SystemExit) as ended:
            cli.run(bare_error)
        said = capsys.readouterr().err
        assert (
            ended.value.code == 2 and said.count("\n") == 1 and said.startswith("error: ") and remedy in said
        )
    else:
        with pytest.raises(type(error)):
            cli.run(bare_error)


def test_packages_that_are_there_are_not_asked_for():
    assert packages.missing_packages(ImportError("requires the yaml library: `pip install yaml`")) == ""
