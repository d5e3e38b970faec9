"""The engine behind an OpenAI-compatible endpoint, and adapters by their names in the registry.

Knows vLLM, Ray Serve and HTTP. Does not know PEFT, datasets or how an adapter was made.
"""
