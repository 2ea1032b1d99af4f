# SPDX-License-Identifier: Apache-2.0
"""`model.generate(custom_generate=unmasking)`: what transformers' options do, against our own generate."""

import pytest
import torch
from tiny_models import MASK_ID, VOCAB, causal_lm
from transformers import GenerationConfig, LogitsProcessor

from diffullama_ext.integrations import adapt
from diffullama_ext.sampling import Trace, generate
from diffullama_ext.sampling.custom_generate import unmasking

IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 10, 11]])
LEFT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    model = adapt(causal_lm(request.param).double(), mask_token=MASK_ID)
    model.generation_config = GenerationConfig(pad_token_id=1)
    return model


def call(model, *ids, **options):
    return model.generate(*ids, custom_generate=unmasking, **options)


@pytest.mark.parametrize("policy", ["confidence", "threshold"])
def test_greedy_by_default(model, policy):
    out = call(model, IDS, attention_mask=LEFT, max_new_tokens=9, steps=3, policy=policy)
    ours = generate(model, prompt_ids=IDS, attention_mask=LEFT, length=9, steps=3, policy=policy, temperature=0.0)
    assert torch.equal(out, ours.sequences)
    assert not (out[:, 4:] == MASK_ID).any()


def test_sampling_options_and_several_sequences(model):
    options = {"temperature": 0.7, "top_k": 9, "top_p": 0.8}
    asked = {"max_length": 12, "num_return_sequences": 3, "seed": 5, "block_length": 4, "return_dict_in_generate": True}
    out = call(model, IDS, attention_mask=LEFT, do_sample=True, **options, **asked)
    rows = {"prompt_ids": IDS, "attention_mask": LEFT, "n": 3, "seed": 5, "block_length": 4}
    ours = generate(model, length=8, **rows, **options)
    assert torch.equal(out.sequences, ours.sequences)
    assert torch.equal(out.nfe, ours.nfe)
    other = call(model, IDS, attention_mask=LEFT, do_sample=True, **options, **(asked | {"seed": 6}))
    assert not torch.equal(other.sequences, out.sequences)


def test_a_cache_between_steps(model):
    options = {"steps": 3, "block_length": 3}
    out = call(model, IDS, max_new_tokens=9, step_cache="dual", return_dict_in_generate=True, **options)
    ours = generate(model, prompt_ids=IDS, length=9, cache="dual", temperature=0.0, **options)
    assert torch.equal(out.sequences, ours.sequences)
    assert torch.equal(out.nfe, ours.nfe)


def test_without_a_seed_torch_gives_one(model):
    torch.manual_seed(1)
    first = call(model, IDS, max_new_tokens=8, do_sample=True)
    second = call(model, IDS, max_new_tokens=8, do_sample=True)
    torch.manual_seed(1)
    assert torch.equal(call(model, IDS, max_new_tokens=8, do_sample=True), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("one", [True, False], ids=["one eos", "several"])
def test_padding_behind_the_first_eos(model, one):
    """Every token of the greedy text in turn is made the eos."""
    plain = call(model, IDS[:1], max_new_tokens=8)
    for eos in set(plain[0, 4:].tolist()):
        eos_ids = [eos] if one else [eos, VOCAB - 1]
        out = call(model, IDS[:1], max_new_tokens=8, eos_token_id=eos_ids)
        written = out[0, 4:].tolist()
        ends = [i for i, token in enumerate(written) if token in eos_ids]
        if ends:
            assert written[ends[0] + 1 :] == [1] * (7 - ends[0])
        if not one and ends:
            assert written[: ends[0] + 1] == plain[0, 4 : 5 + ends[0]].tolist()


def test_a_trace_and_a_page_come_with_it(model):
    trace = Trace()
    out = call(model, IDS, max_new_tokens=6, on_step=trace)
    assert torch.equal(trace.history().xt[-1].long(), out)


class Louder(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return 2 * scores


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_beams": 2}, "num_beams must be 1"),
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor is a logits processor"),
        ({"logits_processor": [Louder()]}, "Louder is a logits processor"),
        ({"max_time": 1.0}, "MaxTimeCriteria is a stopping criterion"),
        ({"steps": 0}, "steps must be in"),
        ({"policy": "psychic"}, "policy must be one of"),
        ({"stepz": 3}, "stepz"),
        ({"max_new_tokens": 80}, "the model takes 64"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_has_no_meaning_is_refused(model, options, text):
    with pytest.raises(ValueError, match=text):
        call(model, IDS, **{"max_new_tokens": 4, **options})
