"""A tiny random Llama, its word-level tokenizer, and pairs for them: shared by the trainer's tests."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 61
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **IDS,
}
"""Of any small model, but for its vocabulary."""
UNUSED_ID = 60  # occurs in no pair of `token_pairs`


def tiny_llama(seed=0, **overrides):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": VOCAB_SIZE, **SIZES, "initializer_range": 0.2, **overrides}))


def word_tokenizer():
    """Ids 3 and on are the words w0, w1, ..."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(VOCAB_SIZE - 3))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


def token_pairs(num_pairs=5, seed=1):
    """Pre-tokenised low-edit pairs of ragged lengths: one token of the answer differs."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(3, UNUSED_ID, (length,), generator=generator).tolist()

    records = []
    for i in range(num_pairs):
        chosen = ids(4 + 2 * i)
        rejected = list(chosen)
        rejected[1 + i] = 3 + (rejected[1 + i] - 2) % (UNUSED_ID - 3)
        records.append({"prompt_ids": ids(3 + i % 3), "chosen_ids": chosen, "rejected_ids": rejected})
    return records


def text_pairs(num_pairs=6):
    """Pairs as words; the second word of the answer differs."""
    return [
        {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w3 w{i + 4}", "rejected": f" w{i + 2} w5 w{i + 4}"}
        for i in range(num_pairs)
    ]
