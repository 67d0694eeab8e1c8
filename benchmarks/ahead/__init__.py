"""What a compiler alone tells of kernels for GPUs that are not here: registers, spills, instructions, and the times
that arithmetic makes of them.

`inductor.py` has torch's compiler write the kernels of an absent GPU, `flex.py` those of flat attention; `sass.py`
reads machine code; `work.py` says what a launch moves and how fast the data sheet lets it. `python -m benchmarks.ahead`
writes the records, `table.py` the page.
"""
