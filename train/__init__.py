"""Base model plus adapter: the step, checkpoints, and the Ray Train job around them.

Does not know serving, vLLM or sweeps; a finished adapter goes to the registry, and that is all that serving sees of it.
"""
