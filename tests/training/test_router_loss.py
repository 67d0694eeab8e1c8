"""The load-balancing loss of a mixture of experts: the model's own in rows, and the same in every other layout."""

import math

import pytest
import torch
from dpop_trainer.batches.collate import PairCollator
from dpop_trainer.batches.routers import RouterLoss, router_coefficient
from dpop_trainer.batches.scoring import ScoredModel, forward_inputs
from experts import EXPERT_FAMILIES, experts
from peft import LoraConfig
from rounding import sum_of
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import logged, trainer

from dpop_kernels import ScoringHead


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def collated(layout, prefix_sharing=True):
    collator = PairCollator(pad_token_id=0, layout=layout, prefix_sharing=prefix_sharing)
    pairs = token_pairs(4)
    pairs[1] = {**pairs[1], "prompt_ids": pairs[0]["prompt_ids"]}  # packed rows compute it once for both
    return collator([{**record, "pair_id": i} for i, record in enumerate(pairs)])


def with_gradients(model, layout, **options):
    """Our loss of a batch, and the gradients of the routers' weights and of the embedding."""
    batch = collated(layout, **options)
    head, router = ScoringHead(model), RouterLoss(model)
    with router.recording():
        ScoredModel(model, head).token_logps(batch, forward_inputs(batch, model))
    loss = router.take(batch)
    loss.backward()
    head.remove()
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_it_is_the_model_s_own_in_every_layout(family):
    model = experts(family)
    rows = collated("rows")
    own = model(**rows.model_inputs(), output_router_logits=True).aux_loss
    if not isinstance(own, torch.Tensor):  # some families' routers are not recorded by the oldest transformers
        with pytest.raises(ValueError, match="router_aux_loss_coef: expected a model that gives its routers' logits"):
            with_gradients(model, "rows")
        return
    assert own > 1  # 4 experts of which 2 are chosen: 2 where all are used alike, if it were
    own.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("gate" in name or "router" in name for name in expected)
    model.zero_grad()
    for layout, options in [("rows", {}), ("tree", {}), ("tree", {"prefix_sharing": False}), ("packed", {})]:
        loss, grads = with_gradients(model, layout, **options)
        # means over some 100 tokens and 2 layers of probabilities, in fp32
        assert loss.item() == pytest.approx(own.item(), abs=sum_of(200, 1)), layout
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=f"{layout}: {name}")


@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_it_is_added_with_its_weight_and_logged(tmp_path, tokenizer, layout):
    """Five pairs in micro-batches of three and two, and nothing learnt: DPO's loss is log 2."""
    run = trainer(tmp_path, tokenizer, experts(output_router_logits=True), layout=layout, loss_type="dpo", max_steps=1)
    assert run.router_aux_loss_coef == 0.25  # the model's own
    run.train()
    (loss,), (aux_loss,) = logged(run, "loss"), logged(run, "aux_loss")
    assert loss == pytest.approx(math.log(2) + 0.25 * aux_loss, rel=1e-6)
    evaluated = run.evaluate(run.train_dataset)
    rows = PairCollator(pad_token_id=0)([{**record, "pair_id": i} for i, record in enumerate(token_pairs())])
    own = run.model(**rows.model_inputs(), output_router_logits=True).aux_loss
    assert evaluated["eval_aux_loss"] == pytest.approx(own.item(), abs=sum_of(250, 1))


def test_it_is_left_out_where_it_weighs_nothing(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, experts(), router_aux_loss_coef=0.0, loss_type="dpo", max_steps=1)
    run.train()
    assert logged(run, "loss") == pytest.approx([math.log(2)], rel=1e-6)
    assert not logged(run, "aux_loss")


def test_it_reaches_an_adapter_and_leaves_the_reference_alone(tmp_path, tokenizer):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    run = trainer(
        tmp_path, tokenizer, experts(), peft_config=lora, router_aux_loss_coef=2.0, gradient_checkpointing=True
    )
    run.train()
    assert len(logged(run, "aux_loss")) == 6
    assert logged(run, "dpop/step_0_max_logratio") == [0.0]


def test_models_without_it(tmp_path, tokenizer):
    assert router_coefficient(tiny_llama(), None) == router_coefficient(tiny_llama(), 0.0) == 0.0
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected None or 0 with LlamaForCausalLM, which is no"):
        trainer(tmp_path, tokenizer, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected None or a finite number >= 0, got -1"):
        trainer(tmp_path, tokenizer, router_aux_loss_coef=-1.0)


def test_a_collator_that_shares_tokens_has_to_count_them():
    batch = collated("tree")
    del batch["num_sequences"]
    model = experts()
    router = RouterLoss(model)
    with router.recording():
        model(batch.input_ids, use_cache=False)
    with pytest.raises(ValueError, match="data_collator: expected num_sequences beside trie_ends"):
        router.take(batch)
