"""The list of dead features: late by a known number of steps, the same after a resume."""

import torch

from sparse_coding.dead_features import PERIOD, DeadFeatures

N = 6


def lists(silence: list[list[int]], dead: DeadFeatures, tokens: torch.Tensor, first: int = 0):
    """What is listed at each step, when before it the features had been silent for so long."""
    listed = []
    for step, tokens_since_fired in enumerate(silence, start=first):
        tokens.copy_(torch.tensor(tokens_since_fired))
        listed.append(dead.at(step).tolist())
    return listed


def silence_at(n_steps: int) -> list[list[int]]:
    """Feature i falls silent at step 3 i, but feature 2 fires at every step; 10 tokens a step."""
    return [
        [0 if i == 2 else max(0, 10 * (step - 3 * i)) for i in range(N)] for step in range(n_steps)
    ]


def make() -> tuple[torch.Tensor, DeadFeatures]:
    tokens = torch.zeros(N, dtype=torch.int64)
    return tokens, DeadFeatures(tokens, dead_after_tokens=30)


def test_the_list_holds_what_was_silent_one_period_before_its_renewal():
    tokens, dead = make()
    silence = silence_at(5 * PERIOD)
    for step, listed in enumerate(lists(silence, dead, tokens)):
        counted = step // PERIOD * PERIOD - PERIOD
        expected = [i for i in range(N) if counted >= 0 and silence[counted][i] >= 30]
        assert listed == expected
    assert expected == [0, 1, 3, 4, 5]


def test_a_resumed_list_goes_on_like_the_unbroken_one():
    silence = silence_at(5 * PERIOD)
    tokens, dead = make()
    unbroken = lists(silence, dead, tokens)
    for cut in (1, PERIOD, 2 * PERIOD + 3, 3 * PERIOD - 1):
        tokens, dead = make()
        lists(silence[:cut], dead, tokens)
        resumed_tokens, resumed = make()
        for name, tensor in resumed.tensors().items():
            tensor.copy_(dead.tensors()[name])
        resumed.restored()
        assert lists(silence[cut:], resumed, resumed_tokens, cut) == unbroken[cut:]
