# SPDX-License-Identifier: Apache-2.0
"""Sampling from transformers models: tiny, random, in float64, so that batch shapes do not decide a draw."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from diffullama_ext.integrations import adapt
from diffullama_ext.sampling import ModelDenoiser, fill, generate

VOCAB, MASK, BOS = 40, 39, 5


def tiny_gpt2():
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=BOS, eos_token_id=7
    )
    return GPT2LMHeadModel(config)


def tiny_llama():
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        bos_token_id=None,
        eos_token_id=[BOS, 7],
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=[tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def model(request):
    torch.manual_seed(0)
    model = request.param().double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.6)
    return adapt(model, mask_token=MASK).train()


PROMPTS = [[5, 1, 2, 3, 4, 5, 6], [5, 9], [5, 9, 1, 1]]


def padded(prompts, side, pad=0):
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        gap = [pad] * (width - len(prompt))
        ids.append(gap + prompt if side == "left" else prompt + gap)
        mask.append([0] * len(gap) + [1] * len(prompt) if side == "left" else [1] * len(prompt) + [0] * len(gap))
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("policy", ["random", "confidence", "threshold"])
@pytest.mark.parametrize("block_length", [None, 3], ids=["whole", "blocks"])
def test_text_depends_neither_on_padding_nor_on_batch_mates(model, policy, block_length):
    options = dict(length=9, steps=5, policy=policy, block_length=block_length, seed=3, top_p=0.9)
    ids, mask = padded(PROMPTS, "left")
    left = generate(model, prompt_ids=ids, attention_mask=mask, **options)
    assert left.sequences.shape == (3, 7 + 9)
    assert torch.equal(left.sequences[:, :7], ids)
    assert not (left.sequences[:, 7:] == MASK).any()

    for other_ids, other_mask in (padded(PROMPTS, "right"), padded(PROMPTS, "left", pad=MASK)):
        other = generate(model, prompt_ids=other_ids, attention_mask=other_mask.bool(), **options)
        assert torch.equal(other.sequences[:, 7:], left.sequences[:, 7:])
        assert torch.equal(other.sequences[:, :7], other_ids)
        assert torch.equal(other.nfe, left.nfe)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, prompt_ids=torch.tensor([prompt]), sample_index=torch.tensor([row]), **options)
        assert torch.equal(alone.sequences[0, -9:], left.sequences[row, 7:])
    assert len({tuple(row) for row in left.sequences[:, 7:].tolist()}) == 3


def test_a_trace_of_the_run_can_be_asked_for(model):
    """Beside a hook of one's own; it changes nothing."""
    steps = []
    options = dict(length=6, steps=3, seed=4)
    plain = generate(model, **options)
    out = generate(model, **options, trace=True, on_step=lambda state, stats, written: steps.append(state.step))
    assert plain.trace is None
    assert torch.equal(out.sequences, plain.sequences)
    assert steps == [0, 1, 2]
    assert out.trace.history().xt.shape == (3, 1, 7)
    assert sorted(set(out.trace.commit_step[0].tolist())) == [-1, 0, 1, 2]  # -1: the start token


def test_blocks_must_divide_the_text(model):
    with pytest.raises(ValueError, match=r"block_length must divide length 9, got 4"):
        generate(model, length=9, block_length=4)


def test_a_prompt_row_equals_fill_by_hand(model):
    """The whole adapter, straight: prompt, masks, model logits, shift."""
    filled = fill(
        ModelDenoiser(model.eval()),
        torch.tensor([[5, 9, 0, 0, 0, 0]]),
        torch.tensor([[False, False, True, True, True, True]]),
        mask_id=MASK,
        steps=2,
        seed=4,
    )
    model.train()
    out = generate(model, prompt_ids=torch.tensor([[5, 9]]), length=4, steps=2, seed=4)
    assert torch.equal(out.sequences, filled.xt)
    assert torch.equal(out.nfe, filled.nfe)


def test_without_a_prompt_a_start_token_stands_first(model):
    """bos, else the first eos; dropped from the result."""
    out = generate(model, length=6, n=3, steps=3, seed=1)
    assert out.sequences.shape == (3, 6)
    prompted = generate(model, length=6, n=3, steps=3, seed=1, prompt_ids=torch.tensor([[BOS]]))
    assert torch.equal(out.sequences, prompted.sequences[:, 1:])
    assert (prompted.sequences[:, 0] == BOS).all()
    other = generate(model, length=6, n=3, steps=3, seed=1, start_id=8)
    assert not torch.equal(other.sequences, out.sequences)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 3


def test_n_sequences_of_each_prompt(model):
    ids, mask = padded(PROMPTS[:2], "left")
    out = generate(model, prompt_ids=ids, attention_mask=mask, n=2, length=5, steps=5)
    assert torch.equal(out.sequences[:, :7], ids[[0, 0, 1, 1]])
    again = generate(model, prompt_ids=ids[[0, 0, 1, 1]], attention_mask=mask[[0, 0, 1, 1]], length=5, steps=5)
    assert torch.equal(again.sequences, out.sequences)


def test_without_shift_no_start_token_is_needed():
    torch.manual_seed(0)
    model = adapt(tiny_gpt2(), mask_token=MASK, shift=False)
    out = generate(model, length=6, steps=3)
    assert out.sequences.shape == (1, 6)
    assert not (out.sequences == MASK).any()


def test_the_models_mode_is_kept_and_dropout_is_off(model):
    """GPT-2 has dropout: in train mode two runs would differ."""
    runs = []
    for training in (True, True, False):
        model.train(training)
        runs.append(generate(model, length=8, steps=4).sequences)
        assert model.training is training
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    model.train()
    with pytest.raises(ValueError, match="top_p"):
        generate(model, length=8, steps=4, top_p=2.0)
    assert model.training


def test_no_graph_is_kept_and_gradients_stay_on(model):
    assert not generate(model, length=3, steps=1).sequences.requires_grad
    assert torch.is_grad_enabled()


def test_progress_is_reported(model):
    seen = []
    generate(model, length=8, steps=4, on_step=lambda state, stats, decision: seen.append(int(state.masked.sum())))
    assert seen == [6, 4, 2, 0]


IDS = torch.tensor([[1, 2], [3, 4]])
LONG = r"the sequence has 49 tokens, given ones and masks, and the model takes 48"
EMPTY = r"prompt_ids must have a real token in every row, got none in rows "


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(length=0), ValueError, r"length must be in \[1, .*got 0"),
        (dict(length=4.0), TypeError, r"length must be an int, got 4.0"),
        (dict(n=0), ValueError, r"n must be in \[1, .*got 0"),
        (dict(steps=0), ValueError, r"steps must be in \[1, .*got 0"),
        (dict(length=48), ValueError, LONG),
        (dict(prompt_ids=torch.ones(1, 45, dtype=torch.int64)), ValueError, LONG),
        (dict(prompt_ids=[1, 2]), TypeError, r"prompt_ids must be a tensor int64\[B, P\], got list"),
        (dict(prompt_ids=torch.tensor([1, 2])), ValueError, r"prompt_ids must be int64\[B, P\], got int64\[2\]"),
        (dict(prompt_ids=IDS[:, :0]), ValueError, EMPTY + r"\[0, 1\]"),
        (dict(prompt_ids=IDS, attention_mask=torch.tensor([[1, 1], [0, 0]])), ValueError, EMPTY + r"\[1\]"),
        (
            dict(prompt_ids=IDS, attention_mask=torch.ones_like(IDS)[:1]),
            ValueError,
            r"attention_mask must be .*\[2, 2\]",
        ),
        (dict(prompt_ids=IDS - 10**6), ValueError, r"prompt_ids .* in the model's vocabulary of \d+ tokens, got -9"),
        (dict(prompt_ids=IDS + 10**6), ValueError, r"prompt_ids .* in the model's vocabulary of \d+ tokens, got 1000"),
        (dict(start_id=10**6), ValueError, r"start_id must be in the model's vocabulary of \d+ tokens, got 1000000"),
        (dict(attention_mask=IDS), ValueError, r"attention_mask must be None without prompt_ids"),
        (dict(model=tiny_gpt2()), ValueError, r"model must be adapted .* got GPT2LMHeadModel .* mask_token_id=None"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_rejects_bad_input(model, changes, error, message):
    with pytest.raises(error, match=message):
        generate(**dict(model=model, length=4, steps=2) | changes)


def test_no_start_token_to_be_found():
    model = adapt(tiny_gpt2(), mask_token=MASK)
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = None
    with pytest.raises(ValueError, match=r"position 0 with shift=True.*put a start token first"):
        generate(model, length=4, steps=2)
    assert generate(model, length=4, steps=2, start_id=3).sequences.shape == (1, 4)
