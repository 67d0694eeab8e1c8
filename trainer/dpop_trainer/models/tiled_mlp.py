"""A model's MLPs over tiles of tokens: their memory is bounded, however long the batch and however wide they are.

What stands beside an MLP and works token by token goes with it (the norm in front of it, the one behind), where the
family's layers hand the output of one to the next and to nothing else. Of a mixture, the experts: who they are for is
decided before, for all tokens at once.
"""

import inspect
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpop_kernels.backends.products import row_blocks
from dpop_kernels.model_head.layers import StandIn
from dpop_trainer.models.adapters import base_model
from dpop_trainer.models.token_tiles import over_tiles

TILE_BYTES = {"gpu": 2 << 30, "cpu": 256 << 20}
"""What a tile may hold in its backward. On a GPU some thousand tokens of a 70B model, so that reading its weights, or
widening packed ones, once for each tile stays below a tenth of the products."""
LEAST_TOKENS = 256
_TENSORS = 4
"""Of every linear layer's outputs, in a tile's backward: the output, what is made of it, and both gradients."""

_MLPS = ("mlp", "feed_forward", "shared_expert", "shared_experts", "shared_mlp")
_EXPERTS = "experts"

_LIKE_LLAMA = ("post_attention_layernorm", "mlp")
_LIKE_GEMMA = ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")
NEIGHBOURS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "starcoder2"), _LIKE_LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _LIKE_GEMMA),
    "glm4": (*_LIKE_LLAMA, "post_mlp_layernorm"),
    "olmo2": ("mlp", "post_feedforward_layernorm"),
}
"""By `model_type`: the modules of a layer that follow one another, each on the other's output alone."""

Tokens = int | Literal["auto"] | None
"""Of a tile; "auto" follows `TILE_BYTES`; None: no tiles."""


def tile_mlps(model: nn.Module, tokens: Tokens, *, on_gpu: bool | None = None) -> None:
    """Compute a model's MLPs over tiles from now on, in place; over others than before, or over none. What is not known
    to work token by token is left as it is.

    Args:
        model: a causal LM, or a peft model around one.
        tokens: of a tile.
        on_gpu: what "auto" is for; None goes by where the tensors are.
    """
    for module in model.modules():
        for stand_in in (module.__dict__.get(slot) for slot in ("forward", "_old_forward")):
            if isinstance(stand_in, _Link):
                stand_in.remove()
    for chain in _chains(model) if tokens is not None else ():
        _Tiled(chain, tokens, on_gpu)


def can_tile(model: nn.Module) -> bool:
    """Whether some of its MLPs are known to work token by token."""
    return next(_chains(model), None) is not None


def check_tiles(model: nn.Module) -> None:
    """
    Raises:
        ValueError: none of a model's MLPs is known to work token by token, or they are split over devices.
    """
    if not can_tile(model):
        raise ValueError(
            "tiled_mlp: expected a model whose layers have an mlp, a feed_forward or experts that work token by token, "
            f"found none in {type(base_model(model)).__name__}. Leave it out."
        )
    modules = (module for chain in _chains(model) for module in chain)
    if any(isinstance(parameter, DTensor) for module in modules for parameter in module.parameters()):
        raise ValueError(
            "tiled_mlp: expected layers that are whole when training begins, got tensor-parallel ones. Leave one of "
            "the two out."
        )


def tile_tokens(num_outputs: int, itemsize: int, *, on_gpu: bool) -> int:
    """Tokens of a tile whose linear layers have so many outputs together."""
    tokens = TILE_BYTES["gpu" if on_gpu else "cpu"] // (_TENSORS * num_outputs * itemsize)
    return max(LEAST_TOKENS, tokens // 128 * 128)


class _Tiled:
    """Modules that follow one another: the last computes all of them, tile by tile, and the others hand on."""

    def __init__(self, modules: list[nn.Module], tokens: Tokens, on_gpu: bool | None) -> None:
        self._modules, self._tokens, self._on_gpu = modules, tokens, on_gpu
        self._num_outputs = sum(map(_num_outputs, modules))
        self._tiles: list[slice] = []  # of the call under way, as the first has found them
        self._handed: Tensor | None = None
        self._links = [_Link(module, self) for module in modules]

    def forward(self, link: "_Link", tensors: tuple[Tensor, ...]) -> Tensor:
        """In the place of a module's forward."""
        states = tensors[0]
        rows = tuple(tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors)
        if link is self._links[0]:
            tiles = row_blocks(rows[0].shape[0], self._tile_tokens(rows))
            self._tiles, self._handed = (tiles, states) if len(tiles) > 1 else ([], None)
        if not self._tiles:
            return link.own_forward(*tensors)
        if states is not self._handed:
            raise ValueError(
                f"tiled_mlp: expected {type(link.module).__name__} to be given what the module before it gave, got "
                "another tensor: this model's layers are of another form than their family's. Leave tiled_mlp out."
            )
        if link is not self._links[-1]:
            return states
        tiles, self._tiles, self._handed = self._tiles, [], None
        is_batch = states.dim() == 3

        def compute(*parts: Tensor) -> Tensor:
            given: Any = tuple(part.unsqueeze(0) for part in parts) if is_batch else parts
            for each in self._links:
                given = (each.own_forward(*given),)
            return given[0].squeeze(0) if is_batch else given[0]

        output = over_tiles(compute, rows, tiles, self._trained, draws=self._draws())
        return output.view(*states.shape[:-1], output.shape[-1])

    def _tile_tokens(self, rows: tuple[Tensor, ...]) -> int:
        if isinstance(self._tokens, int):
            return self._tokens
        states, *others = rows
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        num_chosen = others[0].shape[-1] if others else 1  # experts of a token
        on_gpu = kind != "cpu" if self._on_gpu is None else self._on_gpu
        return tile_tokens(num_chosen * self._num_outputs, dtype.itemsize, on_gpu=on_gpu)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for module in self._modules for parameter in module.parameters() if parameter.requires_grad]

    def _draws(self) -> bool:
        inner = (m for module in self._modules for m in module.modules())
        return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in inner)


class _Link(StandIn):
    """Stands in a module of a chain."""

    def __init__(self, module: nn.Module, chain: _Tiled) -> None:
        super().__init__(module, lambda stand_in, states: None)
        self._chain = chain

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self._chain.forward(self, tensors)

    def own_forward(self, *tensors: Tensor) -> Tensor:
        return self._own_forward(*tensors)


def _chains(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules that are computed tile by tile together, of every layer."""
    base = base_model(model)
    decoder: Any = base.get_decoder() if hasattr(base, "get_decoder") else base
    neighbours = NEIGHBOURS.get(base.config.get_text_config().model_type, ())
    for path, module in decoder.named_modules():
        parent, _, name = path.rpartition(".")
        if name == _EXPERTS and _arguments(module)[0] == 3:
            yield [module]
        elif name in _MLPS and _arguments(module)[1] == 1 and _is_token_wise(module):
            layer = decoder.get_submodule(parent)
            names = neighbours if name in neighbours else (name,)
            yield [getattr(layer, neighbour) for neighbour in names]


def _arguments(module: Any) -> tuple[int, int]:
    """How many a module's forward takes, and how many it has to be given."""
    arguments = list(inspect.signature(type(_unwrapped(module)).forward).parameters.values())[1:]
    return len(arguments), sum(argument.default is argument.empty for argument in arguments)


def _unwrapped(module: Any) -> Any:
    """Without peft's layers around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _is_token_wise(module: nn.Module) -> bool:
    """Made of linear layers, and of what has at most a number for each feature: activations, norms, dropout."""
    if _is_linear(module):
        return True
    own = list(module.parameters(recurse=False))
    return all(parameter.dim() <= 1 for parameter in own) and all(map(_is_token_wise, module.children()))


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "out_features") or hasattr(module, "nf")  # GPT-2's Conv1D


def _num_outputs(module: Any) -> int:
    """Outputs for a token of all linear layers in a module, or of one expert's."""
    module = _unwrapped(module)
    if _is_linear(module):
        return int(getattr(module, "nf", 0) or module.out_features)
    own = sum(max(p.shape[1:]) for p in module.parameters(recurse=False) if p.dim() == 3)
    return own + sum(map(_num_outputs, module.children()))
