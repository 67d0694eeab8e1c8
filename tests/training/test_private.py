"""Secrets are in no file and on no terminal, and what is handed on names no folder of this machine."""

import copy
import json
import pickle
from dataclasses import fields

import pytest
import torch
import yaml
from dpop_trainer import DPOPConfig
from dpop_trainer.cli import main
from dpop_trainer.run_folder.checkpoints import check_same_run
from dpop_trainer.run_folder.identity import changed_fields, identity_of
from dpop_trainer.run_folder.private import (
    is_secret_key,
    secret_places,
    shareable,
    text_without_secrets,
    without_secrets,
)
from dpop_trainer.settings.arguments import DataArguments, ModelArguments
from dpop_trainer.settings.config import SFTConfig
from tiny import text_pairs, tiny_llama, word_tokenizer
from transformers import AutoModelForCausalLM

SECRET, PLACE = "mArKeR", "pRiVaTe"  # every secret of these tests has the one, every folder the other

SECRET_NAMES = (
    "token hub_token api_key apiKey API-KEY HF_TOKEN AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY secret password key auth "
    "use_auth_token Authorization connection_string sas_token private_key credentials github_pat WANDB_API_KEY"
)
INNOCENT_NAMES = (
    "tokenizer max_tokens max_tokens_per_batch pad_token eos_token eos_token_id tokens keys num_virtual_tokens monkey "
    "key_mapping api_key_env num_key_value_heads tokenizer_name_or_path use_cache passes keep_identical column_key"
)


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_names_of_secrets(name):
    assert is_secret_key(name)


@pytest.mark.parametrize("name", INNOCENT_NAMES.split())
def test_names_that_only_look_like_those(name):
    assert not is_secret_key(name)


def test_of_all_fields_of_a_run_the_hubs_token_alone_is_a_secret():
    names = {item.name for part in (ModelArguments, DataArguments, DPOPConfig, SFTConfig) for item in fields(part)}
    assert {name for name in names if is_secret_key(name)} == {"hub_token"}


def test_every_depth_of_every_field():
    deep = {"a": [{"b": ({"token": SECRET}, f"https://user:{SECRET}@host/x")}], "Authorization": f"Bearer {SECRET}"}
    names = {item.name for part in (ModelArguments, DataArguments, DPOPConfig) for item in fields(part)}
    values = {name: copy.deepcopy(deep) for name in names}
    assert SECRET not in str(without_secrets(values))
    assert without_secrets(values)["peft_config"]["a"][0]["b"] == ({"token": None}, "https://<hidden>@host/x")
    assert SECRET in str(values)  # it is a copy
    found = secret_places({"model_init_kwargs": deep})
    assert found == [f"model_init_kwargs.{place}" for place in ("a[0].b[0].token", "a[0].b[1]", "Authorization")]


def test_secrets_are_known_by_their_values(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", f"{SECRET}-of-the-environment")
    monkeypatch.setenv("SOME_KEY", "w3")  # too short to be looked for in texts
    values = {
        "run_name": f"run with {SECRET}-of-the-environment",
        "a": "hf_" + SECRET * 4,
        "b": f"s3://x?signature=1&access_token={SECRET}",
        "c": f'{{"path": "org/set", "token": "{SECRET}"}}',
        "d": "w3 stays",
    }
    assert without_secrets(values) == {
        "run_name": "run with <hidden>",
        "a": "<hidden>",
        "b": "s3://x?signature=1&access_token=<hidden>",
        "c": '{"path": "org/set", "token": "<hidden>"}',
        "d": "w3 stays",
    }


@pytest.mark.parametrize("value", [None, True, "<pad>", "[PAD]", "auto"])
def test_a_switch_or_a_special_token_is_no_secret(value):
    assert without_secrets({"token": value}) == {"token": value}


def test_messages_keep_what_is_not_secret():
    message = "hub_token: expected text, got {'token': 'x1y2'}. Set it, as in --hub_token=x1y2."
    assert text_without_secrets(message) == (
        "hub_token: expected text, got {'token': '<hidden>'}. Set it, as in --hub_token=<hidden>"
    )


def test_what_is_handed_on_has_the_last_part_of_a_path():
    values = {
        "file": f"/home/{PLACE}/pairs.jsonl",
        "above": f"../{PLACE}/model",
        "beside": f"{PLACE}/a/b",
        "home": f"~/{PLACE}/b",
        "windows": f"C:\\{PLACE}\\pairs.jsonl",
        "url": f"file:///home/{PLACE}/pairs.jsonl",
        "list": [{"path": f"/{PLACE}/a.jsonl"}, json.dumps({"path": f"/{PLACE}/b.jsonl", "weight": 2})],
        "sentence": f"read from /home/{PLACE}/x.py, line 3",
        "hub": "org/name",
        "page": "https://huggingface.co/org/name/tree",
        "template": "{% for m in messages %}</s>/{{ m }}/{% endfor %}",
        "regex": r".*\.(q|v)_proj",
    }
    expected = {
        "file": "pairs.jsonl",
        "above": "model",
        "beside": "b",
        "home": "b",
        "windows": "pairs.jsonl",
        "url": "pairs.jsonl",
        "list": [{"path": "a.jsonl"}, '{"path": "b.jsonl", "weight": 2}'],
        "sentence": "read from x.py, line 3",
    }
    assert shareable(values) == values | expected


def test_a_configuration_shows_no_secret_and_copies_keep_it():
    kwargs = {"token": SECRET, "deep": [{"api_key": SECRET}]}
    config = DPOPConfig("out", use_cpu=True, hub_token=SECRET, model_init_kwargs=kwargs, pad_token="<pad>")
    pickled = pickle.dumps(config)
    for shown in (repr(config), str(config), config.to_json_string(), str(config.to_dict()), str(pickled)):
        assert SECRET not in shown
    assert SECRET not in repr(ModelArguments(peft_config={"deep": {"secret": SECRET}}))
    assert SECRET not in repr(DataArguments(dataset_mixture=[{"path": f"https://{SECRET}@host"}]))
    loaded = pickle.loads(pickled)
    assert (loaded.hub_token, loaded.model_init_kwargs) == (None, {"token": None, "deep": [{"api_key": None}]})
    assert loaded.pad_token == config.to_dict()["pad_token"] == "<pad>"
    for twin in (copy.copy(config), copy.deepcopy(config)):
        assert (twin.hub_token, twin.model_init_kwargs, type(twin)) == (SECRET, kwargs, DPOPConfig)


def test_a_run_is_the_same_under_another_token():
    before, now = ({"model_init_kwargs": {"token": token, "revision": "a"}} for token in ("first", "second"))
    assert changed_fields({"config": before}, identity_of(now, num_processes=1)) == {}  # a record of an older version
    changed = {"model_init_kwargs": {"token": "second", "revision": "b"}}
    told = changed_fields({"config": before}, {"config": changed})
    assert told == {"model_init_kwargs": ({"token": None, "revision": "a"}, {"token": None, "revision": "b"})}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A run file with secrets wherever a run takes them, in folders whose names nobody is to learn -> file, tokens
    that the loader was given."""
    folder = tmp_path / PLACE
    tiny_llama().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    for name in ("a", "b", "held_out"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs(4)))
    monkeypatch.setenv("SOME_SERVICE_TOKEN", f"{SECRET}-of-the-environment")
    loading = {"token": f"{SECRET}1", "proxies": {"https": f"http://user:{SECRET}2@localhost:1"}}
    values = {
        "model_name_or_path": str(folder / "model"),
        "ref_model_name_or_path": str(folder / "model"),
        "model_init_kwargs": {**loading, "cache_dir": str(folder / "cache")},
        "ref_model_init_kwargs": loading,
        "hub_token": f"hf_{SECRET * 4}",
        "run_name": f"a run of {SECRET}-of-the-environment",
        "dataset_mixture": [{"path": str(folder / "a.jsonl")}, json.dumps({"path": str(folder / "b.jsonl")})],
        "eval_datasets": [{"path": str(folder / "held_out.jsonl"), "label": "held_out"}],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    tokens = []
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, **kwargs):
        tokens.append(kwargs.get("token"))
        return load(name, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return folder / "run.yaml", tokens


def files_with(text, folder):
    """Files under a folder that hold a text in any form: as bytes, in another case of JSON's escapes, in a pickle."""
    found = [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
    for path in folder.rglob("training_args.bin"):
        loaded = torch.load(path, weights_only=False)
        found += [path] if text in str(vars(loaded)) else []
    return sorted({str(path.relative_to(folder)) for path in found})


def test_no_file_of_a_run_and_no_line_on_the_terminal_has_a_secret(planted, capfd, caplog):
    file, tokens = planted
    run, out = file.parent / "run", file.parent / "out"
    argv = ["train", "--config", str(file)]
    assert main([*argv, "--print-config"]) == 0
    assert "# secrets, left out: " in capfd.readouterr().out
    assert main([*argv, "--max_steps", "1"]) == 0
    assert main(argv) == 0  # goes on from the first step
    assert main(argv) == 0  # finished already
    assert tokens == [f"{SECRET}1"] * 4  # policy and reference, twice
    assert (run / "checkpoint-2" / "training_args.bin").is_file()
    assert main(["export", str(run), "--out", str(out)]) == 0
    with caplog.at_level("ERROR"):
        assert main([*argv, "--model_init_kwargs", f"{{'token': '{SECRET}'"]) != 0  # no JSON: it is shown
        assert main([*argv, "--beta", "0.7", "--output_dir", str(run)]) != 0  # another run's folder: fields are named
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err + caplog.text
    assert files_with(SECRET, run) == files_with(SECRET, out) == []
    assert files_with(PLACE, out) == []
    assert "config.yaml" in files_with(PLACE, run)  # that is how one is found
    written = yaml.safe_load((out / "training_config.yaml").read_text())
    assert [entry if isinstance(entry, str) else entry["path"] for entry in written["dataset_mixture"]] == [
        "a.jsonl",
        '{"path": "b.jsonl"}',
    ]
    assert written["model_init_kwargs"]["cache_dir"] == "cache"
    first = (run / "config.yaml").read_text().splitlines()[0]
    assert first.startswith("# secrets, left out: ")
    for place in ("hub_token", "model_init_kwargs.token", "model_init_kwargs.proxies.https", "run_name"):
        assert place in first
    check_same_run(run / "checkpoint-2", {"config": yaml.safe_load((run / "config.yaml").read_text())}, strict=True)


def test_a_comparison_trains_with_the_secret_and_writes_none(planted, capfd):
    file, tokens = planted
    values = yaml.safe_load(file.read_text())
    held_out = values.pop("eval_datasets")[0]["path"]
    for name in ("ref_model_name_or_path", "ref_model_init_kwargs", "eval_steps"):
        values.pop(name)
    values |= {"eval_dataset_name": held_out, "output_dir": str(file.parent / "compared"), "save_strategy": "no"}
    values |= {"methods": ["dpo"], "seeds": [0], "max_steps": 1, "eval_strategy": "no"}
    flags = ["--methods", *values.pop("methods"), "--seeds", *map(str, values.pop("seeds"))]
    file.write_text(yaml.safe_dump(values))
    assert main(["compare", "--config", str(file), *flags]) == 0
    assert tokens[0] == f"{SECRET}1"
    values["model_init_kwargs"]["token"] = f"{SECRET}-new"
    file.write_text(yaml.safe_dump(values))
    assert main(["compare", "--config", str(file), *flags]) == 0  # finished before
    said = capfd.readouterr()
    assert "(finished before)" in said.out
    assert SECRET not in said.out + said.err
    assert files_with(SECRET, file.parent / "compared") == []
