"""What to install where a library says that a package is missing; the standard library alone."""

import importlib.util
import re

# What a script may miss when it is started in another environment than its own.
REQUIRED = (
    "accelerate",
    "datasets",
    "deepspeed",
    "httpx",
    "huggingface_hub",
    "jinja2",
    "numpy",
    "plotly",
    "rich",
    "torch",
    "transformers",
    "trl",
    "vllm",
    "yaml",
)
# What some models and settings need beside the requirements: a module → its name for pip.
OPTIONAL = {
    "PIL": "pillow",
    "bitsandbytes": "bitsandbytes",
    "einops": "einops",
    "flash_attn": "flash-attn",
    "google.protobuf": "protobuf",
    "kernels": "kernels",
    "mistral_common": "mistral-common",
    "peft": "peft",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "timm": "timm",
    "torchvision": "torchvision",
    "trackio": "trackio",
    "wandb": "wandb",
}


def missing_packages(error: BaseException | None) -> str:
    """What to install for an error, or one behind it, that is for want of a package; empty where it is not.

    Libraries tell it in many ways: by the module's name, or in words that name the package, in an error of
    their own.
    """
    known, others, seen = [], [], []
    while error is not None and error not in seen:
        seen.append(error)
        for name in _named(error):
            module = next(
                (
                    module
                    for module, pip in OPTIONAL.items()
                    if name in (module, pip) or name.startswith(module + ".")
                ),
                None,
            )
            if module is not None and not is_there(module):
                known.append(OPTIONAL[module])
            elif module is None and not is_there(name.partition(".")[0].replace("-", "_")):
                others.append(name)
        error = error.__cause__ or error.__context__
    if known:
        return f"pip install {' '.join(dict.fromkeys(known))}"
    return f"pip install what brings {', '.join(dict.fromkeys(others))}" if others else ""


def _named(error):
    """Names of modules and packages that an error says are missing."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return [error.name]
    if not isinstance(error, ImportError) and not (
        isinstance(error, (ValueError, RuntimeError)) and "install" in text
    ):
        return []
    # of a model's own code
    words = re.search(r"packages that were not found in your environment: ([\w.\-, ]+?)\. ", text)
    asked = r"(?:pip install |need to install )(?:-U )?`?([A-Za-z][\w.\-]*)"
    names = words[1].split(", ") if words else re.findall(asked, text)
    said = text.lower().replace("-", "_").replace("flashattention2", "flash_attn")
    return names + [
        name for name in OPTIONAL if re.search(rf"\b{re.escape(name.lower().rpartition('.')[2])}\b", said)
    ]


def is_there(module: str) -> bool:
    """Whether a module can be imported here, or is one of this project's."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
