"""`ScoringHead`: this package's head behind the `lm_head` of a Hugging Face model, found by looking at the model.

Imports `logps`; needs no transformers to be imported.
"""
