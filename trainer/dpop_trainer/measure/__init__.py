"""Figures of a model on preference pairs: token log-probs, and what training did before, at and after the edit.

Imports `batches`, `data` and `models`. The tools that compare, inspect and evaluate all measure here.
"""
