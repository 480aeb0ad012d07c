"""What is said of a missing package, however a library tells it."""

import pytest

from common import cli, packages
from common.cli import UserError

# What a library says where a package is missing: the text as it comes, and what to install.
MISSING = [
    (ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn.ops"), "pip install flash-attn"),
    (ModuleNotFoundError("No module named 'none'", name="none.part"), "pip install what brings none.part"),
    (ModuleNotFoundError("No module named 'common.nothing'", name="common.nothing"), ""),  # a bug of ours
    (ImportError("cannot import name 'Cache' from 'json'"), ""),
    (
        ImportError(
            "This modeling file requires the following packages that were not found in your environment: "
            "einops, sure_not. Run `pip install einops sure_not`"
        ),
        "pip install einops",
    ),
    (
        ImportError("\nLlamaTokenizer requires the SentencePiece library but it was not found in your …"),
        "pip install sentencepiece",
    ),
    (
        ImportError("FlashAttention2 has been toggled on, but … doesn't seem to be installed."),
        "pip install flash-attn",
    ),
    (
        ValueError(
            "Couldn't instantiate the backend tokenizer. You need to have sentencepiece or tiktoken installed"
        ),
        "pip install sentencepiece tiktoken",
    ),
    (ValueError("the CUDA kernels require more memory"), ""),
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

    def as_it_is():
        raise error

    def told(main):
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1 and said.endswith(remedy + "\n")
        return said

    assert told(wrapped).startswith("error: cannot load this/model")
    if isinstance(error, ImportError) and remedy:
        assert told(as_it_is).startswith("error: ")
    else:
        with pytest.raises(type(error)):
            cli.run(as_it_is)


def test_packages_that_are_there_are_not_asked_for():
    assert packages.missing_packages(ImportError("requires the yaml library: `pip install yaml`")) == ""
