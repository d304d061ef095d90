"""Tokenizers that add different special tokens, and chat templates in the manner of well-known ones."""

from pathlib import Path

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from tests.models import VOCAB, tiny_tokenizer

# name → what the tokenizer makes of a text `$A`
ADDED = {
    "first": "<bos> $A",
    "both": "<bos> $A <eos>",
    "last": "$A <eos>",
    "two first": "<pad> <bos> $A",
    "none": "$A",
}
IDS = {"<bos>": 0, "<eos>": 1, "<pad>": 2}

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|end|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<turn>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# shows no system's turn, and says nothing of it
SILENT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n{% endif %}{% endfor %}"
)


def adding(what: str) -> hf.PreTrainedTokenizerFast:
    """The tiny tokenizer, adding the special tokens of a row of `ADDED`."""
    tokenizer = tiny_tokenizer(special_bos=False)
    single = ADDED[what]
    specials = [(name, IDS[name]) for name in single.split() if name in IDS]
    if specials:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=specials)
    return tokenizer


def wordpiece() -> hf.PreTrainedTokenizerFast:
    """Words in pieces between [CLS] and [SEP], like BERT's."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[CLS]", "[SEP]", "[UNK]", "[PAD]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=special)
    backend.train_from_iterator(["the cat sat on the mat and saw that old dog run far away from home"] * 9, trainer)
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )


def saved(model: hf.PreTrainedModel, tokenizer: hf.PreTrainedTokenizerFast, directory: Path) -> str:
    """A directory of the model with this tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
