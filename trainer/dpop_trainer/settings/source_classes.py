"""Classes of arguments as their source says, for help and for checking flags without torch and transformers.

A run's configuration derives from `transformers.TrainingArguments`, whose import takes ten seconds. Its fields stand in
the source of whichever version is installed, and so do ours. `class_from_source` runs the class statement alone:
annotations, `field(...)` and what these name, each looked up where the source binds it. Methods are left out, names of
other packages become placeholders, and of an `if` the first branch counts: it is the one with the libraries that this
package requires. The real class has the last word, once a command line has passed these.
"""

import ast
import copy
import functools
import importlib.util
import logging
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

READ_PACKAGES = ("transformers", "dpop_trainer", "dpop_kernels")


def class_from_source(module: str, name: str) -> Any:
    """A dataclass with the fields of the one in that module: name, type, default, metadata; or None.

    None where the source is of a form that is not known here. Then nothing is checked before the import.
    """
    try:
        return getattr(_source_module(module), name)
    except Exception as error:  # whatever a new version's source holds, the class itself can be imported
        logger.debug("%s.%s cannot be read from its source: %r", module, name, error)
        return None


def function_from_source(module: str, name: str) -> Any:
    """A module's function, or None: for one that needs tables and names, and nothing that another package computes."""
    return class_from_source(module, name)


def module_from_file(name: str) -> ModuleType:
    """A module by itself, without the package that it is in, whose `__init__` may import much."""
    try:
        spec = importlib.util.spec_from_file_location(name, _file_of(name))
    except ModuleNotFoundError:
        return importlib.import_module(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _SourceModule:
    """The names that a module's source binds, as attributes; each is made when it is asked for."""

    def __init__(self, name: str) -> None:
        file = _file_of(name)
        self._name = name
        self._package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        self._bindings = _bindings(ast.parse(file.read_bytes()).body)
        self._values: dict[str, Any] = {}
        self._is_registered = False

    def __getattr__(self, name: str) -> Any:
        if name not in self._values:
            self._values[name] = self._value(name)
            self._fill_registries(self._values[name])
        return self._values[name]

    def _value(self, name: str) -> Any:
        statement = self._bindings.get(name)
        if isinstance(statement, ast.Import):
            (alias,) = (alias for alias in statement.names if (alias.asname or alias.name.partition(".")[0]) == name)
            return _module(alias.name if alias.asname else alias.name.partition(".")[0])
        if isinstance(statement, ast.ImportFrom):
            (alias,) = (alias for alias in statement.names if (alias.asname or alias.name) == name)
            where = importlib.util.resolve_name("." * statement.level + (statement.module or ""), self._package)
            return getattr(_module(where), alias.name)
        if isinstance(statement, ast.ClassDef):
            return self._run(_without_methods(statement), name)
        if isinstance(statement, ast.FunctionDef):
            return self._run(_without_annotations(statement), name)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            return self._evaluate(statement.value)
        if statement is None and _is_module(f"{self._package}.{name}"):
            return _module(f"{self._package}.{name}")
        raise AttributeError(f"{self._name}: found no {name!r} whose value its source says")

    def _run(self, statement: ast.stmt, name: str) -> Any:
        namespace = self._names_in(statement) | {"__name__": self._name}
        exec(compile(ast.fix_missing_locations(ast.Module([statement], [])), self._name, "exec"), namespace)
        return namespace[name]

    def _evaluate(self, expression: ast.expr) -> Any:
        return eval(compile(ast.Expression(expression), self._name, "eval"), self._names_in(expression))

    def _names_in(self, node: ast.AST) -> dict[str, Any]:
        """Those of this module; the rest are built in, or bound inside."""
        names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        return {name: getattr(self, name) for name in sorted(names) if name in self._bindings}

    def _fill_registries(self, value: Any) -> None:
        """A table that begins empty is filled by the decorators of its module."""
        if value != {} or self._is_registered:
            return
        self._is_registered = True
        functions = [part for part in self._bindings.values() if isinstance(part, ast.FunctionDef)]
        names = {function.name for function in functions}
        for function in functions:
            for decorator in function.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else None
                if isinstance(called, ast.Name) and called.id in names:
                    self._evaluate(decorator)(_placeholder(function.name))


class _OtherPackage:
    """A package that is not read: whatever is asked of it is a class without anything."""

    def __getattr__(self, name: str) -> type:
        return _placeholder(name)


@functools.cache
def _source_module(name: str) -> _SourceModule:
    return _SourceModule(name)


def _module(name: str) -> Any:
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names:
        return importlib.import_module(name)
    return _source_module(name) if root in READ_PACKAGES else _OtherPackage()


def _placeholder(name: str) -> type:
    return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


def _file_of(name: str) -> Path:
    """Where a module's source is; imports nothing."""
    root, *parts = name.split(".")
    spec: ModuleSpec | None = importlib.util.find_spec(root)
    folders = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        path = Path(folder, *parts)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
    raise ModuleNotFoundError(f"no source of {name} is installed", name=name)


def _is_module(name: str) -> bool:
    try:
        return bool(_file_of(name))
    except ModuleNotFoundError:
        return False


def _bindings(statements: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Name -> the statement that binds it, the last of several."""
    bindings: dict[str, ast.stmt] = {}
    for statement in _straightened(statements):
        bindings.update(dict.fromkeys(_bound(statement), statement))
    for statement in statements:  # what only another branch binds
        if isinstance(statement, ast.If | ast.Try):
            handlers = [part for handler in getattr(statement, "handlers", []) for part in handler.body]
            bindings = _bindings([*handlers, *statement.orelse]) | bindings
    return bindings


def _bound(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _straightened(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Without branches: the first of each."""
    for statement in statements:
        if isinstance(statement, ast.If | ast.Try):
            yield from _straightened(statement.body)
        else:
            yield statement


def _without_methods(statement: ast.ClassDef) -> ast.ClassDef:
    """A class of data: of a dataclass the fields and what they name, of an enum its members."""
    decorators = [decorator for decorator in statement.decorator_list if "dataclass" in ast.unparse(decorator)]
    parts = list(_straightened(statement.body))
    fields = [part for part in parts if isinstance(part, ast.AnnAssign)]
    named = {name for part in fields for name in _names(part)}
    body: list[ast.stmt] = []
    for part in parts:
        is_named = isinstance(part, ast.Assign) and (not decorators or not named.isdisjoint(_bound(part)))
        if isinstance(part, ast.AnnAssign | ast.Expr) or is_named:
            body.append(part)
    data_class = copy.copy(statement)
    data_class.body, data_class.decorator_list = body or [ast.Pass()], decorators
    return data_class


def _without_annotations(statement: ast.FunctionDef) -> ast.FunctionDef:
    copied = copy.deepcopy(statement)
    for node in ast.walk(copied):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    copied.decorator_list = []
    return copied


def _names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
