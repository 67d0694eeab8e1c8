"""Write the figures in README and docs from the committed records: `python -m benchmarks.report`.

Between `<!-- NAME -->` and `<!-- /NAME -->` in a page stands what the function for NAME makes of the records. No figure
there is typed by hand; `--check` only says whether the pages are up to date.

    benchmarks/results/demo/*.json     summary.json of `dpop demo`, one per seed
    benchmarks/results/run/metrics.jsonl     of the run that docs/runs.md shows
    benchmarks/results/gsm8k/*.json    inspect.json of `dpop inspect`, one per loss (docs/gsm8k.md)
    benchmarks/results/eval/*.json     results.json of `dpop eval` (docs/evaluation.md)
    benchmarks/results/cpu_step.jsonl  what `python -m benchmarks.cpu_step` appends
    benchmarks/results/chat_step.jsonl what it appends with a pretrained model (docs/benchmarks.md)
    benchmarks/results/cpu_head.jsonl  what `python -m benchmarks.cpu_head` appends
    benchmarks/results/cpu_layouts/*.json    records of benchmarks.cpu_layouts, one per model
    benchmarks/results/cpu_tie/*.json        a record of benchmarks.cpu_tie
    benchmarks/results/paper/*.json          compare.json of `dpop compare` (docs/paper.md)
    benchmarks/results/paper/gradient.json   what `python -m benchmarks.paper_gradient` writes
    benchmarks/results/pairs_scale.jsonl     what `python -m benchmarks.pairs_scale` appends (docs/pairs.md)
    benchmarks/results/layout_counts.json    what `python -m benchmarks.layout_counts` writes
    benchmarks/results/counted.jsonl   what `python -m benchmarks.counted` appends
    benchmarks/results/head_products.json    what `python -m benchmarks.counted.head_products` writes
    benchmarks/results/tiled_mlp.json  what `python -m benchmarks.tiled_mlp` writes (docs/runs.md)
    benchmarks/results/long_pairs.json    what `python -m benchmarks.long_pairs` writes (docs/runs.md)
    benchmarks/results/ahead.jsonl     what `python -m benchmarks.ahead` appends (docs/kernels.md)
    benchmarks/results/planned_cpu.json    what `python -m benchmarks.planned_cpu` writes (docs/plan.md)
    benchmarks/results/published_planned.json    what `python -m benchmarks.published` writes (docs/benchmarks.md)
    benchmarks/results/peers_installed.json    versions of the peers where this command last wrote the pages
    benchmarks/results/levels.jsonl    what `make bench` measures (docs/benchmarks.md)
    benchmarks/results/gpu.jsonl       what `python -m benchmarks.gpu` writes (docs/benchmarks.md)
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpop_trainer.report.plots import logratio_panels
from dpop_trainer.report.run_page import large_panels
from dpop_trainer.report.signed import signed
from dpop_trainer.report.svg import Panel, write_svg
from dpop_trainer.run_folder.run_files import read_metrics
from dpop_trainer.tools.evaluation.compare import as_markdown

from benchmarks import levels, long_pairs, paper, planned_cpu, plots, published, records, scale, steps
from benchmarks.ahead import table as ahead
from benchmarks.counted import table as counted
from benchmarks.gpu import large as gpu_large
from benchmarks.levels import table
from benchmarks.shapes import KNOWN, model_size

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"


def demo() -> str:
    """README's table: each figure is the median over the seeds, with its range."""
    records = _records("demo")

    def cell(method: str, key: str, text: Callable[[float], str]) -> str:
        values = [record["methods"][method][key] for record in records if key in record["methods"][method]]
        if not values:
            return "–"
        low, high = text(min(values)), text(max(values))
        return f"**{text(statistics.median(values))}** ({low} … {high})"

    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("chosen Δ, nats", "chosen_logratio", functools.partial(signed, digits=1)),
        ("rejected Δ, nats", "rejected_logratio", functools.partial(signed, digits=1)),
        ("after the edit, nats/token", "after_edit_per_token", functools.partial(signed, digits=3)),
        ("reward accuracy", "reward_accuracy", "{:.0%}".format),
        ("problems solved", "exact_match", "{:.0%}".format),
    ]
    rows = [
        [name, *(cell(method, key, text) for _, key, text in columns), _points(_solved_more(records, method))]
        for name, method in (("before (SFT)", "sft"), ("DPO", "dpo"), ("DPOP", "dpop"))
    ]
    first = records[0]
    seconds = statistics.median(record["seconds"] for record in records)
    note = (
        f"`make demo`, median (range) of {len(records)} seeds, {first['data']['num_eval_pairs']} held-out pairs; Δ is "
        f"the change of an answer's log-prob against the model before, points that of the share of problems solved, "
        f"seed by seed. {_on_solving(records)} {seconds / 60:.1f} minutes ({first['device']}, torch "
        f"{first['versions']['torch']}); another processor or number of threads rounds otherwise, and may leave the "
        "ranges."
    )
    answers = ("chosen", "rejected")
    shown = [
        picture(f"Log-ratio of the {answer} answers over training, DPO against DPOP", f"demo_{answer}_answers", "docs/")
        for answer in answers
    ]
    titles = ["", *(title for title, _, _ in columns), "points, by seed"]
    return f"{table(titles, rows)}\n\n{note}\n\n{chr(10).join(shown)}"


def _solved_more(records: list[dict[str, Any]], method: str) -> list[float]:
    """Per seed, the share of problems that a method solves less that of the model before, in points."""
    solved = [record["methods"] for record in records]
    return [100 * (methods[method]["exact_match"] - methods["sft"]["exact_match"]) for methods in solved]


def _points(changes: list[float]) -> str:
    return ", ".join(signed(change, 1) for change in changes) if any(changes) else "–"


def _on_solving(records: list[dict[str, Any]]) -> str:
    """What the seeds agree on: a gain or a loss is said of a method only where each of them has it."""
    sentences = []
    for name, method in (("DPO", "dpo"), ("DPOP", "dpop")):
        changes = _solved_more(records, method)
        if all(change > 0 for change in changes):
            sentences.append(f"{name} solves more in every seed.")
        elif all(change < 0 for change in changes):
            sentences.append(f"{name} solves fewer in every seed.")
        else:
            sentences.append(f"Of {name} the seeds disagree: no gain and no loss over the model before is claimed.")
    return " ".join(sentences)


def picture(alt: str, name: str, folder: str = "") -> str:
    """One of `images/`: two of them stand side by side where there is room, one below the other on a phone."""
    return f"![{alt}]({folder}images/{name}.svg)"


def pictures_of_pages() -> list[Panel]:
    """Every picture of README and docs."""
    found = [panel._replace(name=f"demo_{panel.name}") for panel in logratio_panels(_records("demo")[0]["histories"])]
    found += [panel._replace(name=f"run_{panel.name}") for panel in large_panels(read_metrics(RESULTS / "run"))]
    found += paper.pictures()
    if levels.device_of_levels() is not None:
        found += [*plots.against_tokens(), *plots.precision()]
    return found


def step() -> str:
    """README's section: a training step of ours against TRL's on one CPU, and the head against every peer."""
    device = levels.device_of_levels()
    on_gpu = device is not None and not device.startswith("CPU")
    no_gpu = "" if on_gpu else " No GPU has been measured yet; `python -m benchmarks.gpu` is ready."
    sentence = f"{steps.sentence()}{no_gpu}"
    return sentence if device is None else f"{sentence}\n\n{_head_pictures('docs/')}"


def _head_pictures(folder: str = "") -> str:
    shown = {
        "head_time": "Time of a frozen head, by tokens",
        "head_memory": "Memory of a frozen head, by tokens",
        "head_floors": "Fraction of the floor, by model",
    }
    return "\n".join(picture(alt, name, folder) for name, alt in shown.items())


def pictures() -> str:
    """docs/benchmarks.md: the middle of the sweep and the two pictures, where there are records to draw."""
    if levels.device_of_levels() is None:
        return levels.NOT_YET
    precision = [
        picture(f"Error of {what} against time, a point for each peer", f"precision_{key}")
        for key, what in (("logp_nats", "log-probs"), ("grad_worst_row", "the gradient's worst row"))
    ]
    return "\n\n".join([levels.headline(), _head_pictures(), "\n".join(precision)])


def longest() -> str:
    """docs/benchmarks.md: the longest pair in 80 GB by `scale`, and most tokens a head has run with."""
    budget = 80e9
    ways = {
        way: tuple(scale.Training(weight_bytes=weight_bytes, head=head) for head in ("fused", "recomputed", "logits"))
        for way, weight_bytes in (("LoRA", 2.0), ("QLoRA, 4 bits", 0.5))
    }
    measured = levels.most_tokens()
    rows = []
    for name, known in KNOWN.items():
        model = model_size(known)
        cells = [scale.longest_pair(model, training, budget) for heads in ways.values() for training in heads]
        row = [
            name,
            f"{model.num_parameters / 1e9:.2f} billion",
            *(f"{tokens:,}" if tokens else "–" for tokens in cells),
        ]
        rows.append([*row, f"{measured[name] / 1000:.2g} k" if name in measured else "–"])
    titles = ["", "weights", *(f"{way}, {head}" for way in ways for head in ("our head", "TRL's head", "from logits"))]
    return table([*titles, "tokens of a head, measured"], rows)


def large() -> str:
    """docs/benchmarks.md: large models on one card, on paper and, where there are records, as measured."""
    measured = {  # the last one counts
        (r["predicted"]["model"], r["predicted"]["num_tokens"], r["predicted"]["candidate"]): r
        for r in records.read(records.GPU)
        if r["part"] == "large" and "item" in r and not r["device"].endswith("interpreted")
    }
    titles = [
        "",
        "answers of",
        *(f"{name}, {what}" for name in gpu_large.CANDIDATES.values() for what in ("paper", "measured")),
    ]
    rows = []
    for model, num_tokens in gpu_large.TABLE:
        size = model_size(model)
        plan = gpu_large.one_pair_plan(size.vocab_size, num_tokens, rank=gpu_large.RANK)
        row = [model, f"{num_tokens:,} tokens"]
        for candidate in gpu_large.CANDIDATES:
            row.append(f"{gpu_large.on_paper(size, plan, candidate)['gib']:.1f} GiB")
            row.append(_large_cell(measured.get((model, num_tokens, candidate), {})))
        rows.append(row)
    return table(titles, rows)


def _large_cell(record: dict[str, Any]) -> str:
    if "median_s" in record:
        return f"{record['peak_gib']:.1f} GiB, {record['median_s']:.2f} s"
    return "out of memory" if "OutOfMemory" in record.get("failed", "") else "–"


def gsm8k() -> str:
    """docs/gsm8k.md's table: what the two losses did to the chosen answers."""
    titles = ["", "chosen Δ, nats", "rejected Δ, nats", "before", "at", "after the edit, nats/token", "reward accuracy"]
    rows, records = [], _records("gsm8k")
    for record in records:
        regions = [signed(record[f"{region}_edit"]["mean_change"], 3) for region in ("before", "at", "after")]
        answers = [signed(record[f"{side}_logratio"], 1) for side in ("chosen", "rejected")]
        rows.append([record["name"].upper(), *answers, *regions, f"{record['reward_accuracy']:.1%}"])
    note = (
        f"{records[0]['num_pairs']} held-out pairs; Δ is the change of an answer's log-prob against the SFT model, a "
        f"mean per answer or per token (torch {records[0]['versions']['torch']})."
    )
    return f"{table(titles, rows)}\n\n{note}"


def evaluation() -> str:
    """docs/evaluation.md's table: stories260K before and after a short DPOP run, as `dpop eval` writes it."""
    (record,) = _records("eval")
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("lm-eval", "torch"))
    return f"{as_markdown(record).partition(chr(10) * 2)[2].strip()}\n\n{versions}."


def cpu_head() -> str:
    """docs/kernels.md's tables: the head on each CPU, each candidate against the bare products of the same run."""
    by_device: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for record in records.read(RESULTS / "cpu_head.jsonl"):  # the last one counts
        by_device.setdefault(record["device"], {})[record["head"], record["candidate"]] = record
    return "\n\n".join(map(_cpu_head_table, by_device.values()))


def _cpu_head_table(latest: dict[tuple[str, str], dict[str, Any]]) -> str:
    names = {"products": "the bare products", "ours": "`linear_token_logps`", "eager": "eager PyTorch", "trl": "TRL"}
    rows = []
    for (head, candidate), record in latest.items():
        name = f"{names[candidate]} {record['versions']['trl']}" if candidate == "trl" else names[candidate]
        times = f"{record['seconds']:.2f} s", f"{record['seconds'] / latest[head, 'products']['seconds']:.2f}"
        if candidate == "products":
            rows.append([head, name, *times, "", "", ""])
            continue
        errors = f"{record['logp_error_nats']:.1e}", f"{record['grad_hidden_row_error']:.1e}"
        rows.append([head, name, *times, f"{record['peak_mib']:.0f} MiB", *errors])
    any_record = next(iter(latest.values()))
    sizes = ", ".join(f"{key} = {value}" for key, value in zip("NHV", any_record["shape"].values(), strict=True))
    note = (
        f"{sizes}, {any_record['dtype']}, forward and backward, minimum of three, each in its own process "
        f"({any_record['device']}, torch {any_record['versions']['torch']}). Errors are against fp64: of a log-prob in "
        "nats, and the relative error of a row of the hidden states' gradient, largest over the tokens."
    )
    titles = ["head", "", "time", "over the products", "memory over the inputs", "log-prob error", "gradient error"]
    return f"{table(titles, rows)}\n\n{note}"


def layouts() -> str:
    """docs/layouts.md's table: tokens computed, and the time of a step on a CPU."""
    records = sorted(_records("cpu_layouts"), key=lambda record: record["model"]["num_hidden_layers"])
    titles = ["", "tokens computed", "padding"]
    titles += [f"step, {r['model']['num_hidden_layers']} layers of {r['model']['hidden_size']}" for r in records]
    rows = []
    for name, figures in records[0]["layouts"].items():
        timed = [record["layouts"][name] for record in records]
        times = [f"{t['median_step_seconds']:.2f} s ({t['speed_against_rows']:.2f} ×)" for t in timed]
        rows.append([name, f"{figures['computed_ratio']:.3f}", f"{figures['padding_share']:.1%}", *times])
    first = records[0]
    note = (
        f"{first['num_pairs']} pairs in batches of {first['batch_size']}; median of "
        f"{min(record['num_steps'] for record in records)} steps or more, and how many times as fast as rows, on "
        f"{first['num_threads']} CPU thread of a shared machine (torch {first['torch']}); a random Llama, vocabulary "
        f"{first['model']['vocab_size']}."
    )
    return f"{table(titles, rows)}\n\n{note}"


def tie() -> str:
    """docs/reference.md's tables, one a model: what rounding of a reference does at DPOP's hinge."""
    return "\n\n".join(map(_tie_of, _records("cpu_tie")))


def _tie_of(record: dict[str, Any]) -> str:
    named = {"fp32": "fp32", "bf16": "bf16 autocast"}
    precisions = [precision for precision in named if precision in record["settings"]["online"]]
    titles = ["reference"]
    for precision in precisions:
        titles += [f"{what}, {named[precision]}" for what in ("max \\|Δw\\|", "penalised", "gradient norm")]
    rows = []
    for setting, found in record["settings"].items():
        row = [setting]
        for precision in precisions:
            first = found[precision]
            row += [
                f"{first['max_chosen_logratio']:.1g}",
                f"{first['active_fraction']:.0%}",
                f"{first['grad_norm']:.2g}",
            ]
        rows.append(row)
    note = (
        f"First step on {record['num_pairs']} GSM8K pairs in micro-batches of {record['batch_size']}, λ "
        f"{record['dpop_lambda']:g}, no clipping; {record['model']}, on a CPU, {record['num_threads']} threads (torch "
        f"{record['torch']}). Δw in nats."
    )
    return f"{table(titles, rows)}\n\n{note}"


def pairs_scale() -> str:
    """docs/pairs.md's table: seconds and memory of building and examining many pairs."""
    lines = (RESULTS / "pairs_scale.jsonl").read_text().splitlines()
    latest = {record["num_pairs"]: record for record in map(json.loads, lines)}  # the last one counts
    titles = ["pairs", "file", "", "processor time", "per 1,000 pairs", "memory allocated", "with mapped files"]
    rows = []
    for num_pairs, record in sorted(latest.items()):
        for command in ("build", "inspect"):
            figures = record[command]
            rows.append(
                [
                    f"{num_pairs:,}",
                    f"{record['pairs_mb']:,.0f} MB",
                    command,
                    f"{figures['cpu_seconds']:,.0f} s",
                    f"{1e6 * figures['cpu_seconds'] / num_pairs:,.0f} ms",
                    f"{figures['anonymous_mib']:,} MiB",
                    f"{figures['peak_mib']:,} MiB",
                ]
            )
    first = next(iter(latest.values()))
    note = (
        f"`metamath` and `inspect --tokenizer {first['tokenizer']}`, one thread each, start of the command included "
        f"(torch {first['versions']['torch']}). Mapped files are the `datasets` cache and the libraries: the system "
        "takes their pages back when it needs memory."
    )
    return f"{table(titles, rows)}\n\n{note}"


def budgets() -> str:
    """docs/layouts.md's table of batches filled to a budget: tokens computed, padding, and batches per epoch."""
    record = json.loads((RESULTS / "layout_counts.json").read_text())
    sets = record["sets"]
    titles = ["", *(f"{name} ({part['num_pairs']} pairs)" for name, part in sets.items())]
    rows = [
        [layout, *(_budget_cell(part["layouts"][layout]) for part in sets.values())]
        for layout in next(iter(sets.values()))["layouts"]
    ]
    note = (
        f"Tokens computed as a part of both whole sequences of every pair (padding among all positions; batches of "
        f"{record['max_positions']} positions in an epoch; `python -m benchmarks.layout_counts`)."
    )
    return f"{table(titles, rows)}\n\n{note}"


def _budget_cell(figures: dict[str, float]) -> str:
    return f"{figures['computed_ratio']:.3f} ({figures['padding_share']:.1%}; {figures['num_batches']})"


def tiled_mlp() -> str:
    """docs/runs.md's table: what an MLP holds whole and over tiles, by its width and the batch; and a step's time."""
    record = json.loads((RESULTS / "tiled_mlp.json").read_text())
    held = record["held_mib"]
    titles = ["intermediate size", *(f"{count:,} tokens" for count in record["num_tokens"])]
    rows = [
        [
            f"{int(width):,}",
            *(f"{a / 1024:.2f} → {b / 1024:.2f}" for a, b in zip(whole, held["tiled"][width], strict=True)),
        ]
        for width, whole in held["whole"].items()
    ]
    note = (
        f"GiB, whole → in tiles of `auto`: a frozen MLP of hidden size {record['hidden_size']:,} in bf16 with the norm "
        "in front of it, forward and backward, over its input, its output and their gradients; counted on tensors "
        "without data (`python -m benchmarks.tiled_mlp`)."
    )
    if "step" in record:
        step = record["step"]
        ways = ("all weights", "frozen layers")
        times = " and ".join(f"{step[way]['ratio']:.2f} ({way})" for way in ways)
        note += (
            f" A step of a Llama of {step['model']['num_hidden_layers']} layers under checkpointing on "
            f"{step['num_tokens']:,} tokens in tiles of {step['tile']} took {times} of the time without "
            f"({step['device']})."
        )
    return f"{table(titles, rows)}\n\n{note}"


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"demo": demo, "counted": counted.summary, "step": step},
    ROOT / "docs" / "gsm8k.md": {"gsm8k": gsm8k},
    ROOT / "docs" / "evaluation.md": {"eval": evaluation},
    ROOT / "docs" / "kernels.md": {"ahead": ahead.kernels, "ahead_attention": ahead.attention, "cpu_head": cpu_head},
    ROOT / "docs" / "layouts.md": {"layouts": layouts, "budgets": budgets},
    ROOT / "docs" / "reference.md": {"tie": tie},
    ROOT / "docs" / "plan.md": {"planned_cpu": planned_cpu.as_table},
    ROOT / "docs" / "pairs.md": {"scale": pairs_scale},
    ROOT / "docs" / "runs.md": {"tiled_mlp": tiled_mlp, "long_pairs": long_pairs.as_table},
    ROOT / "docs" / "paper.md": {
        "chat_model": paper.chat_model,
        "fast": paper.fast,
        "more": paper.more,
        "own": paper.own_mistakes,
        "neutral": paper.neutral,
        "choices": paper.choices,
        "conversations": paper.conversations,
        "low_edit": paper.low_edit,
        "after_edit": paper.after_edit,
        "beta": paper.beta,
        "high_edit": paper.high_edit,
        "gradient": paper.gradient,
        "guidance": paper.guidance,
    },
    ROOT / "docs" / "benchmarks.md": {
        "pictures": pictures,
        "counted": lambda: f"{counted.whole()}\n\n{counted.note()}",
        "chat_step": steps.of_a_chat_model,
        "longest": longest,
        "published_heads": published.heads,
        "published_steps": published.steps,
        "large": large,
        "peers": levels.peers_table,
        "levels": levels.all_levels,
    },
}


def updated(page: Path) -> str:
    """The page with every generated part renewed.

    Raises:
        ValueError: the page lacks the marks of a part.
    """
    text = page.read_text()
    for name, make in PAGES[page].items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not begin or not end:
            raise ValueError(f"{page.name}: expected the marks <!-- {name} --> and <!-- /{name} -->, found them not.")
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    options = parser.parse_args(argv)
    if not options.check:
        levels.note_installed()
    stale = [page for page in PAGES if page.read_text() != updated(page)]
    if options.check:
        for page in stale:
            print(f"{page.relative_to(ROOT)} is out of date: run python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    for page in stale:
        page.write_text(updated(page))
    drawn = [write_svg(panel, IMAGES) for panel in pictures_of_pages()]
    names = [str(path.relative_to(ROOT)) for path in (*stale, *drawn)]
    print(f"Updated: {', '.join(names)}")
    return 0


def _records(folder: str) -> list[dict[str, Any]]:
    paths = sorted((RESULTS / folder).glob("*.json"))
    if not paths:
        raise ValueError(f"benchmarks/results/{folder}: expected at least one record, found none.")
    return [json.loads(path.read_text()) for path in paths]


if __name__ == "__main__":
    sys.exit(main())
