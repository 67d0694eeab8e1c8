"""The kernels that torch's compiler writes for a GPU, without that GPU and without a CUDA build of torch.

What is compiled gets tensors on torch's "meta" device, which have shapes and no data. They stay there through tracing,
autograd and all passes over the graph, and are said to be on the GPU only where the graph is lowered: from there on
nothing is computed any more, and what the compiler asks about the device is answered from `DEVICES`. The code that
comes out is kept and not loaded. All of this is torch's private side; it is tried with torch 2.13.
"""

import ast
import contextlib
import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, scheduler
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties
from torch.fx import GraphModule, Interpreter
from torch.utils._pytree import tree_map_only

from dpop_kernels.aot import TARGETS, Source

DEVICES = {
    "sm_80": {"multi_processor_count": 108, "shared_memory_per_block_optin": 163 << 10},
    "sm_90": {"multi_processor_count": 132, "shared_memory_per_block_optin": 227 << 10},
    "sm_100": {"multi_processor_count": 148, "shared_memory_per_block_optin": 227 << 10},
}
"""In what an A100, an H100 and a B200 differ for the compiler."""
ALIKE = {
    "warp_size": 32,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "gcnArchName": "",  # asked where torch is not built for CUDA
}


@contextlib.contextmanager
def written_for(target: str) -> Iterator[list[str]]:
    """The modules that `torch.compile` writes for one of `DEVICES` while this lasts: a graph's forward, its backward.

    What was compiled before is forgotten. A compiled function takes and returns meta tensors.
    """
    modules: list[str] = []

    def write(graph: GraphModule, example_inputs: Any, **options: Any) -> Callable[[list[Any]], Any]:
        before_lowering, num_known = copy.deepcopy(graph), len(modules)
        with _present(target, modules):
            try:
                compile_fx.compile_fx_inner(graph, example_inputs, **options)
            except Exception:  # the writer's own, in whatever the compiler wraps it
                if len(modules) == num_known:
                    raise

        def compiled(arguments: list[Any]) -> Any:
            return Interpreter(before_lowering).run(*arguments)

        compiled._boxed_call = True  # type: ignore[attr-defined]  # it is handed a list, for the compiler to empty
        return compiled

    torch._dynamo.reset()
    writing: Any = write
    with (
        mock.patch.object(compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=writing)),
        functorch_config.patch(enable_autograd_cache=False),
        # folds a meta tensor of zeros to one that is made after its use
        inductor_config.patch(joint_graph_constant_folding=False, fx_graph_cache=False, compile_threads=1),
    ):
        yield modules


class Template(NamedTuple):
    """A kernel that was made from a template."""

    source: Source
    """Ready to be compiled."""
    constants: dict[str, Any]
    """What the template was filled with."""


def templates(module: str) -> dict[str, Template]:
    """By name, the kernels in a written module that were made from a template.

    The others are element-wise or sums along rows, in one of several configurations that are chosen by timing.
    """
    calls = [node for node in ast.walk(ast.parse(module)) if isinstance(node, ast.Call)]
    texts = [call.args[:2] for call in calls if ast.unparse(call.func) == "async_compile.triton"]
    found = {}
    for name, text in ((ast.literal_eval(name), ast.literal_eval(text)) for name, text in texts):
        if "@triton_heuristics.template(" in text:
            kernel, described = _loaded(name, text)
            types = described["triton_meta"]
            options = {
                "num_warps": described["num_warps"],
                "num_stages": described["num_stages"],
                "debug": described["inductor_meta"].get("assert_indirect_indexing", True),
                "sanitize_overflow": False,
            }
            source = Source(kernel, types["signature"], types["constants"], types["configs"][0], options)
            found[name] = Template(source, described["inductor_meta"]["config_args"])
    return found


def _loaded(name: str, text: str) -> tuple[Any, dict[str, Any]]:
    """A kernel and what its decorator is told, from a file that is needed only while triton reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with mock.patch.object(triton_heuristics, "template", lambda **described: lambda kernel: (kernel, described)):
            spec.loader.exec_module(module)
    return getattr(module, name)


class _Written(Exception):
    """There is nothing more to do for a graph."""


@contextlib.contextmanager
def _present(target: str, modules: list[str]) -> Iterator[None]:
    """A compiler that sees this GPU and writes to `modules`."""
    import triton.runtime
    from triton.backends.compiler import GPUTarget

    capability = divmod(TARGETS[target][1], 10)
    properties = SimpleNamespace(**DEVICES[target], **ALIKE, major=capability[0], minor=capability[1], name=target)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_rng_state": torch.empty(0, dtype=torch.uint8),
        "set_rng_state": None,
    }

    class Writer(GraphLowering):
        def __init__(self, graph: GraphModule, example_inputs: Any, **options: Any) -> None:
            for nodes in (part.graph.nodes for part in graph.modules() if isinstance(part, GraphModule)):
                for node in nodes:
                    assert "device" not in node.kwargs, "a node makes a tensor of its own"
                    node.meta["val"] = _on_gpu(node.meta.get("val"))
            super().__init__(graph, _on_gpu(example_inputs), **options)

        def run(self, *arguments: Any) -> Any:
            return super().run(*_on_gpu(arguments))

        def compile_to_module(self) -> NoReturn:
            modules.append(self.codegen()[0].value)
            raise _Written

    DeviceProperties.create.cache_clear()
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget(*TARGETS[target]))
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            function = functools.partial(lambda answer, *_: answer, answer)
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
            if name in vars(CudaInterface):
                stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(function)))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        stack.enter_context(mock.patch.object(scheduler, "has_triton", return_value=True))
        stack.enter_context(mock.patch.object(compile_fx, "GraphLowering", Writer))
        yield
    DeviceProperties.create.cache_clear()


def _on_gpu(tree: Any) -> Any:
    """The same without data on a GPU: an allocation is all that a build of torch without CUDA can fake there."""

    def moved(tensor: Tensor) -> Tensor:
        with tensor.fake_mode:  # type: ignore[attr-defined]
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    return tree_map_only(Tensor, moved, tree)
