"""What a step computes and holds, counted without computing it: trainers run as they are, on tensors without data.

    shapes_only.py   floating-point tensors have a shape and no data; FLOP, bytes and peak memory are counted
    sides.py         this package's step and TRL's, each by its own collator, loss and head, as they run on a GPU
    __main__.py      the command: models x data sets x layouts -> records

A count is the same on every machine. It is no time: `report` turns it into one by rates that it prints.
"""
