"""Where pairs come from: compressed files, long lists, mixtures, streams; and the records that a run leaves out."""

import gzip
import itertools
import json

import datasets
import datasets.config
import numpy as np
import pytest
from datasets import Dataset
from dpop_trainer.data import SourceStream, TokenisedStream, load_pairs, read_json, read_pairs, tokenise_pairs
from dpop_trainer.data.convert import convert_pairs, row_pair
from dpop_trainer.data.dataset_source import DatasetSource, parse_sources
from dpop_trainer.data.mixture import mix_pairs, mix_streams
from dpop_trainer.data.read_json import PlacedRecord, read_json_records
from dpop_trainer.data.skipped import SkippedRecords
from dpop_trainer.data.stream import MixedStream, Part, ShuffledStream
from words import chat_tokenizer, mixed_pairs, word_tokenizer

PAIRS = [{"prompt": f"p{i}", "chosen": " b", "rejected": " c"} for i in range(10)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prompts(rows):
    return [row_pair(row["kind"], row["pair"]).prompt for row in rows]


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.json.gz"])
def test_compressed_files(tmp_path, name):
    path = tmp_path / name
    text = json.dumps(PAIRS) if ".json." in name else "".join(json.dumps(pair) + "\n" for pair in PAIRS)
    path.write_bytes(gzip.compress(text.encode()))
    assert load_pairs(path).to_list() == PAIRS
    rows = read_pairs(path)
    assert prompts(rows) == [pair["prompt"] for pair in PAIRS]
    assert rows[2]["place"] == (f"{path}, record 2" if ".json." in name else f"{path}, line 3")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=rf"{name}: expected a file that gzip can read"):
        read_pairs(path)


@pytest.mark.parametrize("block", [1, 2, 7])
def test_list_is_read_in_blocks(tmp_path, monkeypatch, block):
    """Wherever a block ends: inside a number, a character of several bytes, an escape, the white space."""
    monkeypatch.setattr(read_json, "_BLOCK", block)
    values = [{"n": 12345, "text": 'é漢👩\u2028\\ "]},', "deep": [{"a": [1.5e-7, None, True]}]}, {}, {"n": -0.25}]
    path = tmp_path / "list.json"
    for indent in (None, 3):
        path.write_text(" \n" + json.dumps(values, indent=indent, ensure_ascii=False) + "\n ", encoding="utf-8")
        items = list(read_json_records(path))
        assert items == [PlacedRecord(f"{path}, record {index}", value) for index, value in enumerate(values)]
    path.write_text('[{"a": 1},\n\n {"a" 2}]')
    with pytest.raises(ValueError, match=r"at line 3: expected record 1 \(Expecting ':' delimiter\)"):
        list(read_json_records(path))
    path.write_text('[{"a": 1}] x')
    with pytest.raises(ValueError, match=r"at line 1: expected nothing after the list's end, got 'x'"):
        list(read_json_records(path))
    path.write_bytes(b'[{"a": "\n\xff"}]')
    with pytest.raises(ValueError, match="line 2: expected UTF-8"):
        list(read_json_records(path))


def test_rows_are_read_once_per_content(tmp_path, monkeypatch):
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    first = read_pairs(path)
    with monkeypatch.context() as patch:
        patch.setattr("dpop_trainer.data.read.convert_record", None)  # a call would raise
        again = read_pairs(path)
    assert again.to_list() == first.to_list()
    assert again._fingerprint == first._fingerprint
    assert prompts(read_pairs(write(path, PAIRS[:2]))) == ["p0", "p1"]


def test_bad_records_are_refused_by_file_and_line(tmp_path):
    records = [json.dumps(pair) for pair in PAIRS]
    records[3] = '{"prompt": "p3", '
    records[5] = json.dumps({**PAIRS[5], "chosen": None})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(records))
    with pytest.raises(ValueError, match="expected 10 usable records, got 2 that are not") as raised:
        tokenise_pairs(read_pairs(path), word_tokenizer())
    lines = str(raised.value).splitlines()
    assert lines[1].startswith(f"  {path}, line 4: expected a JSON object, got")
    assert lines[2].startswith(f"  {path}, line 6: chosen: expected text, got null.")
    assert "on_bad_record='skip'" in lines[3]


def test_bad_records_are_left_out_and_listed(tmp_path, caplog):
    """Whatever is wrong with them: their JSON, a field, what the template says, an id beyond the vocabulary."""
    user, right, wrong = ({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("assistant", "c")))
    good = {"prompt": [user], "chosen": [right], "rejected": [wrong]}
    system = {**good, "prompt": [{"role": "system", "content": "a"}, user]}  # the template refuses system turns
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(["{", json.dumps(good), json.dumps({**good, "chosen": []}), json.dumps(system)]))
    rows = read_pairs(path)
    skipped = SkippedRecords(tmp_path / "run")
    caplog.clear()
    tokenised, counts = tokenise_pairs(
        rows, chat_tokenizer(), on_bad_record="skip", on_skipped=lambda bad: skipped.add("train", bad) and None
    )
    assert tokenised["pair_id"][:] == [1]
    assert (counts.num_pairs_in, counts.num_pairs, counts.skipped_bad) == (4, 1, 3)
    assert "dropped: 3 that cannot be used" in counts.summary()
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert warning.startswith(f"3 of 4 records left out, which cannot be used:\n  {path}, line 1: expected a JSON")
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped_records.jsonl").read_text().splitlines()]
    assert [(item["dataset"], item["place"]) for item in listed] == [
        ("train", f"{path}, line {number}") for number in (1, 3, 4)
    ]
    assert "no system turn" in listed[2]["reason"]
    with pytest.raises(
        ValueError, match=r"at least one pair that can be used, got none\. 0 of 4 pairs kept; dropped: 4 that"
    ):
        tokenise_pairs(rows, chat_tokenizer(), on_bad_record="skip", vocab_size=2)
    with pytest.raises(ValueError, match="on_bad_record: expected one of"):
        tokenise_pairs(rows, chat_tokenizer(), on_bad_record="ignore")  # type: ignore[arg-type]


def test_listed_once_however_often_it_is_met(tmp_path):
    bad = [read_json.BadRecord("a.jsonl, line 1", "why")]
    skipped = SkippedRecords(tmp_path)
    assert skipped.add("train", bad + bad) == bad
    assert skipped.add("train", bad) == []
    assert skipped.add("eval", bad) == bad
    lines = (tmp_path / "skipped_records.jsonl").read_text().splitlines()
    assert [json.loads(line)["dataset"] for line in lines] == ["train", "eval"]
    SkippedRecords(tmp_path, clear=True)
    assert not (tmp_path / "skipped_records.jsonl").exists()


def test_scores_are_counted():
    """Of the pairs kept: two alike, one the wrong way round, one without scores."""
    scores = [(7.0, 2.0), (5.0, 5.0), (3.0, 3.0), (1.0, 4.0), (None, None)]
    records = [
        {"prompt": "a", "chosen": " b", "rejected": " c", "chosen_rating": chosen, "rejected_rating": rejected}
        for chosen, rejected in scores
    ]
    _, counts = tokenise_pairs(Dataset.from_list(records), word_tokenizer())
    assert (counts.num_pairs, counts.equal_scores, counts.inverted_scores) == (5, 2, 1)
    assert counts.summary().endswith("\nScores of the two answers: 2 equal, 1 inverted.")


def test_mixture_of_forms(tmp_path, caplog):
    """Weights repeat, numbers draw without repeating, and the same seed gives the same mixture."""
    text = write(tmp_path / "text.jsonl", PAIRS)
    turns = [
        {"conversations": [{"from": "human", "value": f"q{i}"}]}
        | {answer: {"from": "gpt", "value": word} for answer, word in (("chosen", "b"), ("rejected", "c"))}
        for i in range(6)
    ]
    (tmp_path / "turns.json").write_text(json.dumps(turns))
    sources = parse_sources(
        [{"path": str(text), "weight": 1.5}, json.dumps({"path": str(tmp_path / "turns.json"), "num_pairs": 4})],
        "dataset_mixture",
    )
    mixed = mix_pairs(sources, seed=3)
    texts = [row["place"] for row in mixed if row["kind"] == "text"]
    messages = [row["place"] for row in mixed if row["kind"] == "messages"]
    # all ten once and five of them again; four of six
    assert (len(texts), len(set(texts))) == (15, 10)
    assert (len(messages), len(set(messages))) == (4, 4)
    assert [row["kind"] for row in mixed] != ["text"] * 15 + ["messages"] * 4
    assert "mixture: text: 15 of 10 records, 78.9% of the whole" in caplog.messages
    assert mix_pairs(sources, seed=3).to_list() == mixed.to_list()
    assert mix_pairs(sources, seed=4).to_list() != mixed.to_list()
    _, counts = tokenise_pairs(mixed, chat_tokenizer())
    assert counts.num_pairs_in == counts.num_pairs == 19


def test_fractions_are_shares_without_repeating(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", PAIRS[:size]) for name, size in (("a", 10), ("b", 4))]
    sources = parse_sources([{"path": str(path), "fraction": share} for path, share in zip(paths, (3, 2))], "x")  # noqa: B905
    places = [row["place"] for row in mix_pairs(sources, seed=0)]
    # b's four records are two fifths, so the whole is ten
    assert sum("b.jsonl" in place for place in places) == 4
    assert sum("a.jsonl" in place for place in places) == 6
    assert len(set(places)) == 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "mix: expected a list of data sets"),
        ([{"split": "train"}], r"mix\[0\]: expected path and any of name, split.*got \['split'\]"),
        ([{"path": "a", "wieght": 1}], r"mix\[0\]: expected path and any of"),
        ([{"path": "a", "weight": 0}], r"mix\[0\]: a: weight: expected a number > 0, got 0"),
        ([{"path": "a", "num_pairs": 1.5}], "num_pairs: expected a whole number, got 1.5"),
        ([{"path": "a", "weight": 1, "num_pairs": 1}], "expected one of fraction, weight and num_pairs"),
        ([{"path": "a", "fraction": 1}, "b"], "mix: expected fraction for all data sets or for none, got it for 1"),
        (["{"], r"mix\[0\]: expected a path or a JSON object"),
        ([7], r"mix\[0\]: expected a mapping with a path, got 7"),
    ],
)
def test_bad_mixtures_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        parse_sources(values, "mix")


def test_mixture_fields(tmp_path):
    (source,) = parse_sources([{"id": "org/data.set", "config": "easy"}], "x")
    assert source == DatasetSource("org/data.set", name="easy")
    assert source.shown == "data"
    with pytest.raises(ValueError, match="a: num_pairs: expected at most its 10 records, got 11"):
        mix_pairs([DatasetSource(str(write(tmp_path / "a.jsonl", PAIRS)), num_pairs=11)], seed=0)


def as_iterable(dataset, kind, tmp_path):
    if kind == "file":
        return SourceStream(write(tmp_path / "pairs.jsonl", dataset.to_list()))
    if kind == "parquet":
        dataset.to_parquet(tmp_path / "pairs.parquet")
        return SourceStream(str(tmp_path / "pairs.parquet"))
    return SourceStream(dataset.to_iterable_dataset(num_shards=3))


@pytest.mark.parametrize("kind", ["file", "parquet", "memory"])
def test_stream_gives_what_the_whole_gives(tmp_path, kind):
    """The same pairs, ids and counts as `tokenise_pairs`, over more than one batch; a look ahead counts nothing."""
    whole, counts = tokenise_pairs(mixed_pairs(), word_tokenizer(), max_length=4)
    stream = TokenisedStream(as_iterable(mixed_pairs(), kind, tmp_path), word_tokenizer(), name="train", max_length=4)
    assert stream.first_records(2) == whole.select(range(2)).to_list()
    assert stream.counts.num_pairs_in == 0
    assert list(stream) == whole.to_list()
    assert stream.counts == counts
    assert list(stream) == whole.to_list()  # again, and counted anew
    assert stream.counts == counts


def test_training_stream_begins_anew(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}] * 3)
    stream = TokenisedStream(SourceStream(path), word_tokenizer(), name="train", repeat=True)
    assert [record["pair_id"] for record in itertools.islice(stream, 7)] == [0, 1, 2, 0, 1, 2, 0]
    write(path, [{"prompt": "a", "chosen": " b", "rejected": " b"}])
    with pytest.raises(ValueError, match=r"train_dataset: expected at least one pair in a pass .* 1 with identical"):
        next(iter(stream))


def test_bad_records_of_a_stream(tmp_path, caplog):
    path = write(tmp_path / "pairs.jsonl", [PAIRS[0], {**PAIRS[1], "chosen": 7}])
    with pytest.raises(ValueError, match=r"train_dataset: .*\n.*pairs\.jsonl, line 2: chosen: expected text"):
        list(TokenisedStream(SourceStream(path), word_tokenizer(), name="train"))
    skipped = SkippedRecords(tmp_path)
    stream = TokenisedStream(
        SourceStream(path), word_tokenizer(), name="train", on_bad_record="skip", skipped=skipped, keep_identical=True
    )
    caplog.clear()
    for _ in range(2):
        assert [record["pair_id"] for record in stream] == [0]
        assert (stream.counts.num_pairs_in, stream.counts.skipped_bad) == (2, 1)
    (line,) = (tmp_path / "skipped_records.jsonl").read_text().splitlines()
    assert json.loads(line)["place"] == f"{path}, line 2"
    assert sum("left out" in message for message in caplog.messages) == 1


def test_shuffled_stream(tmp_path):
    """Every pass holds every row, in an order that seed and pass alone decide."""
    stream = SourceStream(write(tmp_path / "pairs.jsonl", PAIRS))
    shuffled = ShuffledStream(stream, 4, seed=1)
    first = [row["place"] for row in shuffled.rows(0)]
    assert sorted(first) == sorted(row["place"] for row in stream.rows(0))
    assert first == [row["place"] for row in shuffled.rows(0)]
    assert first != [row["place"] for row in shuffled.rows(1)]
    # no row comes before the buffer has reached it
    assert all(int(place.split()[-1]) - 1 <= index + 4 for index, place in enumerate(first))


def test_mixed_stream_draws_by_weight(tmp_path):
    """Three to one, within five standard deviations of 1000 draws; a short source begins anew."""
    paths = [write(tmp_path / f"{name}.jsonl", PAIRS[:size]) for name, size in (("a", 10), ("b", 2))]
    sources = [DatasetSource(str(paths[0]), weight=3), DatasetSource(str(paths[1]))]
    places = [row["place"] for row in itertools.islice(mix_streams(sources, seed=0).rows(0), 1000)]
    num_a = sum("a.jsonl" in place for place in places)
    assert abs(num_a - 750) < 5 * np.sqrt(1000 * 0.75 * 0.25)
    assert len(set(places)) == 12
    again = itertools.islice(mix_streams(sources, seed=0).rows(0), 1000)
    assert places == [row["place"] for row in again]


def test_streamed_reference_log_probs():
    records = [
        {"prompt_ids": [1], "chosen_ids": [2, i], "rejected_ids": [3], "ref_chosen_logps": -i, "ref_rejected_logps": -1}
        for i in range(4, 8)
    ]
    dataset = Dataset.from_list(records)
    stream = TokenisedStream(SourceStream(dataset.to_iterable_dataset()), word_tokenizer(), name="train")
    assert stream.column_names[-2:] == ["ref_chosen_logps", "ref_rejected_logps"]
    assert list(stream) == tokenise_pairs(dataset, word_tokenizer())[0].to_list()
    # a record without, where others have them, is bad; found also when the whole data set is read
    rows = convert_pairs(dataset).to_list()
    rows[2] |= {"ref_chosen_logps": None, "ref_rejected_logps": None}
    features = convert_pairs(dataset).features
    with pytest.raises(ValueError, match="record 2: ref_chosen_logps: expected reference log-probs in every record"):
        tokenise_pairs(Dataset.from_list(rows, features=features), word_tokenizer())


def test_shuffled_iterable_data_set_is_told_its_pass():
    dataset = Dataset.from_list(PAIRS).to_iterable_dataset().shuffle(seed=0, buffer_size=10)
    stream = SourceStream(dataset)
    orders = [prompts(stream.rows(epoch)) for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(pair["prompt"] for pair in PAIRS)
    assert orders[0] == orders[2] != orders[1]


def test_mixed_stream_whose_source_does_not_begin_anew():
    once = iter(PAIRS[:2])
    parts = [Part(SourceStream(datasets.IterableDataset.from_generator(lambda: once)), 1.0)]
    with pytest.raises(ValueError, match=r"expected data set 0 \(from 0\) to begin anew when it ends, got no record"):
        list(itertools.islice(MixedStream(parts, seed=0).rows(0), 5))
