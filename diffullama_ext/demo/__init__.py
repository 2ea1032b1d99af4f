# SPDX-License-Identifier: Apache-2.0
"""The main job in minutes: an autoregressive model becomes a masked diffusion model, on text that Python carries."""

from .config import DemoConfig
from .pipeline import DemoRun, run_demo
from .run_directory import check_replaceable, write_run

__all__ = ["DemoConfig", "DemoRun", "check_replaceable", "run_demo", "write_run"]
