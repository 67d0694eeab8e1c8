"""Triton's interpreter, without what it does again for nothing.

A launch puts its own functions into the place of the language's (`tl.load` and the others), and takes them away at its
end. Up to triton 3.9 it looks for what to replace at each call of a helper as well, in every program: most of the time
of an interpreted kernel, and it finds nothing.
"""

from triton.language import core
from triton.runtime import interpreter

_patch = interpreter._patch_lang


def patch_language_once() -> None:
    """Once per launch, from here on, in this process."""
    interpreter._patch_lang = _patch_if_needed


def _patch_if_needed(function):
    """-> what takes away what this call has replaced."""
    if any(core.is_builtin(language.load) for language in (interpreter.tl, core)):
        return _patch(function)
    return interpreter._LangPatchScope()
