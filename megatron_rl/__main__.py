"""`python -m megatron_rl`, which is what torchrun starts."""

from megatron_rl.cli import main

if __name__ == "__main__":
    main()
