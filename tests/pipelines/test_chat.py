"""Chat templates: spans by hand and by Hugging Face's rendering, what is learnt, truncation, every refusal."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pipelines import TEMPLATES, ByteTokenizer, ChatTemplate, DataError, Marks, train_bpe
from pipelines.chat import LOSSES, ROLES

BYTES = ByteTokenizer()
BPE = train_bpe(["system user assistant end\n the cat sat on the mat"] * 3, 300)


def chat(*contents, system=None):
    """Contents of user and assistant in turns, after a system turn if there is one."""
    turns = [{"role": role, "content": text} for role, text in zip(itertools.cycle(ROLES[1:]), contents, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def spelled(tokenizer, ids):
    """Ids as text, with the names of special tokens."""
    names = tokenizer.specials
    return "".join(names[i] if i < len(names) else tokenizer.decode([i]) for i in ids)


CHAT = chat("Hi", "Ho", "Why?", "No.", system="Be.")
EXPECTED = {  # text, and in ^..^ what "response" learns; by hand from the published formats
    "plain": "<bos>Be.Hi^Ho<eos>^Why?^No.<eos>^",
    "chatml": "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "^Ho<|im_end|>^\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n^No.<|im_end|>^\n",
    "zephyr": "<|system|>\nBe.<eos>\n<|user|>\nHi<eos>\n<|assistant|>\n^Ho<eos>^\n"
    "<|user|>\nWhy?<eos>\n<|assistant|>\n^No.<eos>^\n",
    "llama2": "<bos>[INST] <<SYS>>\nBe.\n<</SYS>>\n\nHi [/INST] ^Ho <eos>^<bos>[INST] Why? [/INST] ^No. <eos>^",
    "phi3": "<|system|>\nBe.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n^Ho<|end|>^\n"
    "<|user|>\nWhy?<|end|>\n<|assistant|>\n^No.<|end|>^\n",
}


def marked(tokenizer, encoded):
    """The text of tokens with ^ where the loss mask changes."""
    ends = np.flatnonzero(np.diff(encoded.loss_mask.astype(int), prepend=0, append=0))
    text = [spelled(tokenizer, part) for part in np.split(encoded.tokens, ends)]
    return "^".join(text)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("name", EXPECTED)
def test_spans_by_hand(name, tokenizer):
    assert TEMPLATES.names() == ["plain", "chatml", "zephyr", "llama2", "phi3"]
    encoded = TEMPLATES.get(name).encode(CHAT, tokenizer)
    assert marked(tokenizer, encoded) == EXPECTED[name]
    assert [each.dtype.name for each in encoded] == ["int32", "int8", "bool", "int32"]
    assert {len(each) for each in encoded} == {len(encoded.tokens)}
    of_turns = [spelled(tokenizer, encoded.tokens[encoded.turns == turn]) for turn in range(5)]
    for turn, message in zip(of_turns, CHAT, strict=True):
        assert message["content"] in turn
    assert "".join(of_turns) == EXPECTED[name].replace("^", "")
    np.testing.assert_array_equal(encoded.roles, np.array([0, 1, 2, 1, 2])[encoded.turns])


def test_marks_are_special_ids_where_there_are_any():
    chatml = TEMPLATES.get("chatml")
    tokens = chatml.encode(chat("a", "b"), BPE).tokens
    assert (tokens == BPE.special_id("<|im_start|>")).sum() == (tokens == BPE.special_id("<|im_end|>")).sum() == 2
    np.testing.assert_array_equal(chatml.end_of_response(BPE), [BPE.special_id("<|im_end|>")])
    np.testing.assert_array_equal(chatml.end_of_response(BYTES), BYTES.encode("<|im_end|>"))
    # What a user spells is no mark.
    tokens = chatml.encode(chat("<|im_end|><eos>", "b"), BPE).tokens
    assert (tokens == BPE.special_id("<|im_end|>")).sum() == 2
    assert BPE.eos_id not in tokens


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("response", "Ho<eos>No.<eos>"),
        ("last_turn", "No.<eos>"),
        ("all", "Be.HiHo<eos>Why?No.<eos>"),
    ],
)
@pytest.mark.parametrize("name", ["plain", "zephyr"])
def test_what_is_learnt(name, loss, expected):
    encoded = TEMPLATES.get(name).encode(CHAT, BYTES, loss=loss)
    assert spelled(BYTES, encoded.tokens[encoded.loss_mask]) == expected


def test_a_prompt_that_is_context_is_not_learnt():
    chatml = TEMPLATES.get("chatml")
    first, second = chatml.encode_responses(CHAT[:4], [chat("x", "No.")[1:], chat("x", "a", "b", "c")[1:]], BPE)
    learnt = [spelled(BPE, each.tokens[each.loss_mask]) for each in (first, second)]
    assert learnt == ["No.<|im_end|>", "a<|im_end|>c<|im_end|>"]
    np.testing.assert_array_equal(first.tokens, chatml.encode(CHAT, BPE).tokens)


# Formats as the models' cards have them; contents of ours are not stripped, so the test's have no spaces about them.
JINJA = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>{{ '\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}",
    "phi3": "{% for m in messages %}<|{{ m.role }}|>{{ '\n' + m.content }}<|end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}",
    "llama2": "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}{% elif m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
}


@pytest.fixture(scope="module")
def rendering():
    """Hugging Face's rendering of templates, with a tokenizer in memory."""
    transformers = pytest.importorskip("transformers")
    hf = pytest.importorskip("tokenizers")
    backend = hf.Tokenizer(hf.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize("name", JINJA)
def test_text_is_that_of_apply_chat_template(rendering, name):
    template = TEMPLATES.get(name)
    for messages in (CHAT, CHAT[1:], CHAT[1:3]):
        theirs = rendering.apply_chat_template(messages, chat_template=JINJA[name], tokenize=False)
        assert spelled(BPE, template.encode(messages, BPE).tokens) == theirs
        theirs = rendering.apply_chat_template(
            messages[:-1], chat_template=JINJA[name], tokenize=False, add_generation_prompt=True
        )
        opening = " " if name == "llama2" else ""  # theirs leaves the space before a response to the model
        assert spelled(BPE, template.prompt(messages[:-1], BPE)) == theirs + opening


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def conversations(draw):
    exchanges = draw(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
    return chat(*itertools.chain(*exchanges), system=draw(st.none() | TEXTS))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(messages=conversations(), name=st.sampled_from(list(EXPECTED)), loss=st.sampled_from(LOSSES))
def test_properties_of_conversations(messages, name, loss):
    for tokenizer in (BYTES, BPE):
        template = TEMPLATES.get(name)
        encoded = template.encode(messages, tokenizer, loss=loss)
        # Every content is there whole, in order, as it is tokenised by itself, in its own turn.
        for turn, message in enumerate(messages):
            ids = encoded.tokens[encoded.turns == turn].tolist()
            content = tokenizer.encode(message["content"]).tolist()
            assert any(ids[i : i + len(content)] == content for i in range(len(ids) - len(content) + 1))
            assert set(encoded.roles[encoded.turns == turn]) == {ROLES.index(message["role"])}
        # What is learnt: contents, and after those of the assistant the end mark.
        end = template.end_of_response(tokenizer).tolist()
        last = messages[-1:] if loss == "last_turn" else messages
        learnt = [m for m in last if loss == "all" or m["role"] == "assistant"]
        expected = [
            [*tokenizer.encode(m["content"]).tolist(), *(end if m["role"] == "assistant" else [])] for m in learnt
        ]
        assert encoded.tokens[encoded.loss_mask].tolist() == list(itertools.chain(*expected))
        # A prompt is what its conversation begins with, up to the first token of the response.
        prompt = template.prompt(messages[:-1], tokenizer)
        np.testing.assert_array_equal(encoded.tokens[: len(prompt)], prompt)
        assert encoded.loss_mask[len(prompt)]


def test_a_text_is_a_prompt_of_one_user_turn():
    np.testing.assert_array_equal(TEMPLATES.get("plain").prompt("12+7=", BYTES), [1, *BYTES.encode("12+7=")])
    for name in TEMPLATES.names():
        template = TEMPLATES.get(name)
        np.testing.assert_array_equal(template.prompt("ab", BPE), template.prompt(chat("ab"), BPE))


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(messages=conversations(), name=st.sampled_from(list(EXPECTED)), room=st.integers(1, 200))
def test_truncation_drops_whole_exchanges_and_keeps_the_system_turn(messages, name, room):
    template, kept = TEMPLATES.get(name), []
    system = [m for m in messages if m["role"] == "system"]
    for first in range(len(system), len(messages), 2):  # oracle: the longest ending that fits
        kept = template.encode([*system, *messages[first:]], BPE)
        if len(kept.tokens) <= room:
            break
    fits = len(kept.tokens) <= room
    whole = template.encode(messages, BPE)
    options = {"length": room, "origin": "a.jsonl:7"}
    if fits:
        for ours, theirs in zip(template.encode(messages, BPE, truncate="drop_turns", **options), kept, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    else:
        with pytest.raises(
            DataError, match=rf"a\.jsonl:7: too long: its last exchange alone has \d+ tokens, {room} fit"
        ):
            template.encode(messages, BPE, truncate="drop_turns", **options)
    if len(whole.tokens) <= room:
        assert template.encode(messages, BPE, truncate="skip", **options) is not None
        assert template.encode(messages, BPE, **options) is not None
    else:
        assert template.encode(messages, BPE, truncate="skip", **options) is None
        with pytest.raises(DataError, match=f"too long: it has {len(whole.tokens)} tokens, {room} fit; raise"):
            template.encode(messages, BPE, **options)


@pytest.mark.parametrize(("length", "prompt"), [(19, "<bos>saaaabbbb<eos>cc"), (18, "<bos>scc"), (10, "<bos>scc")])
def test_responses_of_a_prompt_are_truncated_alike(length, prompt):
    """With the longer response, whole, the conversation has 19 tokens; without the first exchange 10."""
    plain, messages = TEMPLATES.get("plain"), chat("aaaa", "bbbb", "cc", system="s")
    responses = [chat("-", "x")[1:], chat("-", "yyyyy")[1:]]
    encoded = plain.encode_responses(messages, responses, BYTES, length=length, truncate="drop_turns")
    assert [spelled(BYTES, each.tokens) for each in encoded] == [prompt + "x<eos>", prompt + "yyyyy<eos>"]
    assert [spelled(BYTES, each.tokens[each.loss_mask]) for each in encoded] == ["x<eos>", "yyyyy<eos>"]
    with pytest.raises(DataError, match="last exchange alone has 10 tokens, 9 fit"):
        plain.encode_responses(messages, responses, BYTES, length=9, truncate="drop_turns")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (
            chat("a", "b") + chat("c", "d")[1:],
            "r:1: two assistant turns in a row: turn 3 is of assistant",
        ),
        (chat("a", "b", "c") + chat("d", "e"), "two user turns in a row: turn 4"),
        (chat("a", "b", system="s")[::2], "turns out of order: turn 2 is of assistant, expected user"),
        (chat("a", "b")[1:], "turns out of order: turn 1 is of assistant, expected system or user"),
        (chat("a", "b") + chat("c", "d", system="s"), "system turn is not the first: turn 3"),
        (chat("a", "b", system="s")[:1] * 2, "system turn is not the first: turn 2 is of system, expected user"),
        (chat("a", "b", "c"), "no assistant turn at the end: the last of 3 turns is of user"),
        ([], "no assistant turn at the end: there is no turn"),
        ("a", "no assistant turn at the end"),
        (3, "wrong type: a text or a list of turns is expected, found int"),
        ([{"role": "asistant", "content": "a"}], "unknown role: turn 1 is of 'asistant'; did you mean 'assistant'"),
        (chat("a", ""), "empty content: turn 2, of assistant"),
        (chat("a", None), "not a text: the content of turn 2 is NoneType"),
        (chat("a", "b\ud800"), "not valid Unicode: lone surrogate '.ud800' at character 1 of turn 2"),
        ([{"role": "user"}], r"not a turn: turn 1 needs 'role' and 'content' and no more, found \['role'\]"),
        ([{"role": "user", "content": "a", "weight": 0}], "and no more, found .*'weight'"),
        (["a"], "not a turn: .* found str"),
    ],
)
def test_refused_conversations(messages, words):
    with pytest.raises(DataError, match=words):
        TEMPLATES.get("chatml").encode(messages, BYTES, origin="r:1")


def test_other_refusals():
    chatml = TEMPLATES.get("chatml")
    with pytest.raises(DataError, match="prompt: no user turn at the end"):
        chatml.prompt(chat("a", "b"), BYTES)
    with pytest.raises(ValueError, match=r"loss='responses' is not supported; did you mean .*'response'"):
        chatml.encode(chat("a", "b"), BYTES, loss="responses")
    with pytest.raises(ValueError, match="truncate='drop' is not supported"):
        chatml.encode(chat("a", "b"), BYTES, truncate="drop")
    with pytest.raises(KeyError, match="unknown template 'chat_ml'; did you mean 'chatml'"):
        TEMPLATES.get("chat_ml")
    bare = ChatTemplate(name="bare", system=Marks(), user=Marks(), assistant=Marks(end="<eos>"))
    assert len(bare.encode(chat("a", "b"), BYTES).tokens) == 3
    with pytest.raises(ValueError, match=r"template 'bare' has nothing before the first token .* set start='<bos>'"):
        bare.encode(chat("a", "b"), BYTES, loss="all")
