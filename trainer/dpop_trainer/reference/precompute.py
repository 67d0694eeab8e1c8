"""One pass of the reference over a data set: every pair once, whatever a cache knows left out, to columns.

Pairs go longest first (what does not fit into memory shows at once), the batches to all processes in turn, and the
results back to their places. What is computed is written to the cache as it comes; an interrupted pass goes on there.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from dpop_trainer.data.records import REF_COLUMNS, REF_SHARED_COLUMN, TOKEN_COLUMNS
from dpop_trainer.reference.cache import ReferenceCache
from dpop_trainer.reference.keys import pair_keys
from dpop_trainer.settings.terminal import printable

logger = logging.getLogger(__name__)

# between two gathers over all processes; large enough that nobody waits for long, small enough to write often
BATCHES_PER_ROUND = 8


def precompute_reference(
    segment_logps: Callable[[list[dict[str, Any]]], Tensor],
    dataset: Dataset,
    *,
    name: str,
    batch_size: int,
    accelerator: Accelerator,
    cache: ReferenceCache | None = None,
    seconds_between_writes: float = 30.0,
    show_progress: bool = True,
    processes_per_batch: int = 1,
) -> Dataset:
    """The data set with the reference's log-probs as columns. All processes call it together.

    Args:
        segment_logps: B records of the data set -> the reference's sums [B, 3] (shared, chosen tail, rejected tail).
        dataset: tokenised pairs.
        name: of the data set, for the log.
        batch_size: pairs per forward and process.
        accelerator: spreads the work and gathers the results.
        cache: of this reference, on the main process alone, and None on the others; None there computes everything and
            keeps nothing.
        seconds_between_writes: what a kill may cost. The cache is written at the end as well.
        show_progress: a bar on the main process.
        processes_per_batch: how many neighbouring processes run each batch together, and get the same results.

    Returns:
        The data set with float64 columns, in nats: ref_chosen_logps and ref_rejected_logps of the whole answers, as TRL
        has them, and ref_shared_logps of the tokens that both begin with; the tails' are the differences.

    Raises:
        ValueError: the reference gives a pair a log-prob that is not finite.
    """
    is_main = accelerator.is_main_process
    keys = pair_keys(dataset) if cache is not None else []
    # one process reads, so that all leave out the same pairs, whatever their disks hold
    known: list[Any] = [cache.lookup(keys) if cache is not None else None]
    broadcast_object_list(known)
    sums: np.ndarray = known[0] if known[0] is not None else np.full((len(dataset), 3), np.nan)
    missing = np.flatnonzero(np.isnan(sums).any(-1))
    if cache is not None:
        logger.warning(
            "Reference log-probs (%s): %d of %d pairs from the cache at %s.",
            name,
            len(dataset) - len(missing),
            len(dataset),
            cache.folder,
        )
    order = missing[np.argsort(-_lengths(dataset)[missing], kind="stable")]
    bar = tqdm(
        total=len(dataset),
        initial=len(dataset) - len(missing),
        desc=printable(f"Reference log-probs ({name})"),
        unit=" pairs",
        disable=not (is_main and show_progress and len(missing)),
    )
    unwritten: list[np.ndarray] = []
    last_write = time.monotonic()

    def write() -> None:
        rows = np.concatenate(unwritten) if unwritten else np.empty(0, dtype=np.int64)
        if cache is not None and len(rows):
            cache.add([keys[row] for row in rows], sums[rows])
        unwritten.clear()

    with bar:
        try:
            for rows in _rounds(order, batch_size * accelerator.num_processes * BATCHES_PER_ROUND):
                sums[rows] = _computed(segment_logps, dataset, rows, batch_size, accelerator, processes_per_batch)
                bar.update(len(rows))
                unwritten.append(rows)
                if time.monotonic() - last_write >= seconds_between_writes:
                    write()
                    last_write = time.monotonic()
        finally:
            write()
    _check_finite(sums, dataset)
    shared, chosen, rejected = sums.T
    columns = {REF_SHARED_COLUMN: shared, REF_COLUMNS[0]: shared + chosen, REF_COLUMNS[1]: shared + rejected}
    for column, values in columns.items():
        dataset = dataset.add_column(column, values.tolist())
    return dataset


def _computed(
    segment_logps: Callable[[list[dict[str, Any]]], Tensor],
    dataset: Dataset,
    rows: np.ndarray,
    batch_size: int,
    accelerator: Accelerator,
    processes_per_batch: int,
) -> np.ndarray:
    """The sums [len(rows), 3] of a round, from all processes. Each runs as many batches as any other (a sharded model's
    forward waits for all), some of them twice."""
    rank, world = (n // processes_per_batch for n in (accelerator.process_index, accelerator.num_processes))
    batches = list(_rounds(rows, batch_size))
    num_turns = -(-len(batches) // world)
    results = torch.full((num_turns, batch_size, 3), torch.nan, dtype=torch.float64)
    for turn in range(num_turns):
        batch = batches[min(turn * world + rank, len(batches) - 1)]
        records = [dataset[int(row)] for row in batch]
        results[turn, : len(batch)] = segment_logps(records).double().cpu()
    if accelerator.num_processes > 1:
        gathered: Any = accelerator.gather(results.to(accelerator.device))
        of_batches = gathered.cpu().view(world, processes_per_batch, num_turns, batch_size, 3)[:, 0]
        results = of_batches.transpose(0, 1).reshape(-1, batch_size, 3)
    return torch.cat([results[i, : len(batch)] for i, batch in enumerate(batches)]).numpy()


def _rounds(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of each pair's prompt and answers [rows]."""
    total = np.zeros(len(dataset), dtype=np.int64)
    start = 0
    for table in dataset.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(batch_size=10_000):
        for column in TOKEN_COLUMNS:
            offsets = np.asarray(table[column].combine_chunks().offsets)  # type: ignore[index]
            total[start : start + len(table)] += np.diff(offsets)
        start += len(table)
    return total


def _check_finite(sums: np.ndarray, dataset: Dataset) -> None:
    bad = np.flatnonzero(~np.isfinite(sums).all(-1))
    if len(bad):
        pair_ids = [dataset[int(row)].get("pair_id", int(row)) for row in bad[:8]]
        raise ValueError(
            f"reference log-probs: expected finite values, got NaN or infinity for {len(bad)} pairs, pair ids "
            f"{pair_ids}{' ...' if len(bad) > 8 else ''}. Look at these pairs, and run the reference in bf16 or fp32, "
            "not fp16."
        )
