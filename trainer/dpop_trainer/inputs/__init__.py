"""From a run's arguments to what it reads: data sets, tokenizer, what a model and its adapter are made with.

Imports `data`, `settings` and `models`. A run that trains and one that is only planned ask the same functions here.
"""
