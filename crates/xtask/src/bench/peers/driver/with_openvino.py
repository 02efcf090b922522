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
        first = self.generate(1, tokens, 1).m_times_to_first_token[0]
        return tokens / (first / 1e6)

    def decode(self, batch: int, context: int, tokens: int) -> float:
        times = self.generate(batch, context, tokens).m_new_token_times
        if tokens == 1:
            return 0.0
        # The first step after the prompt does not count, as for the other peers.
        return batch * (len(times) - 2) / ((times[-1] - times[1]) / 1e3)

    def generate(self, batch: int, context: int, tokens: int):
        """What its own clock says: microseconds to the first token, milliseconds at which each step ended."""
        ids = numpy.random.randint(5, self.vocab, (batch, context))
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
        config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        return self.pipe.generate(inputs, config).perf_metrics.raw_metrics
