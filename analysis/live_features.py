"""Which features fire on each token of a text: the prompt view of the dashboard.

    echo '{"text": "Dear Sir"}' | python -m analysis.live_features outputs/runs/NAME SAE

A line of JSON in, a line of JSON out, after the line "ready"; data_visualization.serve asks.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from analysis.program import MeasureConfig, run_program
from analysis.subjects import Material, load_subjects
from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.harvest import activations, kept_rows
from sparse_coding.models import choose_device
from sparse_coding.storage import read_object
from sparse_coding.text import Tokenizer, special_ids, starts_with_bos, valid_positions

MAX_CHARACTERS = 20_000
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character
MAX_TOKENS_OF_CHARACTERS = 12  # a run of tokens none of which ends where a character does


def readable_pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token stands for as text, to be read one after the other.

    A character whose bytes are of several tokens (Korean often is) stands at the first of them,
    the others are empty. One that is cut off at an end stays as replacement characters.
    """
    pieces = [tokenizer.decode([i]) for i in ids]
    for start in range(len(ids)):
        if REPLACEMENT not in pieces[start]:
            continue
        for end in range(start + 2, min(len(ids), start + MAX_TOKENS_OF_CHARACTERS) + 1):
            text = tokenizer.decode(list(ids[start:end]))
            if REPLACEMENT not in text:
                pieces[start:end] = [text] + [""] * (end - start - 1)
                break
    return pieces


class Reader:
    """A language model with one dictionary at its hook; reads one context at a time."""

    def __init__(self, material: Material, dictionary: Dictionary, features: Tensor) -> None:
        self.material, self.dictionary = material, dictionary
        self.is_shown = torch.zeros(dictionary.d_sae, dtype=torch.bool)
        self.is_shown[features] = True

    def encode(self, text: str, n_top: int = 8) -> dict[str, Any]:
        """`of_tokens` of a text; `ValueError` if it is empty or longer than a context, without
        whose end it would be another text."""
        tokenizer, limit = self.material.lm.tokenizer, self.material.origin.context_length
        if not text.strip():
            raise ValueError("the text is empty; write a few words")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"the text has {len(text):,} characters; at most {MAX_CHARACTERS:,}")
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) >= limit:
            raise ValueError(f"the text has {len(ids)} tokens; give fewer than {limit}")
        return self.of_tokens(ids, n_top)

    @torch.inference_mode()
    def of_tokens(self, ids: Sequence[int], n_top: int = 8) -> dict[str, Any]:
        """{"tokens": [str], "features": [[[feature, activation], ...] per token]}.

        Of the features that are shown, at most the `n_top` strongest on each token, strongest
        first. As in training, nothing fires on BOS, the first position, special tokens and
        attention sinks. At most a context of tokens is read.
        """
        material, lm = self.material, self.material.lm
        if starts_with_bos(lm.tokenizer, material.origin.bos):
            ids = [lm.tokenizer.bos_token_id, *ids]
        tokens = torch.tensor([ids[: material.origin.context_length]])
        hook = material.origin.hook_name
        x = activations(lm, tokens, [hook])[hook]
        valid = valid_positions(tokens, special_ids(lm.tokenizer)).to(x.device)
        keep = kept_rows(x, valid, material.max_norm)[0].cpu()
        f = self.dictionary.encode(x[0].float()).cpu() * self.is_shown * keep[:, None]
        strongest = f.topk(min(n_top, f.shape[1]), dim=1)
        features = [
            [[i, value] for i, value in zip(*pair, strict=True) if value > 0]
            for pair in zip(strongest.indices.tolist(), strongest.values.tolist(), strict=True)
        ]
        return {
            "tokens": readable_pieces(tokens[0].tolist(), lm.tokenizer),
            "features": features,
        }


@dataclass(frozen=True)
class Config:
    """Which dictionary; what was collected of it says where it is."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or outputs."""
    name: Annotated[str, tyro.conf.Positional]
    """Its name in the folder's results/dashboard."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU) or a torch device."""


def reader_of(cfg: Config) -> Reader:
    """The dictionary that `collect_dashboard` collected, as it did."""
    choose_device(cfg.device)
    index = cfg.folder / "results" / "dashboard" / cfg.name / "index.json"
    if not index.is_file():
        raise UserError(f"{index} does not exist; run python -m analysis.collect_dashboard")
    content = read_object(index, "config")
    config, rows = content["config"], content.get("rows")
    if not {"source", "sae"} <= config.keys() or not isinstance(rows, list):
        raise UserError(f"{index} is of another version; collect it anew")
    known = [key for key in MeasureConfig.__dataclass_fields__ if key in config]
    settings = {key: config[key] for key in known} | {"device": cfg.device, "output": None}
    subjects = load_subjects([config["source"]], MeasureConfig(**settings), with_other_places=True)
    chosen = [subject for subject in subjects if subject.name == config["sae"]]
    if not chosen:
        raise UserError(f"{config['source']} has no dictionary {config['sae']} any more")
    material = Material(chosen[0].origin, cfg.device)
    material.check(chosen)
    features = torch.tensor([row["feature"] for row in rows])
    return Reader(material, chosen[0].dictionary, features)


def main(cfg: Config) -> None:
    """Say that it is ready, then answer each line of standard input with one of output."""
    reader = reader_of(cfg)
    reader.encode("ready")  # the first text is no slower than the next
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = reader.encode(json.loads(line)["text"])
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    run_program(Config, main)
