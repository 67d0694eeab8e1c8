"""Left of the waist: log-probs of tokens, from logits or from hidden states and a head. No loss.

One file per public function: `logits`, `linear`, `lora` (a head with an adapter), `vocab_parallel` (a head in slices);
`tiling` is the walk that they share. README.md tells how to read them. Imports the backends and never a loss.
"""
