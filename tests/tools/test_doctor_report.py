"""The doctor from the command line: files, exit codes; a page that is well-formed, escaped and needs nothing else."""

import gzip
import json
import re
import shlex

import pyarrow.parquet as pq
import pytest
from dpop_trainer.cli import main
from dpop_trainer.data import tokenise_pairs
from dpop_trainer.inputs.data_sets import load_train_data
from dpop_trainer.settings.arguments import parse_arguments
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.tools.doctor.marks import Piece, differing, mark_tokens, mark_words, shortened, token_texts
from page import Page
from tiny import text_pairs, tiny_llama, word_tokenizer
from transformers import AutoTokenizer

SCRIPT = "<script>alert('x')</script>&\"'"
NASTY = [
    {"prompt": f"{SCRIPT} 1", "chosen": f" {SCRIPT} a", "rejected": f" {SCRIPT} b", SCRIPT: SCRIPT},
    {"prompt": "שאלה: מה בירת צרפת?", "chosen": "התשובה היא פריז.", "rejected": "התשובה היא ליון."},
    {"prompt": "emoji 👩‍👩‍👧", "chosen": "Here 👩‍👩‍👧🎉", "rejected": "Here 👨‍👩‍👦🎈"},
    {"prompt": "ctl\x00\x07", "chosen": "a\u202eevil\u202c b\x00", "rejected": "a\u202eevil\u202c c\x1b[31m"},
    {"prompt": "dup", "chosen": "yes", "rejected": "no"},
    {"prompt": "dup", "chosen": "no", "rejected": "yes"},
    {"prompt": "same", "chosen": "x", "rejected": "x"},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, its tokenizer and sound pairs."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    write(tmp_path / "good.jsonl", text_pairs())
    return tmp_path


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_sound_pairs(folder, capsys):
    assert main(["pairs", "inspect", "good.jsonl", "--model", "model", "--max_scored", "4"]) == 0
    out = capsys.readouterr().out
    assert "6 pairs (text)" in out
    assert "Rank correlation of CHES and edit distance" in out
    report = folder / "runs" / "doctor" / "good"
    assert sorted(path.name for path in report.iterdir()) == ["doctor.json", "measures.parquet", "report.html"]
    result = json.loads((report / "doctor.json").read_text())
    assert result["num_pairs"] == 6
    assert result["is_serious"] is False
    # one word of three differs, the EOS not counted
    assert result["statistics"]["token_distance"]["mean"] == pytest.approx(1 / 3)
    assert result["model"]["num_pairs"] == 4
    assert result["model"]["rank_correlation_ches_edit_distance"] is None  # all distances are the same
    table = pq.read_table(report / "measures.parquet")
    assert table.num_rows == 6
    assert table["prefix"].to_pylist() == [1] * 6
    assert table["ches"].null_count == 2
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    assert ("chosen", " w3") in page.marked
    assert ("rejected", " w5") in page.marked
    assert page.text.count("w2") > 0


@pytest.mark.parametrize("model", [[], ["--tokenizer", "gpt2"]])
def test_nasty_pairs(folder, shared, capsys, model):
    write(folder / f"{'<b>&' if not model else 'nasty'}.jsonl", NASTY)
    if model:
        model = ["--tokenizer", str(shared / "tokenizers" / "gpt2")]
    name = "<b>&" if not model else "nasty"
    assert main(["pairs", "inspect", f"{name}.jsonl", "--out", "report", *model]) == 3
    capsys.readouterr()
    page = Page((folder / "report" / "report.html").read_text(encoding="utf-8"))
    assert "b>" not in page.tags
    assert f"{SCRIPT} 1" in page.text  # shown as it is written
    assert f"{name}.jsonl" in page.text
    assert "פריז" in page.text
    assert "👩‍👩‍👧" in page.text
    # control characters are named, never written
    assert "ctlU+0000U+0007" in page.text
    assert "aU+202Eevil" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page.text)
    marked = "".join(text for side, text in page.marked if side == "chosen")
    assert "🎉" in marked


def test_clean_file_keeps_records_as_they_are(folder, capsys):
    write(folder / "nasty.jsonl", NASTY)
    argv = ["pairs", "inspect", "nasty.jsonl", "--write_clean", "clean.jsonl", "--exit_zero"]
    assert main(argv) == 0
    assert "clean.jsonl with 4 pairs; 3 left out" in capsys.readouterr().out
    clean = [json.loads(line) for line in (folder / "clean.jsonl").read_text().splitlines()]
    assert clean == NASTY[:4]
    dropped = [json.loads(line) for line in (folder / "clean.dropped.jsonl").read_text().splitlines()]
    assert dropped == [
        {"row": 4, "reason": "contradictory"},
        {"row": 5, "reason": "contradictory"},
        {"row": 6, "reason": "identical"},
    ]
    # what is left has nothing more to drop; that a text holds control characters is for people to mend
    assert main(["pairs", "inspect", "clean.jsonl", "--out", "again"]) == 3
    result = json.loads((folder / "again" / "doctor.json").read_text())
    assert result["num_to_drop"] == 0
    assert [f["name"] for f in result["findings"] if f["level"] == "serious"] == ["hidden_characters"]


def low_edit(i):
    ends = ("w4", "w5") if i % 2 else ("w5", "w4")  # which tells no side
    return {"prompt": f"w1 w{i}", "chosen": f" w2 w{i} {ends[0]}", "rejected": f" w2 w{i} {ends[1]}"}


LOST_BY_TRAIN = [
    {"prompt": "w1", "chosen": " w2", "rejected": " w2"},  # identical
    {"prompt": "w1 " * 300, "chosen": " w2", "rejected": " w3"},  # no room at 64, which 99% of the pairs need
    {"prompt": "w1", "chosen": " w3", "rejected": " w2", "weight": 0},
    {"prompt": "w1", "chosen": None, "rejected": " w2"},  # a bad record
    {"prompt": "w1", "chosen": " w3", "rejected": " w2", "weight": -1},  # and another
]
FOR_TRAIN = [low_edit(i) for i in range(3, 203)]


@pytest.mark.parametrize(
    ("name", "records", "told", "read"),
    [
        ("as it is.jsonl", FOR_TRAIN, ".", "as it is.jsonl"),
        ("lossy.jsonl", FOR_TRAIN + LOST_BY_TRAIN, " after dropping 3 pairs and 2 bad records.", "lossy.jsonl"),
        (
            "again.jsonl.gz",
            FOR_TRAIN + LOST_BY_TRAIN + FOR_TRAIN[:5],  # duplicates, which train keeps
            " after dropping 8 pairs and 2 bad records.",
            "runs/doctor/again/clean.jsonl",
        ),
    ],
)
def test_the_told_command_trains_on_what_the_sentence_says(folder, capsys, name, records, told, read):
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert main(["pairs", "inspect", name, "--tokenizer", "./model", "--exit_zero"]) == 0
    sentence, *lines = capsys.readouterr().out.splitlines()
    assert sentence == f"Train with DPOP (dpop_lambda 50, max_length 64){told}"
    (command,) = [line for line in lines if line.startswith("  dpop train ")]
    argv = shlex.split(command)[2:]
    model, data, config = parse_arguments(
        DPOPConfig, [*argv, "--output_dir", "out", "--use_cpu", "--bf16", "false"], "dpop"
    )
    assert (model.model_name_or_path, data.dataset_name) == ("./model", read)
    tokenised, _ = tokenise_pairs(
        load_train_data(data, config),
        word_tokenizer(),
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,
        on_bad_record=config.on_bad_record,
        pair_weight=config.pair_weight,
    )
    trained = [[*record["prompt_ids"], *record["rejected_ids"]] for record in tokenised]
    ids = word_tokenizer()
    assert trained == [[*ids(p["prompt"] + p["rejected"])["input_ids"], ids.eos_token_id] for p in FOR_TRAIN]
    assert (folder / "runs/doctor/again/clean.jsonl").exists() == read.startswith("runs/")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.jsonl"], "expected an existing file or folder, got nowhere.jsonl"),
        (["empty.jsonl"], "expected at least one pair, got none"),
        (["broken.jsonl", "--on_bad_record", "error"], "broken.jsonl, line 2: expected a JSON object"),
        (["good.jsonl", "--max_length", "1"], "max_length: expected at least 2"),
        (["good.jsonl", "--tokenizer", "./nowhere"], "expected a folder with a tokenizer, found none at './nowhere'"),
        (["good.jsonl", "--write_clean", "clean.csv"], "write_clean: expected a file ending in .jsonl, got clean.csv"),
        (["same.jsonl", "--write_clean", "c.jsonl"], "write_clean: expected pairs that may stay, got none"),
        (["messages.jsonl", "--tokenizer", "model"], "expected a tokenizer with a chat template"),
    ],
)
def test_what_cannot_be_examined_is_named(folder, capsys, argv, message):
    write(folder / "empty.jsonl", [])
    write(folder / "same.jsonl", [NASTY[-1]])
    turns = [{"role": "user", "content": "hi"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    write(folder / "messages.jsonl", [{"prompt": turns, "chosen": answers[0], "rejected": answers[1]}])
    (folder / "broken.jsonl").write_text(json.dumps(text_pairs()[0]) + '\n{"prompt": \n')
    assert main(["pairs", "inspect", *argv]) == 1
    assert message in capsys.readouterr().err


def test_a_chat_template_from_a_file(folder):
    write(folder / "m.jsonl", [{"chosen": turns("w2"), "rejected": turns("w3")}])
    (folder / "template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    argv = ["pairs", "inspect", "m.jsonl", "--tokenizer", "model", "--chat_template_path", "template.jinja"]
    assert main(argv) == 0
    result = json.loads((folder / "runs" / "doctor" / "m" / "doctor.json").read_text())
    assert result["statistics"]["prompt_tokens"]["max"] == 1


def turns(answer):
    return [{"role": "user", "content": "w1"}, {"role": "assistant", "content": answer}]


def test_words_that_differ():
    chosen, rejected = mark_words("We sold 24 clips, so 72.", "We sold 84 clips, so 73.")
    assert chosen == [
        Piece("We sold ", False),
        Piece("24", True),
        Piece(" clips, so ", False),
        Piece("72", True),
        Piece(".", False),
    ]
    assert [piece.text for piece in rejected if piece.differs] == ["84", "73"]
    # an insertion marks one side alone
    assert differing([1, 2, 3], [1, 9, 2, 3]) == ([False] * 3, [False, True, False, False])


def test_token_texts_put_broken_characters_together(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    text = " a 👩‍👩‍👧🎉 שלום x"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert "".join(texts) == text
    assert len(texts) == len(ids)
    assert "\ufffd" not in "".join(texts)
    # two emoji that share their first bytes: both whole characters are marked
    pair = [tokenizer(f"so {emoji}!")["input_ids"] for emoji in "🎉🎈"]
    chosen, rejected = mark_tokens(*pair, tokenizer)
    assert [piece.text.strip() for piece in chosen if piece.differs] == ["🎉"]
    assert [piece.text.strip() for piece in rejected if piece.differs] == ["🎈"]


def test_token_texts_keep_the_first_space(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "mistral")
    prompt, whole = tokenizer("Answer:")["input_ids"], tokenizer("Answer: yes or no")["input_ids"]
    answer = whole[len(prompt) :]
    assert whole[: len(prompt)] == prompt
    assert "".join(token_texts(answer, tokenizer, before=prompt[-1:])) == " yes or no"


def test_long_stretches_are_shortened():
    pieces = [Piece("a" * 50, False), Piece("b" * 5, True), Piece("c" * 50, False)]
    assert shortened(pieces, 10) == [
        Piece(" ⋯ 40 characters ⋯ " + "a" * 10, False),
        Piece("b" * 5, True),
        Piece("c" * 10 + " ⋯ 40 characters ⋯ ", False),
    ]
    assert shortened([Piece("b" * 100, True)], 10) == [Piece("b" * 80 + " ⋯ 20 characters ⋯ ", True)]
    assert shortened([Piece("a" * 15, False)], 10) == [Piece(" ⋯ 15 characters ⋯ ", False)]
    short = [Piece("a" * 10, False), Piece("b", True)]
    assert shortened(short, 10) == short


def test_what_is_most_of_an_answer_is_not_marked(tmp_path, capsys):
    """Of nine characters four differ, 0.44; or five, 0.56."""
    far = {"prompt": "q", "chosen": "a b c d e", "rejected": "v w x y z"}
    near = {"prompt": "r", "chosen": "a b c d e", "rejected": "v w x y e"}
    for name, pair in (("far", far), ("near", near)):
        main(["pairs", "inspect", str(write(tmp_path / f"{name}.jsonl", [pair])), "--out", str(tmp_path / name)])
    pages = {name: Page((tmp_path / name / "report.html").read_text()) for name in ("far", "near")}
    assert {text for side, text in pages["near"].marked if side == "rejected"} == {"v", "w", "x", "y"}
    assert pages["far"].marked == []


def test_the_judgement_is_the_heading(folder, capsys):
    assert main(["pairs", "inspect", "good.jsonl", "--tokenizer", "model"]) == 0
    told = capsys.readouterr().out.partition("\n")[0]
    text = (folder / "runs/doctor/good/report.html").read_text()
    assert told.startswith("Train with DPOP (dpop_lambda 50")
    assert f'<h1><span class="good">{told}</span></h1>' in text
    write(folder / "same.jsonl", [NASTY[-1]])
    assert main(["pairs", "inspect", "same.jsonl"]) == 3
    assert '<h1><span class="serious">Do not train on this' in (folder / "runs/doctor/same/report.html").read_text()


@pytest.mark.parametrize("weights", [(1.0, 2.0, 0.5), (1.0, 1.0, 1.0)], ids=["weighted", "plain"])
def test_weights_of_pairs_are_shown_where_there_are_any(weights, tmp_path):
    records = [{**pair, "weight": weight} for pair, weight in zip(text_pairs(3), weights, strict=True)]
    path, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    main(["pairs", "inspect", str(path), "--out", str(out)])
    is_shown = len(set(weights)) > 1
    (report,), (figures,) = out.glob("*.html"), out.glob("*.json")
    assert ("Weight of a pair in the loss: 3 pairs, median 1" in report.read_text()) == is_shown
    statistics = json.loads(figures.read_text())["statistics"]
    assert ("weight" in statistics) == is_shown
    if is_shown:
        assert statistics["weight"]["mean"] == pytest.approx(3.5 / 3)
