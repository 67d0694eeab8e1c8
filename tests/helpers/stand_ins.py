"""Stand-ins for the files of `../shared`, which not every checkout has beside it: of the same forms and names, seeded.

data/        gsm8k, arc, hellaswag and three preference files, filled from templates
tokenizers/  gpt2: byte-level BPE; mistral: BPE of "▁" words that falls back to bytes and knows most characters
models/      stories260K: a Llama with a tokenizer like mistral's, of 512 entries, that knows few characters; its
             weights are trained for two seconds on the texts here, and only where a test asks for them
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# records of each data file; of GSM8K fewer than the real files have
NUM_RECORDS = {
    "gsm8k/train.jsonl": 400,
    "gsm8k/test.jsonl": 100,
    "arc/ARC-Challenge_validation.jsonl": 299,
    "arc/ARC-Easy_validation.jsonl": 570,
    "hellaswag/hellaswag_val_1000.jsonl": 1000,
    "prefs/dpo_en_demo.json": 300,
    "prefs/orca_dpo_pairs_validation.jsonl": 284,
    "prefs/tulu_preference_sample.jsonl": 100,
}

NAMES = ["Ada", "Ben", "Clara", "Dario", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mira"]
THINGS = ["apples", "buttons", "candles", "drums", "eggs", "feathers", "grapes", "hats", "jars", "kites", "lamps"]
KINDS = {
    "an animal": ["a goat", "a heron", "a lizard", "a mole", "a newt", "an otter"],
    "a plant": ["a fern", "a maple", "a nettle", "an oak", "a poppy", "a reed"],
    "a metal": ["copper", "gold", "iron", "lead", "silver", "zinc"],
    "a planet": ["Jupiter", "Mars", "Mercury", "Neptune", "Saturn", "Venus"],
    "a tool": ["a chisel", "a file", "a hammer", "a plane", "a saw", "a wrench"],
}
ANIMALS = ["cat", "dog", "duck", "fox", "frog", "hen", "mouse", "owl", "pig", "rabbit"]
PLACES = ["barn", "beach", "forest", "garden", "hill", "lake", "meadow", "mill", "park", "river"]
FEELINGS = ["brave", "glad", "happy", "hungry", "proud", "sad", "shy", "sleepy", "tired", "warm"]
SCENES = {
    "Baking": ["rolls the dough flat", "heats the oven", "cuts the bread", "washes the bowl"],
    "Cycling": ["pumps up the tyre", "rides up the hill", "rings the bell", "puts on a helmet"],
    "Gardening": ["waters the beans", "digs a small hole", "pulls out the weeds", "plants a tree"],
    "Painting": ["mixes two colours", "dips the brush", "draws a thin line", "covers the floor"],
    "Home and Garden": ["sweeps the steps", "paints the fence", "oils the hinge", "mends the gate"],
}
# what tokenizers must spell besides English; none of it is a translation that a test relies on
WORLD_TEXT = """
今天天气很好，我们去公园。 问题：一共有多少本书？ 答：十五本。
今日はとても暑いです。本を読みます。 コーヒーを飲みました。
오늘은 날씨가 좋습니다. 책이 몇 권 있습니까?
ذهب الولد إلى المدرسة صباحا. كم كتابا لديه؟
הילד הלך לבית הספר. כמה ספרים יש לו?
आज मौसम अच्छा है। किताब मेज पर है।
วันนี้อากาศดีมาก เราไปสวนกัน
Сегодня хорошая погода. Сколько книг на столе?
Σήμερα ο καιρός είναι καλός.
Où est la bibliothèque ? Über den Fluß führt eine Brücke. ¿Cuántos años tienes? Žluťoučký kůň.
""".strip().splitlines()


def write_stand_ins(folder: Path) -> None:
    """All of them but the model's weights, in the folders that `../shared` has."""
    write_data(folder / "data")
    write_gpt2(folder / "tokenizers" / "gpt2", [*english(), *WORLD_TEXT])
    mistral = folder / "tokenizers" / "mistral"
    mistral.mkdir(parents=True)
    fallback_bpe([*english(), *WORLD_TEXT], 17_000, most_characters()).save(str(mistral / "tokenizer.json"))
    write_llama(folder / "models" / "stories260K")


def write_data(folder: Path) -> None:
    makers = {
        "gsm8k/train.jsonl": word_problem,
        "gsm8k/test.jsonl": word_problem,
        "arc/ARC-Challenge_validation.jsonl": multiple_choice,
        "arc/ARC-Easy_validation.jsonl": multiple_choice,
        "hellaswag/hellaswag_val_1000.jsonl": completion,
        "prefs/dpo_en_demo.json": sharegpt_pair,
        "prefs/orca_dpo_pairs_validation.jsonl": input_output_pair,
        "prefs/tulu_preference_sample.jsonl": implicit_prompt_pair,
    }
    for name, make in makers.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = random.Random(name)
        records = [make(rng, i) for i in range(NUM_RECORDS[name])]
        if path.suffix == ".json":
            text = json.dumps(records, indent=2, ensure_ascii=False)
        else:
            text = "".join(json.dumps(record) + "\n" for record in records)
        path.write_text(text, encoding="utf-8")


def word_problem(rng: random.Random, i: int) -> dict[str, str]:
    """GSM8K's form: <<a+b=c>> marks, money, thousands, and one solution of forty that computes nothing."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    count = rng.randint(2, 60)
    question, lines = [f"{name} has {count} {thing}."], []
    if i % 40 == 39:
        return {
            "question": f"{question[0]} None of them is sold. How many {thing} does {name} have?",
            "answer": f"No {thing} are sold, so it stays at {count}.\n#### {count}",
        }
    for _ in range(rng.randint(1, 3)):
        number = rng.randint(2, 30)
        kind = rng.choice(["more", "fewer", "times"])
        if kind == "fewer" and number < count:
            question.append(f"Then {number} of them are lost.")
            operation, result = f"{count}-{number}", count - number
        elif kind == "times":
            question.append(f"Then {name} finds {number} boxes, each with as many {thing} as before.")
            operation, result = f"{number}*{count}", number * count
        else:
            question.append(f"Then {name} buys {number} more.")
            operation, result = f"{count}+{number}", count + number
        lines.append(f"Now {name} has {operation} = <<{operation}={result}>>{result} {thing}.")
        count = result
    if rng.random() < 0.5:
        price = rng.randint(2, 9)
        question.append(f"Each is sold for ${price}. How many dollars does {name} get?")
        lines.append(f"{name} gets {count} * {price} = $<<{count}*{price}={count * price}>>{count * price:,}.")
        count *= price
    else:
        question.append(f"How many {thing} does {name} have?")
    return {"question": " ".join(question), "answer": "\n".join([*lines, f"#### {count:,}"])}


def multiple_choice(rng: random.Random, i: int) -> dict[str, Any]:
    """ARC's form: mostly four options, labelled by letters or by digits; sometimes three or five."""
    labels = {10: list("1234"), 20: list("ABC"), 30: list("ABCDE")}.get(i % 40, list("ABCD"))
    kind = rng.choice(list(KINDS))
    wrong = [option for other, options in KINDS.items() if other != kind for option in options]
    options = [rng.choice(KINDS[kind]), *rng.sample(wrong, len(labels) - 1)]
    right = options[0]
    rng.shuffle(options)
    return {
        "id": f"generated_{i}",
        "question": f"{rng.choice(NAMES)} looks for {kind} in a picture book. Which of these is {kind}?",
        "choices": {"text": options, "label": labels},
        "answerKey": labels[options.index(right)],
    }


def completion(rng: random.Random, i: int) -> dict[str, Any]:
    """HellaSwag's form, prepared: a context, four endings, and the index of the right one."""
    activity, *others = rng.sample(list(SCENES), 4)
    right, *wrong = (f"{rng.choice(SCENES[scene])} and looks {rng.choice(FEELINGS)}." for scene in (activity, *others))
    endings = [right, *wrong]
    rng.shuffle(endings)
    context = f"{rng.choice(NAMES)} stands near the {rng.choice(PLACES)} and waits. After {rng.randint(2, 9)} minutes"
    return {"ind": i, "query": f"{activity}: {context} a friend", "choices": endings, "gold": endings.index(right)}


def sharegpt_pair(rng: random.Random, i: int) -> dict[str, Any]:
    """Conversations of one or more questions, sometimes after a system turn; the answers stand apart."""
    turns = [{"from": "system", "value": "You are a patient teacher."}] if i % 4 == 0 else []
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        question, right, _ = question_and_answers(rng)
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": right}]
    question, right, wrong = question_and_answers(rng)
    return {
        "conversations": [*turns, {"from": "human", "value": question}],
        "chosen": {"from": "gpt", "value": right},
        "rejected": {"from": "gpt", "value": wrong},
    }


def input_output_pair(rng: random.Random, i: int) -> dict[str, Any]:
    """A system turn and a question under `input`, the answers as lists of one turn."""
    question, right, wrong = question_and_answers(rng)
    system = {"role": "system", "content": "You are an assistant. Think step by step and give reasons."}
    return {
        "input": {"messages": [system, {"role": "user", "content": question}]},
        "preferred_output": [{"role": "assistant", "content": right}],
        "non_preferred_output": [{"role": "assistant", "content": wrong}],
    }


def implicit_prompt_pair(rng: random.Random, i: int) -> dict[str, Any]:
    """Whole conversations; the prompt, which is also a column, is what they both begin with."""
    question, *answers = question_and_answers(rng)
    right, wrong = (
        [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}] for answer in answers
    )
    return {"id": f"generated_{i}", "source": "generated", "prompt": question, "chosen": right, "rejected": wrong}


def question_and_answers(rng: random.Random) -> tuple[str, str, str]:
    """A question, a right answer and a worse one; from ten words to more than a tiny model's context holds."""
    kind = rng.choice(["sum", "sum", "story", "world", "code", "long"])
    if kind == "sum":
        a, b = rng.randint(2, 50), rng.randint(2, 50)
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        question = f"{name} has {a} {thing} and gets {b}. How many is that?"
        return question, f"{a} + {b} = {a + b} {thing}.", f"{a} + {b} = {a + b + rng.randint(1, 9)} {thing}."
    if kind == "story":
        animal = rng.choice(ANIMALS)
        return f"Tell me of a {animal}.", story(rng, animal), story(rng, animal).replace(animal, "thing")
    if kind == "world":
        text = rng.choice(WORLD_TEXT)
        return f"Say this again, with a smile:\n{text}", f"{text} 🙂", f"{text[:-1]}… 🎈👩‍👧"
    if kind == "code":
        number = rng.randint(2, 9)
        code = f"```python\ndef times(x):\n    return {number} * x\n```"
        return f"Multiply by {number} in Python.", code, code.replace("*", "+")
    told = [story(rng, rng.choice(ANIMALS)) for _ in range(rng.randint(4, 12))]
    question = f"{' '.join(told)}\n\nWhat happens, in a list?"
    lines = [f"{n}. {line.split('. ')[0]}." for n, line in enumerate(told, 1)]
    return question, "\n".join(lines), "\n".join(reversed(lines))


def story(rng: random.Random, animal: str) -> str:
    name, friend = rng.sample(NAMES, 2)
    place, feeling = rng.choice(PLACES), rng.choice(FEELINGS)
    return (
        f"Once there was a little {animal} whose name was {name}. {name} was {feeling} and went to the {place}. "
        f'At the {place} sat {friend}. "Will you play with me?" said {name}. "Yes, I will," said {friend}. '
        f"So they played at the {place} until it was dark, and they were both {rng.choice(FEELINGS)}."
    )


def english(seed: int = 0, num_texts: int = 300) -> list[str]:
    """What the tokenizers and the model learn from: stories, and the lines of word problems and their solutions."""
    rng = random.Random(seed)
    lines = []
    for i in range(num_texts):
        problem = word_problem(rng, i)
        lines += [story(rng, rng.choice(ANIMALS)), f"Question: {problem['question']}", *problem["answer"].splitlines()]
    return lines


def trained_merges(
    tokenizer: Tokenizer, corpus: Iterable[str], **options: Any
) -> tuple[list[str], list[tuple[str, str]]]:
    """The entries of a trained BPE, characters first, and its merges in their order."""
    trainer = trainers.BpeTrainer(show_progress=False, special_tokens=[], **options)
    tokenizer.train_from_iterator(corpus, trainer)
    vocab = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocab, key=vocab.__getitem__), [(left, right) for left, right in merges]


def write_gpt2(folder: Path, corpus: Iterable[str]) -> None:
    """Byte-level BPE of 1,024 entries, the last of which ends a text."""
    end = "<|endoftext|>"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    entries, merges = trained_merges(tokenizer, corpus, vocab_size=1023, initial_alphabet=byte_level.alphabet())
    vocab = {entry: i for i, entry in enumerate([*entries, end])}
    tokenizer.model = models.BPE(vocab, merges)
    tokenizer.add_special_tokens([AddedToken(end, normalized=True)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    settings = {"add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": 1024}
    settings |= {"tokenizer_class": "GPT2Tokenizer", **ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(ends, indent=2))


def fallback_bpe(corpus: Iterable[str], vocab_size: int, characters: Iterable[str] = ()) -> Tokenizer:
    """As SentencePiece makes them for Llama: "▁" before words, digits apart, byte b is token b + 3, BOS is added."""
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # while it learns, no entry reaches over a word or a digit; afterwards the merges alone decide
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)]
    )
    options = {"vocab_size": vocab_size - len(known), "initial_alphabet": sorted(characters)}
    entries, merges = trained_merges(tokenizer, corpus, **options)
    entries.sort(key=lambda entry: len(entry) == 1)  # characters come last
    vocab = {entry: i for i, entry in enumerate([*known, *entries])}
    tokenizer.model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer.pre_tokenizer = None
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in known[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def most_characters() -> Iterator[str]:
    """The letters of many scripts whole, Chinese and Korean to every second character: some words fall back in part."""
    blocks = [(0x21, 0x7F), (0xA1, 0x250), (0x370, 0x530), (0x5D0, 0x5EB), (0x600, 0x700), (0x900, 0x980)]
    blocks += [(0xE01, 0xE5C), (0x3001, 0x3100)]
    for start, stop, *step in [*blocks, (0x4E00, 0x9000, 2), (0xAC00, 0xD7A4, 2)]:
        yield from (chr(code) for code in range(start, stop, *step) if chr(code).isprintable())


def write_llama(folder: Path) -> None:
    """The configuration and the tokenizer of a Llama of 512 entries and a context of 512."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fallback_bpe(english(), 512),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)


def write_weights(folder: Path) -> None:
    """Those of the model in this folder, trained until it tells stories as `english` does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [token for text in tokenizer(english())["input_ids"] for token in (*text, tokenizer.eos_token_id)]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from more, and loses where others use the cores
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
        train(model, torch.tensor(ids), num_steps=120, num_rows=8, length=64)
    torch.set_num_threads(num_threads)
    model.save_pretrained(folder)


def train(model: LlamaForCausalLM, ids: torch.Tensor, *, num_steps: int, num_rows: int, length: int) -> None:
    """On rows cut out of the texts anywhere."""
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=num_steps)
    for _ in range(num_steps):
        starts = torch.randint(len(ids) - length, (num_rows, 1))
        rows = ids[starts + torch.arange(length)]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
