"""`dpop pairs inspect` as the command line calls it."""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from dpop_trainer.data.source_path import check_source_path, expanded, loader_of
from dpop_trainer.data.truncate import check_truncation
from dpop_trainer.settings.command_parser import CommandParser
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.model_folder import check_reads
from dpop_trainer.settings.model_paths import MODEL_FILES, check_local_path
from dpop_trainer.settings.own_process import is_own_process
from dpop_trainer.settings.terminal import say
from dpop_trainer.settings.under_way import LIBRARIES, under_way
from dpop_trainer.settings.wording import counted

EPILOG = """exit code: 0 nothing serious, 1 the file cannot be examined, 2 wrong usage, 3 something serious was found
(--exit_zero turns 3 into 0). Written to --out: report.html, doctor.json, measures.parquet."""


def inspect_pairs(argv: list[str]) -> int:
    """Examine, report, clean -> exit code."""
    parser = CommandParser(
        "dpop pairs inspect",
        description="Look at preference pairs before training on them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="pairs: a local file or folder, or a hub id")
    parser.add_argument("--split", default="train", help="of a hub data set or folder")
    parser.add_argument("--config", help="configuration of a hub data set that has several")
    parser.add_argument("--tokenizer", help="folder or hub id; default: the model's. Without, characters are measured")
    parser.add_argument("--model", help="the model before training: reference margins and CHES of --max_scored pairs")
    parser.add_argument("--eval", help="the pairs that the run is evaluated on, to look for leaks")
    parser.add_argument("--eval_split", default="train", help="of --eval, where it is a hub data set or folder")
    parser.add_argument("--max_length", type=int, help="what the run will use, to count what it cuts")
    parser.add_argument("--truncation_mode", choices=["keep_start", "keep_end"], default="keep_start")
    parser.add_argument("--max_scored", type=int, default=512, help="pairs that the model looks at (default 512)")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs per forward of the model (default 8)")
    parser.add_argument("--num_proc", type=int, help="processes that tokenise")
    parser.add_argument(
        "--chat_template_path",
        help="chat template for a tokenizer without one: zephyr (for a base model), chatml, a .jinja file, a model to "
        "take it from, or the text",
    )
    parser.add_argument(
        "--on_bad_record",
        choices=["skip", "error"],
        default="skip",
        help="count it, show the first and go on (default), or stop at it",
    )
    parser.add_argument("--out", help="folder of the report (default runs/doctor/<name of FILE>)")
    parser.add_argument(
        "--write_clean",
        metavar="OUT.jsonl",
        help="write the pairs that need not be dropped (default: clean.jsonl beside the report, where `dpop train` "
        "would keep others)",
    )
    parser.add_argument("--exit_zero", action="store_true", help="exit with 0 also where something serious was found")
    options = parser.parse_args(argv)

    check_truncation(options.max_length, options.truncation_mode)
    for source, split in ((options.file, options.split), (options.eval, options.eval_split)):
        if source:
            check_source_path(source, split)
    name = options.tokenizer or options.model
    if name:
        check_local_path(name, "")
        for source in filter(None, (options.file, options.eval)):
            check_reads(name, source, has_template=options.chat_template_path is not None)
    with under_way(LIBRARIES if options.model else "Loading datasets"):
        from dpop_trainer.report.terminal import Terminal
        from dpop_trainer.tools.doctor.end_token import take_end_token
        from dpop_trainer.tools.doctor.examine import examine_pairs
        from dpop_trainer.tools.doctor.pair_file import PairFile
        from dpop_trainer.tools.doctor.report import write_report
        from dpop_trainer.tools.doctor.summary import as_text, write_clean, write_json, write_measures
        from dpop_trainer.tools.doctor.verdict import needs_clean_file, verdict

    with doing(f"reading {options.file}"):
        pair_file = PairFile.open(options.file, options.split, options.config, on_bad_record=options.on_bad_record)
    out = Path(options.out or Path("runs") / "doctor" / _name_of(options.file))
    clean_file = Path(options.write_clean or out / "clean.jsonl")
    tokenizer = model = taken_end = None
    stop_ids: list[int] = []
    if name:
        from dpop_trainer.models.tokenizer_loading import (
            load_chat_template,
            load_generation_config,
            load_tokenizer,
            prepare_tokenizer,
            transformers_without_torch,
        )

        if options.model is None and is_own_process():
            transformers_without_torch()
        with doing(f"loading the tokenizer of {name!r}"):
            tokenizer = load_tokenizer(name)
            if options.chat_template_path:
                tokenizer.chat_template = load_chat_template(options.chat_template_path)
            from dpop_trainer.measure.stop_tokens import stop_token_ids

            stop_ids = stop_token_ids(_Named(load_generation_config(name)), tokenizer)
            if options.model is None:  # else it has to be one that the model knows
                taken_end = take_end_token(tokenizer, stop_ids)
            prepare_tokenizer(tokenizer)
    if options.model:
        import torch

        from dpop_trainer.models.loading import load_model

        with doing(f"loading the model {options.model!r}"):
            model = load_model(options.model).to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    with doing(f"examining {options.file}"):
        examination = examine_pairs(
            pair_file,
            config=options.config,
            tokenizer=tokenizer,
            model=model,
            stop_ids=stop_ids,
            taken_end=taken_end,
            run_flags=_run_flags(options),
            clean_file=clean_file,
            eval_source=options.eval,
            eval_split=options.eval_split,
            max_length=options.max_length,
            truncation_mode=options.truncation_mode,
            max_scored=options.max_scored,
            batch_size=options.batch_size,
            num_proc=options.num_proc,
            on_bad_record=options.on_bad_record,
        )
    with doing(f"writing the report to {out}", out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(examination, out / "doctor.json")
        write_measures(examination, out / "measures.parquet")
        write_report(examination, out / "report.html", tokenizer)
    terminal = Terminal.of(sys.stdout)
    say(as_text(examination, terminal), painted=terminal.painted)
    say(f"\nWritten: {out / 'report.html'}, {out / 'doctor.json'}, {out / 'measures.parquet'}")
    if options.write_clean or (verdict(examination).is_yes and needs_clean_file(examination)):
        with doing(f"writing the clean pairs to {clean_file}", clean_file.parent):
            kept = write_clean(examination, clean_file)
        say(f"Written: {clean_file} with {counted(kept, 'pair')}; {len(examination.drop):,} left out")
    return 3 if examination.is_serious and not options.exit_zero else 0


def _name_of(source: str) -> str:
    """A folder's name for a file's, a folder's or a hub id's: without what says of which kind a file is."""
    name = Path(source).name
    while loader_of(Path(name)) is not None:  # train.jsonl.gz is first train.jsonl
        name = Path(name).stem
    return name or "pairs"


def _run_flags(options: argparse.Namespace) -> dict[str, str]:
    """Of `dpop train`, for the model and the data that are examined."""
    model = options.model or options.tokenizer
    if model and expanded(model).is_dir() and not any((expanded(model) / file).is_file() for file in MODEL_FILES):
        model = None  # a tokenizer alone
    flags = {
        "model_name_or_path": model,
        "dataset_name": options.file,
        "dataset_config": options.config,
        "dataset_train_split": None if options.split == "train" else options.split,
        "chat_template_path": options.chat_template_path,
        "truncation_mode": None if options.truncation_mode == "keep_start" else options.truncation_mode,
    }
    return {name: value for name, value in flags.items() if value is not None}


class _Named(NamedTuple):
    """What a model names as its stop tokens, without the model."""

    generation_config: Any
