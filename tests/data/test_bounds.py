"""Files and templates that would not end, or fill the memory, or be half read: refused by name, within a bound."""

import gzip
import inspect
import json
import signal
import time

import pytest
from datasets import Dataset
from dpop_trainer.cli import main
from dpop_trainer.data import read_json, read_pairs, tokenise_pairs
from dpop_trainer.data.limits import LIMITS
from dpop_trainer.data.messages import TEMPLATE_ARGUMENTS
from tiny import text_pairs, word_tokenizer
from transformers import PreTrainedTokenizerBase

PAIRS = "".join(json.dumps(pair) + "\n" for pair in text_pairs(3))
ANSWERS = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "w2"), ("rejected", "w3"))}
CODECS = {"utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "utf-32": "UTF-32", "utf-32-be": "UTF-32"}


def asked(word):
    return {"prompt": [{"role": "user", "content": word}], **ANSWERS}


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.jsonl.gz"])
def test_another_encoding_is_refused_by_its_name(tmp_path, name):
    path = tmp_path / name
    for codec, told in CODECS.items():
        content = PAIRS.encode(codec)
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(ValueError, match=rf"{name}: expected UTF-8, got {told}\. Convert it: iconv -f {told} -t"):
            read_pairs(path)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.jsonl.gz"])
def test_a_record_that_is_too_long_is_named_and_left_out(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DPOP_MAX_RECORD", "1")
    pairs = text_pairs(3)
    pairs[1]["prompt"] = "".join(f"w{i} " for i in range(400_000))  # two and a half times as long, and several blocks
    text = json.dumps(pairs) if name == "pairs.json" else "".join(json.dumps(pair) + "\n" for pair in pairs)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    told = 'expected a record of at most 1 MiB (DPOP_MAX_RECORD), got a longer one: \'{"prompt": "w0 w1 w2'
    if name == "pairs.json":  # whose other records cannot be told from it
        with pytest.raises(ValueError, match=r"record 1: expected a record of at most 1 MiB \(DPOP_MAX_RECORD\)"):
            read_pairs(path)
        return
    rows = read_pairs(path)
    assert [problem is None for problem in rows["problem"]] == [True, False, True]
    assert told in rows["problem"][1]
    assert rows["place"][1] == f"{path}, line 2"


def test_gzip_out_of_all_proportion_stops_as_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(read_json, "_UNPACKED_FREELY", 1 << 20)
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(PAIRS.encode() + (b" " * 99 + b"\n") * 160_000))  # to a hundredth or less
    assert path.stat().st_size * 200 < 16_000_000
    with pytest.raises(
        ValueError, match=r"got a file that unpacks to more than 200 times its size \(DPOP_MAX_UNPACKED\)"
    ):
        read_pairs(path)
    monkeypatch.setenv("DPOP_MAX_UNPACKED", "1000")  # more than gzip packs
    assert len(read_pairs(path)) == 3
    monkeypatch.delenv("DPOP_MAX_UNPACKED")
    monkeypatch.setattr(read_json, "_UNPACKED_FREELY", 32 << 20)
    assert len(read_pairs(path)) == 3


@pytest.mark.parametrize("value", ["much", "0", "-1", "nan", "inf", "1e7", "\x1b[2J"])
@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.name)
def test_a_bound_that_is_no_number_is_refused_before_anything(monkeypatch, capsys, limit, value):
    monkeypatch.setenv(limit.name, value)
    assert main(["pairs", "inspect", "nothing.jsonl"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dpop pairs: {limit.name}: expected a number above 0 and up to 1e+06 ({limit.unit}), got")
    assert error.endswith(f"in the environment. Set another, or unset it for {limit.default:g}.\n")
    assert "\x1b" not in error


def test_a_record_does_not_say_how_all_are_rendered(tmp_path):
    """All that apply_chat_template takes for itself, in this version of transformers, and no variable of a template."""
    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
    assert own - {"self", "kwargs", "tools", "documents"} <= TEMPLATE_ARGUMENTS
    given = ({"enable_thinking": False}, {"chat_template": "w4"}, {"add_generation_prompt": True})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({**asked("w1"), "chat_template_kwargs": options}) + "\n" for options in given))
    first, *others = read_pairs(path)["problem"]
    assert first is None
    for name, problem in zip(("chat_template", "add_generation_prompt"), others, strict=True):
        assert problem.startswith(f"chat_template_kwargs: expected variables of the chat template, got {name!r}")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "did not end within 0.2 seconds (DPOP_TEMPLATE_SECONDS)",
        ),
        ("{{ 'a' * 9999999999 }}", "took more than 0.125 GiB (DPOP_TEMPLATE_MEMORY) of memory"),
        (
            "{% set n = namespace(a='ab') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
            "took more than 0.125 GiB (DPOP_TEMPLATE_MEMORY) of memory",
        ),
        ("{{ 'a' * 1000000 }}", "characters, of at most 524288 (four times DPOP_MAX_RECORD)"),
        ("{{ 1 // 0 }}", "got its error: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "got its error: maximum recursion depth"),
    ],
)
def test_a_template_is_bounded(monkeypatch, template, told):
    """Every record is kept but the one that the template is bad for."""
    monkeypatch.setenv("DPOP_TEMPLATE_SECONDS", "0.2" if "seconds" in told else "60")
    monkeypatch.setenv("DPOP_TEMPLATE_MEMORY", "0.125")
    monkeypatch.setenv("DPOP_MAX_RECORD", "0.125")
    tokenizer = word_tokenizer()
    body = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    tokenizer.chat_template = "{% if messages[0]['content'] == 'w9' %}" + template + "{% endif %}" + body
    pairs = Dataset.from_list([asked(word) for word in ("w1", "w9", "w4")])
    before = signal.getsignal(signal.SIGALRM)
    skipped, start = [], time.monotonic()
    kept, _ = tokenise_pairs(pairs, tokenizer, on_bad_record="skip", on_skipped=skipped.extend)
    assert time.monotonic() - start < 60
    assert kept["pair_id"][:] == [0, 2]
    (bad,) = skipped
    assert told in bad.reason
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
