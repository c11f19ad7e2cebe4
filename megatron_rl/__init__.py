"""megatron_rl: reinforcement learning of mixture-of-experts language models on Megatron-Core and SGLang.

Importing the package, its configuration and its data types needs no torch.
"""

__version__ = "0.2.0"
