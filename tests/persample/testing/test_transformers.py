"""Architectures of Hugging Face's transformers from random weights, where the package is installed (`make slow`)."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from oracle import loop_grads, rel_err
from torch import Tensor

import persample

NAMES = (
    "gpt2 gpt_neox gptj opt bloom llama mistral mixtral qwen2 qwen2_moe qwen3 gemma gemma2 phi phi3 bert roberta "
    "distilbert albert electra deberta deberta-v2 t5 bart pegasus mbart marian mpnet camembert xlm-roberta mobilebert "
    "squeezebert fnet nystromformer convbert roformer ctrl codegen biogpt olmo olmoe stablelm starcoder2 cohere mamba "
    "granite jetmoe longformer big_bird led ernie megatron-bert splinter tapas yoso ibert rembert blenderbot m2m_100 "
    "plbart nllb-moe switch_transformers umt5 mt5 longt5"
).split()
FLOAT32 = {"mixtral", "qwen2_moe", "olmoe", "gemma", "gemma2", "cohere", "mamba", "switch_transformers"}
"""Compute in float32 whatever the model's precision."""
SIZES: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 16)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "num_heads"), 4)
    | dict.fromkeys(
        ("decoder_attention_heads", "num_experts", "num_local_experts", "head_dim", "d_kv", "rotary_dim"), 4
    )
    | dict.fromkeys(("intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim"), 24)
    | dict.fromkeys(("moe_intermediate_size", "n_inner", "shared_expert_intermediate_size"), 24)
    | dict.fromkeys(("max_position_embeddings", "n_positions"), 32)
    | {"vocab_size": 50, "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1}
    | {"eos_token_id": 2, "decoder_start_token_id": 1, "sliding_window": 8, "attention_window": [4, 4]}
    | {"state_size": 4, "time_step_rank": 4, "expand": 2, "conv_kernel": 3}
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the package's own
@pytest.mark.parametrize("name", NAMES)
def test_architecture(name: str) -> None:
    pytest.importorskip("transformers", reason="the architectures come from transformers, which no extra installs")
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = set(inspect.signature(CONFIG_MAPPING[name].__init__).parameters) | set(dir(CONFIG_MAPPING[name]()))
    config = CONFIG_MAPPING[name](**{key: value for key, value in SIZES.items() if key in known})
    model = AutoModel.from_config(config).eval()
    model = model.float() if name in FLOAT32 else model.double()
    inputs = {"input_ids": torch.randint(3, 50, (3, 7))}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 50, (3, 5))

    def loss_fn(outputs: Any, _targets: None) -> Tensor:
        hidden = outputs[0].flatten(1)
        generator = torch.Generator().manual_seed(1)
        return (hidden * torch.randn(hidden.shape[1], generator=generator, dtype=hidden.dtype)).sum(1)

    expected = loop_grads(model, loss_fn, inputs, None)
    found = persample.per_sample(model, loss_fn, inputs).grads()
    largest = max(float(rows.abs().max()) for rows in expected.values())
    relative, absolute = (1e-3, 2e-6) if name in FLOAT32 else (1e-8, 1e-12)
    for parameter, rows in expected.items():
        gap = float((found[parameter] - rows).abs().max())
        assert rel_err(found[parameter], rows) < relative or gap < absolute * largest, parameter
