"""Records of tables and data sets: .csv, .parquet, folders of `save_to_disk` or of the hub, the hub."""

import csv
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError, existing_file
from common.jsonl import BadRecord, decoding, jsonl_records, open_text
from common.messages import is_messages

POINTER = b"version https://git-lfs"  # in place of a large file in a clone without Git LFS


def split_config(name: str) -> tuple[str, str | None]:
    """(data set, configuration or None) of `NAME` or `NAME:CONFIG`."""
    base, _, config = name.rpartition(":")
    named = base and config and "/" not in config and not Path(name).exists()
    return (base, config) if named else (name, None)


def read_csv(path: str | Path, delimiter: str | None = None) -> Iterator[dict | BadRecord]:
    """Yield the rows of a .csv or .tsv file as dicts of texts; a `BadRecord` for one of another width.

    A .csv whose header has one cell by commas and several by semicolons or tabs is separated by these.
    """
    path = existing_file(path, "input")
    csv.field_size_limit(2**31 - 1)
    count, line = 0, 1
    try:
        with decoding(path), open_text(path, newline="") as file:
            if delimiter is None:
                delimiter = _delimiter(path, file.readline())
                file.seek(0)
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = next((row for row in rows if row), [])
            twins = {name for name in header if header.count(name) > 1}
            if twins:
                raise UserError(f"{path} has several columns {min(twins)!r}; give each a name of its own")
            for row in rows:
                line = rows.line_num
                if not row:
                    continue
                count += 1
                if len(row) == len(header):
                    yield dict(zip(header, row, strict=True))
                    continue
                wrong = (
                    f"{path} record {count} (line {line}) has {len(row)} cells, the header has "
                    f"{len(header)}; put cells that hold a {delimiter!r} or a line break in double quotes"
                )
                yield BadRecord(wrong, row)
    except csv.Error as error:
        raise UserError(f"{path} cannot be read behind line {line}: {error}") from None
    if not count:
        raise UserError(f"{path} is empty; a header and a row a record were expected")


def _delimiter(path, header):
    if path.name.removesuffix(".gz").endswith(".tsv"):
        return "\t"
    cells = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in ",;\t"}
    return "," if cells[","] > 1 else max(cells, key=cells.get)


def _refuse_pointer(path):
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in its folder")


def _loaded(name, load, *args, **more):
    """What a function of `datasets` gives; its errors, which are of many kinds, in one line."""
    try:
        return load(*args, **more)
    except Exception as error:
        if type(error).__name__ == "DatasetGenerationError" and error.__cause__:
            error = error.__cause__  # which says nothing itself
        text = " ".join(str(error).split())
        if "Config name is missing" in text or ("BuilderConfig" in text and "not found" in text):
            text += f"; choose a configuration by its name behind a colon, {split_config(name)[0]}:NAME"
        if "Unknown split" in text:
            text += "; choose one with --dataset_split"
        here = Path(split_config(name)[0]).exists()
        what = "read" if here else "load from the hub, and find no such folder here,"
        raise UserError(f"cannot {what} {name}: {type(error).__name__}: {text[:400]}") from None


def _unfilled(record):
    """A record without the nulls that a table put into messages and tools for fields of other rows."""
    filled = {key for key, value in record.items() if is_messages(value) or key == "tools"}
    return {key: _without_nulls(value) if key in filled else value for key, value in record.items()}


def _without_nulls(value):
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None or key == "content"}
        return {key: _without_nulls(item) for key, item in kept.items()}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _rows(data, name):
    if len(data) == 0:
        raise UserError(f"{name} is empty")
    return map(_unfilled, data)


def _choose(splits, split, name):
    if split not in splits:
        there = ", ".join(map(str, splits))
        raise UserError(f"{name} has no split {split!r}; it has {there}: choose one with --dataset_split")


def refuse_split(name: str, split: str) -> None:
    """Refuse `--dataset_split` for what has no splits."""
    if split != "train":
        raise UserError(f"{name} has no splits: leave --dataset_split {split} out, or give train")


def read_parquet(path: str | Path) -> Iterator[dict]:
    """Yield the rows of a .parquet file."""
    import datasets
    import pyarrow.parquet

    path = existing_file(path, "input")
    _refuse_pointer(path)
    if _loaded(str(path), pyarrow.parquet.read_metadata, path).num_rows == 0:
        raise UserError(f"{path} is empty")
    data = _loaded(str(path), datasets.load_dataset, "parquet", data_files=str(path), split="train")
    yield from _rows(data, path)


def read_data_set(name: str, split: str) -> Iterator[dict | BadRecord]:
    """Yield the records of a split: of a folder (`save_to_disk`, or cloned from the hub), or of the hub.

    `NAME:CONFIG` chooses one of several configurations.
    """
    import datasets

    base, config = split_config(name)
    if any((Path(base) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        data = _loaded(name, datasets.load_from_disk, base)
        if isinstance(data, dict):
            _choose(data, split, name)
            data = data[split]
        else:
            refuse_split(name, split)
        yield from _rows(data, name)
        return
    builder = _loaded(name, datasets.load_dataset_builder, base, config)
    files = builder.config.data_files or {}
    if files and split != "all" and not any(mark in split for mark in "[+"):  # not of `train[:10]`
        _choose(files, split, name)
    for file in files.get(split, ()):
        if Path(file).is_file():
            _refuse_pointer(file)
    if _are_text(builder, files.get(split)):
        for file in _loaded(name, datasets.DownloadManager().download, list(files[split])):
            delimiter = getattr(builder.config, "sep", None)
            yield from read_csv(file, delimiter) if delimiter else jsonl_records(file)
        return
    more = {"na_filter": False} if _module(builder) == "csv" else {}
    yield from _rows(_loaded(name, datasets.load_dataset, base, config, split=split, **more), name)


def splits_of(name: str) -> list[str]:
    """The splits of a data set: of a folder (`save_to_disk`, or cloned from the hub), or of the hub."""
    import datasets

    base, config = split_config(name)
    if (Path(base) / "state.json").is_file():
        return ["train"]  # one that has no splits, as `read_data_set` calls it
    if (Path(base) / "dataset_dict.json").is_file():
        return list(_loaded(name, datasets.load_from_disk, base))
    return list(_loaded(name, datasets.get_dataset_split_names, base, config))


def _are_text(builder, files):
    """Whether we read a split's files, .csv or JSON, ourselves: so cells and fields stay what they are."""
    plain = {"csv": (".csv", ".tsv"), "json": (".jsonl", ".json", ".ndjson")}.get(_module(builder), ())
    default = vars(type(builder.config)())
    ours = {"name", "version", "data_dir", "data_files", "description", "sep", "delimiter", "features"}
    given = {key: value for key, value in vars(builder.config).items() if key not in ours}
    special = any(value != default.get(key) for key, value in given.items())
    return bool(files) and not special and all(str(file).endswith(plain) for file in files)


def _module(builder):
    return type(builder).__module__.rsplit(".", 1)[-1]
