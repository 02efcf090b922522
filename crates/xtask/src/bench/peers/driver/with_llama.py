"""llama.cpp by its C interface, through llama-cpp-python: logits are made for the last token of each sequence alone."""

import random
import time

import gguf_file
import llama_cpp as llama

FORMATS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
BATCH = 512


class Peer:
    def __init__(self, folder, precision: str, threads: int, compiled: bool) -> None:
        self.threads = threads
        llama.llama_backend_init()
        path = gguf_file.write(folder, FORMATS[precision])
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(BATCH, 0, 1)

    def prefill(self, tokens: int) -> float:
        context = self.context(1, tokens)
        # A new context's pages are touched once before.
        self.read(context, [self.prompt(tokens)])
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        prompt = self.prompt(tokens)
        begun = time.perf_counter()
        self.read(context, [prompt])
        seconds = time.perf_counter() - begun
        llama.llama_free(context)
        return tokens / seconds

    def decode(self, batch: int, context: int, tokens: int) -> float:
        place = self.context(batch, context + tokens)
        last = self.read(place, [self.prompt(context) for _ in range(batch)])
        begun = 0.0
        for at in range(context, context + tokens - 1):
            if at == context + 1:
                begun = time.perf_counter()
            last = self.run(place, [(token, at, sequence, True) for sequence, token in enumerate(last)])
        seconds = time.perf_counter() - begun
        llama.llama_free(place)
        return batch * max(tokens - 2, 0) / seconds

    def context(self, sequences: int, tokens: int):
        params = llama.llama_context_default_params()
        # Each sequence has room of its own, in steps of 256.
        params.n_ctx = sequences * ((tokens + 255) // 256 * 256)
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        return llama.llama_init_from_model(self.model, params)

    def read(self, context, prompts: list) -> list:
        """The likeliest next token of each prompt."""
        last, rows = [], []
        for sequence, prompt in enumerate(prompts):
            for at, token in enumerate(prompt):
                rows.append((token, at, sequence, at == len(prompt) - 1))
        for begin in range(0, len(rows), BATCH):
            last += self.run(context, rows[begin : begin + BATCH])
        return last

    def run(self, context, rows: list) -> list:
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, at, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, at, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = llama.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answers {status}")
        return [self.likeliest(context, i) for i, row in enumerate(rows) if row[3]]

    def likeliest(self, context, row: int) -> int:
        import numpy

        return int(numpy.ctypeslib.as_array(llama.llama_get_logits_ith(context, row), (self.vocab,)).argmax())

    def prompt(self, tokens: int) -> list:
        return [random.randrange(5, self.vocab) for _ in range(tokens)]
