"""The trainers: DPOPTrainer, SFTTrainer, and what a run does between its first batch and its last checkpoint.

Imports every room but `tools`; no other room imports it. transformers' own Trainer does what it can; here is what it
cannot: batches by budget, exact shares of ranks, checkpoints that are whole, metrics without a transfer per step.
"""
