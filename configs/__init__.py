"""Every setting of Tandem: one schema, YAML files that say only what differs, and clear errors.

Knows names, types, units, bounds and defaults. Does not know Ray, torch, vLLM or MLflow: a config is checked anywhere, in milliseconds.
"""
