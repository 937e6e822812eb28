"""A stand-in for a GPU: a second device, `standin:0`, whose tensors lie in host memory and do not mix with the CPU's.

`python -m pytest -p tests.second_device` runs tests with it, as `make devices` does: trainers, `device_map="auto"`,
pipelines and PEFT's loaders then put things there, as on a machine with a GPU, and code that leaves a tensor on the CPU
fails as it would there. It does not imitate kernels, rounding, other processes, autocast or torch.compile, and layers
take the plain path on it.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """What torch asks of `torch.standin`, and transformers of any device's module."""

    __name__ = "torch.standin"

    def get_amp_supported_dtype(self):
        return []


_setup_privateuseone_for_python_backend("standin", Backend())

DEVICE = torch.device("standin", 0)
aten = torch.ops.aten
MOVES = (aten._to_copy, aten.copy_)
INDEXES = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class SecondTensor(Tensor):
    """A tensor of the second device; `raw` is the one that has its values."""

    @staticmethod
    def __new__(cls, raw: Tensor) -> "SecondTensor":
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, raw.shape, device=DEVICE, **layout)
        tensor.raw = raw
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def __repr__(self):
        return f"standin({self.raw})"

    def __format__(self, specification):
        return format(self.raw, specification)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                copied = SecondTensor(self.raw.clone())
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def untyped_storage(self):  # by which files are written
        return self.raw.untyped_storage()

    def data_ptr(self):
        return self.raw.data_ptr()

    def tolist(self):
        return self.raw.tolist()

    def numpy(self):
        raise TypeError(f"A tensor on {DEVICE} is no array: use Tensor.cpu() first.")


class Placing(TorchDispatchMode):
    """Sees the operations that make tensors, which have no argument to say where."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """An operation on the values; the result is on the device that it would be on."""
    if function in (aten.is_pinned.default, aten._pin_memory.default):  # what a data loader does to its batches
        return function is aten.is_pinned.default or args[0]
    operation, tensors = function.overloadpacket, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    asked = kwargs.get("device") and torch.device(kwargs["device"])
    there = any(isinstance(t, SecondTensor) for t in tensors)
    if not there and (asked is None or asked.type != DEVICE.type):
        return function(*args, **kwargs)
    if there and operation not in MOVES:
        check_places(function, [args[0]] if operation in INDEXES else tensors)
    if asked is not None:
        there, kwargs = asked.type == DEVICE.type, kwargs | {"device": torch.device("cpu")}
    elif operation is aten.copy_:
        there = isinstance(args[0], SecondTensor)
    raw_args, raw_kwargs = tree_map(values, (args, kwargs))
    wrapped = {id(values(t)): t for t in tensors}  # an operation in place gives back what it was given

    def place(result):
        if not isinstance(result, Tensor):
            return result
        return wrapped.get(id(result)) if id(result) in wrapped else SecondTensor(result) if there else result

    return tree_map(place, function(*raw_args, **raw_kwargs))


def check_places(function, tensors):
    """Numbers without a dimension may lie on the CPU, and so may an index, as for CUDA."""
    if any(not isinstance(t, SecondTensor) and t.dim() for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} got {DEVICE} and cpu")


def values(tensor):
    return tensor.raw if isinstance(tensor, SecondTensor) else tensor


def start() -> None:
    """For the rest of the process."""
    torch._C._set_multithreading_enabled(False)  # the backward's threads are those of real devices
    torch._C._set_only_lift_cpu_tensors(True)  # so that `torch.tensor(..., device=...)` is seen
    Placing().__enter__()


def pytest_configure(config):
    """Make the second device the one that libraries find."""
    import peft.peft_model
    import peft.utils.hotswap
    import peft.utils.save_and_load
    from transformers import Pipeline, PreTrainedModel

    start()
    for module in (peft.peft_model, peft.utils.hotswap, peft.utils.save_and_load):
        module.infer_device = lambda: str(DEVICE)

    load = peft.utils.save_and_load.safe_load_file
    peft.utils.save_and_load.safe_load_file = lambda name, device: {k: v.to(device) for k, v in load(name).items()}

    from_pretrained, make_pipeline = PreTrainedModel.from_pretrained.__func__, Pipeline.__init__

    def from_pretrained_there(cls, *args, device_map=None, **kwargs):
        model = from_pretrained(cls, *args, device_map=None if device_map == "auto" else device_map, **kwargs)
        return model.to(DEVICE) if device_map == "auto" else model

    def make_pipeline_there(pipeline, *args, device=None, **kwargs):
        make_pipeline(pipeline, *args, device=DEVICE if device is None else device, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained_there)
    Pipeline.__init__ = make_pipeline_there


@pytest.fixture(autouse=True)
def _trainers_find_it(request, monkeypatch):
    if "device" in request.fixturenames:
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(DEVICE))
