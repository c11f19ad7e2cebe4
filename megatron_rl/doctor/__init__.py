"""`megatron-rl doctor`: checks that SGLang servers which run already can do all that the trainer asks of them."""
