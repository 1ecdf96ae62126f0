"""DeepSeek-V4 in JAX around `jax_dsv4`, as examples/decode_loop.py drives it.

model.py        the cache and the forward pass
generate.py     prefill, decode, sampling
weights.py      which tensors there are, and Hugging Face checkpoints (safetensors.py, tokenizer.py)
config.py       config.json, and the sizes of V4-Flash, V4-Pro and the tiny model
memory.py       bytes of weights and caches
train_tiny.py   made tiny/, the checkpoint that this repository ships
"""
