"""`dpop pairs build`: a recipe run over a source, record by record, into pairs that say where they are from."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any, Literal

from tqdm.auto import tqdm

from dpop_trainer.data.write import PairWriter
from dpop_trainer.tools.pairs.counts import PairCounts
from dpop_trainer.tools.pairs.form import OutputForm, pair_fields
from dpop_trainer.tools.pairs.recipe import BuiltPair, Recipe, SkippedRecord
from dpop_trainer.tools.pairs.source import Item, Source, license_of, open_source, record_of

_ID_FIELDS = ("id", "ind", "idx", "uuid")


def build_file(
    recipe: Recipe,
    source: str,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    limit: int | None = None,
    form: OutputForm = "text",
    license: str | None = None,
    on_bad_record: Literal["error", "skip"] = "error",
    split: str = "train",
    config: str | None = None,
    show_progress: bool = True,
) -> PairCounts:
    """Build pairs from every record of a source.

    Memory does not grow with the source. The same source and seed give the same bytes; a record's pairs depend on its
    own texts and the seed alone, so that adding or removing records leaves the others' pairs as they were.

    Each pair carries prompt, chosen, rejected; edit_original, edit_replacement, edit_start, edit_end (what was changed
    in the chosen answer, in characters); recipe, seed, source, source_index (the record's number from 0), source_id
    (its own id or, where it has none, a hash of it) and license.

    Args:
        recipe: makes the pairs of one record.
        source: a file or a hub id, see `open_source`.
        out: .jsonl or .parquet; replaced if it exists.
        seed: any integer.
        limit: read the first so many records; None reads them all.
        form: write prompt and answers as "text" or as "messages" for a chat template.
        license: what the pairs say of their licence. None: the title of the LICENSE beside the source, whose text is
            then copied beside the pairs, or what the hub says; else null.
        on_bad_record: "error" stops at the first record that cannot be used; "skip" counts them.
        split: of a hub data set.
        config: of a hub data set that has several.
        show_progress: a progress bar on stderr.

    Returns:
        How many pairs were built, why records were skipped, and whether the pairs' surface gives their sides away.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: a bad record (source, place and field are named), no pair at all, or an argument out of range.
            Nothing is written.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a number >= 1 or None, got {limit}.")
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record: expected 'error' or 'skip', got {on_bad_record!r}.")
    if form not in ("text", "messages"):
        raise ValueError(f"form: expected 'text' or 'messages', got {form!r}.")
    writer = PairWriter(out)
    opened = open_source(source, split=split, config=config)
    from dpop_trainer.measure.surface import SurfaceSample  # numpy: not for --help, nor for a source that is not there

    found = license_of(opened.path) if license is None and opened.path is not None else None
    license = found[0] if found else license or opened.license
    counts, sample = PairCounts(), SurfaceSample()
    with writer:
        for index, item in enumerate(_read(opened, limit, counts, show_progress)):
            try:
                record = record_of(item)
                pairs = _pairs_of(record, item.place, recipe, seed, counts)
            except ValueError as error:
                problem = f"{item.place}: {error}"
                if on_bad_record == "error":
                    raise ValueError(problem) from error
                counts.add_bad(problem)
                continue
            for pair in pairs:
                counts.built += 1
                sample.add(*pair[:3])
                origin = {
                    "recipe": recipe.name,
                    "seed": seed,
                    "source": opened.name,
                    "source_index": index,
                    "source_id": _id_of(record),
                    "license": license,
                }
                writer.write(pair_fields(pair, recipe.scaffold, form) | origin)
        if not counts.built:
            first = "".join(f"\n  {detail}" for detail in counts.details())
            raise ValueError(
                f"{opened.path or opened.name}: expected records that pairs can be made of, got none: "
                f"{counts.read} read, {counts}.{first}"
            )
    if found is not None:
        shutil.copyfile(found[1], writer.path.with_name(f"{writer.path.name}.LICENSE"))
    counts.surface = sample.surface()
    return counts


def _read(source: Source, limit: int | None, counts: PairCounts, show_progress: bool) -> Iterator[Item]:
    in_bytes = source.unit == "B"
    total = source.size if limit is None or in_bytes else min(limit, source.size or limit)
    with tqdm(
        total=total,
        desc="Building pairs",
        unit=source.unit if in_bytes else " records",
        unit_scale=in_bytes,
        disable=not show_progress,
    ) as bar:
        for item in source:
            if limit is not None and counts.read == limit:
                return
            counts.read += 1
            yield item
            bar.update(source.consumed - bar.n)
            if counts.read % 1000 == 0:
                bar.set_postfix_str(f"{counts.built:,} pairs", refresh=False)
        bar.set_postfix_str(f"{counts.built:,} pairs")


def _pairs_of(record: dict[str, Any], place: str, recipe: Recipe, seed: int, counts: PairCounts) -> list[BuiltPair]:
    try:
        pairs = recipe.build(record, seed)
    except SkippedRecord as skipped:
        counts.add_skipped(place, skipped)
        return []
    for pair in pairs:
        _check_unicode(pair)
        counts.spared.update(pair.spared)
    return pairs


def _check_unicode(pair: BuiltPair) -> None:
    for name, text in zip(("prompt", "chosen", "rejected"), pair[:3], strict=True):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: expected Unicode text, got half of a surrogate pair ({text[error.start]!r}). Correct the "
                "record or remove it."
            ) from error


def _id_of(record: dict[str, Any]) -> str:
    for field in _ID_FIELDS:
        if isinstance(record.get(field), (str, int)) and record[field] != "":
            return str(record[field])
    canonical = json.dumps(record, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
