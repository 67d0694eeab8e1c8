"""Matrix products, counted as torch makes them: what a head costs, whatever the clock says."""

from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}  # and where their factors stand


class CountedProducts(TorchDispatchMode):
    """FLOP of the matrix products made within, in units of one product of a head, 2·N·H·V.

    Args:
        num_tokens, hidden_size, vocab_size: N, H and V of that head.
        of_head_alone: leave out products none of whose three sides is V long.
    """

    def __init__(self, num_tokens, hidden_size, vocab_size, *, of_head_alone=False):
        super().__init__()
        self._unit = 2 * num_tokens * hidden_size * vocab_size
        self._sides = {vocab_size} if of_head_alone else None
        self._flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        where = PRODUCTS.get(func._schema.name)
        if where is not None:
            left, right = (args[position] for position in where)
            sides = (*left.shape, right.shape[1])
            if self._sides is None or self._sides & set(sides):
                self._flop += 2 * sides[0] * sides[1] * sides[2]
        return func(*args, **(kwargs or {}))

    @property
    def products(self):
        return self._flop / self._unit
