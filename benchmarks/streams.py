"""Activations of one hook of one language model, through other libraries' own pipelines.

Every pipeline reads the same contexts and runs the same weights in the same dtype; each shuffles
in its own buffer.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from benchmarks.peers import without_patches
from sparse_coding.config import RunConfig
from sparse_coding.errors import UserError
from sparse_coding.harvest import hook_width
from sparse_coding.models import EMBEDDED, EMBEDDED_CACHE, LanguageModel, check_hook, load_lm
from sparse_coding.text import TokenBatch, contexts, load_text, special_ids

# dictionary_learning's default buffer of 30,000 contexts would hold far more than a short run.
BUFFER_CONTEXTS = 128
LM_CONTEXTS = 32
"""Contexts in one forward pass; SAELens's default."""


class Clock:
    """An iterator that counts its items and the seconds they took to make."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = iter(items)
        self.seconds = 0.0
        self.n_items = 0

    def __iter__(self) -> "Clock":
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            item = next(self.items)
        finally:
            self.seconds += time.perf_counter() - start
        self.n_items += 1
        return item


class Reading(NamedTuple):
    """What is read by all pipelines."""

    lm: LanguageModel
    hook_name: str
    d_in: int
    context_length: int
    token_batches: Callable[[str], Iterator[TokenBatch]]
    """Contexts of a split of the text, "train" or "heldout"."""

    @property
    def layer(self) -> int:
        return int(self.hook_name.split(".")[1])

    def batches(self, n_tokens: int) -> list[TokenBatch]:
        """Enough batches of the training text for `n_tokens` valid positions."""
        taken, n_valid = [], 0
        for batch in self.token_batches("train"):
            taken.append(batch)
            n_valid += int(batch.valid.sum())
            if n_valid >= n_tokens:
                return taken
        raise UserError(f"the text gives {n_valid:,} activations, not {n_tokens:,}: ask for fewer")

    def contexts(self, n_tokens: int) -> Int[Tensor, "contexts position"]:
        """Their tokens."""
        return torch.cat([batch.tokens for batch in self.batches(n_tokens)])


def reading(lm: str, text: str, hook_name: str, context_length: int) -> Reading:
    """Model and text by name; the first position of every context is a BOS."""
    if not hook_name.endswith("hook_resid_post"):
        raise UserError(
            f"--hook-name {hook_name}: dictionary_learning reads hook_resid_post alone"
        )
    model = load_lm(lm)
    check_hook(model, hook_name)
    source = load_text(text, heldout_fraction=RunConfig.heldout_fraction)

    def token_batches(split: str) -> Iterator[TokenBatch]:
        length = {"context_length": context_length, "batch_contexts": LM_CONTEXTS}
        return contexts(source.documents(split), model.tokenizer, bos="always", **length)

    d_in = hook_width(model, hook_name)
    return Reading(model, hook_name, d_in, context_length, token_batches)


def sae_lens_dataset(read: Reading, n_tokens: int) -> Any:
    """The contexts as SAELens's pretokenised data set."""
    import datasets

    return datasets.Dataset.from_dict({"input_ids": read.contexts(n_tokens).numpy()})


def sae_lens_activations(read: Reading, dataset: Any, batch_tokens: int) -> Any:
    """SAELens's ActivationsStore over the same TransformerLens model, with its default buffer."""
    from sae_lens.training.activations_store import ActivationsStore

    special = torch.tensor(sorted(special_ids(read.lm.tokenizer)))
    return ActivationsStore(
        model=read.lm.model,
        dataset=dataset,
        streaming=False,
        hook_name=read.hook_name,
        hook_head_index=None,
        context_size=read.context_length,
        d_in=read.d_in,
        n_batches_in_buffer=20,
        total_training_tokens=len(dataset),
        store_batch_size_prompts=LM_CONTEXTS,
        train_batch_size_tokens=batch_tokens,
        prepend_bos=False,  # it is in the tokens
        normalize_activations="none",
        device=read.lm.device,
        dtype="float32",
        exclude_special_tokens=special,
    )


def dictionary_learning_buffer(read: Reading, n_tokens: int, batch_tokens: int) -> Any:
    """dictionary_learning's ActivationBuffer over nnsight; it tokenises text again itself."""
    from dictionary_learning.buffer import ActivationBuffer
    from nnsight import LanguageModel as TracedModel

    without_patches()
    texts = read.lm.tokenizer.batch_decode(read.contexts(n_tokens))
    # A bridge alters the model inside it, so the weights are loaded once more.
    model = _transformers_model(read.lm)
    named_blocks = (
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == read.lm.n_layers
    )
    traced = TracedModel(model, tokenizer=read.lm.tokenizer)
    blocks = functools.reduce(getattr, next(named_blocks).split("."), traced)
    return ActivationBuffer(
        iter(texts),
        traced,
        blocks[read.layer],
        d_submodule=read.d_in,
        n_ctxs=BUFFER_CONTEXTS,
        ctx_len=read.context_length,
        refresh_batch_size=LM_CONTEXTS,
        out_batch_size=batch_tokens,
        device="cpu",
        remove_bos=True,
    )


def _transformers_model(lm: LanguageModel) -> nn.Module:
    """The same weights outside TransformerLens."""
    from transformers import AutoModelForCausalLM

    source = EMBEDDED_CACHE if lm.name == EMBEDDED else lm.name
    return AutoModelForCausalLM.from_pretrained(source, dtype=lm.dtype).to(lm.device).eval()
