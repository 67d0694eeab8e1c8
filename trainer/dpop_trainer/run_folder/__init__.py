"""What a run leaves on disk: whole files, checkpoints' conditions, identity, environment, metrics.

Imports `data` for what a record is, and nothing else. A file of a run is written here, its page (`report/run_page`)
excepted.
"""
