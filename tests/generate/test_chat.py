import pytest

import polyhead as ph
from polyhead.generate.chat import Chat
from polyhead.generate.config import GenerationConfig
from polyhead.generate.generator import TextGenerator
from polyhead.generate.prompts import encode_chat
from polyhead.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREEDY = GenerationConfig(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def chatty() -> Tokenizer:
    return Tokenizer.train(
        ["user assistant system hello, how are you? " * 9],
        kind="bpe",
        vocab_size=300,
        special_tokens={"bos": "<|im_start|>", "eos": "<|im_end|>"},
        add_bos=True,
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module", params=[None, 10])
def generator(request, chatty) -> TextGenerator:
    """A tiny model, without and with a sliding window."""
    model = ph.build(
        "mistral",
        seed=2,
        vocab_size=300,
        d_model=32,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        max_seq_len=160,
        window=request.param,
        init_std=0.3,
    )
    return TextGenerator(model, chatty)


def fed_tokens(generator: TextGenerator, work) -> int:
    """How many tokens the model computes while `work` runs."""
    seen: list[int] = []
    hook = generator.model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].shape[1]), with_kwargs=True
    )
    try:
        work()
    finally:
        hook.remove()
    return sum(seen)


def test_a_conversation_is_encoded_without_specials_twice(chatty):
    ids = encode_chat([{"role": "user", "content": "hello"}], chatty)
    assert ids.count(chatty.bos_id) == 2
    assert ids[:1] == [chatty.bos_id]
    assert ids[1] != chatty.bos_id
    text = chatty.decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_kept_cache_changes_no_answer(generator):
    chat = Chat(generator, GREEDY, system="hello")
    for text in ("how are you?", "hello", "you?"):
        answer = "".join(chat.say(text))
        prompt = encode_chat(chat.messages[:-1], generator.tokenizer)
        assert chat.messages[-1] == {"role": "assistant", "content": answer}
        assert answer == generator.generate(prompt, GREEDY)
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3]


def test_only_what_is_new_in_a_turn_is_computed(generator):
    chat = Chat(generator, GREEDY)
    "".join(chat.say("how are you? " * 5))
    before = len(encode_chat(chat.messages, generator.tokenizer))
    fed = fed_tokens(generator, lambda: "".join(chat.say("hello")))
    whole = len(encode_chat(chat.messages, generator.tokenizer))
    assert fed < whole - before // 2


def test_a_prefix_that_is_held_is_not_computed_again(generator):
    engine, prompt = generator.own_engine(), list(range(5, 41))
    first = fed_tokens(generator, lambda: list(generator.stream(prompt, GREEDY, engine=engine)))
    answer = generator.generate(prompt, GREEDY)
    longer = [*prompt, *answer.token_ids, 11, 12]
    second = fed_tokens(generator, lambda: list(generator.stream(longer, GREEDY, engine=engine)))
    assert first <= len(prompt) + 11
    # Whole blocks of 16 tokens are found.
    assert second <= len(longer) - 32 + 11
    again = "".join(generator.stream(longer, GREEDY, engine=engine))
    assert again == generator.generate(longer, GREEDY)


def test_an_answer_broken_off_stays_as_far_as_it_came(generator):
    chat = Chat(generator, GREEDY)
    answer = chat.say("hello")
    first = next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first}
    "".join(chat.say("you?"))
    prompt = encode_chat(chat.messages[:-1], generator.tokenizer)
    assert chat.messages[-1]["content"] == generator.generate(prompt, GREEDY)


def test_old_turns_are_forgotten_when_the_context_is_full(generator):
    chat = Chat(generator, GREEDY, system="hello")
    for turn in range(8):
        "".join(chat.say(f"you {turn}?"))
    assert chat.messages[0] == {"role": "system", "content": "hello"}
    assert chat.messages[1]["role"] == "user"
    assert chat.messages[-2]["content"] == "you 7?"
    assert 3 <= len(chat.messages) < 17


def test_a_message_longer_than_the_model_leaves_the_history(generator):
    chat = Chat(generator, GREEDY)
    with pytest.raises(ph.DataError, match="shorten it"):
        chat.say("hello " * 300)
    assert chat.messages == []


def test_reset_keeps_the_system_message(generator):
    chat = Chat(generator, GREEDY, system="hello")
    "".join(chat.say("you?"))
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "hello"}]


def test_no_template(generator):
    bare = Tokenizer.train(["hello"], kind="bytes")
    with pytest.raises(ph.PolyheadError):
        Chat(TextGenerator(generator.model, bare)).say("hello")
