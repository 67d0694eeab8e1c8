"""Parquet and Arrow files that are cut, or hold what no reader expects: refused by name, whole or streamed."""

import errno
import itertools
import json
import os
import time

import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from dpop_trainer.data import convert, load_pairs, read_pairs
from dpop_trainer.data.partial_files import partial_of, replacing
from dpop_trainer.data.read import stream_items
from dpop_trainer.models.from_elsewhere import from_elsewhere
from tiny import text_pairs

PAIRS = text_pairs(3)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table_with(**columns):
    table = pa.Table.from_pylist(PAIRS)
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, values)
    return table


def bytes_as_text(*values):
    """A column of strings, whatever bytes these are: Parquet and Arrow do not look."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


MAP = pa.array([[("a", "b")]] * 3, pa.map_(pa.string(), pa.string()))
PARQUET = {
    "a map": (table_with(more=MAP), "does not have a datasets dtype equivalent"),
    "a prompt of maps": (table_with(prompt=MAP), "does not have a datasets dtype equivalent"),
    "metadata that is no JSON": (
        pa.Table.from_pylist(PAIRS).replace_schema_metadata({"huggingface": "{"}),
        "Expecting prop",
    ),
    "metadata of nothing": (
        pa.Table.from_pylist(PAIRS).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": {"prompt": {"dtype": "no such", "_type": "Value"}}}})}
        ),
        "no such",
    ),
    "metadata of another shape": (
        pa.Table.from_pylist(PAIRS).replace_schema_metadata({"huggingface": json.dumps({"info": 3})}),
        "TypeError: ",
    ),
}


def read_stream(path):
    return list(stream_items(str(path), "train"))


@pytest.mark.parametrize("read", [read_pairs, read_stream])
@pytest.mark.parametrize("what", PARQUET)
def test_a_parquet_file_that_nobody_can_read_is_named(tmp_path, what, read):
    table, reason = PARQUET[what]
    path = tmp_path / "pairs.parquet"
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"expected a readable \.parquet file, got .*pairs\.parquet \(") as caught:
        read(path)
    assert reason in str(caught.value)
    assert "or as JSON, one record per line" in str(caught.value)


def test_text_that_is_no_utf_8_is_named_by_its_record(tmp_path):
    path = tmp_path / "pairs.parquet"
    pq.write_table(table_with(prompt=bytes_as_text(b"a", b"a\xff", b"c")), path)
    with pytest.raises(ValueError, match=r"pairs\.parquet, record 1: expected text in UTF-8, got other bytes"):
        read_pairs(path)
    with pytest.raises(ValueError, match=r"pairs\.parquet, after record -?\d: expected records that can be read"):
        read_stream(path)


def write_arrow(path, table, *, whole_file):
    new = pa.ipc.new_file if whole_file else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)


@pytest.mark.parametrize("whole_file", [True, False], ids=["file", "stream"])
def test_an_arrow_file_cut_anywhere_is_named(tmp_path, whole_file):
    """A stream at every eighth byte: also where a batch ends, which pyarrow takes for the end of all."""
    path = tmp_path / "pairs.arrow"
    write_arrow(path, pa.Table.from_pylist(PAIRS), whole_file=whole_file)
    assert load_pairs(path).to_list() == PAIRS
    content = path.read_bytes()
    for size in range(0, len(content), len(content) // 8 if whole_file else 8):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"source: expected a readable \.arrow file, got .*pairs\.arrow \("):
            load_pairs(path)


def test_a_saved_data_set_that_was_cut_is_named(tmp_path):
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    reader = pa.ipc.open_stream(path.read_bytes())
    rows = reader.read_all().slice(0, 2)
    write_arrow(path, rows, whole_file=False)
    os.truncate(path, path.stat().st_size - 8)  # what a stream of two rows is, but for its end
    with pytest.raises(ValueError, match=r"saved \(.*\.arrow has no end: it was cut, or is still being written\)"):
        load_pairs(tmp_path / "saved")
    path.unlink()
    with pytest.raises(ValueError, match=r"expected a folder of data files or one that save_to_disk wrote, got"):
        load_pairs(tmp_path / "saved")


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), OSError(errno.ENOSPC, "No space left"), torch.OutOfMemoryError("on the device")]
)
def test_no_room_is_not_told_as_damage(error):
    def records():
        yield {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
        raise error

    stream = datasets.IterableDataset.from_generator(records)
    with pytest.raises(type(error)) as raised:
        list(stream_items(stream, "train"))
    assert raised.value is error
    with pytest.raises(type(error)), from_elsewhere("model: expected a folder with a model", "m"):
        raise error


def test_a_pair_beyond_the_bound_is_named_and_a_long_one_told(tmp_path, monkeypatch, caplog):
    """From Parquet as from JSON, whose lines are bounded as they are read."""
    monkeypatch.setenv("DPOP_MAX_RECORD", "1")
    monkeypatch.setattr(convert, "_LONG", 1 << 19)
    pairs = [{**pair, "prompt": "w1 " * words} for pair, words in zip(PAIRS, (1, 200_000, 400_000), strict=True)]
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "pairs.parquet")
    problems = read_pairs(tmp_path / "pairs.parquet")["problem"][:]
    assert problems[:2] == [None, None]
    assert problems[2].startswith("record: expected at most 1 MiB (DPOP_MAX_RECORD) of text, got 1.1 MiB. Remove it")
    told = [message for message in caplog.messages if "takes a while" in message]
    assert [message.partition(": a pair of 0.6 million")[0] for message in told] == [
        f"{tmp_path / 'pairs.parquet'}, record 1"
    ]


def test_what_killed_processes_left_half_written_is_removed_after_a_day(tmp_path):
    day = time.time() - 90_000
    for name, is_old in itertools.product(("a.arrow.7.partial", "b.seal.123.partial", "mine.partial"), (True, False)):
        path = tmp_path / f"{is_old}.{name}"
        path.write_bytes(b"half")
        if is_old:
            os.utime(path, (day, day))
    assert partial_of(tmp_path / "new") == tmp_path / f"new.{os.getpid()}.partial"
    names = {path.name for path in tmp_path.iterdir()}
    # of another program's we know nothing
    assert names == {"False.a.arrow.7.partial", "False.b.seal.123.partial", "False.mine.partial", "True.mine.partial"}
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "new"):
        pass  # which wrote nothing
    assert {path.name for path in tmp_path.iterdir()} == names
