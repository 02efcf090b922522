"""GGUF files of the models that are measured, written once beside the model."""

import json
import math
import os
import pathlib

import gguf
import numpy
from gguf import GGMLQuantizationType, quants

BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
TOKENIZERS = {"llama": "llama-bpe", "qwen2": "qwen2"}
NORMAL, CONTROL = 1, 3


def write(folder: pathlib.Path, form: str) -> pathlib.Path:
    """The file in that format (BF16, F16, Q8_0 or Q4_0), made where it is not there yet."""
    path = folder / f"model-{form}.gguf"
    if path.exists():
        return path
    about = config(folder)
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, about["model_type"], use_temp_file=False)
    head = about.get("head_dim") or about["hidden_size"] // about["num_attention_heads"]
    writer.add_context_length(about["max_position_embeddings"])
    writer.add_embedding_length(about["hidden_size"])
    writer.add_block_count(about["num_hidden_layers"])
    writer.add_feed_forward_length(about["intermediate_size"])
    writer.add_head_count(about["num_attention_heads"])
    writer.add_head_count_kv(about["num_key_value_heads"])
    writer.add_rope_freq_base(about["rope_theta"])
    writer.add_layer_norm_rms_eps(about["rms_norm_eps"])
    writer.add_vocab_size(about["vocab_size"])
    writer.add_rope_dimension_count(head)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{form}"])
    add_tokenizer(writer, folder, about)
    kind = GGMLQuantizationType[form]
    for name, shape, bits in tensors(folder / "model.safetensors"):
        values = (bits.astype(numpy.uint32) << 16).view(numpy.float32).reshape(shape)
        parts = name.split(".", 3)
        if name in WHOLE:
            name = WHOLE[name]
        else:
            layer, suffix = parts[3].rsplit(".", 1)
            name = f"blk.{parts[2]}.{BLOCK[layer]}.{suffix}"
            if about["model_type"] == "llama" and layer in ("self_attn.q_proj", "self_attn.k_proj"):
                values = interleaved(values, head)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    if about.get("rope_scaling"):
        writer.add_tensor("rope_freqs.weight", stretched(about["rope_scaling"], about["rope_theta"], head))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(unfinished, path)
    return path


def config(folder: pathlib.Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def add_tokenizer(writer, folder: pathlib.Path, about: dict) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocab = {id: token for token, id in tokenizer["model"]["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(TOKENIZERS[about["model_type"]])
    writer.add_token_list([vocab[id] for id in range(len(vocab))])
    writer.add_token_types([CONTROL if id in special else NORMAL for id in range(len(vocab))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(about["bos_token_id"])
    writer.add_eos_token_id(about["eos_token_id"])


def tensors(path: pathlib.Path):
    """Name, shape and bits of each tensor of a safetensors file of bf16."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, about in header.items():
        begin, end = about["data_offsets"]
        yield name, about["shape"], numpy.memmap(path, numpy.uint16, "r", 8 + length + begin, ((end - begin) // 2,))


def interleaved(values, head: int):
    """llama.cpp turns neighbours of a head, Hugging Face its halves."""
    heads = values.shape[0] // head
    return values.reshape(heads, 2, head // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def stretched(scaling: dict, theta: float, head: int):
    """Divisors of the rotary frequencies, as Llama 3.1 stretches them."""
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    divisors = []
    for at in range(0, head, 2):
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi * theta ** (at / head))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return numpy.array(divisors, numpy.float32)
