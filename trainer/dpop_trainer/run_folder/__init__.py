"""What a run leaves on disk: whole files, checkpoints' conditions, identity, environment, metrics and their picture.

Imports `data` for what a record is, and nothing else. A file of a run is written here or not at all. How every picture
looks is here too (`plot_style`), the lowest room that draws one.
"""
