"""What shards of another number hold of a shard's answers: a run may go on with other machines or GPUs than
it was begun with, since an answer does not depend on its shard.
"""

import contextlib
import glob
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from common.manifest import Output, difference, read_manifest
from common.records import shard_range
from generation.sampling import SHARD

if TYPE_CHECKING:
    from generation.get_hf2 import Arguments


def take_over(job: "Arguments", output: Output, records: list, settings: dict, inputs: dict) -> int:
    """Save in `output` the answers of its prompts that are in shards of another number: in `X.of4.*` for the
    prefix `X.of2.`, as run_loop.sh names them. Returns how many.

    Args:
        job: of this shard. records: all prompts, of `load_prompts`.
        settings, inputs: what shapes the answers; those of other shards are taken if they were made so.
    """
    prefix = re.fullmatch(r"(.*\.of)\d+\.", Path(job.output_dir).name)
    if prefix is None or job.overwrite:
        return 0
    mine = shard_range(len(records), job.local_index, job.my_world_size)
    wanted = {records[k]["id"] for k in mine if isinstance(records[k], dict)} - output.done.keys()
    before = len(wanted)
    for path in sorted(output.path.parent.glob(f"{glob.escape(prefix[1])}*.manifest.json")):
        shard = path.with_name(path.name.removesuffix(".manifest.json") + ".jsonl")
        if shard.name.startswith(prefix[0]) or (held := read_manifest(shard)) is None:
            continue
        held["settings"] = {key: value for key, value in held["settings"].items() if key not in SHARD}
        if difference(held, {k: v for k, v in settings.items() if k not in SHARD}, inputs) is None:
            for file in (shard, Path(f"{shard}.partial")):
                _take(file, wanted, output)
    return before - len(wanted)


def _take(file, wanted, output):
    """Append the records of a file whose ids are wanted, which they are no more then."""
    with contextlib.suppress(FileNotFoundError), open(file, "rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # torn by a kill
                record = json.loads(line)
                if record["id"] in wanted:
                    output.append(record)
                    wanted.remove(record["id"])
