"""Train one of the two tiny language models that ship here: same text, another seed.

    python -m pretrained.train_tiny_lm --seed 0 --output pretrained/tiny-a
    python -m pretrained.train_tiny_lm --seed 1 --output pretrained/tiny-b

Each is a GPT-NeoX (Pythia's architecture) of 2.6 million parameters on the training split of the
builtin text, about 45 minutes on one CPU core. The seed draws the initial weights and the order of
the contexts; the tokenizer depends on the text alone. The result is a Hugging Face folder in
float16 with a model card. A run that is stopped goes on with the same command.
"""

import copy
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from sparse_coding.checkpoint import StopSignal, load_run, save_run
from sparse_coding.config import as_json, environment
from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.metrics import Interval, bootstrap_weights, interval
from sparse_coding.settings import (
    Count,
    CountOrZero,
    OutputFolder,
    Positive,
    PositiveOrZero,
    Range,
    Seed,
    read_settings,
)
from sparse_coding.storage import atomic_path, write_json
from sparse_coding.text import Text, TokenBatch, contexts, load_text

END = "<|endoftext|>"


@dataclass(frozen=True)
class Config:
    """One tiny language model."""

    seed: Seed = 0
    """Of the initial weights and of the order of the contexts."""
    output: OutputFolder = Path("outputs/tiny_lm")
    """Folder of the finished model."""
    work: OutputFolder = Path("outputs/cache/tiny_lm")
    """Where checkpoints and the log of losses are kept, in a folder per seed."""
    n_steps: Count = 3000
    """Optimizer steps."""
    batch_contexts: Count = 16
    """Contexts in a step."""
    context_length: Annotated[int, Range(2)] = 256
    """Tokens in a context, the separator between documents included."""
    lr: Positive = 3e-3
    """Peak learning rate of AdamW: linear warmup, then linear to zero."""
    warmup_steps: CountOrZero = 100
    """Steps over which it rises."""
    weight_decay: PositiveOrZero = 0.1
    """Of matrices; biases and norms have none."""
    vocabulary: Annotated[int, Range(257)] = 4096
    """Tokens, 256 bytes and the separator among them."""
    d_model: Count = 192
    """Width of the residual stream."""
    n_layers: Count = 4
    """Blocks."""
    n_heads: Count = 4
    """Attention heads in a block."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What products are computed in (autocast); the weights are float32 in training."""
    checkpoint_every: Count = 100
    """Steps between checkpoints."""


def train_tokenizer(text: Text, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training split: any text comes back as it was."""
    bpe = ByteLevelBPETokenizer()
    documents = (document.text for document in text.documents("train"))
    bpe.train_from_iterator(documents, vocab_size=vocabulary, special_tokens=[END])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END)


def build_model(cfg: Config) -> GPTNeoXForCausalLM:
    """Pythia's architecture (parallel blocks, a quarter of each head rotary), tied embeddings."""
    settings = GPTNeoXConfig(
        vocab_size=cfg.vocabulary,
        hidden_size=cfg.d_model,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        intermediate_size=4 * cfg.d_model,
        max_position_embeddings=cfg.context_length,
        rotary_pct=0.25,
        use_parallel_residual=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)  # initialisers draw from the global generator
        return GPTNeoXForCausalLM(settings)


def token_contexts(
    text: Text, split: str, tokenizer: PreTrainedTokenizerFast, length: int
) -> Iterator[TokenBatch]:
    """A split as contexts of documents joined by the separator."""
    return contexts(text.documents(split), tokenizer, context_length=length, bos="never")


def lr_at(cfg: Config, step: int) -> float:
    """Linear from 0 over `warmup_steps`, then linear to 0 at the end."""
    rise = (step + 1) / cfg.warmup_steps
    fall = (cfg.n_steps - step) / max(1, cfg.n_steps - cfg.warmup_steps)
    return cfg.lr * min(1.0, rise, fall)


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Int[Tensor, " vocabulary"]:
    """How many bytes of text each token stands for; 0 for the separator."""
    vocabulary = tokenizer.get_vocab()
    n_bytes = torch.zeros(len(vocabulary), dtype=torch.int64)
    for token, index in vocabulary.items():
        # a byte-level vocabulary is written with one character a byte
        n_bytes[index] = 0 if token == END else len(token)
    return n_bytes


class Training:
    """Model and optimizer; the state is named tensors, so that a stopped run goes on exactly."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.model = cfg, build_model(cfg)
        self.parameters = dict(self.model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        others = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": cfg.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, tokens: Int[Tensor, "contexts position"], n_steps_done: int) -> float:
        """One update; returns the loss in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.cfg, n_steps_done)
        with torch.autocast("cpu", getattr(torch, self.cfg.dtype), self.cfg.dtype != "float32"):
            loss = self.model(tokens, labels=tokens).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        return loss.item()

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and moments by name."""
        moments = {
            f"{key}|{name}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        return moments | {f"weight|{name}": p for name, p in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"weight|{name}"])
            for key, value in self.optimizer.state[parameter].items():
                value.copy_(state[f"{key}|{name}"])


def train(cfg: Config, tokens: Int[Tensor, "n position"], work: Path) -> Training:
    """Train to the end or go on from the newest checkpoint."""
    generator = torch.Generator().manual_seed(cfg.seed)
    n_epochs = math.ceil(cfg.n_steps * cfg.batch_contexts / len(tokens))
    order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(n_epochs)])
    training = Training(cfg)
    first = load_run(work, {"training": training})
    stop = StopSignal()
    with open(work / "log.jsonl", "a", encoding="utf-8") as log:
        for step in tqdm(range(first, cfg.n_steps), initial=first, total=cfg.n_steps, unit="step"):
            chosen = order[step * cfg.batch_contexts : (step + 1) * cfg.batch_contexts]
            loss = training.step(tokens[chosen].long(), step)
            log.write(json.dumps({"step": step + 1, "loss": loss, "time": time.time()}) + "\n")
            done = step + 1
            if done % cfg.checkpoint_every == 0 or done == cfg.n_steps or stop.name:
                log.flush()
                save_run(work, done, {"training": training}, keep=2)
            if stop.name:
                raise SystemExit(
                    f"stopped by {stop.name} at step {done}; the same command goes on"
                )
    stop.restore()
    return training


class HeldOut(NamedTuple):
    """Mean losses on held-out documents, with 95 % intervals of a bootstrap over documents."""

    nats_per_token: Interval
    bits_per_byte: Interval
    unigram_nats_per_token: Interval
    """The control: each token predicted by its share of the training text."""
    n_tokens: int
    n_documents: int


@torch.no_grad()
def measure(
    model: GPTNeoXForCausalLM,
    batches: Iterable[TokenBatch],
    n_bytes: Int[Tensor, " vocabulary"],
    log_share: Float[Tensor, " vocabulary"],
) -> HeldOut:
    """Losses of the tokens of documents; the separator is read but not counted as a target.

    `n_bytes` is the length of each token, `log_share` the logarithm of its training frequency.
    """
    found: list[tuple[Tensor, ...]] = []
    for batch in tqdm(batches, desc="held out", unit="batch"):
        log_p = model(batch.tokens).logits[:, :-1].float().log_softmax(dim=-1)
        targets, counted = batch.tokens[:, 1:], batch.document[:, 1:] >= 0
        nats = -log_p.gather(2, targets[..., None])[..., 0][counted].double()
        chosen = targets[counted]
        found.append((batch.document[:, 1:][counted], nats, n_bytes[chosen], -log_share[chosen]))
    document, nats, size, unigram = (torch.cat(parts) for parts in zip(*found, strict=True))
    sums = torch.zeros(4, int(document.max()) + 1, dtype=torch.float64)
    values = torch.stack([torch.ones_like(nats), nats, size.double(), unigram.double()])
    sums.index_add_(1, document, values)
    weights = bootstrap_weights(sums[0] > 0, 1000, torch.Generator().manual_seed(0))
    n, nats, size, unigram = (weights @ sums.T).T
    return HeldOut(
        interval(nats / n),
        interval(nats / size / math.log(2)),
        interval(unigram / n),
        int(sums[0].sum()),
        int((sums[0] > 0).sum()),
    )


def export(training: Training, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face folder in float16: transformers and TransformerLens load it as it is."""
    model = copy.deepcopy(training.model).half()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


CARD = """\
---
license: apache-2.0
library_name: transformers
tags:
- gpt_neox
---
# {name}

A GPT-NeoX of {n_parameters:,} parameters ({cfg.n_layers} layers, width {cfg.d_model},
{cfg.n_heads} heads, tied embeddings, byte-level BPE of {cfg.vocabulary:,} tokens, contexts of
{cfg.context_length}), small enough to be shipped. `tiny-a` and `tiny-b` saw the same text; the
seed, which is all that differs, drew the initial weights and the order of the contexts. They are
for questions such as: do two models that differ in their seed alone learn the same features?

```
python easy_training_base.py --lm {name} --hook-name blocks.2.hook_resid_post
```

| held out | value | 95 % interval |
|---|---|---|
| nats per token | {nats_per_token} |
| bits per byte | {bits_per_byte} |
| nats per token of the tokens' training shares alone | {unigram_nats_per_token} |

On {n_heldout_tokens:,} tokens of {n_documents} documents that were not trained on (the
split of `easy_training_base.py`); intervals of a bootstrap over documents, which say nothing about
other seeds. Trained on {n_tokens:,} tokens of the builtin text (`sparse_coding/builtin_text.py`
names its sources and licences) in {cfg.n_steps:,} steps of {cfg.batch_contexts} contexts, AdamW,
peak learning rate {cfg.lr:g}, products in {cfg.dtype}, seed {cfg.seed}. Made by

```
python -m pretrained.train_tiny_lm --seed {cfg.seed} --output pretrained/{name}
```

It knows English speeches, plays, the Bible, Python and its documentation a little, and nothing of
the world.
"""


def card(cfg: Config, heldout: HeldOut, n_tokens: int, n_parameters: int) -> str:
    """The model card, README.md."""
    intervals = {
        name: f"{x.value:.3f} | [{x.low:.3f}, {x.high:.3f}]"
        for name, x in heldout._asdict().items()
        if isinstance(x, Interval)
    }
    return CARD.format(
        cfg=cfg,
        name=cfg.output.name,
        n_tokens=n_tokens,
        n_parameters=n_parameters,
        n_heldout_tokens=heldout.n_tokens,
        n_documents=heldout.n_documents,
        **intervals,
    )


def main() -> None:
    report_user_errors_in_one_line()
    cfg = read_settings(Config, description=__doc__)
    if (cfg.output / "config.json").exists():
        raise UserError(f"{cfg.output} holds a model; give another --output or remove it first")
    text = load_text("builtin")
    work = cfg.work / f"seed_{cfg.seed}"
    work.mkdir(parents=True, exist_ok=True)
    print("tokenizer ...", flush=True)
    tokenizer = train_tokenizer(text, cfg.vocabulary)
    batches = token_contexts(text, "train", tokenizer, cfg.context_length)
    tokens = torch.cat([b.tokens.int() for b in tqdm(batches, desc="tokenise", unit="batch")])
    print(f"{tokens.numel():,} training tokens, {len(tokens):,} contexts")
    training = train(cfg, tokens, work)
    export(training, tokenizer, cfg.output)
    counts = tokens.flatten().long().bincount(minlength=cfg.vocabulary).double() + 1
    n_bytes = token_bytes(tokenizer)
    finished = GPTNeoXForCausalLM.from_pretrained(cfg.output, dtype=torch.float32)
    batches = token_contexts(text, "heldout", tokenizer, cfg.context_length)
    heldout = measure(finished, batches, n_bytes, (counts / counts.sum()).log())
    n_tokens = cfg.n_steps * cfg.batch_contexts * cfg.context_length
    n_parameters = sum(parameter.numel() for parameter in training.parameters.values())
    about = card(cfg, heldout, n_tokens, n_parameters)
    with atomic_path(cfg.output / "README.md") as temporary:
        temporary.write_text(about, encoding="utf-8")
    results = {key: getattr(heldout, key) for key in HeldOut._fields}
    write_json(
        cfg.output / "training.json",
        {"config": as_json(cfg), "environment": environment("cpu"), "heldout": results},
    )
    print(about)


if __name__ == "__main__":
    main()
