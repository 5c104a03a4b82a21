"""The CUDA implementation of `scoresde.ops`: a source file, what compiles and loads it, and what launches it.

`use("off")`, `using("require")`, `mode()` and `why_not(device)` choose and explain whether it runs: `noise/switch.py`.
"""

from ..noise.switch import enabled, mode, use, using, why_not

__all__ = ["enabled", "mode", "use", "using", "why_not"]
