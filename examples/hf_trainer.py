# SPDX-License-Identifier: Apache-2.0
"""transformers.Trainer as it is: the data collator adds the noise, compute_loss_func weighs the masked tokens.

The model's own forward makes the logits [B, L, V]; DiffusionTrainer never holds them, and anneals the attention.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from diffullama_ext import mask_tokens, shifted_cross_entropy
from diffullama_ext.integrations import adapt
from diffullama_ext.objective import draw_t

MASK_ID, LENGTH = 64, 32


class Noising:
    """A batch of clean tokens becomes noised inputs; ``labels`` carries what the loss needs."""

    def __init__(self, seed: int) -> None:
        self.seed, self.n_seen = seed, 0

    def __call__(self, examples: list[dict]) -> dict:
        x0 = torch.stack([torch.as_tensor(example["input_ids"]) for example in examples])
        number = torch.arange(self.n_seen, self.n_seen + len(x0))
        self.n_seen += len(x0)
        t = draw_t(number, self.seed, strata=len(x0))
        noised = mask_tokens(x0, t, mask_id=MASK_ID, seed=self.seed, sample_index=number)
        return {"input_ids": noised.xt, "labels": {"x0": x0, "masked": noised.masked, "weight": 1 / t}}


def diffusion_loss(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    loss, _ = shifted_cross_entropy(outputs.logits, labels["x0"], labels["masked"], loss_weight=labels["weight"])
    return loss


def main(steps: int = 40, output_dir: str = "/tmp/diffullama-hf-trainer") -> list[float]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=MASK_ID + 1, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4)
    model = adapt(GPT2LMHeadModel(config), mask_token=MASK_ID)
    data = [{"input_ids": torch.full((LENGTH,), word)} for word in range(MASK_ID)]
    arguments = TrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model, arguments, train_dataset=data, data_collator=Noising(seed=0), compute_loss_func=diffusion_loss
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print([round(loss, 2) for loss in main()])
