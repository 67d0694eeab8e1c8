"""An examination as JSON, as a table of measures per pair, as text for the terminal, and as a clean file of pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dpop_trainer.data.write import PairWriter
from dpop_trainer.report.signed import minus, signed
from dpop_trainer.report.terminal import PLAIN, Terminal
from dpop_trainer.run_folder.files import write_atomically
from dpop_trainer.settings.wording import counted
from dpop_trainer.tools.doctor.examine import Examination
from dpop_trainer.tools.doctor.pair_file import PairFile
from dpop_trainer.tools.doctor.verdict import verdict

_ROWS_LISTED = 100
_BAD_SHOWN = 3

EDIT_DISTANCE_IS_NOT_ALL = (
    "Edit distance says how alike two answers look, CHES how alike they are to the model. Razin et al. "
    "(arXiv:2410.08847) find that CHES tells which pairs lower the chosen answer, and edit distance alone does not."
)


def as_dict(examination: Examination) -> dict[str, Any]:
    """Everything but the texts, as plain values. NaN becomes null; of each finding at most 100 rows are listed."""
    from dpop_trainer.run_folder.versions import versions

    numbers, pair_file = examination.pair_file.numbers, examination.pair_file
    values = {
        "source": examination.pair_file.source,
        "form": examination.pair_file.form,
        "num_pairs": examination.num_pairs,
        "num_records": pair_file.num_records,
        "num_bad": len(pair_file.bad),
        "bad_records": [bad._asdict() for bad in pair_file.bad[:_ROWS_LISTED]],
        "num_ties": pair_file.num_ties,
        "settings": examination.settings,
        "is_serious": examination.is_serious,
        "verdict": verdict(examination)._asdict(),
        "findings": [
            {
                "name": finding.name,
                "level": finding.level,
                "count": len(finding.rows),
                "share": finding.share,
                "message": finding.message,
                "remedy": finding.remedy,
                "rows": numbers[finding.rows[:_ROWS_LISTED]].tolist(),
            }
            for finding in examination.findings
        ],
        "recommendations": [item._asdict() for item in examination.recommendations],
        "num_to_drop": len(examination.drop),
        "statistics": examination.statistics(),
        "surface": {**examination.surface._asdict(), "cues": [cue._asdict() for cue in examination.surface.cues]},
        "model": model_summary(examination),
        "versions": versions(),
    }
    return _without_nan(values)


def model_summary(examination: Examination) -> dict[str, Any] | None:
    """What the model says, and whether edit distance would have said the same."""
    scores = examination.model_scores
    if scores is None:
        return None
    from dpop_trainer.tools.doctor.ches import rank_correlation

    distance = examination.measures.token_distance[scores.rows]
    order = np.argsort(-scores.ches_normalised)
    return {
        "num_pairs": len(scores.rows),
        "prefers_chosen": float((scores.margins > 0).mean()),
        "prefers_chosen_per_token": float((scores.normalised_margins > 0).mean()),
        "rank_correlation_ches_edit_distance": rank_correlation(scores.ches_normalised, distance),
        "highest_ches_rows": examination.pair_file.numbers[scores.rows[order]][:_ROWS_LISTED].tolist(),
    }


def as_text(examination: Examination, terminal: Terminal = PLAIN) -> str:
    """The examination for a terminal."""
    pair_file = examination.pair_file
    pairs = counted(examination.num_pairs, "pair")
    told = verdict(examination)
    lines = [terminal.filled(told.sentence)]
    lines += [terminal.filled(f"{reason}.", "  ") for reason in told.reasons]
    if told.is_yes:
        lines.append(f"  dpop train {told.options}")
    lines += ["", f"{pair_file.source}: {pairs} ({pair_file.form})", *left_out(pair_file), ""]
    for finding in examination.findings:
        lines.append(terminal.filled(f"{finding.message}.", " " * 11, after=f"  {finding.level.upper():8} "))
        lines.append(terminal.filled(finding.remedy, " " * 11))
    if not examination.findings:
        lines.append("  nothing found")
    lines += ["", f"  {'':22}{'mean':>10}{'p5':>10}{'median':>10}{'p95':>10}{'max':>10}"]
    for name, values in examination.statistics().items():
        cells = "".join(f"{number(values[key]):>10}" for key in ("mean", "p5", "median", "p95", "max"))
        lines.append(f"  {name.replace('_', ' '):22}{cells}")
    surface = examination.surface
    if surface.num_pairs:
        lines += ["", terminal.filled(f"{str(surface)[:1].upper()}{str(surface)[1:]}.", "  ")]
    summary = model_summary(examination)
    if summary is not None:
        correlation = summary["rank_correlation_ches_edit_distance"]
        lines += [
            "",
            terminal.filled(
                f"The model gives the chosen answer more log-prob in {summary['prefers_chosen']:.1%} of "
                f"{summary['num_pairs']:,} pairs, per token in {summary['prefers_chosen_per_token']:.1%}.",
                "  ",
            ),
            terminal.filled(
                f"Rank correlation of CHES and edit distance: {signed(correlation)}. {EDIT_DISTANCE_IS_NOT_ALL}", "  "
            ),
        ]
    lines += ["", "  Recommended:"]
    for item in examination.recommendations:
        lines.append(f"    {item.setting}: {item.value}")
        lines.append(terminal.filled(item.why, " " * 6))
    return "\n".join(lines)


def left_out(pair_file: PairFile) -> list[str]:
    """What of a file's records is no pair, a line for each kind and for the first bad ones."""
    lines = []
    if pair_file.num_ties:
        lines.append(f"  left out: {counted(pair_file.num_ties, 'tie')}, which the trainer leaves out too")
    if pair_file.bad:
        lines.append(
            f"  left out: {counted(len(pair_file.bad), 'record')} of {pair_file.num_records:,} that cannot be used; "
            "train with on_bad_record skip, or correct them:"
        )
        lines += [f"    {bad.place}: {bad.reason}" for bad in pair_file.bad[:_BAD_SHOWN]]
    return lines


def write_measures(examination: Examination, path: Path) -> None:
    """All measures of all pairs as Parquet, one row per pair in the file's order, with the reason for dropping."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"row": examination.pair_file.numbers, **examination.measures._asdict()}
    reasons = np.full(examination.num_pairs, None, object)
    for row, reason in examination.drop.items():
        reasons[row] = reason
    columns["drop"] = reasons
    if examination.model_scores is not None:
        scores = examination.model_scores
        for name in ("chosen_logps", "rejected_logps", "ches", "ches_normalised"):
            column = np.full(examination.num_pairs, np.nan)
            column[scores.rows] = getattr(scores, name)
            columns[name] = column
    arrays = {name: pa.array(column, from_pandas=True) for name, column in columns.items()}
    pq.write_table(pa.table(arrays), path)


def write_clean(examination: Examination, path: Path) -> int:
    """The records that need not be dropped, as they were, to a JSONL file; beside it the others' rows and reasons.

    Returns:
        How many were written.

    Raises:
        ValueError: the file does not end in .jsonl, or nothing would be left.
    """
    if path.suffix != ".jsonl":
        raise ValueError(f"write_clean: expected a file ending in .jsonl, got {path}.")
    kept = examination.num_pairs - len(examination.drop)
    if not kept:
        raise ValueError(
            f"write_clean: expected pairs that may stay, got none: all {examination.num_pairs:,} are to drop."
        )
    with PairWriter(path) as writer:
        for row, record in enumerate(examination.pair_file.records()):
            if row not in examination.drop:
                writer.write(record)
    with PairWriter(path.with_suffix(".dropped.jsonl")) as writer:
        for row, reason in examination.drop.items():
            writer.write({"row": int(examination.pair_file.numbers[row]), "reason": reason})
    return kept


def number(value: float) -> str:
    """Four significant digits, thousands grouped."""
    if abs(value) >= 1000:
        return minus(f"{value:,.0f}")
    return minus(f"{value:.4g}" if value == int(value) else f"{value:.3g}")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_json(examination: Examination, path: Path) -> None:
    """`as_dict` to a file."""
    write_atomically(path, json.dumps(as_dict(examination), indent=2) + "\n")
