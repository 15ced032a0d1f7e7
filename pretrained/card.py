"""The model card of a published SAE: what it is, what was measured, how every library loads it.

Pure text from a run's own numbers; no torch, no files and no network.
"""

from typing import Any, NamedTuple

from sparse_coding.config import hooks_of

WEIGHTS = "sae_weights.safetensors"
CROSSCODER_WEIGHTS = "crosscoder.safetensors"


class Facts(NamedTuple):
    """All that a card is written from."""

    repo: str
    """user/name on the hub."""
    name: str
    """The SAE's name, and its folder in the repository."""
    config: dict[str, Any]
    """Its cfg.json."""
    row: dict[str, Any]
    """Its row of summary.json."""
    run: dict[str, Any]
    """The run's settings."""
    environment: dict[str, Any]
    figures: tuple[str, ...] = ()
    """File names below figures/."""
    licence: str = ""
    base_model: str = ""
    """The language model's name on the hub, if it is there."""

    @property
    def hooks(self) -> tuple[str, ...]:
        """Several where a crosscoder joins them."""
        return hooks_of(self.row["hook_name"])

    @property
    def is_crosscoder(self) -> bool:
        return "widths" in self.config


def model_card(facts: Facts) -> str:
    """The README.md of the repository."""
    parts = (_front_matter(facts), _head(facts), _measured(facts), _loading(facts),
             _figures(facts), _training(facts))  # fmt: skip
    return "\n".join(part for part in parts if part)


def _front_matter(facts: Facts) -> str:
    """What the hub reads."""
    library = [] if facts.is_crosscoder else ["saelens"]
    lines = ["---", *(f"library_name: {name}" for name in library)]
    lines += [f"license: {facts.licence}"] if facts.licence else []
    lines += [f"base_model: {facts.base_model}"] if facts.base_model else []
    tags = ["sparse-autoencoder", "mechanistic-interpretability", *(library or ["crosscoder"])]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""])


def _head(facts: Facts) -> str:
    row, target = facts.row, facts.row.get("hook_name_out")
    kind, place = "sparse autoencoder", f"on `{row['hook_name']}`"
    if target:
        kind, place = "transcoder", f"from `{row['hook_name']}` to `{target}`"
    elif facts.is_crosscoder:
        kind, place = "crosscoder", "of " + " and ".join(f"`{hook}`" for hook in facts.hooks)
    return (
        f"# {facts.name}\n\n"
        f"A {kind} of {row['d_sae']:,} features ({row['ratio']} times the width "
        f"{row['d_in']:,}) {place} of {row['lm']}, trained as `"
        f"{row['architecture']}` on {row['n_tokens_trained']:,} activations.\n"
    )


# What a reader needs beside each number.
MEASURES = {
    "l0": ("L0", "active features per token"),
    "fvu": ("FVU", "fraction of variance unexplained, about the held-out mean"),
    "nats_lost": ("nats lost", "rise of the cross-entropy when the model runs on reconstructions"),
    "ce_recovered": ("CE recovered", "1 - nats lost / nats lost by zero-ablation"),
    "ce_clean": ("CE, clean", "nats per token"),
    "ce_sae": ("CE, reconstructed", "nats per token"),
    "ce_mean": ("CE, mean-ablated", "nats per token"),
    "ce_zero": ("CE, zero-ablated", "nats per token"),
    "dead_fraction": ("silent features", "share that fired on none of these tokens"),
}


def _measured(facts: Facts) -> str:
    row = facts.row
    lines = ["## Measured", "", "| | | |", "|---|---|---|"]
    per_hook = {f"fvu_{hook}": (f"FVU, `{hook}`", "of this hook alone") for hook in facts.hooks}
    for key, (label, meaning) in (MEASURES | per_hook).items():
        if row.get(key) is not None:
            lines.append(f"| {label} | {_value(row, key)} | {meaning} |")
    tokens = f"{row['n_tokens_eval']:,} held-out tokens"
    if row.get("n_tokens_ce"):
        tokens += f", the cross-entropies on {row['n_tokens_ce']:,} of them"
    lines += ["", f"On {tokens}. Brackets: 95 % intervals of a bootstrap over documents.", ""]
    return "\n".join(lines)


def _value(row: dict[str, Any], key: str) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    interval = f" [{low:.4g}, {high:.4g}]" if low is not None and high is not None else ""
    return f"{row[key]:.4g}{interval}"


def _loading(facts: Facts) -> str:
    fetch = f"# python -m pretrained.fetch {facts.repo} --file {facts.name}   prints FOLDER\n"
    load = "from sparse_coding.formats import load_dictionary\n\nsae = load_dictionary(FOLDER)"
    snippets = {
        "SAELens": _saelens(facts),
        "dictionary_learning": _dictionary_learning(facts),
        "sparsify": _sparsify(facts),
        "sparse_coding": fetch + load,
    }
    if facts.is_crosscoder:
        snippets["PyTorch alone"] = _torch_alone(facts)
    text = "## Loading\n"
    for library, code in snippets.items():
        text += f"\n{library}:\n\n```python\n{code}\n```\n" if code else ""
    missing = ", ".join(library for library, code in snippets.items() if not code)
    if missing:
        text += (
            f"\nIts formula (`{facts.config['architecture']}`) has no counterpart in: {missing}.\n"
        )
    return text


def _saelens(facts: Facts) -> str:
    if facts.is_crosscoder:
        return ""
    return f'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{facts.repo}", "{facts.name}")'


def _torch_alone(facts: Facts) -> str:
    """A crosscoder's formulas; its tensors are all that they need."""
    activation = "f = (x @ w['W_enc'] + w['b_enc']).relu()\n"
    if facts.config["architecture"] == "batch_topk_crosscoder":
        activation = (
            "pre = (x @ w['W_enc'] + w['b_enc']).relu()\n"
            "rows = zip(w['W_dec'].split(widths, dim=1), w['scales'])\n"
            "norms = sum(scale * part.norm(dim=1) for part, scale in rows)\n"
            "f = pre * (pre * norms > w['threshold'])\n"
        )
    return (
        f"{_weights(facts)}widths = {list(facts.config['widths'])}\n"
        "# x: (..., d_in), the raw activations of the hooks side by side, in the order above\n"
        f"{activation}"
        "x_hat = f @ w['W_dec'] + w['b_dec']\n"
        "of_hooks = x_hat.split(widths, dim=-1)"
    )


# By SAELens's architecture and whether b_dec is subtracted from the input: the class of
# dictionary_learning that encodes alike, its module, and its tensors from SAELens's.
LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
MATRICES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
GATED = {
    "encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T", "decoder_bias": "b_dec",
    "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag",
}  # fmt: skip
COUNTERPARTS: dict[tuple[str, bool], tuple[str, str, dict[str, str]]] = {
    ("standard", True): ("dictionary", "AutoEncoder", LINEAR | {"bias": "b_dec"}),
    ("standard", False): ("dictionary", "AutoEncoderNew", LINEAR | {"decoder.bias": "b_dec"}),
    ("topk", True): ("trainers.top_k", "AutoEncoderTopK", LINEAR | {"b_dec": "b_dec"}),
    ("gated", True): ("dictionary", "GatedAutoEncoder", GATED),
    ("jumprelu", True): ("dictionary", "JumpReluAutoEncoder", MATRICES),
    ("jumprelu", False): ("dictionary", "JumpReluAutoEncoder", MATRICES),
}


def _dictionary_learning(facts: Facts) -> str:
    config = facts.config
    key = config["architecture"], config.get("apply_b_dec_to_input")
    if key not in COUNTERPARTS:
        return ""
    module, cls, tensors = COUNTERPARTS[key]
    k = f", {config['k']}" if key[0] == "topk" else ""
    strict = ", strict=False" if key[0] == "topk" else ""  # k and the threshold stay as made
    last = f"\nsae.apply_b_dec_to_input = {key[1]}" if key[0] == "jumprelu" else ""
    return (
        f"from dictionary_learning.{module} import {cls}\n{_weights(facts)}"
        f"sae = {cls}({config['d_in']}, {config['d_sae']}{k})\n"
        f"{_load_state(tensors, strict)}{last}"
    )


def _sparsify(facts: Facts) -> str:
    config = facts.config
    if (config["architecture"], config.get("apply_b_dec_to_input")) != ("topk", True):
        return ""
    names = ("encoder.weight", "W_enc.T"), ("encoder.bias", "b_enc")
    tensors = dict(names) | {"W_dec": "W_dec", "b_dec": "b_dec"}
    return (
        f"from sparsify import SparseCoder, SparseCoderConfig\n{_weights(facts)}"
        f"cfg = SparseCoderConfig(num_latents={config['d_sae']}, k={config['k']})\n"
        f"sae = SparseCoder({config['d_in']}, cfg)\n{_load_state(tensors, '')}"
    )


def _weights(facts: Facts) -> str:
    weights = CROSSCODER_WEIGHTS if facts.is_crosscoder else WEIGHTS
    return (
        "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n"
        f'w = load_file(hf_hub_download("{facts.repo}", "{facts.name}/{weights}"))\n'
    )


def _load_state(tensors: dict[str, str], strict: str) -> str:
    lines = []
    for theirs, ours in tensors.items():
        name, dot, transposed = ours.partition(".")
        lines.append(f'    "{theirs}": w["{name}"]{dot}{transposed},\n')
    return f"tensors = {{\n{''.join(lines)}}}\nsae.load_state_dict(tensors{strict})"


def _figures(facts: Facts) -> str:
    if not facts.figures:
        return ""
    pictures = "\n".join(f"![{name}](figures/{name})" for name in facts.figures)
    return f"## Figures\n\nOf all SAEs of the run.\n\n{pictures}\n"


# Settings that describe a training; a run knows many more.
SETTINGS = ("context_length", "bos", "n_tokens", "n_epochs", "batch_tokens", "lr",
            "lr_warmup_fraction", "lr_decay_fraction", "target_l0", "n_resamples")  # fmt: skip


def _training(facts: Facts) -> str:
    rows = {"l1_coeff": facts.row.get("l1_coeff"), "seed": facts.row.get("seed")}
    rows |= {key: facts.run.get(key) for key in SETTINGS}
    rows |= {
        "commit": facts.environment.get("commit"),
        "torch": facts.environment.get("versions", {}).get("torch"),
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value not in (None, [])]
    return "\n".join(
        ["## Training", "", "| | |", "|---|---|", *lines, "",
         "The squared error is summed over the width, and each hook's activations were scaled to "
         "a root-mean-square norm of sqrt(width); that is folded into the weights, which take raw "
         "activations.", ""]
    )  # fmt: skip
