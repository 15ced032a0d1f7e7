"""Tiny random language models as folders: real architectures and formats, no download."""

from pathlib import Path
from typing import Any, NamedTuple

TEXT = "the red cat sees one old tree near the blue bird; a new dog finds it and likes it. " * 9
END = "<|endoftext|>"
FAMILIES = ("gpt2", "gpt_neox", "llama")
D_MODEL = 12


def save_tiny_lm(
    family: str, folder: Path, text: str, *, n_layers: int = 2, seed: int = 0, std: float = 0.2
) -> None:
    """A random model of `family` (width 12) with a byte-level BPE tokenizer made from `text`.

    The weights are larger than any initialiser's: at its 0.02 a block of width 12 adds next to
    nothing to the stream, and a test could not tell one layer from the next.
    """
    import torch
    from transformers import AutoModelForCausalLM

    n_tokens = _save_tokenizer(folder, text)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(family, n_tokens, n_layers, std))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # initialisers set these to 0, which hides a lost one
                parameter.normal_(std=std)
    model.save_pretrained(folder)


def _save_tokenizer(folder: Path, text: str) -> int:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=300, special_tokens=[END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _config(family: str, n_tokens: int, n_layers: int, std: float):
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

    common = {
        "vocab_size": n_tokens, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": std,
    }  # fmt: skip
    if family == "gpt2":
        shape = {"n_embd": D_MODEL, "n_layer": n_layers, "n_head": 2, "n_inner": 20}
        return GPT2Config(n_positions=64, **shape, **common)
    shape = {
        "hidden_size": D_MODEL, "num_hidden_layers": n_layers, "num_attention_heads": 2,
        "intermediate_size": 20, "max_position_embeddings": 64,
    }  # fmt: skip
    if family == "llama":
        return LlamaConfig(num_key_value_heads=1, tie_word_embeddings=False, **shape, **common)
    return GPTNeoXConfig(**shape, **common)


class Block(NamedTuple):
    """The modules of one block, as transformers names them."""

    block: Any
    attention: Any
    mlp: Any


def load_plain(folder: Path):
    """The model of transformers itself, in float32, for comparison."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def blocks_of(plain) -> list[Block]:
    """The blocks of a model of transformers."""
    family = plain.config.model_type
    blocks = plain.base_model.h if family == "gpt2" else plain.base_model.layers
    attention = {"gpt2": "attn", "gpt_neox": "attention", "llama": "self_attn"}[family]
    return [Block(block, getattr(block, attention), block.mlp) for block in blocks]


def first(output: Any) -> Any:
    """The tensor of a module that returns it alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output
