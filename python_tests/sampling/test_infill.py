# SPDX-License-Identifier: Apache-2.0
"""Infilling: the syntax of spans, tokenizers of both kinds, and text on both sides."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from diffullama_ext.integrations import adapt
from diffullama_ext.sampling import infill, parse_spans


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("[MASK:12]", [12]),
        ("def add(a, b):\n    [MASK:12]\n", ["def add(a, b):\n    ", 12, "\n"]),
        ("[MASK:1][MASK:02] x", [1, 2, " x"]),
        ("a[0] [MASK] [MASK:3]", ["a[0] [MASK] ", 3]),
    ],
)
def test_parse_spans(text, pieces):
    assert parse_spans(text) == pieces


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"text must have a span \[MASK:n\] to fill, got ''"),
        ("no span [MASK]", r"text must have a span \[MASK:n\] to fill, got 'no span \[MASK\]'"),
        ("x" * 100, r"got 'x{57}\.\.\.'"),
        ("[MASK:0]", r"at least 1 token, got \[MASK:0\]"),
        ("[MASK:2] [MASK:two]", r"must mark spans as \[MASK:n\], n a number of tokens, got '\[MASK:two\]'"),
        ("[MASK:-1]", r"got '\[MASK:-1\]'"),
        ("[MASK:2] [MASK:7", r"got '\[MASK:7'"),
        ("[MASK:]", r"got '\[MASK:\]'"),
    ],
)
def test_parse_spans_rejects(text, message):
    with pytest.raises(ValueError, match=message):
        parse_spans(text)


def byte_level():
    """One token a byte, and a mask, a bos and an eos token behind them."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<m>", bos_token="<s>", eos_token="</s>")


def metaspace():
    """Like LLaMA-2's: a space before the text's beginning, which decoding strips again."""
    characters = ["\n", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("\u2581", "d"), ("\u2581d", "o"), ("\u2581do", "g")]
    vocab = {token: index for index, token in enumerate([*characters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<m>", eos_token="</s>")


class Scripted(nn.Module):
    """A model whose logits are a function of the ids and the padding mask; keeps what it was given."""

    def __init__(self, logits_of, mask_id, shift=True, longest=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.logits_of, self.seen = logits_of, []
        diffusion = {"shift": shift, "anneal_steps": 0}
        self.config = SimpleNamespace(mask_token_id=mask_id, diffusion=diffusion, max_position_embeddings=longest)
        self.generation_config = None

    def forward(self, input_ids, attention_mask, use_cache):
        self.seen.append((input_ids, attention_mask))
        logits = self.logits_of(input_ids, attention_mask)
        return SimpleNamespace(logits=logits.roll(-1, dims=1) if self.config.diffusion["shift"] else logits)


def palindromes(tokenizer, starts):
    """Every text is one: a mask is told by its mirror image, so the left half needs the right one."""

    def logits_of(ids, real):
        length = real.sum(1) if real is not None else torch.full((len(ids),), ids.shape[1])
        mirrored = (length - 1 + starts)[:, None] - torch.arange(ids.shape[1])
        known = ids.gather(1, mirrored.clamp(0, ids.shape[1] - 1))
        sure = torch.where(known == tokenizer.mask_token_id, 0.0, 60.0)
        return sure[..., None] * F.one_hot(known, len(tokenizer)).float()

    return logits_of


@pytest.mark.parametrize("shift", [False, True], ids=["same-row", "shift"])
@pytest.mark.parametrize("policy", ["random", "confidence", "threshold"])
def test_both_sides_of_a_span_are_read(shift, policy):
    tokenizer = byte_level()
    model = Scripted(palindromes(tokenizer, starts=int(shift)), tokenizer.mask_token_id, shift=shift)
    out = infill(model, tokenizer, ["[MASK:4] dcba", "ab[MASK:2]dcba", "x[MASK:1]z[MASK:1]yx"], policy=policy, steps=3)
    assert out.texts == ["abcd dcba", "abcddcba", "xyzzyx"]
    assert out.fills == [["abcd"], ["cd"], ["y", "z"]]
    ids, real = model.seen[0]
    assert real.sum(1).tolist() == [9 + shift, 8 + shift, 6 + shift]
    assert (ids[:, 0] == tokenizer.bos_token_id).any() == shift


def constant(answer, vocab):
    """Certain of ``answer``, a list of ids by position, whatever is given."""
    return lambda ids, real: 60.0 * F.one_hot(torch.tensor(answer), vocab).float().expand(len(ids), -1, -1)


def test_sentencepiece_spaces_are_the_texts_own():
    """The space that belongs to a text's beginning is not put before later pieces, nor stripped from a span."""
    tokenizer = metaspace()
    dog, d = tokenizer.convert_tokens_to_ids(["\u2581dog", "d"])
    model = Scripted(constant([0] * 6 + [dog, d] + [0] * 2, len(tokenizer)), tokenizer.mask_token_id)
    out = infill(model, tokenizer, "a ba[MASK:2]b dog", steps=1)
    tokens = tokenizer.convert_ids_to_tokens(model.seen[0][0][0].tolist())
    assert tokens == ["</s>", "\u2581", "a", "\u2581", "b", "a", "<m>", "<m>", "b", "\u2581dog"]
    assert out.fills == [[" dogd"]]
    assert out.texts == ["a ba dogdb dog"]


def test_special_tokens_do_not_show_and_broken_characters_do():
    tokenizer = byte_level()
    answer = [0, tokenizer.eos_token_id, tokenizer.encode("\u00e4")[0], 0, 0]
    model = Scripted(constant(answer, len(tokenizer)), tokenizer.mask_token_id)
    out = infill(model, tokenizer, "[MASK:2]\u00e4", steps=1)
    assert out.fills == [["\ufffd"]]
    assert out.texts == ["\ufffd\u00e4"]


def test_start_token():
    """bos, else eos, of the tokenizer, else of the model; what is given instead; none without the shift."""

    def first_id(tokenizer, shift=True, start_id=None, bos=None):
        model = Scripted(lambda ids, real: torch.zeros(*ids.shape, 300), 299, shift=shift)
        model.config.bos_token_id = bos
        infill(model, tokenizer, "xy[MASK:1]", steps=1, start_id=start_id)
        return int(model.seen[0][0][0, 0])

    tokenizer = byte_level()
    x = tokenizer.encode("x")[0]
    assert first_id(tokenizer) == tokenizer.bos_token_id
    assert first_id(tokenizer, start_id=17) == 17
    assert first_id(tokenizer, shift=False) == x
    tokenizer.bos_token = None
    assert first_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert first_id(tokenizer, bos=11) == 11
    assert first_id(tokenizer) == x
    with pytest.raises(ValueError, match="position 0 with shift=True"):
        infill(Scripted(None, 299), tokenizer, "[MASK:1]xy", steps=1)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    tokenizer = byte_level()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.4)
    return adapt(model, tokenizer).train(), tokenizer


TEXTS = ["def add(a, b):\n    [MASK:12]\n", "[MASK:3]", "x = [MASK:4] + [MASK:5]  # \u00e4\u4e2d"]


@pytest.mark.parametrize("policy", ["random", "confidence", "threshold"])
def test_a_model_infills_and_rows_are_independent(tiny, policy):
    model, tokenizer = tiny
    options = dict(steps=6, policy=policy, block_length=4, seed=5, top_k=50)
    out = infill(model, tokenizer, TEXTS, **options)
    for text, whole, fills in zip(TEXTS, out.texts, out.fills, strict=True):
        fixed = [piece for piece in parse_spans(text) if isinstance(piece, str)]
        assert "<m>" not in whole
        rest = whole
        for piece in fixed:
            assert piece in rest
            rest = rest[rest.index(piece) + len(piece) :]
        assert len(fills) == text.count("[MASK:")
    for row, text in enumerate(TEXTS):
        alone = infill(model, tokenizer, text, sample_index=torch.tensor([row]), **options)
        assert alone.texts == [out.texts[row]]
        assert alone.nfe.tolist() == [int(out.nfe[row])]
    assert model.training


def test_n_fillings_of_each_text(tiny):
    model, tokenizer = tiny
    out = infill(model, tokenizer, TEXTS[1:], n=2, steps=2)
    assert len(out.texts) == 4
    assert len(set(out.texts)) == 4
    assert infill(model, tokenizer, [TEXTS[1]] * 2 + [TEXTS[2]] * 2, steps=2).texts == out.texts


def test_rejects_bad_input(tiny):
    model, tokenizer = tiny
    for changes, error, message in [
        (dict(text=[]), ValueError, r"text must be a text or at least one, got an empty sequence"),
        (dict(text=["[MASK:1]", "x"]), ValueError, r"must have a span \[MASK:n\] to fill, got 'x'"),
        (dict(text="[MASK:64]"), ValueError, r"the sequence has 65 tokens.*model takes 64"),
        (dict(n=0), ValueError, r"n must be in \[1, .*got 0"),
        (dict(steps=0), ValueError, r"steps must be in \[1, .*got 0"),
        (dict(policy="best"), ValueError, r"policy must be one of"),
        (dict(model=GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1))), ValueError, r"model must be adapted"),
    ]:
        with pytest.raises(error, match=message):
            infill(**dict(model=model, tokenizer=tokenizer, text="a[MASK:1]", steps=1) | changes)
