"""STAND-IN for CUDA under the real OpenRLHF 0.11.2: the hardware alone, so that it runs on a CPU.

A .pth file of the environment imports it in each Python, Ray's workers and vLLM's too (see
test_real_openrlhf.py, which makes that environment). Nothing of OpenRLHF is changed: each
function below is called with a library's module right behind that module's own code, and puts the CPU in the
place of a GPU there. What that leaves unproven: memory, CUDA IPC, NCCL, real sleeping and offloading,
kernels, speed.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import pickle
import sys

STAND_INS = {}
GPUS = int(os.environ.get("STAND_IN_GPUS", "2"))
for name, value in {
    "DS_ACCELERATOR": "cpu",
    "ACCELERATE_USE_CPU": "true",  # our reward server is not to wonder that torch sees no GPU
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():
    os.environ.setdefault(name, value)
if any(word.endswith("run_openrlhf.py") for word in sys.orig_argv):
    os.sched_getaffinity = lambda pid: set(range(16))  # of a machine with GPUs


def stands_in(module):
    """Call the decorated function with `module` once that has been imported."""
    return lambda function: STAND_INS.setdefault(module, function)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        change = STAND_INS.pop(name, None)
        spec = change and importlib.machinery.PathFinder.find_spec(name, path)
        if not spec or not spec.loader:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())


def means_gpu(device):
    return (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith("cuda")


@stands_in("torch")
def one_gpu_that_is_the_cpu(torch):
    def nothing(name):  # a function for each name: torch._dynamo refuses one that stands for several
        return lambda *args, _name=name, **kwargs: None

    torch.cuda.current_device = lambda: 0
    for name in ("set_device", "synchronize", "current_stream"):
        setattr(torch.cuda, name, nothing(name))

    to = torch.Tensor.to

    def moved(tensor, *args, **kwargs):
        device = args[0] if args else kwargs.get("device")
        if device is None or isinstance(device, (torch.dtype, torch.Tensor)) or not means_gpu(device):
            return to(tensor, *args, **kwargs)
        # A copy, as a real move is one: what Ray hands over is read-only.
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "copy")}
        rest = [value for value in args[1:] if not isinstance(value, bool)]
        return to(tensor, torch.device("cpu"), *rest, copy=True, **kwargs)

    torch.Tensor.to = moved

    import torch.utils._device

    torch.utils._device._device_constructors()  # `with torch.device(…)` knows the true functions from here on
    for name in ("tensor", "as_tensor", "empty", "zeros", "ones"):
        make = getattr(torch, name)

        @functools.wraps(make)
        def made(*args, _make=make, **kwargs):
            if kwargs.get("device") is not None and means_gpu(kwargs["device"]):
                kwargs["device"] = "cpu"
            return _make(*args, **kwargs)

        setattr(torch, name, made)


@stands_in("torch.distributed.device_mesh")
def mesh_of_cpus(module):
    init = module.init_device_mesh
    module.init_device_mesh = lambda kind, *args, **kwargs: init(
        "cpu" if kind == "cuda" else kind, *args, **kwargs
    )


def from_handle(data, *_):
    return pickle.loads(data)


from_handle.__module__ = "stand_in_for_cuda"


@stands_in("torch.multiprocessing.reductions")
def handle_is_the_tensor(module):
    """In place of a handle of CUDA IPC; the seventh argument is the device, which the receiver replaces."""
    module.reduce_tensor = lambda tensor: (from_handle, (pickle.dumps(tensor.detach()), *[0] * 6))


@stands_in("openrlhf.trainer.ray.utils")
def names_of_gpus(module):
    module.get_physical_gpu_id = lambda: (
        f"stand-in {os.uname().nodename} {os.environ.get('CUDA_VISIBLE_DEVICES')}"
    )


@stands_in("ray")
def cluster_of_gpus(ray):
    init = ray.init

    def declared(*args, **kwargs):
        if not args and not kwargs.get("address") and not os.environ.get("RAY_ADDRESS"):
            kwargs = {"num_gpus": GPUS, "num_cpus": GPUS + 2, "include_dashboard": False} | kwargs
        return init(*args, **kwargs)

    ray.init = declared


@stands_in("vllm.platforms.cpu")
def sleep_is_there(module):
    """vLLM's worker for CPUs takes sleep and wake_up and does nothing; its platform says that it cannot."""
    module.CpuPlatform.is_sleep_mode_available = lambda self: True


@stands_in("vllm.model_executor.layers.utils")
def weights_stay_loadable(module):
    """On the CPU vLLM packs the weights of linear layers and drops them: new ones could not be loaded."""

    def unpacked(layer, remove_weight):
        import torch

        layer.cpu_linear = torch.nn.functional.linear

    module.dispatch_cpu_unquantized_gemm = unpacked


@stands_in("vllm.distributed.device_communicators.pynccl")
def broadcast_over_tcp(module):
    class OverTCP:
        def __init__(self, group, device, **_):
            self.group = group

        def broadcast(self, tensor, src, stream=None):
            mine = tensor if self.group.rank == src else None
            tensor.copy_(self.group.broadcast_obj(mine, src))

    module.PyNcclCommunicator = OverTCP


@stands_in("transformers.modeling_utils")
def flash_may_be_chosen(module):
    module.PreTrainedModel._flash_attn_can_dispatch = lambda self, *args, **kwargs: True


@stands_in("transformers.modeling_flash_attention_utils")
def flash_is_there(module):
    module.is_flash_attn_2_available = lambda *args, **kwargs: True
