"""The ops: each from its checks to its call."""
