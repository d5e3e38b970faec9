"""A Gradio page that talks to the endpoint, for teams that build their own on Gradio.

Gradio is an optional extra. Knows the endpoint as any client does. The page at `/` needs none of this.
"""

import os
from typing import Any

from configs.errors import ClusterError
from configs.schema import ChatbotConfig
from serve.deploy import endpoint

LOOPBACK = "127.0.0.1"
# Gradio would tell its makers of each start, and look for newer versions of itself.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}


def run_ui(config: ChatbotConfig) -> None:
    """Show the page on loopback until it is stopped; the key is that of OpenAI's clients, OPENAI_API_KEY.

    Raises:
        ClusterError: Gradio is not installed.
    """
    make_page(config).launch(server_name=LOOPBACK, share=False)


def make_page(config: ChatbotConfig) -> Any:
    """Return the page, to launch or to build on.

    Raises:
        ClusterError: Gradio is not installed.
    """
    os.environ.update(QUIET)
    try:
        import gradio
    except ImportError as error:
        remedy = ".venv/bin/uv pip install --python .venv/bin/python 'gradio>=6'"
        raise ClusterError("the page needs gradio, which is an optional extra", str(error), remedy) from None
    token = os.environ.get("OPENAI_API_KEY", "none")
    chatbot = gradio.Chatbot(scale=1, buttons=["copy"])  # without the one that shares a conversation with the world
    return gradio.load_chat(endpoint(config), config.name, token=token, file_types=None, chatbot=chatbot, title=config.name)
