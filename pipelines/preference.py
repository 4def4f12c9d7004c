"""Sources of prompts with responses: demonstrations, pairs, labelled responses, ranked lists.

A record is a JSON object, one a line of a file, or one that a task makes. A prompt or a response is a text or a list of
turns (see `pipelines.chat`); fields that are not named here are not read.

  sft       {"messages"} or {"prompt", "response"}; where they are asked for, "quality": a number in [0, 1], and
            "attributes": {name: number}
  pairs     {"prompt", "chosen", "rejected"}
  unpaired  {"prompt", "response", "label"}         label: true or false, 1 or 0
  ranked    {"prompt", "responses", "scores"}       scores: the higher the better; or "ranks": the lower the better

Where chosen and rejected are lists of turns they may begin with the prompt, and the prompt may then be left out: it is
what they begin with in common, up to a turn of the user.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from pipelines.chat import LOSSES, TEMPLATES, TRUNCATIONS, Turns, as_turns, check_conversation
from pipelines.errors import DataError
from pipelines.sources import BaseSource, build_source, expand_paths, field_of, json_records
from zoo.core.registry import Registry, check_choice

KINDS = ("sft", "pairs", "unpaired", "ranked")
UNPACKINGS = ("best_vs_worst", "best_vs_rest", "all", "lists")
WEIGHTINGS = ("token", "example")
# Comparisons across prompts: ((member, side), (member, side)), member 0 the example and 1 and 2 its partners, side 0
# the chosen response and 1 the rejected one. Eight in which the first is better, and six ties.
_OTHERS = tuple(itertools.product((1, 2), (0, 1)))
CROSS_PROMPTS = (
    *itertools.product(((0, 0), (0, 1)), _OTHERS),
    *itertools.combinations(_OTHERS, 2),
)
SCORE = "{score}"  # where the score goes in the text of a goal
METRICS = {  # what runs report, by the kind of batches
    "sft": ("loss", "accuracy"),
    "pairs": ("loss", "accuracy"),
    "unpaired": ("loss",),
    "ranked": ("loss",),
}
_KIND_OF = {  # options that make sense for one kind only
    **dict.fromkeys(("loss", "pack", "weighting", "quality", "attributes"), "sft"),
    "mismatched": "unpaired",
    "cross_prompts": "pairs",
    **dict.fromkeys(("unpack", "gap", "ties", "stage", "goal"), "ranked"),
}

RESPONSE_SOURCES: "Registry[type[ResponseSource]]" = Registry("source")


class ResponseExample(NamedTuple):
    """A prompt and its responses.

    Attributes:
        prompt: turns, the last of the user.
        responses: of each response the turns that follow; of a pair the chosen one first, of a list the best one.
        origin: "file:line", or the name and the number of what was made.
        split: "train" or "validation".
        context: whether the prompt's turns of the assistant are context, and not to be learnt.
        label: 1.0 desirable, 0.0 not, of a single response.
        scores: of the responses of ranked records.
        tie: whether neither of a pair is better.
        quality: in [0, 1], of a demonstration.
    """

    prompt: Turns
    responses: tuple[Turns, ...]
    origin: str
    split: str
    context: bool = True
    label: float | None = None
    scores: tuple[float, ...] | None = None
    tie: bool = False
    quality: float | None = None


@dataclasses.dataclass(kw_only=True)
class ResponseSource(BaseSource):
    """What all sources of responses share. Options that belong to one kind of records are refused for the others.

    The share that is held out is chosen by the text of the first user turn: all records of a prompt, and conversations
    that go on from each other, are on one side.

    Args:
        template: name of the chat template; "plain" adds nothing but bos and eos.
        truncate: what to do with an example that is too long: "error", "drop_turns" or "skip"; see
            `ChatTemplate.encode`. What is dropped of a prompt is the same for all of its responses.
        loss: of sft, "response", "last_turn" or "all"; see `ChatTemplate.encode`. Of {"prompt", "response"} records the
            prompt is context, unless "all"; of the other kinds nothing but the response is ever learnt.
        pack: of sft, whether rows hold several whole examples, or one each.
        weighting: of sft, "token", every token that is to be learnt has weight 1; "example", 1 / their number in its
            example: a mean over examples of means over tokens, packed or not.
        quality: of sft, whether every record has a "quality", in [0, 1], to weigh its example by.
        mismatched: of unpaired, whether each prompt comes with another example's response, too, as KTO wants.
        unpack: of ranked, pairs of the best response with the worst ("best_vs_worst") or with each other one
            ("best_vs_rest"), "all" pairs, or the "lists" as they are. Among equals the first counts as the best and the
            last as the worst.
        gap: of ranked, the difference of scores above which one response is better; a pair of less is none.
        ties: of ranked, whether pairs of less are kept as ties.
        stage: of ranked and "best_vs_rest", from 1 on: of each record the one pair whose gap in score is the stage-th
            largest. Curry-DPO (arXiv:2403.07230) trains on stage 1, 2, ... in turn, each from the model of the one
            before, which is also its reference. 0 = all pairs at once. The order is `objectives.curriculum_pairs`.
        goal: of ranked, a text with "{score}" for a system turn, such as "Aim at a score of {score}.": every pair
            becomes two, asked for the score of either response, which is then the chosen one (arXiv:2410.08067, as in
            the authors' code but for pairs of equal scores, which it keeps). The examples have no scores any more.
            "" = no goals.
        cross_prompts: of pairs, comparisons across prompts for each training pair, up to fourteen (RRM,
            arXiv:2409.13156; see `cross_prompt_pairs`), after the pairs themselves; for reward models. 0 = none.
        attributes: of sft, names of numbers in the record's "attributes", which a system turn lists as
            "name:number,name:number" (attribute-conditioned tuning of SteerLM, arXiv:2310.05344). To generate, ask for
            the numbers that are wanted.
    """

    template: str = "plain"
    truncate: str = "error"
    loss: str = "response"
    pack: bool = False
    weighting: str = "token"
    quality: bool = False
    mismatched: bool = False
    unpack: str = "best_vs_worst"
    gap: float = 0.0
    ties: bool = False
    stage: int = 0
    goal: str = ""
    cross_prompts: int = 0
    attributes: Sequence[str] = ()
    kind: ClassVar[str]
    items: ClassVar[str] = "examples"

    def __post_init__(self):
        super().__post_init__()
        names = [self.attributes] if isinstance(self.attributes, str) else list(self.attributes)
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"attributes={self.attributes!r} must be names of numbers, such as ('helpfulness',)")
        self.attributes = tuple(names)
        TEMPLATES.get(self.template)
        check_choice("kind", self.kind, KINDS)
        check_choice("truncate", self.truncate, TRUNCATIONS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("unpack", self.unpack, UNPACKINGS)
        for option in ("pack", "quality", "mismatched", "ties"):
            check_choice(option, getattr(self, option), (False, True))
        if isinstance(self.gap, bool) or not isinstance(self.gap, int | float) or not 0 <= self.gap < math.inf:
            raise ValueError(f"gap={self.gap!r} must be a finite number of at least 0")
        for field in dataclasses.fields(ResponseSource):
            kind = _KIND_OF.get(field.name, self.kind)
            if kind != self.kind and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} is an option of kind {kind!r}, not of {self.kind!r}; leave it out")
        if self.unpack == "lists" and (self.gap or self.ties or self.goal):
            raise ValueError("gap, ties and goal are options of pairs, not of unpack='lists'; leave them out")
        if isinstance(self.stage, bool) or not isinstance(self.stage, int) or self.stage < 0:
            raise ValueError(f"stage={self.stage!r} must be 0, for all pairs, or the number of a stage")
        if self.stage and self.unpack != "best_vs_rest":
            raise ValueError(f"stage={self.stage} goes with unpack='best_vs_rest', not with {self.unpack!r}")
        crossed = self.cross_prompts
        if isinstance(crossed, bool) or not isinstance(crossed, int) or not 0 <= crossed <= len(CROSS_PROMPTS):
            raise ValueError(f"cross_prompts={crossed!r} must be a number from 0 to {len(CROSS_PROMPTS)}")
        if self.goal and (not isinstance(self.goal, str) or SCORE not in self.goal):
            raise ValueError(f"goal={self.goal!r} must be a text that says where the score goes, by {SCORE!r}")
        if self.goal and self.ties:
            raise ValueError("a tie has no response that is right for a goal: leave out ties or goal")

    @property
    def batches(self) -> str:
        """The kind of the batches: `kind`, but "pairs" where ranked records are unpacked into pairs."""
        return "pairs" if self.kind == "ranked" and self.unpack != "lists" else self.kind

    @property
    def metrics(self) -> tuple[str, ...]:
        """What runs on such batches report; the first one chooses the best checkpoint."""
        return METRICS[self.batches]

    def records(self) -> Iterator[tuple[Mapping[str, Any], str] | tuple[Mapping[str, Any], str, str] | DataError]:
        """Yields (record, origin), or (record, origin, split), or the error that stands in a record's place."""
        raise NotImplementedError

    def examples(self) -> Iterator[ResponseExample]:
        """Yields the examples in a fixed order; afterwards `skipped` holds the counts by reason.

        Pairs that ranked records do not give, "no preference" and "equal responses", count as skipped whatever
        `on_error` is.

        Raises:
            DataError: a bad record (with on_error="raise"), or nothing to read at all.
        """
        found = itertools.chain.from_iterable(map(self._examples, self.records()))
        return self.usable(self._crossed(found) if self.cross_prompts else found)

    def _crossed(self, found: Iterable[ResponseExample | DataError]) -> Iterator[ResponseExample | DataError]:
        """What is found, and then the comparisons across the prompts of what is for training."""
        train: list[ResponseExample] = []
        for item in found:
            if isinstance(item, ResponseExample) and item.split == "train":
                train.append(item)
            yield item
        if len(train) < 3:
            raise DataError("too few pairs", str(self), f"cross_prompts takes three for training, found {len(train)}")
        yield from cross_prompt_pairs(train, self.cross_prompts)

    def _examples(self, item) -> Sequence[ResponseExample | DataError]:
        if isinstance(item, DataError):
            return [item]
        record, origin, *split = item
        try:
            example = _PARSERS[self.kind](record, origin)
            if self.attributes:
                example = _told(example, _listed(record, self.attributes, origin))
            if self.goal and "scores" not in record:
                raise DataError("missing field", origin, "a goal needs 'scores', the line has 'ranks'")
            if self.quality:
                example = example._replace(quality=_quality(record, origin))
        except DataError as error:
            return [error]
        opening = next(turn["content"] for turn in example.prompt if turn["role"] == "user")
        example = example._replace(split=split[0] if split else self.split(opening))
        return [example] if self.batches == self.kind else self._unpacked(example)

    def _unpacked(self, ranked: ResponseExample) -> list[ResponseExample]:
        """The pairs of an example whose responses come best first."""
        assert ranked.scores is not None
        count = len(ranked.responses)
        chosen = {
            "best_vs_worst": [(0, count - 1)],
            "best_vs_rest": [(0, other) for other in range(1, count) if self.stage in (0, count - other)],
            "all": itertools.combinations(range(count), 2),
        }[self.unpack]
        found = []
        if self.stage >= count:
            self.skipped["fewer pairs than stages"] += 1
        for pair in chosen:
            responses = tuple(ranked.responses[i] for i in pair)
            better, worse = (ranked.scores[i] for i in pair)
            tie = better - worse <= self.gap
            if responses[0] == responses[1]:
                self.skipped["equal responses"] += 1
            elif tie and not self.ties:
                self.skipped["no preference"] += 1
            elif self.goal:
                for score, order in ((better, responses), (worse, responses[::-1])):
                    told = _told(ranked, self.goal.replace(SCORE, f"{score:g}"))
                    found.append(told._replace(responses=order, scores=None))
            else:
                found.append(ranked._replace(responses=responses, scores=(better, worse), tie=tie))
        return found


def cross_prompt_pairs(examples: Sequence[ResponseExample], number: int, seed: int = 0) -> Iterator[ResponseExample]:
    """Pairs with responses to other prompts, so that what is good about a response has to do with its prompt (RRM).

    Each example has two partners. Its own responses, chosen and rejected, are better answers to its prompt than those
    of either partner: eight pairs. The partners' are as good as each other: six, whose order is drawn, so that the
    expected loss is that of a label of 1/2. Which there are is `objectives.cross_prompt_comparisons`.

    Args:
      examples: pairs, three at least.
      number: drawn for each example, of the fourteen. Pairs of equal responses are left out, and those with a partner
        of the same prompt.
      seed: of the partners and of the draws.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(examples))
    for position, index in enumerate(order):
        group = [examples[order[(position + step) % len(order)]] for step in range(3)]
        own = examples[index]
        for case in sorted(rng.choice(len(CROSS_PROMPTS), number, replace=False)):
            sides, tie = CROSS_PROMPTS[case], case >= 8
            if tie and rng.random() < 0.5:
                sides = sides[::-1]
            responses = tuple(group[member].responses[side] for member, side in sides)
            others = [group[member] for member, _ in sides if member]
            if responses[0] != responses[1] and all(other.prompt != own.prompt for other in others):
                yield own._replace(responses=responses)


def _told(example: ResponseExample, text: str) -> ResponseExample:
    """The example with a text before its system turn, if it has one, or as its system turn."""
    system = [turn["content"] for turn in example.prompt[:1] if turn["role"] == "system"]
    turn = {"role": "system", "content": "\n\n".join([text, *system])}
    return example._replace(prompt=(turn, *example.prompt[len(system) :]))


def _listed(record: Mapping[str, Any], names: Sequence[str], origin: str) -> str:
    """The attributes of a record as a text."""
    given = field_of(record, "attributes", origin)
    if not isinstance(given, Mapping):
        raise DataError("wrong type", origin, f"'attributes' must map names to numbers, found {type(given).__name__}")
    numbers = {name: field_of(given, name, f"{origin}, 'attributes'") for name in names}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e38:
            raise DataError("bad attribute", origin, f"{name!r} must be a finite number, found {number!r:.40}")
    return ",".join(f"{name}:{number:g}" for name, number in numbers.items())


def make_response_source(config: Mapping[str, Any]) -> ResponseSource:
    """Builds the source that `config["name"]` names with the other entries as its options."""
    return build_source(RESPONSE_SOURCES, config)


@dataclasses.dataclass(kw_only=True)
class JsonResponses(ResponseSource):
    """Every line is a record.

    Args:
        paths: file, glob pattern, or a list of them.
    """

    paths: str | Sequence[str]

    def files(self) -> list[pathlib.Path]:
        """The files in the order they were named; patterns expand sorted."""
        return expand_paths(self.paths)

    def records(self):
        """Yields one record per line."""
        return json_records(self.files())


@RESPONSE_SOURCES.register("sft")
@dataclasses.dataclass(kw_only=True)
class Demonstrations(JsonResponses):
    """Lines {"messages"} or {"prompt", "response"}; "messages" where there are both."""

    kind: ClassVar[str] = "sft"


@RESPONSE_SOURCES.register("pairs")
@dataclasses.dataclass(kw_only=True)
class Pairs(JsonResponses):
    """Lines {"prompt", "chosen", "rejected"}, or conversations {"chosen", "rejected"} that begin alike."""

    kind: ClassVar[str] = "pairs"


@RESPONSE_SOURCES.register("unpaired")
@dataclasses.dataclass(kw_only=True)
class Unpaired(JsonResponses):
    """Lines {"prompt", "response", "label"}."""

    kind: ClassVar[str] = "unpaired"


@RESPONSE_SOURCES.register("ranked")
@dataclasses.dataclass(kw_only=True)
class Ranked(JsonResponses):
    """Lines {"prompt", "responses", "scores"} or {"prompt", "responses", "ranks"}."""

    kind: ClassVar[str] = "ranked"


def _demonstration(record: Mapping[str, Any], origin: str) -> ResponseExample:
    if "messages" in record:
        turns = as_turns(record["messages"], "user", f"{origin}, 'messages'")
        turns = check_conversation(turns, f"{origin}, 'messages'", last="assistant")
        return ResponseExample(turns[:-1], (turns[-1:],), origin, "", context=False)
    prompt = _prompt(record, origin)
    return ResponseExample(prompt, (_response(record, "response", prompt, origin),), origin, "")


def _quality(record: Mapping[str, Any], origin: str) -> float:
    value = field_of(record, "quality", origin)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DataError("bad quality", origin, f"'quality' must be a number in [0, 1], found {value!r:.40}")
    return float(value)


def _pair(record: Mapping[str, Any], origin: str) -> ResponseExample:
    chosen, rejected = (field_of(record, name, origin) for name in ("chosen", "rejected"))
    if "prompt" in record or isinstance(chosen, str) or isinstance(rejected, str):
        prompt = _prompt(record, origin)
    else:
        prompt = _common_prompt(as_turns(chosen, "", origin), as_turns(rejected, "", origin), origin)
    responses = tuple(_response(record, name, prompt, origin) for name in ("chosen", "rejected"))
    if responses[0] == responses[1]:
        raise DataError("equal responses", origin, "'chosen' and 'rejected' must differ")
    return ResponseExample(prompt, responses, origin, "")


def _labelled(record: Mapping[str, Any], origin: str) -> ResponseExample:
    prompt = _prompt(record, origin)
    response, label = _response(record, "response", prompt, origin), field_of(record, "label", origin)
    if not isinstance(label, int | float) or label not in (0, 1):
        raise DataError("bad label", origin, f"'label' must be true, false, 1 or 0, found {label!r}")
    return ResponseExample(prompt, (response,), origin, "", label=float(label))


def _ranking(record: Mapping[str, Any], origin: str) -> ResponseExample:
    prompt, given = _prompt(record, origin), field_of(record, "responses", origin)
    if not isinstance(given, list) or len(given) < 2:
        raise DataError("wrong type", origin, "'responses' must be a list of at least two")
    if ("scores" in record) == ("ranks" in record):
        reason = "missing field" if "scores" not in record else "one field too many"
        raise DataError(reason, origin, "either 'scores' or 'ranks' is expected")
    name, sign = ("scores", 1.0) if "scores" in record else ("ranks", -1.0)
    numbers = record[name]
    if not isinstance(numbers, list) or len(numbers) != len(given):
        found = f"{len(numbers)}" if isinstance(numbers, list) else type(numbers).__name__
        raise DataError(f"bad {name}", origin, f"a list of {len(given)}, one a response, is expected, found {found}")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e38:
            raise DataError(f"bad {name}", origin, f"finite numbers are expected, found {number!r:.40}")
    responses = [_continuation(each, f"responses[{i}]", prompt, origin) for i, each in enumerate(given)]
    order = sorted(range(len(given)), key=lambda i: -sign * numbers[i])  # stable: equals stay in order
    best_first = tuple(responses[i] for i in order)
    return ResponseExample(prompt, best_first, origin, "", scores=tuple(sign * numbers[i] for i in order))


_PARSERS = {"sft": _demonstration, "pairs": _pair, "unpaired": _labelled, "ranked": _ranking}


def _prompt(record: Mapping[str, Any], origin: str) -> Turns:
    turns = as_turns(field_of(record, "prompt", origin), "user", f"{origin}, 'prompt'")
    return check_conversation(turns, f"{origin}, 'prompt'", last="user")


def _response(record: Mapping[str, Any], name: str, prompt: Turns, origin: str) -> Turns:
    return _continuation(field_of(record, name, origin), name, prompt, origin)


def _continuation(value: Any, name: str, prompt: Turns, origin: str) -> Turns:
    """The turns that follow the prompt, which a list of turns may begin with."""
    origin = f"{origin}, {name!r}"
    turns = as_turns(value, "assistant", origin)
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    elif turns and isinstance(turns[0], Mapping) and turns[0].get("role") != "assistant":
        raise DataError("another prompt", origin, "its turns must begin with those of the prompt, or with a response")
    return check_conversation((*prompt, *turns), origin, last="assistant")[len(prompt) :]


def _common_prompt(chosen: Turns, rejected: Turns, origin: str) -> Turns:
    """What two conversations begin with in common, up to a turn of the user."""
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        check_conversation(turns, f"{origin}, {name!r}", last="assistant")
    same = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))]
    while same and same[-1]["role"] != "user":
        same.pop()
    if not same:
        raise DataError("another prompt", origin, "'chosen' and 'rejected' begin with different turns of the user")
    return tuple(same)
