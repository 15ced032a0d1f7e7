"""Which class's formulas an SAE computes with, and whether another library can express them."""

from collections.abc import Iterable

from sparse_coding.errors import UserError
from sparse_coding.sae import SAE


def formulas(cls: type[SAE], known: Iterable[type[SAE]]) -> type[SAE] | None:
    """The first of the known classes that `cls` descends from; it has its formulas."""
    return next((base for base in known if issubclass(cls, base)), None)


def refuse_what_cannot_be_said(
    sae: SAE, known: Iterable[type[SAE]], library: str, has_transcoders: bool = False
) -> None:
    """`UserError` for what has no words there: crosscoders, transcoders, a class or an encoder of
    its own, thresholds below 0.

    Behind a ReLU, as all others have it, a threshold below 0 would silence what ours lets through.
    """
    if sae.joins_hooks:
        raise UserError(f"{library} has no crosscoders; save it with formats.crosscoder")
    cls, known = type(sae), tuple(known)
    expected = formulas(cls, known)
    if expected is None:
        allowed = ", ".join(base.__name__ for base in known)
        raise UserError(f"{library} has no {cls.__name__}; it can hold: {allowed}")
    if sae.is_transcoder and not has_transcoders:
        raise UserError(f"this layout of {library} has no transcoders; SAELens has")
    for method in ("pre_activations", "encode", "decode"):
        if getattr(cls, method) is not getattr(expected, method):
            raise UserError(
                f"{cls.__name__} has its own {method}, which {library} cannot express; it must "
                f"keep that of {expected.__name__}"
            )
    if hasattr(sae, "threshold") and (sae.threshold < 0).any():
        raise UserError(
            f"{cls.__name__} has a threshold below 0, which {library}'s ReLU would treat as 0; "
            "set it to 0 or above"
        )
