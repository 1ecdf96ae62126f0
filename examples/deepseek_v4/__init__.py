"""DeepSeek-V4 in JAX around `jax_dsv4`, as examples/decode_loop.py and examples/serve.py run it.

config.py       config.json, and the sizes of V4-Flash, V4-Pro and the tiny model
weights.py      which tensors there are, and how a checkpoint fills them
packed.py       fp8 and fp4 matrices as they are published
safetensors.py  the files of a checkpoint
tokenizer.py    text to token ids, and back
model.py        the cache and the forward pass
rope.py         its rotation by position
index_keys.py   its indexer's keys, also in fp8, and their scores
products.py     its products with weights: by XLA, or by kernels.py
kernels.py      kernels in Pallas for Hopper GPUs: the products
fused.py        the same for what is between them, in steps of few tokens
terms.py        a sublayer's output before it is summed
generate.py     prefill, decode, sampling
speculate.py    drafts of the layer that predicts the token after next
serving.py      requests that come and go: slots, chunks of prompts between steps
slots.py        the two programs of a server
pages.py        its blocks, and the prefixes that requests share
axes.py         what devices exchange along the axes of a mesh
mesh.py         the same over many devices
processes.py    the same over many processes
command.py      what the commands have in common: options, errors, output
memory.py       bytes of weights and caches
train_tiny.py   made tiny/, the checkpoint of this repository
"""
