"""Models and tokenizers: loaded by name, given an adapter, in 4 or 8 bits, spread over ranks, with MLPs over tiles of
tokens, or as a finished run left them.

Imports `data`'s names and `settings`. Whoever wants a model, before or after training, comes here.
"""
