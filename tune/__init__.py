"""Sweeps: a space of settings, a scheduler that stops what is not worth its tokens, and the best trial registered as a candidate.

Knows Ray Tune. Does not know torch, vLLM or how an adapter is trained: `train` does.
"""
