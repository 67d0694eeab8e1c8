"""Triton's interpreter, without what it does again and for nothing, in triton up to 3.9.

A launch puts its own functions into the place of the language's (`tl.load` and the others), and takes them away at its
end. It looks for what to replace at each call of a helper as well, in every program, and finds nothing. Sums and
products of integers are computed in 64 bits once more, for an assertion that is made in debug mode alone. Which NumPy
type a type has is looked up in a table that is built for every load and store. Together most of an interpreted
kernel's time.
"""

from dataclasses import replace
from functools import cache

import numpy as np
from triton.language import core
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_numpy_type_of_scalar = cache(interpreter._get_np_dtype)


def save_time() -> None:
    """From here on, in this process."""
    interpreter._patch_lang = _patch_if_needed
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter._get_np_dtype = _numpy_type


def _patch_if_needed(function):
    """-> what takes away what this call has replaced."""
    if any(core.is_builtin(language.load) for language in (interpreter.tl, core)):
        return _patch(function)
    return interpreter._LangPatchScope()


def _numpy_type(of):
    """Of a scalar or a block of them; a pointer is a number of 64 bits."""
    scalar = of.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _numpy_type_of_scalar(scalar)
