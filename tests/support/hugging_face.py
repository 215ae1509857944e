"""Small Hugging Face models with random weights, and batches for them."""

from collections.abc import Callable, Iterator

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, WIDTH = 99, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOW = 5


def _gpt2(**changes: object) -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**{"vocab_size": VOCABULARY, **sizes, **dropout, **changes})
    return transformers.GPT2LMHeadModel(config)


def _t5(**changes: object) -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = transformers.T5Config(**{"vocab_size": VOCABULARY, **sizes, **special, **changes})
    return transformers.T5ForConditionalGeneration(config)


def _bart(**changes: object) -> nn.Module:
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    }
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 96}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**{**sizes, **changes}))


def _family(name: str, sizes: dict[str, object], kind: str = "ForCausalLM", **own: object) -> Callable[..., nn.Module]:
    def make(**changes: object) -> nn.Module:
        config_name = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
        config = getattr(transformers, config_name)(**{**sizes, **own, **changes})
        return getattr(transformers, f"{name}{kind}")(config)

    return make


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "gpt2": _gpt2,
    "llama": _family("Llama", GROUPED),
    "qwen3": _family("Qwen3", GROUPED, head_dim=16),
    "mistral": _family("Mistral", GROUPED, sliding_window=WINDOW),
    "gemma2": _family("Gemma2", GROUPED, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=50.0),
    "gemma3": _family(
        "Gemma3",
        GROUPED,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=30.0,
    ),
    "phi3": _family("Phi3", GROUPED),
    "olmo2": _family("Olmo2", GROUPED),
    "smollm3": _family("SmolLM3", GROUPED),
    "modernbert": _family(
        "ModernBert",
        {**SIZES, "cls_token_id": 1, "sep_token_id": 2},
        "ForMaskedLM",
        local_attention=8,
        global_attn_every_n_layers=2,
    ),
    "bert": _family("Bert", {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "ForMaskedLM"),
    "bart": _bart,
    "t5": _t5,
}
MASKED = ("modernbert", "bert")  # models that generate nothing
ENCODERS = (*MASKED, "bart", "t5")  # models that see what comes after a token


def made(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> nn.Module:
    """A model whose norms are not all ones and whose biases are not all zeros, in training."""
    model = FAMILIES[name](**changes)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model.to(dtype).train()


ZERO = 1e-12  # of the largest gradient: what float64 makes of a gradient that is 0
PADDING = (0, 4, 7)  # tokens of each row of a padded batch


def batches(name: str, T: int = 13) -> Iterator[tuple[str, dict[str, Tensor | bool]]]:
    """(kind, arguments) of a whole batch, one padded on either side and, for a decoder, one of packed documents.

    Left padding changes what a model says at its last pad, so the label of the first token does not count there.
    """
    tokens = torch.randint(3, VOCABULARY, (len(PADDING), T))
    yield "whole", {"input_ids": tokens, "labels": tokens.clone()}
    for side in ("right", "left"):
        mask = torch.ones_like(tokens)
        labels = tokens.clone()
        for row, pad in enumerate(PADDING):
            padding = slice(T - pad, T) if side == "right" else slice(0, pad)
            mask[row, padding] = 0
            labels[row, padding] = -100
            if side == "left" and pad:
                labels[row, pad] = -100
        yield f"{side} padding", {"input_ids": tokens, "labels": labels, "attention_mask": mask}
    if name not in ENCODERS:
        positions = torch.cat([torch.arange(5), torch.arange(T - 5)])[None].expand(len(PADDING), -1)
        labels = tokens.clone()
        labels[:, 5] = -100
        yield "packed", {"input_ids": tokens, "labels": labels, "position_ids": positions, "use_cache": False}


def relative(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each result in float64 over the largest magnitude that it should have.

    A gradient that should be 0, as that of a key's bias, is one over the largest of all gradients: there is no other
    measure for the rounding that is left of it.
    """
    largest = {name: x.abs().max() for name, x in expected.items()}
    largest_gradient = max(size for name, size in largest.items() if name != "loss")
    return {
        name: results[name].double() / (largest_gradient if size < ZERO * largest_gradient else size)
        for name, size in largest.items()
    }


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor | bool]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}
