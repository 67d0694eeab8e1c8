"""A plan as a table for the terminal, as the YAML of a setting, and as JSON."""

from typing import Any

from dpop_trainer.tools.plan.devices import GIB
from dpop_trainer.tools.plan.planner import Choice, Outcome, Planner
from dpop_trainer.tools.plan.search import Found, most_tokens

BAR = 24


def as_text(planner: Planner, asked: Outcome, found: Found | None, longest: int | None, notes: list[str]) -> str:
    """What the terminal shows.

    Args:
        planner: of the run.
        asked: the setting that was asked for.
        found: what a search came to; None where there was none.
        longest: tokens of the longest pair that fits; None where it was not searched.
        notes: where things came from, and what was assumed.
    """
    device = planner.run.device
    lines = [_headline(planner, asked), ""]
    lines += _memory_lines(asked, device.memory_bytes)
    lines += ["", *_verdict(asked, device.memory_gib)]
    lines += ["", *_time_lines(planner, asked)]
    if longest is not None:
        lines.append(_longest_line(longest, most_tokens(asked.choice)))
    if found is not None and found.nearest is not None:
        lines += ["", "Nearest setting that fits:", *_setting_lines(planner, asked.choice, found.nearest)]
    elif found is not None and not asked.fits:
        adapter = "train an adapter (use_peft: true), " if planner.run.model.lora is None else ""
        lines += ["", f"No setting was found that fits: {adapter}lower max_length, or take a smaller model."]
    cheapest = found.cheapest if found is not None else None
    if cheapest is not None and (found is None or found.nearest is None or cheapest.choice != found.nearest.choice):
        if asked.fits and cheapest.device_seconds_per_pair >= 0.99 * asked.device_seconds_per_pair:
            lines += ["", "No cheaper setting was found."]
        else:
            lines += ["", "Cheapest setting that fits:", *_setting_lines(planner, asked.choice, cheapest)]
    return "\n".join(line.rstrip() for line in [*lines, "", *notes])


def as_json(
    planner: Planner, asked: Outcome, found: Found | None, longest: int | None, notes: list[str]
) -> dict[str, Any]:
    """The same as plain values; bytes, seconds."""
    run, device = planner.run, planner.run.device
    sizes = planner.sizes(asked.choice.bits)
    return {
        "model": {
            "parameters": sizes.num_parameters,
            "active_parameters": sizes.num_active,
            "trained_parameters": sizes.num_trained,
            "layers": sizes.num_layers,
        },
        "device": {
            "name": device.name,
            "memory_bytes": device.memory_bytes,
            "tflops": device.tflops,
            "bandwidth_gb": device.bandwidth_gb,
            "utilisation": device.utilisation,
        },
        "pairs": {"num_pairs": run.pairs.num_pairs, "origin": run.pairs.origin, "assumed": run.pairs.is_assumed},
        "fits": asked.fits,
        "asked": _outcome_json(planner, asked),
        "longest_pair_tokens": longest,
        "nearest": None if found is None or found.nearest is None else _outcome_json(planner, found.nearest),
        "cheapest": None if found is None or found.cheapest is None else _outcome_json(planner, found.cheapest),
        "notes": notes,
    }


def setting_yaml(choice: Choice, *, nested: bool = True) -> list[str]:
    """A setting as lines of a run's YAML."""
    lines = [
        f"per_device_train_batch_size: {choice.num_pairs}",
        f"gradient_accumulation_steps: {choice.accumulation}",
        f"gradient_checkpointing: {str(choice.checkpointing).lower()}",
        f"layout: {choice.layout}",
    ]
    if choice.tiled_mlp is not None:
        lines.append(f"tiled_mlp: {choice.tiled_mlp}")
    if choice.offloading:
        lines.append("activation_offloading: true")
    if choice.ranks_per_batch > 1:
        lines.append(f"sequence_parallel_size: {choice.ranks_per_batch}")
    if choice.bits is not None:
        lines.append(f"load_in_{choice.bits}bit: true")
    if choice.bits == 4:
        lines += [f"use_bnb_nested_quant: {str(nested).lower()}"]
        if choice.sharding == "fsdp2":
            lines.append("bnb_4bit_quant_storage: bfloat16")
    return lines


def accelerate_file(choice: Choice) -> str | None:
    """The name of the recipe for the launcher that a setting takes."""
    if choice.num_devices == 1:
        return None
    kind = "fsdp2_2x8" if choice.sharding == "fsdp2" and choice.num_devices > 8 else f"{choice.sharding}_8"
    return f"accelerate/{kind}"


def _longest_line(longest: int, most: int) -> str:
    if not longest:
        return "longest pair    none: what is there before the first token does not fit"
    at_least = "at least " if longest >= most else ""  # no longer one was looked for
    return f"longest pair    {at_least}{longest} tokens of prompt and answer fit at this setting"


def _headline(planner: Planner, asked: Outcome) -> str:
    run, choice = planner.run, asked.choice
    sizes = planner.sizes(choice.bits)
    active = f" ({_count(sizes.num_active)} active)" if sizes.num_active < sizes.num_parameters else ""
    base = f"{choice.bits}-bit base, " if choice.bits else ""
    how = f"LoRA, {_count(sizes.num_trained)} trained" if run.model.lora is not None else "all weights trained"
    where = f"{choice.num_devices} x {run.device.name}" if choice.num_devices > 1 else run.device.name
    shared = f", {choice.sharding}" if choice.num_devices > 1 else ""
    shared += f", {choice.ranks_per_batch} to a batch" if choice.ranks_per_batch > 1 else ""
    return f"{_count(sizes.num_parameters)} parameters{active}, {base}{how}; {where}{shared}"


def _memory_lines(outcome: Outcome, available: float) -> list[str]:
    memory = outcome.memory
    lines = [f"{f'memory at its peak ({memory.phase})':32} {'GiB':>9}"]
    scale = max(memory.total, available)
    for part in sorted(memory.parts, key=lambda part: -part.num_bytes):
        bar = "#" * round(BAR * part.num_bytes / scale)
        name = part.name + (" *" if part.is_assumed else "")
        lines.append(f"  {name:30} {part.num_bytes / GIB:9.2f}  {bar}")
    lines.append(f"  {'total':30} {memory.total / GIB:9.2f}  of {available / GIB:.1f}")
    if any(part.is_assumed for part in memory.parts):
        lines.append("  * assumed")
    return lines


def _verdict(outcome: Outcome, memory_gib: float) -> list[str]:
    if outcome.fits:
        return [f"FITS, {outcome.spare / GIB:.1f} GiB to spare."]
    return [f"DOES NOT FIT: {-outcome.spare / GIB:.1f} GiB short of {memory_gib:.1f} GiB on each device."]


def _time_lines(planner: Planner, outcome: Outcome) -> list[str]:
    run, choice, batches = planner.run, outcome.choice, outcome.batches
    micro = outcome.time.total
    pairs_per_step = batches.pairs_per_batch * choice.accumulation * choice.num_batches
    logits = outcome.logits_bytes(run.config.get_text_config().vocab_size) / GIB
    pairs = f"{batches.pairs_per_batch:.3g} pair{'s' * (batches.pairs_per_batch != 1)}"
    lines = [
        f"layout          {outcome.layout}: {pairs}, {batches.positions:.0f} positions "
        f"({batches.padding:.0%} padding), {batches.scored:.0f} scored tokens a micro-batch",
        f"logits          none; of these positions, as other trainers make them, {logits:.1f} GiB",
        f"step            {_duration(micro * choice.accumulation)} for {pairs_per_step:.0f} pairs "
        f"({micro:.2f} s a micro-batch, {outcome.cost.total_flop:.3g} FLOP in the largest)",
    ]
    count = run.pairs.num_pairs
    if count is None:
        hours = 1000 * outcome.seconds_per_pair / 3600
        lines.append(
            f"1000 pairs      {_duration(3600 * hours)}{_price(planner, choice, hours)} (num_pairs: not known)"
        )
    else:
        hours = count * outcome.seconds_per_pair / 3600
        lines.append(f"epoch           {_duration(3600 * hours)} for {count} pairs{_price(planner, choice, hours)}")
        total = hours * run.num_epochs
        if run.max_steps > 0:
            total = run.max_steps * pairs_per_step * outcome.seconds_per_pair / 3600
        if total != hours:
            what = f"{run.max_steps} steps" if run.max_steps > 0 else f"{run.num_epochs:g} epochs"
            lines.append(f"run             {_duration(3600 * total)} for {what}{_price(planner, choice, total)}")
    return lines


def _price(planner: Planner, choice: Choice, hours: float) -> str:
    if planner.run.price is None:
        return ""
    return f", {hours * choice.num_devices * planner.run.price:.2f} at {planner.run.price:g} per device-hour"


def _setting_lines(planner: Planner, asked: Choice, outcome: Outcome) -> list[str]:
    choice = outcome.choice
    before = set(setting_yaml(asked, nested=planner.run.model.nested))
    lines = []
    for line in setting_yaml(choice, nested=planner.run.model.nested):
        lines.append(f"  {line:36}" + ("" if line in before else "# changed"))
    launcher = accelerate_file(choice)
    if launcher is not None:
        processes = f"--num_processes {choice.num_devices}"
        file = f'"$(dpop recipes --path {launcher})"'
        lines.append(f"  accelerate launch --config_file {file} {processes} -m dpop_trainer train ...")
    pace = f"{outcome.device_seconds_per_pair:.3g} device-seconds a pair"
    return [*lines, f"  {outcome.memory.total / GIB:.1f} GiB a device, {outcome.spare / GIB:.1f} to spare; {pace}"]


def _outcome_json(planner: Planner, outcome: Outcome) -> dict[str, Any]:
    choice, batches = outcome.choice, outcome.batches
    return {
        "setting": {**vars(choice), "layout_used": outcome.layout, "accelerate": accelerate_file(choice)},
        "memory": {
            "phase": outcome.memory.phase,
            "total_bytes": outcome.memory.total,
            "spare_bytes": outcome.spare,
            "parts": {part.name: part.num_bytes for part in outcome.memory.parts},
            "assumed": [part.name for part in outcome.memory.parts if part.is_assumed],
        },
        "batch": {
            "pairs": batches.pairs_per_batch,
            "positions": batches.positions,
            "padding": batches.padding,
            "scored": batches.scored,
        },
        "flop": dict(outcome.cost.flop),
        "micro_batch_seconds": outcome.time.total,
        "products_seconds": outcome.time.products,
        "device_seconds_per_pair": outcome.device_seconds_per_pair,
        "seconds_per_pair": outcome.seconds_per_pair,
    }


def _count(number: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
