"""Models and tokenizers: loaded by name, given an adapter, in 4 or 8 bits, or as a finished run left them.

Imports `settings` alone. Whoever wants a model, before or after training, comes here.
"""
