"""Cards and pools, Ray sessions, base models on disk, and MLflow as record of runs and registry.

Does not know prompts, HTTP routes or losses.
"""
