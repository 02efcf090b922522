"""OpenVINO GenAI on the GGUF files: its reader takes F16, Q8_0 and Q4_0."""

import numpy
import openvino
import openvino_genai as genai

import gguf_file

FORMATS = {"bf16": "F16", "int8": "Q8_0", "int4": "Q4_0"}


class Peer:
    def __init__(self, folder, precision: str, threads: int, compiled: bool) -> None:
        path = gguf_file.write(folder, FORMATS[precision])
        self.vocab = gguf_file.config(folder)["vocab_size"]
        self.pipe = genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=threads)

    def prefill(self, tokens: int) -> float:
        times, begin = self.generate(1, tokens, 1)
        return tokens / ((times[0] - begin) / 1000)

    def decode(self, batch: int, context: int, tokens: int) -> float:
        times, _ = self.generate(batch, context, tokens)
        if tokens == 1:
            return 0.0
        return batch * (len(times) - 1) / ((times[-1] - times[0]) / 1000)

    def generate(self, batch: int, context: int, tokens: int):
        """When each step's tokens came, and when the call began, in milliseconds."""
        import time

        ids = numpy.random.randint(5, self.vocab, (batch, context))
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
        config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False, apply_chat_template=False)
        times = []
        begin = time.perf_counter() * 1000
        out = self.pipe.generate(inputs, config)
        return out, begin
