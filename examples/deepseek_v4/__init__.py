"""DeepSeek-V4 in JAX around `jax_dsv4`, as examples/decode_loop.py and examples/serve.py run it.

config.py       config.json, and the sizes of V4-Flash, V4-Pro and the tiny model
weights.py      which tensors there are, and how a checkpoint fills them
safetensors.py  the files of a checkpoint
tokenizer.py    text to token ids, and back
model.py        the cache and the forward pass
generate.py     prefill, decode, sampling
speculate.py    drafts of the layer that predicts the token after next
serving.py      requests that come and go: slots, chunks of prompts between steps
slots.py        the two programs of a server
pages.py        its blocks, and the prefixes that requests share
mesh.py         the same over many devices
processes.py    the same over many processes
command.py      what the commands have in common: options, errors, output
memory.py       bytes of weights and caches
train_tiny.py   made tiny/, the checkpoint of this repository
"""
