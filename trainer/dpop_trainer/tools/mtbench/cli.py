"""The options of `dpop mtbench answer` and `dpop mtbench judge`."""

import json
import sys

from dpop_trainer.settings.command_parser import CommandParser
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.model_paths import check_trained_path
from dpop_trainer.settings.terminal import say
from dpop_trainer.settings.under_way import LIBRARIES, under_way
from dpop_trainer.tools.mtbench.files import read_questions


def main(argv: list[str]) -> int:
    """Parse and run -> 0, or 1 where judgments are still missing."""
    options = vars(_parser().parse_args(argv))
    return {"answer": _answer, "judge": _judge}[options.pop("step")](options)


def _answer(options: dict) -> int:
    check_trained_path(options["model"])
    read_questions(options["questions"])
    with under_way(LIBRARIES):
        from dpop_trainer.tools.mtbench.answer import AnswerSettings, run_answer

    where = {name: options.pop(name) for name in ("model", "questions", "out", "model_id", "limit")}
    run_answer(**where, settings=AnswerSettings(**options))
    return 0


def _judge(options: dict) -> int:
    from dpop_trainer.report.terminal import Terminal
    from dpop_trainer.tools.mtbench.endpoint import Endpoint
    from dpop_trainer.tools.mtbench.judge import run_judge, scores_as_text

    try:
        request_fields = json.loads(options.pop("request_fields"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"request_fields: expected a JSON object, got a syntax error ({error}).") from error
    if not isinstance(request_fields, dict):
        raise ValueError(f"request_fields: expected a JSON object, got {request_fields!r}.")
    endpoint = Endpoint(
        url=options.pop("endpoint"),
        model=options.pop("judge_model"),
        api_key_env=options.pop("api_key_env"),
        timeout=options.pop("timeout"),
        max_attempts=options.pop("max_attempts"),
        max_reply_mib=options.pop("max_reply_mib"),
        request_fields=request_fields,
    )
    with doing(f"having the answers in {options['out']} judged by {endpoint.url}", options["out"]):
        report = run_judge(endpoint=endpoint, **options)
    say(f"\n{scores_as_text(report.scores, Terminal.of(sys.stdout))}\n")
    if report.failures:
        say("Missing, and asked for again by the same command:", is_problem=True)
        for failure in report.failures[:10]:
            say(f"  {failure}", is_problem=True)
        return 1
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "dpop mtbench",
        description="MT-Bench in FastChat's formats: answer the questions, then have the answers graded.",
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="answer | judge")
    answer = steps.add_parser("answer", help="generate OUT/model_answer/MODEL_ID.jsonl")
    answer.add_argument("--model", required=True, help="folder or hub id of a model or an adapter")
    answer.add_argument("--questions", required=True, help="FastChat's question.jsonl")
    answer.add_argument("--out", default="runs/mtbench")
    answer.add_argument("--model_id", help="the model's name in the files; default: the last part of its path")
    answer.add_argument("--limit", type=int, help="the first so many questions only")
    answer.add_argument("--max_new_tokens", type=int, default=1024, help="per turn (default 1024)")
    answer.add_argument("--num_choices", type=int, default=1, help="answers to each question (default 1)")
    answer.add_argument("--batch_size", type=int, default=8, help="conversations at a time (default 8)")
    answer.add_argument("--chat_template", help="Jinja file, in place of the tokenizer's template")
    answer.add_argument("--dtype", help="dtype to load in; default: the checkpoint's own")
    answer.add_argument("--device", help="default: the GPU if there is one")
    answer.add_argument("--device_map", help='"auto" spreads a large model over all GPUs')
    answer.add_argument("--trust_remote_code", action="store_true")
    judge = steps.add_parser(
        "judge",
        help="grade the answers, 1 to 10",
        description="The questions and the answers are sent to --endpoint, and nowhere else.",
    )
    judge.add_argument("--endpoint", required=True, help="OpenAI-compatible, such as http://localhost:8000/v1")
    judge.add_argument("--judge_model", required=True, help="the judge's name at the endpoint")
    judge.add_argument("--api_key_env", help="environment variable that holds the key; default: no key is sent")
    judge.add_argument("--questions", required=True, help="FastChat's question.jsonl")
    judge.add_argument("--out", default="runs/mtbench", help="the folder of the answers (default runs/mtbench)")
    judge.add_argument("--models", nargs="+", help="default: every file in OUT/model_answer")
    judge.add_argument("--prompt_file", help="FastChat's judge_prompts.jsonl, in place of our prompts")
    judge.add_argument("--reference_file", help="FastChat's reference_answer/gpt-4.jsonl")
    judge.add_argument("--first_turn_only", action="store_true", help="leave the second turn out")
    judge.add_argument("--workers", type=int, default=4, help="requests at a time (default 4)")
    judge.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for a reply (default 120)")
    judge.add_argument("--max_attempts", type=int, default=6, help="tries for each judgment (default 6)")
    judge.add_argument("--max_reply_mib", type=float, default=16.0, help="MiB that a reply may have (default 16)")
    judge.add_argument(
        "--request_fields",
        default="{}",
        help='JSON, added to each request; null removes a field, as in {"max_tokens": null}',
    )
    return parser
