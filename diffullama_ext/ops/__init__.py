# SPDX-License-Identifier: Apache-2.0
"""Typed access to ``torch.ops.diffullama``: fake kernels and autograd for the schemas of ``csrc/library.cpp``.

The submodules register against schemas that the compiled library defines, so they are imported only when it is loaded.
"""

from .._library import SCHEMAS_LOADED, find_kernels

if SCHEMAS_LOADED:
    from . import attention, attention_mask, noising, shifted_cross_entropy, unmasking

    find_kernels()
    __all__ = ["attention", "attention_mask", "noising", "shifted_cross_entropy", "unmasking"]
