"""The levels: what is computed at which sizes, what counts as wrong, and what the device could do at best.

    logits      logits [N, V] -> log-probs, forward, and forward with backward
    head        hidden states x weight -> log-probs: reference pass, frozen, trainable
    dpo         hidden states of policy and reference x weight -> DPO loss, frozen and trainable
    pair_loss   token log-probs and segment bounds -> DPOP loss, forward with backward

A case makes its inputs once; every peer gets the same tensors. The training step has its own file, bench_step.py.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks import truth
from benchmarks.inputs import head_inputs, logits_inputs
from benchmarks.peers import Peer
from benchmarks.shapes import HeadShape, PairShape, make_pairs, segment_lengths

NUM_CHECKED = 64
"""Rows that are compared with fp64."""
NUM_WEIGHT_ROWS = 8
"""Rows of the weight's gradient that are."""
BETA, DPOP_LAMBDA = 0.1, 50.0


class Output(NamedTuple):
    """What one call computed."""

    result: Tensor
    """Log-probs [N], their mean, or a loss."""
    grads: tuple[Tensor, ...] = ()


class Bounds(NamedTuple):
    """Beyond these a result is wrong, not rounded."""

    logps: float
    """nats."""
    gradient: float
    """Of the gradient as a whole, relative."""


@dataclass(kw_only=True)
class Case:
    """One level at one size."""

    task: str
    device: torch.device
    dtype: torch.dtype
    level: str = ""

    def __str__(self) -> str:
        return f"{self.level}-{self.task}-{self.size_name}"

    @property
    def size_name(self) -> str:
        raise NotImplementedError

    @property
    def sizes(self) -> dict[str, Any]:
        raise NotImplementedError

    def cost(self) -> tuple[float, float]:
        """FLOP and bytes that no implementation can do without."""
        raise NotImplementedError

    def takes(self, peer: Peer) -> bool:
        """Whether the peer offers this level."""
        raise NotImplementedError

    def candidate(self, peer: Peer) -> Callable[[], Output]:
        """The peer's call on this case's inputs."""
        raise NotImplementedError

    def errors(self, output: Output, peer: Peer) -> dict[str, float]:
        """Against fp64 on the same inputs."""
        raise NotImplementedError

    def bounds(self, peer: Peer) -> Bounds:
        """Where rounding ends, for this peer's way of rounding.

        fp32 logits: 1e-4 nat, ten times the precision contract. Logits of size z rounded to 16 bits are off by up to
        z · eps / 2, the target's and all others: twice that in a log-prob, and as a factor in every probability. A
        gradient may be off by ten roundings besides. A filter leaves out what its authors chose to; its gradient must
        still point the right way.
        """
        rounding = torch.finfo(self.dtype).eps
        logps = 1e-4
        if not peer.has_fp32_logits and rounding > 1e-4:
            logps = self.largest_logit() * rounding
        gradient = 1.0 if peer.filters_gradient else 10 * rounding + 1e-3 + (torch.tensor(logps).expm1().item())
        return Bounds(logps, gradient)

    def largest_logit(self) -> float:
        raise NotImplementedError

    def is_wrong(self, errors: dict[str, float], peer: Peer) -> bool:
        bounds = self.bounds(peer)
        limits = {"logp_nats": bounds.logps, "loss": max(1e-3, bounds.logps), "grad": bounds.gradient}
        return any(not errors[name] <= limit for name, limit in limits.items() if name in errors)


@dataclass(kw_only=True)
class LogitsCase(Case):
    """Logits that exist: their log-probs."""

    task: Literal["forward", "forward_backward"]
    level: str = "logits"
    num_tokens: int
    vocab_size: int
    name: str

    @property
    def size_name(self) -> str:
        return f"{self.name}-{self.num_tokens}"

    @property
    def sizes(self) -> dict[str, Any]:
        return {"name": self.name, "num_tokens": self.num_tokens, "vocab_size": self.vocab_size}

    def cost(self) -> tuple[float, float]:
        passes = 1 if self.task == "forward" else 3  # the gradient: logits read once more, written once
        return 0.0, passes * self.num_tokens * self.vocab_size * self.dtype.itemsize

    def takes(self, peer: Peer) -> bool:
        in_place_forward = self.task == "forward" and peer.name.endswith("in place")  # the same call
        return peer.logits_logps is not None and not in_place_forward

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        return logits_inputs(self.vocab_size, self.num_tokens, self.device, self.dtype)

    def candidate(self, peer: Peer) -> Callable[[], Output]:
        assert peer.logits_logps is not None
        function, (logits, target_ids) = peer.logits_logps, self.inputs
        if self.task == "forward":
            return torch.no_grad()(lambda: Output(function(logits, target_ids)))
        grad_logps = torch.full((self.num_tokens,), 1 / self.num_tokens, device=self.device)
        # a peer may write its gradient over the logits: it gets its own, which then hold the gradient
        own = logits.clone().requires_grad_() if peer.name.endswith("in place") else logits.detach().requires_grad_()

        def call() -> Output:
            logps = function(own, target_ids)
            return Output(logps.detach(), torch.autograd.grad(logps, own, grad_logps.to(logps.dtype)))

        return call

    def errors(self, output: Output, peer: Peer) -> dict[str, float]:
        logits, target_ids = self.inputs
        rows = truth.sample_rows(self.num_tokens, NUM_CHECKED, self.device)
        logps, gradient = truth.logits_truth(logits[rows], target_ids[rows])
        errors = _logp_errors(output.result[rows], logps)
        if output.grads:
            errors |= _grad_errors(output.grads[0][rows], gradient / self.num_tokens)
        return errors

    def largest_logit(self) -> float:
        return float(self.inputs[0].abs().max())


@dataclass(kw_only=True)
class HeadCase(Case):
    """Hidden states and a head: log-probs without logits."""

    task: Literal["reference", "frozen", "trainable"]
    level: str = "head"
    head: HeadShape
    num_tokens: int

    @property
    def size_name(self) -> str:
        return f"{self.head.name}-{self.num_tokens}"

    @property
    def sizes(self) -> dict[str, Any]:
        return {**asdict(self.head), "num_tokens": self.num_tokens}

    def cost(self) -> tuple[float, float]:
        n, v, h = self.num_tokens, self.head.vocab_size, self.head.hidden_size
        products = {"reference": 1, "frozen": 2, "trainable": 3}[self.task]
        # hidden states and weight read once, gradients written once
        tensors = {"reference": n * h + v * h, "frozen": 2 * n * h + v * h, "trainable": 2 * n * h + 2 * v * h}
        return products * 2.0 * n * v * h, tensors[self.task] * self.dtype.itemsize

    def takes(self, peer: Peer) -> bool:
        return peer.linear_logps is not None and (self.head.softcap is None or peer.takes_softcap)

    @cached_property
    def inputs(self) -> Any:
        return head_inputs(self.head, self.num_tokens, self.device, self.dtype)

    def candidate(self, peer: Peer) -> Callable[[], Output]:
        assert peer.linear_logps is not None
        function, inputs = peer.linear_logps, self.inputs
        if self.task == "reference":
            return torch.no_grad()(lambda: Output(function(*inputs, self.head.softcap)))
        hidden_states = inputs.hidden_states.detach().requires_grad_()
        weight = inputs.weight.detach().requires_grad_(self.task == "trainable")
        leaves = [tensor for tensor in (hidden_states, weight) if tensor.requires_grad]

        def call() -> Output:
            logps = function(hidden_states, weight, inputs.target_ids, self.head.softcap)
            # the mean for everyone: peers that give nothing else are then asked for the same gradients
            return Output(logps.detach(), torch.autograd.grad(logps.mean(), leaves))

        return call

    @cached_property
    def _truth(self) -> tuple[Tensor, truth.Truth, Tensor, Tensor]:
        """Checked rows, their truth, checked rows of the weight, their gradient's truth."""
        inputs, softcap = self.inputs, self.head.softcap
        rows = truth.sample_rows(self.num_tokens, NUM_CHECKED, self.device)
        rows_truth = truth.head_truth(
            inputs.hidden_states[rows], inputs.weight, inputs.target_ids[rows], softcap=softcap
        )
        columns = inputs.target_ids[rows[:: max(1, len(rows) // NUM_WEIGHT_ROWS)]].unique()
        if self.task != "trainable":
            return rows, rows_truth, columns, columns.new_empty(0)
        grad_logps = torch.full((self.num_tokens,), 1 / self.num_tokens, device=self.device)
        return (
            rows,
            rows_truth,
            columns,
            truth.grad_weight_truth(
                inputs.hidden_states, inputs.weight, inputs.target_ids, grad_logps, columns, softcap=softcap
            ),
        )

    @cached_property
    def _true_mean(self) -> Tensor:
        hidden_states, weight, target_ids = self.inputs
        parts = torch.arange(self.num_tokens, device=self.device).split(512)
        return torch.cat(
            [
                truth.head_truth(hidden_states[rows], weight, target_ids[rows], softcap=self.head.softcap).logps
                for rows in parts
            ]
        ).mean()

    def errors(self, output: Output, peer: Peer) -> dict[str, float]:
        rows, rows_truth, columns, grad_weight = self._truth
        if peer.gives_mean_only:
            errors = {"logp_nats": truth.largest((output.result - self._true_mean).abs())}
        else:
            errors = _logp_errors(output.result[rows], rows_truth.logps)
        if output.grads:
            errors |= _grad_errors(output.grads[0][rows], rows_truth.grad_hidden / self.num_tokens)
        if len(output.grads) == 2:
            errors["grad_weight"] = truth.relative(output.grads[1][columns], grad_weight)
            errors["grad"] = max(errors["grad"], errors["grad_weight"])
        return errors

    def largest_logit(self) -> float:
        rows = truth.sample_rows(self.num_tokens, NUM_CHECKED, self.device)
        return float((self.inputs.hidden_states[rows].float() @ self.inputs.weight.float().T).abs().max())


@dataclass(kw_only=True)
class DpoCase(Case):
    """The whole head of a DPO step: the reference's pass, the policy's pass, the loss, the gradients."""

    task: Literal["frozen", "trainable"]
    level: str = "dpo"
    head: HeadShape
    pairs: PairShape
    num_pairs: int
    scale: int = 1
    """Divides the pairs' lengths."""

    @property
    def size_name(self) -> str:
        return f"{self.head.name}-{self.pairs.name}x{self.num_pairs}"

    @property
    def sizes(self) -> dict[str, Any]:
        scored = self.inputs[2] != -100
        return {
            **asdict(self.head),
            "pairs": self.pairs.name,
            "num_pairs": self.num_pairs,
            "num_tokens": int(scored.sum()),
            "num_positions": scored.numel(),
        }

    def cost(self) -> tuple[float, float]:
        n, v, h = self.sizes["num_tokens"], self.head.vocab_size, self.head.hidden_size
        products = {"frozen": 3, "trainable": 4}[self.task]  # the reference's among them
        tensors = {"frozen": 3 * n * h + v * h, "trainable": 3 * n * h + 2 * v * h}
        return products * 2.0 * n * v * h, tensors[self.task] * self.dtype.itemsize

    def takes(self, peer: Peer) -> bool:
        return peer.linear_dpo is not None

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden_states [2B, T, H], weight [V, H], labels [2B, T], ref_hidden_states [2B, T, H]."""
        pairs = make_pairs(self.pairs, self.num_pairs, self.head.vocab_size, scale=self.scale)
        answers = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
        answers += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
        length = max(len(prompt) + len(answer) for prompt, answer in answers)
        num_scored = sum(len(answer) for _, answer in answers)
        states, weight, target_ids = head_inputs(self.head, num_scored, self.device, self.dtype)
        labels = torch.full((len(answers), length), -100, device=self.device)
        for row, (prompt, answer) in enumerate(answers):
            labels[row, len(prompt) : len(prompt) + len(answer)] = 0
        scored = labels != -100
        labels[scored] = target_ids
        generator = torch.Generator(self.device).manual_seed(1)
        hidden_states = torch.randn(
            *labels.shape, self.head.hidden_size, device=self.device, dtype=self.dtype, generator=generator
        )
        hidden_states[:, :-1][scored[:, 1:]] = states
        noise = torch.randn(hidden_states.shape, device=self.device, dtype=self.dtype, generator=generator)
        return hidden_states, weight, labels, hidden_states + 0.05 * noise

    def candidate(self, peer: Peer) -> Callable[[], Output]:
        assert peer.linear_dpo is not None
        function, (hidden_states, weight, labels, ref_hidden_states) = peer.linear_dpo, self.inputs
        hidden_states = hidden_states.detach().requires_grad_()
        weight = weight.detach().requires_grad_(self.task == "trainable")
        leaves = [tensor for tensor in (hidden_states, weight) if tensor.requires_grad]

        def call() -> Output:
            loss = function(hidden_states, weight, labels, ref_hidden_states, BETA)
            return Output(loss.detach(), torch.autograd.grad(loss, leaves))

        return call

    @cached_property
    def _truth(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The loss, checked rows and their gradient, checked rows of the weight and theirs."""
        hidden_states, weight, labels, ref_hidden_states = self.inputs
        scored, targets = labels[:, 1:] != -100, labels[:, 1:][labels[:, 1:] != -100]
        states, ref_states = hidden_states[:, :-1][scored], ref_hidden_states[:, :-1][scored]
        parts = torch.arange(len(targets), device=self.device).split(512)
        policy = [truth.head_truth(states[rows], weight, targets[rows]) for rows in parts]
        reference = [truth.head_truth(ref_states[rows], weight, targets[rows]).logps for rows in parts]
        logps = torch.cat([part.logps for part in policy]).requires_grad_()
        ratios = logps.new_zeros(scored.shape).masked_scatter(scored, logps - torch.cat(reference)).sum(1)
        chosen, rejected = ratios.chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        (grad_logps,) = torch.autograd.grad(loss, logps)
        rows = truth.sample_rows(len(targets), NUM_CHECKED, self.device)
        gradient = torch.cat([part.grad_hidden for part in policy])[rows] * grad_logps[rows].unsqueeze(-1)
        columns = targets[rows[:: max(1, len(rows) // NUM_WEIGHT_ROWS)]].unique()
        grad_weight = columns.new_empty(0)
        if self.task == "trainable":
            grad_weight = truth.grad_weight_truth(states, weight, targets, grad_logps, columns)
        return loss.detach(), rows, gradient, columns, grad_weight

    def errors(self, output: Output, peer: Peer) -> dict[str, float]:
        loss, rows, gradient, columns, grad_weight = self._truth
        scored = self.inputs[2][:, 1:] != -100
        errors = {"loss": truth.largest((output.result.double() - loss).abs())}
        errors |= _grad_errors(output.grads[0][:, :-1][scored][rows], gradient)
        if len(output.grads) == 2:
            errors["grad_weight"] = truth.relative(output.grads[1][columns], grad_weight)
            errors["grad"] = max(errors["grad"], errors["grad_weight"])
        return errors

    def largest_logit(self) -> float:
        hidden_states, weight, labels, _ = self.inputs
        states = hidden_states[:, :-1][labels[:, 1:] != -100]
        rows = truth.sample_rows(len(states), NUM_CHECKED, self.device)
        return float((states[rows].float() @ weight.float().T).abs().max())


@dataclass(kw_only=True)
class PairLossCase(Case):
    """Token log-probs of a batch -> DPOP's loss and its gradient. Bound by launches, not by bytes."""

    task: Literal["forward_backward"] = "forward_backward"
    level: str = "pair_loss"
    pairs: PairShape
    num_pairs: int
    dtype: torch.dtype = field(default=torch.float32)

    @property
    def size_name(self) -> str:
        return f"{self.pairs.name}x{self.num_pairs}"

    @property
    def sizes(self) -> dict[str, Any]:
        return {"name": self.pairs.name, "num_pairs": self.num_pairs, "num_tokens": len(self.inputs[0])}

    def cost(self) -> tuple[float, float]:
        return 0.0, 2.0 * self.sizes["num_tokens"] * self.dtype.itemsize

    def takes(self, peer: Peer) -> bool:
        return peer.pair_loss is not None

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """token_logps [N], cu_seqlens [3B + 1], ref_segment_logps [B, 3]; Δw on both sides of the hinge."""
        lengths = torch.tensor(segment_lengths(make_pairs(self.pairs, self.num_pairs, 1000)))
        generator = torch.Generator().manual_seed(0)
        token_logps = -torch.rand(int(lengths.sum()), generator=generator)
        reference = torch.stack([part.sum() for part in token_logps.split(lengths.tolist())]).view(-1, 3)
        reference = reference + torch.randn(reference.shape, generator=generator)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return token_logps.to(self.device), cu_seqlens.to(self.device), reference.to(self.device)

    def candidate(self, peer: Peer) -> Callable[[], Output]:
        assert peer.pair_loss is not None
        function, (token_logps, cu_seqlens, reference) = peer.pair_loss, self.inputs
        token_logps = token_logps.detach().requires_grad_()

        def call() -> Output:
            loss = function(token_logps, cu_seqlens, reference, BETA, DPOP_LAMBDA)
            return Output(loss.detach(), torch.autograd.grad(loss, token_logps))

        return call

    def errors(self, output: Output, peer: Peer) -> dict[str, float]:
        token_logps, cu_seqlens, reference = self.inputs
        wide = token_logps.double().requires_grad_()
        sums = torch.stack([part.sum() for part in wide.split(cu_seqlens.diff().tolist())]).view(-1, 3)
        shared, chosen, rejected = (sums - reference.double()).unbind(-1)
        margins = chosen - rejected - DPOP_LAMBDA * torch.relu(-(shared + chosen))
        loss = -torch.nn.functional.logsigmoid(BETA * margins).mean()
        (gradient,) = torch.autograd.grad(loss, wide)
        return {
            "loss": truth.largest((output.result.double() - loss.detach()).abs()),
            "grad": truth.relative(output.grads[0], gradient),
        }

    def bounds(self, peer: Peer) -> Bounds:
        """fp32 sums of hundreds of nats are off by 1e-5 each, βλ = 5 times that in the loss."""
        return Bounds(logps=1e-3, gradient=1e-3)


def _logp_errors(candidate: Tensor, logps: Tensor) -> dict[str, float]:
    return {"logp_nats": truth.largest((candidate.double() - logps).abs())}


def _grad_errors(candidate: Tensor, gradient: Tensor) -> dict[str, float]:
    return {"grad": truth.relative(candidate, gradient), "grad_worst_row": truth.worst_row(candidate, gradient)}
