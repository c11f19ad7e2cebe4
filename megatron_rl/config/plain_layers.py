"""What keeps a model from Transformer Engine's layers. No torch."""

from __future__ import annotations

from megatron_rl.models.architecture import Architecture


def plain_features(arch: Architecture) -> list[str]:
    """Returns the model's features that the layers in plain PyTorch alone have."""
    features = {
        "sinks of attention": arch.sinks,
        "sliding windows": bool(arch.windowed_layers),
        "biases of experts": arch.biases,
        "clamped activations": arch.clamped is not None,
        "gated delta networks": arch.delta_net is not None,
        "gates on attention": arch.output_gate,
        "zero-centred norms": arch.zero_centred_norms,
    }
    return [name for name, present in features.items() if present]
