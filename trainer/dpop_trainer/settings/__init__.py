"""What a run is asked to do: configurations, TRL's fields, flags and YAML, and the errors that answer a wrong one.

Imports no other room but `recipes` and the kernels' losses. What the command line needs before anything heavy is
imported (everything here but `config` and `renamed`) needs neither torch nor transformers. A field is added in
`config.py`; its check stands in `config_checks.py` if it needs no torch.
"""
