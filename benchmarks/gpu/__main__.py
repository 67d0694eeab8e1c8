"""Measure on one H200: nine minutes, then four for what is left.

    python -m benchmarks.gpu OUT                            the first call
    python -m benchmarks.gpu OUT --done EARLIER             the second: what EARLIER's records hold is not done again
    python -m benchmarks.gpu OUT --job head/ready           one job alone
    python -m benchmarks.gpu OUT --rehearse                 the same way through tiny sizes on a CPU

OUT/gpu.jsonl gets one record per figure as it comes, OUT/log.txt what the jobs print. Interrupt it at any time. Exit
code 1: a job was cut or broke, or a result of ours is wrong. `python -m benchmarks.gpu.wheels` says what to bring along
to a machine without a network.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from benchmarks import records
from benchmarks.gpu import runner
from benchmarks.gpu.jobs import FIRST_SECONDS, JOBS, SECOND_SECONDS, find


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    doc = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=doc[0])
    parser.add_argument("folder", type=Path, help="for the records")
    parser.add_argument(
        "--seconds", type=float, help=f"for all of it: {FIRST_SECONDS:.0f}, with --done {SECOND_SECONDS:.0f}"
    )
    parser.add_argument("--done", type=Path, help="folder with the records of an earlier call")
    parser.add_argument("--job", help=f"one of {', '.join(map(str, JOBS))}")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    default = SECOND_SECONDS if options.done else FIRST_SECONDS
    seconds = default if options.seconds is None else options.seconds
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    if options.job:
        return run_job(options.job, options.folder, seconds, rehearse=options.rehearse, done=options.done)
    if not options.rehearse and not has_gpu():
        parser.error("no CUDA device here. Pass --rehearse to run tiny sizes on the CPU.")
    passed_on = ["--rehearse"] * options.rehearse + (["--done", str(options.done)] if options.done else [])
    done = {job for folder in (options.done, options.folder) if folder for job in runner.done_jobs(folder)}
    fine = False
    try:
        clock = runner.Clock(seconds)
        fine = runner.run(JOBS, options.folder, clock, runner.process(options.folder, passed_on), done)
    except KeyboardInterrupt:
        print(f"Interrupted: what was measured is in {options.folder}")
    from benchmarks.gpu.table import table

    print(table(records.read(options.folder / runner.RECORDS)))
    return 0 if fine else 1


def run_job(name: str, folder: Path, seconds: float, *, rehearse: bool, done: Path | None) -> int:
    """A job, in this process; its exit code as in `runner`."""
    from benchmarks.gpu.work import Work

    job = find(name)
    work = Work(folder, job.part, seconds=seconds, rehearse=rehearse, done=done)
    job.run(work, job.name)
    return work.code


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupted)  # whoever ends the command ends its jobs
    sys.exit(main())
