"""A GPU that is not there, to rehearse on: tensors that say `cuda:0` and are computed on the CPU.

It refuses what CUDA refuses, tensors of two devices in one operator and a generator of another
device, and it notes where the program would have to wait for the GPU. PyTorch's C++ knows nothing
of it and takes all for the CPU's; what C++ settles before an operator runs (`.to`, `device=`,
`.tolist()`) is therefore settled here, in a function mode."""
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

ROOT = str(Path(__file__).parent.parent)
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
waits = []  # "file:line operator" for each wait since the pretence began


def wait(operator: str):
    """Notes a wait, and the line of the program that asked for it."""
    frame = sys._getframe()
    while frame.f_back and os.path.dirname(frame.f_code.co_filename) != ROOT:
        frame = frame.f_back
    waits.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {operator}")


class GPUTensor(Tensor):
    """A tensor that says it lies on `cuda:0`; its operators come through `__torch_dispatch__`."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse_or_note(operator, args, kwargs)
        with torch._C._DisableTorchDispatch():
            result = operator(*args, **kwargs)
        return tree_map(on_gpu, result)

    def __format__(self, spec):
        return format(self.item(), spec)

    def __reduce_ex__(self, protocol):  # torch.save reads it
        wait("save")
        return on_cpu(self).__reduce_ex__(protocol)


def on_gpu(x):
    """The same memory, said to be the GPU's; what is no tensor stays as it is."""
    if not isinstance(x, Tensor) or isinstance(x, GPUTensor):
        return x
    return Tensor._make_subclass(GPUTensor, x, x.requires_grad)


def on_cpu(x):
    """The same memory, said to be the CPU's."""
    if not isinstance(x, GPUTensor):
        return x
    here = torch.empty(0, dtype=x.dtype)
    return here.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def tensors_in(x) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [each for part in x for each in tensors_in(part)] if isinstance(x, (tuple, list)) else []


# --- what an operator may be given, and which ones wait -------------------------------------------

# The host reads their result, or the result's shape.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2",
         "unique_dim", "unique_consecutive", "repeat_interleave", "_linalg_check_errors"}
TAKE_A_NUMBER = {"where", "masked_fill", "masked_fill_", "fill_", "index_put_"}


def refuse_or_note(operator, args, kwargs):
    """Raises RuntimeError where CUDA does; notes a wait."""
    name = operator._schema.name.removeprefix("aten::")
    here = [x for x in tensors_in([args, [*kwargs.values()]]) if not isinstance(x, GPUTensor)]
    if name == "copy_":
        if here and not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
            wait(name)
        return
    if name in ("index", "index_put_") and isinstance(args[0], GPUTensor):
        for index in filter(lambda index: index is not None, args[1]):
            is_mask = index.dtype == torch.bool and (name == "index" or args[2].numel() > 1)
            if is_mask or not isinstance(index, GPUTensor):  # counted, or copied to the GPU
                wait(name)
            here = [x for x in here if x is not index]
    if name in READS:
        wait(name)
    takes_a_number = torch.Tag.pointwise in operator.tags or name in TAKE_A_NUMBER
    writes_here = operator._schema.is_mutable and any(x is args[0] for x in here)
    if here and (writes_here or not takes_a_number or any(x.dim() for x in here)):
        raise RuntimeError(f"{name}: tensors on two devices, cuda:0 and cpu")


# --- what C++ settles before an operator runs -----------------------------------------------------

class Generator(torch.Generator):
    """One that claims the device that it was asked for, and draws the CPU's numbers."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.claimed = torch.device(device)
        return made

    device = property(lambda self: self.claimed)


class Settled(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.__name__
        if name in ("to", "cpu", "cuda") and isinstance(args[0], Tensor):
            return moved(name, *args, **kwargs)
        if name == "pin_memory":
            return args[0]
        if name in ("numpy", "__array__") and isinstance(args[0], GPUTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "tolist" and isinstance(args[0], GPUTensor):
            wait(name)
            return on_cpu(args[0]).tolist()

        device = kwargs.get("device")
        place = None if device is None else torch.device(device).type
        if place == "cuda":
            kwargs["device"] = CPU
            if name in ("tensor", "as_tensor", "new_tensor"):  # made on the host and copied
                wait(name)
        for generator in (*args, *kwargs.values()):
            if isinstance(generator, torch.Generator):
                where = place or next((x.device.type for x in tensors_in(args)), "cpu")
                if generator.device.type != where:
                    raise RuntimeError(f"{name}: a generator on {generator.device} for {where}")
        result = function(*args, **kwargs)
        return result if place is None else (on_gpu if place == "cuda" else on_cpu)(result)


def moved(name, x, *args, non_blocking=False, **kwargs):
    """`x.to(...)`, `x.cpu()` or `x.cuda()`."""
    if name != "to":
        device, dtype = torch.device(name), None
    elif args and isinstance(args[0], Tensor):
        device, dtype = args[0].device, args[0].dtype
    else:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    x = x if dtype is None else Tensor.to(x, dtype)
    if device is None or device.type == x.device.type:
        return x
    assert not (x.requires_grad and torch.is_grad_enabled()), "no gradient crosses devices here"
    if device.type == "cpu" or not non_blocking:
        wait(name)
    copy = x.detach().clone()
    return (on_gpu if device.type == "cuda" else on_cpu)(copy).requires_grad_(x.requires_grad)


def grouped(lists, with_indices=False):
    """For torch._C._group_tensors_by_device_and_dtype, which asks C++ for the device."""
    groups = {}
    for i, x in enumerate(lists[0]):
        parts, indices = groups.setdefault((x.device, x.dtype), ([[] for _ in lists], []))
        indices.append(i)
        for part, whole in zip(parts, lists):
            part += whole[i:i + 1]  # some lists are empty
    return groups


@contextmanager
def pretended_gpu():
    """A GPU while the block runs: `--device cuda` finds it."""
    real = torch.autocast

    def autocast(kind, dtype, enabled=True):
        return real("cpu", dtype, enabled and kind == "cuda")

    replaced = [(torch, "Generator", Generator), (torch, "autocast", autocast),
                (torch._C, "_group_tensors_by_device_and_dtype", grouped),
                (torch, "set_float32_matmul_precision", lambda precision: None),
                (torch.cuda, "get_device_name", lambda device: "a pretended GPU"),
                (torch.cuda, "get_device_capability", lambda device: (7, 5))]
    overwrite = torch.__future__.set_overwrite_module_params_on_conversion
    with ExitStack() as stack:
        for replacement in replaced:
            stack.enter_context(patch.object(*replacement))
        stack.callback(overwrite, torch.__future__.get_overwrite_module_params_on_conversion())
        overwrite(True)  # a parameter that is moved is another object here
        waits.clear()
        with Settled():
            yield CUDA
