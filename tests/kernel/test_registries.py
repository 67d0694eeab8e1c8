"""A loss or a backend that someone adds is seen everywhere, without a second place that knows its name."""

import importlib
import sys

import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.settings.arguments import parse_arguments
from dpop_trainer.training.metrics import loss_metrics, pair_metrics
from dpop_trainer.training.watch import ChosenWatch
from rounding import CONTRACT_NATS
from tiny import tiny_llama, token_pairs, word_tokenizer
from transformers import TrainerState

from dpop_kernels import linear_token_logps, needs_reference, pair_loss, token_logps
from dpop_kernels.backends import BACKENDS, Registration
from dpop_kernels.losses.formulas import LOSSES, TRL_NAMES, PairScores
from dpop_kernels.losses.options import LossOptions
from dpop_kernels.losses.pair_loss import pair_loss_terms
from dpop_kernels.losses.weights import has_penalty

# SLiC with DPOP's penalty, as a file of someone's own
OWN_LOSS = """
import torch
from dpop_kernels.losses.formulas import dpop_penalties, register_loss

def penalty(pair, options):
    return dpop_penalties(pair.chosen_logratios, options.dpop_lambda, options.dead_zone)

@register_loss("slic_positive", trl_name="hinge_positive", penalty=penalty)
def slic_positive(pair, options):
    return torch.relu(1 - options.beta * (pair.margins - penalty(pair, options)))
"""


# torch's backend, which counts what it is asked for, as a file of someone's own
OWN_BACKEND = """
from dpop_kernels.backends.chunked import *
from dpop_kernels.backends import chunked, chunked_tiles

RUNS_TRITON = False
asked = {"logits": 0, "tiles": 0, "sums": 0}

def token_logps(*args, **kwargs):
    asked["logits"] += 1
    return chunked.token_logps(*args, **kwargs)

def segment_sums(*args, **kwargs):
    asked["sums"] += 1
    return chunked.segment_sums(*args, **kwargs)

class TILES:
    tile_bounds, rows_forward = chunked_tiles.tile_bounds, chunked_tiles.rows_forward
    rows_backward, tile_backward = chunked_tiles.rows_backward, chunked_tiles.tile_backward

    def tile_forward(*args, **kwargs):
        asked["tiles"] += 1
        return chunked_tiles.tile_forward(*args, **kwargs)
"""


@pytest.fixture
def own_backend(tmp_path, monkeypatch):
    """Its name, and what it has been asked for."""
    (tmp_path / "own_backend.py").write_text(OWN_BACKEND)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(BACKENDS, "own", Registration("own_backend", lambda device, dtype: None))
    yield "own", importlib.import_module("own_backend").asked
    del sys.modules["own_backend"]


def test_a_backend_of_ones_own_is_used_wherever_it_is_named(own_backend, tmp_path):
    """By logits, by a head, by a loss on tokens and by a run; elsewhere by nobody."""
    name, asked = own_backend
    hidden_states, weight, target_ids = torch.randn(5, 8), torch.randn(11, 8), torch.tensor([0, 3, 10, 7, 3])
    expected = (hidden_states.double() @ weight.double().T).log_softmax(-1)[range(5), target_ids]
    by_logits = token_logps(hidden_states @ weight.T, target_ids, backend=name)
    by_head = linear_token_logps(hidden_states, weight, target_ids, backend=name)
    assert asked == {"logits": 1, "tiles": 1, "sums": 0}
    for logps in (by_logits, by_head):
        assert (logps - expected).abs().max() <= CONTRACT_NATS
    cu_seqlens, references = torch.tensor([0, 0, 2, 5]), torch.zeros(1, 3)
    losses = pair_loss(by_head, cu_seqlens, references, backend=name).losses
    assert asked["sums"] == 1
    torch.testing.assert_close(losses, pair_loss(by_head, cu_seqlens, references, backend="reference").losses)

    args = DPOPConfig(str(tmp_path), kernel_backend=name, max_steps=1, use_cpu=True, report_to="none")
    before = dict(asked)
    DPOPTrainer(
        tiny_llama(), None, args, train_dataset=Dataset.from_list(token_pairs(2)), processing_class=word_tokenizer()
    ).train()
    assert asked["tiles"] > before["tiles"]
    assert asked["sums"] > before["sums"]


@pytest.fixture
def own_loss(tmp_path, monkeypatch):
    (tmp_path / "own_loss.py").write_text(OWN_LOSS)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("own_loss")
    yield "slic_positive"
    del LOSSES["slic_positive"], TRL_NAMES["hinge_positive"], sys.modules["own_loss"]


def test_a_penalised_loss_of_ones_own_is_seen_by_pair_loss_and_metrics(own_loss):
    """Δw = -1 - (-0.5) = -0.5 and Δl = -4 - (-3) = -1: m = 0.5, p = 5 · 0.5 = 2.5, so 1 - 0.1 · (0.5 - 2.5) = 1.2."""
    arguments = torch.tensor([-1.0, -4.0]), torch.tensor([0, 0, 1, 2]), torch.tensor([[0.0, -0.5, -3.0]])
    options = LossOptions(beta=0.1, dpop_lambda=5.0)
    for backend in BACKENDS:
        pairs, terms = pair_loss_terms(*arguments, loss_weights={own_loss: 1.0}, options=options, backend=backend)
        assert pairs.losses.item() == pytest.approx(1.2)
        assert pairs.penalties.item() == pytest.approx(2.5)
        assert loss_metrics(terms, options)["dpop/lambda"][0].item() == 5.0
        assert pair_metrics(pairs, beta=0.1)["dpop/penalty"][0].item() == pytest.approx(0.25)
    by_trl_s_name = pair_loss(*arguments, loss_type="hinge_positive", beta=0.1, dpop_lambda=5.0)
    assert by_trl_s_name.losses.item() == pytest.approx(1.2)
    assert (has_penalty(own_loss), has_penalty("slic"), needs_reference(own_loss)) == (True, False, True)


def test_two_penalties_are_summed(own_loss):
    """What `penalties` says of a sum of losses: as above, once for each of the two."""
    arguments = torch.tensor([-1.0, -4.0]), torch.tensor([0, 0, 1, 2]), torch.tensor([[0.0, -0.5, -3.0]])
    pairs = pair_loss(*arguments, loss_type=[own_loss, "dpop", "dpo"], beta=0.1, dpop_lambda=5.0)
    assert pairs.penalties.item() == pytest.approx(5.0)


def test_the_watch_knows_that_a_loss_of_ones_own_penalises(own_loss, caplog):
    args, state = DPOPConfig(use_cpu=True, loss_type=own_loss), TrainerState()
    for loss_type, advice in ((own_loss, "Raise dpop_lambda (now 5)"), ("slic", "Use loss_type dpop")):
        watch = ChosenWatch(10.0, loss_types=[loss_type], dpop_lambda=5.0)
        watch.on_log(args, state, None, logs={"dpop/chosen_logratio": -20.0})
        assert advice in caplog.records[-1].getMessage()


def test_a_run_by_flags_logs_a_loss_of_ones_own(own_loss, tmp_path):
    """λ and the penalty, as for DPOP; and the term by its name beside another."""
    flags = ["--output_dir", str(tmp_path), "--loss_type", own_loss, "sft", "--dpop_lambda", "5", "--max_steps", "2"]
    flags += ["--use_cpu", "true", "--logging_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    args = parse_arguments(DPOPConfig, flags, "dpop train")[2]
    trainer = DPOPTrainer(
        model=tiny_llama(),
        ref_model=tiny_llama(seed=1),
        args=args,
        train_dataset=Dataset.from_list(token_pairs(4)),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["dpop/lambda"] == 5.0
    assert first["dpop/penalty"] > 0
    assert {f"loss/{own_loss}", "loss/sft"} <= set(first)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_a_loss_declares_is_what_its_formula_reads(loss_type):
    """A value it does not read may be NaN: its loss stays finite; one that it does read makes it NaN."""
    loss = LOSSES[loss_type]
    known = {name: torch.tensor([-2.0]) for name in PairScores._fields if not name.endswith("lengths")}
    known |= {name: torch.tensor([3.0]) for name in PairScores._fields if name.endswith("lengths")}
    options = LossOptions(label_smoothing=0.1)
    scores, logratios = ("chosen_scores", "rejected_scores", "margins"), ("chosen_logratios", "rejected_logratios")

    def reads(*names, options=options):
        pair = PairScores(**known | dict.fromkeys(names, torch.tensor([torch.nan])))
        return loss.formula(pair, options).isnan().item()

    assert not reads()
    assert reads("chosen_lengths", "rejected_lengths") == loss.reads_lengths
    assert reads(*scores, *logratios) == loss.needs_reference
    if loss.takes_divergence:
        assert reads(*scores)
        assert reads(*logratios) == (loss.penalty is not None)
    assert (not loss.formula(PairScores(**known), LossOptions()).isfinite().item()) == loss.needs_label_smoothing
    numbers = {name for name, usual in LossOptions._field_defaults.items() if isinstance(usual, float)}
    read = {name for name in numbers if reads(options=options._replace(**{name: torch.nan}))}
    assert read - {"beta"} == loss.reads & numbers - {"f_alpha_divergence_coef"}  # which scores are made with


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_is_of_the_batch_if_another_pair_changes_it(loss_type):
    """The loss of the first two of three pairs, with one third and with another."""
    random = torch.Generator().manual_seed(0)
    names = [name for name in PairScores._fields if not name.endswith("lengths")]
    values = {name: -torch.rand(3, generator=random) for name in names}
    values |= {name: torch.tensor([2.0, 3.0, 4.0]) for name in PairScores._fields if name.endswith("lengths")}
    other = {name: value * torch.tensor([1.0, 1.0, 7.0]) for name, value in values.items()}
    formula, options = LOSSES[loss_type].formula, LossOptions(label_smoothing=0.1)
    first, second = (formula(PairScores(**given), options)[:2] for given in (values, other))
    assert torch.equal(first, second) != LOSSES[loss_type].is_of_batch


def test_the_flag_for_a_backend_offers_the_registry():
    metadata = DPOPConfig.__dataclass_fields__["kernel_backend"].metadata
    assert metadata["choices"] == ["auto", *BACKENDS]
    assert ", ".join(BACKENDS) in metadata["help"]
