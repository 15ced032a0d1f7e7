"""A finished run of the entry script on a tiny model, as a user makes it: subprocess, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from build_notebook import ROOT
from tiny_models import save_tiny_lm

WORDS = [
    "the", "a", "one", "red", "blue", "old", "new", "cat", "dog", "bird", "tree", "sees", "finds",
    "likes", "near", "under", "over",
]  # fmt: skip
SETTINGS = (
    "--lm lm --text text.jsonl --hook-name blocks.1.hook_resid_post --context-length 32 "
    "--heldout-fraction 0.2 --ratios 1 4 --target-l0 6 --initial-l0 8 --n-tokens 12000 "
    "--batch-tokens 64 --n-tokens-eval 1500 --n-tokens-ce 600 --log-every 5 --device cpu"
)


# In the environment of every program that tests run; test_secrets looks for them.
SECRETS = {
    "HF_TOKEN": "hf_plantedplantedplantedplanted",
    "OPENAI_API_KEY": "sk-planted-planted-planted",
    "WANDB_API_KEY": "planted" * 6,
    "HTTPS_PROXY": "http://somebody:planted-password@127.0.0.1:9",
}


def save_place(folder: Path, n_documents: int = 200) -> None:
    """A GPT-NeoX of two layers, lm/, and a text of some 150 tokens a document, text.jsonl."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(n_documents):
        drawn = torch.randint(len(WORDS), (120,), generator=generator).tolist()
        texts.append(" ".join(WORDS[i] for i in drawn))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    save_tiny_lm("gpt_neox", folder / "lm", "\n".join(texts[:200]))


def command(*arguments: str) -> list[str]:
    """The entry script's, with small settings; the place is the working directory."""
    return [sys.executable, str(ROOT / "easy_training_base.py"), *SETTINGS.split(), *arguments]


def run_in(place: Path, command: list[str]) -> subprocess.CompletedProcess:
    """What became of a command; output as text."""
    environment = SECRETS | os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment)


def run_program(place: Path, program: str, *arguments: str) -> subprocess.CompletedProcess:
    """`python -m PROGRAM ARGUMENTS` in the place."""
    return run_in(place, [sys.executable, "-m", program, *arguments])
