"""A chat model in a GGUF file, as llama.cpp's converter writes one: a random Llama with byte-level tokens."""

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

START, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUM_HEADS, NUM_KEY_HEADS = 4, 2


def _llama(vocab_size, max_position_embeddings):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_KEY_HEADS,
            max_position_embeddings=max_position_embeddings,
            initializer_range=0.2,
        )
    ).eval()


def _interleaved(weight, num_heads):
    """Rows of queries and keys as the format has them: the two halves that a rotation pairs stand side by side."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path, eos=START, max_position_embeddings=128):
    """A Llama with random weights and byte-level tokens, as llama.cpp's converter writes one -> the model."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "hi", "lo", START, END, TEXT_END]
    model = _llama(len(tokens), max_position_embeddings)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // NUM_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 3) + [3] * 3)
    writer.add_token_merges(["h i", "l o"])  # of one alone transformers 5.17 makes a text
    writer.add_bos_token_id(tokens.index(START))
    writer.add_eos_token_id(tokens.index(eos))
    writer.add_pad_token_id(tokens.index(TEXT_END))
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _interleaved(weight, NUM_HEADS if "q_proj" in name else NUM_KEY_HEADS)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
