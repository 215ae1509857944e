"""Which settings make a CPU run fastlm's compiled code at the small shapes of tests, where a user's runs PyTorch's."""

from fastlm.ops import _dispatch


def of_compiled_code() -> dict[str, object]:
    """Names in _dispatch and their values."""
    thresholds = ("ATTENTION_MIN_SEQLEN", "ATTENTION_MIN_MACS", "ENCODER_LAYER_MIN_SEQLEN")
    return {
        **{name: 0 for name in vars(_dispatch) if name.startswith(thresholds)},
        "CPU_MIN_NUMEL": dict.fromkeys(_dispatch.CPU_MIN_NUMEL, 0),
        "CROSS_ENTROPY_FEW_LOGITS": -1,
        "num_threads": lambda: 1,
    }
