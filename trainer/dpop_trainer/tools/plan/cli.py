"""`dpop plan`: plan a run, print it, and say by the exit code whether it fits."""

import importlib
import json
from contextlib import nullcontext
from dataclasses import replace

from dpop_trainer.data.source_path import check_source_path
from dpop_trainer.settings.arguments import DataArguments, ModelArguments, check_arguments
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.own_process import hidden, is_own_process
from dpop_trainer.settings.run_parser import RunParser
from dpop_trainer.settings.source_classes import class_from_source
from dpop_trainer.settings.terminal import say
from dpop_trainer.settings.under_way import LIBRARIES, under_way
from dpop_trainer.tools.plan.arguments import PlanArguments
from dpop_trainer.tools.plan.devices import find_device

CONFIG = ("dpop_trainer.tools.plan.options", "PlanConfig")
DOES_NOT_FIT = 3
# peft would import the first to train on packed weights, which have stand-ins here, and the compiler with it;
# transformers the second, for losses of object detection
NOT_NEEDED = ("bitsandbytes", "scipy")
EXIT_CODES = "Exit codes: 0 the run fits; 3 it does not; 1 it cannot be planned, and says why; 2 wrong usage."


def main(argv: list[str]) -> int:
    """-> 0 where the setting that was asked for fits, 3 where it does not."""
    _check(argv)
    with hidden(*NOT_NEEDED) if is_own_process() else nullcontext(), under_way(LIBRARIES) as show:
        from dpop_trainer.tools.plan.options import parse_plan
        from dpop_trainer.tools.plan.report import as_json, as_text
        from dpop_trainer.tools.plan.search import longest_pair, search
        from dpop_trainer.tools.plan.setup import make_planner

        show("Building the model without its weights")
        model, data, config, plan = parse_plan(argv)
        with doing(f"planning a run of {model.model_name_or_path!r}"):
            planner, choice, notes = make_planner(model, data, config, plan)
            planner.show = show
            asked = planner.outcome(choice)
            if plan.engine == "auto" and choice.num_devices > 1 and not asked.fits:
                asked = planner.outcome(replace(choice, sharding="fsdp2"))
            found = search(planner, asked) if plan.search else None
            longest = longest_pair(planner, asked.choice) if plan.search and planner.run.budget is None else None
    if plan.json:
        say(json.dumps(as_json(planner, asked, found, longest, notes), indent=2))
    else:
        say(as_text(planner, asked, found, longest, notes))
    return 0 if asked.fits else DOES_NOT_FIT


def _check(argv: list[str]) -> None:
    """Tell what is wrong before torch is imported; `--help` prints the plan's own options first, and stops."""
    if "-h" in argv or "--help" in argv:
        _print_help()
        raise SystemExit(0)
    told = check_arguments(*CONFIG, argv, "dpop plan", PlanArguments)
    if told is None:
        return
    plan: PlanArguments = told[3]
    if plan.device not in (None, "cpu"):  # which is measured when it is planned
        find_device(plan.device, memory=plan.memory, tflops=plan.tflops, bandwidth=plan.bandwidth, utilisation=plan.mfu)
    if plan.data is not None:
        check_source_path(plan.data)


def _print_help() -> None:
    config = class_from_source(*CONFIG) or getattr(importlib.import_module(CONFIG[0]), CONFIG[1])
    parser = RunParser((PlanArguments, ModelArguments, DataArguments, config), "dpop plan")
    parser.epilog = EXIT_CODES
    parser.print_help()
