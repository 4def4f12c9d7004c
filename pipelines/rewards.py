"""Rewards that a program can check: functions of a prompt, a response and the response that the data give."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from pipelines.synthetic import arithmetic


def exact_match(prompt: str, response: str, given: str) -> float:
    """1.0 where the response is the given one, but for white space around it, else 0.0."""
    del prompt
    return float(response.strip() == given.strip())


def sums(prompt: str, response: str, given: str) -> float:
    """`arithmetic.reward`: whether the response is the value of the prompt, such as "12+7="."""
    del given
    return arithmetic.reward(prompt, response)


Reward = Callable[[str, str, str], float]
REWARDS: Mapping[str, Reward] = MappingProxyType({"exact_match": exact_match, "arithmetic": sums})
