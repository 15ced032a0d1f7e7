"""Writes the golden dictionary_learning files, with that library's own code and forward pass.

    python tests/golden/make_dictionary_learning.py

Each folder of `dictionary_learning/` is what `trainSAE` leaves of an SAE with random weights
(d_in 5, d_sae 7): the state dict in ae.pt, the trainer's class and sizes in config.json.
`recorded.safetensors` there holds inputs x and, for each folder, what encode and decode of the SAE
that `load_dictionary` makes of it returned. Made with dictionary-learning 0.1.0.
"""

import json
from pathlib import Path

import torch
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from safetensors.torch import save_file

HERE = Path(__file__).parent / "dictionary_learning"
RECORDED = {"x": 2 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))}


def write(
    name: str, cls: type, *sizes: object, rows: str = "unit", dtype: str = "float32"
) -> None:
    sae = cls(5, 7, *sizes)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        if rows == "unit" and hasattr(sae, "decoder"):
            sae.decoder.weight /= sae.decoder.weight.norm(dim=0)
        if cls is JumpReluAutoEncoder:
            sae.threshold.copy_(torch.randn(7))  # below 0 too
        elif hasattr(sae, "threshold"):
            sae.threshold.fill_(1.5)
    trainer = {"dict_class": cls.__name__, "activation_dim": 5, "dict_size": 7}
    if hasattr(sae, "k"):
        trainer["k"] = sae.k.item()
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}) + "\n")
    state = {key: value.cpu() for key, value in sae.to(getattr(torch, dtype)).state_dict().items()}
    torch.save(state, folder / "ae.pt")
    record(name, load_dictionary(str(folder), device="cpu")[0])


def record(name: str, sae: torch.nn.Module) -> None:
    with torch.no_grad():
        f = sae.encode(RECORDED["x"])
        RECORDED[f"{name}.f"], RECORDED[f"{name}.x_hat"] = f, sae.decode(f)


def write_as_in_december_2023(name: str) -> None:
    """No config.json that names a class, and the file format of torch before 1.6."""
    sae = AutoEncoder(5, 7)
    with torch.no_grad():
        sae.bias.copy_(torch.randn(5))
        sae.encoder.weight.copy_(torch.randn(7, 5))
        sae.decoder.weight /= sae.decoder.weight.norm(dim=0)
    (HERE / name).mkdir(parents=True, exist_ok=True)
    torch.save(sae.state_dict(), HERE / name / "ae.pt", _use_new_zipfile_serialization=False)
    record(name, AutoEncoder.from_pretrained(HERE / name / "ae.pt"))


if __name__ == "__main__":
    torch.manual_seed(0)
    write("autoencoder_rows_not_unit", AutoEncoder, rows="any")
    write("autoencoder_bfloat16", AutoEncoder, dtype="bfloat16")
    write_as_in_december_2023("december_2023")
    write("autoencoder_new", AutoEncoderNew, rows="any")
    write("gated", GatedAutoEncoder)
    write("topk", AutoEncoderTopK, 3)
    write("batchtopk", BatchTopKSAE, 3)
    write("matryoshka", MatryoshkaBatchTopKSAE, 3, [2, 5])
    write("jumprelu", JumpReluAutoEncoder)
    save_file(RECORDED, HERE / "recorded.safetensors")
