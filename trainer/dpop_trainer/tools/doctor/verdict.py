"""The examination in one sentence, with values that can be pasted, and the three reasons that weigh most."""

import shlex
from typing import NamedTuple

from dpop_trainer.settings.wording import counted
from dpop_trainer.tools.doctor.examine import Examination
from dpop_trainer.tools.doctor.findings import DROPPED, DROPPED_BY_TRAIN, LENGTH_FINDINGS, percent

MUCH_LOST = 0.2
"""Share of the records of a file that must not be lost without somebody having looked, as in `dpop train`."""
_REASONS = 3
# which part of a data set is read, of `dpop train`'s flags
_OF_THE_SOURCE = ("dataset_name", "dataset_config", "dataset_train_split")


class Verdict(NamedTuple):
    """What to do with the file."""

    sentence: str
    options: str
    """For `dpop train`; empty where it should not be trained on."""
    reasons: list[str]
    """Three at most."""

    @property
    def is_yes(self) -> bool:
        return bool(self.options)


def verdict(examination: Examination) -> Verdict:
    """The sentence, the options and the reasons."""
    against = _against(examination)
    settings = {item.setting: item.value for item in examination.recommendations}
    reasons = [reason for reason in (*against[1:], *_reasons(examination)) if reason not in against[:1]][:_REASONS]
    if against:
        return Verdict(f"Do not train on this: {against[0][:1].lower()}{against[0][1:]}.", "", reasons)
    values = ["dpop_lambda 50"]
    length = settings.get("max_length")
    if length is not None:
        values.append(f"max_length {length}")
    num_dropped = len(examination.drop)
    after = f" after dropping {counted(num_dropped, 'pair')}" if num_dropped else ""
    if examination.pair_file.bad:
        after += f"{' and' if after else ' without'} {counted(len(examination.pair_file.bad), 'bad record')}"
    surface = examination.surface
    # a style, since a format's mark speaks against training; better answers have one too, which only a reader can tell
    look = f" But read some pairs first: {surface.guess}." if surface.gives_away else ""
    sentence = f"Train with DPOP ({', '.join(values)}){after}.{look}"
    return Verdict(sentence, _options(examination, length), reasons)


def needs_clean_file(examination: Examination) -> bool:
    """Whether pairs are to be dropped that `dpop train` would not leave out by itself."""
    return not set(examination.drop.values()) <= set(DROPPED_BY_TRAIN)


def _options(examination: Examination, length: str | None) -> str:
    where = dict(examination.run_flags)
    is_clean = needs_clean_file(examination)
    if is_clean:
        where = {name: value for name, value in where.items() if name not in _OF_THE_SOURCE}
        if examination.clean_file is not None:
            where["dataset_name"] = str(examination.clean_file)
    options = [f"--{name} {shlex.quote(value)}" for name, value in where.items()]
    options.append("--loss_type dpop --dpop_lambda 50")
    if length is not None:
        options.append(f"--max_length {length}")
    if examination.pair_file.bad and not is_clean:
        options.append("--on_bad_record skip")
    return " ".join(options)


def _against(examination: Examination) -> list[str]:
    """What speaks against training before somebody has looked: no pair to drop and no length mends it."""
    if not (~examination.measures.identical).any():
        return ["No pair has two different answers"]
    pair_file = examination.pair_file
    lost = len(examination.drop) + len(pair_file.bad)
    against = [
        finding.message
        for finding in examination.findings
        if finding.level == "serious" and finding.name not in (*DROPPED, *LENGTH_FINDINGS)
    ]
    if lost > MUCH_LOST * pair_file.num_records:
        share = percent(lost / pair_file.num_records)
        against.append(f"{lost:,} of {counted(pair_file.num_records, 'record')} ({share}) would be lost")
    return against


def _reasons(examination: Examination) -> list[str]:
    """Findings, what plain DPO would do to low-edit pairs among them; then what speaks for the pairs."""
    first = {"serious": 0, "low_edit": 1, "warning": 2, "note": 3}
    findings = sorted(examination.findings, key=lambda finding: first.get(finding.name, first[finding.level]))
    reasons = [
        f"{finding.message}. {finding.remedy}".rstrip(".") if finding.name == "low_edit" else finding.message
        for finding in findings
    ]
    if not any(finding.name == "low_edit" for finding in findings):
        reasons += [item.why.rstrip(".") for item in examination.recommendations if item.setting == "loss_type"]
    surface = examination.surface
    if surface.is_told and not surface.gives_away:
        reasons.append(f"The surface gives nothing away: {surface}")
    return reasons + [item.why.rstrip(".") for item in examination.recommendations if item.setting == "max_length"]
