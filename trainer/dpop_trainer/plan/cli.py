"""`dpop plan`: plan a run, print it, and say by the exit code whether it fits."""

import json
from dataclasses import replace

DOES_NOT_FIT = 3


def main(argv: list[str]) -> int:
    """-> 0 where the setting that was asked for fits, 3 where it does not."""
    from dpop_trainer.plan.options import parse_plan
    from dpop_trainer.plan.report import as_json, as_text
    from dpop_trainer.plan.search import longest_pair, search
    from dpop_trainer.plan.setup import make_planner

    model, data, config, plan = parse_plan(argv)
    planner, choice, notes = make_planner(model, data, config, plan)
    asked = planner.outcome(choice)
    if plan.sharding == "auto" and plan.devices > 1 and not asked.fits:
        asked = planner.outcome(replace(choice, sharding="fsdp2"))
    found = search(planner, asked) if plan.search else None
    longest = longest_pair(planner, asked.choice) if plan.search and planner.run.budget is None else None
    if plan.json:
        print(json.dumps(as_json(planner, asked, found, longest, notes), indent=2))
    else:
        print(as_text(planner, asked, found, longest, notes))
    return 0 if asked.fits else DOES_NOT_FIT
