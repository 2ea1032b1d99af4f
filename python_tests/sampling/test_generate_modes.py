# SPDX-License-Identifier: Apache-2.0
"""Modes of generation over models: every policy by name, the end of text, chat, guidance, graphs."""

import pytest
import torch
from tiny_models import MASK_ID, VOCAB, WORDS, causal_lm, word_tokenizer

from diffullama_ext.integrations import adapt
from diffullama_ext.sampling import POLICIES, Forbidden, ModelDenoiser, ThresholdPolicy, chat, fill, generate, infill
from diffullama_ext.sampling.cuda_graphs import GraphedDenoiser

EOS = 9
PROMPTS = torch.tensor([[0, 0, 20, 21], [22, 23, 24, 25], [0, 26, 27, 28]])
REAL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


@pytest.fixture(scope="module")
def model():
    return adapt(causal_lm("llama").double(), mask_token=MASK_ID)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_generates(model, policy):
    """Rows are as alone, behind padding on either side."""
    options = dict(length=8, steps=6, block_length=4, policy=policy, seed=4, top_p=0.95)
    out = generate(model, prompt_ids=PROMPTS, attention_mask=REAL, **options)
    assert torch.equal(out.sequences[:, :4], PROMPTS)
    assert not (out.sequences == MASK_ID).any()
    assert out.completion_tokens.tolist() == [8, 8, 8]
    for row, first in enumerate((2, 0, 1)):
        alone = generate(model, prompt_ids=PROMPTS[row : row + 1, first:], sample_index=torch.tensor([row]), **options)
        assert torch.equal(alone.sequences[0, -8:], out.sequences[row, -8:])


def test_greedy_threshold_above_one_is_one_token_at_a_time(model):
    options = dict(prompt_ids=PROMPTS, attention_mask=REAL, length=10, temperature=0.0)
    above = generate(model, policy=ThresholdPolicy(1.01), **options)
    assert above.nfe.tolist() == [10, 10, 10]
    ids = PROMPTS[1].tolist() + [MASK_ID] * 10
    while MASK_ID in ids:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].detach()
        logits[:, MASK_ID] = -torch.inf
        best = max((j for j, i in enumerate(ids) if i == MASK_ID), key=lambda j: float(logits[j - 1].softmax(0).max()))
        ids[best] = int(logits[best - 1].argmax())
    assert above.sequences[1].tolist() == ids


def test_completion_tokens_end_with_eos(model):
    with_eos = model.get_output_embeddings().weight.data
    kept = with_eos[EOS].clone()
    with_eos[EOS] = with_eos[[30, 31]].mean(0) * 1.5  # likely now and then
    options = dict(prompt_ids=PROMPTS, attention_mask=REAL, length=20, block_length=4, eos_id=EOS, seed=2, n=4)
    out = generate(model, **options)
    ends = 0
    for ids, count in zip(out.sequences[:, -20:].tolist(), out.completion_tokens.tolist(), strict=True):
        assert EOS not in ids[: count - 1]
        assert count == 20 or ids[count - 1 :] == [EOS] * (21 - count)
        ends += EOS in ids
    assert ends > 0
    to_the_end = generate(model, logits_hooks=[Forbidden([EOS])], **options)
    assert to_the_end.completion_tokens.tolist() == [20] * 12
    assert (out.nfe <= to_the_end.nfe).all()
    assert (out.nfe < to_the_end.nfe).any()
    with_eos[EOS] = kept


def test_guided_generation_differs_and_counts_both_forwards(model):
    options = dict(prompt_ids=PROMPTS, attention_mask=REAL, length=8, steps=4, temperature=0.0)
    plain, guided = generate(model, **options), generate(model, cfg=2.0, **options)
    assert guided.nfe.tolist() == [8, 8, 8]
    assert not torch.equal(plain.sequences, guided.sequences)
    other = generate(model, cfg=2.0, negative=lambda state: state.xt.flip(1), **options)
    assert not torch.equal(other.sequences, guided.sequences)


def test_infill_takes_the_same_options(model):
    tokenizer = word_tokenizer()
    text = "w30 [MASK:3] w31 w32 [MASK:4] w33"
    options = dict(start_id=20, temperature=0.0, block_length=3)
    plain = infill(model, tokenizer, text, **options)
    for changes in (dict(cfg=1.5), dict(cache="block"), dict(policy="saber"), dict(logits_hooks=[Forbidden([40])])):
        out = infill(model, tokenizer, text, **options | changes)
        assert len(out.fills[0]) == 2
        assert out.texts[0].startswith("w30 ")
        assert out.texts[0].endswith(" w33")
    assert infill(model, tokenizer, text, cfg=3.0, **options).texts != plain.texts


# --- chat ------------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"


@pytest.fixture
def talking():
    tokenizer = word_tokenizer(eos_token=WORDS[EOS])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_chat_is_generation_behind_the_template(model, talking):
    long = [{"role": "user", "content": "w20 w21 w22"}, {"role": "assistant", "content": "w23"}]
    short = [{"role": "user", "content": "w30"}]
    options = dict(length=6, steps=3, seed=1)
    both = chat(model, talking, [long, short], **options)
    ids = [WORDS.index(word) for word in ["w1", "w20", "w21", "w22", "w1", "w23", "w2"]]
    out = generate(model, prompt_ids=torch.tensor([ids]), eos_id=EOS, **options)
    assert both.texts[0] == talking.decode(out.sequences[0, len(ids) :][: int(out.completion_tokens)])
    assert both.completion_tokens[0] == out.completion_tokens
    assert len(both.texts) == len(both.nfe) == 2
    assert chat(model, talking, long, **options).texts == both.texts[:1]
    assert chat(model, talking, short, sample_index=torch.tensor([1]), **options).texts == both.texts[1:]


def test_chat_rejects_bad_input(model, talking):
    with pytest.raises(ValueError, match=r"must have a chat template, .* has none"):
        chat(model, word_tokenizer(), [{"role": "user", "content": "w3"}], length=3)
    for messages in ([], [[]]):
        with pytest.raises(ValueError, match="messages must be a conversation of at least one message"):
            chat(model, talking, messages, length=3)


# --- graphs ----------------------------------------------------------------------------------------------------------


def test_graphed_inputs_and_outputs():
    """Everything but the capture itself, which a function stands in for: what a replay reads and writes is static."""
    model = adapt(causal_lm("gpt2").double(), mask_token=MASK_ID)
    captured = []

    def run_again(run):
        out = run()
        captured.append(1)

        def replay():
            new = run()
            out.zero_()
            out.copy_(new)

        return replay, out

    xt = torch.randint(8, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    masked = torch.arange(12).expand(2, -1) >= torch.tensor([[2], [4]])
    options = dict(mask_id=MASK_ID, steps=4, seed=3)
    graphed = fill(GraphedDenoiser(ModelDenoiser(model), run_again), xt, masked, **options)
    assert captured == [1]
    assert torch.equal(graphed.xt, fill(ModelDenoiser(model), xt, masked, **options).xt)
    with pytest.raises(ValueError, match=r"cuda_graph needs a CUDA device and no cache, got cpu"):
        generate(model, length=3, start_id=1, cuda_graph=True)
