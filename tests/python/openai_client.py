#!/usr/bin/env python3
"""Ask a Lathe server by OpenAI's own client: python openai_client.py http://127.0.0.1:8080/v1

The server has the model `base`, whose context is 256 tokens of one byte each, and the adapter `team/tuned`.
"""

import concurrent.futures
import struct
import sys

import openai

URL = sys.argv[1]
client = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0)
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]


def chat(**settings):
    return client.chat.completions.create(**({"model": "base", "messages": TALK, "max_tokens": 12} | settings))


def complete(**settings):
    return client.completions.create(**({"model": "base", "prompt": "Once", "max_tokens": 12} | settings))


def models():
    listed = [(model.id, model.owned_by) for model in client.models.list()]
    assert listed == [("base", "lathe"), ("team/tuned", "lathe")], listed
    assert client.models.retrieve("base").id == "base"
    assert client.models.retrieve("team/tuned").id == "team/tuned"
    refused(openai.NotFoundError, "model_not_found", "model", client.models.retrieve, "other")


def answers():
    answer = chat(seed=1)
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.model == "base" and answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert len(choice.message.content) == answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    again = chat(seed=1)
    assert again.choices == answer.choices
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert answer.usage.prompt_tokens - 16 <= cached < answer.usage.prompt_tokens, cached
    assert chat(seed=2).choices != answer.choices
    assert chat(seed=1, model="team/tuned").choices != answer.choices
    assert chat(seed=1, max_tokens=openai.omit, max_completion_tokens=12).choices == answer.choices
    text = complete(temperature=0, top_p=0.9).choices[0].text
    assert len(text) == 12
    assert complete(temperature=0, prompt=list(b"Once")).choices[0].text == text
    assert complete(temperature=1, extra_body={"top_k": 1}).choices[0].text == text
    # No bound of its own: the context's.
    assert chat(max_tokens=openai.omit).usage.total_tokens == 256


def streams():
    whole = chat(seed=3, max_tokens=40)
    chunks = list(chat(seed=3, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason == "length"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(chunk.choices[0].text for chunk in complete(seed=3, max_tokens=40, stream=True))
    assert text == complete(seed=3, max_tokens=40).choices[0].text
    # Left in the middle.
    with complete(max_tokens=200, stream=True) as stream:
        next(iter(stream))
    # The client's own helper, which rebuilds the answer from its events (and refuses one that ends by its length).
    text = chat(seed=1).choices[0].message.content
    with client.chat.completions.stream(
        model="base", messages=TALK, max_tokens=12, seed=1, stop=text[6:9]
    ) as stream:
        for _ in stream:
            pass
        rebuilt = stream.get_final_completion().choices[0]
    assert rebuilt.message.content == text[: text.index(text[6:9])] and rebuilt.finish_reason == "stop"


def stops():
    text = complete(temperature=0, max_tokens=40).choices[0].text
    stop = text[17:20]
    for settings in [{"stop": stop}, {"stop": ["zzzzzzzz", stop]}]:
        answer = complete(temperature=0, max_tokens=40, **settings)
        assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
        streamed = list(complete(temperature=0, max_tokens=40, stream=True, **settings))
        assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text
        assert streamed[-1].choices[0].finish_reason == "stop"


def refused(error, code, param, call, *arguments, **settings):
    try:
        call(*arguments, **settings)
    except error as found:
        assert (found.code, found.param) == (code, param), (found.code, found.param, str(found))
    else:
        raise AssertionError(f"{code} was expected")


def embed(given, **more):
    return client.embeddings.create(**{"model": "base", "input": given, **more})


def embeddings():
    # The client asks for base64 where nothing is said.
    answer = embed(["one", "two", "one"])
    vectors = [item.embedding for item in answer.data]
    assert [item.index for item in answer.data] == [0, 1, 2] and vectors[0] == vectors[2] != vectors[1]
    assert abs(sum(x * x for x in vectors[0]) - 1) < 1e-6, vectors[0]
    assert answer.model == "base" and answer.usage.prompt_tokens == answer.usage.total_tokens == 9
    # As f32: a float's decimals are the shortest that read back to it.
    plain = embed("two", encoding_format="float", dimensions=32, user="somebody").data[0].embedding
    assert struct.pack("32f", *plain) == struct.pack("32f", *vectors[1])
    assert embed([list(b"two")]).data[0].embedding == vectors[1]
    assert embed("two", model="team/tuned").data[0].embedding != vectors[1]


def errors():
    refused(openai.NotFoundError, "model_not_found", "model", chat, model="bose")
    refused(openai.BadRequestError, "decimal_above_max_value", "temperature", chat, temperature=3)
    refused(openai.BadRequestError, "invalid_type", "max_tokens", chat, max_tokens="many")
    refused(openai.BadRequestError, "unsupported_value", "n", chat, n=2)
    refused(openai.BadRequestError, "unsupported_parameter", "logprobs", chat, logprobs=True)
    refused(openai.BadRequestError, "empty_array", "messages", chat, messages=[])
    refused(openai.BadRequestError, "invalid_value", "messages[0].role", chat, messages=[{"role": "x", "content": "y"}])
    refused(openai.BadRequestError, "context_length_exceeded", "messages", chat, messages=[TALK[1]] * 20)
    refused(openai.BadRequestError, "context_length_exceeded", "prompt", complete, prompt="x" * 300)
    refused(openai.BadRequestError, "array_above_max_length", "stop", complete, stop=["a", "b", "c", "d", "e"])
    refused(openai.NotFoundError, "model_not_found", "model", embed, "x", model="bose")
    refused(openai.BadRequestError, "empty_string", "input", embed, "")
    refused(openai.BadRequestError, "context_length_exceeded", "input[1]", embed, ["x", "x" * 300])
    refused(openai.BadRequestError, "unsupported_value", "dimensions", embed, "x", dimensions=8)
    refused(openai.NotFoundError, "unknown_url", None, client.images.generate, model="base", prompt="x")


def together():
    def ask(seed):
        return complete(seed=seed, max_tokens=5 + seed).choices[0].text

    alone = [ask(seed) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


for part in [models, answers, streams, stops, embeddings, errors, together]:
    part()
print("all is well")
