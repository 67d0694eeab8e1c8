"""Every loss of the registry: against TRL's own code, by hand, by fp64 differences; weights, names, smoothing, tie."""

import doctest
import math
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends import IN_FP64, ON_CPU
from loss_pairs import batch_of, bounds, log_odds, nll, one_pair, read_by, sigmoid

import dpop_kernels.losses.formulas
from dpop_kernels import dpo_loss, dpop_loss, needs_reference, pair_loss
from dpop_kernels.losses.formulas import LOSSES, TRL_NAMES, PairScores, register_loss
from dpop_kernels.losses.options import LossOptions
from dpop_kernels.losses.pair_loss import pair_loss_terms, segment_sums
from dpop_kernels.losses.weights import losses_of_batch, resolve_losses

DOCUMENT = Path(__file__).parents[2] / "docs" / "losses.md"
SMOOTHED = {"exo_pair": 0.1, "robust": 0.1, "aot": 0.1}
BY_PAIR = [name for name, loss in LOSSES.items() if not loss.is_of_batch]

# TRL's name -> ours, where the two are the same function of the pair
TRL_LOSSES = {
    "sigmoid": "dpo",
    "hinge": "slic",
    "ipo": "ipo_norm",
    "sigmoid_norm": "dpo_norm",
    **{
        name: name
        for name in ("exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
    },
    **{name: name for name in ("aot", "aot_unpaired")},
}


class Pairs:
    """Whole answers of ragged lengths, fp64: packed for us, padded for TRL."""

    def __init__(self, chosen_lengths, rejected_lengths):
        generator = torch.Generator().manual_seed(3)
        self.lengths = [*chosen_lengths, *rejected_lengths]  # TRL's rows: chosen first
        self.num_pairs, self.longest = len(chosen_lengths), max(self.lengths)
        self.rows = [-torch.rand(n, dtype=torch.float64, generator=generator) * 2 for n in self.lengths]
        noise = torch.randn(len(self.rows), dtype=torch.float64, generator=generator)
        self.ref = torch.stack([row.sum() for row in self.rows]) + noise

    def packed(self):
        """token_logps (a leaf), cu_seqlens, ref_segment_logps, without shared tokens."""
        order = [row for pair in range(self.num_pairs) for row in (pair, self.num_pairs + pair)]
        token_logps = torch.cat([self.rows[row] for row in order]).requires_grad_()
        lengths = [n for pair in range(self.num_pairs) for n in (0, *(self.lengths[r] for r in order[2 * pair :][:2]))]
        ref = torch.stack([torch.zeros(self.num_pairs), *self.ref.chunk(2)], dim=1).double()
        return token_logps, torch.tensor([0, *lengths]).cumsum(0), ref

    def padded(self):
        """Log-probs [2B, T - 1] (a leaf), zero off the answers, and completion_mask [2B, T] after two prompt tokens."""
        log_probs = torch.zeros(len(self.rows), self.longest + 1, dtype=torch.float64)
        mask = torch.zeros(len(self.rows), self.longest + 2, dtype=torch.long)
        for i, row in enumerate(self.rows):
            log_probs[i, 1 : 1 + len(row)] = row
            mask[i, 2 : 2 + len(row)] = 1
        return log_probs.requires_grad_(), mask


def trl_loss(pairs, loss_types, loss_weights, **options):
    """The loss of TRL's DPOTrainer and its gradient per pair and token, from its own method on a model that answers
    with the given log-probs."""
    from trl.trainer.dpo_trainer import DPOTrainer

    log_probs, mask = pairs.padded()
    zeros = torch.zeros_like(log_probs).detach()
    answer = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def unchanged(tensor):
        return tensor

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=unchanged, gather_for_metrics=unchanged),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05)),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        use_weighting=False,
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        loss_types=loss_types,
        loss_weights=loss_weights,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    ref_chosen_logps, ref_rejected_logps = pairs.ref.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: answer, inputs, False)
    (grad,) = torch.autograd.grad(loss, log_probs)
    of_rows = [grad[i, 1 : 1 + n] for i, n in enumerate(pairs.lengths)]
    order = [row for pair in range(pairs.num_pairs) for row in (pair, pairs.num_pairs + pair)]
    return loss, torch.cat([of_rows[row] for row in order])


def our_loss(pairs, loss_types, loss_weights, **options):
    token_logps, cu_seqlens, ref = pairs.packed()
    losses = pair_loss(token_logps, cu_seqlens, ref, loss_type=loss_types, loss_weights=loss_weights, **options).losses
    (grad,) = torch.autograd.grad(losses.mean(), token_logps)
    return losses.mean(), grad


@pytest.mark.parametrize("trl_name", TRL_LOSSES)
def test_equals_trls_own_code(trl_name):
    pairs = Pairs([3, 5, 2, 7], [4, 1, 6, 5])
    options = read_by(TRL_LOSSES[trl_name], beta=0.4, discopop_tau=0.7)
    if trl_name in SMOOTHED:
        options["label_smoothing"] = SMOOTHED[trl_name]
    theirs, their_grad = trl_loss(pairs, [trl_name], [1.0], **options)
    ours, our_grad = our_loss(pairs, [TRL_LOSSES[trl_name]], [1.0], **options)
    assert float(our_grad.abs().min()) > 0
    # TRL holds ε of exo_pair in fp32
    tolerance = 1e-7 if trl_name == "exo_pair" else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(our_grad, their_grad, rtol=tolerance, atol=tolerance)


TAKERS = {trl_name: ours for trl_name, ours in TRL_LOSSES.items() if LOSSES[ours].takes_divergence}


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])  # TRL's alpha refuses fp64: see ten steps below
@pytest.mark.parametrize("trl_name", TAKERS)
def test_divergences_equal_trls_own_code(trl_name, divergence):
    pairs = Pairs([3, 5, 2, 7], [4, 1, 6, 5])
    options = {"beta": 0.4, "f_divergence_type": divergence}
    if trl_name in SMOOTHED:
        options["label_smoothing"] = SMOOTHED[trl_name]
    theirs, their_grad = trl_loss(pairs, [trl_name], [1.0], **options)
    ours, our_grad = our_loss(pairs, [TAKERS[trl_name]], [1.0], **options)
    tolerance = 1e-7 if trl_name == "exo_pair" else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(our_grad, their_grad, rtol=tolerance, atol=tolerance)


def test_a_divergence_is_taken_by_trls_losses_and_kin_alone():
    """TRL 1.16 lists those of TAKERS, and its sft, which reads none."""
    assert set(TAKERS) == {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
    takers = {name for name, loss in LOSSES.items() if loss.takes_divergence}
    assert takers - set(TAKERS.values()) == {"dpop", "dpop_norm", "ipo", "rdpo", "beta_dpo"}
    pairs = pair_loss(*one_pair(1.0, 0.0), loss_type=["dpo", "sft"], f_divergence_type="forward_kl")
    assert pairs.losses.item() == pytest.approx(nll(0.3 * (1 - math.exp(-1))) + 3.0, rel=1e-12)


@pytest.mark.parametrize("loss_type", ["simpo", "cpo", "orpo"])
def test_losses_without_a_reference_equal_trls_own_code(loss_type, monkeypatch):
    """Of its CPO and ORPO trainers, whose likelihood terms are means over a batch's tokens: here over each answer's."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    pairs = Pairs([3, 5, 2, 7], [4, 1, 6, 5])
    sums = torch.stack([row.sum() for row in pairs.rows])
    means = sums / torch.tensor(pairs.lengths)
    chosen_means, rejected_means = means.chunk(2)
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    cpo = {"alpha": 0.0, "simpo_gamma": 1.0, "label_smoothing": 0.1, "beta": 2.0, "accelerator": accelerator}
    if loss_type == "simpo":
        expected = CPOTrainer.cpo_loss(SimpleNamespace(**cpo, loss_type="simpo"), chosen_means, rejected_means)[0]
    elif loss_type == "cpo":
        expected = CPOTrainer.cpo_loss(SimpleNamespace(**cpo, loss_type="sigmoid"), *sums.chunk(2))[0]
        expected = expected - 0.5 * chosen_means
    else:
        trainer = SimpleNamespace(beta=2.0, accelerator=accelerator)
        expected = -ORPOTrainer.odds_ratio_loss(trainer, chosen_means, rejected_means)[0] - chosen_means
    options = read_by(loss_type, beta=2.0, simpo_gamma=1.0, cpo_alpha=0.5, label_smoothing=0.1)
    token_logps, cu_seqlens, _ = pairs.packed()
    losses = pair_loss(token_logps, cu_seqlens, None, loss_type=loss_type, **options).losses
    tolerance = 1e-6 if loss_type == "orpo" else 1e-12  # TRL's odds are in fp32
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)


def test_names_that_both_have_mean_the_same_but_for_ipo():
    for trl_name, ours in TRL_LOSSES.items():
        if trl_name != "ipo":
            assert list(resolve_losses(trl_name)) == [ours]
    assert set(TRL_NAMES) == {"sigmoid", "sigmoid_norm", "hinge"}


def test_sft_equals_trls_where_the_chosen_answers_are_as_long():
    options = {"beta": 0.4}
    pairs = Pairs([5, 5, 5], [4, 1, 6])
    theirs, their_grad = trl_loss(pairs, ["sigmoid", "sft"], [1.0, 0.1], **options)
    ours, our_grad = our_loss(pairs, ["dpo", "sft"], [1.0, 0.1], **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-12, atol=1e-15)


def test_sft_is_each_answers_mean():
    token_logps = torch.tensor([-1.0, -2.0, -3.0, -9.0, -6.0, -9.0], dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 3, 4, 4, 5, 6])  # pair 1: shared 2, chosen 1; pair 2: chosen 1
    losses = pair_loss(token_logps, cu_seqlens, None, loss_type="sft").losses
    assert losses.tolist() == [2.0, 6.0]
    losses.sum().backward()
    assert token_logps.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 0, -1, 0])


@pytest.mark.parametrize("backend", IN_FP64)
@pytest.mark.parametrize(
    "loss_type", [name for name in LOSSES if name != "beta_dpo"]
)  # whose β is no part of the slope
def test_gradcheck(backend, loss_type):
    generator = torch.Generator().manual_seed(5)
    token_logps = -torch.rand(16, dtype=torch.float64, generator=generator).requires_grad_()
    # the first token and the last belong to no segment
    cu_seqlens = 1 + torch.tensor([0, 2, 3, 4, 1, 0, 4]).cumsum(0)
    ref = -torch.rand(2, 3, dtype=torch.float64, generator=generator) * 3
    options = read_by(loss_type, beta=0.7, dpop_lambda=3.0, dead_zone=0.05, label_smoothing=0.2)

    def function(token_logps):
        return pair_loss(token_logps, cu_seqlens, ref, loss_type=loss_type, backend=backend, **options).losses

    assert torch.autograd.gradcheck(function, token_logps)


def slopes(pair, beta, noise, temperature, penalty_slope, penalty):
    """d loss / d Δw and d loss / d Δl of every loss, as docs/losses.md derives them."""
    dw, dl, lw, ll = pair.chosen_logratios, pair.rejected_logratios, pair.chosen_lengths, pair.rejected_lengths
    s = torch.sigmoid
    m, m_norm, target, z = dw - dl, dw / lw - dl / ll, 1 / (2 * beta), beta * (dw - dl)
    z_dpop, z_norm, rw, rl = beta * (m - penalty), beta * m_norm, beta * dw, beta * dl
    z_dpop_norm, z_rdpo = beta * (m_norm - penalty / lw), z + 0.1 * (lw - ll)
    aw, al = pair.chosen_logps / lw, pair.rejected_logps / ll
    z_simpo, odds = beta * (aw - al) - 0.5, (aw.exp() / (1 - aw.exp())) / (al.exp() / (1 - al.exp()))

    def bell(x):
        return s(x) * s(-x)

    def opposite(slope):
        return slope, -slope

    logit, share, exp = math.log((1 - noise) / noise), s(z / temperature), torch.exp(-z)
    nlls = torch.log1p(exp)
    blend = (1 - share) * s(-z) + share * exp + share * (1 - share) * (nlls - exp) / temperature
    return {
        "dpop": (-beta * s(-z_dpop) * (1 + penalty_slope), beta * s(-z_dpop)),
        "dpop_norm": (-beta * s(-z_dpop_norm) * (1 + penalty_slope) / lw, beta * s(-z_dpop_norm) / ll),
        "dpo": opposite(-beta * s(-z)),
        "dpo_norm": (-beta * s(-z_norm) / lw, beta * s(-z_norm) / ll),
        "ipo": opposite(2 * (m - target)),
        "ipo_norm": (2 * (m_norm - target) / lw, -2 * (m_norm - target) / ll),
        "slic": opposite(-beta * (z < 1).double()),
        "rdpo": opposite(-beta * s(-z_rdpo)),
        "robust": opposite(-beta * (s(-z) + noise / (1 - 2 * noise))),
        "exo_pair": opposite(beta * bell(z) * (z - logit)),
        "nca_pair": (beta * (s(rw) / 2 - s(-rw)), beta * s(rl) / 2),
        "bco_pair": (-beta * s(-rw), beta * s(rl)),
        "sppo_hard": (2 * (dw - target), 2 * (dl + target)),
        "apo_zero": (-beta * bell(rw), beta * bell(rl)),
        "apo_down": (beta * (bell(rw) - bell(z)), beta * bell(z)),
        "discopop": opposite(-beta * blend),
        "simpo": (-beta * s(-z_simpo) / lw, beta * s(-z_simpo) / ll),
        "cpo": (-beta * s(-z) - 0.5 / lw, beta * s(-z)),
        "orpo": (
            -beta / (1 + odds) / (1 - aw.exp()) / lw - 1 / lw,
            beta / (1 + odds) / (1 - al.exp()) / ll,
        ),
        "sft": (-1 / lw, torch.zeros_like(dl)),
    }


@pytest.mark.parametrize("loss_type", BY_PAIR)
def test_slopes_are_the_documented_ones(loss_type):
    noise = 0.2 if loss_type in SMOOTHED else 0.0
    options = LossOptions(0.7, 3.0, 0.1, noise, discopop_tau=0.5, rdpo_alpha=0.1, cpo_alpha=0.5)
    dw, dl = torch.randn(2, 9, dtype=torch.float64).mul_(2).requires_grad_().unbind(0)
    lengths = torch.randint(1, 9, (2, 9)).double()
    # log-probs are the log-ratios here, but for a constant, the reference's
    pair = PairScores(dw - 20, dl - 20, dw - dl, dw, dl, dw, dl, dw - dl, *lengths)
    ours = torch.autograd.grad(LOSSES[loss_type].formula(pair, options).sum(), [dw, dl], materialize_grads=True)
    excess = torch.relu(-dw - 0.1)
    assert 0 < int((excess > 0).sum()) < 9
    documented = slopes(pair, 0.7, 0.2, 0.5, penalty_slope=3.0 * (excess > 0), penalty=3.0 * excess)
    assert loss_type in documented, f"{loss_type}: derive its slopes, for docs/losses.md and for `slopes` above"
    for slope, derived in zip(ours, documented[loss_type], strict=True):
        torch.testing.assert_close(slope, derived.detach(), rtol=1e-12, atol=1e-15)


BY_HAND = {
    # Δw = -1, Δl = -2, so m = 1; β = 0.5; one token each; log π(y_w) = -3
    "dpo": nll(0.5),
    "dpop": nll(0.5 * (1 - 4)),  # λ = 4
    "dpo_norm": nll(0.5),
    "ipo": 0.0,  # 1 / (2β) is the margin
    "ipo_norm": 0.0,
    "slic": 0.5,
    "nca_pair": nll(-0.5) + (nll(0.5) + nll(1.0)) / 2,
    "bco_pair": nll(-0.5) + nll(1.0),
    "sppo_hard": 4.0 + 1.0,
    "apo_zero": sigmoid(0.5) + sigmoid(-1.0),
    "apo_down": sigmoid(-0.5) + sigmoid(-0.5),
    "discopop": sigmoid(-10) * nll(0.5) + sigmoid(10) * math.exp(-0.5),  # τ = 0.05
    "dpop_norm": nll(0.5 * (1 - 4)),
    "rdpo": nll(0.5),  # answers of one length
    "simpo": nll(0.5 * (-3 + 4) - 0.5),  # γ = 0.5
    "cpo": nll(0.5 * (-3 + 4)) + 0.5 * 3,  # α = 0.5
    "orpo": 0.5 * nll(log_odds(-3) - log_odds(-4)) + 3,
    "sft": 3.0,
    "aot": nll(0.5),  # of one pair alone
    "aot_unpaired": nll(0.5),
    "beta_dpo": nll(0.5 * (1 + 0.6 * (1 - 0.5))),  # M₀ = 0.5
}
SMOOTHED_BY_HAND = {
    "dpo": 0.9 * nll(0.5) + 0.1 * nll(-0.5),
    "dpop": 0.9 * nll(-1.5) + 0.1 * nll(-2.5),  # β (m - p) = 0.5 · (1 - 4), β (-m - p) = 0.5 · (-1 - 4)
    "dpop_norm": 0.9 * nll(-1.5) + 0.1 * nll(-2.5),
    "simpo": 0.9 * nll(0) + 0.1 * nll(0),  # β · (-3 + 4) - γ
    "cpo": 0.9 * nll(0.5) + 0.1 * nll(-0.5) + 3,
    "aot": 0.9 * nll(0.5) + 0.1 * nll(-0.5),
    "aot_unpaired": 0.9 * nll(0.5) + 0.1 * nll(-0.5),
    "robust": (0.9 * nll(0.5) - 0.1 * nll(-0.5)) / 0.8,
    "exo_pair": sigmoid(0.5) * math.log(sigmoid(0.5) / 0.9) + sigmoid(-0.5) * math.log(sigmoid(-0.5) / 0.1),
}


@pytest.mark.parametrize(("loss_type", "expected"), BY_HAND.items())
def test_by_hand(loss_type, expected):
    options = read_by(loss_type, beta=0.5, dpop_lambda=4.0, rdpo_alpha=0.25, cpo_alpha=0.5, beta_dpo_threshold=0.5)
    losses = pair_loss(*one_pair(-1.0, -2.0), loss_type=loss_type, **options).losses
    assert losses.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("loss_type", "expected"), SMOOTHED_BY_HAND.items())
def test_smoothed_by_hand(loss_type, expected):
    options = read_by(loss_type, beta=0.5, dpop_lambda=4.0, label_smoothing=0.1)
    losses = pair_loss(*one_pair(-1.0, -2.0), loss_type=loss_type, **options).losses
    assert losses.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_has_a_value_by_hand(loss_type):
    assert loss_type in BY_HAND | SMOOTHED_BY_HAND, f"{loss_type}: derive its loss of `one_pair`, and add it to BY_HAND"


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    {
        # Δw = 0.5, Δl = -1, so m = 1.5; β = 2; log π is -1 over one token and -6 over two
        "simpo": nll(2 * (-1 + 3) - 1),  # γ = 1
        "cpo": nll(2 * (-1 + 6)) + 0.5 * 1,  # α = 0.5
        "orpo": 2 * nll(log_odds(-1) - log_odds(-3)) + 1,
        "rdpo": nll(2 * 1.5 + 0.25 * (1 - 2)),  # α = 0.25
        "dpo_norm": nll(2 * (0.5 + 0.5)),
    }.items(),
)
def test_of_unequal_lengths_by_hand(loss_type, expected):
    token_logps, cu_seqlens = torch.tensor([-1.0, -4.0, -2.0], dtype=torch.float64), torch.tensor([0, 0, 1, 3])
    ref = torch.tensor([[0.0, -1.5, -5.0]], dtype=torch.float64)
    options = read_by(loss_type, beta=2.0, simpo_gamma=1.0, cpo_alpha=0.5, rdpo_alpha=0.25)
    losses = pair_loss(token_logps, cu_seqlens, ref, loss_type=loss_type, **options).losses
    assert losses.item() == pytest.approx(expected, rel=1e-12)


def test_dpop_norm_s_penalty_is_per_token_too():
    """Δw = -1 over two tokens, Δl = -2 over one, τ = 0.5: m' = -0.5 + 2 and p = 4 · 0.5 nats, so 1 a token."""
    token_logps, cu_seqlens = torch.tensor([-1.0, -4.0, -2.0], dtype=torch.float64), torch.tensor([0, 0, 2, 3])
    ref = torch.tensor([[0.0, -4.0, 0.0]], dtype=torch.float64)
    options = {"beta": 0.5, "dpop_lambda": 4.0, "dead_zone": 0.5}
    pairs = pair_loss(token_logps, cu_seqlens, ref, loss_type="dpop_norm", **options)
    assert pairs.losses.item() == pytest.approx(nll(0.5 * (1.5 - 1)), rel=1e-12)
    assert pairs.penalties.item() == 1.0


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
@pytest.mark.parametrize("margin", [-300.0, 300.0])
def test_far_margins_are_finite_in_fp32(loss_type, margin):
    """z = ±150 at β = 0.5: past where exp overflows fp32."""
    token_logps, *rest = one_pair(margin / 2, -margin / 2, dtype=torch.float32)
    options = read_by(loss_type, beta=0.5, label_smoothing=0.1)
    losses = pair_loss(token_logps, *rest, loss_type=loss_type, **options).losses
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(token_logps.grad).all()


@pytest.mark.parametrize("chosen_logratio", [-0.01, -0.5, -3.0])
@pytest.mark.parametrize("rejected_logratio", [-200.0, -1.0, 5.0])
def test_smoothed_dpop_never_gains_by_lowering_the_chosen_answer(chosen_logratio, rejected_logratio):
    """Below the reference the slope is -β ((1-ε) σ(-z) (1 + λ) + ε σ(-z') (λ - 1)), negative for every λ ≥ 1. With the
    penalty's sign turned too, as in -ε log σ(-z), it would be positive at Δl = -200."""
    beta, dpop_lambda, noise = 0.3, 50.0, 0.1
    token_logps, *rest = one_pair(chosen_logratio, rejected_logratio)
    options = {"beta": beta, "dpop_lambda": dpop_lambda, "label_smoothing": noise}
    pair_loss(token_logps, *rest, **options).losses.sum().backward()
    margin, penalty = chosen_logratio - rejected_logratio, dpop_lambda * -chosen_logratio
    pull = (1 - noise) * sigmoid(-beta * (margin - penalty))
    flipped_pull = noise * sigmoid(-beta * (-margin - penalty))
    expected = -beta * (pull * (1 + dpop_lambda) + flipped_pull * (dpop_lambda - 1))
    assert token_logps.grad[0].item() == pytest.approx(expected, rel=1e-9)
    assert token_logps.grad[0] < 0
    assert token_logps.grad[1].item() == pytest.approx(beta * (pull - flipped_pull), rel=1e-9)


def test_smoothed_dpop_without_penalty_is_smoothed_dpo_bit_for_bit():
    arguments = [torch.randn(99).mul_(9).requires_grad_() for _ in range(4)]
    dpop = dpop_loss(*arguments, dpop_lambda=0.0, label_smoothing=0.2)
    dpo = dpo_loss(*arguments, label_smoothing=0.2)
    assert torch.equal(dpop, dpo)
    for ours, theirs in zip(torch.autograd.grad(dpop, arguments), torch.autograd.grad(dpo, arguments), strict=True):
        assert torch.equal(ours, theirs)


def test_smoothed_dpo_is_least_where_the_model_is_as_sure_as_the_labels():
    """σ(z) = 1 - ε there: ε = 0.2 and z = log 4."""
    chosen, zero = torch.tensor([math.log(4) / 0.5], dtype=torch.float64, requires_grad=True), torch.zeros(1).double()
    dpo_loss(chosen, zero, zero, zero, beta=0.5, label_smoothing=0.2).backward()
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_robust_is_unbiased():
    """Over labels wrong with probability ε its mean is DPO's clean loss: (1-ε) R(z) + ε R(-z) = ℓ(z)."""
    right = pair_loss(*one_pair(1.5, -0.5), loss_type="robust", label_smoothing=0.3).losses.item()
    wrong = pair_loss(*one_pair(-0.5, 1.5), loss_type="robust", label_smoothing=0.3).losses.item()
    expected = pair_loss(*one_pair(1.5, -0.5), loss_type="dpo").losses.item()
    assert 0.7 * right + 0.3 * wrong == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("noise", [1e-7, -1e-7])
def test_dead_zone_keeps_rounding_from_deciding_the_first_gradient(backend, noise):
    token_logps = torch.tensor([-1e-4, -2e-4, -1.0], dtype=torch.float32, requires_grad=True)
    cu_seqlens = torch.tensor([0, 1, 2, 3])
    ref = token_logps.detach().clone().view(1, 3)
    ref[0, 1] += noise  # the reference's sums, rounded another way

    def gradient(**options):
        out = pair_loss(token_logps, cu_seqlens, ref, beta=0.3, dpop_lambda=50.0, backend=backend, **options)
        assert 0.5 * abs(noise) < abs(out.chosen_logratios.item()) < 2 * abs(noise)
        (grad,) = torch.autograd.grad(out.losses.sum(), token_logps)
        return grad

    dpo = gradient(loss_type="dpo")
    assert torch.equal(gradient(dead_zone=0.01), dpo)
    without = gradient()
    if noise > 0:  # the chosen answer seems to have lost 1e-7 nat
        torch.testing.assert_close(without[1], 51 * dpo[1], rtol=1e-4, atol=0)
    else:
        assert torch.equal(without, dpo)


@pytest.mark.parametrize(("chosen_logratio", "is_penalised"), [(-0.75, True), (-0.5, False), (-0.25, False)])
def test_penalty_begins_below_the_dead_zone_with_slope_zero_at_its_edge(chosen_logratio, is_penalised):
    token_logps, *rest = one_pair(chosen_logratio, 0.0)
    out = pair_loss(token_logps, *rest, beta=0.5, dpop_lambda=8.0, dead_zone=0.5)
    out.losses.sum().backward()
    penalty = 8 * 0.25 if is_penalised else 0.0
    z = 0.5 * (chosen_logratio - penalty)
    assert out.penalties.item() == penalty
    assert out.losses.item() == pytest.approx(nll(z), rel=1e-12)
    assert token_logps.grad[0].item() == pytest.approx(-0.5 * sigmoid(-z) * (9 if is_penalised else 1), rel=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
def test_weighted_sum_is_linear_in_its_terms(backend):
    token_logps, lengths, ref = batch_of(6, torch.Generator().manual_seed(1))
    dtype = torch.float64 if backend in IN_FP64 else torch.float32
    leaf = token_logps.to(dtype).requires_grad_()
    names, weights = ["dpop", "ipo_norm", "sft"], [0.8, 2.0, 0.25]

    def run(loss_type, loss_weights=None):
        options = {"loss_type": loss_type, "loss_weights": loss_weights, "backend": backend}
        losses = pair_loss(leaf, bounds(lengths), ref, **options).losses
        return losses, torch.autograd.grad(losses.sum(), leaf)[0]

    total, grad = run(names, weights)
    parts = [run(name) for name in names]
    torch.testing.assert_close(total, sum(w * losses for w, (losses, _) in zip(weights, parts, strict=True)))
    torch.testing.assert_close(grad, sum(w * part for w, (_, part) in zip(weights, parts, strict=True)))
    torch.testing.assert_close(run("dpop", [0.5])[1], 0.5 * parts[0][1])


def test_terms_are_each_loss_by_itself():
    token_logps, lengths, ref = batch_of(4, torch.Generator().manual_seed(2))
    token_logps.requires_grad_()
    options = LossOptions(beta=0.3, dpop_lambda=5.0)
    pairs, terms = pair_loss_terms(
        token_logps, bounds(lengths), ref, loss_weights={"dpop": 1.0, "sft": 0.1, "ipo": 0.0}, options=options
    )
    assert list(terms) == ["dpop", "sft", "ipo"]
    for name, losses in terms.items():
        alone = pair_loss(
            token_logps, bounds(lengths), ref, loss_type=name, **read_by(name, beta=0.3, dpop_lambda=5.0)
        ).losses
        torch.testing.assert_close(losses, alone.detach())
        assert not losses.requires_grad
    torch.testing.assert_close(pairs.losses, terms["dpop"] + 0.1 * terms["sft"])
    assert (pairs.penalties > 0).any()


def test_a_loss_of_weight_zero_may_be_infinite():
    token_logps = torch.tensor([-1.0, -math.inf], dtype=torch.float64, requires_grad=True)
    losses = pair_loss(
        token_logps, torch.tensor([0, 0, 1, 2]), torch.zeros(1, 3), loss_type=["sft", "ipo"], loss_weights=[1, 0]
    ).losses
    losses.sum().backward()
    assert losses.tolist() == [1.0]
    assert token_logps.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("loss_type", BY_PAIR)
def test_gradient_is_the_same_whatever_the_micro_batches(loss_type):
    """Four pairs at once or in two halves of unequal tokens: sums over pairs, divided by the four."""
    token_logps, lengths, ref = batch_of(4, torch.Generator().manual_seed(4))
    options = {"loss_type": loss_type, **read_by(loss_type, label_smoothing=0.1)}
    leaf = token_logps.clone().requires_grad_()
    (pair_loss(leaf, bounds(lengths), ref, **options).losses.sum() / 4).backward()
    halves = token_logps.clone().requires_grad_()
    cut = int(lengths[:6].sum())
    assert cut != int(lengths[6:].sum())
    first, second = halves[:cut], halves[cut:]
    for part, of_lengths, of_ref in ((first, lengths[:6], ref[:2]), (second, lengths[6:], ref[2:])):
        (pair_loss(part, bounds(of_lengths), of_ref, **options).losses.sum() / 4).backward()
    torch.testing.assert_close(leaf.grad, halves.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss_type", [name for name, loss in LOSSES.items() if not loss.needs_reference])
def test_losses_without_reference_do_not_see_it(loss_type):
    token_logps, lengths, ref = batch_of(3, torch.Generator().manual_seed(6))
    with_reference = pair_loss(token_logps, bounds(lengths), ref, loss_type=loss_type).losses
    without = pair_loss(token_logps, bounds(lengths), None, loss_type=loss_type)
    assert torch.equal(with_reference, without.losses)
    sums = segment_sums(token_logps, bounds(lengths)).view(-1, 3)
    torch.testing.assert_close(without.chosen_logratios, sums[:, 0] + sums[:, 1])


@pytest.mark.parametrize("loss_type", [name for name, loss in LOSSES.items() if loss.needs_reference])
def test_losses_with_reference_refuse_none_and_depend_on_it(loss_type):
    assert needs_reference(loss_type)
    assert needs_reference(["sft", loss_type])
    token_logps, lengths, ref = batch_of(3, torch.Generator().manual_seed(6))
    options = {"loss_type": ["sft", loss_type], "label_smoothing": SMOOTHED.get(loss_type, 0.0)}
    with pytest.raises(ValueError, match=r"ref_segment_logps: expected shape \[B, 3\], got None. .* need a reference"):
        pair_loss(token_logps, bounds(lengths), None, **options)
    other = ref + torch.tensor([0.0, 1.0, -1.0])
    losses = [pair_loss(token_logps, bounds(lengths), given, **options).losses for given in (ref, other)]
    assert not torch.equal(*losses)


def test_what_needs_no_reference_and_what_is_of_a_batch():
    assert {name for name in LOSSES if not needs_reference(name)} == {"simpo", "cpo", "orpo", "sft"}
    assert not needs_reference(["sft", "simpo"])
    assert losses_of_batch(["aot", "dpo", "beta_dpo"]) == ["aot", "beta_dpo"]
    assert set(losses_of_batch(list(LOSSES))) == {"aot", "aot_unpaired", "beta_dpo"}


def test_a_loss_is_one_function():
    @register_loss("test_only", trl_name="test_alias")
    def squared_margin(pair, options):
        return (options.beta * pair.margins).square()

    try:
        assert pair_loss(*one_pair(-1.0, -3.0), loss_type="test_alias", beta=0.5).losses.item() == pytest.approx(1.0)
        with pytest.raises(ValueError, match="name: expected a name that no loss has, got 'test_only'"):
            register_loss("test_only")(squared_margin)
        with pytest.raises(ValueError, match=r"reads: expected fields of LossOptions, got \['gama'\]"):
            register_loss("test_too", reads=["gama"])
    finally:
        del LOSSES["test_only"], TRL_NAMES["test_alias"]


def test_the_documents_examples():
    """The docstring's, and docs/losses.md's by hand: m = 1.5 and β = 0.5, so (1 - 0.75)²."""
    assert doctest.testmod(dpop_kernels.losses.formulas).attempted > 0
    assert doctest.testmod(dpop_kernels.losses.formulas).failed == 0
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "@register_loss" in block]
    try:
        exec(block, {})
        losses = pair_loss(*one_pair(0.5, -1.0), loss_type="squared_hinge", beta=0.5).losses
        assert losses.item() == pytest.approx(0.25**2, rel=1e-12)
    finally:
        LOSSES.pop("squared_hinge", None)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_is_documented(loss_type):
    table, _, rest = DOCUMENT.read_text().partition("## Which for what")
    assert re.search(rf"^\| `{loss_type}` \|", table, re.MULTILINE), f"{loss_type}: add its row to docs/losses.md"
    choice = rest.partition("\n## ")[0]
    assert f"`{loss_type}`" in choice, f"{loss_type}: say under 'Which for what' of docs/losses.md when to take it"
    lines = dpop_kernels.losses.formulas.__doc__ or ""
    assert f"    {loss_type} " in lines, f"{loss_type}: add its line to the docstring of losses/formulas.py"


def test_no_loss_is_documented_that_is_not():
    table = DOCUMENT.read_text().partition("## Which for what")[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == set(LOSSES)


def test_names_and_weights_are_resolved():
    assert resolve_losses("dpop") == {"dpop": 1.0}
    assert list(resolve_losses(["sigmoid", "sft"], [1, "0.1"]).items()) == [("dpo", 1.0), ("sft", 0.1)]
    assert resolve_losses(("hinge",), 2) == {"slic": 2.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kto_pair",), r"got 'kto_pair'. TRL has it no longer: KTOTrainer trains on single answers"),
        (("kto_pairs",), r"got 'kto_pairs'.$"),  # and no exo_pair
        (("dppo",), r"loss_type: expected one of \[.*\], got 'dppo'. Did you mean 'dpo'\?"),
        (([],), "loss_type: expected at least one loss, got none"),
        (([3],), "loss_type: expected names, got 3"),
        ((["dpo", "sigmoid"],), r"loss_type: expected each loss once, got \['dpo', 'sigmoid'\]"),
        ((["dpo", "sft"], [1.0]), r"loss_weights: expected one for each loss, 2 for \['dpo', 'sft'\], got 1"),
        (("dpo", [-1.0]), "loss_weights: expected finite numbers >= 0, got -1.0"),
        (("dpo", [math.nan]), "loss_weights: expected finite numbers >= 0, got nan"),
        (("dpo", "much"), "loss_weights: expected finite numbers >= 0, got 'much'"),
        ((["dpo", "sft"], [0, 0]), "loss_weights: expected at least one above 0"),
    ],
)
def test_bad_names_and_weights_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve_losses(*arguments)


def test_registered_names_are_all_of_trls():
    from trl import DPOConfig

    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = {word.strip("`',. ") for word in text.split() if word.startswith("`'")}
    assert len(named) >= 15
    assert named <= set(LOSSES) | set(TRL_NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dead_zone": -0.1}, "dead_zone: expected a finite value >= 0, got -0.1. In nats"),
        ({"dead_zone": math.inf}, "dead_zone: expected"),
        ({"label_smoothing": 0.5}, r"label_smoothing: expected a value in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected"),
        ({"label_smoothing": math.nan}, "label_smoothing: expected"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau: expected a finite value > 0, got 0.0"),
        (
            {"loss_type": ["ipo", "sft"], "label_smoothing": 0.1},
            r"label_smoothing: expected 0.0 with loss_type \['ipo', 'sft'\], which does not read it, got 0.1. These",
        ),
        ({"loss_type": "exo_pair"}, "label_smoothing: expected a value > 0 with 'exo_pair'"),
        ({"simpo_gamma": 1.0}, r"simpo_gamma: expected 0.5 with loss_type \['dpop'\], .* got 1.0. These do: simpo."),
        ({"loss_type": "dpo", "dpop_lambda": 5.0}, "dpop_lambda: expected 50.0 .* got 5.0. These do: dpop, dpop_norm."),
        ({"loss_type": "simpo", "simpo_gamma": -1.0}, "simpo_gamma: expected a finite value >= 0, got -1.0"),
        ({"loss_type": "beta_dpo", "beta_dpo_threshold": -math.inf}, "beta_dpo_threshold: expected a finite number"),
        ({"f_divergence_type": "kl"}, "f_divergence_type: expected one of reverse_kl, .* got 'kl'"),
        ({"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef: expected 0.5 with f_divergence_type 'reverse_kl'"),
        (
            {"loss_type": ["dpo", "nca_pair"], "f_divergence_type": "forward_kl"},
            "f_divergence_type: expected 'reverse_kl' with 'nca_pair', .* got 'forward_kl'. These are: dpop, ",
        ),
        (
            {"loss_type": "simpo", "f_divergence_type": "forward_kl"},
            r"f_divergence_type: expected 'reverse_kl' with loss_type \['simpo'\], which does not read it",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pair_loss(*one_pair(0.0, 0.0), **options)
