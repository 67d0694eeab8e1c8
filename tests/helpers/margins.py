"""How near each comparison came to its bound: `pytest -p margins --margins FOLDER -o enable_assertion_pass_hook=true`.

Every passed comparison of an error with its bound (`assert error <= bound`, `pytest.approx`, torch's and numpy's
assertions) is written as one line of JSON. A `Guarantee` is left out: it may be touched.
"""

import ast
import json
import math
import operator
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}


class Recorder:
    """Writes the comparisons of one process."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{os.getpid()}.jsonl"
        self._test, self._count = "", 0

    def begin(self, test):
        self._test, self._count = test, 0

    def record(self, error, bound, what):
        self._count += 1
        error, bound = float(error), float(bound)
        if error >= 0 and 0 < bound < math.inf:
            line = {"test": self._test, "count": self._count, "error": error, "bound": bound, "what": what}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def record_arrays(self, actual, expected, rtol, atol, what):
        """The element that is nearest to its bound."""
        actual, expected = np.broadcast_arrays(np.asarray(actual, float), np.asarray(expected, float))
        with np.errstate(invalid="ignore"):  # infinities on both sides are equal, and no error
            errors, bounds = np.abs(actual - expected).ravel(), (atol + rtol * np.abs(expected)).ravel()
        usable = np.isfinite(errors) & (bounds > 0)
        if usable.any():
            nearest = np.argmax(errors[usable] / bounds[usable])
            self.record(errors[usable][nearest], bounds[usable][nearest], what)


def pytest_addoption(parser):
    parser.addoption("--margins", type=Path, help="folder for the comparisons of a number with its bound")


def pytest_configure(config):
    if config.getoption("--margins") is not None:
        config.pluginmanager.register(Watch(Recorder(config.getoption("--margins"))))


class Watch:
    """Pytest's hooks, and wrappers around the three assertions that carry a bound of their own."""

    def __init__(self, recorder):
        self.recorder = recorder
        self._wrap_torch()
        self._wrap_numpy()
        self._wrap_approx()

    def pytest_runtest_setup(self, item):
        self.recorder.begin(item.nodeid)

    def pytest_assertion_pass(self, item, lineno, orig, expl):
        compared = re.match(r"(.*?) <=? (.*)", expl.split("\n")[0])
        if compared is None or "Guarantee" in compared[2]:
            return
        try:
            error, bound = number(compared[1]), number(compared[2])
        except (ValueError, SyntaxError, KeyError):
            return  # not two numbers
        if bound < 0.1 or "worst(" in orig:  # an error's bound, or the worst error in units of its bound
            self.recorder.record(error, bound, orig)

    def _wrap_torch(self):
        assert_close = torch.testing.assert_close

        def watched(actual, expected, *args, rtol=None, atol=None, **kwargs):
            assert_close(actual, expected, *args, rtol=rtol, atol=atol, **kwargs)
            if isinstance(actual, torch.Tensor) and actual.is_floating_point() and rtol is not None:
                values = [tensor.detach().double().cpu().numpy() for tensor in (actual, expected)]
                self.recorder.record_arrays(*values, rtol, atol, f"assert_close(rtol={rtol:.1e}, atol={atol:.1e})")

        torch.testing.assert_close = watched

    def _wrap_numpy(self):
        assert_allclose = np.testing.assert_allclose

        def watched(actual, desired, rtol=1e-7, atol=0, **kwargs):
            assert_allclose(actual, desired, rtol=rtol, atol=atol, **kwargs)
            what = f"assert_allclose(rtol={rtol:.1e}, atol={atol:.1e})"
            self.recorder.record_arrays(actual, desired, rtol, atol, what)

        np.testing.assert_allclose = watched

    def _wrap_approx(self):
        scalar = type(pytest.approx(1.0))
        equals = scalar.__eq__

        def watched(approx, actual):
            is_equal = equals(approx, actual)
            if is_equal and isinstance(actual, (int, float)) and isinstance(approx.expected, (int, float)):
                error = abs(float(actual) - float(approx.expected))
                self.recorder.record(error, approx.tolerance, f"approx(rel={approx.rel}, abs={approx.abs})")
            return is_equal

        scalar.__eq__ = watched


def number(text):
    """What pytest writes of a number: 1e-05, tensor(1e-05, dtype=...), np.float64(1e-05), (3 * 1e-05)."""
    text = re.sub(r"(?:tensor|np\.float\d+)\(([^(),]*)(?:, [^()]*)?\)", r"(\1)", text)
    return _value(ast.parse(text.strip(), mode="eval").body)


def _value(node):
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError(f"expected a number, got {ast.dump(node)}")
