# SPDX-License-Identifier: Apache-2.0
"""The demo's models and losses: a small GPT-2, trained left to right, then as a masked diffusion model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..functional import linear_shifted_cross_entropy
from ..integrations import DiffusionConfig
from ..objective import DiffusionObjective, ObjectiveConfig
from ..schedules import AttentionAnnealing
from .config import DemoConfig
from .training import LossOf

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase


def new_model(config: DemoConfig, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """A GPT-2 with random weights of ``config.seed``: the same on every call."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(config.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.length,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own, computed in one pass
            resid_pdrop=0.0,  # few passes over the data: nothing to regularise
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def autoregressive_loss_of(model: PreTrainedModel) -> LossOf:
    """Next-token loss per token. Every token is "masked" and the shift makes row i score token i+1."""
    head = model.get_output_embeddings().weight

    def loss_of(x0: Tensor, sample_index: Tensor, step: int) -> Tensor:
        hidden = model.base_model(input_ids=x0, use_cache=False).last_hidden_state
        loss, _ = linear_shifted_cross_entropy(hidden, head, x0, torch.ones_like(x0, dtype=torch.bool), shift=True)
        return loss

    return loss_of


def diffusion_loss_of(model: PreTrainedModel, config: DemoConfig) -> LossOf:
    """The diffusion objective of an adapted model; noise levels are stratified over each batch."""
    diffusion = DiffusionConfig.of(model)
    annealing = AttentionAnnealing(diffusion.anneal_steps)
    objective = DiffusionObjective(ObjectiveConfig(diffusion.mask_id, shift=diffusion.shift, strata=config.batch_size))

    def loss_of(x0: Tensor, sample_index: Tensor, step: int) -> Tensor:
        return objective(
            model, x0, attn_mask_ratio=annealing(step), seed=config.seed, step=step, sample_index=sample_index
        ).loss

    return loss_of
