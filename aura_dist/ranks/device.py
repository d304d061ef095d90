"""Which accelerator torch can use here, and what differs between kinds of them. Imports torch when it is asked."""

import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from aura_dist.errors import ModelError


@dataclass(frozen=True)
class Kind:
    """A kind of accelerator: the backend of its collectives, and the setting that hides all of them."""

    backend: str
    hidden_by: str


# as torch calls it (ROCm's is `cuda` too) → what differs
KINDS = {"cuda": Kind("nccl", "CUDA_VISIBLE_DEVICES="), "xpu": Kind("xccl", "ONEAPI_DEVICE_SELECTOR=opencl:cpu")}


def accelerator() -> str | None:
    """Kind of this machine's accelerator, one of `KINDS`; None if there is none."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device is not None and device.type in KINDS else None


def kind_of(device: str) -> str:
    """`cuda:1` → `cuda`."""
    return device.partition(":")[0]


def backend_of(device: str) -> str:
    """Backend of the collectives among devices such as `cuda:1`; gloo's on a CPU."""
    return KINDS[kind_of(device)].backend if kind_of(device) in KINDS else "gloo"


def device_memory(device: str) -> int | None:
    """Free bytes of a device such as `cuda:1`; None for a CPU."""
    return None if device == "cpu" else int(_module(device).mem_get_info(_torch_device(device))[0])


def memory_within_reach(device: str) -> int | None:
    """Free bytes of a device, and those that torch holds for this process; None for a CPU."""
    if device == "cpu":
        return None
    return (device_memory(device) or 0) + int(_module(device).memory_reserved(_torch_device(device)))


def identity(device: str) -> str:
    """What tells one accelerator from every other on any machine; empty where the driver does not say it."""
    found = getattr(_module(device).get_device_properties(_torch_device(device)), "uuid", None)
    return "" if found is None else f"{platform.node()} {found}"


def page_locked_bytes(num_bytes: int) -> int:
    """Bytes that torch takes for a page-locked block: the next power of two (`CachingHostAllocator.h`)."""
    return 1 << max(0, num_bytes - 1).bit_length()


def use_exact_float32() -> None:
    """From here on, GPUs compute float32 products and convolutions in float32: TF32 would change the fourth digit."""
    import torch

    cudnn: Any = torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    for part in (cudnn.conv, cudnn.rnn):
        part.fp32_precision = "ieee"  # else `torch.backends.fp32_precision` would decide


@contextmanager
def exact_float32() -> Iterator[None]:
    """`use_exact_float32` within the context; on exit all is as it was.

    torch has two ways to set this, and refuses to read the older one where the newer one has set something else.
    """
    import torch

    backends: Any = torch.backends
    cudnn = backends.cudnn
    parts = backends.cuda.matmul, backends.mkldnn.matmul, cudnn.conv, cudnn.rnn
    with ExitStack() as undo:
        for part in parts:  # these last, because the older ones set them too
            undo.callback(setattr, part, "fp32_precision", part.fp32_precision)
        with suppress(RuntimeError):
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        with suppress(RuntimeError):
            undo.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        use_exact_float32()
        yield


def _torch_device(device: str) -> Any:
    import torch

    return torch.device(device)


def _module(device: str) -> Any:
    """What torch has for a kind of device, such as `torch.cuda`."""
    import torch

    return torch.get_device_module(_torch_device(device))


def wants_gpu(wanted: str) -> bool:
    """Whether `--device` means a GPU: `cuda` always, `auto` if there is one."""
    return wanted == "cuda" or (wanted == "auto" and accelerator() is not None)


def pick_device(wanted: str) -> str:
    """The device that `--device` means, as torch calls it; ModelError if it asks for a GPU and there is none."""
    if not wants_gpu(wanted):
        return "cpu"
    found = accelerator()
    if found is None:
        raise ModelError("--device cuda: expected a GPU that torch can use, found none; use --device cpu")
    return found
