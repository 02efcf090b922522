#!/usr/bin/env python3
"""Ask a Lathe gateway by OpenAI's own client: python openai_gateway.py http://lathe-gateway/v1 KEY MODEL

Nothing of the client is set but its address and its key.
"""

import sys

import openai

url, key, model = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key=key)
question = {
    "model": model,
    "messages": [{"role": "user", "content": "How much is the red lamp?"}],
    "temperature": 0,
    "max_tokens": 32,
}

listed = [model.id for model in client.models.list()]
assert model in listed, listed
assert client.models.retrieve(model).id == model

answer = client.chat.completions.create(**question)
said = answer.choices[0].message.content
assert said and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, answer

stream = client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True})
chunks = list(stream)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said, chunks
assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens, chunks[-1]

embedded = client.embeddings.create(model=model, input=["a red lamp", "a blue chair", "a red lamp"])
lamp, chair, again = [item.embedding for item in embedded.data]
assert lamp == again != chair and len(lamp) == len(chair), embedded
assert embedded.model == model.split("/")[-1] and embedded.usage.total_tokens == embedded.usage.prompt_tokens > 0, embedded

try:
    client.chat.completions.create(**(question | {"model": "no-such-model"}))
    raise AssertionError("a model that is not there answers")
except openai.NotFoundError as error:
    assert error.code == "model_not_found", error
try:
    client.with_options(api_key="lathe-wrong").chat.completions.create(**question)
    raise AssertionError("a wrong key is served")
except openai.AuthenticationError as error:
    assert error.code == "invalid_api_key", error
print("all is well")
