"""The same work by torch, transformers and peft: tokens a second, one line of JSON for each kind of work.

    python peer.py FOLDER f32|bf16 WORK,... THREADS ROW STEP_ROWS RANK PROMPT SEQUENCES RUNS ANSWER

WORK is train, prefill or decode. A line is {"what": ..., "runs": [tokens/s, ...], "by_processor": tokens/s}, the last figure by
processor time: what it would be if nothing else ran.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

folder, precision, work = sys.argv[1:4]
threads, row, step_rows, rank, prompt, sequences, runs, answer = map(int, sys.argv[4:12])
torch.set_num_threads(threads)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]


class Clock:
    """Tokens a second of each run, and of processor time over all of them."""

    def __init__(self) -> None:
        self.rates, self.tokens, self.processor = [], 0, 0.0

    def begin(self) -> None:
        self.begun = time.perf_counter(), time.process_time()

    def end(self, tokens: int) -> None:
        self.rates.append(tokens / (time.perf_counter() - self.begun[0]))
        self.tokens += tokens
        self.processor += time.process_time() - self.begun[1]

    def tell(self, what: str) -> None:
        by_processor = self.tokens / self.processor * threads
        print(json.dumps({"what": what, "runs": self.rates, "by_processor": by_processor}), flush=True)


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    if "prefill" in work:
        timed(prefill(model), row).tell("prefill")
    if "decode" in work:
        decode(model, 1).tell("decode, batch 1")
        decode(model, sequences).tell(f"decode, batch {sequences}")
    if "train" in work:
        timed(train(model), row * step_rows).tell("LoRA training")


def timed(once, tokens: int) -> Clock:
    clock = Clock()
    once()
    for _ in range(runs):
        clock.begin()
        once()
        clock.end(tokens)
    return clock


def prefill(model):
    ids = torch.randint(5, model.config.vocab_size, (1, row))

    @torch.inference_mode()
    def once() -> None:
        model(ids, use_cache=True, logits_to_keep=1).logits.argmax()

    return once


@torch.inference_mode()
def decode(model, batch: int) -> Clock:
    clock = Clock()
    for run in range(runs + 1):
        ids = torch.randint(5, model.config.vocab_size, (batch, prompt))
        out = model(ids, use_cache=True, logits_to_keep=1)
        if run == 1:
            clock = Clock()
        clock.begin()
        for _ in range(answer - 1):
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(ids, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        out.logits.argmax()
        clock.end(batch * (answer - 1))
    return clock


def train(model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    ids = torch.randint(5, model.config.vocab_size, (step_rows, row))

    def once() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return once


main()
