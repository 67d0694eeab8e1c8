"""The reference: which model it is, what it costs, and how its log-probs are kept.

choose            which reference a run has: one plan, decided once
pair_reference    that reference at work: what a trainer asks
source            the policy in a state in which it is the reference, or a frozen model
adapters          does an adapter change anything yet?
start_weights     the trainable parameters as they were, and their place in a run that is resumed
moving            a reference that follows the policy, every so many steps
weight_files      a reference's weights on disk
second_model      a reference by name, quantised or offloaded
precompute        one pass over a data set, sharded, resumable -> columns
cache             log-probs by pair on disk
keys              what a pair and a reference are known by
recall            the model of a pass, loaded anew for pairs that come after
of_run            which it was, from what a run left, loaded anew
step_zero         how far policy and reference are apart before the first update, and why
"""

from dpop_trainer.reference.choose import has_reference_columns
from dpop_trainer.reference.pair_reference import PairReference
from dpop_trainer.reference.second_model import load_reference
from dpop_trainer.reference.source import frozen_copy, reference_segment_logps

__all__ = ["PairReference", "frozen_copy", "has_reference_columns", "load_reference", "reference_segment_logps"]
