"""Real features for `validate_polysemanticity`: sums of two against single ones, and repeats."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.families import facts_of, open_subjects
from analysis.program import ConceptConfig, Row
from analysis.subjects import Subject, load_subjects
from analysis.units import ConceptReading, Conditions, Family, choose_units, observe
from analysis.validate_polysemanticity import (
    halves,
    intraclass_correlation,
    rank_auroc,
    resampled,
    row,
)
from sparse_coding.errors import UserError
from sparse_coding.polysemanticity import choose_concept, effective_number, eligible

if TYPE_CHECKING:
    from analysis.validate_polysemanticity import Config

SINGLE = 2.0  # a feature of at most so many effective concepts on source A may be summed
NATIVE = 1  # index of the condition
MIN_PAIRS = 20


def real_features(cfg: "Config") -> tuple[list[Row], str]:
    """Rows, and the device that the language model ran on.

    Which features are single is decided on source A; sums and singles are measured on source B.
    There is no limit: what a feature of A stands for in other people's text is not known.
    """
    of = ConceptConfig(source=str(cfg.run), n_documents=cfg.n_documents, device=cfg.device)
    opened = open_subjects(of, load_subjects([of.source], of), cfg.ratio)
    hook = opened.hook_name
    subject = opened.of_ratio[0] if cfg.ratio else max(opened.subjects, key=ratio_of)
    reading = ConceptReading(opened.material, opened.corpus, [hook])
    family = Family("sae", hook, subject.dictionary, facts_of(subject), reading, 1)
    units = choose_units(subject.dictionary.d_sae, cfg.n_features, cfg.seed)
    seen = observe(family, units, Conditions((0.001,)))

    a, b = reading.choosing.labels, reading.heldout.labels
    kept = eligible(seen.choosing.active[NATIVE]) & eligible(seen.heldout.active[NATIVE])
    mass_a, mass_b = (of.mass[NATIVE][:, kept].double() for of in (seen.choosing, seen.heldout))
    single = (effective_number(mass_a, a) <= SINGLE).nonzero()[:, 0]
    concept = choose_concept(seen.choosing.largest[:, kept], a)[single]
    scaled = (mass_b / mass_b.sum(dim=0))[:, single]  # both halves of a sum weigh alike
    sums = pairs_apart(scaled, b.superclass[concept], torch.Generator().manual_seed(cfg.seed))
    if sums.shape[1] < MIN_PAIRS:
        raise UserError(
            f"{subject.name} has {len(single)} features of one concept among {len(units)}, too "
            f"few for {MIN_PAIRS} sums; give more --n-features or another --ratio"
        )
    n_eff_sums, n_eff_single = effective_number(sums, b), effective_number(scaled, b)
    found = resampled(rank_auroc, n_eff_single, n_eff_sums, seed=cfg.seed)
    of, n = f"sums of two of {subject.name}", len(n_eff_sums) + len(n_eff_single)
    rows = [row("AUROC of n_eff", of, found, n)]
    repeated = halves(mass_b, b)
    icc = resampled(intraclass_correlation, repeated, seed=cfg.seed)
    rows.append(row("repeated", f"{subject.name}, halves of B", icc, len(repeated)))
    return rows, str(reading.lm.device)


def ratio_of(subject: Subject) -> int:
    return subject.facts["ratio"]


def pairs_apart(
    mass: Float[Tensor, "documents units"],
    superclass: Int[Tensor, " units"],
    generator: torch.Generator,
) -> Float[Tensor, "documents sums"]:
    """Sums of two units of different superclasses, each unit in one sum at most."""
    order = torch.randperm(mass.shape[1], generator=generator).tolist()
    sums = []
    while order:
        i = order.pop()
        j = next((j for j in order if superclass[j] != superclass[i]), None)
        if j is not None:
            order.remove(j)
            sums.append(mass[:, i] + mass[:, j])
    return torch.stack(sums, dim=1) if sums else mass[:, :0]
