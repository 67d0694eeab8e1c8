"""From a finished run to something to hand on: merged weights, tokenizer, model card, and the hub where asked."""
