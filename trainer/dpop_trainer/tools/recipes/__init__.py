"""`dpop recipes`: what recipes there are, where they are, and all of them copied."""
