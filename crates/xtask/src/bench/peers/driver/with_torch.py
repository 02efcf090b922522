"""torch, transformers and peft, eager or with each block compiled by torch.compile."""

import time

import torch
from transformers import AutoModelForCausalLM, StaticCache

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
RANK = 16


class Peer:
    def __init__(self, folder, precision: str, threads: int, compiled: bool) -> None:
        torch.set_num_threads(threads)
        self.compiled = compiled
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision], attn_implementation="sdpa")
        self.trained = None
        if compiled:
            # Blocks share one graph: the time to compile is that of one block, not of all.
            for block in self.model.model.layers:
                block.compile()

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        if self.compiled:
            self.read(self.prompt(1, tokens), tokens)
        ids = self.prompt(1, tokens)
        begun = time.perf_counter()
        self.read(ids, tokens)
        return tokens / (time.perf_counter() - begun)

    @torch.inference_mode()
    def decode(self, batch: int, context: int, tokens: int) -> float:
        cache, ids = self.read(self.prompt(batch, context), context + tokens + 1)
        if tokens == 1:
            return 0.0
        # The first step compiles, and touches memory for the first time.
        ids = self.step(ids, cache, context)
        begun = time.perf_counter()
        for at in range(context + 1, context + tokens):
            ids = self.step(ids, cache, at)
        return batch * (tokens - 1) / (time.perf_counter() - begun)

    def train(self, full: bool, rows: int, length: int, steps: int) -> float:
        if self.trained is None:
            self.trained = self.prepare(full)
        optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0, fused=True)
        ids = self.prompt(rows, length)
        begun = 0.0
        for step in range(steps + 1):
            if step == 1:
                begun = time.perf_counter()
            self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return rows * length * steps / (time.perf_counter() - begun)

    def prepare(self, full: bool) -> list:
        if not full:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, lora)
        self.model.train()
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def read(self, ids, room: int):
        """The cache after the prompt, and the likeliest next tokens."""
        # A cache that grows would be another shape, and another compilation, for each step.
        cache = StaticCache(config=self.model.config, max_cache_len=room) if self.compiled else None
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

    def step(self, ids, cache, at: int):
        position = torch.full_like(ids, at)
        out = self.model(ids, past_key_values=cache, position_ids=position, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def prompt(self, batch: int, tokens: int):
        return torch.randint(5, self.model.config.vocab_size, (batch, tokens))
