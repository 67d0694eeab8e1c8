"""Special tokens where texts meet, tool calls' arguments, what templates leave out, answers that do not end.

Expected ids and texts are written down by hand; the tokenizers are one of words and one of characters.
"""

import json
import logging

import datasets.config
import pytest
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.cli import main
from dpop_trainer.data import SourceStream, TokenisedStream, tokenise_pairs
from dpop_trainer.data.convert import convert_pairs, row_pair
from dpop_trainer.data.seams import last_visible, without_ends
from dpop_trainer.data.templates import turn_opening
from dpop_trainer.tools.doctor.examine import examine_pairs
from tiny import tiny_llama
from tiny import word_tokenizer as tiny_tokenizer
from transformers import GenerationConfig
from words import ASSISTANT, BOS, END, EOS, USER, A, B, C, chat_tokenizer, ids_of, text_of, texts, tokens, turn
from words import character_tokenizer as new_character_tokenizer
from words import word_tokenizer as new_word_tokenizer


@pytest.fixture(scope="module")
def character_tokenizer():
    return new_character_tokenizer()


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def chat(chosen="b", rejected="c", prompt="a", **columns):
    answers = {"chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}
    return {"prompt": [turn("user", prompt)], **answers, **columns}


def counts_of(dataset, tokenizer, **options):
    return tokenise_pairs(dataset, tokenizer, **options)[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b", ("b", None)),
        ("b ", ("b ", None)),
        ("b</s>", ("b", "</s>")),
        ("b </s> \n", ("b ", "</s>")),
        ("b<|im_end|>\n</s>", ("b", "<|im_end|>")),  # the first of two ends the turn
        ("</s>", ("", "</s>")),
    ],
)
def test_ends_of_a_text(text, expected):
    assert without_ends(text, ("</s>", "<|im_end|>")) == expected


@pytest.mark.parametrize(
    ("pair", "expected", "num_mended"),
    [
        (("a", " b", " c"), ([BOS, A], [B, EOS], [C, EOS]), 0),
        (("<s> a", " b", " c"), ([BOS, A], [B, EOS], [C, EOS]), 1),
        (("<s> <s> a", " b", " c"), ([BOS, A], [B, EOS], [C, EOS]), 1),
        (("a", " b </s>", " c"), ([BOS, A], [B, EOS], [C, EOS]), 0),  # it is one, whoever wrote it
        (("a", " b </s> ", " c </s>\n"), ([BOS, A], [B, EOS], [C, EOS]), 1),
        (("a", " b </s> </s>", " c"), ([BOS, A], [B, EOS], [C, EOS]), 1),
        (("a", " b <end>\n", " c <end>"), ([BOS, A], [B, END], [C, END]), 1),  # a chat written out as text
    ],
)
def test_texts_begin_and_end_once(pair, expected, num_mended):
    tokenised, counts = tokenise_pairs(texts(pair), chat_tokenizer())
    assert ids_of(tokenised) == [expected]
    assert (counts.mended_seams, counts.stray_specials) == (num_mended, 0)


@pytest.mark.parametrize(
    ("record", "num_mended"),
    [
        (chat(), 0),
        (chat("b <end>\n"), 1),
        (chat("b </s>", "c </s>"), 1),
        (chat("<s> b"), 1),
        (chat(prompt="<s> a"), 1),
    ],
)
def test_turns_begin_and_end_as_the_template_says(record, num_mended):
    tokenised, counts = tokenise_pairs(Dataset.from_list([record]), chat_tokenizer())
    assert ids_of(tokenised) == [([USER, A, END, ASSISTANT], [B, END], [C, END])]
    assert (counts.mended_seams, counts.stray_specials) == (num_mended, 0)


@pytest.mark.parametrize(
    "dataset",
    [
        texts(("a", "<s> b", "<s> c")),
        texts(("a </s>", " b", " c")),
        tokens(([BOS, BOS, A], [B, EOS], [C, EOS])),
        tokens(([A], [B, EOS, EOS], [C, EOS])),
        tokens(([A, EOS], [B, EOS], [C, EOS])),
        tokens(([A], [BOS, B, EOS], [C, EOS])),
    ],
)
def test_what_nobody_can_mend_is_counted(dataset):
    counts = counts_of(dataset, chat_tokenizer())
    assert (counts.mended_seams, counts.stray_specials) == (0, 1)
    assert "1 with a special token where texts meet that should not be there" in counts.summary()


CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}<%s>{% endfor %}{{ m.content or '' }}{% endfor %}"
ENCODES = CALLS.replace("%s", "{{ c.function.name }}{{ c.function.arguments | tojson }}")
WRITES = CALLS.replace("%s", "{{ c.function.name }}{{ c.function.arguments }}")
JOINS = CALLS.replace("%s", "{{ c.function.name + c.function.arguments }}")  # an object would be an error


@pytest.mark.parametrize("template", [ENCODES, WRITES, JOINS])
@pytest.mark.parametrize("is_text", [True, False])
@pytest.mark.parametrize("form", ["openai", "messages"])
def test_arguments_are_written_as_json_once(character_tokenizer, form, is_text, template):
    """OpenAI's are text, others' an object; templates expect one or the other."""
    arguments = {"city": "Paris", "days": [1, True]}
    call = {"function": {"name": "go", "arguments": json.dumps(arguments) if is_text else arguments}}
    asked, right, wrong = (
        turn("user", "Q"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        turn("assistant", "A"),
    )
    record = {"prompt": [asked], "chosen": [right], "rejected": [wrong]}
    if form == "openai":
        record = {"input": {"messages": [asked]}, "preferred_output": [right], "non_preferred_output": [wrong]}
    stream = SourceStream(datasets.IterableDataset.from_generator(lambda: iter([record])))
    character_tokenizer.chat_template, before = template, character_tokenizer.chat_template
    try:
        (row,) = TokenisedStream(stream, character_tokenizer, name="train").first_records(1)
    finally:
        character_tokenizer.chat_template = before
    assert text_of(row) == ("Q", '<go{"city": "Paris", "days": [1, true]}>', "A")


# as the templates of GLM-4, gpt-oss and Llama 3 look for what a turn says beside its calls
NAMES_CALLS = CALLS.replace("%s", "{{ c.function.name }}")
GLM_LIKE = NAMES_CALLS.replace("{{ m.content or '' }}", "{{ m.content if m.content is defined }}")
GPT_OSS_LIKE = NAMES_CALLS.replace("{{ m.content or '' }}", "{{ m.content + '' if 'content' in m }}")
LLAMA_LIKE = NAMES_CALLS.replace("{{ m.content or '' }}", "{{ 'says ' ~ m.content if 'content' in m }}")


@pytest.mark.parametrize("template", [GLM_LIKE, GPT_OSS_LIKE, LLAMA_LIKE], ids=["glm", "gpt_oss", "llama"])
@pytest.mark.parametrize("said", [{}, {"content": None}], ids=["absent", "null"])
def test_a_call_without_words_stays_without(character_tokenizer, said, template):
    call = {"role": "assistant", **said, "tool_calls": [CALL]}
    record = {"prompt": [turn("user", "Q"), call], "chosen": [turn("assistant", "A")], "rejected": [call]}
    rows = convert_pairs(Dataset.from_list([record]))
    pair = row_pair("messages", rows[0]["pair"])
    assert pair.prompt[1] == pair.rejected[0] == {"role": "assistant", "tool_calls": [CALL]}
    character_tokenizer.chat_template, before = template, character_tokenizer.chat_template
    try:
        tokenised, _ = tokenise_pairs(rows, character_tokenizer)
    finally:
        character_tokenizer.chat_template = before
    says = "says " if template == LLAMA_LIKE else ""
    assert text_of(tokenised[0]) == (f"{says}Q<adder>", f"{says}A", "<adder>")


def test_arguments_that_are_no_json_stay_as_a_model_wrote_them(character_tokenizer):
    call = {"function": {"name": "go", "arguments": '{"city": '}}
    record = chat() | {"rejected": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    character_tokenizer.chat_template, before = WRITES, character_tokenizer.chat_template
    try:
        tokenised, _ = tokenise_pairs(Dataset.from_list([record]), character_tokenizer)
    finally:
        character_tokenizer.chat_template = before
    assert text_of(tokenised[0])[2] == '<go{"city": >'


PLAIN = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
STRIPS = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
SPACED = PLAIN.replace("m.content", "m.content | replace('\n', ' ')")
THOUGHT = "<think> d </think>\nb"
CALL = {"function": {"name": "adder", "arguments": {}}}


@pytest.mark.parametrize(
    ("template", "record", "expected"),
    [
        (PLAIN, chat(THOUGHT), 0),
        (STRIPS, chat(THOUGHT), 1),
        (STRIPS, chat("b", "<think> d </think>c"), 1),
        (STRIPS, chat(), 0),
        (SPACED, chat(THOUGHT), 0),  # white space alone
        (
            STRIPS,
            chat() | {"prompt": [turn("user", "a"), turn("assistant", THOUGHT), turn("user", "a")]},
            0,
        ),  # by design
        (PLAIN, chat() | {"chosen": [{**turn("assistant", "b"), "reasoning_content": "d d"}]}, 1),
        (PLAIN, chat() | {"chosen": [{**turn("assistant", "b"), "tool_calls": [CALL]}]}, 1),
        (PLAIN, chat(tools=[{"type": "function", "function": {"name": "adder"}}]), 1),
    ],
)
def test_what_a_template_leaves_out_is_counted(template, record, expected):
    counts = counts_of(Dataset.from_list([record]), chat_tokenizer(template))
    assert counts.left_out == expected
    assert ("1 of which the chat template leaves a part out" in counts.summary()) == bool(expected)


def test_answers_that_go_on_over_other_turns_are_counted():
    longer = {"chosen": [turn("assistant", "b"), turn("user", "a"), turn("assistant", "b")]}
    result = {"rejected": [turn("assistant", "b"), turn("tool", "a"), turn("assistant", "c")]}
    template = PLAIN.replace("<{{ m.role }}>", "d")
    counts = counts_of(Dataset.from_list([chat(), chat() | longer, chat() | result]), chat_tokenizer(template))
    assert counts.foreign_turns == 2


@pytest.mark.parametrize(
    ("stop_ids", "expected"), [((), (0, 0)), ((EOS,), (0, 1)), ((END,), (1, 0)), ((EOS, END), (0, 0))]
)
def test_answers_that_end_in_no_stop_token_are_counted(stop_ids, expected):
    """A text ends in EOS, the template's turns in its own end; without stop tokens nothing is known."""
    for dataset, count in zip((texts(("a", " b", " c")), Dataset.from_list([chat()])), expected, strict=True):
        assert counts_of(dataset, chat_tokenizer(), stop_ids=stop_ids).endless_answers == count
    both = tokens(([A], [B, EOS], [C, EOS]), ([A], [B, END], [C, END]))
    assert counts_of(both, chat_tokenizer(), stop_ids=stop_ids).endless_answers == sum(expected)


def test_text_without_the_turns_of_a_chat_template_is_told():
    """Its user's turn opens with <user>; a tokenizer without a template has none to miss."""
    pairs = texts(("a", " b", " c"), ("<user> a <end> <assistant>", " b", " c"), ("b", " a", " c"))
    counts = counts_of(pairs, chat_tokenizer())
    assert counts.plain_text == 2
    assert "2 pairs are plain text, without the turns of the tokenizer's chat template" in counts.summary()
    assert counts_of(pairs, new_word_tokenizer("<s> $A")).plain_text == 0
    told = counts_of(Dataset.from_list([chat()]), chat_tokenizer())
    assert told.plain_text == 0
    assert "plain text" not in told.summary()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
            "<|im_start|>user",
        ),
        ("{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "[INST]"),
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{{ messages[0].content }}", "<|im_start|>user"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('system first') }}", None),
        ("", None),
    ],
)
def test_what_a_template_writes_before_a_user(template, expected):
    assert turn_opening(chat_tokenizer(template)) == expected


def test_white_space_behind_an_end(character_tokenizer):
    """As ChatML writes it: the line break is no end."""
    ids = [ord(character) for character in "b>\n "]
    assert last_visible(ids, character_tokenizer, frozenset()) == ord(">")
    assert last_visible([10], character_tokenizer, frozenset()) == 10
    assert last_visible([], character_tokenizer, frozenset()) == -1


def test_streams_count_the_same():
    records = [chat(), chat("b <end>"), chat(THOUGHT), chat() | {"chosen": [turn("assistant", "b"), turn("user", "a")]}]
    dataset, tokenizer = Dataset.from_list(records), chat_tokenizer(STRIPS)
    stream = TokenisedStream(SourceStream(dataset), tokenizer, name="train", stop_ids=[EOS], on_bad_record="skip")
    assert len(list(stream)) == 4
    whole = counts_of(dataset, tokenizer, stop_ids=[EOS])
    assert stream.counts == whole
    assert (whole.mended_seams, whole.left_out, whole.foreign_turns, whole.endless_answers) == (1, 1, 1, 4)


@pytest.mark.parametrize(("eos", "is_told"), [(2, True), ([2, 12], False)])  # w9 is token 12
def test_a_base_model_given_a_template_that_it_does_not_stop_at_is_told(tmp_path, caplog, eos, is_told):
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} w9 {% endfor %}"
    model.generation_config.eos_token_id = eos
    caplog.set_level(logging.WARNING)
    DPOPTrainer(
        model,
        args=DPOPConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", layout="rows"),
        train_dataset=Dataset.from_list([chat("w3", "w4", "w5")]),
        processing_class=tokenizer,
    )
    message = "1 with an answer that ends in no token at which the model stops"
    assert any(message in line for line in caplog.messages) == is_told


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_doctor_names_the_pairs(tmp_path):
    records = [
        chat(),
        chat("b <end>"),
        chat(THOUGHT),
        chat() | {"chosen": [turn("assistant", "b"), turn("user", "a")]},
    ]
    examination = examine_pairs(
        write(tmp_path / "pairs.jsonl", records),
        tokenizer=chat_tokenizer(STRIPS),
        stop_ids=[EOS],
        show_progress=False,
    )
    found = {finding.name: finding.rows.tolist() for finding in examination.findings}
    assert found["mended_seams"] == [1]
    assert found["left_out"] == [2]
    assert found["foreign_turns"] == [3]
    assert found["endless"] == [0, 1, 2, 3]
    stray = examine_pairs(
        write(tmp_path / "text.jsonl", texts(("a", " b", " c"), ("a </s>", " b", " c")).to_list()),
        tokenizer=chat_tokenizer(),
        stop_ids=[EOS],
        show_progress=False,
    )
    assert {finding.name: finding.rows.tolist() for finding in stray.findings}["stray_specials"] == [1]
    plain = next(finding for finding in stray.findings if finding.name == "plain_text")
    assert (plain.level, plain.rows.tolist()) == ("note", [0, 1])


@pytest.mark.parametrize(("named", "is_found"), [(None, True), (EOS, True), ([EOS, END], False)])
def test_doctor_knows_the_stop_tokens_beside_the_tokenizer(tmp_path, capsys, named, is_found):
    folder = tmp_path / "model"
    chat_tokenizer().save_pretrained(folder)
    if named is not None:
        GenerationConfig(eos_token_id=named).save_pretrained(folder)
    data = write(tmp_path / "pairs.jsonl", [chat()])
    main(["pairs", "inspect", data, "--tokenizer", str(folder), "--out", str(tmp_path / "report")])
    found = json.loads((tmp_path / "report" / "doctor.json").read_text())["findings"]
    assert ("endless" in json.dumps(found)) == is_found
    assert ("no token at which the model stops" in capsys.readouterr().out) == is_found
