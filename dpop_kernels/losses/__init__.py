"""Right of the waist: pairs and their losses. No vocabulary, no logits.

`formulas` is the registry: a loss is one function there. `on_sums` takes summed log-probs, `pair_loss` token log-probs
with their bounds, `unpaired` sums of single answers. Imports `outputs` and `validate`, and `pair_loss` the backends.
"""
