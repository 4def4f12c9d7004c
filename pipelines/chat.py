"""Chat templates: conversations to tokens, with the role and the turn of each and whether it is to be learnt.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": text}: at most one system turn, first,
then user and assistant in turns. Every text is tokenised by itself and never across a mark of the template, so that
the spans of turns are exact and a prompt has the same ids alone as before a response.

Marks are special ids where the tokenizer has them and plain text elsewhere. A content never encodes to a special id;
marks that are plain text, it can spell.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.errors import DataError
from pipelines.tokenizers import Tokenizer
from zoo.core.registry import Registry, check_choice, nearest

Message = Mapping[str, str]
Turns = tuple[Message, ...]

ROLES = ("system", "user", "assistant")
LOSSES = ("response", "last_turn", "all")
TRUNCATIONS = ("error", "drop_turns", "skip")
TEMPLATES: "Registry[ChatTemplate]" = Registry("template")


class ChatTokens(NamedTuple):
    """T tokens of a conversation.

    Attributes:
        tokens: int32[T].
        roles: int8[T], whose turn: 0 system, 1 user, 2 assistant. Marks belong to the turn that they open or close.
        loss_mask: bool[T], whether the token itself is to be learnt (not the one after it).
        turns: int32[T], the turn's number, from 0.
    """

    tokens: np.ndarray
    roles: np.ndarray
    loss_mask: np.ndarray
    turns: np.ndarray


class Marks(NamedTuple):
    """The template's own text about a turn: `prefix` content `end` `separator`.

    A model writes `end` after its turn, and learns to; `separator` is what comes before the next turn.
    """

    prefix: str = ""
    end: str = ""
    separator: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a conversation becomes tokens.

    Names of special tokens in the marks ("<bos>", "<eos>", "<|im_start|>") become their ids where the tokenizer has
    them. Responses are generated after the assistant's prefix.

    Args:
        name: of the template.
        system: marks about the system turn.
        user: marks about the user's turns.
        assistant: marks about the model's turns.
        start: before all turns.
        after_system: prefix of a user turn that follows the system turn; None: as of the others.
    """

    name: str
    system: Marks
    user: Marks
    assistant: Marks
    start: str = ""
    after_system: str | None = None

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        loss: str = "response",
        length: int | None = None,
        truncate: str = "error",
        origin: str = "conversation",
    ) -> ChatTokens | None:
        """Tokens of a conversation that ends with a response.

        Args:
            messages: the conversation.
            tokenizer: of the model.
            loss: what is to be learnt: "response", all turns of the assistant with their end marks; "last_turn", the
                last of them; "all", the contents of the other turns, too (instruction modelling, arXiv:2405.14394).
                Prefixes, separators and the marks of other turns never are.
            length: most tokens; None: any number.
            truncate: what to do with a longer conversation: "error"; "drop_turns", leave out exchanges of user and
                assistant from the oldest on, but neither the system turn nor the last exchange; "skip", return None.
            origin: what errors call the conversation, for example file and line.

        Raises:
            DataError: no conversation of which something can be learnt, a text that the tokenizer refuses, or one that
                is too long.
            ValueError: an unknown option.
        """
        turns = check_conversation(messages, origin, last="assistant")
        options: dict[str, Any] = {"loss": loss, "length": length, "truncate": truncate, "origin": origin}
        encoded = self.encode_responses(turns[:-1], [turns[-1:]], tokenizer, context=False, **options)
        return None if encoded is None else encoded[0]

    def encode_responses(
        self,
        prompt: Sequence[Message],
        responses: Sequence[Sequence[Message]],
        tokenizer: Tokenizer,
        *,
        context: bool = True,
        loss: str = "response",
        length: int | None = None,
        truncate: str = "error",
        origin: str = "conversation",
    ) -> list[ChatTokens] | None:
        """`encode` of a prompt with each of several responses: what is dropped of the prompt is the same for all.

        Args:
            prompt: ends with a user turn.
            responses: turns that follow it, ending with one of the assistant.
            tokenizer: of the model.
            context: whether the assistant's turns in the prompt are context, and not learnt with loss="response".
            loss, length, truncate, origin: as of `encode`.
        """
        check_choice("loss", loss, LOSSES)
        check_choice("truncate", truncate, TRUNCATIONS)
        shortened = check_conversation(prompt, origin, last="user")
        conversations = [check_conversation([*prompt, *each], origin, last="assistant") for each in responses]
        write = functools.cache(functools.partial(_encode, tokenizer, origin))
        while True:
            first = len(shortened) if context else 0
            ends = [each[len(prompt) :] for each in conversations]
            encoded = [self._encode((*shortened, *end), write, loss, first) for end in ends]
            longest = max(len(each.tokens) for each in encoded)
            if length is None or longest <= length:
                return encoded
            if truncate == "skip":
                return None
            dropped = without_oldest_exchange(shortened) if truncate == "drop_turns" else None
            if dropped is None:
                what = "its last exchange alone has" if truncate == "drop_turns" else "it has"
                fix = "raise the length or set truncate='skip'"
                fix += "" if truncate == "drop_turns" else " or 'drop_turns'"
                raise DataError("too long", origin, f"{what} {longest} tokens, {length} fit; {fix}")
            shortened = dropped

    def prompt(self, messages: str | Sequence[Message], tokenizer: Tokenizer, *, origin: str = "prompt") -> np.ndarray:
        """Ids int32[T] to generate a response from; what `encode` gives of the conversation starts with them.

        Args:
            messages: a conversation that ends with a user turn, or the text of one user turn.
            tokenizer: of the model.
            origin: what errors call the prompt.

        Raises:
            DataError: as of `encode`.
        """
        turns = check_conversation(as_turns(messages, "user", origin), origin, last="user")
        write = functools.partial(_encode, tokenizer, origin)
        return np.concatenate([self._encode(turns, write, "response", 0).tokens, self.start_of_response(tokenizer)])

    def start_of_response(self, tokenizer: Tokenizer) -> np.ndarray:
        """Ids int32[T], or none, that stand before every response."""
        return _encode(tokenizer, self.name, self.assistant.prefix, True)

    def end_of_response(self, tokenizer: Tokenizer) -> np.ndarray:
        """Ids int32[T] that end a response: one, where the tokenizer has the mark as a special id."""
        return _encode(tokenizer, self.name, self.assistant.end, True)

    def _encode(self, turns: Turns, write, loss: str, first: int) -> ChatTokens:
        """`write(text, marks)` gives ids; of "response", turns before `first` are not learnt."""
        pieces: list[tuple[np.ndarray, int, int, bool]] = []  # ids, role, turn, learnt
        for turn, message in enumerate(turns):
            role = message["role"]
            marks: Marks = getattr(self, role)
            prefix = marks.prefix
            if self.after_system is not None and turn and turns[turn - 1]["role"] == "system":
                prefix = self.after_system
            ours = role == "assistant" and turn >= (len(turns) - 1 if loss == "last_turn" else first)
            opening = (self.start if turn == 0 else "") + prefix
            for text, mark, learnt in (
                (opening, True, False),
                (message["content"], False, ours or loss == "all"),
                (marks.end, True, ours or (loss == "all" and role == "assistant")),
                (marks.separator, True, False),
            ):
                pieces.append((write(text, mark), ROLES.index(role), turn, learnt))
        ids, roles, numbers, learnt = zip(*pieces, strict=True)
        lengths = [len(each) for each in ids]
        mask = np.repeat(np.array(learnt, bool), lengths)
        if mask[0]:
            raise ValueError(
                f"template {self.name!r} has nothing before the first token that is to be learnt; set start='<bos>'"
            )
        return ChatTokens(
            np.concatenate(ids),
            np.repeat(np.array(roles, np.int8), lengths),
            mask,
            np.repeat(np.array(numbers, np.int32), lengths),
        )


def _encode(tokenizer: Tokenizer, origin: str, text: str, marks: bool) -> np.ndarray:
    """Ids int32[T] of a content, or of a template's own text, in which names of special tokens stand for their ids."""
    try:
        if not marks:
            return tokenizer.encode(text)
        names = "|".join(map(re.escape, tokenizer.specials))
        parts = [part for part in re.split(f"({names})", text) if part]
        ids = [[tokenizer.special_id(p)] if p in tokenizer.specials else tokenizer.encode(p) for p in parts]
    except ValueError as error:
        raise DataError("refused by the tokenizer", origin, str(error)) from error
    return np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32)


def as_turns(value: str | Sequence[Message], role: str, origin: str) -> Turns:
    """Turns as a tuple; a text is one turn of `role`. What they hold is not looked at."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if not isinstance(value, Sequence):
        raise DataError("wrong type", origin, f"a text or a list of turns is expected, found {type(value).__name__}")
    return tuple(value)


def check_conversation(messages: Sequence[Message], origin: str, *, last: str) -> Turns:
    """The turns as a tuple, after a look at each.

    Args:
        messages: the turns.
        origin: what errors call the conversation.
        last: role of the last turn, "user" or "assistant".

    Raises:
        DataError: no list of turns, a role that is unknown or out of order, a content that is empty or no text.
    """
    turns = as_turns(messages, "user", origin)
    expected = ("system", "user")
    for number, message in enumerate(turns, 1):
        role = _check_turn(message, number, origin)
        if role not in expected:
            where = f"turn {number} is of {role}, expected {' or '.join(expected)}"
            if role == "system":
                raise DataError("system turn is not the first", origin, where)
            before = turns[number - 2]["role"] if number > 1 else None
            raise DataError(f"two {role} turns in a row" if role == before else "turns out of order", origin, where)
        expected = ("assistant",) if role == "user" else ("user",)
    if not turns or turns[-1]["role"] != last:
        found = f"the last of {len(turns)} turns is of {turns[-1]['role']}" if turns else "there is no turn"
        raise DataError(f"no {last} turn at the end", origin, found)
    return turns


def _check_turn(message: Any, number: int, origin: str) -> str:
    """The role of a turn that is as it should be."""
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        found = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise DataError("not a turn", origin, f"turn {number} needs 'role' and 'content' and no more, found {found}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError("unknown role", origin, f"turn {number} is of {role!r}; {nearest(role, ROLES)}")
    if not isinstance(content, str):
        raise DataError("not a text", origin, f"the content of turn {number} is {type(content).__name__}")
    if not content:
        raise DataError("empty content", origin, f"turn {number}, of {role}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        where = f"lone surrogate {content[error.start]!r} at character {error.start} of turn {number}"
        raise DataError("not valid Unicode", origin, where) from error
    return role


def without_oldest_exchange(turns: Turns) -> Turns | None:
    """Turns without the first of user and assistant; None where only one of the user is left."""
    system = turns[:1] if turns[0]["role"] == "system" else ()
    rest = turns[len(system) + 2 :]
    return (*system, *rest) if rest else None


def _add(**options: Any) -> None:
    TEMPLATES.register(options["name"])(ChatTemplate(**options))


_add(name="plain", start="<bos>", system=Marks(), user=Marks(), assistant=Marks(end="<eos>"))
_add(
    name="chatml",
    system=Marks("<|im_start|>system\n", "<|im_end|>", "\n"),
    user=Marks("<|im_start|>user\n", "<|im_end|>", "\n"),
    assistant=Marks("<|im_start|>assistant\n", "<|im_end|>", "\n"),
)
_add(
    name="zephyr",  # arXiv:2310.16944
    system=Marks("<|system|>\n", "<eos>", "\n"),
    user=Marks("<|user|>\n", "<eos>", "\n"),
    assistant=Marks("<|assistant|>\n", "<eos>", "\n"),
)
_add(
    name="llama2",  # arXiv:2307.09288; contents are not stripped of spaces here
    system=Marks("<bos>[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
    user=Marks("<bos>[INST] ", " [/INST]"),
    assistant=Marks(" ", " <eos>"),
    after_system="",
)
_add(
    name="phi3",  # arXiv:2404.14219
    system=Marks("<|system|>\n", "<|end|>", "\n"),
    user=Marks("<|user|>\n", "<|end|>", "\n"),
    assistant=Marks("<|assistant|>\n", "<|end|>", "\n"),
)
