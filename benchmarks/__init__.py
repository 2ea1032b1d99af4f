# SPDX-License-Identifier: Apache-2.0
"""Every op beside what an engineer would write in eager PyTorch, on the same inputs in one run."""
