"""Which accelerator torch can use here. Imports torch when it is asked."""

from aura_dist.errors import ModelError

# kind of device, as torch calls it (ROCm's is `cuda` too) → the backend of its collectives
BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


def accelerator() -> str | None:
    """Kind of this machine's accelerator, one of `BACKENDS`; None if there is none."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device is not None and device.type in BACKENDS else None


def backend_of(device: str) -> str:
    """Backend of the collectives among devices such as `cuda:1`; gloo's on a CPU."""
    return BACKENDS.get(device.partition(":")[0], "gloo")


def device_memory(device: str) -> int | None:
    """Free bytes of a device such as `cuda:1`; None for a CPU."""
    import torch

    if device == "cpu":
        return None
    where = torch.device(device)
    free, _ = torch.get_device_module(where).mem_get_info(where)
    return int(free)


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
