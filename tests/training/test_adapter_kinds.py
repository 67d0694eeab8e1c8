"""Every kind of adapter that peft has: trained against its own start, saved and loaded, or refused by name."""

import peft
import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPTrainer
from dpop_trainer.models.adapters import REFUSED_KINDS
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import answer_logp, config

LAYERS = {"target_modules": ["q_proj", "v_proj"]}
TOKENS = {"num_virtual_tokens": 2}

# kind -> its configuration, small enough for a model of 32 wide
TRAINED = {
    "ADALORA": {**LAYERS, "init_r": 2, "target_r": 1, "total_step": 4},
    "ADAMSS": LAYERS,
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "BEFT": LAYERS,
    "BOFT": {**LAYERS, "boft_block_size": 4},
    "C3A": {**LAYERS, "block_size": 16},
    "CARTRIDGE": TOKENS,
    "DEFT": LAYERS,
    "DELORA": LAYERS,
    "FOURIERFT": {**LAYERS, "n_frequency": 10},
    "FROD": LAYERS,
    "GLORA": LAYERS,
    "GRALORA": LAYERS,
    "HIRA": LAYERS,
    "HRA": LAYERS,
    "IA3": {**LAYERS, "feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": {**LAYERS, "r": 2},
    "LOKR": {**LAYERS, "r": 2},
    "LORA": {**LAYERS, "r": 2},
    "MISS": {**LAYERS, "r": 2},
    "OFT": {**LAYERS, "oft_block_size": 4, "r": 0},
    "OSF": LAYERS,
    "PEANUT": LAYERS,
    "PREFIX_TUNING": TOKENS,
    "PSOFT": {**LAYERS, "r": 2},
    "PVERA": LAYERS,
    "RANDLORA": {**LAYERS, "r": 2},
    "ROAD": {**LAYERS, "group_size": 4},
    "SHADOW": {},
    "SHIRA": {**LAYERS, "r": 2},
    "SUPERTUNING": LAYERS,
    "TINYLORA": LAYERS,
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 4]},
    "UNILORA": LAYERS,
    "VBLORA": {**LAYERS, "num_vectors": 4, "vector_length": 4, "r": 2, "topk": 2},
    "VERA": {"target_modules": ["q_proj"], "r": 2},
    "WAVEFT": {**LAYERS, "n_frequency": 10},
}
NEEDED = {
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "LILY": LAYERS,
    "MULTITASK_PROMPT_TUNING": {**TOKENS, "num_tasks": 1},
    "POLY": LAYERS,
    "PROMPT_TUNING": TOKENS,
    "P_TUNING": TOKENS,
    "XLORA": {"adapters": {}, "hidden_size": 32},
}


def new_config(kind, options):
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](task_type="CAUSAL_LM", **options)


def build(tmp_path, peft_config):
    return DPOPTrainer(
        tiny_llama(),
        args=config(tmp_path, learning_rate=0.05, max_steps=2, gradient_accumulation_steps=1, layout="rows"),
        train_dataset=Dataset.from_list(token_pairs(2)),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
    )


def chosen_logps(model):
    """Eager, [2]."""
    with torch.no_grad():
        return torch.stack([answer_logp(model, r["prompt_ids"], r["chosen_ids"]) for r in token_pairs(2)])


def test_every_kind_of_pefts_is_here():
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} <= TRAINED.keys() | REFUSED_KINDS.keys()
    assert REFUSED_KINDS.keys() == NEEDED.keys()


@pytest.mark.filterwarnings("ignore")  # of peft's kinds some warn of what they are
@pytest.mark.parametrize("kind", TRAINED)
def test_a_kind_is_trained_against_its_start_and_saved(kind, tmp_path):
    if kind not in peft.PeftType.__members__:
        pytest.skip(f"peft {peft.__version__} has no {kind}")
    trainer = build(tmp_path, new_config(kind, TRAINED[kind]))
    before = chosen_logps(trainer.model.eval())
    trainer.train()
    trainer.save_model()
    after = chosen_logps(trainer.model.eval())
    assert (after - before).abs().max() > 1e-4  # it learned
    batch = trainer.data_collator(list(trainer.train_dataset))
    shared, chosen, _ = trainer.reference.segment_logps(batch, batch.model_inputs()).double().T
    bounds = {"rtol": 0, "atol": 1e-4}  # nats; sums of at most six fp32 log-probs of about -4
    torch.testing.assert_close(shared + chosen, before, **bounds)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "run").eval()
    torch.testing.assert_close(chosen_logps(loaded), after, **bounds)


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_a_kind_is_refused_by_name(kind, tmp_path):
    refused = new_config(kind, NEEDED[kind])
    with pytest.raises(ValueError, match=rf"peft_config: expected an adapter .*got {type(refused).__name__}: .*; use "):
        build(tmp_path, refused)
