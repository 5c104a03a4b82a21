"""The CUDA implementation of `scoresde.ops`: a source file, what compiles and loads it, and what launches it."""
