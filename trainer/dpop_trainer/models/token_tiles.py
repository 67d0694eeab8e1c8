"""A function of single tokens, computed over tiles of them: what it holds inside is one tile's, whatever their number.

    y[t] = f(x[t])     forward    tile after tile without gradient; x is kept, and nothing of the inside
                       backward   tile after tile forward again and back: grad_x[t], and into totals of fp32 or better
                                  grad_w += what the tile adds; rounded once

Two autograd nodes: the first keeps x, the second computes y, and they meet in the backward. For a checkpointed layer
runs again until it has back all that it had kept, and ends there: where x is the last of that, y is not computed again,
and a step has two forwards of f, as many as without tiles.

Source: TiledMLP of Arctic Long Sequence Training, arXiv:2506.13996, section 3.1, whose step has three.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpop_kernels.precision import accumulator_dtype


def over_tiles(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    tiles: list[slice],
    trained: Callable[[], list[nn.Parameter]],
    *,
    draws: bool = False,
) -> Tensor:
    """
    Args:
        function: of tensors of some tokens, [S, ...] each -> [S, H]; row by row.
        tensors: [N, ...] each; those of floats may take a gradient.
        tiles: of the N tokens, in order.
        trained: the parameters in it that take a gradient, in an order that stays. Asked again in the backward: what
            shards weights hands out whole ones for a while.
        draws: it draws random numbers (dropout), to be the same in the backward.

    Returns:
        [N, H].
    """
    parameters = trained()
    call = _Call(function, tiles, trained, _Surroundings.now(tensors[0].device, draws=draws))
    if torch.is_grad_enabled() and (parameters or any(tensor.requires_grad for tensor in tensors)):
        kept = _Keep.apply(call, len(tensors), *tensors, *parameters)
        output: Any = _Compute.apply(kept, call, tensors)
    else:
        output = call.forward(tensors)
    if parameters and torch.is_autocast_enabled(tensors[0].device.type):
        torch.clear_autocast_cache()  # it holds weights that were rounded without gradient
    return output


@dataclass
class _Call:
    """One call of the function, as both its nodes know it."""

    function: Callable[..., Tensor]
    tiles: list[slice]
    trained: Callable[[], list[nn.Parameter]]
    surroundings: "_Surroundings"
    grad_output: Tensor | None = None
    """On its way from the one node to the other."""

    def forward(self, tensors: tuple[Tensor, ...]) -> Tensor:
        output = None
        for tile in self.tiles:
            part = self.function(*(tensor[tile] for tensor in tensors))
            if output is None:
                output = part.new_empty(tensors[0].shape[0], part.shape[-1])
            output[tile] = part
        assert output is not None
        return output

    def backward(
        self, tensors: tuple[Tensor, ...], grad_output: Tensor, needs_grad: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """-> gradients of the tensors, then of what is trained."""
        parameters = self.trained()
        wanted = list(zip(tensors, needs_grad, strict=True))
        grads = [torch.empty_like(tensor) if needed else None for tensor, needed in wanted]
        totals: list[Tensor | None] = [None] * len(parameters)
        with self.surroundings.again():
            for tile in self.tiles:
                with torch.enable_grad():
                    parts = [tensor[tile].detach().requires_grad_(needed) for tensor, needed in wanted]
                    output = self.function(*parts)
                sources = [part for part in parts if part.requires_grad]
                found = iter(torch.autograd.grad(output, [*sources, *parameters], grad_output[tile], allow_unused=True))
                for grad in grads:
                    if grad is not None:
                        part = next(found)
                        grad[tile] = 0 if part is None else part
                for i, part in enumerate(found):
                    if part is not None:
                        total = totals[i]
                        # a copy: what autograd returns may be a view of another's
                        totals[i] = part.to(accumulator_dtype(part), copy=True) if total is None else total.add_(part)
        rounded = [None if total is None else total.to(p.dtype) for total, p in zip(totals, parameters, strict=True)]
        return [*grads, *rounded]


class _Keep(torch.autograd.Function):
    """The node that keeps what the function was given -> an empty tensor, for the other to begin with."""

    @staticmethod
    def forward(ctx, call, num_tensors, *tensors_and_parameters):
        ctx.call = call
        ctx.save_for_backward(*tensors_and_parameters[:num_tensors])
        return tensors_and_parameters[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        tensors, call = ctx.saved_tensors, ctx.call
        grad_output, call.grad_output = call.grad_output, None
        grads = call.backward(tensors, grad_output, ctx.needs_input_grad[2 : 2 + len(tensors)])
        return None, None, *grads


class _Compute(torch.autograd.Function):
    """The node that has the output, and nothing to keep."""

    @staticmethod
    def forward(ctx, kept, call, tensors):
        ctx.call = call
        return call.forward(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        ctx.call.grad_output = grad_output
        return grad_output.new_zeros(0, dtype=torch.float32), None, None


@dataclass(frozen=True)
class _Surroundings:
    """What the function's result depends on beside its inputs: autocast, and random states where it draws."""

    device: torch.device
    autocast: dict[str, Any]
    random_states: tuple[Tensor, Tensor | None] | None

    @classmethod
    def now(cls, device: torch.device, *, draws: bool) -> "_Surroundings":
        kind = device.type
        autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        states = None
        if draws:
            own = None if kind == "cpu" else torch.get_device_module(device).get_rng_state(device)
            states = torch.get_rng_state(), own
        return cls(device, autocast, states)

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.autocast(**self.autocast), self._drawing_again():
            yield

    def _drawing_again(self) -> AbstractContextManager[None]:
        return nullcontext() if self.random_states is None else self._with_states(*self.random_states)

    @contextmanager
    def _with_states(self, of_host: Tensor, of_device: Tensor | None) -> Iterator[None]:
        devices = [] if of_device is None else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type):
            torch.set_rng_state(of_host)
            if of_device is not None:
                torch.get_device_module(self.device).set_rng_state(of_device, self.device)
            yield
