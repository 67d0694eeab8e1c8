"""Everything beside training, a folder for each command: pairs, doctor, inspect, compare, plan, evaluation, mtbench,
delivery, demo, recipes.

A tool may import any other room, and no other tool, but for three commands that are made of others: `pairs inspect` is
the doctor, the demo's problems are edited as `pairs` does and its chat model is trained by `compare`, a model card
shows an evaluation's table. Nothing that trains imports from here.
"""
