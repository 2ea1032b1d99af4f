# SPDX-License-Identifier: Apache-2.0
"""AttentionMask: who may attend to whom, one bit an entry, made once a step and shared by every layer."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import ops, reference
from ._library import use_kernel
from .checks import as_scalar_tensor, check_int, check_range, check_tensor


def _backend(op: str, device: torch.device) -> ModuleType:
    """ops or reference: the two have the same functions."""
    return ops.attention_mask if use_kernel(op, device) else reference.attention_mask


class AttentionMask:
    """allow(b, q, k) as bits, with the two masks that need none (causal, full) known by name.

    Attributes:
        kind: "causal", "full" or "bits"; attention takes its cheapest exact path by it.
        q_length, k_length: queries and keys the mask is for.
        words: int32 [M, q_length, ceil(k_length / 32)], M = 1 (shared by the batch) or B; word w of a row holds the
            keys 32w..32w+31, key j at bit j % 32. Made on first use for the named kinds.
    """

    def __init__(
        self,
        kind: str,
        q_length: int,
        k_length: int,
        words: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.kind = kind
        self.q_length = q_length
        self.k_length = k_length
        self.device = words.device if words is not None else torch.device(device or "cpu")
        self._words = words
        self._derived: dict[object, Tensor] = {}  # what kernels read instead of the words, made once

    # --- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def causal(cls, length: int, *, device: torch.device | str | None = None) -> AttentionMask:
        """Key k is allowed for query q where k <= q."""
        check_int("length", length, 0, 2**31 - 1)
        return cls("causal", length, length, device=device)

    @classmethod
    def full(
        cls, q_length: int, k_length: int | None = None, *, device: torch.device | str | None = None
    ) -> AttentionMask:
        """Every key is allowed."""
        k_length = q_length if k_length is None else k_length
        check_int("q_length", q_length, 0, 2**31 - 1)
        check_int("k_length", k_length, 0, 2**31 - 1)
        return cls("full", q_length, k_length, device=device)

    @classmethod
    def annealed(
        cls,
        length: int,
        attn_mask_ratio: float | Tensor,
        *,
        seed: int | Tensor,
        step: int | Tensor = 0,
        device: torch.device | str | None = None,
    ) -> AttentionMask:
        """causal OR Bernoulli(attn_mask_ratio), keyed by (seed, step, q, k): attention-mask annealing.

        One draw is shared by batch, heads and layers. A number of 0 gives ``causal`` and 1 gives ``full`` exactly; a
        tensor (for CUDA graphs and torch.compile) gives bits that say the same.

        Args:
            length: queries and keys.
            attn_mask_ratio: in [0, 1], or float32 [1] on the device.
            seed, step: ints, or int64 [1] on the device.

        Source: Gong et al., "Scaling Diffusion Language Models via Adaptation from Autoregressive Models" (ICLR 2025).
        """
        check_int("length", length, 0, 2**31 - 1)
        if isinstance(attn_mask_ratio, Tensor):
            device = attn_mask_ratio.device
        else:
            check_range("attn_mask_ratio", attn_mask_ratio, 0.0, 1.0)
            if attn_mask_ratio == 0:
                return cls.causal(length, device=device)
            if attn_mask_ratio == 1:
                return cls.full(length, device=device)
        device = torch.device(device or "cpu")
        words = _backend("annealed_mask", device).annealed_mask(
            length,
            as_scalar_tensor("attn_mask_ratio", attn_mask_ratio, torch.float32, device),
            as_scalar_tensor("seed", seed, torch.int64, device),
            as_scalar_tensor("step", step, torch.int64, device),
        )
        return cls("bits", length, length, words)

    @classmethod
    def block_causal(cls, block_ids: Tensor, key_block_ids: Tensor | None = None) -> AttentionMask:
        """Key k is allowed for query q where id[k] <= id[q]; ids int64 [L] or [B, L], in any order.

        Block diffusion, prefix-LM and chunks are ids.
        """
        return cls._from_ids(block_ids, key_block_ids, exact=False)

    @classmethod
    def documents(cls, document_ids: Tensor, key_document_ids: Tensor | None = None) -> AttentionMask:
        """Key k is allowed for query q of the same document; ids int64 [L] or [B, L]."""
        return cls._from_ids(document_ids, key_document_ids, exact=True)

    @classmethod
    def two_streams(cls, block_ids: Tensor) -> AttentionMask:
        """[noised | clean] of a sequence, ids int64 [L] or [B, L] of its blocks: the training mask of block diffusion.

        For 2 L queries and keys: a noised query sees the noised keys of its block and the clean ones of lower blocks; a
        clean query the clean ones of its and lower blocks. ids are at least 0.

        Source: Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models"
        (BD3-LM, ICLR 2025): M_BD, M_OBC and M_BC.
        """
        check_tensor("block_ids", block_ids, torch.int64)
        clean = 2 * block_ids + 1  # odd, so that the even id of a noised query lies below its own block's clean keys
        nothing = torch.full_like(block_ids, 2**62)
        before = cls.block_causal(torch.cat([2 * block_ids, clean], dim=-1), torch.cat([nothing, clean], dim=-1))
        within = cls.documents(torch.cat([block_ids, nothing], dim=-1), torch.cat([block_ids, -nothing], dim=-1))
        return before | within

    @classmethod
    def _from_ids(cls, query_ids: Tensor, key_ids: Tensor | None, exact: bool) -> AttentionMask:
        key_ids = query_ids if key_ids is None else key_ids
        ids = []
        for name, value in (("ids", query_ids), ("key ids", key_ids)):
            value = value[None] if isinstance(value, Tensor) and value.dim() == 1 else value
            check_tensor(name, value, torch.int64, ("B", "L"))
            ids.append(value)
        if ids[0].shape[0] != ids[1].shape[0]:
            raise ValueError(f"ids and key ids must have one batch size, got {ids[0].shape[0]} and {ids[1].shape[0]}")
        words = _backend("id_mask", ids[0].device).id_mask(*ids, exact)
        return cls("bits", ids[0].shape[1], ids[1].shape[1], words)

    @classmethod
    def from_dense(cls, allowed: Tensor) -> AttentionMask:
        """From bool [Lq, Lk] or [M, Lq, Lk], True where attention is allowed; M = 1 or B."""
        allowed = allowed[None] if isinstance(allowed, Tensor) and allowed.dim() == 2 else allowed
        check_tensor("allowed", allowed, torch.bool, ("M", "Lq", "Lk"))
        words = _backend("pack_mask", allowed.device).pack_mask(allowed)
        return cls("bits", allowed.shape[1], allowed.shape[2], words)

    # --- use ---------------------------------------------------------------------------------------------------------

    @property
    def words(self) -> Tensor:
        """int32 [M, q_length, ceil(k_length / 32)]."""
        if self._words is None:
            if self.kind == "causal":
                position = torch.arange(self.q_length, device=self.device)[None]
                self._words = _backend("id_mask", self.device).id_mask(position, position, False)
            else:
                zeros = [
                    torch.zeros(1, n, dtype=torch.int64, device=self.device) for n in (self.q_length, self.k_length)
                ]
                self._words = _backend("id_mask", self.device).id_mask(*zeros, True)
        return self._words

    @property
    def n_masks(self) -> int:
        """1 (shared by the batch) or B."""
        return 1 if self._words is None else self._words.shape[0]

    def to_dense(self) -> Tensor:
        """bool [M, q_length, k_length]."""
        return _backend("unpack_mask", self.device).unpack_mask(self.words, self.k_length)

    def fragments(self, transpose: bool = False) -> Tensor:
        """The bits as Hopper's attention kernels read them, in the order of a thread's accumulators; made once.

        int32 [M, ceil(rows / 64), ceil(columns / 128), 128, 2], rows = queries and columns = keys, or the reverse with
        ``transpose``. In each 64 x 128 tile, bit i = c + 2r + 4v of the 64 of thread 32w + l is row 16w + l/4 + 8r and
        column 8v + 2(l % 4) + c. Bits past the last query or key are 0. (A mask made outside a CUDA graph: use it once,
        backward too, before the capture. What is first made inside holds nothing until the graph has been replayed.)
        """
        if transpose not in self._derived:
            backend = _backend("fragment_mask", self.device)
            self._derived[transpose] = backend.fragment_mask(self.words, self.k_length, transpose)
        return self._derived[transpose]

    def tile_classes(self, rows: int, cols: int) -> Tensor:
        """What each tile of rows x cols holds: uint8 [M, ceil(q_length / rows), ceil(k_length / cols)]; made once.

        0: nothing is allowed, 1: everything is, 2: some of it. Tiles at the ends count their real entries only.
        """
        check_int("rows", rows, 1, 2**31 - 1)
        check_int("cols", cols, 1, 2**31 - 1)
        if (rows, cols) not in self._derived:
            backend = _backend("mask_tile_classes", self.device)
            self._derived[rows, cols] = backend.mask_tile_classes(self.words, self.k_length, rows, cols)
        return self._derived[rows, cols]

    def to(self, device: torch.device | str) -> AttentionMask:
        """The same mask on another device."""
        words = None if self._words is None else self._words.to(device)
        return AttentionMask(self.kind, self.q_length, self.k_length, words, device)

    def _check_combines(self, other: AttentionMask) -> None:
        if not isinstance(other, AttentionMask):
            raise TypeError(f"masks combine with masks, got {type(other).__name__}")
        same_lengths = (self.q_length, self.k_length) == (other.q_length, other.k_length)
        if not same_lengths or (self.n_masks != other.n_masks and 1 not in (self.n_masks, other.n_masks)):
            raise ValueError(f"masks must have one shape, or one mask for all, got {self!r} and {other!r}")

    def __and__(self, other: AttentionMask) -> AttentionMask:
        self._check_combines(other)
        return AttentionMask("bits", self.q_length, self.k_length, self.words & other.words)

    def __or__(self, other: AttentionMask) -> AttentionMask:
        self._check_combines(other)
        return AttentionMask("bits", self.q_length, self.k_length, self.words | other.words)

    def __repr__(self) -> str:
        return f"AttentionMask({self.kind}, [{self.n_masks}, {self.q_length}, {self.k_length}], {self.device})"
