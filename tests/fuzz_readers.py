"""What is read from outside: for every reader a small valid file or folder, and how it is read."""

import json
import sys
import types
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import dashboard_data
import numpy as np
import pyarrow
import torch
from pyarrow import parquet
from test_cache import ActivationCache, make_cache
from test_figures import summary_row
from tiny_models import TEXT, save_tiny_lm

from analysis.program import MeasureConfig
from analysis.subjects import load_subjects
from data_visualization import dashboard, fig_reconstruction, report, style
from pretrained import publish
from pretrained.archive import Limits, unpack
from pretrained.fetch import Store
from sparse_coding.checkpoint import load_run, save_run
from sparse_coding.config import RunConfig
from sparse_coding.errors import UserError
from sparse_coding.formats import load_dictionary
from sparse_coding.formats.crosscoder import save_crosscoder
from sparse_coding.formats.dictionary_learning import save_dictionary_learning
from sparse_coding.formats.gemma_scope import save_gemma_scope
from sparse_coding.formats.openai import save_openai
from sparse_coding.formats.saelens import save_saelens
from sparse_coding.formats.sparsify import save_sparsify
from sparse_coding.formats.tensors import write_tensors
from sparse_coding.judge import Endpoint, Judge
from sparse_coding.ladder import SAESpec
from sparse_coding.models import load_lm, size_of
from sparse_coding.runs import Run, run_settings
from sparse_coding.sae import (
    L1SAE,
    BatchTopKCrosscoderSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    TopKSAE,
)
from sparse_coding.sources import TensorActivations
from sparse_coding.text_files import FileReader
from sparse_coding.training import Trainer, TrainingConfig

D_IN, D_SAE = 3, 5
HOOK = "blocks.1.hook_resid_post"
OUT = "out"  # the one place beside its input where a reader may write


class Reader(NamedTuple):
    """Writes a small valid file or folder at a path; reads it; what it may raise."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    refusal: type[Exception] | tuple[type[Exception], ...] = UserError


def sae(cls: type, **options) -> torch.nn.Module:
    return cls(D_IN, D_SAE, torch.Generator().manual_seed(0), **options)


def crosscoder() -> BatchTopKCrosscoderSAE:
    return BatchTopKCrosscoderSAE(5, D_SAE, torch.Generator().manual_seed(0), k=2, widths=(3, 2))


def matryoshka() -> MatryoshkaSAE:
    return sae(MatryoshkaSAE, k=2, prefixes=(2, 5))


def write_old_checkpoint(path: Path) -> None:
    """As torch saved before 1.6: five pickles in a row, then the numbers."""
    state = {"pre_bias": torch.ones(D_IN), "latent_bias": torch.ones(D_SAE)}
    state |= {"encoder.weight": torch.ones(D_SAE, D_IN), "decoder.weight": torch.ones(D_IN, D_SAE)}
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_hoagy(path: Path) -> None:
    """A list of (object, hyper-parameters), the object pickled under a foreign class's name."""
    name = "autoencoders.learned_dict"
    module = types.ModuleType(name)
    module.UntiedSAE = type("UntiedSAE", (), {"__module__": name})
    thing = module.UntiedSAE()
    thing.encoder, thing.decoder = torch.ones(D_SAE, D_IN), torch.ones(D_SAE, D_IN)
    thing.encoder_bias = torch.zeros(D_SAE)
    with mock.patch.dict(
        sys.modules, {"autoencoders": types.ModuleType("autoencoders"), name: module}
    ):
        torch.save([(thing, {"dict_size": D_SAE})], path)


def write_gemma_scope_2(folder: Path) -> None:
    tensors = {key: value.float() for key, value in sae(JumpReLUSAE).state_dict().items()}
    tensors["w_enc"], tensors["w_dec"] = tensors.pop("W_enc"), tensors.pop("W_dec")
    write_tensors(folder / "params.safetensors", tensors)
    config = {"type": "sae", "architecture": "jump_relu", "hf_hook_point_in": "a"}
    (folder / "config.json").write_text(json.dumps(config))


def parts() -> dict:
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(0))
    spec = SAESpec("topk", 2, None, 2.0, 0)
    cfg = TrainingConfig(n_steps=4, batch_tokens=8, initial_l0=2.0, step="reference")
    return {"trainer": Trainer([spec], cfg, x), "source": TensorActivations(x, 8, seed=0)}


def with_any_checksum(function: Callable, *arguments: object, **named: object) -> object:
    """As for one who makes the checksum of what he has changed."""
    with mock.patch("sparse_coding.checkpoint._checksum", lambda tensors: "right"):
        return function(*arguments, **named)


def read_cache(folder: Path) -> None:
    cache = ActivationCache(folder)
    rows = np.arange(min(cache.n_tokens, 7))
    cache.tokens(rows), cache.documents(rows)
    for hook in list(cache.hooks)[:4]:
        assert len(cache.rows(hook, rows)) == len(rows)
        cache.mean(hook), cache.mean_square_norm(hook)


def run_config(folder: Path, **changes) -> RunConfig:
    """Of a run whose folder is OUTPUT/runs/NAME."""
    return RunConfig(name=folder.name, output=folder.parents[1], **changes)


def write_run(folder: Path) -> None:
    """A run's folder with one SAE, its summary and its log."""
    row = summary_row(2, 30.0) | {"name": "small"}
    settings = run_settings(run_config(folder))
    environment = {"device": "cpu", "commit": "0" * 12, "versions": {"torch": "2"}}
    content = {"config": settings, "environment": environment}
    metadata = {"model_name": "tiny", "hook_name": HOOK, "context_size": 32, "prepend_bos": True}
    save_saelens(matryoshka(), folder / "saes/small", metadata=metadata)
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "summary.json").write_text(json.dumps(content | {"rows": [row]}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "l0": 2.5}\n{"step": 2, "l0": 2.5}\n')


def resume_run(folder: Path) -> None:
    cfg = run_config(folder, resume=True)
    Run(cfg, run_settings(cfg), "cpu").cut_log(1)


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/cfg.json", "{}" * 40)
        archive.writestr("b.txt", "text " * 40)


def read_zip(path: Path) -> None:
    unpack(path, path.parent / OUT, Limits(n_bytes=10**6))


def read_text(path: Path) -> None:
    for document in FileReader(path, "text", False).documents():
        document.text.encode()


def write_text_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.jsonl").write_text(LINES)
    (folder / "b.txt").write_text("one\n\n\ntwo\n")


class Tags(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {key for key, _ in attrs}


def read_report(folder: Path) -> None:
    """Whatever stands in the results, it is text on the page."""
    found = Tags()
    found.feed(report.page([folder], [], []))
    assert not found.tags & {"script", "img", "iframe", "object", "svg", "form"}
    assert found.attributes <= {
        "lang",
        "charset",
        "name",
        "content",
        "http-equiv",
        "class",
        "href",
    }


def write_store(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    Store(folder).enter("a", {"a.json": "https://example.org/a.json"})


def save_lm(folder: Path) -> None:
    save_tiny_lm("gpt2", folder, TEXT, n_layers=1)
    (folder / "generation_config.json").unlink()


ROWS = [summary_row(1, 30.0), summary_row(8, 31.0)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in ("one two", "three", "vier"))
JUDGED = '{"key": "00ff", "answer": "yes"}\n{"key": "01ff", "answer": "no"}\n'
DRAWING = (ValueError, OSError, *style.OF_ANOTHER_VERSION)  # what a figure's program catches
READERS = (
    Reader("saelens", lambda p: save_saelens(matryoshka(), p, metadata={}), load_dictionary),
    Reader("sparsify", lambda p: save_sparsify(sae(TopKSAE, k=2), p, metadata={}),
           load_dictionary),
    Reader("gemma_scope", lambda p: save_gemma_scope(sae(JumpReLUSAE), p), load_dictionary),
    Reader("gemma_scope_2", write_gemma_scope_2, load_dictionary),
    Reader("dictionary_learning",
           lambda p: save_dictionary_learning(matryoshka(), p, metadata={}), load_dictionary),
    Reader("openai.pt", lambda p: save_openai(sae(L1SAE), p), load_dictionary),
    Reader("before_torch_1.6.pt", write_old_checkpoint, load_dictionary),
    Reader("learned_dicts.pt", write_hoagy, load_dictionary),
    Reader("crosscoder", lambda p: save_crosscoder(crosscoder(), p, metadata={"hook_name": "a+b"}),
           load_dictionary),
    Reader("checkpoints", lambda p: with_any_checksum(save_run, p, 3, parts(), keep=1),
           lambda p: with_any_checksum(load_run, p, parts())),
    Reader("cache", lambda p: make_cache(p.parent).folder.rename(p), read_cache),
    Reader("runs/read", write_run, lambda p: load_subjects([str(p)], MeasureConfig(lm="tiny"))),
    Reader("runs/resumed", write_run, resume_run),
    Reader("runs/published", write_run, lambda p: publish.collect(p / "saes/small", "a/b")),
    Reader("runs/reported", write_run, read_report),
    Reader("archive.zip", write_zip, read_zip),
    Reader("text.txt", lambda p: p.write_text("one\n\n\ntwo\n"), read_text),
    Reader("text.jsonl", lambda p: p.write_text(LINES), read_text),
    Reader("text.parquet", lambda p: parquet.write_table(
        pyarrow.table({"text": ["one two", "three"], "n": [1, 2]}), p), read_text),
    Reader("texts", write_text_folder, read_text),
    Reader("results.json", lambda p: p.write_text(json.dumps({"rows": ROWS})),
           lambda p: fig_reconstruction.draw(style.read_rows(p)), DRAWING),
    Reader("metrics.jsonl", lambda p: p.write_text(LINES), style.read_lines, ValueError),
    Reader("dashboard", lambda p: dashboard_data.write(p.parent, n=12).rename(p),
           lambda p: dashboard.build(p, p.parent / OUT / "site"), (ValueError, OSError)),
    Reader("judge.jsonl", lambda p: p.write_text(JUDGED),
           lambda p: Judge(Endpoint("http://127.0.0.1", "m"), p)),
    Reader("fetched", write_store, lambda p: Store(p).has("a")),
    Reader("lm/config", save_lm, lambda p: size_of(str(p))),
    Reader("lm/whole", save_lm, lambda p: load_lm(str(p), device="cpu", dtype="float32")),
)  # fmt: skip
