"""A shard takes over what shards of another number have saved of its prompts, and nothing else."""

import json

import pytest

from common.manifest import Output
from generation import sampling
from generation.get_hf2 import Arguments, shaping
from generation.other_shards import take_over


@pytest.fixture
def shard(tmp_path):
    """Opens shard k of n; {"seed": …} and the like may differ."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(12)))

    def make(k, n, prefix="a", **more):
        args = Arguments(
            model_name_or_path="m/m",
            dataset_name_or_path=str(prompts),
            output_dir=f"{tmp_path}/shards/{prefix}.of{n}.",
            local_index=k,
            my_world_size=n,
            **more,
        )
        settings, inputs = shaping(args)
        settings |= {"local_index": k, "my_world_size": n}
        output = Output(f"{args.output_dir}{k}.jsonl", "test", settings, inputs, args.overwrite)
        records = sampling.load_prompts(args)
        return output, records, lambda: take_over(args, output, records, settings, inputs)

    return make


def answer(output, records):
    for record in records:
        output.append(record | {"responses": [f"to {record['id']}"]})


def test_three_shards_go_on_where_two_stopped(shard):
    first, records, _ = shard(0, 2)
    answer(first, records[:6])
    first.finish([record["id"] for record in records[:6]], {"records": 6})  # whole
    second, *_ = shard(1, 2)
    answer(second, records[6:9])  # half done
    with open(second.partial, "ab") as file:
        file.write(b'{"id": "torn')
    stranger, *_ = shard(0, 2, prefix="b")
    answer(stranger, records[9:])
    other, *_ = shard(0, 4, seed=7)
    answer(other, records[9:])
    found = {}
    for k, expected in enumerate((4, 4, 1)):
        output, _, take = shard(k, 3)
        assert take() == expected and take() == 0
        found |= {name: json.loads(line) for name, line in zip(output.done, open(output.partial, "rb"))}
    assert found.keys() == {record["id"] for record in records[:9]}
    assert all(record["responses"] == [f"to {name}"] for name, record in found.items())


def test_nothing_is_taken_over_where_all_is_to_be_made_again(shard):
    first, records, _ = shard(0, 2)
    answer(first, records[:6])
    assert shard(0, 3, overwrite=True)[2]() == 0
