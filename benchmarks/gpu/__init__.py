"""Everything on one H200 in fifteen minutes, in two calls: `python -m benchmarks.gpu OUT`.

`jobs` says what is measured, in which order and for how long; `runner` gives each job a process of its own and ends it
in time; `work` is what a job writes its records through. The parts are one file each, with `run(work, name)`. A part
knows nothing of the others; `predicted` and `trainers` are what they share.
"""
