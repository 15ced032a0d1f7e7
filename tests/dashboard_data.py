"""Made-up data of the dashboard, in the form that analysis.collect_dashboard writes.

Tokens are hostile on purpose: markup, quotes, line ends of other alphabets, halves of characters.
"""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HOSTILE = ("<script>alert(1)</script>", "</script>", "\"'`&amp;", "\n", " \u2028", "\u2029",
           "\ufffd", "\ud83d", "<img src=x onerror=alert(1)>", "\t ", "", "]]>",
           "\u202eabc")  # fmt: skip
CONCEPTS = ("python", "french", "dna", "latex", "tables", "http", "<b>bold</b>")
DEAD, RARE, PLAIN, BARE = 3, 5, 7, 9
"""Features: never fires; too rare to be judged; has everything; has a null for everything."""
CHUNK = 32
N_BINS = 6


def context(focus: int, act: float, concept: str | None = None, salt: int = 0) -> Row:
    """Twelve tokens; the unit fires on `focus` with `act` and half as strongly on the next."""
    tokens = [f" w{salt}_{i}" for i in range(12 - 4)] + [
        HOSTILE[(salt + i) % 13] for i in range(4)
    ]
    acts = [0.0] * 12
    acts[focus], acts[focus + 1] = act, act / 2
    return {"tokens": tokens, "acts": acts, "focus": focus, "document": salt, "source": "books",
            "concept": concept}  # fmt: skip


def silent(salt: int) -> Row:
    return context(4, 0.0, salt=salt)


def bars(first: int) -> list[Row]:
    """Shares 0.4, 0.2, 0.1, ... of the concepts from `first` on."""
    names = CONCEPTS[first % 7 :] + CONCEPTS[: first % 7]
    shares = [0.4, 0.2, 0.1, 0.1, 0.1, 0.06, 0.04]
    return [
        {"concept": name, "share": s, "share_low": 0.8 * s, "share_high": 1.25 * s,
         "lift": 10 * s, "lift_low": 8 * s}
        for name, s in zip(names, shares, strict=True)
    ]  # fmt: skip


def by_concept(first: int) -> dict[str, list[int]]:
    return {name: [n + c for n in range(N_BINS, 0, -1)] for c, name in enumerate(CONCEPTS[first:])}


def largest(i: int) -> float:
    return 2.0 + i % 17 / 4


def index_row(i: int) -> Row:
    """Row of feature i, of which `DEAD` and `RARE` have the nulls that belong to them."""
    density = 0.0 if i == DEAD else 1e-5 if i == RARE else (i * 37 % 1009 + 1) / 4e4
    token = HOSTILE[i] if i < len(HOSTILE) else f" word{i % 97}"
    row = {"feature": i, "density": density, "n_firings": round(density * 100_000),
           "max": 0.0 if i == DEAD else largest(i),
           "top_token": None if i == DEAD else token}  # fmt: skip
    n_eff = 1 + i * 53 % 600 / 100
    judged = {"n_eff": n_eff, "n_eff_low": 0.9 * n_eff, "n_eff_high": 1.2 * n_eff,
              "concept": CONCEPTS[i % 7], "auroc": 0.5 + i % 50 / 100,
              "auroc_low": 0.45 + i % 50 / 100, "auroc_high": 0.51 + i % 50 / 100,
              "interpretability": 0.5 + i % 40 / 100,
              "description": f"Tokens that begin with <i>{i}</i>"}  # fmt: skip
    return row | (dict.fromkeys(judged) if i in (DEAD, RARE) else judged)


def entry(i: int) -> Row:
    """Everything of feature i."""
    top = largest(i)
    intervals = [
        {"low": top * k / 5, "high": top * (k + 1) / 5, "n_firings": 9 - k,
         "contexts": [context(4, top * (k + 0.5) / 5, salt=k)]}
        for k in reversed(range(5))
    ]  # fmt: skip
    beside = {"contexts": [context(3, 1.5, "french", 5)], "n_eff": 4.25, "concepts": bars(i + 1)}
    return {
        "feature": i,
        "histogram": {"edges": [top * k / N_BINS for k in range(N_BINS + 1)],
                      "counts": [900, 300, 90, 30, 9, 3], "by_concept": by_concept(0)},
        "concepts": bars(i),
        "precision": {"concept": CONCEPTS[i % 7], "precision": 0.75, "recall": 0.625, "f1": 0.68,
                      "average_precision": 0.71},
        "logits": {"top": [[HOSTILE[k], 2.0 - k / 10] for k in range(10)],
                   "bottom": [[f" less{k}", k / 10 - 3] for k in range(10)]},
        "examples": {"top": [context(4, top, "python", i), context(5, 1.0), context(5, 0.5)],
                     "intervals": intervals, "near_miss": [silent(8), silent(9)]},
        "on_concepts": [context(2, 0.75, "korean", 6)],
        "neighbours": [
            {"sae": "twin", "ratio": 4, "seed": 1, "feature": 2, "cosine": 0.875,
             "same_seed": False},
            {"sae": "unseen", "ratio": 8, "seed": 0, "feature": 1, "cosine": 0.5,
             "same_seed": True},
        ],
        "nearest_neuron": beside | {"hook_name": "blocks.3.mlp.hook_post", "neuron": 41,
            "correlation": -0.25, "histogram_by_concept": {
                "edges": [k / N_BINS for k in range(N_BINS + 1)], "by_concept": by_concept(2)}},
        "random_direction": beside | {"n_eff": 6.5},
        "effect": {"kl": 0.0125, "kl_random": 0.002, "n_firings": 640, "by_concept": [
            {"concept": name, "kl": 0.01 * (c + 1), "n_firings": 10 * c + 5}
            for c, name in enumerate(CONCEPTS)]},
    }  # fmt: skip


def bare(i: int) -> Row:
    """A feature of which nothing was measured."""
    return {"feature": i} | dict.fromkeys(list(entry(i))[1:])


def dead(i: int) -> Row:
    """A feature that never fires: what it writes is known, and nothing else."""
    nothing = {
        "edges": [k / N_BINS for k in range(N_BINS + 1)],
        "counts": [0] * N_BINS,
        "by_concept": {},
    }
    no_examples = {"top": [], "intervals": [], "near_miss": []}
    of_nothing = {"contexts": [], "n_eff": None, "concepts": None}
    known = {key: entry(i)[key] for key in ("logits", "neighbours")}
    return bare(i) | known | {"histogram": nothing, "examples": no_examples,
                              "random_direction": of_nothing}  # fmt: skip


def rare(i: int) -> Row:
    """A feature that fires twice."""
    few = {"top": [context(4, largest(i))], "intervals": [], "near_miss": []}
    return dead(i) | {"histogram": entry(i)["histogram"] | {"by_concept": {}}, "examples": few}


def prompts() -> list[Row]:
    """Two texts; in the first feature `PLAIN` fires on tokens 2 and 5 and is strongest on 5."""
    tokens = ["<|im_start|>", "The", " cat", "\n", "</script>", " sat", " on", "\u2028", " mat"]
    features = [[], [[1, 0.5]], [[2, 3.0], [PLAIN, 1.25]], [[DEAD, 0.25]], [[1, 2.0]],
                [[PLAIN, 4.5], [2, 1.0], [11, 0.75]], [], [[8, 0.125]], [[1, 1.5]]]  # fmt: skip
    second = {"title": "<u>second</u>", "tokens": ["Other", " text"], "features": [[[4, 1.0]], []]}
    return [{"title": "first", "tokens": tokens, "features": features}, second]


def about(name: str, n: int) -> Row:
    return {
        "name": name, "lm": "small-lm", "hook_name": "blocks.3.hook_resid_post",
        "architecture": "topk", "ratio": 4, "d_in": 48, "d_sae": n, "seed": 0,
        "n_tokens": 100_000, "n_documents": 420, "split": "held out",
        "concepts": [{"name": c, "superclass": "kinds"} for c in CONCEPTS],
        "n_concept_documents": 140, "n_concept_tokens": 9_000, "n_collected": n,
        "weights_sha256": "5e1f" * 16, "text": "builtin", "context_length": 128,
        "bos": "always", "excluded": "first positions",
    }  # fmt: skip


def write(folder: Path, name: str = "topk_x04_s0", n: int = 70, is_sparse: bool = False) -> Path:
    """Data of n features in `folder`/results/dashboard/`name`; sparse: entries without content."""
    target = folder / "results" / "dashboard" / name
    (target / "features").mkdir(parents=True)
    kinds = {DEAD: dead, RARE: rare, BARE: bare}
    for first in range(0, n, CHUNK):
        chunk = [
            (bare if is_sparse else kinds.get(i, entry))(i)
            for i in range(first, min(n, first + CHUNK))
        ]
        path = target / "features" / f"{first // CHUNK:05d}.json"
        path.write_text(json.dumps(chunk), encoding="utf-8")
    index = {"config": {"seed": 0, "output": None}, "environment": {"machine": "x86_64"},
             "about": about(name, n), "rows": [index_row(i) for i in range(n)]}  # fmt: skip
    (target / "index.json").write_text(json.dumps(index), encoding="utf-8")
    (target / "prompts.json").write_text(json.dumps(prompts()), encoding="utf-8")
    return target
