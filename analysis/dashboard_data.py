"""One dictionary's dashboard data: two passes over text, then feature by feature, then files."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from tqdm import tqdm

from analysis.dashboard_features import (
    ByFeature,
    Neurons,
    Shown,
    activity,
    beside,
    best_neurons,
    concept_stream,
    histogram,
    judge_concepts,
    one_unit,
    significant,
)
from analysis.families import mlp_of
from analysis.held_rows import Held, drawn_contexts, kept_activations, make_held
from analysis.interpretation import Tools, detections, find, judged, make_tools
from analysis.live_features import Reader
from analysis.program import Row
from analysis.subjects import Material, Subject
from analysis.unit_effects import effect
from analysis.units import ConceptReading, Family, Split, choose_units
from sparse_coding.baselines import random_directions
from sparse_coding.concepts import concept_documents
from sparse_coding.config import as_json, environment
from sparse_coding.consistency import Codes, join, max_cosine, sparse_codes
from sparse_coding.descriptions import in_words
from sparse_coding.dictionary import Dictionary
from sparse_coding.examples import NEAR_MISS, RANDOM, SAME_TOKEN, bounds, spread
from sparse_coding.models import LanguageModel, direct_logits
from sparse_coding.storage import whole_folder, write_json
from sparse_coding.unit_activity import ROWS_AT_ONCE, unit_activations

if TYPE_CHECKING:
    from analysis.collect_dashboard import Config

CHUNK = 32  # features of one file
BLOCK = 256  # features whose activations are dense at once
N_TOP, N_INTERVAL, N_MISSES, N_BESIDE, N_LOGITS, N_PROMPTS = 12, 4, 6, 4, 10, 6
JUDGED = ("n_eff", "n_eff_low", "n_eff_high", "concept", "auroc", "auroc_low", "auroc_high")
DETECTION = ("average_precision", "precision", "recall", "f1")
EXCLUDED = "first positions, special tokens, tokens with a norm over 10 times the median"


class Collector:
    """Reads the held-out text and the concept corpus with one dictionary's language model."""

    def __init__(
        self, cfg: "Config", subject: Subject, siblings: Sequence[Subject],
        lm: LanguageModel | None = None,
    ) -> None:  # fmt: skip
        self.cfg, self.subject, self.dictionary = cfg, subject, subject.dictionary
        self.siblings = [
            other for other in siblings
            if other.name != subject.name and other.origin == subject.origin
        ]  # fmt: skip
        self.material = Material(subject.origin, cfg.device, lm)
        self.material.check([subject, *self.siblings])
        self.features = self._chosen()
        self.held = self._read_heldout()
        corpus = concept_documents(self.material.lm.tokenizer, n_documents=cfg.n_documents)
        neurons = mlp_of(subject.origin.hook_name)
        hooks = [subject.origin.hook_name, *([neurons] if neurons else [])]
        self.reading = ConceptReading(self.material, corpus, hooks)
        self.a, self.b = (
            ByFeature(self._encode(split), self.dictionary.d_sae)
            for split in (self.reading.choosing, self.reading.heldout)
        )
        self.concept_names = [concept.name for concept in corpus.concepts]
        split = self.reading.heldout
        self.concept_of_rows = split.labels.concept[split.document].numpy()
        self.mean = self.reading.choosing.acts[subject.origin.hook_name].float().mean(dim=0)
        self.concept_shown = concept_stream(self.reading)
        generator = torch.Generator().manual_seed(cfg.seed)
        self.weights = self.reading.heldout.labels.draws(cfg.n_draws, generator)

    def _chosen(self) -> Int[Tensor, " features"]:
        cfg, d_sae = self.cfg, self.dictionary.d_sae
        if cfg.features:
            return torch.tensor(sorted(set(cfg.features)))
        return choose_units(d_sae, cfg.n_features or d_sae, cfg.seed)

    # --- reading -------------------------------------------------------------------------------

    def _codes(self, x: Float[Tensor, "rows d_in"]) -> Iterator[Codes]:
        for rows in x.split(ROWS_AT_ONCE):
            rows = rows.to(self.dictionary.W_dec.device).float()
            yield sparse_codes(self.dictionary.encode(rows))

    def _encode(self, split: Split) -> Codes:
        return join(self._codes(split.acts[self.subject.origin.hook_name]))

    def _read_heldout(self) -> Held:
        """Also `self.heldout`, the features' activations there, and `self.shown`."""
        material, cfg = self.material, self.cfg
        batches, place = drawn_contexts(material, cfg.n_tokens, cfg.seed)
        codes, position = [], []
        for x, places in kept_activations(material, batches):
            codes += self._codes(x)
            position.append(places)
        self.heldout = ByFeature(join(codes), self.dictionary.d_sae)
        rows = np.concatenate(position)
        held = make_held(material, batches, place, rows, cfg.n_draws, cfg.seed)
        sources = [held.evidence.sources[i] for i in held.evidence.source.tolist()]
        nothing = [None] * len(sources)
        self.shown = Shown(held.stream, material.lm.tokenizer, held.ids, sources, nothing)
        return held

    # --- features ------------------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[Row, Row]]:
        """(row of the index, entry of a chunk) of every chosen feature, in their order."""
        cfg, n = self.cfg, len(self.features)
        tools = make_tools(self.material, self.held, cfg.seed) if cfg.n_contexts else None
        neurons, kin = self._nearest_neurons(), self._neighbours()
        ablated = set(self.features[choose_units(n, cfg.n_effects, cfg.seed)].tolist())
        bar = tqdm(total=n, desc=self.subject.name, unit="feature")
        for number, block in enumerate(self.features.split(BLOCK)):
            companions = self._companions(block, neurons, number)
            logits = self._logits(block)
            heldout, of_concepts = self.heldout.dense(block), self.b.dense(block)
            judged_as = self._judged(block, of_concepts)
            for j, feature in enumerate(block.tolist()):
                column, column_b = heldout[:, j], of_concepts[:, j]
                described, misses = self._described(feature, column, tools)
                entry = {
                    "feature": feature,
                    "histogram": self._histogram(column, column_b),
                    "examples": self._examples(feature, column) | {"near_miss": misses},
                    "on_concepts": self.concept_shown.strongest(column_b, N_BESIDE),
                    **{key: judged_as[j][key] for key in ("concepts", "precision")},
                    **companions[j],
                    "logits": logits[j],
                    "neighbours": kin[number * BLOCK + j],
                    "effect": self._effect(feature, column_b) if feature in ablated else None,
                }
                row = self._firing(feature, column) | judged_as[j]["row"] | described
                yield row, entry
                bar.update()
        bar.close()

    def _firing(self, feature: int, column: Float32[np.ndarray, " rows"]) -> Row:
        n_firings = int((column > 0).sum())
        return {
            "feature": feature,
            "density": significant(n_firings / len(column)),
            "n_firings": n_firings,
            "max": significant(float(column.max())),
            "top_token": self.shown.top_token(column),
        }

    def _histogram(
        self, column: Float32[np.ndarray, " rows"], column_b: Float32[np.ndarray, " rows_b"]
    ) -> Row:
        return histogram(column, column_b, self.concept_of_rows, self.concept_names)

    def _examples(self, feature: int, column: Float32[np.ndarray, " rows"]) -> Row:
        generator = np.random.default_rng([self.cfg.seed, feature])
        return {
            "top": self.shown.strongest(column, N_TOP),
            "intervals": self.shown.intervals(column, N_INTERVAL, generator),
        }

    def _described(
        self, feature: int, column: Float32[np.ndarray, " rows"], tools: Tools | None
    ) -> tuple[Row, list[Row]]:
        """Its description with its score, and silent contexts that look as if it should fire."""
        family = one_unit(feature, column)
        if tools is None or not judged(family, self.held):
            return {"interpretability": None, "description": None}, []
        found = find(tools, family, 0, self.cfg.n_contexts, self.cfg.seed)
        score = detections(self.held, found.scoring, found.description)[RANDOM]
        near = found.scoring.row[found.scoring.of(NEAR_MISS)]
        same = found.scoring.row[found.scoring.of(SAME_TOKEN)]
        misses = np.concatenate([same[: N_MISSES // 2], near])[:N_MISSES]
        row = {
            "interpretability": significant(score.balanced_accuracy[0].item()),
            "description": in_words(found.description, self.held.evidence),
        }
        return row, self.shown.contexts(column, misses)

    # --- blocks of features --------------------------------------------------------------------

    def _judged(
        self, block: Int[Tensor, " block"], of_concepts: Float32[np.ndarray, "rows_b block"]
    ) -> list[Row]:
        """Concepts of each: "row" for the index, "concepts" and "precision" for the entry."""
        a, b = (
            activity(values, split, torch.zeros(len(block)))
            for values, split in (
                (self.a.dense(block), self.reading.choosing),
                (of_concepts, self.reading.heldout),
            )
        )
        known = judge_concepts(a, b, self.reading, self.weights)
        found = []
        for j in range(len(block)):
            row = known.get(j, {})
            detected = (
                {"concept": row["concept"]} | {k: row[k] for k in DETECTION} if row else None
            )
            found.append(
                {
                    "row": {key: row.get(key) for key in JUDGED},
                    "concepts": row.get("concepts"),
                    "precision": detected,
                }
            )
        return found

    def _companions(
        self, block: Int[Tensor, " block"], neurons: Neurons | None, number: int
    ) -> list[Row]:
        """The nearest neuron and a random direction of each, cut to fire as often on sources A."""
        hook, reading = self.subject.origin.hook_name, self.reading
        n_firings = np.diff(self.a.columns.indptr)[block.numpy()]
        generator = torch.Generator().manual_seed(1000 * self.cfg.seed + number)
        drawn = random_directions(self.mean, len(block), generator).to(
            self.dictionary.W_dec.device
        )
        places = torch.arange(len(block))
        random = [
            torch.cat(list(unit_activations(drawn, split.acts[hook], places))).numpy()
            for split in (reading.choosing, reading.heldout)
        ]
        rows: list[Row] = [
            {"random_direction": row, "nearest_neuron": None}
            for row in self._beside(random, n_firings)
        ]
        if neurons is not None:
            values = [
                neurons.halves(split, block) for split in (reading.choosing, reading.heldout)
            ]
            of_neurons = self._beside(values, n_firings)
            for j, (row, beside_it) in enumerate(zip(rows, of_neurons, strict=True)):
                about = neurons.about(int(block[j]))
                by_concept = self.concept_of_rows, self.concept_names
                shown = histogram(None, values[1][:, j], *by_concept)
                row["nearest_neuron"] = about | beside_it | {"histogram_by_concept": shown}
        return rows

    def _beside(
        self, values: Sequence[Float32[np.ndarray, "rows units"]], n_firings: np.ndarray
    ) -> list[Row]:
        return beside(*values, n_firings, self.reading, self.concept_shown, self.weights, N_BESIDE)

    def _nearest_neurons(self) -> Neurons | None:
        if len(self.reading.hooks) == 1:
            return None
        hook = self.reading.hooks[1]
        best = best_neurons(self.a.columns, self.reading.choosing.acts[hook])
        return Neurons(hook, *best)

    def _logits(self, block: Int[Tensor, " block"]) -> list[Row]:
        """The tokens that each makes likelier, and less likely, by what it writes (a crosscoder's
        at the last of its hooks)."""
        lm = self.material.lm
        logits = direct_logits(lm, self.dictionary.W_dec[block, -lm.d_model :])
        ends = {"top": logits.topk(N_LOGITS), "bottom": logits.topk(N_LOGITS, largest=False)}

        def words(end: Any, j: int) -> list[list[str | float]]:
            pairs = zip(end.indices[j].tolist(), end.values[j].tolist(), strict=True)
            return [[lm.tokenizer.decode([token]), significant(value)] for token, value in pairs]

        return [{name: words(end, j) for name, end in ends.items()} for j in range(len(block))]

    def _neighbours(self) -> list[list[Row]]:
        """Of each chosen feature the nearest row of every other SAE of the run."""
        W_dec = self.dictionary.W_dec[self.features].float().cpu()
        found: list[list[Row]] = [[] for _ in self.features]
        for other in self.siblings:
            best, _ = max_cosine(W_dec, other.dictionary.W_dec.float().cpu())
            facts = {key: other.facts.get(key) for key in ("ratio", "seed")}
            same_seed = facts["seed"] == self.subject.facts.get("seed")
            for row, cosine, feature in zip(
                found, best.value.tolist(), best.partner.tolist(), strict=True
            ):
                row.append(
                    {"sae": other.name, **facts, "feature": feature,
                     "cosine": significant(cosine), "same_seed": same_seed}
                )  # fmt: skip
        return found

    def _effect(self, feature: int, column_b: Float32[np.ndarray, " rows_b"]) -> Row | None:
        """Divergence of the next token's distribution without it, on sources B, by concept."""
        fired = torch.from_numpy(column_b > 0)
        if not fired.any():
            return None
        origin, seed = self.subject.origin, self.cfg.seed
        family = Family("sae", origin.hook_name, self.dictionary, {}, self.reading, 1)
        generator = torch.Generator().manual_seed(seed)
        one = effect(family, feature, 0.0, fired, generator)
        n = one.n_firings.sum()
        if n == 0:
            return None
        by_concept = [
            {"concept": name, "kl": significant((kl / many).item()), "n_firings": int(many)}
            for name, kl, many in zip(self.concept_names, one.kl, one.n_firings, strict=True)
            if many
        ]
        return {"kl": significant((one.kl.sum() / n).item()),
                "kl_random": significant((one.kl_random.sum() / n).item()),
                "n_firings": int(n), "by_concept": by_concept}  # fmt: skip

    # --- files ---------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """All files, or none; they take the place of an older folder only when all are there."""
        with whole_folder(folder, "index.json", overwrite=self.cfg.overwrite) as temporary:
            rows = self._write_into(temporary)
        n_judged = sum(row["n_eff"] is not None for row in rows)
        size = sum(path.stat().st_size for path in folder.rglob("*.json")) / 1e6
        print(f"{self.subject.name}: {len(rows):,} features, {n_judged:,} active enough to be "
              f"judged by concepts; {size:.0f} MB\nwritten: {folder}")  # fmt: skip

    def _write_into(self, folder: Path) -> list[Row]:
        """The rows of the index."""
        rows: list[Row] = []
        chunk: list[Row] = []
        for row, entry in self.entries():
            rows.append(row)
            chunk.append(entry)
            if len(chunk) == CHUNK or len(rows) == len(self.features):
                name = f"{(len(rows) - 1) // CHUNK:05d}.json"
                write_json(folder / "features" / name, chunk, is_compact=True)
                chunk = []
        write_json(folder / "prompts.json", self.prompts(), is_compact=True)
        config = as_json(self.cfg) | {"sae": self.subject.name}
        about = self.about()
        write_json(
            folder / "index.json",
            {"config": config, "environment": environment(str(self.material.lm.device)),
             "about": about, "rows": rows},
        )  # fmt: skip
        return rows

    def prompts(self) -> list[Row]:
        """A document of sources B of every concept, and a few held-out contexts."""
        reader, stream = Reader(self.material, self.dictionary, self.features), self.held.stream
        shown = {d.concept: d.tokens for d in self.reading.corpus.documents if d.source == "B"}
        generator = np.random.default_rng(self.cfg.seed)
        contexts = spread(np.arange(len(stream.position)), stream.group, N_PROMPTS, generator)
        for n, (row, begin, end) in enumerate(
            zip(contexts, *bounds(stream, contexts, 48), strict=True)
        ):
            title = f"held-out text {n + 1}, {self.shown.source[row]}"
            shown[title] = self.shown.ids[stream.token[begin:end]].tolist()
        return [{"title": title} | reader.of_tokens(ids) for title, ids in shown.items()]

    def about(self) -> Row:
        """What was measured on what."""
        origin, stream, labels = self.subject.origin, self.held.stream, self.reading.heldout.labels
        return {
            "name": self.subject.name,
            "lm": origin.lm,
            "hook_name": origin.hook_name,
            **{key: self.subject.facts.get(key) for key in
               ("architecture", "ratio", "d_in", "d_sae", "seed")},
            "n_tokens": len(stream.position),
            "n_documents": int(stream.group.max()) + 1,
            "split": "held out",
            "concepts": [
                {"name": concept.name, "superclass": concept.superclass}
                for concept in self.reading.corpus.concepts
            ],
            "n_concept_documents": len(labels.concept),
            "n_concept_tokens": int(labels.n_tokens.sum()),
            "n_collected": len(self.features),
            "weights_sha256": weights_sha256(self.dictionary),
            "text": origin.text,
            "context_length": origin.context_length,
            "bos": origin.bos,
            "excluded": EXCLUDED,
        }  # fmt: skip


def weights_sha256(dictionary: Dictionary) -> str:
    """Of all tensors in float32, in the order of their names: the same in every format."""
    found = hashlib.sha256()
    for name, tensor in sorted(dictionary.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
