"""Call a function of the user's own on made-up responses, before a run needs it: a process of its own, in the
function's environment.

    python loop/try_function.py reward FILE.py:NAME < records.json

or `gold`; the records are as `made_up` makes them.

Ends with status 0, or with one line that says what is wrong. What the function prints is nobody's concern.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from annotate_data.functions import RewardFunction
from common.cli import UserError, run
from evaluation.metrics import gold_scores, load_gold

SECONDS = 60  # that a function is given, with its imports
RESPONSE = "This is a made-up response. It is here to see whether the function takes it and returns a number."


def made_up(prompt: dict) -> dict:
    """A generated record with one response to a prompt record (messages and whatever fields the data
    carries).
    """
    fields = {
        "responses": [RESPONSE],
        "finish_reasons": ["stop"],
        "num_tokens": [20],
        "prompt_token_ids": [0],
        "response_token_ids": [[0]],
    }
    return prompt | fields


def try_function(kind: str, spec: str, records: list[dict], python: str = sys.executable) -> str | None:
    """What is wrong with the reward or gold function `spec` where it is called on these records by this
    Python; None where nothing is.

    Raises:
        TimeoutError: it took longer than SECONDS.
    """
    command = [python, str(Path(__file__).resolve()), kind, spec]
    # OMP_NUM_THREADS and the like stay as they are: it runs as it will run.
    try:
        done = subprocess.run(
            command,
            input=json.dumps(records),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{spec} did not end within {SECONDS} s") from None
    if done.returncode == 0:
        return None
    told = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    return told[-1] if told else f"{spec} ends its process with status {done.returncode} when it is called"


def main():
    kind, spec = sys.argv[1:]
    records = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, open(os.devnull, "w", encoding="utf-8")
    try:
        if kind == "gold":
            function = load_gold(spec)
            for record in records:
                gold_scores(record, function)
            return
        function = RewardFunction(spec)
        for _, found in function.score(records):
            if not all(math.isfinite(reward) for reward in found["rewards"]):
                raise UserError(
                    f"the reward function {spec} gives {found['rewards'][0]}: a finite number was expected, "
                    "a low one for what it cannot judge"
                )
    finally:
        sys.stdout = out


if __name__ == "__main__":
    run(main)
