"""Run files that come with the package: for the paper's models and today's, for accelerate and for Slurm. No code.

`settings/recipes.py` finds them. A new recipe is one file here, and a row in docs/recipes.md.
"""
