"""Figures of a model on preference pairs: token log-probs, and what training did before, at and after the edit.

Beside them, what needs no model: whether an answer is right, and what the surface of pairs gives away.

Imports `batches`, `data` and `models`. The tools that compare, inspect and evaluate all measure here.
"""
