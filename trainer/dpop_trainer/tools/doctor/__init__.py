"""Looking at preference pairs before training on them: measure, find what is wrong, recommend, report."""
