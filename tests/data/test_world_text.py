"""Text of the whole world through the data path, the reports and a training run; numbers in test_numerals.py."""

import json
import re

import pytest
import torch
import yaml
from datasets import Dataset
from dpop_trainer.cli import main
from dpop_trainer.data import PairTree, read_pairs, tokenise_pairs
from dpop_trainer.data.convert import row_pair
from dpop_trainer.data.edits import EditRegions
from dpop_trainer.report.graphemes import columns, graphemes, pad, pad_left
from dpop_trainer.report.token_text import token_texts
from dpop_trainer.tools.doctor.marks import Piece, mark_tokens, mark_words
from dpop_trainer.tools.doctor.texts import pair_texts
from dpop_trainer.tools.inspect.report import AnswerTokens, _coloured
from transformers import AutoModelForCausalLM, AutoTokenizer

WORLD = {
    "chinese": ("小明有１２个苹果，又买了3个。", "他现在有12+3=15个苹果。", "他现在有12+3=16个苹果。"),
    "japanese": ("質問：東京の人口は？", "答えは約1,400万人です。", "答えは約1,500万人です。"),
    "korean": ("질문: 몇 개?", "사과가 24개 있습니다.", "사과가 26개 있습니다."),
    "arabic": ("سؤال: كم عدد التفاح؟", "لديه ٤٨ ÷ ٢ = ٢٤ تفاحة.", "لديه ٤٨ ÷ ٢ = ٢٦ تفاحة."),
    "hebrew": ("שאלה: כמה?", " יש לו 24 תפוחים.", " יש לו 26 תפוחים."),
    "hindi": ("प्रश्न: कितने?", "उसके पास २४ सेब हैं।", "उसके पास २६ सेब हैं।"),
    "thai": ("คำถาม: กี่ผล?", "เขามีแอปเปิ้ล 24 ผล", "เขามีแอปเปิ้ล 26 ผล"),
    "emoji": ("Who?", "👩‍👩‍👧 and 🇫🇷", "👩‍👩‍👦 and 🇩🇪"),
    "control characters": ("a\x00b", "\x07c\u2028d\r\n\ufeffe", "\x07c\u2028d\r\n\ufefff"),
    "directions": ("q:", " a\u202eb\u202c1 \u200f", " a\u202eb\u202c2 \u200f"),
}


@pytest.fixture(scope="module", params=["tokenizers/gpt2", "tokenizers/mistral", "models/stories260K"])
def tokenizer(request, shared):
    """Byte-level BPE, and two that fall back to bytes: one that knows most characters, one that knows few."""
    tokenizer = AutoTokenizer.from_pretrained(shared / request.param)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = "</s>"
    return tokenizer


@pytest.mark.parametrize("script", WORLD)
def test_tokens_are_those_of_the_whole_text(tokenizer, script):
    prompt, chosen, rejected = WORLD[script]
    (row,), _ = tokenise_pairs(texts(WORLD[script]), tokenizer)
    tree = PairTree.from_ids(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"], share_prefix=True)
    for answer, tail in ((chosen, tree.chosen_ids), (rejected, tree.rejected_ids)):
        whole = [*tree.prompt_ids, *tree.shared_ids, *tail]
        assert whole == [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        assert tokenizer.decode(whole, skip_special_tokens=True).strip() == prompt + answer
    assert tree.chosen_ids[0] != tree.rejected_ids[0]
    # what is shown of the answer is the answer, though characters are spread over tokens
    shown = token_texts(tokenizer, row["chosen_ids"], row["prompt_ids"])
    assert len(shown) == len(row["chosen_ids"])
    assert (prompt + chosen).endswith("".join(shown[:-1]))
    assert len("".join(shown[:-1])) >= len(chosen)  # more where a token spans the boundary
    assert shown[-1] == tokenizer.eos_token


def test_answers_that_part_inside_a_character(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    # 问 is E9 97 AE, 一 E4 B8 80, 丁 E4 B8 81; byte b is this tokenizer's token b + 3
    (row,), counts = tokenise_pairs(texts(("问", "一好", "丁好")), tokenizer)
    one, good = [0xE4 + 3, 0xB8 + 3, 0x80 + 3], [byte + 3 for byte in "好".encode()]
    assert row["prompt_ids"][-3:] == [0xE9 + 3, 0x97 + 3, 0xAE + 3]
    assert row["chosen_ids"] == [*one, *good, tokenizer.eos_token_id]
    tree = PairTree.from_ids(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"], share_prefix=True)
    assert tree.shared_ids == one[:2]
    assert (tree.chosen_ids[0], tree.rejected_ids[0]) == (0x80 + 3, 0x81 + 3)
    assert counts.merged_boundaries == 0
    # both characters are marked whole, though only their last bytes differ
    marked = mark_tokens(row["chosen_ids"][:-1], row["rejected_ids"][:-1], tokenizer, before=row["prompt_ids"])
    assert marked == ([Piece("一", True), Piece("好", False)], [Piece("丁", True), Piece("好", False)])
    # cut inside the character, nothing is left to prefer; one byte more, and there is
    length = len(row["prompt_ids"])
    with pytest.raises(ValueError, match="1 with answers identical after truncation"):
        tokenise_pairs(texts(("问", "一好", "丁好")), tokenizer, max_length=length + 2)
    (row,), counts = tokenise_pairs(texts(("问", "一好", "丁好")), tokenizer, max_length=length + 3)
    assert (row["chosen_ids"], row["rejected_ids"]) == (one, [*one[:2], 0x81 + 3])
    assert (counts.truncated_chosen, counts.truncated_rejected) == (1, 1)
    # keep_end may begin in the middle of 问
    (row,), _ = tokenise_pairs(texts(("问", "一好", "丁好")), tokenizer, max_length=9, truncation_mode="keep_end")
    assert row["prompt_ids"] == [0x97 + 3, 0xAE + 3]
    assert token_texts(tokenizer, row["chosen_ids"], row["prompt_ids"])[:6] == ["", "", "一", "", "", "好"]


def test_what_never_becomes_a_character_does_not_spoil_the_rest(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    ids = [byte + 3 for byte in b"\x80\xb8" + "好一".encode() + b"\xe4"]
    shown = token_texts(tokenizer, ids)
    assert shown == ["\ufffd", "\ufffd", "", "", "好", "", "", "一", "\ufffd"]


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("script", WORLD)
def test_every_form_brings_the_text_unchanged(tmp_path, script):
    prompt, chosen, rejected = WORLD[script]
    asked, good, bad = turn("user", prompt), turn("assistant", chosen), turn("assistant", rejected)
    share = {"user": "human", "assistant": "gpt"}
    said = [{"from": share[message["role"]], "value": message["content"]} for message in (asked, good, bad)]
    as_text = f"\n\nHuman: {prompt}\n\nAssistant:"
    forms = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"question": prompt, "chosen": chosen, "rejected": rejected},
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"conversations": said[:1], "chosen": said[1], "rejected": said[2]},
        {"prompt": json.dumps([asked]), "chosen": json.dumps([good]), "rejected": json.dumps([bad])},
        {"chosen": f"{as_text} {chosen}", "rejected": f"{as_text} {rejected}"},
    ]
    for number, record in enumerate(forms):
        for ensure_ascii in (True, False):
            path = tmp_path / f"{number}-{ensure_ascii}.jsonl"
            # a byte order mark, and lines that end as on Windows; U+2028 ends no line
            line = json.dumps(record, ensure_ascii=ensure_ascii)
            path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}\r\n".encode())
            rows = read_pairs(path)
            assert len(rows) == 2
            for row in rows:
                found = pair_texts(row_pair(row["kind"], row["pair"]))
                assert found.prompt.endswith(prompt) or prompt in found.prompt
                assert (found.chosen.strip(), found.rejected.strip()) == (chosen.strip(), rejected.strip())


def texts(*pairs):
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs])


@pytest.mark.parametrize(
    ("text", "pieces", "width"),
    [
        ("abc", ["a", "b", "c"], 3),
        ("你好", ["你", "好"], 4),
        ("ﾊｰ", ["ﾊ", "ｰ"], 2),  # half-width kana
        ("e\u0301a", ["e\u0301", "a"], 2),
        ("की", ["की"], 1),
        ("กี่", ["กี่"], 1),
        ("👩‍👩‍👧🎉", ["👩‍👩‍👧", "🎉"], 4),
        ("👍🏽!", ["👍🏽", "!"], 3),
        ("🇫🇷🇩🇪", ["🇫🇷", "🇩🇪"], 4),
        ("❤\ufe0f", ["❤\ufe0f"], 2),
        ("שלום", ["ש", "ל", "ו", "ם"], 4),
        ("می\u200cخواهم", ["م", "ی\u200c", "خ", "و", "ا", "ه", "م"], 7),  # a non-joiner shows nothing
        ("क्षि", ["क्षि"], 2),  # two consonants of a conjunct
        ("ตำ", ["ตำ"], 2),  # a vowel with a column of its own
        ("\u1112\u1161\u11ab", ["\u1112\u1161\u11ab"], 2),  # 한 in three parts
        ("\r\n", ["\r\n"], 0),
        ("", [], 0),
    ],
)
def test_graphemes_and_columns(text, pieces, width):
    assert list(graphemes(text)) == pieces
    assert columns(text) == width
    assert pad(text, 10) == text + " " * (10 - width)
    assert pad_left(text, 10) == " " * (10 - width) + text


@pytest.mark.parametrize(
    ("chosen", "rejected", "marked"),
    [
        ("他有24个苹果", "他有26个苹果", ["24"]),
        ("价格上涨了很多", "价格下跌了很多", ["上涨"]),  # characters, not the whole sentence
        ("他有十五个", "他有十六个", ["五"]),
        ("कि है", "की है", ["कि"]),  # a vowel sign is marked with its consonant
        ("คะแนน กี่", "คะแนน กี้", ["กี่"]),
        ("a 👩‍👩‍👧 b", "a 👩‍👩‍👦 b", ["👩‍👩‍👧"]),
        ("لديه ٢٤ تفاحة", "لديه ٢٦ تفاحة", ["٢٤"]),
        ("don't go_on", "don't go_in", ["go_on"]),
    ],
)
def test_marks_fall_on_what_a_reader_sees(chosen, rejected, marked):
    pieces, _ = mark_words(chosen, rejected)
    assert "".join(piece.text for piece in pieces) == chosen
    assert [piece.text for piece in pieces if piece.differs] == marked


def test_tokens_that_are_bytes_of_a_character_are_one_stretch():
    # 苹 in three tokens, of which the first one lost most; then the flag's two letters, a token each; then EOS
    answer = AnswerTokens(
        ["", "", "苹", "a", "🇫", "🇷", ""],
        [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0],
        [-3.5, -1.0, -1.0, -1.0, -0.5, -0.5, -1.0],
        EditRegions(1, 2),
    )
    spans = re.findall(r'<span(.*?) title="(.*?)">(.*?)</span>', _coloured(answer, 5.0, True))
    assert spans == [
        (' class="edit lost far" style="--much: 0.5"', "−2.50 nats: −3.00 → −5.50, 3 tokens", "苹"),
        ("", "+0.00 nats: −1.00 → −1.00", "a"),
        (' class="gained" style="--much: 0.2"', "+1.00 nats: −2.00 → −1.00, 2 tokens", "🇫🇷"),
        ("", "+0.00 nats: −1.00 → −1.00", ""),
    ]


PAIRS = {
    "chinese": [
        {
            "prompt": f"问题：小明有{n}个苹果，又买了{n + 1}个。现在有几个？\n答：",
            "chosen": f"他现在有{n}+{n + 1}={2 * n + 1}个苹果。",
            "rejected": f"他现在有{n}+{n + 1}={2 * n + 2}个苹果。",
        }
        for n in range(2, 8)
    ],
    "arabic": [
        {
            "prompt": f"سؤال: لدى علي {n} تفاحات واشترى {n} أخرى. كم لديه؟\nالجواب:",
            "chosen": f" لديه {n}+{n}={2 * n} تفاحة.",
            "rejected": f" لديه {n}+{n}={2 * n + 1} تفاحة.",
        }
        for n in range(2, 8)
    ],
}


@pytest.mark.parametrize("script", PAIRS)
def test_training_and_reports(tmp_path, tiny_llama, script, capsys):
    records = PAIRS[script]
    folder = tmp_path / "运行 تشغيل"
    folder.mkdir()
    pairs = folder / "数据.jsonl"
    pairs.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    run = folder / "_run"
    settings = {
        "model_name_or_path": str(tiny_llama),
        "dataset_name": str(pairs),
        "output_dir": str(run),
        "max_steps": 6,
        "per_device_train_batch_size": 6,
        "learning_rate": 2.0e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    assert main(["train", "--config", str(folder / "run.yaml")]) == 0
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    # before the first step the policy is the reference: -log σ(0)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]

    capsys.readouterr()
    assert main(["inspect", str(run), "--pairs", str(pairs), "--num_worst", "2"]) == 0
    result = json.loads((run / "inspect.json").read_text(encoding="utf-8"))
    assert result["num_pairs"] == len(records)
    for worst in result["worst"]:
        record = records[worst["pair_id"]]
        assert worst["prompt"].endswith(record["prompt"])
        assert "".join(worst["chosen"]["texts"]) == record["chosen"] + "</s>"
        logps = answer_logps(run, record["prompt"], record["chosen"])
        torch.testing.assert_close(torch.tensor(worst["chosen"]["policy_logps"]), logps, atol=1e-4, rtol=0)
    page = (run / "inspect.html").read_text(encoding="utf-8")
    assert "\ufffd" not in page

    assert main(["pairs", "inspect", str(pairs), "--model", str(run), "--out", str(folder / "doctor")]) == 0
    page = (folder / "doctor" / "report.html").read_text(encoding="utf-8")
    assert "\ufffd" not in page
    marks = re.findall(r'<mark class="chosen">(.*?)</mark>', page)
    assert marks
    assert all(mark.isdecimal() for mark in marks)  # the sums differ, the words do not

    models = [str(tiny_llama), str(run)]
    assert main(["eval", "--models", *models, "--pairs", str(pairs), "--out", str(folder / "评")]) == 0
    assert main(["export", str(run), "--out", str(folder / "出"), "--evaluation", str(folder / "评")]) == 0
    card = (folder / "出" / "README.md").read_text(encoding="utf-8")
    assert "# 出" in card
    assert "Trained on `数据.jsonl` (a local file)." in card
    (shown,) = re.findall(r"chosen Δ \|.*\| ([+-][0-9.]+) ±", card)
    assert float(shown) == pytest.approx(result["chosen_logratio"], abs=0.006)


def answer_logps(model_folder, prompt, answer):
    """Of every token of the answer and the EOS, by the model's own forward."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = torch.tensor([*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id])
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logps = model(ids[None]).logits[0].double().log_softmax(-1)
    return logps[start - 1 : -1].gather(1, ids[start:, None])[:, 0].float()
