"""Conversations: formats, checks, chat template and loss mask, splits, and synthesis from seed facts.

Does not know adapters, Ray or serving.
"""
