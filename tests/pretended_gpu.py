"""A pretended GPU: tensors that call themselves cuda:0, and whose numbers lie on the CPU.

It finds mistakes that a machine without a GPU hides: tensors of two devices in one operation, which
raises as a GPU does; waits of the host for the device, counted by line of the steps; and what may
not be recorded as a CUDA graph, or does not hold when it is replayed. It does not tell speed,
rounding or memory. To torch's C++ the tensors are the CPU's: autograd works.
"""

import collections
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from traceback import walk_stack
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

ROOT, GPU = Path(__file__).resolve().parent.parent, torch.device("cuda:0")
WAITS = collections.Counter()  # (what, line) -> how often
RECORDING = []  # the graph that is being recorded, if any
LOOKS = "_local_scalar_dense nonzero _unique2 bincount masked_select equal".split()


class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU; `held` has its numbers."""

    device = GPU
    __torch_function__ = torch._C._disabled_torch_function_impl
    __reduce_ex__ = lambda self, how: self.held.detach().__reduce_ex__(how)  # noqa: E731 - saved

    @staticmethod
    def __new__(cls, held):
        same = dict(strides=held.stride(), dtype=held.dtype, device="cpu")
        new = torch.Tensor._make_wrapper_subclass(cls, held.shape, **same)
        new.held = held
        return new

    def __deepcopy__(self, memo):
        copy, parameter = OnGPU(self.held.detach().clone()), isinstance(self, torch.nn.Parameter)
        copy = torch.nn.Parameter(copy, self.requires_grad) if parameter else copy
        return memo.setdefault(id(self), copy)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        flat, form = tree_flatten((args, kwargs or {}))
        check(func, args, [v for v in flat if isinstance(v, torch.Tensor)])
        known = {id(getattr(v, "held", v)): v for v in flat}  # what is changed in place
        args, kwargs = tree_unflatten([v.held if isinstance(v, OnGPU) else v for v in flat], form)
        wrap = lambda v: known[id(v)] if id(v) in known else OnGPU(v)  # noqa: E731
        return tree_map_only(torch.Tensor, wrap, run(func, args, kwargs))


def run(func, args, kwargs):
    """Do an operation on what tensors hold, and note it where a graph is being recorded."""
    for graph in RECORDING:
        if getattr(func, "_schema", None) and func._schema.is_mutable:
            held = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
            graph.before.update({id(v): (v, v.clone()) for v in held if id(v) not in graph.before})
    out = func(*args, **kwargs)
    for graph in RECORDING:
        graph.tape.append((func, args, kwargs, out))
    return out


class Graph:
    """A CUDA graph: operations that are done again, on the same tensors."""

    def __init__(self):
        self.tape, self.before = [], {}

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.tape:
            new = func(*args, **kwargs)
            for old, v in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(v, torch.Tensor) and v.data_ptr() != old.data_ptr():  # no view
                    old.copy_(v)


@contextmanager
def record(graph, pool, stream):
    """Record what is done as a graph; as on a GPU, nothing of it happens."""
    dice = torch.get_rng_state()
    RECORDING.append(graph)
    try:
        yield
    finally:
        RECORDING.clear()
    torch.set_rng_state(dice)
    for v, before in reversed(graph.before.values()):
        v.copy_(before)


def check(func, args, tensors):
    """Count the wait that an operation is, and refuse it where a GPU would."""
    name = func._schema.name.removeprefix("aten::")
    if name in LOOKS:
        wait(name)
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        for i in args[1]:
            if i is not None and (not isinstance(i, OnGPU) or i.dtype == torch.bool):
                wait("index")  # it is copied over, or counted
            if isinstance(i, OnGPU) and not isinstance(args[0], OnGPU):
                raise RuntimeError("Expected all indices to be on the same device: cpu, cuda")
    elif name == "copy_" and isinstance(args[0], OnGPU) != isinstance(args[1], OnGPU):
        wait("copy")
    else:  # a single number may come from anywhere, where numbers are combined one by one
        single = torch.Tag.pointwise in func.tags
        if any(not isinstance(v, OnGPU) and not (single and v.dim() == 0) for v in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}, cpu, cuda")


def wait(what):
    """Count a wait, at the line of the steps that it happens in."""
    if RECORDING:
        raise RuntimeError("operation not permitted when stream is capturing")
    places = ((Path(f.f_code.co_filename), n) for f, n in walk_stack(None))
    WAITS[what, next((f"{path.name}:{n}" for path, n in places if path.parent == ROOT), "")] += 1


def move(x, *where, device=None, dtype=None, memory_format=torch.preserve_format, **how):
    """Do what Tensor.to does."""
    for v in where:
        device = v if isinstance(v, (str, torch.device)) else getattr(v, "device", device)
        dtype = v if isinstance(v, torch.dtype) else getattr(v, "dtype", dtype)
    there = torch.device(device or x.device).type == "cuda"
    if there != isinstance(x, OnGPU):
        if not (hasattr(x, "pinned") and how.get("non_blocking")):
            wait("copy")
        x = OnGPU(x.detach().clone()) if there else x.held.detach().clone()
    return x.to(dtype=dtype or x.dtype, memory_format=memory_format)


class Calls(TorchFunctionMode):
    """Take part where Python still knows the device that was asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, first = dict(kwargs or {}), (*args, None)[0]
        if func is torch.Tensor.to or (func is torch.as_tensor and torch.is_tensor(first)):
            return move(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return setattr(first, "pinned", True) or first
        here, device, dice = isinstance(first, OnGPU), kwargs.get("device"), kwargs.get("generator")
        if here and func in (torch.Tensor.cpu, torch.Tensor.tolist):
            return func(move(first, "cpu"))
        if here and func is torch.Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        there = torch.device(device or "cpu").type == "cuda"
        if dice is not None and not here and there != (dice.device.type == "cuda"):
            raise RuntimeError(f"Expected a generator of the device that is drawn on: {func}")
        if not there:
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor):
            wait("copy")
        made = run(func, args, {**kwargs, "device": "cpu"})
        return made if isinstance(made, OnGPU) else OnGPU(made)


class Generator(torch.Generator):
    """Random numbers of the CPU that may call themselves the GPU's."""

    device = None

    def __new__(cls, device="cpu"):
        new = super().__new__(cls)
        new.device = torch.device(device)
        return new


@contextmanager
def pretended_gpu():
    """Pretend that this machine has one GPU, which can bfloat16; gives the counter of waits."""
    clip, autocast, state = torch.nn.utils.clip_grad, torch.autocast, torch.zeros(16).byte()
    group = clip._group_tensors_by_device_and_dtype  # asks C++, which knows of no GPU here

    def groups(v, *more):
        return {(v[0][0].device, kind): g for (_, kind), g in group(v, *more).items()}

    cuda = dict(is_available=lambda: True, is_bf16_supported=lambda **_: True)
    cuda.update(get_rng_state=lambda *_: state, set_rng_state=lambda *_: None)
    cuda.update(CUDAGraph=Graph, graph=record, stream=nullcontext, graph_pool_handle=mock.Mock)
    cuda.update(Stream=mock.Mock, current_stream=mock.Mock, synchronize=mock.Mock)
    cuda.update(reset_peak_memory_stats=mock.Mock, max_memory_allocated=lambda: 0)
    plain = dict(autocast=lambda kind, *a, **how: autocast("cpu", *a, **how), Generator=Generator)
    asks_driver = {"_accelerator_graph_capture_health_check": lambda optimizer: None}
    asks_driver[group.__name__] = staticmethod(groups)
    places = {torch.cuda: cuda, torch: plain, clip: {group.__name__: groups}}
    WAITS.clear()
    with ExitStack() as stack:
        for place, new in (places | {torch.optim.Optimizer: asks_driver}).items():
            stack.enter_context(mock.patch.multiple(place, **new))
        swap = torch.__future__.set_overwrite_module_params_on_conversion
        stack.callback(swap, swap(True) or False)
        stack.enter_context(Calls())
        yield WAITS
